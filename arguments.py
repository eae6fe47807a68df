"""The flags of generate.py: what they are, and what goes together.

    args = parse_arguments(["happy rock", "--duration", "12"])
    args.prompt, args.duration  # ["happy rock"], 12.0

All that can be known before a model is loaded is checked here. Needs job.py, edit.py,
recall.py, magnet_job.py, diffusion_job.py, hub.py, models.py, audio.py, outputs.py, messages.py,
options.py, quantize.py and what these need beside it; where a folder is given without a
prompt, published.py, too.
"""

import argparse
import difflib
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

import mlx.core as mx

from audio import SUBTYPES, check_bitrate, choose_subtype
from diffusion_job import CODEC
from edit import set_edit
from endings import FADE
from hub import MODELS, check_name, follows, local
from job import (
    ALL_KEYS,
    BATCH_OF_FILE,
    RANKS,
    check_level,
    make_job,
)
from magnet_job import asked_for, is_magnet, refuse
from messages import one_line
from models import table
from options import row_seeds
from outputs import check_apart
from outputs import named_path as path
from outputs import print_result, same_file
from quantize import BITS, GROUP_SIZES, MODES, asked
from recall import recalled


def name_of_file(text: str) -> str:
    """The same as it was spelled, for a file's settings."""
    return os.path.expanduser(text)


