"""Train: a tiny model from nothing, or a released one on your own clips.

    python train.py synth --codec --output tiny-new
    python train.py synth --lm --output tiny-new
    python generate.py --model tiny-new --prompt "slow sad bell melody with drums"

    python train.py lora --model small --data clips/ --output brass.safetensors
    python generate.py --model small --adapter brass.safetensors --prompt "brass band"

The first makes a small model for the world of `synth.py`: the codec learns to give
sound back through its codebooks, then T5 and decoder together learn to write its codes.
The other changes a model's layers a little, for sounds and captions of your own (see
lora.py). What `--resume` goes on from lies in or beside the output, under "training".
"""

import argparse
import functools
import hashlib
import io
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from safetensors import SafetensorError, safe_open

import convert
import synth
from encodec import (
    Encodec,
    EncodecConfig,
    Parser,
    TransposedKernel,
    load_audio,
    nearest,
    save_audio,
)
from lora import LoRALinear, add_adapters, find, save_adapter
from musicgen import (
    Conditioning,
    Decoder,
    DecoderConfig,
    MusicGen,
    MusicGenConfig,
    delay,
    delay_mask,
    sinusoids,
)
from settings import save_arrays
from t5 import T5Config, Tokenizer

CODEC = EncodecConfig(
    target_bandwidths=(1.8,),  # 4 codebooks of 512
    codebook_size=512,
    hidden_size=64,
    num_filters=12,
    num_lstm_layers=0,
    pad_mode="constant",
)
DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    ffn_dim=768,
)
PIECES = 200  # of the vocabulary
TEXT = T5Config(
    vocab_size=PIECES + 100,  # with the sentinels
    d_model=96,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=3,
)
WITHOUT_TEXT = 0.15  # of the clips: so that guidance has something to lead away from
MISHEARD = 0.05  # of the traits in captions are guessed: what guidance makes up for
STFT_SIZES = (2048, 512, 128)
CODEC_FILE = "codec.safetensors"
CLIPS = {"codec": 4000, "lm": 24_000}  # to make: sounds of 2 GB, codes of 77 MB


# What both trainings need


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


