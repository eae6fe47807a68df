"""MusicGen: text -> music.

The single-stage language model over EnCodec codes of Copet et al.
(https://arxiv.org/abs/2306.05284): a decoder that attends a text and writes K
codes for every frame of 20 ms, the k-th codebook a little later than the first.
Needs `t5.py`, `encodec.py`, `melody.py`, `style.py` and `mert.py` beside it, and
`checkpoints.py` and `convert.py` to load a model.

    model = MusicGen.from_pretrained("stereo-small")
    audio = model.generate(["happy rock", "calm piano"], duration=8.0, seed=0)
    save_audio("out.wav", audio[0], model.sampling_rate)
"""

import functools
import itertools
import math
import re
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from encodec import Encodec, EncodecConfig, add, parallel_streams
from melody import MelodyConditioner, MelodyConfig
from style import StyleConditioner, StyleConfig
from t5 import T5, T5Config, Tokenizer

Sounds = mx.array | list[mx.array | None] | None  # one (N, C), or one for each prompt

DELAYS = {  # (codebooks, audio channels): steps by which each codebook lags
    (4, 1): (0, 1, 2, 3),
    (8, 2): (0, 0, 1, 1, 2, 2, 3, 3),  # left, right, left, right, ...
}
STEPS_AHEAD = 1  # that are under way when a piece of a stream is handed out
DECODING_MEMORY = 10**9  # bytes that making audio of codes takes beyond the weights

LIMITS = {  # least and largest value of each size
    "vocab_size": (1, 2**16),
    "hidden_size": (4, 2**14),
    "num_hidden_layers": (1, 200),
    "num_attention_heads": (1, 2**10),
    "ffn_dim": (1, 2**17),
    "num_codebooks": (1, 64),
    "audio_channels": (1, 2),
    "sound_width": (0, 2**14),
}
DTYPES = {name: getattr(mx, name) for name in ("float16", "bfloat16", "float32")}


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
    activation_function: str = "gelu"
    scale_embedding: bool = False
    delays: tuple[int, ...] | None = None  # None: what DELAYS says
    sound_width: int = 0  # of what comes of a sound before the text and the codes; 0:
    # nothing does, and the text is attended

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            size = getattr(self, name)
            if type(size) is not int or not low <= size <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {size!r}.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "num_attention_heads must split hidden_size into even widths, got "
                f"{self.num_attention_heads} for {self.hidden_size}."
            )
        for name, known in (
            ("activation_function", "gelu"),
            ("scale_embedding", False),
        ):
            if getattr(self, name) != known:
                raise ValueError(
                    f"{name} must be {known!r}, got {getattr(self, name)!r}."
                )
        self._set_delays()

    def _set_delays(self) -> None:
        key = (self.num_codebooks, self.audio_channels)
        if self.delays is None and key not in DELAYS:
            raise ValueError(
                f"delays must be given for {key[0]} codebooks and {key[1]} channels; "
                f"known without are {list(DELAYS)}."
            )
        delays = DELAYS[key] if self.delays is None else self.delays
        numbers = isinstance(delays, list | tuple) and all(
            type(delay) is int and 0 <= delay <= 100 for delay in delays
        )
        if not (numbers and len(delays) == self.num_codebooks and min(delays) == 0):
            raise ValueError(
                f"delays must give {self.num_codebooks} numbers of steps, the least 0 "
                f"and none above 100, got {delays!r}."
            )
        self.delays = tuple(delays)

    @classmethod
    def from_dict(cls, config: dict) -> "DecoderConfig":
        """Take the known keys. Raises ValueError for a size missing or absurd."""
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim")
        for key in (*sizes, "num_codebooks"):
            if key not in config:
                raise ValueError(f"The decoder's config must have '{key}'.")
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        if isinstance(width := config["hidden_size"], int):
            known.setdefault("num_attention_heads", width // 64)
        return cls(**known)


Conditioner = MelodyConditioner | StyleConditioner  # of a sound
CONDITIONERS = {"melody": MelodyConfig, "style": StyleConfig}


@dataclass
class MusicGenConfig:
    """The models, and the longest audio in seconds the decoder knows."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text_encoder: T5Config = field(default_factory=T5Config)
    audio_encoder: EncodecConfig = field(default_factory=EncodecConfig)
    max_duration: float = 30.0
    quantization: dict[str, int] | None = None  # bits and group_size, of the decoder
    conditioner: MelodyConfig | StyleConfig | None = None

    def __post_init__(self):
        seconds = self.max_duration
        if type(seconds) not in (int, float) or not 0.1 <= seconds <= 600:
            raise ValueError(
                f"max_duration must be from 0.1 to 600 seconds, got {seconds!r}."
            )
        if self.quantization is not None:
            check_quantization(self.quantization)
        width = self.conditioner.width if self.conditioner else 0
        if self.decoder.sound_width != width:
            raise ValueError(
                f"sound_width must be that of the conditioner, {width}, got "
                f"{self.decoder.sound_width}."
            )
        self._check_codec()

    def _check_codec(self) -> None:
        decoder, codec = self.decoder, self.audio_encoder
        for name, wanted, least in (
            ("audio_channels", codec.audio_channels == 1, 1),
            ("normalize", not codec.normalize, False),
            (
                "codebook_size",
                codec.codebook_size >= decoder.vocab_size,
                decoder.vocab_size,
            ),
            (
                "target_bandwidths",
                codec.num_codebooks() * decoder.audio_channels >= decoder.num_codebooks,
                f"enough for {decoder.num_codebooks // decoder.audio_channels} codebooks",
            ),
        ):
            if not wanted:
                raise ValueError(
                    f"The codec does not belong to the decoder: its {name} must be "
                    f"{least}, got {getattr(codec, name)}."
                )

    @classmethod
    def from_dict(cls, config: dict) -> "MusicGenConfig":
        """Read a nested `config.json`, published or ours."""
        if config.get("model_type") not in ("musicgen", "musicgen_melody"):
            raise ValueError(
                "model_type must be 'musicgen' or 'musicgen_melody', got "
                f"'{config.get('model_type')}'."
            )
        for part in ("decoder", "text_encoder", "audio_encoder"):
            if not isinstance(config.get(part), dict):
                raise ValueError(f"It must have '{part}', an object, but lacks it.")
        conditioner = read_conditioner(config)
        width = {"sound_width": conditioner.width if conditioner else 0}
        return cls(
            DecoderConfig.from_dict(config["decoder"] | width),
            T5Config.from_dict(config["text_encoder"]),
            EncodecConfig.from_dict(config["audio_encoder"]),
            config.get("max_duration", 30.0),
            config.get("quantization"),
            conditioner,
        )


def read_conditioner(config: dict) -> MelodyConfig | StyleConfig | None:
    """What a `config.json` says of it, ours or transformers', which knows melodies."""
    told = config.get("conditioner")
    if told is None and config["model_type"] == "musicgen_melody":
        told = config | {"kind": "melody"}
    elif told is None and config["decoder"].get("num_chroma"):  # we wrote it so once
        told = config["decoder"] | {"kind": "melody"}
    if told is None:
        return None
    if not isinstance(told, dict) or told.get("kind") not in list(CONDITIONERS):
        raise ValueError(
            f"conditioner must be an object of the kind {' or '.join(CONDITIONERS)}, "
            f"got {told!r:.80}."
        )
    return CONDITIONERS[told["kind"]].from_dict(told)


BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)


def check_quantization(settings: dict[str, int]) -> None:
    """Raise ValueError unless MLX can quantize so."""
    for name, known in (("bits", BITS), ("group_size", GROUP_SIZES)):
        value = settings.get(name) if isinstance(settings, dict) else settings
        if type(value) is not int or value not in known or len(settings) != 2:
            raise ValueError(
                f"quantization must give bits and group_size, q_{name} of {known}, "
                f"got {value!r}."
            )


