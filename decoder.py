"""MusicGen's decoder: codes and conditions -> logits of the next codes.

The transformer of Copet et al. (https://arxiv.org/abs/2306.05284), plain:
`Decoder.__call__` is what trains and what runs where engine.py does not. Each step
takes K codes a row and gives logits for the K codes of the next step. Stands alone.

Shapes: R rows, each take once or more for guidance; S steps, K codebooks, V entries of
each; P frames of a prefix, L tokens of a text; D hidden size, H heads of width d.

    cache = decoder.make_cache(rows, steps)
    text_kv = decoder.text_kv(Condition(states, mask))
    logits = decoder(tokens, text_kv, cache)  # (R, S, K) -> (R, S, K, V)
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

Mask = mx.array | str | None  # of attention: added to scores, "causal", or none


@dataclass
class DecoderConfig:
    """Sizes of the decoder, spelled as in `config.json`; defaults: small."""

    vocab_size: int = 2048  # entries per codebook; also the id of the blank
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    ffn_dim: int = 4096
    num_codebooks: int = 4
    audio_channels: int = 1
    delays: tuple[int, ...] = (0, 1, 2, 3)  # steps by which each codebook lags
    prefix_width: int = 0  # features of a prefix frame; 0: the text is cross-attended


class KVCache:
    """Keys and values of one layer's past, in one buffer that is allocated once.

    The heads of all rows lie on one axis, for each attends its own past alone.
    """

    def __init__(self, heads: int, steps: int, width: int, dtype: mx.Dtype):
        self._buffer = mx.zeros((2, heads, steps, width), dtype)
        self.offset = 0

    def update_and_fetch(self, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (2, R * H, S, d); returns all keys, all values (1, R * H, S', d)."""
        end = self.offset + keys_values.shape[2]
        self._buffer[:, :, self.offset : end] = keys_values
        self.offset = end
        return mx.split(self._buffer[:, :, :end], 2)


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """Scaled dot-product attention, on (R, H, S, d)."""
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )


