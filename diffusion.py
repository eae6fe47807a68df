"""Multi-band diffusion: MusicGen's codes -> sound, by another decoder than EnCodec's.

San Roman et al., https://arxiv.org/abs/2308.02560. Four UNets make the sound out of
noise, a band of frequency each, in 20 steps, as the codec's latent states say; the bands
are summed. Then the loudness of 32 bands is brought to that of EnCodec's own decoding.

    model = MultiBandDiffusion.from_pretrained("musicgen")
    audio = model.decode(codes, 0, codec)  # codes (B, T, K), a seed -> (B, N, C)

or `python diffusion.py take.safetensors take.wav`, for codes of generate.py's
--save-codes. Needs bands.py, group_norm.py, matmul_conv.py, encodec.py, encodec_stream.py,
parallel.py and options.py beside it; diffusion_files.py to load what was published, and to
decode a file musicgen.py, settings.py, prompt.py, audio.py and progress.py, with what
these need.
"""

import argparse
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from bands import split_bands
from encodec import Encodec
from encodec_stream import DecodingStream
from group_norm import GroupNorm
from matmul_conv import Conv1d, ConvTranspose1d, StridedConv1d
from options import row_seeds

if TYPE_CHECKING:
    from diffusion_files import Files, Parts

NUM_STEPS = 1000  # of the schedule
STEPS = (*range(999, 0, -50), 0)  # those that are taken; the last is not evaluated
EQ_BANDS = 32
UNTOUCHED = dict(loudness=None, peak=None, fade_in=None, fade_out=0.0)  # by this script
OF_CUTS = ("ending", "loop", "bars", "loop_start", "loop_score", "drop_prompt")
NOT_MADE = (*OF_CUTS, "subtype", "mp3_bitrate")  # by it: it decodes all that there is
RELEASED = dict(musicgen=(32_000, 128))  # rate in Hz, and width of the codec's states
PIECE, OVERLAP = 30.0, 1.0  # seconds that are decoded at once, and that pieces share
ALIGNED = 4  # frames, so that all pieces begin where the published UNets' strides do


@dataclass(frozen=True)
class UNetConfig:
    """Sizes, spelled as in the file; defaults: the published ones."""

    hidden: int = 48
    depth: int = 4
    growth: float = 4
    max_channels: int = 10_000
    kernel: int = 8
    stride: int = 4
    norm_groups: int = 4
    res_blocks: int = 2
    emb_all_layers: bool = True
    codec_dim: int = 128

    @property
    def widths(self) -> list[int]:
        """Channels before each level, of which a sound has one, and behind the last:
        (depth + 1,). Raises ValueError where groups do not divide them."""
        widths, hidden = [1], self.hidden
        for _ in range(self.depth):
            widths.append(hidden)
            hidden = min(int(hidden * self.growth), self.max_channels)
        if any(width % self.norm_groups for width in widths[1:]):
            raise ValueError(
                f"norm_groups must divide {widths[1:]}, got {self.norm_groups}."
            )
        return widths


