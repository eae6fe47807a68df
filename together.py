"""Processes of mlx.launch that end together, and at once where a signal says so.

    with signals_at_once():
        peers = Peers(mx.distributed.init())
    with peers.watched("another process has ended"):
        ...  # MLX waits for the others here

MLX waits for another process without end, even for one that is gone, and Python handles
no signal meanwhile. So a thread watches a connection to the others, and the launcher.
Stands alone.
"""

import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ADDRESSES = 8  # of a machine, at most
PATIENCE = 5.0  # seconds for a connection


@contextmanager
def signals_at_once() -> Iterator[None]:
    """Signals end the process, whatever it is doing, and not when Python may run."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Peers:
    """Connections to the other processes of a group: of the first one to each."""

    def __init__(self, group: mx.distributed.Group):
        self._parent = os.getppid()
        self._links: list[socket.socket] = []
        if group.size() > 1:
            self._connect(group)

    def _connect(self, group: mx.distributed.Group) -> None:
        """The first process listens, and tells the others where."""
        first, token = group.rank() == 0, secrets.randbits(31)
        with socket.create_server(("", 0)) if first else socket.socket() as server:
            told = [server.getsockname()[1], token, *own_addresses()] if first else []
            told = mx.array(told + [0] * (2 + ADDRESSES - len(told)), mx.int32)
            port, token, *addresses = mx.distributed.all_sum(told, group=group).tolist()
            secret = token.to_bytes(4, "big")
            if first:
                self._links = accept(server, group.size() - 1, secret)
            else:
                self._links = call(addresses, port, secret)
        for link in self._links:
            keep_alive(link)

    @contextmanager
    def watched(self, message: str) -> Iterator[None]:
        """While it lasts, the end of a process or of the launcher ends this one, with a
        message. One that leaves in good order is no end."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(message, done), daemon=True)
        watch.start()
        with signals_at_once():
            yield
        done.set()
        self.leave()

    def leave(self) -> None:
        """Say that this process ends in good order."""
        for link in self._links:
            try:
                link.sendall(b".")
            except OSError:  # it is gone, too
                pass

    def _watch(self, message: str, done: threading.Event) -> None:
        links = list(self._links)
        while not done.is_set():
            if os.getppid() != self._parent:
                end_with("mlx.launch has ended, and so does this process.")
            readable = select.select(links, [], [], 1.0)[0]
            for link in readable:
                if not received(link):
                    if not done.is_set():
                        end_with(message)
                links.remove(link)


def received(link: socket.socket) -> bool:
    """Whether the other one said that it leaves; else it is gone."""
    try:
        return link.recv(1) == b"."
    except OSError:
        return False


def end_with(message: str) -> None:
    """End the process, whatever its threads wait for."""
    try:
        program = os.path.basename(sys.argv[0])
        os.write(2, f"\n{program}: error: {message}\n".encode())
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # nothing after it, of whatever else still runs
            os.dup2(silent, stream)
        time.sleep(0.2)  # MLX 0.32.3's launcher reads only what lives
    except OSError:  # nobody reads it
        pass
    os._exit(1)


def own_addresses() -> list[int]:
    """This machine's IPv4 addresses as numbers; the one for itself comes first."""
    found = ["127.0.0.1"]
    try:
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses a way out
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    numbers = [socket.inet_aton(address) for address in dict.fromkeys(found)]
    return [int.from_bytes(n, "big", signed=True) for n in numbers][:ADDRESSES]


def accept(server: socket.socket, count: int, secret: bytes) -> list[socket.socket]:
    """Connections of so many others that know the secret; fewer, where they do not
    come."""
    links = []
    server.settimeout(2 * PATIENCE)
    try:
        while len(links) < count:
            link, _ = server.accept()
            link.settimeout(PATIENCE)
            if link.recv(len(secret)) == secret:
                link.sendall(b"!")
                links.append(link)
    except OSError:
        pass
    return links


def call(addresses: list[int], port: int, secret: bytes) -> list[socket.socket]:
    """A connection to the first process at one of its addresses, if there is any."""
    for number in filter(None, addresses):
        address = socket.inet_ntoa(number.to_bytes(4, "big", signed=True))
        try:
            link = socket.create_connection((address, port), PATIENCE / 2)
            link.sendall(secret)
            if link.recv(1) == b"!":
                return [link]
        except OSError:
            continue
    return []


def keep_alive(link: socket.socket) -> None:
    """A machine that is gone without a word is found out within half a minute."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", 0x10))
    for option, value in ((idle, 10), (socket.TCP_KEEPINTVL, 5)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
