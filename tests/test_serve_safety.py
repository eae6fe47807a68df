"""What a server refuses, and that it lives on: strangers' pages, paths, bodies, and those
who send too slowly, too much, or read nothing."""

import contextlib
import io
import json
import shutil
import socket
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO
from unittest.mock import Mock, patch

import numpy as np
from common import ROOT, slow
from served import Answer, ServedTest, read_answer

import serve
import web
from settings import to_comment
from wav_stream import WavStream

GENERATE = "/v1/audio/music-generations"
SHORT = {"prompt": "slow bell", "duration": 0.2, "seed": 1}
KINDS = ("text/plain", "application/x-www-form-urlencoded", "text/plain;json", "")
IDS = (
    *("..", "%2e%2e", "%2e%2e%2f", "..%2fsecret", "..%2F..%2Fetc%2Fpasswd"),
    *(
        "%2fetc%2fpasswd",
        "%2Ftmp",
        "a%00b",
        "%00",
        "..%5csecret",
        "%5c..%5c",
        "....%2f",
    ),
    *("%252e%252e%252fsecret", "..%c0%afsecret", "%ff", "%u002e", ".", "~", "starred"),
    *(".hidden", "*", "%0d%0aX:%20y", "a" * 5000, "bell%2f..%2fbell", "secret"),
)


def next_answer(answers: BinaryIO) -> Answer:
    """Of several in one connection."""
    open_ = Mock(wraps=answers, close=lambda: None)
    return read_answer(SimpleNamespace(makefile=lambda *_: open_))


class SafetyTest(ServedTest):
    """With a take, `bell`, and beside the folder of takes one that is nobody's."""

    def setUp(self):
        self.enterContext(patch.object(web, "PATIENCE", 0.5))
        self.enterContext(patch.object(web, "HEADERS", 1.0))
        self.enterContext(patch.object(web, "LEFT", 0.5))
        super().setUp()
        self.takes.mkdir()
        self.secret, self.bell = self.folder / "secret.wav", self.takes / "bell.wav"
        self.make(self.secret, 0.1)
        self.make(self.bell, 0.1)
        self.before = self.contents()

    def make(self, path, seconds: float) -> None:
        comment = to_comment(dict(prompt="bell", seed=1, model="tiny"))
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (int(32000 * seconds), 1))
        with open(path, "wb") as file:
            WavStream(file, 1, 32000, comment).write(noise)

    def contents(self) -> dict[str, bytes]:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in paths}

    def assert_refused(self, answer: Answer, *statuses: int) -> None:
        self.assertIn(answer.status, statuses, answer.body[:200])
        self.assertEqual(answer.headers["Content-Type"], "application/json")
        self.assertEqual([*answer.json], ["error"])
        error = answer.json["error"]
        self.assertRegex(error, r"[.?]$")
        self.assertLess(len(error), 500)
        for word in ("\n", "Traceback", str(self.folder)):
            self.assertNotIn(word, error)

    def assert_lives(self) -> None:
        """Nothing has changed, nobody is heard any more, and takes are made."""
        self.assertEqual(self.contents(), self.before)
        self.wait(lambda: self.server._room._value == web.MOST)
        self.assertEqual(self.ask("GET", "/health").json["status"], "ok")
        answer = self.ask("POST", GENERATE, SHORT)
        self.assertEqual((answer.status, answer.body[:4]), (200, b"RIFF"))

    def wait(self, ready, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)

    def head(self, line: str, *headers: str) -> bytes:
        """A request's first lines; its Host is right."""
        lines = [line, f"Host: 127.0.0.1:{self.port}", *headers]
        return "\r\n".join([*lines, "", ""]).encode()


