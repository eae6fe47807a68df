"""Checkpoints: a MusicGen of any published layout, or of our own, from its files.

    model, folder, dtype = load("stereo-small")

as `MusicGen.from_pretrained` does. audiocraft's layout is two `.bin` files beside T5 and
the codec, transformers' and ours a `config.json` with all weights; `.bin` files are
read by convert.py. Loading is strict: every tensor has its place, or an error names it.
"""

import json
import os
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open

from encodec import Encodec
from melody import MelodyConditioner
from musicgen import (
    COMPUTED,
    DTYPES,
    Conditioner,
    Decoder,
    DecoderConfig,
    MusicGen,
    MusicGenConfig,
)
from style import StyleConditioner
from t5 import T5, T5Config, Tokenizer

MODELS = {
    name: f"facebook/musicgen-{name}"
    for name in (
        "small",
        "medium",
        "large",
        "stereo-small",
        "stereo-medium",
        "stereo-large",
        "melody",
        "melody-large",
        "stereo-melody",
        "stereo-melody-large",
        "style",
    )
} | {"tiny": str(Path(__file__).with_name("tiny"))}
AUDIOCRAFT_FILES = ("state_dict.bin", "compression_state_dict.bin")
T5_REPO = "google-t5/t5-base"


def load(name: str) -> tuple[MusicGen, Path, mx.Dtype]:
    """A model by short name, Hub id or local folder; the folder, and the dtype in which
    its decoder was published or written."""
    folder = locate(name)
    read = load_audiocraft if is_audiocraft(folder) else load_transformers
    model, dtype = read(folder)
    return model, folder, dtype


def check_name(name: str) -> None:
    """Raise ValueError for what is no short name, Hub id or local folder."""
    folder = name != "" and os.path.isdir(name)
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.exists(name)
    if not (name in MODELS or folder or hub_id):
        raise ValueError(
            f"model must be one of {', '.join(MODELS)}, a Hub id or a local folder, "
            f"got '{name:.200}'."
        )


def local(name: str) -> Path:
    """The path that `name` would have here. `tiny` is the folder beside this file,
    never one of the current directory: that is `./tiny`."""
    return Path(MODELS[name] if name == "tiny" else name)


def locate(name: str) -> Path:
    """The folder of a model: a local one, or the Hub's cache of what it needs.

    `tiny` lies beside this file. Of another short name exactly AUDIOCRAFT_FILES are
    fetched; of another repository these, or where it has none the transformers layout.
    """
    check_name(name)
    folder = local(name)
    if folder.is_dir():
        return folder
    if name == "tiny":
        raise FileNotFoundError(
            f"{folder} must hold config.json, model.safetensors and spiece.model. Copy "
            "that folder along with the scripts, or train it: python train.py synth "
            f"--codec --output {shlex.quote(str(folder))}, then with --lm for --codec."
        )
    repo = MODELS.get(name, name)
    try:
        try:
            paths = [hf_hub_download(repo, file) for file in AUDIOCRAFT_FILES]
            return Path(paths[0]).parent
        except EntryNotFoundError:
            if name in MODELS:
                raise
            return fetch_transformers(repo)
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise OSError(
            f"The Hub did not give {repo}: {error} To work offline, take --model tiny "
            f"or a local folder with {' and '.join(AUDIOCRAFT_FILES)}, T5 in t5-base/ "
            "and, for stereo, the codec in encodec_32khz/; or one that convert.py wrote."
        ) from error


def fetch_transformers(repo: str) -> Path:
    common = ["config.json", "spiece.model"]
    files = ["model*.safetensors", "model.safetensors.index.json"]
    folder = Path(snapshot_download(repo, allow_patterns=common + files))
    if not any(folder.glob("model*.safetensors")):
        snapshot_download(repo, allow_patterns=common + ["pytorch_model*"])
    return folder


def is_audiocraft(folder: Path) -> bool:
    """Whether to read audiocraft's layout. A clone of a published repository has
    both, and then the other one needs no T5 from elsewhere."""
    other = [folder / "config.json", folder / "spiece.model"]
    complete = all(path.is_file() for path in other) and find_weights(folder)
    has_t5 = (folder / T5_REPO.split("/")[1]).is_dir()
    return (folder / AUDIOCRAFT_FILES[0]).is_file() and (has_t5 or not complete)