SHORT = dict(prompt="-p", model="-m", duration="-d", output="-o", seed="-s")
SHORT |= dict(regenerate="--fill")  # of a MAGNeT
CHUNK = 0.5  # seconds
SWITCH = dict(action="store_true")
FLAGS = {  # by groups: name, what it is, and how it is read
    "what to play": {
        "prompt": (
            'a text; "" for anything, - for standard input; may be given several times',
            dict(action="append"),
        ),
        "prompts": (
            "file with a prompt in each line, or JSON objects with any of: "
            f"{', '.join(ALL_KEYS)}. What is there with its settings is not made "
            "again",
            dict(type=path),
        ),
        "duration": (
            "length in seconds; beyond the model's 30 (tiny: 8, AudioGen: 10) a window "
            "slides; a MAGNeT makes no more than its own (default: the model's own: 8, "
            "AudioGen: 5, MAGNeT: 10 or 30)",
            dict(type=float),
        ),
        "seed": (
            "number that fixes the take; further ones count up (default: any)",
            dict(type=int),
        ),
        "takes": (
            "how many of each prompt (default: %(default)s)",
            dict(type=int, default=1),
        ),
        "negative_prompt": ("what to move away from", dict(default="")),
    },
    "the take as a score": {
        "bpm": (
            "tempo, 20 to 400; it is added to the prompt unless that names one",
            dict(type=float),
        ),
        "beats_per_bar": ("beats of a bar (default: 4)", dict(type=int)),
        "loop": (
            "make a loop of so many --bars at --bpm, to the sample; a wav says so to a "
            "sampler",
            SWITCH,
        ),
        "bars": ("length of the loop", dict(type=float)),
        "section_fade": (
            'seconds over which a section, as of the prompt "0: calm | 12: drums", comes '
            "in (default: at once)",
            dict(type=float),
        ),
        "section_context": (
            "seconds of the music before it that a section hears; the less, the more it "
            "follows its text (default: all of its window)",
            dict(type=float),
        ),
        "best_of": (
            "make so many takes, 2 to 64, seeds counted up, and keep the one that "
            "follows its prompt best",
            dict(type=int),
        ),
        "keep_all": ("keep the others of --best-of, too, numbered by rank", SWITCH),
        "rank": (
            "what makes a take of --best-of the best: how much likelier the text makes "
            "it than none (text, the default), or how likely it is (likelihood)",
            dict(choices=RANKS),
        ),
        "regenerate": (
            "make a part again: its seconds, and the take (codes of --save-codes, or any "
            "sound, or that of --audio-prompt). All else stays; several --takes are the "
            "best ones. A MAGNeT fills it in from both sides, or several parts: --fill "
            "2:4 8:12",
            dict(nargs="+", action="extend", metavar=("8:12", "FILE")),
        ),
        "candidates": (
            "how many parts --regenerate makes, 1 to 64, to choose from (default: 8)",
            dict(type=int),
        ),
        "notes": (
            'tune to follow, with --bpm and --model melody and the like, as "C E G:2 | A '
            '- F#:3": notes with their beats, - for a rest',
            dict(),
        ),
        "ending": (
            "make a bar more (without --bpm 2 s), and end in it where the music rests",
            SWITCH,
        ),
        "fade_in": (
            "seconds over which the output rises (default: 0)",
            dict(type=float),
        ),
        "fade_out": (
            "seconds over which it falls; 0 ends it as it is (default: %(default)s, with "
            "--ending 0.25; a --stream is not faded)",
            dict(type=float, default=FADE),
        ),
    },
    "the model": {
        "model": (
            f"{', '.join(MODELS)} (no download); a Hub id or a local folder (default: "
            "%(default)s)",
            dict(type=name_of_file, default="small"),
        ),
        "dtype": (
            "of the decoder (default: float16 on a GPU, float32 on the CPU)",
            dict(choices=["float16", "bfloat16", "float32"]),
        ),
        "q_bits": (
            "quantize the decoder's layers while loading: bits a weight (default: the "
            "mode's own)",
            dict(type=int, choices=BITS),
        ),
        "q_group_size": (
            "weights that share a scale (default: the mode's own)",
            dict(type=int, choices=GROUP_SIZES),
        ),
        "q_mode": (
            "how quantized weights are stored (default: affine)",
            dict(choices=[*MODES]),
        ),
        "adapter": (
            "what changes the model: file of train.py lora, or PEFT's folder or Hub id; "
            "may be given several times",
            dict(type=path, action="append"),
        ),
        "adapter_scale": (
            "how far it changes it: 0 not at all, 1 as it was trained (default: 1); of "
            "several once, or for each in turn",
            dict(type=float, action="append"),
        ),
    },
    "where it goes": {
        "output": (
            "file to write: .wav, .flac, .ogg, .mp3 or .m4a; numbered where there are "
            "several (default: prompt and seed, such as happy-rock-7.wav; with --prompts, "
            "that file's name)",
            dict(type=name_of_file),
        ),
        "force": ("overwrite what is there; with --prompts, make every line", SWITCH),
        "play": ("play what was made; with --stream, while it is made", SWITCH),
        "stream": (
            "write samples as they come; the output is a .wav, or - for a pipe",
            SWITCH,
        ),
        "chunk": (
            "seconds of sound written at a time (default: %(default)s)",
            dict(type=float, default=CHUNK),
        ),
        "loudness": (
            "LUFS to bring the output to, such as -14; a limiter keeps its true peak at "
            "-1 dB or less (default: as it comes)",
            dict(type=float),
        ),
        "peak": (
            "dB of full scale to bring the output's true peak to (default: as it comes)",
            dict(type=float),
        ),
        "subtype": (
            "pcm_16 with dither (default), pcm_24 (wav, flac) or float (wav)",
            dict(type=str.upper),
        ),
        "mp3_bitrate": (
            "kbit/s of an .mp3, 8 to 320 (default: it varies)",
            dict(type=int),
        ),
        "decoder": (
            "what makes the sound of the codes: encodec, which is the model's own, or "
            "diffusion, which is slow and cleaner (4.6 GB); or a file, a folder or a Hub "
            "id of such (default: encodec)",
            dict(type=name_of_file),
        ),
        "save_codes": ("file to keep the codes in: .safetensors", dict(type=path)),
    },
    "to begin with a sound": {
        "audio_prompt": ("sound file to continue", dict(type=name_of_file)),
        "prompt_start": (
            "second of the sound file to begin at (default: 0)",
            dict(type=float),
        ),
        "prompt_length": (
            "seconds of the sound file to take (default: all)",
            dict(type=float),
        ),
        "drop_prompt": ("leave what is continued out of the output", SWITCH),
    },
    "to follow a sound": {
        "melody": (
            "sound file whose tune to follow, with --model melody and the like",
            dict(type=name_of_file),
        ),
        "melody_start": ("second of it to begin at (default: 0)", dict(type=float)),
        "no_separate": (
            "take the melody as it is, not the vocals and other instruments that Demucs "
            "finds in it",
            SWITCH,
        ),
        "show_melody": ("draw the notes of the melody", SWITCH),
        "save_melody": (
            "file to write the separated sound to",
            dict(type=name_of_file),
        ),
        "style": (
            "sound file in whose manner to play, with --model style",
            dict(type=name_of_file),
        ),
        "style_start": (
            "second of it at which the excerpt begins (default: any, by the seed)",
            dict(type=float),
        ),
        "style_length": (
            "seconds of the excerpt, 1.5 to 4.5 (default: 3)",
            dict(type=float),
        ),
        "style_quantizers": (
            "how much of the excerpt to keep to, 1 to 6; fewer are freer (default: 3)",
            dict(type=int),
        ),
        "guidance_beta": (
            "weight of the prompt beside the style, such as 5 (default: they count "
            "alike)",
            dict(type=float),
        ),
    },
    "what was made before": {
        "again": (
            "sound or codes whose settings to use, but for the flags given beside",
            dict(type=path),
        ),
        "resume": (
            "file of codes to go on from, to a longer --duration",
            dict(type=path),
        ),
        "redecode": (
            "file of codes to make the sound of again, without generating",
            dict(type=path),
        ),
    },
    "how it is drawn": {
        "temp": (
            "sampling temperature; 0 takes the likeliest (default: 1; MAGNeT: 3, which "
            "falls)",
            dict(type=float),
        ),
        "top_k": (
            "draw from this many likeliest codes, 1 to 2048 (default: 250; MAGNeT: 0, "
            "off)",
            dict(type=int),
        ),
        "top_p": (
            "draw from the likeliest codes that together reach this probability, 0 to 1, "
            "instead of the top k; 0 is off (default: 0; MAGNeT: 0.9)",
            dict(type=float),
        ),
        "guidance_coef": (
            "weight of the prompt; 1 is no guidance (default: 3)",
            dict(type=float),
        ),
        "extend_stride": (
            "seconds by which the window of long audio slides (default: 18; tiny: 4.8; "
            "AudioGen: 2)",
            dict(type=float),
        ),
        "max_guidance_coef": (
            "MAGNeT's weight of the prompt where all is masked (default: 10)",
            dict(type=float),
        ),
        "min_guidance_coef": (
            "... and towards which it falls (default: 1)",
            dict(type=float),
        ),
        "decoding_steps": (
            "MAGNeT's passes for each codebook (default: 20,10,10,10)",
            dict(),
        ),
        "span_arrangement": (
            "whether MAGNeT masks spans side by side, or such as begin anywhere "
            "(default: nonoverlap)",
            dict(choices=["nonoverlap", "stride1"]),
        ),
    },
    "how it runs": {
        "batch_size": (
            "takes at once (default: what memory holds; with --prompts at most "
            f"{BATCH_OF_FILE})",
            dict(type=int),
        ),
        "tensor_parallel": (
            "share one model among the processes of mlx.launch",
            SWITCH,
        ),
        "plain": (
            "run the plain step and decode, which are slower and easy to follow",
            SWITCH,
        ),
        "quiet": ("say nothing but warnings and errors", SWITCH),
    },
}
EXAMPLES = """examples:
  python generate.py "happy rock" --model tiny --play
  python generate.py -p "epic strings" -m stereo-large -d 30 -o epic.flac
  python generate.py --prompts songs.txt --output song.wav
  python generate.py "8-bit arcade" -m melody --melody hummed.m4a
  python generate.py "the same, longer" --audio-prompt song.mp3 --duration 60
"""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what may have been meant."""

    source = ""  # of what is parsed, where it is no command line

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(self.source + message)}\n")

    def parse_args(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = f"; did you mean {known[0]}?" if known else ""
            if flag == "-" or not flag.startswith("-"):
                hint = "; a prompt of several words stands in quotes"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return args


def make_parser() -> Parser:
    parser = Parser(
        prog="generate.py",
        usage='%(prog)s "happy rock" [flags]',
        description="Generate music from a text with MusicGen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = (
        f"MusicGen for MLX: mlx {mx.__version__}, Python {platform.python_version()}"
    )
    parser.add_argument("--version", action="version", version=versions)
    parser.add_argument(
        "--list-models", help="show all models, with their sizes", **SWITCH
    )
    parser.add_argument(
        "text", nargs="?", metavar="PROMPT", help="what to play, as of --prompt"
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (about, reads) in flags.items():
            short = [SHORT[name]] if name in SHORT else []
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, *short, help=about, **reads)
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Ends the process with a line where they cannot be."""
    parser = make_parser()
    args = parser.parse_args([*recalled(parser, argv), *argv])
    if args.list_models:
        show_models(parser, argv)
    if args.text is not None:
        args.prompt = [*(args.prompt or []), args.text]
    if args.output is None and args.prompts:
        args.output = f"{args.prompts.stem}.wav"
    try:
        set_adapters(args)
        args.magnet = is_magnet(args.model)
        args.asked = asked_for(vars(args) | {"stream": wants_stream(args)})
        if args.magnet is not None:
            refuse(args.asked, args.magnet)
        set_edit(args)
        if args.regenerate and args.regenerate.path.suffix != ".safetensors":
            args.fade_out = None if args.fade_out == FADE else args.fade_out
        if args.prompt and "-" in args.prompt:
            args.prompt = [read_input() if p == "-" else p for p in args.prompt]
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def wants_stream(args: argparse.Namespace) -> bool:
    return args.stream or args.output == "-"


