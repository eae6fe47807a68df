"""serve.py in a process of its own: Ctrl-C, what it prints, and who touches MLX."""

import os
import re
import signal
import subprocess
import sys
import time
from textwrap import dedent

from common import ROOT, slow
from serving import BELL, GENERATIONS, NOISE, ServerTest, in_base64, read_events

import serve

SPY = """
    import sys, threading, types
    sys.path[:0] = {paths}
    import mlx.core as mx

    touched = set()

    def spy(function):
        def call(*arguments, **options):
            touched.add((threading.current_thread().name, function.__name__))
            return function(*arguments, **options)
        return call

    class Made(type):
        def __call__(cls, *arguments, **options):
            return made(*arguments, **options)

        def __instancecheck__(cls, value):
            return isinstance(value, real)

    real = mx.array
    made = spy(lambda *arguments, **options: real(*arguments, **options))
    mx.array = Made("array", (), {{}})
    for module in (mx, mx.random, mx.fft, mx.fast):
        for name, value in [*vars(module).items()]:
            if type(value).__name__ in ("nb_func", "builtin_function_or_method"):
                setattr(module, name, spy(value))

    import unittest
    from test_serve_process import TestOneThread
    import serve

    class Spied(TestOneThread):
        def test(self):
            self.everything()

    before = {{*touched}}
    result = unittest.TextTestRunner().run(Spied("test"))
    names = {{name for name, _ in touched - before}}
    assert result.wasSuccessful()
    assert names == {{"worker"}}, touched - before
"""


class TestOneThread(ServerTest):
    def everything(self):
        """Whatever touches sound, codes or models."""
        sound = in_base64(NOISE)
        self.make(**BELL, audio_prompt=sound, prompt_length=0.1)
        self.events(**BELL | dict(takes=2, loudness=-20))
        for what, fields in (
            ("again", dict(temp=0.5)),
            ("extend", dict(seconds=0.5)),
            ("regenerate", dict(part=[0.3, 0.5], candidates=2)),
            ("loudness", dict(peak=-3)),
        ):
            fields |= dict(audio_prompt=sound) if what == "again" else {}
            self.make(path=f"/takes/slow-bell-7/{what}", **fields)
        self.make(path="/v1/audio/chroma", melody=sound)
        self.make(path="/v1/audio/chroma", notes="C E G", bpm=60)
        for path in ("/takes", "/v1/models", "/takes/slow-bell-7.flac", "/health"):
            self.assertEqual(self.get(path).status, 200)
        self.fails(400, "bpm", **BELL | dict(notes="C E G"))
        self.ask("DELETE", "/takes/slow-bell-7")

    @slow(6)
    def test_touches_mlx(self):
        """In a process of its own, in which each function of MLX tells who calls it."""
        paths = [str(ROOT / "tests"), str(ROOT), str(ROOT / "reference")]
        script = dedent(SPY).format(paths=paths)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])


class TestCommand(ServerTest):
    """serve.py in a process of its own."""

    def start(self, *flags: str) -> tuple[subprocess.Popen, str]:
        """The process, and the address that it prints."""
        command = [sys.executable, str(ROOT / "serve.py"), "--model=tiny", "--no-open"]
        command += ["--port=0", f"--takes-dir={self.takes}", *flags]
        process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process, process.stdout.readline().strip()

    @slow(4)
    def test_ends_at_once_and_keeps_what_is_made(self):
        for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
            process, address = self.start()
            self.port = int(re.search(r":(\d+)/", address)[1])
            long = dict(prompt="bell", seed=1, duration=60, stream="events")
            with self.asking("POST", GENERATIONS, long) as answer:
                next(e for e in read_events(answer) if e.name == "audio")
                with self.asking("POST", GENERATIONS, long) as other:
                    next(read_events(other))
                    process.send_signal(number)
                    began = time.monotonic()
                    self.assertEqual(process.wait(20), status)
                    self.assertLess(time.monotonic() - began, 5)
                    self.assertEqual([*read_events(other)][-1].name, "cancelled")
                self.assertEqual([e.name for e in read_events(answer)][-1], "cancelled")
            takes = serve.Takes(self.takes).every()
            self.assertEqual(len(takes), 1)
            self.assertTrue(0 < takes[0].seconds < 60 and takes[0].codes)
            serve.Takes(self.takes).delete(takes[0].id)
            self.assertEqual(os.listdir(self.takes), [])

    @slow(2)
    def test_what_it_prints(self):
        _, address = self.start("--host=0.0.0.0")
        self.assertRegex(address, r"^http://127\.0\.0\.1:\d+/\?token=[\w-]{20,}$")
        self.port = int(re.search(r":(\d+)/", address)[1])
        self.assertEqual(self.get("/health").status, 401)
        token = address.partition("=")[2]
        self.assertEqual(self.get(f"/health?token={token}").status, 200)
        bearer = self.get("/health", Authorization=f"Bearer {token}")
        self.assertEqual(bearer.status, 200)
        for flags, line in (
            ([f"--port={self.port}", "--host=0.0.0.0"], "in use"),
            (["--model=tiney"], "Did you mean tiny"),
            (["--port=99999"], "--port must be"),
            ([f"--takes-dir={ROOT / 'serve.py'}"], "must be a folder"),
            (["--takes-dir="], "must name a file or a folder"),
        ):
            process, _ = self.start(*flags)
            _, err = process.communicate(timeout=30)
            self.assertNotEqual(process.returncode, 0)
            self.assertRegex(err.splitlines()[-1], f"^serve.py: error: .*{line}")
