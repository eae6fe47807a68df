"""Many takes, in batches: of several prompts, or of the lines that lines.py reads.

    for batch in run(model, plan(["happy rock", "calm piano"], values, takes=4), size=8):
        for take in batch:
            print(take.step, "of", take.total)
        for result in batch.save():
            print(result.job.output, result.error or "is there")

Jobs that differ in prompt, seed and file only run in one batch. Under `mlx.launch` every
process takes its share. Needs job.py, which has `plan`, musicgen.py and what these need,
diffusion_job.py, prompt.py and settings.py beside it. Jobs that follow a sound go with conditioning.py,
and melody.py or style.py; those of a model without text need textless.py, and the best of many ranking.py.
"""

import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import settings
from audio import count_samples, load_audio, save_audio
from diffusion_job import STOPPED, Decoder, Watch
from job import AudioPrompt, Job, MelodyFile
from musicgen import MusicGen, Take
from notes import Tune
from outputs import default_name, free
from prompt import check_length, prompt_frames


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
        duration = job.made.duration
        most = int(duration * rate) + 1
        audio = load_audio(path, rate, model.channels, first, min(count or most, most))
        if len(audio) == most:
            frames = model.frames_in(duration)
            there = count_samples(path, rate) - first
            check_length(model, min(count or there, there), frames)
        return audio

    def melody(self, job: Job) -> mx.array | Tune | None:
        """Samples (N, 1) that hold the job's melody, without drums and bass if that is
        wanted, or its typed tune; None without a melody."""
        if job.notes:
            return self._typed(job)
        return job.melody and self._melody(job.melody, job.made.duration)

    def _typed(self, job: Job) -> Tune:
        from conditioning import check_follows
        from melody import MelodyRequest

        check_follows(self._model, "melody", "notes")
        request = MelodyRequest(job.tune)
        return self._model.conditioner.prepare(request, 0, job.made.duration)

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


