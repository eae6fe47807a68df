"""What the model makes of a take: it again, a longer one, a part of it again, or the
sound of its codes anew.

    take = takes.find("slow-bell-7")
    task = read_again(takes, take, Form({"temp": 0.8}), limits)
    task = read_extension(takes, take, Form({"seconds": 10}), limits)
    task = read_edit(takes, take, Form({"part": "8:12"}), limits)
    task = read_redecoding(takes, take, Form({"decoder": "diffusion"}), limits)
    task.check()  # raises ValueError for what cannot be made, before it is tried

Tasks for worker.py, as those of tasks.py. What is made is a new take; the old one stays.
Needs tasks.py, remake.py, edit.py, recall.py, sources.py, diffusion_job.py and what these
need beside it.
"""

import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jobs
import remake
import settings
from diffusion_job import DIFFUSION, Decoder, make_decoder
from edit import CANDIDATES, MOST_CANDIDATES, Edit, split
from endings import FADE
from forms import Form
from hub import same_model
from job import DIFFER
from jobs import Sounds, Start
from magnet_job import refuse
from recall import KEPT as BESIDE_CODES
from recall import NEW_IN_EDIT, OF_MODEL, staying
from sources import read_start
from takes import Take, Takes
from tasks import (
    FILES,
    Decodings,
    Generate,
    Limits,
    Order,
    Share,
    Watched,
    make_order,
    read_given,
    read_model,
    tell_decoder,
    timed,
)
from worker import Refused, Ticket, Worker

if TYPE_CHECKING:
    from musicgen import MusicGen

KEPT = 3  # of the candidates
MOST_PARTS = 16


def read_again(
    takes: Takes, take: Take, form: Form, limits: Limits
) -> "Generate | Remake":
    """A take with the settings of another, but for what the form gives. Where no seed is
    given it is any. Raises as `read_order`, and Refused (409) for a take that follows a
    file which the form does not have."""
    if "regenerated" in take.settings:
        return read_again_edited(takes, take, form, limits)
    order = read_like(take, form, limits, read_given(form))
    if form.fields.get("seed") is None:
        order.values["seed"] = secrets.randbits(31)
    return Generate(takes, order)


def read_like(
    take: Take,
    form: Form,
    limits: Limits,
    given: dict[str, Any],
    edited: Path | None = None,
    keeps: Iterable[str] = (),
) -> Order:
    """An order with the settings that are `given`, and with those of a take that hold
    beside them (see `recall.staying`): all but what an edit makes anew, where the file
    `edited` is edited. Raises Refused (409) for a file that the take followed and the
    form lacks, but for the settings that `keeps` names."""
    old = str(take.settings.get("model", limits.model))
    model = read_model(given, old, limits)
    check_adapter(take, limits)
    same = {key for key in form.files if form.names.get(key) == name_of(take, key)}
    changes = {*given, *form.files} - same
    if given.get("stream") not in (True, "wav"):  # where the whole take is made first
        changes -= {"stream"}
    record = staying(take.settings, changes, None if model == old else model, edited)
    for key in FILES:
        if record.get(key) and key not in form.files and key not in keeps:
            raise Refused(
                409,
                f"{take.id} follows {record[key]!s:.80}, which is not kept: send the file "
                f"along, as {key}.",
            )
    if record.get("decoder"):
        if "decoder" not in given:
            check_decoder(take, limits)
        record["decoder"] = DIFFUSION  # as a request names it
    defaults = {
        key: value
        for key, value in record.items()
        if value is not None and key not in OF_MODEL
    }
    return make_order(form, defaults | given, model, limits)


def name_of(take: Take, key: str) -> str:
    """The name of the file that a take followed, or began with."""
    return Path(str(take.settings.get(key))).name


def check_adapter(take: Take, limits: Limits) -> None:
    """Raise Refused for a take that was made with an adapter that is not served."""
    adapter = take.settings.get("adapter")
    if adapter and adapter != limits.adapter:
        raise Refused(
            409,
            f"{take.id} was made with the adapter {adapter!s:.80}: start the server with "
            "--adapter to go on with it.",
        )


def check_decoder(take: Take, limits: Limits) -> None:
    """Raise Refused for a take whose sound was made by a decoder that is not served."""
    decoder = take.settings["decoder"]
    if make_decoder(decoder) != make_decoder(limits.decoder):
        raise Refused(
            409,
            f"{take.id} was decoded by {decoder!s:.80}: start the server with --decoder "
            "to go on with it, or give a decoder.",
        )