class KVCache:
    """Keys and values of one layer's past, in one buffer that is allocated once.

    N is the heads of all rows: each attends its own past alone.
    """

    def __init__(self, heads: int, steps: int, width: int, dtype: mx.Dtype):
        self._buffer = mx.zeros((2, heads, steps, width), dtype)
        self.offset = 0

    def update(self, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (2, N, S, d); returns all keys and all values (1, N, S', d)."""
        end = self.offset + keys_values.shape[2]
        self._buffer[:, :, self.offset : end] = keys_values
        self.offset = end
        return mx.split(self._buffer[:, :, :end], 2)


States = tuple[mx.array, mx.array]  # values (R, L, width), and a mask (R, L)
Memory = tuple[mx.array, mx.array] | None  # text keys and values (R', H, L, d)


class Conditioning(NamedTuple):
    """What stays the same over a whole generation.

    R' rows, the first, have a text to attend: all, or half of them.
    """

    memory: list[Memory]
    mask: mx.array | None  # (R', 1, 1, L), added to the scores; None: all attended
    positions: mx.array  # (S, D)


# cublasLt, which MLX's CUDA build asks for a product with several rows, costs the
# host 12 to 18 microseconds a call; the same product as matrix times columns is one
# kernel of 4 to 6. It reads the matrix again for each row, so where that is much, no.
MAX_COLUMNS = 16 if mx.cuda.is_available() else 0
MAX_READ = 2**26  # numbers, for all rows together


def project(
    layer: nn.Module, x: mx.array, residual: mx.array | None = None
) -> mx.array:
    """`layer(x)`, plus `residual`: (R, S, D) -> (R, S, D') in the fewest operations."""
    R, S, _ = x.shape
    if not isinstance(layer, nn.Linear):  # quantized, or shared among processes
        y = layer(x)
    elif S == 1 < R <= MAX_COLUMNS and R * layer.weight.size <= MAX_READ:
        y = (layer.weight @ x.swapaxes(1, 2)).swapaxes(1, 2)
    elif residual is None:
        return layer(x)
    else:
        return mx.addmm(residual, x, layer.weight.T)
    return y if residual is None else residual + y


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Scaled dot-product attention, on (R, H, S, d)."""
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )


def attend_past(cache: KVCache, queries: mx.array, keys_values: mx.array) -> mx.array:
    """Append keys and values to the cache, and attend all that is in it."""
    mask = "causal" if queries.shape[2] > 1 else None
    return attend(queries, *cache.update(keys_values), mask)


def join_heads(x: mx.array, rows: int) -> mx.array:
    """(R, H, S, d) or (1, R * H, S, d) -> (R, S, D)."""
    S, width = x.shape[2:]
    return x.reshape(rows, -1, S, width).swapaxes(1, 2).reshape(rows, S, -1)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self._heads = config.num_attention_heads
        self.in_proj = nn.Linear(D, 3 * D, bias=False)  # queries, keys, values
        self.out_proj = nn.Linear(D, D, bias=False)

    def shard(self, group: mx.distributed.Group) -> None:
        self._heads //= group.size()
        self.in_proj = shard_linear(
            self.in_proj, "all-to-sharded", segments=3, group=group
        )
        self.out_proj = shard_linear(self.out_proj, "sharded-to-all", group=group)

    def queries_keys_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(R, S, D) -> queries (1, R * H, S, d), keys and values (2, R * H, S, d)."""
        R, S, _ = x.shape
        y = project(self.in_proj, x).reshape(R, S, 3, self._heads, -1)
        y = y.transpose(2, 0, 3, 1, 4)  # (3, R, H, S, d)
        return mx.split(y.reshape(3, R * self._heads, S, -1), [1])


class CrossAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self._heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D, bias=False)
        self.kv_proj = nn.Linear(D, 2 * D, bias=False)  # keys, values
        self.out_proj = nn.Linear(D, D, bias=False)

    def shard(self, group: mx.distributed.Group) -> None:
        self._heads //= group.size()
        self.q_proj = shard_linear(self.q_proj, "all-to-sharded", group=group)
        self.kv_proj = shard_linear(
            self.kv_proj, "all-to-sharded", segments=2, group=group
        )
        self.out_proj = shard_linear(self.out_proj, "sharded-to-all", group=group)

    def queries(self, x: mx.array) -> mx.array:
        """(R, S, D) -> (R, H, S, d)."""
        R, S, _ = x.shape
        return project(self.q_proj, x).reshape(R, S, self._heads, -1).swapaxes(1, 2)

    def keys_values(self, text: mx.array) -> tuple[mx.array, mx.array]:
        """Text states (R, L, D) -> keys and values (R, H, L, d)."""
        R, L, _ = text.shape
        y = self.kv_proj(text)
        y = y.reshape(R, L, 2 * self._heads, y.shape[-1] // (2 * self._heads))
        return mx.split(y.swapaxes(1, 2), 2, axis=1)


class Layer(nn.Module):
    """One layer, in two parts: what goes before the self-attention, and after."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D)
        self.self_attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(D)
        self.linear1 = nn.Linear(D, config.ffn_dim, bias=False)
        self.linear2 = nn.Linear(config.ffn_dim, D, bias=False)

    def shard(self, group: mx.distributed.Group) -> None:
        self.self_attn.shard(group)
        self.linear1 = shard_linear(self.linear1, "all-to-sharded", group=group)
        self.linear2 = shard_linear(self.linear2, "sharded-to-all", group=group)

    def remember(self, text: mx.array) -> Memory:
        """What stays of text states (R, L, D): nothing, for they come first here."""
        return None

    def before(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Queries (1, R * H, S, d), keys and values (2, R * H, S, d) of x (R, S, D)."""
        return self.self_attn.queries_keys_values(self.norm1(x))

    def after(
        self, x: mx.array, attended: mx.array, memory: Memory, mask: mx.array | None
    ) -> mx.array:
        """The layer's output (R, S, D), from what its self-attention gave."""
        x = project(self.self_attn.out_proj, join_heads(attended, len(x)), x)
        x = self.add_text(x, memory, mask)
        hidden = nn.gelu(project(self.linear1, self.norm2(x)))
        return project(self.linear2, hidden, x)

    def add_text(self, x: mx.array, memory: Memory, mask: mx.array | None) -> mx.array:
        return x


class CrossLayer(Layer):
    """A layer that attends the text."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.norm_cross = nn.LayerNorm(config.hidden_size)
        self.cross_attention = CrossAttention(config)

    def shard(self, group: mx.distributed.Group) -> None:
        super().shard(group)
        self.cross_attention.shard(group)

    def remember(self, text: mx.array) -> Memory:
        """Keys and values (R, H, L, d) of text states (R, L, D)."""
        return self.cross_attention.keys_values(text)

    def add_text(self, x: mx.array, memory: Memory, mask: mx.array | None) -> mx.array:
        """Add to the rows that have a text what they find in it: (R, S, D)."""
        rows = len(memory[0])
        queries = self.cross_attention.queries(self.norm_cross(x[:rows]))
        attended = join_heads(attend(queries, *memory, mask), rows)
        found = project(self.cross_attention.out_proj, attended)
        parts = x.reshape(-1, *found.shape)
        has_text = mx.array([True] + [False] * (len(parts) - 1))[:, None, None, None]
        return (parts + mx.where(has_text, found, 0)).reshape(x.shape)


def sinusoids(steps: int, width: int) -> mx.array:
    """Position embeddings (S, D), cosines before sines. float32."""
    half = width // 2
    period = 10000.0 ** (mx.arange(half) / (half - 1))
    phase = mx.arange(steps)[:, None] / period
    return mx.concatenate([mx.cos(phase), mx.sin(phase)], axis=-1)


def rows_with_text(mask: mx.array) -> int:
    """Half of the rows of (R, L) if the second half has no token to attend, else all."""
    R = len(mask)
    return R // 2 if R % 2 == 0 and not mask[R // 2 :].any().item() else R


State = tuple[mx.array, mx.array, mx.array]  # x, queries, keys and values of a layer


class Decoder(nn.Module):
    """The language model: codes and a text in, logits of the next codes out.

    The K embedding tables lie in one, codebook after codebook, and so do the K
    output projections.
    """

    def __init__(self, config: DecoderConfig, text_width: int):
        super().__init__()
        self.config = config
        K, V, D = config.num_codebooks, config.vocab_size, config.hidden_size
        self.output_proj = nn.Linear(text_width, D)  # of the text, as audiocraft has it
        self.emb = nn.Embedding(K * (V + 1), D)
        kind = Layer if config.sound_width else CrossLayer
        self.layers = [kind(config) for _ in range(config.num_hidden_layers)]
        if config.sound_width:
            self.sound_proj = nn.Linear(config.sound_width, D)
        self.out_norm = nn.LayerNorm(D)
        self.linears = nn.Linear(D, K * V, bias=False)
        self.group: mx.distributed.Group | None = None  # among which it is shared
        self._tables = mx.arange(K) * (V + 1)  # where each codebook's table begins

    @property
    def dtype(self) -> mx.Dtype:
        """The one dtype from the embeddings to the logits."""
        return self.out_norm.weight.dtype

    def condition(self, text: mx.array, mask: mx.array, steps: int) -> Conditioning:
        """Prepare `steps` steps under the text states (R, L, width).

        `mask` (R, L) is true for the tokens to attend. The others are zeroed; a row
        without any attends nothing but zeros, which adds nothing. Where all of the
        second half are such, as null rows are, they are left out.
        """
        rows = rows_with_text(mask)
        text, mask = text[:rows], mask[:rows]
        text = self.output_proj(text.astype(self.dtype)) * mask[..., None]
        memory = [layer.remember(text) for layer in self.layers]
        attended = mask | ~mask.any(axis=1, keepdims=True)
        bias = mx.where(attended, 0, -mx.inf)[:, None, None].astype(self.dtype)
        positions = sinusoids(steps, self.config.hidden_size).astype(self.dtype)
        bias = None if attended.all().item() else bias
        # Now, for compiled steps would compute again whatever is still lazy.
        mx.eval(memory, bias, positions)
        return Conditioning(memory, bias, positions)

    def prefix(self, sound: States, text: States) -> mx.array:
        """What comes before the codes (R, P, D): a sound, then the text, each zeroed
        where its mask is false."""
        pairs = (self.sound_proj, sound), (self.output_proj, text)
        return mx.concatenate(
            [
                project(values.astype(self.dtype)) * mask[..., None]
                for project, (values, mask) in pairs
            ],
            axis=1,
        )

    def cache_bytes(self, steps: int) -> int:
        """Bytes that the caches of one sequence of `steps` steps take."""
        width = self._cache_heads * self._head_width
        return 2 * len(self.layers) * width * steps * self.dtype.size

    @property
    def _cache_heads(self) -> int:
        return self.layers[0].self_attn._heads  # fewer where they are shared

    @property
    def _head_width(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def make_cache(self, rows: int, steps: int) -> list[KVCache]:
        """Empty caches for `rows` sequences of up to `steps` steps."""
        sizes = (rows * self._cache_heads, steps, self._head_width)
        return [KVCache(*sizes, self.dtype) for _ in self.layers]

    def embed(self, tokens: mx.array) -> mx.array:
        """Sum of the codebooks' embeddings: (R, S, K) -> (R, S, D)."""
        return self.emb(tokens + self._tables).sum(axis=2)

    def logits(self, x: mx.array) -> mx.array:
        """(R, S, D) -> (R, S, K, V)."""
        R, S, _ = x.shape
        x = project(self.linears, self.out_norm(x))
        return x.reshape(R, S, self.config.num_codebooks, -1)

    def __call__(
        self, tokens: mx.array, conditioning: Conditioning, cache: list[KVCache]
    ) -> mx.array:
        """Logits (R, S, K, V) of what follows `tokens` (R, S, K)."""
        return self.logits(self.hidden(tokens, conditioning, cache))

    def hidden(
        self,
        tokens: mx.array,
        conditioning: Conditioning,
        cache: list[KVCache],
        prefix: mx.array | None = None,
    ) -> mx.array:
        """What the layers make of `tokens` (R, S, K), after a prefix (R, P, D) if there
        is one: (R, P + S, D)."""
        memory, mask, positions = conditioning
        start, x = cache[0].offset, self.embed(tokens)
        x = x if prefix is None else mx.concatenate([prefix, x], axis=1)
        x = x + positions[start : start + x.shape[1]]
        for layer, text, past in zip(self.layers, memory, cache):
            x = layer.after(x, attend_past(past, *layer.before(x)), text, mask)
        return x

    def compile(
        self, conditioning: Conditioning, cache: list[KVCache]
    ) -> tuple[Callable[[mx.array], State], Callable[[State], mx.array]]:
        """A faster `self` for single steps, in two halves: tokens (R, 1, K) to what
        the lower layers make of them, and that to logits (R, 1, K, V).

        All between two self-attentions is compiled, so that Python does not build
        its graph anew in every step; the attention's own shape grows.
        """
        (memory, mask, positions), layers = conditioning, self.layers

        @mx.compile
        def enter(tokens: mx.array, position: mx.array):
            x = self.embed(tokens) + position
            return x, *layers[0].before(x)

        def between(i: int):
            def run(x: mx.array, attended: mx.array):
                x = layers[i].after(x, attended, memory[i], mask)
                return x, *layers[i + 1].before(x)

            return mx.compile(run)

        @mx.compile
        def leave(x: mx.array, attended: mx.array):
            return self.logits(layers[-1].after(x, attended, memory[-1], mask))

        blocks = [(cache[i], between(i)) for i in range(len(layers) - 1)]
        half = len(blocks) // 2

        def climb(state: State, blocks: list) -> State:
            for past, block in blocks:
                x, *qkv = state
                state = block(x, attend_past(past, *qkv))
            return state

        def lower(tokens: mx.array) -> State:
            return climb(enter(tokens, positions[cache[0].offset]), blocks[:half])

        def upper(state: State) -> mx.array:
            x, *qkv = climb(state, blocks[half:])
            return leave(x, attend_past(cache[-1], *qkv))

        return lower, upper

    def quantize(self, bits: int, group_size: int = 64) -> None:
        """Store the layers' matrices in `bits` bits, with a scale for each group.

        Embeddings and output heads stay as they are, and the keys and values of
        the text, which are made once. Raises ValueError for what MLX cannot do.
        """
        check_quantization({"bits": bits, "group_size": group_size})
        width = math.gcd(self.config.hidden_size, self.config.ffn_dim)
        if width % group_size:
            raise ValueError(
                "q_group_size must divide the matrices' width, a multiple of "
                f"{width}; got {group_size}."
            )

        def in_every_step(name: str, module: nn.Module) -> bool:
            in_layer = isinstance(module, nn.Linear) and name.startswith("layers.")
            return in_layer and not name.endswith("kv_proj")

        nn.quantize(self, group_size, bits, class_predicate=in_every_step)

    def shard(self, group: mx.distributed.Group) -> None:
        """Keep this process's share of every layer: some of the heads, and of the
        feed-forward's width. Raises ValueError when they do not divide."""
        for name in ("num_attention_heads", "ffn_dim"):
            if getattr(self.config, name) % group.size():
                raise ValueError(
                    f"The number of processes must divide {name}, "
                    f"{getattr(self.config, name)}, got {group.size()}."
                )
        for layer in self.layers:
            layer.shard(group)
        self.group = group

    def store_columns(self) -> None:
        """Store the matrices column after column, shapes unchanged.

        For the CPU: with two rows the plain BLAS of MLX's Linux wheel then takes
        0.7 of the time a step, and OpenBLAS 0.4.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight = mx.contiguous(module.weight.T).T
                mx.eval(module.weight)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """audiocraft's or transformers' names -> ours, with what we fuse fused.

        Raises ValueError for integers, save quantized ones, and missing parts.
        """
        renamed = {}
        for name, weight in weights.items():
            if not name.endswith(COMPUTED):
                add(renamed, rename(name), weight)
        check_numbers(renamed)
        return fuse(split_cross(renamed))


COMPUTED = ("embed_positions.weights", ".self_wav.chroma.spec.window")  # from nothing

RENAMES = (  # transformers' names -> audiocraft's -> ours
    (r"^model\.decoder\.", ""),
    (r"^embed_tokens\.", "emb."),
    (r"^lm_heads\.", "linears."),
    (r"^enc_to_dec_proj\.", "output_proj."),
    (r"^(audio_enc_to_dec|melody)_proj\.", "sound_proj."),
    (r"^layer_norm\.", "out_norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm_cross."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.fc([12])\.", r".linear\1."),
    (r"^transformer\.", ""),
    (r"^condition_provider\.conditioners\.description\.", ""),
    (r"^condition_provider\.conditioners\.self_wav\.output_", "sound_"),
    (r"\.in_proj_weight$", ".in_proj.weight"),
)


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_numbers(weights: dict[str, mx.array]) -> None:
    """Raise ValueError unless all are floats, or quantized and so with `scales`."""
    for name, weight in weights.items():
        packed = f"{name.removesuffix('.weight')}.scales" in weights
        quantized = packed and weight.dtype == mx.uint32
        if not (quantized or mx.issubdtype(weight.dtype, mx.floating)):
            raise ValueError(f"{name} must hold floats, but holds {weight.dtype}")


def split_cross(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Part the queries of audiocraft's cross-attention from keys and values."""
    split = {}
    for name, weight in weights.items():
        stem, found, _ = name.partition("cross_attention.in_proj.weight")
        if found:
            if weight.ndim != 2 or weight.shape[0] % 3:
                raise ValueError(f"{name} must hold 3 matrices, got {weight.shape}")
            D = weight.shape[0] // 3
            add(split, f"{stem}cross_attention.q_proj.weight", weight[:D])
            add(split, f"{stem}cross_attention.kv_proj.weight", weight[D:])
        else:
            add(split, name, weight)
    return split


FUSED = (  # pattern of the parts' names -> name of the whole; parts in order
    (r"(.*self_attn)\.([qkv])_proj\.weight", r"\1.in_proj.weight", "qkv"),
    (r"(.*cross_attention)\.([kv])_proj\.weight", r"\1.kv_proj.weight", "kv"),
    (r"(emb)\.(0|[1-9]\d?)\.weight", r"\1.weight", None),
    (r"(linears)\.(0|[1-9]\d?)\.weight", r"\1.weight", None),
)


def fuse(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack the matrices that are applied to the same input."""
    fused, parts = {}, {}
    for name, weight in weights.items():
        for pattern, whole, order in FUSED:
            if match := re.fullmatch(pattern, name):
                place = order.index(match[2]) if order else int(match[2])
                parts.setdefault(match.expand(whole), {})[place] = weight
                break
        else:
            fused[name] = weight
    for name, places in parts.items():
        if missing := set(range(max(places) + 1)) - places.keys():
            raise ValueError(f"part {min(missing)} of {name} is missing")
        if len({weight.shape for weight in places.values()}) > 1:
            shapes = ", ".join(str(places[i].shape) for i in sorted(places))
            raise ValueError(f"the parts of {name} must have one shape, got {shapes}")
        add(fused, name, mx.concatenate([places[i] for i in sorted(places)]))
    return fused


def delay_mask(frames: int, delays: tuple[int, ...], start: int = 0) -> mx.array:
    """Which cells of the delayed sequence hold a code of a frame from `start` on:
    (S, K) booleans.

    Codebook k writes frame t in step t + delays[k]. Four frames, mono, where a
    dot is a blank:

        step        0  1  2  3  4  5  6
        codebook 0  0  1  2  3  .  .  .
        codebook 1  .  0  1  2  3  .  .
        codebook 2  .  .  0  1  2  3  .
        codebook 3  .  .  .  0  1  2  3

    MusicGen paper, section 2.2.
    """
    frame = mx.arange(frames + max(delays))[:, None] - mx.array(delays)
    return (frame >= start) & (frame < frames)


def delay(
    codes: mx.array, delays: tuple[int, ...], frames: int, blank: int
) -> mx.array:
    """Put codes (B, T, K) where `delay_mask` has their frames: (B, S, K).

    The sequence is that of `frames` frames; its other cells hold `blank`.
    """
    S, T = frames + max(delays), codes.shape[1]
    columns = [
        mx.pad(codes[..., k], [(0, 0), (d, S - T - d)], constant_values=blank)
        for k, d in enumerate(delays)
    ]
    return mx.stack(columns, axis=-1)


def undelay(sequence: mx.array, delays: tuple[int, ...]) -> mx.array:
    """Realign the codebooks: (B, S, K) -> (B, T, K).

    S counts steps, T = S - max(delays) frames. Raises ValueError when S holds
    no whole frame.
    """
    frames = sequence.shape[1] - max(delays)
    if frames < 1:
        raise ValueError(
            f"The sequence must have more than {max(delays)} steps to hold a whole "
            f"frame, got {sequence.shape[1]}."
        )
    aligned = [sequence[:, d : d + frames, k] for k, d in enumerate(delays)]
    return mx.stack(aligned, axis=-1)


def guide(logits: mx.array, options: "Options") -> mx.array:
    """Classifier-free guidance in float32: rows (R, S, K, V) -> (B, S, K, V).

    The rows are [all; null], or all alone for guidance 1. With `guidance_beta` they
    are [all; style without text; null], and the text counts beta times (section 4.3 of
    https://arxiv.org/abs/2407.12563).
    """
    *given, null = mx.split(logits.astype(mx.float32), options.copies)
    if not given:
        return null
    aim = given[-1]
    if options.guidance_beta is not None:
        aim = aim + options.guidance_beta * (given[0] - aim)
    return null + options.guidance_coef * (aim - null)


Sampler = Callable[[mx.array, mx.array], mx.array]


def make_sampler(temp: float = 1.0, top_k: int = 250, top_p: float = 0.0) -> Sampler:
    """A function from logits (B, S, K, V) and keys (B, 2) to tokens (B, S, K).

    `temp` 0 takes the likeliest. Otherwise `top_p` > 0 draws from the likeliest
    entries that together reach that probability, and `top_p` 0 from the `top_k`
    likeliest and what ties with the last of them. Every row draws by its own key.
    """

    def draw(logits: mx.array, keys: mx.array) -> mx.array:
        noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[1:], key=key))(keys)
        return mx.argmax(logits + noise, axis=-1)

    def greedy(logits: mx.array, keys: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1)

    def nucleus(logits: mx.array, keys: mx.array) -> mx.array:
        order = mx.argsort(-logits, axis=-1)
        logits = mx.take_along_axis(logits, order, axis=-1) / temp
        before = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1, inclusive=False)
        rank = draw(mx.where(before > top_p, -mx.inf, logits), keys)
        return mx.take_along_axis(order, rank[..., None], axis=-1).squeeze(-1)

    def likeliest(logits: mx.array, keys: mx.array) -> mx.array:
        place = max(logits.shape[-1] - top_k, 0)
        least = mx.partition(logits, place, axis=-1)[..., place : place + 1]
        return draw(mx.where(logits < least, -mx.inf, logits / temp), keys)

    if temp == 0:
        return greedy
    return nucleus if top_p > 0 else likeliest


Chooser = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def make_chooser(options: "Options") -> Chooser:
    """A function from logits (R, 1, K, V), keys (B, 2), which cells are free (K,)
    and what the others hold (B, 1, K), to tokens (B, 1, K)."""
    sample = make_sampler(options.temp, options.top_k, options.top_p)

    @mx.compile
    def choose(
        logits: mx.array, keys: mx.array, free: mx.array, given: mx.array
    ) -> mx.array:
        tokens = sample(guide(logits, options), keys)
        return mx.where(free, tokens, given)

    return choose


def sampling_keys(seeds: list[int], steps: int) -> mx.array:
    """Random keys (S, B, 2): a word from the row's seed, and the step's number.

    So a row's draws depend on its seed alone, however many rows or steps.
    """
    words = mx.stack([mx.random.split(mx.random.key(s), 1)[0, 0] for s in seeds])
    words = mx.broadcast_to(words, (steps, len(seeds)))
    numbers = mx.broadcast_to(mx.arange(steps, dtype=mx.uint32)[:, None], words.shape)
    return mx.stack([words, numbers], axis=-1)


STYLE_OPTIONS = ("guidance_beta", "style_start", "style_length", "style_quantizers")


@dataclass(frozen=True)
class Options:
    """What shapes a take, besides its prompt and seed."""

    duration: float = 8.0  # seconds
    temp: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    guidance_coef: float = 3.0
    negative_prompt: str = ""
    extend_stride: float | None = None  # seconds; None: 3/5 of the longest window
    guidance_beta: float | None = None  # None: text and style count alike
    style_start: float | None = None  # second of the sound; None: any, by the seed
    style_length: float | None = None  # seconds; None: the model's, 3
    style_quantizers: int | None = None  # None: the model's, 3; fewer are freer

    @property
    def copies(self) -> int:
        """Rows that each take needs."""
        return 3 if self.guidance_beta is not None else 1 + (self.guidance_coef != 1)

    def check(self, max_duration: float = 30.0, frame_rate: int = 50) -> None:
        """Raise ValueError, saying what must hold, for what `generate` cannot do."""
        for name in ("duration", "temp", "top_p", "guidance_coef", *STYLE_OPTIONS):
            number = getattr(self, name)
            whole = isinstance(number, Real) and not isinstance(number, bool)
            left_out = number is None and name in STYLE_OPTIONS
            if not (left_out or whole and abs(number) < 1e6):
                raise ValueError(f"{name} must be a number, got {number!r}.")
        if self.duration < 1 / frame_rate:
            raise ValueError(
                f"duration must be at least a frame, 1/{frame_rate} s, "
                f"got {self.duration}."
            )
        if self.temp != 0 and self.temp < 1e-3:  # dividing by less overflows
            raise ValueError(f"temp must be 0 (greedy) or 0.001 up, got {self.temp}.")
        if type(self.top_k) is bool or not (
            isinstance(self.top_k, Integral) and 1 <= self.top_k <= 2048
        ):
            raise ValueError(
                f"top_k must be between 1 and 2048 (all), got {self.top_k}. "
                "For greedy decoding use temp=0."
            )
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 (off) and 1, got {self.top_p}.")
        self._check_style()
        self._check_null_rows()
        stride = self.extend_stride
        if stride is not None and not (
            isinstance(stride, Real) and 1 / frame_rate <= stride < max_duration
        ):
            raise ValueError(
                f"extend_stride must be from 1/{frame_rate} to less than the longest "
                f"window of {max_duration:g} seconds, got {stride}."
            )

    def _check_style(self) -> None:
        if self.style_start is not None and self.style_start < 0:
            raise ValueError(
                f"style_start must be 0 s or more, got {self.style_start}."
            )
        if not isinstance(self.style_quantizers, Integral | None):
            raise ValueError(
                f"style_quantizers must be whole, got {self.style_quantizers}."
            )

    def _check_null_rows(self) -> None:
        if not isinstance(self.negative_prompt, str):
            raise ValueError(
                f"negative_prompt must be a text, got {self.negative_prompt!r}."
            )
        if self.negative_prompt and self.copies == 1:
            raise ValueError(
                "negative_prompt must come with a guidance_coef other than 1, "
                "which leaves out the rows it stands in."
            )


def windows(frames: int, longest: int, stride: int) -> list[tuple[int, int]]:
    """First frame and end of the windows in which `frames` frames are made.

    Each starts `stride` frames after the one before, and takes what that one made
    from there on as its beginning. 60 s in windows of 30 s, each dot 6 s:

        ##...
           **###
              **###     # made here, * taken over

    """
    starts = range(0, max(frames - longest, 0) + stride, stride)
    return [(start, min(start + longest, frames)) for start in starts]


class Part(NamedTuple):
    """Some rows of a run."""

    stream: mx.Stream
    text: tuple[mx.array, mx.array]  # states (R, L, width) and mask (R, L)
    conditioning: Conditioning
    cache: list[KVCache]
    lower: Callable[[mx.array], State]
    upper: Callable[[State], mx.array]


class Run:
    """The decoder under given texts, ready to step: what is prepared once.

    `rows` takes run under as many text states (R, L, width) with their mask (R, L),
    or a whole number of times as many, for up to `steps` steps. On the CPU the rows
    are two halves, computed side by side.
    """

    def __init__(
        self, decoder: Decoder, text: mx.array, mask: mx.array, rows: int, steps: int
    ):
        R = len(text)
        self._decoder, self._copies = decoder, R // rows
        on_cpu = mx.default_device() == mx.cpu
        self._cut = R // 2 if on_cpu and R > 1 and decoder.group is None else R
        self._parts, self._prefixes = [], None
        self._halfway: list[State] = []  # of the step before
        for (text, mask), stream in zip(self._split(text, mask), parallel_streams()):
            with mx.stream(stream):
                conditioning = decoder.condition(text, mask, steps)
            cache = decoder.make_cache(len(text), steps)
            halves = decoder.compile(conditioning, cache)
            parts = (stream, (text, mask), conditioning, cache, *halves)
            self._parts.append(Part(*parts))

    def _split(self, *arrays: mx.array) -> list[tuple[mx.array, ...]]:
        parts = [tuple(x[: self._cut] for x in arrays)]
        if self._cut < len(arrays[0]):
            parts.append(tuple(x[self._cut :] for x in arrays))
        return parts

    def rewind(self, sound: States | None = None, null: States | None = None) -> None:
        """Forget all steps; the buffers are used again. What comes of a sound before
        the codes, of B takes and of as many null rows, is given anew."""
        for part in self._parts:
            for layer in part.cache:
                layer.offset = 0
        if sound is not None:
            rows = [sound] * max(self._copies - 1, 1) + [null] * (self._copies > 1)
            self._prefixes = self._on_streams(
                lambda part, sound: self._decoder.prefix(sound, part.text),
                self._split(*map(mx.concatenate, zip(*rows))),
            )

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits (R, 1, K, V) of what follows the tokens (B, S, K)."""
        rows = [x for x, in self._split(mx.concatenate([tokens] * self._copies))]
        if tokens.shape[1] > 1 or self._prefixes:
            prefixes, self._prefixes = self._prefixes or [None] * len(rows), None
            return mx.concatenate(
                self._on_streams(self._prefill, list(zip(rows, prefixes)))
            )
        states = self._on_streams(lambda part, x: part.lower(x), rows)
        self._keep_pace(tokens, states)
        return mx.concatenate(
            self._on_streams(lambda part, state: part.upper(state), states)
        )

    def _on_streams(self, compute: Callable, values: list) -> list:
        results = []
        for part, value in zip(self._parts, values):
            with mx.stream(part.stream):
                results.append(compute(part, value))
        return results

    def _prefill(self, part: Part, given: tuple[mx.array, mx.array | None]) -> mx.array:
        tokens, prefix = given
        x = self._decoder.hidden(tokens, part.conditioning, part.cache, prefix)
        return self._decoder.logits(x[:, -1:])

    def _keep_pace(self, tokens: mx.array, states: list[State]) -> None:
        """Start on the lower layers, when the step before is through with them.

        MLX writes into a cache only once all that reads it is done, and copies the
        whole of it otherwise. So half a step is under way while the other is built.
        """
        mx.eval(self._halfway)
        mx.async_eval(states)
        mx.eval(tokens)
        self._halfway = states


class MusicGen(nn.Module):
    """Text encoder, decoder and codec together."""

    def __init__(self, config: MusicGenConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = T5(config.text_encoder)
        self.decoder = Decoder(config.decoder, config.text_encoder.d_model)
        self.audio_encoder = Encodec(config.audio_encoder)
        self.conditioner: Conditioner | None = None
        if config.conditioner:
            parts = (self.audio_encoder, config.max_duration)
            self.conditioner = config.conditioner.build(*parts)
        self._load_text_encoder: Callable[[], T5] | None = None  # after it was freed
        self.name, self.revision = "", None  # that from_pretrained loaded
        self._adapter: dict[str, Any] = {}  # its file and scale, if there is one
        if config.quantization:
            self.decoder.quantize(**config.quantization)

    @property
    def sampling_rate(self) -> int:
        """Samples per second."""
        return self.audio_encoder.sampling_rate

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return self.config.audio_encoder.frame_rate

    @property
    def adapter(self) -> dict[str, Any]:
        """Under "adapter" and "adapter_scale" what `from_pretrained` was given."""
        return self._adapter

    @property
    def channels(self) -> int:
        """Audio channels: 1, or 2 in the stereo models."""
        return self.config.decoder.audio_channels

    def generate(
        self,
        prompts: str | list[str],
        duration: float = 8.0,
        *args,
        drop_prompt: bool = False,
        **options,
    ) -> mx.array:
        """Music for each prompt: (B, N, C) float32 samples in about -1 to 1.

        Takes the options of `generate_codes`. `drop_prompt` leaves out what
        `audio_prompt` gave.
        """
        codes = self.generate_codes(prompts, duration, *args, **options)
        audio = self.decode(codes)
        if drop_prompt:
            audio = self.without(audio, self.prompt_frames(options.get("audio_prompt")))
        return audio

    def prompt_frames(self, audio: mx.array | None) -> int:
        """Frames that an audio prompt (N, C) takes."""
        hop = self.config.audio_encoder.hop_length
        return 0 if audio is None else math.ceil(len(audio) / hop)

    def without(self, audio: mx.array, frames: int) -> mx.array:
        """Audio (B, N, C) less its first frames."""
        return audio[:, frames * self.config.audio_encoder.hop_length :]

    def generate_codes(
        self,
        prompts: str | list[str],
        duration: float = 8.0,
        temp: float = 1.0,
        top_k: int = 250,
        top_p: float = 0.0,
        guidance_coef: float = 3.0,
        seed: int | list[int] | None = None,
        callback: Callable[[int, int], None] | None = None,
        *,
        negative_prompt: str = "",
        audio_prompt: mx.array | None = None,
        codes_prompt: mx.array | None = None,
        melody: Sounds = None,
        separate: bool = True,
        style: Sounds = None,
        extend_stride: float | None = None,
        batch_size: int | None = None,
        stop: Callable[[], bool] | None = None,
        guidance_beta: float | None = None,
        style_start: float | None = None,
        style_length: float | None = None,
        style_quantizers: int | None = None,
    ) -> mx.array:
        """Codes (B, T, K) for each prompt, T = int(duration * frame_rate).

        Args:
            prompts: one text or several; "" is unconditional.
            duration: seconds. Beyond `max_duration` a window slides over the music.
            temp, top_k, top_p: see `make_sampler`.
            guidance_coef: weight of the text against no text; 1 is the text
                alone, and runs half the rows.
            seed: row i draws from seed + i, or from the i-th of a list; a row's
                codes depend on its own prompt and seed only. None: any.
            callback: called in each step with its number and their count.
            negative_prompt: what to move away from, in place of no text.
            audio_prompt: sound (N, C) at `sampling_rate` for the takes to start with.
            codes_prompt: codes (1, T, K) to start with, such as those of a take that
                was stopped; it then ends as if it never had been.
            melody: sound (N, C) at `sampling_rate` whose tune a melody model follows,
                or one or None for each prompt. Repeated where it is too short.
            separate: take drums and bass away from it first, with Demucs.
            style: sound (N, C) in whose manner a style model plays, or one or None for
                each prompt.
            style_start, style_length: seconds of it that are heard. None: from
                anywhere on, by the seed, and the model's own, 3.
            style_quantizers: how much to keep to it, 1 to 6. None: the model's own, 3.
            guidance_beta: how many times the text counts beside it.
            extend_stride: seconds from one window's start to the next's; what
                lies between that and the window's end begins the next. None: 3/5
                of the window, so 18 of 30.
            batch_size: rows to run at once; None: as many as memory holds.
            stop: asked in each step; once it is true the takes end there. Of several
                batches only the first rows that are whole come back. Raises
                KeyboardInterrupt where not a frame is made.

        Raises ValueError for options out of range.
        """
        options = (duration, temp, top_k, top_p, guidance_coef)
        of_style = (guidance_beta, style_start, style_length, style_quantizers)
        options = Options(*options, negative_prompt, extend_stride, *of_style)
        prompts, seeds = self._check(prompts, seed, options)
        known = self._known(audio_prompt, codes_prompt, options)
        sounds = self._sounds(melody, style, seeds, options, separate)
        batches = self._batches(prompts, sounds, batch_size, options)

        codes = {}
        for i, rows in enumerate(batches):
            chosen = ([x[row] for row in rows] for x in (prompts, seeds, sounds))
            work = (*chosen, known, options, in_all(callback, i, len(batches)))
            pieces = [p for p in self._codes(*work, stop=stop) if p is not None]
            if not pieces:
                raise KeyboardInterrupt
            codes |= zip(rows, mx.concatenate(pieces, axis=1))
            if len(batches) > 1 and stop is not None and stop():
                break
        return mx.stack(first_whole(codes))

    def _batches(
        self,
        prompts: list[str],
        sounds: list[mx.array | None],
        size: int | None,
        options: Options,
    ) -> list[list[int]]:
        """The prompts' numbers, up to `size` together, or what memory holds. Where
        sound and text come before the codes, a batch has those of one length."""
        if size is not None and not (isinstance(size, Integral) and size > 0):
            raise ValueError(f"batch_size must be 1 or more, got {size!r}.")
        size, groups = size or self.rows_that_fit(options), {0: range(len(prompts))}
        if self.conditioner is not None:
            texts, groups = [*prompts, options.negative_prompt], {}
            *tokens, least = (len(self.tokenizer.encode(text)) for text in texts)
            for row, count in enumerate(tokens):
                length = (max(count, least), self.conditioner.frames(sounds[row]))
                groups.setdefault(length, []).append(row)
        return [
            rows[start : start + size]
            for rows in groups.values()
            for start in range(0, len(rows), size)
        ]

    def _sounds(
        self,
        melody: Sounds,
        style: Sounds,
        seeds: list[int],
        options: Options,
        separate: bool,
    ) -> list[mx.array | None]:
        """What the conditioner takes of each row's sound; None where there is none."""
        given = {"melody": melody, "style": style}
        rows = {k: one_each(k, sound, len(seeds)) for k, sound in given.items()}
        bare = [sound is None for sound in rows["style"]]
        alone = [k for k in STYLE_OPTIONS if getattr(options, k) is not None]
        if alone and all(bare):
            raise ValueError(f"{', '.join(alone)} must come with a style.")
        if options.guidance_beta is not None and any(bare):
            raise ValueError("guidance_beta must come with a style for each prompt.")
        found = [None] * len(seeds)
        for kind, sounds in rows.items():
            if any(sound is not None for sound in sounds):
                self.check_follows(kind)
                rest = (seeds, options, separate)
                found = self.conditioner.take_all(sounds, *rest)
        return found

    def check_follows(self, kind: str) -> None:
        """Raise ValueError unless this model follows sounds so: "melody", "style"."""
        if self.conditioner is None or self.conditioner.kind != kind:
            raise ValueError(
                f"{kind} must go with a {kind} model, such as '{kind}'; this is none."
            )

    def _states(
        self, sounds: list[mx.array | None], start: int, frames: int
    ) -> tuple[States, States] | tuple[()]:
        """What comes of the sounds before the codes, in takes and in null rows, for the
        window from frame `start` on of `frames`."""
        if self.conditioner is None:
            return ()
        longest = int(self.config.max_duration * self.frame_rate)
        place = start * self.config.audio_encoder.hop_length
        states = self.conditioner.states(sounds, place if frames > longest else None)
        return states, self.conditioner.null_states(states[0].shape)

    def stream(
        self,
        prompt: str,
        duration: float = 8.0,
        *,
        chunk: float = 0.5,
        seed: int | None = None,
        audio_prompt: mx.array | None = None,
        codes_prompt: mx.array | None = None,
        melody: mx.array | None = None,
        separate: bool = True,
        style: mx.array | None = None,
        callback: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        on_codes: Callable[[mx.array], None] | None = None,
        **options,
    ) -> Iterator[mx.array]:
        """The samples that `generate` gives for one prompt, while they are made.

        Yields arrays (N, C) of about `chunk` seconds; a sample waits for the delay
        pattern and the codec's look-ahead, together 0.135 s in the 32 kHz codec.
        `on_codes` is called with each piece of codes (1, T, K), before its sound
        comes. Takes the options of `generate_codes`. Raises ValueError for bad ones.
        """
        options = Options(duration, **options)
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be one text, got {prompt!r}.")
        prompts, seeds = self._check(prompt, seed, options)
        if not isinstance(chunk, Real) or not 1 / self.frame_rate <= chunk < 1e6:
            raise ValueError(
                f"chunk must be at least 1/{self.frame_rate} s, got {chunk}."
            )
        known = self._known(audio_prompt, codes_prompt, options)
        every = int(chunk * self.frame_rate)
        sounds = self._sounds(melody, style, seeds, options, separate)
        work = (prompts, seeds, sounds, known, options, callback)
        return self._sound(self._codes(*work, every=every, stop=stop), on_codes)

    def _check(
        self, prompts: str | list[str], seed: int | list[int] | None, options: Options
    ) -> tuple[list[str], list[int]]:
        """A prompt and a seed for each row, after checking all that was asked for."""
        prompts = check_prompts(prompts)
        options.check(self.config.max_duration, self.frame_rate)
        return prompts, row_seeds(seed, len(prompts))

    def _known(
        self, audio: mx.array | None, codes: mx.array | None, options: Options
    ) -> mx.array:
        """Codes (1, T, K) to start with: given, of a sound, or none."""
        frames = int(options.duration * self.frame_rate)
        if codes is None:
            return self.encode_prompt(audio, frames)
        if audio is not None:
            raise ValueError("audio_prompt and codes_prompt must not come together.")
        return self._check_known(codes, frames)

    def _sound(
        self,
        codes: Iterator[mx.array | None],
        on_codes: Callable[[mx.array], None] | None,
    ) -> Iterator[mx.array]:
        """Decode pieces of codes (1, T, K), handing each piece of sound out when the
        next step is under way, so that a GPU always has work."""
        decoding, waiting = self.audio_encoder.stream(), deque()
        for step, piece in enumerate(codes):
            if piece is not None:
                sound = self._by_channel(decoding.push, piece)[0]
                mx.async_eval(sound)
                waiting.append((step, sound))
                if on_codes is not None:
                    on_codes(piece)
            while waiting and waiting[0][0] + STEPS_AHEAD <= step:
                yield from filled([waiting.popleft()[1]])
        nothing = mx.zeros((1, 0, self.config.decoder.num_codebooks), mx.uint32)
        finish = functools.partial(decoding.push, last=True)
        rest = [sound for _, sound in waiting]
        yield from filled([*rest, self._by_channel(finish, nothing)[0]])

    def _codes(
        self,
        prompts: list[str],
        seeds: list[int],
        sounds: list[mx.array | None],
        known: mx.array,
        options: Options,
        callback: Callable[[int, int], None] | None,
        every: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[mx.array | None]:
        """Codes in pieces (B, T, K), `known` (1, T', K) first.

        A piece comes every `every` frames, or with each window's end; None comes
        for a step that completes none.
        """
        delays = self.config.decoder.delays
        frames = int(options.duration * self.frame_rate)
        plan = windows(frames, *self._window(options))
        plan = [(start, end) for start, end in plan if end > known.shape[1]]
        run = self._prepare(prompts, sounds, options, plan[0][1] - plan[0][0])
        choose = make_chooser(options)
        keys = sampling_keys(seeds, frames + max(delays))
        report = progress(callback, known.shape[1], plan, max(delays))

        known = mx.repeat(known, len(prompts), axis=0)
        offset = 0  # the first frame in `known`
        if known.shape[1] > 0:
            yield known
        for start, end in plan:
            run.rewind(*self._states(sounds, start, frames))
            known, offset = known[:, start - offset :], start
            sequence, columns, done = [], 0, known.shape[1]
            for tokens in self._steps(run, choose, known, end - start, keys[start:]):
                report()
                sequence.append(tokens)
                columns += tokens.shape[1]
                ready = columns - max(delays)
                whole_window = ready == end - start
                stopped = not whole_window and stop is not None and stop()
                enough = every and ready >= done + every or stopped and ready > done
                if whole_window or enough:
                    whole = mx.concatenate(sequence, axis=1)
                    sequence = [whole]
                    known = undelay(whole, delays)
                    yield known[:, done:]
                    done = ready
                else:
                    yield None
                if stopped:
                    return
            mx.eval(known)

    def _steps(
        self,
        run: Run,
        choose: "Chooser",
        known: mx.array,
        frames: int,
        keys: mx.array,
    ) -> Iterator[mx.array]:
        """The delayed sequence of a window of `frames` frames that starts with the
        codes `known` (B, T, K): first all that is known, then a step at a time."""
        delays, blank = self.config.decoder.delays, self.config.decoder.vocab_size
        T = known.shape[1]
        forced = delay(known, delays, frames, blank)
        free = delay_mask(frames, delays, start=T)
        B, S, K = forced.shape
        tokens = mx.full((B, 1, K), blank, forced.dtype)
        if T > 0:
            tokens = mx.concatenate([tokens, forced[:, :T]], axis=1)
            yield forced[:, :T]
        for step in range(T, S):
            given = forced[:, step : step + 1]
            tokens = choose(run(tokens), keys[step], free[step], given)
            mx.async_eval(tokens)
            yield tokens

    def _window(self, options: Options) -> tuple[int, int]:
        """Frames of the longest window, and from one's start to the next's."""
        longest = self.config.max_duration
        stride = options.extend_stride or 0.6 * longest
        return int(longest * self.frame_rate), int(stride * self.frame_rate)

    def _prepare(
        self,
        prompts: list[str],
        sounds: list[mx.array | None],
        options: Options,
        frames: int,
    ) -> Run:
        """The decoder under the prompts, for windows of up to `frames` frames."""
        guided = options.copies > 1
        text, mask = self.encode_text(prompts, guided, options.negative_prompt)
        if options.copies > 2:
            text, mask = (add_empty_rows(x, len(prompts)) for x in (text, mask))
        steps = frames + max(self.config.decoder.delays)
        if self.conditioner is not None:
            steps += self.conditioner.frames(sounds[0]) + text.shape[1]
        self._make_room(len(text) * self.decoder.cache_bytes(steps))
        return Run(self.decoder, text, mask, len(prompts), steps)

    def rows_that_fit(self, options: Options) -> int:
        """How many prompts fit into memory at once, at least one."""
        longest, _ = self._window(options)
        frames = min(longest, int(options.duration * self.frame_rate))
        if self.conditioner is not None:
            frames += self.conditioner.longest + self.config.text_encoder.n_positions
        row = self.decoder.cache_bytes(frames) * options.copies
        room = memory_size() - mx.get_active_memory() - DECODING_MEMORY
        return max(int(room // row), 1)

    def encode_prompt(self, audio: mx.array | None, frames: int) -> mx.array:
        """Codes (1, T, K) of sound (N, C), mono or stereo; none for None.

        Raises ValueError for another shape, NaN, or `frames` frames or more.
        """
        K, C = self.config.decoder.num_codebooks, self.channels
        if audio is None:
            return mx.zeros((1, 0, K), mx.uint32)
        audio = mx.array(audio)
        if audio.ndim != 2 or 0 in audio.shape or audio.shape[1] > 2:
            raise ValueError(
                "audio_prompt must have the shape (N, 1) or (N, 2) with N > 0, "
                f"got {audio.shape}."
            )
        if not mx.isfinite(audio).all():
            raise ValueError("audio_prompt must be finite, but it holds NaN.")
        longest = frames * self.config.audio_encoder.hop_length
        if len(audio) > longest - self.config.audio_encoder.hop_length:
            raise ValueError(
                f"audio_prompt must be a frame shorter than the duration of "
                f"{longest / self.sampling_rate:g} s or more, but has "
                f"{len(audio) / self.sampling_rate:g} s."
            )
        if mx.abs(audio).max() < 1e-4:
            warnings.warn("The audio prompt is silent; the music may be, too.")
        audio = audio.mean(axis=1, keepdims=True) if C == 1 else audio
        audio = mx.broadcast_to(audio, (len(audio), C))
        ((codes, _),) = self.audio_encoder.encode(audio.T[..., None])  # (C, T, K / C)
        return codes.transpose(1, 2, 0).reshape(1, -1, K).astype(mx.uint32)

    def check_codes(self, codes: mx.array) -> None:
        """Raise ValueError unless codes (B, T, K) can be this model's."""
        config = self.config.decoder
        if (
            codes.ndim != 3
            or not mx.issubdtype(codes.dtype, mx.integer)
            or codes.shape[2] != config.num_codebooks
            or codes.size == 0
            or codes.min().item() < 0
            or codes.max().item() >= config.vocab_size
        ):
            raise ValueError(
                f"The codes must be of {config.num_codebooks} codebooks with "
                f"{config.vocab_size} entries, as this model's are; they are not."
            )

    def _check_known(self, codes: mx.array, frames: int) -> mx.array:
        if codes.ndim != 3 or len(codes) != 1:
            raise ValueError(
                f"codes_prompt must be codes (1, T, K), got {codes.shape}."
            )
        T = codes.shape[1]
        if T > 0:
            self.check_codes(codes)
        if T >= frames:
            raise ValueError(
                f"The codes are {T / self.frame_rate:g} s long already; the duration "
                f"must be more, got {frames / self.frame_rate:g} s."
            )
        return codes

    def _make_room(self, size: int) -> None:
        """Free T5 where `size` bytes, or what decoding takes, do not fit beside it."""
        needed = mx.get_active_memory() + max(size, DECODING_MEMORY)
        if self._load_text_encoder and needed > memory_size():
            self.text_encoder = None

    def encode_text(
        self, prompts: list[str], with_null: bool, negative_prompt: str = ""
    ) -> tuple[mx.array, mx.array]:
        """T5 states (R, L, width) and mask (R, L) of the prompts.

        `with_null` adds as many rows of the negative prompt. In a row of an empty
        prompt nothing is attended. Longer prompts than T5 knows lose their end,
        with a warning.
        """
        if self.text_encoder is None:
            self.text_encoder = self._load_text_encoder()
        count = len(prompts)
        if with_null and negative_prompt:
            prompts = [*prompts, negative_prompt]
        longest = self.config.text_encoder.n_positions
        ids = [self.tokenizer.encode(prompt) for prompt in prompts]
        for i, row in enumerate(ids):
            if len(row) > longest:
                which = f"Prompt {i + 1}" if i < count else "The negative prompt"
                warnings.warn(
                    f"{which} has {len(row)} tokens; T5 takes {longest}, so the rest "
                    "is left out."
                )
                ids[i] = row[: longest - 1] + row[-1:]
        text, mask = self.text_encoder.encode(ids)
        mask = mask & mx.array([prompt != "" for prompt in prompts])[:, None]
        if with_null and negative_prompt:
            rows = (count, *text.shape[1:])
            text = mx.concatenate([text[:-1], mx.broadcast_to(text[-1:], rows)])
            mask = mx.concatenate([mask[:-1], mx.broadcast_to(mask[-1:], rows[:2])])
        elif with_null:
            text = mx.concatenate([text, mx.zeros_like(text)])
            mask = mx.concatenate([mask, mx.zeros_like(mask)])
        return text, mask

    def decode(self, codes: mx.array) -> mx.array:
        """Samples (B, N, C) of codes (B, T, K), N = T * hop_length."""
        return self._by_channel(self.audio_encoder.decode_chunk, codes)

    def _by_channel(
        self, decode: Callable[[mx.array], mx.array], codes: mx.array
    ) -> mx.array:
        """Stereo is two runs of the mono codec: codebooks alternate left, right."""
        B, T, K = codes.shape
        C = self.channels
        codes = codes.reshape(B, T, K // C, C).transpose(0, 3, 1, 2)
        audio = decode(codes.reshape(B * C, T, K // C))
        N = audio.shape[1]
        return audio.reshape(B, C, N).swapaxes(1, 2)  # (B, C, N) -> (B, N, C)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        dtype: mx.Dtype | None = None,
        q_bits: int | None = None,
        q_group_size: int = 64,
        lazy: bool = False,
        group: mx.distributed.Group | None = None,
        adapter: str | Path | None = None,
        adapter_scale: float = 1.0,
    ) -> "MusicGen":
        """Load a model by short name ("small"), Hub id or local folder.

        A folder may have audiocraft's layout, with T5 in `t5-base/` and a codec
        that is only named in `encodec_32khz/` (else the Hub is asked for them),
        transformers', or the one `convert.py` writes. `dtype` is the decoder's:
        by default float32 on the CPU, on a GPU what `convert.py` wrote, else
        float16. T5 and codec are always float32. `q_bits` quantizes the decoder's
        layers while loading, unless the folder holds them so. `lazy` leaves
        the weights to be read when they are needed. `group` shares the decoder's
        layers among its processes, which must then all generate the same. `adapter`
        is a file of `train.py lora` that changes it, `adapter_scale` times. Raises
        ValueError or OSError naming the file, tensor or key and what to do.
        """
        from checkpoints import load

        known = isinstance(dtype, mx.Dtype) and dtype in DTYPES.values()
        if dtype is not None and not known:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}.")
        model, folder, stored = load(str(path_or_repo))
        model.name = str(path_or_repo)
        if folder.parent.name == "snapshots":  # of the Hub's cache
            model.revision = folder.name
        if dtype is None:
            dtype = stored if mx.default_device() == mx.gpu else mx.float32
        model.decoder.set_dtype(dtype)
        if q_bits is not None:
            model.quantize(q_bits, q_group_size)
        shared = group is not None and group.size() > 1
        if adapter is not None:
            model._adapt(adapter, adapter_scale, shared)
        if shared:
            model.decoder.shard(group)
        if not lazy:
            try:
                mx.eval(model.parameters())
            except RuntimeError as error:
                raise ValueError(f"{folder} cannot be read: {error}") from error
            if mx.default_device() == mx.cpu:
                model.decoder.store_columns()
        return model

    def quantize(self, bits: int, group_size: int = 64) -> None:
        """Quantize the decoder's layers, unless they are so already. Raises ValueError
        where they are in other bits, or MLX cannot do it."""
        told = self.config.quantization
        if told is None:
            self.decoder.quantize(bits, group_size)
            self.config.quantization = {"bits": bits, "group_size": group_size}
        elif told["bits"] != bits:
            raise ValueError(
                f"{self.name} is quantized already, with {told}; q_bits cannot be "
                f"{bits}."
            )

    def _adapt(self, path: str | Path, scale: float, shared: bool) -> None:
        """Change the decoder by an adapter's file, before it is `shared`."""
        from lora import has_adapters, load_adapter

        load_adapter(self, path, scale)
        if shared and has_adapters(self.decoder):
            raise ValueError(
                "An adapter on a quantized model cannot be shared by processes; take "
                "the model that is not quantized."
            )
        self._adapter = {"adapter": str(path), "adapter_scale": scale}


def one_each(name: str, sounds: Sounds, count: int) -> list[mx.array | None]:
    """A sound or None for each of `count` rows."""
    if not isinstance(sounds, list | tuple):
        return [sounds] * count
    if len(sounds) != count:
        raise ValueError(
            f"{name} must be one sound, or one for each of {count} prompts, got "
            f"{len(sounds)}."
        )
    return list(sounds)


def add_empty_rows(rows: mx.array, count: int) -> mx.array:
    """The first `count` rows, as many of zeros, and the others."""
    return mx.concatenate([rows[:count], mx.zeros_like(rows[:count]), rows[count:]])


def check_prompts(prompts: str | list[str]) -> list[str]:
    """A list of at least one text. Raises ValueError for anything else."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    several = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not several or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"There must be a prompt, or a list of them, got {prompts!r:.80}. "
            "An empty text generates freely."
        )
    return list(prompts)


def progress(
    callback: Callable[[int, int], None] | None,
    known: int,
    plan: list[tuple[int, int]],
    delay: int,
) -> Callable[[], None]:
    """A function that tells `callback` one step more and the number of all.

    A window takes a step for each column that it makes, and one for all known ones.
    """
    ends = [known, *(end for _, end in plan)]
    total = sum(b - a + delay + (a > 0) for a, b in zip(ends, ends[1:]))
    steps = itertools.count()
    return lambda: callback and callback(next(steps), total)


def in_all(
    callback: Callable[[int, int], None] | None, batch: int, batches: int
) -> Callable[[int, int], None] | None:
    """What tells `callback` the steps of one batch as those of all."""
    if callback is None:
        return None
    return lambda step, steps: callback(batch * steps + step, batches * steps)


def filled(arrays: list[mx.array]) -> list[mx.array]:
    """Those of the arrays (N, C) that hold something."""
    return [array for array in arrays if array.shape[0] > 0]


def memory_size() -> int:
    """Bytes that MLX may use on this machine."""
    limit = mx.get_memory_limit()
    return mx.device_info().get("max_recommended_working_set_size", limit)


def first_whole(codes: dict[int, mx.array]) -> list[mx.array]:
    """Of rows that may have been stopped, those from row 0 on that are as long as the
    longest, up to the first that is not."""
    longest = max(len(row) for row in codes.values())
    found = itertools.takewhile(
        lambda row: row in codes and len(codes[row]) == longest, itertools.count()
    )
    return [codes[row] for row in found]


def row_seeds(seed: int | list[int] | None, rows: int) -> list[int]:
    """One seed a row: counted up from `seed`, as listed, or any."""
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, Integral):
        seed = [int(seed) + row for row in range(rows)]
    seeds = list(seed) if isinstance(seed, list | tuple) else []
    whole = all(
        isinstance(s, Integral) and type(s) is not bool and 0 <= s < 2**64
        for s in seeds
    )
    if len(seeds) != rows or not whole:
        raise ValueError(
            f"seed must be a number from 0 to 2**64 - 1, or {rows} of them, got {seed}."
        )
    return [int(s) for s in seeds]
