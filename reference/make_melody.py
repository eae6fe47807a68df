"""Make tiny random melody models, and what the originals compute with them.

    python make_melody.py --audiocraft DIR

writes `melody-transformers/`, `stereo-melody-transformers/` and `melody-audiocraft/`
beside this file, after make.py. The melodies are tunes of sounds.py; Demucs has no
part in this. Needs what make.py needs, torchaudio and librosa.
"""

import argparse
import json
import types
from pathlib import Path

import make as base
import make_audiocraft
import sounds
import torch
import transformers
import xpcfg
from safetensors.torch import save_file
from torch import Tensor

import tiny

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
    projections = [model.enc_to_dec_proj, model.audio_enc_to_dec_proj]
    return base.random_state(model, projections, generator)


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


# audiocraft

SECONDS = 1  # of a window, and so 8 frames of chroma
LONG, STRIDE, FRAME_RATE = 80, 30, 50
CHROMA_STEM = """
  self_wav:
    model: chroma_stem
    chroma_stem:
      sample_rate: ${sample_rate}
      n_chroma: 12
      radix2_exp: 14
      argmax: true
      match_len_on_eval: false
      eval_wavs: null
      n_eval_wavs: 100
      cache_path: null
"""


def lm_cfg() -> str:
    text = xpcfg.lm_cfg(False, 2, dim=32, heads=2, hidden_scale=1.5, card=64)
    for old, new in (
        ("segment_duration: 30", f"segment_duration: {SECONDS}"),
        (
            "  prepend: []\n  cross:\n  - description\n",
            "  prepend: [self_wav, description]\n  cross: []\n",
        ),
        ("conditioners:\n", "conditioners:" + CHROMA_STEM),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def import_audiocraft(checkout: Path):
    """With a Demucs that gives the sound as it is."""
    for name in ("librosa", "torchaudio"):
        make_audiocraft.STAND_INS.remove(name)
    audiocraft = make_audiocraft.import_audiocraft(checkout)
    import demucs

    same = types.SimpleNamespace(sources=["drums", "bass", "other", "vocals"])
    same.to = lambda device: same
    demucs.pretrained.get_model = lambda name: same
    stem = audiocraft.conditioners.ChromaStemConditioner
    stem._get_stemmed_wav = lambda self, wav, rate: wav
    return audiocraft


def make_by_audiocraft(audiocraft, spiece: bytes) -> dict:
    folder = base.HERE / "melody-audiocraft"
    t5 = base.make_t5(folder / "t5-base", base.T5, spiece, whole=True)
    make_audiocraft.use_local_files(audiocraft, folder)

    @torch.no_grad()
    def attempt(seed: int) -> dict | None:
        from omegaconf import OmegaConf

        generator = torch.Generator().manual_seed(7000 + seed)
        make_audiocraft.save_pointer(folder, generator)
        cfg = OmegaConf.create(lm_cfg())
        cfg.device, cfg.dtype = "cpu", "float32"
        model = audiocraft.builders.get_lm_model(cfg)
        tiny.fill(model, generator)
        package = (model.state_dict(), lm_cfg(), torch.float16)
        torch.save(make_audiocraft.package(*package), folder / "state_dict.bin")
        return audiocraft_values(audiocraft, folder)

    return {"melody-audiocraft": base.search(attempt, "melody-audiocraft")} | {
        "melody-audiocraft/t5-base": t5
    }


def audiocraft_values(audiocraft, folder: Path) -> dict | None:
    """Greedy codes with a tune and without, in one window and in several."""
    lm = audiocraft.loaders.load_lm_model(str(folder))
    codec = audiocraft.loaders.load_compression_model(str(folder))
    conditioner = lm.condition_provider.conditioners["self_wav"]
    conditioner.match_len_on_eval = True  # as MusicGen.get_pretrained does
    conditioner._use_masking = False
    model = audiocraft.musicgen.MusicGen("tiny", codec, lm, max_duration=30)
    model.max_duration = SECONDS  # less than its default stride allows
    arrays, scores = {}, []

    def record(module, args, logits):
        with_text, without = logits[:, :, -1]  # (2, K, S, V)
        scores.append(without + (with_text - without) * 3.0)

    hook = lm.register_forward_hook(record)
    for frames in (base.FRAMES, LONG):
        model.set_generation_params(
            use_sampling=False,
            duration=(frames + 0.5) / FRAME_RATE,
            extend_stride=STRIDE / FRAME_RATE,
            cfg_coef=3.0,
        )
        for which, notes in (*enumerate(TUNES), ("none", None)):
            rows = []
            for prompt in base.PROMPTS[:2]:
                tune = None
                if notes is not None:
                    tune = torch.from_numpy(sounds.tune(32000, notes)).T
                options = dict(prompt=None, melody_wavs=[tune])
                attributes, _ = model._prepare_tokens_and_attributes(
                    [prompt], **options
                )
                rows.append(model._generate_tokens(attributes, None))
            arrays[f"tune_{which}_{frames}"] = tiny.int32(torch.cat(rows))
    hook.remove()
    short = [v for k, v in arrays.items() if k.endswith(f"_{base.FRAMES}")]
    if alike(torch.cat(short)) or tiny.smallest_gap(torch.stack(scores)) < 1e-3:
        return None
    save_file(arrays, folder / "expected.safetensors")
    return {"frames": [base.FRAMES, LONG], "stride": STRIDE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audiocraft", type=Path, required=True, help="a checkout")
    args = parser.parse_args()
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
    about |= make_by_audiocraft(import_audiocraft(args.audiocraft), spiece)
    path = base.HERE / "expected.json"
    tiny.write_json(path, json.loads(path.read_text()) | about)


if __name__ == "__main__":
    main()
