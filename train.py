"""Train a tiny model from nothing, or an adapter on your own clips.

    python train.py synth --codec --output tiny-new
    python train.py synth --lm --output tiny-new
    python train.py synth --magnet --model tiny-new --output tiny-magnet-new
    python generate.py --model tiny-new --prompt "slow sad bell melody with drums"

    python train.py lora --model small --data clips/ --output brass.safetensors
    python generate.py --model small --adapter brass.safetensors --prompt "brass band"

`synth` trains a small model on the clips of `synth.py`. First the codec learns to
reconstruct sound through its codebooks, then T5 and the decoder together learn to write
its codes (see train_lm.py); a MAGNeT learns them on the same codec and T5. `lora`
trains an adapter of a model (see lora.py) on sounds and captions of your own, with
`--format peft` as the library PEFT loads it. `--resume` goes on from the last checkpoint.
It lies in the output folder under `training`, or for an adapter in the folder
`OUTPUT.training`. Needs training.py, train_codec.py, train_lm.py, train_magnet.py,
synth.py, lora.py, peft_files.py, prompt.py, musicgen.py and all that these need,
outputs.py and messages.py beside it.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np

import peft_files
import synth
from audio import check_writable, load_audio
from hub import local
from lora import LAYERS, TARGETS, Adapted, add_adapters, content, find, save_adapter
from messages import Forgiving, one_line
from musicgen import MusicGen
from outputs import check_apart, leave_nothing, named_path
from prompt import check_codes, encode_prompt
from quantize import add_flags, asked
from settings import save_arrays
from strict import in_a_line
from train_codec import WITHOUT_TEXT, train_codec
from train_lm import lm_loss, padded, train_lm
from train_magnet import train_magnet
from training import CHECKPOINT, ENDLESS, Training, alone, check_new, counted, wipe

CLIPS = {  # to make: samples of 2 GB, codes of 77 MB
    "codec": 4000,
    "lm": 24_000,
    "magnet": 24_000,
}


# Adapters


QUANTIZATION = ("q_bits", "q_group_size", "q_mode")
SOUNDS = {  # that need a caption; another file is a clip where it has one
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".m4a", ".aac"),
    *(".mp4", ".webm", ".caf", ".au", ".wma"),
}


def find_clips(folder: Path) -> list[tuple[Path, str]]:
    """Sound files of a folder, and their captions.

    `captions.jsonl` names them in lines with "file" and "caption". Without it each
    sound file has its caption in a .txt of the same name. What is no clip, or has no
    caption that can be read, is named on stderr. Raises FileNotFoundError where there
    is no folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    lines = folder / "captions.jsonl"
    return listed_clips(folder, lines) if lines.is_file() else lone_clips(folder)


def listed_clips(folder: Path, lines: Path) -> list[tuple[Path, str]]:
    """Clips that captions.jsonl names. What it does not name is left out."""
    clips, named = [], set()
    for number, line in enumerate(lines.read_bytes().split(b"\n"), 1):
        try:
            if text := decode(line, f"{lines}, line {number}"):
                clips.append(read_caption(lines, number, text))
                named.add(os.path.realpath(clips[-1][0]))
        except ValueError as error:
            skip(str(error))
    for path in visible(folder):
        if path.suffix.lower() in SOUNDS and os.path.realpath(path) not in named:
            skip(f"{path} is not named in {lines.name}.")
    return clips


def lone_clips(folder: Path) -> list[tuple[Path, str]]:
    """Clips of a folder whose captions stand in files of their own."""
    clips, used = [], set()
    for path in (p for p in visible(folder) if p.suffix.lower() != ".txt"):
        text = path.with_suffix(".txt")
        try:
            caption = read_text(text) if path.is_file() else ""
            used |= {text} if caption else set()
        except (OSError, ValueError) as error:
            used.add(text)
            skip(f"{path}: {error}")
            continue
        if caption:
            clips.append((path, caption))
        elif path.is_file() and path.suffix.lower() in SOUNDS:
            used.add(text)
            skip(f"{path} needs a caption in {text.name}.")
        else:
            skip(f"{path} is a folder." if path.is_dir() else f"{path} has no caption.")
    for path in visible(folder):
        if path.suffix.lower() == ".txt" and path not in used:
            skip(f"{path} is the caption of no sound file.")
    return clips


def visible(folder: Path) -> list[Path]:
    """All that a folder holds, less what is hidden."""
    return [path for path in sorted(folder.iterdir()) if path.name[0] != "."]


def skip(reason: str) -> None:
    """Tell what is left out."""
    wipe()
    print(f"train.py: skipped: {one_line(reason)}", file=sys.stderr)


