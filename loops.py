"""Loops: so many bars of a take that repeat without a click.

    beat = Beat(120)
    codes = model.generate_codes("techno, 120 bpm", duration=loop_seconds(beat, 4) + 4)
    first = best_cut(model, "techno, 120 bpm", codes, frames(model, beat, 4))
    audio = decode_round(model, codes[:, first : first + L], samples(model, beat, 4))

A take is longer than its loop. The places where the loop may begin are ranked by how
likely the wrap is: where the model, after the loop's last frame, would go on with its
first ones. The likeliest few of them are decoded over the wrap, and that one is taken
whose sound has the least there that is not around it. The codec decodes the loop round
the corner, so that it hears the end before the beginning and the beginning after the
end. A loop of whole frames is seldom as long as so many beats: it is resampled to the
sample, by less than a frame, and as the circle that it is.

`write_loop_points` puts the loop into a wav, for samplers. Needs beat.py beside it;
ranking.py, and what that needs, to find the cut.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from beat import Beat

if TYPE_CHECKING:
    from musicgen import MusicGen

BEFORE, AFTER = 4.0, 1.0  # seconds around the wrap: what is given, what is to follow
LEAST_SPARE = 2.0  # seconds that a take is longer than its loop, or a bar
AROUND = 2.0  # seconds of the loop that the codec hears before its beginning
CUTS = 32  # places that are tried, at most
DECODED = 6  # of so many places the likeliest one is decoded: 5 of 32
SPLASH, BESIDE = 0.02, 0.12  # seconds over the wrap, and on either side of it


def loop_samples(beat: Beat, bars: float, sampling_rate: int) -> int:
    """Samples of so many bars."""
    return round(beat.bars(bars) * sampling_rate)


def loop_frames(beat: Beat, bars: float, frame_rate: int) -> int:
    """The whole frames that are nearest to so many bars, at least one."""
    return max(round(beat.bars(bars) * frame_rate), 1)


def take_seconds(beat: Beat, bars: float) -> float:
    """Seconds of a take that a loop of so many bars is cut out of."""
    return beat.bars(bars) + max(beat.bars(1), LEAST_SPARE)


def check_loop(beat: Beat | None, bars: float | None, duration: float) -> None:
    """Raise ValueError for a loop that is longer than its take."""
    if bars is not None and beat.bars(bars) > duration + 1e-9:
        raise ValueError(
            f"A loop of {bars:g} bars is {beat.bars(bars):g} s long, more than the "
            f"duration allows, {duration:g} s."
        )


def cut_scores(
    model: "MusicGen", prompt: str, codes: mx.array, frames: int, firsts: list[int]
) -> mx.array:
    """Log-likelihoods (len(firsts),) of the wraps of loops that begin at these frames
    of codes (1, T, K), per code in nats: how likely their first frames are after their
    last ones."""
    from ranking import log_likelihood

    follow = min(model.frames_in(AFTER), frames, model.longest_window // 2)
    before = min(model.frames_in(BEFORE), frames, model.longest_window - follow)
    rows = []
    for first in firsts:
        loop = codes[0, first : first + frames]
        rows.append(mx.concatenate([loop[frames - before :], loop[:follow]]))
    text = getattr(prompt, "texts", [prompt])[0]  # the beginning is the first section's
    return log_likelihood(model, text, mx.stack(rows), before)


def best_cut(
    model: "MusicGen", prompt: str, codes: mx.array, frames: int
) -> tuple[int, float]:
    """The frame of codes (1, T, K) at which the best loop of so many frames begins, and
    the log-likelihood of its wrap: of the likeliest sixth of the places, the one whose
    sound has the smallest `splash`. With sections it begins at the first one. Raises
    ValueError where the take is shorter."""
    spare = codes.shape[1] - frames
    if spare < 0:
        raise ValueError(
            f"The loop of {frames / model.frame_rate:g} s must not be longer than the "
            f"take, {codes.shape[1] / model.frame_rate:g} s."
        )
    if hasattr(prompt, "sections"):
        spare = 0
    firsts = sorted({round(x) for x in np.linspace(0, spare, min(CUTS, spare + 1))})
    scores = cut_scores(model, prompt, codes, frames, firsts).tolist()
    ranked = sorted(zip(firsts, scores), key=lambda cut: -cut[1])
    likeliest = ranked[: max(len(ranked) // DECODED, 1)]
    splashes = cut_splashes(model, codes, frames, [first for first, _ in likeliest])
    return likeliest[int(np.argmin(splashes))]


def cut_splashes(
    model: "MusicGen", codes: mx.array, frames: int, firsts: list[int]
) -> list[float]:
    """The `splash` of each loop that begins at one of these frames of codes (1, T, K)."""
    before, after = map(model.frames_in, (AROUND, 0.3))  # that the codec hears
    around = np.arange(-before, after) % frames
    rows = codes[0][mx.array(np.add.outer(firsts, around))]
    audio = np.array(model.decode(rows), np.float64)  # (len(firsts), N, C)
    wrap = before * model.config.audio_encoder.hop_length
    return [splash(sound, wrap, model.sampling_rate) for sound in audio]


def splash(sound: np.ndarray, wrap: int, sampling_rate: int) -> float:
    """How much more there is over the wrap, a sample of a sound (N, C), than beside it,
    in dB: 20 ms across it against the mean of those within 0.12 s, in the mean of all
    half-octave bands.

    A click is in all bands at once, a note that begins there in many, and one that goes
    on in none.
    """
    size = 2 * round(SPLASH * sampling_rate / 2)
    half, steps = size // 2, round(2 * BESIDE / SPLASH)
    starts = wrap - half + half * np.arange(-steps, steps + 1)
    parts = np.stack([sound[start : start + size] for start in starts])
    power = np.abs(np.fft.rfft(parts * np.hanning(size)[:, None], axis=1)) ** 2
    edges = np.unique((half / 2 ** np.arange(0.5, np.log2(half), 0.5)).astype(int))
    bands = np.add.reduceat(power.sum(axis=2), edges, axis=1)
    levels = 10 * np.log10(bands + 1e-3)  # (parts, bands)
    beside = np.delete(levels, [steps - 1, steps, steps + 1], axis=0)
    return float((levels[steps] - beside.mean(axis=0)).mean())


def decode_round(
    model: "MusicGen",
    codes: mx.array,
    count: int,
    decode: Callable[[mx.array], mx.array] | None = None,
) -> mx.array:
    """The sound (count, C) of a loop's codes (1, T, K), as it is heard when it has been
    repeated for a while; by the model's own `decode`, or another one."""
    T, hop = codes.shape[1], model.config.audio_encoder.hop_length
    before = model.frames_in(AROUND)
    times = -(-before // T)
    after = model.frames_in(min(AROUND, 0.2))
    around = mx.concatenate([codes] * (times + 1 + -(-after // T)), axis=1)
    audio = (decode or model.decode)(around[:, : (times + 1) * T + after])[0]
    return resample_circle(audio[times * T * hop : (times + 1) * T * hop], count)


def resample_circle(audio: mx.array, count: int) -> mx.array:
    """Samples (N, C) of a sound that repeats -> (count, C), by its Fourier series."""
    N = len(audio)
    if N == count:
        return audio
    series = np.fft.rfft(np.array(audio, np.float64), axis=0)
    bins = min(N, count) // 2 + 1
    kept = np.zeros((count // 2 + 1, series.shape[1]), complex)
    kept[:bins] = series[:bins]
    if min(N, count) % 2 == 0:  # the highest frequency, which has no phase of its own
        kept[bins - 1] = 0
    sound = np.fft.irfft(kept, count, axis=0) * (count / N)
    return mx.array(sound.astype(np.float32))


def write_loop_points(path: str | Path, count: int, sampling_rate: int) -> None:
    """Add a `smpl` chunk to a wav that is one loop of `count` samples, played for ever.

    Written as in Microsoft's "New Multimedia Data Types and Data Techniques" of 1994.
    """
    period = round(1e9 / sampling_rate)  # of a sample, in ns
    middle_c, forever, forward = 60, 0, 0
    head = struct.pack("<9I", 0, 0, period, middle_c, 0, 0, 0, 1, 0)
    loop = struct.pack("<6I", 0, forward, 0, count - 1, 0, forever)
    with open(path, "r+b") as file:
        size = file.seek(0, 2)
        file.write(b"\0" * (size % 2))
        file.write(b"smpl" + struct.pack("<I", len(head + loop)) + head + loop)
        end = file.tell()
        file.seek(4)
        file.write(struct.pack("<I", end - 8))
