"""A part of a take made again, from what stands before it, and ranked by what comes after.

    made = regenerate(model, codes, "happy rock", part=(8.0, 12.0), candidates=8)
    made.codes, made.scores  # (N, T, K), best first: all but the part is as it was
    audio = join(old, model.decode(made.codes), made.frames, hop)  # (N, n, C)

The candidates are rows of one batch that begins with the frames before the part, as if
the take had been stopped there. Each is ranked by how likely the frames after the part,
which stay, are after it. Where nothing comes after, they are ranked by how well they
follow the text. Needs ranking.py, musicgen.py, decoder.py, t5.py, encodec.py, options.py,
checkpoints.py, prompt.py, audio.py, resample.py and outputs.py beside it, and what these
need for models and texts of other kinds.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import mlx.core as mx

from musicgen import MusicGen, Take
from options import Options, check_batch_size, is_number, is_whole, row_seeds
from prompt import check_codes
from ranking import check_autoregressive, log_likelihood, order, text_scores

REACH = 3.75  # frames around its own on which a sample of the 32 kHz codec depends
FOLLOW = 5.0  # seconds after the part that rank the candidates
MOST = 64  # candidates
AFTER = "what comes after the part"
BY_TEXT = "how they follow the text, since nothing comes after the part"
ALONE = "how likely they are, since nothing comes after the part"


class Regenerated(NamedTuple):
    """Candidates, the best first."""

    codes: mx.array  # (N, T, K), whole takes
    scores: list[float]  # log-likelihoods a code, in nats
    seeds: list[int]
    frames: tuple[int, int]  # the part: its first frame and its end
    ranked_by: str

    def describe(self) -> str:
        """The scores in a line."""
        several = f"; the others {', '.join(f'{x:.3f}' for x in self.scores[1:])}"
        return (
            f"{len(self.scores)} candidates, ranked by {self.ranked_by}: the best has "
            f"{self.scores[0]:.3f} a code{several if self.scores[1:] else ''}"
        )


def regenerate(
    model: MusicGen, codes: mx.array, prompt: str, part: tuple[float, float], **options
) -> Regenerated:
    """Make a part of codes (1, T, K) again; options as of `Candidates`."""
    candidates = Candidates(model, codes, prompt, part, **options)
    for _ in candidates:
        pass
    return candidates.ranked()


class Candidates:
    """Takes in which a part is made again: iterate to make them, a decoder step at a
    time, then ask which are best.

    Args:
        codes: of the take, (1, T, K).
        prompt: its text, or another, or `sections.Sections`.
        part: its first second and its end.
        candidates: how many, 1 to 64.
        seed: of the first; counted up, or a list. None: any.
        follow: seconds after the part that rank the candidates.
        batch_size: rows to run at once; None: as many as memory holds.
        options: as of `MusicGen.steps`, but for what the take begins with and its
            duration, which stays.

    Raises ValueError for what cannot be made.
    """

    def __init__(
        self,
        model: MusicGen,
        codes: mx.array,
        prompt: str,
        part: tuple[float, float],
        candidates: int = 8,
        seed: int | list[int] | None = None,
        follow: float = FOLLOW,
        batch_size: int | None = None,
        **options,
    ):
        check_autoregressive(model)
        check_codes(model, codes)
        if len(codes) != 1:
            raise ValueError(f"codes must be of one take, got {len(codes)}.")
        if not (is_number(follow) and model.frames_in(follow) >= 1):
            raise ValueError(f"follow must be a frame or more, got {follow!r:.40} s.")
        check_candidates(candidates)
        check_batch_size(batch_size)
        self.frames = check_part(model, part, codes.shape[1])
        self.seeds = row_seeds(seed, candidates)
        self._model, self._codes, self._prompt = model, codes, prompt
        self._after, self._options = model.frames_in(follow), options
        options["duration"] = codes.shape[1] / model.frame_rate
        names = {field.name for field in fields(Options)} & options.keys()
        given = Options(**{name: options[name] for name in names})
        size = batch_size or model.rows_that_fit(given)
        self._takes = [
            self._take(self.seeds[first : first + size])
            for first in range(0, candidates, size)
        ]
        self._made: list[mx.array] = []

    def _take(self, seeds: list[int]) -> Take:
        """Candidates, which go on to the end of the whole take where they are let."""
        before = self._codes[:, : self.frames[0]]
        rows = dict(batch_size=len(seeds), codes_prompt=before, seed=seeds)
        return self._model.steps([self._prompt] * len(seeds), **rows, **self._options)

    def __iter__(self) -> Iterator[Take]:
        """Yields the take at hand after each step. It is left where the part ends, so
        that no end is heard in it."""
        self._made, end = [], self.frames[1]
        for take in self._takes:
            for _ in take:
                yield take
                if take.frames >= end:
                    break
            mx.eval(made := take.codes[:, :end])
            self._made.append(made)

    def ranked(self) -> Regenerated:
        """The candidates, once all are made."""
        made = mx.concatenate(self._made)
        (_, end), (N, _, K) = self.frames, made.shape
        rest = mx.broadcast_to(self._codes[:, end:], (N, self._codes.shape[1] - end, K))
        whole = mx.concatenate([made, rest.astype(made.dtype)], axis=1)
        options = self._options | dict(seed=self.seeds)
        scores, ranked_by = score(
            self._model, self._prompt, whole, self.frames, self._after, **options
        )
        best = order(scores)
        return Regenerated(
            whole[mx.array(best)],
            [scores[i].item() for i in best],
            [self.seeds[i] for i in best],
            self.frames,
            ranked_by,
        )


def score(
    model: MusicGen,
    prompt: str,
    codes: mx.array,
    frames: tuple[int, int],
    after: int,
    **options,
) -> tuple[mx.array, str]:
    """Scores (N,) of codes (N, T, K) in which the part `frames` was made again, and what
    they are of: up to `after` frames after it, or the text where the part ends the take.
    """
    first, end = frames
    last = min(end + after, codes.shape[1])
    if end == last and model.config.text_encoder is None:
        return log_likelihood(model, prompt, codes, first, **options), ALONE
    if end == last:
        return text_scores(model, prompt, codes, first, **options), BY_TEXT
    scores = log_likelihood(model, prompt, codes, end, last, **options)
    return scores, AFTER


def check_part(
    model: MusicGen, part: tuple[float, float], frames: int, take: object = "The take"
) -> tuple[int, int]:
    """First frame and end of a part in seconds, of a `take` of so many frames.

    Raises ValueError for one that is empty, reaches the take's beginning, or is outside
    of the take. Its end may be at the end of the take's last frame.
    """
    first, end = frames_of(model, part, frames, take)
    if first == 0:
        raise ValueError(
            f"The part {part[0]:g}:{part[1]:g} reaches the take's beginning, so that "
            "nothing stands before it: begin later, or make a new take with --again and "
            "another --seed."
        )
    return first, end


def frames_of(
    model: MusicGen, part: tuple[float, float], frames: int, take: object = "The take"
) -> tuple[int, int]:
    """The same of a part that may begin with the take."""
    pair = isinstance(part, list | tuple) and len(part) == 2
    if not (pair and all(map(is_number, part))):
        raise ValueError(f"The part must be two numbers of seconds, got {part!r:.80}.")
    (first, end), rate = map(model.frames_in, part), model.frame_rate
    name, length = f"{part[0]:g}:{part[1]:g}", f"{frames / rate:g} s"
    if first >= end:
        raise ValueError(
            f"The part {name} is empty: it must have a frame, {1 / rate:g} s, or more."
        )
    if first < 0 or end > frames:
        raise ValueError(
            f"{take!s:.150} is {length} long; the part {name} is not in it."
        )
    return first, end


def check_candidates(count: int) -> None:
    """Raise ValueError unless there can be so many."""
    if not (is_whole(count) and 1 <= count <= MOST):
        raise ValueError(f"candidates must be from 1 to {MOST}, got {count!r:.40}.")


def join(
    old: mx.array, new: mx.array, frames: tuple[int, int], hop_length: int
) -> mx.array:
    """Sounds (N, n, C) that are old (n, C) but for a part, which is of new (N, m, C).

    `old` is the take before, decoded, or the sound that it was encoded from; `new` are
    the candidates, decoded. REACH frames before the part and after it, where the two are
    nearest to each other, they fade into each other within a frame; farther off, samples
    are those of `old`, bit for bit. A plain decode would not keep these: the codec's LSTM
    remembers what was for longer than that.
    """
    (first, end), count = frames, len(old)
    new = new[:, :count]
    place = mx.arange(count) / hop_length  # in frames
    rises = place - (first - REACH)
    falls = end + REACH - place
    falls = mx.where(end * hop_length >= count, 1, falls)  # nothing comes after
    weight = mx.clip(mx.minimum(rises, falls), 0, 1)[:, None]
    return mx.where(weight == 1, new, old + (new - old) * weight)
