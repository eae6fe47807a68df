"""HTDemucs: a song into drums, bass, other and vocals.

The hybrid transformer of Rouard et al. (https://arxiv.org/abs/2211.08553). One branch
works on the spectrogram, one on the waveform; between their encoders and decoders a
transformer lets each attend the other, and the stems are the sum of what both give.
Stands alone; audio.py is needed beside it to split a file from the command line.

    model = HTDemucs.from_pretrained("adefossez/HTDemucs")
    drums, bass, other, vocals = model.separate(audio)  # (N, 2) at model.sampling_rate

or `python demucs.py song.mp3 --output-dir stems/ --stems vocals,drums`.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open

REPO = "adefossez/HTDemucs"
FILES = ["*.safetensors", "*.yaml"]
KERNEL, STRIDE = 8, 4  # of the convolutions on both branches


@dataclass(frozen=True)
class HTDemucsConfig:
    """Sizes, by the names under which the published file gives them."""

    sources: tuple[str, ...] = ("drums", "bass", "other", "vocals")
    audio_channels: int = 2
    channels: int = 48
    growth: int = 2
    depth: int = 4
    nfft: int = 4096
    freq_emb: float = 0.2
    emb_scale: float = 10
    dconv_depth: int = 2
    dconv_comp: int = 8
    bottom_channels: int = 512
    t_layers: int = 5
    t_hidden_scale: float = 4.0
    t_heads: int = 8
    t_max_period: float = 10000.0
    samplerate: int = 44100
    segment: Fraction = Fraction(39, 5)  # seconds

    @classmethod
    def from_dict(cls, given: dict) -> "HTDemucsConfig":
        """From the published arguments. Raises ValueError for what is not ported."""
        known = {field.name for field in fields(cls)}
        for name, value in given.items():
            if name not in known and value not in FIXED.get(name, (value,)):
                raise ValueError(
                    f"{name} must be {FIXED[name][0]!r}, got {value!r}; other kinds "
                    "of Demucs are not ported."
                )
        values = {name: given[name] for name in known & given.keys()}
        values["sources"] = tuple(values.get("sources", cls.sources))
        config = cls(**values)
        check_config(config)
        return config

    @property
    def segment_length(self) -> int:
        """Samples of the pieces in which it was trained to hear."""
        return int(self.segment * self.samplerate)


class HTDemucs(nn.Module):
    """The published model of that name, and others of its kind."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * config.growth**i for i in range(config.depth)]
        C, S = config.audio_channels, len(config.sources)
        bottom = config.bottom_channels
        ins, outs = [None, *widths[:-1]], [None, *widths[:-1]]

        def encoders(first: int) -> list[Encoder]:
            return [Encoder(a or first, b, config) for a, b in zip(ins, widths)]

        def decoders(first: int, spectral: bool) -> list[Decoder]:
            return [
                Decoder(b, a or first, config, spectral, last=a is None)
                for a, b in zip(outs[::-1], widths[::-1])
            ]

        self.encoder, self.tencoder = encoders(2 * C), encoders(C)
        self.decoder, self.tdecoder = decoders(2 * C * S, True), decoders(C * S, False)
        self.freq_emb = nn.Embedding(config.nfft // 2 // STRIDE, widths[0])
        self.channel_upsampler = nn.Linear(widths[-1], bottom)
        self.channel_downsampler = nn.Linear(bottom, widths[-1])
        self.channel_upsampler_t = nn.Linear(widths[-1], bottom)
        self.channel_downsampler_t = nn.Linear(bottom, widths[-1])
        self.crosstransformer = CrossTransformer(config)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that it takes and gives."""
        return self.config.samplerate

    @property
    def channels(self) -> int:
        """Channels that it takes and gives: 2."""
        return self.config.audio_channels

    def __call__(self, audio: mx.array) -> mx.array:
        """Stems (B, S, N, C) of audio (B, N, C), N being `config.segment_length`."""
        config = self.config
        B, N, C = audio.shape
        spectrum = spectrogram(audio.swapaxes(1, 2).reshape(B * C, N), config.nfft)
        _, F, T = spectrum.shape
        parts = mx.stack([spectrum.real, spectrum.imag], axis=1)  # (B C, 2, F, T)
        x, mean, deviation = normalize(parts.reshape(B, 2 * C, F, T).moveaxis(1, -1))
        xt, mean_t, deviation_t = normalize(audio[:, :, None])
        x, xt = self.separated(x, xt)
        x = (x * deviation + mean).reshape(B, F, T, -1, 2).transpose(0, 3, 1, 2, 4)
        spectrum = (x[..., 0] + 1j * x[..., 1]).reshape(-1, F, T)
        x = waveform(spectrum, N).reshape(B, -1, C, N)
        xt = (xt * deviation_t + mean_t).reshape(B, N, -1, C)
        return x.swapaxes(2, 3) + xt.swapaxes(1, 2)

    def separated(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """Spectrogram (B, F, T, 2 C) and waveform (B, N, 1, C) of the mix, both
        normalized -> those of all stems, (B, F, T, 2 C S) and (B, N, 1, C S)."""
        saved, lengths = [], []
        for i, (encode, encode_t) in enumerate(zip(self.encoder, self.tencoder)):
            lengths.append((x.shape[1], xt.shape[1]))
            x, xt = encode(x), encode_t(xt)
            if i == 0:
                factor = self.config.freq_emb * self.config.emb_scale
                x = x + factor * self.freq_emb.weight[:, None]
            saved.append((x, xt))
        x, xt = self.attended(x, xt)
        for decode, decode_t in zip(self.decoder, self.tdecoder):
            (skip, skip_t), (length, length_t) = saved.pop(), lengths.pop()
            x, xt = decode(x, skip, length), decode_t(xt, skip_t, length_t)
        return x, xt

    def attended(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """Both branches through the transformer, shapes unchanged."""
        x, xt = self.channel_upsampler(x), self.channel_upsampler_t(xt[:, :, 0])
        x, xt = self.crosstransformer(x, xt)
        xt = self.channel_downsampler_t(xt)
        return self.channel_downsampler(x), xt[:, :, None]

    def separate(
        self, audio: mx.array, shifts: int = 0, overlap: float = 0.25
    ) -> mx.array:
        """Stems (S, N, C) of audio (N, C) at the model's rate, in the order of
        `config.sources`: drums, bass, other, vocals.

        Heard in pieces of 7.8 s that overlap by `overlap` of their length. With
        `shifts` the mean of as many passes over the audio moved by up to half a second,
        a little better and as much slower. Raises ValueError for another shape or NaN.
        """
        *_, (_, _, stems) = self.steps(audio, shifts, overlap)
        return stems

    def steps(
        self, audio: mx.array, shifts: int = 0, overlap: float = 0.25
    ) -> Iterator[tuple[int, int, mx.array]]:
        """Yields each piece's number, how many there are, and the stems so far."""
        audio, most = mx.array(audio), self.sampling_rate // 2
        check_audio(audio, self.channels, shifts, overlap)
        stride = max(1, int((1 - overlap) * self.config.segment_length))
        padded, random = mx.pad(audio, ((most, most), (0, 0))), np.random.default_rng(0)
        moves = random.integers(0, most + 1, shifts).tolist()
        passes = [padded[move : len(audio) + most] for move in moves] or [audio]
        number, count = 0, sum(len(range(0, len(x), stride)) for x in passes)
        total = 0
        for moved in passes:
            for stems in self._overlap_add(moved, stride):
                number += 1
                if number < count:
                    yield number, count, stems
            total = total + stems[:, len(moved) - len(audio) :]
            mx.eval(total)
        yield number, count, total / len(passes)

    def _overlap_add(self, audio: mx.array, stride: int) -> Iterator[mx.array]:
        """Stems (S, N, C) as a sum of pieces, each weighted most in its middle; yielded
        after each piece."""
        N, size = len(audio), self.config.segment_length
        ramp = mx.minimum(mx.arange(size) + 1, size - mx.arange(size)) / (size // 2)
        total = mx.zeros((len(self.config.sources), *audio.shape))
        weights = mx.zeros((N, 1))
        for start in range(0, N, stride):
            stop = min(start + size, N)
            weight = ramp[: stop - start, None]
            total[:, start:stop] += weight * self.piece(audio, start, stop)
            weights[start:stop] += weight
            mx.eval(total, weights)
            yield total / weights

    def piece(self, audio: mx.array, start: int, stop: int) -> mx.array:
        """Stems (S, stop - start, C), heard in the middle of a whole segment."""
        size = self.config.segment_length
        before = (size - (stop - start)) // 2
        first, last = start - before, start - before + size
        left, right = max(-first, 0), max(last - len(audio), 0)
        heard = mx.pad(audio[max(first, 0) : last], ((left, right), (0, 0)))
        stems = self(heard[None])[0]
        return stems[:, before : before + stop - start]

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path = REPO) -> "HTDemucs":
        """Load a folder or a Hub repository with one .safetensors file, which holds
        the sizes too, as demucs 4.1 writes it. Float32. Raises FileNotFoundError, or
        ValueError for a file that is damaged or holds another kind of model.
        """
        path = find_file(path_or_repo)
        try:
            with safe_open(path, "numpy") as file:  # which checks the header, too
                config = read_config(file.metadata() or {})
            weights = cls.sanitize(mx.load(str(path)))
            model = cls(config)
            model.load_weights(list(weights.items()))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path} does not load: {error}") from error
        model.eval()
        mx.eval(model.parameters())
        return model

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The published names and layouts -> ours, in float32."""
        kept = {}
        for name, weight in weights.items():
            for pattern, ours in RENAMES:
                name = re.sub(pattern, ours, name)
            kept[name] = arrange(name, weight.astype(mx.float32))
        return kept


class Residuals(nn.Module):
    """Dilated convolutions over time in few channels, each added to its input."""

    def __init__(self, channels: int, config: HTDemucsConfig):
        super().__init__()
        hidden = int(channels / config.dconv_comp)
        self.layers = [
            [
                nn.Conv1d(channels, hidden, 3, padding=2**i, dilation=2**i),
                Norm(hidden),
                nn.GELU(),
                nn.Conv1d(hidden, 2 * channels, 1),
                Norm(2 * channels),
                nn.GLU(),
                Scale(channels),
            ]
            for i in range(config.dconv_depth)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, W, C) -> same shape. Time is W, or L where W is 1 (the waveform)."""
        B, L, W, C = x.shape
        y = x.reshape(B * L, W, C) if W > 1 else x.reshape(B, L, C)
        for layers in self.layers:
            z = y
            for layer in layers:
                z = layer(z)
            y = y + z
        return y.reshape(x.shape)


