# /// script
# requires-python = ">=3.10"
# dependencies = [
#     'mlx>=0.32.3; sys_platform == "darwin"',
#     'mlx[cpu]>=0.32.3; sys_platform == "linux"',
#     'numpy>=1.23.2',
#     'sentencepiece>=0.1.98',
#     'huggingface_hub>=0.25.0',
#     'safetensors>=0.3.0',
#     'soundfile>=0.13.0',
# ]
# ///
"""Generate music from the command line.

    python generate.py --prompt "epic orchestral soundtrack" --model stereo-large

`python generate.py --help` explains every flag. Needs jobs.py, lines.py and stream.py
beside it, which plan and write takes, hub.py, musicgen.py and all that these need,
messages.py and together.py; lora.py for an adapter, melody.py to follow a melody.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from huggingface_hub.utils import logging, tqdm

import jobs
import lines
import settings
import stream
from audio import check_bitrate, check_writable, choose_subtype, save_audio
from encodec_stream import play as play_take
from hub import MODELS, check_name, follows, local, same_model
from jobs import Job, Result, Sounds, Start
from messages import Forgiving, one_line
from musicgen import MusicGen, Take
from options import row_seeds
from outputs import check_apart, check_new, leave_nothing, same_file
from together import Peers, signals_at_once

HELP = {
    "prompt": 'what to play; "" for anything; may be given several times',
    "prompts": "file with a prompt in each line, or JSON objects with any of: "
    f"{', '.join(jobs.ALL_KEYS)}. What is there with its settings is not made again",
    "model": f"{', '.join(MODELS)} (no download); a Hub id or a local folder "
    "(default: %(default)s)",
    "duration": "length in seconds; beyond the model's 30 (tiny: 8) a window slides "
    "(default: %(default)s)",
    "extend_stride": "seconds by which the window of long audio slides (default: 18; "
    "tiny: 4.8)",
    "output": "file to write: .wav, .flac, .ogg, .mp3 or .m4a; numbered where there are "
    "several (default: prompt and seed, such as happy-rock-7.wav; of a file, its name)",
    "force": "overwrite what is there; of a file of prompts make every line",
    "stream": "write samples as they come; the output is a .wav, or - for a pipe",
    "chunk": "seconds of sound written at a time (default: %(default)s)",
    "seed": "number that fixes the take; further ones count up (default: any)",
    "takes": "how many of each prompt (default: %(default)s)",
    "batch_size": "takes at once (default: what memory holds; of a file at most "
    f"{jobs.BATCH_OF_FILE})",
    "temp": "sampling temperature; 0 takes the likeliest (default: %(default)s)",
    "top_k": "draw from this many likeliest codes, 1 to 2048 (default: %(default)s)",
    "top_p": "draw from the likeliest codes that together reach this probability, "
    "0 to 1, instead of the top k; 0 is off (default: %(default)s)",
    "guidance_coef": "weight of the prompt; 1 is no guidance (default: %(default)s)",
    "negative_prompt": "what to move away from",
    "audio_prompt": "sound file to continue",
    "prompt_start": "second of the sound file to begin at (default: 0)",
    "prompt_length": "seconds of the sound file to take (default: all)",
    "drop_prompt": "leave what is continued out of the output",
    "melody": "sound file whose tune to follow, with --model melody and the like",
    "melody_start": "second of it to begin at (default: 0)",
    "no_separate": "take the melody as it is, not the vocals and other instruments "
    "that Demucs finds in it",
    "show_melody": "draw the notes of the melody",
    "save_melody": "file to write the separated sound to",
    "style": "sound file in whose manner to play, with --model style",
    "style_start": "second of it at which the excerpt begins (default: any, by the "
    "seed)",
    "style_length": "seconds of the excerpt, 1.5 to 4.5 (default: 3)",
    "style_quantizers": "how much of the excerpt to keep to, 1 to 6; fewer are freer "
    "(default: 3)",
    "guidance_beta": "weight of the prompt beside the style, such as 5 (default: they "
    "count alike)",
    "loudness": "LUFS to bring the output to, such as -14; a limiter keeps its true peak "
    "at -1 dB or less (default: as it comes)",
    "peak": "dB of full scale to bring the output's true peak to (default: as it comes)",
    "subtype": "pcm_16 with dither (default), pcm_24 (wav, flac) or float (wav)",
    "mp3_bitrate": "kbit/s of an .mp3, 8 to 320 (default: it varies)",
    "save_codes": "file to keep the codes in: .safetensors",
    "resume": "file of codes to go on from, to a longer --duration",
    "redecode": "file of codes to make the sound of again, without generating",
    "again": "sound or codes whose settings to use, but for the flags given beside",
    "dtype": "of the decoder (default: float16 on a GPU, float32 on the CPU)",
    "q_bits": "quantize the decoder's layers while loading: 4 or 8 bits per weight",
    "adapter": "file of train.py lora that changes the model",
    "adapter_scale": "how much it does (default: %(default)s)",
    "tensor_parallel": "share one model among the processes of mlx.launch",
    "plain": "run the plain step and decode, which are slower and easy to follow",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def add(self, name: str, *short: str, **settings) -> None:
        flag = "--" + name.replace("_", "-")
        self.add_argument(flag, *short, help=HELP[name], **settings)


def make_parser() -> Parser:
    parser = Parser(description="Generate music from a text with MusicGen.")
    parser.add("prompt", "-p", action="append")
    parser.add("prompts", type=Path)
    parser.add("model", default="small")
    parser.add("duration", type=float, default=8.0)
    parser.add("extend_stride", type=float)
    parser.add("output")
    parser.add("force", action="store_true")
    parser.add("stream", action="store_true")
    parser.add("chunk", type=float, default=0.5)
    parser.add("seed", type=int)
    parser.add("takes", type=int, default=1)
    parser.add("batch_size", type=int)
    parser.add("temp", type=float, default=1.0)
    parser.add("top_k", type=int, default=250)
    parser.add("top_p", type=float, default=0.0)
    parser.add("guidance_coef", type=float, default=3.0)
    parser.add("negative_prompt", default="")
    parser.add("audio_prompt")
    parser.add("prompt_start", type=float)
    parser.add("prompt_length", type=float)
    parser.add("drop_prompt", action="store_true")
    parser.add("melody")
    parser.add("melody_start", type=float)
    parser.add("no_separate", action="store_true")
    parser.add("show_melody", action="store_true")
    parser.add("save_melody")
    parser.add("style")
    parser.add("style_start", type=float)
    parser.add("style_length", type=float)
    parser.add("style_quantizers", type=int)
    parser.add("guidance_beta", type=float)
    parser.add("loudness", type=float)
    parser.add("peak", type=float)
    parser.add("subtype", type=str.upper)
    parser.add("mp3_bitrate", type=int)
    parser.add("save_codes", type=Path)
    parser.add("resume", type=Path)
    parser.add("redecode", type=Path)
    parser.add("again", type=Path)
    parser.add("dtype", choices=["float16", "bfloat16", "float32"])
    parser.add("q_bits", type=int, choices=[4, 8])
    parser.add("adapter", type=Path)
    parser.add("adapter_scale", type=float, default=1.0)
    parser.add("tensor_parallel", action="store_true")
    parser.add("plain", action="store_true")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args([*recalled(parser), *sys.argv[1:]])
    if args.output is None and args.prompts:
        args.output = f"{args.prompts.stem}.wav"
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go together or cannot be made."""
    for name in ("melody", "style"):
        if getattr(args, name) and follows(args.model) not in (name, None):
            raise ValueError(
                f"--{name} needs a model that follows one, such as --model {name}; "
                f"{args.model} does not"
            )
    if args.style and args.prompt is None and args.prompts is None:
        args.prompt = [""]
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("either --prompt or --prompts must be given")
    for name in ("takes", "batch_size"):
        number = getattr(args, name)
        if number is not None and not 1 <= number <= 10_000:
            raise ValueError(f"{name} must be from 1 to 10000, got {number}")
    if args.prompts is not None and args.takes != 1:
        raise ValueError("--takes goes with --prompt; in a file repeat the line")
    check_codes(args)
    if args.adapter_scale != 1 and not args.adapter:
        raise ValueError("--adapter-scale needs an --adapter")
    if args.show_melody or args.save_melody:
        check_melody(args)
    check_name(args.model)
    args.stream = args.stream or args.output == "-"
    if args.stream:
        check_stream(args)
    else:
        choose_subtype(args.output or "x.wav", args.subtype)
        check_bitrate(args.output or "x.wav", args.mp3_bitrate)
    args.seed_is_given = args.seed is not None
    if args.seed_is_given:
        row_seeds(args.seed, rows=1)
    values = vars(args) | {"prompt": "", "seed": args.seed or 0}
    values["output"] = args.output or "x.wav"
    check_files(args)
    overrides = set() if args.prompts else None
    jobs.make_job(values, overrides=overrides).options.check(max_duration=math.inf)
    jobs.check_level(args.loudness, args.peak)


