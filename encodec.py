"""EnCodec: codes <-> samples, and audio files.

The neural codec of Défossez et al. (https://arxiv.org/abs/2210.13438), encoder
and decoder, for the three published sizes: 24 kHz mono (causal), 32 kHz mono
(the one MusicGen speaks) and 48 kHz stereo (normalised, in overlapping chunks).
Stands alone:

    model = Encodec.from_pretrained("32khz")
    audio = load_audio("in.wav", model.sampling_rate, model.channels)
    chunks = model.encode(audio[None])
    save_audio("out.wav", model.decode(chunks)[0], model.sampling_rate)

or `python encodec.py in.wav out.wav --model 48khz --bandwidth 6`. Only reading
audiocraft's `compression_state_dict.bin` needs `convert.py` beside it.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import soundfile
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging
from safetensors import SafetensorError, safe_open

REPOS = {
    "24khz": "facebook/encodec_24khz",
    "32khz": "facebook/encodec_32khz",
    "48khz": "facebook/encodec_48khz",
}
FILES = ("config.json", "model.safetensors")
AUDIOCRAFT_FILE = "compression_state_dict.bin"
LIMITS = {  # least and largest value of each setting, or of each number in it
    "audio_channels": (1, 64),
    "sampling_rate": (1000, 192_000),
    "target_bandwidths": (0.01, 1000.0),
    "chunk_length_s": (0.01, 3600.0),
    "overlap": (0.0, 0.99),
    "hidden_size": (1, 2**14),
    "num_filters": (1, 2**10),
    "num_residual_layers": (0, 16),
    "upsampling_ratios": (1, 64),
    "kernel_size": (1, 99),
    "last_kernel_size": (1, 99),
    "residual_kernel_size": (1, 99),
    "dilation_growth_rate": (1, 16),
    "compress": (1, 64),
    "num_lstm_layers": (0, 16),
    "trim_right_ratio": (0.0, 1.0),
    "codebook_size": (2, 2**16),
}
CHOICES = {
    "normalize": (False, True),
    "norm_type": ("weight_norm", "time_group_norm"),
    "use_causal_conv": (False, True),
    "pad_mode": ("reflect", "constant"),
    "use_conv_shortcut": (False, True),
}


@dataclass
class EncodecConfig:
    """The graph, spelled as in `config.json`; defaults: MusicGen's 32 kHz codec."""

    audio_channels: int = 1
    sampling_rate: int = 32000
    target_bandwidths: tuple[float, ...] = (2.2,)  # kbit/s
    normalize: bool = False
    chunk_length_s: float | None = None
    overlap: float | None = None
    hidden_size: int = 128
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: tuple[int, ...] = (8, 5, 4, 4)
    norm_type: str = "weight_norm"
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = False
    pad_mode: str = "reflect"
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: float = 1.0
    codebook_size: int = 2048
    use_conv_shortcut: bool = False

    @classmethod
    def from_dict(cls, config: dict) -> "EncodecConfig":
        """Take the known keys. Raises ValueError when one is missing or absurd."""
        names = {field.name for field in fields(cls)}
        if missing := names - config.keys():
            raise ValueError(
                f"The codec's config must have {', '.join(sorted(missing))}."
            )
        return cls(**{name: config[name] for name in names})

    def __post_init__(self):
        for name in ("upsampling_ratios", "target_bandwidths"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ValueError(f"{name} must be a list, got {getattr(self, name)!r}.")
            setattr(self, name, tuple(getattr(self, name)))
            if not 1 <= len(getattr(self, name)) <= 8:
                raise ValueError(f"{name} must have 1 to 8 numbers.")
        for name, limits in LIMITS.items():
            check_number(name, getattr(self, name), *limits)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {choices}, got {getattr(self, name)!r}."
                )
        if self.compress > self.num_filters:
            raise ValueError(
                f"compress must be at most num_filters, {self.num_filters}, "
                f"got {self.compress}."
            )
        if self.num_codebooks() > 128:
            raise ValueError(
                f"target_bandwidths must need at most 128 codebooks of "
                f"{self.codebook_size} entries, but need {self.num_codebooks()}."
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return math.ceil(self.sampling_rate / self.hop_length)

    @property
    def chunk_length(self) -> int | None:
        """Samples per chunk, None when the audio is coded in one piece."""
        seconds = self.chunk_length_s
        return None if seconds is None else int(seconds * self.sampling_rate)

    @property
    def chunk_stride(self) -> int | None:
        """Samples from one chunk's start to the next's."""
        if self.chunk_length is None:
            return None
        return max(1, int((1 - (self.overlap or 0)) * self.chunk_length))

    def num_codebooks(self, bandwidth: float | None = None) -> int:
        """Codebooks at `bandwidth` kbit/s; without one, all there are."""
        bits = math.ceil(math.log2(self.codebook_size)) * self.frame_rate
        bandwidth = bandwidth or self.target_bandwidths[-1]
        # Guard against 1000 * 2.2 and the like falling short of a whole number.
        return max(1, math.floor(1000 * bandwidth / bits + 1e-6))


def check_number(name: str, value, low: float, high: float) -> None:
    """Raise ValueError unless `value`, or each number in it, lies in the limits.

    Integer limits ask for integers. None is what some settings are left at.
    """
    kinds = (int,) if type(low) is int else (int, float)
    optional = name in ("chunk_length_s", "overlap")
    for number in value if isinstance(value, tuple) else (value,):
        fits = type(number) in kinds and low <= number <= high
        if not (fits or number is None and optional):
            raise ValueError(f"{name} must be from {low} to {high}, got {value!r}.")


def pad(x: mx.array, left: int, right: int, mode: str) -> mx.array:
    """Pad (B, N, C) along N, by zeros or by reflection.

    Where x is too short to be reflected, zeros are appended for the reflection
    to see, and cut off again.
    """
    if mode == "constant":
        return mx.pad(x, [(0, 0), (left, right), (0, 0)])
    missing = max(left, right) + 1 - x.shape[1]
    if missing > 0:
        x = mx.pad(x, [(0, 0), (0, missing), (0, 0)])
    N = x.shape[1]
    head = x[:, 1 : left + 1][:, ::-1]
    tail = x[:, N - 1 - right : N - 1][:, ::-1]
    x = mx.concatenate([head, x, tail], axis=1)
    return x[:, : x.shape[1] - missing] if missing > 0 else x


def group_norm(config: EncodecConfig, channels: int) -> nn.Module | None:
    """What follows a convolution; weight norm is folded into its weights."""
    if config.norm_type == "weight_norm":
        return None
    return nn.GroupNorm(1, channels, pytorch_compatible=True)


class Conv1d(nn.Module):
    """Convolution (B, N, C_in) -> (B, ceil(N / stride), C_out)."""

    def __init__(
        self,
        config: EncodecConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ):
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride, dilation=dilation
        )
        self.norm = group_norm(config, out_channels)
        self._pad_mode = config.pad_mode
        self._stride = stride
        total = (kernel_size - 1) * dilation + 1 - stride
        self._right = 0 if config.use_causal_conv else total // 2
        self._left = total - self._right

    def __call__(self, x: mx.array) -> mx.array:
        fill = -x.shape[1] % self._stride  # makes the last window full
        x = self.conv(pad(x, self._left, self._right + fill, self._pad_mode))
        return x if self.norm is None else self.norm(x)