def show_models(parser: Parser, argv: list[str]) -> None:
    """Print the released models, and end the process. Nothing else can be asked then."""
    if len(argv) > 1:
        parser.error("--list-models makes nothing: leave out what is beside it")
    print_result(table())
    parser.exit()


def set_adapters(args: argparse.Namespace) -> None:
    """One adapter and its scale, or lists of as many. Raises ValueError where the scales
    are not as many as the adapters."""
    adapters, scales = args.adapter or [], args.adapter_scale or [1.0]
    if not adapters and any(scale != 1 for scale in scales):
        raise ValueError("--adapter-scale needs an --adapter")
    if adapters and len(scales) not in (1, len(adapters)):
        raise ValueError(
            "--adapter-scale must be given once, or once for each --adapter, got "
            f"{len(scales)} for {len(adapters)}"
        )
    if len(adapters) > 1:
        scales = scales * len(adapters) if len(scales) == 1 else scales
        args.adapter, args.adapter_scale = adapters, scales
    else:
        args.adapter, args.adapter_scale = next(iter(adapters), None), scales[0]


def read_input() -> str:
    """The text on standard input. Raises ValueError where there is none."""
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input must be a text: {error}") from error
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError("--prompt - reads standard input, which is closed") from error
    if not text:
        raise ValueError('standard input is empty; for any music give --prompt ""')
    return text


