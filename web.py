"""A request over HTTP, read with patience that ends, and the ways to answer it.

    class Mine(Request):
        def answer(self):
            self.json({"path": self.words})

    Server(("127.0.0.1", 8000), Mine).serve_forever()

Whatever `answer` raises becomes a status and a sentence: `{"error": "It is full."}`. A
client that sends or takes nothing for long is left, and only so many are heard at once.
Needs forms.py, messages.py and strict.py beside it.
"""

import io
import json
import re
import secrets
import select
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from forms import Form, read_form
from messages import one_line

BODY = 64 * 2**20  # bytes of a body, at most
PATIENCE = 15.0  # seconds without a byte
HEADERS = 30.0  # seconds for all headers
LEFT = 3.0  # seconds for which the rest of an unwanted body is read
MOST = 200  # connections at once
PIECE = 2**16  # bytes that are sent at once
RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")
EXTRA = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Patient(io.RawIOBase):
    """What a client sends, until it is too slow: then TimeoutError is raised. `until` is
    the time by which all must be there."""

    def __init__(self, connection: socket.socket):
        self._connection, self.until = connection, inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("It came too slowly.")
        self._connection.settimeout(min(PATIENCE, left))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(PATIENCE)


class Request(BaseHTTPRequestHandler):
    """A request of a client. A class of one's own has `answer`, which ends with `json`,
    `file` or `send_whole`, or `begin` and then `chunk`. `words` are its path's, between
    the slashes, `query` is what stands after the question mark, and `id` is made for it
    here."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "musicgen", ""
    timeout = PATIENCE
    command, request_version, requestline = None, "HTTP/1.1", ""
    _folder: tempfile.TemporaryDirectory | None = None

    # How it is heard

    def setup(self) -> None:
        super().setup()
        self._patient = Patient(self.connection)
        self.rfile = io.BufferedReader(self._patient, PIECE)

    def handle_one_request(self) -> None:
        self.id, self.words, self.query = secrets.token_hex(8), [], {}
        self._answered, self._unread, self._names = False, False, {}
        try:
            self._patient.until = inf
            if not self.rfile.peek(1):  # the client has closed
                self.close_connection = True
                return
        except OSError:  # too slow, too
            self.close_connection = True
            return
        try:
            if self._read_headers():
                self._reply()
        except OSError:  # there is nobody to be answered
            self.close_connection = True
        finally:
            self.hand_over()()

    def _read_headers(self) -> bool:
        """Read the request's line and headers. Returns whether to answer."""
        self._patient.until = time.monotonic() + HEADERS
        try:
            self.raw_requestline = self.rfile.readline(2**16 + 1)
            if len(self.raw_requestline) > 2**16:
                self.send_error(414, "The path is too long.")
                return False
            parsed = self.parse_request()
        except TimeoutError:
            self.send_error(408, "The headers came too slowly.")
            return False
        self._patient.until = inf
        return parsed and self.request_version != "HTTP/0.9"

    def _reply(self) -> None:
        self._unread = self.headers.get("Transfer-Encoding") is not None
        self._unread |= self.headers.get("Content-Length", "0") != "0"
        try:
            parts = urlsplit(self.path)
            self.query = parse_qs(parts.query)
            self.words = [unquote(word) for word in parts.path.split("/")[1:]]
            self.answer()
        except ConnectionError:
            self.close_connection = True
        except Exception as error:
            self.fail(error)
        if self._unread:
            self._drain()

    def handle_expect_100(self) -> bool:
        """A body that is too long is not asked for."""
        if int_or(self.headers.get("Content-Length"), 0) > BODY:
            self.send_error(413, f"The body must have at most {BODY} bytes.")
            return False
        return super().handle_expect_100()

    def _drain(self) -> None:
        """Read what nobody wants, for LEFT seconds: where a connection is closed while the
        client still sends, it is reset, and the answer may be lost."""
        self.close_connection, self._patient.until = True, time.monotonic() + LEFT
        self.connection.shutdown(socket.SHUT_WR)
        while self.rfile.read1(PIECE):
            pass

    def form(self) -> Form:
        """The fields and files of the body. Raises forms.BadRequest."""
        if not self._unread and "Content-Type" not in self.headers:
            return Form()
        self._folder = tempfile.TemporaryDirectory(prefix="musicgen-")
        form = read_form(self.rfile, self.headers, self._folder.name, BODY)
        self._unread = False
        for key, path in form.files.items():
            converted = path.with_name(f"{path.stem}-converted.wav")  # as audio.py says
            self._names |= {str(converted): converted.name.partition("-")[2]}
            self._names |= {str(path): form.names[key]}
        return form

    def hand_over(self) -> Callable[[], None]:
        """A function that removes the files of the form. From now on they stay until it
        is called; else they go with the request."""
        folder, self._folder = self._folder, None
        return folder.cleanup if folder else lambda: None

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # How it is answered

    def begin(self, status: int, kind: str, length: int | None, **more: Any) -> None:
        """Status and headers, of which `more` are spelled with `_`. Without a length the
        body goes in chunks."""
        self._answered = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self._chunks = length is None and self.request_version != "HTTP/1.0"
        if length is None and not self._chunks:  # it ends with the connection
            self.close_connection = True
        elif length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        if self._unread or self.close_connection:
            self.close_connection = True
            self.send_header("Connection", "close")
        headers = {"X-Request-Id": self.id} | EXTRA
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send(self, data: bytes) -> None:
        """A piece of the body. Raises TimeoutError where the client takes nothing."""
        if self.command != "HEAD":
            for start in range(0, len(data), PIECE):
                self.wfile.write(data[start : start + PIECE])

    def send_whole(
        self, data: bytes, kind: str, status: int = 200, **more: Any
    ) -> None:
        """A whole answer."""
        self.begin(status, kind, len(data), **more)
        self.send(data)

    def json(self, value: Any, status: int = 200, **more: Any) -> None:
        """A whole answer in JSON."""
        self.send_whole(json.dumps(value).encode(), "application/json", status, **more)

    def chunk(self, data: bytes = b"") -> None:
        """A piece of a body that began without a length; the last one is empty."""
        self.send(b"%x\r\n%s\r\n" % (len(data), data) if self._chunks else data)

    def file(self, path: Path, kind: str) -> None:
        """A file, or the range of it that is asked for. Raises FileNotFoundError."""
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            try:
                start, stop = self._range(size)
            except ValueError:
                more = {"Content-Range": f"bytes */{size}"}
                return self.json({"error": "There is no such range."}, 416, **more)
            more = dict(Accept_Ranges="bytes", Cache_Control="no-cache")
            if status := 206 if (start, stop) != (0, size) else 0:
                more["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.begin(status or 200, kind, stop - start, **more)
            file.seek(start)
            while start < stop and (data := file.read(min(PIECE, stop - start))):
                self.send(data)
                start += len(data)

    def _range(self, size: int) -> tuple[int, int]:
        """First byte and end. Raises ValueError for a range that is not there; of several
        ranges, or what is none, all is given."""
        match = RANGE.fullmatch(self.headers.get("Range", "").strip())
        if not match or not any(match.groups()):
            return 0, size
        first, last = match.groups()
        if not first:
            start, stop = max(size - int(last), 0), size
        else:
            start, stop = int(first), min(int(last or size) + 1, size)
        if start >= stop:
            raise ValueError("There is no such range.")
        return start, stop

    def fail(self, error: Exception) -> None:
        """Answer what went wrong. What has no `status` is a fault of the server's."""
        status = getattr(error, "status", 500)
        if isinstance(error, TimeoutError):  # the client takes nothing
            status, self._answered = 408, True
        elif status == 500:
            traceback.print_exception(error, file=sys.stderr)
        self.send_error(status, str(error) or type(error).__name__)

    def as_sentence(self, message: str) -> str:
        """A message as a sentence, in which the client's files are called as it calls
        them."""
        for path, name in self._names.items():
            message = message.replace(path, name)
        line = one_line(message)
        return line if line.endswith((".", "?", "!")) else f"{line}."

    def send_error(self, code: int, message: str | None = None, *_) -> None:
        """A sentence, and the end of the connection where something was sent already, or
        not all was heard."""
        if self._answered or self.command is None or code in (408, 414, 431):
            self.close_connection = True
        if not self._answered:
            wait = dict(Retry_After=10) if code == 503 else {}
            sentence = self.as_sentence(message or "It cannot be answered")
            self.json({"error": sentence}, code, **wait)

    def log_message(self, *_) -> None:
        """Nothing: who asked for what stays here."""


def int_or(text: str | None, other: int) -> int:
    """The whole number in a text, or the other one."""
    try:
        return int(text)
    except (TypeError, ValueError):
        return other


class Server(ThreadingHTTPServer):
    """Answers each connection in a thread of its own, of at most `MOST` at once."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Request]):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._room = threading.BoundedSemaphore(MOST)
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # whose name is not looked up
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # no thread can be had
                self._room.release()
        body = b'{"error": "Too many connections: try again later."}'
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        head += b"Retry-After: 10\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        try:
            request.setblocking(False)
            request.send(head % len(body) + body)
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket, client_address: Any
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc(file=sys.stderr)