def read_part(model: MusicGen, part: AudioPrompt) -> mx.array:
    """Samples (N, C) of a part of a sound file. Raises ValueError or OSError."""
    path, start, length, _ = part
    rate = model.sampling_rate
    first = find_start("prompt_start", path, start, rate)
    count = None if length is None else int(length * rate)
    return load_audio(path, rate, model.channels, first, count)


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
    edit: dict[str, Any] = {}  # settings of theirs, where a part was made again


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
        rows: int | None = None,
    ):
        if jobs[0].best_of:  # which runs by itself
            jobs = jobs[0].contenders()
        self._model, self._jobs, self._sounds = model, jobs, sounds
        self._rows = rows or len(jobs)  # at once
        self.scores: list[float] = []  # of many, the best first
        self._start, self._began = start, 0.0
        self.duration = jobs[0].made.duration  # seconds, of all of them
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
                Decoder(self._model, first.decoder).check()
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
                if job.fault:  # that was found when the model was met
                    raise ValueError(job.fault)
                if self._model.config.text_encoder is None:
                    from textless import without_text

                    without_text(self._model.name, [job.prompt], job.options)
                elif not job.prompt_is_given:
                    raise ValueError("there must be a prompt, for the model has text.")
                if job.best_of:
                    from ranking import check_best_of

                    check_best_of(self._model, job.best_of, job.rank)
                self._sounds.melody(job), self._sounds.style_start(job)
            except (OSError, ValueError) as error:
                self._failed.append(Result(job, error))
                self._jobs = [other for other in self._jobs if other is not job]

    def _make(self, jobs: list[Job], audio: mx.array | None) -> Iterator[Take]:
        """The steps of some jobs; in halves, where memory cannot hold all after all."""
        size = min(len(jobs), self._rows)
        take = make_take(self._model, jobs, self._sounds, audio, self._start, size)
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

    def _best(self, codes: mx.array) -> tuple[mx.array, dict[int, dict[str, Any]]]:
        """Of many takes the best, or all in order, with what their files say of it, by
        seed; of others, what there is."""
        first, sounds = self._jobs[0], self._sounds
        before = self._start.codes.shape[1] if self._start else self._prompt_frames
        if not first.best_of or codes.shape[1] <= before:
            return codes, {}
        from ranking import RANKS, order

        jobs, texts = self._jobs[: len(codes)], [first.text] * len(codes)
        how = dict(seed=[job.seed for job in jobs], batch_size=self._rows)
        how |= options_of(jobs, sounds)
        scores = RANKS[first.rank](self._model, texts, codes, before, **how)
        ranks = order(scores)[: None if first.keep_all else 1]
        self.scores = sorted(scores.tolist(), reverse=True)
        paths = [job.output for job in jobs]
        self._jobs = [replace(jobs[i], output=path) for i, path in zip(ranks, paths)]
        told = dict(first_seed=first.seed, scores=self.scores)
        found = {jobs[i].seed: told | dict(score=scores[i].item()) for i in ranks}
        return codes[mx.array(ranks)], found

    def save(
        self,
        save_codes: Path | None = None,
        beside: bool = False,
        watch: Watch = iter,
    ) -> Iterator[Result]:
        """Write the jobs' sound, and the codes of the only one where they are wanted, or
        of each `beside` its sound, as NAME.safetensors. `watch` is a `Decoder`'s.

        Yields a result for each job that failed or has its file. Processes that share
        the model leave it to the first.
        """
        yield from self._failed
        model, group = self._model, self._model.decoder.group
        if not self._jobs or not self._takes:
            return
        try:
            codes = self.codes()
            if codes.shape[1] == 0:  # stopped before anything was made
                return
            codes, scores = self._best(codes)
            if group is not None and group.rank() > 0:
                return
        except (RuntimeError, ValueError) as error:
            yield from (Result(job, error) for job in self._jobs)
            return
        decoder = Decoder(model, self._jobs[0].decoder, watch)
        try:
            audio = decode(model, self._jobs, codes, self._prompt_frames, decoder)
        except (OSError, RuntimeError, ValueError) as error:
            if save_codes:
                self._keep(codes, save_codes)
            yield from (Result(job, error) for job in self._jobs)
            return
        elapsed = time.perf_counter() - self._began
        for job, samples, own in zip(self._jobs, audio, codes):
            made_of = (self._sounds, self._prompt_frames, self._start)
            try:
                of = (own[None], self._prompt_frames, decoder)
                samples, facts = shape(model, job, samples, *of)
                if job.decoder != decoder.name:
                    warnings.warn(f"{job.output}: {STOPPED}")
                    job = replace(job, decoder=decoder.name)
                record = take_settings(model, job, *made_of)
                record |= scores.get(job.seed, {}) | facts
                job = save(model, job, samples, record)
                if beside:
                    path = job.output.with_suffix(".safetensors")
                    settings.save_codes(path, own[None], record, job.overwrite)
                if save_codes:
                    settings.save_codes(save_codes, codes[:1], record, job.overwrite)
                    save_codes = None  # of several the best one's
            except (OSError, ValueError) as error:
                yield Result(job, error)
                continue
            seconds = len(samples) / model.sampling_rate
            yield Result(job, None, seconds, elapsed, len(self._jobs))

    def _keep(self, codes: mx.array, path: Path) -> None:
        """Write the codes that could not be decoded, for another decoder."""
        job, made_of = self._jobs[0], (self._sounds, self._prompt_frames, self._start)
        record = take_settings(self._model, job, *made_of)
        settings.save_codes(path, codes[:1], record, job.overwrite)
        warnings.warn(f"The codes are in {path}: --redecode decodes them.")


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
        fit = min(size, model.rows_that_fit(job.made))
        if group is not None:
            fit = mx.distributed.all_min(mx.array(fit), group=group).item()
        return fit

    for batch in batches(jobs, rows):
        yield Batch(model, batch, sounds, start, rows(batch[0]))


def make_take(
    model: MusicGen,
    jobs: list[Job],
    sounds: Sounds,
    audio: mx.array | None,
    start: Start | None,
    batch_size: int | None = None,
) -> Take:
    """The take of jobs that run together, which start with a sound, or with codes."""
    return model.steps(
        [job.text for job in jobs],
        seed=[job.seed for job in jobs],
        audio_prompt=audio,
        codes_prompt=start and start.codes,
        batch_size=batch_size or len(jobs),
        **options_of(jobs, sounds),
    )


