"""Train T5 and a small decoder: captions and codes -> the codes that come next.

The second part of `train.py synth`: a small MusicGen on the codec of the first part. T5
and the decoder begin with nothing, and learn together. Half of the rows are songs that
change: from a frame on the codes are another clip's, and the text is that one's, so that
the model learns to leave what it heard when the text says so:

    frames   0 1 2 3 4 5 6 7
    codes    a b c d|s t u v
    text     slow bell|fast saw
             melody   |with drums

Needs train_codec.py, training.py, synth.py, convert.py, musicgen.py, decoder.py, t5.py
and what these need beside it.
"""

import argparse
import hashlib
import io
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_unflatten

import synth
from checkpoints import MusicGenConfig
from convert import FILES, save_model
from decoder import Condition, DecoderConfig, TextKV
from musicgen import MusicGen, delay, delay_mask
from t5 import T5Config, Tokenizer
from train_codec import (
    CODEC,
    CODEC_FILE,
    MISHEARD,
    WITHOUT_TEXT,
    encode_clips,
    load_codec,
    save_samples,
)
from training import Training, check_new

DECODER = DecoderConfig(
    vocab_size=512,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=3,
    ffn_dim=768,
)
CHANGING = 0.5  # share of rows whose text changes
PIECES = 200  # of the tokenizer's vocabulary
TEXT = T5Config(
    vocab_size=PIECES + 100,  # with the sentinels
    d_model=96,
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=3,
)


