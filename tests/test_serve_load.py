"""Many clients at once, of whom some cancel, and some go without a word: no take is lost
or mixed up, the queue keeps its order, and memory stays.

    MUSICGEN_LOAD=120 python test.py serve_load

goes on for two minutes in place of a second, and prints what it has seen.
"""

import base64
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from common import ROOT, Test, slow
from serving import GENERATIONS, read_events

from audio import load_audio
from musicgen import MusicGen
from settings import load_codes, read_settings

SECONDS = float(os.environ.get("MUSICGEN_LOAD", 1))
CLIENTS = 50
DURATIONS = (0.1, 0.2, 0.3)
GROWTH = 40  # MB of memory, after the first third
WAYS = ("wav", "stream", "events", "cancel", "leave", "look", "delete")
OFTEN = (3, 2, 4, 3, 3, 2, 1)
LEVELS = re.compile(r"was scaled down by|Samples beyond 1 are clipped")


@dataclass
class Asked:
    """A take that was asked for, and what became of it."""

    prompt: str
    seed: int
    duration: float
    begins: bool  # with a sound
    sent: float = field(default_factory=time.monotonic)
    queued: float | None = None  # when it was told that it waits
    places: list[int] = field(default_factory=list)
    take: dict[str, Any] | None = None
    end: str = ""  # the last event, "left", or "deleted"