class Training:
    """Steps over a model's parameters, with what is needed to go on after a stop.

    `state` is all that changes but the parameters: arrays by name. `settings` are
    what must be the same when it goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,
        args: argparse.Namespace,
        folder: Path,
        state: dict[str, mx.array],
        settings: dict[str, Any],
    ):
        self.optimizer = optim.AdamW(args.lr, betas=[0.9, 0.98], weight_decay=0.01)
        self.optimizer.init(model.trainable_parameters())
        self.model, self.state, self.settings = model, state, settings
        self.steps, self.rate, self.seconds = args.steps, args.lr, args.seconds
        self.path = folder / "checkpoint.safetensors"
        self.done, self.passed = 0, 0.0
        self.random = np.random.default_rng(args.seed)
        self._gradient = nn.value_and_grad(model, loss)
        if args.resume:
            self.resume()
        moving = [model.state, self.optimizer.state]
        self._update = mx.compile(self._apply, inputs=moving, outputs=moving)

    def _apply(self, gradients: dict) -> None:
        """Move by gradients of a norm of 1 at most; ones that are not finite are none."""
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        usable = mx.isfinite(norm)
        gradients = tree_map(lambda g: mx.where(usable, g, 0), gradients)
        self.optimizer.update(self.model, gradients)

    def step(self, batch: tuple[mx.array, ...]) -> mx.array:
        """One step on a batch; returns the losses. The learning rate rises in the first
        tenth, at most 200 steps, and falls to a fiftieth."""
        progress = min(max(self.done / self.steps, self.passed / self.seconds), 1)
        falling = 0.51 + 0.49 * math.cos(math.pi * progress)
        rising = min(1, (self.done + 1) / max(1, min(200, self.steps // 10)))
        self.optimizer.learning_rate = self.rate * falling * rising
        (_, losses, state), gradients = self._gradient(self.model, *batch)
        self._update(gradients)
        self.state.update(state)
        mx.async_eval(losses, self.model, self.optimizer.state, self.state)
        self.done += 1
        return losses

    def save(self) -> None:
        """Keep all to go on from; whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"model": self.model.trainable_parameters()}
        arrays["optimizer"] = self.optimizer.state
        arrays = dict(tree_flatten(arrays))
        arrays |= {f"state/{name}": value for name, value in self.state.items()}
        told = dict(done=self.done, passed=self.passed, settings=self.settings)
        told["random"] = self.random.bit_generator.state
        save_arrays(self.path, arrays, {"training": json.dumps(told)})

    def resume(self) -> None:
        """Go on from what `save` kept. Raises FileNotFoundError without it, or
        ValueError for one that is damaged or of other settings."""
        if not self.path.is_file():
            raise FileNotFoundError(f"There is nothing to resume: no {self.path}.")
        try:
            with safe_open(self.path, "numpy") as file:
                told = json.loads((file.metadata() or {})["training"])
            arrays = mx.load(str(self.path))
            mx.eval(arrays)
        except (KeyError, RuntimeError, SafetensorError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        for name, value in self.settings.items():
            if told["settings"].get(name) != value:
                raise ValueError(
                    f"{name} must be as it was, {told['settings'].get(name)}, to go on "
                    f"from {self.path}; got {value}."
                )
        self.done, self.passed = told["done"], told["passed"]
        self.random.bit_generator.state = told["random"]
        kept = {k: arrays.pop(k) for k in list(arrays) if k.startswith("state/")}
        self.state.update({k.removeprefix("state/"): v for k, v in kept.items()})
        arrays = tree_unflatten(list(arrays.items()))
        self.model.update(arrays["model"])
        self.optimizer.state = arrays["optimizer"]

    def run(
        self,
        batches: Callable[[], tuple[mx.array, ...]],
        names: tuple[str, ...],
        keep: Callable[[], None],
    ) -> None:
        """Train to the last step, or for so many seconds; tells the losses every half
        minute. Saves what to go on from every four, at the end and at Ctrl-C; each time
        but the last has the caller `keep` what came of it. Raises ValueError once a
        loss is not finite."""
        start, told, said, kept = time.perf_counter() - self.passed, [], 0.0, 0.0
        try:
            while self.done < self.steps and self.passed < self.seconds:
                told.append(self.step(batches()))
                self.passed = time.perf_counter() - start
                if self.passed - said < 30 and self.done < self.steps:
                    continue
                self.tell(told, names)  # which looks whether they are finite
                told, said = [], self.passed
                if self.passed - kept > 240:
                    self.save()
                    keep()
                    kept = self.passed
        finally:
            if told:
                self.tell(told, names)
            self.save()
        keep()

    def tell(self, losses: list[mx.array], names: tuple[str, ...]) -> None:
        means = mx.stack(losses).mean(axis=0).tolist()
        if not all(map(math.isfinite, means)):
            raise ValueError(
                f"The loss must be finite, but is {means} in step {self.done}; a lower "
                "--lr may help."
            )
        found = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
        print(f"{self.passed:.0f} s, step {self.done}: {found}", flush=True)


# The codec


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


# T5 and decoder


def train_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """A vocabulary of the words that captions use, in `spiece.model`."""
    path, made = folder / "spiece.model", io.BytesIO()
    random = np.random.default_rng(seed)
    clips = (synth.KNOWN[random.integers(len(synth.KNOWN))] for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            synth.caption(clip, random, synth.MISSING) for clip in clips
        ),
        model_writer=made,
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",  # small letters
        hard_vocab_limit=False,
        num_threads=1,  # the same pieces everywhere
        minloglevel=2,
    )
    path.write_bytes(made.getvalue())
    return Tokenizer(path)


