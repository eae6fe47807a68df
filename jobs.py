"""Many takes, in batches: of several prompts, or of the lines that lines.py reads.

    for batch in run(model, plan(["happy rock", "calm piano"], values, takes=4), size=8):
        for take in batch:
            print(take.step, "of", take.total)
        for result in batch.save():
            print(result.job.output, result.error or "is there")

A job is one sound file to make. Jobs that differ in prompt, seed and file only run in
one batch. Under `mlx.launch` every process takes its share. Needs musicgen.py and what
that needs, prompt.py, audio.py, loudness.py, settings.py, outputs.py and strict.py
beside it. Jobs that follow a sound go with conditioning.py, and melody.py or style.py;
those of a model without text need textless.py.
"""

import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import settings
from audio import check_audio_path, count_samples, load_audio, save_audio
from loudness import CEILING, to_loudness, to_peak
from musicgen import MusicGen, Take
from options import STYLE_OPTIONS, Options, row_seeds
from outputs import check_apart, check_new, default_name, free
from prompt import check_length, prompt_frames
from strict import in_a_line

SHORTEST = 0.4  # seconds over which loudness is measured
BATCH_OF_FILE = 8  # lines at once, so that an interruption loses little


class AudioPrompt(NamedTuple):
    """What part of which sound file a take starts with, and whether it stays."""

    path: str
    start: float = 0.0  # seconds
    length: float | None = None  # seconds; None: to the end
    drop: bool = False


class MelodyFile(NamedTuple):
    """Which sound file's tune a take follows, from which second on, and whether drums
    and bass are taken away first."""

    path: str
    start: float = 0.0
    separate: bool = True


@dataclass(frozen=True)
class Job:
    """One sound file to make."""

    prompt: str
    seed: int
    output: Path
    options: Options
    audio_prompt: AudioPrompt | None = None
    melody: MelodyFile | None = None
    style: str | None = None  # sound file
    loudness: float | None = None  # LUFS
    peak: float | None = None  # dB of full scale
    subtype: str | None = None  # of the file's samples; None: the format's own
    mp3_bitrate: int | None = None  # kbit/s
    line: int | None = None  # in the file of prompts
    fault: str | None = None  # of that line, which then cannot be made
    overwrite: bool = False  # what is there
    seed_is_given: bool = True  # not any
    prompt_is_given: bool = True  # false: for a model without text

    @in_a_line
    def check(self, writes: bool = True, reads: bool = True) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried.

        `writes` is false where the output goes to a pipe or is another process's,
        and `reads` where the audio prompt is not wanted, its codes being there.
        """
        if self.fault:
            raise ValueError(self.fault)
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got {self.prompt!r}.")
        row_seeds([self.seed], rows=1)
        self.options.check(max_duration=math.inf)
        check_level(self.loudness, self.peak)
        if writes:
            check_audio_path(self.output, self.subtype, self.mp3_bitrate)
        duration = self.options.duration  # None: the model's own
        if self.loudness is not None and duration and duration < SHORTEST:
            raise ValueError(
                f"loudness needs a duration of {SHORTEST} s or more, got "
                f"{duration:g}."
            )
        for path in self.inputs().values():
            if reads and not Path(path).is_file():
                raise FileNotFoundError(f"There is no sound file {path}.")
        if writes:
            check_apart(self.output, self.inputs())
        if writes and not self.overwrite:
            check_new(self.output)

    def timed(self, model: MusicGen) -> "Job":
        """The same, as long as the model's own takes where no duration is given."""
        own = model.config.default_duration
        if self.options.duration is not None:
            return self
        return replace(self, options=replace(self.options, duration=own))

    def level(self, audio: mx.array, sampling_rate: int) -> np.ndarray:
        """Samples (N, C) brought to the loudness or peak that is asked for."""
        audio = np.array(audio)
        if self.loudness is not None and len(audio) < SHORTEST * sampling_rate:
            warnings.warn(
                f"{self.output} is shorter than {SHORTEST} s: its loudness stays as it is."
            )
            return audio
        if self.loudness is not None:
            return to_loudness(audio, sampling_rate, self.loudness, self.output)
        return audio if self.peak is None else to_peak(audio, self.peak)

    @property
    def ceiling(self) -> float:
        """dB of full scale that no true peak of its file exceeds."""
        return CEILING if self.loudness is not None else self.peak or 0.0

    def runs_with(self, other: "Job") -> bool:
        """Whether both can be rows of one batch."""
        return (self.options, self.audio_prompt) == (other.options, other.audio_prompt)

    def inputs(self) -> dict[str, str]:
        """The sound files that it reads, by what they are."""
        melody, style = self.melody and self.melody.path, self.style
        paths = {"audio_prompt": self.audio_prompt and self.audio_prompt.path}
        paths |= {"melody": melody, "style": style}
        return {name: path for name, path in paths.items() if path}

    def record(self) -> dict[str, Any]:
        """Its settings, for the file's comment."""
        record = asdict(self.options) | dict(prompt=self.prompt, seed=self.seed)
        record |= dict(loudness=self.loudness, peak=self.peak, subtype=self.subtype)
        record |= dict(mp3_bitrate=self.mp3_bitrate)
        if self.audio_prompt:
            record |= dict(zip(AUDIO_KEYS, self.audio_prompt))
        if self.melody:
            path, start, separate = self.melody
            record |= dict(melody=path, melody_start=start, no_separate=not separate)
        return record | ({"style": self.style} if self.style else {})


