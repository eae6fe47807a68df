"""Bodies of requests: forms and JSON, what is broken in them, and what they cost."""

import base64
import errno
import io
import json
import socket
import threading
import tracemalloc
from email.message import Message
from pathlib import Path
from unittest.mock import patch

from common import Test

import forms
from forms import BadRequest, Form, read_form

MOST = 64 * 2**20
PART = 'Content-Disposition: form-data; name="{}"\r\n\r\n'
FILE = 'Content-Disposition: form-data; name="{}"; filename="{}"\r\n\r\n'
SOUND = bytes(range(256)) * 3  # holds \r\n and quotes


def headers_of(kind: str, length: int | None) -> Message:
    headers = Message()
    headers["Content-Type"] = kind
    if length is not None:
        headers["Content-Length"] = str(length)
    return headers


def form_of(*parts: tuple[str, bytes], mark: str = "x") -> bytes:
    """A body as browsers send it."""
    whole = [f"--{mark}\r\n{head}".encode() + body + b"\r\n" for head, body in parts]
    return b"".join(whole) + f"--{mark}--\r\n".encode()


class Grain:
    """A stream that gives few bytes at once."""

    def __init__(self, content: bytes, grain: int):
        self.stream, self.grain = io.BytesIO(content), grain

    def read1(self, size: int) -> bytes:
        return self.stream.read(min(size, self.grain))


class Repeated:
    """A stream without end, of which nothing is held."""

    def __init__(self, begin: bytes, piece: bytes):
        self.begin, self.piece, self.given = begin, piece, 0

    def read1(self, size: int) -> bytes:
        given, self.begin = self.begin or self.piece, b""
        self.given += len(given[:size])
        return given[:size]


class FormTest(Test):
    def read(
        self,
        body: bytes,
        kind: str = "application/json",
        most: int = MOST,
        grain: int = 2**16,
    ) -> Form:
        folder = self.folder / str(len([*self.folder.iterdir()]))
        folder.mkdir()
        stream, headers = Grain(body, grain), headers_of(kind, len(body))
        form = read_form(stream, headers, folder, most)
        self.assertEqual(stream.stream.read(), b"")
        self.assertEqual(sorted(folder.iterdir()), sorted(form.files.values()))
        return form

    def read_parts(self, body: bytes, **options) -> Form:
        return self.read(body, "multipart/form-data; boundary=x", **options)

    def refused(self, status: int, words: str, read, *arguments, **options) -> None:
        with self.assertRaisesRegex(BadRequest, words) as raised:
            read(*arguments, **options)
        self.assertEqual(raised.exception.status, status)
        message = str(raised.exception)
        self.assertLess(len(message), 400)
        self.assertNotIn("\n", message)
        self.assertRegex(message, r"\.$")


