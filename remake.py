"""Parts of a take made again, or filled in, as --regenerate and --fill ask for it.

    edit = start(model, jobs, sounds, how)  # PartAgain; of a MAGNeT PartsFilled
    for _ in edit:  # a take after each step
        pass
    print(edit.finish())
    for edited in edit.results():
        job, audio, codes, record = write(model, edited)

A MusicGen makes several candidates, of which the best are written, a MAGNeT as many as
there are jobs. Needs edit.py, sources.py, recall.py, job.py, jobs.py, regenerate.py and
what these need beside it; fill.py for a MAGNeT.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

import jobs
from edit import Edit, seeds
from job import Job
from jobs import Sounds
from musicgen import MusicGen
from recall import read_record
from regenerate import Candidates, check_part, join
from sources import read_take

if TYPE_CHECKING:
    from fill import Filling


class How(NamedTuple):
    """What is made again, and how: as the flags of generate.py say it."""

    edit: Edit
    candidates: int | None = None  # that a MusicGen makes
    batch_size: int | None = None  # of them at once; None: as memory allows
    seed_is_given: bool = True
    named: bool = True  # whether files are called as the jobs say, not by their seeds


class Edited(NamedTuple):
    """A take of which parts were made again."""

    job: Job
    audio: mx.array  # (N, C)
    codes: mx.array  # (1, T, K)
    record: dict[str, Any]  # its settings


def start(
    model: MusicGen, wanted: list[Job], sounds: Sounds, how: How
) -> "PartAgain | PartsFilled":
    """Read the take that is edited, and plan what is made. Raises ValueError or OSError
    for what cannot be."""
    kind = PartsFilled if wanted[0].magnet else PartAgain
    return kind(model, wanted, sounds, how)


class Remake:
    """What both ways have in common: the take that is edited, and the jobs for it."""

    def __init__(self, model: MusicGen, wanted: list[Job], sounds: Sounds, how: How):
        self._model, self._sounds, self._how = model, sounds, how
        self._codes, self._old = read_take(how.edit, model)
        self._wanted = lasting(wanted, self._codes.shape[1] / model.frame_rate)
        self._steps = self.plan()

    def __iter__(self) -> Iterator:
        return iter(self._steps)

    def options(self) -> dict[str, Any]:
        """Options of the takes, with the sounds that they follow."""
        options = jobs.options_of(self._wanted[:1], self._sounds)
        return options | dict(batch_size=self._how.batch_size)

    def settings(self, job: Job, **ranked) -> dict[str, Any]:
        """What is told of a take in its file."""
        edit = self._how.edit
        told = dict(regenerated=str(edit.path), part=edit.name) | ranked
        return told | jobs.take_settings(self._model, job, self._sounds)


class PartAgain(Remake):
    """A part made again, several times, of which the best ones are kept."""

    doing, then = "generating", "ranking"

    def plan(self) -> Candidates:
        how, model, codes = self._how, self._model, self._codes
        edit, count, first = how.edit, how.candidates, self._wanted[0]
        self._frames = check_part(model, edit.part, codes.shape[1], edit.path)
        self.seconds = self._frames[1] / model.frame_rate  # that are made, at most
        seed = first.seed
        if count > 1 or not how.seed_is_given:
            seed = seeds(seed, count, read_record(edit.path, edits=True).get("seed"))
        options = self.options() | dict(seed=seed)
        return Candidates(model, codes, first.text, edit.part, count, **options)

    def finish(self) -> str:
        """Rank the candidates; a line that tells their scores."""
        self._made = self._steps.ranked()
        return self._made.describe()

    def results(self) -> Iterator[Edited]:
        """The best, one for each job."""
        made, how = self._made, self._how
        best = made.codes[: len(self._wanted)]
        new, hop = self._model.decode(best), hop_length(self._model)
        audio = join(self._old, new, self._frames, hop)
        for i, job in enumerate(self._wanted):
            job = jobs.chosen(job, made.seeds[i], how.named)
            ranked = dict(score=made.scores[i], scores=made.scores)
            told = self.settings(job, candidates=how.candidates, **ranked)
            yield Edited(job, audio[i], best[i : i + 1], told)


class PartsFilled(Remake):
    """Parts filled in by a MAGNeT, once for each job."""

    doing, then = "filling", "filling: decoding"
    seconds = 0.0  # for passes are counted

    def plan(self) -> "Filling":
        from fill import Filling

        options = self.options() | dict(takes=len(self._wanted))
        options |= dict(seed=[job.seed for job in self._wanted])
        edit, text = self._how.edit, self._wanted[0].text
        return Filling(
            self._model, self._codes, text, edit.parts, take=edit.path, **options
        )

    def finish(self) -> None:
        """Nothing is ranked."""

    def results(self) -> Iterator[Edited]:
        """All of them."""
        from fill import join_parts

        made, hop = self._steps, hop_length(self._model)
        audio = join_parts(self._old, self._model.decode(made.codes), made.frames, hop)
        for i, job in enumerate(self._wanted):
            yield Edited(job, audio[i], made.codes[i : i + 1], self.settings(job))


def write(model: MusicGen, edited: Edited) -> Edited:
    """Write the sound, with its fades and at its level. Returns the same, with the job
    under another name where somebody else wrote its file meanwhile. Raises OSError."""
    job, audio, _, record = edited
    sound = job.ending.apply(np.array(audio), model.sampling_rate, 0)
    return edited._replace(job=jobs.save(model, job, sound, record))


def hop_length(model: MusicGen) -> int:
    """Samples of a frame."""
    return model.config.audio_encoder.hop_length


def lasting(wanted: list[Job], seconds: float) -> list[Job]:
    """The same jobs, as long as the take that is edited."""
    options = replace(wanted[0].options, duration=seconds)
    return [replace(job, options=options) for job in wanted]