class Client(threading.Thread):
    """Asks for takes, one after the other, until there is no more time."""

    def __init__(self, number: int, port: int, until: float, sound: bytes):
        super().__init__()
        self.number, self.port, self.until = number, port, until
        self.random, self.count = random.Random(number), 0
        self.upload = {"name": "hum.wav", "base64": base64.b64encode(sound).decode()}
        self.asked: list[Asked] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.until:
            way = self.random.choices(WAYS, OFTEN)[0]
            try:
                getattr(self, way)()
            except (AssertionError, HTTPException, OSError, ValueError) as error:
                self.wrong.append(f"{way}: {error!r}")

    def ask(self, method: str, path: str, fields: Any = None) -> HTTPResponse:
        """The beginning of an answer. The connection ends with it."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = None if fields is None else json.dumps(fields)
        kind = {} if fields is None else {"Content-Type": "application/json"}
        connection.request(method, path, body, kind | {"Connection": "close"})
        return connection.getresponse()

    def begin(self, stream: Any) -> tuple[Asked, HTTPResponse]:
        self.count += 1
        one = Asked(
            f"client {self.number} asks {self.count}",
            self.number * 100_000 + self.count,
            self.random.choice(DURATIONS),
            self.random.random() < 0.2,
        )
        fields = dict(prompt=one.prompt, seed=one.seed, duration=one.duration)
        fields |= {"audio_prompt": self.upload} if one.begins else {}
        response = self.ask("POST", GENERATIONS, fields | {"stream": stream})
        assert response.status == 200, (response.status, response.read(300))
        self.asked.append(one)
        return one, response

    def listen(self, one: Asked, response: HTTPResponse, stops: Any = None) -> None:
        """Hear the events, until one of them, or chance, says to leave."""
        for event in read_events(response):
            if event.name == "queued":
                one.queued = one.queued or time.monotonic()
                one.places.append(event.data["place"])
            elif event.name == "take":
                one.take = event.data
            elif event.name in ("done", "cancelled", "error"):
                one.end = event.name
                assert one.end != "error", event.data
            if stops and stops(event):
                break

    # Ways to ask

    def wav(self) -> None:
        one, response = self.begin(False)
        body = response.read()
        one.take, one.end = {"id": response.headers["X-Take-Id"]}, "done"
        found = self.ask("GET", f"/takes/{one.take['id']}.wav").read()
        assert body == found, "the file is another one"
        one.take = json.loads(self.ask("GET", f"/takes/{one.take['id']}").read())

    def stream(self) -> None:
        one, response = self.begin(True)
        sound = response.read()
        one.take, one.end = {"id": response.headers["X-Take-Id"]}, "done"
        one.take = json.loads(self.ask("GET", f"/takes/{one.take['id']}").read())
        samples = len(sound[sound.index(b"data") + 8 :]) / 2
        assert samples == one.take["seconds"] * 32000, "it is of another length"

    def events(self) -> None:
        one, response = self.begin("events")
        self.listen(one, response)
        assert one.end == "done" and one.take, one

    def cancel(self) -> None:
        one, response = self.begin("events")
        id, chance = response.headers["X-Request-Id"], self.random.random() * 0.4

        def stop(event: Any) -> bool:
            if self.random.random() < chance:
                answer = self.ask("POST", f"/cancel/{id}", {})
                assert answer.status in (200, 404), answer.status  # it may be over
            return False

        self.listen(one, response, stop)
        assert one.end in ("done", "cancelled"), one

    def leave(self) -> None:
        """Without a word: at once, or after some events, or after half a stream."""
        one, response = self.begin(self.random.choice(["events", True, False]))
        chance = self.random.random()
        if response.headers["Content-Type"] == "text/event-stream":
            self.listen(one, response, lambda _: self.random.random() < chance)
        elif chance < 0.5:
            response.read(1000)
        response.close()
        one.end = one.end or "left"

    def look(self) -> None:
        paths = ("/health", "/takes", "/v1/models", "/takes/none", "/nothing")
        answer = self.ask("GET", self.random.choice(paths))
        assert answer.status in (200, 404), answer.status
        json.loads(answer.read())

    def delete(self) -> None:
        mine = [one for one in self.asked if one.end == "done"]
        if not mine:
            return
        one = self.random.choice(mine)
        answer = self.ask("DELETE", f"/takes/{one.take['id']}")
        assert answer.status == 200, (answer.status, answer.read())
        one.end = "deleted"


class TestLoad(Test):
    def setUp(self):
        super().setUp()
        self.takes, uploads = self.folder / "takes", self.folder / "uploads"
        uploads.mkdir()
        compiled = Path(tempfile.gettempdir()) / "mlx"  # else MLX compiles all again
        compiled.mkdir(exist_ok=True)
        (uploads / "mlx").symlink_to(compiled)
        flags = [
            "--model",
            "tiny",
            "--port",
            "0",
            "--no-open",
            "--takes-dir",
            self.takes,
        ]
        self.server = subprocess.Popen(
            [sys.executable, "serve.py", *map(str, flags)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(uploads)},
            stdout=subprocess.PIPE,
            stderr=open(self.folder / "errors.txt", "w"),
            text=True,
        )
        self.addCleanup(self.server.stdout.close)
        self.addCleanup(self.server.wait)
        self.addCleanup(self.server.kill)
        line = self.server.stdout.readline()
        self.port = int(re.search(r":(\d+)/", line)[1])
        noise = np.random.default_rng(0).normal(size=1600) / 9  # shorter than any take
        self.sound = self.folder / "hum.wav"
        soundfile.write(self.sound, noise, 32000)

    def memory(self) -> float:
        """MB that the server holds."""
        command = ["ps", "-o", "rss=", "-p", str(self.server.pid)]
        return int(subprocess.check_output(command)) / 1024

    def load(self) -> tuple[list[Client], list[tuple[float, float]]]:
        """Clients who have asked for a while, and what memory the server held then."""
        begun = time.monotonic()
        arguments = (self.port, begun + SECONDS, self.sound.read_bytes())
        clients = [Client(number, *arguments) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        held = []
        while any(client.is_alive() for client in clients):
            held.append((time.monotonic() - begun, self.memory()))
            time.sleep(SECONDS / 60)
        for client in clients:
            client.join()
        return clients, held

    @slow(12)
    def test_many_clients(self):
        clients, held = self.load()
        asked = [one for client in clients for one in client.asked]
        self.assertEqual([wrong for client in clients for wrong in client.wrong], [])
        self.check_rest()
        self.check_order(asked)
        counted = self.check_takes(asked)
        growth = self.check_memory(held)
        if "MUSICGEN_LOAD" in os.environ:
            ends = Counter(one.end for one in asked)
            print(
                f"{CLIENTS} clients, {SECONDS:g} s: {len(asked)} takes asked for, {dict(ends)}"
            )
            print(f"{counted} takes in the folder, all as made alone; memory {growth}")

    def check_rest(self) -> None:
        """Nothing goes on any more, nothing is left over, and nothing was complained of."""
        end = time.monotonic() + 60
        client = Client(-1, self.port, 0, b"")
        while True:
            told = json.loads(client.ask("GET", "/health").read())
            if not told["busy"] and told["queue"] == 0:
                break
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
        left = [*(self.folder / "uploads").glob("*/*")]
        left = [path for path in left if path.parent.name != "mlx"]
        self.assertEqual(left, [])
        said = (self.folder / "errors.txt").read_text().splitlines()
        self.assertEqual([line for line in said if not LEVELS.search(line)], [])

    def check_order(self, asked: list[Asked]) -> None:
        """Who waits comes nearer, and who came later is made later."""
        for one in asked:
            self.assertEqual(one.places, sorted({*one.places}, reverse=True))
        told = [one for one in asked if one.queued and one.take and one.end == "done"]
        for first in told:
            for second in told:
                if first.queued < second.sent:
                    self.assertLess(first.take["made"], second.take["made"])

    def check_takes(self, asked: list[Asked]) -> int:
        """What was told of is there, all else was asked for, and each is what its prompt
        and its seed make alone, as far as it goes. Returns how many there are."""
        by_seed = {one.seed: one for one in asked}
        found = {path.stem: path for path in self.takes.glob("*.wav")}
        for one in asked:
            if one.end == "done":
                self.assertIn(one.take["id"], found)
                self.assertEqual(one.take["prompt"], one.prompt)
                self.assertEqual(one.take["seconds"], one.duration)
        gone = [one.take["id"] for one in asked if one.end == "deleted"]
        self.assertEqual({*gone} & {*found}, set())
        model, told = MusicGen.from_pretrained("tiny"), set()
        for path in found.values():
            settings = read_settings(path)
            one = by_seed[settings["seed"]]
            self.assertNotIn(one.seed, told)  # there are no two of one
            told.add(one.seed)
            self.assertEqual(settings["prompt"], one.prompt)
            codes, _ = load_codes(path.with_suffix(".safetensors"))
            alone = self.alone(model, one)
            self.assertSame(codes, alone[:, : codes.shape[1]])
            if one.end == "done":
                self.assertEqual(codes.shape, alone.shape)
        names = {path.name for path in self.takes.iterdir()}
        want = {
            f"{stem}{suffix}" for stem in found for suffix in (".wav", ".safetensors")
        }
        self.assertEqual(names, want)
        return len(found)

    def alone(self, model: MusicGen, one: Asked):
        audio = load_audio(self.sound, 32000, 1) if one.begins else None
        options = dict(seed=one.seed, audio_prompt=audio)
        return model.generate_codes(one.prompt, one.duration, **options)

    def check_memory(self, held: list[tuple[float, float]]) -> str:
        """It does not grow once all has been done for the first time."""
        parts = [
            [
                mb
                for seconds, mb in held
                if SECONDS * i / 3 <= seconds < SECONDS * (i + 1) / 3
            ]
            for i in range(3)
        ]
        first, middle, last = [statistics.median(part) for part in parts]
        if SECONDS >= 30:
            self.assertLess(last - middle, GROWTH)
        return f"{first:.0f}, {middle:.0f}, {last:.0f} MB in the thirds"