def load_audiocraft(folder: Path) -> tuple[MusicGen, mx.Dtype]:
    """Build from `state_dict.bin` and its companions, with the published dtype."""
    path = folder / AUDIOCRAFT_FILES[0]
    weights, of_sound, decoder, cfg = read_audiocraft(path)
    text_encoder, tokenizer, reload = load_t5(folder, cfg)
    audio_encoder = Encodec.from_pretrained(folder)
    try:
        conditioner = None
        if decoder.sound_width:
            conditioner = load_conditioner(of_sound, cfg, folder, audio_encoder)
        parts = (decoder, text_encoder.config, audio_encoder.config)
        seconds = float(cfg.get("dataset.segment_duration", 30))
        of_sound = None if conditioner is None else conditioner.config
        config = MusicGenConfig(*parts, seconds, conditioner=of_sound)
        model = MusicGen(config, tokenizer)
        model.text_encoder, model.audio_encoder = text_encoder, audio_encoder
        model.conditioner, model._load_text_encoder = conditioner, reload
        model.decoder.load_weights(list(weights.items()))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not load: {error}") from error
    return model, mx.float16


OF_SOUND = "condition_provider.conditioners.self_wav."  # but for its projection
READERS = {"chroma_stem": MelodyConditioner, "style": StyleConditioner}


def load_conditioner(
    weights: dict[str, mx.array], cfg: dict, folder: Path, codec: Encodec
) -> Conditioner:
    """The conditioner of audiocraft's `weights`, by the name that its settings give."""
    known = "style" if weights else "chroma_stem"  # where they are silent
    kind = cfg.get("conditioners.self_wav.model", known)
    if kind not in READERS:
        raise ValueError(f"self_wav must be one of {', '.join(READERS)}, got {kind}")
    return READERS[kind].from_audiocraft(weights, cfg, folder, codec)


def load_t5(folder: Path, cfg: dict) -> tuple[T5, Tokenizer, Callable[[], T5]]:
    """The text encoder that `cfg` names, its tokenizer, and a way to load it again."""
    name = cfg.get("conditioners.description.t5.name", "t5-base")
    if not isinstance(name, str) or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise ValueError(f"{folder / AUDIOCRAFT_FILES[0]} names a T5 that cannot be.")
    local = folder / name.split("/")[-1]
    place = local if local.is_dir() else name if "/" in name else f"google-t5/{name}"
    try:
        model, tokenizer = T5.from_pretrained(place)
    except OSError as error:
        raise OSError(f"{folder} needs T5 in {local.name}/ or from the Hub: {error}")
    return model, tokenizer, lambda: T5.from_pretrained(place)[0]


# What the decoder here is; other values in a checkpoint's settings need other code.
SETTINGS = {
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm_first": "true",
    "transformer_lm.positional_embedding": "sin",
    "transformer_lm.norm": "layer_norm",
    "codebooks_pattern.modeling": "delay",
}


def check_settings(cfg: dict) -> None:
    """Raise ValueError for settings in `xp.cfg` that this decoder does not have."""
    for name, known in SETTINGS.items():
        if cfg.get(name, known) != known:
            raise ValueError(f"{name} must be {known}, got {cfg[name]}")


def read_audiocraft(
    path: Path,
) -> tuple[dict[str, mx.array], dict[str, mx.array], DecoderConfig, dict]:
    """The decoder's weights, those of the conditioner of sounds, the decoder's config
    and the settings, of a `state_dict.bin`."""
    from convert import load_package, read_yaml

    package = load_package(path)
    try:
        cfg = read_yaml(package.get("xp.cfg", ""))
        check_settings(cfg)
        weights, of_sound = part_sound(package["best_state"])
        config = audiocraft_config(weights, cfg)
        return Decoder.sanitize(weights), of_sound, config, cfg
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}.") from error
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not load: {error}") from error


