"""EnCodec: codes <-> samples.

The neural codec of Défossez et al. (https://arxiv.org/abs/2210.13438): 24 kHz mono
(causal), 32 kHz mono (MusicGen's) and 48 kHz stereo (normalised, in chunks). Stands
alone; encodec_files.py, strict.py and limits.py are needed for published weights,
hub.py to fetch, group_norm.py at 48 kHz; audio.py, resample.py, outputs.py for sounds.

    model = Encodec.from_pretrained("32khz")
    chunks = model.encode(audio)  # (B, N, C) at model.sampling_rate
    audio = model.decode(chunks)

or `python encodec.py in.wav out.wav --model 48khz --bandwidth 6`.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

if sys.platform == "darwin":  # where an M5 rounds the factors of float32 products
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at the first of them

import mlx.core as mx
import mlx.nn as nn


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
        """Take the known keys. Raises ValueError when one is missing."""
        names = {field.name for field in fields(cls)}
        if missing := names - config.keys():
            listed = ", ".join(sorted(missing))
            raise ValueError(f"The codec's config must have {listed}.")
        values = {name: config[name] for name in names}
        for name in ("upsampling_ratios", "target_bandwidths"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        return cls(**values)

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return math.ceil(self.sampling_rate / self.hop_length)

    def num_codebooks(self, bandwidth: float | None = None) -> int:
        """Codebooks at `bandwidth` kbit/s; without one, all there are."""
        bits = math.ceil(math.log2(self.codebook_size)) * self.frame_rate
        bandwidth = bandwidth or self.target_bandwidths[-1]
        # Guard against 1000 * 2.2 and the like falling short of a whole number.
        return max(1, math.floor(1000 * bandwidth / bits + 1e-6))


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
    from group_norm import GroupNorm

    return GroupNorm(1, channels)


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


class LSTM(nn.Module):
    """Stacked LSTM over time with a skip connection around the whole stack."""

    def __init__(self, config: EncodecConfig, channels: int):
        super().__init__()
        self.lstm = [nn.LSTM(channels, channels) for _ in range(config.num_lstm_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        hidden = x
        for layer in self.lstm:
            hidden, _ = layer(hidden)
        return hidden + x


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


def residual_blocks(config: EncodecConfig, channels: int) -> list[nn.Module]:
    return [
        ResnetBlock(config, channels, config.dilation_growth_rate**i)
        for i in range(config.num_residual_layers)
    ]


def build_encoder(config: EncodecConfig) -> nn.Sequential:
    """SEANet encoder: samples (B, N, C) -> embeddings (B, T, hidden_size)."""
    width = config.num_filters
    layers = [Conv1d(config, config.audio_channels, width, config.kernel_size)]
    for ratio in reversed(config.upsampling_ratios):
        layers += residual_blocks(config, width)
        layers += [nn.ELU(), Conv1d(config, width, 2 * width, 2 * ratio, ratio)]
        width *= 2
    layers += [LSTM(config, width), nn.ELU()]
    layers += [Conv1d(config, width, config.hidden_size, config.last_kernel_size)]
    return nn.Sequential(*layers)


def build_decoder(config: EncodecConfig) -> nn.Sequential:
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
    return nn.Sequential(*layers)


class Codebook(nn.Module):
    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.embed = mx.random.normal((config.codebook_size, config.hidden_size))


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
            codes.append(nearest(x, layer.codebook.embed))
            x = x - layer.codebook.embed[codes[-1]]
        return mx.stack(codes, axis=-1)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes (B, T, K) -> embeddings (B, T, D). Raises ValueError for what are none:
        MLX would read whatever lies beyond a codebook."""
        K, entries = len(self.layers), len(self.layers[0].codebook.embed)
        whole = isinstance(codes, mx.array) and mx.issubdtype(codes.dtype, mx.integer)
        fits = whole and codes.ndim == 3 and 1 <= codes.shape[2] <= K
        if not fits or codes.size and not 0 <= codes.min() <= codes.max() < entries:
            kind = f"an mx.array (B, T, K <= {K}) of integers from 0 to {entries - 1}"
            raise ValueError(f"codes must be {kind}, got {type(codes).__name__}.")
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

    @property
    def chunk_sizes(self) -> tuple[int, int] | None:
        """Samples of a chunk, and from one's start to the next's; None: one piece."""
        config = self.config
        if config.chunk_length_s is None:
            return None
        length = int(config.chunk_length_s * config.sampling_rate)
        return length, max(1, int((1 - (config.overlap or 0)) * length))

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
        K, N = config.num_codebooks(bandwidth), audio.shape[1]
        length, stride = self.chunk_sizes or (N, N)
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
        _, stride = self.chunk_sizes
        return overlap_add(pieces, stride)

    def decode_chunk(self, codes: mx.array, scale: mx.array | None = None) -> mx.array:
        """Audio (B, T * hop_length, C) of codes (B, T, K).

        encodec_stream.py does the same in pieces, in less memory.
        """
        audio = self.decoder(self.quantizer.decode(codes))
        return audio if scale is None else audio * scale

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path) -> "Encodec":
        """Load "24khz", "32khz", "48khz", a Hub id or a folder of any layout, in float32.
        Raises ValueError or OSError naming the file and what is wrong with it.
        """
        from encodec_files import load

        return load(cls, EncodecConfig, path_or_repo)


def by_channel(
    decode: Callable[[mx.array], mx.array], codes: mx.array, channels: int
) -> mx.array:
    """Samples (B, N, C) of codes (B, T, K) of which every C-th codebook is a channel's,
    by a mono codec: stereo is two runs of it, left and right."""
    (B, T, K), C = codes.shape, channels
    codes = codes.reshape(B, T, K // C, C).transpose(0, 3, 1, 2)
    audio = decode(codes.reshape(B * C, T, K // C))
    audio = audio.reshape(B, C, audio.shape[1]).swapaxes(1, 2)  # (B, N, C)
    mx.async_eval(audio)  # here, for what is lazy belongs to this thread
    return audio


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


def main() -> None:
    import encodec_files

    encodec_files.main(Encodec)


if __name__ == "__main__":
    main()
