"""What several tests need. `test.py` makes the scripts importable."""

import io
import json
import shutil
import sys
import tempfile
import unittest
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds

import generate
from checkpoints import read
from decoder import Condition, Decoder, DecoderConfig
from magnet import MAGNeT
from musicgen import MusicGen

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "reference"
EXPECTED = json.loads((REFERENCE / "expected.json").read_text())
TRANSFORMERS = ("mono-transformers", "stereo-transformers")
AUDIOCRAFT = ("mono-audiocraft", "stereo-audiocraft")


def expected(name: str) -> dict[str, mx.array]:
    return mx.load(str(REFERENCE / name / "expected.safetensors"))


def last(array: mx.array) -> mx.array:
    """The originals put time last; we put channels, codebooks, vocabulary last."""
    return array.swapaxes(1, 2)


def exact(name: str) -> MusicGen:
    """A model of the reference in float32, which is not every device's own choice."""
    return MusicGen.from_pretrained(REFERENCE / name, mx.float32)


def random_magnet(longest: float = 1.0, name: str = "mono-transformers") -> MAGNeT:
    """A reference MusicGen's weights, taken for those of a MAGNeT, with a codec that is
    not so loud."""
    files = read(str(REFERENCE / name))
    files.config.masking = dict(span_len=3, subcodes_context=5)
    files.config.max_duration = files.config.default_duration = longest
    model = MAGNeT.from_pretrained(REFERENCE / name, mx.float32, files=files)
    last = model.audio_encoder.decoder.layers[-1].conv
    last.weight, last.bias = last.weight / 100, last.bias / 100
    return model


# Runs generate.py so that it tells of every step, as a terminal would see it.
TELLING = """
import runpy
import progress
progress.MINUTE = 0
runpy.run_path("generate.py", run_name="__main__")
"""


def slow(seconds: float) -> Callable:
    """Marks a test that takes so much of a CPU: test.py begins with the slowest."""

    def mark(test: Callable) -> Callable:
        test.seconds = seconds
        return test

    return mark


class Test(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def assertClose(self, got: mx.array, want: mx.array, tolerance: float = 1e-4):
        """Relative to the largest expected value, or to 1 where that is less."""
        self.assertEqual(got.shape, want.shape)
        got, want = np.array(got, np.float64), np.array(want, np.float64)
        scale = max(np.abs(want).max(initial=0), 1)
        self.assertLess(np.abs(got - want).max(initial=0) / scale, tolerance)

    def assertSame(self, got: mx.array, want: mx.array):
        got, want = np.array(got), np.array(want)
        self.assertEqual(got.shape, want.shape)
        different = np.argwhere(got != want)
        self.assertEqual(len(different), 0, f"first at {different[:1]}")

    def copy(self, name: str) -> Path:
        """A copy of a reference checkpoint, to be damaged."""
        return Path(shutil.copytree(REFERENCE / name, self.folder / name))


class ScriptTest(Test):
    """Of generate.py's command line, in this process."""

    def run_script(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(
            io.StringIO()
        ) as err:
            with patch("sys.argv", ["generate.py", *map(str, arguments)]):
                try:
                    generate.main()
                    status = 0
                except SystemExit as stop:
                    status = stop.code
                    if isinstance(status, str):  # as the interpreter does
                        print(status, file=sys.stderr)
                        status = 1
        return status, out.getvalue(), err.getvalue()


class FollowingTest(ScriptTest):
    """Of commands with a `model` that follows a sound."""

    def run_script(self, *arguments: str) -> tuple[int, str, str]:
        common = ["--model", self.model, "--duration", "0.3", "--seed", "3"]
        return super().run_script(*arguments, *common)

    def make(self, name: str, *arguments: str) -> np.ndarray:
        output = ["--output", self.folder / name, "--force"]
        status, _, err = self.run_script(*output, *arguments)
        self.assertEqual(status, 0, err)
        return soundfile.read(self.folder / name)[0]


def random_decoder(dtype: mx.Dtype = mx.float32):
    """A tiny decoder, the condition of two texts of different lengths, tokens."""
    config = DecoderConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=20,
    )
    mx.random.seed(0)
    decoder = Decoder(config, text_width=12)
    decoder.set_dtype(dtype)
    mask = mx.arange(5) < mx.array([[3], [5]])
    text = Condition(mx.random.normal((2, 5, 12)), mask)
    return decoder, text, mx.random.randint(0, 11, (2, 9, 4))
