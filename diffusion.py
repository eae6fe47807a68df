"""Multi-band diffusion: MusicGen's codes -> sound, by another decoder than EnCodec's.

San Roman et al., https://arxiv.org/abs/2308.02560. Four UNets make the sound out of
noise, a band of frequency each, in 20 steps, as the codec's latent states say; the bands
are summed. Then the loudness of 32 bands is brought to that of EnCodec's own decoding.

    model = MultiBandDiffusion.from_pretrained("musicgen")
    audio = model.decode(codes, codec, seed=0)  # codes (B, T, K) -> (B, N, C)

or `python diffusion.py take.safetensors take.wav`. Needs bands.py, group_norm.py and
encodec.py beside it; diffusion_files.py, torch_file.py, strict.py and hub.py to load what was published,
and for a take's codes musicgen.py, settings.py, audio.py and what these need.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bands import split_bands
from encodec import Encodec
from group_norm import GroupNorm

if TYPE_CHECKING:
    from diffusion_files import Files

STEPS = (*range(999, 0, -50), 0)  # of the schedule's 1000; the last is not evaluated
EQ_BANDS = 32
PIECE, OVERLAP = 30.0, 1.0  # seconds that are decoded at once, and that pieces share


@dataclass(frozen=True)
class UNetConfig:
    """Sizes, spelled as in the file; defaults: the published ones."""

    channels: int = 1
    hidden: int = 48
    depth: int = 4
    growth: float = 4
    max_channels: int = 10_000
    num_steps: int = 1000
    kernel: int = 8
    stride: int = 4
    norm_groups: int = 4
    res_blocks: int = 2
    emb_all_layers: bool = True
    codec_dim: int = 128

    @property
    def widths(self) -> list[int]:
        """Channels before each level, and behind the last: (depth + 1,)."""
        widths, hidden = [self.channels], self.hidden
        for _ in range(self.depth):
            widths.append(hidden)
            hidden = min(int(hidden * self.growth), self.max_channels)
        return widths


class ResBlock(nn.Module):
    def __init__(self, channels: int, groups: int, dilation: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        pad = dict(padding=dilation, dilation=dilation)
        self.conv1 = nn.Conv1d(channels, channels, 3, **pad)
        self.norm2 = GroupNorm(groups, channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, **pad)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(nn.relu(self.norm1(x)))
        return x + self.conv2(nn.relu(self.norm2(h)))


def res_blocks(config: UNetConfig, channels: int) -> list[ResBlock]:
    groups = config.norm_groups
    return [ResBlock(channels, groups, 2**i) for i in range(config.res_blocks)]


class EncoderLayer(nn.Module):
    """(B, N, C) -> (B, ceil(N / stride), more channels)."""

    def __init__(self, config: UNetConfig, before: int, after: int):
        super().__init__()
        kernel, self._stride = config.kernel, config.stride
        sizes = dict(stride=config.stride, padding=(kernel - config.stride) // 2)
        self.conv = nn.Conv1d(before, after, kernel, **sizes, bias=False)
        self.norm = GroupNorm(config.norm_groups, after)
        self.res_blocks = res_blocks(config, after)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.pad(x, [(0, 0), (0, -x.shape[1] % self._stride), (0, 0)])
        x = nn.relu(self.norm(self.conv(x)))
        for block in self.res_blocks:
            x = block(x)
        return x


class DecoderLayer(nn.Module):
    """(B, N, C) -> (B, N * stride, fewer channels)."""

    def __init__(self, config: UNetConfig, before: int, after: int):
        super().__init__()
        kernel, stride = config.kernel, config.stride
        sizes = dict(stride=stride, padding=(kernel - stride) // 2)
        self.res_blocks = res_blocks(config, before)
        self.norm = GroupNorm(config.norm_groups, before)
        self.convtr = nn.ConvTranspose1d(before, after, kernel, **sizes, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.res_blocks:
            x = block(x)
        return self.convtr(nn.relu(self.norm(x)))


class UNet(nn.Module):
    """Tells the noise in a sound, under a condition.

    Each level of the way down is remembered, and added on the way up. The condition is
    added to the deepest, from which the way up begins.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths, steps = config.widths, config.num_steps
        pairs = [*zip(widths, widths[1:])]
        self.encoders = [EncoderLayer(config, a, b) for a, b in pairs]
        self.decoders = [DecoderLayer(config, b, a) for a, b in reversed(pairs)]
        self.embedding = nn.Embedding(steps, config.hidden)
        deeper = widths[2:] if config.emb_all_layers else []
        self.embeddings = [nn.Embedding(steps, width) for width in deeper]
        self.conv_codec = nn.Conv1d(config.codec_dim, widths[-1], 1)

    def __call__(self, x: mx.array, step: int, condition: mx.array) -> mx.array:
        """The noise (B, N, C) in x (B, N, C) at a step of the schedule; the condition is
        (B, T, D). Raises ValueError for one that is more than twice as long as the
        deepest level."""
        levels, z = [], x
        tables = [self.embedding, *self.embeddings]
        for i, encoder in enumerate(self.encoders):
            z = encoder(z)
            z = z + tables[i].weight[step] if i < len(tables) else z
            levels.append(z)
        levels[-1] = z + stretch(self.conv_codec(condition), z.shape[1])
        z = mx.zeros_like(z)
        for decoder in self.decoders:
            level = levels.pop()
            z = decoder(z[:, : level.shape[1]] + level)
        return z[:, : x.shape[1]]


