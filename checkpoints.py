"""Checkpoints: where a model's files lie, and what is in them.

    files = read("stereo-small")  # a short name, a Hub id or a folder
    files.config, files.weights, files.tokenizer

A folder that `convert.py` wrote is read here: `config.json`, `model.safetensors` and
`spiece.model`. Published ones, audiocraft's and transformers', are read by
published.py, and fetched by hub.py; models that follow a sound are configured by
conditioning.py, those that are quantized by quantize.py. No MusicGen is built; the
weights have our names, and each is checked when it is loaded. Needs decoder.py,
encodec.py, options.py and t5.py beside it; limits.py is needed to refuse a stranger's
config of absurd sizes.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from safetensors import SafetensorError, safe_open

import decoder
from decoder import DecoderConfig
from encodec import EncodecConfig
from options import DTYPES
from t5 import T5Config, Tokenizer

TINY = Path(__file__).with_name("tiny")
KINDS = ("small", "medium", "large", "melody", "melody-large")
SHORT_NAMES = {*KINDS, *(f"stereo-{k}" for k in KINDS), "style", "audiogen-medium"}
SHORT_NAMES |= {f"magnet-{size}-{s}secs" for size in KINDS[:2] for s in (10, 30)}
SHORT_NAMES |= {f"audio-magnet-{size}" for size in KINDS[:2]}


@dataclass
class MusicGenConfig:
    """Configs of the models, and the longest audio in seconds that it knows."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text_encoder: T5Config | None = field(default_factory=T5Config)  # None: no text
    audio_encoder: EncodecConfig = field(default_factory=EncodecConfig)
    max_duration: float = 30.0
    quantization: dict | None = None  # of the decoder: bits, group_size, mode
    default_duration: float = 8.0  # seconds, where none are given
    default_stride: float | None = None  # between windows; None: 3/5 of max_duration
    masking: dict | None = None  # of a MAGNeT: span_len, subcodes_context
    conditioner: Any = None  # config of the file that turns a sound into a prefix


class Checkpoint(NamedTuple):
    """What a model's files hold."""

    path: Path  # of the config, or of audiocraft's decoder
    config: MusicGenConfig
    weights: dict[str, mx.array]  # by our names
    tokenizer: Tokenizer | None  # None: there is no text
    dtype: mx.Dtype  # in which the decoder was published or written
    read_text_encoder: Callable[[], dict[str, mx.array]]  # its weights once more
    misfit: Callable[[Exception], str]  # why the weights do not load, in a line

    @property
    def revision(self) -> str | None:
        """Of a folder in the Hub's cache."""
        folder = self.path.parent
        return folder.name if folder.parent.name == "snapshots" else None


def read(name: str) -> Checkpoint:
    """A model by short name, Hub id or local folder.

    Raises ValueError or OSError naming the file, tensor or key and what to do.
    """
    folder = locate(name)
    path = folder / "config.json"
    settings = read_json(path) if path.exists() else {}
    if "decoder_dtype" not in settings:
        import published

        path, settings, weights, tokenizer, read_text, misfit = published.read(folder)
    else:
        pieces = folder / "spiece.model"
        has_text = settings.get("text_encoder", {}) is not None
        if has_text and not pieces.is_file():
            raise FileNotFoundError(say(folder, "must hold spiece.model but lacks it"))
        tokenizer = Tokenizer(pieces) if has_text else None
        weights = read_weights(folder)
        read_text = lambda: read_weights(folder, "text_encoder.")  # noqa: E731
        misfit = lambda e: say(folder, f"does not load: {e}")  # noqa: E731
    try:
        config = read_config(settings)
        if config.quantization is not None:
            from quantize import check_stored

            check_stored(config.quantization, weights)
        if tokenizer:
            tokenizer.check(config.text_encoder)
        dtype = DTYPES[settings.get("decoder_dtype", "float16")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(say(path, f"does not load: {error}")) from error
    return Checkpoint(path, config, weights, tokenizer, dtype, read_text, misfit)


def say(path: Path | str, why: str) -> str:
    return f"{path!s:.150} {repr(' '.join(why.split()))[1:-1]:.230}"  # in a line


def read_json(path: Path) -> dict:
    """The object in a file. Raises ValueError when it holds none."""
    try:
        if path.stat().st_size > 2**26:  # memory might not hold it
            raise ValueError("it must be at most 64 MB")
        settings = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(say(path, f"does not load: {error}")) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path!s:.200} must hold an object, got {settings!r:.40}")
    return settings


def read_weights(folder: Path, of: str = "") -> dict[str, mx.array]:
    """The tensors of a folder that `convert.py` wrote; T5 and codec in float32. `of` is
    the beginning of names that are read, and taken away."""
    path = folder / "model.safetensors"
    if not path.is_file():
        import published

        found = published.read_weights(folder)  # in shards, say
    else:
        try:
            with safe_open(path, "numpy"):  # checks the header as mx.load does not
                found = mx.load(str(path))
        except (RuntimeError, SafetensorError) as e:
            raise ValueError(say(path, f"is damaged, fetch it again: {e}")) from e
    melody, sound = "decoder.melody_proj.", "decoder.sound_proj."  # once, and now
    weights = {name.replace(melody, sound): weight for name, weight in found.items()}
    if len(weights) < len(found):
        raise ValueError(f"{path!s:.200}: {sound} is there twice, under two spellings")
    for name, weight in weights.items():
        packed = f"{name.rpartition('.')[0]}.scales" in weights  # see quantize.py
        if not (packed or mx.issubdtype(weight.dtype, mx.floating)):
            why = f"{name:.150} must hold floats, but holds {weight.dtype}"
            raise ValueError(say(f"{path}:", why))
        if not name.startswith("decoder."):
            weights[name] = weight.astype(mx.float32)
    return {k.removeprefix(of): w for k, w in weights.items() if k.startswith(of)}


def locate(name: str) -> Path:
    """The folder of a model: a local one, or the Hub's cache of what it needs. Short
    names come first, and `tiny` is the folder beside this file; `./tiny` is another."""
    beside = {"tiny": TINY, "tiny-magnet": TINY.with_name("tiny-magnet")}
    folder = beside.get(name, Path(os.path.expanduser(name)))
    if name and name not in SHORT_NAMES and os.path.isdir(folder):  # whatever the name
        return folder
    if name in beside:
        raise FileNotFoundError(
            f"{folder!s:.150} must hold config.json, model.safetensors and spiece.model: "
            "copy that folder, too, from where these scripts are from."
        )
    from hub import fetch

    return fetch(name)


def read_config(settings: dict) -> MusicGenConfig:
    """The config in a nested `config.json`, published or ours.

    Raises ValueError for what is missing, not ported, or absurd.
    """
    if has_limits := Path(__file__).with_name("limits.py").is_file():
        from limits import check_parts, check_settings

        check_settings(settings)
    conditioner, text = None, settings["text_encoder"]
    section = settings.get("conditioner")
    legacy = settings["decoder"].get("num_chroma")  # we wrote it there once
    if settings["model_type"] != "musicgen" or section is not None or legacy:
        from conditioning import read_config as read_conditioner

        conditioner = read_conditioner(settings)
    names = [field.name for field in fields(MusicGenConfig)][3:-1]  # after the models
    config = MusicGenConfig(
        decoder.read_config(settings["decoder"], getattr(conditioner, "width", 0)),
        text and T5Config.from_dict(text),
        EncodecConfig.from_dict(settings["audio_encoder"]),
        conditioner=conditioner,
        **{name: settings[name] for name in names if name in settings},
    )
    if has_limits:
        check_parts(config)
    return config