class Extend(Generate):
    """A take that goes on from another's codes."""

    reads = False

    def __init__(self, takes: Takes, order: Order, take: Take, seconds: float):
        super().__init__(takes, order)
        self._take, self._seconds = take, seconds

    def check(self) -> None:
        if self.order.values["magnet"]:
            refuse({"resume": True}, magnet=True)
        super().check()

    def first_codes(self, model: "MusicGen") -> Start:
        codes, _ = settings.load_codes(self._take.codes)
        duration = codes.shape[1] / model.frame_rate + self._seconds
        self.order.values["duration"] = duration
        return read_start(self._take.codes, model, duration)


def read_extension(takes: Takes, take: Take, form: Form, limits: Limits) -> Extend:
    """A take that is longer by the form's `seconds`. Raises as `read_again`, and Refused
    (409) for a loop, and for a take without codes."""
    given = read_given(form, ["seconds"])
    more = read_seconds("seconds", given.pop("seconds", None))
    if "duration" in given or given.get("takes", 1) != 1:
        raise ValueError(
            "A take goes on once, by seconds: leave out duration and takes."
        )
    if take.settings.get("loop"):
        raise Refused(
            409,
            f"{take.id} is a loop, whose end goes on to its beginning: make one of more "
            "bars, with again.",
        )
    if not take.codes:
        raise Refused(409, f"{take.id} has no codes beside it, to go on from.")
    order = read_like(take, form, limits, given, keeps=["audio_prompt"])
    order.values["duration"] = take.seconds + more
    order.values.setdefault("seed", secrets.randbits(31))
    return Extend(takes, order, take, more)


def read_seconds(name: str, value: Any) -> float:
    """A number above 0, else ValueError."""
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError(
            f"{name} must be a number of seconds above 0, got {value!r:.40}."
        )
    return value


class Redecode(Generate):
    """The sound of a take's codes made anew."""

    reads = False

    def __init__(self, takes: Takes, order: Order, take: Take):
        super().__init__(takes, order)
        self._take = take

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Make it. Tells `decoding` of diffusion, and `take`. Nothing is written where it
        is stopped."""
        model = worker.use(self.order.model, ticket)
        if ticket.stops():
            return
        start = read_start(self._take.codes, model)
        (job,), sounds = timed(self.jobs(), model), Sounds(model)
        tell_decoder(ticket, job)
        seconds = start.codes.shape[1] / model.frame_rate
        decodings = Decodings(worker, ticket, 1, seconds)
        decoder = Decoder(model, job.decoder, decodings)
        samples, record = jobs.redecode(model, job, sounds, start, decoder)
        if ticket.heeded:
            return
        path = jobs.save(model, job, samples, record).output
        beside = path.with_suffix(".safetensors")
        settings.save_codes(beside, start.codes, record, overwrite=False)
        ticket.tell("take", **self._takes.of(path).as_json())


def read_redecoding(takes: Takes, take: Take, form: Form, limits: Limits) -> Redecode:
    """A take's codes, decoded anew, with the decoder, the level and the fades of the form.
    Raises as `read_again`, and Refused (409) for a take without codes."""
    given = read_given(form)
    if lone := {*given, *form.files} - BESIDE_CODES - {"stream"}:
        raise ValueError(f"The codes are taken as they are: leave out {min(lone)}.")
    if not take.codes:
        raise Refused(409, f"{take.id} has no codes beside it, to be decoded.")
    given["stream"] = read_stream(given)
    order = read_like(take, form, limits, given, keeps=FILES)
    order.values.setdefault("seed", secrets.randbits(31))
    return Redecode(takes, order, take)


class Remake(Generate):
    """Parts of a take made again: the best of several candidates, or by a MAGNeT filled
    in from both sides."""

    def __init__(self, takes: Takes, order: Order, edit: Edit, candidates: int):
        super().__init__(takes, order)
        self._edit, self._candidates = edit, candidates

    def check(self) -> None:
        super().check()
        if self.order.values["magnet"]:
            return
        self._edit.part  # raises ValueError for several, which only a MAGNeT fills in
        if self._candidates > 1 and self.jobs()[0].certain:
            raise ValueError(f"candidates must differ: {DIFFER}, or give candidates 1.")

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Make them. Tells `progress`, and `take` of each that is kept, the best first."""
        model = worker.use(self.order.model, ticket)
        wanted, sounds = timed(self.jobs(), model), Sounds(model)
        how = remake.How(self._edit, self._candidates)
        edit = remake.start(model, wanted, sounds, how)
        seconds = edit.seconds or wanted[0].options.duration
        for _ in Watched(edit, worker, ticket, Share(0.0, 1.0, seconds)):
            pass
        if ticket.heeded:
            return
        edit.finish()
        for edited in edit.results():
            path = self._takes.free(edited.job.prompt, edited.job.seed)
            edited = edited._replace(job=replace(edited.job, output=path))
            job, _, codes, record = remake.write(model, edited)
            path = job.output.with_suffix(".safetensors")
            settings.save_codes(path, codes, record, overwrite=False)
            ticket.tell("take", **self._takes.of(job.output).as_json())


