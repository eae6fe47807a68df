"""Make tiny PEFT adapters, and what transformers computes with them.

    python make_peft.py

writes the folders of `peft/` beside this file, after make.py and make_melody.py: the
adapters as PEFT saves them, and in `expected.safetensors` greedy codes and logits at
several scales. `ours-*` hold adapters that train.py wrote for PEFT; of these only
`expected.safetensors` is made (README.md tells how they were trained). Needs torch, transformers and peft.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import make as base
import peft
import sounds
import torch
import transformers
from make_melody import TUNES
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

import tiny

SCALES = (0.0, 0.5, 1.0)
LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TEXT = ["k", "v", "q", "o", "wi", "wo"]
MONO, STEREO, MELODY = (f"{name}-transformers" for name in ("mono", "stereo", "melody"))


def tables(count: int) -> list[str]:
    """Heads and embeddings, as musicgen-dreamboothing names them."""
    return [
        f"{name}.{k}" for name in ("lm_heads", "embed_tokens") for k in range(count)
    ]


PATTERNS = {
    "rank_pattern": {"fc1": 3, r"layers\.1\.self_attn\.q_proj": 1},
    "alpha_pattern": {"fc1": 2, "decoder.lm_heads.0": 7, r".*SelfAttention\.q": 5},
}
CASES = {  # folder: the model, what PEFT is told
    "mono": (
        MONO,
        dict(
            r=2, lora_alpha=3, target_modules=LAYERS + tables(4) + ["enc_to_dec_proj"]
        ),
    ),
    "mono-text": (
        MONO,
        dict(
            r=2,
            lora_alpha=4,
            use_rslora=True,
            target_modules=LAYERS + TEXT + tables(4),
            **PATTERNS,
        ),
    ),
    "mono-saved": (
        MONO,
        dict(
            r=2,
            lora_alpha=2,
            bias="all",
            target_modules=["q_proj", "v_proj", "relative_attention_bias"],
            modules_to_save=[
                "enc_to_dec_proj",
                "k_proj",
                "lm_heads.2",
                "embed_tokens.1",
            ],
        ),
    ),
    "mono-bias": (
        MONO,
        dict(
            r=2,
            lora_alpha=2,
            bias="lora_only",
            target_modules=r".*(enc_to_dec_proj|fc2|lm_heads\.3)",
        ),
    ),
    "stereo": (
        STEREO,
        dict(
            r=2, lora_alpha=3, target_modules=LAYERS + tables(8) + ["enc_to_dec_proj"]
        ),
    ),
    "melody": (
        MELODY,
        dict(
            r=2,
            lora_alpha=3,
            target_modules=LAYERS
            + tables(4)
            + ["enc_to_dec_proj", "audio_enc_to_dec_proj"],
        ),
    ),
    "mono-shared": (  # T5's encoder goes on with its own embed_tokens
        MONO,
        dict(r=2, lora_alpha=5, target_modules=["fc1"], modules_to_save=["shared"]),
    ),
}
MATCHED = (  # settings, of which PEFT tells the modules
    dict(target_modules=["fc1", "decoder.lm_heads.0", "q"]),
    dict(target_modules=["c1", "encoder_attn.k_proj"]),
    dict(target_modules=r".*decoder.*(q_proj|fc1)"),
    dict(target_modules=r"[a-z]+\.lm_heads\.[01]"),
    dict(target_modules=LAYERS, exclude_modules=["fc1", "layers.0.self_attn.q_proj"]),
    dict(target_modules=LAYERS, exclude_modules=r".*layers\.0\.encoder_attn\.q_proj"),
    dict(target_modules=LAYERS, layers_to_transform=[1]),
    dict(target_modules=[*LAYERS, "lm_heads.0"], layers_to_transform=0),
    dict(target_modules=LAYERS, layers_to_transform=[]),
    dict(
        target_modules=[*LAYERS, "wi", "decoder.model.decoder.layers.0.fc1"],
        layers_to_transform=1,
        layers_pattern=["block", "layers"],
    ),
    dict(target_modules=["wi", "fc1"], layers_to_transform=[0], layers_pattern="block"),
    dict(target_modules=LAYERS, modules_to_save=["fc1", "decoder.layers.1"]),
    dict(target_modules="all-linear"),
)


def load(name: str) -> nn.Module:
    kind = transformers.MusicgenForConditionalGeneration
    if name == MELODY:
        kind = transformers.MusicgenMelodyForConditionalGeneration
    return base.load(kind, base.HERE / name)


@torch.no_grad()
def draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all that PEFT would train."""
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if "lora_" not in name:  # a whole module, or a bias
            std = 0.25 * max(tensor.std().item(), 0.125) if tensor.numel() > 1 else 0.1
            tensor += tiny.grid_normal(tensor.shape, std, generator)
        elif "lora_embedding_A" in name:
            tensor.copy_(tiny.grid_normal(tensor.shape, 0.5, generator))
        elif "lora_A" in name:
            std = tensor.shape[1] ** -0.5
            tensor.copy_(tiny.grid_normal(tensor.shape, std, generator))
        else:
            tensor.copy_(tiny.grid_normal(tensor.shape, 0.3, generator))


