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

    python generate.py "epic orchestral soundtrack" --model stereo-large

`python generate.py --help` explains every flag. Needs arguments.py, which has the flags,
recall.py, job.py, magnet_job.py, jobs.py, lines.py, stream.py and sources.py, which plan
and write takes, progress.py, together.py, musicgen.py, magnet.py, encodec_stream.py,
quantize.py and all that these need beside it; remake.py to edit a take, adapters.py for
an adapter, melody.py to follow a melody, play.py to play.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import mlx.core as mx

import jobs
import lines
import magnet
import settings
import stream
from arguments import NO_PROMPT, parse_arguments
from audio import check_writable, save_audio
from diffusion_job import Decoder, Watch
from encodec_stream import play as play_take
from hub import local
from job import BATCH_OF_FILE, DIFFER, Job, plan
from jobs import Result, Sounds, Start
from magnet_job import refuse
from messages import Forgiving, one_line
from musicgen import MusicGen, Take
from notes import Tune
from outputs import check_new, in_words, leave_nothing
from progress import PASSES, Progress, say
from quantize import asked
from recall import OF_MODEL, QUANTIZATION, read_record
from sources import check_adapter, read_start
from together import Peers, signals_at_once

if TYPE_CHECKING:
    from diffusion import Decoding


class Stop:
    """Whether Ctrl-C was pressed. A second one raises KeyboardInterrupt.

    Before `arm` Ctrl-C ends all at once. It is `heeded` once somebody was told so;
    `decoding`, where that was diffusion, and the codes were whole.
    """

    def __init__(self):
        self._asked = self.heeded = self.decoding = False

    def arm(self) -> None:
        """From now on Ctrl-C is asked for, and what was made stays."""
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def __call__(self) -> bool:
        self.heeded = self._asked
        return self._asked


def agreed_seed(group: mx.distributed.Group) -> int:
    """Any seed, the same in every process."""
    mine = secrets.randbits(31) if group.rank() == 0 else 0
    return jobs.agree([mine], group)[0]


def make_jobs(args: argparse.Namespace) -> list[Job]:
    if args.prompts is not None:
        return lines.plan_file(args.prompts, vars(args))
    return plan(args.prompt, vars(args), args.takes)


def choose_jobs(args: argparse.Namespace, group: mx.distributed.Group) -> list[Job]:
    """What this process is to make. Says which lines of a file are left out, and why."""
    every = planned = make_jobs(args)
    if not args.tensor_parallel:
        planned = jobs.share(every, group)
    if args.prompts is None:
        return planned
    given = {name: getattr(args, name) for name in OF_MODEL}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(args.adapter, list):
        given["adapter"] = [*map(str, args.adapter)]
    else:
        given["adapter"] = args.adapter and str(args.adapter)
    if args.adapter is not None:
        from adapters import checksum

        given["adapter_hash"] = checksum(args.adapter)
    quantization = asked(*(getattr(args, name) for name in QUANTIZATION))
    given |= {f"q_{name}": value for name, value in quantization.items()}
    wanted, messages = lines.left(planned, given, args.force, every)
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
        if args.regenerate and group.size() > 1:
            raise ValueError("--regenerate runs in one process: leave out mlx.launch.")
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
        tell("Nothing is left to make.", args)
        return 0
    failed = check(wanted, args, together)
    bad = {id(result.job) for result in failed}
    good = [job for job in wanted if id(job) not in bad]
    results, stop = failed, Stop()
    if good and (args.prompts or not failed):
        shown = not args.quiet and group.rank() == 0
        with Progress(shown) as progress:
            results += make_all(good, args, together, stop, progress)
    if together is None or group.rank() == 0:
        tell_failures(results, args)
        play_all(results, args)
    failures = [result for result in results if result.error]
    if stop.heeded and not failures:
        seconds = sum(result.seconds for result in results)
        return tell_stop(args, seconds, stop.decoding)
    return 1 if failures else 0


