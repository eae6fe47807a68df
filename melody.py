"""Chroma: which of the twelve notes sounds, eight times a second.

What the melody models are given of a recording. Of each frame only the strongest
note is kept, so that they follow the tune and not the sound (section 2.3 of
https://arxiv.org/abs/2306.05284).

    chroma = extract_chroma(audio, 44100)  # (T, 12), one-hot
    print(draw(chroma))

or `python melody.py hummed.wav`, which draws it. Drums and bass are taken away first
where a Demucs is given (`take_melody`). Needs encodec.py beside it, for sound files.
"""

import argparse
import functools
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from encodec import Encodec, load_audio, resample

if TYPE_CHECKING:
    from demucs import HTDemucs
    from musicgen import Options

RATE = 32000  # samples per second at which the notes are sought
WINDOW, HOP = 16384, 4096  # samples of a frame, and from one to the next
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MELODY = ("vocals", "other")  # the stems that hold it
FRAMES_AT_ONCE = 500
MARGIN = 10  # seconds beyond what is heard, on which Demucs and the last frame depend


def extract_chroma(audio: mx.array, sampling_rate: int) -> mx.array:
    """The strongest note of each frame of samples (N, C): one-hot (T, 12) from C on.

    T = 1 + N // 4096 at 32 kHz. Raises ValueError for another shape, NaN, silence,
    or less than a frame.
    """
    return one_hot(note_strengths(audio, sampling_rate))


def frames_of(seconds: float) -> int:
    """How many frames there are of so much sound: 235 of 30 seconds."""
    return 1 + int(seconds * RATE) // HOP


def one_hot(found: mx.array) -> mx.array:
    """(T, 12) with a one where each row is largest, the first of several."""
    largest = mx.argmax(found, axis=-1, keepdims=True)
    return (mx.arange(len(NOTES)) == largest).astype(mx.float32)


def note_strengths(audio: mx.array, sampling_rate: int) -> mx.array:
    """How strong each note is in each frame of samples (N, C): (T, 12), at most 1.

    Octaves are added up, most from the middle ones. Raises as `extract_chroma`.
    """
    return strengths(check(audio, sampling_rate), sampling_rate)


def strengths(audio: mx.array, sampling_rate: int) -> mx.array:
    """`note_strengths` of what is checked already, and may be silent."""
    audio = np.array(audio.mean(axis=1, keepdims=True))
    audio = mx.array(resample(audio, sampling_rate, RATE)[:, 0])
    half = WINDOW // 2
    audio = mx.concatenate([audio[half:0:-1], audio, audio[-2 : -half - 2 : -1]])
    count = 1 + (len(audio) - WINDOW) // HOP
    window = 0.5 - 0.5 * mx.cos(mx.arange(WINDOW) * (2 * math.pi / WINDOW))
    window = window / mx.sqrt((window**2).sum())
    filters, pieces = mx.array(chroma_filters()).T, []
    for first in range(0, count, FRAMES_AT_ONCE):
        shape = (min(FRAMES_AT_ONCE, count - first), WINDOW)
        frames = mx.as_strided(audio, shape, (HOP, 1), first * HOP)
        power = mx.abs(mx.fft.rfft(frames * window)) ** 2
        pieces.append(power @ filters)
        mx.eval(pieces)
    found = mx.concatenate(pieces)
    return found / mx.maximum(found.max(axis=-1, keepdims=True), 1e-6)


def check(audio: mx.array, sampling_rate: int) -> mx.array:
    """The samples (N, C), if there is a melody to look for in them."""
    if isinstance(audio, str | Path):
        raise ValueError(f"melody must be samples (N, C), got {audio!r}.")
    audio = mx.array(audio).astype(mx.float32)
    if audio.ndim != 2 or not 1 <= audio.shape[1] <= 8:
        raise ValueError(f"melody must have the shape (N, C), got {audio.shape}.")
    if len(audio) * RATE < WINDOW * sampling_rate:
        raise ValueError(
            f"melody must have at least {WINDOW / RATE} s, got "
            f"{len(audio) / sampling_rate:.3f} s."
        )
    if not mx.isfinite(audio).all().item():
        raise ValueError("melody must be finite, but it holds NaN or infinity.")
    if mx.abs(audio).max().item() < 1e-4:
        raise ValueError("melody must not be silent.")
    return audio