class Encoder(nn.Module):
    """Convolves with stride 4 along the first axis of (B, L, W, C): frequency in the
    spectrogram, whose W is time, and time in the waveform, whose W is 1."""

    def __init__(self, channels_in: int, channels: int, config: HTDemucsConfig):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, (KERNEL, 1), (STRIDE, 1), (2, 0))
        self.dconv = Residuals(channels, config)
        self.rewrite = nn.Linear(channels, 2 * channels)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, W, C) -> (B, ceil(L / 4), W, C')."""
        x = mx.pad(x, ((0, 0), (0, -x.shape[1] % STRIDE), (0, 0), (0, 0)))
        return nn.glu(self.rewrite(self.dconv(nn.gelu(self.conv(x)))))


class Upsample(nn.Module):
    """A transposed convolution along the first axis, with a kernel of two strides: a
    product, of which each result's halves go to two neighbouring places."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.weight = mx.zeros((2 * STRIDE * channels, channels_in))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, W, C) -> (B, 4 L + 4, W, C')."""
        B, L, W, _ = x.shape
        head, tail = mx.split(x @ self.weight.T, 2, axis=-1)
        ends = (0, 0), (0, 0)
        y = mx.pad(head, ((0, 0), (0, 1), *ends))
        y = y + mx.pad(tail, ((0, 0), (1, 0), *ends))
        y = y.reshape(B, L + 1, W, STRIDE, -1).swapaxes(2, 3)
        return y.reshape(B, STRIDE * (L + 1), W, -1) + self.bias


class Decoder(nn.Module):
    """Undoes an `Encoder`, with what that gave as `skip`."""

    def __init__(
        self,
        channels: int,
        channels_out: int,
        config: HTDemucsConfig,
        spectral: bool,
        last: bool,
    ):
        super().__init__()
        kernel, padding = ((3, 3), (1, 1)) if spectral else ((3, 1), (1, 0))
        self.rewrite = nn.Conv2d(channels, 2 * channels, kernel, padding=padding)
        self.dconv = Residuals(channels, config)
        self.conv_tr = Upsample(channels, channels_out)
        self._last = last

    def __call__(self, x: mx.array, skip: mx.array, length: int) -> mx.array:
        """(B, L, W, C) -> (B, length, W, C'), the length that was encoded."""
        x = self.conv_tr(self.dconv(nn.glu(self.rewrite(x + skip))))
        x = x[:, KERNEL // 4 : KERNEL // 4 + length]
        return x if self._last else nn.gelu(x)


class Attention(nn.Module):
    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        D = config.bottom_channels
        self._heads = config.t_heads
        self.in_proj = nn.Linear(D, 3 * D)  # queries, keys, values
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        """What x (B, T, D) finds in memory (B, S, D): (B, T, D)."""
        B, T, D = x.shape
        weights, biases = self.in_proj.weight, self.in_proj.bias
        q = mx.addmm(biases[:D], x, weights[:D].T)
        k, v = mx.split(mx.addmm(biases[D:], memory, weights[D:].T), 2, axis=-1)
        q, k, v = (y.reshape(B, -1, self._heads, D // self._heads) for y in (q, k, v))
        q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
        scale = (D // self._heads) ** -0.5
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.out_proj(x.swapaxes(1, 2).reshape(B, T, D))


class TransformerLayer(nn.Module):
    """Attends itself, or the other branch (`cross`)."""

    def __init__(self, config: HTDemucsConfig, cross: bool):
        super().__init__()
        D = config.bottom_channels
        hidden = int(D * config.t_hidden_scale)
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(D)
        self.norm_memory = nn.LayerNorm(D) if cross else None
        self.norm2 = nn.LayerNorm(D)
        self.linear1 = nn.Linear(D, hidden)
        self.linear2 = nn.Linear(hidden, D)
        self.gamma_1 = Scale(D)
        self.gamma_2 = Scale(D)
        self.norm_out = Norm(D)

    def __call__(self, x: mx.array, other: mx.array) -> mx.array:
        """(B, T, D), beside the other branch's (B, S, D), -> (B, T, D)."""
        y = self.norm1(x)
        memory = y if self.norm_memory is None else self.norm_memory(other)
        x = x + self.gamma_1(self.attn(y, memory))
        hidden = nn.gelu(self.linear1(self.norm2(x)))
        return self.norm_out(x + self.gamma_2(self.linear2(hidden)))


class CrossTransformer(nn.Module):
    """Layers for both branches; every second one attends the other branch."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        D, kinds = config.bottom_channels, range(config.t_layers)
        self._max_period = config.t_max_period
        self.norm_in = nn.LayerNorm(D)
        self.norm_in_t = nn.LayerNorm(D)
        self.layers = [TransformerLayer(config, i % 2 == 1) for i in kinds]
        self.layers_t = [TransformerLayer(config, i % 2 == 1) for i in kinds]

    def __call__(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """Spectrogram (B, F, T, D) and waveform (B, S, D), each of the same shape."""
        B, F, T, D = x.shape
        places = plane_positions(F, T, D, self._max_period)
        x = (self.norm_in(x) + places).swapaxes(1, 2).reshape(B, T * F, D)
        xt = self.norm_in_t(xt) + positions(xt.shape[1], D, self._max_period)
        for layer, layer_t in zip(self.layers, self.layers_t):
            x, xt = layer(x, xt), layer_t(xt, x)
        return x.reshape(B, T, F, D).swapaxes(1, 2), xt


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * x


def total(x: mx.array) -> mx.array:
    """The sum of each row of (B, ...), in two stages: added up one after another, as
    on MLX's CPU, millions of numbers would lose three digits."""
    x = x.reshape(len(x), -1)
    whole = x.shape[1] // 1024 * 1024
    parts = x[:, :whole].reshape(len(x), -1, 1024).sum(axis=-1)
    return parts.sum(axis=-1) + x[:, whole:].sum(axis=-1)


def center(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """x (B, ...) less each row's mean; the mean; the sum of the squares."""
    shape = (len(x), *[1] * (x.ndim - 1))
    mean = (total(x) / (x.size // len(x))).reshape(shape)
    x = x - mean
    return x, mean, total(x * x).reshape(shape)


class Norm(nn.Module):
    """Over all time and channels of each row of (B, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        x, _, squares = center(x)
        scale = mx.rsqrt(squares / (x.size // len(x)) + 1e-5)
        return x * scale * self.weight + self.bias


def positions(length: int, width: int, period: float) -> mx.array:
    """Sinusoids (length, width), cosines before sines."""
    half = width // 2
    rates = period ** (mx.arange(half) / (half - 1))
    phase = mx.arange(length)[:, None] / rates
    return mx.concatenate([mx.cos(phase), mx.sin(phase)], axis=-1)


def plane_positions(height: int, width: int, channels: int, period: float) -> mx.array:
    """Sinusoids (height, width, channels): half of the channels tell the place along
    the width, half along the height, sines and cosines in turn."""
    half = channels // 2
    rates = mx.exp(mx.arange(0, half, 2) * (-math.log(period) / half))

    def turns(length: int) -> mx.array:
        phase = mx.arange(length)[:, None] * rates
        return mx.stack([mx.sin(phase), mx.cos(phase)], axis=-1).reshape(length, half)

    shape = (height, width, half)
    along = mx.broadcast_to(turns(width)[None], shape)
    return mx.concatenate([along, mx.broadcast_to(turns(height)[:, None], shape)], -1)


def hann(size: int) -> mx.array:
    """The window of `size` samples, periodic."""
    return 0.5 - 0.5 * mx.cos(mx.arange(size) * (2 * math.pi / size))


def spectrogram(audio: mx.array, size: int) -> mx.array:
    """Frames of `size` samples, a quarter apart, of (R, N): complex (R, size / 2, T).

    As many as quarters begin in N. Without the highest frequency.
    """
    hop = size // 4
    R, N = audio.shape
    T, edge = math.ceil(N / hop), hop // 2 * 3
    audio = reflect(audio, edge, edge + T * hop - N)
    blocks = audio.reshape(R, -1, hop)
    frames = mx.concatenate([blocks[:, i : i + T] for i in range(4)], axis=-1)
    spectrum = mx.fft.rfft(frames * hann(size)) / math.sqrt(size)
    return spectrum[..., :-1].swapaxes(1, 2)


def waveform(spectrum: mx.array, length: int) -> mx.array:
    """The (R, length) samples of which `spectrogram` made complex (R, size / 2, T)."""
    R, bins, T = spectrum.shape
    size, hop = 2 * bins, bins // 2
    spectrum = mx.pad(spectrum, ((0, 0), (0, 1), (0, 0))).swapaxes(1, 2)
    frames = mx.fft.irfft(spectrum, size) * (hann(size) * math.sqrt(size))
    quarters = frames.reshape(R, T, 4, hop)
    pads = [((0, 0), (i, 3 - i), (0, 0)) for i in range(4)]
    audio = sum(mx.pad(quarters[:, :, i], pads[i]) for i in range(4)).reshape(R, -1)
    edge = hop // 2 * 3
    return audio[:, edge : edge + length] / 1.5  # what four squared windows add up to


def reflect(x: mx.array, before: int, after: int) -> mx.array:
    """(R, N), mirrored at both ends without repeating the last sample."""
    start, end = x[:, 1 : before + 1][:, ::-1], x[:, -after - 1 : -1][:, ::-1]
    return mx.concatenate([start, x, end], axis=1)


def normalize(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """x (B, ...) with mean 0 and deviation 1 in each row; the mean; the deviation."""
    centered, mean, squares = center(x)
    deviation = mx.sqrt(squares / (x.size // len(x) - 1))
    return centered / (1e-5 + deviation), mean, deviation


RENAMES = (
    (r"\.(self|cross)_attn\.", ".attn."),
    (r"in_proj_", "in_proj."),
    (r"freq_emb\.embedding\.", "freq_emb."),
    (r"(layers(?:_t)?\.\d*[13579])\.norm2", r"\1.norm_memory"),  # those that cross
    (r"(layers(?:_t)?\.\d*[13579])\.norm3", r"\1.norm2"),
)


def arrange(name: str, weight: mx.array) -> mx.array:
    """A published weight in the layout that our layers have."""
    if weight.ndim < 3:
        return weight
    if ".dconv." in name:  # (C', C, k)
        return weight.swapaxes(1, 2)
    if weight.ndim == 3:  # of the waveform: as if it had a second axis
        weight = weight[..., None]
    if ".conv_tr." in name:  # (C, C', 8, 1) -> (8 C', C)
        return weight[..., 0].transpose(2, 1, 0).flatten(0, 1)
    if weight.shape[2:] == (1, 1):
        return weight[..., 0, 0]
    return weight.transpose(0, 2, 3, 1)


def check_audio(audio: mx.array, channels: int, shifts: int, overlap: float) -> None:
    """Raise ValueError for what cannot be separated."""
    if audio.ndim != 2 or audio.shape[1] != channels or len(audio) == 0:
        raise ValueError(
            f"audio must have the shape (N, {channels}), got {audio.shape}."
        )
    if not mx.isfinite(audio).all().item():
        raise ValueError("audio must be finite, but it holds NaN or infinity.")
    if not 0 <= overlap <= 0.99 or type(shifts) is not int or shifts < 0:
        given = f"got {overlap} and {shifts}"
        raise ValueError(f"overlap must be from 0 to 0.99, shifts 0 or more, {given}.")


def find_file(path_or_repo: str | Path) -> Path:
    """The one .safetensors file of a folder, or of a Hub repository."""
    folder = Path(path_or_repo)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_repo)):
            raise FileNotFoundError(
                f"'{path_or_repo}' must be a folder or a Hub repository such as {REPO}."
            )
        folder = Path(snapshot_download(str(path_or_repo), allow_patterns=FILES))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} must hold one .safetensors file, but holds {len(found)}."
        )
    return found[0]


def read_config(metadata: dict[str, str]) -> HTDemucsConfig:
    """The sizes in a file's header. Raises ValueError for another kind of model."""
    kind = metadata.get("klass", "none")
    if kind.rpartition(".")[2] != "HTDemucs":
        raise ValueError(f"it must hold an HTDemucs, but holds {kind}")
    positional = json.loads(metadata.get("args", "[]"))
    named = json.loads(metadata.get("kwargs", "{}"))
    if not isinstance(positional, list) or not isinstance(named, dict):
        raise ValueError(f"its arguments must be a list and an object, got {metadata}")
    if positional:
        named = {"sources": positional[0]} | named
    return HTDemucsConfig.from_dict({k: fraction(v) for k, v in named.items()})


def fraction(value):
    """A fraction as the header has it, a dict -> Fraction; all else as it is."""
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return Fraction(value["numerator"], value["denominator"])
    return value


# Checking a config, which may come from a stranger.

LIMITS = {  # least and largest value of each size
    **dict.fromkeys(("channels", "dconv_comp"), (1, 1024)),
    **dict.fromkeys(("audio_channels", "growth", "depth"), (1, 8)),
    "dconv_depth": (0, 8),
    "nfft": (16, 2**16),
    "bottom_channels": (4, 2**14),
    "t_layers": (0, 64),
    "t_heads": (1, 256),
    "samplerate": (1, 2**20),
    "segment": (Fraction(1, 10), 600),
}
ON = ("cac", "rewrite", "t_norm_in", "t_norm_first", "t_norm_out", "t_layer_scale")
OFF = ("t_norm_in_group", "t_group_norm", "t_sparse_self_attn", "t_sparse_cross_attn")
FIXED = {  # arguments of the original of which only these values are ported
    **dict.fromkeys((*ON, "t_gelu", "use_train_segment"), (True,)),
    **dict.fromkeys((*OFF, "t_cross_first"), (False,)),
    **dict.fromkeys(("context_enc", "t_sin_random_shift"), (0,)),
    "multi_freqs": (None, []),
    "channels_time": (None,),
    "kernel_size": (KERNEL,),
    "stride": (STRIDE,),
    "context": (1,),
    "norm_starts": (4,),
    "dconv_mode": (3,),
    "t_emb": ("sin",),
    "t_weight_pos_embed": (1.0,),
}


def check_config(config: HTDemucsConfig) -> None:
    """Raise ValueError for sizes that cannot be, or are hostile."""
    for name, (least, most) in LIMITS.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise ValueError(f"{name} must be from {least} to {most}, got {value}.")
    last = 2 * STRIDE ** (config.depth - 1)
    if config.nfft % (last * STRIDE) or config.nfft // last <= KERNEL:
        raise ValueError(
            f"nfft must be a multiple of {last * STRIDE} and more than "
            f"{last * KERNEL} for {config.depth} layers, got {config.nfft}."
        )
    width, heads = config.bottom_channels, config.t_heads
    if width < 1 or width % heads or width % 4:
        raise ValueError(
            f"bottom_channels must be a multiple of 4 and of {heads} heads, got {width}."
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Split a song into stems.")
    add = parser.add_argument
    add("source", help="sound file to read")
    add("--output-dir", type=Path, default=Path("stems"), help="(default: stems)")
    add("--stems", help="which to write, such as vocals,drums (default: all)")
    add("--model", default=REPO, help="folder or Hub repository (default: %(default)s)")
    add("--shifts", type=int, default=0, help="passes to take the mean of (default: 0)")
    add("--overlap", type=float, default=0.25, help="of the pieces (default: 0.25)")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Separate one file and write its stems."""
    from audio import check_audio_path, load_audio, save_audio

    if not Path(args.source).is_file():
        raise FileNotFoundError(f"There is no sound file {args.source}.")
    model = HTDemucs.from_pretrained(args.model)
    known, names = model.config.sources, ", ".join(model.config.sources)
    wanted = [s.strip() for s in args.stems.split(",")] if args.stems else known
    if unknown := set(wanted) - set(known):
        raise ValueError(f"--stems must be of {names}; got {min(unknown)!r}.")
    audio = load_audio(args.source, model.sampling_rate, model.channels)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    paths = {stem: args.output_dir / f"{stem}.wav" for stem in wanted}
    for path in paths.values():
        check_audio_path(path)
        if path.resolve() == Path(args.source).resolve():
            raise ValueError(f"{path} must not be the song; choose an --output-dir.")
    with tqdm(unit="piece") as bar:
        for _, bar.total, stems in model.steps(audio, args.shifts, args.overlap):
            bar.update()
    loudest = mx.abs(stems).max().item()
    if loudest > 1:  # all alike, so that they add up to the song
        print(f"All stems were scaled down by {loudest:.2f}.", file=sys.stderr)
        stems = stems / loudest
    for stem, path in paths.items():
        save_audio(path, stems[known.index(stem)], model.sampling_rate)
        print(path)


def main() -> None:
    try:
        run(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"demucs.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
