"""alone.py's trials of multi-band diffusion."""

from pathlib import Path

import mlx.core as mx
import numpy as np

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
WEIGHTS = REFERENCE / "diffusion-audiocraft" / "mbd_tiny.th"
NOISE = mx.array(np.random.default_rng(0).normal(size=(1, 3000, 1)), mx.float32)


def try_bands(bands):
    parts = bands.split_bands(NOISE, 32000, 8)
    assert mx.allclose(parts.sum(axis=0), NOISE, atol=1e-5).item()


def try_matmul_conv(matmul_conv):
    down = matmul_conv.StridedConv1d(1, 3, 8, stride=4)(NOISE)
    assert matmul_conv.ConvTranspose1d(3, 1, 8, stride=4)(down).shape == NOISE.shape


def try_diffusion(diffusion):
    model = diffusion.MultiBandDiffusion.from_pretrained(WEIGHTS)
    assert model.unet(1)(NOISE, 499, mx.zeros((1, 5, 16))).shape == NOISE.shape


def try_diffusion_files(diffusion_files):
    files = diffusion_files.open_files(WEIGHTS)
    assert files.read(0, lambda parts: parts.sizes["hidden"]) == 4


def try_diffusion_job(diffusion_job):
    assert diffusion_job.make_decoder("encodec") is None
    assert diffusion_job.make_decoder("diffusion") == "diffusion"
