"""How a take begins and ends: fades, and a cut where the music rests.

    audio = fade(audio, 32000, fade_in=0.5, fade_out=2.0)  # (N, C)
    audio = audio[: find_cut(audio, 32000, first)]  # of what comes after `first` samples
    audio = Ending(fade_out=1.0, tail=2.0).apply(audio, 32000, first)  # both

Most takes stop in mid-note. `generate.py` fades the last 20 ms of a file, and with
--ending makes more than is asked for, to choose the end. Stands alone.
"""

from typing import Any, NamedTuple

import numpy as np

FADE = 0.02  # seconds, of every file of generate.py
CUT_FADE = 0.25  # seconds, before a cut that was sought
TAIL = 2.0  # seconds among which a cut is sought where there is no bar
STEP = 0.005  # seconds from one place of a cut to the next
WINDOW = 1024  # samples of a spectrum


class Ending(NamedTuple):
    """What is done to the samples of a take."""

    fade_in: float = 0.0  # seconds
    fade_out: float | None = None  # seconds; None: nothing is said of it
    tail: float = (
        0.0  # seconds that are made in addition, among which the end is sought
    )

    def apply(self, audio: np.ndarray, rate: int, first: int) -> np.ndarray:
        """Samples (N', C) of (N, C): cut after the first ones, if there are more and a
        cut is wanted, and faded."""
        if self.tail:
            audio = audio[: find_cut(audio, rate, first)]
        return fade(audio, rate, self.fade_in, self.fade_out or 0.0)

    def record(self) -> dict[str, Any]:
        """The settings that made it, which are given to `make_ending`."""
        record = dict(fade_in=self.fade_in) if self.fade_in else {}
        record |= {} if self.fade_out is None else dict(fade_out=self.fade_out)
        return record | (dict(ending=True) if self.tail else {})

    def check(self, duration: float) -> None:
        """Raise ValueError for a fade that is longer than the take."""
        for name, seconds in (("fade_in", self.fade_in), ("fade_out", self.fade_out)):
            if seconds not in (None, FADE) and seconds > duration:
                raise ValueError(
                    f"{name} must not be longer than the take, {duration:g} s, got "
                    f"{seconds:g}."
                )


def make_ending(
    fade_in: Any = None,
    fade_out: Any = None,
    seeks: Any = None,
    bar: float | None = None,
) -> Ending:
    """Of settings, and the seconds of a bar where there is a beat. A cut that is sought
    has a longer fade, unless another than the usual one is given. Raises ValueError
    naming a setting that cannot be."""
    for name, seconds in (("fade_in", fade_in), ("fade_out", fade_out)):
        number = type(seconds) in (int, float) and 0 <= seconds < 1e6
        if not (seconds is None or number):
            raise ValueError(f"{name} must be 0 s or more, got {seconds!r:.40}.")
    if seeks not in (None, False, True):
        raise ValueError(f"ending must be true or false, got {seeks!r:.40}.")
    if seeks and fade_out in (None, FADE):
        fade_out = CUT_FADE
    tail = (TAIL if bar is None else bar) if seeks else 0.0
    return Ending(float(fade_in or 0), fade_out, tail)


def fade(
    audio: np.ndarray, rate: int, fade_in: float = 0.0, fade_out: float = 0.0
) -> np.ndarray:
    """Samples (N, C) that rise over so many seconds and fall over others, by half a
    cosine. The last one is 0, or the first. A fade that is longer than the sound begins
    or ends with it."""
    audio = np.array(audio)
    rise, fall = (min(round(s * rate), len(audio)) for s in (fade_in, fade_out))
    audio[:rise] *= slope(rise)[::-1, None]
    audio[len(audio) - fall :] *= slope(fall)[:, None]
    return audio


def slope(count: int) -> np.ndarray:
    """From just below 1 down to 0: (count,)."""
    return (0.5 + 0.5 * np.cos(np.pi * np.arange(1, count + 1) / count)).astype("f4")


def find_cut(audio: np.ndarray, rate: int, first: int) -> int:
    """How many of the samples (N, C) to keep, `first` or more: up to where the energy is
    lowest, as at the end of a note, and the fewest notes begin in the fade before it.

    Both count alike, each against its mean over the whole sound.
    """
    audio, step = np.array(audio, np.float64), max(round(STEP * rate), 1)
    count = len(audio) // step
    ends = np.arange(1, count + 1) * step
    if count == 0 or ends[-1] <= first:
        return len(audio)
    energy = (audio[: count * step] ** 2).reshape(count, -1).mean(axis=1)
    cost = np.zeros(count)
    for values, seconds in ((energy, FADE), (onsets(audio, step), CUT_FADE)):
        weights = np.ones(round(seconds * rate / step)) * (step / rate / seconds)
        means = np.convolve(values, weights)[:count]  # of the steps up to each
        cost += means / max(values.mean(), 1e-12)
    return int(ends[np.argmin(np.where(ends >= first, cost, np.inf))])


def onsets(audio: np.ndarray, step: int) -> np.ndarray:
    """How much begins in each step of samples (N, C): (N // step,). It is what the
    logarithms of the spectrum rise by, all frequencies together."""
    mono = np.pad(audio.mean(axis=1), (WINDOW - step, 0))
    windows = np.lib.stride_tricks.sliding_window_view(mono, WINDOW)[::step]
    strengths = np.abs(np.fft.rfft(windows * np.hanning(WINDOW), axis=1))
    rises = np.diff(np.log1p(strengths), axis=0, prepend=0)
    return np.maximum(rises, 0).sum(axis=1)[: len(audio) // step]
