"""Many takes: from several prompts or a file of them, in batches, resumably.

    jobs = plan(["happy rock", "calm piano"], {"seed": 7, "output": "out.wav"}, takes=4)
    failures = run(model, jobs)

A job is one sound file to make. Jobs that differ in prompt, seed and file only run
in one batch; a job whose file exists is done. Under `mlx.launch` every process
takes its share.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from encodec import check_audio_path, load_audio, save_audio
from loudness import to_loudness, to_peak
from musicgen import MusicGen, Options, row_seeds

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


@dataclass(frozen=True)
class Job:
    """One sound file to make."""

    prompt: str
    seed: int
    output: Path
    options: Options
    audio_prompt: AudioPrompt | None = None
    loudness: float | None = None  # LUFS
    peak: float | None = None  # dB of full scale
    line: int | None = None  # in the file of prompts

    def check(self, to_pipe: bool = False) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried."""
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got {self.prompt!r}.")
        row_seeds([self.seed], rows=1)
        self.options.check()
        check_level(self.loudness, self.peak)
        if not to_pipe:
            check_audio_path(self.output)
        if self.audio_prompt and not Path(self.audio_prompt.path).is_file():
            raise FileNotFoundError(f"There is no sound file {self.audio_prompt.path}.")

    def level(self, audio: mx.array, sampling_rate: int) -> np.ndarray:
        """Samples (N, C) brought to the loudness or peak that is asked for."""
        audio = np.array(audio)
        if self.loudness is not None:
            return to_loudness(audio, sampling_rate, self.loudness)
        return audio if self.peak is None else to_peak(audio, self.peak)

    def runs_with(self, other: "Job") -> bool:
        """Whether both can be rows of one batch."""
        mine, its = (self.options, self.audio_prompt), (
            other.options,
            other.audio_prompt,
        )
        return mine == its


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
KEYS = ("prompt", "seed", "output", *OPTIONS, *LEVELS)
AUDIO_KEYS = ("audio_prompt", "prompt_start", "prompt_length", "drop_prompt")
ALIASES = {"guidance": "guidance_coef", "negative": "negative_prompt"}


def make_job(settings: dict[str, Any], line: int | None = None) -> Job:
    """A job from values of KEYS and AUDIO_KEYS. Raises ValueError naming a bad one."""
    sound = None
    if settings.get("audio_prompt") is not None:
        path, start, length, drop = (settings.get(key) for key in AUDIO_KEYS)
        for name, number in (("prompt_start", start), ("prompt_length", length)):
            if not isinstance(number, int | float | None):
                raise ValueError(f"{name} must be a number of seconds, got {number!r}.")
        sound = AudioPrompt(str(path), start or 0.0, length, bool(drop))
    options = Options(**{key: settings[key] for key in OPTIONS if key in settings})
    output = Path(str(settings["output"]))
    levels = [settings.get(key) for key in LEVELS]
    own = (settings["prompt"], settings["seed"], output)
    return Job(*own, options, sound, *levels, line)


def numbered(output: str, index: int, count: int) -> str:
    """`out.wav` -> `out-3.wav`, where there are several."""
    path = Path(output)
    return output if count == 1 else str(path.with_stem(f"{path.stem}-{index + 1}"))


def plan(prompts: list[str], settings: dict[str, Any], takes: int = 1) -> list[Job]:
    """Jobs for `takes` takes of each prompt: seeds counted up, files numbered."""
    count = len(prompts) * takes
    jobs = []
    for i in range(count):
        own = dict(prompt=prompts[i // takes], seed=settings["seed"] + i)
        own["output"] = numbered(settings["output"], i, count)
        jobs.append(make_job(settings | own))
    return jobs


def plan_file(path: Path, settings: dict[str, Any]) -> list[Job]:
    """Jobs for the lines of a file: a prompt each, or a JSON object with any of the
    settings. Raises ValueError naming the line that is neither, has an unknown key,
    or the output of another line."""
    lines, jobs, outputs = list(read_lines(path)), [], {}
    for i, (number, own) in enumerate(lines):
        default = dict(seed=settings["seed"] + i)
        default["output"] = numbered(settings["output"], i, max(len(lines), 2))
        try:
            job = make_job(settings | default | own, number)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        place = job.output.resolve()
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

    The file is JSON Lines if its first such line begins with a brace.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}") from error
    filled = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    json_lines = bool(filled) and filled[0][1].startswith("{")
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
    known = {*KEYS, *AUDIO_KEYS}
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
    missing = [int(first and not job.output.exists()) for job in jobs]
    missing = mx.distributed.all_sum(mx.array(missing), group=group)
    return [job for job, wanted in zip(jobs, missing.tolist()) if wanted]


def share(jobs: list[Job], group: mx.distributed.Group) -> list[Job]:
    """This process's share, every n-th of all jobs, less what is there already."""
    mine = jobs[group.rank() :: group.size()]
    return [job for job in mine if not job.output.exists()]


def batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Neighbours that can run together, at most `size` at a time."""
    batch = []
    for job in jobs:
        if batch and (len(batch) == size or not job.runs_with(batch[0])):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


Progress = Callable[[int, int], None]


def generate(
    model: MusicGen, batch: list[Job], callback: Progress | None = None
) -> mx.array:
    """Audio (B, N, C) of jobs that run together.

    What does not fit into memory after all runs in halves.
    """
    options, sound = batch[0].options, batch[0].audio_prompt
    try:
        audio = model.generate(
            [job.prompt for job in batch],
            seed=[job.seed for job in batch],
            audio_prompt=sound.load(model) if sound else None,
            drop_prompt=bool(sound and sound.drop),
            callback=callback,
            batch_size=len(batch),
            **{name: getattr(options, name) for name in OPTIONS},
        )
        mx.eval(audio)
        return audio
    except RuntimeError:  # of MLX
        if len(batch) == 1:
            raise
    mx.clear_cache()
    half = len(batch) // 2
    parts = [generate(model, part, callback) for part in (batch[:half], batch[half:])]
    return mx.concatenate(parts)


class Made(NamedTuple):
    """What is told of a file that is there."""

    job: Job
    seconds: float  # of audio
    taken: float  # seconds for the whole batch
    batch: int  # jobs in it


def run(
    model: MusicGen,
    jobs: list[Job],
    batch_size: int,
    callback: Progress | None = None,
    finished: Callable[[Made], None] | None = None,
    save: bool = True,
) -> list[tuple[Job, Exception]]:
    """Make every job; returns those that failed, with the reason.

    A job that fails leaves the others alone. `save` is false in processes that
    only help to compute.
    """
    failures, sound = [], []
    for job in jobs:
        try:
            job.check()
            sound.append(job)
        except (OSError, TypeError, ValueError) as error:
            failures.append((job, error))
    for batch in batches(sound, batch_size):
        start = time.perf_counter()
        try:
            audio = generate(model, batch, callback)
        except (OSError, RuntimeError, ValueError) as error:
            failures += [(job, error) for job in batch]
            continue
        taken = time.perf_counter() - start
        for job, samples in zip(batch, audio if save else []):
            try:
                rate = model.sampling_rate
                save_audio(job.output, job.level(samples, rate), rate)
            except (OSError, ValueError) as error:
                failures.append((job, error))
                continue
            if finished:
                length = len(samples) / model.sampling_rate
                finished(Made(job, length, taken, len(batch)))
    return failures