class TestWhoMayAsk(SafetyTest):
    def test_by_foreign_names(self):
        port = self.port
        for host in (
            *("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"),
            *("127.0.0.1:1", "127.0.0.1", "localhost", f"x@127.0.0.1:{port}", ""),
            *(f"127.0.0.1:{port}/", f"127.1:{port}", f"2130706433:{port}", "[::1]"),
            *(f"127.0.0.1:{port}, evil.example", f"127.0.0.1:{port}0", "a:b:c", "[]"),
            *(f"localhost.:{port}", f"localhost:{port} x", f"\xff:{port}", "a" * 9000),
        ):
            for method, path in (("GET", "/takes"), ("DELETE", "/takes/bell")):
                answer = self.ask(method, path, Host=host)
                self.assert_refused(answer, 400, 403)
        for lines in ("", f"Host: 127.0.0.1:{port}\r\nHost: evil.example\r\n"):
            for version in ("1.0", "1.1"):
                raw = f"GET /takes HTTP/{version}\r\n{lines}\r\n"
                self.assert_refused(self.send(raw.encode()), 400, 403)
        for host in ("127.0.0.1", "localhost", "LocalHost", "[::1]"):
            answer = self.ask("GET", "/takes", Host=f"{host}:{port}")
            self.assertEqual(answer.status, 200, host)
        self.assert_lives()

    def test_from_foreign_pages(self):
        port = self.port
        for origin in (
            *(
                "http://evil.example",
                "null",
                "",
                f"https://127.0.0.1:{port}",
                "file://",
            ),
            *("http://127.0.0.1", f"http://127.0.0.1:{port}.evil.example", "http://"),
            *(f"http://evil.example:{port}", f"http://127.0.0.1:{port}/", "\xff"),
        ):
            for method, path, fields in (
                ("GET", "/takes", None),
                ("GET", "/takes/bell.wav", None),
                ("POST", GENERATE, SHORT),
                ("POST", "/takes/bell/star", {"starred": True}),
                ("POST", "/api/juce/process_audio", {}),
                ("DELETE", "/takes/bell", None),
            ):
                answer = self.ask(method, path, fields, Origin=origin)
                self.assert_refused(answer, 403)
                self.assertNotIn("Access-Control-Allow-Origin", answer.headers)
        preflight = {"Origin": "http://evil.example"}
        preflight |= {"Access-Control-Request-Method": "DELETE"}
        answer = self.ask("OPTIONS", "/takes/bell", **preflight)
        self.assert_refused(answer, 403, 405, 501)
        self.assertNotIn("Access-Control-Allow-Origin", answer.headers)
        own = f"http://127.0.0.1:{port}"
        self.assertEqual(self.ask("GET", "/takes", Origin=own).status, 200)
        self.assert_lives()

    def test_forms_that_need_no_leave(self):
        """What any page may post to any site without asking."""
        for path in (
            GENERATE,
            "/takes/bell/star",
            "/takes/bell/again",
            "/takes/bell/stems",
        ):
            for kind in KINDS:
                answer = self.ask("POST", path, SHORT, Content_Type=kind)
                self.assert_refused(answer, 415)
        self.assert_lives()

    def test_pages_that_show_ours_within_theirs(self):
        page = self.folder / "page.html"
        page.write_text("<!doctype html><title>A page</title>")
        with patch.object(serve, "PAGE", page):
            headers = self.ask("GET", "/").headers
        self.assertIn("frame-ancestors 'none'", headers["Content-Security-Policy"])
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")


