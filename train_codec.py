"""Train a small codec: sound -> codes -> sound, as near as four codebooks allow.

The first part of `train.py synth`: an EnCodec of a few hundred thousand weights on the
clips of synth.py. Its loss compares waveforms and spectra; the codebooks are not trained,
but follow what they are to code. Needs training.py, synth.py, encodec.py, audio.py and
settings.py beside it.
"""

import argparse
import functools
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

import synth
from audio import save_audio
from encodec import Encodec, EncodecConfig, TransposedKernel, nearest
from settings import save_arrays
from training import Training

CODEC = EncodecConfig(
    target_bandwidths=(1.8,),  # 4 codebooks of 512
    codebook_size=512,
    hidden_size=64,
    num_filters=12,
    num_lstm_layers=0,
    pad_mode="constant",
)
STFT_SIZES = (2048, 512, 128)
CODEC_FILE = "codec.safetensors"


@mx.custom_function
def elu(x: mx.array) -> mx.array:
    """As `nn.elu`, of which the gradient is not a number where x is large: there its
    exp overflows."""
    return nn.elu(x)


@elu.vjp
@mx.compile
def elu_vjp(x: mx.array, slope: mx.array, y: mx.array) -> mx.array:
    return mx.where(y > 0, slope, slope * (y + 1))


