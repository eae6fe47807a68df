"""Published checkpoints: audiocraft's and transformers' folders -> our config and
names.

audiocraft's layout is two `.bin` files beside T5 and, where the codec is only named,
the codec; or `checkpoint.th` in place of the first; transformers' a `config.json` with
all weights. Needs audiocraft.py, ported.py, torch_file.py, decoder_names.py, strict.py,
encodec_files.py, t5.py and t5_files.py beside it. The files of what a model follows are
needed beside it, too: melody.py, or style.py and mert.py, and what these need.

    path, settings, weights, tokenizer, read_text_encoder = read(Path("musicgen-small"))
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

import audiocraft
import encodec_files
import ported
import strict
import t5_files
from decoder_names import TRANSFORMERS, name_decoder, spell
from strict import in_a_line, one_line, small_text
from t5 import Tokenizer
from torch_file import load_torch

T5_REPO = "google-t5/t5-base"
T5_NAME = r"(\w[\w.-]{,95}/)?\w[\w.-]{,95}"  # as long as the Hub lets names be
# A codec of the Hub, in the settings of a training.
NAMED_CODEC = r"//pretrained/([\w-][\w.-]{,95}/[\w-][\w.-]{,95})"
WINDOW = "dataset.segment_duration"  # of audiocraft's settings
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER = "adapter_config.json"  # of PEFT, which is no model
EXTRACTORS = ("preprocessor", "processor")
Weights = dict[str, mx.array]


class Published(NamedTuple):
    """What a published folder holds."""

    path: Path  # of the config, or of audiocraft's decoder
    settings: dict[str, Any]  # as in our config.json
    weights: Weights  # by our names
    tokenizer: Tokenizer | None  # None: there is no text
    read_text_encoder: Callable[[], Weights]  # T5's weights once more
    misfit: Callable[[Exception], str]  # why the weights do not load, in a line


@in_a_line
def read(folder: Path) -> Published:
    """Read a folder of either layout. Raises ValueError or OSError naming the file,
    tensor or key and what to do.

    A clone of a published repository has both layouts, and then transformers' needs no
    T5 from elsewhere.
    """
    other = [folder / "config.json", folder / "spiece.model"]
    complete = all(path.is_file() for path in other) and find_weights(folder)
    has_t5 = (folder / T5_REPO.split("/")[1]).is_dir()
    if audiocraft.find_decoder(folder) and (has_t5 or not complete):
        return read_audiocraft(folder)
    return read_transformers(folder)


def decoder_dtype(weights: Weights) -> str:
    """The type in which the decoder runs where none is asked for. What was published in
    bfloat16 stays so, for float16 might not hold it."""
    types = {w.dtype for name, w in weights.items() if name.startswith("decoder.")}
    return "bfloat16" if mx.bfloat16 in types else "float16"


def under(prefix: str, weights: Weights | nn.Module) -> Weights:
    """Weights, or those of a module, with a prefix before their names."""
    if isinstance(weights, nn.Module):
        weights = dict(tree_flatten(weights.parameters()))
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


def may_lack_text(folder: Path) -> bool:
    """Whether a folder's model may be one without text, as far as its settings tell. No
    weights are read, and what is damaged is told when it is loaded."""
    path = folder / "config.json"
    try:
        if path.is_file():
            return read_json(path).get("text_encoder", "") is None
        package = load_torch(audiocraft.find_decoder(folder), ("xp.cfg",))
        names = audiocraft.read_settings(package)
        return not any(name.startswith("conditioners.description.") for name in names)
    except (AttributeError, OSError, TypeError, ValueError):
        return True


def is_magnet(folder: Path) -> bool | None:
    """Whether a folder in audiocraft's layout holds a MAGNeT; None for what is damaged,
    which is told when it is loaded."""
    try:
        package = load_torch(audiocraft.find_decoder(folder), ("xp.cfg",))
        return ported.is_magnet(audiocraft.read_settings(package))
    except (AttributeError, OSError, TypeError, ValueError):
        return None


# audiocraft's layout


def read_audiocraft(folder: Path) -> Published:
    path = audiocraft.find_decoder(folder)
    package = audiocraft.read_decoder(path)
    has_text, text = audiocraft.has_text(package), Text(None, {}, None, dict)
    if has_text:
        text = read_text(path, package.cfg)
    codec_path, codec, codec_weights = read_codec(path, package.cfg)
    try:
        check_rate(package.cfg, codec, codec_path)
        settings = {
            "model_type": "musicgen",
            "decoder": package.config,
            "text_encoder": text.settings,
            "audio_encoder": codec,
            "max_duration": audiocraft.number(WINDOW, package.cfg.get(WINDOW, "30")),
        }
        settings |= own_defaults(package.cfg, codec, settings["max_duration"])
        if ported.is_magnet(package.cfg):
            settings["masking"] = audiocraft.masking_settings(package.cfg)
        weights = under("decoder", package.decoder)
        weights |= under("text_encoder", text.weights)
        weights |= under("audio_encoder", codec_weights)
        has_sound = package.config["prefix_width"] > 0
        audiocraft.check_conditions(package.cfg, has_sound, has_text)
        if has_sound:
            settings["conditioner"], learned = read_conditioner(package, folder)
            weights |= under("conditioner", learned)
        settings["decoder_dtype"] = decoder_dtype(weights)
    except (KeyError, TypeError, ValueError) as error:
        told = strict.misfit(error, spell_conditioner)
        raise ValueError(f"{path} does not load: {told}") from error

    def spell_any(name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "text_encoder":
            return f"{rest} of {text.place}/{t5_files.FILES[1]}"
        if part == "audio_encoder":
            names = encodec_files.names_in(codec_path)
            return f"{encodec_files.spell(rest, names)} of {codec_path.name}"
        own = spell(rest) if part == "decoder" else spell_conditioner(rest)
        return f"{own} of {path.name}"

    misfit = partial(tell_misfit, folder, spell_any)
    return Published(path, settings, weights, text.tokenizer, text.read_again, misfit)


def spell_conditioner(name: str) -> str:
    """audiocraft's name of a tensor of the conditioner of a style."""
    from style import spell

    return f"{audiocraft.SELF_WAV}{spell(name)}"


