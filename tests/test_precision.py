"""Products in float32 are exact on a Mac, unless its user says otherwise."""

import json
import subprocess
import sys

from common import ROOT, Test

WITH_PRODUCTS = (  # in float32, by MLX
    *("t5", "encodec", "demucs", "mert", "melody", "style", "musicgen", "jobs"),
    *("generate", "convert", "train", "train_codec", "evaluate", "benchmark"),
)
PROGRAM = """
import json, os, sys
import mlx.core, mlx.nn, mlx.optimizers, mlx.utils, numpy, sentencepiece, soundfile
import multiprocessing, safetensors.numpy, urllib.request
import mlx.nn.layers.distributed
from huggingface_hub import errors, hf_hub_download, snapshot_download, utils

sys.path.insert(0, sys.argv[1])
found = {}
for name in sys.argv[2:]:
    for platform, value in (("darwin", None), ("darwin", "1"), ("linux", None)):
        os.environ.pop("MLX_ENABLE_TF32", None)
        if value:
            os.environ["MLX_ENABLE_TF32"] = value
        for module, loaded in [*sys.modules.items()]:
            if str(getattr(loaded, "__file__", "")).startswith(sys.argv[1]):
                del sys.modules[module]
        sys.platform = platform
        __import__(name)
        sys.platform = "linux"
        found.setdefault(name, []).append(os.environ.get("MLX_ENABLE_TF32"))
print(json.dumps(found))
"""


class TestPrecision(Test):
    def test_factors_are_not_rounded_on_a_mac(self):
        """MLX rounds them on an M5, unless the environment says "0" at the first
        product. Each script by itself sees to that, on a Mac only."""
        command = [sys.executable, "-c", PROGRAM, str(ROOT), *WITH_PRODUCTS]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.stderr, "")
        for name, (mac, own, linux) in json.loads(done.stdout).items():
            with self.subTest(name):
                self.assertEqual((mac, own, linux), ("0", "1", None))