def check_level(loudness: float | None, peak: float | None) -> None:
    """Raise ValueError for a level that cannot be."""
    for name, level, least, unit in (
        ("loudness", loudness, -70, "LUFS"),
        ("peak", peak, -100, "dB"),
    ):
        number = isinstance(level, int | float) and least <= level <= 0
        if not (level is None or number):
            raise ValueError(f"{name} must be from {least} to 0 {unit}, got {level!r}.")
    if loudness is not None and peak is not None:
        raise ValueError("loudness and peak must not be given together.")


OPTIONS = tuple(field.name for field in fields(Options))
LEVELS = ("loudness", "peak")
KEYS = ("prompt", "seed", "output", *OPTIONS, *LEVELS, "subtype", "mp3_bitrate")
AUDIO_KEYS = ("audio_prompt", "prompt_start", "prompt_length", "drop_prompt")
MELODY_KEYS = ("melody", "melody_start", "no_separate")
STYLE_KEYS = ("style", *STYLE_OPTIONS)
ALL_KEYS = (*dict.fromkeys((*KEYS, *AUDIO_KEYS, *MELODY_KEYS, *STYLE_KEYS)),)


def sound_name(key: str, path: Any) -> str | None:
    """A path, in which ~ is the home folder, or None for none. Raises ValueError, which
    has the `key`, for what is no path."""
    if not isinstance(path, str | Path | None) or "\0" in str(path):
        raise ValueError(f"{key} must name a sound file, got {path!r:.80}.")
    return os.path.expanduser(path) if path else None


def make_audio_prompt(path, start, length, drop) -> AudioPrompt | None:
    """From values of AUDIO_KEYS. Raises ValueError naming a bad one."""
    for name, seconds, least in (
        ("prompt_start", start, 0),
        ("prompt_length", length, 1e-4),
    ):
        number = type(seconds) in (int, float) and least <= seconds < 1e6
        if seconds is not None and not number:
            raise ValueError(f"{name} must be {least:g} s or more, got {seconds!r}.")
    path = sound_name("audio_prompt", path)
    if drop not in (None, False, True):
        raise ValueError(f"drop_prompt must be true or false, got {drop!r}.")
    if not path and (start is not None or length is not None or drop):
        raise ValueError(
            "prompt_start, prompt_length and drop_prompt need an audio_prompt."
        )
    return AudioPrompt(path, start or 0.0, length, bool(drop)) if path else None


