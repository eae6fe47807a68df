"""A typed tune: the names of notes -> the chroma that a melody model follows.

    tune = parse("C E G:2 | A - F#:3", Beat(110))
    audio = model.generate("8-bit arcade", melody=tune)  # of a melody model
    tune.chroma()  # (T, 12), one-hot, as `extract_chroma` of its sound

A note is a name from C to B, # or b if any, an octave if any, and after a colon its
beats, 1 where nothing is said: F#, Bb4:1.5. `-` is a rest, and `|` is decoration. Chroma
knows no octaves: they are kept for who plays the notes. Needs beat.py beside it; for
chroma melody.py, audio.py, resample.py and outputs.py are needed.
"""

import re
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from beat import Beat

if TYPE_CHECKING:
    from melody import MelodyConfig

STEPS = dict(C=0, D=2, E=4, F=5, G=7, A=9, B=11)  # halftones above C
NOTE = re.compile(r"(?:([A-G])([#b]?)(\d?)|-)(?::(\d{1,4}(?:\.\d*)?|\.\d+))?")
CELLS = 512  # of a frame, in each of which one note sounds
DECAY = 1.6  # a second, by which a note's energy falls: e^-1.6 of it is left after one
SOUNDS = 0.95  # share of its time in which a note sounds, as `synth.py` plays it


class Note(NamedTuple):
    """What sounds, and how long."""

    pitch: int | None  # 60 is C4, the middle C; None: a rest
    beats: float = 1.0


class Tune(NamedTuple):
    """Notes one after the other, to a beat."""

    notes: tuple[Note, ...]
    beat: Beat

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.beat.beats(sum(note.beats for note in self.notes))

    def chroma(
        self,
        config: "MelodyConfig | None" = None,
        start: float | None = None,
        seconds: float | None = None,
    ) -> mx.array:
        """The frames (T, num_chroma) that a model of this config is given; None: a
        published one.

        Of the whole tune, or its first `seconds`; or of so many from `start` on, the
        tune going round.
        Raises ValueError for a tune that lasts less than a frame, for rests alone, and
        for a model whose octave has no twelve notes.
        """
        from melody import RATE, MelodyConfig, one_hot

        config = config or MelodyConfig()
        self.check(config, config.n_fft / RATE)
        whole = self.duration if start is None else seconds
        length = whole if seconds is None else min(whole, seconds)
        cells = round(length * RATE) * CELLS // config.n_fft
        energies = self._energies(start or 0.0, cells, config.n_fft / RATE)
        rows = np.arange(12) * config.num_chroma // 12
        notes = np.zeros((len(energies), config.num_chroma), np.float32)
        notes[:, rows] = energies / np.maximum(energies.max(1, keepdims=True), 1e-6)
        return one_hot(mx.array(notes)) if config.argmax else mx.array(notes)

    def check(self, config: "MelodyConfig", shortest: float) -> None:
        """Raise ValueError as `chroma`."""
        if self.duration < shortest:
            raise ValueError(
                f"notes must last at least {shortest:g} s, got {self.duration:.3f} s. "
                "Give more notes or beats."
            )
        if all(note.pitch is None for note in self.notes):
            raise ValueError("notes must have a note, not rests alone.")
        if config.num_chroma % 12:
            raise ValueError(
                "notes must go with a model that tells twelve notes apart, not "
                f"{config.num_chroma}."
            )

    def _energies(self, start: float, count: int, frame: float) -> np.ndarray:
        """How loud each note is in frames of so many seconds, weighed as by Hann's
        window: (T, 12), of `count` cells from a second on. The sound is mirrored at both
        ends, as `chromagram` does."""
        missing, half, hop = max(CELLS - count, 0), CELLS // 2, CELLS // 4
        roll = self._roll(start + (np.arange(count) + 0.5) * (frame / CELLS))
        roll = np.pad(roll, ((missing // 2, missing - missing // 2), (0, 0)))
        roll = np.concatenate([roll[:half][::-1], roll, roll[-half:][::-1]])
        window = (
            np.sin(np.pi * (np.arange(CELLS) + 0.5) / CELLS) ** 4
        )  # Hann's, squared
        frames = np.lib.stride_tricks.sliding_window_view(roll, CELLS, axis=0)[::hop]
        return frames @ window

    def _roll(self, times: np.ndarray) -> np.ndarray:
        """How loud each note is at some times, in seconds: (N, 12)."""
        ends = self.beat.beats(1) * np.cumsum([note.beats for note in self.notes])
        times = times % ends[-1]
        which = np.minimum(np.searchsorted(ends, times, "right"), len(ends) - 1)
        starts = np.concatenate([[0.0], ends[:-1]])
        since, lasts = times - starts[which], (ends - starts)[which]
        energies = np.exp(-DECAY * since) * (since < SOUNDS * lasts)
        pitches = np.array(
            [-1 if n.pitch is None else n.pitch % 12 for n in self.notes]
        )
        return energies[:, None] * (pitches[which, None] == np.arange(12))


def parse(text: str, beat: Beat) -> Tune:
    """The tune of a text. Raises ValueError for an unknown note or beat, and for none."""
    if not isinstance(text, str):
        raise ValueError(f"notes must be a text, got {text!r:.80}.")
    notes = [parse_note(word) for word in text.replace("|", " ").split()]
    if not notes:
        raise ValueError('notes must name a note, such as "C E G:2", but are empty.')
    return Tune((*notes,), beat)


def parse_note(word: str) -> Note:
    found = NOTE.fullmatch(word)
    beats = float(found and found[4] or 1)
    if not found or beats == 0:
        raise ValueError(
            "notes must be such as C, F#, Bb4 or - for a rest, with beats above 0 as in "
            f"C:1.5, got {word!r:.40}."
        )
    name, accidental, octave, _ = found.groups()
    if name is None:
        return Note(None, beats)
    shift = {"#": 1, "b": -1, "": 0}[accidental]
    return Note(12 * (int(octave or 4) + 1) + STEPS[name] + shift, beats)
