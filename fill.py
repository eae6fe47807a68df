"""Parts of a take filled in with what fits what comes before them, and after.

    codes = fill(model, codes, "happy rock", parts=[(2.0, 4.0), (8.0, 12.0)], seed=0)
    audio = join_parts(old, model.decode(codes), frames, hop)  # (N, n, C)

Only a MAGNeT can: it masks the frames of the parts in every codebook, and nothing else.
All other codes (1, T, K) stay as they are. A take that is longer than the model's own is
filled in windows of that length around its parts, one after the other. Of a MusicGen
regenerate.py makes a part again, from what comes before it. Needs magnet.py,
regenerate.py, ranking.py, musicgen.py, decoder.py, t5.py, encodec.py, options.py,
checkpoints.py, prompt.py, audio.py, resample.py and outputs.py beside it, and what these
need for models of other kinds.
"""

from collections.abc import Iterator

import mlx.core as mx

from magnet import MAGNeT, MagnetTake
from options import check_batch_size, is_whole, row_seeds
from prompt import check_codes
from regenerate import frames_of, join

Frames = list[tuple[int, int]]  # of parts: first frame, end
BESIDE = 0.1  # of a window: what it hears on both sides of its parts, together 1/5


def fill(
    model: MAGNeT,
    codes: mx.array,
    prompt: str,
    parts: list[tuple[float, float]],
    **options,
) -> mx.array:
    """Codes (N, T, K) whose parts are filled in; options as of `Filling`."""
    filling = Filling(model, codes, prompt, parts, **options)
    for _ in filling:
        pass
    return filling.codes


class Filling:
    """Takes in which parts are filled in: iterate to make them, a pass at a time.

    Args:
        codes: of the take, (1, T, K).
        prompt: its text, or another.
        parts: of each its first second and its end.
        takes: how many.
        seed: of the first; counted up, or a list. None: any.
        batch_size: rows to run at once; None: as many as memory holds.
        take: what messages call it, such as its file.
        options: as of `MAGNeT.steps`, such as temp and decoding_steps; but the take
            keeps its length.

    Raises ValueError for what cannot be made.
    """

    def __init__(
        self,
        model: MAGNeT,
        codes: mx.array,
        prompt: str,
        parts: list[tuple[float, float]],
        takes: int = 1,
        seed: int | list[int] | None = None,
        batch_size: int | None = None,
        take: object = "The take",
        **options,
    ):
        if model.config.masking is None:
            raise ValueError(
                "Only a MAGNeT fills in parts: for others see regenerate.py."
            )
        check_codes(model, codes)
        if len(codes) != 1:
            raise ValueError(f"codes must be of one take, got {len(codes)}.")
        if not (is_whole(takes) and takes > 0):
            raise ValueError(f"takes must be 1 or more, got {takes!r:.40}.")
        check_batch_size(batch_size)
        self.seeds = row_seeds(seed, takes)
        self.frames = frames_of_parts(model, parts, codes.shape[1], take)
        self._windows = windows(self.frames, codes.shape[1], model.longest_window)
        self._model, self._codes, self._prompt = model, codes, prompt
        self._options = options | dict(batch_size=batch_size)
        self._groups = [self.seeds]
        if len(self._windows) > 1:  # each take hears what it has filled in
            self._groups = [[seed] for seed in self.seeds]
        first = self._steps(codes, *self._windows[0], self._groups[0])
        turns = len(self._windows) * len(self._groups)
        self.step, self.total = 0, first.total * turns  # passes made, and in all
        self.codes = codes[:0]  # (N, T, K) of the takes that are whole

    def _steps(
        self, codes: mx.array, start: int, end: int, inside: Frames, seeds: list[int]
    ) -> MagnetTake:
        """Takes of a window, whose parts inside are filled in."""
        own = dict(codes_prompt=codes[:, start:end], seed=seeds)
        own["free"] = free_frames(
            end - start, [(a - start, b - start) for a, b in inside]
        )
        return self._model.steps([self._prompt] * len(seeds), **own, **self._options)

    def __iter__(self) -> Iterator["Filling"]:
        """Yields itself after each pass."""
        self.step, self.codes = 0, self._codes[:0]
        for seeds in self._groups:
            whole = self._codes
            for start, end, inside in self._windows:
                take = self._steps(whole, start, end, inside, seeds)
                for _ in take:
                    self.step += 1
                    yield self
                whole = put_in(whole, take.codes, start)
            self.codes = mx.concatenate([self.codes, whole])