def make_melody(path, start, no_separate, overrides: set[str]) -> MelodyFile | None:
    """From values of MELODY_KEYS. Raises ValueError naming a bad one, or one of the
    job's `overrides`, which is no default of a file of prompts, without a melody."""
    path = sound_name("melody", path)
    if start is not None and not (type(start) in (int, float) and 0 <= start < 1e6):
        raise ValueError(f"melody_start must be 0 s or more, got {start!r}.")
    if no_separate not in (None, False, True):
        raise ValueError(f"no_separate must be true or false, got {no_separate!r}.")
    lone = {"melody_start": start is not None, "no_separate": no_separate}
    if not path and any(given and name in overrides for name, given in lone.items()):
        raise ValueError("melody_start and no_separate need a melody.")
    return MelodyFile(path, start or 0.0, not no_separate) if path else None


def make_style(values: dict[str, Any], overrides: set[str]) -> tuple[str | None, dict]:
    """The path among values of STYLE_KEYS, and the options. Raises ValueError naming a
    bad path, or one of the job's `overrides` options without one, as `make_melody`."""
    path = sound_name("style", values.get("style"))
    given = {k: v for k in STYLE_OPTIONS if (v := values.get(k)) is not None}
    if path:
        return path, given
    if lone := given.keys() & overrides:
        raise ValueError(f"{min(lone)} must come with a style.")
    return None, {}


@in_a_line
def make_job(
    values: dict[str, Any], line: int | None = None, overrides: set[str] | None = None
) -> Job:
    """A job from values of ALL_KEYS, of which those named in `overrides` are no
    defaults; None: all. Raises ValueError naming a bad one."""
    sound = make_audio_prompt(*(values.get(key) for key in AUDIO_KEYS))
    overrides = {*values} if overrides is None else overrides
    melody = make_melody(*(values.get(key) for key in MELODY_KEYS), overrides)
    style, options = make_style(values, overrides)
    options |= {k: values[k] for k in OPTIONS if k in values and k not in STYLE_KEYS}
    options = Options(**options)
    output = values["output"]
    if not isinstance(output, str | Path) or not str(output) or "\0" in str(output):
        raise ValueError(f"output must name a file, got {output!r}.")
    levels = [values.get(key) for key in LEVELS]
    first = (values["prompt"], values["seed"], Path(output))
    subtype = values.get("subtype") and str(values["subtype"]).upper()
    written = (subtype, values.get("mp3_bitrate"))
    job = Job(*first, options, sound, melody, style, *levels, *written, line)
    return replace(job, overwrite=bool(values.get("force")))


def numbered(output: str, index: int, count: int) -> str:
    """`out.wav` -> `out-3.wav`, where there are several."""
    path = Path(output)
    return output if count == 1 else str(path.with_stem(f"{path.stem}-{index + 1}"))