class TestParts(FormTest):
    def test_fields_and_files(self):
        body = form_of(
            (PART.format("prompt"), "42 Bässe".encode()),
            (PART.format("notes"), b"60"),
            (PART.format("model"), b"true"),
            (PART.format("seed"), b"7"),
            (PART.format("stream"), b"true"),
            (PART.format("temp"), b"0.5"),
            (PART.format("part"), b"8:12"),
            (PART.format("top_p"), b"NaN"),
            (FILE.format("melody", "C:\\music\\hum.WAV"), SOUND),
            (FILE.format("style", "../../etc/passwd"), b""),
            (FILE.format("audio_prompt", ""), b""),  # of a browser: none was chosen
        )
        fields = dict(prompt="42 Bässe", notes="60", model="true", seed=7, temp=0.5)
        fields |= dict(stream=True, part="8:12", top_p="NaN")
        for grain in (1, 2, 3, 7, 2**16):
            form = self.read_parts(body, grain=grain)
            self.assertEqual(form.fields, fields)
            self.assertEqual(form.names, {"melody": "hum.WAV", "style": "passwd"})
            self.assertEqual(form.files["melody"].read_bytes(), SOUND)
            self.assertEqual(form.files["melody"].suffix, ".wav")
            self.assertEqual(form.files["style"].read_bytes(), b"")
            self.assertEqual(form.files["style"].suffix, "")

    def test_what_other_clients_send(self):
        for body in (
            b"before it\r\n" + form_of((PART.format("prompt"), b"a")) + b"after it",
            form_of((PART.format("prompt"), b"a")).rstrip(),
            form_of((PART.format("prompt").replace('"', ""), b"a")),
            form_of(("content-type: text/plain\r\n" + PART.format("prompt"), b"a")),
            form_of((PART.format("prompt"), b"a")).replace(b"--x\r\n", b"--x \t\r\n"),
        ):
            for grain in (1, 2**16):
                form = self.read_parts(body, grain=grain)
                self.assertEqual(form.fields, {"prompt": "a"}, body)
        self.assertEqual(self.read_parts(b"--x--\r\n").fields, {})

    def test_contents_that_look_like_a_boundary(self):
        for content in (b"\r\n--", b"\r\n-", b"--x--\r\n", b"\r\n\r\n", b"\r\n--y\r\n"):
            body = form_of((FILE.format("melody", "a.wav"), content))
            for grain in (1, 5, 2**16):
                path = self.read_parts(body, grain=grain).files["melody"]
                self.assertEqual(path.read_bytes(), content)

    def test_what_is_broken(self):
        whole = form_of((PART.format("prompt"), b"a"))
        lines = "A: b\r\n" * 500_000
        for status, words, body in (
            (400, "breaks off", b""),
            (400, "breaks off", b"no boundary at all"),
            (400, "breaks off", whole[:-6]),
            (400, "breaks off", whole[:20]),
            (400, "header of a part is too long", form_of((lines, b""))),
            (400, "with a name", form_of(("\r\n", b"a"))),
            (400, "with a name", form_of(("A: b\r\n\r\n", b"a"))),
            (
                400,
                "with a name",
                form_of(("Content-Disposition: attachment; name=a\r\n\r\n", b"")),
            ),
            (400, "begins as its boundary", whole.replace(b"--x\r", b"--xyz\r")),
            (400, "100 parts", form_of(*[(PART.format(i), b"") for i in range(1000)])),
            (400, "'a' is given twice", form_of(*[(PART.format("a"), b"")] * 2)),
            (400, "'a' is given twice", form_of(*[(FILE.format("a", "b"), b"")] * 2)),
            (400, "'a' has no name", form_of((FILE.format("a", ""), b"sound"))),
            (400, "UTF-8", form_of((PART.format("prompt"), b"\xff\xfe"))),
            (
                400,
                "melody must be a file",
                form_of((PART.format("melody"), b"/etc/passwd")),
            ),
            (
                413,
                "text of the form is too long",
                form_of((PART.format("a"), bytes(2**20 + 1))),
            ),
            (
                413,
                "too long",
                form_of(*[(PART.format(i), bytes(2**19)) for i in range(3)]),
            ),
        ):
            self.refused(status, words, self.read_parts, body)

    def test_boundaries(self):
        for kind in ("", "; boundary=", f"; boundary={'a' * 71}", "; boundary=\xff"):
            kind = f"multipart/form-data{kind}"
            self.refused(400, "must give the boundary", self.read, b"--\r\n", kind)
        kind = 'multipart/form-data; charset=utf-8; boundary="a b\'()+_,-./:=?"'
        body = form_of((PART.format("seed"), b"1"), mark="a b'()+_,-./:=?")
        self.assertEqual(self.read(body, kind).fields, {"seed": 1})


