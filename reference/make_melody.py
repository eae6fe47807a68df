"""Make tiny random melody models, and what transformers computes with them.

    python make_melody.py

writes `melody-transformers/` and `stereo-melody-transformers/` beside this file. The
melody is a tune of sounds.py; Demucs has no part in this. Needs torch, torchaudio,
transformers and sentencepiece.
"""

import json
from pathlib import Path

import make as base
import sounds
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

TUNES = [[60, 64, 67, 72, 71], [69, 65, 62, 57, 59, 64]]
CHROMA = {"chroma_length": 9}


def melody_config(stereo: bool) -> dict:
    config = base.CONFIGS["musicgen-stereo-melody" if stereo else "musicgen-melody"]
    config = json.loads(json.dumps(config)) | CHROMA
    config["text_encoder"] |= base.T5
    config["audio_encoder"] |= base.CODEC_INSIDE
    config["decoder"] |= base.DECODER | {"num_hidden_layers": 1 if stereo else 2}
    return config


def make_melody(name: str, stereo: bool, spiece: bytes) -> dict:
    folder, config = base.HERE / name, melody_config(stereo)
    tiny.write_json(folder / "config.json", config)
    special = config["decoder"]["pad_token_id"]
    generation = {"bos_token_id": special, "pad_token_id": special}
    generation |= {"decoder_start_token_id": special, "guidance_scale": 3.0}
    tiny.write_json(folder / "generation_config.json", generation)
    (folder / "spiece.model").write_bytes(spiece)

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(5000 + 1000 * stereo + seed)
        base.save_one(random_melody(config, generator), folder)
        return expect(folder)

    return base.search(attempt, name)


def random_melody(config: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights of a tiny model under the names of the published files."""
    parsed = transformers.MusicgenMelodyConfig.from_dict(config)
    model = transformers.MusicgenMelodyForConditionalGeneration(parsed)
    tiny.fill(model.text_encoder, generator)
    tiny.fill(model.decoder, generator)
    tiny.fill_codec(model.audio_encoder, generator)
    base.fit_codec(model.audio_encoder, 16000, generator)
    for part in (model.enc_to_dec_proj, model.audio_enc_to_dec_proj):
        for name, tensor in part.state_dict().items():
            tensor.copy_(tiny.draw(name, tensor.shape, generator))
    state = base.published(model.state_dict())
    state.pop("text_encoder.encoder.embed_tokens.weight")
    return state


def expect(folder: Path) -> dict | None:
    """Greedy codes of text with each tune, and of text alone; one prompt at a time,
    since in a batch transformers attends the padding."""
    model = base.load(transformers.MusicgenMelodyForConditionalGeneration, folder)
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    extract = transformers.MusicgenMelodyFeatureExtractor()
    arrays, gaps = {}, []
    for which, notes in (*enumerate(TUNES), ("none", None)):
        rows = []
        for prompt in base.PROMPTS[:2]:
            inputs = dict(tokenizer([prompt], return_tensors="pt"))
            if notes is not None:
                tune = sounds.tune(32000, notes)[:, 0]
                found = extract(tune, sampling_rate=32000, return_tensors="pt")
                inputs["input_features"] = found["input_features"]
            codes, audio, gap = base.greedy(model, inputs, 3.0)
            rows.append(codes)
            gaps.append(gap)
            if gap < base.SMALLEST_GAP:
                return None
        arrays[f"tune_{which}_codes"] = tiny.int32(torch.cat(rows))
    every = torch.cat(list(arrays.values()))
    if base.dull(every.flatten(0, 1)) or alike(every):
        return None
    save_file(arrays, folder / "expected.safetensors")
    return {"tunes": TUNES, "smallest_logit_gap": min(gaps)}


def alike(rows: Tensor) -> bool:
    """Whether a prompt or a melody changes little."""
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    return any((a != b).float().mean() < 0.2 for a, b in pairs)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spiece = tiny.tokenizer("identity")
    about = {}
    for name, stereo in ("melody-transformers", False), (
        "stereo-melody-transformers",
        True,
    ):
        about[name] = make_melody(name, stereo, spiece)
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | about)


if __name__ == "__main__":
    main()