class NoPast:
    """Stands for a cache where all steps are there at once."""

    offset = 0

    def update(self, keys_values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.split(keys_values, 2)


def condition(
    decoder: Decoder, text: mx.array, mask: mx.array, steps: int
) -> Conditioning:
    """`Decoder.condition` for training: nothing is computed ahead."""
    text = decoder.output_proj(text.astype(decoder.dtype)) * mask[..., None]
    memory = [layer.remember(text) for layer in decoder.layers]
    attended = mask | ~mask.any(axis=1, keepdims=True)
    bias = mx.where(attended, 0, -1e4)[:, None, None].astype(decoder.dtype)
    positions = sinusoids(steps, decoder.config.hidden_size).astype(decoder.dtype)
    return Conditioning(memory, bias, positions)


def lm_loss(
    model: MusicGen, ids: mx.array, mask: mx.array, told: mx.array, codes: mx.array
) -> tuple:
    """Cross-entropy of codes (B, T, K) under texts `ids` (B, L), which rows are `told`.
    As in audiocraft only the first T steps count, those before the codes' end."""
    config = model.config.decoder
    T, blank = codes.shape[1], config.vocab_size
    wanted = delay(codes, config.delays, T, blank)[:, :T]
    tokens = mx.pad(wanted[:, :-1], [(0, 0), (1, 0), (0, 0)], constant_values=blank)
    states = (model.text_encoder(ids, mask), mask & told[:, None])
    decoder, prefix = model.decoder, None
    if model.conditioner is not None:  # the text comes first, after no sound
        nothing = model.conditioner.states([None] * len(codes), None)
        prefix = decoder.prefix(nothing, states)
    steps = tokens.shape[1] + (0 if prefix is None else prefix.shape[1])
    past = [NoPast() for _ in decoder.layers]
    x = decoder.hidden(tokens, condition(decoder, *states, steps), past, prefix)
    logits = decoder.logits(x[:, -tokens.shape[1] :]).astype(mx.float32)
    real = delay_mask(T, config.delays)[:T]
    each = nn.losses.cross_entropy(logits, mx.where(real, wanted, 0)) * real
    losses = each.sum(axis=(0, 1)) / (len(codes) * real.sum(axis=0))  # of each codebook
    return losses.mean(), losses, {}


def encode_clips(codec: Encodec, count: int) -> tuple[list[synth.Clip], mx.array]:
    """Clips and their codes (B, T, K)."""
    clips, sounds, codes = [], [], []
    for clip, sound in make_clips(range(10**6, 10**6 + count), synth.KNOWN):
        clips.append(clip)
        sounds.append(sound)
        if len(sounds) == 50 or len(clips) == count:
            audio = to_float(mx.array(np.stack(sounds)))[..., None]
            codes.append(codec.encode(audio)[0].codes.astype(mx.uint16))
            mx.eval(codes[-1])
            sounds = []
    return clips, mx.concatenate(codes)


def train_lm(args: argparse.Namespace) -> None:
    """Train T5 and decoder on codes of clips, and write the whole model."""
    mx.random.seed(args.seed)
    path = args.output / "training" / "codec" / CODEC_FILE
    codec = load_codec(path)
    folder = args.output / "training" / "lm"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder, args.seed)
    config = MusicGenConfig(DECODER, TEXT, CODEC, synth.SECONDS)
    model = MusicGen(config, tokenizer)
    start_small(model)
    model.audio_encoder = codec
    model.audio_encoder.freeze()
    settings = dict(batch=args.batch, clips=args.clips, seed=args.seed)
    settings["codec"] = hashlib.sha256(path.read_bytes()).hexdigest()
    training = Training(model, lm_loss, args, folder, {}, settings)
    random = training.random
    clips, codes = encode_clips(codec, args.clips)

    def batch() -> tuple[mx.array, ...]:
        rows = random.integers(len(clips), size=args.batch)
        told = [synth.misheard(clips[r], random, MISHEARD) for r in rows]
        ids = [tokenizer.encode(synth.caption(c, random, synth.MISSING)) for c in told]
        ids, mask = padded(ids, 32)
        with_text = mx.array(random.random(args.batch) >= WITHOUT_TEXT)
        return ids, mask, with_text, codes[mx.array(rows)].astype(mx.int32)

    def keep() -> None:
        save_model(model, args.output)
        for i in range(2):
            clip, text, _ = synth.make(i, synth.HELD_OUT)
            audio = model.generate(text, duration=4.0, seed=i)[0]
            save_audio(folder / f"sample-{i}.wav", mx.clip(audio, -1, 1), synth.RATE)
            (folder / f"sample-{i}.txt").write_text(f"{text}\n")

    names = tuple(f"codebook {k}" for k in range(DECODER.num_codebooks))
    training.run(batch, names, keep)


def start_small(model: MusicGen) -> None:
    """Weights from which T5, which does not divide its scores, and the summed
    embeddings begin well."""
    for name, weight in tree_flatten(model.parameters()):
        if name.endswith(("shared.weight", "emb.weight", "SelfAttention.q.weight")):
            small = 0.05 if "SelfAttention" in name else 0.3
            model.update(
                tree_unflatten([(name, small * mx.random.normal(weight.shape))])
            )