class TestJson(FormTest):
    def test_fields_and_files(self):
        text = base64.b64encode(SOUND).decode()
        request = dict(prompt='a "b" \\ ä 音', seed=7, part=[8, 12], stream=True)
        files = dict(melody=dict(name="a/b.flac", base64=text), audio_data=text)
        for grain in (1, 3, 2**16):
            for ascii in (True, False):
                body = json.dumps(request | files | {"style": None}, ensure_ascii=ascii)
                form = self.read(body.encode(), grain=grain)
                self.assertEqual(form.fields, request | {"style": None})
                self.assertEqual(form.names["melody"], "b.flac")
                for key in ("melody", "audio_data"):
                    self.assertEqual(form.files[key].read_bytes(), SOUND)
        for body in (b"", b"{}", b"\xef\xbb\xbf{}"):
            self.assertEqual(self.read(body), Form())

    def test_long_files(self):
        """Of all lengths about those from which on they go to the disk as they come."""
        for size in (49148, 49150, 49152, 49153, 98304, 98305, 10**6):
            sound = (SOUND * (size // len(SOUND) + 1))[:size]
            text = base64.b64encode(sound).decode()
            request = {"prompt": "a", "melody": {"base64": text}, "audio_data": text}
            for body in (json.dumps(request), json.dumps(request).replace("/", "\\/")):
                for grain in (1021, 2**16):
                    form = self.read(body.encode(), grain=grain)
                    self.assertEqual(form.fields, {"prompt": "a"})
                    self.assertEqual(form.files["melody"].read_bytes(), sound)
                    self.assertEqual(form.files["audio_data"].read_bytes(), sound)
                    self.assertEqual(form.names["melody"], "melody")

    def test_what_is_broken(self):
        deep = b"[" * 100_000
        long = "a" * 70_000
        for status, words, body in (
            (400, "no JSON", b"{"),
            (400, "no JSON", b"\\"),
            (400, "has no end", b'{"prompt": "a'),
            (400, "has no end", b'{"prompt": "a\\'),
            (400, "has no end", b'{"prompt": "' + long.encode()),
            (400, "an object", b"[]"),
            (400, "an object", b'"a"'),
            (400, "too deep", deep),
            (400, "too deep", b'{"a": ' + deep + b"]" * 100_000 + b"}"),
            (400, "UTF-8", b'{"prompt": "\xff"}'),
            (400, "half a character", b'{"prompt": "\\ud800"}'),
            (400, "NaN", b'{"temp": NaN}'),
            (400, "Infinity", b'{"temp": -Infinity}'),
            (400, "1e999", b'{"temp": 1e999}'),
            (400, "no JSON", b'{"seed": ' + b"9" * 5000 + b"}"),
            (400, "base64", b'{"melody": {"base64": "a"}}'),
            (400, "base64", b'{"melody": {"base64": "QQ==QQ=="}}'),
            (400, "base64", b'{"melody": {"base64": "QU\\nFB"}}'),
            (400, "base64", b'{"melody": {"base64": "data:audio/wav;base64,QQ=="}}'),
            (400, "must be as", b'{"melody": {"base64": 5}}'),
            (400, "must be as", b'{"melody": {"name": 5, "base64": ""}}'),
            (400, "must be as", b'{"prompt": {}}'),
            (400, "unknown key 'x'", b'{"melody": {"base64": "", "x": 1}}'),
            (400, "melody must be a file", b'{"melody": "/etc/passwd"}'),
            (400, "melody must be a file", b'{"melody": ["/etc/passwd"]}'),
            (413, "'prompt' is longer", json.dumps({"prompt": long}).encode()),
            (413, "'prompt' is longer", json.dumps({"prompt": [[long]]}).encode()),
            (413, "of no file", b'{"prompt": [' + b"1," * 2**20),
            (413, "of no file", b'""' * 2**20),
            (400, "100 files", json.dumps([long] * 101).encode()),
        ):
            for grain in (1021, 2**16):
                self.refused(status, words, self.read, body, grain=grain)

    def test_long_files_that_are_two(self):
        """The end of the first stands where what is read at once ends."""
        for text in ("QUJD" * (forms.PIECE // 4 - 1) + "QQ==", "Q" * 10**6):
            body = json.dumps({"melody": {"base64": text}})
            self.read(body.encode())
            body = json.dumps({"melody": {"base64": text + "QQ==QUJD"}})
            self.refused(400, "base64", self.read, body.encode())
            body = json.dumps({"melody": {"base64": text + "QUJDQUI="}})
            if text.endswith("="):
                self.refused(400, "base64", self.read, body.encode())

    def test_long_names_of_files(self):
        name = "/".join(["a" * 300] * 2) + ".wav"
        body = json.dumps({"melody": {"name": name, "base64": "QUFB"}})
        form = self.read(body.encode())
        self.assertEqual(form.names["melody"], "a" * 96 + ".wav")
        for name in ("", ".", "..", "a/..", "\0", "a/\n", "\\"):
            body = json.dumps({"melody": {"name": name, "base64": "QUFB"}})
            self.assertEqual(self.read(body.encode()).names["melody"], "melody")
        body = json.dumps({"melody": {"name": "a" * 70_000, "base64": "QUFB"}})
        self.refused(400, "must be as", self.read, body.encode())


class TestLimits(FormTest):
    def test_kinds(self):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense", ""):
            self.refused(415, "Content-Type", self.read, b"{}", kind)
        none = Message()
        none["Content-Length"] = "2"
        self.refused(
            415, "Content-Type", read_form, Grain(b"{}", 9), none, self.folder, MOST
        )

    def test_lengths(self):
        self.assertEqual(self.read(b'{"a": 1}', most=8).fields, {"a": 1})
        self.refused(413, "9 bytes; at most 8", self.read, b'{"a": 10}', most=8)
        stream = Repeated(b"", b"a")
        for lengths, status, words in (
            ([2**30], 413, "1073741824 bytes"),
            (["5", "6"], 400, "one number"),
            (["-5"], 400, "one number"),
            (["5x"], 400, "one number"),
            (["٣"], 400, "one number"),
            (["9" * 5000], 400, "one number"),
            ([""], 400, "one number"),
        ):
            headers = headers_of("application/json", None)
            for length in lengths:
                headers["Content-Length"] = str(length)
            self.refused(status, words, read_form, stream, headers, self.folder, MOST)
        for coding in ("chunked", "gzip, chunked", "identity"):
            headers = headers_of("application/json", None)
            headers["Transfer-Encoding"] = coding
            self.refused(411, "Length", read_form, stream, headers, self.folder, MOST)
        self.assertEqual(stream.given, 0)  # not a byte was read of all these
        headers = headers_of("application/json", None)  # as curl -X POST sends it
        self.assertEqual(read_form(stream, headers, self.folder, MOST), Form())

    def test_a_body_that_ends_too_soon(self):
        headers = headers_of("application/json", 1000)
        stream = Grain(b'{"prompt": ', 9)
        self.refused(400, "11 of its", read_form, stream, headers, self.folder, MOST)

    def test_slow_senders(self):
        """One that stops, and one that never does, but sends a byte now and then."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(0.1)
            theirs.send(b'{"prompt"')
            headers = headers_of("application/json", 1000)
            arguments = (ours.makefile("rb"), headers, self.folder, MOST)
            self.refused(408, "too slowly", read_form, *arguments)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(5)
            done = threading.Event()

            def drip() -> None:
                while not done.wait(0.02):
                    theirs.send(b" ")

            thread = threading.Thread(target=drip)
            thread.start()
            arguments = (ours.makefile("rb"), headers, self.folder, MOST, 0.2)
            self.refused(408, "more than 0.2 s", read_form, *arguments)
            done.set()
            thread.join()

    def test_a_client_that_is_gone(self):
        class Gone:
            def read1(self, size: int) -> bytes:
                raise ConnectionResetError("gone")

        headers = headers_of("application/json", 10)
        with self.assertRaises(ConnectionError):
            read_form(Gone(), headers, self.folder, MOST)

    def test_a_full_disk(self):
        body = form_of((FILE.format("melody", "a.wav"), SOUND))
        full = OSError(errno.ENOSPC, "No space left on device")
        with patch.object(forms, "open", side_effect=full, create=True):
            self.refused(507, "the disk is full", self.read_parts, body)

    def test_memory_is_constant(self):
        """Of 40 MB in a file of a form, of JSON, and in what is refused."""
        piece = (b"QUJD" * 2**14)[: 2**16]
        size = 40 * 2**20
        part = f"--x\r\n{FILE.format('melody', 'a')}".encode()
        lists = b"[]," * 2**14
        for kind, begin, piece, words in (
            ("multipart/form-data; boundary=x", part, piece, "breaks off"),
            ("multipart/form-data; boundary=x", b"--x\r\n", piece, "too long"),
            ("multipart/form-data; boundary=x", b"", piece, "breaks off"),
            ("application/json", b'{"melody": {"base64": "', piece, "has no end"),
            ("application/json", b'{"prompt": "', b"\\n" * 2**15, "has no end"),
            ("application/json", b'{"prompt": [', lists, "of no file"),
            ("application/json", b"[" * 2**20, lists, "of no file"),
        ):
            headers = headers_of(kind, size)
            tracemalloc.start()
            arguments = (Repeated(begin, piece), headers, self.folder, MOST)
            with self.assertRaisesRegex(BadRequest, words):
                read_form(*arguments)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 8 * 2**20, (kind, begin[:30]))
            for path in self.folder.iterdir():
                path.unlink()
        text = b'{"melody": {"base64": "' + b"QUJD" * (size // 4) + b'"}}'
        tracemalloc.start()
        form = self.read(text)
        peak = tracemalloc.get_traced_memory()[1] - len(text)  # which the stream holds
        tracemalloc.stop()
        self.assertLess(peak, 8 * 2**20)
        self.assertEqual(form.files["melody"].stat().st_size, size // 4 * 3)

    def test_no_name_of_a_client_is_a_path(self):
        for name in ("/etc/x.wav", "../x.wav", "..\\x.wav", "%2e%2e%2fx.wav", "x.wav/"):
            body = form_of((FILE.format("melody", name), SOUND))
            path: Path = self.read_parts(body).files["melody"]
            self.assertEqual(path.parent.parent, self.folder)
            self.assertRegex(path.name, r"^1(\.wav)?$")
