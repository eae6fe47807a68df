"""Sounds that can be made anywhere, to look for melodies in. Only numpy."""

import numpy as np


def sweep(rate: int, seconds: float = 4.0) -> np.ndarray:
    """Up four octaves from 110 Hz: (N, 1)."""
    time = np.arange(int(seconds * rate)) / rate
    octaves = 4 * time / seconds
    phase = 110 * seconds / (4 * np.log(2)) * 2**octaves
    return (0.5 * np.sin(2 * np.pi * phase)).astype(np.float32)[:, None]


def chords(rate: int) -> np.ndarray:
    """C, A minor, F and G for a second each, the root loudest: (N, 2)."""
    time = np.arange(rate) / rate
    notes = ((60, 64, 67), (57, 60, 64), (53, 57, 60), (55, 59, 62))
    weights = (0.4, 0.2, 0.15)
    sounds = [
        sum(w * np.sin(2 * np.pi * hertz(n) * time) for w, n in zip(weights, chord))
        for chord in notes
    ]
    left = np.concatenate(sounds).astype(np.float32)
    return np.stack([left, 0.5 * left], axis=1)


def noise(rate: int, seed: int = 0, seconds: float = 2.0) -> np.ndarray:
    """White, of one channel: (N, 1)."""
    size = (int(seconds * rate), 1)
    return (0.2 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def tune(rate: int, notes: list[int], beat: float = 0.5) -> np.ndarray:
    """Notes (60 is C) of a beat each, with overtones, that fade: (N, 1)."""
    time = np.arange(int(beat * rate)) / rate
    fade = np.exp(-2 * time)
    sounds = [
        sum(np.sin(2 * np.pi * k * hertz(n) * time) / k**2 for k in (1, 2, 3)) * fade
        for n in notes
    ]
    return (0.4 * np.concatenate(sounds)).astype(np.float32)[:, None]


def hertz(note: int) -> float:
    """Frequency of a MIDI note."""
    return 440 * 2 ** ((note - 69) / 12)