def part_sound(
    weights: dict[str, mx.array],
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """All weights but those of the conditioner of sounds; and these, by their names
    there."""
    rest, of_sound = {}, {}
    for name, weight in weights.items():
        stem = name.removeprefix(OF_SOUND)
        if stem == name or stem.startswith("output_proj.") or name.endswith(COMPUTED):
            rest[name] = weight
        else:
            of_sound[stem] = weight
    return rest, of_sound


def audiocraft_config(weights: dict[str, mx.array], cfg: dict) -> DecoderConfig:
    """Config from what the shapes show and what `cfg` alone tells.

    `cfg` maps dotted names of `xp.cfg` to strings. Where it is silent the
    published models' values hold: heads of width 64, delays as in DELAYS.
    """
    K = sum(name.startswith("emb.") for name in weights)
    entries, D = weights["emb.0.weight"].shape
    layers = {name.split(".")[2] for name in weights if "transformer.layers." in name}
    stereo = cfg.get("interleave_stereo_codebooks.use", str(K == 8).lower())
    delays = cfg.get("codebooks_pattern.delay.delays")
    of_sound = weights.get(f"{OF_SOUND}output_proj.weight")
    return DecoderConfig(
        vocab_size=entries - 1,
        hidden_size=D,
        num_hidden_layers=len(layers),
        num_attention_heads=int(cfg.get("transformer_lm.num_heads", D // 64)),
        ffn_dim=weights["transformer.layers.0.linear1.weight"].shape[0],
        num_codebooks=K,
        audio_channels=2 if stereo == "true" else 1,
        delays=tuple(map(int, delays)) if delays else None,
        sound_width=0 if of_sound is None else of_sound.shape[1],
    )


def load_transformers(folder: Path) -> tuple[MusicGen, mx.Dtype]:
    """Build from config.json, weights and spiece.model, transformers' or ours,
    with the decoder's dtype on a GPU."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
        config = MusicGenConfig.from_dict(settings)
        dtype = DTYPES[settings.get("decoder_dtype", "float16")]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} must hold {' and '.join(AUDIOCRAFT_FILES)}, or config.json "
            "with weights and spiece.model, but has neither."
        ) from None
    except KeyError as error:
        raise ValueError(
            f"decoder_dtype in {path} must be one of {', '.join(DTYPES)}, got {error}."
        ) from None
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not load: {error}") from error
    warn_of_heads(path, config.decoder)
    if not (folder / "spiece.model").is_file():
        raise FileNotFoundError(
            f"{folder} must hold spiece.model; take that of {T5_REPO}."
        )
    tokenizer = Tokenizer(folder / "spiece.model")
    try:
        tokenizer.check(config.text_encoder)
        model = MusicGen(config, tokenizer)
        model.load_weights(list(sanitize(read_weights(folder)).items()))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not load: {error}") from error
    model._load_text_encoder = lambda: read_text_encoder(folder, config.text_encoder)
    return model, dtype


def read_text_encoder(folder: Path, config: T5Config) -> T5:
    """T5 alone, out of a whole model's weights."""
    model = T5(config)
    weights = sanitize(read_weights(folder)).items()
    prefix = "text_encoder."
    own = [(k.removeprefix(prefix), w) for k, w in weights if k.startswith(prefix)]
    model.load_weights(own)
    return model


def warn_of_heads(path: Path, config: DecoderConfig) -> None:
    """Shapes do not show the heads, and every published model's are 64 wide."""
    heads, D = config.num_attention_heads, config.hidden_size
    if D >= 1024 and heads != D // 64:
        warnings.warn(
            f"{path} gives {heads} attention heads for a hidden size of {D}; the "
            f"published models have {D // 64}. If the sound is noise, correct it."
        )


WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def find_weights(folder: Path) -> Path | None:
    """The first of WEIGHTS that is there."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of `model.safetensors`, `pytorch_model.bin`, or their shards."""
    path = find_weights(folder)
    if path and path.suffix != ".json":
        return read_file(path)
    if path:
        shards = [read_file(folder / shard) for shard in read_index(path)]
        return {name: weight for shard in shards for name, weight in shard.items()}
    raise FileNotFoundError(
        f"{folder} must hold model.safetensors or pytorch_model.bin, or their shards "
        "and index, but has neither."
    )


def read_index(path: Path) -> list[str]:
    """Names of the shards beside the index `path`."""
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("it names a file outside its folder")
        if not all(shard.endswith((".bin", ".safetensors")) for shard in shards):
            raise ValueError("it names a file that is neither safetensors nor .bin")
    except (
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{path} is damaged, fetch it again: {error!r}") from error
    return shards


def read_file(path: Path) -> dict[str, mx.array]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the index names it.")
    if path.suffix == ".bin":
        from convert import load_state

        return load_state(path)
    try:
        with safe_open(path, "numpy"):  # checks the header as mx.load does not
            return mx.load(str(path))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, fetch it again: {error}") from error


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Names and layouts of a whole model, transformers' or ours -> ours."""
    parts = {"text_encoder.": T5, "audio_encoder.": Encodec, "decoder.": Decoder}
    parts["conditioner."] = StyleConditioner  # another has no weights
    grouped = {prefix: {} for prefix in parts}
    for name, weight in weights.items():
        prefix = next((p for p in parts if name.startswith(p)), "decoder.")
        grouped[prefix][name.removeprefix(prefix)] = weight
    return {
        prefix + name: weight
        for prefix, part in parts.items()
        for name, weight in part.sanitize(grouped[prefix]).items()
    }
