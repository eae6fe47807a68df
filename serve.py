"""A page to play on: a server of this machine, for a browser and for other programs.

    python serve.py --model tiny

prints an address, and opens the browser there. GUIDE.md tells what can be asked of it.
Needs worker.py, tasks.py, takes.py, and page.html, which is the page, with what these
need beside it.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import json
import re
import secrets
import select
import socket
import sys
import threading
import webbrowser
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import mlx.core as mx

import magnet
from hub import BESIDE, MAGNETS, MODELS, follows, local
from lines import own_settings
from models import missing
from takes import Take, Takes
from tasks import Generate, read_order
from worker import LAST, Refused, Ticket, Worker

PAGE = Path(__file__).with_name("page.html")
BODY = 64 * 2**20  # bytes at most
PATIENCE = 15.0  # seconds without a byte
LOOK = 0.5  # seconds between two looks whether the client is still there


class Request(BaseHTTPRequestHandler):
    """A request, and the ways to answer it."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "musicgen", ""
    timeout = PATIENCE

    def handle_any(self) -> None:
        self.id, self.answered = secrets.token_hex(8), False
        try:
            self._dispatch()
        except Refused as error:
            self.error(error.status, str(error))
        except KeyError as error:
            self.error(404, f"There is no take {error.args[0]!r:.80}.")
        except (ValueError, TypeError, OverflowError) as error:
            self.error(getattr(error, "status", 400), str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except OSError as error:
            self.error(507, str(error))

    do_GET = do_POST = do_DELETE = do_HEAD = do_PUT = do_OPTIONS = handle_any

    def _dispatch(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        words = [unquote(word) for word in parts.path.split("/")]
        known = False
        for route in ROUTES:
            found = match(route.path, words)
            known = known or found is not None
            if found is not None and route.method == self.command:
                return route.answer(self, **found)
        status = 405 if known else 404
        raise Refused(status, f"There is no {self.command} {parts.path:.80}.")

    def form(self) -> tuple[dict[str, Any], dict[str, Path]]:
        """The fields of the body, and its files."""
        length = int(self.headers.get("Content-Length") or 0)
        if length > BODY:
            self.close_connection = True
            raise Refused(413, f"The body must have at most {BODY} bytes.")
        try:
            fields = json.loads(self.rfile.read(length) or b"{}")
        except ValueError as error:
            raise Refused(400, f"The body is no JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise Refused(400, "The body must be an object of JSON.")
        return fields, {}

    def begin(self, status: int, kind: str, length: int | None, **more: str) -> None:
        """Status and headers; without a length the body goes in chunks."""
        self.answered = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("X-Request-Id", self.id)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def bytes(self, data: bytes, kind: str, status: int = 200, **more: str) -> None:
        self.begin(status, kind, len(data), **more)
        self.wfile.write(data)

    def json(self, told: Any, status: int = 200, **more: str) -> None:
        data = json.dumps(told).encode()
        self.bytes(data, "application/json", status, **more)

    def error(self, status: int, message: str) -> None:
        """A sentence, unless something was answered already."""
        if self.answered:
            self.close_connection = True
            return
        more = dict(Retry_After="10") if status == 503 else {}
        self.json({"error": message}, status, **more)

    def chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end_chunks(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def events(self, ticket: Ticket):
        """The events of a ticket, which is cancelled when the client goes."""
        try:
            while True:
                event = ticket.next(LOOK)
                if self.is_gone():
                    raise ConnectionError("The client is gone.")
                if event:
                    yield event
                    if event.name in LAST:
                        return
        finally:
            if not ticket.ended.is_set():
                ticket.cancel()

    def log_message(self, *_) -> None:
        """Nothing: what is made is told by the page."""

    def send_error(self, code: int, message: str | None = None, *_) -> None:
        self.id, self.answered = secrets.token_hex(8), False
        self.close_connection = True
        self.error(code, f"{message or 'It cannot be answered'}.")


# Answers


def page(request: Request) -> None:
    text = (
        PAGE.read_bytes()
        if PAGE.is_file()
        else b"<!doctype html><title>MusicGen</title>"
    )
    request.bytes(text, "text/html; charset=utf-8")


def health(request: Request) -> None:
    worker = request.server.worker
    told = dict(status="ok", model=worker.name, loading=worker.loading)
    request.json(told | dict(queue=worker.waiting, busy=worker.busy))


def list_models(request: Request) -> None:
    server, names = request.server, [*MODELS]
    if server.model not in names:
        names.insert(0, server.model)
    request.json({"data": [describe_model(name, server.worker.name) for name in names]})


def describe_model(name: str, loaded: str | None) -> dict[str, Any]:
    here = local(name) is not None or name in MODELS and missing(name) == 0
    told = dict(id=name, object="model", loaded=name == loaded, local=here)
    return told | dict(kind=kind(name), duration=own_settings(name).get("duration"))


def kind(name: str) -> str:
    """What a model follows or makes, in a word."""
    if "magnet" in name:
        return "magnet"
    return follows(name) or ("sound" if name.startswith("audio") else "text")


def list_takes(request: Request) -> None:
    request.json({"takes": [take.as_json() for take in request.server.takes.every()]})


def get_take(request: Request, id: str) -> None:
    takes = request.server.takes
    stem, dot, suffix = id.rpartition(".")
    try:
        return request.json(takes.find(id).as_json())
    except KeyError:
        take = takes.find(stem)
    if suffix == "json":
        return request.json(take.as_json())
    if dot + suffix == take.path.suffix:
        return request.bytes(take.path.read_bytes(), "audio/wav")
    raise KeyError(id)


def generate(request: Request) -> None:
    """Takes of a prompt."""
    server = request.server
    order = read_order(*request.form(), server.model, server.most_seconds)
    task = Generate(server.takes, order)
    task.check()
    answer(request, task, order.stream, order.takes)


def answer(request: Request, task: Any, stream: str, takes: int = 1) -> None:
    """Do it, and tell of it in the way that was asked for."""
    ticket = request.server.worker.submit(task, request.id)
    if stream == "events":
        return answer_events(request, ticket)
    if stream == "wav":
        return answer_stream(request, ticket)
    made, error = [], None
    for event in request.events(ticket):
        if event.name == "take":
            made.append(event.data)
        elif event.name == "error":
            raise Refused(event.data["status"], event.data["error"])
    if takes > 1:
        return request.json({"takes": made})
    if not made:
        raise Refused(409, "It was cancelled before anything was made.")
    data = server_file(request, made[0])
    more = {"X-Take-Id": quote(made[0]["id"]), "X-Seed": str(made[0]["seed"])}
    request.bytes(data, "audio/wav", **more)


def server_file(request: Request, take: dict[str, Any]) -> bytes:
    return request.server.takes.find(take["id"]).path.read_bytes()


def answer_events(request: Request, ticket: Ticket) -> None:
    request.begin(200, "text/event-stream", None, Cache_Control="no-store")
    for name, data in request.events(ticket):
        if name == "header":
            continue
        if name == "audio":
            data = {"data": base64.b64encode(data["data"]).decode()}
        if name == "error":
            data = {"error": data["error"]}
        request.chunk(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
    request.end_chunks()


def answer_stream(request: Request, ticket: Ticket) -> None:
    more = {}
    for name, data in request.events(ticket):
        if name == "start":
            more = {"X-Take-Id": quote(data["id"]), "X-Seed": str(data["seed"])}
        elif name == "header":
            request.begin(200, "audio/wav", None, **more)
            request.chunk(data["data"])
        elif name == "audio":
            request.chunk(data["data"])
        elif name == "error":
            raise Refused(data["status"], data["error"])
    request.end_chunks()


def delete_take(request: Request, id: str) -> None:
    request.server.takes.delete(id)
    request.json({"deleted": id})


def star_take(request: Request, id: str) -> None:
    fields, _ = request.form()
    request.json(request.server.takes.star(id, bool(fields.get("starred"))).as_json())


def cancel(request: Request, id: str) -> None:
    if not request.server.worker.cancel(id):
        raise Refused(404, f"There is no request {id!r:.40} under way.")
    request.json({"cancelled": id})


class Route:
    """What answers a method and a path, in which a word in braces is any."""

    def __init__(self, method: str, path: str, answer):
        self.method, self.path, self.answer = method, path.split("/"), answer


def match(path: list[str], words: list[str]) -> dict[str, str] | None:
    """The words in the braces of a path, or None where it is another."""
    if len(path) != len(words):
        return None
    pairs = [*zip(path, words)]
    if any(own != word and not own.startswith("{") for own, word in pairs):
        return None
    return {own[1:-1]: word for own, word in pairs if own.startswith("{")}


ROUTES = [
    Route("GET", "/", page),
    Route("GET", "/health", health),
    Route("GET", "/v1/models", list_models),
    Route("POST", "/v1/audio/music-generations", generate),
    Route("GET", "/takes", list_takes),
    Route("GET", "/takes/{id}", get_take),
    Route("DELETE", "/takes/{id}", delete_take),
    Route("POST", "/takes/{id}/star", star_take),
    Route("POST", "/cancel/{id}", cancel),
]


class Server(ThreadingHTTPServer):
    """The server, with the worker and the folder of takes that its answers use."""

    daemon_threads, block_on_close = True, False
    request_queue_size = 128

    def __init__(self, args: argparse.Namespace):
        self.model, self.most_seconds = args.model, args.max_seconds
        self.takes = Takes(args.takes_dir)
        dtype = getattr(mx, args.dtype) if args.dtype else None
        load = partial(magnet.load, dtype=dtype, q_bits=args.q_bits)
        self.worker = Worker(load, args.queue)
        super().__init__((args.host, args.port), Request)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a page to make music on.")
    add = parser.add_argument
    add("--model", default="small", help="taken where none is named")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--no-open", action="store_true", help="open no browser")
    add("--takes-dir", default="takes")
    add("--max-seconds", type=float, default=600.0)
    add("--queue", type=int, default=100)
    add("--dtype", choices=["float16", "bfloat16", "float32"])
    add("--q-bits", type=int)
    return parser.parse_args(argv)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parse_arguments(sys.argv[1:])
    server = Server(args)
    address = f"http://{args.host}:{server.server_port}/"
    print(address, flush=True)
    if not args.no_open:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.worker.close()


if __name__ == "__main__":
    main()