def check(
    wanted: list[Job], args: argparse.Namespace, group: mx.distributed.Group | None
) -> list[Result]:
    """Results of what cannot be made: now, not after the minutes of loading."""
    source = args.resume or args.redecode
    failed = jobs.check(wanted, group, args.output != "-", source is None)
    ranked = args.regenerate and not wanted[0].magnet
    if ranked and args.candidates > 1 and wanted[0].certain:
        raise ValueError(f"--candidates must differ: {DIFFER}, or give --candidates 1.")
    if args.regenerate:
        read_record(args.regenerate.path, edits=True)
    for path in filter(None, (args.save_codes, args.save_melody)):
        check_writable(path)
        if not args.force:
            check_new(path)
    if args.adapter is not None:
        from adapters import check_files

        check_files(args.adapter)
    if args.play:
        import play

        for job in wanted:
            play.find_player(job.output.suffix)
    return failed


def make_all(
    good: list[Job],
    args: argparse.Namespace,
    group: mx.distributed.Group | None,
    stop: Stop,
    progress: Progress,
) -> list[Result]:
    """Load the model and run the jobs."""
    model = load(args, group, progress)
    good, sounds = [job.timed(model) for job in good], Sounds(model)
    args.duration = good[0].options.duration
    if not args.prompts:
        check_faults(good)
    if not (args.prompts or args.redecode):
        if good[0].melody:
            progress.stage("separating the melody")
        tell_melody(args, model, sounds.melody(good[0]))
    if args.again:
        check_adapter(args.again, settings.read_settings(args.again), model)
    start = None
    if args.resume or args.redecode:
        seconds = args.duration if args.resume else None
        start = read_start(args.resume or args.redecode, model, seconds)
    if not (args.prompts or group):
        stop.arm()
    if args.regenerate:
        return edit(model, good, sounds, stop, args, progress)
    if args.redecode:
        return redecode(model, good[0], sounds, start, stop, args, progress)
    if args.stream:
        return [stream_job(model, good[0], sounds, start, stop, args, progress)]
    return make_batches(model, good, sounds, start, stop, args, progress)


def check_faults(wanted: list[Job]) -> None:
    """Raise ValueError for a job that the model, now that it is known, cannot make."""
    for job in wanted:
        if job.fault:
            raise ValueError(job.fault)


def load(
    args: argparse.Namespace, group: mx.distributed.Group | None, progress: Progress
) -> MusicGen:
    asking = "" if local(args.model) else ", asking the Hub for it"
    progress.stage(f"loading {args.model}{asking}")
    dtype = getattr(mx, args.dtype) if args.dtype else None
    adapter = dict(adapter=args.adapter, adapter_scale=args.adapter_scale)
    quantization = {name: getattr(args, name) for name in QUANTIZATION}
    model = magnet.load(args.model, dtype, group=group, **quantization, **adapter)
    refuse(args.asked, magnet=model.config.masking is not None)
    if args.any_music and model.config.text_encoder is not None:
        raise ValueError(NO_PROMPT)
    model.plain = model.plain or args.plain
    return model


def tell_melody(
    args: argparse.Namespace, model: MusicGen, melody: mx.array | Tune
) -> None:
    """Show the melody, a sound (N, 1) or a typed tune, and keep the sound, where that is
    wanted."""
    if args.show_melody:
        from melody import draw, extract_chroma

        if isinstance(melody, Tune):
            chroma = melody.chroma(seconds=model.conditioner.needed(args.duration))
        else:
            chroma = extract_chroma(melody, model.sampling_rate)
        drawn = draw(chroma)
        say(drawn, sys.stderr if args.output == "-" else sys.stdout)
    if args.save_melody:
        save_audio(args.save_melody, melody, model.sampling_rate)


def redecode(
    model: MusicGen,
    job: Job,
    sounds: Sounds,
    start: Start,
    stop: Stop,
    args: argparse.Namespace,
    progress: Progress,
) -> list[Result]:
    """Make the sound of saved codes."""
    began = time.perf_counter()
    progress.stage("decoding")
    decoder = Decoder(model, job.decoder, watched_decoding("decoding", stop, progress))
    samples, record = jobs.redecode(model, job, sounds, start, decoder)
    if stop.heeded:
        return []
    job = jobs.save(model, job, samples, record)
    if args.save_codes:
        settings.save_codes(args.save_codes, start.codes, record, args.force)
    seconds = len(samples) / model.sampling_rate
    result = Result(job, None, seconds, time.perf_counter() - began)
    tell(describe(result), args)
    return [result]


