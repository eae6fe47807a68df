"""What a page may ask of a model: takes, and what can be done with one.

    order = read_order({"prompt": "slow bell", "seed": 7}, {}, model="tiny")
    task = Generate(Takes("takes"), order)
    task.check()  # raises ValueError for what cannot be made, before it is tried
    ticket = worker.submit(task)

Each writes its takes as generate.py would, with their codes beside them, and tells a
ticket of worker.py how it goes on. Needs worker.py, takes.py, jobs.py, lines.py, hub.py,
encodec_stream.py, wav_stream.py and what these need beside it.
"""

import io
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

import jobs
import settings
from encodec_stream import pieces_of
from endings import FADE, Ending
from job import ALL_KEYS, Job, make_job
from jobs import Batch, Result, Sounds, Start
from lines import ALIASES
from magnet_job import is_magnet, refuse
from takes import Takes
from wav_stream import WavStream
from worker import Refused, Ticket, Worker, status_of

if TYPE_CHECKING:
    from musicgen import MusicGen, Take

FILES = ("audio_prompt", "melody", "style")  # that come with a request
MOST_TAKES = 16
MOST_TEXT = 10_000  # characters
CHUNK = 0.5  # seconds of a piece, as of generate.py
OFTEN = 0.1  # seconds between two tellings of how far it is
DEFAULTS = dict(negative_prompt="", fade_out=FADE)  # as of generate.py


@dataclass(frozen=True)
class NamedJob(Job):
    """A job whose sounds have other names in its settings than the files have."""

    names: dict[str, str] = field(default_factory=dict, compare=False)

    def record(self) -> dict[str, Any]:
        record = super().record()
        given = {key: self.names.get(record.get(key)) for key in FILES}
        return record | {key: name for key, name in given.items() if name}


class Order(NamedTuple):
    """What was asked for."""

    model: str
    values: dict[str, Any]  # of job.ALL_KEYS
    takes: int = 1  # seeds counted up
    stream: str = ""  # "wav", "events" or neither
    names: dict[str, str] = {}  # paths of files that came along, and their own names


def read_order(
    fields: dict[str, Any], files: dict[str, Path], model: str, most: float = 600.0
) -> Order:
    """What the fields of a request ask for, with files by the field that they came in.

    `model` is what is taken where none is named; no take may last more than `most`
    seconds. Raises ValueError, or Refused, naming the field that cannot be.
    """
    given = {}
    for name, value in fields.items():
        name = name.replace("-", "_")
        name = ALIASES.get(name, "duration" if name == "duration_seconds" else name)
        if name in given:
            raise ValueError(f"{name} must not be given twice.")
        if value is not None:
            given[name] = value
    model = read_text("model", given.pop("model", model))
    takes, stream = given.pop("takes", 1), given.pop("stream", False)
    check_known(given, files)
    if type(takes) is not int or not 1 <= takes <= MOST_TAKES:
        raise ValueError(f"takes must be from 1 to {MOST_TAKES}, got {takes!r:.40}.")
    streams = {False: "", True: "wav", "wav": "wav", "events": "events"}
    if not isinstance(stream, str | bool) or stream not in streams:
        raise ValueError(f'stream must be true, "wav" or "events", got {stream!r:.40}.')
    paths = {name: str(path) for name, path in files.items()}
    values = DEFAULTS | given | paths | dict(magnet=is_magnet(model))
    values["prompt"] = read_text("prompt", given.get("prompt", ""))
    values.setdefault("seed", secrets.randbits(31))
    check_duration(values.get("duration"), most)
    names = {str(path): path.name for path in files.values()}
    return Order(model, values, takes, streams[stream], names)


def check_known(given: dict[str, Any], files: dict[str, Path]) -> None:
    """Raise ValueError for fields that are unknown, and for files that are not files."""
    known = {*ALL_KEYS} - {"output", *FILES}
    for name in given:
        if name in FILES:
            raise ValueError(
                f"{name} must be a sound file that comes with the request."
            )
        if name not in known:
            raise ValueError(
                f"'{name:.60}' is unknown; known are model, takes, stream, "
                f"{', '.join(sorted(known))}."
            )
    if unknown := files.keys() - {*FILES}:
        raise ValueError(f"'{min(unknown):.60}' must not be a file.")


def read_text(name: str, value: Any) -> str:
    """A text that is not too long, else ValueError."""
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise ValueError(
            f"{name} must be a text of at most {MOST_TEXT} characters, got {value!r:.40}."
        )
    return value


def check_duration(seconds: Any, most: float) -> None:
    """Raise ValueError for more seconds than are allowed; what is no number is told by
    the job."""
    if isinstance(seconds, int | float) and seconds > most:
        raise ValueError(
            f"duration must be at most {most:g} s, got {seconds:g}: see --max-seconds."
        )