def stretch(x: mx.array, length: int) -> mx.array:
    """The nearest of (B, T, D) for each of so many places: (B, length, D)."""
    T = x.shape[1]
    if T > 2 * length:
        raise ValueError(
            f"The condition must have at most {2 * length} frames for this sound, got {T}."
        )
    scale = np.float32(T) / np.float32(length)
    places = np.floor(np.arange(length, dtype=np.float32) * scale).astype(np.int32)
    return x[:, mx.array(np.minimum(places, T - 1))]


@dataclass(frozen=True)
class Schedule:
    """How much noise there is at each of 1000 steps, spelled as in the file."""

    beta_t0: float
    beta_t1: float
    beta_exp: float
    num_steps: int = 1000
    clip: float = 5.0
    noise_scale: float = 1.0

    @property
    def remains(self) -> np.ndarray:
        """The share (num_steps,) of the sound's power that is left after each step."""
        ends = [beta ** (1 / self.beta_exp) for beta in (self.beta_t0, self.beta_t1)]
        roots = np.linspace(*ends, self.num_steps, dtype=np.float32)
        return np.cumprod(1 - roots ** np.float32(self.beta_exp), dtype=np.float32)

    def sample(
        self,
        unet: Callable[[mx.array, int, mx.array], mx.array],
        condition: mx.array,
        noise: Sequence[mx.array],
    ) -> mx.array:
        """A band (B, N, 1), before its processor, out of noise: the initial one, then
        that of each step but the last, (B, N, 1) each."""
        scale, remains = self.noise_scale, self.remains
        x = noise[0] * scale
        for i, (step, after) in enumerate(zip(STEPS, STEPS[1:])):
            here, there = remains[step], remains[after]
            alpha = here / there
            found = unet(x, step, condition) * scale
            x = (x - float((1 - alpha) / np.sqrt(1 - here)) * found) / float(
                np.sqrt(alpha)
            )
            if after > 0:
                spread = np.sqrt((1 - there) / (1 - here) * (1 - alpha))
                x = x + float(spread) * noise[i + 1] * scale
            x = mx.clip(x, -self.clip, self.clip) if self.clip else x
            mx.async_eval(x)
        return x


class Processor(NamedTuple):
    """The way back from a band as the UNet knows it, whose own bands are as loud as
    those of noise, to the sound."""

    sampling_rate: int
    mean: mx.array  # (n,) of each band
    gain: mx.array  # (n,)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, 1) -> (B, N, 1)."""
        bands = split_bands(x, self.sampling_rate, len(self.gain))
        shape = (-1, 1, 1, 1)
        return (bands * self.gain.reshape(shape) + self.mean.reshape(shape)).sum(axis=0)


class Band(NamedTuple):
    """What makes one band."""

    unet: UNet
    schedule: Schedule
    processor: Callable[[mx.array], mx.array]