def plan(prompts: list[str], values: dict[str, Any], takes: int = 1) -> list[Job]:
    """Jobs for `takes` takes of each prompt: seeds counted up, files numbered. Without
    an output they are called after prompt and seed."""
    count, output = len(prompts) * takes, values.get("output")
    jobs = []
    for i in range(count):
        prompt, seed = prompts[i // takes], values["seed"] + i
        if output is None:
            path = free(default_name(prompt, seed))
        else:
            path = numbered(output, i, count)
        jobs.append(make_job(values | dict(prompt=prompt, seed=seed, output=path)))
    return jobs


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


class Sounds:
    """The sounds that jobs ask for, as a model takes them."""

    def __init__(self, model: MusicGen):
        self._model = model
        self._melody = functools.lru_cache(maxsize=32)(self._read_melody)

    def audio_prompt(self, job: Job) -> mx.array | None:
        """Samples (N, C) of the job's audio prompt, if there is one. Raises ValueError
        or OSError, as the others."""
        if job.audio_prompt is None:
            return None
        path, start, length, _ = job.audio_prompt
        model, rate = self._model, self._model.sampling_rate
        first = find_start("prompt_start", path, start, rate)
        if length is not None and not 1 <= int(length * rate):
            raise ValueError(
                f"prompt_length must be {1 / rate:g} s or more, got {length}."
            )
        count = None if length is None else int(length * rate)
        most = int(job.options.duration * rate) + 1
        audio = load_audio(path, rate, model.channels, first, min(count or most, most))
        if len(audio) == most:
            frames = model.frames_in(job.options.duration)
            there = count_samples(path, rate) - first
            check_length(model, min(count or there, there), frames)
        return audio

    def melody(self, job: Job) -> mx.array | None:
        """Samples (N, 1) that hold the job's melody, without drums and bass if that is
        wanted; None without a melody."""
        return job.melody and self._melody(job.melody, job.options.duration)

    def _read_melody(self, melody: MelodyFile, duration: float) -> mx.array:
        from conditioning import check_follows
        from melody import MelodyRequest

        check_follows(self._model, "melody")
        conditioner, rate = self._model.conditioner, self._model.sampling_rate
        first = find_start("melody_start", melody.path, melody.start, rate)
        needed = int(conditioner.needed(duration) * rate)
        audio = load_audio(melody.path, rate, 1, first, needed)
        request = MelodyRequest(audio, melody.separate)
        sound = conditioner.prepare(request, 0, duration)
        mx.eval(sound)  # here, for what is lazy belongs to this thread
        return sound

    def style_start(self, job: Job) -> float | None:
        """The second at which the excerpt of the job's style begins, given or drawn.
        Raises ValueError where it does not lie in the sound."""
        if job.style is None:
            return None
        from conditioning import check_follows
        from style import StyleRequest

        check_follows(self._model, "style")
        excerpt = (job.options.style_start, job.options.style_length)
        request = StyleRequest(job.style, *excerpt)
        return self._model.conditioner.excerpt(request, job.seed)[0]


def find_start(name: str, path: str, start: float, sampling_rate: int) -> int:
    """The sample at a second of a sound file. Raises ValueError, which has the `name`
    of the setting, where the file has ended."""
    first = int(start * sampling_rate)
    count = count_samples(path, sampling_rate) if first else 1
    if not 0 <= first < count:
        raise ValueError(
            f"{name} must be less than the {count / sampling_rate:g} s of {path}, got "
            f"{start:g}."
        )
    return first


class Start(NamedTuple):
    """Codes that a take goes on from, or whose sound is made again."""

    codes: mx.array  # (1, T, K)
    prompt_frames: int = 0  # of these, the ones of an audio prompt


class Result(NamedTuple):
    """What became of a job: its file, or the error."""

    job: Job
    error: Exception | None = None
    seconds: float = 0.0  # of audio
    elapsed: float = 0.0  # seconds that its whole batch took
    batch: int = 1  # jobs in that


class Batch:
    """Jobs that run together: iterate to make their codes, a decoder step at a time,
    then `save` them. Where the loop is left early, what there is can be saved."""

    def __init__(
        self,
        model: MusicGen,
        jobs: list[Job],
        sounds: Sounds,
        start: Start | None = None,
    ):
        self._model, self._jobs, self._sounds = model, jobs, sounds
        self._start, self._began = start, 0.0
        self.duration = jobs[0].options.duration  # seconds, of all of them
        self._takes: list[Take] = []
        self._prompt_frames = 0  # of the takes, the ones of an audio prompt
        self._failed: list[Result] = []

    def __iter__(self) -> Iterator[Take]:
        """Yields the take after each step. An error ends it, and is told by `save`."""
        self._began = time.perf_counter()
        self._leave_out_unheard()
        try:
            if self._jobs:
                first, start = self._jobs[0], self._start
                audio = None if start else self._sounds.audio_prompt(first)
                self._prompt_frames = frames_of_prompt(self._model, audio, start)
                yield from self._make(self._jobs, audio)
        except (OSError, RuntimeError, ValueError) as error:
            self._failed += [Result(job, error) for job in self._jobs]
            self._jobs = []

    def _leave_out_unheard(self) -> None:
        """Fail the jobs whose melody or style cannot be heard, or whose text cannot be
        followed, and no others."""
        for job in list(self._jobs):
            try:
                if self._model.config.text_encoder is None:
                    from textless import without_text

                    without_text(self._model.name, [job.prompt], job.options)
                elif not job.prompt_is_given:
                    raise ValueError("there must be a prompt, for the model has text.")
                self._sounds.melody(job), self._sounds.style_start(job)
            except (OSError, ValueError) as error:
                self._failed.append(Result(job, error))
                self._jobs = [other for other in self._jobs if other is not job]

    def _make(self, jobs: list[Job], audio: mx.array | None) -> Iterator[Take]:
        """The steps of some jobs; in halves, where memory cannot hold all after all."""
        take = make_take(self._model, jobs, self._sounds, audio, self._start)
        self._takes.append(take)
        try:
            yield from take
            mx.eval(take.codes)
            return
        except RuntimeError:  # of MLX
            if len(jobs) == 1 or self._model.decoder.group is not None:
                raise
        self._takes.remove(take)
        mx.clear_cache()
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]):
            yield from self._make(part, audio)

    def codes(self) -> mx.array:
        """Codes (B, T, K) of the jobs from the first on that are as long as any."""
        parts = [take.codes for take in self._takes]
        longest = max(part.shape[1] for part in parts)
        whole = itertools.takewhile(lambda part: part.shape[1] == longest, parts)
        return mx.concatenate(list(whole))

    def save(self, save_codes: Path | None = None) -> Iterator[Result]:
        """Write the jobs' sound, and the codes of the only one where they are wanted.

        Yields a result for each job that failed or has its file. Processes that share
        the model leave it to the first.
        """
        yield from self._failed
        model, group = self._model, self._model.decoder.group
        shared_by_another = group is not None and group.rank() > 0
        if not self._jobs or not self._takes or shared_by_another:
            return
        try:
            codes = self.codes()
            if codes.shape[1] == 0:  # stopped before anything was made
                return
            audio = decode(model, self._jobs[0], codes, self._prompt_frames)
        except (RuntimeError, ValueError) as error:
            yield from (Result(job, error) for job in self._jobs)
            return
        elapsed = time.perf_counter() - self._began
        for job, samples in zip(self._jobs, audio):
            record = take_settings(model, job, self._sounds, self._prompt_frames)
            try:
                job = save(model, job, samples, record)
                if save_codes:
                    settings.save_codes(save_codes, codes, record, job.overwrite)
            except (OSError, ValueError) as error:
                yield Result(job, error)
                continue
            seconds = len(samples) / model.sampling_rate
            yield Result(job, None, seconds, elapsed, len(self._jobs))