def scaled(name: str, folders: list[Path], scales: list[float]) -> nn.Module:
    """The model with adapters, each weighted: PEFT's own layers where all is low-rank,
    else a blend of the weights with and without."""
    if all(low_rank(folder) for folder in folders):
        model = peft.PeftModel.from_pretrained(load(name), folders[0], "0")
        check_loaded(model, folders[0])
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, str(i))
        adapters = [str(i) for i in range(len(folders))]
        model.base_model.set_adapter(adapters)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for adapter, scale in zip(adapters, scales):
                    if adapter in module.scaling:
                        module.set_scale(adapter, scale)
        return model.base_model.model.eval()
    (folder,), (scale,) = folders, scales
    plain = load(name)
    model = peft.PeftModel.from_pretrained(load(name), folder)
    merged = model.merge_and_unload()
    state, new = plain.state_dict(), merged.state_dict()
    assert state.keys() == new.keys()
    plain.load_state_dict({k: v + scale * (new[k] - v) for k, v in state.items()})
    return plain.eval()


def check_loaded(model: nn.Module, folder: Path) -> None:
    """Raise ValueError unless PEFT has put every tensor of the file in its place."""
    file = load_file(folder / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(model, adapter_name="0")
    if file.keys() != held.keys() or any((held[k] != v).any() for k, v in file.items()):
        raise ValueError(f"PEFT loads {folder} in part only.")


def low_rank(folder: Path) -> bool:
    names = load_file(folder / "adapter_model.safetensors")
    return all(".lora_" in name for name in names)


def inputs_of(name: str) -> Iterator[dict]:
    pieces = SentencePieceProcessor(model_file=str(base.HERE / name / "spiece.model"))
    for prompt, notes in zip(base.PROMPTS[:2], TUNES):
        ids = torch.tensor([pieces.encode(prompt) + [1]])
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if name == MELODY:
            extract = transformers.MusicgenMelodyFeatureExtractor()
            tune = sounds.tune(32000, notes)[:, 0]
            found = extract(tune, sampling_rate=32000, return_tensors="pt")
            inputs["input_features"] = found["input_features"]
        yield inputs


@torch.no_grad()
def expect(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None, float]:
    """Greedy codes (2, K, T), logits of the checkpoint's tokens, the closest call."""
    rows, gaps = [], []
    for inputs in inputs_of(name):
        codes, _, gap = base.greedy(model, inputs, 3.0)
        rows.append(codes)
        gaps.append(gap)
    logits = None
    if name != MELODY:
        known = load_file(base.HERE / name / "expected.safetensors")
        ids, mask = known["text_ids"][:2], known["text_mask"][:2]
        states = model.text_encoder(input_ids=ids, attention_mask=mask)[0]
        states = model.enc_to_dec_proj(states) * mask[..., None]
        tokens = known["tokens"]
        logits = model.decoder(
            input_ids=tokens.flatten(0, 1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        ).logits.unflatten(0, (2, tokens.shape[1]))
    return torch.cat(rows), logits, min(gaps)


def values(name: str, folders: list[Path], cases: dict[str, list[float]]):
    """Arrays of each case, or None where a choice is close or a scale changes little."""
    arrays, gaps = {}, []
    for case, scales in cases.items():
        codes, logits, gap = expect(scaled(name, folders, scales), name)
        arrays[f"{case}_codes"] = tiny.int32(codes)
        if logits is not None and any(scales):
            arrays[f"{case}_logits"] = tiny.float32(logits)
        gaps.append(gap)
        if gap < base.SMALLEST_GAP:
            return None
    made = [v for k, v in arrays.items() if k.endswith("_codes")]
    pairs = [(a, b) for i, a in enumerate(made) for b in made[:i]]
    if any((a != b).float().mean() < 0.1 for a, b in pairs):
        return None
    save_file(arrays, folders[-1] / "expected.safetensors")
    return {"smallest_logit_gap": min(gaps), "model": name}


def make(case: str, number: int) -> dict:
    name, options = CASES[case]
    folder = base.HERE / "peft" / case

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(1000 * number + seed)
        model = peft.get_peft_model(load(name), peft.LoraConfig(**options))
        draw(model, generator)
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # a set, in any order
        tiny.write_json(path, config)
        return values(name, [folder], {f"scale_{s:g}": [s] for s in SCALES})

    return base.search(attempt, case)


def matches() -> list[dict]:
    """The settings, with the modules that PEFT wraps; and all that it could wrap."""
    kinds = (nn.Linear, nn.Embedding)
    names = [n for n, m in load(MONO).named_modules() if isinstance(m, kinds)]
    found = [{"settings": {}, "modules": sorted(names)}]
    for settings in MATCHED:
        model = peft.get_peft_model(load(MONO), peft.LoraConfig(r=2, **settings))
        modules = sorted(
            name.removeprefix("base_model.model.")
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        )
        found.append({"settings": settings, "modules": modules})
    return found


def pickle(source: Path, folder: Path) -> None:
    """The same adapter as older versions of PEFT wrote it."""
    folder.mkdir(exist_ok=True)
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    shutil.copy(source / "adapter_config.json", folder)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = {case: make(case, i) for i, case in enumerate(CASES)}
    tiny.write_json(base.HERE / "peft" / "matched.json", matches())
    folders = [base.HERE / "peft" / case for case in ("mono", "mono-text")]
    two = base.HERE / "peft" / "two"
    two.mkdir(exist_ok=True)
    model = scaled(MONO, folders, [0.5, 0.75])
    codes, logits, gap = expect(model, MONO)
    assert gap > base.SMALLEST_GAP, gap
    arrays = {"codes": tiny.int32(codes), "logits": tiny.float32(logits)}
    save_file(arrays, two / "expected.safetensors")
    made["two"] = {"adapters": ["mono", "mono-text"], "scales": [0.5, 0.75]}
    pickle(base.HERE / "peft" / "mono-bias", base.HERE / "peft" / "pickled")
    for folder in sorted((base.HERE / "peft").glob("ours-*/")):
        name = f"{folder.name.removeprefix('ours-')}-transformers"
        codes, logits, gap = expect(scaled(name, [folder], [1.0]), name)
        arrays = {"codes": tiny.int32(codes)}
        if logits is not None:
            arrays["logits"] = tiny.float32(logits)
        save_file(arrays, folder / "expected.safetensors")
        made[folder.name] = {"model": name, "smallest_logit_gap": gap}
    versions = {p.__name__: p.__version__ for p in (torch, transformers, peft)}
    text = json.dumps(made | {"versions": versions}, indent=2)
    (base.HERE / "peft" / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