class TestToken(SafetyTest):
    flags = ("--token", "väry-secret")

    def test_of_every_route(self):
        wrong = (
            *("Bearer", "Bearer ", "Bearer wrong", "Basic väry-secret", "väry-secret"),
            *("Bearer \xff", "Bearer väry-secret2", "Bearer v", "a" * 5000),
        )
        for route in serve.ROUTES:
            path = route.path.replace("{id}", "bell").replace("{name}", "drums")
            for query in ("", "?token=", "?token=wrong", "?token=%ff", "?tokens=x"):
                answer = self.ask(route.method, path + query, {})
                self.assert_refused(answer, 401)
            for header in wrong:
                answer = self.ask(route.method, path, Authorization=header)
                self.assert_refused(answer, 401)
        self.assertEqual(self.contents(), self.before)
        answer = self.ask("GET", "/takes?token=v%C3%A4ry-secret")
        self.assertEqual(answer.status, 200)

    def test_of_a_server_for_other_machines(self):
        flags = ["--model", "tiny", "--port", "0", "--no-open", "--host", "0.0.0.0"]
        server = serve.PageServer(serve.parse_arguments(flags))
        self.addCleanup(server.plugin.close)
        self.addCleanup(server.worker.close)
        server.server_close()
        self.assertGreaterEqual(len(server.token), 20)
        self.assertIn(server.token, server.address)
        self.assertIsNone(serve.parse_arguments(["--no-open"]).token)

    def test_an_empty_one_opens_nothing(self):
        """As of an unset variable of a shell: `--token "$TOKEN"`."""
        for token in ("", " ", "\t"):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    serve.parse_arguments(["--host", "0.0.0.0", "--token", token])
            self.assertIn("--token must not be empty", err.getvalue())


class TestPaths(SafetyTest):
    def test_ids(self):
        for route in serve.ROUTES:
            if "{id}" not in route.path:
                continue
            for id in IDS:
                for suffix in ("", ".wav", ".json", ".safetensors"):
                    path = route.path.replace("{id}", id + suffix)
                    path = path.replace("{name}", "drums.wav")
                    fields = {} if route.method == "POST" else None
                    answer = self.ask(route.method, path, fields)
                    self.assert_refused(answer, 400, 404, 405, 414)
        for id in IDS:
            answer = self.ask("GET", f"/takes/bell/stems/{id}")
            self.assert_refused(answer, 400, 404, 405)
        self.assert_lives()

    def test_other_paths(self):
        for path in (
            *("/etc/passwd", "/../secret.wav", "/page.html", "/serve.py", "/takes/"),
            *("//evil.example/", "/takes//bell", "/%2e%2e/secret.wav", "*", "/\xff"),
            *("/takes/bell/../../secret.wav", "/" + "a" * 60_000, "/;", "?", "takes"),
        ):
            answer = self.ask("GET", path.encode().decode("latin-1"))
            self.assert_refused(answer, 400, 404)
        self.assert_lives()

    def test_models_and_files_are_no_paths(self):
        copy = Path(self.enterContext(tempfile.TemporaryDirectory()))
        outside = str(shutil.copytree(ROOT / "tiny", copy / "model"))
        for fields in (
            *({"model": outside}, {"model": "/etc"}, {"model": "../x"}),
            *({"model": "tiny/../tiny"}, {"model": "./tests"}, {"model": "~"}),
            *({"model": "a" * 5000}, {"model": "\0"}, {"model": ["tiny"]}),
            *({"output": "/tmp/x.wav"}, {"melody": str(self.secret)}),
            *({"audio_prompt": str(self.secret)}, {"style": {"path": "/etc/passwd"}}),
            *({"codes_prompt": "x"}, {"adapter": "/etc"}, {"seed": "/etc/passwd"}),
        ):
            with self.subTest(str(fields)[:80]):
                answer = self.ask("POST", GENERATE, SHORT | fields)
                self.assert_refused(answer, 400, 404)
        self.assertIsNone(self.server.worker.name)
        self.assert_lives()


