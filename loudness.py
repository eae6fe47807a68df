"""Loudness by ITU-R BS.1770-4: measure that of a sound, and change it.

    python loudness.py take.wav
    python loudness.py take.wav --loudness -14 --output louder.wav

The measure is the integrated loudness in LUFS. Streaming services bring music to one
level of it, usually -14. Needs audio.py beside it.
"""

import argparse
import math
import sys
import warnings

import numpy as np
import soundfile

from audio import check_audio_path, load_audio, save_audio

ABSOLUTE_GATE = -70.0  # LUFS: quieter blocks are silence
RELATIVE_GATE = -10.0  # LU below the mean: quieter blocks are pauses
BLOCK = 0.4  # seconds; blocks start a quarter of that apart


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


def to_loudness(audio: np.ndarray, rate: int, loudness: float) -> np.ndarray:
    """Scale samples (N, C) to `loudness` LUFS.

    Where they would clip they are scaled to a peak of 1 instead, with a warning.
    Silence stays as it is, with a warning. Raises ValueError as `integrated_loudness`.
    """
    source = integrated_loudness(audio, rate)
    if source == -math.inf:
        warnings.warn("The sound is silent and stays so.")
        return audio
    gain = 10 ** ((loudness - source) / 20)
    peak = np.abs(audio).max()
    if gain * peak > 1:
        gain = 1 / peak
        most = source + 20 * math.log10(gain)
        warnings.warn(
            f"{loudness:g} LUFS would clip. The sound has {most:.1f} LUFS, with a peak "
            "of 1."
        )
    return audio * gain


def to_peak(audio: np.ndarray, peak: float) -> np.ndarray:
    """Scale samples (N, C) to a peak in dB of full scale. Silence stays silent."""
    highest = np.abs(audio).max(initial=0)
    return audio * (10 ** (peak / 20) / highest) if highest > 0 else audio


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and set loudness.")
    parser.add_argument("source", help="sound file to read, mono or stereo")
    parser.add_argument("--loudness", type=float, help="LUFS to bring it to")
    parser.add_argument("--output", help="sound file to write")
    args = parser.parse_args()
    if (args.loudness is None) != (args.output is None):
        parser.error("--loudness and --output must be given together")
    try:
        info = soundfile.info(args.source)
        audio = np.array(load_audio(args.source, info.samplerate, info.channels))
        print(f"{args.source}: {integrated_loudness(audio, info.samplerate):.1f} LUFS")
        if args.output:
            louder = to_loudness(audio, info.samplerate, args.loudness)
            save_audio(check_audio_path(args.output), louder, info.samplerate)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"loudness.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
