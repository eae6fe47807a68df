"""Make the notes that transformers and librosa find in the sounds of sounds.py.

    python make_chroma.py

writes chroma.safetensors. Needs torch, torchaudio, transformers and librosa.
"""

from pathlib import Path

import librosa
import numpy as np
import sounds
import torch
from safetensors.numpy import save_file
from transformers import MusicgenMelodyFeatureExtractor

RATE, WINDOW, HOP = 32000, 16384, 4096


def strengths(audio: np.ndarray) -> np.ndarray:
    """librosa's chroma (T, 12) of samples (N, 1) at 32 kHz."""
    options = dict(n_fft=WINDOW, hop_length=HOP, center=True, pad_mode="reflect")
    power = np.abs(librosa.stft(audio[:, 0], **options)) ** 2
    filters = librosa.filters.chroma(sr=RATE, n_fft=WINDOW, tuning=0)
    return np.ascontiguousarray(librosa.util.normalize(filters @ power, axis=0).T)


def main() -> None:
    extract, expected = MusicgenMelodyFeatureExtractor(), {}
    for rate in (32000, 44100):
        for make in (sounds.sweep, sounds.chords, sounds.noise):
            audio = torch.from_numpy(make(rate).mean(axis=1))
            found = extract(audio, sampling_rate=rate, return_tensors="np")
            notes = found["input_features"][0].argmax(axis=-1)
            expected[f"{make.__name__}_{rate}"] = notes.astype(np.uint8)
    for seed in range(20):
        found = strengths(sounds.noise(RATE, seed, seconds=0.6))
        expected[f"librosa_{seed}"] = found.astype(np.float32)
    save_file(expected, Path(__file__).with_name("chroma.safetensors"))


if __name__ == "__main__":
    main()