class TestBodies(SafetyTest):
    def declare(self, length: object, *more: str) -> bytes:
        line = f"POST {GENERATE} HTTP/1.1"
        kind = "Content-Type: application/json"
        return self.head(line, kind, f"Content-Length: {length}", *more)

    def test_a_gigabyte_that_is_declared(self):
        for more in ((), ("Expect: 100-continue",)):
            begun = time.monotonic()
            self.assert_refused(self.send(self.declare(2**30, *more), "POST"), 413)
            self.assertLess(time.monotonic() - begun, 5)
        self.assert_lives()

    def test_a_gigabyte_that_is_sent(self):
        """As declared, as less than it is, and as another thing."""
        lies = self.declare(20) + json.dumps({"duration": -1}).encode().ljust(20)
        multipart = "Content-Type: multipart/form-data; boundary=x"
        line = f"POST {GENERATE} HTTP/1.1"
        for begin, statuses in (
            (self.declare(2**30), (413,)),
            (lies, (400,)),
            (self.head("POST /cancel/x HTTP/1.1"), (404,)),
            (self.head(line, multipart, f"Content-Length: {2**25}"), (400,)),
            (self.head(line, multipart, "Transfer-Encoding: chunked"), (411,)),
            (self.head("GET /health HTTP/1.1", f"Content-Length: {2**30}"), (200,)),
        ):
            with self.subTest(begin[:60]):
                tracemalloc.start()
                connection, sent = self.connect(), []
                pour = threading.Thread(
                    target=self.pour, args=(connection, begin, sent)
                )
                pour.start()
                with suppress(OSError, HTTPException):
                    self.assertIn(read_answer(connection, "POST").status, statuses)
                pour.join(30)
                self.assertFalse(pour.is_alive())
                self.wait(lambda: self.server._room._value == web.MOST)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                self.assertLess(peak, 2**24)
        self.assert_lives()

    def pour(self, connection: socket.socket, begin: bytes, sent: list[int]) -> None:
        with suppress(OSError):
            connection.sendall(begin)
            while sum(sent) < 2**30:
                sent.append(connection.send(b"\r\n" + b"x" * 65534))

    def test_lengths_that_are_none(self):
        for length in ("-1", "x", "", "1e9", "5, 6", "0x10", "9" * 5000, "٣", "+5"):
            raw = self.declare(length.encode().decode("latin-1")) + b"{}"
            self.assert_refused(self.send(raw, "POST"), 400, 413, 431)
        twice = self.declare(2, "Content-Length: 3")
        self.assert_refused(self.send(twice + b"{}", "POST"), 400)
        self.assert_lives()

    def test_requests_within_bodies(self):
        """Of which the server would hear, were it to take a body for a request."""
        smuggled = self.head("DELETE /takes/bell HTTP/1.1")
        length = f"Content-Length: {len(smuggled)}"
        chunked = "Transfer-Encoding: chunked"
        for begin in (
            self.head("GET /health HTTP/1.1", length),
            self.head("GET /takes/unknown HTTP/1.1", length),
            self.head("DELETE /takes/unknown HTTP/1.1", length),
            self.head("POST /cancel/x HTTP/1.1", length),
            self.head("FOO / HTTP/1.1", length),
            self.head(f"POST {GENERATE} HTTP/1.1", length, chunked) + b"0\r\n\r\n",
            self.head("GET /health HTTP/1.1", chunked) + b"0\r\n\r\n",
            self.head("GET /health HTTP/1.1", chunked),
            self.declare(2**30),
            self.declare(len(smuggled)),
        ):
            connection = self.connect()
            connection.sendall(begin + smuggled)
            with suppress(OSError):
                while connection.recv(2**16):
                    pass
            self.assertEqual(self.contents(), self.before, begin)
        self.assert_lives()

    def test_bodies_that_end_too_soon(self):
        for begin in (self.declare(1000), self.declare(1000) + b'{"prompt": "a'):
            connection = self.connect()
            connection.sendall(begin)
            connection.shutdown(socket.SHUT_WR)
            self.assert_refused(read_answer(connection, "POST"), 400)
            connection = self.connect()
            connection.sendall(begin)
            connection.close()
        self.assert_lives()


