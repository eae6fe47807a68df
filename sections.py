"""Sections: a take whose text changes at given times.

    song = Sections([(0.0, "calm pads"), (12.0, "drums come in")], fade=1.0)
    audio = model.generate(song, duration=24.0)
    song = parse("0: calm pads | 8bars: drums come in", Beat(120))  # 8 bars are 16 s

Every step attends the text of its frame, so that the frames before a section are those
of a take without it. A section hears all that comes before it in its window, and so may
go on with that music rather than with its text; with a `context`, in seconds, it hears
no more than that. Where the text stands before the codes, in the melody and style
models, the whole window is computed under the text of the section at hand. Over `fade`
seconds from a section's beginning on, its logits and those of the text before are
blended. Needs beat.py beside it.
"""

import math
import re
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING

import mlx.core as mx

from beat import Beat

if TYPE_CHECKING:
    from decoder import Condition
    from musicgen import MusicGen, Window
    from options import Options

BEGINNING = re.compile(r"\s*0(?:\.0*)?\s*(?:s|bars?)?\s*:")
PART = re.compile(
    r"\s*(?:(\d+):(?=\d\d(?:\.\d*)?\s*:))?"  # minutes
    r"(\d+(?:\.\d*)?|\.\d+)\s*(s|bars?)?\s*:(.*)",
    re.DOTALL,
)


class Sections(str):
    """A prompt in sections: pairs of the second at which one begins and its text. As a
    string it is what `parse` reads.

    Raises ValueError for sections that are not in order, or have no text.
    """

    sections: list[tuple[float, str]]  # in seconds; neighbours have other texts
    fade: float  # seconds
    context: float | None  # seconds before it that a section hears; None: its window

    def __new__(
        cls,
        sections: Iterable[tuple[float, str]],
        fade: float = 0.0,
        text: str | None = None,
        context: float | None = None,
    ):
        sections = pairs(sections)
        check(sections, fade)
        check_context(context)
        if text is None:
            text = " | ".join(f"{seconds:.15g}: {words}" for seconds, words in sections)
        prompt = super().__new__(cls, text)
        prompt.sections = merged(sections)
        prompt.fade, prompt.context = float(fade), context
        return prompt

    def __getnewargs__(self):
        return self.sections, self.fade, str(self), self.context

    def each(self, change: Callable[[str], str]) -> "Sections":
        """The same with other texts."""
        sections = [(seconds, change(words)) for seconds, words in self.sections]
        return Sections(sections, self.fade, str(self), self.context)

    @property
    def texts(self) -> list[str]:
        """One of each section."""
        return [words for _, words in self.sections]


def pairs(sections: Iterable) -> list[tuple[float, str]]:
    """What is given as pairs. Raises ValueError for what is none."""
    try:
        return [
            (float(seconds) if isinstance(seconds, Real) else seconds, words)
            for seconds, words in (() if isinstance(sections, str) else sections)
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Sections must be pairs of seconds and text, got {sections!r:.80}."
        ) from error


def check(sections: list[tuple[float, str]], fade: float) -> None:
    """Raise ValueError unless they are in order, and each has a text."""
    before = None
    for seconds, words in sections:
        number = type(seconds) is float and math.isfinite(seconds)
        if not (number and isinstance(words, str)):
            raise ValueError(
                f"Sections must be pairs of seconds and text, got {seconds!r:.40} and "
                f"{words!r:.40}."
            )
        if not words.strip():
            raise ValueError(f"The section at {seconds:g} s must have a text.")
        if before is None and seconds != 0:
            raise ValueError(f"The first section must begin at 0, got {seconds:g} s.")
        if before is not None and seconds <= before:
            raise ValueError(
                f"Sections must be in order: {seconds:g} s comes after {before:g} s."
            )
        before = seconds
    if before is None:
        raise ValueError("There must be a section, at 0 s.")
    lengths = [b - a for (a, _), (b, _) in zip(sections, sections[1:])]
    if type(fade) not in (int, float) or not 0 <= fade <= min(lengths, default=1e6):
        raise ValueError(
            "section_fade must be from 0 s to the shortest section's length, got "
            f"{fade!r:.40}."
        )


