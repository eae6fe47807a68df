"""Loudness by ITU-R BS.1770-4: measure that of a sound, and change it.

    python loudness.py take.wav
    python loudness.py take.wav --loudness -14 --output louder.wav

The measure is the integrated loudness in LUFS. Streaming services bring music to one
level of it, usually -14. A limiter keeps peaks from standing in the way. Needs audio.py,
resample.py and outputs.py beside it.
"""

import argparse
import math
import sys
import warnings

import numpy as np

from audio import check_output, read_sound, save_audio
from outputs import print_out, print_result
from resample import peaks_between, to_numpy, true_peak

ABSOLUTE_GATE = -70.0  # LUFS: quieter blocks are silence
RELATIVE_GATE = -10.0  # LU below the mean: quieter blocks are pauses
BLOCK = 0.4  # seconds; blocks start a quarter of that apart
CEILING = -1.0  # dB of full scale: the highest true peak of what is brought to a level
LOOK_AHEAD = 0.004  # seconds before a peak in which the limiter closes
RECOVERY = 40.0  # dB a second by which it opens again
STEP = 3.0  # dB by which it is driven on at once
WORTH = 0.2  # dB of loudness for each dB of gain: for less it is not driven on


def biquad(
    b: tuple[float, ...], a: tuple[float, ...], frequencies: np.ndarray, rate: int
) -> np.ndarray:
    """Complex response of the filter b(z) / a(z) at `frequencies` (F,) in Hz."""
    delay = np.exp(-2j * np.pi * frequencies / rate)
    powers = np.stack([np.ones_like(delay), delay, delay**2])
    return (np.array(b) @ powers) / (np.array(a) @ powers)


def k_weighting(frequencies: np.ndarray, rate: int) -> np.ndarray:
    """Response of BS.1770's two filters at `frequencies` (F,) in Hz.

    They are a high shelf, for the effect of the head, and a high pass. The
    recommendation tabulates them for 48 kHz only. These are the analogue filters behind
    its table, brought to any rate by the bilinear transform.
    """
    gain, slope, quality = (
        10 ** (3.999843853973347 / 20),
        0.4996667741545416,
        0.70717524,
    )
    k = math.tan(math.pi * 1681.974450955533 / rate)
    edge = gain**slope
    norm = 1 + k / quality + k * k
    shelf = (
        (gain + edge * k / quality + k * k) / norm,
        2 * (k * k - gain) / norm,
        (gain - edge * k / quality + k * k) / norm,
    )
    poles = (1.0, 2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm)
    response = biquad(shelf, poles, frequencies, rate)

    quality = 0.5003270373238773
    k = math.tan(math.pi * 38.13547087602444 / rate)
    norm = 1 + k / quality + k * k
    poles = (1.0, 2 * (k * k - 1) / norm, (1 - k / quality + k * k) / norm)
    return response * biquad((1.0, -2.0, 1.0), poles, frequencies, rate)


def weigh(audio: np.ndarray, rate: int) -> np.ndarray:
    """Filter samples (N, C) by the K weighting, ten seconds at a time.

    A second of silence is appended to each piece. The filters, whose longest time
    constant is about 1 / 38 s, ring out in it, and what they give there is added to the
    next piece.
    """
    size, tail = 10 * rate, rate
    response = k_weighting(np.fft.rfftfreq(size + tail, 1 / rate), rate)[:, None]
    output = np.zeros((len(audio) + size + tail, audio.shape[1]))
    for start in range(0, len(audio), size):
        piece = np.fft.rfft(audio[start : start + size], size + tail, axis=0)
        sound = np.fft.irfft(piece * response, size + tail, axis=0)
        output[start : start + size + tail] += sound
    return output[: len(audio)]


def integrated_loudness(audio: np.ndarray, rate: int) -> float:
    """Loudness in LUFS of samples (N, C), mono or stereo; -inf for silence.

    Raises ValueError for less than a block of 0.4 s, and for more than two channels,
    since their weights depend on where the speakers stand. ITU-R BS.1770-4, annex 1.
    """
    size, step = round(BLOCK * rate), round(BLOCK * rate / 4)
    if len(audio) < size or audio.shape[1] > 2:
        raise ValueError(
            f"Loudness needs {BLOCK} s or more of 1 or 2 channels, got "
            f"{len(audio) / rate:g} s of {audio.shape[1]}."
        )
    power = (weigh(np.asarray(audio, np.float64), rate) ** 2).sum(axis=1)
    total = np.concatenate([[0.0], np.cumsum(power)])
    starts = np.arange(0, len(audio) - size + 1, step)
    blocks = (total[starts + size] - total[starts]) / size
    for gate in (ABSOLUTE_GATE, None):
        if gate is None and len(blocks):
            gate = decibels(blocks.mean()) + RELATIVE_GATE
        blocks = blocks[[decibels(block) > gate for block in blocks]]
    return decibels(blocks.mean()) if len(blocks) else -math.inf