class TestSlow(SafetyTest):
    def drip(self, begin: bytes, piece: bytes, every: float = 0.1) -> bytes:
        """What comes while bytes are sent now and then, until nobody hears them."""
        connection, got = self.connect(), b""
        connection.sendall(begin)
        connection.settimeout(every)
        for _ in range(100):
            try:
                if more := connection.recv(2**16):
                    got += more
                    continue
                if not piece:
                    return got
                time.sleep(every)
            except TimeoutError:
                pass
            except OSError:
                return got
            try:
                connection.send(piece)
            except OSError:
                return got
        self.fail("It is still heard.")

    def test_headers_that_never_end(self):
        for begin, piece in (
            (b"", b"G"),
            (b"GET /health HTTP/1.1\r\n", b"x"),
            (self.head("GET /health HTTP/1.1")[:-2], b"A: b\r\n"),
            (b"GET /health HTTP/1.1\r\n", b""),
        ):
            self.assertIn(b" 408 ", self.drip(begin, piece))
        self.assertEqual(self.drip(b"\r\n", b"\r\n"), b"")
        self.assertEqual(self.drip(b"", b""), b"")
        self.assert_lives()

    def test_bodies_that_never_end(self):
        head = (f"POST {GENERATE} HTTP/1.1", "Content-Length: 5000")
        with patch("forms.SECONDS", 1.0), patch("forms.read_form.__defaults__", (1.0,)):
            for kind, begin in (
                ("application/json", b'{"prompt": "'),
                ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: "),
            ):
                raw = self.head(*head, f"Content-Type: {kind}") + begin
                self.assertIn(b" 408 ", self.drip(raw, b"a"))
                self.assertIn(b" 408 ", self.drip(raw, b""))
        refused = self.head(*head[:1], f"Content-Length: {2**30}")
        for piece in (b"a", b""):
            self.assertRegex(self.drip(refused, piece), rb" 41[35] ")
        self.assert_lives()

    def test_a_hundred_who_say_nothing(self):
        """While others are answered."""
        silent = [self.connect() for _ in range(100)]
        for connection in silent[::2]:
            connection.sendall(b"GET /health HT")
        begun = time.monotonic()
        self.assertEqual(self.ask("GET", "/health").status, 200)
        self.assertLess(time.monotonic() - begun, 5)
        self.wait(lambda: self.server._room._value == web.MOST)
        self.assert_lives()

    def test_who_reads_nothing(self):
        """Of a file, of many answers, and of what is made meanwhile; others' takes come."""
        self.make(self.takes / "long.wav", 200)  # more than sockets hold
        self.before = self.contents()
        get = self.head("GET /takes/long.wav HTTP/1.1")
        fields = SHORT | {"duration": 5, "stream": "events"}
        body = json.dumps(fields).encode()
        post = self.head(
            f"POST {GENERATE} HTTP/1.1",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        )
        for raw in (get, self.head("GET /takes HTTP/1.1") * 500, post + body):
            connection = self.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(raw)
        answer = self.ask("POST", GENERATE, SHORT)
        self.assertEqual(answer.status, 200)
        for path in [*self.takes.glob("slow-bell*")]:
            path.unlink()
        self.assert_lives()


