"""Make a tiny random HTDemucs, and what the demucs package computes with it.

    python make_demucs.py [--full DIR]

writes `htdemucs/` beside this file. `--full` writes a model of the published size to
DIR instead, with 20 s of noise and its stems: too large to keep, for a check by hand
(`python make_demucs.py --compare DIR` runs ours on it). Needs torch and demucs 4.1.
"""

import argparse
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
PUBLISHED = {  # what differs from the defaults of the class
    "sources": ["drums", "bass", "other", "vocals"],
    "bottom_channels": 512,
    "dconv_mode": 3,
    "segment": Fraction(39, 5),
}
TINY = PUBLISHED | {
    "channels": 8,
    "bottom_channels": 16,
    "depth": 2,
    "nfft": 256,
    "t_layers": 3,
    "t_heads": 2,
    "samplerate": 4000,
    "segment": Fraction(3, 10),
}


def as_json(value):
    if not isinstance(value, Fraction):
        return value
    parts = {"numerator": value.numerator, "denominator": value.denominator}
    return {"_type": "fraction"} | parts


def make(folder: Path, settings: dict, seconds: float) -> None:
    """A model in the published layout, a sound, and the stems of the original."""
    import torch

    from demucs.apply import apply_model
    from demucs.htdemucs import HTDemucs

    torch.manual_seed(0)
    model = HTDemucs(**settings).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("scale"):  # they begin so small that nothing would show
                weight.uniform_(0.2, 0.8)
            elif weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            weight.copy_(weight.half())
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = json.dumps({name: as_json(value) for name, value in settings.items()})
    about = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": kwargs}
    state = {k: v.half().numpy() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", about)

    mix = 0.3 * torch.randn(1, 2, int(seconds * model.samplerate))
    start = time.perf_counter()
    with torch.no_grad():
        stems = apply_model(model, mix, shifts=0, split=True, overlap=0.25)[0]
    print(f"demucs: {time.perf_counter() - start:.1f} s for {seconds:g} s of audio")
    expected = {"audio": mix[0].T, "stems": stems.transpose(1, 2)}
    expected = {name: x.contiguous().numpy() for name, x in expected.items()}
    place = folder / "expected"
    place.mkdir(exist_ok=True)
    save_file(expected, place / "expected.safetensors")


def compare(folder: Path) -> None:
    """Print how far our stems are from those of the original."""
    sys.path.insert(0, str(HERE.parent))
    from demucs import HTDemucs  # ours

    expected = load_file(folder / "expected" / "expected.safetensors")
    model = HTDemucs.from_pretrained(folder)
    start = time.perf_counter()
    stems = np.array(model.separate(expected["audio"]))
    seconds = len(expected["audio"]) / model.sampling_rate
    print(f"ours: {time.perf_counter() - start:.1f} s for {seconds:g} s of audio")
    error = np.abs(stems - expected["stems"]).max()
    print(f"largest difference {error:.1e} of {np.abs(stems).max():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=Path, help="folder for a model of full size")
    parser.add_argument("--compare", type=Path, help="folder to run ours on")
    args = parser.parse_args()
    if args.compare:
        compare(args.compare)
    elif args.full:
        make(args.full, PUBLISHED, seconds=20)
    else:
        make(HERE / "htdemucs", TINY, seconds=0.75)


if __name__ == "__main__":
    main()