class MultiBandDiffusion:
    """The decoder. `files` reads its bands when they are wanted.

    keep: whether bands stay in memory; else one does at a time.
    """

    def __init__(self, files: "Files", keep: bool = False):
        self._files, self._keep, self._bands = files, keep, {}
        self.sampling_rate, self.n_bands = files.sampling_rate, files.n_bands

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path = "musicgen", keep: bool | None = None
    ) -> "MultiBandDiffusion":
        """Load "musicgen", a file, a folder with one or a Hub id.

        keep: None is as memory allows. Raises FileNotFoundError, OSError where the Hub
        does not give it, or ValueError for a file that is none.
        """
        from diffusion_files import fits, open_files

        files = open_files(path_or_repo)
        return cls(files, fits(files) if keep is None else keep)

    def band(self, number: int) -> Band:
        """One of the bands, 0 being the lowest. Raises ValueError for what is none."""
        if not 0 <= number < self.n_bands:
            raise ValueError(
                f"band must be from 0 to {self.n_bands - 1}, got {number!r:.40}."
            )
        if number not in self._bands:
            if not self._keep:
                self._bands.clear()
                mx.clear_cache()
            self._bands[number] = self._files.read(number)
        return self._bands[number]

    def unet(self, band: int) -> UNet:
        """Call it with x (B, N, 1), a step and a condition (B, T, D) for the noise."""
        return self.band(band).unet

    def processor(self, band: int) -> Callable[[mx.array], mx.array]:
        """The sample's way back, (B, N, 1) -> (B, N, 1)."""
        return self.band(band).processor

    def sample(
        self, condition: mx.array, noise: Sequence[Sequence[mx.array]]
    ) -> mx.array:
        """Sound (B, N, 1) before `re_eq`, under a condition (B, T, D).

        noise: of each band the initial one and those of 19 steps, (B, N, 1) each.
        """
        total = mx.array(0.0)
        for number in range(self.n_bands):
            unet, schedule, processor = self.band(number)
            made = schedule.sample(unet, condition, noise[number])
            total = total + processor(made)
            mx.eval(total)
        return total

    def re_eq(self, sound: mx.array, reference: mx.array) -> mx.array:
        """The sound (B, N, 1) with each of 32 bands as loud as the reference's
        (B, N, 1), over all rows together."""
        out = mx.zeros_like(reference)
        bands, wanted = (
            split_bands(x, self.sampling_rate, EQ_BANDS) for x in (sound, reference)
        )
        for band, own in zip(bands, wanted):
            out = out + band * (mx.std(own, ddof=1) / mx.std(band, ddof=1))
        return out

    def decode(
        self, codes: mx.array, codec: Encodec, seed: int = 0, channels: int = 1
    ) -> mx.array:
        """Sound (B, N, C) of codes (B, T, K), by the codec that made them; row i draws
        from seed + i. Stereo codes are two rows of a mono codec, as MusicGen's.

        Raises ValueError for a codec of another rate.
        """
        if codec.sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The codec must have {self.sampling_rate} Hz, got {codec.sampling_rate}."
            )
        rows = [
            self._decode(one, codec, seed + i, channels) for i, one in enumerate(codes)
        ]
        return mx.stack(rows)

    def _decode(
        self, codes: mx.array, codec: Encodec, seed: int, channels: int
    ) -> mx.array:
        """The same of one take, (T, K) -> (N, C)."""
        T, K = codes.shape
        rows = codes.reshape(T, K // channels, channels).transpose(
            2, 0, 1
        )  # (C, T, K')
        reference = codec.decode_chunk(rows)
        condition = codec.quantizer.decode(rows)
        keys = mx.random.split(mx.random.key(seed), self.n_bands)
        shape = (len(STEPS) - 1, *reference.shape)
        hop, total = codec.config.hop_length, mx.zeros_like(reference)
        pieces = cut(T, *(int(s * codec.config.frame_rate) for s in (PIECE, OVERLAP)))
        for number in range(self.n_bands):  # one after the other is in memory
            unet, schedule, processor = self.band(number)
            noise = mx.random.normal(shape, key=keys[number])
            made = [
                schedule.sample(unet, condition[:, a:b], noise[:, :, a * hop : b * hop])
                for a, b in pieces
            ]
            total = total + processor(join(made, [a * hop for a, _ in pieces]))
            mx.eval(total)
        return self.re_eq(total, reference)[..., 0].T


def cut(frames: int, piece: int, overlap: int) -> list[tuple[int, int]]:
    """First frames and ends of pieces, which share an overlap with the next."""
    starts = range(0, max(frames - overlap, 1), piece - overlap)
    return [(start, min(start + piece, frames)) for start in starts]


def join(pieces: list[mx.array], starts: list[int]) -> mx.array:
    """Pieces (B, n, 1) that begin at these samples as one; where two overlap, the one
    goes over into the other."""
    sound = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:]):
        both = sound.shape[1] - start
        rise = ((mx.arange(both) + 0.5) / both)[:, None]
        # The noises of both are the same, so their sounds are alike and levels add.
        mixed = sound[:, start:] * (1 - rise) + piece[:, :both] * rise
        sound = mx.concatenate([sound[:, :start], mixed, piece[:, both:]], axis=1)
    return sound


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode a take by diffusion.")
    parser.add_argument("codes", type=Path, help="a file of generate.py --save-codes")
    parser.add_argument("output", type=Path, help="sound file to write")
    parser.add_argument("--decoder", default="musicgen", help="file, folder or Hub id")
    parser.add_argument("--model", help="whose codec (default: the take's own)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    from audio import save_audio
    from musicgen import MusicGen
    from settings import load_codes, to_comment

    try:
        codes, record = load_codes(args.codes)
        codec_of = MusicGen.from_pretrained(args.model or record["model"])
        model = MultiBandDiffusion.from_pretrained(args.decoder)
        how = (codec_of.audio_encoder, args.seed, codec_of.channels)
        audio = model.decode(codes, *how)[0]
        told = record | dict(decoder="diffusion", decoder_seed=args.seed)
        save_audio(args.output, audio, model.sampling_rate, to_comment(told))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"diffusion.py: error: {error}")


if __name__ == "__main__":
    main()
