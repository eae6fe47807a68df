"""Style: a few seconds of music -> what a style model follows.

The style conditioner of MusicGen-Style (https://arxiv.org/abs/2407.12563): features of
an excerpt go through a transformer and then through a narrow place, of which only a
few residual codebooks are used, so that the manner of the music stays and its notes do
not. Needs mert.py beside it, which makes the features, encodec.py and, to read `.bin`
files, convert.py. Of a style model that is loaded:

    start, excerpt = model.conditioner.excerpt(sound, seed=7)  # sound: (N, C)
    followed = model.conditioner(excerpt)  # (T, 512), five times a second
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from encodec import Encodec, add, nearest, resample
from mert import MERT, REPO, EncoderLayer, MERTConfig

if TYPE_CHECKING:
    from musicgen import Options

SCALES = {"xsmall": 8, "default": 8, "large": 16}  # heads of each transformer_scale
CODECS = ("//pretrained/facebook/encodec_32khz", "facebook/encodec_32khz")
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


@dataclass(frozen=True)
class StyleConfig:
    """Sizes and settings; defaults: the published model. Seconds are of excerpts."""

    kind: str = "style"
    width: int = 512
    num_layers: int = 8
    num_heads: int = 8
    hidden: int = 2048
    num_quantizers: int = 6
    bins: int = 1024
    eval_q: int = 3  # quantizers that are used; fewer leave more freedom
    ds_factor: int = 15  # frames of features for one that is followed
    length: float = 3.0
    varying_lengths: tuple[float, float] = (1.5, 4.5)  # least and most
    mert: MERTConfig | None = MERTConfig()
    encodec_n_q: int = 0  # codebooks whose embeddings are the features, without MERT

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            size = getattr(self, name)
            if type(size) is not int or not low <= size <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {size!r}.")
        if self.width % (2 * self.num_heads) or self.eval_q > self.num_quantizers:
            raise ValueError(
                "num_heads must split width into even parts and eval_q be at most "
                f"num_quantizers, got {self}."
            )
        if (self.mert is None) == (self.encodec_n_q == 0):
            raise ValueError("Style must have either mert or encodec_n_q.")
        lengths = self.varying_lengths
        pair = isinstance(lengths, tuple) and len(lengths) == 2
        seconds = (self.length, *lengths) if pair else ()
        real = all(type(x) in (int, float) and 0.1 <= x <= 30 for x in seconds)
        if not (pair and real and lengths[0] <= lengths[1]):
            raise ValueError(
                "length and varying_lengths, the least and the most, must be seconds "
                f"from 0.1 to 30, got {self.length!r} and {lengths!r}."
            )

    @classmethod
    def from_dict(cls, config: dict) -> "StyleConfig":
        """Take the known keys of what `convert.py` wrote."""
        names = {field.name for field in fields(cls)}
        given = {name: config[name] for name in names & config.keys()}
        if isinstance(lengths := given.get("varying_lengths"), list):
            given["varying_lengths"] = tuple(lengths)
        mert = given.get("mert", {})
        if mert is not None and not isinstance(mert, dict):
            raise ValueError(f"mert must be an object, got {mert!r:.80}.")
        given["mert"] = None if mert is None else MERTConfig.from_dict(mert)
        return cls(**given)

    def build(self, codec: Encodec, window: float) -> "StyleConditioner":
        """The conditioner of a model with this codec."""
        return StyleConditioner(self, codec)


class StyleConditioner(nn.Module):
    """What comes of an excerpt before the codes: nothing, in rows that have none."""

    kind = "style"

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
        """Audio (N, 1) at the codec's rate -> what is followed, (T, width).

        Raises ValueError unless `quantizers` are None, the model's own, or in range.
        """
        used, most = self.config.eval_q, self.config.num_quantizers
        used = used if quantizers is None else quantizers
        if not 1 <= used <= most:
            raise ValueError(f"style_quantizers must be from 1 to {most}, got {used}.")
        x = self.features(audio)
        x = x + self._positions(mx.arange(x.shape[1]))
        for layer in self.layers:
            x = layer(x)
        x = (x - self.mean) * mx.rsqrt(self.variance + 1e-5)
        x = quantize(x, self.codebooks[:used])
        return x[0, :: self.config.ds_factor]

    def features(self, audio: mx.array) -> mx.array:
        """Features (1, T, width) of audio (N, 1) at the codec's rate."""
        if self.config.mert is None:
            codes = self._codec.encode(audio[None])[0].codes
            return sum(embed(codes[..., k]) for k, embed in enumerate(self.embed))
        rates = self._codec.sampling_rate, self.mert.sampling_rate
        return self.embed(self.mert(mx.array(resample(np.array(audio), *rates)).T))

    @property
    def longest(self) -> int:
        """Most frames that there can be of a sound."""
        rate = self._codec.config.frame_rate
        if self.config.mert:
            rate = self.mert.sampling_rate / math.prod(self.config.mert.conv_stride)
        most = max(self.config.varying_lengths[1], self.config.length)
        return math.ceil(rate * most / self.config.ds_factor) + 1

    def frames(self, taken: mx.array | None) -> int:
        """Frames that come before the codes."""
        return 1 if taken is None else len(taken)

    def take_all(
        self,
        sounds: list[mx.array | None],
        seeds: list[int],
        options: "Options",
        separate: bool,
    ) -> list[mx.array | None]:
        """What is followed of an excerpt of each sound (N, C): (T, width). Raises as
        `excerpt`, and for other quantizers than there are."""
        where = (options.style_start, options.style_length)
        taken, found = [], {}
        for sound, seed in zip(sounds, seeds):
            key = (id(sound), 0.0)
            if sound is not None:
                start, excerpt = self.excerpt(sound, seed, *where)
                key = (id(sound), start)
            if key not in found:
                quantizers = options.style_quantizers
                found[key] = None if sound is None else self(excerpt, quantizers)
            taken.append(found[key])
        return taken

    def excerpt(
        self,
        sound: mx.array,
        seed: int,
        start: float | None = None,
        length: float | None = None,
    ) -> tuple[float, mx.array]:
        """The second at which the excerpt of a sound (N, C) starts, and its samples
        (N', 1). `start` None draws it from the seed; `length` None is the model's.

        Raises ValueError for another shape, a length out of range, an excerpt that
        does not lie in the sound, and NaN or silence in it.
        """
        if isinstance(sound, str | Path):
            raise ValueError(f"style must be samples (N, C), got {sound!r}.")
        sound, rate = mx.array(sound), self._codec.sampling_rate
        if sound.ndim != 2 or not 1 <= sound.shape[1] <= 8:
            raise ValueError(f"style must have the shape (N, C), got {sound.shape}.")
        size = int(self._length(length) * rate)
        first = find_start(len(sound), size, rate, seed, start)
        excerpt = sound[first : first + size].astype(mx.float32)
        excerpt = excerpt.mean(axis=1, keepdims=True)
        loudest = mx.abs(excerpt).max().item()
        if not math.isfinite(loudest):
            raise ValueError("style must be finite, but it holds NaN or infinity.")
        if loudest < 1e-4:
            raise ValueError(
                f"The excerpt of style, from {first / rate:g} s on, must not be silent; "
                "choose a style_start."
            )
        return first / rate if start is None else start, excerpt

    def _length(self, length: float | None) -> float:
        least, most = self.config.varying_lengths
        if length is None:
            return self.config.length
        if not least <= length <= most:
            raise ValueError(
                f"style_length must be from {least:g} to {most:g} s, got {length:g}."
            )
        return length

    def states(
        self, taken: list[mx.array | None], place: int | None
    ) -> tuple[mx.array, mx.array]:
        """What rows hold: values (B, T, width), and a mask (B, T) of those that count.
        The same in every window."""
        nothing = mx.zeros((1, self.config.width))
        values = mx.stack([nothing if x is None else x for x in taken])
        there = mx.array([x is not None for x in taken])[:, None]
        return values, mx.broadcast_to(there, values.shape[:2])

    def null_states(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """What rows without a sound hold, beside others of this shape (B, T, width)."""
        return mx.zeros(shape), mx.zeros(shape[:2], mx.bool_)

    @classmethod
    def from_audiocraft(
        cls,
        weights: dict[str, mx.array],
        cfg: dict[str, Any],
        folder: Path,
        codec: Encodec,
    ) -> "StyleConditioner":
        """From audiocraft's weights and settings; the published model's hold where
        these are silent. MERT is looked for in the folder, in `MERT-v1-95M/`, and then
        on the Hub. Raises KeyError, or ValueError for settings that are not ported."""
        own = settings_of_style(cfg)
        weights = cls.sanitize(weights)
        found, mert = sizes(weights, own), None
        if found["encodec_n_q"] == 0:
            mert = load_mert(folder)
            parameters = tree_flatten(mert.parameters())
            weights |= {f"mert.{name}": weight for name, weight in parameters}
        model = cls(StyleConfig(**found, mert=mert and mert.config), codec)
        model.load_weights(list(weights.items()))
        return model

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """audiocraft's names, or ours -> ours, in float32. Raises ValueError for what
        is no float, comes twice, or lacks a part."""
        kept, codebooks = {}, {}
        for name, weight in weights.items():
            if re.fullmatch(UNUSED, name):
                continue
            if not mx.issubdtype(weight.dtype, mx.floating):
                raise ValueError(f"{name} must hold floats, but holds {weight.dtype}")
            weight = weight.astype(mx.float32)
            if match := re.fullmatch(CODEBOOK, name):
                codebooks[int(match[1])] = weight
                continue
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            for part, own in split(name, weight).items():
                add(kept, part, own)
        if codebooks:
            add(kept, "codebooks", stack_codebooks(codebooks))
        return kept


CODEBOOK = r"rvq\.vq\.layers\.(\d+)\._codebook\.embed"
UNUSED = r".*(_codebook\.(inited|cluster_size|embed_avg)|num_batches_tracked)"
RENAMES = (  # audiocraft's names -> ours
    (r"^transformer\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"^batch_norm\.running_mean$", "mean"),
    (r"^batch_norm\.running_var$", "variance"),
)


def split(name: str, weight: mx.array) -> dict[str, mx.array]:
    """audiocraft's one matrix of queries, keys and values -> three."""
    if not name.endswith(".in_proj_weight"):
        return {name: weight}
    if weight.ndim != 2 or len(weight) % 3:
        raise ValueError(f"{name} must hold 3 matrices, got {weight.shape}")
    stem = name.removesuffix("in_proj_weight")
    names = [f"{stem}{part}_proj.weight" for part in ("query", "key", "value")]
    return dict(zip(names, mx.split(weight, 3)))


def stack_codebooks(codebooks: dict[int, mx.array]) -> mx.array:
    """Entries (V, D) of each codebook -> (K, V, D)."""
    if missing := {*range(len(codebooks))} - codebooks.keys():
        raise ValueError(f"codebook {min(missing)} of style is missing")
    shapes = {book.shape for book in codebooks.values()}
    if len(shapes) > 1 or len(codebooks[0].shape) != 2:
        raise ValueError(f"the codebooks of style must have one shape, got {shapes}")
    return mx.stack([codebooks[i] for i in range(len(codebooks))])


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
    if round(start * rate) > last:
        raise ValueError(
            f"style_start must be at most {last / rate:g} s for an excerpt of "
            f"{size / rate:g} s, got {start:g}."
        )
    return round(start * rate)


def settings_of_style(cfg: dict[str, Any]) -> dict[str, Any]:
    """Those of audiocraft's settings that are about style, by their names there.
    Raises ValueError for values that are not ported."""
    prefix = "conditioners.self_wav.style."
    own = {k.removeprefix(prefix): v for k, v in cfg.items() if k.startswith(prefix)}
    for name, known in (
        ("use_middle_of_segment", ("false",)),
        ("batch_norm", ("true",)),
        ("transformer_scale", tuple(SCALES)),
        ("encodec_checkpoint", CODECS),
    ):
        if own.get(name, known[0]) not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, got {own[name]}")
    return own


def check_settings(found: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ValueError where the settings tell of other weights than were found."""
    extractor = "encodec" if found["encodec_n_q"] else "mert"
    for name, value in (
        ("model_name", extractor),
        ("n_q_out", str(found["num_quantizers"])),
    ):
        if own.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value}, as in the weights, got {own[name]}"
            )


def load_mert(folder: Path) -> MERT:
    """From the folder, from `MERT-v1-95M/` in it, else from the Hub."""
    local = folder / REPO.split("/")[1]
    try:
        return MERT.from_pretrained(local if local.is_dir() else REPO)
    except OSError as error:
        raise OSError(f"{folder} needs MERT in {local.name}/ or from the Hub: {error}")


def sizes(weights: dict[str, mx.array], own: dict[str, Any]) -> dict[str, Any]:
    """Values of StyleConfig, from our weights and audiocraft's settings of style."""
    for name in ("codebooks", "layers.0.linear1.weight"):
        if name not in weights:
            raise ValueError(f"style must have {name}, but the weights lack it")
    quantizers, bins, width = weights["codebooks"].shape
    hidden = weights["layers.0.linear1.weight"].shape[0]
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    heads = SCALES[own.get("transformer_scale", "default")]
    embeds = [n for n in weights if re.fullmatch(r"embed\.\d+\.weight", n)]
    found = dict(width=width, num_layers=len(layers), num_heads=heads, hidden=hidden)
    found |= dict(num_quantizers=quantizers, bins=bins, encodec_n_q=len(embeds))
    check_settings(found, own)
    for name in ("eval_q", "ds_factor", "length", "varying_lengths"):
        if own.get(name, "null") != "null":  # of the training alone, where it is null
            found[name] = number(name, own[name])
    return found


def number(name: str, told: str | list[str]) -> int | float | tuple[float, ...]:
    """A setting that audiocraft's `xp.cfg` gives as text."""
    try:
        if isinstance(told, list):
            return tuple(map(float, told))
        return float(told) if name == "length" else int(told)
    except ValueError:
        raise ValueError(f"{name} of style must be a number, got {told}") from None
