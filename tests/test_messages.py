"""What people read: one clean line, and terminals that are gone."""

import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import mlx.core as mx
from common import REFERENCE, ROOT, ScriptTest

import messages
import settings


class TestMessages(ScriptTest):
    def test_one_line(self):
        for text, line in (
            ("a\n\n b\t c ", "a b c"),
            ("\x1b]0;title\x07red\x9b1m", r"\x1b]0;title\x07red\x9b1m"),
            ("left\u202eright\ud800", r"left\u202eright\ud800"),
            ("häppy 音楽 🎸", "häppy 音楽 🎸"),
        ):
            self.assertEqual(messages.one_line(text), line)
        long = messages.one_line(f"begin {'x' * 99_888} end")
        self.assertLess(len(long), messages.LONGEST + 1)
        self.assertRegex(long, "^begin x+ ... x+ end$")

    def test_what_an_encoding_lacks_is_spelled_out(self):
        """And nothing is lost of it."""
        for encoding, shown in (
            ("ascii", r"h\xe4ppy \u97f3\u697d \U0001f3b8"),
            ("latin-1", r"häppy \u97f3\u697d \U0001f3b8"),
            ("utf-8", "häppy 音楽 🎸"),
        ):
            file = io.TextIOWrapper(io.BytesIO(), encoding)
            print("häppy 音楽 🎸", file=messages.Forgiving(file), flush=True)
            self.assertEqual(file.buffer.getvalue().decode(encoding), f"{shown}\n")

    def test_a_take_is_named_whatever_the_terminal_shows(self):
        """On both of its streams."""
        command = [sys.executable, str(ROOT / "generate.py"), "-p", "音楽", "-s", "3"]
        command += ["--model", str(REFERENCE / "stereo-audiocraft"), "-d", "0.1"]
        name = r"\u97f3\u697d-3.wav"
        for more, place in (([], "stdout"), (["-o", "音楽-3.wav"], "stderr")):
            ends = dict(capture_output=True, cwd=self.folder, text=True)
            ends["env"] = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
            told = getattr(subprocess.run([*command, *more], **ends), place)
            self.assertIn(name, told, more)

    def test_texts_of_files_reach_the_terminal_clean(self):
        self.enterContext(chdir(self.folder))
        hostile = "\x1b[2J" + "x" * 99_888
        model = str(REFERENCE / "stereo-audiocraft")
        for lines in (
            '{"prompt": "a", "output": "%s.wav"}' % hostile.replace("\x1b", "\\u001b"),
            f'["{hostile}"]',
            json.dumps({"prompt": "a", hostile: 3}),
            json.dumps({"prompt": "a", "style": hostile}),
        ):
            Path("p.jsonl").write_text(lines)
            status, _, err = self.run_script("--prompts", "p.jsonl", "--model", model)
            self.assertEqual(status, 1)
            self.assertNotIn("\x1b", err)
            self.assertLess(len(err), 2000)
        codes = mx.zeros((1, 9, 8), mx.uint32)
        settings.save_codes("c.safetensors", codes, {"dtype": hostile, "prompt": "a"})
        status, _, err = self.run_script("--again", "c.safetensors")
        self.assertEqual(status, 2)
        self.assertNotIn("\x1b", err)
        self.assertLess(len(err), 2000)

    def test_a_terminal_that_is_gone_costs_no_take(self):
        command = [sys.executable, str(ROOT / "generate.py"), "-p", "a", "--seed", "3"]
        command += ["--model", str(REFERENCE / "stereo-audiocraft"), "--duration", "1"]
        for i, end in enumerate(
            ("2>&-", ">&-", ">&- 2>&-", "2>/dev/full", ">/dev/full", "2>&1 | true")
        ):
            path = self.folder / f"{i}.wav"
            words = [
                *command,
                "--takes",
                "2",
                "--batch-size",
                "1",
                "--output",
                str(path),
            ]
            line = f"{shlex.join(words)} {end}; exit ${{PIPESTATUS[0]}}"
            run = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
            self.assertEqual((end, run.returncode), (end, 0), run.stderr)
            self.assertTrue(path.with_stem(f"{i}-1").exists(), end)
            self.assertTrue(path.with_stem(f"{i}-2").exists(), end)
            self.assertNotIn("Traceback", run.stderr + run.stdout)
            self.assertNotIn("Exception ignored", run.stderr + run.stdout)
