"""What a page may ask of a model: takes of a prompt, which are heard while they are made.

    order = read_order(Form({"prompt": "slow bell", "seed": 7}), Limits("tiny"))
    task = Generate(Takes("takes"), order)
    task.check()  # raises ValueError for what cannot be made, before it is tried
    ticket = worker.submit(task)

The takes are what generate.py would write, with their codes beside them, and the ticket
tells how they come. Needs worker.py, takes.py, forms.py, arguments.py, jobs.py, lines.py,
hub.py, diffusion_job.py, encodec_stream.py, wav_stream.py and what these need beside it.
"""

import io
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

import jobs
import settings
from arguments import FLAGS
from diffusion_job import CODEC, DIFFUSION, Watch
from encodec_stream import pieces_of
from endings import FADE, Ending
from forms import Form
from hub import HUB_ID, MODELS
from job import ALL_KEYS, Job, make_job
from jobs import Batch, Result, Sounds, Start
from lines import ALIASES
from magnet_job import is_magnet, refuse
from takes import Takes
from wav_stream import WavStream
from worker import Refused, Ticket, Worker, status_of

if TYPE_CHECKING:
    from diffusion import Decoding
    from musicgen import MusicGen, Take

STREAMS = {False: "", True: "wav", "wav": "wav", "events": "events"}
FILES = ("audio_prompt", "melody", "style")  # that come with a request
MOST_TAKES = 16
MOST_TEXT = 10_000  # characters
CHUNK = 0.5  # seconds of a piece, as of generate.py
OFTEN = 0.1  # seconds between two tellings of how far it is
FLOATS = {  # flags of generate.py that are numbers with a point
    name
    for flags in FLAGS.values()
    for name, (_, reads) in flags.items()
    if reads.get("type") is float
}
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
    most: float = inf  # seconds of a take


class Limits(NamedTuple):
    """What a server serves."""

    model: str  # its own, which is taken where none is named, and may be a folder
    seconds: float = 600.0  # of a take, at most
    adapter: str | None = None  # of its own model
    decoder: str = DIFFUSION  # what `diffusion` is: a file, a folder or a Hub id


def read_order(form: Form, limits: Limits) -> Order:
    """What the fields and files of a request ask for: takes of a prompt. Raises
    ValueError, or Refused, naming the field that cannot be."""
    given = read_given(form)
    model = read_model(given, limits.model, limits)
    order = make_order(form, given, model, limits)
    order.values.setdefault("seed", secrets.randbits(31))
    return order


