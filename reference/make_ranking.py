"""Make the reference values of teacher-forced codes.

    python make_ranking.py --audiocraft DIR

Runs after make.py, on the checkpoints it wrote, and writes `ranking.safetensors`: random
codes, and the log-likelihood of each that audiocraft's `compute_predictions` gives, which
its training uses, with a text and without.
"""

import argparse
from pathlib import Path

import make as base
import make_audiocraft
import torch
from safetensors.torch import save_file

import tiny

FRAMES, ROWS = 12, 2


@torch.no_grad()
def values(audiocraft, name: str) -> dict[str, torch.Tensor]:
    """Codes (B, K, T), and log-likelihoods of that shape."""
    make_audiocraft.use_local_files(audiocraft, base.HERE / name)
    lm = audiocraft.loaders.load_lm_model(str(base.HERE / name))
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, lm.num_codebooks, FRAMES)
    codes = torch.randint(0, lm.card, shape, generator=generator)
    attributes = audiocraft.conditioners.ConditioningAttributes
    arrays = {f"{name}_codes": tiny.int32(codes)}
    for kind, texts in {"text": base.PROMPTS[:ROWS], "null": [None] * ROWS}.items():
        rows = []
        for row, text in zip(codes, texts):  # in a batch it attends to the padding
            conditions = [attributes(text={"description": text})]
            # blanks after the end, as in generating; training would leave these steps out
            how = dict(keep_only_valid_steps=False)
            output = lm.eval().compute_predictions(row[None], conditions, **how)
            assert output.mask.all()
            logs = output.logits.float().log_softmax(-1)
            rows.append(logs.gather(-1, row[None, ..., None])[..., 0])
        arrays[f"{name}_{kind}"] = tiny.float32(torch.cat(rows))
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True)
    audiocraft = make_audiocraft.import_audiocraft(parser.parse_args().audiocraft)
    arrays = {}
    for name in ("mono-audiocraft", "stereo-audiocraft"):
        arrays |= values(audiocraft, name)
    save_file(arrays, base.HERE / "ranking.safetensors")


if __name__ == "__main__":
    main()