def edit(
    model: MusicGen,
    wanted: list[Job],
    sounds: Sounds,
    stop: Stop,
    args: argparse.Namespace,
    progress: Progress,
) -> list[Result]:
    """Make parts of a take again, and write what comes of it."""
    import remake

    began = time.perf_counter()
    progress.stage("reading the take")
    how = (args.candidates, args.batch_size, args.seed_is_given)
    how = remake.How(args.regenerate, *how, named=args.output is not None)
    making = remake.start(model, wanted, sounds, how)
    for _ in watch(making, making.doing, making.seconds, model, stop, progress):
        pass
    if stop.heeded:
        return []
    progress.stage(making.then)
    if scores := making.finish():
        tell(scores, args)
    results = []
    for edited in making.results():
        job, audio, codes, record = remake.write(model, edited)
        if args.save_codes:
            settings.save_codes(args.save_codes, codes, record, args.force)
        seconds = len(audio) / model.sampling_rate
        elapsed = time.perf_counter() - began
        results.append(Result(job, None, seconds, elapsed))
        tell(describe(results[-1]), args)
    return results


def make_batches(
    model: MusicGen,
    wanted: list[Job],
    sounds: Sounds,
    start: Start | None,
    stop: Stop,
    args: argparse.Namespace,
    progress: Progress,
) -> list[Result]:
    """Run the jobs in batches, showing how far they are."""
    results = []
    rows = sum(job.best_of or 1 for job in wanted)
    size = args.batch_size or (BATCH_OF_FILE if args.prompts else rows)
    planned = list(jobs.run(model, wanted, size, sounds, start))
    for i, batch in enumerate(planned, 1):
        if stop():
            break
        name = f"batch {i} of {len(planned)}" if len(planned) > 1 else "generating"
        seconds = batch.duration
        for _ in watch(batch, name, seconds, model, stop, progress):
            pass
        progress.stage(f"{name}: decoding")
        decoding = watched_decoding(f"{name}: decoding", stop, progress)
        for result in batch.save(args.save_codes, watch=decoding):
            if batch.scores and not result.error and result.job.line is None:
                tell(tell_scores(batch.scores), args)
                batch.scores = []
            results.append(result)
            if not result.error:
                tell(describe(result), args)
    return results


def watch(
    steps: Iterator[Take],
    name: str,
    seconds: float,
    model: MusicGen,
    stop: Stop,
    progress: Progress,
) -> Iterator[Take]:
    """The same steps until Ctrl-C, shown as so many seconds of sound, or a MAGNeT's as
    passes. After the last step Ctrl-C is not asked for."""
    progress.stage(f"{name}: the first step (a first run compiles MLX's kernels)")
    in_passes = model.config.masking is not None
    for take in steps:
        if take.step == 1 and in_passes:
            progress.begin(name, take.total, PASSES)
        elif take.step == 1:
            progress.begin(name, seconds)
        progress.to(take.step if in_passes else take.frames / model.frame_rate)
        yield take
        if take.step < take.total and stop():
            return


def watched_decoding(name: str, stop: Stop, progress: Progress) -> Watch:
    """What goes through the steps of diffusion until Ctrl-C, shown as seconds of sound.
    After the last step Ctrl-C is not asked for."""

    def watch(steps: "Decoding") -> Iterator["Decoding"]:
        progress.begin(name, steps.seconds)
        whole = not stop.heeded
        for decoding in steps:
            progress.to(decoding.seconds * decoding.step / decoding.total)
            yield decoding
            if decoding.step < decoding.total and stop():
                stop.decoding = whole
                return

    return watch


def stream_job(
    model: MusicGen,
    job: Job,
    sounds: Sounds,
    start: Start | None,
    stop: Stop,
    args: argparse.Namespace,
    progress: Progress,
) -> Result:
    """Stream one job, showing how far it is. The codes are kept too, where they are
    wanted, before each piece all that there are."""
    began = time.perf_counter()
    audio = None if start else sounds.audio_prompt(job)
    prompt_frames = jobs.frames_of_prompt(model, audio, start)
    record = jobs.take_settings(model, job, sounds, prompt_frames, start)
    take = jobs.make_take(model, [job], sounds, audio, start)
    seconds = job.options.duration
    steps = watch(take, "streaming", seconds, model, stop, progress)
    pieces = play_take(model, take, args.chunk, steps)
    if args.save_codes:
        pieces = keep_codes(pieces, take, args.save_codes, record, args.force)
    if args.play and can_play_pieces():
        from play import heard

        pieces, args.play = heard(pieces, model.channels, model.sampling_rate), False
    form = (model.channels, model.sampling_rate, settings.to_comment(record))
    whole = lambda: take.step == take.total  # noqa: E731
    output = (str(job.output), pieces, *form, job.overwrite, whole)
    seconds, path = stream.write(*output)
    job = replace(job, output=Path(path))
    result = Result(job, None, seconds, time.perf_counter() - began)
    tell(describe(result), args, sys.stderr if path == "-" else sys.stdout)
    return result


