"""Melody: a recording -> chroma, which says what note sounds eight times a second.

The melody conditioner of MusicGen (https://arxiv.org/abs/2306.05284, section 2.3). Of
each frame only the strongest of twelve notes is kept, so that a melody model follows
the tune and not the sound.

    chroma = extract_chroma(audio, 44100)  # (N, C) -> (T, 12), one-hot
    print(draw(chroma))

or `python melody.py hummed.wav`, which draws it. Needs audio.py, resample.py and
outputs.py beside it; demucs.py is needed where drums and bass are to be taken away first.
"""

import argparse
import functools
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if sys.platform == "darwin":  # where an M5 rounds the factors of float32 products
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at the first of them

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from audio import check_samples, load_audio, resample
from outputs import print_result

if TYPE_CHECKING:
    from demucs import HTDemucs
    from encodec import Encodec

RATE = 32000  # samples per second of which chroma is made, whatever the codec's rate
NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
STEMS = ("vocals", "other")  # of Demucs, the two that hold a melody
FRAMES_AT_ONCE = 500
MARGIN = 10  # seconds after a window that its last frames and Demucs depend on
SILENCE = 1e-4  # samples below it count as none


@dataclass(frozen=True)
class MelodyConfig:
    """How chroma is made; defaults: the published models.

    The numbers are spelled as in transformers' `config.json` and
    `preprocessor_config.json`; `argmax` is audiocraft's.
    """

    kind: str = "melody"
    num_chroma: int = 12  # notes of an octave
    chroma_length: int = 235  # frames of a window: 30 s
    n_fft: int = 16384  # samples of a frame at RATE; the next begins a quarter later
    argmax: bool = True  # only the strongest note of a frame is kept

    @classmethod
    def from_dict(cls, config: dict) -> "MelodyConfig":
        """Take the known keys. Raises ValueError for what is absurd."""
        names = {field.name for field in fields(cls)}
        config = cls(**{name: config[name] for name in names & config.keys()})
        check_config(config)
        return config

    @property
    def width(self) -> int:
        """Features of a prefix frame."""
        return self.num_chroma

    def build(self, codec: "Encodec", max_duration: float) -> "MelodyConditioner":
        """The conditioner of a model with this codec and windows of so many seconds."""
        return MelodyConditioner(self, codec.sampling_rate, max_duration)


class MelodyRequest(NamedTuple):
    """A melody to follow."""

    audio: Any  # (N, C) at the model's sampling rate, a file, or a `Tune` of notes.py;
    # repeated where it is too short
    separate: bool = True  # take drums and bass of a sound away first, with Demucs


