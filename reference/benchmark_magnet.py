"""Run MAGNeT in torch and in this project on the same shapes, in one run.

    python benchmark_magnet.py magnet-small-30secs magnet-medium-30secs [--batches 1 16]

Random weights of full size, takes of 30 s with guidance and sampling within the top p.
The loop in torch is a plain one of the same passes, in float16 with torch's own fused
attention, whose masks are not causal. On the CPU, float32 and `--duration` make it a
check. Beside it MusicGen of the same size. Needs torch beside what the project needs.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECT = Path(__file__).resolve().parent.parent
SIZES = {"small": (1024, 24), "medium": (1536, 48)}  # hidden size, layers
V, K, SPAN, CONTEXT, TOKENS = 2048, 4, 3, 5, 12  # of a text: tokens
PASSES = (20, 10, 10, 10)
TEMP, TOP_P, MOST, LEAST = 3.0, 0.9, 10.0, 1.0


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        sizes = dict(qkv=3, out=1, q=1, cross_out=1)
        for name, times in sizes.items():
            setattr(self, name, nn.Linear(width, times * width, bias=False))
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        parts = map(self.split, self.qkv(self.norms[0](x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        queries = self.split(self.q(self.norms[1](x)))
        y = F.scaled_dot_product_attention(
            queries, *map(self.split, self.kv(text).chunk(2, -1))
        )
        x = x + self.cross_out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[2](x))))


class Model(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.emb = nn.ModuleList(nn.Embedding(V + 1, width) for _ in range(K))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, V, bias=False) for _ in range(K))

    def forward(self, codes: Tensor, stage: int, text: Tensor, mask) -> Tensor:
        x = sum(table(codes[:, k]) for k, table in enumerate(self.emb))
        x = x + positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for layer in self.layers:
            x = layer(x, text, mask)
        return self.heads[stage](self.norm(x))


def positions(count: int, width: int, device) -> Tensor:
    half = width // 2
    period = 10000.0 ** (torch.arange(half, device=device) / (half - 1))
    phase = torch.arange(count, device=device)[:, None] / period
    return torch.cat([phase.cos(), phase.sin()], -1)


def draw(probs: Tensor) -> Tensor:
    """Tokens (B, T) of probabilities (B, T, V), within the top p."""
    ordered, places = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > TOP_P] = 0
    picked = torch.multinomial(ordered.flatten(0, 1), 1).view(*probs.shape[:2], 1)
    return places.gather(-1, picked)[..., 0]


@torch.inference_mode()
def take(
    model: Model, text: Tensor, batch: int, frames: int, counts: tuple[int, ...]
) -> Tensor:
    """Codes (B, K, T), as audiocraft's loop makes them in so many passes."""
    device, dtype = text.device, text.dtype
    place = torch.arange(frames, device=device)
    far = (place[:, None] - place).abs() > CONTEXT
    near = torch.zeros(frames, frames, device=device, dtype=dtype)
    near = near.masked_fill(far, -math.inf)
    codes = torch.full((batch, K, frames), V, device=device)
    for stage, passes in enumerate(counts):
        scores = torch.zeros(batch, frames // SPAN, device=device)
        for step in range(passes):
            share = math.cos(step / max(passes - 1, 1) * math.pi / 2)
            count = max(int(share * scores.shape[1]), 1)
            again = torch.zeros_like(scores, dtype=torch.bool)
            again.scatter_(1, scores.topk(count, -1).indices, True)
            masked = again.repeat_interleave(SPAN, 1)
            own = codes[:, stage].masked_fill(masked, V)
            codes[:, stage] = own
            logits = model(codes.repeat(2, 1, 1), stage, text, near if stage else None)
            cond, null = logits.float().chunk(2)
            logits = null + (cond - null) * (share * MOST + (1 - share) * LEAST)
            temp = max(TEMP * (passes - 1 - step) / passes, 0.01)
            probs = (logits / temp).softmax(-1)
            tokens = draw(probs)
            codes[:, stage] = torch.where(masked, tokens, own)
            found = probs.gather(-1, tokens[..., None])[..., 0]
            scores = 1 - found.unflatten(1, (-1, SPAN)).amax(-1)
            scores = scores.masked_fill(~again, -1e4)
    return codes


def torch_take(size: str, batch: int, duration: float) -> float:
    """Seconds of a take, after one in four passes."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.float16 if on_gpu else torch.float32
    width, layers = SIZES[size]
    with torch.device(device):
        model = Model(width, layers).to(dtype).eval()
        text = torch.randn(2 * batch, TOKENS, width, dtype=dtype)
    frames = int(duration * 50) // SPAN * SPAN
    take(model, text, batch, frames, (1,) * K).cpu()
    start = time.perf_counter()
    take(model, text, batch, frames, PASSES).cpu()
    return time.perf_counter() - start


def our_take(name: str, batch: int, duration: float) -> float:
    """Seconds that ../benchmark.py reports for the generation."""
    command = [sys.executable, "benchmark.py", "--random", name]
    command += ["--duration", str(duration), "--batch", str(batch)]
    result = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    return float(re.search(r"\| generation \| ([\d.]+) s", result.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--duration", type=float, default=30.0)
    args = parser.parse_args()
    print(
        "| | takes | MusicGen | MAGNeT in torch | MAGNeT here |\n|---|---|---|---|---|"
    )
    for name in args.names:
        size = name.split("-")[1]
        for batch in args.batches:
            plain = torch_take(size, batch, args.duration)
            torch.cuda.empty_cache()
            ours = our_take(name, batch, args.duration)
            musicgen = our_take(size, batch, args.duration)
            row = f"{musicgen:.2f} s | {plain:.2f} s | {ours:.2f} s |"
            print(f"| {name} | {batch} | {row}", flush=True)


if __name__ == "__main__":
    main()