NO_PROMPT = 'a prompt must be given, such as "happy rock", or --prompts'


def may_lack_text(model: str) -> bool:
    """Whether a model may be one without text, as far as is known before it is loaded."""
    if follows(model) is not None:
        return False
    folder = local(model)
    if folder is None:
        return True
    from published import may_lack_text

    return may_lack_text(folder)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go together or cannot be made."""
    for name, kind in (("melody", "melody"), ("notes", "melody"), ("style", "style")):
        if getattr(args, name) is not None and follows(args.model) not in (kind, None):
            raise ValueError(
                f"--{name} needs a model that follows one, such as --model {kind}; "
                f"{args.model} does not"
            )
    if args.style and args.prompt is None and args.prompts is None:
        args.prompt = [""]
    args.any_music = args.prompt is None and args.prompts is None
    if args.any_music and not may_lack_text(args.model):
        raise ValueError(NO_PROMPT)
    if args.any_music:  # of a model without text, perhaps: generate.py sees to it
        args.prompt = [""]
    args.may_lack_text = args.prompts is not None and may_lack_text(args.model)
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("a prompt and --prompts must not be given together")
    for name in ("takes", "batch_size"):
        number = getattr(args, name)
        if number is not None and not 1 <= number <= 10_000:
            raise ValueError(f"{name} must be from 1 to 10000, got {number}")
    if args.prompts is not None and args.takes != 1:
        raise ValueError("--takes goes with --prompt; in a file repeat the line")
    check_codes(args)
    if args.show_melody or args.save_melody:
        check_melody(args)
    check_name(args.model)
    asked(args.q_bits, args.q_group_size, args.q_mode)
    args.stream = wants_stream(args)
    if args.play and args.output == "-":
        raise ValueError("--play does not go with --output -: leave one of them out")
    if args.chunk != CHUNK and not args.stream:
        raise ValueError("--chunk goes with --stream: leave it out, or stream")
    if args.stream:
        check_stream(args)
    else:
        choose_subtype(args.output or "a .wav", args.subtype)
        check_bitrate(args.output or "a .wav", args.mp3_bitrate)
    args.seed_is_given = args.seed is not None
    if args.seed_is_given:
        row_seeds(args.seed, rows=1)
    values = vars(args) | {"seed": args.seed or 0, "output": args.output or "x.wav"}
    check_files(args)
    overrides = set() if args.prompts else None
    for prompt in args.prompt or [""]:
        job = make_job(values | {"prompt": prompt}, overrides=overrides)
    job.check_options()
    check_level(args.loudness, args.peak)


def check_melody(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go with --show-melody and --save-melody."""
    if not args.melody and (args.save_melody or args.notes is None):
        raise ValueError(
            "--show-melody and --save-melody need a --melody; --notes are shown, too"
        )
    if args.prompts or args.redecode:
        raise ValueError("--show-melody and --save-melody go with --prompt alone")
    if args.save_melody:
        choose_subtype(args.save_melody)
        if args.output and same_file(args.save_melody, args.output):
            raise ValueError(
                f"--save-melody must be a file of its own: {args.save_melody}"
            )


