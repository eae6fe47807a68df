"""Parts of a take made again, or filled in, as --regenerate and --fill ask for it.

    edit = start(model, jobs, sounds, args)  # PartAgain; of a MAGNeT PartsFilled
    for _ in edit:  # a take after each step
        pass
    print(edit.finish())
    for job, audio, codes, record in edit.results():
        ...

A MusicGen makes several candidates, of which the best are written, a MAGNeT as many as
there are jobs. Needs edit.py, sources.py, recall.py, job.py, jobs.py, regenerate.py and
what these need beside it; fill.py for a MAGNeT.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

import jobs
from edit import seeds
from job import Job
from jobs import Sounds
from musicgen import MusicGen
from recall import read_record
from regenerate import Candidates, check_part, join
from sources import read_take


class Edited(NamedTuple):
    """A take of which parts were made again."""

    job: Job
    audio: mx.array  # (N, C)
    codes: mx.array  # (1, T, K)
    record: dict[str, Any]  # its settings


def start(
    model: MusicGen, wanted: list[Job], sounds: Sounds, args: argparse.Namespace
) -> "PartAgain | PartsFilled":
    """Read the take that `args` name, and plan what is made. Raises ValueError or OSError
    for what cannot be."""
    kind = PartsFilled if wanted[0].magnet else PartAgain
    return kind(model, wanted, sounds, args)


class PartAgain:
    """A part made again, several times, of which the best ones are kept."""

    doing, then = "generating", "ranking"

    def __init__(
        self,
        model: MusicGen,
        wanted: list[Job],
        sounds: Sounds,
        args: argparse.Namespace,
    ):
        self._model, self._sounds, self._args = model, sounds, args
        edit, count = args.regenerate, args.candidates
        codes, self._old = read_take(edit, model)
        self._frames = check_part(model, edit.part, codes.shape[1], edit.path)
        self.seconds = self._frames[1] / model.frame_rate  # that are made, at most
        self._wanted = lasting(wanted, codes.shape[1] / model.frame_rate)
        seed = wanted[0].seed
        if count > 1 or not args.seed_is_given:
            seed = seeds(seed, count, read_record(edit.path, args).get("seed"))
        how = dict(seed=seed, batch_size=args.batch_size)
        how |= jobs.options_of(self._wanted[:1], sounds)
        text = self._wanted[0].text
        self._candidates = Candidates(model, codes, text, edit.part, count, **how)

    def __iter__(self) -> Iterator:
        return iter(self._candidates)

    def finish(self) -> str:
        """Rank the candidates; a line that tells their scores."""
        self._made = self._candidates.ranked()
        return self._made.describe()

    def results(self) -> Iterator[Edited]:
        """The best, one for each job."""
        made, args = self._made, self._args
        best = made.codes[: len(self._wanted)]
        new, hop = self._model.decode(best), hop_length(self._model)
        audio = join(self._old, new, self._frames, hop)
        for i, job in enumerate(self._wanted):
            told = dict(candidates=args.candidates, score=made.scores[i])
            told |= dict(scores=made.scores)
            job = jobs.chosen(job, made.seeds[i], named=args.output is not None)
            told |= jobs.take_settings(self._model, job, self._sounds)
            yield Edited(job, audio[i], best[i : i + 1], where(args) | told)


class PartsFilled:
    """Parts filled in by a MAGNeT, once for each job."""

    doing, then = "filling", "filling: decoding"
    seconds = 0.0  # for passes are counted

    def __init__(
        self,
        model: MusicGen,
        wanted: list[Job],
        sounds: Sounds,
        args: argparse.Namespace,
    ):
        from fill import Filling, frames_of_parts

        self._model, self._sounds, self._args = model, sounds, args
        edit = args.regenerate
        codes, self._old = read_take(edit, model)
        self._frames = frames_of_parts(model, edit.parts, codes.shape[1], edit.path)
        self._wanted = lasting(wanted, codes.shape[1] / model.frame_rate)
        how = jobs.options_of(self._wanted[:1], sounds)
        how |= dict(takes=len(wanted), seed=[job.seed for job in wanted])
        how |= dict(batch_size=args.batch_size)
        self._filling = Filling(model, codes, wanted[0].text, edit.parts, **how)

    def __iter__(self) -> Iterator:
        return iter(self._filling)

    def finish(self) -> None:
        """Nothing is ranked."""

    def results(self) -> Iterator[Edited]:
        """All of them."""
        from fill import join_parts

        codes, hop = self._filling.codes, hop_length(self._model)
        audio = join_parts(self._old, self._model.decode(codes), self._frames, hop)
        for i, job in enumerate(self._wanted):
            told = jobs.take_settings(self._model, job, self._sounds)
            yield Edited(job, audio[i], codes[i : i + 1], where(self._args) | told)


def hop_length(model: MusicGen) -> int:
    """Samples of a frame."""
    return model.config.audio_encoder.hop_length


def where(args: argparse.Namespace) -> dict[str, str]:
    """What was edited, for a file's settings."""
    return dict(regenerated=str(args.regenerate.path), part=args.regenerate.name)


def lasting(wanted: list[Job], seconds: float) -> list[Job]:
    """The same jobs, as long as the take that is edited."""
    options = replace(wanted[0].options, duration=seconds)
    return [replace(job, options=options) for job in wanted]
