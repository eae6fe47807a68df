"""How loud a sound is, by ITU-R BS.1770-4, and how to make it as loud as wanted.

    python loudness.py take.wav
    python loudness.py take.wav --loudness -14 --output louder.wav

Integrated loudness in LUFS: what streaming services level to, usually -14. Needs
audio.py beside it, which reads and writes the files.
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
BLOCK = 0.4  # seconds, a quarter apart


def biquad(
    b: tuple[float, ...], a: tuple[float, ...], frequencies: np.ndarray, rate: int
) -> np.ndarray:
    """Response of a second-order filter at `frequencies` in Hz."""
    delay = np.exp(-2j * np.pi * frequencies / rate)
    powers = np.stack([np.ones_like(delay), delay, delay**2])
    return (np.array(b) @ powers) / (np.array(a) @ powers)


def k_weighting(frequencies: np.ndarray, rate: int) -> np.ndarray:
    """Response of BS.1770's two filters, a shelf for the head and a high pass.

    The recommendation tabulates them for 48 kHz; these are the analogue filters
    behind the table, by the bilinear transform for any rate.
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
    """(N, C) through the K weighting, ten seconds at a time.

    Each piece is followed by a second of silence, in which the filters, whose
    longest time is 1 / 38 s, fall silent.
    """
    size, tail = 10 * rate, rate
    response = k_weighting(np.fft.rfftfreq(size + tail, 1 / rate), rate)[:, None]
    weighed = np.zeros((len(audio) + size + tail, audio.shape[1]))
    for start in range(0, len(audio), size):
        piece = np.fft.rfft(audio[start : start + size], size + tail, axis=0)
        sound = np.fft.irfft(piece * response, size + tail, axis=0)
        weighed[start : start + size + tail] += sound
    return weighed[: len(audio)]


def integrated_loudness(audio: np.ndarray, rate: int) -> float:
    """Loudness in LUFS of (N, C) samples, mono or left and right.

    -inf for silence. Raises ValueError for less than a block of 0.4 s or more
    than two channels, whose places are not known. ITU-R BS.1770-4, annex 1.
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
    """Loudness in LUFS of K-weighted samples with the mean square `power`."""
    return -0.691 + 10 * math.log10(power) if power > 0 else -math.inf


def to_loudness(audio: np.ndarray, rate: int, loudness: float) -> np.ndarray:
    """(N, C) scaled to `loudness` LUFS; less, with a warning, where it would clip."""
    now = integrated_loudness(audio, rate)
    if now == -math.inf:
        warnings.warn("The sound is silent and stays so.")
        return audio
    gain = 10 ** ((loudness - now) / 20)
    peak = np.abs(audio).max()
    if gain * peak > 1:
        gain = 1 / peak
        reached = now + 20 * math.log10(gain)
        warnings.warn(f"Louder than {reached:.1f} LUFS would clip; that is what it is.")
    return audio * gain


def to_peak(audio: np.ndarray, peak: float) -> np.ndarray:
    """(N, C) scaled to a peak of `peak` dB of full scale; silence stays silent."""
    highest = np.abs(audio).max(initial=0)
    return audio * (10 ** (peak / 20) / highest) if highest > 0 else audio


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure and set loudness.")
    parser.add_argument("source", help="sound file to read, mono or stereo")
    parser.add_argument("--loudness", type=float, help="LUFS to bring it to")
    parser.add_argument("--output", help="sound file to write")
    args = parser.parse_args()
    if (args.loudness is None) != (args.output is None):
        parser.error("--loudness and --output go together")
    try:
        info = soundfile.info(args.source)
        audio = np.array(load_audio(args.source, info.samplerate, info.channels))
        print(f"{args.source}: {integrated_loudness(audio, info.samplerate):.1f} LUFS")
        if args.output:
            louder = to_loudness(audio, info.samplerate, args.loudness)
            save_audio(check_audio_path(args.output), louder, info.samplerate)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"loudness.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