class TransposedKernel(nn.Module):
    """Weights of a transposed convolution whose kernel is twice its stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        bound = (in_channels * 2 * stride) ** -0.5
        shape = (2 * stride, out_channels, in_channels)
        self.weight = mx.random.uniform(-bound, bound, shape)
        self.bias = mx.zeros(out_channels)


def trim_right(config: EncodecConfig, stride: int) -> int:
    """Of the `stride` outputs too many, how many are cut off at the end."""
    if config.use_causal_conv:
        return math.ceil(stride * config.trim_right_ratio)
    return stride // 2


class ConvTranspose1d(nn.Module):
    """Transposed convolution (B, T, C_in) -> (B, T * stride, C_out).

    Each input position adds 2 * stride outputs: its own half and the half it
    shares with its successor. So this is one matrix product and one overlap-add,
    where a general transposed convolution stuffs its input with zeros.
    """

    def __init__(
        self, config: EncodecConfig, in_channels: int, out_channels: int, stride: int
    ):
        super().__init__()
        self.conv = TransposedKernel(in_channels, out_channels, stride)
        self.norm = group_norm(config, out_channels)
        self._trim_right = trim_right(config, stride)
        self._trim_left = stride - self._trim_right

    def __call__(self, x: mx.array) -> mx.array:
        B, T, C = x.shape
        halves = x @ self.conv.weight.reshape(-1, C).T
        own, shared = mx.split(halves, 2, axis=-1)  # (B, T, stride * C_out) each
        x = mx.pad(own, [(0, 0), (0, 1), (0, 0)])
        x = x + mx.pad(shared, [(0, 0), (1, 0), (0, 0)])
        x = x.reshape(B, -1, self.conv.bias.size) + self.conv.bias
        if self.norm is not None:
            x = self.norm(x)
        return x[:, self._trim_left : x.shape[1] - self._trim_right]


LSTMState = tuple[mx.array, mx.array]  # hidden and cell (B, D)


@mx.compile
def lstm_steps(
    inputs: mx.array, recurrent: mx.array, hidden: mx.array, cell: mx.array
) -> tuple[mx.array, LSTMState]:
    """Hidden states (B, T, D) after what comes in, (B, T, 4 D) for the gates in,
    forget, new and out, by the matrix (4 D, D); and the state after the last."""
    steps = []
    for x in mx.unstack(inputs, axis=1):
        # sums of parts, not parts of a sum, so that all but the product is one kernel
        gates = zip(mx.split(x, 4, -1), mx.split(hidden @ recurrent.T, 4, -1))
        i, f, g, o = (a + b for a, b in gates)
        cell = mx.sigmoid(f) * cell + mx.sigmoid(i) * mx.tanh(g)
        hidden = mx.sigmoid(o) * mx.tanh(cell)
        steps.append(hidden)
    return mx.stack(steps, axis=1), (hidden, cell)


class LSTMLayer(nn.LSTM):
    """MLX's LSTM with ten steps compiled together.

    `nn.LSTM` takes twelve operations a step. On a GPU their number decides, for each
    is tiny.
    """

    def __call__(
        self, x: mx.array, state: LSTMState | None = None
    ) -> tuple[mx.array, LSTMState]:
        """Hidden states (B, T, D) of x (B, T, D), and the state after the last."""
        inputs = mx.addmm(self.bias, x, self.Wx.T)
        zeros = mx.zeros((len(x), self.hidden_size), x.dtype)
        state, pieces = state or (zeros, zeros), []
        for start in range(0, x.shape[1], 10):
            piece = inputs[:, start : start + 10]
            piece, state = lstm_steps(piece, self.Wh, *state)
            pieces.append(piece)
        return mx.concatenate(pieces, axis=1), state


class LSTM(nn.Module):
    """Stacked LSTM over time with a skip connection around the whole stack."""

    def __init__(self, config: EncodecConfig, channels: int):
        super().__init__()
        layers = range(config.num_lstm_layers)
        self.lstm = [LSTMLayer(channels, channels) for _ in layers]

    def __call__(self, x: mx.array) -> mx.array:
        return self.advance(x, [None] * len(self.lstm))[0]

    def advance(self, x: mx.array, states: list) -> tuple[mx.array, list[LSTMState]]:
        """The output for x (B, T, D), from the layers' states to their next ones."""
        hidden, after = x, []
        for layer, state in zip(self.lstm, states):
            hidden, state = layer(hidden, state)
            after.append(state)
        return hidden + x, after