class TestFloods(SafetyTest):
    def test_headers(self):
        for lines in (
            ["A: b"] * 200,
            [f"A: {'b' * 100_000}"],
            [f"A: {'b' * 60_000}"] * 90,
            ["no colon"],
            ["A : b", " folded"],
            ["\0: \0"],
        ):
            connection = self.connect()
            with suppress(OSError, HTTPException):
                connection.sendall(self.head("GET /nothing HTTP/1.1", *lines))
                answer = read_answer(connection)
                self.assert_refused(answer, 400, 404, 431)
        self.assert_lives()

    def test_methods(self):
        for method in (
            "PUT",
            "PATCH",
            "TRACE",
            "CONNECT",
            "OPTIONS",
            "FOO",
            "get",
            "A" * 9000,
        ):
            for path in ("/takes/bell", "/health", GENERATE):
                self.assert_refused(self.ask(method, path), 405, 501)
        for method, path in (("POST", "/takes"), ("DELETE", "/"), ("GET", GENERATE)):
            self.assert_refused(self.ask(method, path), 405)
        head = self.ask("HEAD", "/health")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assert_lives()

    def test_what_is_no_http(self):
        random = np.random.default_rng(0)
        for raw in (
            *(b"GET /takes\r\n", b"GET /takes\r\n\r\n", b"DELETE /takes/bell\r\n\r\n"),
            *(b"GET /takes HTTP/0.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            *(
                b"GET /takes HTTP/9999999999.1\r\n\r\n",
                b"GET /takes HTTP/1.1.1\r\n\r\n",
            ),
            *(
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                b"\0" * 1000,
                b"\r\n" * 99,
            ),
            *(random.bytes(3000) for _ in range(20)),
        ):
            connection, got = self.connect(), b""
            connection.sendall(raw)
            with suppress(OSError):
                while piece := connection.recv(2**16):
                    got += piece
            self.assertNotIn(b" 200 ", got)
            self.assertNotIn(b"bell", got)
        self.assert_lives()

    def test_clients_that_know_no_chunks(self):
        """Of HTTP/1.0, as some proxies: samples come as they are, up to the end."""
        for fields in (SHORT | dict(stream=True), SHORT | dict(stream="events")):
            body = json.dumps(fields).encode()
            line = f"Content-Length: {len(body)}"
            head = self.head(
                f"POST {GENERATE} HTTP/1.0", "Content-Type: application/json", line
            )
            connection = self.connect()
            connection.sendall(head + body)
            with connection.makefile("rb") as answers:
                headers, _, sound = answers.read().partition(b"\r\n\r\n")
            self.assertNotIn(b"chunked", headers)
            self.assertIn(b"Connection: close", headers)
            self.assertIn(sound[:6], (b"RIFF\xff\xff", b"event:"))
            self.assertFalse(sound.endswith(b"0\r\n\r\n"))

    def test_requests_in_a_row(self):
        """In one connection, and all at once."""
        connection = self.connect()
        body = json.dumps(SHORT | {"duration": -1}).encode()
        kind, length = "Content-Type: application/json", f"Content-Length: {len(body)}"
        post = self.head(f"POST {GENERATE} HTTP/1.1", kind, length) + body
        get = self.head("GET /takes/bell HTTP/1.1")
        connection.sendall((get + post) * 10)
        answers = connection.makefile("rb")
        for _ in range(10):
            self.assertEqual(next_answer(answers).json["id"], "bell")
            self.assert_refused(next_answer(answers), 400)
        self.assert_lives()

    def test_a_hundred_at_once(self):
        asked = [("GET", "/health"), ("GET", "/takes"), ("GET", "/takes/bell.wav")]
        asked += [("GET", "/takes/none"), ("GET", "/v1/models")]
        with ThreadPoolExecutor(100) as pool:
            found = [pool.submit(self.ask, *asked[i % 5]) for i in range(100)]
            statuses = [future.result().status for future in found]
        self.assertEqual(statuses, [200, 200, 200, 404, 200] * 20)
        self.assert_lives()

    def test_more_connections_than_there_is_room(self):
        with patch.object(web, "PATIENCE", 9.0), patch.object(web, "HEADERS", 9.0):
            connections = [self.connect() for _ in range(web.MOST)]
            self.wait(lambda: self.server._room._value == 0)
            answer = read_answer(self.connect())
            self.assert_refused(answer, 503)
            self.assertIn("Retry-After", answer.headers)
            for connection in connections:
                connection.close()
        self.assert_lives()


class TestQueue(SafetyTest):
    flags = ("--queue", "3")

    @slow(5)
    def test_more_takes_than_may_wait(self):
        with ThreadPoolExecutor(20) as pool:
            asked = [{**SHORT, "seed": i, "duration": 1} for i in range(20)]
            found = [pool.submit(self.ask, "POST", GENERATE, one) for one in asked]
            answers = [future.result() for future in found]
        made = [answer for answer in answers if answer.status == 200]
        self.assertGreaterEqual(len(made), 4)
        for answer in answers:
            if answer not in made:
                self.assert_refused(answer, 503)
                self.assertIn("Retry-After", answer.headers)
        self.assertEqual(len([*self.takes.glob("slow-bell*.wav")]), len(made))
