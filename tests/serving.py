"""A client of the server, for the tests of what is made."""

import base64
import contextlib
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import soundfile
from common import ROOT, Test
from served import Answer, ServedTest

GENERATIONS = "/v1/audio/music-generations"
NOISE = np.random.default_rng(0).normal(size=(48000, 1)) / 9
BELL = dict(prompt="slow bell", seed=7, duration=1)


class Event(NamedTuple):
    name: str
    data: dict[str, Any]


def read_events(response: HTTPResponse) -> Iterator[Event]:
    """Server-sent events, as they come."""
    name = ""
    for line in response:
        key, _, value = line.decode().rstrip("\n").partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield Event(name, json.loads(value))


def sound_of(events: list[Event], channels: int = 1) -> np.ndarray:
    """The samples (N, C) that events tell, of 16 bits."""
    pieces = [base64.b64decode(e.data["data"]) for e in events if e.name == "audio"]
    return np.frombuffer(b"".join(pieces), "<i2").reshape(-1, channels)


class ServerTest(ServedTest):
    """With takes of a second, of JSON."""

    @contextlib.contextmanager
    def asking(
        self, method: str, path: str, fields: Any = None, headers: dict | None = None
    ) -> Iterator[HTTPResponse]:
        """The beginning of an answer, of which the rest may be read. Bytes go as they
        are, other fields as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = dict(headers or {})
        if fields is not None and not isinstance(fields, bytes):
            fields = json.dumps(fields).encode()
        if fields is not None:
            headers = {"Content-Type": "application/json"} | headers
        try:
            connection.request(method, path, fields, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, method: str, path: str, fields: Any = None, **headers) -> Answer:
        """A whole answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.asking(method, path, fields, named) as response:
            return Answer(response.status, response.headers, response.read())

    def get(self, path: str, **headers) -> Answer:
        return self.ask("GET", path, **headers)

    def post(self, path: str, fields: Any = None, **headers) -> Answer:
        return self.ask("POST", path, fields, **headers)

    def make(self, status: int = 200, path: str = GENERATIONS, **fields) -> Any:
        """What is answered to fields that must get that status: JSON, or a sound."""
        answer = self.post(path, fields)
        self.assertEqual(answer.status, status, answer.body[:300])
        json_ = answer.headers["Content-Type"] == "application/json"
        return answer.json if json_ else answer.body

    def take(self, **fields) -> dict[str, Any]:
        """A new take, as it is told."""
        self.make(**({"prompt": "slow bell", "seed": 7, "duration": 1} | fields))
        return self.get("/takes").json["takes"][0]

    def events(self, path: str = GENERATIONS, **fields) -> list[Event]:
        """All events of a request."""
        with self.asking("POST", path, {"stream": "events"} | fields) as response:
            self.assertEqual(response.status, 200)
            return [*read_events(response)]

    def fails(self, status: int, pattern: str, path: str = GENERATIONS, **fields):
        """The fields get that status, and a sentence."""
        said = self.make(status, path, **fields)
        self.assertEqual([*said], ["error"])
        self.assertRegex(said["error"], pattern)
        self.assertTrue(said["error"].endswith("."), said)


class Gate:
    """Holds up a model's steps until it is opened, so that nothing depends on time."""

    def __init__(self, test: Test):
        self.opened, self.reached = threading.Event(), threading.Event()
        from musicgen import Take

        own = Take.__iter__

        def held(take):
            for step in own(take):
                yield step
                if take.frames >= 10:
                    self.reached.set()
                    self.opened.wait(30)

        test.enterContext(patch.object(Take, "__iter__", held))
        test.addCleanup(self.opened.set)


def in_base64(audio: np.ndarray) -> dict[str, str]:
    """A sound (N, C) at 32 kHz as a file in JSON."""
    file = io.BytesIO()
    soundfile.write(file, audio, 32000, format="WAV")
    return dict(name="a.wav", base64=base64.b64encode(file.getvalue()).decode())


def flags_of(fields: dict) -> list[str]:
    """The fields of a request as flags of generate.py."""
    named = {f"--{name.replace('_', '-')}": value for name, value in fields.items()}
    named = {flag: value for flag, value in named.items() if value is not False}
    return [flag if v is True else f"{flag}={v}" for flag, v in named.items()]


def generate_py(folder: Path, *flags: str) -> bytes:
    """Run generate.py in a folder; what it writes to standard output."""
    command = [sys.executable, str(ROOT / "generate.py"), "--quiet", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate_beside(path: Path, *flags: str) -> bytes:
    """The file that generate.py makes there, with its codes beside it."""
    codes = path.with_suffix(".safetensors")
    generate_py(path.parent, *flags, f"--output={path}", f"--save-codes={codes}")
    return path.read_bytes()


class MadeTest(ServerTest):
    """With generate.py to make the same."""

    def same(self, name: str, fields: dict, model: str = "tiny", **files: str) -> bytes:
        """The file that generate.py makes of the fields, with its codes beside it."""
        flags = flags_of(fields | files | dict(model=model, output=name))
        if "takes" not in fields:
            flags.append(f"--save-codes={Path(name).with_suffix('.safetensors')}")
        generate_py(self.folder, *flags)
        path = self.folder / name
        return path.read_bytes() if path.is_file() else b""
