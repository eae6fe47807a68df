"""A server with `tiny`, for the tests of what it answers."""

import http.client
import json
import socket
import threading
from pathlib import Path
from typing import Any, NamedTuple

from common import Test

import serve


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_answer(connection: socket.socket, method: str = "GET") -> Answer:
    """The next answer that comes. Raises http.client.HTTPException, or OSError."""
    answer = http.client.HTTPResponse(connection, method=method)
    answer.begin()
    return Answer(answer.status, answer.headers, answer.read())


class ServedTest(Test):
    """In this process, with a folder of takes of its own."""

    flags: tuple[str, ...] = ()

    def setUp(self):
        super().setUp()
        self.takes = self.folder / "takes"
        flags = ["--model", "tiny", "--port", "0", "--no-open", *self.flags]
        flags += ["--takes-dir", str(self.takes)]
        self.server = serve.PageServer(serve.parse_arguments(flags))
        self.port = self.server.server_port
        thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        thread.start()
        self.addCleanup(self.server.plugin.close)
        self.addCleanup(self.server.worker.close)
        self.addCleanup(self.server.server_close)
        self.addCleanup(thread.join)
        self.addCleanup(self.server.shutdown)

    def connect(self, seconds: float = 60.0) -> socket.socket:
        address = ("127.0.0.1", self.port)
        return self.enterContext(socket.create_connection(address, seconds))

    def send(self, raw: bytes, method: str = "GET") -> Answer:
        """What comes for some bytes."""
        with self.connect() as connection:
            connection.sendall(raw)
            return read_answer(connection, method)

    def ask(self, method: str, path: str, fields: Any = None, **headers: str) -> Answer:
        """As any client."""
        body = b"" if fields is None else json.dumps(fields).encode()
        told = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if fields is not None:
            told |= {"Content-Type": "application/json"}
            told |= {"Content-Length": str(len(body))}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{name}: {value}\r\n" for name, value in told.items()]
        head = f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
        return self.send(head.encode() + body, method)

    def files(self) -> list[Path]:
        return sorted(self.takes.glob("*")) if self.takes.is_dir() else []