def options_of(jobs: list[Job], sounds: Sounds) -> dict[str, Any]:
    """Options of the take of such jobs, with the sounds that they follow."""
    if jobs[0].magnet:
        return asdict(jobs[0].made)
    return asdict(jobs[0].made) | dict(
        melody=sounds_or_none(jobs, sounds.melody),
        separate=False,  # done already
        style=sounds_or_none(jobs, lambda job: job.style),
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


def decode(
    model: MusicGen,
    jobs: list[Job],
    codes: mx.array,
    prompt_frames: int,
    decoder: Decoder,
) -> mx.array:
    """Audio (B, N, C) of jobs' codes (B, T, K), less an audio prompt to be dropped."""
    job = jobs[0]
    if is_whole_loop(model, job, codes):  # which `shape` decodes, round the corner
        audio = model.decode(codes)
    else:
        audio = decoder(codes, [job.seed for job in jobs])
    if job.audio_prompt and job.audio_prompt.drop:
        audio = audio[:, prompt_frames * model.config.audio_encoder.hop_length :]
    mx.eval(audio)
    return audio


def redecode(
    model: MusicGen, job: Job, sounds: Sounds, start: Start, decoder: Decoder
) -> tuple[mx.array | np.ndarray, dict[str, Any]]:
    """The sound (N, C) of saved codes as the job wants it, and its settings."""
    decoder.check()
    of = (start.codes, start.prompt_frames, decoder)
    samples, facts = shape(model, job, decode(model, [job], *of)[0], *of)
    told = take_settings(model, job, sounds, start.prompt_frames, start)
    return samples, told | facts


def is_whole_loop(model: MusicGen, job: Job, codes: mx.array) -> bool:
    """Whether the codes (B, T, K) are those of a loop; a take that was stopped is none."""
    whole = codes.shape[1] >= model.frames_in(job.options.duration)
    return job.loop is not None and whole


def shape(
    model: MusicGen,
    job: Job,
    samples: mx.array,
    codes: mx.array,
    prompt_frames: int,
    decoder: Decoder,
) -> tuple[mx.array | np.ndarray, dict[str, Any]]:
    """The samples (N, C) of a take as the job wants them, less what `decode` drops, and
    what was found for that, for the file's comment."""
    if not is_whole_loop(model, job, codes):
        return ended(model, job, samples, prompt_frames), {}
    from loops import best_cut, decode_round, loop_frames, loop_samples

    frames = loop_frames(job.beat, job.loop, model.frame_rate)
    frames = min(frames, codes.shape[1])  # a take may be as long as its loop
    count = loop_samples(job.beat, job.loop, model.sampling_rate)
    first, score = best_cut(model, job.text, codes, frames)
    turn = lambda around: decoder(around, [job.seed])  # noqa: E731
    samples = decode_round(model, codes[:, first : first + frames], count, turn)
    return samples, dict(loop_start=first / model.frame_rate, loop_score=score)


def chosen(job: Job, seed: int, named: bool = True) -> Job:
    """The job with the seed of what was chosen, and unless it is `named` by somebody
    called after it."""
    job = replace(job, seed=seed)
    return job if named else replace(job, output=free(default_name(job.prompt, seed)))


def ended(
    model: MusicGen, job: Job, samples: mx.array, prompt_frames: int
) -> np.ndarray:
    """The samples with the fades and the end that the job asks for."""
    frames = model.frames_in(job.options.duration)
    if job.audio_prompt and job.audio_prompt.drop:
        frames -= prompt_frames
    first = frames * model.config.audio_encoder.hop_length
    return job.ending.apply(np.array(samples), model.sampling_rate, first)


def save(
    model: MusicGen, job: Job, samples: mx.array | np.ndarray, record: dict[str, Any]
) -> Job:
    """Write the job's sound, with its settings in the comment. Returns the job, under
    another name where somebody else wrote its file meanwhile."""
    rate, comment = model.sampling_rate, settings.to_comment(record)
    audio = job.level(samples, rate)
    while True:
        try:
            written = (comment, job.subtype, job.mp3_bitrate, job.overwrite)
            save_audio(job.output, audio, rate, *written, job.ceiling)
            if "loop_start" in record and job.output.suffix.lower() == ".wav":
                from loops import write_loop_points

                write_loop_points(job.output, len(audio), rate)
            return job
        except FileExistsError:
            other = free(job.output)
            warnings.warn(
                f"Another program wrote {job.output} meanwhile: this take is in {other}."
            )
            job = replace(job, output=other)


def take_settings(
    model: MusicGen,
    job: Job,
    sounds: Sounds,
    prompt_frames: int = 0,
    start: Start | None = None,
) -> dict[str, Any]:
    """All that makes the job's take again, for the file's comment, or says that it was
    made from an edit's codes."""
    record = job.record() | dict(model=model.name, revision=model.revision)
    record |= start.edit if start else {}
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
