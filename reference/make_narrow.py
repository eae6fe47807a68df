"""What transformers computes with models whose widths need no projection.

    python make_narrow.py

writes `narrow.safetensors`, after make.py and make_melody.py: greedy codes of their
models, with decoders cut to the width of T5. transformers makes no `enc_to_dec_proj`
then, and no `audio_enc_to_dec_proj` where chroma is as wide, too. "pairs" is stereo with
two codebooks a channel. The models are not kept: a test cuts them again. Needs what
make_melody.py needs.
"""

import json
import shutil
import tempfile
from pathlib import Path

import make as base
import make_melody
import sounds
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny

WIDTH = 24  # of T5
CASES = {  # name: model, changes of its decoder's config, of the whole config
    "mono": ("mono-transformers", {}, {}),
    "stereo": ("stereo-transformers", {}, {}),
    "pairs": ("mono-transformers", {"audio_channels": 2}, {}),
    "melody": ("melody-transformers", {}, {}),
    "chroma": ("melody-transformers", {}, {"num_chroma": WIDTH}),
}


def cut(name: str, folder: Path, first: int) -> Path:
    """A model whose decoder is as wide as its T5: its features from the `first` on."""
    source, decoder, whole = CASES[name]
    target = Path(shutil.copytree(base.HERE / source, folder / name))
    config = json.loads((target / "config.json").read_text())
    wide = config["decoder"]["hidden_size"]
    config["decoder"] |= {"hidden_size": WIDTH} | decoder
    tiny.write_json(target / "config.json", config | whole)
    kept = slice(first, first + WIDTH)
    left_out = ["enc_to_dec_proj."] + ["audio_enc_to_dec_proj."] * bool(whole)
    state = {}
    for path in (*target.glob("*.safetensors"), *target.glob("*.bin")):
        read = torch.load if path.suffix == ".bin" else load_file
        if path.name != "expected.safetensors":
            state |= read(path)
        path.unlink()
    (target / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    state = {k: w for k, w in state.items() if not k.startswith(tuple(left_out))}
    for key, weight in state.items():
        if key.startswith(("decoder.", "audio_enc_to_dec_proj.")):
            window = tuple(kept if n == wide else slice(n) for n in weight.shape)
            state[key] = weight[window]
    state = {k: w.clone() for k, w in state.items() if "embed_positions" not in k}
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


@torch.no_grad()
def greedy(model, inputs: dict, coef: float) -> tuple[Tensor, float]:
    """Codes (1, K, T) and the closest call."""
    decoder = model.config.decoder
    K, C = decoder.num_codebooks, decoder.audio_channels
    steps = base.FRAMES + K // C - 1
    with base.captured_codes(model) as captured:
        output = model.generate(
            **inputs,
            do_sample=False,
            guidance_scale=coef,
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_scores=True,
        )
    codes = torch.stack(captured, 2).flatten(1, 2)
    assert codes.shape == (1, K, base.FRAMES), codes.shape
    scores = torch.stack(output.scores, 1).unflatten(0, (1, K))  # (1, K, S, V)
    used = [scores[:, k, k // C :][:, : base.FRAMES] for k in range(K)]
    used = torch.stack(used, 1)
    assert (used.argmax(-1) == codes).all()
    return codes, tiny.smallest_gap(used)


def expect(name: str, folder: Path, first: int) -> dict[str, Tensor] | None:
    """Codes of each prompt, with and without guidance, or with a tune each."""
    follows = "melody" in CASES[name][0]
    kind = "MusicgenMelody" if follows else "Musicgen"
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = base.load(model, cut(name, folder, first))
    for projection in ("enc_to_dec_proj", "audio_enc_to_dec_proj"):
        made = projection.startswith("audio") and name == "melody"
        assert hasattr(model, projection) == made
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder / name)
    extract = transformers.MusicgenMelodyFeatureExtractor(
        num_chroma=model.config.num_chroma if follows else 12
    )
    arrays, gaps = {"first": torch.tensor([first])}, []
    for coef in (1.0, 3.0):
        rows = []
        for i, prompt in enumerate(base.PROMPTS[:2]):
            inputs = dict(tokenizer([prompt], return_tensors="pt"))
            if follows:
                tune = sounds.tune(32000, make_melody.TUNES[i])[:, 0]
                found = extract(tune, sampling_rate=32000, return_tensors="pt")
                inputs["input_features"] = found["input_features"]
            codes, gap = greedy(model, inputs, coef)
            rows.append(codes)
            gaps.append(gap)
        arrays[f"g{coef:g}"] = tiny.int32(torch.cat(rows))
    print(f"{name} from {first} on: closest call {min(gaps):.4f}", flush=True)
    if min(gaps) < base.SMALLEST_GAP or make_melody.alike(arrays["g3"]):
        return None
    return {f"{name}_{key}": array for key, array in arrays.items()}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arrays = {}
    for name in CASES:
        for first in range(9):
            with tempfile.TemporaryDirectory() as folder:
                if found := expect(name, Path(folder), first):
                    break
        arrays |= found
    save_file(arrays, base.HERE / "narrow.safetensors")


if __name__ == "__main__":
    main()