def read_text(path: Path) -> str:
    """The lines of a text file as one, "" where there is none. Raises OSError, or
    ValueError for one that is not in UTF-8."""
    text = decode(path.read_bytes(), str(path)) if path.is_file() else ""
    return " ".join(line.strip() for line in text.split("\n") if line.strip())


@in_a_line
def decode(text: bytes, name: str) -> str:
    """A text in UTF-8. Raises ValueError with the name of what is none."""
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be a text in UTF-8: {error}") from error


@in_a_line
def read_caption(lines: Path, number: int, line: str) -> tuple[Path, str]:
    """Sound file and caption of one line of captions.jsonl, or ValueError."""
    try:
        entry = json.loads(line)
        file, text = entry["file"], entry["caption"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f'{lines}, line {number} must be {{"file": ..., "caption": ...}}: {error!r}'
        ) from error
    if not isinstance(file, str) or not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{lines}, line {number} must hold a file name and a caption that is not "
            f"empty, got {line:.40}"
        )
    path = lines.parent / os.path.expanduser(file)
    try:
        os.path.realpath(path)
    except ValueError as error:  # of NUL, say
        raise ValueError(f"{lines}, line {number} names no file: {error}") from error
    return path, text


def clip_codes(model: MusicGen, path: Path) -> mx.array:
    """Codes (T, K) of a sound file, encoded in pieces of 30 s.

    They are stored in a hidden file beside it, whose name depends on the content of the
    sound file and on the codec, so each clip is encoded once. Raises FileNotFoundError,
    or ValueError for a sound that is not readable, shorter than 1 s, or silent.
    """
    codes_path = path.with_name(f".{digest(model, path)}.codes.safetensors")
    try:
        codes = mx.load(str(codes_path))["codes"]
        check_codes(model, codes[None])
        return codes
    except (KeyError, RuntimeError, ValueError):
        pass  # there is no such file, or it is damaged
    audio = load_audio(path, model.sampling_rate, model.channels)
    if len(audio) < model.sampling_rate:
        seconds = len(audio) / model.sampling_rate
        raise ValueError(f"{path} must be 1 s long or longer, got {seconds:g} s.")
    if mx.abs(audio).max() < 1e-4:
        raise ValueError(f"{path} is silent.")
    size = 30 * model.sampling_rate
    pieces = [audio[i : i + size] for i in range(0, len(audio), size)]
    with warnings.catch_warnings():  # a piece may be silent
        warnings.filterwarnings("ignore", "The audio prompt is silent")
        most = 10**6  # frames, more than a piece has
        codes = mx.concatenate([encode_prompt(model, x, most)[0] for x in pieces])
    try:
        save_arrays(codes_path, {"codes": codes}, {})
    except OSError:
        pass  # the folder cannot be written: the clip is encoded again next time
    return codes


def digest(model: MusicGen, path: Path) -> str:
    """A name for a sound file's codes, by its content and the model's codec.

    Raises FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no sound file {path}.")
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):  # a clip may be larger than memory
            sha.update(block)
    sha.update(repr((model.config.audio_encoder, model.channels)).encode())
    sha.update(np.array(model.audio_encoder.quantizer.layers[0].codebook.embed))
    return sha.hexdigest()[:24]


def load_clips(model: MusicGen, folder: Path) -> tuple[list[str], list[mx.array]]:
    """Captions of the clips in a folder, and codes (T, K) of each.

    A clip that cannot be read is named on stderr and left out. Raises ValueError where
    no clip is left.
    """
    texts, codes = [], []
    clips = find_clips(folder)
    for path, text in counted(clips, len(clips), "encoding clips", "clips"):
        try:
            codes.append(clip_codes(model, path))
            texts.append(text)
        except (OSError, ValueError) as error:
            skip(str(error))
    if not codes:
        raise ValueError(
            f"{folder} must hold a sound file that can be read, with a caption."
        )
    return texts, codes


def summary(texts: list[str], codes: list[mx.array]) -> str:
    """How many clips there are, and a hash of all that is learned from."""
    sha = hashlib.sha256(json.dumps(texts).encode())
    for clip in codes:
        sha.update(np.array(clip.astype(mx.uint16)))
    return f"{len(codes)} clips ({sha.hexdigest()[:8]})"


def adapt_only(model: MusicGen) -> None:
    """Freeze all parameters but those of the adapters."""
    model.freeze()
    for _, _, module in find(model.decoder, Adapted):
        module.unfreeze(keys=["a", "b"], recurse=False)


def check_adapter_path(args: argparse.Namespace) -> Path:
    """The folder of the checkpoint, where it and the adapter can be written, and
    nothing is lost. Raises ValueError or OSError where not, before minutes of training.
    """
    results = adapter_results(args)
    folder = args.output.with_name(f"{args.output.name}.training")
    for path in results:
        check_apart(path, {"model": local(args.model)})
        check_writable(path if path.parent.exists() else args.output)
    if folder.exists():
        check_writable(folder / CHECKPOINT)
    check_new(args, folder, *results)
    return folder


def adapter_results(args: argparse.Namespace) -> list[Path]:
    """The files of an adapter. Raises ValueError where the output is not one, or with
    `--format peft` not a folder."""
    is_file = args.output.suffix == ".safetensors"
    if args.format == "peft":
        if is_file or args.output.is_file():
            raise ValueError(
                f"--output must be a folder with --format peft, got {args.output}."
            )
        check_folder(args)
        return [args.output / name for name in (peft_files.CONFIG, peft_files.WEIGHTS)]
    if not is_file or args.output.is_dir():
        raise ValueError(f"--output must end in .safetensors, got {args.output}.")
    return [args.output]


def check_folder(args: argparse.Namespace) -> None:
    """Raise FileExistsError where the folder to write to is another's than an
    adapter's."""
    if args.force or not args.output.is_dir():
        return
    others = [path.name for path in visible(args.output)]
    if others and peft_files.CONFIG not in others:
        raise FileExistsError(
            f"{args.output} holds other files than an adapter's, such as {others[0]}: "
            "choose another --output, or write beside them with --force."
        )


