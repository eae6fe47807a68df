"""Train a small MAGNeT: codes are masked, and guessed from those that are left.

The last part of `train.py synth`: a MAGNeT (https://arxiv.org/abs/2401.04577) on the
codec and the T5 of a model that is there, such as `tiny`, which stay as they are. Each
row of a batch has a stage, the codebook that is learned. Of its codes some spans are
masked; the codebooks before it are seen, those after it are masked. The loss is the
cross-entropy of what is masked in that codebook alone. From the whole to its parts: the
training; its batches; the loss; the masks.

A row of 12 frames in stage 1 of 4, in spans of 3, a dot is masked and ? counts:

    codebook 0  abcdefghijkl
    codebook 1  ab???fg???kl
    codebook 2  ............
    codebook 3  ............

Three things are not as in audiocraft's training. There a batch has one stage, and all
stages are as frequent; here each row has its own, and FIRST of them have the first, which
makes the tune. A span may begin before the first frame here, so that each frame is masked
as often. And some rows, `--holes` of them, are masked in one part only, with all
codebooks around it to be seen, as in takes of which a part is filled. On a MAGNeT of the
same sizes the training goes on from its decoder. Needs magnet.py, convert.py,
train_codec.py, training.py, synth.py, audio.py, decoder.py and what these need beside it.
"""

import argparse
import hashlib
import math
from dataclasses import asdict
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import synth
from checkpoints import MusicGenConfig
from convert import FILES, save_model
from decoder import Condition, Decoder, DecoderConfig
from magnet import MAGNeT, MaskingConfig, load
from musicgen import MusicGen
from train_codec import MISHEARD, WITHOUT_TEXT, encode_clips, save_samples
from training import Training, check_new

SIZES = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, ffn_dim=512)
MASKING = MaskingConfig()  # the paper's
TEXTS = 100  # captions of each kind of clip
FIRST = 0.6  # share of rows whose stage is the first; the others are alike


def train_magnet(args: argparse.Namespace) -> None:
    """Train a decoder on codes of clips, and write the whole model.

    Raises FileExistsError where a model is there that is not to be lost, ValueError for
    a model on which none can be trained.
    """
    folder = args.output / "training" / "magnet"
    check_new(args, folder, *(args.output / name for name in FILES))
    mx.random.seed(args.seed)
    source = load(args.model)
    model = magnet_on(source)
    K = model.config.decoder.num_codebooks
    check_batch(args.batch, K)
    settings = dict(batch=args.batch, clips=args.clips, seed=args.seed)
    settings |= dict(holes=args.holes, model=content(source))
    training = Training(
        model.decoder, magnet_loss, args, folder, {}, settings, compiled=True
    )
    texts = encode_texts(model, args.seed)
    clips, codes = encode_clips(model.audio_encoder, args.clips)
    batch = Batches(clips, codes, texts, args.batch, args.holes, training.random)

    def write() -> None:
        save_model(model, args.output)
        save_samples(model, folder)

    training.run(batch, tuple(f"codebook {k}" for k in range(K)), write)


def magnet_on(source: MusicGen) -> MAGNeT:
    """A MAGNeT on the codec and the T5 of a model, with the decoder of a MAGNeT of the
    same sizes, else with new weights. Raises ValueError for a model that has no text, or
    another sound than the clips."""
    config = source.config
    if config.text_encoder is None or config.conditioner is not None:
        raise ValueError(f"{source.name} must follow a text, and nothing else.")
    if (source.sampling_rate, source.channels) != (synth.RATE, 1):
        raise ValueError(f"{source.name} must have mono sound at {synth.RATE} Hz.")
    K = config.decoder.num_codebooks
    decoder = DecoderConfig(
        vocab_size=config.decoder.vocab_size, num_codebooks=K, delays=(0,) * K, **SIZES
    )
    parts = (decoder, config.text_encoder, config.audio_encoder, synth.SECONDS)
    model = MAGNeT(MusicGenConfig(*parts, masking=asdict(MASKING)), source.tokenizer)
    shape = model.decoder.emb.weight.shape
    model.decoder.emb.weight = 0.3 * mx.random.normal(shape)  # K of them are summed
    if isinstance(source, MAGNeT) and source.config.decoder == decoder:
        model.decoder.update(source.decoder.parameters())
        model.decoder.set_dtype(mx.float32)
    model.text_encoder, model.audio_encoder = source.text_encoder, source.audio_encoder
    return model


def check_batch(rows: int, codebooks: int) -> None:
    """Raise ValueError unless a batch has rows of each stage."""
    least = math.ceil(1 / min(stage_shares(codebooks)))
    if rows < least:
        raise ValueError(
            f"--batch must be {least} or more with --magnet, got {rows}: each has rows "
            "of every codebook."
        )