class Generate:
    """Takes of one prompt, which run in a batch. The first one's sound is told while it
    is made, where the order streams."""

    quick = False

    def __init__(self, takes: Takes, order: Order):
        self._takes, self.order = takes, order

    def jobs(self) -> list[Job]:
        """A job for each take. Raises ValueError."""
        order, planned = self.order, []
        seed, step = order.values["seed"], order.values.get("best_of") or 1
        for i in range(order.takes):
            own = seed + i * step if isinstance(seed, int) else seed
            path = self._takes.free(order.values["prompt"], own)
            job = make_job(order.values | dict(seed=own, output=path))
            parts = {part.name: getattr(job, part.name) for part in fields(job)}
            planned.append(NamedJob(**parts, names=order.names))
        return planned

    def check(self) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried."""
        for job in self.jobs():
            job.check()
        if self.order.stream == "wav":
            check_stream(job, self.order.takes)
            refuse({"stream": True}, bool(self.order.values["magnet"]))

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Make them. Tells `start` of each, `progress`, `header` and `audio` where the
        order streams, and `take` of each that is written."""
        model = worker.use(self.order.model, ticket)
        if ticket.stops():
            return
        wanted, sounds = [job.timed(model) for job in self.jobs()], Sounds(model)
        for job in wanted:
            if job.fault:
                raise ValueError(job.fault)
            tell_start(ticket, model, job)
        self._make(worker, ticket, model, wanted, sounds, self.start(model, wanted[0]))

    def start(self, model: "MusicGen", job: Job) -> Start | None:
        """What the take begins with: nothing but an audio prompt, if any."""
        return None

    def _make(
        self,
        worker: Worker,
        ticket: Ticket,
        model: "MusicGen",
        wanted: list[Job],
        sounds: Sounds,
        start: Start | None,
    ) -> None:
        rows, results = sum(job.best_of or 1 for job in wanted), []
        batches = list(jobs.run(model, wanted, rows, sounds, start))
        streams = self.order.stream and model.config.masking is None
        for i, batch in enumerate(batches):
            watched = Watched(batch, worker, ticket, i, len(batches))
            if streams and i == 0:
                pour(model, watched, ticket, header(model, wanted[0], sounds, start))
            for _ in watched:  # what is left, which is all where nothing streams
                pass
            results += keep(batch, self._takes, ticket)
            if ticket.heeded:
                break
        tell_failures(results)


def check_stream(job: Job, takes: int) -> None:
    """Raise ValueError for what needs the whole take before it is heard."""
    ending = job.ending
    whole = dict(takes=takes > 1, best_of=job.best_of, loop=job.loop is not None)
    whole |= dict(loudness=job.loudness is not None, peak=job.peak is not None)
    whole |= dict(ending=ending.tail, fade_in=ending.fade_in)
    whole |= dict(fade_out=ending.fade_out not in (None, 0, FADE))
    whole |= dict(subtype=job.subtype not in (None, "PCM_16"))
    whole |= dict(drop_prompt=job.audio_prompt and job.audio_prompt.drop)
    for name, given in whole.items():
        if given:
            raise ValueError(
                f"{name} needs the whole take: leave out stream, or take "
                '"events", which tells of the take at the end.'
            )


def tell_start(ticket: Ticket, model: "MusicGen", job: Job) -> None:
    """Tell what a take will be."""
    form = dict(sampling_rate=model.sampling_rate, channels=model.channels)
    told = dict(id=job.output.stem, prompt=job.prompt, seed=job.seed)
    ticket.tell("start", **told, **form, seconds=job.options.duration)


class Watched:
    """The steps of a batch, of which the ticket is told, until it stops: an iteration
    that can be left and gone on with. `take` is that of the first row."""

    def __init__(self, batch: Batch, worker: Worker, ticket: Ticket, i: int, n: int):
        self.take: "Take | None" = None
        self._batch, self._steps = batch, iter(batch)
        self._worker, self._ticket = worker, ticket
        self._before, self._share, self._told = i / n, 1 / n, 0.0

    def __iter__(self) -> Iterator["Take"]:
        return self

    def __next__(self) -> "Take":
        if self.take and self._ticket.stops():
            raise StopIteration
        take = next(self._steps)
        if self.take is None or self.take.step < self.take.total:
            self.take = take  # another one, where memory did not hold the first
        self._tell(take)
        self._worker.do_quick()
        return take

    def _tell(self, take: "Take") -> None:
        now, whole = time.monotonic(), take.step == take.total
        if whole or now - self._told >= OFTEN:
            done = self._before + self._share * take.step / take.total
            of, self._told = self._batch.duration, now
            self._ticket.tell("progress", seconds=round(done * of, 3), of=of)

    @property
    def frames(self) -> int:
        """Frames of the first row that there are."""
        return self.take.frames

    @property
    def codes(self) -> mx.array:
        """Codes (1, T, K) of the first row."""
        return self.take.codes[:1]


class Pieces(io.BytesIO):
    """What was written since it was last taken."""

    def taken(self) -> bytes:
        data = self.getvalue()
        self.seek(0), self.truncate()
        return data


def header(model: "MusicGen", job: Job, sounds: Sounds, start: Start | None) -> str:
    """The settings that a stream of the job has before its samples."""
    job = replace(job, ending=Ending())
    audio = None if start else sounds.audio_prompt(job)
    frames = jobs.frames_of_prompt(model, audio, start)
    return settings.to_comment(jobs.take_settings(model, job, sounds, frames, start))


def pour(model: "MusicGen", steps: Watched, ticket: Ticket, comment: str) -> None:
    """Tell the sound of the first row while the steps are made: `header`, the beginning
    of a wav file, then `audio`, samples (N, C) of 16 bits, little endian."""
    pieces = Pieces()
    wav = WavStream(pieces, model.channels, model.sampling_rate, comment, rewinds=False)
    ticket.tell("header", data=pieces.taken())
    first = next(steps, None)
    if first is None:  # the batch tells why
        return
    made = pieces_of(model, steps, model.frames_in(CHUNK), chain([first], steps))
    for piece in made:
        wav.write(piece)
        ticket.tell("audio", data=pieces.taken())


def keep(batch: Batch, takes: Takes, ticket: Ticket) -> list[Result]:
    """Write the takes of a batch, and tell of each."""
    results = []
    for result in batch.save(beside=True):
        results.append(result)
        if not result.error:
            ticket.tell("take", **takes.of(result.job.output).as_json())
    return results


def tell_failures(results: Iterable[Result]) -> None:
    """Raise Refused for the first take that failed."""
    for result in results:
        if result.error:
            raise Refused(status_of(result.error), str(result.error))
