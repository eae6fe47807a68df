"""Run transformers and this project on the same shapes, in turn, and print the ratio.

    python benchmark.py small medium large [--steps 100]

Random weights of full size, one take with guidance, the decoder in bfloat16 on a GPU
and float32 on the CPU. Needs torch and transformers beside what the project needs.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import manifests
import torch
import transformers

PROJECT = Path(__file__).resolve().parent.parent


def transformers_step(name: str, steps: int) -> float:
    """Seconds per step of transformers' own generate."""
    config = manifests.read()["configs"][f"musicgen-{name}"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.MusicgenForConditionalGeneration(
            transformers.MusicgenConfig.from_dict(config)
        )
    model = model.to(dtype).eval()
    settings = {"pad_token_id": 2048, "bos_token_id": 2048, "guidance_scale": 3.0}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.generation_config.decoder_start_token_id = 2048
    ids = torch.arange(2, 14, device=device)[None]
    mask = torch.ones_like(ids)

    def run(count: int) -> float:
        start = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(8)
    return (run(steps + 8) - run(8)) / steps  # without text and codec


def our_step(name: str, steps: int) -> float:
    """Seconds per step that ../benchmark.py reports."""
    command = [sys.executable, "benchmark.py", "--random", name]
    command += ["--duration", str(steps / 50)]
    if torch.cuda.is_available():
        command += ["--dtype", "bfloat16"]
    result = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return float(re.search(r"\| step \| ([\d.]+) ms", result.stdout)[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print("| | transformers | MLX | ratio |\n|---|---|---|---|")
    for name in args.names:
        theirs = transformers_step(name, args.steps)
        torch.cuda.empty_cache()
        ours = our_step(name, args.steps)
        print(
            f"| {name} | {theirs * 1e3:.1f} ms | {ours * 1e3:.2f} ms "
            f"| {theirs / ours:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