def put_in(codes: mx.array, new: mx.array, start: int) -> mx.array:
    """Codes (1, T, K) with new ones (N, t, K) from a frame on: (N, T, K)."""
    (N, t, _), rest = new.shape, codes.shape[2:]
    before = mx.broadcast_to(codes[:, :start], (N, start, *rest))
    after = codes[:, start + t :]
    after = mx.broadcast_to(after, (N, after.shape[1], *rest))
    return mx.concatenate([before, new.astype(codes.dtype), after], axis=1)


def free_frames(count: int, frames: Frames) -> mx.array:
    """Booleans (T,), true in parts."""
    place = mx.arange(count)
    inside = [(first <= place) & (place < end) for first, end in frames]
    return mx.stack(inside).any(axis=0)


def frames_of_parts(
    model: MAGNeT,
    parts: list[tuple[float, float]],
    count: int,
    take: object = "The take",
) -> Frames:
    """First frames and ends of parts in seconds, in order; those that touch are one.

    Raises ValueError for one that is empty or outside of a `take` of `count` frames, and
    for one that leaves a window too little to hear.
    """
    found, merged = sorted(frames_of(model, part, count, take) for part in parts), []
    if not found:
        raise ValueError("There must be a part to fill in, such as (8.0, 12.0).")
    for first, end in found:
        if merged and first <= merged[-1][1]:
            first, before = merged.pop()
            end = max(end, before)
        merged.append((first, end))
    longest, rate = model.longest_window, model.frame_rate
    most = longest - 2 * beside(longest)
    for first, end in merged if count > longest else ():
        if end - first > most:
            raise ValueError(
                f"The part {first / rate:g}:{end / rate:g} is too long: in a take beyond "
                f"the model's own {longest / rate:g} s a part has at most "
                f"{most / rate:g} s. Give less, or a shorter take."
            )
    return merged


def beside(longest: int) -> int:
    """Frames that a window hears on each side of its parts."""
    return int(BESIDE * longest)


def windows(frames: Frames, count: int, longest: int) -> list[tuple[int, int, Frames]]:
    """First frame, end, and the parts that are filled in there, of each window over
    `count` frames. Parts in seconds, in windows of 10 s of a take of 30 s:

        parts                  2:4  5:6        17:19
        window 1      0:10  in 2:4  5:6
        window 2     13:23                  in 17:19
    """
    if count <= longest:
        return [(0, count, frames)]
    most, groups = longest - 2 * beside(longest), []
    for part in frames:
        if groups and part[1] - groups[-1][0][0] <= most:
            groups[-1].append(part)
        else:
            groups.append([part])
    found = []
    for group in groups:
        middle = (group[0][0] + group[-1][1]) // 2
        start = min(max(middle - longest // 2, 0), count - longest)
        found.append((start, start + longest, group))
    return found


def join_parts(
    old: mx.array, new: mx.array, frames: Frames, hop_length: int
) -> mx.array:
    """Sounds (N, n, C) that are old (n, C) but for the parts, which are of new (N, m, C),
    as `regenerate.join` makes one."""
    rows = []
    for i in range(len(new)):
        row = old
        for part in frames:
            row = join(row, new[i : i + 1], part, hop_length)[0]
        rows.append(row)
    return mx.stack(rows)