def run(
    model: MusicGen,
    jobs: list[Job],
    size: int,
    sounds: Sounds | None = None,
    start: Start | None = None,
) -> Iterator[Batch]:
    """Batches of `size` jobs, or what memory holds, of jobs that were checked.

    Where processes share the model, what the smallest machine holds. A job that fails
    leaves the others alone.
    """
    sounds, group = sounds or Sounds(model), model.decoder.group
    jobs = [job.timed(model) for job in jobs]

    def rows(job: Job) -> int:
        fit = min(size, model.rows_that_fit(job.options))
        if group is not None:
            fit = mx.distributed.all_min(mx.array(fit), group=group).item()
        return fit

    for batch in batches(jobs, rows):
        yield Batch(model, batch, sounds, start)


def make_take(
    model: MusicGen,
    jobs: list[Job],
    sounds: Sounds,
    audio: mx.array | None,
    start: Start | None,
) -> Take:
    """The take of jobs that run together, which start with a sound, or with codes."""
    return model.steps(
        [job.prompt for job in jobs],
        seed=[job.seed for job in jobs],
        audio_prompt=audio,
        codes_prompt=start and start.codes,
        melody=sounds_or_none(jobs, sounds.melody),
        separate=False,  # done already
        style=sounds_or_none(jobs, lambda job: job.style),
        batch_size=len(jobs),
        **asdict(jobs[0].options),
    )


