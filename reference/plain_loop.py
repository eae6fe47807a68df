"""Time the loop of musicgen.py against the same loop without its tricks.

    python reference/plain_loop.py [small|medium|large] [--steps 16]

The plain loop does what a first port does: queries, keys and values by three
products, keys and values of the text projected in every step, a table and a head
for each codebook, a cache that is copied to grow, positions and masks made anew,
a sort to sample. Both use the same random weights and, greedily, give the same
codes, which is checked. Needs nothing but the project's own requirements.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmark  # noqa: E402
from musicgen import Decoder, Layer, delay_mask, sinusoids, undelay  # noqa: E402


class PlainLayer:
    """A decoder layer that computes all it needs from the fused one's weights."""

    def __init__(self, layer: Layer, heads: int):
        self.layer, self.heads = layer, heads
        self.q, self.k, self.v = mx.split(layer.self_attn.in_proj.weight, 3)
        self.text_k, self.text_v = mx.split(layer.cross_attention.kv_proj.weight, 2)
        self.past = None
        mx.eval(self.q, self.k, self.v, self.text_k, self.text_v)

    def split(self, x: mx.array) -> mx.array:
        """(R, S, D) -> (R, H, S, d)."""
        R, S, _ = x.shape
        return x.reshape(R, S, self.heads, -1).transpose(0, 2, 1, 3)

    def attend(self, q, k, v, mask=None) -> mx.array:
        q, k, v = map(self.split, (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(0, 1, 3, 2)
        scores = scores if mask is None else scores + mask
        x = mx.softmax(scores, axis=-1) @ v
        R, H, S, width = x.shape
        return x.transpose(0, 2, 1, 3).reshape(R, S, H * width)

    def __call__(self, x: mx.array, text: mx.array, mask: mx.array) -> mx.array:
        layer = self.layer
        y = layer.norm1(x)
        k, v = y @ self.k.T, y @ self.v.T
        if self.past is not None:
            k, v = (mx.concatenate([a, b], axis=1) for a, b in zip(self.past, (k, v)))
        self.past = k, v
        x = x + layer.self_attn.out_proj(self.attend(y @ self.q.T, k, v))
        y = layer.cross_attention.q_proj(layer.norm_cross(x))
        y = self.attend(y, text @ self.text_k.T, text @ self.text_v.T, mask)
        x = x + layer.cross_attention.out_proj(y)
        return x + layer.linear2(nn.gelu(layer.linear1(layer.norm2(x))))


class PlainLoop:
    """Greedy codes of a text, one step after another."""

    def __init__(self, decoder: Decoder):
        self.decoder, config = decoder, decoder.config
        K, V = config.num_codebooks, config.vocab_size
        self.tables = mx.split(decoder.emb.weight, K)
        self.heads = mx.split(decoder.linears.weight, K)
        self.layers = [
            PlainLayer(layer, config.num_attention_heads) for layer in decoder.layers
        ]
        self.blank = V
        mx.eval(self.tables, self.heads)

    def logits(
        self, tokens: mx.array, text: mx.array, mask: mx.array, step: int
    ) -> mx.array:
        """Logits (R, 1, K, V) of step `step`, tokens (R, 1, K)."""
        x = sum(table[tokens[..., k]] for k, table in enumerate(self.tables))
        x = x + sinusoids(step + 1, x.shape[-1])[step].astype(x.dtype)
        bias = mx.where(mask | ~mask.any(axis=1, keepdims=True), 0, -mx.inf)
        bias = bias[:, None, None].astype(x.dtype)
        for layer in self.layers:
            x = layer(x, text, bias)
        x = self.decoder.out_norm(x)
        return mx.stack([x @ head.T for head in self.heads], axis=2)

    def generate(self, states: mx.array, mask: mx.array, frames: int) -> list[float]:
        """Codes (B, T, K) of text states (2B, L, width), and each step's seconds."""
        delays = self.decoder.config.delays
        is_code = delay_mask(frames, delays)
        text = self.decoder.output_proj(states) * mask[..., None]
        tokens = mx.full((len(states) // 2, 1, len(delays)), self.blank)
        steps, seconds = [], []
        for step in range(len(is_code)):
            start = time.perf_counter()
            rows = mx.concatenate([tokens, tokens])
            logits = self.logits(rows, text, mask, step)
            given, null = mx.split(logits, 2)
            logits = null + 3 * (given - null)
            tokens = mx.argsort(logits, axis=-1)[..., -1]
            tokens = mx.where(is_code[step], tokens, self.blank)
            mx.eval(tokens)
            seconds.append(time.perf_counter() - start)
            steps.append(tokens)
        return undelay(mx.concatenate(steps, axis=1), delays), seconds


def compare(name: str, steps: int, dtype: mx.Dtype) -> None:
    model = benchmark.random_model(name, dtype, q_bits=None)
    frames = steps - max(model.config.decoder.delays)
    stamps = []

    def stamp(*_) -> None:
        stamps.append(time.perf_counter())

    text, mask = model.encode_text([benchmark.PROMPT], with_null=True)
    mx.eval(text)
    for module in model.decoder.modules():  # as they are in the file
        if isinstance(module, nn.Linear):
            module.weight = mx.contiguous(module.weight)
    mx.eval(model.decoder.parameters())
    codes, plain = PlainLoop(model.decoder).generate(text, mask, frames)
    if mx.default_device() == mx.cpu:
        model.decoder.store_columns()
    ours = model.generate_codes(
        benchmark.PROMPT, duration=(frames + 0.5) / 50, temp=0, callback=stamp
    )
    mx.eval(ours)
    gaps = [b - a for a, b in zip(stamps[1:], stamps[2:])]
    same = (codes == ours).mean().item()
    plain, ours = statistics.median(plain[1:]), statistics.median(gaps)
    print(f"{name}: plain {plain * 1e3:.1f} ms a step, ours {ours * 1e3:.1f} ms,")
    print(f"{plain / ours:.2f} times; {same:.1%} of the codes are the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="small", choices=benchmark.SIZES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    compare(args.model, args.steps, getattr(mx, args.dtype))


if __name__ == "__main__":
    main()