class ResnetBlock(nn.Module):
    def __init__(self, config: EncodecConfig, channels: int, dilation: int):
        super().__init__()
        hidden, kernel_size = channels // config.compress, config.residual_kernel_size
        self.block = [
            nn.ELU(),
            Conv1d(config, channels, hidden, kernel_size, dilation=dilation),
            nn.ELU(),
            Conv1d(config, hidden, channels, kernel_size=1),
        ]
        self.shortcut = None
        if config.use_conv_shortcut:
            self.shortcut = Conv1d(config, channels, channels, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        skip = x if self.shortcut is None else self.shortcut(x)
        for layer in self.block:
            x = layer(x)
        return skip + x


class Stack(nn.Module):
    """Layers one after another, numbered as in the checkpoints."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = layers

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


@functools.cache
def second_stream(device: str) -> mx.Stream:
    return mx.new_stream(mx.default_device())


def parallel_streams() -> list[mx.Stream]:
    """Streams for work that can be done side by side: on the CPU two, for each is a
    thread, and the plain BLAS of MLX's Linux wheel keeps to the thread that calls it;
    on a GPU the default one."""
    device = mx.default_device()
    streams = [mx.default_stream(device)]
    # by name: devices that are equal are different keys of a cache
    return streams + ([second_stream(str(device))] if device == mx.cpu else [])


def convolution_reach(
    config: EncodecConfig, kernel_size: int, dilation: int = 1
) -> tuple[int, int]:
    """Positions before and after its own that a convolution sees."""
    total = (kernel_size - 1) * dilation
    after = 0 if config.use_causal_conv else total // 2
    return total - after, after


def upsampling_reach(config: EncodecConfig) -> tuple[int, int]:
    """Samples before and after its own on whose frames a sample depends, in the
    layers after the LSTM: 482 after it, 3/4 of a frame, for the 32 kHz codec."""
    before = after = 0
    step = config.hop_length  # samples between two positions of a layer
    for ratio in config.upsampling_ratios:
        step //= ratio
        right = trim_right(config, ratio)
        reaches = [(right, ratio - right)]
        for i in range(config.num_residual_layers):
            dilation = config.dilation_growth_rate**i
            kernel_size = config.residual_kernel_size
            reaches.append(convolution_reach(config, kernel_size, dilation))
        before += step * sum(left for left, _ in reaches)
        after += step * sum(right for _, right in reaches)
    left, right = convolution_reach(config, config.last_kernel_size)
    return before + left, after + right


def residual_blocks(config: EncodecConfig, channels: int) -> list[nn.Module]:
    return [
        ResnetBlock(config, channels, config.dilation_growth_rate**i)
        for i in range(config.num_residual_layers)
    ]


def build_encoder(config: EncodecConfig) -> Stack:
    """SEANet encoder: samples (B, N, C) -> embeddings (B, T, hidden_size)."""
    width = config.num_filters
    layers = [Conv1d(config, config.audio_channels, width, config.kernel_size)]
    for ratio in reversed(config.upsampling_ratios):
        layers += residual_blocks(config, width)
        layers += [nn.ELU(), Conv1d(config, width, 2 * width, 2 * ratio, ratio)]
        width *= 2
    layers += [LSTM(config, width), nn.ELU()]
    layers += [Conv1d(config, width, config.hidden_size, config.last_kernel_size)]
    return Stack(layers)


def build_decoder(config: EncodecConfig) -> Stack:
    """SEANet decoder: embeddings (B, T, hidden_size) -> samples (B, N, C)."""
    width = config.num_filters * 2 ** len(config.upsampling_ratios)
    layers = [Conv1d(config, config.hidden_size, width, config.kernel_size)]
    layers += [LSTM(config, width)]
    for ratio in config.upsampling_ratios:
        layers += [nn.ELU(), ConvTranspose1d(config, width, width // 2, ratio)]
        width //= 2
        layers += residual_blocks(config, width)
    layers += [nn.ELU()]
    layers += [Conv1d(config, width, config.audio_channels, config.last_kernel_size)]
    return Stack(layers)


class Codebook(nn.Module):
    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.embed = mx.random.normal((config.codebook_size, config.hidden_size))

    def nearest(self, x: mx.array) -> mx.array:
        """Index of the entry nearest to each vector: (B, T, D) -> (B, T)."""
        return nearest(x, self.embed)


def nearest(x: mx.array, entries: mx.array) -> mx.array:
    """Index of the entry (V, D) nearest to each vector: (..., D) -> (...)."""
    distance = (entries**2).sum(axis=-1) - 2 * (x @ entries.T)
    return mx.argmin(distance, axis=-1)


class Quantizer(nn.Module):
    """Residual vector quantizer: each codebook codes what the last left over."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.layers = [QuantizerLayer(config) for _ in range(config.num_codebooks())]

    def encode(self, x: mx.array, num_codebooks: int) -> mx.array:
        """Embeddings (B, T, D) -> codes (B, T, K)."""
        codes = []
        for layer in self.layers[:num_codebooks]:
            codes.append(layer.codebook.nearest(x))
            x = x - layer.codebook.embed[codes[-1]]
        return mx.stack(codes, axis=-1)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes (B, T, K) -> embeddings (B, T, D)."""
        return sum(
            layer.codebook.embed[codes[..., k]]
            for k, layer in enumerate(self.layers[: codes.shape[-1]])
        )


class QuantizerLayer(nn.Module):
    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.codebook = Codebook(config)


class Chunk(NamedTuple):
    """One piece of coded audio."""

    codes: mx.array  # (B, T, K)
    scale: mx.array | None = None  # (B, 1, 1): what the decoded samples are times


class Encodec(nn.Module):
    """The codec. Parameter names are those of the transformers checkpoints."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = build_decoder(config)

    @property
    def sampling_rate(self) -> int:
        """Samples per second."""
        return self.config.sampling_rate

    @property
    def channels(self) -> int:
        """Audio channels."""
        return self.config.audio_channels

    def encode(self, audio: mx.array, bandwidth: float | None = None) -> list[Chunk]:
        """Code audio (B, N, C) as a list of chunks.

        There is one with scale None, except in the 48 kHz model: there each
        second is a chunk, and scale is its volume. `bandwidth` in kbit/s sets K;
        the default is the model's smallest. Raises ValueError for audio of
        another shape or a bandwidth the model does not know.
        """
        config = self.config
        if audio.ndim != 3 or audio.shape[1] == 0 or audio.shape[2] != self.channels:
            raise ValueError(
                f"audio must have the shape (B, N, {self.channels}) with N > 0, "
                f"got {audio.shape}."
            )
        if bandwidth is None:
            bandwidth = config.target_bandwidths[0]
        if bandwidth not in config.target_bandwidths:
            raise ValueError(
                f"bandwidth must be one of {list(config.target_bandwidths)} kbit/s, "
                f"got {bandwidth}."
            )
        K = config.num_codebooks(bandwidth)
        N = audio.shape[1]
        length, stride = config.chunk_length or N, config.chunk_stride or N
        return [
            self.encode_chunk(audio[:, start : start + length], K)
            for start in range(0, N, stride)
        ]

    def encode_chunk(self, audio: mx.array, num_codebooks: int) -> Chunk:
        """Code one piece (B, N, C) with the first `num_codebooks` codebooks."""
        scale = None
        if self.config.normalize:
            mono = audio.mean(axis=2, keepdims=True)
            scale = mx.sqrt((mono**2).mean(axis=1, keepdims=True)) + 1e-8
            audio = audio / scale
        return Chunk(self.quantizer.encode(self.encoder(audio), num_codebooks), scale)

    def decode(self, chunks: list[Chunk]) -> mx.array:
        """Audio (B, N, C) of the chunks that `encode` gave.

        N is rounded up to whole frames. Overlapping chunks are cross-faded by
        triangular weights.
        """
        pieces = [self.decode_chunk(codes, scale) for codes, scale in chunks]
        if len(pieces) == 1:
            return pieces[0]
        return overlap_add(pieces, self.config.chunk_stride)

    def decode_chunk(self, codes: mx.array, scale: mx.array | None = None) -> mx.array:
        """Audio (B, T * hop_length, C) of codes (B, T, K)."""
        if self.config.norm_type == "weight_norm":
            audio = self.stream().push(codes, last=True)
        else:  # group norm looks at the whole; such a codec has short chunks
            audio = self.decoder(self.quantizer.decode(codes))
        return audio if scale is None else audio * scale

    def stream(self) -> "DecodingStream":
        """Decode frames as they come. Raises ValueError for a codec with group norm
        (48 kHz), which cannot."""
        return DecodingStream(self)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names and layouts of either published form -> ours, in float32.

        Raises ValueError for a tensor that does not hold floats or lacks its
        partner.
        """
        kept = {}
        for name, weight in weights.items():
            if not UNUSED.fullmatch(name):
                add(kept, rename(name), weight)
        for name, weight in kept.items():
            if not mx.issubdtype(weight.dtype, mx.floating):
                raise ValueError(f"{name} must hold floats, but holds {weight.dtype}")
        weights = {name: weight.astype(mx.float32) for name, weight in kept.items()}
        if not any("lstm.weight_ih" in name for name in weights):
            return weights  # ours already
        return merge_lstm(channels_last(fold_weight_norm(weights)))

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path) -> "Encodec":
        """Load a codec in float32.

        `path_or_repo` is "24khz", "32khz", "48khz", another Hub id, or a local
        folder with `config.json` and `model.safetensors` or with audiocraft's
        `compression_state_dict.bin`. Raises ValueError or OSError naming the
        file and what is wrong with it.
        """
        folder = Path(path_or_repo)
        if (folder / AUDIOCRAFT_FILE).is_file():
            return cls.from_audiocraft(folder)
        config, weights = locate(path_or_repo)
        try:
            config = EncodecConfig.from_dict(read_config(config))
            model = cls(config)
            with safe_open(weights, "numpy"):  # checks the header as mx.load does not
                tensors = cls.sanitize(mx.load(str(weights)))
            model.load_weights(list(tensors.items()))
            mx.eval(model.parameters())
        except (
            IndexError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"Codec {weights.parent} does not load: {error}"
            ) from error
        return model

    @classmethod
    def from_audiocraft(cls, folder: Path) -> "Encodec":
        """Load `compression_state_dict.bin`: a codec, or the name of one.

        A pointed-to codec is looked for beside the file, in a folder of its
        repository's name, before the Hub.
        """
        from convert import load_package, read_yaml

        path = folder / AUDIOCRAFT_FILE
        package = load_package(path)
        if "pretrained" in package:
            repo = str(package["pretrained"])
            if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
                raise ValueError(f"{path} must name a Hub repository, got {repo!r}.")
            local = folder / repo.split("/")[-1]
            try:
                return cls.from_pretrained(local if local.is_dir() else repo)
            except OSError as error:
                raise OSError(
                    f"{path} points to {repo}, looked for in {local}: {error}"
                ) from error
        try:
            weights = cls.sanitize(package["best_state"])
            cfg = read_yaml(package.get("xp.cfg", ""))
            model = cls(audiocraft_config(weights, cfg))
            model.load_weights(list(weights.items()))
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}.") from error
        except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{path} does not load: {error}") from error
        return model


class Lookahead:
    """Applies layers that reach over few frames to frames as they come.

    `apply` maps frames (B, T, D) to `rate` outputs for each. An output is handed
    out when all it depends on is there: `before` and `after` its own place, counted
    in outputs. So each piece takes some frames along on both sides and drops the
    outputs they give, and what is left is what one pass over all would give.
    """

    def __init__(
        self, apply, rate: int, before: int, after: int, frames: int, width: int
    ):
        self._apply, self._rate, self._frames = apply, rate, frames
        self._before, self._after, self._width = before, after, width
        # Where more is seen before than after, reflection at the beginning shows the
        # first outputs what comes as much later.
        self._hold = before if before > after else 0
        self._buffer = None  # the frames that are still needed
        self._start = 0  # number of its first frame
        self._done = 0  # outputs handed out

    def __call__(self, x: mx.array, last: bool) -> mx.array:
        """The outputs (B, N, C) that frames (B, T, D) complete; N can be 0."""
        rate, size = self._rate, self._frames * self._rate
        buffer = x if self._buffer is None else mx.concatenate([self._buffer, x], 1)
        end = self._start + buffer.shape[1]
        stop = end * rate - self._after
        stop = self._done if stop < max(self._hold, self._done) else stop
        stop = end * rate if last else stop
        pieces = []
        for a in range(self._done, stop, size):
            b = min(a + size, stop)
            first = max((a - self._before) // rate, 0)
            until = min(math.ceil((max(b, self._hold) + self._after) / rate), end)
            window = slice(first - self._start, until - self._start)
            place = slice(a - first * rate, b - first * rate)
            pieces.append(self._apply(buffer, window, place))
        keep = max((stop - self._before) // rate, 0)
        self._buffer = buffer[:, keep - self._start :]
        self._start, self._done = keep, stop
        nothing = mx.zeros((len(x), 0, self._width))
        return mx.concatenate(pieces, axis=1) if pieces else nothing


class DecodingStream:
    """The codec's decoder on frames as they come.

    What `push` returns is, put together, what decoding all frames at once gives,
    however they are split. The LSTM keeps its state; the convolutions before and
    after it wait for the 3 3/4 frames on which a sample of the 32 kHz codec depends.
    """

    def __init__(self, model: Encodec):
        config = model.config
        if config.norm_type != "weight_norm":
            raise ValueError(
                "A codec with group norm, which looks at all samples at once, cannot "
                "decode a stream; use decode."
            )
        self._model = model
        first, lstm, *_ = model.decoder.layers
        reach = convolution_reach(config, config.kernel_size)
        self._convolve = Lookahead(
            lambda x, window, place: first(x[:, window])[:, place],
            *(1, *reach, 1000, first.conv.bias.size),
        )
        self._states = [None] * len(lstm.lstm)
        self._upsample: list[Lookahead] = []  # for two rows each, to save memory

    def push(self, codes: mx.array, last: bool = False) -> mx.array:
        """Samples (B, N, C) that the codes (B, T, K) complete; N can be 0.

        `last` hands out all that is left, and ends the stream.
        """
        x = self._convolve(self._model.quantizer.decode(codes), last)
        if x.shape[1] > 0:
            x, self._states = self._model.decoder.layers[1].advance(x, self._states)
            mx.async_eval(x)  # or pieces side by side would wait for each other
        if not self._upsample:
            self._upsample = [
                make_upsampler(self._model, min(len(x) - i, 2))
                for i in range(0, len(x), 2)
            ]
        rows = [up(x[2 * i : 2 * i + 2], last) for i, up in enumerate(self._upsample)]
        return mx.concatenate(rows)


def make_upsampler(model: Encodec, rows: int, frames: int = 200) -> Lookahead:
    """What follows the LSTM, for `frames` frames of all rows at a time, to save memory."""
    streams = parallel_streams()
    waiting, turn = [], itertools.cycle(streams)

    def apply(x: mx.array, window: slice, place: slice) -> mx.array:
        with mx.stream(next(turn)):
            x = x[:, window]
            for layer in model.decoder.layers[2:]:
                x = layer(x)
            waiting.append(x[:, place])
        piece = waiting[-1]
        if len(waiting) == len(streams):  # together, so that they interleave
            mx.async_eval(waiting)
            waiting.clear()
        return piece

    frames = math.ceil(frames / (rows * len(streams)))
    reach = upsampling_reach(model.config)
    return Lookahead(apply, model.config.hop_length, *reach, frames, model.channels)


def read_config(path: Path) -> dict:
    """The settings in a `config.json`. Raises ValueError when it holds none."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} must hold an object, got {config!r:.40}")
    return config


