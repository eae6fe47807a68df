"""Write a full-size checkpoint with random weights.

    python random_checkpoint.py small DIR --spiece spiece.model

gives the files, names, shapes and dtypes of facebook/musicgen-small in
audiocraft's layout, next to a t5-base encoder: enough to measure speed and
memory, or to try a conversion, without downloading anything. What it plays is
noise. NAME is small, medium, large, stereo-small, stereo-medium or
stereo-large. Needs torch; `--spiece` is T5's tokenizer, any SentencePiece
model with 32,000 pieces.
"""

import argparse
import json
import math
import re
import shutil
from pathlib import Path

import manifests
import numpy as np
import torch
import xpcfg
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1.4.0a2"
# Long tensors repeat this many values, drawn once.
POOL = 1 << 22


class Weights:
    """Draws plausible weights by name, quickly: slices of one random pool."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.pool = torch.from_numpy(self.random.standard_normal(POOL, np.float32))

    def normal(self, shape: tuple[int, ...], std: float) -> Tensor:
        """Return normal values; a run of the pool starts at a random place."""
        size = math.prod(shape)
        start = int(self.random.integers(POOL))
        repeats = (start + size) // POOL + 1
        values = self.pool.repeat(repeats)[start : start + size]
        return (values * std).reshape(shape)

    def draw(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        return self.values(name, shape).to(getattr(torch, dtype))

    def values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("inited"):
            return torch.ones(shape)
        if name.endswith("weight_g"):
            return self.gain(name, shape)
        if name.endswith(("embed", "embed_avg", "weight_v")):
            return self.normal(shape, 1.0)
        if name.endswith("cluster_size"):
            return torch.ones(shape)
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and "bias" not in name))
        if re.search(r"shared|relative_attention_bias", name):
            return self.normal(shape, 1.0)
        return self.normal(shape, 0.8 / math.sqrt(shape[-1]))

    def gain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Weight norms that keep the variance of what passes through.

        A convolution's rows span (in, kernel), so a norm of one does. Those of
        a transposed one span (out, kernel), with two taps to every sample.
        """
        kernel = self.kernels.get(name, 4)
        return torch.full(shape, math.sqrt(kernel) / 2)

    def fill(self, manifest: dict) -> dict[str, Tensor]:
        full = manifests.expand(manifest)
        self.kernels = transposed_kernels(full)
        return {name: self.draw(name, *entry) for name, entry in full.items()}


def transposed_kernels(full: dict) -> dict[str, int]:
    """Map the weight_g of each transposed convolution to its kernel size.

    Their first axis is the input, and so differs in length from the bias.
    """
    kernels = {}
    for name, (_, shape) in full.items():
        stem = name.removesuffix("weight_v")
        if stem != name and full[f"{stem}bias"][1][0] != shape[0]:
            kernels[f"{stem}weight_g"] = shape[-1]
    return kernels


def lm_cfg(config: dict) -> str:
    decoder = config["decoder"]
    return xpcfg.lm_cfg(
        stereo=decoder["num_codebooks"] == 8,
        layers=decoder["num_hidden_layers"],
        dim=decoder["hidden_size"],
        heads=decoder["num_attention_heads"],
        hidden_scale=4,
        card=decoder["vocab_size"],
    )


def package(state: dict[str, Tensor], cfg: str) -> dict:
    return {"best_state": state, "xp.cfg": cfg, "version": VERSION, "exported": True}


def write_codec(stored: dict, name: str, folder: Path, weights: Weights) -> None:
    """Write compression_state_dict.bin: a codec, or a pointer and its codec."""
    path = folder / "compression_state_dict.bin"
    pointer = stored["compression"][name]
    if "pretrained" not in pointer:
        state = weights.fill(stored["tensors"]["encodec_32khz.audiocraft"])
        cfg = xpcfg.codec_cfg(dimension=128, filters=64, bins=2048)
        torch.save(package(state, cfg), path)
        return
    torch.save(pointer | {"version": VERSION}, path)
    write_transformers(stored, "encodec_32khz", folder, weights)


def write_transformers(stored: dict, name: str, folder: Path, weights: Weights) -> None:
    """Write folder/name with the config.json and model.safetensors of that model."""
    tensors = stored["tensors"][f"{name}.transformers"]
    tensors = {k: v for k, v in tensors.items() if name != "t5-base" or encodes(k)}
    (folder / name).mkdir(parents=True, exist_ok=True)
    config = json.dumps(stored["configs"][name], indent=2) + "\n"
    (folder / name / "config.json").write_text(config)
    state = weights.fill(tensors)
    save_file(state, folder / name / "model.safetensors", {"format": "pt"})


def encodes(name: str) -> bool:
    return name == "shared.weight" or name.startswith("encoder.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="which model: small, stereo-large...")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--spiece", type=Path, help="T5's spiece.model, to copy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    name = "musicgen-" + args.name.removeprefix("musicgen-")
    if name not in manifests.MUSICGEN:
        parser.error(f"name must be one of {manifests.MUSICGEN}, got {args.name}.")
    stored, weights = manifests.read(), Weights(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    write_codec(stored, name, args.folder, weights)
    write_transformers(stored, "t5-base", args.folder, weights)
    if args.spiece:
        shutil.copyfile(args.spiece, args.folder / "t5-base" / "spiece.model")
    state = weights.fill(stored["tensors"][f"{name}.audiocraft"])
    cfg = lm_cfg(stored["configs"][name])
    torch.save(package(state, cfg), args.folder / "state_dict.bin")


if __name__ == "__main__":
    main()
