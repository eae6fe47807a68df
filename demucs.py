"""HTDemucs: a song into drums, bass, other and vocals.

The hybrid transformer of Rouard et al. (https://arxiv.org/abs/2211.08553). One branch
works on the spectrogram, the other on the waveform. Between their encoders and decoders
a transformer lets each attend to the other. The stems are the sum of both outputs.
Stands alone; strict.py is needed to tell what a file lacks, hub.py to see at once that
there is no network, and audio.py, resample.py and outputs.py to split a sound file.

    model = HTDemucs.from_pretrained("adefossez/HTDemucs")
    audio = load_audio("song.mp3", model.sampling_rate, model.channels)  # of audio.py
    drums, bass, other, vocals = model.separate(audio)

or `python demucs.py song.mp3 --output-dir stems/ --stems vocals,drums`.
"""

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

if sys.platform == "darwin":  # where an M5 rounds the factors of float32 products
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at the first of them

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging, tqdm
from safetensors import SafetensorError, safe_open

REPO = "adefossez/HTDemucs"
KERNEL, STRIDE = 8, 4  # of the convolutions on both branches


@dataclass(frozen=True)
class HTDemucsConfig:
    """Sizes, named as in the published file; defaults: the published model's."""

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
    def from_dict(cls, config: dict) -> "HTDemucsConfig":
        """Take the keys that name a size; others are ignored."""
        values = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        return cls(**values | {"sources": tuple(config.get("sources", cls.sources))})

    @property
    def segment_length(self) -> int:
        """Samples of the pieces that the model was trained on."""
        return int(self.segment * self.samplerate)


class Scale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * x


def row_sums(x: mx.array) -> mx.array:
    """The sum of each row of (B, ...), in two stages: in one stage, millions of numbers
    would lose three digits on MLX's CPU, which adds them one after another."""
    x = x.reshape(len(x), -1)
    whole = x.shape[1] // 1024 * 1024
    parts = x[:, :whole].reshape(len(x), -1, 1024).sum(axis=-1)
    return parts.sum(axis=-1) + x[:, whole:].sum(axis=-1)


