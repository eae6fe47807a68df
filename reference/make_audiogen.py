"""Make a tiny AudioGen in audiocraft's layout, and what audiocraft's AudioGen makes.

    python make_audiogen.py --audiocraft DIR

writes `audiogen-audiocraft/` beside this file: a decoder, a codec of 16 kHz and T5 in
`t5-large/`, with `expected.safetensors`. Duration and stride are the class's own: 5 s,
and windows of 10 s that slide by 2 s. Needs what make_audiocraft.py needs.
"""

import argparse
import importlib
import json
from pathlib import Path

import make as base
import make_audiocraft
import torch
import transformers
import xpcfg
from safetensors.torch import save_file
from torch import Tensor

import tiny

NAME = "audiogen-audiocraft"
T5 = base.T5 | {"d_model": 32, "d_ff": 48, "num_heads": 3}
LONG = 13.0  # seconds, in three windows
SEAM = slice(490, 520)  # frames around the end of the first window, to be heard
SMALLEST_GAP = 2e-4  # of thousands of choices; between the best two logits

LM_CFG = xpcfg.lm_cfg(False, layers=2, dim=32, heads=2, hidden_scale=1.5, card=64)
CODEC_CFG = xpcfg.codec_cfg(dimension=16, filters=2, bins=64)
CHANGES = {  # from MusicGen's settings to AudioGen's
    "solver: musicgen": "solver: audiogen",
    "sample_rate: 32000": "sample_rate: 16000",
    "segment_duration: 30": "segment_duration: 10",
    "name: t5-base": "name: t5-large",
    "ratios: [8, 5, 4, 4]": "ratios: [8, 5, 4, 2]",
}


def audiogen_cfg(text: str) -> str:
    for old, new in CHANGES.items():
        text = text.replace(old, new)
    return text


def save_part(model, text: str, dtype: torch.dtype, path: Path) -> None:
    torch.save(make_audiocraft.package(model.state_dict(), text, dtype), path)


def save_codec(audiocraft, folder: Path, generator: torch.Generator) -> None:
    from omegaconf import OmegaConf

    text = audiogen_cfg(CODEC_CFG)
    cfg = OmegaConf.create(text)
    cfg.device = "cpu"
    model = audiocraft.builders.get_compression_model(cfg).eval()
    tiny.fill_codec(model, generator)
    codebooks = [layer._codebook for layer in model.quantizer.vq.layers]
    with torch.no_grad():
        latents = model.encoder(tiny.music(1, 16000, generator))
        tiny.fit_codebooks(codebooks, latents, generator)
    save_part(model, text, torch.float32, folder / "compression_state_dict.bin")


def save_lm(audiocraft, folder: Path, generator: torch.Generator) -> None:
    from omegaconf import OmegaConf

    text = audiogen_cfg(LM_CFG)
    cfg = OmegaConf.create(text)
    cfg.device, cfg.dtype = "cpu", "float32"
    model = audiocraft.builders.get_lm_model(cfg)
    tiny.fill(model, generator)
    save_part(model, text, torch.float16, folder / "state_dict.bin")


def load(audiocraft, folder: Path):
    """audiocraft's AudioGen of the files, by its own loaders."""
    module = importlib.import_module("audiocraft.models.audiogen")
    lm = audiocraft.loaders.load_lm_model(str(folder))
    codec = audiocraft.loaders.load_compression_model(str(folder))
    return module.AudioGen("tiny", codec, lm)


@torch.no_grad()
def expect(audiocraft, folder: Path, generator: torch.Generator) -> dict | None:
    model = load(audiocraft, folder)
    gaps, arrays, coef = [], {}, model.generation_params["cfg_coef"]

    def record(module, args, logits):
        with_text, without = logits[:, :, -1]  # (2, K, S, V)
        gaps.append(tiny.smallest_gap(without + (with_text - without) * coef))

    model.lm.register_forward_hook(record)
    model.generation_params["use_sampling"] = False
    rows = [generate(model, prompt) for prompt in base.PROMPTS]
    arrays["codes"] = tiny.int32(torch.cat(rows))
    model.set_generation_params(use_sampling=False, duration=LONG)
    arrays["long_codes"] = tiny.int32(generate(model, base.PROMPTS[0]))
    if min(gaps) < SMALLEST_GAP or any(
        base.dull(codes.flatten(0, 1)) for codes in arrays.values()
    ):
        return None
    for name, frames in ("audio", slice(0, 15)), ("long_audio", SEAM):
        codes = arrays[name.replace("audio", "codes")][:1, :, frames].long()
        arrays[name] = tiny.float32(model.generate_audio(codes))
    sound = tiny.music(1, 2077, generator)
    with tiny.watch_codebooks(audiocraft.codebook.EuclideanCodebook) as closest:
        encoded, _ = model.compression_model.encode(sound)
    if min(closest) < base.SMALLEST_CODE_GAP:
        return None
    arrays |= {"sound": sound, "sound_codes": tiny.int32(encoded)}
    save_file(arrays, folder / "expected.safetensors")
    return {
        "source": "audiocraft",
        "prompts": base.PROMPTS,
        "long": LONG,
        "seam": [SEAM.start, SEAM.stop],
        "smallest_logit_gap": min(gaps),
        "smallest_code_gap": min(closest),
    }


def generate(model, prompt: str) -> Tensor:
    attributes, _ = model._prepare_tokens_and_attributes([prompt], None)
    return model._generate_tokens(attributes, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    audiocraft = make_audiocraft.import_audiocraft(args.audiocraft)
    folder = base.HERE / NAME
    spiece = tiny.tokenizer("identity")
    t5 = base.make_t5(folder / "t5-large", T5, spiece, whole=False)
    make_audiocraft.use_local_files(audiocraft, folder)
    audiocraft.conditioners.T5Conditioner.MODELS_DIMS["t5-large"] = T5["d_model"]

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(3000 + seed)
        save_codec(audiocraft, folder, generator)
        save_lm(audiocraft, folder, generator)
        return expect(audiocraft, folder, generator)

    made = {NAME: base.search(attempt, NAME), f"{NAME}/t5-large": t5}
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | made)


if __name__ == "__main__":
    main()