def sounds_or_none(
    jobs: list[Job], load: Callable[[Job], mx.array | None]
) -> list[mx.array | None] | None:
    """A sound for each job; None where no job has one."""
    sounds = [load(job) for job in jobs]
    return None if all(sound is None for sound in sounds) else sounds


def frames_of_prompt(
    model: MusicGen, audio: mx.array | None, start: Start | None
) -> int:
    """Frames of a take that are its audio prompt's."""
    return prompt_frames(model, audio) if start is None else start.prompt_frames


def decode(model: MusicGen, job: Job, codes: mx.array, prompt_frames: int) -> mx.array:
    """Audio (B, N, C) of codes (B, T, K), less an audio prompt to be dropped."""
    audio = model.decode(codes)
    if job.audio_prompt and job.audio_prompt.drop:
        audio = audio[:, prompt_frames * model.config.audio_encoder.hop_length :]
    mx.eval(audio)
    return audio


def save(model: MusicGen, job: Job, samples: mx.array, record: dict[str, Any]) -> Job:
    """Write the job's sound, with its settings in the comment. Returns the job, under
    another name where somebody else wrote its file meanwhile."""
    rate, comment = model.sampling_rate, settings.to_comment(record)
    audio = job.level(samples, rate)
    while True:
        try:
            written = (comment, job.subtype, job.mp3_bitrate, job.overwrite)
            save_audio(job.output, audio, rate, *written, job.ceiling)
            return job
        except FileExistsError:
            other = free(job.output)
            warnings.warn(
                f"Another program wrote {job.output} meanwhile: this take is in {other}."
            )
            job = replace(job, output=other)


def take_settings(
    model: MusicGen, job: Job, sounds: Sounds, prompt_frames: int = 0
) -> dict[str, Any]:
    """All that makes the job's take again, for the file's comment."""
    record = job.record() | dict(model=model.name, revision=model.revision)
    if job.audio_prompt:
        record |= dict(prompt_frames=prompt_frames)
    if job.style and job.options.style_start is None:
        # else the file need not be there any more
        record["style_start"] = sounds.style_start(job)
    if model.config.quantization:
        told = {"mode": "affine"} | model.config.quantization  # older ones have none
        record |= {f"q_{name}": value for name, value in told.items()}
    if checksum := getattr(model, "_adapter_hash", None):
        record |= dict(adapter_hash=checksum)
    dtype = str(model.decoder.dtype).removeprefix("mlx.core.")
    return record | model.adapter | dict(dtype=dtype, mlx=mx.__version__)


def check(
    jobs: list[Job],
    group: mx.distributed.Group | None,
    to_files: bool = True,
    reads: bool = True,
) -> list[Result]:
    """Results of the jobs that cannot be made.

    Processes that share a model, the `group`, agree: what one of them cannot make
    they all leave. Only the first of them writes.
    """
    first = group is None or group.rank() == 0
    writes, errors = to_files and first, {}
    for i, job in enumerate(jobs):
        try:
            job.check(writes, reads)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            errors[i] = error
    if group is not None:
        bad = agree([int(i in errors) for i in range(len(jobs))], group)
        told = agree([int(i in errors) * first for i in range(len(jobs))], group)
        for i in errors:
            if not told[i]:
                warnings.warn(f"Process {group.rank()} cannot make it: {errors[i]}")
        elsewhere = ValueError("Another process cannot make it, and says why.")
        errors = {i: errors.get(i, elsewhere) for i, wrong in enumerate(bad) if wrong}
    return [Result(jobs[i], error) for i, error in errors.items()]
