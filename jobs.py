"""Many takes: from several prompts or a file of them, in batches, resumably.

    jobs = plan(["happy rock", "calm piano"], {"seed": 7, "output": "out.wav"}, takes=4)
    failures = run(model, jobs)

A job is one sound file to make. Jobs that differ in prompt, seed and file only run
in one batch; a job whose file exists is done. Under `mlx.launch` every process
takes its share.
"""

import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import settings
from encodec import check_audio_path, load_audio, save_audio
from loudness import to_loudness, to_peak
from melody import take as take_melody
from musicgen import STYLE_OPTIONS, MusicGen, Options, row_seeds

SHORTEST = 0.4  # seconds over which loudness is measured
BATCH_OF_FILE = 8  # lines at once, so that an interruption loses little


class AudioPrompt(NamedTuple):
    """What part of which sound file a take starts with, and whether it stays."""

    path: str
    start: float = 0.0  # seconds
    length: float | None = None  # seconds; None: to the end
    drop: bool = False

    def load(self, model: MusicGen) -> mx.array:
        """The part as (N, C) at the model's rate. Raises ValueError or OSError."""
        audio = load_audio(self.path, model.sampling_rate, model.channels)
        first = int(self.start * model.sampling_rate)
        if not 0 <= first < len(audio):
            raise ValueError(
                f"prompt_start must be from 0 to less than the "
                f"{len(audio) / model.sampling_rate:g} s of {self.path}, "
                f"got {self.start:g}."
            )
        if self.length is None:
            return audio[first:]
        if not 1 <= int(self.length * model.sampling_rate):
            raise ValueError(f"prompt_length must be above 0 s, got {self.length:g}.")
        return audio[first : first + int(self.length * model.sampling_rate)]