class ResBlock(nn.Module):
    def __init__(self, channels: int, groups: int, dilation: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = Conv1d(channels, channels, 3, dilation)
        self.norm2 = GroupNorm(groups, channels)
        self.conv2 = Conv1d(channels, channels, 3, dilation)

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
        self._stride = config.stride
        self.conv = StridedConv1d(before, after, config.kernel, config.stride)
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
        self.res_blocks = res_blocks(config, before)
        self.norm = GroupNorm(config.norm_groups, before)
        self.convtr = ConvTranspose1d(before, after, config.kernel, config.stride)

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
        widths = config.widths
        pairs = [*zip(widths, widths[1:])]
        self.encoders = [EncoderLayer(config, a, b) for a, b in pairs]
        self.decoders = [DecoderLayer(config, b, a) for a, b in reversed(pairs)]
        self.embedding = nn.Embedding(NUM_STEPS, config.hidden)
        deeper = widths[2:] if config.emb_all_layers else []
        self.embeddings = [nn.Embedding(NUM_STEPS, width) for width in deeper]
        self.conv_codec = nn.Linear(config.codec_dim, widths[-1])

    def __call__(self, x: mx.array, step: int, condition: mx.array) -> mx.array:
        """The noise (B, N, 1) in x (B, N, 1) at a step of the schedule; the condition is
        (B, T, D). Computed in the weights' dtype, and returned in float32. Raises
        ValueError for another shape or step, a condition of another width, or one that
        is more than twice as long as the deepest level."""
        check_call(x, step)
        check_width(self.width, condition.shape[2])
        N = x.shape[1]
        x, condition = (a.astype(self.conv_codec.weight.dtype) for a in (x, condition))
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
        return z[:, :N].astype(mx.float32)

    @property
    def width(self) -> int:
        """How wide a condition is."""
        return self.conv_codec.weight.shape[1]


def check_width(wanted: int, width: int) -> None:
    """Raise ValueError for a condition of another width."""
    if width != wanted:
        raise ValueError(
            f"The diffusion decodes codes of a codec that is {wanted} wide, not {width}: it "
            "is not this model's."
        )


def check_call(x: mx.array, step: int) -> None:
    """Raise ValueError for what MLX would take, and make something else of."""
    if x.ndim != 3 or x.shape[2] != 1:
        raise ValueError(f"x must be (B, N, 1), got {x.shape}.")
    if not 0 <= step < NUM_STEPS:
        raise ValueError(f"step must be from 0 to {NUM_STEPS - 1}, got {step!r:.40}.")


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
    num_steps: int = NUM_STEPS
    clip: float | None = 5.0
    noise_scale: float = 1.0

    @property
    def remains(self) -> np.ndarray:
        """The share (num_steps,) of the sound's power that is left after each step."""
        ends = [beta ** (1 / self.beta_exp) for beta in (self.beta_t0, self.beta_t1)]
        roots = np.linspace(*ends, self.num_steps, dtype=np.float32)
        kept = np.cumprod(1 - roots ** np.float32(self.beta_exp), dtype=np.float64)
        return kept.astype(np.float32)

    def steps(
        self,
        unet: Callable[[mx.array, int, mx.array], mx.array],
        condition: mx.array,
        noise: Iterable[mx.array],
    ) -> Iterator[mx.array]:
        """A band (B, N, 1), before its processor, out of noise, after each of 20 steps.

        noise: the initial one, then that of each step but the last, (B, N, 1) each.
        """
        drawn, scale, remains = iter(noise), self.noise_scale, self.remains
        x = next(drawn) * scale
        for step, after in zip(STEPS, STEPS[1:]):
            here, there = remains[step], remains[after]
            alpha = here / there
            found = unet(x, step, condition) * scale
            x = x - float((1 - alpha) / np.sqrt(1 - here)) * found
            x = x / float(np.sqrt(alpha))
            if after > 0:
                spread = np.sqrt((1 - there) / (1 - here) * (1 - alpha))
                x = x + float(spread) * next(drawn) * scale
            x = mx.clip(x, -self.clip, self.clip) if self.clip else x
            mx.async_eval(x)
            yield x


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

    def __init__(
        self, files: "Files", keep: bool = False, dtype: mx.Dtype = mx.float32
    ):
        self._files, self._keep, self._dtype = files, keep, dtype
        self._bands: dict[int, Band] = {}
        self.sampling_rate, self.n_bands = files.sampling_rate, files.n_bands

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path = "musicgen",
        keep: bool | None = None,
        dtype: mx.Dtype | None = None,
    ) -> "MultiBandDiffusion":
        """Load "musicgen", a file, a folder with one or a Hub id.

        keep: None is as memory allows. `dtype` is the UNets': by default float32 on the
        CPU, float16 on a GPU. Raises FileNotFoundError, OSError where the Hub does not
        give it, or ValueError for a file that is none.
        """
        from diffusion_files import fits, open_files

        files, on_cpu = open_files(path_or_repo), mx.default_device() == mx.cpu
        dtype = dtype or (mx.float32 if on_cpu else mx.float16)
        return cls(files, fits(files, dtype) if keep is None else keep, dtype)

    def band(self, number: int) -> Band:
        """One of the bands, by its number. Raises ValueError for what is none."""
        if not 0 <= number < self.n_bands:
            raise ValueError(
                f"band must be from 0 to {self.n_bands - 1}, got {number!r:.40}."
            )
        if number not in self._bands:
            self.forget()
            self._bands[number] = self._files.read(number, self._build)
        return self._bands[number]

    def _build(self, parts: "Parts") -> Band:
        unet = UNet(UNetConfig(**parts.sizes))
        load(unet, parts.weights, self._dtype)
        mx.eval(unet.parameters())  # so that what is cast goes
        processor = lambda x: x  # noqa: E731
        if parts.processor:
            processor = Processor(self.sampling_rate, *parts.processor)
        return Band(unet, Schedule(**parts.schedule), processor)

    @functools.cached_property
    def width(self) -> int:
        """How wide a condition is. Reads a band, the first time."""
        width = self.unet(0).width
        self.forget()
        return width

    def forget(self) -> None:
        """Give the memory of the bands back, unless they are to be kept."""
        if not self._keep:
            self._bands.clear()
            mx.clear_cache()

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

        noise: of each band the initial one and those of 19 steps, (B, N, 1) each; raises
        ValueError for fewer or more.
        """
        steps = len(STEPS) - 1
        if [len(one) for one in noise] != [steps] * self.n_bands:
            raise ValueError(f"noise must be {steps} of each of {self.n_bands} bands.")
        total = mx.array(0.0)
        for number in range(self.n_bands):
            unet, schedule, processor = self.band(number)
            *_, made = schedule.steps(unet, condition, noise[number])
            total = total + processor(made)
            mx.eval(total)
        return total

    def re_eq(self, sound: mx.array, reference: mx.array) -> mx.array:
        """The sound (B, N, 1) with each of 32 bands as loud as the reference's
        (B, N, 1), over all rows together. A band without any sound stays silent."""
        out = mx.zeros_like(reference)
        bands, wanted = (
            split_bands(x, self.sampling_rate, EQ_BANDS) for x in (sound, reference)
        )
        for band, own in zip(bands, wanted):
            there = spread(band)
            out = out + band * (spread(own) / there if there > 0 else 0.0)
            mx.eval(out)
        return out

    def decode(
        self,
        codes: mx.array,
        seed: int | list[int],
        codec: Encodec,
        channels: int = 1,
    ) -> mx.array:
        """Sound (B, N, C) of codes (B, T, K), by the codec that made them. Row i is of
        seed + i, or of the i-th of a list, whatever the others are. Stereo codes are two
        rows of a mono codec, as MusicGen's.

        Raises ValueError for a codec of another rate or width, or another number of
        seeds.
        """
        decoding = Decoding(self, codes, seed, codec, channels)
        for _ in decoding:
            pass
        return decoding.audio


def spread(x: mx.array) -> float:
    """The standard deviation of all samples. In float64, for the sums of MLX's CPU back
    end lose digits: of 30 s the result was wrong by 3e-4."""
    return float(np.std(np.array(x), ddof=1, dtype=np.float64))


def load(unet: UNet, weights: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Load weights of a file. Raises ValueError naming a tensor that is missing, of
    another shape, or not known."""
    wanted = {name: array.shape for name, array in tree_flatten(unet.parameters())}
    for name in sorted(wanted.keys() ^ weights.keys()):
        what = "lacks the" if name in wanted else "has the unknown"
        raise ValueError(f"it {what} tensor {name:.120}.")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{name:.120} must be of shape {shape}, got {weights[name].shape}."
            )
    unet.load_weights([(k, mx.contiguous(w.astype(dtype))) for k, w in weights.items()])


