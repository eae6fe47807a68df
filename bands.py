"""Split a sound into bands of frequency, that are as wide to the ear and sum up to it.

    bands = split_bands(sound, sampling_rate=32000, n_bands=8)  # (8, B, N, C)
    mx.abs(bands.sum(axis=0) - sound).max()  # 1e-7 or so

Edges lie evenly on the mel scale. A band is the difference of two low passes, windowed
sincs, as in julius (https://github.com/adefossez/julius). Stands alone.
"""

import functools

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
    Beyond its ends the sound goes on as it begins and ends.

    Block by block: on a CPU `mx.conv1d` copies each sample for each tap, which takes
    14 GB for 30 s at 32 kHz in 32 bands, and it crashes for 60 s.
    """
    (B, N, C), (F, taps) = sound.shape, filters.shape
    rows = sound.swapaxes(1, 2).reshape(B * C, N, 1)
    reach = [(0, 0), (taps // 2, taps // 2), (0, 0)]
    rows, blocks = mx.pad(rows, reach, mode="edge"), []
    for start in range(0, max(N, 1), BLOCK):
        block = rows[:, start : start + BLOCK + taps - 1]
        blocks.append(mx.conv1d(block, filters[..., None]))
        mx.eval(blocks[-1])  # so that its copies go
    low = mx.concatenate(blocks, axis=1)
    return low.reshape(B, C, N, F).transpose(3, 0, 2, 1)


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