def padded(ids: list[list[int]], length: int) -> tuple[mx.array, mx.array]:
    """Ids and mask (B, length); what is longer loses its end."""
    rows = np.zeros((len(ids), length), np.int32)
    for row, own in zip(rows, ids):
        row[: len(own)] = own[:length]
    mask = np.arange(length) < np.array([len(own) for own in ids])[:, None]
    return mx.array(rows), mx.array(mask)


def save_model(model: MusicGen, folder: Path) -> None:
    """Write the model in float16 in this project's layout, each file whole."""
    half = MusicGen(model.config, model.tokenizer)
    half.update(model.parameters())
    half.set_dtype(mx.float16)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        convert.save(half, Path(part))
        for path in Path(part).iterdir():
            path.replace(folder / path.name)


# Adapters


SOUNDS = {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"}


def find_clips(folder: Path) -> list[tuple[Path, str]]:
    """Sound files and their captions: of `captions.jsonl`, lines with "file" and
    "caption", or of a .txt beside each. Raises FileNotFoundError or ValueError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    lines = folder / "captions.jsonl"
    if lines.is_file():
        return [read_caption(lines, *line) for line in read_text(lines)]
    paths = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
    found = []
    for path in (p for p in paths if p.suffix.lower() in SOUNDS):
        text = path.with_suffix(".txt")
        if not text.is_file() or not read_text(text):
            raise ValueError(f"{path} needs a caption in {text.name}.")
        found.append((path, " ".join(line for _, line in read_text(text))))
    return found


def read_text(path: Path) -> list[tuple[int, str]]:
    """Number and content of a text's lines that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]


def read_caption(lines: Path, number: int, line: str) -> tuple[Path, str]:
    try:
        told = json.loads(line)
        file, text = told["file"], told["caption"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f'{lines}, line {number} must be {{"file": ..., "caption": ...}}: {error!r}'
        ) from error
    if not isinstance(file, str) or not isinstance(text, str) or not text.strip():
        raise ValueError(f"{lines}, line {number} must hold texts, got {line:.40}")
    return lines.parent / file, text


def clip_codes(model: MusicGen, path: Path) -> mx.array:
    """Codes (T, K) of a sound file, made in pieces of 30 s; kept beside it under what
    the file and the codec are, so made only once."""
    kept = path.with_name(f".{digest(model, path)}.codes.safetensors")
    try:
        codes = mx.load(str(kept))["codes"]
        model.check_codes(codes[None])
        return codes
    except (KeyError, RuntimeError, ValueError):
        pass  # there is none, or it is damaged
    audio = load_audio(path, model.sampling_rate, model.channels)
    if len(audio) < model.sampling_rate:
        raise ValueError(f"{path} must have a second of sound.")
    if mx.abs(audio).max() < 1e-4:
        raise ValueError(f"{path} is silent.")
    size = 30 * model.sampling_rate
    pieces = [audio[i : i + size] for i in range(0, len(audio), size)]
    with warnings.catch_warnings():  # a piece may be silent
        warnings.filterwarnings("ignore", "The audio prompt is silent")
        codes = mx.concatenate([model.encode_prompt(x, 10**6)[0] for x in pieces])
    try:
        save_arrays(kept, {"codes": codes}, {})
    except OSError:
        pass  # made again next time
    return codes


def digest(model: MusicGen, path: Path) -> str:
    """A name for the codes of a file by a model's codec. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no sound file {path}.")
    found = hashlib.sha256(path.read_bytes())
    found.update(repr((model.config.audio_encoder, model.channels)).encode())
    found.update(np.array(model.audio_encoder.quantizer.layers[0].codebook.embed))
    return found.hexdigest()[:24]


def load_clips(model: MusicGen, folder: Path) -> tuple[list[str], list[mx.array]]:
    """Captions and codes; what cannot be read is named and left out. Raises ValueError
    where nothing is left."""
    texts, codes = [], []
    for path, text in find_clips(folder):
        try:
            codes.append(clip_codes(model, path))
            texts.append(text)
        except (OSError, ValueError) as error:
            print(f"train.py: skipped: {error}", file=sys.stderr)
    if not codes:
        raise ValueError(f"{folder} must hold a sound file that can be read.")
    return texts, codes


def adapt_only(model: MusicGen) -> None:
    """Train nothing but the adapters."""
    model.freeze()
    for _, _, module in find(model.decoder, LoRALinear):
        module.unfreeze(keys=["a", "b"], recurse=False)


def train_lora(args: argparse.Namespace) -> None:
    """Train adapters on a folder of clips, and write them."""
    mx.random.seed(args.seed)
    if args.output.suffix != ".safetensors" or args.output.is_dir():
        raise ValueError(f"--output must end in .safetensors, got {args.output}.")
    dtype = None if args.dtype is None else getattr(mx, args.dtype)
    model = MusicGen.from_pretrained(args.model, dtype, args.q_bits)
    add_adapters(model.decoder, args.rank, 1.0)
    adapt_only(model)
    texts, codes = load_clips(model, args.data)
    folder = args.output.with_name(f"{args.output.name}.training")
    same = ("model", "rank", "batch", "crop", "dtype", "q_bits", "seed")
    settings = {name: getattr(args, name) for name in same}
    training = Training(model, lm_loss, args, folder, {}, settings)
    random = training.random
    ids = [model.tokenizer.encode(text) for text in texts]
    length = max(map(len, ids))
    most = int(args.crop * model.frame_rate)

    def batch() -> tuple[mx.array, ...]:
        rows = random.integers(len(codes), size=args.batch)
        frames = min(most, min(len(codes[r]) for r in rows))
        starts = [random.integers(len(codes[r]) - frames + 1) for r in rows]
        crops = [codes[r][s : s + frames] for r, s in zip(rows, starts)]
        tokens, mask = padded([ids[r] for r in rows], length)
        told = mx.array(random.random(args.batch) >= WITHOUT_TEXT)
        return tokens, mask, told, mx.stack(crops).astype(mx.int32)

    def keep() -> None:
        save_adapter(args.output, model.decoder, args.rank, {"model": args.model})

    names = tuple(f"codebook {k}" for k in range(codes[0].shape[1]))
    training.run(batch, names, keep)
    print(f"Wrote {args.output}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Train a tiny model, or adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("synth", help="train the tiny model from nothing")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--codec", action="store_true", help="first: the codec")
    what.add_argument("--lm", action="store_true", help="then: T5 and decoder")
    what.add_argument("--listen", type=int, help="only write so many clips to OUTPUT")
    add = made.add_argument
    add("--output", type=Path, default=Path("tiny-new"), help="(default: tiny-new)")
    told = ", ".join(f"{count} for --{part}" for part, count in CLIPS.items())
    add("--clips", type=int, help=f"to make (default: {told})")
    taught = commands.add_parser("lora", help="teach a model your own clips")
    add = taught.add_argument
    add("--model", required=True, help="short name, Hub id or folder")
    add("--data", type=Path, required=True, help="folder of clips with captions")
    add("--output", type=Path, default=Path("adapter.safetensors"))
    add("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    add("--crop", type=float, default=10.0, help="seconds (default: %(default)s)")
    add("--dtype", choices=["float16", "bfloat16", "float32"])
    add("--q-bits", type=int, choices=[4, 8], help="quantize what is not trained")
    for command, steps, batch, lr in ((made, 14_500, 24, 1e-3), (taught, 500, 1, 1e-4)):
        add = command.add_argument
        add("--steps", type=int, default=steps, help="(default: %(default)s)")
        add("--batch", type=int, default=batch, help="clips a step (%(default)s)")
        add("--lr", type=float, default=lr, help="learning rate (%(default)s)")
        add("--seconds", type=float, default=1e9, help="stop after so many of training")
        add("--seed", type=int, default=0, help="(default: %(default)s)")
        add("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    if args.command == "synth" and args.clips is None:
        args.clips = CLIPS["codec" if args.codec else "lm"]
    for name in ("steps", "batch", "lr", "seconds", "clips", "rank", "crop", "listen"):
        if (value := getattr(args, name, None)) is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    for name, most in (("lr", 1), ("crop", 600), ("seed", 2**32)):
        if not 0 <= getattr(args, name, 0) <= most:
            parser.error(
                f"--{name} must be from 0 to {most}, got {getattr(args, name)}"
            )
    if getattr(args, "crop", 1) < 0.1:
        parser.error(f"--crop must be at least 0.1 s, got {args.crop}")
    return args


def run(args: argparse.Namespace) -> None:
    if args.command == "lora":
        return train_lora(args)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.listen:
        synth.listen(args.listen, args.output)
    elif args.codec:
        train_codec(args)
    else:
        train_lm(args)


def main() -> None:
    args = parse_arguments()
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