def center(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """x (B, ...) minus each row's mean; the means; the sums of the squares."""
    shape = (len(x), *[1] * (x.ndim - 1))
    mean = (row_sums(x) / (x.size // len(x))).reshape(shape)
    x = x - mean
    return x, mean, row_sums(x * x).reshape(shape)


class Norm(nn.Module):
    """Normalization over time and channels together, for each row of (B, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = mx.ones((channels,)), mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        x, _, squares = center(x)
        x = x * mx.rsqrt(squares / (x.size // len(x)) + 1e-5)
        return x * self.weight + self.bias


class Residuals(nn.Module):
    """Residual branches of dilated convolutions over time, with fewer channels."""

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
        """(B, L, W, C) -> same shape. Time is W, or in the waveform L, where W is 1."""
        B, L, W, C = x.shape
        y = x.reshape(B * L, W, C) if W > 1 else x.reshape(B, L, C)
        for layers in self.layers:
            z = y
            for layer in layers:
                z = layer(z)
            y = y + z
        return y.reshape(x.shape)


class Encoder(nn.Module):
    """A convolution with stride 4 along the axis L of (B, L, W, C). L is frequency in
    the spectrogram, where W is time; it is time in the waveform, where W is 1."""

    def __init__(self, ins: int, outs: int, config: HTDemucsConfig):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, (KERNEL, 1), (STRIDE, 1), (2, 0))
        self.dconv = Residuals(outs, config)
        self.rewrite = nn.Linear(outs, 2 * outs)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, W, C) -> (B, ceil(L / 4), W, C')."""
        x = mx.pad(x, ((0, 0), (0, -x.shape[1] % STRIDE), (0, 0), (0, 0)))
        return nn.glu(self.rewrite(self.dconv(nn.gelu(self.conv(x)))))


class Upsample(nn.Module):
    """A transposed convolution along the axis L. Its kernel is two strides long, so it
    is one matrix product, whose results overlap their neighbours by half."""

    def __init__(self, ins: int, outs: int):
        super().__init__()
        self.weight, self.bias = mx.zeros((2 * STRIDE * outs, ins)), mx.zeros((outs,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, L, W, C) -> (B, 4 L + 4, W, C')."""
        (B, L, W, _), none = x.shape, (0, 0)
        head, tail = mx.split(x @ self.weight.T, 2, axis=-1)
        y = mx.pad(head, (none, (0, 1), none, none))
        y = y + mx.pad(tail, (none, (1, 0), none, none))
        y = y.reshape(B, L + 1, W, STRIDE, -1).swapaxes(2, 3)
        return y.reshape(B, STRIDE * (L + 1), W, -1) + self.bias


class Decoder(nn.Module):
    """The inverse of an `Encoder`, whose output is its `skip`."""

    def __init__(
        self, ins: int, outs: int, config: HTDemucsConfig, spectral: bool, last: bool
    ):
        super().__init__()
        kernel, padding = ((3, 3), (1, 1)) if spectral else ((3, 1), (1, 0))
        self.rewrite = nn.Conv2d(ins, 2 * ins, kernel, padding=padding)
        self.dconv = Residuals(ins, config)
        self.conv_tr = Upsample(ins, outs)
        self._last = last

    def __call__(self, x: mx.array, skip: mx.array, length: int) -> mx.array:
        """(B, L, W, C) -> (B, length, W, C'), the length before the encoder."""
        x = self.conv_tr(self.dconv(nn.glu(self.rewrite(x + skip))))
        x = x[:, KERNEL // 4 : KERNEL // 4 + length]
        return x if self._last else nn.gelu(x)


class Attention(nn.Module):
    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        D, self._heads = config.bottom_channels, config.t_heads
        self.in_proj = nn.Linear(D, 3 * D)  # queries, keys, values
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array, context: mx.array) -> mx.array:
        """Queries of x (B, T, D), keys and values of context (B, S, D) -> (B, T, D)."""
        (B, T, D), H = x.shape, self._heads
        weights, biases = self.in_proj.weight, self.in_proj.bias
        q = mx.addmm(biases[:D], x, weights[:D].T)
        k, v = mx.split(mx.addmm(biases[D:], context, weights[D:].T), 2, axis=-1)
        q, k, v = (y.reshape(B, -1, H, D // H).swapaxes(1, 2) for y in (q, k, v))
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=(D // H) ** -0.5)
        return self.out_proj(x.swapaxes(1, 2).reshape(B, T, D))


class TransformerLayer(nn.Module):
    """A layer that attends to its own branch, or with `cross` to the other one."""

    def __init__(self, config: HTDemucsConfig, cross: bool):
        super().__init__()
        D = config.bottom_channels
        hidden = int(D * config.t_hidden_scale)
        self.attn = Attention(config)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.norm_context = nn.LayerNorm(D) if cross else None
        self.linear1, self.linear2 = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.gamma_1, self.gamma_2 = Scale(D), Scale(D)
        self.norm_out = Norm(D)

    def __call__(self, x: mx.array, other: mx.array) -> mx.array:
        """x (B, T, D), with the other branch (B, S, D) -> (B, T, D)."""
        y = self.norm1(x)
        context = y if self.norm_context is None else self.norm_context(other)
        x = x + self.gamma_1(self.attn(y, context))
        hidden = nn.gelu(self.linear1(self.norm2(x)))
        return self.norm_out(x + self.gamma_2(self.linear2(hidden)))


class CrossTransformer(nn.Module):
    """Layers of both branches. Every second one attends to the other branch."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        D, kinds = config.bottom_channels, range(config.t_layers)
        self._max_period = config.t_max_period
        self.norm_in, self.norm_in_t = nn.LayerNorm(D), nn.LayerNorm(D)
        self.layers = [TransformerLayer(config, i % 2 == 1) for i in kinds]
        self.layers_t = [TransformerLayer(config, i % 2 == 1) for i in kinds]

    def __call__(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """Spectrogram (B, F, T, D) and waveform (B, S, D) -> the same shapes."""
        B, F, T, D = x.shape
        places = plane_positions(F, T, D, self._max_period)
        x = (self.norm_in(x) + places).swapaxes(1, 2).reshape(B, T * F, D)
        xt = self.norm_in_t(xt) + positions(xt.shape[1], D, self._max_period)
        for layer, layer_t in zip(self.layers, self.layers_t):
            x, xt = layer(x, xt), layer_t(xt, x)
        return x.reshape(B, T, F, D).swapaxes(1, 2), xt


def positions(length: int, width: int, period: float) -> mx.array:
    """Sinusoids (length, width), cosines before sines."""
    rates = period ** (mx.arange(width // 2) / (width // 2 - 1))
    phase = mx.arange(length)[:, None] / rates
    return mx.concatenate([mx.cos(phase), mx.sin(phase)], axis=-1)


def plane_positions(height: int, width: int, channels: int, period: float) -> mx.array:
    """Sinusoids (height, width, channels). The first half of the channels is for the
    place along the width, the second along the height; sines and cosines alternate."""
    half = channels // 2
    rates = mx.exp(mx.arange(0, half, 2) * (-math.log(period) / half))

    def turns(length: int) -> mx.array:
        phase = mx.arange(length)[:, None] * rates
        return mx.stack([mx.sin(phase), mx.cos(phase)], axis=-1).reshape(length, half)

    shape = (height, width, half)
    along = mx.broadcast_to(turns(width)[None], shape)
    return mx.concatenate([along, mx.broadcast_to(turns(height)[:, None], shape)], -1)


def hann(size: int) -> mx.array:
    """The periodic Hann window of `size` samples."""
    return 0.5 - 0.5 * mx.cos(mx.arange(size) * (2 * math.pi / size))


def spectrogram(audio: mx.array, size: int) -> mx.array:
    """Audio (R, N) -> complex (R, size / 2, T), in frames a quarter of `size` apart. T
    is N / (size / 4), rounded up. The highest frequency is left out."""
    (R, N), hop = audio.shape, size // 4
    T, edge = math.ceil(N / hop), hop // 2 * 3
    audio = reflect(audio, edge, edge + T * hop - N)
    blocks = audio.reshape(R, -1, hop)
    frames = mx.concatenate([blocks[:, i : i + T] for i in range(4)], axis=-1)
    spectrum = mx.fft.rfft(frames * hann(size)) / math.sqrt(size)
    return spectrum[..., :-1].swapaxes(1, 2)


def waveform(spectrum: mx.array, length: int) -> mx.array:
    """The inverse of `spectrogram`: complex (R, size / 2, T) -> (R, length)."""
    R, bins, T = spectrum.shape
    size, hop = 2 * bins, bins // 2
    spectrum = mx.pad(spectrum, ((0, 0), (0, 1), (0, 0))).swapaxes(1, 2)
    frames = mx.fft.irfft(spectrum, size) * (hann(size) * math.sqrt(size))
    quarters = frames.reshape(R, T, 4, hop)
    pads = [((0, 0), (i, 3 - i), (0, 0)) for i in range(4)]
    audio = sum(mx.pad(quarters[:, :, i], pads[i]) for i in range(4)).reshape(R, -1)
    return audio[:, hop // 2 * 3 :][:, :length] / 1.5  # four squared windows' sum


def reflect(x: mx.array, before: int, after: int) -> mx.array:
    """Pad (R, N) at both ends by its mirror image, without repeating the end."""
    start, end = x[:, 1 : before + 1][:, ::-1], x[:, -after - 1 : -1][:, ::-1]
    return mx.concatenate([start, x, end], axis=1)


def normalize(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """x (B, ...) with mean 0 and deviation 1 in each row; the means; the deviations."""
    centered, mean, squares = center(x)
    deviation = mx.sqrt(squares / (x.size // len(x) - 1))
    return centered / (1e-5 + deviation), mean, deviation


class HTDemucs(nn.Module):
    """The whole model. `sanitize` maps the published parameter names to ours."""

    def __init__(self, config: HTDemucsConfig):
        super().__init__()
        self.config = config
        widths = [config.channels * config.growth**i for i in range(config.depth)]
        C, S, D = config.audio_channels, len(config.sources), config.bottom_channels
        sizes = list(zip([None, *widths[:-1]], widths))  # None: the outermost
        self.encoder = [Encoder(a or 2 * C, b, config) for a, b in sizes]
        self.tencoder = [Encoder(a or C, b, config) for a, b in sizes]
        sizes.reverse()
        self.decoder, self.tdecoder = [  # of 2 numbers a bin, and of 1 a sample
            [Decoder(b, a or n * C * S, config, n == 2, a is None) for a, b in sizes]
            for n in (2, 1)
        ]
        self.freq_emb = nn.Embedding(config.nfft // 2 // STRIDE, widths[0])
        self.channel_upsampler = nn.Linear(widths[-1], D)
        self.channel_downsampler = nn.Linear(D, widths[-1])
        self.channel_upsampler_t = nn.Linear(widths[-1], D)
        self.channel_downsampler_t = nn.Linear(D, widths[-1])
        self.crosstransformer = CrossTransformer(config)

    @property
    def sampling_rate(self) -> int:
        """Samples per second of input and output."""
        return self.config.samplerate

    @property
    def channels(self) -> int:
        """Channels of input and output: 2."""
        return self.config.audio_channels

    def __call__(self, audio: mx.array) -> mx.array:
        """Audio (B, N, C) -> stems (B, S, N, C); N is `config.segment_length`."""
        B, N, C = audio.shape
        x = spectrogram(audio.swapaxes(1, 2).reshape(B * C, N), self.config.nfft)
        _, F, T = x.shape
        parts = mx.stack([x.real, x.imag], axis=1)  # (B C, 2, F, T)
        x, mean, deviation = normalize(parts.reshape(B, 2 * C, F, T).moveaxis(1, -1))
        xt, mean_t, deviation_t = normalize(audio[:, :, None])
        x, xt = self.unet(x, xt)
        x = (x * deviation + mean).reshape(B, F, T, -1, 2).transpose(0, 3, 1, 2, 4)
        spectrum = (x[..., 0] + 1j * x[..., 1]).reshape(-1, F, T)
        x = waveform(spectrum, N).reshape(B, -1, C, N)
        xt = (xt * deviation_t + mean_t).reshape(B, N, -1, C)
        return x.swapaxes(2, 3) + xt.swapaxes(1, 2)

    def unet(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """Normalized spectrogram (B, F, T, 2 C) and waveform (B, N, 1, C) of the mix ->
        those of all stems, (B, F, T, 2 C S) and (B, N, 1, C S)."""
        skips, lengths = [], []
        for i, (encode, encode_t) in enumerate(zip(self.encoder, self.tencoder)):
            lengths.append((x.shape[1], xt.shape[1]))
            x, xt = encode(x), encode_t(xt)
            if i == 0:
                factor = self.config.freq_emb * self.config.emb_scale
                x = x + factor * self.freq_emb.weight[:, None]
            skips.append((x, xt))
        x, xt = self.bottleneck(x, xt)
        for decode, decode_t in zip(self.decoder, self.tdecoder):
            (skip, skip_t), (length, length_t) = skips.pop(), lengths.pop()
            x, xt = decode(x, skip, length), decode_t(xt, skip_t, length_t)
        return x, xt

    def bottleneck(self, x: mx.array, xt: mx.array) -> tuple[mx.array, mx.array]:
        """The transformer over both branches. Shapes stay as they are."""
        x, xt = self.channel_upsampler(x), self.channel_upsampler_t(xt[:, :, 0])
        x, xt = self.crosstransformer(x, xt)
        return self.channel_downsampler(x), self.channel_downsampler_t(xt)[:, :, None]

    def separate(
        self, audio: mx.array, shifts: int = 0, overlap: float = 0.25
    ) -> mx.array:
        """Audio (N, C) at the model's rate -> stems (S, N, C), in the order of
        `config.sources`: drums, bass, other, vocals.

        It works in pieces of 7.8 s that overlap by the part `overlap`. With `shifts` it
        takes the mean of as many passes over audio shifted by up to 0.5 s: slower and a
        little better. Raises ValueError for another shape, NaN or impossible options.
        """
        *_, (*_, stems) = self.separate_steps(audio, shifts, overlap)
        return stems

    def separate_steps(
        self, audio: mx.array, shifts: int = 0, overlap: float = 0.25
    ) -> Iterator[tuple[int, int, mx.array | None]]:
        """`separate`, a piece at a time. Yields (done, pieces, stems): the pieces that
        are done, all pieces, and the stems, which are None until all are done."""
        audio = mx.array(audio)
        check_audio(audio, self.channels)
        if not 0 <= overlap <= 0.99:
            raise ValueError(f"overlap must be from 0 to 0.99, got {overlap}.")
        if type(shifts) is not int or shifts < 0:
            raise ValueError(f"shifts must be a whole number from 0 on, got {shifts}.")
        N, most = len(audio), self.sampling_rate // 2 if shifts else 0
        offsets = np.random.default_rng(0).integers(0, most + 1, shifts or 1).tolist()
        padded = mx.pad(audio, ((most, most), (0, 0)))
        stride = max(1, int((1 - overlap) * self.config.segment_length))
        pieces = sum(math.ceil((N + most - offset) / stride) for offset in offsets)
        done, total = 0, 0
        for offset in offsets:
            shifted = padded[offset : N + most]
            stems = mx.zeros((len(self.config.sources), *shifted.shape))
            weights = mx.zeros((len(shifted), 1))
            for start in range(0, len(shifted), stride):
                yield done, pieces, None
                self._add_piece(shifted, start, stems, weights)
                done += 1
            total = total + (stems / weights)[:, most - offset :]
            mx.eval(total)
        mx.eval(total := total / len(offsets))
        yield done, pieces, total

    def _add_piece(
        self, audio: mx.array, start: int, stems: mx.array, weights: mx.array
    ) -> None:
        """Add the stems of a piece to the sums. It weighs most in its middle. A piece
        shorter than a segment is padded on both sides by its surroundings, or zeros."""
        size = self.config.segment_length
        stop = min(start + size, len(audio))
        ramp = mx.minimum(mx.arange(size) + 1, size - mx.arange(size)) / (size // 2)
        weight = ramp[: stop - start, None]
        before = (size - (stop - start)) // 2
        first, last = start - before, start - before + size
        left, right = max(-first, 0), max(last - len(audio), 0)
        segment = mx.pad(audio[max(first, 0) : last], ((left, right), (0, 0)))
        piece = self(segment[None])[0, :, before : before + stop - start]
        stems[:, start:stop] += weight * piece
        weights[start:stop] += weight
        mx.eval(stems, weights)

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path = REPO) -> "HTDemucs":
        """Load a folder or a Hub repository with one .safetensors file, in float32. The
        sizes stand in its header, as demucs 4.1 writes it.

        Raises OSError, or ValueError for a file that is damaged or another model's.
        """
        path = locate(path_or_repo)
        try:
            with safe_open(path, "numpy") as file:  # checks the header, too
                config = read_config(file.metadata() or {})
            weights = cls.sanitize(mx.load(str(path)))
            model = cls(config)
            model.load_weights(list(weights.items()))
        except SafetensorError as error:
            raise ValueError(f"{path!s:.150} is damaged: {error!s:.200}") from error
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            from strict import misfit

            raise ValueError(f"{path!s:.80} does not load: {misfit(error, spell)}")
        mx.eval(model.state)
        return model

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The published names and layouts -> ours, in float32. ValueError: no floats."""
        ours = {}
        for name, weight in weights.items():
            if not mx.issubdtype(weight.dtype, mx.floating):
                raise ValueError(f"{name:.99} must hold floats, but has {weight.dtype}")
            for pattern, replacement in RENAMES:
                name = re.sub(pattern, replacement, name)
            ours[name] = arrange(name, weight.astype(mx.float32))
        return ours


RENAMES = (  # published names -> ours
    (r"\.(self|cross)_attn\.", ".attn."),
    (r"in_proj_", "in_proj."),
    (r"freq_emb\.embedding\.", "freq_emb."),
    (r"(layers(?:_t)?\.\d*[13579])\.norm2", r"\1.norm_context"),  # odd: cross
    (r"(layers(?:_t)?\.\d*[13579])\.norm3", r"\1.norm2"),
)


def spell(name: str) -> str:
    """The published name of a tensor of ours."""
    cross = re.search(r"layers(_t)?\.\d*[13579]\.", name)
    name = name.replace(".attn.", ".cross_attn." if cross else ".self_attn.")
    name = name.replace("norm2", "norm3" if cross else "norm2")
    name = name.replace("norm_context", "norm2").replace("in_proj.", "in_proj_")
    return name.replace("freq_emb.", "freq_emb.embedding.")


def arrange(name: str, weight: mx.array) -> mx.array:
    """A published weight in the layout of our layers."""
    if not 3 <= weight.ndim <= 4:
        return weight
    if ".dconv." in name:  # (C', C, k) -> (C', k, C)
        return weight.swapaxes(1, 2)
    if weight.ndim == 3:  # of the waveform: a kernel with W = 1
        weight = weight[..., None]
    if ".conv_tr." in name:  # (C, C', 8, 1) -> (8 C', C)
        return weight[..., 0].transpose(2, 1, 0).flatten(0, 1)
    if weight.shape[2:] == (1, 1):
        return weight[..., 0, 0]
    return weight.transpose(0, 2, 3, 1)


def locate(path_or_repo: str | Path) -> Path:
    """The one .safetensors file of a folder, or of the Hub's cache. Raises OSError."""
    repo, folder = str(path_or_repo), Path(os.path.expanduser(path_or_repo))
    if repo == REPO or not folder.is_dir():  # `./adefossez/HTDemucs` is a folder
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
            wrong = f"{repo!r:.200} must be a folder or a Hub id like {REPO}."
            raise FileNotFoundError(wrong)
        reason, explain = "", lambda error, *_: str(error)
        if Path(__file__).with_name("hub.py").is_file():
            from hub import explain, no_network

            reason = no_network()
        options = dict(allow_patterns="*.safetensors", local_files_only=bool(reason))
        try:
            folder = Path(snapshot_download(repo, **options))
        except (OSError, ValueError) as error:
            why = explain(error, repo, reason).rstrip(". ")
            told = f"Demucs, {repo:.80}: {why}. Or name a folder with its .safetensors"
            raise OSError(f"The Hub did not give {told} file.") from error
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        wrong = f"must hold one .safetensors file, but holds {len(paths)}."
        raise FileNotFoundError(f"{folder!s:.200} {wrong}")
    return paths[0]


def read_config(metadata: dict[str, str]) -> HTDemucsConfig:
    """The sizes in a file's header. Raises ValueError for another kind of model."""
    kind = metadata.get("klass", "none")
    if kind.rpartition(".")[2] != "HTDemucs":
        raise ValueError(f"it must hold an HTDemucs, but holds {kind:.80}")
    positional = json.loads(metadata.get("args", "[]"))
    named = json.loads(metadata.get("kwargs", "{}"), object_hook=fraction)
    if not isinstance(positional, list) or not isinstance(named, dict):
        raise ValueError("its arguments must be a list and an object")
    named = ({"sources": positional[0]} if positional else {}) | named
    check_fixed(named)
    check_sizes(config := HTDemucsConfig.from_dict(named))
    return config


def fraction(value: dict) -> dict | Fraction:
    """The Fraction that an object of the header stands for; other objects unchanged."""
    if value.get("_type") == "fraction":
        return Fraction(value.get("numerator"), value.get("denominator"))
    return value


LIMITS = {  # least and largest value of sizes; without them a file could fill memory
    "audio_channels channels growth dconv_comp t_heads": (1, 2**14),
    "nfft bottom_channels": (4, 2**20),
    "depth": (1, 8),
    "dconv_depth t_layers": (0, 200),
    "freq_emb emb_scale t_hidden_scale": (0.0, 1e6),
    "t_max_period": (1.0, 1e9),
    "samplerate": (100, 768_000),
    "segment": (0.1, 600.0),
}
FIXED = {  # settings of which only the published value is ported
    "cac rewrite t_norm_in t_norm_first t_norm_out t_layer_scale t_gelu": True,
    "use_train_segment": True,
    "t_norm_in_group t_group_norm t_cross_first": False,
    "t_sparse_self_attn t_sparse_cross_attn": False,
    "multi_freqs channels_time": None,
    "kernel_size": KERNEL,
    "stride": STRIDE,
    "context t_weight_pos_embed": 1,
    "context_enc t_sin_random_shift": 0,
    "norm_starts": 4,
    "dconv_mode": 3,
    "t_emb": "sin",
}


def check_fixed(settings: dict) -> None:
    """Raise ValueError for settings of another kind of Demucs."""
    for names, value in FIXED.items():
        for name in names.split():
            got = settings.get(name, value)
            if (got or None) != (value or None):  # an empty list counts as None
                wrong = f"{name} must be {value!r}, got {got!r:.80}"
                raise ValueError(f"{wrong}. Other kinds of Demucs are not ported.")


def check_sizes(config: HTDemucsConfig) -> None:
    """Raise ValueError for sizes that are hostile, or do not fit together."""
    for names, (least, most) in LIMITS.items():
        for name in names.split():
            value = getattr(config, name)
            kinds = (int,) if type(least) is int else (int, float, Fraction)
            if type(value) not in kinds or not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, got {value!r:.80}")
    names = [s for s in config.sources if re.fullmatch(r"[\w -]+", s)]  # of files, too
    if not names or len(set(names)) < len(config.sources):
        raise ValueError(f"sources must be different names, got {config.sources!r:.80}")
    last = 2 * STRIDE ** (config.depth - 1)
    if config.nfft % (last * STRIDE) or config.nfft // last <= KERNEL:
        rule = f"a multiple of {last * STRIDE} and more than {last * KERNEL}"
        raise ValueError(f"nfft must be {rule}, got {config.nfft}.")
    if (D := config.bottom_channels) % (heads := config.t_heads) or D % 4:
        rule = "a multiple of t_heads and of 4"
        raise ValueError(f"bottom_channels must be {rule}, got {D} and {heads} heads.")


def check_audio(audio: mx.array, channels: int) -> None:
    """Raise ValueError unless audio is finite samples (N, channels) in floats."""
    floats = mx.issubdtype(audio.dtype, mx.floating)  # integers would be noise
    if not floats or audio.ndim != 2 or audio.shape[1] != channels or not len(audio):
        wanted = f"audio must have the shape (N, {channels}), in floats"
        raise ValueError(f"{wanted}, got {audio.shape} in {audio.dtype}.")
    if not mx.isfinite(audio).all().item():
        raise ValueError("audio must be finite, but it holds NaN or infinity.")


def run(args: argparse.Namespace) -> None:
    """Separate one file and write its stems."""
    from audio import check_output, load_audio, save_stems
    from outputs import print_out

    if not os.path.isfile(os.path.expanduser(args.source)):
        raise FileNotFoundError(f"There is no sound file {args.source}.")
    model = HTDemucs.from_pretrained(args.model)
    sources = model.config.sources
    names = [s.strip() for s in args.stems.split(",")] if args.stems else sources
    if unknown := set(names) - set(sources):
        choices = ", ".join(sources)
        raise ValueError(f"--stems must be of {choices}; got {min(unknown)!r}.")
    folder = Path(os.path.expanduser(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.wav" for name in names}
    for path in paths.values():
        check_output(path, args.source, args.force)
    audio = load_audio(args.source, model.sampling_rate, model.channels)
    steps = model.separate_steps(audio, args.shifts, args.overlap)
    _, pieces, _ = next(steps)  # an error comes before the bar
    with tqdm(total=pieces, unit="piece", disable=None) as bar:  # only on a terminal
        for done, _, stems in steps:
            bar.update(done - bar.n)
    named = {path: stems[sources.index(name)] for name, path in paths.items()}
    for path in save_stems(named, model.sampling_rate, args.force):
        print_out(path)


def main() -> None:
    warnings.formatwarning = lambda text, *_: f"demucs.py: warning: {text}\n"
    parser = argparse.ArgumentParser(description="Split a song into stems.")
    add = parser.add_argument
    add("source", help="sound file to read")
    add("--output-dir", type=Path, default=Path("stems"), help="(default: stems)")
    add("--stems", help="stems to write, such as vocals,drums (default: all)")
    add("--model", default=REPO, help="folder or Hub repository (default: %(default)s)")
    add("--shifts", type=int, default=0, help="shifted passes to average (0: as it is)")
    add("--overlap", type=float, default=0.25, help="of the pieces (default: 0.25)")
    add("--force", action="store_true", help="overwrite what is there")
    logging.set_verbosity_error()  # hides the Hub's retries; failures are reported
    try:
        run(parser.parse_args())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"demucs.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