def content(source: MusicGen) -> str:
    """A hash of what is taken from a model."""
    sha = hashlib.sha256()
    for name, weight in sorted(tree_flatten(source.parameters())):
        if isinstance(source, MAGNeT) or not name.startswith("decoder."):
            sha.update(name.encode())
            sha.update(np.array(weight.astype(mx.float32)).tobytes())
    return sha.hexdigest()


# Batches


class Texts(NamedTuple):
    """Captions of each kind of clip, as T5 states them: they are encoded once."""

    clips: list[synth.Clip]  # M kinds
    states: mx.array  # (M, TEXTS, L, width)
    mask: mx.array  # (M, TEXTS, L), true where there is a token


def encode_texts(model: MAGNeT, seed: int) -> Texts:
    """Captions of all clips that are known, of which some traits are guessed or left
    out."""
    random, ids = np.random.default_rng(seed), []
    for clip in synth.KNOWN:
        labels = [synth.misheard(clip, random, MISHEARD) for _ in range(TEXTS)]
        texts = [synth.caption(label, random, synth.MISSING) for label in labels]
        ids.append([model.tokenizer.encode(text) for text in texts])
    longest = max(len(row) for rows in ids for row in rows)
    filled = np.zeros((len(ids), TEXTS, longest), np.int32)
    mask = np.zeros(filled.shape, bool)
    for place in np.ndindex(filled.shape[:2]):
        row = ids[place[0]][place[1]]
        filled[place][: len(row)], mask[place][: len(row)] = row, True
    states = []
    for tokens, attended in zip(mx.array(filled), mx.array(mask)):
        states.append(model.text_encoder(tokens, attended))
        mx.eval(states[-1])
    return Texts(synth.KNOWN, mx.stack(states), mx.array(mask))


class Batches:
    """Draws batches of codes (N, T, K), each as `magnet_loss` takes it."""

    def __init__(
        self,
        clips: list[synth.Clip],
        codes: mx.array,
        texts: Texts,
        size: int,
        holes: float,
        random: np.random.Generator,
    ):
        self.codes, self.texts, self.size, self.random = codes, texts, size, random
        self.holes = holes  # share of rows that are masked in one part only
        places = {clip: place for place, clip in enumerate(texts.clips)}
        self.kinds = np.array([places[clip] for clip in clips])
        self.shares = stage_shares(codes.shape[2])
        self.spans = Spans(codes.shape[1], MASKING.span_len)

    def __call__(self) -> tuple[mx.array, ...]:
        random, size = self.random, self.size
        rows = random.integers(len(self.kinds), size=size)
        which = mx.array(self.kinds[rows]), mx.array(random.integers(TEXTS, size=size))
        with_text = mx.array(random.random(size) >= WITHOUT_TEXT)
        attended = self.texts.mask[which] & with_text[:, None]
        codes = self.codes[mx.array(rows)].astype(mx.int32)
        stages = mx.array(draw_stages(self.shares, size, random))
        rates, *parts = self.parts()
        key = mx.random.key(random.integers(2**32))
        masked, inside = self.spans(rates, *parts, key=key), self.spans.inside(*parts)
        return self.texts.states[which], attended, codes, masked, inside, stages

    def parts(self) -> tuple[mx.array, mx.array, mx.array]:
        """Where each row (B,) is masked: rates, and the first frames and the numbers of
        frames of the parts in which that is."""
        random, size, T = self.random, self.size, self.spans.frames
        rates = np.cos(np.pi / 2 * random.random(size))
        holes = random.random(size) < self.holes
        lengths = np.where(holes, random.integers(1, T + 1, size), T)
        firsts = random.integers(T - lengths + 1)
        return mx.array(rates, mx.float32), mx.array(firsts), mx.array(lengths)


def stage_shares(codebooks: int) -> list[float]:
    """The share of rows that each stage has."""
    if codebooks == 1:
        return [1.0]
    return [FIRST] + [(1 - FIRST) / (codebooks - 1)] * (codebooks - 1)


def draw_stages(
    shares: list[float], rows: int, random: np.random.Generator
) -> np.ndarray:
    """Stages (B,) of rows, as often as their shares say: each batch has rows of each."""
    places = (np.arange(rows) + random.random()) / rows
    return np.searchsorted(np.cumsum(shares)[:-1], places, side="right")


# The loss