def same_file(path: str | Path, other: str | Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


class Melody(NamedTuple):
    """Which sound file's tune a take follows, from which second on, and whether drums
    and bass are taken away first."""

    path: str
    start: float = 0.0
    separate: bool = True

    def load(self, model: MusicGen, duration: float) -> mx.array:
        """The sound that holds the melody for a take of `duration` seconds, (N, 1) at
        the model's rate. Raises ValueError or OSError."""
        model.check_follows("melody")
        seconds = model.conditioner.heard(duration)
        return load_melody(self, model.sampling_rate, seconds)


@functools.lru_cache(maxsize=32)
def load_melody(melody: Melody, sampling_rate: int, seconds: float) -> mx.array:
    """Kept, since takes share it and Demucs is slow."""
    audio = load_audio(melody.path, sampling_rate, 1)
    first = int(melody.start * sampling_rate)
    if first >= len(audio):
        raise ValueError(
            f"melody_start must be less than the {len(audio) / sampling_rate:g} s of "
            f"{melody.path}, got {melody.start:g}."
        )
    return take_melody(audio[first:], sampling_rate, seconds, melody.separate)


@functools.lru_cache(maxsize=2)
def load_style(path: str, sampling_rate: int) -> mx.array:
    """The sound (N, 1) in whose manner to play; kept, since takes share it."""
    return load_audio(path, sampling_rate, 1)


@dataclass(frozen=True)
class Job:
    """One sound file to make."""

    prompt: str
    seed: int
    output: Path
    options: Options
    audio_prompt: AudioPrompt | None = None
    melody: Melody | None = None
    style: str | None = None  # sound file
    loudness: float | None = None  # LUFS
    peak: float | None = None  # dB of full scale
    subtype: str | None = None  # of the file's samples; None: the format's own
    line: int | None = None  # in the file of prompts

    def check(self, writes: bool = True, reads: bool = True) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried.

        `writes` is false where the output goes to a pipe or is another process's,
        and `reads` where the audio prompt is not wanted, its codes being there.
        """
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got {self.prompt!r}.")
        row_seeds([self.seed], rows=1)
        self.options.check(max_duration=math.inf)
        check_level(self.loudness, self.peak)
        if writes:
            check_audio_path(self.output, self.subtype)
        if self.loudness is not None and self.options.duration < SHORTEST:
            raise ValueError(
                f"loudness is measured over {SHORTEST} s; the duration must be as "
                f"much, got {self.options.duration:g}."
            )
        if reads and self.audio_prompt and not Path(self.audio_prompt.path).is_file():
            raise FileNotFoundError(f"There is no sound file {self.audio_prompt.path}.")
        for name, path in self.followed().items():
            if reads and not Path(path).is_file():
                raise FileNotFoundError(f"There is no sound file {path}.")
            if writes and same_file(path, self.output):
                raise ValueError(f"output must not be the {name}, {self.output}.")

    def is_done(self) -> bool:
        """Whether its file is there."""
        try:
            return self.output.stat().st_size > 0
        except (OSError, ValueError):
            return False

    def level(self, audio: mx.array, sampling_rate: int) -> np.ndarray:
        """Samples (N, C) brought to the loudness or peak that is asked for."""
        audio = np.array(audio)
        if self.loudness is not None and len(audio) < SHORTEST * sampling_rate:
            warnings.warn(f"{self.output} is too short to bring it to a loudness.")
            return audio
        if self.loudness is not None:
            return to_loudness(audio, sampling_rate, self.loudness)
        return audio if self.peak is None else to_peak(audio, self.peak)

    def runs_with(self, other: "Job") -> bool:
        """Whether both can be rows of one batch."""
        return (self.options, self.audio_prompt) == (other.options, other.audio_prompt)

    def sound(self, model: MusicGen) -> mx.array | None:
        """Samples (N, C) of the audio prompt, if there is one."""
        return self.audio_prompt and self.audio_prompt.load(model)

    def followed(self) -> dict[str, str]:
        """The sound files that it follows."""
        paths = {"melody": self.melody and self.melody.path, "style": self.style}
        return {name: path for name, path in paths.items() if path}

    def tune(self, model: MusicGen) -> mx.array | None:
        """Samples (N, 1) of the melody, if there is one."""
        return self.melody and self.melody.load(model, self.options.duration)

    def manner(self, model: MusicGen) -> mx.array | None:
        """Samples (N, 1) of the style, if there is one."""
        return self.style and load_style(self.style, model.sampling_rate)

    def excerpt(self, model: MusicGen) -> tuple[float, mx.array] | None:
        """Where its excerpt of the style starts, and the samples (N, 1)."""
        if self.style is None:
            return None
        model.check_follows("style")
        options = (self.options.style_start, self.options.style_length)
        return model.conditioner.excerpt(self.manner(model), self.seed, *options)


def check_level(loudness: float | None, peak: float | None) -> None:
    """Raise ValueError for a level that cannot be."""
    for name, level, least in (("loudness", loudness, -70), ("peak", peak, -100)):
        number = isinstance(level, int | float) and least <= level <= 0
        if not (level is None or number):
            raise ValueError(f"{name} must be from {least} to 0 dB, got {level!r}.")
    if loudness is not None and peak is not None:
        raise ValueError("loudness and peak must not be given together.")


OPTIONS = tuple(field.name for field in fields(Options))
LEVELS = ("loudness", "peak")
KEYS = ("prompt", "seed", "output", *OPTIONS, *LEVELS, "subtype")
AUDIO_KEYS = ("audio_prompt", "prompt_start", "prompt_length", "drop_prompt")
MELODY_KEYS = ("melody", "melody_start", "no_separate")
STYLE_KEYS = ("style", *STYLE_OPTIONS)
ALL_KEYS = (*dict.fromkeys((*KEYS, *AUDIO_KEYS, *MELODY_KEYS, *STYLE_KEYS)),)
ALIASES = {"guidance": "guidance_coef", "negative": "negative_prompt"}


def make_audio_prompt(path, start, length, drop) -> AudioPrompt | None:
    """From values of AUDIO_KEYS. Raises ValueError naming a bad one."""
    for name, seconds, least in (
        ("prompt_start", start, 0),
        ("prompt_length", length, 1e-4),
    ):
        number = type(seconds) in (int, float) and least <= seconds < 1e6
        if seconds is not None and not number:
            raise ValueError(f"{name} must be {least} s or more, got {seconds!r}.")
    if drop not in (None, False, True):
        raise ValueError(f"drop_prompt must be true or false, got {drop!r}.")
    if path is None and (start is not None or length is not None or drop):
        raise ValueError(
            "prompt_start, prompt_length and drop_prompt need an audio_prompt."
        )
    return path and AudioPrompt(str(path), start or 0.0, length, bool(drop))


def make_melody(path, start, no_separate, own: set[str]) -> Melody | None:
    """From values of MELODY_KEYS. Raises ValueError naming a bad one, or one of the
    job's `own`, which is no default of a file of prompts, without a melody."""
    if not isinstance(path, str | Path | None):
        raise ValueError(f"melody must name a sound file, got {path!r}.")
    if start is not None and not (type(start) in (int, float) and 0 <= start < 1e6):
        raise ValueError(f"melody_start must be 0 s or more, got {start!r}.")
    if no_separate not in (None, False, True):
        raise ValueError(f"no_separate must be true or false, got {no_separate!r}.")
    lone = {"melody_start": start is not None, "no_separate": no_separate}
    if not path and any(given and name in own for name, given in lone.items()):
        raise ValueError("melody_start and no_separate need a melody.")
    return Melody(str(path), start or 0.0, not no_separate) if path else None


def make_style(values: dict[str, Any], own: set[str]) -> tuple[str | None, dict]:
    """The path among values of STYLE_KEYS, and the options. Raises ValueError naming a
    bad path, or one of the job's `own` options without one, as `make_melody`."""
    path = values.get("style")
    if not isinstance(path, str | Path | None):
        raise ValueError(f"style must name a sound file, got {path!r}.")
    given = {k: v for k in STYLE_OPTIONS if (v := values.get(k)) is not None}
    if path:
        return str(path), given
    if lone := given.keys() & own:
        raise ValueError(f"{min(lone)} must come with a style.")
    return None, {}


def make_job(
    values: dict[str, Any], line: int | None = None, own: set[str] | None = None
) -> Job:
    """A job from values of ALL_KEYS, of which those named in `own` are no defaults;
    None: all. Raises ValueError naming a bad one."""
    sound = make_audio_prompt(*(values.get(key) for key in AUDIO_KEYS))
    own = {*values} if own is None else own
    melody = make_melody(*(values.get(key) for key in MELODY_KEYS), own)
    style, options = make_style(values, own)
    options |= {k: values[k] for k in OPTIONS if k in values and k not in STYLE_KEYS}
    options = Options(**options)
    output = Path(str(values["output"]))
    levels = [values.get(key) for key in LEVELS]
    first = (values["prompt"], values["seed"], output)
    subtype = values.get("subtype") and str(values["subtype"]).upper()
    return Job(*first, options, sound, melody, style, *levels, subtype, line)


def numbered(output: str, index: int, count: int) -> str:
    """`out.wav` -> `out-3.wav`, where there are several."""
    path = Path(output)
    return output if count == 1 else str(path.with_stem(f"{path.stem}-{index + 1}"))


def plan(prompts: list[str], values: dict[str, Any], takes: int = 1) -> list[Job]:
    """Jobs for `takes` takes of each prompt: seeds counted up, files numbered."""
    count = len(prompts) * takes
    jobs = []
    for i in range(count):
        own = dict(prompt=prompts[i // takes], seed=values["seed"] + i)
        own["output"] = numbered(values["output"], i, count)
        jobs.append(make_job(values | own))
    return jobs


def plan_file(path: Path, values: dict[str, Any]) -> list[Job]:
    """Jobs for the lines of a file: a prompt each, or a JSON object with any of the
    settings. Raises ValueError naming the line that is neither, has an unknown key,
    or the output of another line."""
    lines, jobs, outputs = list(read_lines(path)), [], {}
    for i, (number, own) in enumerate(lines):
        default = dict(seed=values["seed"] + i)
        default["output"] = numbered(values["output"], i, max(len(lines), 2))
        try:
            job = make_job(values | default | own, number, {*own})
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        place = os.path.realpath(job.output) if "\0" not in str(job.output) else i
        if place in outputs:
            raise ValueError(
                f"{path}, line {number}: its output {job.output} is that of line "
                f"{outputs[place]}, too."
            )
        outputs[place] = number
        jobs.append(job)
    if not jobs:
        raise ValueError(f"{path} must hold a prompt in a line, but holds none.")
    return jobs


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and settings of each line that is not empty.

    The file is JSON Lines if it is called so, or its first such line begins with a
    brace or bracket.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error
    filled = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    named = path.suffix in (".json", ".jsonl", ".ndjson")
    json_lines = named or bool(filled) and filled[0][1].startswith(("{", "["))
    for number, line in filled:
        yield number, parse_line(path, number, line) if json_lines else {"prompt": line}


def parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}, line {number} must be an object, got {line:.40}")
    own = {ALIASES.get(k, k.replace("-", "_")): v for k, v in found.items()}
    known = {*ALL_KEYS}
    if unknown := own.keys() - known:
        raise ValueError(
            f"{path}, line {number} has the unknown key '{min(unknown)}'; known are "
            f"{', '.join(sorted(known))}."
        )
    if "prompt" not in own:
        raise ValueError(f"{path}, line {number} must have a prompt.")
    return own


def pending(jobs: list[Job], group: mx.distributed.Group) -> list[Job]:
    """Jobs whose file is not there, as the first process sees it."""
    first = group.rank() == 0
    missing = agree([int(first and not job.is_done()) for job in jobs], group)
    return [job for job, wanted in zip(jobs, missing) if wanted]


def share(jobs: list[Job], group: mx.distributed.Group) -> list[Job]:
    """This process's share: every n-th of all jobs, done or not."""
    return jobs[group.rank() :: group.size()]


def agree(numbers: list[int], group: mx.distributed.Group) -> list[int]:
    """The sums of the processes' numbers."""
    return mx.distributed.all_sum(mx.array(numbers), group=group).tolist()


def batches(jobs: list[Job], size: Callable[[Job], int]) -> Iterator[list[Job]]:
    """Neighbours that can run together, as many as `size` says of the first."""
    batch, most = [], 0
    for job in jobs:
        if batch and (len(batch) == most or not job.runs_with(batch[0])):
            yield batch
            batch = []
        if not batch:
            most = size(job)
        batch.append(job)
    if batch:
        yield batch


Progress = Callable[[int, int], None]


def generate(
    model: MusicGen,
    batch: list[Job],
    sound: mx.array | None = None,
    callback: Progress | None = None,
    known: mx.array | None = None,
    stop: Callable[[], bool] | None = None,
) -> mx.array:
    """Codes (B, T, K) of jobs that run together, starting with `known` codes if any,
    else with their audio prompt's `sound`.

    What does not fit into memory after all runs in halves.
    """
    try:
        codes = model.generate_codes(
            [job.prompt for job in batch],
            seed=[job.seed for job in batch],
            audio_prompt=sound,
            codes_prompt=known,
            melody=each(batch, lambda job: job.tune(model)),
            separate=False,  # done already
            style=each(batch, lambda job: job.manner(model)),
            callback=callback,
            stop=stop,
            batch_size=len(batch),
            **asdict(batch[0].options),
        )
        mx.eval(codes)
        return codes
    except RuntimeError:  # of MLX
        if len(batch) == 1 or model.decoder.group is not None:
            raise
    mx.clear_cache()
    half = len(batch) // 2
    halves = (batch[:half], batch[half:])
    parts = [generate(model, part, sound, callback, known, stop) for part in halves]
    return mx.concatenate(parts)


def each(
    batch: list[Job], load: Callable[[Job], mx.array | None]
) -> list[mx.array | None] | None:
    """A sound for each job; None where no job has one."""
    found = [load(job) for job in batch]
    return None if all(sound is None for sound in found) else found


def made_of(model: MusicGen, job: Job, prompt_frames: int = 0) -> dict[str, Any]:
    """All that makes the job's take again, for the file's comment."""
    found = asdict(job.options)
    found |= dict(model=model.name, revision=model.revision, seed=job.seed)
    found |= dict(prompt=job.prompt, loudness=job.loudness, peak=job.peak)
    found |= dict(subtype=job.subtype)
    if job.audio_prompt:
        found |= dict(zip(AUDIO_KEYS, job.audio_prompt), prompt_frames=prompt_frames)
    if job.melody:
        path, start, separate = job.melody
        found |= dict(melody=path, melody_start=start, no_separate=not separate)
    if job.style:
        found["style"] = job.style
        if job.options.style_start is None:
            found["style_start"], _ = job.excerpt(model)
    if model.config.quantization:
        found["q_bits"] = model.config.quantization["bits"]
    dtype = str(model.decoder.dtype).removeprefix("mlx.core.")
    return found | model.adapter | dict(dtype=dtype, mlx=mx.__version__)


@dataclass(frozen=True)
class Course:
    """How takes begin and end, and what is kept beside their sound."""

    known: mx.array | None = None  # codes (1, T, K) to go on from
    prompt_frames: int = 0  # of these, the ones of an audio prompt
    save_codes: Path | None = None  # of the only take
    stop: Callable[[], bool] | None = None  # asked in each step

    def begin(self, model: MusicGen, job: Job) -> tuple[mx.array | None, int]:
        """Samples (N, C) of the job's audio prompt, where its codes are not known
        already, and the frames that it takes."""
        if self.known is not None:
            return None, self.prompt_frames
        sound = job.sound(model)
        return sound, model.prompt_frames(sound)

    def stopped(self) -> bool:
        return self.stop is not None and self.stop()


class Made(NamedTuple):
    """What is told of a file that is there."""

    job: Job
    seconds: float  # of audio
    taken: float  # seconds for the whole batch
    batch: int  # jobs in it


Failure = tuple[Job, Exception]


def check(
    jobs: list[Job],
    group: mx.distributed.Group | None,
    to_files: bool = True,
    reads: bool = True,
) -> list[Failure]:
    """Jobs that cannot be made, with the reason.

    Processes that share a model, the `group`, agree: what one of them cannot make
    they all leave. Only the first of them writes.
    """
    writes = to_files and (group is None or group.rank() == 0)
    found = {}
    for i, job in enumerate(jobs):
        try:
            job.check(writes, reads)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            found[i] = error
    if group is not None:
        bad = agree([int(i in found) for i in range(len(jobs))], group)
        elsewhere = ValueError("Another process cannot make it.")
        found = {i: found.get(i, elsewhere) for i, wrong in enumerate(bad) if wrong}
    return [(jobs[i], error) for i, error in found.items()]


def audible(model: MusicGen, batch: list[Job]) -> tuple[list[Job], list[Failure]]:
    """The jobs whose melody or style can be heard, if they have one, and the others."""
    good, failures = [], []
    for job in batch:
        try:
            job.tune(model), job.excerpt(model)
            good.append(job)
        except (OSError, ValueError) as error:
            failures.append((job, error))
    return good, failures


def run(
    model: MusicGen,
    jobs: list[Job],
    batch_size: int,
    callback: Progress | None = None,
    finished: Callable[[Made], None] | None = None,
    group: mx.distributed.Group | None = None,
    course: Course = Course(),
) -> list[Failure]:
    """Make every job, checked before; returns those that failed, with the reason.

    A job that fails leaves the others alone. Batches are of `batch_size` jobs, or
    what memory holds. `group` are the processes that share the model. Once the
    course is stopped, the batch ends there, is saved, and none follows.
    """
    failures = []

    def size(job: Job) -> int:
        rows = min(batch_size, model.rows_that_fit(job.options))
        if group is not None:  # what the smallest machine holds
            rows = mx.distributed.all_min(mx.array(rows), group=group).item()
        return rows

    for batch in batches(jobs, size):
        if course.stopped():
            break
        start = time.perf_counter()
        batch, unheard = audible(model, batch)
        failures += unheard
        if not batch:
            continue
        try:
            sound, prompt_frames = course.begin(model, batch[0])
            codes = generate(model, batch, sound, callback, course.known, course.stop)
            if group is not None and group.rank() > 0:
                continue
            audio = decode(model, batch, codes, prompt_frames)
        except (OSError, RuntimeError, ValueError) as error:
            failures += [(job, error) for job in batch]
            continue
        taken = time.perf_counter() - start
        for job, samples in zip(batch, audio):
            try:
                save(model, job, samples, codes, prompt_frames, course.save_codes)
            except (OSError, ValueError) as error:
                failures.append((job, error))
                continue
            if finished:
                length = len(samples) / model.sampling_rate
                finished(Made(job, length, taken, len(batch)))
    return failures


def decode(
    model: MusicGen, batch: list[Job], codes: mx.array, prompt_frames: int
) -> mx.array:
    """Audio (B, N, C) of codes, less that of an audio prompt to be dropped."""
    audio = model.decode(codes)
    if batch[0].audio_prompt and batch[0].audio_prompt.drop:
        audio = model.without(audio, prompt_frames)
    mx.eval(audio)
    return audio


def save(
    model: MusicGen,
    job: Job,
    samples: mx.array,
    codes: mx.array,
    prompt_frames: int,
    save_codes: Path | None,
) -> None:
    """Write the job's sound, and its codes where they are wanted."""
    rate, told = model.sampling_rate, made_of(model, job, prompt_frames)
    comment = settings.to_comment(told)
    save_audio(job.output, job.level(samples, rate), rate, comment, job.subtype)
    if save_codes:
        settings.save_codes(save_codes, codes, told)
