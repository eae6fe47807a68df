"""Make the tiny checkpoints in audiocraft's layout, and what audiocraft computes.

Called by make.py. audiocraft runs from its source, on the CPU in float32. What
it imports but text-to-music never calls (video, Demucs, spaCy, xformers...) is
replaced by stand-ins, so that little has to be installed: omegaconf, einops,
julius, num2words and soundfile, besides what make.py needs.
"""

import importlib.machinery
import importlib.metadata
import sys
import types
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import make as base
import torch
import transformers
import xpcfg
from safetensors.torch import save_file
from torch import Tensor

import tiny

# The commit of facebookresearch/audiocraft that gave the values kept here.
COMMIT = "896ec7c"

STAND_INS = [
    "av",
    "audioseal",
    "demucs",
    "dora",
    "flashy",
    "librosa",
    "spacy",
    "torchaudio",
    "torchdiffeq",
    "xformers",
]
RESAMPLED = [(44100, 32000), (48000, 32000), (32000, 24000), (16000, 32000)]


class StandIns:
    """An importer that answers for packages which are not needed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def import_audiocraft(checkout: Path) -> types.SimpleNamespace:
    """Import the parts in use, without the package's own __init__ files."""
    warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
    sys.meta_path.insert(0, StandIns())
    for name in ("audiocraft", "audiocraft.data", "audiocraft.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    sys.modules["audiocraft"].__version__ = version(checkout)
    sys.modules["audiocraft"].modules = importlib.import_module("audiocraft.modules")
    names = {
        "builders": "audiocraft.models.builders",
        "loaders": "audiocraft.models.loaders",
        "musicgen": "audiocraft.models.musicgen",
        "encodec": "audiocraft.models.encodec",
        "conditioners": "audiocraft.modules.conditioners",
        "codebook": "audiocraft.quantization.core_vq",
        "transformer": "audiocraft.modules.transformer",
    }
    modules = {k: importlib.import_module(v) for k, v in names.items()}
    modules["transformer"]._is_profiled = lambda: False
    # All that is called of xformers: attention itself is torch's by default.
    modules["transformer"].ops = types.SimpleNamespace(unbind=torch.unbind)
    return types.SimpleNamespace(**modules)


def version(checkout: Path) -> str:
    source = (checkout / "audiocraft" / "__init__.py").read_text()
    return source.split("__version__ = '")[1].split("'")[0]


def use_local_files(audiocraft, folder: Path) -> None:
    """Have "t5-base" and "facebook/encodec_32khz" come from the folder."""

    def local(cls):
        def from_pretrained(name):
            return cls.from_pretrained(folder / Path(name).name)

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    conditioners = audiocraft.conditioners
    conditioners.T5Tokenizer = local(transformers.T5Tokenizer)
    conditioners.T5EncoderModel = local(transformers.T5EncoderModel)
    conditioners.T5Conditioner.MODELS_DIMS["t5-base"] = base.T5["d_model"]
    audiocraft.encodec.HFEncodecModel = local(transformers.EncodecModel)


def package(state: dict[str, Tensor], cfg: str, dtype: torch.dtype) -> dict:
    """Return what audiocraft's export functions would save."""
    from omegaconf import OmegaConf

    return {
        "best_state": {k: v.to(dtype).clone() for k, v in state.items()},
        "xp.cfg": OmegaConf.to_yaml(OmegaConf.create(cfg)),
        "version": sys.modules["audiocraft"].__version__,
        "exported": True,
    }


# The codec


def save_codec(audiocraft, folder: Path, generator: torch.Generator) -> None:
    """Write compression_state_dict.bin with a whole codec in it."""
    from omegaconf import OmegaConf

    text = xpcfg.codec_cfg(dimension=16, filters=2, bins=64)
    cfg = OmegaConf.create(text)
    cfg.device = "cpu"
    model = audiocraft.builders.get_compression_model(cfg).eval()
    tiny.fill_codec(model, generator)
    codebooks = [layer._codebook for layer in model.quantizer.vq.layers]
    with torch.no_grad():
        latents = model.encoder(tiny.music(1, 16000, generator))
        tiny.fit_codebooks(codebooks, latents, generator)
    saved = package(model.state_dict(), text, torch.float32)
    torch.save(saved, folder / "compression_state_dict.bin")


def save_pointer(folder: Path, generator: torch.Generator) -> None:
    """Write a compression_state_dict.bin that only names a codec, and that codec."""
    pointer = {"pretrained": "facebook/encodec_32khz", "exported": True}
    pointer["version"] = sys.modules["audiocraft"].__version__
    torch.save(pointer, folder / "compression_state_dict.bin")
    config = base.CONFIGS["encodec_32khz"] | base.CODEC_INSIDE
    codec = folder / "encodec_32khz"
    tiny.write_json(codec / "config.json", config)
    state = base.published(base.random_codec(config, generator).state_dict())
    save_file(state, codec / "model.safetensors", {"format": "pt"})


# The language model


def lm_cfg(stereo: bool) -> str:
    layers = 1 if stereo else 2
    return xpcfg.lm_cfg(stereo, layers, dim=32, heads=2, hidden_scale=1.5, card=64)


def save_lm(audiocraft, folder: Path, stereo: bool, generator) -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(lm_cfg(stereo))
    cfg.device, cfg.dtype = "cpu", "float32"
    model = audiocraft.builders.get_lm_model(cfg)
    tiny.fill(model, generator)
    saved = package(model.state_dict(), lm_cfg(stereo), torch.float16)
    torch.save(saved, folder / "state_dict.bin")


def make_checkpoint(audiocraft, name: str, stereo: bool, spiece: bytes) -> dict:
    folder = base.HERE / name
    t5 = base.make_t5(folder / "t5-base", base.T5, spiece, whole=True)
    use_local_files(audiocraft, folder)

    def attempt(seed: int) -> dict | None:
        generator = torch.Generator().manual_seed(2000 + 1000 * stereo + seed)
        if stereo:
            save_pointer(folder, generator)
        else:
            save_codec(audiocraft, folder, generator)
        save_lm(audiocraft, folder, stereo, generator)
        return expect(audiocraft, folder, generator)

    result = base.search(attempt, name)
    return {name: result, f"{name}/t5-base": t5}


@torch.no_grad()
def expect(audiocraft, folder: Path, generator: torch.Generator) -> dict | None:
    """Run audiocraft's own loaders, generation and codec on the files."""
    lm = audiocraft.loaders.load_lm_model(str(folder))
    codec = audiocraft.loaders.load_compression_model(str(folder))
    codec = audiocraft.builders.get_wrapped_compression_model(codec, lm.cfg)
    arrays, gaps = {}, []
    # One prompt at a time: in a batch audiocraft attends to the padding.
    for coef in base.GUIDANCE:
        rows = []
        for prompt in base.PROMPTS:
            codes, gap = greedy(audiocraft, lm, prompt, coef)
            rows.append(codes)
            gaps.append(gap)
            if gap < base.SMALLEST_GAP:
                return None
        arrays[f"batch_g{coef:g}_codes"] = tiny.int32(torch.cat(rows))
    if not base.lively(arrays):
        return None
    codes = arrays["batch_g3_codes"][:1].long()
    arrays["one_g3_audio"] = tiny.float32(codec.decode(codes))
    arrays |= expect_layers(audiocraft, lm, generator)
    code_gap = expect_codec(audiocraft, codec, arrays, generator)
    if code_gap < base.SMALLEST_CODE_GAP:
        return None
    save_file(arrays, folder / "expected.safetensors")
    return {
        "source": "audiocraft",
        "frames": base.FRAMES,
        "guidance": base.GUIDANCE,
        "prompts": base.PROMPTS,
        "smallest_logit_gap": min(gaps),
        "smallest_code_gap": code_gap,
    }


def greedy(audiocraft, lm, prompt: str, coef: float) -> tuple[Tensor, float]:
    """Return codes (1, K, T) and the closest call."""
    attributes = audiocraft.conditioners.ConditioningAttributes
    scores = []

    def record(module, args, logits):
        with_text, without = logits[:, :, -1]  # (2, K, S, V)
        scores.append(without + (with_text - without) * coef)

    hook = lm.register_forward_hook(record)
    codes = lm.generate(
        conditions=[attributes(text={"description": prompt})],
        max_gen_len=base.FRAMES,
        use_sampling=False,
        cfg_coef=coef,
        check=True,
    )
    hook.remove()
    scores = torch.stack(scores, 1)  # (K, S, V)
    pairs = lm.num_codebooks // 4
    used = [row[k // pairs :][: base.FRAMES] for k, row in enumerate(scores)]
    used = torch.stack(used)
    assert (used.argmax(-1) == codes[0]).all()
    return codes, tiny.smallest_gap(used)


def expect_layers(audiocraft, lm, generator) -> dict[str, Tensor]:
    """Text states of each prompt, and logits for both guidance rows."""
    attributes = audiocraft.conditioners.ConditioningAttributes
    conditions = [attributes(text={"description": t}) for t in (base.PROMPTS[0], None)]
    tokenized = lm.condition_provider.tokenize(conditions)
    inputs = tokenized["description"]
    tensors = lm.condition_provider(tokenized)
    tokens = base.delayed_tokens(lm.num_codebooks, lm.card, generator)
    logits = lm(tokens, conditions=[], condition_tensors=tensors)
    return {
        "text_ids": tiny.int32(inputs["input_ids"]),
        "text_mask": tiny.int32(inputs["attention_mask"]),
        "text_states": tiny.float32(tensors["description"][0]),
        "tokens": tiny.int32(tokens),
        "logits": tiny.float32(logits),
    }


def expect_codec(audiocraft, codec, arrays: dict, generator) -> float:
    """Encode and decode a short piece, and a very short one."""
    audio = tiny.music(codec.channels, 1943, generator)
    pieces = {"": audio, "short_": audio[..., 1000:1050].contiguous()}
    books = [
        audiocraft.codebook.EuclideanCodebook,
        base.EncodecEuclideanCodebook,
    ]
    closest = []
    for prefix, piece in pieces.items():
        with (
            tiny.watch_codebooks(books[0]) as ours,
            tiny.watch_codebooks(books[1]) as theirs,
        ):
            codes, scale = codec.encode(piece)
        assert scale is None
        closest += ours + theirs
        arrays[f"{prefix}audio"] = piece
        arrays[f"{prefix}codes"] = tiny.int32(codes)
        arrays[f"{prefix}decoded"] = tiny.float32(codec.decode(codes))
    return min(closest)


# The resampler audiocraft uses on prompts


def make_resampled() -> dict:
    import julius

    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for old, new in RESAMPLED:
        audio = torch.randn(2, 701, generator=generator)
        resampled = julius.resample_frac(audio, old, new)
        arrays[f"{old}_{new}_input"] = audio
        arrays[f"{old}_{new}_output"] = tiny.float32(resampled)
    save_file(arrays, base.HERE / "resample.safetensors")
    return {"source": "julius.resample_frac", "rates": RESAMPLED}


def make(checkout: Path, spiece: bytes) -> dict:
    """Write everything; returns what belongs in expected.json."""
    audiocraft = import_audiocraft(checkout)
    about = make_checkpoint(audiocraft, "mono-audiocraft", False, spiece)
    about |= make_checkpoint(audiocraft, "stereo-audiocraft", True, spiece)
    about["resample"] = make_resampled()
    about["audiocraft"] = {"version": version(checkout), "commit": COMMIT}
    about["resample"]["julius"] = importlib.metadata.version("julius")
    return about
