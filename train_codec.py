"""Train a small codec: sound -> codes -> sound, as near as four codebooks allow.

The first part of `train.py synth`: a small EnCodec (https://arxiv.org/abs/2210.13438),
trained on the clips of synth.py. The loss compares waveforms and spectra; there is no
discriminator. The codebooks have no gradient: their entries move to the means of the
vectors that choose them. Needs training.py, synth.py, encodec.py, audio.py, settings.py,
resample.py, outputs.py, progress.py, messages.py and strict.py beside it.
"""

import argparse
import functools
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

import synth
from audio import save_audio
from encodec import Encodec, EncodecConfig, TransposedKernel, nearest
from settings import save_arrays
from training import Training, check_new, counted

if TYPE_CHECKING:
    from musicgen import MusicGen

CODEC = EncodecConfig(
    target_bandwidths=(1.8,),  # 4 codebooks of 512
    codebook_size=512,
    hidden_size=64,
    num_filters=12,
    num_lstm_layers=0,
    pad_mode="constant",
)
# Of those that learn to write its codes, see train.py and train_magnet.py:
WITHOUT_TEXT = 0.15  # share of rows without text: guidance needs both kinds
MISHEARD = 0.05  # share of traits that a caption guesses: guidance makes up for them
STFT_SIZES = (2048, 512, 128)  # samples
CODEC_FILE = "codec.safetensors"


@mx.custom_function
def elu(x: mx.array) -> mx.array:
    """`nn.elu` with a gradient that is finite everywhere.

    That of `nn.elu` is NaN where x is large, because its exp overflows.
    """
    return nn.elu(x)


@elu.vjp
@mx.compile
def elu_vjp(x: mx.array, slope: mx.array, y: mx.array) -> mx.array:
    return mx.where(y > 0, slope, slope * (y + 1))


class ELU(nn.Module):
    """The activation that a codec is trained with."""

    def __call__(self, x: mx.array) -> mx.array:
        return elu(x)


def with_gradients(codec: Encodec) -> Encodec:
    """Give the codec an ELU that it can be trained with."""

    def replace(module: nn.Module) -> nn.Module:
        return ELU() if isinstance(module, nn.ELU) else module

    leaves = tree_map(replace, codec.leaf_modules(), is_leaf=nn.Module.is_module)
    codec.update_modules(leaves)
    return codec


def codec_loss(codec: Encodec, state: dict, audio: mx.array) -> tuple:
    """Loss of a codec on audio (B, N): the total, its parts (3,), and the new state.

    `state` holds the codebooks, as `first_codebooks` makes them.
    """
    x = codec.encoder(audio[..., None])  # (B, T, D)
    vectors = mx.stop_gradient(x).reshape(-1, x.shape[-1])  # (B T, D)
    codebooks = [state[f"entries.{k}"] for k in range(CODEC.num_codebooks())]
    quantized, residuals, codes = quantize(vectors, codebooks)
    *keys, next_key = mx.random.split(state["key"], len(codebooks) + 1)
    new_state = {"key": next_key}
    for k, entries in enumerate(codebooks):
        old = {name: state[f"{name}.{k}"] for name in ("counts", "sums")}
        entries, new = follow(entries, old, residuals[k], codes[k], keys[k])
        new_state |= {f"entries.{k}": entries}
        new_state |= {f"{name}.{k}": value for name, value in new.items()}
    quantized = quantized.reshape(x.shape)
    commitment = ((x - quantized) ** 2).mean()
    # Straight through: the decoder sees the quantized x, its gradient goes on to x.
    straight = x + mx.stop_gradient(quantized - x)
    output = codec.decoder(straight)[..., 0]
    time_loss = mx.abs(output - audio).mean() / mx.abs(audio).mean()
    stft = stft_distance(output, audio)
    total = time_loss + stft + 0.25 * commitment
    losses = mx.stack([time_loss, stft, commitment])
    return total, losses, {k: mx.stop_gradient(v) for k, v in new_state.items()}


