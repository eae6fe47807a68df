"""Style: a few seconds of music -> what a style model plays in the manner of.

The style conditioner of MusicGen-Style (https://arxiv.org/abs/2407.12563): features of
an excerpt go through a transformer and then through a bottleneck, a residual quantizer
of which only a few codebooks are used, so that the manner of the music stays and its
notes do not. Needs mert.py beside it, which makes the features, encodec.py, audio.py,
resample.py, outputs.py and strict.py. With a style model that is loaded:

    request = StyleRequest(sound)  # (N, C) at the model's sampling rate
    start, excerpt = model.conditioner.excerpt(request, seed=7)
    tokens = model.conditioner(excerpt)  # (T, 512), five a second
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from audio import check_samples, count_samples, load_audio, resample
from encodec import Encodec, nearest
from mert import MERT, EncoderLayer, MERTConfig
from strict import Misfit


@dataclass(frozen=True)
class StyleConfig:
    """Sizes and settings; defaults: the published model. Seconds are of excerpts."""

    kind: str = "style"
    width: int = 512
    num_layers: int = 8
    num_heads: int = 8
    hidden: int = 2048
    num_quantizers: int = 6
    bins: int = 1024  # entries of each quantizer
    eval_q: int = 3  # quantizers that are used; fewer leave more freedom
    ds_factor: int = 15  # frames of features for one of the prefix
    length: float = 3.0
    varying_lengths: tuple[float, float] = (1.5, 4.5)  # least and most
    mert: MERTConfig | None = MERTConfig()
    encodec_n_q: int = 0  # codebooks whose embeddings are the features, without MERT

    @classmethod
    def from_dict(cls, config: dict) -> "StyleConfig":
        """Take the known keys. Raises ValueError for what is absurd."""
        names = {field.name for field in fields(cls)}
        settings = {name: config[name] for name in names & config.keys()}
        if isinstance(lengths := settings.get("varying_lengths"), list):
            settings["varying_lengths"] = tuple(lengths)
        mert = settings.get("mert", {})
        if mert is not None and not isinstance(mert, dict):
            raise ValueError(f"mert must be an object, got {mert!r:.80}.")
        settings["mert"] = None if mert is None else MERTConfig.from_dict(mert)
        config = cls(**settings)
        check_config(config)
        return config

    def build(self, codec: Encodec, max_duration: float) -> "StyleConditioner":
        """The conditioner of a model with this codec, whatever its windows."""
        return StyleConditioner(self, codec)


class StyleRequest(NamedTuple):
    """A manner to play in. None: as the model has it."""

    audio: mx.array | str | Path  # (N, C) at the model's sampling rate, or a file
    start: float | None = None  # second at which the excerpt begins; None: by the seed
    length: float | None = None  # seconds of the excerpt
    quantizers: int | None = None  # that are used; fewer leave more freedom


class StyleConditioner(nn.Module):
    """Makes the prefix of a style: tokens of an excerpt. Takes without a style have a
    prefix of one frame that does not count."""

    kind = "style"
    uses_seed = True  # `prepare` draws where the excerpt begins

    def __init__(self, config: StyleConfig, codec: Encodec):
        super().__init__()
        D = config.width
        self.config, self._codec = config, codec
        if config.mert:
            self.mert = MERT(config.mert)
            self.embed = nn.Linear(config.mert.hidden_size, D)
        elif config.encodec_n_q > codec.config.num_codebooks():
            raise ValueError(
                f"encodec_n_q must be at most the codec's "
                f"{codec.config.num_codebooks()} codebooks, got {config.encodec_n_q}."
            )
        else:
            entries = codec.config.codebook_size
            self.embed = [nn.Embedding(entries, D) for _ in range(config.encodec_n_q)]
        self._positions = nn.SinusoidalPositionalEncoding(D, cos_first=True, scale=1.0)
        sizes = (D, config.num_heads, config.hidden)
        self.layers = [
            EncoderLayer(*sizes, bias=False, norm_first=True)
            for _ in range(config.num_layers)
        ]
        self.mean, self.variance = mx.zeros(D), mx.ones(D)
        self.codebooks = mx.zeros((config.num_quantizers, config.bins, D))

    def __call__(self, audio: mx.array, quantizers: int | None = None) -> mx.array:
        """Audio (N, 1) at the codec's rate -> tokens of its style (T, width).

        Raises ValueError unless `quantizers` are None, the model's own, or in range.
        """
        count, most = self.config.eval_q, self.config.num_quantizers
        count = count if quantizers is None else quantizers
        if not 1 <= count <= most or count != int(count):
            raise ValueError(f"style_quantizers must be from 1 to {most}, got {count}.")
        x = self.features(audio)
        x = x + self._positions(mx.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        x = (x - self.mean) * mx.rsqrt(self.variance + 1e-5)  # batch norm
        x = quantize(x, self.codebooks[: int(count)])
        return x[0, :: self.config.ds_factor]

    def features(self, audio: mx.array) -> mx.array:
        """Features (1, T, width) of audio (N, 1) at the codec's rate."""
        if self.config.mert is None:
            bandwidth = self._codec.config.target_bandwidths[-1]  # all codebooks
            codes = self._codec.encode(audio[None], bandwidth)[0].codes
            return sum(embed(codes[..., k]) for k, embed in enumerate(self.embed))
        rates = self._codec.sampling_rate, self.mert.sampling_rate
        return self.embed(self.mert(mx.array(resample(np.array(audio), *rates)).T))

    @property
    def longest(self) -> int:
        """Most prefix frames there can be."""
        rate = self._codec.config.frame_rate
        if self.config.mert:
            rate = self.mert.sampling_rate / math.prod(self.config.mert.conv_stride)
        most = max(self.config.varying_lengths[1], self.config.length)
        return math.ceil(rate * most / self.config.ds_factor) + 1

    def prepare(
        self, request: StyleRequest | None, seed: int, duration: float
    ) -> mx.array | None:
        """Tokens (T, width) of an excerpt, one for takes of any duration. Raises as
        `excerpt`, and for more quantizers than there are."""
        if request is None:
            return None
        if not isinstance(request, StyleRequest):
            raise ValueError(f"condition must be a StyleRequest, got {request!r:.80}.")
        _, excerpt = self.excerpt(request, seed)
        return self(excerpt, request.quantizers)

    def frames(self, prepared: mx.array | None) -> int:
        """Prefix frames of a take."""
        return 1 if prepared is None else len(prepared)

    def states(
        self, prepared: list[mx.array | None], start: int | None
    ) -> tuple[mx.array, mx.array]:
        """Tokens (B, T, width) of rows of equal length, and a mask (B, T) of those
        that count. The same in every window."""
        nothing = mx.zeros((1, self.config.width))
        values = mx.stack([nothing if x is None else x for x in prepared])
        there = mx.array([x is not None for x in prepared])[:, None]
        return values, mx.broadcast_to(there, values.shape[:2])

    def null_states(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """Zeros (B, T, width), and a mask (B, T) in which nothing counts."""
        return mx.zeros(shape), mx.zeros(shape[:2], mx.bool_)

    def excerpt(self, request: StyleRequest, seed: int) -> tuple[float, mx.array]:
        """The second at which a request's excerpt starts, and its samples (N, 1).

        Raises ValueError for another shape or NaN, a length out of range, an excerpt
        that does not lie in the sound, and silence in it.
        """
        audio, rate = request.audio, self._codec.sampling_rate
        size = int(self._length(request.length) * rate)
        if isinstance(audio, str | Path):
            samples = count_samples(audio, rate)
            first = find_start(samples, size, rate, seed, request.start)
            excerpt = load_audio(audio, rate, 1, first, size)
        else:
            audio = check_samples("style", audio, rate)
            first = find_start(len(audio), size, rate, seed, request.start)
            excerpt = audio[first : first + size].mean(axis=1, keepdims=True)
        if mx.abs(excerpt).max().item() < 1e-4:
            raise ValueError(
                f"The excerpt of style, from {first / rate:g} s on, must not be silent. "
                "Choose another style_start."
            )
        start = first / rate if request.start is None else request.start
        return start, excerpt

    def _length(self, length: float | None) -> float:
        least, most = self.config.varying_lengths
        if length is None:
            return self.config.length
        if not least <= length <= most:
            raise ValueError(
                f"style_length must be from {least:g} to {most:g} s, got {length:g}."
            )
        return length

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """audiocraft's names, or ours -> ours, in float32. Raises Misfit for what is no
        float, comes twice, or lacks a part."""
        kept, codebooks = {}, {}
        for name, weight in weights.items():
            if re.fullmatch(UNUSED, name):
                continue
            if not mx.issubdtype(weight.dtype, mx.floating):
                raise Misfit(name, f"must hold floats, but holds {weight.dtype}")
            weight = weight.astype(mx.float32)
            if match := re.fullmatch(CODEBOOK, name):
                codebooks[int(match[1])] = weight
                continue
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            for part, matrix in split(name, weight).items():
                add(kept, part, matrix)
        if codebooks:
            add(kept, "codebooks", stack_codebooks(codebooks))
        return kept


def quantize(x: mx.array, codebooks: mx.array) -> mx.array:
    """The sum of the nearest entries, each of what the last left over: (B, T, D)."""
    total = mx.zeros_like(x)
    for entries in codebooks:
        total = total + entries[nearest(x - total, entries)]
    return total


def find_start(
    samples: int, size: int, rate: int, seed: int, start: float | None
) -> int:
    """The sample at which an excerpt of `size` of the samples starts: at a second, or
    anywhere. Raises ValueError where it does not lie in them."""
    last = samples - size
    if last < 0:
        raise ValueError(
            f"style must have at least the {size / rate:g} s of the excerpt "
            f"(style_length), got {samples / rate:g} s."
        )
    if start is None:
        return int(np.random.default_rng(seed).integers(last + 1))
    if not 0 <= start < math.inf:
        raise ValueError(f"style_start must be 0 s or more, got {start}.")
    if round(start * rate) > last:
        raise ValueError(
            f"style_start must be at most {last / rate:g} s for an excerpt of "
            f"{size / rate:g} s, got {start:g}."
        )
    return round(start * rate)


CODEBOOK = r"rvq\.vq\.layers\.(\d+)\._codebook\.embed"
UNUSED = r".*(_codebook\.(inited|cluster_size|embed_avg)|num_batches_tracked)"
RENAMES = (  # audiocraft's names -> ours
    (r"^transformer\.layers\.", "layers."),
    (r"\.self_attn\.", ".attention."),
    (r"^batch_norm\.running_mean$", "mean"),
    (r"^batch_norm\.running_var$", "variance"),
)


SPELLINGS = (  # ours -> audiocraft's names
    (r"\.attention\.(query|key|value)_proj\.", ".self_attn.in_proj_"),
    (r"\.attention\.", ".self_attn."),
    (r"^layers\.", "transformer.layers."),
    (r"^mean$", "batch_norm.running_mean"),
    (r"^variance$", "batch_norm.running_var"),
    (r"^codebooks$", "rvq.vq.layers.0._codebook.embed"),
)


def spell(name: str) -> str:
    """audiocraft's name, below the conditioner's, of a tensor of ours."""
    for pattern, theirs in SPELLINGS:
        name = re.sub(pattern, theirs, name)
    return name


def split(name: str, weight: mx.array) -> dict[str, mx.array]:
    """audiocraft's one matrix of queries, keys and values -> three."""
    if not name.endswith(".in_proj_weight"):
        return {name: weight}
    if weight.ndim != 2 or len(weight) % 3:
        raise Misfit(name, f"must hold 3 matrices, got {weight.shape}")
    stem = name.removesuffix("in_proj_weight")
    names = [f"{stem}{part}_proj.weight" for part in ("query", "key", "value")]
    return dict(zip(names, mx.split(weight, 3)))


def stack_codebooks(codebooks: dict[int, mx.array]) -> mx.array:
    """Entries (V, D) of each codebook -> (K, V, D)."""
    if missing := {*range(len(codebooks))} - codebooks.keys():
        raise Misfit(f"rvq.vq.layers.{min(missing)}._codebook.embed", "is missing")
    shapes = [codebooks[i].shape for i in range(len(codebooks))]
    for i, shape in enumerate(shapes):
        want = max(shapes, key=shapes.count)  # of most of them
        if shape != want or len(shape) != 2:
            why = f"must have the shape (V, D) of all codebooks, {want}, got {shape}"
            raise Misfit(f"rvq.vq.layers.{i}._codebook.embed", why)
    return mx.stack([codebooks[i] for i in range(len(codebooks))])


def add(weights: dict[str, mx.array], name: str, weight: mx.array) -> None:
    """Put a tensor under a name. Raises Misfit when the name is taken."""
    if name in weights:
        raise Misfit(name, "is there twice, under two spellings")
    weights[name] = weight


LIMITS = {  # least and largest value of each size
    "width": (4, 2**14),
    "num_layers": (0, 200),
    "num_heads": (1, 2**10),
    "hidden": (1, 2**17),
    "num_quantizers": (1, 64),
    "bins": (1, 2**16),
    "eval_q": (1, 64),
    "ds_factor": (1, 2**10),
    "encodec_n_q": (0, 64),
}


def check_config(config: StyleConfig) -> None:
    """Raise ValueError for sizes that cannot be, or that no memory holds."""
    for name, (low, high) in LIMITS.items():
        size = getattr(config, name)
        if type(size) is not int or not low <= size <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {size!r:.80}.")
    if config.width % (2 * config.num_heads):
        raise ValueError(
            f"num_heads must split width, {config.width}, into even parts, got "
            f"{config.num_heads}."
        )
    if config.eval_q > config.num_quantizers:
        raise ValueError(
            f"eval_q must be at most num_quantizers, {config.num_quantizers}, got "
            f"{config.eval_q}."
        )
    if (config.mert is None) == (config.encodec_n_q == 0):
        raise ValueError("Style must have either mert or encodec_n_q.")
    check_lengths(config.length, config.varying_lengths)


def check_lengths(length: float, limits: tuple[float, float]) -> None:
    """Raise ValueError unless all are seconds, and the least comes first."""
    pair = isinstance(limits, tuple) and len(limits) == 2
    seconds = (length, *limits) if pair else ()
    real = all(type(x) in (int, float) and 0.1 <= x <= 30 for x in seconds)
    if not (pair and real and limits[0] <= limits[1]):
        raise ValueError(
            "length and varying_lengths, the least and the most, must be seconds "
            f"from 0.1 to 30, got {length!r:.80} and {limits!r:.80}."
        )
