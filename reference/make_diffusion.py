"""Make a tiny multi-band diffusion in audiocraft's layout, and what audiocraft computes.

    python make_diffusion.py --audiocraft DIR

writes `diffusion-audiocraft/` beside this file. Runs after make.py, of whose
`mono-audiocraft` it takes the codec. Noises and inputs are numpy's RandomState of the
seeds named here, so that they need not be kept. Needs what make_audiocraft.py needs.
"""

import argparse
import functools
import importlib
import sys
import types
from pathlib import Path
from unittest.mock import patch

import make_audiocraft
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny

HERE = Path(__file__).parent
FOLDER, CODEC = HERE / "diffusion-audiocraft", HERE / "mono-audiocraft"
BANDS, FRAMES, ROWS = 3, 9, 2
CFG = """
one: 1
channels: ${one}
sample_rate: 32000
schedule:
  {repartition: power, variable_step_batch: true, beta_t0: 1.0e-5, beta_t1: 2.9e-2,
   beta_exp: 7.5, num_steps: 1000, variance: beta, clip: 5.0, rescale: 1.0,
   n_bands: null, noise_scale: 1.0}
processor: {name: multi_band_processor, use: false, n_bands: 8, num_samples: 10000, power_std: 0.4}
model: unet
diffusion_unet:
  {hidden: 4, depth: 3, res_blocks: 2, norm_groups: 4, kernel: 8, stride: 4, growth: 2,
   max_channels: 10000, dropout: 0.0, emb_all_layers: true, bilstm: false,
   codec_dim: 0, transformer: false, cross_attention: false}
"""


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(
        np.random.RandomState(seed).standard_normal(shape).astype("f4")
    )


def import_modules(checkout: Path) -> types.SimpleNamespace:
    audiocraft = make_audiocraft.import_audiocraft(checkout)
    for name in ("audiocraft.solvers", "audiocraft.solvers.compression"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["audiocraft.solvers.compression"].CompressionSolver = None
    audiocraft.diffusion = importlib.import_module(
        "audiocraft.models.multibanddiffusion"
    )
    audiocraft.schedule = importlib.import_module(
        "audiocraft.modules.diffusion_schedule"
    )
    return audiocraft


def make_file(audiocraft, path: Path, codec_dim: int) -> None:
    """A file of BANDS bands; the first has no processor."""
    from omegaconf import OmegaConf

    generator, package = torch.Generator().manual_seed(0), {"sample_rate": 32000}
    for band in range(BANDS):
        cfg = OmegaConf.create(CFG)
        cfg.diffusion_unet.codec_dim = codec_dim
        cfg.processor.use, cfg.processor.power_std = band > 0, 0.4 + 0.35 * (band > 1)
        unet = audiocraft.builders.get_diffusion_model(cfg)
        tiny.fill(unet, generator)
        processor = audiocraft.builders.get_processor(cfg.processor, sample_rate=32000)
        if band:
            processor.counts += 50
            processor.sum_x += 0.1 * numbers(band, 8)
            processor.sum_x2 += 5 * numbers(band + 10, 8).abs() + 1
            processor.sum_target_x2 += 5 * numbers(band + 20, 8).abs() + 1
        states = dict(
            model_state=unet.state_dict(), processor_state=processor.state_dict()
        )
        package[band] = dict(cfg=cfg, **states)
    torch.save(package | dict(n_bands=BANDS), path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--audiocraft", type=Path, required=True)
    audiocraft = import_modules(parser.parse_args().audiocraft)
    FOLDER.mkdir(exist_ok=True)
    codec = audiocraft.loaders.load_compression_model(CODEC, device="cpu")
    path = FOLDER / "mbd_tiny.th"
    make_file(audiocraft, path, codec.quantizer.dimension)
    trusting = functools.partial(torch.load, weights_only=False)  # settings, too
    with patch.object(torch, "load", trusting):
        loaded = audiocraft.loaders.load_diffusion_models(path, device="cpu")
    processes = [
        audiocraft.diffusion.DiffusionProcess(
            unet.eval(),
            audiocraft.schedule.NoiseSchedule(
                **cfg.schedule, sample_processor=processor, device="cpu"
            ),
        )
        for unet, processor, cfg in zip(*loaded)
    ]
    model = audiocraft.diffusion.MultiBandDiffusion(processes, codec)
    codes = torch.from_numpy(
        np.random.RandomState(7).randint(0, codec.cardinality, (ROWS, 4, FRAMES))
    )
    found = {"codes": codes, "condition": model.get_emb(codes)}
    N = FRAMES * int(codec.sample_rate / codec.frame_rate)
    x = numbers(1, ROWS, 1, N - 3)
    for band, process in enumerate(processes):
        for step in (0, 499, 999):
            made = process.model(x, step, condition=found["condition"]).sample
            found[f"unet.{band}.{step}"] = made
        found[f"processor.{band}"] = process.schedule.sample_processor.return_sample(x)
    drawn = iter([numbers(100 + i, ROWS, 1, N) for i in range(BANDS * 20)])
    with patch.object(torch, "randn_like", lambda like: next(drawn)):
        found["sample"] = model.generate(found["condition"])
    found["codec"] = codec.decode(codes)
    found["re_eq"] = model.re_eq(found["sample"], found["codec"])
    drawn = iter([numbers(100 + i, ROWS, 1, N) for i in range(BANDS * 20)])
    with patch.object(torch, "randn_like", lambda like: next(drawn)):
        found["whole"] = model.tokens_to_wav(codes)
    split = importlib.import_module("julius").SplitBands
    for rate, count in ((32000, 8), (24000, 8), (32000, 32)):
        bands = split(sample_rate=rate, n_bands=count)
        found[f"filters.{rate}.{count}"] = bands.lowpass.filters[[0, -1], 0]
    found["bands"] = split(sample_rate=32000, n_bands=8)(x[:1, :, :2000])
    found = {k: v.contiguous() for k, v in found.items() if k not in ("condition",)}
    save_file(found, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