def spectra(audio: mx.array, size: int) -> mx.array:
    """Magnitudes (B, T, size / 2 + 1) of audio (B, N), in frames a quarter apart."""
    hop = size // 4
    blocks = audio[:, : audio.shape[1] // hop * hop].reshape(len(audio), -1, hop)
    T = blocks.shape[1] - 3
    frames = mx.concatenate([blocks[:, i : i + T] for i in range(4)], axis=-1)
    window = 0.5 - 0.5 * mx.cos(mx.arange(size) * (2 * np.pi / size))
    spectrum = mx.fft.rfft(frames * (window / size**0.5))
    # The constant keeps the gradient of the root finite in silence.
    return mx.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-6)


def stft_distance(output: mx.array, target: mx.array) -> mx.array:
    """Distance between the spectra of two sounds (B, N), averaged over STFT_SIZES.

    Each is the L1 distance of the magnitudes, relative to those of the target, plus
    half of the L1 distance of their logarithms.
    """
    total = 0
    for size in STFT_SIZES:
        a, b = spectra(output, size), spectra(target, size)
        total = total + mx.abs(a - b).mean() / b.mean()
        total = total + 0.5 * mx.abs(mx.log(a) - mx.log(b)).mean()
    return total / len(STFT_SIZES)


def quantize(x: mx.array, codebooks: list[mx.array]) -> tuple[mx.array, list, list]:
    """Residual vector quantization of vectors (M, D): their quantized values (M, D),
    and for each codebook its inputs (M, D) and codes (M,)."""
    rest, residuals, codes = x, [], []
    for entries in codebooks:
        residuals.append(rest)
        codes.append(nearest(rest, entries))
        rest = rest - entries[codes[-1]]
    return x - rest, residuals, codes