class ELU(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return elu(x)


def with_gradients(codec: Encodec) -> Encodec:
    """The codec with an ELU that can be trained."""

    def change(module: nn.Module) -> nn.Module:
        return ELU() if isinstance(module, nn.ELU) else module

    leaves = tree_map(change, codec.leaf_modules(), is_leaf=nn.Module.is_module)
    codec.update_modules(leaves)
    return codec


def codec_loss(codec: Encodec, state: dict, audio: mx.array) -> tuple:
    """Loss on audio (B, N), its parts, and how the codebooks move."""
    x = codec.encoder(audio[..., None])
    flat = mx.stop_gradient(x).reshape(-1, x.shape[-1])
    books = [state[f"entries.{k}"] for k in range(CODEC.num_codebooks())]
    found, seen, taken = quantize(flat, books)
    *keys, after = mx.random.split(state["key"], len(books) + 1)
    moved = {"key": after}
    for k, entries in enumerate(books):
        old = {name: state[f"{name}.{k}"] for name in ("counts", "sums")}
        entries, new = follow(entries, old, seen[k], taken[k], keys[k])
        moved |= {f"entries.{k}": entries}
        moved |= {f"{name}.{k}": value for name, value in new.items()}
    found = found.reshape(x.shape)
    commitment = ((x - found) ** 2).mean()
    given = x + mx.stop_gradient(found - x)
    again = codec.decoder(given)[..., 0]
    time_loss = mx.abs(again - audio).mean() / mx.abs(audio).mean()
    stft = stft_distance(again, audio)
    total = time_loss + stft + 0.25 * commitment
    losses = mx.stack([time_loss, stft, commitment])
    return total, losses, {k: mx.stop_gradient(v) for k, v in moved.items()}


def spectra(audio: mx.array, size: int) -> mx.array:
    """Magnitudes (B, T, size / 2 + 1) of audio (B, N), frames a quarter apart."""
    hop = size // 4
    blocks = audio[:, : audio.shape[1] // hop * hop].reshape(len(audio), -1, hop)
    T = blocks.shape[1] - 3
    frames = mx.concatenate([blocks[:, i : i + T] for i in range(4)], axis=-1)
    window = 0.5 - 0.5 * mx.cos(mx.arange(size) * (2 * np.pi / size))
    found = mx.fft.rfft(frames * (window / size**0.5))
    return mx.sqrt(found.real**2 + found.imag**2 + 1e-6)


def stft_distance(found: mx.array, wanted: mx.array) -> mx.array:
    """How far spectra of audio (B, N) are apart, in magnitude and in its logarithm,
    over several sizes of frames."""
    total = 0
    for size in STFT_SIZES:
        a, b = spectra(found, size), spectra(wanted, size)
        total = total + mx.abs(a - b).mean() / b.mean()
        total = total + 0.5 * mx.abs(mx.log(a) - mx.log(b)).mean()
    return total / len(STFT_SIZES)


def quantize(x: mx.array, codebooks: list[mx.array]) -> tuple[mx.array, list, list]:
    """Embeddings (M, D) -> the sum of the nearest entries of each codebook, what each
    codebook saw, and which entries it took."""
    rest, seen, taken = x, [], []
    for entries in codebooks:
        seen.append(rest)
        taken.append(nearest(rest, entries))
        rest = rest - entries[taken[-1]]
    return x - rest, seen, taken


def follow(
    entries: mx.array,
    state: dict[str, mx.array],
    seen: mx.array,
    taken: mx.array,
    key: mx.array,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Move each entry of a codebook to the mean of what took it lately, and dead ones to
    anything that was seen, by the random key."""
    V, D = entries.shape
    counts = mx.zeros(V).at[taken].add(mx.ones(len(taken)))
    sums = mx.zeros((V, D)).at[taken].add(seen)
    counts = 0.99 * state["counts"] + 0.01 * counts
    sums = 0.99 * state["sums"] + 0.01 * sums
    means = sums / mx.maximum(counts, 1e-5)[:, None]
    dead = (counts < 0.02)[:, None]
    others = seen[mx.random.randint(0, len(seen), (V,), key=key)]
    entries = mx.where(dead, others, means)
    counts = mx.where(dead[:, 0], 0.2, counts)
    return entries, dict(counts=counts, sums=entries * counts[:, None])


def start_even(codec: Encodec) -> None:
    """Weights through which a signal neither fades nor grows, to a quiet sound."""
    for _, module in codec.named_modules():
        if isinstance(module, (nn.Conv1d, TransposedKernel)):
            shape = module.weight.shape
            taps = 2 if isinstance(module, TransposedKernel) else shape[1]
            bound = (3 / (taps * shape[-1])) ** 0.5
            module.weight = mx.random.uniform(-bound, bound, shape)
    last = codec.decoder.layers[-1].conv
    last.weight = 0.1 * last.weight


def first_codebooks(random: mx.array) -> dict[str, mx.array]:
    """Entries, how often and by what they were taken, and the key for what is drawn,
    before the first step."""
    V, D = CODEC.codebook_size, CODEC.hidden_size
    *keys, after = mx.random.split(random, CODEC.num_codebooks() + 1)
    state = {"key": after}
    for k, key in enumerate(keys):
        state[f"entries.{k}"] = 0.1 * mx.random.normal((V, D), key=key)
        state[f"counts.{k}"] = mx.zeros(V)  # dead, so that they move to what is seen
        state[f"sums.{k}"] = mx.zeros((V, D))
    return state


def train_codec(args: argparse.Namespace) -> None:
    """Train on crops of a second, and write CODEC_FILE."""
    mx.random.seed(args.seed)
    codec = with_gradients(Encodec(CODEC))
    state = first_codebooks(mx.random.key(args.seed))
    start_even(codec)
    for k in range(CODEC.num_codebooks()):  # they follow, and are not trained
        codec.quantizer.layers[k].freeze()
    loss = lambda model, audio: codec_loss(model, training.state, audio)  # noqa: E731
    folder = args.output / "training" / "codec"
    settings = dict(batch=args.batch, clips=args.clips, seed=args.seed)
    training = Training(codec, loss, args, folder, state, settings)
    random = training.random
    known = synth.KNOWN + synth.clips_of("any")
    clips = make_clips(range(args.clips), known)
    sounds = mx.array(np.stack([sound for _, sound in clips]))
    crop = mx.arange(synth.RATE)

    def batch() -> tuple[mx.array]:
        rows = random.integers(len(sounds), size=args.batch)
        starts = random.integers(sounds.shape[1] - synth.RATE + 1, size=args.batch)
        places = mx.array(starts)[:, None] + crop
        return (to_float(sounds[mx.array(rows)[:, None], places]),)

    def keep() -> None:
        for k, layer in enumerate(codec.quantizer.layers):
            layer.codebook.embed = training.state[f"entries.{k}"]
        save_arrays(folder / CODEC_FILE, dict(tree_flatten(codec.parameters())), {})
        sample = to_float(sounds[0])[None, :, None]
        again = codec.decode(codec.encode(sample))[0]
        save_audio(folder / "again.wav", mx.clip(again, -1, 1), synth.RATE)
        save_audio(folder / "original.wav", sample[0], synth.RATE)

    names = ("time", "stft", "commitment")
    training.run(batch, names, keep)


def load_codec(path: Path) -> Encodec:
    """What `train_codec` wrote. Raises FileNotFoundError, or ValueError for a damaged
    file."""
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
    """One of the clips for each seed, and its samples (N,) as int16; on all cores."""
    with get_context("spawn").Pool() as pool:
        make = functools.partial(make_clip, clips=clips)
        yield from pool.imap(make, seeds, chunksize=16)


def make_clip(seed: int, clips: list[synth.Clip]) -> tuple[synth.Clip, np.ndarray]:
    clip, _, sound = synth.make(seed, clips)
    return clip, (sound * 32767).astype(np.int16)


def to_float(sound: mx.array) -> mx.array:
    """int16 samples -> float32 in -1 to 1."""
    return sound.astype(mx.float32) / 32767