def overlap_add(pieces: list[mx.array], stride: int) -> mx.array:
    """Cross-fade pieces (B, N_i, C) that start `stride` samples apart."""
    B, length, C = pieces[0].shape
    ramp = mx.linspace(0, 1, length + 2)[1:-1]
    weight = (0.5 - mx.abs(ramp - 0.5))[:, None]
    total = stride * (len(pieces) - 1) + pieces[-1].shape[1]
    audio, weights = mx.zeros((B, total, C)), mx.zeros((total, 1))
    for i, piece in enumerate(pieces):
        N = piece.shape[1]
        place = slice(i * stride, i * stride + N)
        audio[:, place] += weight[:N] * piece
        weights[place] += weight[:N]
    return audio / weights


# Training's bookkeeping, of no use here.
UNUSED = re.compile(r"quantizer\..*\.(inited|cluster_size|embed_avg)")

RENAMES = (  # audiocraft's names, then transformers' since 4.46
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.conv(tr)?\.(conv|convtr)\.", ".conv."),
    (r"^quantizer\.vq\.", "quantizer."),
    (r"\._codebook\.", ".codebook."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)


def rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def add(weights: dict[str, mx.array], name: str, weight: mx.array) -> None:
    """Put a tensor under a name. Raises ValueError when the name is taken."""
    if name in weights:
        raise ValueError(f"{name} is there twice, under two spellings")
    weights[name] = weight


def fold_weight_norm(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """weight = g * v / |v|, the norm taken over all dimensions but the first."""
    folded = dict(weights)
    for name, weight in weights.items():
        stem, found, _ = name.partition(".weight_v")
        if found:
            if weight.ndim != 3:
                raise ValueError(f"{name} must have 3 dimensions, got {weight.shape}")
            gain = partner(folded, f"{stem}.weight_g", (len(weight), 1, 1))
            norm = mx.sqrt((weight**2).sum(axis=(1, 2), keepdims=True))
            add(folded, f"{stem}.weight", gain * folded.pop(name) / norm)
    return folded


def partner(weights: dict[str, mx.array], name: str, shape: tuple) -> mx.array:
    """Take `name` out of `weights`. Raises ValueError unless it has the shape."""
    if name not in weights or weights[name].shape != shape:
        found = weights[name].shape if name in weights else "nothing"
        raise ValueError(f"{name} must have the shape {shape}, got {found}")
    return weights.pop(name)


def channels_last(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Move torch's kernels to our layouts.

    (out, in, kernel) -> (out, kernel, in), and where the decoder upsamples, in
    its inner layers, (in, out, kernel) -> (kernel, out, in).
    """
    inner = re.compile(r"decoder\.layers\.(\d+)\.conv\.weight")
    numbers = [int(m[1]) for m in map(inner.fullmatch, weights) if m]
    if not numbers:
        raise ValueError("decoder.layers.0.conv.weight is missing")
    last = max(numbers)

    def move(name: str, weight: mx.array) -> mx.array:
        match = inner.fullmatch(name)
        if match and 0 < int(match[1]) < last:
            return weight.transpose(2, 1, 0)
        return weight.swapaxes(1, 2) if weight.ndim == 3 else weight

    return {name: move(name, weight) for name, weight in weights.items()}


def merge_lstm(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """torch's `lstm.weight_ih_l0` and its like -> `lstm.0.Wx`, biases added up."""
    merged = dict(weights)
    for name, weight in weights.items():
        match = re.fullmatch(r"(.*lstm)\.(weight_ih|weight_hh|bias_ih)_l(\d+)", name)
        if not match:
            continue
        stem, kind, layer = match.groups()
        weight = merged.pop(name)
        if kind == "bias_ih":
            other = f"{stem}.bias_hh_l{layer}"
            weight = weight + partner(merged, other, weight.shape)
        ours = {"weight_ih": "Wx", "weight_hh": "Wh", "bias_ih": "bias"}[kind]
        add(merged, f"{stem}.{layer}.{ours}", weight)
    return merged


def flag(cfg: dict, name: str) -> bool:
    """A setting that is true or false, and false where it is not given."""
    value = cfg.get(name, "false")
    if value not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {value}")
    return value == "true"


def audiocraft_config(weights: dict[str, mx.array], cfg: dict) -> EncodecConfig:
    """Config from what the shapes of our weights show and what `cfg` alone tells.

    `cfg` maps dotted names of `xp.cfg` to strings. Where it is silent the
    defaults of audiocraft's code hold.
    """
    outer = weights["encoder.layers.0.conv.weight"]  # (filters, kernel, channels)
    inner = weights["encoder.layers.1.block.1.conv.weight"]
    entries, width = weights["quantizer.layers.0.codebook.embed"].shape
    upsampling = {}  # layer -> stride, half of the kernel
    for name, weight in weights.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.conv\.weight", name)
        if match:
            upsampling[int(match[1])] = weight.shape[0] // 2
    _, *places, last = sorted(upsampling)
    config = EncodecConfig(
        audio_channels=outer.shape[2],
        sampling_rate=int(cfg.get("sample_rate", 32000)),
        normalize=flag(cfg, "encodec.renormalize"),
        hidden_size=width,
        num_filters=outer.shape[0],
        num_residual_layers=places[1] - places[0] - 2,
        upsampling_ratios=tuple(upsampling[place] for place in places),
        kernel_size=outer.shape[1],
        last_kernel_size=weights[f"decoder.layers.{last}.conv.weight"].shape[1],
        residual_kernel_size=inner.shape[1],
        dilation_growth_rate=int(cfg.get("seanet.dilation_base", 2)),
        use_causal_conv=flag(cfg, "seanet.causal"),
        pad_mode=cfg.get("seanet.pad_mode", "reflect"),
        compress=outer.shape[0] // inner.shape[0],
        num_lstm_layers=sum(name.endswith(".Wh") for name in weights) // 2,
        codebook_size=entries,
        use_conv_shortcut=any(".shortcut." in name for name in weights),
    )
    codebooks = sum(name.endswith(".embed") for name in weights)
    bits = codebooks * math.ceil(math.log2(entries)) * config.frame_rate
    return replace(config, target_bandwidths=(bits / 1000,))


def locate(path_or_repo: str | Path) -> list[Path]:
    """The two FILES: in a local folder, or from the Hub through its cache."""
    folder = Path(path_or_repo)
    if not folder.is_dir():
        repo = REPOS.get(str(path_or_repo), str(path_or_repo))
        try:
            return [Path(hf_hub_download(repo, name)) for name in FILES]
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise OSError(
                f"'{path_or_repo}' is none of {', '.join(REPOS)}, no local folder, and "
                f"the Hub did not give it: {error}. To work offline, name a folder "
                f"with {' and '.join(FILES)}."
            ) from error
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {' and '.join(FILES)}, or {AUDIOCRAFT_FILE}, "
                f"but {name} is missing."
            )
    return [folder / name for name in FILES]


def load_audio(path: str | Path, sampling_rate: int, channels: int) -> mx.array:
    """Read a sound file as (N, channels) float32 at `sampling_rate`.

    Whatever soundfile reads: wav, flac, ogg, mp3 and more. Mono is copied to
    every channel, several are averaged to one; of more channels than wanted the
    first are taken. Raises FileNotFoundError, or ValueError for a file that is
    not sound, holds none, holds NaN or has too few channels.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no sound file {path}.")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable sound file: {error}") from error
    if len(audio) == 0 or not np.isfinite(audio).all():
        raise ValueError(f"{path} must hold sound, but it is empty or holds NaN.")
    found = audio.shape[1]
    if channels == 1:
        audio = audio.mean(axis=1, keepdims=True)
    elif found == 1:
        audio = np.repeat(audio, channels, axis=1)
    elif found < channels:
        raise ValueError(f"{path} has {found} channels, but {channels} are needed.")
    return mx.array(resample(audio[:, :channels], rate, sampling_rate))


def resample(audio: np.ndarray, source: int, target: int) -> np.ndarray:
    """(N, C) at `source` Hz -> (floor(N * target / source), C) at `target` Hz.

    A sinc of 24 zero crossings under a squared cosine, cut off at 0.945 of the
    lower Nyquist frequency, edges held: the filter of julius, which the original
    uses (https://github.com/adefossez/julius).
    """
    if source == target:
        return audio
    zeros, rolloff = 24, 0.945
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    rate = min(source, target) * rolloff
    width = math.ceil(zeros * source / rate)
    taps = np.arange(-width, width + 2)

    phase = (np.arange(target) * source % target) / target  # where between samples
    time = (taps - phase[:, None]) * rate / source
    time = np.clip(time, -zeros, zeros)
    kernels = np.sinc(time) * np.cos(np.pi * time / zeros / 2) ** 2
    kernels = (kernels / kernels.sum(axis=1, keepdims=True)).astype(np.float32)

    output = np.empty((len(audio) * target // source, audio.shape[1]), np.float32)
    for start in range(0, len(output), 65536):  # bounds the memory of the windows
        places = np.arange(start, min(start + 65536, len(output)))
        window = (places * source // target)[:, None] + taps
        window = audio[np.clip(window, 0, len(audio) - 1)]
        output[places] = np.einsum("nt,ntc->nc", kernels[places % target], window)
    return output


SUBTYPES = {  # the first is the default
    ".wav": ("PCM_16", "PCM_24", "FLOAT"),
    ".flac": ("PCM_16", "PCM_24"),
    ".ogg": ("VORBIS",),
    ".mp3": ("MPEG_LAYER_III",),
}


def choose_subtype(path: str | Path, subtype: str | None = None) -> str:
    """How the samples lie in a file of this name: as asked for, or its default.

    Raises ValueError for an extension that `save_audio` does not know, or a subtype
    that it does not have.
    """
    suffix = Path(path).suffix
    known = SUBTYPES.get(suffix.lower())
    if known is None:
        raise ValueError(
            f"{path} must end in one of {', '.join(SUBTYPES)}, got '{suffix}'."
        )
    if subtype is not None and subtype not in known:
        raise ValueError(
            f"subtype of a {suffix} must be {' or '.join(known)}, got {subtype!r}."
        )
    return subtype or known[0]


def check_audio_path(path: str | Path, subtype: str | None = None) -> Path:
    """Raise OSError unless a file can be written at `path`, ValueError for an
    extension or subtype that `save_audio` does not know."""
    choose_subtype(path, subtype)
    check_writable(path)
    return Path(path)


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be written at `path`."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} of {path.name} must exist.")
    if os.path.exists(path) and not path.is_file():
        raise PermissionError(f"{path} is no ordinary file; choose another place.")
    if len(os.fsencode(path.name)) > 255:
        raise PermissionError(f"{path.name:.40}... is too long a name for a file.")
    try:  # permissions alone do not tell
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except (OSError, RuntimeError) as error:
        raise PermissionError(
            f"{path} cannot be written; choose another place: {error}"
        ) from error


def to_int16(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Float samples (N, C) in 16 bits, beyond 1 clipped.

    With triangular dither of a step to both sides, so that what is quieter than a
    step is heard in a constant hiss and not as distortion.
    """
    noise = random.random((*audio.shape, 2), np.float32)
    steps = np.clip(audio, -1, 1) * 32766 + noise[..., 0] - noise[..., 1]
    return np.rint(steps).astype(np.int16)


def save_audio(
    path: str | Path,
    audio: mx.array,
    sampling_rate: int,
    comment: str = "",
    subtype: str | None = None,
) -> None:
    """Write (N, C) or (N,) float samples; the extension names the format.

    wav and flac (16 bit with dither; `subtype` "PCM_24", or of wav "FLOAT"), ogg
    and mp3. Samples beyond 1 would clip: then, but in FLOAT, the whole is scaled
    down to a peak of 1, with a warning. Raises ValueError for another shape, NaN,
    an unknown extension or subtype, OSError where nothing can be written. The file
    appears under its name only when it is whole.
    """
    path = check_audio_path(path, subtype)
    subtype = choose_subtype(path, subtype)
    audio = np.asarray(audio, dtype=np.float32)
    audio = audio[:, None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or not 1 <= audio.shape[1] <= 8:
        raise ValueError(
            f"The audio for {path} must have the shape (N, C) with 1 to 8 channels, "
            f"got {audio.shape}."
        )
    if not 1000 <= sampling_rate <= 192_000:  # libsndfile crashes on others
        raise ValueError(f"sampling_rate must be 1000 to 192000, got {sampling_rate}.")
    peak = np.abs(audio).max(initial=0)
    if not np.isfinite(peak):
        raise ValueError(f"The audio for {path} must be finite, but it holds NaN.")
    if peak > 1 and subtype != "FLOAT":
        warnings.warn(f"{path} was scaled down: its peak of {peak:.2f} would clip.")
        audio = audio / peak
    target = path.resolve()  # of a link
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    part = target.with_name(f".{digest}.part{target.suffix}")
    settings = dict(channels=audio.shape[1], subtype=subtype)
    random = np.random.default_rng(0)  # the same file of the same samples
    try:
        with soundfile.SoundFile(part, "w", sampling_rate, **settings) as file:
            if comment:
                file.comment = comment
                if path.suffix.lower() == ".wav" and len(comment) > 50_000:
                    warnings.warn(f"{path} takes no comment as long as its settings.")
            # libsndfile's Vorbis encoder crashes on minutes in one call
            for start in range(0, len(audio), 65536):
                block = audio[start : start + 65536]
                file.write(to_int16(block, random) if subtype == "PCM_16" else block)
        if soundfile.info(part).frames < len(audio):  # not every format says so
            raise OSError("the disk is full")
        part.replace(target)
    except (OSError, soundfile.LibsndfileError) as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def demo(model: Encodec, source: Path, target: Path, bandwidth: float | None) -> None:
    """Pass a sound file through the codec."""
    audio = load_audio(source, model.sampling_rate, model.channels)
    chunks = model.encode(audio[None], bandwidth)
    decoded = model.decode(chunks)[0, : len(audio)]
    save_audio(target, decoded, model.sampling_rate)
    frames = sum(codes.shape[1] for codes, _ in chunks)
    K = chunks[0][0].shape[2]
    print(f"{target}: {len(audio) / model.sampling_rate:.2f} s, {frames} x {K} codes")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def warn(message: Warning | str, *_) -> None:
    print(f"encodec.py: warning: {message}", file=sys.stderr)


def main() -> None:
    parser = Parser(description="Pass a sound file through EnCodec.")
    parser.add_argument("source", type=Path, help="sound file to read")
    parser.add_argument("target", type=Path, help="sound file to write")
    parser.add_argument(
        "--model",
        default="32khz",
        help="24khz, 32khz, 48khz, a Hub id or a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth", type=float, help="kbit/s (default: the model's smallest)"
    )
    args = parser.parse_args()
    warnings.showwarning = warn
    logging.set_verbosity_error()  # the Hub's retries; the end result is reported
    try:
        choose_subtype(args.target)
        if args.bandwidth is not None and not args.bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0, got {args.bandwidth}")
    except ValueError as error:
        parser.error(str(error))
    try:
        check_audio_path(args.target)
        model = Encodec.from_pretrained(args.model)
        demo(model, args.source, args.target, args.bandwidth)
    except (OSError, ValueError) as error:
        sys.exit(f"encodec.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