class MelodyConditioner(nn.Module):
    """Makes the prefix of a melody: its chroma, at the model's `sampling_rate`.

    Takes without a melody have a prefix as long, of what silence gives.
    """

    kind = "melody"
    uses_seed = False  # what `prepare` gives is the same for all seeds

    def __init__(self, config: MelodyConfig, sampling_rate: int, max_duration: float):
        super().__init__()
        self.config, self.sampling_rate = config, sampling_rate
        self.max_duration = max_duration

    @property
    def longest(self) -> int:
        """Most prefix frames there can be."""
        return self.config.chroma_length

    def needed(self, duration: float) -> float:
        """Seconds of a melody on which a take of `duration` seconds depends."""
        more = duration if duration > self.max_duration else 0
        return self.max_duration + MARGIN + more

    def prepare(
        self, request: MelodyRequest | None, seed: int, duration: float
    ) -> Any | None:
        """The samples (N, 1) that hold the melody for a take of `duration` seconds, or
        the typed tune.

        Raises ValueError for samples without a melody: see `check_melody`.
        """
        if request is None:
            return None
        if not isinstance(request, MelodyRequest):
            raise ValueError(f"condition must be a MelodyRequest, got {request!r:.80}.")
        rate, shortest = self.sampling_rate, self.config.n_fft / RATE
        if hasattr(request.audio, "chroma"):
            request.audio.check(self.config, shortest)
            return request.audio
        needed = int(self.needed(duration) * rate)
        audio = check_samples("melody", request.audio, rate, count=needed)
        audio = check_melody(audio, rate, shortest).mean(axis=1, keepdims=True)
        if request.separate:
            return isolate_melody(audio, rate, published_demucs())
        return audio

    def frames(self, prepared: Any | None) -> int:
        """Prefix frames of a take."""
        return self.longest

    def states(
        self, prepared: list[Any | None], start: int | None
    ) -> tuple[mx.array, mx.array]:
        """Chroma (B, T, width), and a mask (B, T) in which every frame counts.

        Of a window that begins at the sample `start`, the melody going round; None:
        of the only window, which is filled by repeating frames.
        """
        notes = {id(x): self._chroma(x, start) for x in prepared}  # takes share one
        values = mx.stack([repeat(notes[id(x)], self.longest) for x in prepared])
        return values, mx.ones(values.shape[:2], mx.bool_)

    def null_states(self, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """What silence gives, (B, T, width), and a mask (B, T) in which it counts."""
        return mx.broadcast_to(self._silence(), shape), mx.ones(shape[:2], mx.bool_)

    def _chroma(self, audio: Any | None, start: int | None) -> mx.array:
        if audio is None:
            return self._silence()
        if hasattr(audio, "chroma"):
            if start is None:
                return audio.chroma(self.config, None, self.max_duration + MARGIN)
            first = start / self.sampling_rate
            return audio.chroma(self.config, first, self.max_duration)
        if start is not None:
            samples = int(self.max_duration * self.sampling_rate)
            audio = audio[(start + mx.arange(samples)) % len(audio)]
        return chroma(audio, self.sampling_rate, self.config)

    def _silence(self) -> mx.array:
        """(1, width). All notes are 0, and of equals `one_hot` takes the first: C."""
        notes = mx.zeros((1, self.config.width))
        return one_hot(notes) if self.config.argmax else notes


def extract_chroma(audio: mx.array | str | Path, sampling_rate: int) -> mx.array:
    """The strongest note of each frame of samples (N, C), or of a file, which is read
    at the rate: one-hot (T, 12) from C on.

    T = 1 + N // 4096 at 32 kHz. Raises ValueError for another shape, NaN, silence,
    or less than a frame.
    """
    config = MelodyConfig()
    audio = check_samples("melody", audio, sampling_rate)
    audio = check_melody(audio, sampling_rate, config.n_fft / RATE)
    frames = chroma(audio, sampling_rate, config)
    mx.eval(frames)  # here, for what is lazy belongs to this thread
    return frames


def chroma(audio: mx.array, sampling_rate: int, config: MelodyConfig) -> mx.array:
    """Chroma (T, num_chroma) of samples (N, C) as a model of this config knows it."""
    notes = chromagram(audio, sampling_rate, config.num_chroma, config.n_fft)
    return one_hot(notes) if config.argmax else notes


def one_hot(notes: mx.array) -> mx.array:
    """(T, num_chroma) with a one where each row is largest, the first of several."""
    largest = mx.argmax(notes, axis=-1, keepdims=True)
    return (mx.arange(notes.shape[-1]) == largest).astype(mx.float32)


def chromagram(
    audio: mx.array, sampling_rate: int, num_chroma: int = 12, n_fft: int = 16384
) -> mx.array:
    """How strong each note is in each frame of samples (N, C): (T, num_chroma).

    The strongest has 1, and in silence all have 0. Octaves are added up, most from
    the middle ones. T = 1 + N // (n_fft / 4) at 32 kHz, N being at least n_fft.
    """
    audio = np.array(mx.array(audio).mean(axis=1, keepdims=True))
    audio = mx.array(resample(audio, sampling_rate, RATE)[:, 0])
    missing, half, hop = max(n_fft - len(audio), 0), n_fft // 2, n_fft // 4
    audio = mx.pad(audio, (missing // 2, missing - missing // 2))
    audio = mx.concatenate([audio[half:0:-1], audio, audio[-2 : -half - 2 : -1]])
    count = 1 + (len(audio) - n_fft) // hop
    window = 0.5 - 0.5 * mx.cos(mx.arange(n_fft) * (2 * math.pi / n_fft))
    window = window / mx.sqrt((window**2).sum())
    filters, pieces = mx.array(chroma_filters(num_chroma, n_fft)).T, []
    for first in range(0, count, FRAMES_AT_ONCE):
        shape = (min(FRAMES_AT_ONCE, count - first), n_fft)
        frames = mx.as_strided(audio, shape, (hop, 1), first * hop)
        power = mx.abs(mx.fft.rfft(frames * window)) ** 2
        pieces.append(power @ filters)
        mx.eval(pieces)  # the spectra of a long sound would fill the memory
    notes = mx.concatenate(pieces)
    return notes / mx.maximum(notes.max(axis=-1, keepdims=True), 1e-6)


@functools.lru_cache(maxsize=4)
def chroma_filters(num_chroma: int, n_fft: int) -> np.ndarray:
    """How much each frequency of a frame adds to each note: (num_chroma, n_fft / 2 +
    1).

    Every frequency has a bell over the notes around it, wider where a frequency
    spans more of a note, and weighs as its octave does: a bell around the fifth from
    27.5 Hz. As librosa's `filters.chroma` with tuning 0
    (https://librosa.org/doc/latest/generated/librosa.filters.chroma.html).
    """
    frequencies = np.arange(1, n_fft // 2 + 2) * (RATE / n_fft)
    places = num_chroma * np.log2(frequencies / 27.5)  # in notes above the lowest A
    # 0 Hz has no logarithm: librosa gives it a place one and a half octaves lower
    places = np.concatenate([[places[0] - 1.5 * num_chroma], places])
    widths, places = np.maximum(np.diff(places), 1), places[:-1]
    apart, half = places - np.arange(num_chroma)[:, None], round(num_chroma / 2)
    apart = (apart + half) % num_chroma - half  # the same note in any octave
    bells = np.exp(-0.5 * (2 * apart / widths) ** 2)
    bells /= np.sqrt((bells**2).sum(axis=0))
    bells *= np.exp(-0.5 * ((places / num_chroma - 5) / 2) ** 2)
    # The rows begin with A, and C is three twelfths on. Where an octave has less than
    # twelve notes, librosa leaves them there.
    return np.roll(bells, -3 * (num_chroma // 12), axis=0).astype(np.float32)


def repeat(frames: mx.array, length: int) -> mx.array:
    """Frames (T, width) cut, or repeated from the first on, to (length, width)."""
    return mx.tile(frames, (math.ceil(length / len(frames)), 1))[:length]


def isolate_melody(audio: mx.array, sampling_rate: int, demucs: "HTDemucs") -> mx.array:
    """Voices and instruments without drums and bass, of samples (N, C): (N', 1) at the
    same rate. Raises ValueError where nothing is left."""
    audio = mx.array(audio).mean(axis=1, keepdims=True)
    audio = mx.broadcast_to(audio, (len(audio), demucs.channels))
    audio = resample(np.array(audio), sampling_rate, demucs.sampling_rate)
    stems = demucs.separate(audio)
    melody = sum(stems[demucs.config.sources.index(name)] for name in STEMS)
    melody = np.array(melody.mean(axis=1, keepdims=True))
    if np.abs(melody).max() < SILENCE:
        raise ValueError(
            "melody must have a voice or an instrument besides drums and bass, but "
            "Demucs finds none. --no-separate (separate=False) follows the sound as it "
            "is."
        )
    return mx.array(resample(melody, demucs.sampling_rate, sampling_rate))


@functools.cache
def published_demucs() -> "HTDemucs":
    """The published separation, loaded once."""
    from demucs import HTDemucs

    try:
        return HTDemucs.from_pretrained()
    except OSError as error:
        raise OSError(
            f"{error} Without it, --no-separate (separate=False) follows the sound as "
            "it is."
        ) from error


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


def check_melody(audio: mx.array, sampling_rate: int, shortest: float) -> mx.array:
    """The samples (N, C). Raises ValueError for less than `shortest` seconds, and for
    silence."""
    seconds = len(audio) / sampling_rate
    if seconds < shortest:
        raise ValueError(
            f"melody must have at least {shortest:g} s, got {seconds:.3f} s. Give a "
            "longer sound."
        )
    if mx.abs(audio).max().item() < SILENCE:
        raise ValueError(
            f"melody must not be silent, but its {seconds:g} s are. Give another part "
            "of the sound."
        )
    return audio


LIMITS = {  # least and largest value of each size
    "num_chroma": (1, 2**8),
    "chroma_length": (1, 2**16),
    "n_fft": (2**6, 2**17),
}
FOLLOWED = {  # what transformers' feature extractor may say beside these sizes
    "sampling_rate": RATE,
    "stem_indices": [3, 2],  # vocals and other
}


def check_config(config: MelodyConfig) -> None:
    """Raise ValueError for sizes that cannot be, or that no memory holds."""
    for name, (low, high) in LIMITS.items():
        size = getattr(config, name)
        if type(size) is not int or not low <= size <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {size!r:.80}.")
    if config.n_fft & (config.n_fft - 1):
        raise ValueError(f"n_fft must be a power of two, got {config.n_fft}.")
    if type(config.argmax) is not bool:
        raise ValueError(f"argmax must be true or false, got {config.argmax!r:.80}.")


def extractor_settings(extractor: dict[str, Any], config: dict) -> dict[str, int]:
    """Fields of MelodyConfig in transformers' `preprocessor_config.json`, beside the
    `config` of its `config.json`.

    Its extractor always takes the strongest note. Raises ValueError for settings that
    are not followed, and for those of another model.
    """
    n_fft = extractor.get("n_fft", MelodyConfig.n_fft)
    if type(n_fft) is not int:
        raise ValueError(f"n_fft must be a whole number, got {n_fft!r:.80}.")
    sizes = MelodyConfig.from_dict(config)
    followed = FOLLOWED | {"hop_length": n_fft // 4, "num_chroma": sizes.num_chroma}
    for name, value in followed.items():
        if name in extractor and extractor[name] != value:
            raise ValueError(
                f"{name} of the feature extractor must be {value}, got "
                f"{extractor[name]!r:.80}."
            )
    seconds = sizes.chroma_length * n_fft / 4 / RATE
    chunk = extractor.get("chunk_length", 30 if extractor else seconds)
    if not chunk >= seconds - 1:  # it would cut the melody off
        raise ValueError(
            f"chunk_length of the feature extractor must be {seconds:g} s, as long as "
            f"chroma_length, got {chunk!r:.80}."
        )
    return {"n_fft": n_fft}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the melody of a sound file.")
    parser.add_argument("source", help="sound file to read")
    args = parser.parse_args()
    try:
        if not os.path.isfile(os.path.expanduser(args.source)):
            raise FileNotFoundError(f"There is no sound file {args.source}.")
        drawing = draw(extract_chroma(load_audio(args.source, RATE, 1), RATE))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"melody.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)
    print_result(drawing)


if __name__ == "__main__":
    main()