OF_MODEL = ("model", "dtype", "q_bits", "adapter", "adapter_scale")
RECALLED = {*jobs.ALL_KEYS, *OF_MODEL} - {"output", "mp3_bitrate"}
KEPT = {"output", *jobs.LEVELS, "subtype", "mp3_bitrate"}  # flags beside --redecode
REPLACES = {  # flags, and the settings of a file that they put out of force
    "prompt": {"prompt"},
    "prompts": {"prompt"},
    "audio_prompt": {*jobs.AUDIO_KEYS},
    "melody": {*jobs.MELODY_KEYS},
    "style": {*jobs.STYLE_KEYS},
    "style_length": {"style_start"},
    "model": {"adapter", "adapter_scale"},
    "adapter": {"adapter_scale"},
    "loudness": {"peak"},
    "peak": {"loudness"},
    "stream": {"loudness", "peak", "subtype", "drop_prompt"},
    "output": {"subtype"},
}


def recalled(parser: Parser) -> list[str]:
    """The settings of --again, --resume or --redecode, as flags to go before those
    that are given."""
    args, _ = parser.parse_known_args()
    sources = [p for p in (args.again, args.resume, args.redecode) if p is not None]
    if not sources:
        return []
    given = {k for k, v in vars(args).items() if v != parser.get_default(k)}
    if len(sources) > 1:
        parser.error("--again, --resume and --redecode must not come together")
    shaping = given & ({"prompts", "takes", *jobs.ALL_KEYS} - KEPT)
    if args.redecode and shaping:
        name = min(shaping).replace("_", "-")
        parser.error(f"--redecode makes the sound of codes as they are, not --{name}")
    if args.resume and args.audio_prompt:
        parser.error("--resume goes on from codes, not from an --audio-prompt")
    try:
        record = settings.read_settings(sources[0])
    except (OSError, ValueError) as error:
        report(f"error: {error}")
        sys.exit(1)
    replaced = set().union(*(REPLACES.get(name, ()) for name in given))
    wanted = {k: record[k] for k in (RECALLED - replaced) & record.keys()}
    flags = {f"--{k.replace('_', '-')}": v for k, v in wanted.items()}
    chosen = {f: v for f, v in flags.items() if v is not None and v is not False}
    return [flag if v is True else f"{flag}={v}" for flag, v in chosen.items()]