def train_tokenizer(folder: Path, seed: int) -> Tokenizer:
    """Train a vocabulary on captions, and write it as `spiece.model`."""
    path, content = folder / "spiece.model", io.BytesIO()
    random = np.random.default_rng(seed)
    clips = (synth.KNOWN[random.integers(len(synth.KNOWN))] for _ in range(20_000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            synth.caption(clip, random, synth.MISSING) for clip in clips
        ),
        model_writer=content,
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",  # ignores case
        hard_vocab_limit=False,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    path.write_bytes(content.getvalue())
    return Tokenizer(path)


def lm_loss(
    model: MusicGen,
    ids: mx.array,
    mask: mx.array,
    with_text: mx.array,
    codes: mx.array,
) -> tuple:
    """Cross-entropy of codes (B, T, K) under texts: `ids` and their `mask`, (B, L).

    Rows where `with_text` (B,) is False are unconditional. Returns what `code_loss` does.
    """
    text = Condition(model.text_encoder(ids, mask), mask & with_text[:, None])
    return code_loss(model, codes, text, model.decoder.text_kv(text))


def song_loss(
    model: MusicGen,
    ids: mx.array,
    mask: mx.array,
    with_text: mx.array,
    codes: mx.array,
    changes: mx.array,
) -> tuple:
    """Cross-entropy of codes (B, T, K) of songs whose text changes.

    `ids` and `mask` (2, B, L) are of the texts before and after the change, `changes`
    (B,) the steps from which on the second one holds. Else as `lm_loss`.
    """
    states = model.text_encoder(ids.flatten(0, 1), mask.flatten(0, 1))
    before, after = mask
    tokens = mx.concatenate([before, after], axis=1) & with_text[:, None]  # (B, 2 L)
    text = Condition(mx.concatenate(mx.split(states, 2), axis=1), tokens)
    sees = attended(mask, changes, codes.shape[1]) | ~with_text[:, None, None]
    added = mx.where(sees, 0, -mx.inf)[:, None].astype(model.decoder.dtype)
    text_kv = [kv._replace(mask=added) for kv in model.decoder.text_kv(text)]
    return code_loss(model, codes, text, text_kv)


def attended(mask: mx.array, changes: mx.array, steps: int) -> mx.array:
    """Which tokens of its two texts each step sees, (B, T, 2 L): of `mask` (2, B, L) the
    first text's before the steps `changes` (B,), from there on the second one's."""
    before, after = mask[:, :, None]
    changed = (mx.arange(steps) >= changes[:, None])[..., None]
    return mx.concatenate([before & ~changed, after & changed], axis=2)


def code_loss(
    model: MusicGen, codes: mx.array, text: Condition, text_kv: list[TextKV | None]
) -> tuple:
    """Cross-entropy of codes (B, T, K) under a text and its keys and values.

    As in audiocraft, only the first T steps count, not those in which the delayed
    codebooks run out. Returns the mean loss, each codebook's loss (K,), and no state.
    """
    config = model.config.decoder
    T, blank = codes.shape[1], config.vocab_size
    targets = delay(codes, config.delays, T, blank)[:, :T]
    tokens = mx.pad(targets[:, :-1], [(0, 0), (1, 0), (0, 0)], constant_values=blank)
    decoder, prefix = model.decoder, None
    if model.conditioner is not None:  # its prefix: no sound, then the text
        null = model.conditioner.states([None] * len(codes), None)
        prefix = decoder.prefix(Condition(*null), text)
    no_cache = [None] * len(decoder.layers)
    logits = decoder(tokens, text_kv, no_cache, prefix).astype(mx.float32)
    valid = delay_mask(T, config.delays)[:T]  # (T, K), False at blanks
    losses = nn.losses.cross_entropy(logits, mx.where(valid, targets, 0)) * valid
    losses = losses.sum(axis=(0, 1)) / (len(codes) * valid.sum(axis=0))  # (K,)
    return losses.mean(), losses, {}


def train_lm(args: argparse.Namespace) -> None:
    """Train T5 and the decoder on codes of clips, and write the whole model.

    Raises FileNotFoundError where the codec was not trained before, FileExistsError
    where a model is there that is not to be lost.
    """
    folder = args.output / "training" / "lm"
    check_new(args, folder, *(args.output / name for name in FILES))
    mx.random.seed(args.seed)
    path = args.output / "training" / "codec" / CODEC_FILE
    codec = load_codec(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder, args.seed)
    config = MusicGenConfig(DECODER, TEXT, CODEC, synth.SECONDS)
    model = MusicGen(config, tokenizer)
    start_small(model)
    model.audio_encoder = codec
    model.audio_encoder.freeze()
    settings = dict(batch=args.batch, clips=args.clips, seed=args.seed)
    settings["codec"] = hashlib.sha256(path.read_bytes()).hexdigest()
    training = Training(model, song_loss, args, folder, {}, settings)
    clips, codes = encode_clips(codec, args.clips)

    def batch() -> tuple[mx.array, ...]:
        return draw_songs(clips, codes, tokenizer, args.batch, training.random)

    def write() -> None:
        save_model(model, args.output)
        save_samples(model, folder)

    names = tuple(f"codebook {k}" for k in range(DECODER.num_codebooks))
    training.run(batch, names, write)


def draw_songs(
    clips: list[synth.Clip],
    codes: mx.array,
    tokenizer: Tokenizer,
    size: int,
    random: np.random.Generator,
) -> tuple[mx.array, ...]:
    """A batch for `song_loss`: `size` rows, each of two clips and their captions."""
    rows = random.integers(len(clips), size=(2, size))
    labels = [synth.misheard(clips[r], random, MISHEARD) for r in rows.flat]
    texts = [synth.caption(label, random, synth.MISSING) for label in labels]
    ids, mask = padded([tokenizer.encode(text) for text in texts], 32)
    ids, mask = (x.reshape(2, size, -1) for x in (ids, mask))  # (2 B, L) -> (2, B, L)
    with_text = mx.array(random.random(size) >= WITHOUT_TEXT)
    changes = draw_changes(codes.shape[1], size, random)
    before, after = codes[mx.array(rows)].astype(mx.int32)  # (B, T, K) each
    frames = mx.arange(codes.shape[1])[:, None]
    song = mx.where(frames < changes[:, None, None], before, after)
    return ids, mask, with_text, song, changes


def draw_changes(frames: int, rows: int, random: np.random.Generator) -> mx.array:
    """The frames (B,) from which on rows are another clip: those of songs that do not
    change are past the last one."""
    changes = random.random(rows) < CHANGING
    return mx.array(np.where(changes, random.integers(1, frames, rows), frames))


def start_small(model: MusicGen) -> None:
    """Draw initial weights that suit T5, which does not scale its attention scores, and
    the decoder, which sums its K embeddings."""
    for name, weight in tree_flatten(model.parameters()):
        if name.endswith(("shared.weight", "emb.weight", "SelfAttention.q.weight")):
            deviation = 0.05 if "SelfAttention" in name else 0.3
            weight = deviation * mx.random.normal(weight.shape)
            model.update(tree_unflatten([(name, weight)]))


def padded(ids: list[list[int]], length: int) -> tuple[mx.array, mx.array]:
    """Token ids and their mask, both (B, length). Longer texts lose their end."""
    rows = np.zeros((len(ids), length), np.int32)
    for row, text_ids in zip(rows, ids):
        row[: len(text_ids)] = text_ids[:length]
    mask = np.arange(length) < np.array([len(text_ids) for text_ids in ids])[:, None]
    return mx.array(rows), mx.array(mask)
