"""Resample sound, and find its true peak, which lies between samples.

    audio = resample(audio, 44100, 32000)  # (N, C) -> (floor(N * 320 / 441), C)
    true_peak(audio)  # 1.0 is full scale

Samples come as arrays of numpy or MLX, and go as numpy's. Stands alone.
"""

import math
from typing import Any

import numpy as np

ZEROS, ROLLOFF = 24, 0.945  # of julius: zero crossings, and where it cuts off
REACH = 16  # samples to each side from which a value between two is computed
BLOCK = 2**20  # samples at once, to bound memory


def to_numpy(audio: Any) -> np.ndarray:
    """Samples (N, C) of numpy or MLX as numpy's. Raises ValueError for another shape,
    and for MLX's bfloat16, which numpy does not know."""
    audio = np.asarray(audio)
    if audio.ndim != 2:
        raise ValueError(f"Samples must have the shape (N, C), got {audio.shape}.")
    return audio


def resample(audio: Any, source: int, target: int) -> np.ndarray:
    """(N, C) at `source` Hz -> (floor(N * target / source), C) at `target` Hz.

    The filter is that of julius, which audiocraft uses
    (https://github.com/adefossez/julius): a sinc with 24 zero crossings and a squared
    cosine as its window, cut off at 0.945 of the lower Nyquist frequency. Beyond the
    ends the first and the last sample go on. Raises as `to_numpy`.
    """
    audio = to_numpy(audio)
    if source == target:
        return audio
    source, target, width = filter_width(source, target)
    taps = np.arange(-width, width + 2)
    output = np.empty((len(audio) * target // source, audio.shape[1]), np.float32)
    phases = np.arange(min(target, len(output))) * source % target / target
    size = max(2**22 // len(taps), 1)  # of blocks, to bound the memory of the windows
    starts = range(0, len(phases), size)
    kernels = [filters(phases[i : i + size], taps, source, target) for i in starts]
    kernels = np.concatenate(kernels or [np.empty((0, len(taps)), np.float32)])
    for start in range(0, len(output), size):
        places = np.arange(start, min(start + size, len(output)))
        window = (places * source // target)[:, None] + taps
        window = audio[np.clip(window, 0, len(audio) - 1)]
        output[places] = np.einsum("nt,ntc->nc", kernels[places % target], window)
    return output


def filter_width(source: int, target: int) -> tuple[int, int, int]:
    """Both rates in their smallest numbers, and how many samples at the first the
    filter between them reaches to each side."""
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    return source, target, math.ceil(ZEROS * source / (min(source, target) * ROLLOFF))


def filters(
    phases: np.ndarray, taps: np.ndarray, source: int, target: int
) -> np.ndarray:
    """The filters (P, T) for `phases` (P,) of a sample, from 0 to 1, at `taps` (T,)."""
    rate = min(source, target) * ROLLOFF
    time = np.clip((taps - phases[:, None]) * rate / source, -ZEROS, ZEROS)
    kernels = np.sinc(time) * np.cos(np.pi * time / ZEROS / 2) ** 2
    return (kernels / kernels.sum(axis=1, keepdims=True)).astype(np.float32)


def peaks_between(audio: Any) -> np.ndarray:
    """Samples (N, C) -> (N,): the highest of any channel from each sample on to before
    the next, at four places. Beyond the ends is silence.

    The places between are interpolated by a sinc with a squared cosine as its window.
    ITU-R BS.1770-4, annex 2.
    """
    audio = to_numpy(audio)
    highest = np.abs(audio).max(axis=1, initial=0)
    taps = np.arange(1 - REACH, REACH + 1)
    for place in (0.25, 0.5, 0.75):
        time = taps - place
        kernel = np.sinc(time) * np.cos(np.pi * time / REACH / 2) ** 2
        kernel = (kernel / kernel.sum()).astype(np.float32)
        for channel in audio.T:
            padded = np.pad(channel, (REACH - 1, REACH))
            between = np.abs(np.correlate(padded, kernel, "valid"))
            highest = np.maximum(highest, between)
    return highest


def true_peak(audio: Any) -> float:
    """The highest value of samples (N, C), also between them, where a player's filter
    finds it. In silence 0."""
    highest = 0.0
    for start in range(0, len(audio), BLOCK):
        first = max(start - REACH, 0)
        between = peaks_between(audio[first : start + BLOCK + REACH])
        highest = max(highest, float(between[start - first :][:BLOCK].max()))
    return highest
