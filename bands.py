"""Split a sound into bands of frequency, that are as wide to the ear and sum up to it.

    bands = split_bands(sound, sampling_rate=32000, n_bands=8)  # (8, B, N, C)
    mx.abs(bands.sum(axis=0) - sound).max()  # 1e-7 or so

Edges lie evenly on the mel scale. A band is the difference of two low passes, windowed
sincs, as in julius (https://github.com/adefossez/julius). Stands alone.
"""

import functools
import math

import mlx.core as mx
import numpy as np

ZEROS = 8  # of the sinc, on each side
BLOCK = 2**15  # samples that are filtered at once


def split_bands(sound: mx.array, sampling_rate: int, n_bands: int) -> mx.array:
    """Bands (n_bands, B, N, C) of a sound (B, N, C), from the lowest to the highest.

    Raises ValueError for fewer than one band.
    """
    if n_bands < 1:
        raise ValueError(f"n_bands must be 1 or more, got {n_bands}.")
    if n_bands == 1:
        return sound[None]
    low = low_passes(sound, low_pass_filters(sampling_rate, n_bands))
    return mx.concatenate([low[:1], low[1:] - low[:-1], (sound - low[-1])[None]])


def low_passes(sound: mx.array, filters: mx.array) -> mx.array:
    """What each of the filters (F, taps) leaves of a sound (B, N, C): (F, B, N, C).
    Beyond its ends the sound goes on as it begins and ends. By FFT, block by block."""
    (B, N, C), (F, taps) = sound.shape, filters.shape
    rows = sound.swapaxes(1, 2).reshape(B * C, N)
    rows = mx.pad(rows, [(0, 0), (taps // 2, taps // 2)], mode="edge")
    block = max(min(N, BLOCK), 1)
    size = 2 ** math.ceil(math.log2(block + taps - 1))
    passes, blocks = mx.conjugate(mx.fft.rfft(filters, size)), []
    for start in range(0, max(N, 1), block):
        spectrum = mx.fft.rfft(rows[:, start : start + block + taps - 1], size)
        blocks.append(mx.fft.irfft(spectrum[:, None] * passes, size)[..., :block])
        mx.eval(blocks[-1])  # so that what it was made of goes
    low = mx.concatenate(blocks, axis=2)[..., :N]  # (B * C, F, N)
    return low.reshape(B, C, F, N).transpose(2, 0, 3, 1)


def edges(sampling_rate: int, n_bands: int) -> np.ndarray:
    """Frequencies (n_bands - 1,) in Hz between bands."""
    top = 2595 * np.log10(1 + sampling_rate / 2 / 700)
    mels = np.linspace(0, top, n_bands + 1)[1:-1]
    return 700 * (10 ** (mels / 2595) - 1)


@functools.cache
def low_pass_filters(sampling_rate: int, n_bands: int) -> mx.array:
    """Filters (n_bands - 1, taps) that pass what is below each edge. All are as long as
    the lowest one needs."""
    cutoffs = edges(sampling_rate, n_bands) / sampling_rate
    half = int(ZEROS / cutoffs[0] / 2)
    time = np.arange(-half, half + 1)
    window = 0.5 + 0.5 * np.cos(np.pi * time / half)  # Hann's
    cutoffs = cutoffs[:, None]
    filters = 2 * cutoffs * window * np.sinc(2 * cutoffs * time)
    filters = filters / filters.sum(axis=1, keepdims=True)
    with mx.stream(mx.cpu):
        made = mx.array(filters, mx.float32)
        mx.eval(made)
    return made
