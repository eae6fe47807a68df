"""Progress: what goes on, in one line at the end of a terminal.

    with Progress() as progress:
        progress.stage("loading small")
        progress.begin("take 1 of 2", total=30.0)
        progress.to(0.5)

Where stderr is no terminal nothing moves: what takes more than a minute says so, once a
minute. A line that cannot be written is nobody's error. Needs messages.py
and strict.py beside it.
"""

import os
import sys
import time
from typing import TextIO

from messages import Forgiving

STAGE = "{desc}"
COUNT = (
    "{desc}: {percentage:3.0f}% {bar} {n:.1f} of {total:.1f} {unit}, {remaining} left"
)
PASS = "{desc}: {percentage:3.0f}% {bar} pass {n:.0f} of {total:.0f}, {remaining} left"
SOUND = "s of audio"  # what is counted, unless told otherwise
PASSES = "passes"  # of a MAGNeT, which are whole
SHAPE = dict(ncols=80, nrows=24)  # of a terminal that does not tell its own
MINUTE = 60.0  # seconds between two lines where there is no terminal


class Progress:
    """A line that says what is done now, and how far it is."""

    def __init__(self, shown: bool = True, stream: TextIO | None = None):
        self._file = forgiving(sys.stderr if stream is None else stream)
        self._shown, self._moves = shown, shown and is_terminal(self._file)
        self._bar = moving_line(self._file) if self._moves else None
        self._text, self._last = "", time.monotonic()
        self._total, self._unit = 0.0, SOUND

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._moves:
            self._bar.close()

    def stage(self, text: str) -> None:
        """Say what is done from now on, such as "loading small"."""
        self._text = text
        if self._moves:
            self._bar.bar_format = STAGE
            self._bar.set_description_str(text)
        self._say(text)

    def begin(self, text: str, total: float, unit: str = SOUND) -> None:
        """Count from 0 to `total` from now on."""
        self._text, self._total, self._unit = text, total, unit
        if self._moves:
            self._bar.bar_format = PASS if unit == PASSES else COUNT
            self._bar.unit = unit
            self._bar.set_description_str(text, refresh=False)
            self._bar.reset(total)

    def to(self, amount: float) -> None:
        """So much of the total is done."""
        if self._moves:
            self._bar.update(amount - self._bar.n)
        if self._unit == PASSES:
            self._say(f"{self._text}: pass {amount:.0f} of {self._total:.0f}")
        else:
            self._say(f"{self._text}: {amount:.1f} of {self._total:.1f} {self._unit}")

    def _say(self, text: str) -> None:
        """A line a minute, where there is no terminal."""
        now = time.monotonic()
        if self._shown and not self._moves and now - self._last >= MINUTE:
            self._last = now
            print(text, file=self._file, flush=True)


def moving_line(stream: TextIO):
    """An empty line at the end of a terminal, as the downloads of the Hub have it."""
    from huggingface_hub.utils import tqdm  # here, for it is slow to import

    shape = SHAPE if no_shape(stream) else dict(dynamic_ncols=True)
    return tqdm(file=stream, bar_format=STAGE, leave=False, miniters=0, **shape)


def say(line: str, stream: TextIO | None) -> None:
    """Print a line to a stream, above what moves in the terminal."""
    if "tqdm" not in sys.modules:  # then nothing moves
        print(line, file=forgiving(stream))
        return
    from huggingface_hub.utils import tqdm

    tqdm.write(line, file=forgiving(stream))


def forgiving(stream: TextIO | None) -> Forgiving:
    """The stream itself, if it is so: tqdm knows what shares a terminal by that."""
    return stream if isinstance(stream, Forgiving) else Forgiving(stream)


def is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def no_shape(stream: TextIO | None) -> bool:
    """Whether a terminal says that it has 0 columns or rows, as of some programs that
    run others: tqdm shows nothing there."""
    try:
        return 0 in os.get_terminal_size(stream.fileno())
    except (AttributeError, OSError, ValueError):  # it is none, or closed
        return False