def decibels(power: float) -> float:
    """Loudness in LUFS of K-weighted samples whose mean square is `power`."""
    return -0.691 + 10 * math.log10(power) if power > 0 else -math.inf


def to_loudness(
    audio: np.ndarray, rate: int, loudness: float, name: object = "The sound"
) -> np.ndarray:
    """Bring samples (N, C) to `loudness` LUFS.

    They are scaled. Where peaks stand in the way, which must stay below CEILING, a
    limiter lowers these, and a warning tells by how much, and what was missed. Silence
    stays as it is, with a warning. Warnings call the sound by its `name`. Raises
    ValueError as `integrated_loudness`.
    """
    audio = to_numpy(audio)
    source = integrated_loudness(audio, rate)
    if source == -math.inf:
        warnings.warn(f"{name} is silent and stays so.")
        return audio
    gain = from_decibels(loudness - source)
    if gain * true_peak(audio) <= from_decibels(CEILING):
        return audio * gain
    louder, lowered = limit(audio * gain, rate)
    reached, rise = integrated_loudness(louder, rate), 1.0
    for _ in range(30):  # the gain makes up for what the limiter took
        if abs(loudness - reached) < 0.02:
            break
        more = max(min((loudness - reached) / rise, STEP), -STEP)
        gain *= from_decibels(more)
        harder = limit(audio * gain, rate)
        found = integrated_loudness(harder[0], rate)
        rise = (found - reached) / more
        if rise < WORTH:
            break
        (louder, lowered), reached = harder, found
    told = f"a limiter lowered its peaks by up to {lowered:.1f} dB"
    if abs(loudness - reached) < 0.1:
        warnings.warn(f"{name} is at {loudness:g} LUFS: {told}.")
    else:
        warnings.warn(
            f"{name} missed {loudness:g} LUFS and is at {reached:.1f}: {told}, and more "
            "would hardly make it louder."
        )
    return louder


def from_decibels(decibels: float) -> float:
    """The factor of an amplitude."""
    return 10 ** (decibels / 20)


def limit(audio: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """Samples (N, C) with no true peak above CEILING, and the most dB that were taken.

    All channels are lowered alike. A peak is lowered from LOOK_AHEAD before it on, and
    the sound comes back by RECOVERY after it.
    """
    ceiling, lowered = from_decibels(CEILING), np.ones(len(audio))
    for _ in range(10):  # the lowered sound may have new peaks between its samples
        peaks = peaks_between(audio * lowered[:, None])
        if peaks.max(initial=0) <= ceiling * 1.0001:
            break
        before = np.concatenate([peaks[:1], peaks[:-1]])  # beside a sample, too
        needed = ceiling * 0.9999 / np.maximum(np.maximum(peaks, before), ceiling)
        lowered = lowered * smooth(needed, rate)
    lowered = lowered * min(1, ceiling / max(true_peak(audio * lowered[:, None]), 1e-9))
    return audio * lowered[:, None], -20 * math.log10(lowered.min(initial=1))


def smooth(factors: np.ndarray, rate: int) -> np.ndarray:
    """A curve (N,) nowhere above `factors` (N,), which are at most 1.

    It holds the least of what is near, comes back by so many dB a second, and is a mean
    over all that is near.
    """
    reach = max(round(LOOK_AHEAD * rate), 1)
    decibels = np.pad(20 * np.log10(factors), 2 * reach)
    least, span = decibels, 1  # of each place the least of so many from it on
    while span < 2 * reach + 1:
        step = min(span, 2 * reach + 1 - span)
        least, span = np.minimum(least[:-step], least[step:]), span + step
    slope = RECOVERY / rate * np.arange(len(least))
    least = np.minimum.accumulate(least - slope) + slope
    window = np.hanning(2 * reach + 3)[1:-1]
    return 10 ** (np.convolve(least, window / window.sum(), "valid") / 20)


def to_peak(audio: np.ndarray, peak: float) -> np.ndarray:
    """Scale samples (N, C) to a true peak in dB of full scale. Silence stays silent."""
    audio = to_numpy(audio)
    highest = true_peak(audio)
    return audio * (from_decibels(peak) / highest) if highest > 0 else audio


def warn(message: Warning | str, *_) -> None:
    print(f"loudness.py: warning: {message}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = argparse.ArgumentParser(description="Measure and set loudness.")
    add = parser.add_argument
    add("source", help="sound file to read, mono or stereo")
    add("--loudness", type=float, help="LUFS to bring it to")
    add("--output", help="sound file to write")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args()
    if (args.loudness is None) != (args.output is None):
        parser.error("--loudness and --output must be given together")
    try:
        if args.output:
            check_output(args.output, args.source, args.force)
        audio, rate = read_sound(args.source)
        tell = print_out if args.output else print_result
        tell(f"{args.source}: {integrated_loudness(audio, rate):.1f} LUFS")
        if args.output:
            louder = to_loudness(audio, rate, args.loudness, args.output)
            written = dict(overwrite=args.force, ceiling=CEILING)
            save_audio(args.output, louder, rate, **written)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"loudness.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
