"""benchmark.py prints what it says."""

import io
from contextlib import redirect_stdout
from unittest.mock import patch

from common import REFERENCE, Test, slow

import benchmark
import demucs


class TestBenchmark(Test):
    def table(self, *arguments: str) -> dict[str, str]:
        with patch("sys.argv", ["benchmark.py", *arguments]):
            with redirect_stdout(io.StringIO()) as out:
                benchmark.main()
        rows = [line.strip("| ").split(" | ") for line in out.getvalue().splitlines()]
        return dict(row for row in rows if len(row) == 2)

    @slow(8)
    def test_model(self):
        folder = str(REFERENCE / "mono-audiocraft")
        rows = self.table("--model", folder, "--duration", "0.4", "--batch", "2")
        self.assertEqual((rows["model"], rows["takes"]), (folder, "2 of 0.4 s"))
        self.assertRegex(rows["step"], r"^[\d.]+ ms mean, [\d.]+ median, [\d.]+ worst$")
        self.assertRegex(rows["streaming"], "^first sound after .* s, a take in .* s$")
        self.assertGreater(int(rows["operations per step"]), 20)

    @slow(6)
    def test_plain(self):
        folder = str(REFERENCE / "mono-audiocraft")
        flags = ("--model", folder, "--duration", "0.4")
        plain, fast = self.table(*flags, "--plain"), self.table(*flags)
        self.assertEqual(plain.keys(), fast.keys())
        plain, fast = (int(rows["operations per step"]) for rows in (plain, fast))
        self.assertGreater(plain, 1.5 * fast)

    def test_training(self):
        folder = str(REFERENCE / "mono-audiocraft")
        flags = ("--duration", "0.4", "--batch", "2", "--lora", "3")
        rows = self.table("--model", folder, *flags)
        self.assertRegex(rows["training step"], "^.* s for 2 of 0.4 s, rank 3$")

    def test_separation(self):
        config = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs").config
        with patch("demucs.HTDemucsConfig", return_value=config):
            rows = self.table("--random", "htdemucs", "--duration", "0.5")
        self.assertRegex(rows["separation"], "^.* s for 0.5 s of audio, .* times real")
