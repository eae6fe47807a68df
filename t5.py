"""T5 text encoder: text -> hidden states.

The encoder half of T5 (Raffel et al., https://arxiv.org/abs/1910.10683) in
float32, with relu or gated feed-forward, and a tokenizer that needs only the
published `spiece.model`. Stands alone; t5_files.py, strict.py and limits.py are
needed to load published weights, hub.py to fetch them, outputs.py to print.

    model, tokenizer = T5.from_pretrained("google-t5/t5-base")
    states, mask = model.encode([tokenizer.encode("happy rock")])
"""

import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

if sys.platform == "darwin":  # where an M5 rounds the factors of float32 products
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at the first of them

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece


@dataclass
class T5Config:
    """Sizes of the encoder, spelled as in `config.json`; defaults: t5-base."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    n_positions: int = 512
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def from_dict(cls, config: dict) -> "T5Config":
        """Take the known keys. Raises ValueError for a size missing or absurd."""
        for key in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            if key not in config:
                raise ValueError(f"The T5 config must have '{key}', but lacks it.")
        names = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in names})


class Tokenizer:
    """Text to T5 ids, as the published fast tokenizer gives them.

    `spiece.model` knows the pieces; the names of the special tokens and of the
    100 sentinels `<extra_id_N>`, which number downwards behind the pieces, are
    cut out of the text first. The ids differ from the published ones for U+2034
    and where a character that NFKC changes has a combining mark behind it, which
    the published normalizer drops.
    """

    def __init__(self, path: str | Path):
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{path!s:.120} must be a SentencePiece model: {str(error).rstrip('.'):.160}. "
                "Fetch spiece.model of google-t5/t5-base again."
            ) from error
        size = self._pieces.vocab_size()
        self.vocab_size = size + 100  # with the sentinels
        self._special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self._special |= {f"<extra_id_{i}>": size + 99 - i for i in range(100)}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def check(self, config: T5Config) -> None:
        """Raise ValueError unless the model has an embedding for every id."""
        if self.vocab_size > config.vocab_size:
            raise ValueError(
                f"spiece.model has {self.vocab_size} ids, but T5's vocab_size is only "
                f"{config.vocab_size}: the two do not belong together."
            )

    def serialized(self) -> bytes:
        """The content of `spiece.model`."""
        return self._pieces.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, ending in 1 (end of sequence); never truncated."""
        text = text.encode("utf-8", "replace").decode()  # no lone surrogates
        ids = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            else:
                # U+0085 is white space to the published tokenizer only.
                ids.extend(self._pieces.encode(part.replace("\x85", " ")))
        return ids + [1]


def relative_position_buckets(length: int, config: T5Config) -> mx.array:
    """Bucket of every key as seen from every query: (L, L) integers.

    Half of the buckets look back, half ahead; in each half one part counts
    single positions and the rest grows logarithmically. T5 paper, section 2.1.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    position = np.arange(length)
    offset = position[None, :] - position[:, None]  # key - query
    distance = np.abs(offset)
    # float32 throughout, since the boundaries depend on its rounding
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    furthest = math.log(config.relative_attention_max_distance / exact)
    growth = growth / np.float32(furthest)
    far = exact + (growth * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return mx.array(bucket + half * (offset > 0))


class Attention(nn.Module):
    """Multi-head self-attention, unscaled: T5 folds the scale into its weights."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (
            proj(x).reshape(B, L, self.num_heads, -1).swapaxes(1, 2)  # (B, H, L, d)
            for proj in (self.q, self.k, self.v)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(x.swapaxes(1, 2).reshape(B, L, -1))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        self.SelfAttention = Attention(config)
        if has_bias:
            self.SelfAttention.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


FEED_FORWARDS = {  # feed_forward_proj: activation, input projections
    "relu": (nn.relu, ("wi",)),
    "gated-gelu": (nn.gelu_approx, ("wi_0", "wi_1")),
    "gated-silu": (nn.silu, ("wi_0", "wi_1")),
}


class FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self._activation, self._inputs = FEED_FORWARDS[config.feed_forward_proj]
        for name in self._inputs:
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        first, *gate = (self[name](x) for name in self._inputs)
        hidden = self._activation(first)
        return self.wo(hidden * gate[0] if gate else hidden)


class FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = FeedForward(config)
        self.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, has_bias: bool):
        super().__init__()
        self.layer = [AttentionLayer(config, has_bias), FeedForwardLayer(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [Block(config, i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5(nn.Module):
    """The encoder. Parameter names are those of the published checkpoints."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config)

    def __call__(self, ids: mx.array, mask: mx.array) -> mx.array:
        """Hidden states (B, L, d_model) float32 of `ids` (B, L).

        `mask` (B, L) is true for tokens and false for padding, which no token
        attends; what stands at the padding itself means nothing.
        """
        buckets = relative_position_buckets(ids.shape[1], self.config)
        bias = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = bias(buckets).transpose(2, 0, 1)  # (L, L, H) -> (H, L, L)
        # Finite, so that a row of nothing but padding gives no NaN.
        lowest = mx.finfo(mx.float32).min
        bias = mx.where(mask[:, None, None, :], bias, lowest)  # (B, H, L, L)
        x = self.shared(ids)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def encode(self, ids: list[list[int]]) -> tuple[mx.array, mx.array]:
        """States (B, L, d_model) and mask (B, L) of lists of ids of any lengths."""
        L = max(map(len, ids))
        padded = mx.array([row + [0] * (L - len(row)) for row in ids])
        mask = mx.arange(L) < mx.array([[len(row)] for row in ids])
        return self(padded, mask), mask

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path) -> "tuple[T5, Tokenizer]":
        """Load a folder or a Hub id, such as "google-t5/t5-base", with its tokenizer.
        Raises ValueError or OSError naming the file and what is wrong with it.
        """
        from t5_files import load

        return load(cls, T5Config, Tokenizer, path_or_repo)


def main() -> None:
    import t5_files

    t5_files.main(T5)


if __name__ == "__main__":
    main()