def tell_misfit(folder: Path, spell: Callable[[str], str], error: Exception) -> str:
    return one_line(f"{folder} does not load: {strict.misfit(error, spell)}")


class Text(NamedTuple):
    """What stands for the text encoder; nothing in a model without text."""

    settings: dict[str, Any] | None
    weights: Weights
    tokenizer: Tokenizer | None
    read_again: Callable[[], Weights]
    place: str = ""


def read_text(path: Path, cfg: dict[str, Any]) -> Text:
    """The T5 that goes with audiocraft's decoder in `path`."""
    local, place = find_t5(path, cfg)
    try:
        settings, weights, spiece = t5_files.read(place)
    except OSError as error:
        why = str(error.__cause__ or error).rstrip(".")  # without what is said here
        where = f"{local.name}/ or from the Hub"
        raise OSError(f"{path.parent} needs T5 in {where}: {why}.") from error
    again = lambda: t5_files.read(place)[1]  # noqa: E731
    return Text(settings, weights, Tokenizer(spiece), again, local.name)


def read_codec(path: Path, cfg: dict[str, Any]) -> tuple[Path, dict, Weights]:
    """The codec that goes with audiocraft's decoder in `path`."""
    place = codec_folder(path, cfg)
    try:
        return encodec_files.read(place)
    except OSError as error:
        if isinstance(place, str):  # one of the Hub
            raise encodec_files.needed(path.parent, place, error) from error
        raise