def check_files(args: argparse.Namespace) -> None:
    """Raise ValueError where a file to write is one that is read."""
    if args.prompts and args.prompts.suffix.lower() in SUBTYPES:
        raise ValueError(f"--prompts must be a text file, got {args.prompts}")
    inputs = {f"--{name}": getattr(args, name) for name in ("again", "resume")}
    inputs["--redecode"] = args.redecode
    inputs["--regenerate"] = args.regenerate and args.regenerate.path
    adapters = args.adapter if isinstance(args.adapter, list) else [args.adapter]
    for i, adapter in enumerate(adapters):
        inputs[f"--adapter {i + 1}" if i else "--adapter"] = adapter
    inputs |= {"--prompts": args.prompts, "--audio-prompt": args.audio_prompt}
    inputs |= {"--melody": args.melody, "--style": args.style}
    inputs["--decoder"] = args.decoder
    inputs["--model"] = local(args.model)
    for output in (args.output, args.save_codes, args.save_melody):
        if output and output != "-":
            check_apart(output, inputs)
    if args.output and args.save_codes and same_file(args.output, args.save_codes):
        raise ValueError(f"--save-codes must be a file of its own: {args.save_codes}")


def check_codes(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go with --save-codes and --resume."""
    if not (args.save_codes or args.resume or args.redecode):
        return
    if args.prompts or len(args.prompt) > 1 or args.takes > 1:
        raise ValueError("--save-codes, --resume and --redecode go with one take")
    if args.tensor_parallel:
        raise ValueError("--save-codes and --resume go without --tensor-parallel")
    if args.redecode and (args.stream or args.output == "-"):
        raise ValueError("--redecode writes a file: leave out --stream and --output -")
    if args.save_codes and args.save_codes.suffix != ".safetensors":
        raise ValueError(f"--save-codes must end in .safetensors: {args.save_codes}")


def check_stream(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go with --stream."""
    if args.prompts or len(args.prompt) > 1 or args.takes > 1 or args.drop_prompt:
        raise ValueError(
            "--stream makes one take of one prompt, with all of it: it does not go with "
            "--prompts, --takes or --drop-prompt"
        )
    if args.tensor_parallel:
        raise ValueError("--stream does not go with --tensor-parallel")
    if args.loop:
        raise ValueError("--loop needs the whole take: leave out --stream")
    if args.best_of:
        raise ValueError("--best-of needs whole takes: leave out --stream")
    if args.decoder not in (None, CODEC):
        raise ValueError(f"--decoder {args.decoder} needs the whole take: no --stream")
    output = args.output or "x.wav"
    if output != "-" and Path(output).suffix.lower() != ".wav":
        raise ValueError(f"--stream writes .wav or -, got --output {args.output}")
    if args.loudness is not None or args.peak is not None:
        raise ValueError(
            "--loudness and --peak need the whole take: leave out --stream"
        )
    if args.ending or args.fade_in or args.fade_out not in (0, FADE):
        raise ValueError("--ending and fades need the whole take: leave out --stream")
    args.fade_out = None
    if args.mp3_bitrate is not None:
        raise ValueError("--mp3-bitrate needs an .mp3: leave out --stream")
    if args.subtype not in (None, "PCM_16"):
        raise ValueError(f"--stream writes pcm_16, not --subtype {args.subtype}")
    if not 0.02 <= args.chunk < 1e6:
        raise ValueError(f"--chunk must be at least 0.02 seconds, got {args.chunk}")
