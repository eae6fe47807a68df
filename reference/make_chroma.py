"""Make the notes that the originals find in the sounds of sounds.py.

    python make_chroma.py --audiocraft DIR

writes chroma.safetensors, by transformers and librosa, and chroma-audiocraft.safetensors,
by audiocraft's conditioner under settings that no published model has. Needs what
make_melody.py needs; Demucs has no part in this.
"""

import argparse
import json
from pathlib import Path

import librosa
import make_melody
import numpy as np
import sounds
import torch
from omegaconf import OmegaConf
from safetensors.numpy import save_file
from transformers import MusicgenMelodyFeatureExtractor

RATE, WINDOW, HOP = 32000, 16384, 4096
HERE = Path(__file__).resolve().parent

SECONDS = 1  # of a window of audiocraft's
SETTINGS = {  # of chroma_stem, beside or instead of the published ones
    "radix2_exp": {"radix2_exp": 12},
    "n_chroma": {"n_chroma": 24},
    "argmax": {"argmax": False},
    "few": {"n_chroma": 7, "argmax": False},
    "all": {"n_chroma": 36, "radix2_exp": 13, "argmax": False},
    "window": {"radix2_exp": 16},  # more than there is of sound
}
TUNES = {  # cut to the window, and repeated to fill it
    "long": ([60, 64, 67, 72, 71, 69], 0.5),
    "short": ([62, 69, 65], 0.2),
}


def strengths(audio: np.ndarray) -> np.ndarray:
    """librosa's chroma (T, 12) of samples (N, 1) at 32 kHz."""
    options = dict(n_fft=WINDOW, hop_length=HOP, center=True, pad_mode="reflect")
    power = np.abs(librosa.stft(audio[:, 0], **options)) ** 2
    filters = librosa.filters.chroma(sr=RATE, n_fft=WINDOW, tuning=0)
    return np.ascontiguousarray(librosa.util.normalize(filters @ power, axis=0).T)


def published() -> dict[str, np.ndarray]:
    """Notes by transformers, and chroma by librosa."""
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
    return expected


def conditioner(audiocraft, settings: dict) -> torch.nn.Module:
    """audiocraft's, as MusicGen.get_pretrained makes it of a checkpoint's settings."""
    cfg = OmegaConf.create(make_melody.lm_cfg())
    cfg.device, cfg.dataset.segment_duration = "cpu", SECONDS
    cfg.conditioners.self_wav.chroma_stem.update(settings)
    del cfg.conditioners.description
    provider = audiocraft.builders.get_conditioner_provider(8, cfg)
    stem = provider.conditioners["self_wav"].eval()
    stem.match_len_on_eval, stem._use_masking = True, False
    return stem


@torch.no_grad()
def under_settings(audiocraft) -> dict[str, np.ndarray]:
    """Chroma (T, n_chroma) of tunes and of no sound, cut or repeated to a window."""
    arrays = {}
    waves = {name: sounds.tune(RATE, *tune) for name, tune in TUNES.items()}
    waves["none"] = np.zeros((1, 1), np.float32)
    for name, settings in SETTINGS.items():
        stem = conditioner(audiocraft, settings)
        for which, wave in waves.items():
            length = torch.tensor([0 if which == "none" else len(wave)])
            wav = torch.from_numpy(wave.T)[None]
            condition = audiocraft.conditioners.WavCondition(
                wav, length, sample_rate=[RATE], path=[None]
            )
            chroma = stem._get_wav_embedding(condition)
            _, mask = stem(condition)
            assert mask.all() and chroma.shape[1] == stem.chroma_len
            chroma = chroma[0].numpy().copy()
            one_hot = settings.get("argmax", True)
            arrays[f"{name}_{which}"] = chroma.astype(np.uint8) if one_hot else chroma
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True, help="a checkout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    save_file(published(), HERE / "chroma.safetensors")
    audiocraft = make_melody.import_audiocraft(args.audiocraft)
    about = {"seconds": SECONDS, "settings": SETTINGS, "tunes": TUNES}
    about = {name: json.dumps(value) for name, value in about.items()}
    path = HERE / "chroma-audiocraft.safetensors"
    save_file(under_settings(audiocraft), path, metadata=about)


if __name__ == "__main__":
    main()