def check_rate(cfg: dict[str, Any], codec: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the codec has the rate with which the decoder was trained,
    where that is known."""
    rate, found = cfg.get("sample_rate"), codec["sampling_rate"]
    if rate in audiocraft.SILENT:
        return
    if audiocraft.number("sample_rate", rate) != found:
        raise ValueError(
            f"its codec must be one of {rate:.20} Hz, but {path!s:.120} is one of {found} "
            "Hz: put the decoder's own beside it"
        )


def codec_folder(path: Path, cfg: dict[str, Any]) -> Path | str:
    """Where the codec lies: beside the decoder in `path`, else where its settings name
    one of the Hub, as those of a training do."""
    name = cfg.get("compression_model_checkpoint")
    pointed = re.fullmatch(NAMED_CODEC, name) if isinstance(name, str) else None
    if path.with_name(audiocraft.FILES[1]).is_file() or not pointed:
        return path.parent
    local = path.with_name(pointed[1].split("/")[1])
    return local if local.is_dir() else pointed[1]


AUDIOGEN = {"default_duration": 5.0, "default_stride": 2.0}  # seconds, in audiocraft


def own_defaults(
    cfg: dict[str, Any], codec: dict[str, Any], longest: float
) -> dict[str, float]:
    """What audiocraft's AudioGen and MAGNeT do otherwise than MusicGen where nothing is
    asked. The file names its solver; one that does not is told by its 16 kHz."""
    if ported.is_magnet(cfg):
        return {"default_duration": longest}
    unsaid = "audiogen" if codec["sampling_rate"] == 16000 else "musicgen"
    is_audiogen = cfg.get("solver", unsaid) == "audiogen"
    return AUDIOGEN if is_audiogen and longest > AUDIOGEN["default_stride"] else {}


def find_t5(path: Path, cfg: dict[str, Any]) -> tuple[Path, Path | str]:
    """Where the text encoder that `cfg` names may lie, a folder beside the file; and
    that folder if it is there, else the Hub id."""
    name = cfg.get("conditioners.description.t5.name", "t5-base")
    if not isinstance(name, str) or not re.fullmatch(T5_NAME, name):
        raise ValueError(f"{path} must name a T5 of the Hub, got {name!r:.80}.")
    local = path.with_name(name.split("/")[-1])
    repo = name if "/" in name else f"google-t5/{name}"
    return local, local if local.is_dir() else repo


def read_conditioner(
    package: audiocraft.Package, folder: Path
) -> tuple[dict[str, Any], Weights]:
    """The settings of the conditioner of a sound, and what it has learned."""
    unsaid = "style" if package.conditioner else "chroma_stem"
    kind = package.cfg.get("conditioners.self_wav.model", unsaid)
    if kind == "chroma_stem":
        return audiocraft.melody_settings(package.cfg, package.window), {}
    if kind != "style":
        raise ValueError(f"self_wav must be chroma_stem or style, got {kind}")
    from style import StyleConditioner

    weights = StyleConditioner.sanitize(package.conditioner)
    settings = audiocraft.style_settings(weights, package.cfg) | {"mert": None}
    if settings["encodec_n_q"] == 0:
        mert = read_mert(folder)
        settings["mert"] = asdict(mert.config)
        weights |= under("mert", mert)
    return settings, weights


def read_mert(folder: Path) -> nn.Module:
    """From `MERT-v1-95M/` in the folder, else from the Hub."""
    from mert import FILES, MERT, REPO

    local = folder / REPO.split("/")[1]
    try:
        return MERT.from_pretrained(local if local.is_dir() else REPO)
    except OSError as error:
        why = str(error.__cause__ or error).rstrip(".")
        place = f"{local.name}/ ({', '.join(FILES)})"
        raise OSError(
            f"{folder} needs MERT in {place} or from the Hub: {why}."
        ) from error


# transformers' layout


def read_transformers(folder: Path) -> Published:
    path = folder / "config.json"
    if not path.is_file() and (folder / ADAPTER).is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter of PEFT, and no model: give the model that it "
            "was made for as --model, and this as --adapter (adapter=)."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must hold {' and '.join(audiocraft.FILES)} "
            f"({audiocraft.DECODERS[1]} may take the place of the first), or config.json "
            "with weights and spiece.model, but has neither."
        )
    settings = read_json(path)
    warn_of_heads(path, settings)
    tokenizer = Tokenizer(t5_files.find_spiece(folder, T5_REPO))
    misfit = partial(tell_misfit, folder, partial(spell_transformers, folder))
    try:
        if settings.get("model_type") == "musicgen_melody":
            settings |= read_extractor(folder, settings)
        weights = sanitize(read_weights(folder))
        weights |= identities(settings, weights)
        settings["decoder_dtype"] = decoder_dtype(weights)
    except strict.Misfit as error:
        raise ValueError(misfit(error)) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} does not load: {strict.misfit(error)}") from error

    def read_text_encoder() -> Weights:
        prefix = "text_encoder."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in read_weights(folder).items()
            if name.startswith(prefix)
        }
        return t5_files.sanitize(weights)

    return Published(path, settings, weights, tokenizer, read_text_encoder, misfit)


def identities(settings: dict[str, Any], weights: Weights) -> Weights:
    """Projections that change nothing, in place of those that transformers does not make
    where what a decoder follows is as wide as the decoder."""
    parts = [settings.get(part) for part in ("decoder", "text_encoder")]
    if not all(isinstance(part, dict) for part in parts):  # which is told later
        return {}
    D, made = parts[0].get("hidden_size"), {}
    widths = {"output_proj": parts[1].get("d_model")}
    if settings.get("model_type") == "musicgen_melody":
        widths["sound_proj"] = settings.get("num_chroma", 12)
    for name, width in widths.items():
        own = [f"decoder.{name}.{part}" for part in ("weight", "bias")]
        if type(D) is int and D == width and D <= 2**14 and not weights.keys() & {*own}:
            dtype = getattr(mx, decoder_dtype(weights))
            made |= dict(zip(own, (mx.eye(D, dtype=dtype), mx.zeros(D, dtype))))
    return made


def spell_transformers(folder: Path, name: str) -> str:
    """A tensor's name as transformers has it, and its file."""
    part, _, rest = name.partition(".")
    if part == "decoder":
        name = spell(rest, TRANSFORMERS)
    elif part == "audio_encoder":
        names = [n for n in read_weights(folder) if n.startswith(f"{part}.")]
        names = [name.removeprefix(f"{part}.") for name in names]
        name = f"{part}.{encodec_files.spell(rest, names)}"
    return f"{name} of {find_weights(folder).name}"


def read_json(path: Path) -> dict:
    """The object in a file. Raises ValueError when it holds none."""
    try:
        settings = json.loads(small_text(path))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} does not load: {strict.misfit(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold an object, got {settings!r:.40}")
    return settings


def read_extractor(folder: Path, settings: dict) -> dict[str, Any]:
    """What transformers' feature extractor says of a melody, if its file is there:
    `preprocessor_config.json`, or since transformers 5 a part of another."""
    from melody import extractor_settings

    path, newer = (folder / f"{name}_config.json" for name in EXTRACTORS)
    found = read_json(path) if path.is_file() else {}
    if not path.is_file() and newer.is_file():
        found = read_json(newer).get("feature_extractor", {})
        if not isinstance(found, dict):
            raise ValueError(f"{newer} must hold an object, feature_extractor.")
    return extractor_settings(found, settings)


def warn_of_heads(path: Path, settings: dict) -> None:
    """Shapes do not show the heads, and every published model's are 64 wide."""
    decoder = settings.get("decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    heads, D = decoder.get("num_attention_heads"), decoder.get("hidden_size")
    if isinstance(heads, int) and isinstance(D, int) and D >= 1024 and heads != D // 64:
        warnings.warn(
            f"{path} gives {heads} attention heads for a hidden size of {D}; the "
            f"published models have {D // 64}. If the sound is noise, correct it."
        )


def find_weights(folder: Path) -> Path | None:
    """The first of WEIGHTS that is there."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


@in_a_line
def read_weights(folder: Path) -> Weights:
    """All tensors of `model.safetensors`, `pytorch_model.bin`, or their shards."""
    path = find_weights(folder)
    if path is None:
        raise FileNotFoundError(
            f"{folder} must hold model.safetensors or pytorch_model.bin, or their "
            "shards and index, but has neither."
        )
    if path.suffix != ".json":
        return read_file(path)
    shards = [read_file(folder / shard) for shard in read_index(path)]
    return {name: weight for shard in shards for name, weight in shard.items()}


def read_index(path: Path) -> list[str]:
    """Names of the shards beside the index `path`."""
    try:
        shards = sorted(set(json.loads(small_text(path))["weight_map"].values()))
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
        raise ValueError(
            f"{path} is damaged, fetch it again: {error!r:.200}"
        ) from error
    return shards


def read_file(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though the index names it.")
    if path.suffix == ".bin":
        from torch_file import load_state

        return load_state(path)
    try:
        with safe_open(path, "numpy"):  # checks the header as mx.load does not
            return mx.load(str(path))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, fetch it again: {error}") from error


def sanitize(weights: Weights) -> Weights:
    """Names and layouts of a whole model, transformers' -> ours."""
    parts = {
        "text_encoder": t5_files.sanitize,
        "audio_encoder": encodec_files.sanitize,
        "decoder": name_decoder,
    }
    if any(name.startswith("conditioner.") for name in weights):
        from style import StyleConditioner

        parts["conditioner"] = StyleConditioner.sanitize
    grouped = {part: {} for part in parts}
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part in parts:
            grouped[part][rest] = weight
        else:
            grouped["decoder"][name] = weight
    named = {}
    for part, own in grouped.items():
        try:
            named[part] = parts[part](own)
        except strict.Misfit as error:
            name, why = error.args
            raise strict.Misfit(f"{part}.{name}", why) from error
    return {k: w for part, own in named.items() for k, w in under(part, own).items()}