def magnet_loss(
    decoder: Decoder,
    states: mx.array,
    attended: mx.array,
    codes: mx.array,
    masked: mx.array,
    inside: mx.array,
    stages: mx.array,
) -> tuple:
    """Cross-entropy of what is masked in each row's own codebook.

    Args:
        states, attended: T5's (B, L, width) and which count (B, L); none in rows
            without text.
        codes: (B, T, K).
        masked: frames (B, T) that are masked in the own codebook.
        inside: frames (B, T) of the parts that are made, beyond which all is seen.
        stages: the own codebooks (B,).

    Returns the mean loss of what is masked, each codebook's loss (K,), and no state.
    MAGNeT paper, section 3.
    """
    text, no_cache = Condition(states, attended), [None] * len(decoder.layers)
    tokens, own = hide(codes, masked, inside, stages, decoder.config.vocab_size)
    sees = visible(codes.shape[1], stages, MASKING.subcodes_context)
    heads = decoder.config.num_attention_heads
    sees = mx.repeat(sees, heads, axis=0)[None]  # (1, B * H, T, T)
    logits = decoder(tokens, decoder.text_kv(text), no_cache, mask=sees)
    logits = (logits * own[:, None, :, None]).sum(axis=2)  # (B, T, V)
    targets = mx.take_along_axis(codes, stages[:, None, None], axis=2)[..., 0]
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets) * masked
    sums, cells = losses.sum(axis=1) @ own, masked.sum(axis=1) @ own  # (K,)
    return sums.sum() / cells.sum(), sums / mx.maximum(cells, 1), {}


def hide(
    codes: mx.array, masked: mx.array, inside: mx.array, stages: mx.array, blank: int
) -> tuple[mx.array, mx.array]:
    """Codes (B, T, K) as they are seen in their rows' stages (B,), and which codebook is
    each row's own, as 1 among 0 (B, K)."""
    codebook = mx.arange(codes.shape[2])
    own, later = codebook == stages[:, None], codebook > stages[:, None]
    hidden = masked[..., None] & own[:, None] | inside[..., None] & later[:, None]
    return mx.where(hidden, blank, codes), own.astype(mx.float32)


def visible(frames: int, stages: mx.array, context: int) -> mx.array:
    """Which frames see which, (B, T, T): in the first stage all, later the nearest."""
    place = mx.arange(frames)
    near = mx.abs(place[:, None] - place) <= context
    return near | (stages == 0)[:, None, None]


# The masks


class Spans:
    """Draws spans of frames to be masked, which begin anywhere and may overlap.

    spans: frames T of a row, and of a span.
    """

    def __init__(self, frames: int, length: int):
        self.frames, self.length = frames, length
        self.covered = mx.array(covered(frames, length), mx.float32)

    def __call__(
        self, rates: mx.array, firsts: mx.array, lengths: mx.array, key: mx.array
    ) -> mx.array:
        """Frames (B, T) that are masked: about the share `rates` (B,) of the parts that
        begin at `firsts` (B,) and have `lengths` (B,) frames, and nothing else.

        As many spans are drawn as cover that share on average. Place i is where a span
        begins that ends in frame i.
        """
        count = (self.covered[lengths] < rates[:, None]).sum(axis=1)
        firsts, lengths = firsts[:, None], lengths[:, None]
        place = mx.arange(self.frames + self.length - 1)
        inside = (place >= firsts) & (place < firsts + lengths + self.length - 1)
        lot = mx.random.uniform(shape=inside.shape, key=key)
        rank = mx.argsort(mx.argsort(mx.where(inside, lot, 2), axis=1), axis=1)
        begins = rank < mx.maximum(count, 1)[:, None]
        frame = place[: self.frames]
        masked = sum(begins[:, frame + i] for i in range(self.length)) > 0
        return masked & self.inside(firsts[:, 0], lengths[:, 0])

    def inside(self, firsts: mx.array, lengths: mx.array) -> mx.array:
        """Frames (B, T) of the parts."""
        frame, firsts = mx.arange(self.frames), firsts[:, None]
        return (frame >= firsts) & (frame < firsts + lengths[:, None])


def covered(frames: int, length: int) -> np.ndarray:
    """The share of a part that spans cover on average: of parts of 0 to T frames, by the
    number of spans, (T + 1, T + length).

    Spans begin in different places. A frame is in `length` of all P of them, so n spans
    leave it out with the probability choose(P - length, n) / choose(P, n). MAGNeT paper,
    appendix C.
    """
    places = np.arange(frames + 1)[:, None] + length - 1
    before = np.arange(frames + length - 1)  # spans that are drawn already
    left = np.maximum(places - before, 1)
    missed = np.cumprod(np.clip((places - length - before) / left, 0, 1), axis=1)
    return 1 - np.concatenate([np.ones((frames + 1, 1)), missed], axis=1)
