"""benchmark.py prints what it says."""

import io
import itertools
import os
import re
from contextlib import redirect_stdout
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, Test, exact, slow

import benchmark
import demucs
import engine


class TestBenchmark(Test):
    def table(self, *arguments: str) -> dict[str, str]:
        with patch("sys.argv", ["benchmark.py", *arguments]):
            with redirect_stdout(io.StringIO()) as out:
                benchmark.main()
        *lines, self.line = out.getvalue().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines]
        return dict(row for row in rows if len(row) == 2)

    @slow(8)
    def test_model(self):
        folder = str(REFERENCE / "mono-audiocraft")
        rows = self.table("--model", folder, "--duration", "0.4", "--batch", "2")
        self.assertEqual((rows["model"], rows["takes"]), (folder, "2 of 0.4 s"))
        self.assertRegex(rows["step"], r"^[\d.]+ ms mean, [\d.]+ median, [\d.]+ worst$")
        self.assertRegex(rows["streaming"], "^first sound after .* s, a take in .* s$")
        self.assertGreater(int(rows["operations per step"]), 20)

    def test_line_to_send(self):
        folder = str(REFERENCE / "mono-audiocraft")
        rows = self.table("--model", folder, "--duration", "0.2")
        told = [rows[name] for name in ("device", "model", "decoder", "takes", "step")]
        self.assertTrue(
            self.line.startswith(f"To send: {'; '.join(told)}; "), self.line
        )
        self.assertIn(f"; MLX {mx.__version__}; ", self.line)
        on_cpu = mx.default_device() == mx.cpu
        self.assertEqual("MUSICGEN_COLUMNS" in self.line, not on_cpu)

    def test_columns_are_tried(self):
        """On a GPU: in turns, and what was set before is set again."""
        model, tried = exact("mono-audiocraft"), []
        project = engine.project

        def record(layer, x, *residual):
            tried.append((os.environ["MUSICGEN_COLUMNS"], engine.max_columns()))
            return project(layer, x, *residual)

        for value in ("7", None):
            with patch.dict(os.environ), patch("engine.project", record):
                os.environ.pop("MUSICGEN_COLUMNS", None)
                if value:
                    os.environ["MUSICGEN_COLUMNS"] = value
                times = benchmark.columns_times(model, 0.2)
                self.assertEqual(os.environ.get("MUSICGEN_COLUMNS"), value)
            self.assertEqual([*times], [0, 2])
            self.assertTrue(all(0 < ms < 1e4 for ms in times.values()))
            turns = [columns for columns, _ in itertools.groupby(tried)]
            self.assertEqual(turns, [("0", 0), ("2", 2)] * 3)
            tried.clear()

    @slow(6)
    def test_plain(self):
        folder = str(REFERENCE / "mono-audiocraft")
        flags = ("--model", folder, "--duration", "0.4")
        plain, fast = self.table(*flags, "--plain"), self.table(*flags)
        fast.pop("step, one take", None)  # with columns and without: on a GPU
        self.assertEqual(plain.keys(), fast.keys())
        plain, fast = (int(rows["operations per step"]) for rows in (plain, fast))
        self.assertGreater(plain, 1.5 * fast)

    def test_quantized(self):
        folder = str(REFERENCE / "mono-transformers")
        for flags, told in (
            (["--q-mode", "nvfp4"], "4 bit (nvfp4)"),
            (["--q-bits", "8", "--q-group-size", "32"], "8 bit"),
        ):
            rows = self.table("--model", folder, "--duration", "0.1", *flags)
            self.assertRegex(rows["decoder"], rf"^float(16|32), {re.escape(told)}$")
        with patch.dict(benchmark.SIZES, small=(64, 1)):
            rows = self.table("--random", "small", "--duration", "0.1", *flags)
        self.assertRegex(rows["decoder"], rf"^float(16|32), {re.escape(told)}$")

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