def read_given(form: Form, more: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a form by their names in job.ALL_KEYS, with `model`, `takes`,
    `stream` and some `more`. Raises ValueError for one that is unknown, or given twice.
    """
    given, own = {}, ("model", "takes", "stream", *more)
    known = {*ALL_KEYS, *own} - {"output", *FILES}
    for spelled, value in form.fields.items():
        name = spelled.replace("-", "_")
        name = ALIASES.get(name, "duration" if name == "duration_seconds" else name)
        if name not in known:
            names = ", ".join([*own, *sorted(known - {*own})])
            raise ValueError(f"'{spelled:.60}' is unknown; known are {names}.")
        if name in given:
            raise ValueError(f"{name} must not be given twice.")
        if value is not None:
            given[name] = value
    if unknown := form.files.keys() - {*FILES}:
        raise ValueError(f"'{min(unknown):.60}' must not be a file.")
    return given


def read_model(given: dict[str, Any], own: str, limits: Limits) -> str:
    """The model that is asked for, which is taken out of `given`, or else `own`. Raises
    Refused for what is not served, such as a folder that --model does not name."""
    name = read_text("model", given.pop("model", own))
    if name in (own, limits.model) or name in MODELS:
        return name
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        raise Refused(
            404,
            f"There is no model {name!r:.80}: take one of {', '.join(MODELS)}, or a Hub "
            "id. A folder is served where --model names it.",
        )
    return name


def make_order(form: Form, given: dict[str, Any], model: str, limits: Limits) -> Order:
    """An order of the settings of `read_given`. It has no seed where none is given.
    Raises ValueError, which names the field."""
    takes, stream = given.pop("takes", 1), given.pop("stream", False)
    if type(takes) is not int or not 1 <= takes <= MOST_TAKES:
        raise ValueError(f"takes must be from 1 to {MOST_TAKES}, got {takes!r:.40}.")
    if not isinstance(stream, str | bool) or stream not in STREAMS:
        raise ValueError(f'stream must be true, "wav" or "events", got {stream!r:.40}.')
    paths = {name: str(path) for name, path in form.files.items()}
    given = {name: as_flag(name, value) for name, value in given.items()}
    values = DEFAULTS | given | paths | dict(magnet=is_magnet(model))
    for name in ("prompt", "negative_prompt", "notes"):
        if name in values or name == "prompt":
            values[name] = read_text(name, values.get(name, ""))
    if "decoder" in values:
        values["decoder"] = choose_decoder(values["decoder"], limits)
    names = {paths[name]: form.names.get(name, name) for name in paths}
    return Order(model, values, takes, STREAMS[stream], names, limits.seconds)


def choose_decoder(name: Any, limits: Limits) -> str:
    """The decoder that a request names. Raises ValueError for all but two names: no file
    and no Hub id is a stranger's to choose."""
    if name not in (CODEC, DIFFUSION):
        raise ValueError(
            f'decoder must be "{CODEC}" or "{DIFFUSION}" here, got {name!r:.40}.'
        )
    return limits.decoder if name == DIFFUSION else CODEC


def as_flag(name: str, value: Any) -> Any:
    """A value as generate.py reads it: for JSON 8.0 is 8."""
    if type(value) is int and name in FLOATS and abs(value) < 2**53:
        return float(value)
    return value


def read_text(name: str, value: Any) -> str:
    """A text that is not too long, else ValueError."""
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise ValueError(
            f"{name} must be a text of at most {MOST_TEXT} characters, got {value!r:.40}."
        )
    return value


def check_duration(seconds: Any, most: float) -> None:
    """Raise ValueError for more seconds than are allowed. What is no number is left to
    the job to refuse."""
    if isinstance(seconds, int | float) and seconds > most:
        raise ValueError(f"duration must be at most {most:g} s here, got {seconds:g}.")


class Generate:
    """Takes of one prompt, which run in a batch. The first one's sound is told while it
    is made, where the order streams."""

    quick = False
    reads = True  # an audio prompt; False where `first_codes` stand in its place

    def __init__(self, takes: Takes, order: Order):
        self._takes, self.order = takes, order

    def jobs(self) -> list[Job]:
        """A job for each take. Raises ValueError."""
        order, planned = self.order, []
        first, step = order.values["seed"], order.values.get("best_of") or 1
        for i in range(order.takes):
            seed = first + i * step if isinstance(first, int) else first
            path = self._takes.free(order.values["prompt"], seed)
            job = make_job(order.values | dict(seed=seed, output=path))
            check_duration(job.options.duration, order.most)
            parts = {part.name: getattr(job, part.name) for part in fields(job)}
            planned.append(NamedJob(**parts, names=order.names))
        return planned

    def check(self) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried."""
        try:
            planned = self.jobs()
            for job in planned:
                job.check(reads=self.reads)
        except (OverflowError, TypeError) as error:  # of values of absurd types
            raise ValueError(str(error)) from error
        if self.order.stream == "wav":
            check_stream(planned[0], self.order.takes)
            refuse({"stream": True}, bool(self.order.values["magnet"]))

    def first_codes(self, model: "MusicGen") -> Start | None:
        """The codes that the takes go on from, if any. It is called before the jobs are
        planned, and may change the order."""
        return None

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Make them. Tells `start` of each, `progress`, `header` and `audio` where the
        order streams, `decoding`, and `take` of each that is written."""
        model = worker.use(self.order.model, ticket)
        if ticket.stops():
            return
        start = self.first_codes(model)
        wanted, sounds = timed(self.jobs(), model), Sounds(model)
        tell_decoder(ticket, wanted[0])
        for job in wanted:
            tell_start(ticket, model, job)
        self._make(worker, ticket, model, wanted, sounds, start)

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
        times = count_decodings(wanted, len(batches))
        decodings = Decodings(worker, ticket, times, batches[0].duration)
        for i, batch in enumerate(batches):
            share = Share(i / len(batches), 1 / len(batches), batch.duration)
            watched = Watched(batch, worker, ticket, share)
            if streams and i == 0:
                frames = prompt_frames(model, wanted[0], sounds, start)
                comment = header(model, wanted[0], sounds, start, frames)
                dropped = wanted[0].audio_prompt and wanted[0].audio_prompt.drop
                tell_sound(model, watched, ticket, comment, frames if dropped else 0)
            for _ in watched:  # what is left, which is all where nothing streams
                pass
            if ticket.heeded and start and watched.frames <= start.codes.shape[1]:
                break  # it is no longer than what it goes on from
            results += save_takes(batch, self._takes, ticket, decodings)
            if ticket.heeded:
                break
        raise_failure(results)


def timed(wanted: list[Job], model: "MusicGen") -> list[Job]:
    """The jobs with the model's own duration where none is given. Raises ValueError for
    what it cannot make."""
    wanted = [job.timed(model) for job in wanted]
    for job in wanted:
        if job.fault:
            raise ValueError(job.fault)
    return wanted


def check_stream(job: Job, takes: int) -> None:
    """Raise ValueError for a job that needs its whole take before any of it is heard."""
    ending = job.ending
    whole = dict(takes=takes > 1, best_of=job.best_of, loop=job.loop is not None)
    whole |= dict(loudness=job.loudness is not None, peak=job.peak is not None)
    whole |= dict(ending=ending.tail, fade_in=ending.fade_in)
    whole |= dict(fade_out=ending.fade_out not in (None, 0, FADE))
    whole |= dict(subtype=job.subtype not in (None, "PCM_16"))
    whole |= dict(drop_prompt=job.audio_prompt and job.audio_prompt.drop)
    whole |= dict(decoder=job.decoder)
    for name, given in whole.items():
        if given:
            raise ValueError(
                f"{name} needs the whole take: leave out stream, or take "
                '"events", which tells of the take at the end.'
            )


def tell_decoder(ticket: Ticket, job: Job) -> None:
    """Tell that the job's decoder is read, unless it is the codec's own: it may have to
    be downloaded, before the first step."""
    if job.decoder:
        ticket.tell("loading", model=job.decoder)


def tell_start(ticket: Ticket, model: "MusicGen", job: Job) -> None:
    """Tell what a take will be, and where its sound will be decoded by diffusion."""
    data = dict(id=job.output.stem, prompt=job.prompt, seed=job.seed)
    data |= dict(decoder=DIFFUSION) if job.decoder else {}
    data |= dict(sampling_rate=model.sampling_rate, channels=model.channels)
    ticket.tell("start", **data, seconds=job.options.duration)


class Share(NamedTuple):
    """Which share of all the work a batch is, by which its progress is told."""

    before: float  # share of the batches before it, from 0 to 1
    size: float  # its own
    seconds: float  # that stand for all the work


class Watched:
    """The steps of a batch, until its ticket stops: each is told as progress, and quick
    tasks are done after it. One loop may leave it and another go on. `take` is that of
    the first row."""

    def __init__(
        self, steps: Iterable["Take"], worker: Worker, ticket: Ticket, share: Share
    ):
        self.take: "Take | None" = None
        self._steps, self._worker, self._ticket = iter(steps), worker, ticket
        self._share, self._last, self._more = share, 0.0, False

    def __iter__(self) -> Iterator["Take"]:
        return self

    def __next__(self) -> "Take":
        if self._more and self._ticket.stops():
            raise StopIteration
        take = next(self._steps)
        self._more = take.step < take.total  # after the last one it is not asked
        if self.take is None or self.take.step < self.take.total:
            self.take = take  # another one, where memory did not hold the first
        self._tell(take.step / take.total)
        self._worker.do_quick()
        return take

    def _tell(self, done: float) -> None:
        (before, size, of), now = self._share, time.monotonic()
        if done == 1 or now - self._last >= OFTEN:
            self._last = now
            seconds = round((before + size * done) * of, 3)
            self._ticket.tell("progress", seconds=seconds, of=of)

    @property
    def frames(self) -> int:
        """How many frames of the first row are made."""
        return self.take.frames if self.take else 0

    @property
    def codes(self) -> mx.array:
        """Codes (1, T, K) of the first row."""
        return self.take.codes[:1]


class Decodings:
    """What goes through the steps of diffusion until its ticket stops: each is told as
    `decoding`, and quick tasks are done after it. It is called so many `times`, and
    `seconds` stand for all the work."""

    def __init__(self, worker: Worker, ticket: Ticket, times: int, seconds: float):
        self._worker, self._ticket = worker, ticket
        self._times, self._of = times, seconds
        self._done, self._last = 0, 0.0

    def __call__(self, steps: "Decoding") -> Iterator["Decoding"]:
        if self._ticket.stops():  # while the codes were made
            return
        for decoding in steps:
            self._tell(self._done + decoding.step / decoding.total)
            self._worker.do_quick()
            yield decoding
            if decoding.step < decoding.total and self._ticket.stops():
                return
        self._done += 1

    def _tell(self, done: float) -> None:
        now = time.monotonic()
        if done == self._times or now - self._last >= OFTEN:
            self._last = now
            seconds = round(done / self._times * self._of, 3)
            self._ticket.tell("decoding", seconds=seconds, of=self._of)


def count_decodings(wanted: list[Job], batches: int) -> int:
    """How many times there is something to decode: loops are decoded one by one."""
    if wanted[0].loop is None:
        return batches
    return sum(len(job.outputs()) for job in wanted)


class Pieces(io.BytesIO):
    """What was written since it was last taken."""

    def taken(self) -> bytes:
        data = self.getvalue()
        self.seek(0), self.truncate()
        return data


def prompt_frames(
    model: "MusicGen", job: Job, sounds: Sounds, start: Start | None
) -> int:
    """Frames of the job's take that are its audio prompt's."""
    audio = None if start else sounds.audio_prompt(job)
    return jobs.frames_of_prompt(model, audio, start)


def header(
    model: "MusicGen", job: Job, sounds: Sounds, start: Start | None, frames: int
) -> str:
    """The settings that a stream of the job has before its samples, which are not faded,
    and are the codec's."""
    job = replace(job, ending=Ending(), decoder=None)
    return settings.to_comment(jobs.take_settings(model, job, sounds, frames, start))


def tell_sound(
    model: "MusicGen", steps: Watched, ticket: Ticket, comment: str, dropped: int = 0
) -> None:
    """Tell the sound of the first row while the steps are made, without its first
    `dropped` frames: `header`, the beginning of a wav file, then `audio`, samples (N, C)
    of 16 bits, little endian."""
    pieces = Pieces()
    wav = WavStream(pieces, model.channels, model.sampling_rate, comment, rewinds=False)
    ticket.tell("header", data=pieces.taken())
    first = next(steps, None)
    if first is None:  # the batch tells why
        return
    skip = dropped * model.config.audio_encoder.hop_length
    chunk = model.frames_in(CHUNK)
    for piece in pieces_of(model, steps, chunk, chain([first], steps)):
        samples, skip = piece[skip:], max(skip - len(piece), 0)
        if len(samples):
            wav.write(samples)
            ticket.tell("audio", data=pieces.taken())


def save_takes(
    batch: Batch, takes: Takes, ticket: Ticket, watch: Watch
) -> list[Result]:
    """Write the takes of a batch, and tell of each. `watch` is a `Decoder`'s."""
    results = []
    takes.folder.mkdir(parents=True, exist_ok=True)  # it may have gone meanwhile
    for result in batch.save(beside=True, watch=watch):
        results.append(result)
        if not result.error:
            ticket.tell("take", **takes.of(result.job.output).as_json())
    return results


def raise_failure(results: Iterable[Result]) -> None:
    """Raise Refused for the first take that failed."""
    for result in results:
        if result.error:
            raise Refused(status_of(result.error), str(result.error))