def read_edit(takes: Takes, take: Take, form: Form, limits: Limits) -> Remake:
    """A take of which the `part`, or several `parts`, are made again: of `candidates` the
    best `takes`. Raises as `read_again`."""
    given = read_given(form, ["part", "parts", "candidates"])
    parts = read_parts(given.pop("part", None), given.pop("parts", None))
    count = given.pop("candidates", None)
    if "decoder" in given:
        raise ValueError("An edit goes without decoder: redecode what is made of it.")
    if lone := given.keys() & (NEW_IN_EDIT - {"seed"}):
        raise ValueError(f"An edit keeps the take's {min(lone)}: leave it out.")
    model = read_model(
        dict(given), str(take.settings.get("model", limits.model)), limits
    )
    path = source(take, model)
    stream = {"stream": read_stream(given)}
    order = read_like(take, form, limits, given | stream, edited=path)
    if path.suffix != ".safetensors" and order.values["fade_out"] == FADE:
        order.values["fade_out"] = None  # it is in the sound
    if order.values["magnet"] and count is not None:
        refuse({"candidates": count}, magnet=True)
    count = read_count(CANDIDATES if count is None else count)
    kept = order.takes if "takes" in given else min(KEPT, count)
    if kept > count and not order.values["magnet"]:
        raise ValueError(f"takes must be at most the {count} candidates, got {kept}.")
    order.values.setdefault("seed", secrets.randbits(31))
    return Remake(takes, order._replace(takes=kept), Edit(parts, path), count)


def read_stream(given: dict[str, Any]) -> Any:
    """The stream of what cannot be a wav, since nothing is heard before the end, else
    ValueError."""
    stream = given.get("stream", False)
    if stream in (True, "wav"):
        raise ValueError('stream must be "events", since it is heard at the end.')
    return stream


def read_count(count: Any) -> int:
    """How many candidates, else ValueError."""
    if type(count) is not int or not 1 <= count <= MOST_CANDIDATES:
        raise ValueError(
            f"candidates must be from 1 to {MOST_CANDIDATES}, got {count!r:.40}."
        )
    return count


def read_parts(part: Any, parts: Any) -> tuple[tuple[float, float], ...]:
    """Parts, each as "8:12" or [8, 12], else ValueError."""
    if part is not None and parts is not None:
        raise ValueError("part and parts must not be given together.")
    given = [part] if parts is None else parts
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_PARTS:
        raise ValueError(f"parts must be a list of up to {MOST_PARTS} parts.")
    return tuple(read_part(one) for one in given)


def read_part(part: Any) -> tuple[float, float]:
    """First second and end of "8:12" or [8, 12], else ValueError."""
    if isinstance(part, str) and len(part) < 40 and (found := split([part])[0]):
        return found[0]
    pair = isinstance(part, list) and len(part) == 2
    if pair and all(type(x) in (int, float) and 0 <= x < 1e6 for x in part):
        return (part[0], part[1])
    raise ValueError(
        f'part must be such as "8:12" or [8, 12] for the seconds 8 to 12, got {part!r:.40}.'
    )


def source(take: Take, model: str) -> Path:
    """The file of a take to edit: its codes, or its sound where there are none, or these
    are another model's, or hold more than is heard."""
    same = same_model(str(take.settings.get("model")), model)
    return take.codes if take.codes and same and not cut(take) else take.path


def cut(take: Take) -> bool:
    """Whether the sound of a take is less than its codes."""
    return any(take.settings.get(name) for name in ("ending", "drop_prompt"))


def read_again_edited(takes: Takes, take: Take, form: Form, limits: Limits) -> Remake:
    """The edit that made a take, once more: the same parts of the same take, with any
    seed. Raises as `read_again`, and Refused (409) where that take is gone."""
    file = Path(str(take.settings["regenerated"]))
    for origin in takes.every():
        if file.name in (origin.path.name, origin.path.stem + file.suffix):
            break
    else:
        raise Refused(409, f"{take.id} was made of {file.name:.80}, which is gone.")
    fields = dict(parts=str(take.settings.get("part", "")).split(), takes=1)
    for key in ("prompt", "negative_prompt", "temp", "top_k", "top_p", "guidance_coef"):
        if take.settings.get(key) is not None:
            fields[key] = take.settings[key]
    return read_edit(takes, origin, replace(form, fields=fields | form.fields), limits)