def join_heads(x: mx.array, rows: int) -> mx.array:
    """(R, H, S, d) or (1, R * H, S, d) -> (R, S, D)."""
    S, width = x.shape[2:]
    return x.reshape(rows, -1, S, width).swapaxes(1, 2).reshape(rows, S, -1)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.in_proj = nn.Linear(D, 3 * D, bias=False)  # queries, keys, values
        self.out_proj = nn.Linear(D, D, bias=False)

    def __call__(self, x: mx.array, cache: KVCache | None, mask: Mask) -> mx.array:
        """What x (R, S, D) finds in itself and in its past: (R, S, D)."""
        queries, keys_values = self.split_heads(self.in_proj(x))
        if cache is None:
            keys, values = mx.split(keys_values, 2)
        else:
            keys, values = cache.update_and_fetch(keys_values)
        mask = mask if x.shape[1] > 1 else None
        return self.out_proj(join_heads(attend(queries, keys, values, mask), len(x)))

    def split_heads(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(R, S, 3 D) -> queries (1, R * H, S, d), keys and values (2, R * H, S, d)."""
        R, S, _ = x.shape
        x = x.reshape(R, S, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        return mx.split(x.reshape(3, R * self.heads, S, -1), [1])


class TextKV(NamedTuple):
    """Keys and values of a text in one layer: made once, attended in every step."""

    keys: mx.array  # (R, H, L, d)
    values: mx.array
    mask: mx.array | None  # (R, 1, 1, L), added to the scores; None: all are attended


class CrossAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=False)
        self.kv_proj = nn.Linear(D, 2 * D, bias=False)  # keys, values
        self.out_proj = nn.Linear(D, D, bias=False)

    def __call__(self, x: mx.array, text_kv: TextKV) -> mx.array:
        """What x (R, S, D) finds in the text: (R, S, D)."""
        attended = attend(self.split_heads(self.q_proj(x)), *text_kv)
        return self.out_proj(join_heads(attended, len(x)))

    def split_heads(self, x: mx.array) -> mx.array:
        """(R, S, D) -> (R, H, S, d)."""
        R, S, _ = x.shape
        return x.reshape(R, S, self.heads, -1).swapaxes(1, 2)

    def keys_values(self, states: mx.array) -> tuple[mx.array, mx.array]:
        """Text states (R, L, D) -> keys and values (R, H, L, d)."""
        R, L, _ = states.shape
        y = self.kv_proj(states)
        y = y.reshape(R, L, 2 * self.heads, y.shape[-1] // (2 * self.heads))
        return mx.split(y.swapaxes(1, 2), 2, axis=1)


class Layer(nn.Module):
    """Self-attention, cross-attention (of a text, with no prefix), feed-forward."""

    def __init__(self, config: DecoderConfig, has_text: bool = True):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D)
        self.self_attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(D)
        self.linear1 = nn.Linear(D, config.ffn_dim, bias=False)
        self.linear2 = nn.Linear(config.ffn_dim, D, bias=False)
        if has_text and not config.prefix_width:
            self.norm_cross = nn.LayerNorm(D)
            self.cross_attention = CrossAttention(config)

    def __call__(
        self, x: mx.array, text_kv: TextKV | None, cache: KVCache | None, mask: Mask
    ) -> mx.array:
        x = x + self.self_attn(self.norm1(x), cache, mask)
        if text_kv is not None:
            x = x + self.cross_attention(self.norm_cross(x), text_kv)
        return x + self.linear2(nn.gelu(self.linear1(self.norm2(x))))


class Condition(NamedTuple):
    """States that steer the decoder: of a text, a melody, a style, or of none of them.

    States that do not count are zeroed. Rows for guidance, without a text or a sound,
    are a condition like any other.
    """

    states: mx.array  # (R, L, width)
    mask: mx.array  # (R, L), true where a state counts


def stack_rows(conditions: list[Condition]) -> Condition:
    """One condition with the rows of all."""
    return Condition(*map(mx.concatenate, zip(*conditions)))


class Decoder(nn.Module):
    """The language model: codes and conditions in, logits of the next codes out.

    The K embedding tables lie in one, codebook after codebook, and so do the K
    output projections. A `text_width` of 0 is a model without text.
    """

    def __init__(self, config: DecoderConfig, text_width: int):
        super().__init__()
        self.config = config
        K, V, D = config.num_codebooks, config.vocab_size, config.hidden_size
        if text_width:
            self.output_proj = nn.Linear(text_width, D)  # as audiocraft names it
        self.emb = nn.Embedding(K * (V + 1), D)
        layers = range(config.num_hidden_layers)
        self.layers = [Layer(config, text_width > 0) for _ in layers]
        if config.prefix_width:
            self.sound_proj = nn.Linear(config.prefix_width, D)
        self.out_norm = nn.LayerNorm(D)
        self.linears = nn.Linear(D, K * V, bias=False)
        self.group: mx.distributed.Group | None = None  # among which it is shared
        self._tables = mx.arange(K) * (V + 1)  # where each codebook's table begins

    def __call__(
        self,
        tokens: mx.array,
        text_kv: list[TextKV | None],
        cache: list[KVCache | None],
        prefix: mx.array | None = None,
        mask: Mask = "causal",
    ) -> mx.array:
        """Logits (R, S, K, V) of what follows each of the tokens (R, S, K).

        A cache holds the past and is appended to; None: there is no past. A prefix
        (R, P, D), if any, comes before the tokens. MAGNeT has other masks.
        """
        x = self.embed(tokens)
        x = x if prefix is None else mx.concatenate([prefix, x], axis=1)
        x = x + self.positions(cache[0].offset if cache[0] else 0, x.shape[1])
        for layer, text, past in zip(self.layers, text_kv, cache):
            x = layer(x, text, past, mask)
        return self.logits(x[:, -tokens.shape[1] :])

    def embed(self, tokens: mx.array) -> mx.array:
        """Sum of the codebooks' embeddings: (R, S, K) -> (R, S, D)."""
        return self.emb(tokens + self._tables).sum(axis=2)

    def positions(self, start: int, count: int) -> mx.array:
        """Sinusoids (S, D) of the steps from `start` on, cosines before sines."""
        half = self.config.hidden_size // 2
        period = 10000.0 ** (mx.arange(half) / (half - 1))
        phase = mx.arange(start, start + count)[:, None] / period
        table = mx.concatenate([mx.cos(phase), mx.sin(phase)], axis=-1)
        return table.astype(self.dtype)

    def logits(self, x: mx.array) -> mx.array:
        """(R, S, D) -> (R, S, K, V)."""
        R, S, _ = x.shape
        x = self.linears(self.out_norm(x))
        return x.reshape(R, S, self.config.num_codebooks, -1)

    def text_kv(self, text: Condition) -> list[TextKV | None]:
        """Keys and values of the text in each layer; None where none is attended.

        A row without a text attends nothing but zeros, which adds nothing.
        """
        if "cross_attention" not in self.layers[0]:
            return [None] * len(self.layers)
        states = self.output_proj(text.states.astype(self.dtype)) * text.mask[..., None]
        attended = text.mask | ~text.mask.any(axis=1, keepdims=True)
        mask = mx.where(attended, 0, -mx.inf)[:, None, None].astype(self.dtype)
        return [
            TextKV(*layer.cross_attention.keys_values(states), mask)
            for layer in self.layers
        ]

    def prefix(self, sound: Condition, text: Condition) -> mx.array:
        """What comes before the codes (R, P, D): a sound's states, then a text's."""
        pairs = (self.sound_proj, sound), (self.output_proj, text)
        return mx.concatenate(
            [
                project(states.astype(self.dtype)) * mask[..., None]
                for project, (states, mask) in pairs
            ],
            axis=1,
        )

    @property
    def dtype(self) -> mx.Dtype:
        """The one dtype from the embeddings to the logits."""
        return self.out_norm.weight.dtype

    def make_cache(self, rows: int, steps: int) -> list[KVCache]:
        """Empty caches for `rows` sequences of up to `steps` steps."""
        width = self.config.hidden_size // self.config.num_attention_heads
        sizes = (rows * self.layers[0].self_attn.heads, steps, width)
        return [KVCache(*sizes, self.dtype) for _ in self.layers]


FIXED = {"activation_function": "gelu", "scale_embedding": False}


def read_config(settings: dict, prefix_width: int) -> DecoderConfig:
    """Take the keys that are known. Raises ValueError for one that is missing, or that
    asks for what is not ported."""
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {settings[name]!r:.80}.")
    names = {field.name for field in fields(DecoderConfig)} - {"prefix_width"}
    sizes = {"audio_channels": 1, "delays": None}  # where nothing is said
    if isinstance(width := settings.get("hidden_size"), int):
        sizes["num_attention_heads"] = width // 64
    sizes |= {name: settings[name] for name in names if name in settings}
    if missing := names - sizes.keys():
        listed = ", ".join(sorted(missing))
        raise ValueError(f"The decoder's config must have {listed}.")
    K, C = sizes["num_codebooks"], sizes["audio_channels"]
    if sizes["delays"] is None and K in range(65) and C in (1, 2):  # see limits.py
        sizes["delays"] = tuple(k // C for k in range(K))  # left, right share a step
    if isinstance(sizes["delays"], list):
        sizes["delays"] = tuple(sizes["delays"])
    return DecoderConfig(**sizes, prefix_width=prefix_width)