def check_melody(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go with --show-melody and --save-melody."""
    if not args.melody:
        raise ValueError("--show-melody and --save-melody need a --melody")
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
    inputs = {f"--{name}": getattr(args, name) for name in ("again", "resume")}
    inputs |= {"--redecode": args.redecode, "--adapter": args.adapter}
    inputs |= {"--prompts": args.prompts, "--audio-prompt": args.audio_prompt}
    inputs |= {"--melody": args.melody, "--style": args.style}
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
        raise ValueError("--redecode has the whole at once, so not --stream")
    if args.save_codes and args.save_codes.suffix != ".safetensors":
        raise ValueError(f"--save-codes must end in .safetensors: {args.save_codes}")


def check_stream(args: argparse.Namespace) -> None:
    """Raise ValueError for what does not go with --stream."""
    if args.prompts or len(args.prompt) > 1 or args.takes > 1 or args.drop_prompt:
        raise ValueError("--stream makes one take, and does not drop its beginning")
    if args.tensor_parallel:
        raise ValueError("--stream does not go with --tensor-parallel")
    output = args.output or "x.wav"
    if output != "-" and Path(output).suffix.lower() != ".wav":
        raise ValueError(f"--stream writes .wav or -, got --output {args.output}")
    if args.loudness is not None or args.peak is not None:
        raise ValueError("--loudness and --peak need the whole, so not --stream")
    if args.mp3_bitrate is not None:
        raise ValueError("--mp3-bitrate goes with an .mp3, so not --stream")
    if args.subtype not in (None, "PCM_16"):
        raise ValueError(f"--stream writes pcm_16, not --subtype {args.subtype}")
    if not 0.02 <= args.chunk < 1e6:
        raise ValueError(f"--chunk must be at least 0.02 seconds, got {args.chunk}")


class Stop:
    """Whether Ctrl-C was pressed. A second one raises KeyboardInterrupt.

    It is `heeded` once somebody was told so.
    """

    def __init__(self):
        self._asked = self.heeded = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def __call__(self) -> bool:
        self.heeded = self._asked
        return self._asked


def never() -> bool:
    """For takes that Ctrl-C ends at once."""
    return False


def agreed_seed(group: mx.distributed.Group) -> int:
    """Any seed, the same in every process."""
    mine = secrets.randbits(31) if group.rank() == 0 else 0
    return jobs.agree([mine], group)[0]


def make_jobs(args: argparse.Namespace) -> list[Job]:
    if args.prompts is not None:
        return lines.plan_file(args.prompts, vars(args))
    return jobs.plan(args.prompt, vars(args), args.takes)


def choose_jobs(args: argparse.Namespace, group: mx.distributed.Group) -> list[Job]:
    """What this process is to make. Says which lines of a file are left out, and why."""
    planned = make_jobs(args)
    if not args.tensor_parallel:
        planned = jobs.share(planned, group)
    if args.prompts is None:
        return planned
    given = {name: getattr(args, name) for name in OF_MODEL}
    given = {name: value for name, value in given.items() if value is not None}
    given |= dict(adapter=args.adapter and str(args.adapter))
    wanted, messages = lines.left(planned, given, args.force)
    if not args.tensor_parallel:
        tell_all(messages)
        return wanted
    if group.rank() == 0:
        tell_all(messages)
    return lines.agreed(planned, wanted, group)


def tell_all(messages: list[str]) -> None:
    for message in messages:
        report(message)


def run(args: argparse.Namespace) -> int:
    """Make what is to be made; returns the exit status."""
    with signals_at_once():
        group = mx.distributed.init()
        if args.tensor_parallel and group.size() == 1:
            raise ValueError(
                "--tensor-parallel needs mlx.launch with 2 or more processes."
            )
        if args.seed is None:
            args.seed = agreed_seed(group)
        peers = Peers(group)
    if args.tensor_parallel:
        with peers.watched(
            "another process that shares the model has ended, and so does this one."
        ):
            status = make(choose_jobs(args, group), args, group)
            jobs.agree([status], group)
        return status
    status = make(choose_jobs(args, group), args, group)
    with peers.watched(
        "another process has ended before its share was made: run the command again."
    ):
        jobs.agree([status], group)  # mlx.launch ends all when one fails, so all wait
    return status


def make(
    wanted: list[Job], args: argparse.Namespace, group: mx.distributed.Group
) -> int:
    """Run the jobs and report those that failed; returns the exit status."""
    together = group if args.tensor_parallel else None
    if not wanted:
        print("Nothing is left to make.")
        return 0
    # now, not after the minutes of loading
    source = args.resume or args.redecode
    failed = jobs.check(wanted, together, args.output != "-", source is None)
    bad = {id(result.job) for result in failed}
    good = [job for job in wanted if id(job) not in bad]
    for path in filter(None, (args.save_codes, args.save_melody)):
        check_writable(path)
        if not args.force:
            check_new(path)
    if args.adapter:
        from lora import read_adapter

        read_adapter(args.adapter)
    results, stop = failed, never
    if good and (args.prompts or not failed):
        model = load(args, together)
        sounds = Sounds(model)
        if not (args.prompts or args.redecode):  # while Ctrl-C still ends it at once
            tell_melody(args, model, sounds.melody(good[0]))
        start = read_start(args, model)
        stop = never if args.prompts or together else Stop()
        if args.redecode:
            results += redecode(model, good[0], sounds, start, args)
        elif args.stream:
            results += play(model, good[0], sounds, start, stop, args)
        else:
            results += make_batches(model, good, sounds, start, stop, args)
    if together is None or group.rank() == 0:
        tell_failures(results, args)
    failures = [result for result in results if result.error]
    if stop is not never and stop.heeded and not failures:
        return tell_stop(args, sum(result.seconds for result in results))
    return 1 if failures else 0


def load(args: argparse.Namespace, group: mx.distributed.Group | None) -> MusicGen:
    dtype = getattr(mx, args.dtype) if args.dtype else None
    adapter = dict(adapter=args.adapter, adapter_scale=args.adapter_scale)
    model = MusicGen.from_pretrained(
        args.model, dtype, args.q_bits, group=group, **adapter
    )
    model.plain = model.plain or args.plain
    return model


def tell_melody(args: argparse.Namespace, model: MusicGen, melody: mx.array) -> None:
    """Show and keep the sound (N, 1) that holds the melody, where that is wanted."""
    if args.show_melody:
        from melody import draw, extract_chroma

        drawn = draw(extract_chroma(melody, model.sampling_rate))
        tqdm.write(drawn, file=sys.stderr if args.output == "-" else sys.stdout)
    if args.save_melody:
        save_audio(args.save_melody, melody, model.sampling_rate)


def read_start(args: argparse.Namespace, model: MusicGen) -> Start | None:
    """Saved codes to begin with, if any. Raises ValueError for codes of another model,
    or as long as the take is to be."""
    source = args.resume or args.redecode
    if source is None:
        return None
    from prompt import check_codes

    codes, record = settings.load_codes(source)
    check_source(source, record, model)
    check_codes(model, codes)
    prompt_frames = min(record.get("prompt_frames", 0), codes.shape[1])
    if args.resume:
        codes = sure_codes(args, model, codes, prompt_frames)
    return Start(codes, prompt_frames)


def check_source(source: Path, record: dict, model: MusicGen) -> None:
    """Raise ValueError for codes of another model; warn of another revision."""
    name = str(record.get("model"))
    if not same_model(name, model.name):
        raise ValueError(f"{source} holds codes of {name}, not of {model.name}.")
    if record.get("revision") != model.revision:
        warn(f"{source} is of revision {record.get('revision')}, not {model.revision}.")


def sure_codes(
    args: argparse.Namespace, model: MusicGen, codes: mx.array, prompt_frames: int
) -> mx.array:
    """Codes to go on from, less the last two frames that were generated: where a take
    ends, its later codebooks saw blanks instead of what comes now."""
    T = codes.shape[1]
    if T >= model.frames_in(args.duration):
        raise ValueError(
            f"{args.resume} is {T / model.frame_rate:g} s long already; --duration "
            f"must be more, got {args.duration:g}."
        )
    unsure = max(max(model.config.decoder.delays) - 1, 0)
    return codes[:, : max(T - unsure, prompt_frames)]


def redecode(
    model: MusicGen, job: Job, sounds: Sounds, start: Start, args: argparse.Namespace
) -> list[Result]:
    """Make the sound of saved codes."""
    began = time.perf_counter()
    codes, prompt_frames = start
    samples = jobs.decode(model, job, codes, prompt_frames)[0]
    record = jobs.take_settings(model, job, sounds, prompt_frames)
    job = jobs.save(model, job, samples, record)
    if args.save_codes:
        settings.save_codes(args.save_codes, codes, record)
    seconds = len(samples) / model.sampling_rate
    result = Result(job, None, seconds, time.perf_counter() - began)
    print(describe(result))
    return [result]


def make_batches(
    model: MusicGen,
    wanted: list[Job],
    sounds: Sounds,
    start: Start | None,
    stop: Stop,
    args: argparse.Namespace,
) -> list[Result]:
    """Run the jobs in batches, showing how far they are."""
    group, results = model.decoder.group, []
    size = args.batch_size or (jobs.BATCH_OF_FILE if args.prompts else len(wanted))
    with tqdm(unit="step", disable=group is not None and group.rank() > 0) as bar:
        for batch in jobs.run(model, wanted, size, sounds, start):
            if stop():
                break
            for _ in until(watch(batch, bar), stop):
                pass
            for result in batch.save(args.save_codes):
                results.append(result)
                if not result.error:
                    tqdm.write(describe(result), file=sys.stdout)
    return results


def watch(steps: Iterator[Take], bar: tqdm) -> Iterator[Take]:
    """The same steps, shown in a bar."""
    for take in steps:
        if take.step == 1:
            bar.reset(take.total)
        bar.update()
        yield take


def play(
    model: MusicGen,
    job: Job,
    sounds: Sounds,
    start: Start | None,
    stop: Stop,
    args: argparse.Namespace,
) -> list[Result]:
    """Stream one job, showing how far it is. The codes are kept too, where they are
    wanted, before each piece all that there are."""
    began = time.perf_counter()
    audio = None if start else sounds.audio_prompt(job)
    prompt_frames = jobs.frames_of_prompt(model, audio, start)
    record = jobs.take_settings(model, job, sounds, prompt_frames)
    take = jobs.make_take(model, [job], sounds, audio, start)
    with tqdm(unit="step") as bar:
        steps = until(watch(take, bar), stop)
        pieces = play_take(model, take, args.chunk, steps)
        if args.save_codes:
            pieces = keep_codes(pieces, take, args.save_codes, record)
        form = (model.channels, model.sampling_rate, settings.to_comment(record))
        whole = lambda: take.step == take.total  # noqa: E731
        output = (str(job.output), pieces, *form, job.overwrite, whole)
        seconds, path = stream.write(*output)
    job = replace(job, output=Path(path))
    result = Result(job, None, seconds, time.perf_counter() - began)
    print(describe(result), file=sys.stderr if path == "-" else sys.stdout)
    return [result]


def until(steps: Iterator[Take], stop: Stop) -> Iterator[Take]:
    """The steps until Ctrl-C; after the last it is not asked for."""
    for take in steps:
        yield take
        if take.step < take.total and stop():
            return


def keep_codes(
    pieces: Iterator[mx.array], take: Take, path: Path, record: dict
) -> Iterator[mx.array]:
    """The pieces, each once its codes are saved: what is heard can be gone on from."""
    for piece in pieces:
        settings.save_codes(path, take.codes, record)
        yield piece


def tell_failures(results: list[Result], args: argparse.Namespace) -> None:
    """One line for each line of the file, or for each reason."""
    told = set()
    failures = [result for result in results if result.error]
    for job, error, *_ in sorted(failures, key=lambda result: result.job.line or 0):
        place = f"{args.prompts}, line {job.line}: " if job.line else ""
        if f"{place}{error}" not in told:
            report(f"error: {place}{error}")
        told.add(f"{place}{error}")


def tell_stop(args: argparse.Namespace, seconds: float) -> int:
    """Say how to go on, if `seconds` of anything were made; returns the exit status."""
    codes = shlex.quote(str(args.save_codes))
    if seconds == 0:
        report("stopped before anything was made.")
    elif args.save_codes:
        report(f"stopped. To go on: --resume {codes} --duration {args.duration:g}")
    elif args.takes > 1 or len(args.prompt) > 1:
        report("stopped.")
    else:
        report("stopped. With --save-codes, --resume could go on from here.")
    return 130


def describe(result: Result) -> str:
    together = f" ({result.batch} at once)" if result.batch > 1 else ""
    speed = result.batch * result.seconds / result.elapsed
    return one_line(
        f"{result.job.output}: {result.seconds:.2f} s of audio in {result.elapsed:.1f} s"
        f"{together}, {speed:.2f} times real time, seed {result.job.seed}"
    )


def report(message: str) -> None:
    tqdm.write(f"generate.py: {one_line(message)}", file=sys.stderr)


def warn(message: Warning | str, *_) -> None:
    report(f"warning: {message}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_nothing()
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    args = parse_arguments()
    warnings.showwarning = warn
    logging.set_verbosity_error()  # the Hub's retries; the end result is reported
    try:
        sys.exit(run(args))
    except (OSError, RuntimeError, ValueError) as error:
        report(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