@functools.cache
def chroma_filters() -> np.ndarray:
    """How much each frequency of a frame adds to each note: (12, WINDOW / 2 + 1).

    Every frequency has a bell over the notes around it, wider where a frequency
    spans more of a note, and weighs as its octave does: a bell around the fifth from
    27.5 Hz. As librosa's `filters.chroma` with tuning 0
    (https://librosa.org/doc/latest/generated/librosa.filters.chroma.html).
    """
    notes = len(NOTES)
    frequencies = np.arange(1, WINDOW) * (RATE / WINDOW)
    places = notes * np.log2(frequencies / 27.5)  # in notes above the lowest A
    places = np.concatenate([[places[0] - 1.5 * notes], places])  # a place for 0 Hz
    widths = np.append(np.maximum(np.diff(places), 1), 1)
    apart = places - np.arange(notes)[:, None]
    apart = (apart + notes / 2) % notes - notes / 2  # the same note in any octave
    bells = np.exp(-0.5 * (2 * apart / widths) ** 2)
    bells /= np.sqrt((bells**2).sum(axis=0))
    bells *= np.exp(-0.5 * ((places / notes - 5) / 2) ** 2)
    from_c = np.roll(bells, -NOTES.index("D#"), axis=0)  # it began with A
    return from_c[:, : WINDOW // 2 + 1].astype(np.float32)


def fit(chroma: mx.array, length: int) -> mx.array:
    """Frames (T, 12) cut, or repeated from the first on, to (length, 12)."""
    return mx.tile(chroma, (math.ceil(length / len(chroma)), 1))[:length]


def take_melody(audio: mx.array, sampling_rate: int, demucs: "HTDemucs") -> mx.array:
    """The voices and instruments without drums and bass, of samples (N, C): (N', 1)
    at 32 kHz. Raises as `extract_chroma`."""
    audio = check(audio, sampling_rate).mean(axis=1, keepdims=True)
    audio = mx.broadcast_to(audio, (len(audio), demucs.channels))
    audio = resample(np.array(audio), sampling_rate, demucs.sampling_rate)
    stems = demucs.separate(audio)
    melody = sum(stems[demucs.config.sources.index(name)] for name in MELODY)
    melody = np.array(melody.mean(axis=1, keepdims=True))
    if np.abs(melody).max() < 1e-4:
        raise ValueError(
            "melody must have a voice or an instrument besides drums and bass; Demucs "
            "finds none. Without separation it is taken as it is."
        )
    return mx.array(resample(melody, demucs.sampling_rate, RATE))


@functools.cache
def published_demucs() -> "HTDemucs":
    """The published separation, loaded once."""
    from demucs import HTDemucs

    return HTDemucs.from_pretrained()


@dataclass(frozen=True)
class MelodyConfig:
    """Sizes, spelled as in transformers' `config.json`."""

    kind: str = "melody"
    num_chroma: int = 12
    chroma_length: int = 235  # frames

    def __post_init__(self):
        for name, most in (("num_chroma", 2**10), ("chroma_length", 2**12)):
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {size!r}.")

    @classmethod
    def from_dict(cls, config: dict) -> "MelodyConfig":
        """Take the known keys."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: config[name] for name in names & config.keys()})

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return self.num_chroma

    def build(self, codec: Encodec, window: float) -> "MelodyConditioner":
        """The conditioner of a model with this codec, and windows of `window` s."""
        return MelodyConditioner(self, codec.sampling_rate, window)


class MelodyConditioner(nn.Module):
    """What comes of a melody before the codes: notes; C throughout without one."""

    kind = "melody"

    def __init__(self, config: MelodyConfig, sampling_rate: int, window: float):
        super().__init__()
        self.config, self.longest = config, config.chroma_length
        self.sampling_rate, self.window = sampling_rate, window

    def frames(self, taken: mx.array | None) -> int:
        """Frames that come before the codes."""
        return self.longest

    def heard(self, duration: float) -> float:
        """Seconds of a melody that matter to a take of `duration` seconds."""
        return self.window + MARGIN + (duration if duration > self.window else 0)

    def take_all(
        self,
        sounds: list[mx.array | None],
        seeds: list[int],
        options: "Options",
        separate: bool,
    ) -> list[mx.array | None]:
        """Of each sound (N, C) the samples (N', 1) that hold its melody. Raises as
        `extract_chroma`."""
        rest = (self.sampling_rate, self.heard(options.duration), separate)
        taken = {id(x): x if x is None else take(x, *rest) for x in sounds}
        return [taken[id(x)] for x in sounds]

    def states(
        self, taken: list[mx.array | None], place: int | None
    ) -> tuple[mx.array, mx.array]:
        """What rows hold: notes (B, T, num_chroma), and a mask (B, T) of those that
        count, all. In long audio they begin at the sample `place`, and go round."""
        notes = {id(x): self._notes(x, place) for x in taken}  # takes share one
        values = mx.stack([fit(notes[id(x)], self.longest) for x in taken])
        return values, mx.ones(values.shape[:2], mx.bool_)

    def null_states(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """What rows without a sound hold, beside others of this shape (B, T, C)."""
        notes = (mx.arange(shape[-1]) == 0).astype(mx.float32)
        return mx.broadcast_to(notes, shape), mx.ones(shape[:2], mx.bool_)

    def _notes(self, melody: mx.array | None, place: int | None) -> mx.array:
        """Notes (T', num_chroma) of samples (N, 1); C where they are silent."""
        if melody is None:
            return (mx.arange(self.config.num_chroma)[None] == 0).astype(mx.float32)
        if place is not None:
            samples = int(self.window * self.sampling_rate)
            melody = melody[(place + mx.arange(samples)) % len(melody)]
        return one_hot(strengths(melody, self.sampling_rate))

    @classmethod
    def from_audiocraft(
        cls, weights: dict, cfg: dict[str, Any], folder: Path, codec: Encodec
    ) -> "MelodyConditioner":
        """By audiocraft's settings; there are no weights."""
        seconds = float(cfg.get("dataset.segment_duration", 30))
        notes = int(cfg.get("conditioners.self_wav.chroma_stem.n_chroma", len(NOTES)))
        return MelodyConfig("melody", notes, frames_of(seconds)).build(codec, seconds)


def take(
    sound: mx.array, sampling_rate: int, seconds: float, separate: bool
) -> mx.array:
    """The samples (N', 1) that hold the melody of the first `seconds` of a sound
    (N, C). Raises as `extract_chroma`."""
    heard = min(len(check(sound, sampling_rate)), int(seconds * sampling_rate))
    sound = mx.array(sound)[:heard]
    if separate:
        return take_melody(sound, sampling_rate, published_demucs())
    return check(sound, sampling_rate).mean(axis=1, keepdims=True)


def draw(chroma: mx.array, width: int = 72) -> str:
    """Notes over time, B at the top, in up to `width` columns of a terminal."""
    frames = np.array(chroma)
    edges = np.linspace(0, len(frames), min(width, len(frames)) + 1).astype(int)
    columns = [frames[a:b].mean(axis=0) for a, b in zip(edges, edges[1:])]
    shades = " ░▒▓█"
    lines = []
    for note in reversed(range(len(NOTES))):
        row = (shades[math.ceil(column[note] * 4)] for column in columns)
        lines.append(f"{NOTES[note]:2} {''.join(row)}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the melody of a sound file.")
    parser.add_argument("source", help="sound file to read")
    args = parser.parse_args()
    try:
        if not Path(args.source).is_file():
            raise FileNotFoundError(f"There is no sound file {args.source}.")
        print(draw(extract_chroma(load_audio(args.source, RATE, 1), RATE)))
    except (OSError, ValueError) as error:
        sys.exit(f"melody.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
