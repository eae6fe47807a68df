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
Needs training.py, train_codec.py, synth.py, lora.py, convert.py, prompt.py, musicgen.py
and all that these need beside it.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_unflatten

import convert
import synth
from audio import load_audio, save_audio
from checkpoints import MusicGenConfig
from decoder import Condition, DecoderConfig
from encodec import Encodec
from lora import LoRALinear, add_adapters, find, save_adapter
from musicgen import MusicGen, delay, delay_mask
from prompt import check_codes, encode_prompt
from settings import save_arrays
from t5 import T5Config, Tokenizer
from train_codec import CODEC, CODEC_FILE, load_codec, make_clips, to_float, train_codec
from training import Training

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
CLIPS = {"codec": 4000, "lm": 24_000}  # to make: sounds of 2 GB, codes of 77 MB


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


def lm_loss(
    model: MusicGen, ids: mx.array, mask: mx.array, told: mx.array, codes: mx.array
) -> tuple:
    """Cross-entropy of codes (B, T, K) under texts `ids` (B, L), which rows are `told`.
    As in audiocraft only the first T steps count, those before the codes' end."""
    config = model.config.decoder
    T, blank = codes.shape[1], config.vocab_size
    wanted = delay(codes, config.delays, T, blank)[:, :T]
    tokens = mx.pad(wanted[:, :-1], [(0, 0), (1, 0), (0, 0)], constant_values=blank)
    text = Condition(model.text_encoder(ids, mask), mask & told[:, None])
    decoder, prefix = model.decoder, None
    if model.conditioner is not None:  # the text comes first, after no sound
        nothing = model.conditioner.states([None] * len(codes), None)
        prefix = decoder.prefix(Condition(*nothing), text)
    no_past = [None] * len(decoder.layers)
    logits = decoder(tokens, decoder.text_kv(text), no_past, prefix).astype(mx.float32)
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
        check_codes(model, codes[None])
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
        codes = mx.concatenate([encode_prompt(model, x, 10**6)[0] for x in pieces])
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


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


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