def check_context(context: float | None) -> None:
    number = type(context) in (int, float) and 0 <= context < 1e6
    if not (context is None or number):
        raise ValueError(f"section_context must be 0 s or more, got {context!r:.40}.")


def check_end(prompt: str, duration: float) -> None:
    """Raise ValueError for a section that begins when the take has ended."""
    if isinstance(prompt, Sections) and prompt.sections[-1][0] >= duration:
        first, words = prompt.sections[-1]
        raise ValueError(
            f"The section at {first:g} s, {words!r:.40}, must begin before the take "
            f"ends, at {duration:g} s."
        )


def merged(sections: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The same, less those that go on with the text before."""
    kept = sections[:1]
    for seconds, words in sections[1:]:
        if words != kept[-1][1]:
            kept.append((seconds, words))
    return kept


def parse(
    prompt: str,
    beat: Beat | None = None,
    fade: float = 0.0,
    context: float | None = None,
) -> str:
    """Sections of "0: calm pads | 12: drums come in"; what does not begin with "0:" is
    the plain text that it was. A time is in seconds, in minutes and seconds, "1:30", or in
    bars of a beat, "8bars".

    Raises ValueError for a section without a time or a text, or for bars without a beat.
    """
    if not BEGINNING.match(prompt):
        return prompt
    sections = []
    for part in prompt.split("|"):
        found = PART.fullmatch(part)
        if found is None:
            raise ValueError(
                "A section must be a time and a text, such as 12: drums come in; got "
                f"{part.strip()!r:.60}."
            )
        minutes, number, unit, words = found.groups()
        seconds = in_seconds(float(number), unit or "s", beat) + 60 * int(minutes or 0)
        sections.append((seconds, words.strip()))
    return Sections(sections, fade, prompt, context)


def in_seconds(number: float, unit: str, beat: Beat | None) -> float:
    if unit == "s" or number == 0:
        return number
    if beat is None:
        raise ValueError(f"{number:g}{unit} needs a bpm.")
    return beat.bars(number)


def times(prompt: str) -> tuple:
    """What prompts that run together have in common: the times of their sections, the
    fade and the context; nothing in plain texts."""
    if not isinstance(prompt, Sections):
        return ()
    return *(seconds for seconds, _ in prompt.sections), prompt.fade, prompt.context


def group(prompts: list[str], size: int) -> tuple[list[list[int]], int]:
    """Numbers of the rows that run together, and how many of so many that memory holds:
    half of them, where one fades, for that needs the caches of both texts."""
    groups = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(times(prompt), []).append(row)
    fades = any(getattr(prompt, "fade", 0) for prompt in prompts)
    return [*groups.values()], max(size // 2, 1) if fades else size


def cut(
    plan: list["Window"], prompt: Sections, model: "MusicGen", duration: float
) -> list["Window"]:
    """The windows, each as often as a section begins in it: the loop stops there, and
    goes on from there.

    Raises ValueError as `check_end`, and for a section that is shorter than a frame.
    """
    check_end(prompt, duration)
    frames = [model.frames_in(seconds) for seconds, _ in prompt.sections]
    for (first, _), one, other in zip(prompt.sections, frames, frames[1:]):
        if one == other:
            raise ValueError(
                f"The section at {first:g} s must last a frame, {1 / model.frame_rate:g} s."
            )
    if prompt.context is not None and len(frames) > 1:
        return cut_anew(plan, frames, model, prompt.context)
    passes, made = [], 0
    for start, _, end in plan:
        within = [frame for frame in frames if made < frame < end]
        passes += [(start, stop, end) for stop in (*within, end)]
        made = end
    return passes


def cut_anew(
    plan: list["Window"], frames: list[int], model: "MusicGen", context: float
) -> list["Window"]:
    """Windows that begin so many seconds before each section, and slide on from there.

    Raises ValueError for a model that follows a sound, which knows no such windows.
    """
    if model.conditioner is not None:
        raise ValueError(
            "section_context needs a model that follows the text alone: leave it out."
        )
    longest, last = model.longest_window, plan[-1][-1]
    stride = plan[1][0] if len(plan) > 1 else longest
    passes, start = [], 0
    for first, stop in zip(frames, [*frames[1:], last]):
        start = max(first - model.frames_in(context), start, first - longest + 1)
        made = first
        while made < stop:
            end = min(start + longest, last)
            passes.append((start, made := min(end, stop), end))
            start += stride if made < stop else 0
    return passes


class SectionStep:
    """The decoder under texts that change: what the loop calls in place of `PlainStep`
    or `Engine`, of which it has one, and another one to fade.

    The prompts of B takes have sections at the same times; `plan` are their windows.
    """

    def __init__(
        self,
        model: "MusicGen",
        prompts: list[Sections],
        encode: Callable[[list[str]], "Condition"],
        options: "Options",
        steps: int,
        plan: list["Window"],
    ):
        starts = [seconds for seconds, _ in prompts[0].sections]
        self._frames, self._plan = list(map(model.frames_in, starts)), iter(plan)
        rows = zip(*(prompt.texts for prompt in prompts))
        self._texts = [encode([*texts]) for texts in rows]
        mx.eval(self._texts)  # T5 may be freed when the first forward is made
        longest = max(self._texts, key=lambda text: text.mask.shape[1])
        self._fade = model.frames_in(prompts[0].fade)
        self._delays = model.config.decoder.delays
        count = 2 if self._fade else 1
        forwards = [
            model.make_forward(longest, options.copies, steps) for _ in range(count)
        ]
        self._new, self._old = forwards[0], forwards[-1]

    def rewind(self, sound: "Condition | None" = None) -> None:
        """Begin the next window of the plan, after the prefix of a sound if any."""
        self._start, self._sound, self._begun = next(self._plan)[0], sound, False

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits (R, 1, K, V) of what follows the tokens (B, S, K)."""
        begins = not self._begun
        if begins:
            self._begun, self._frame = True, self._start + tokens.shape[1] - 1
            self._at = sum(first <= self._frame for first in self._frames) - 1
        logits, weights = self._run(self._new, tokens, self._at, begins), self._weights
        self._frame += 1
        if self._fade == 0 or self._at == 0 or min(weights) == 1:
            return logits
        old = self._run(self._old, tokens, self._at - 1, begins).astype(mx.float32)
        return old + (logits - old) * mx.array(weights)[:, None]

    @property
    def _weights(self) -> list[float]:
        """Of the section's logits against the ones before, for each codebook by the
        frame that it writes: rising evenly to 1, which a fade of 0 has at once."""
        since = self._frame - self._frames[self._at]
        behind = [since - delay for delay in self._delays]
        return [min(max((b + 1) / (self._fade + 1), 0.0), 1.0) for b in behind]

    def _run(
        self, forward: Callable, tokens: mx.array, last: int, begins: bool
    ) -> mx.array:
        """The same of one forward. A window begins with all its tokens, each of them
        under the text of its frame, and of no section after the `last`."""
        if not begins:
            return forward(tokens)
        if self._sound is not None:  # the text is a part of the prefix
            forward.follow(self._texts[last])
            forward.rewind(self._sound)
            return forward(tokens)
        forward.rewind()
        ends = [*self._frames[1 : last + 1], self._start + tokens.shape[1]]
        place = 0
        for text, end in zip(self._texts, ends):
            if end - self._start > place:
                forward.follow(text)
                logits = forward(tokens[:, place : end - self._start])
                place = end - self._start
        return logits