class Decoding:
    """Sound on its way: iterate, a step of a UNet at a time, then take `audio`
    (B, N, C), which is None until then. Arguments are those of `decode`.

    One band after the other is made, of all rows. More than 30 s are made in pieces that
    are alike in length, and overlap by a second.
    """

    def __init__(
        self,
        model: MultiBandDiffusion,
        codes: mx.array,
        seed: int | list[int],
        codec: Encodec,
        channels: int = 1,
    ):
        check_rate(model, codec)
        self._model, self._codec, (B, T, K) = model, codec, codes.shape
        self._seeds = row_seeds([] if seed is None else seed, B)  # None would be any
        rows = codes.reshape(B, T, K // channels, channels)
        self._rows = rows.transpose(0, 3, 1, 2)  # (B, C, T, K'), each a batch of C
        sizes = (int(seconds * codec.config.frame_rate) for seconds in (PIECE, OVERLAP))
        self._pieces = cut(T, *sizes)
        self.seconds = B * T / codec.config.frame_rate
        self.step, steps = 0, len(STEPS) - 1
        self.total = B * model.n_bands * len(self._pieces) * steps
        self.audio: mx.array | None = None

    def __iter__(self) -> Iterator["Decoding"]:
        model, codec = self._model, self._codec
        wanted = [DecodingStream(codec).push(row, last=True) for row in self._rows]
        sums = [mx.zeros_like(sound) for sound in wanted]
        for number in range(model.n_bands):
            band = model.band(number)
            for i, row in enumerate(self._rows):
                made = []
                for x, last in self._steps(band, row, self._keys(i, number)):
                    made += [x] if last else []
                    self.step += 1
                    yield self
                starts = [a * codec.config.hop_length for a, _ in self._pieces]
                sums[i] = sums[i] + band.processor(join(made, starts))
                mx.eval(sums[i])
        pairs = zip(sums, wanted)
        self.audio = mx.stack([model.re_eq(*pair)[..., 0].T for pair in pairs])

    def _keys(self, row: int, number: int) -> mx.array:
        """Of the noises of a row's band: (20, 2)."""
        steps = len(STEPS) - 1
        keys = mx.random.split(mx.random.key(self._seeds[row]), self._model.n_bands)
        return mx.random.split(keys[number], steps)

    def _steps(
        self, band: Band, row: mx.array, keys: mx.array
    ) -> Iterator[tuple[mx.array, bool]]:
        """A band of each piece (C, n, 1) of a row (C, T, K) after each step, and whether
        that was the last one."""
        hop, (C, T, _) = self._codec.config.hop_length, row.shape
        condition, shape = self._codec.quantizer.decode(row), (C, T * hop, 1)
        for a, b in self._pieces:
            # of the whole take, so that pieces share the noises where they overlap
            noises = (mx.random.normal(shape, key=key) for key in keys)
            noise = (one[:, a * hop : b * hop] for one in noises)
            steps = band.schedule.steps(band.unet, condition[:, a:b], noise)
            for i, x in enumerate(steps, 1):
                yield x, i == len(STEPS) - 1


def check_rate(model: MultiBandDiffusion, codec: Encodec) -> None:
    """Raise ValueError for a codec of another rate."""
    if codec.sampling_rate != model.sampling_rate:
        raise ValueError(
            f"The diffusion decodes what a codec of {model.sampling_rate} Hz made, not "
            f"one of {codec.sampling_rate} Hz."
        )


def check_released(name: str | Path, codec: Encodec) -> None:
    """Raise ValueError where a released decoder is named that does not decode what the
    codec made: before it is downloaded."""
    found = codec.sampling_rate, codec.config.hidden_size
    wanted = RELEASED.get(str(name), found)
    if wanted != found:
        told = "The released diffusion decodes codes of MusicGen's codec (%d Hz, %d wide), "
        told += "not of this model's (%d Hz, %d wide)."
        raise ValueError(told % (*wanted, *found))


def check_codec(model: MultiBandDiffusion, codec: Encodec) -> None:
    """Raise ValueError for a codec of another rate or width."""
    check_rate(model, codec)
    check_width(model.width, codec.config.hidden_size)


def cut(frames: int, piece: int, overlap: int) -> list[tuple[int, int]]:
    """First frames and ends of pieces, as few as can be and about alike in length, which
    share an overlap with the next."""
    count = max(math.ceil((frames - overlap) / (piece - overlap)), 1)
    step = math.ceil((frames - overlap) / count / ALIGNED) * ALIGNED
    return [(i * step, min((i + 1) * step + overlap, frames)) for i in range(count)]


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


def run(args: argparse.Namespace) -> None:
    """Decode one file."""
    import settings
    from audio import check_output, save_audio
    from outputs import check_apart, print_out
    from progress import Progress

    codes, record = settings.load_codes(args.codes)
    check_output(args.output, args.codes, args.force)
    check_apart(args.output, {"decoder": args.decoder})
    name, seed = args.model or record.get("model"), args.seed
    if name is None:
        raise ValueError(f"{args.codes} names no model that made it: give --model.")
    codec, channels = read_codec(str(name), codes)
    if seed is None and (seed := record.get("seed")) is None:
        seed = 0
    row_seeds([seed], rows=1)
    check_released(args.decoder, codec)
    model = MultiBandDiffusion.from_pretrained(args.decoder)
    with Progress() as progress:
        decoding = Decoding(model, codes, [seed], codec, channels)
        progress.begin("decoding", decoding.seconds)
        for step in decoding:
            progress.to(step.seconds * step.step / step.total)
    told = {key: value for key, value in record.items() if key not in NOT_MADE}
    decoder = "diffusion" if args.decoder in RELEASED else args.decoder  # as of a job
    told |= dict(decoder=decoder, seed=seed) | UNTOUCHED
    comment = settings.to_comment(told)
    audio, rate = decoding.audio[0], model.sampling_rate
    save_audio(args.output, audio, rate, comment, overwrite=args.force)
    print_out(f"{args.output}: {len(audio) / rate:.2f} s")


def read_codec(name: str, codes: mx.array) -> tuple[Encodec, int]:
    """The codec of a model, and of how many channels codes (1, T, K) of it are."""
    from musicgen import MusicGen
    from prompt import check_codes

    model = MusicGen.from_pretrained(name, lazy=True)  # its decoder is not read
    check_codes(model, codes)
    return model.audio_encoder, model.channels


def warn(message: Warning | str, *_) -> None:
    from messages import one_line

    print(f"diffusion.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    from messages import one_line

    parser = argparse.ArgumentParser(
        prog="diffusion.py",
        description="Decode a take's codes by multi-band diffusion.",
    )
    add = parser.add_argument
    add("codes", type=Path, help="file of generate.py --save-codes, a .safetensors")
    add("output", type=Path, help="sound file to write")
    weights = "musicgen, a file, a folder or a Hub id (default: %(default)s)"
    add("--decoder", default="musicgen", help=weights)
    add("--model", help="whose codec made the codes (default: the take's own model)")
    add("--seed", type=int, help="of the noise (default: the take's own)")
    add("--force", action="store_true", help="overwrite what is there")
    warnings.showwarning = warn
    os.environ["HF_HUB_VERBOSITY"] = "error"  # no retries; the end result is reported
    try:
        run(parser.parse_args())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"diffusion.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
