"""The beat of a take: tempo and bars, in seconds and in words.

    beat = Beat(bpm=120, beats_per_bar=4)
    beat.bars(4)  # 8.0 seconds
    beat.named("happy rock")  # "happy rock, 120 bpm"

Stands alone.
"""

import re
from typing import Any, NamedTuple

SLOWEST, FASTEST = 20, 400  # beats a minute
MOST_BEATS = 32  # of a bar


class Beat(NamedTuple):
    """Beats a minute, and beats of a bar."""

    bpm: float
    beats_per_bar: int = 4

    def beats(self, count: float) -> float:
        """Seconds of so many beats."""
        return count * 60 / self.bpm

    def bars(self, count: float) -> float:
        """Seconds of so many bars."""
        return self.beats(count * self.beats_per_bar)

    def named(self, prompt: str) -> str:
        """A prompt with its tempo, unless it says one. An empty one stays empty."""
        if not prompt or re.search(r"\d\s*bpm\b", prompt, re.IGNORECASE):
            return prompt
        return f"{prompt}, {self.bpm:g} bpm"


def make_beat(bpm: Any, beats_per_bar: Any = None) -> Beat | None:
    """A beat of such settings; None where there is no tempo. Raises ValueError for one
    that cannot be."""
    if bpm is None:
        if beats_per_bar is not None:
            raise ValueError("beats_per_bar needs a bpm.")
        return None
    if type(bpm) not in (int, float) or not SLOWEST <= bpm <= FASTEST:
        raise ValueError(f"bpm must be from {SLOWEST} to {FASTEST}, got {bpm!r:.40}.")
    count = 4 if beats_per_bar is None else beats_per_bar
    if type(count) is not int or not 1 <= count <= MOST_BEATS:
        raise ValueError(
            f"beats_per_bar must be from 1 to {MOST_BEATS}, got {count!r:.40}."
        )
    return Beat(bpm, count)
