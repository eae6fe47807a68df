"""The curl lines of GUIDE.md, in their order, against a server of `tiny`."""

import json
import re
import shlex
import shutil
import subprocess
import unittest
from unittest.mock import patch

import numpy as np
import soundfile
from common import REFERENCE, ROOT, slow
from serving import ServerTest

import demucs
import synth
from audio import save_audio

SHORTER = {  # what would take long
    '"duration_seconds": 8': '"duration_seconds": 1',
    '"part": "2:4"': '"part": "0.2:0.4"',
    '"seconds": 4': '"seconds": 0.5',
    '"seed": 7, "stream"': '"seed": 7, "duration": 1, "stream"',
    '"prompt": "fast saw", "stream"': '"prompt": "fast saw", "duration": 1, "stream"',
    '"decoder": "diffusion"': '"decoder": "encodec"',
    "prompt_length=2": "prompt_length=0.2 -F duration=0.5",
}


def lines() -> list[str]:
    guide = (ROOT / "GUIDE.md").read_text()
    section = guide.split("\n## A page to play on\n")[1].split("\n## ")[0]
    return re.findall("^curl .*$", section, re.MULTILINE)


@unittest.skipUnless(shutil.which("curl"), "curl is not installed")
class TestGuide(ServerTest):
    def setUp(self):
        super().setUp()
        clip = synth.render(synth.KNOWN[0], np.random.default_rng(0), 2.0)[:, None]
        for name in ("song.mp3", "hummed.wav"):
            save_audio(self.folder / name, clip, 32000)
        model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        load = patch("demucs.HTDemucs.from_pretrained", return_value=model)
        self.enterContext(load)

    def run_line(self, line: str) -> bytes:
        """What a line prints. Its status must be one of success."""
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        line = line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        words = [*shlex.split(line), "--fail-with-body", "--silent", "--show-error"]
        done = subprocess.run(words, cwd=self.folder, capture_output=True)
        self.assertEqual(done.returncode, 0, (line, done.stderr, done.stdout[:300]))
        return done.stdout

    @slow(6)
    def test_each_line(self):
        printed = {}
        for line in lines():
            with self.subTest(line):
                printed[line] = self.run_line(line)
                if found := re.search(r"-o (\S+)", line):
                    self.assertGreater(soundfile.info(self.folder / found[1]).frames, 0)
                elif " -N " in line:
                    self.assertTrue(
                        printed[line].endswith(b"event: done\ndata: {}\n\n")
                    )
                else:
                    self.assertTrue(json.loads(printed[line]))
        self.assertGreater(len(printed), 10)

    def test_every_route_is_told(self):
        guide = (ROOT / "GUIDE.md").read_text()
        told = set(re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", guide))
        same = {("GET", "/takes/ID.wav"), ("GET", "/takes/ID")}
        self.assertLessEqual(same, told)
        import serve

        for route in serve.ROUTES:
            path = route.path.replace("{id}", "ID")
            path = path.replace(
                "/api/juce/poll_status/ID", "/api/juce/poll_status/SESSION"
            )
            path = path.replace("/api/juce/{name}", "/api/juce/process_audio")
            if path not in ("/", "/takes/ID/stems/{name}"):
                self.assertIn((route.method, path), told)