def follow(
    entries: mx.array,
    state: dict[str, mx.array],
    vectors: mx.array,
    codes: mx.array,
    key: mx.array,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Move the entries (V, D) of a codebook to the vectors (M, D) that chose them.

    `codes` (M,) say which entry each vector chose. An entry becomes the moving average
    of its vectors; one that hardly any vector chose is dead, and becomes a vector drawn
    by the random key. Returns the entries, and the state: each entry's moving count
    "counts" (V,), and sum of vectors "sums" (V, D).
    """
    V, D = entries.shape
    counts = mx.zeros(V).at[codes].add(mx.ones(len(codes)))
    sums = mx.zeros((V, D)).at[codes].add(vectors)
    counts = 0.99 * state["counts"] + 0.01 * counts
    sums = 0.99 * state["sums"] + 0.01 * sums
    means = sums / mx.maximum(counts, 1e-5)[:, None]
    dead = (counts < 0.02)[:, None]
    others = vectors[mx.random.randint(0, len(vectors), (V,), key=key)]
    entries = mx.where(dead, others, means)
    counts = mx.where(dead[:, 0], 0.2, counts)
    return entries, dict(counts=counts, sums=entries * counts[:, None])


def start_even(codec: Encodec) -> None:
    """Draw initial weights through which a signal keeps its level.

    The last layer is scaled down, so that the first outputs are quiet.
    """
    for _, module in codec.named_modules():
        if isinstance(module, (nn.Conv1d, TransposedKernel)):
            shape = module.weight.shape
            taps = 2 if isinstance(module, TransposedKernel) else shape[1]
            bound = (3 / (taps * shape[-1])) ** 0.5
            module.weight = mx.random.uniform(-bound, bound, shape)
    last = codec.decoder.layers[-1].conv
    last.weight = 0.1 * last.weight


def first_codebooks(key: mx.array) -> dict[str, mx.array]:
    """The state before the first step, by a random key: the next "key", and for each
    codebook k "entries.k" (V, D), "counts.k" (V,) and "sums.k" (V, D)."""
    V, D = CODEC.codebook_size, CODEC.hidden_size
    *keys, next_key = mx.random.split(key, CODEC.num_codebooks() + 1)
    state = {"key": next_key}
    for k, key in enumerate(keys):
        state[f"entries.{k}"] = 0.1 * mx.random.normal((V, D), key=key)
        state[f"counts.{k}"] = mx.zeros(V)  # dead: the first step draws vectors
        state[f"sums.{k}"] = mx.zeros((V, D))
    return state


def train_codec(args: argparse.Namespace) -> None:
    """Train a codec on crops of 1 s, and write it as CODEC_FILE. Raises FileExistsError
    where one is there that is not to be lost."""
    folder = args.output / "training" / "codec"
    check_new(args, folder, folder / CODEC_FILE)
    mx.random.seed(args.seed)
    codec = with_gradients(Encodec(CODEC))
    state = first_codebooks(mx.random.key(args.seed))
    start_even(codec)
    for k in range(CODEC.num_codebooks()):  # `follow` moves them, not the gradient
        codec.quantizer.layers[k].freeze()
    loss = lambda model, audio: codec_loss(model, training.state, audio)  # noqa: E731
    settings = dict(batch=args.batch, clips=args.clips, seed=args.seed)
    training = Training(codec, loss, args, folder, state, settings)
    random = training.random
    kinds = synth.KNOWN + synth.clips_of("any")
    made = make_clips(range(args.clips), kinds)
    clips = counted(made, args.clips, "making clips", "clips")
    sounds = mx.array(np.stack([sound for _, sound in clips]))
    crop = mx.arange(synth.RATE)

    def batch() -> tuple[mx.array]:
        rows = random.integers(len(sounds), size=args.batch)
        starts = random.integers(sounds.shape[1] - synth.RATE + 1, size=args.batch)
        places = mx.array(starts)[:, None] + crop
        return (to_float(sounds[mx.array(rows)[:, None], places]),)

    def write() -> None:
        for k, layer in enumerate(codec.quantizer.layers):
            layer.codebook.embed = training.state[f"entries.{k}"]
        save_arrays(folder / CODEC_FILE, dict(tree_flatten(codec.parameters())), {})
        sample = to_float(sounds[0])[None, :, None]
        output = codec.decode(codec.encode(sample))[0]
        save_audio(folder / "again.wav", mx.clip(output, -1, 1), synth.RATE)
        save_audio(folder / "original.wav", sample[0], synth.RATE)

    names = ("time", "stft", "commitment")
    training.run(batch, names, write)


def load_codec(path: Path) -> Encodec:
    """Load the codec that `train_codec` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train the codec first (--codec).")
    codec = Encodec(CODEC)
    try:
        codec.load_weights(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return codec


def make_clips(
    seeds: range, clips: list[synth.Clip]
) -> Iterator[tuple[synth.Clip, np.ndarray]]:
    """Yield a clip for each seed, one of `clips`, and its samples (N,) in int16.

    They are made on all cores.
    """
    with get_context("spawn").Pool() as pool:
        make = functools.partial(make_clip, clips=clips)
        yield from pool.imap(make, seeds, chunksize=16)


def make_clip(seed: int, clips: list[synth.Clip]) -> tuple[synth.Clip, np.ndarray]:
    clip, _, sound = synth.make(seed, clips)
    return clip, (sound * 32767).astype(np.int16)


def encode_clips(codec: Encodec, count: int) -> tuple[list[synth.Clip], mx.array]:
    """Make clips, and encode them: the clips, and codes (B, T, K) in uint16."""
    clips, sounds, codes = [], [], []
    seeds = range(10**6, 10**6 + count)  # not those that the codec was trained on
    made = make_clips(seeds, synth.KNOWN)
    for clip, sound in counted(made, count, "making and encoding clips", "clips"):
        clips.append(clip)
        sounds.append(sound)
        if len(sounds) == 50 or len(clips) == count:
            audio = to_float(mx.array(np.stack(sounds)))[..., None]
            codes.append(codec.encode(audio)[0].codes.astype(mx.uint16))
            mx.eval(codes[-1])
            sounds = []
    return clips, mx.concatenate(codes)


def save_samples(model: "MusicGen", folder: Path) -> None:
    """Write two takes of captions that were not in the training, and the captions."""
    for i in range(2):
        _, text, _ = synth.make(i, synth.HELD_OUT)
        audio = model.generate(text, duration=4.0, seed=i)[0]
        save_audio(folder / f"sample-{i}.wav", mx.clip(audio, -1, 1), synth.RATE)
        (folder / f"sample-{i}.txt").write_text(f"{text}\n")


def to_float(sound: mx.array) -> mx.array:
    """Samples in int16 -> float32 from -1 to 1."""
    return sound.astype(mx.float32) / 32767