def write_adapter(args: argparse.Namespace, model: MusicGen) -> None:
    """Write it in the format that is asked for."""
    settings = {"model": args.model}
    if args.targets != [*LAYERS]:
        settings["targets"] = args.targets
    if args.format == "peft":
        peft_files.write(args.output, *content(model.decoder, args.rank, settings))
    else:
        save_adapter(args.output, model.decoder, args.rank, settings)


def train_lora(args: argparse.Namespace) -> None:
    """Train an adapter on a folder of clips, and write it."""
    folder = check_adapter_path(args)
    with alone(folder):
        train_adapter(args, folder)
    print(f"Wrote {args.output}")


def train_adapter(args: argparse.Namespace, folder: Path) -> None:
    """The same, with the checkpoint in `folder`."""
    mx.random.seed(args.seed)
    dtype = None if args.dtype is None else getattr(mx, args.dtype)
    quantization = {name: getattr(args, name) for name in QUANTIZATION}
    model = MusicGen.from_pretrained(args.model, dtype, **quantization)
    if model.config.text_encoder is None:
        raise ValueError(f"{args.model} has no text, so it cannot be trained here.")
    if args.format == "peft":
        peft_files.check_model(model.config.decoder.prefix_width)
        if model.config.quantization:
            raise ValueError(
                f"{args.model} is quantized, and an adapter of PEFT cannot be worked into "
                "such a model: train on the original, or leave out --format peft."
            )
    add_adapters(model.decoder, args.rank, 1.0, args.targets)
    adapt_only(model)
    texts, codes = load_clips(model, args.data)
    flags = ("model", "rank", "batch", "crop", "dtype", *QUANTIZATION, "seed")
    settings = {name: getattr(args, name) for name in flags}
    settings["targets"] = None if args.targets == [*LAYERS] else args.targets
    settings["data"] = summary(texts, codes)
    training = Training(model, lm_loss, args, folder, {}, settings)
    random = training.random
    ids = [model.tokenizer.encode(text) for text in texts]
    length = max(map(len, ids))
    most = model.frames_in(args.crop)

    def batch() -> tuple[mx.array, ...]:
        rows = random.integers(len(codes), size=args.batch)
        frames = min(most, min(len(codes[r]) for r in rows))
        starts = [random.integers(len(codes[r]) - frames + 1) for r in rows]
        crops = [codes[r][s : s + frames] for r, s in zip(rows, starts)]
        tokens, mask = padded([ids[r] for r in rows], length)
        with_text = mx.array(random.random(args.batch) >= WITHOUT_TEXT)
        return tokens, mask, with_text, mx.stack(crops).astype(mx.int32)

    names = tuple(f"codebook {k}" for k in range(codes[0].shape[1]))
    training.run(batch, names, lambda: write_adapter(args, model))


class Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Train a tiny model, or an adapter.")
    commands = parser.add_subparsers(dest="command", required=True)
    tiny = commands.add_parser("synth", help="train the tiny model from nothing")
    add_parts(tiny)
    lora = commands.add_parser("lora", help="teach a model your own clips")
    add = lora.add_argument
    add("--model", required=True, help="short name, Hub id or folder")
    add("--data", type=named_path, required=True, help="folder of clips with captions")
    output = "adapter.safetensors, or with --format peft the folder adapter"
    add("--output", type=named_path, help=f"(default: {output})")
    formats = dict(choices=["own", "peft"], default="own")
    add("--format", **formats, help="of the adapter (default: %(default)s)")
    add(
        "--targets",
        nargs="+",
        choices=[*LAYERS, *TARGETS],
        default=[*LAYERS],
        help="what is adapted: any of these (default: layers)",
    )
    add("--rank", type=int, default=16, help="of the adapter (default: %(default)s)")
    add("--crop", type=float, default=10.0, help="seconds of a clip (%(default)s)")
    add("--dtype", choices=["float16", "bfloat16", "float32"])
    add_flags(add)
    for command, steps, batch, lr in ((tiny, 14_500, 24, 1e-3), (lora, 500, 1, 1e-4)):
        add = command.add_argument
        add("--steps", type=int, default=steps, help="how many (%(default)s)")
        add("--batch", type=int, default=batch, help="clips in a step (%(default)s)")
        add("--lr", type=float, default=lr, help="learning rate (%(default)s)")
        add("--seconds", type=float, default=ENDLESS, help="to stop after (never)")
        add("--seed", type=int, default=0, help="(default: %(default)s)")
        add("--resume", action="store_true", help="go on from the last checkpoint")
        add("--force", action="store_true", help="overwrite what another one made")
    args = parser.parse_args()
    if args.output is None:
        args.output = Path(
            "adapter" if args.format == "peft" else "adapter.safetensors"
        )
    for name in {"data", "output"} & vars(args).keys():
        setattr(args, name, Path(os.path.expanduser(getattr(args, name))))
    if args.command == "synth" and args.clips is None:
        args.clips = CLIPS[part_of(args)]
    check_numbers(parser, args)
    return args


def add_parts(tiny: argparse.ArgumentParser) -> None:
    """Add the flags of what is trained on clips of synth.py."""
    part = tiny.add_mutually_exclusive_group(required=True)
    part.add_argument("--codec", action="store_true", help="train the codec: first")
    part.add_argument("--lm", action="store_true", help="train T5 and decoder: second")
    text = "train a MAGNeT on the codec and the T5 of --model"
    part.add_argument("--magnet", action="store_true", help=text)
    part.add_argument("--listen", type=int, help="only write this many clips to OUTPUT")
    add = tiny.add_argument
    add("--output", type=named_path, default="tiny-new", help="(default: %(default)s)")
    text = "of which --magnet takes the codec and the T5 (default: %(default)s)"
    add("--model", default="tiny", help=text)
    text = "share of --magnet's rows that are masked in one part (default: %(default)s)"
    add("--holes", type=float, default=0.2, help=text)
    counts = ", ".join(f"{count} for --{name}" for name, count in CLIPS.items())
    add("--clips", type=int, help=f"clips to make (default: {counts})")


def part_of(args: argparse.Namespace) -> str:
    """Which part of a model `synth` trains."""
    return next((part for part in CLIPS if getattr(args, part)), "lm")


def check_numbers(parser: Parser, args: argparse.Namespace) -> None:
    """End with an error for numbers that cannot be."""
    for name in ("steps", "batch", "lr", "seconds", "clips", "rank", "crop", "listen"):
        if (value := getattr(args, name, None)) is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    for name, most in (("lr", 1), ("crop", 600), ("holes", 1), ("seed", 2**32)):
        if not 0 <= getattr(args, name, 0) <= most:
            parser.error(
                f"--{name} must be from 0 to {most}, got {getattr(args, name)}"
            )
    if args.command == "lora":
        try:
            quantized = asked(*(getattr(args, name) for name in QUANTIZATION))
            if quantized and args.format == "peft":
                flag = next(name for name in QUANTIZATION if getattr(args, name))
                raise ValueError(
                    "--format peft needs a model that is not quantized, for PEFT works "
                    f"adapters into no other: leave out --{flag.replace('_', '-')}"
                )
        except ValueError as error:
            parser.error(str(error))
    if getattr(args, "crop", 1) < 0.1:
        parser.error(f"--crop must be at least 0.1 s, got {args.crop}")


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if args.command == "lora":
        return train_lora(args)
    if args.listen:
        args.output.mkdir(parents=True, exist_ok=True)
        synth.listen(args.listen, args.output, overwrite=args.force)
        return
    part = part_of(args)
    train = {"codec": train_codec, "lm": train_lm, "magnet": train_magnet}[part]
    with alone(args.output / "training" / part):
        train(args)


def warn(message: Warning | str, *_) -> None:
    wipe()
    print(f"train.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_nothing()
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    args = parse_arguments()
    try:
        run(args)
    except (OSError, RuntimeError, ValueError) as error:
        wipe()
        sys.exit(f"train.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