def can_play_pieces() -> bool:
    """Whether something here plays a sound while it is made; a warning if not."""
    from play import find_pipe_player

    try:
        return bool(find_pipe_player())
    except OSError as error:
        warn(f"{error} The sound is played when it is whole.")
        return False


def play_all(results: list[Result], args: argparse.Namespace) -> None:
    """Play what was made, one after the other, where that is wanted."""
    if args.play:
        from play import play_file

        for result in results:
            if not result.error and result.seconds:
                play_file(result.job.output)


def keep_codes(
    pieces: Iterator[mx.array], take: Take, path: Path, record: dict, force: bool
) -> Iterator[mx.array]:
    """The pieces, each once its codes are saved: what is heard can be gone on from."""
    for piece in pieces:
        settings.save_codes(path, take.codes, record, force)
        force = True  # the file is ours now
        yield piece


def tell_scores(scores: list[float]) -> str:
    others = ", ".join(f"{score:.3f}" for score in scores[1:])
    return (
        f"the best of {len(scores)} follows its prompt with {scores[0]:.3f} a code; the "
        f"others {others}"
    )


def tell_failures(results: list[Result], args: argparse.Namespace) -> None:
    """One line for each line of the file, or for each reason."""
    told = set()
    failures = [result for result in results if result.error]
    for job, error, *_ in sorted(failures, key=lambda result: result.job.line or 0):
        place = f"{args.prompts}, line {job.line}: " if job.line else ""
        if f"{place}{error}" not in told:
            report(f"error: {place}{error}")
        told.add(f"{place}{error}")


def tell_stop(args: argparse.Namespace, seconds: float, decoding: bool) -> int:
    """Say how to go on, if `seconds` of anything were made, or how to decode it, where
    that was stopped; returns the exit status."""
    codes = shlex.quote(str(args.save_codes))
    decoder = f" --decoder {shlex.quote(args.decoder)}" if args.decoder else ""
    if seconds == 0:
        report("stopped before anything was made.")
    elif args.save_codes and decoder and decoding:
        report(f"stopped. To decode it: --redecode {codes}{decoder}")
    elif args.save_codes:
        longer = f"--resume {codes} --duration {args.duration:g}"
        report(f"stopped. To go on: {longer}{decoder}")
    elif args.takes > 1 or len(args.prompt) > 1:
        report("stopped.")
    else:
        report("stopped. Give --save-codes next time, to be able to go on.")
    return 130


def describe(result: Result) -> str:
    job, seconds, elapsed = result.job, result.seconds, result.elapsed
    output = "standard output" if str(job.output) == "-" else job.output
    together = f" ({result.batch} at once)" if result.batch > 1 else ""
    speed = result.batch * seconds / elapsed
    return one_line(
        f"{output}: {seconds:.2f} s of audio in {elapsed:.1f} s{together}, {speed:.2f} "
        f'times real time, seed {job.seed}, "{job.prompt:.80}"'
    )


def tell(line: str, args: argparse.Namespace, stream: TextIO | None = None) -> None:
    """Print a result, unless it is to be quiet."""
    if not args.quiet:
        say(line, stream or sys.stdout)


def report(message: str) -> None:
    say(f"generate.py: {one_line(message)}", sys.stderr)


def warn(message: Warning | str, *_) -> None:
    report(f"warning: {message}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_nothing()
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    args = parse_arguments(sys.argv[1:])
    warnings.showwarning = warn
    os.environ["HF_HUB_VERBOSITY"] = "error"  # no retries; the end result is reported
    try:
        sys.exit(run(args))
    except OSError as error:  # of the system, or with a message of ours
        file = f"{error.filename}: " if error.filename else ""
        report(f"error: {file}{in_words(error)}")
        sys.exit(1)
    except (RuntimeError, ValueError) as error:
        report(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
