"""audiocraft's files: Meta's layout -> configs and arrays by our names.

`state_dict.bin` holds the decoder, the projections and what a conditioner has learned;
`compression_state_dict.bin` the codec, or the name of one. Both are pickles of torch,
with their settings as a text of YAML. `checkpoint.th`, which the training saves, holds
the decoder, too, and the settings as objects of omegaconf. Needs torch_file.py,
decoder_names.py, ported.py and strict.py beside it. No model is built.

    package = read_decoder(Path("musicgen/state_dict.bin"))
    package.config, package.decoder, package.conditioner
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from decoder_names import COMPUTED, name_decoder, spell
from ported import (
    DELAY,
    SILENT,
    check_codec,
    check_coders,
    check_decoder,
    check_sizes,
    codec_sizes,
    decoder_sizes,
    is_magnet,
    number,
)
from strict import Misfit, in_a_line, misfit
from torch_file import check_state, load_torch

FILES = ("state_dict.bin", "compression_state_dict.bin")
DECODERS = (FILES[0], "checkpoint.th")  # what is exported comes first
KEYS = ("pretrained", "fsdp_best_state", "best_state", "xp.cfg")  # that are read


def find_decoder(folder: Path) -> Path | None:
    """The first of DECODERS that is there."""
    return next((folder / name for name in DECODERS if (folder / name).is_file()), None)


@in_a_line
def load_package(path: Path) -> dict[str, Any]:
    """Read what audiocraft exported, or saved in training: `best_state`, tensors by
    name, and `xp.cfg`, a text or a dict; or `pretrained`.

    Raises ValueError naming the file when it holds neither.
    """
    package = load_torch(path, KEYS)
    if not isinstance(package, dict):
        raise ValueError(f"{path} must hold what audiocraft exports, but does not.")
    if isinstance(package.get("pretrained"), str):
        return package
    settings = package.get("xp.cfg", "")
    if "best_state" not in package or not isinstance(settings, str | dict):
        raise ValueError(f"{path} must hold what audiocraft exports, but does not.")
    package["best_state"] = check_state(path, best_state(path, package))
    return package


def best_state(path: Path, package: dict[str, Any]) -> Any:
    """The state by names of tensors, which in training lies below "model"; that of all
    processes (FSDP) comes first. Raises ValueError where the training has none yet."""
    states = [package.get(key) for key in ("fsdp_best_state", "best_state")]
    nested = [s for s in states if isinstance(s, dict) and type(s.get("model")) is dict]
    if not nested:
        return package["best_state"]
    if state := next((s["model"] for s in nested if s["model"]), None):
        return state
    raise ValueError(
        f"{path} must hold a best state, but it is empty. Let the training run to a "
        "validation, or take a file that audiocraft's export_lm wrote."
    )


def read_settings(package: dict[str, Any]) -> dict[str, Any]:
    """`xp.cfg` of either form, as `read_yaml` gives it."""
    settings = package.get("xp.cfg", "")
    return read_yaml(settings) if isinstance(settings, str) else flatten(settings)


MOST_SETTINGS = 10_000  # a hostile tree may hold one branch in a great many places


def flatten(settings: dict[Any, Any]) -> dict[str, Any]:
    """The same of the settings as objects: scalars and lists of scalars, as texts."""
    values, todo = {}, [("", settings)]
    for _ in range(MOST_SETTINGS):
        if not todo:
            return {name: resolve(value, values) for name, value in values.items()}
        name, value = todo.pop()
        if isinstance(value, dict) and value:
            stem = f"{name}." if name else ""
            todo += [(f"{stem}{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            values[name] = [in_yaml(item) for item in value if is_scalar(item)]
        elif is_scalar(value) or value == {}:
            values[name] = in_yaml(value)
        if len(todo) > MOST_SETTINGS or len(name) > 1000:
            break
    raise ValueError("xp.cfg holds more settings than any training has")


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def in_yaml(value: Any) -> str:
    """A setting as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_yaml(text: str) -> dict[str, Any]:
    """Scalars and lists of scalars of a YAML text, as strings, by dotted name.

    Knows the block style that OmegaConf writes, which is how the checkpoints
    keep their settings, and lists in brackets; passes over texts of several
    lines; resolves values like `${encodec.causal}`.
    """
    values, path, text_indent = {}, [], math.inf
    for line in text.splitlines():
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        if not body or body.startswith("#") or indent > text_indent:
            continue
        text_indent = math.inf
        key, colon, value = body.partition(":")
        value = scalar(value)
        if body.startswith("- "):
            name = ".".join(name for _, name in path)
            if not isinstance(values.get(name), list):
                values[name] = []
            values[name].append(scalar(body[2:]))
        elif colon:
            path = [part for part in path if part[0] < indent] + [(indent, key)]
            if value.startswith(("|", ">")):
                value, text_indent = "", indent
            elif value.startswith("["):
                items = value.strip("[]").split(",")
                value = [scalar(item) for item in items if item]
            if value or value == []:
                values[".".join(name for _, name in path)] = value
    return {name: resolve(value, values) for name, value in values.items()}


def scalar(text: str) -> str:
    """A YAML value without its quotes, or without the comment behind it."""
    text = text.strip()
    quoted = re.match(r"'([^']*)'|\"([^\"]*)\"", text)
    if quoted:
        return quoted[1] or quoted[2] or ""
    return re.split(r"\s#", text)[0].rstrip()


def resolve(value: Any, values: dict[str, Any]) -> Any:
    """Follow references like `${name}`; one that leads nowhere is empty."""
    for _ in range(20):
        match = re.fullmatch(r"\$\{(.+)\}", value) if isinstance(value, str) else None
        if not match:
            return value
        value = values.get(match[1], "")
    return ""


# The codec


@in_a_line
def find_codec(path: Path, package: dict[str, Any]) -> str | None:
    """The Hub repository of the codec that a `compression_state_dict.bin` only names.
    None: it holds the codec."""
    if "pretrained" not in package:
        return None
    repo = str(package["pretrained"])
    if not re.fullmatch(r"[\w-][\w.-]{,95}/[\w-][\w.-]{,95}", repo):
        raise ValueError(f"{path} must name a Hub repository, got {repo!r:.80}.")
    return repo


@in_a_line
def read_codec(
    path: Path, package: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Settings as in transformers' `config.json`, and tensors by audiocraft's names."""
    try:
        weights, cfg = package["best_state"], read_settings(package)
        check_codec(cfg)
        settings = codec_settings(weights, cfg)
        check_sizes(cfg, codec_sizes(weights, settings, cfg))
        if kernels(weights, "encoder") == kernels(weights, "decoder"):
            check_coders(cfg, settings)  # else one is missing, which loading tells
        return settings, weights
    except KeyError as error:
        raise ValueError(f"{path} lacks {error!s:.200}.") from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} does not load: {misfit(error)}") from error


LSTM = ".lstm.weight_"  # before "ih_l0" and the like
WEIGHT_NORM = ("parametrizations.weight.original1", "weight_v")
CONV = r"(encoder|decoder)\.model\.(.+)\.conv(?:tr)?\.conv(?:tr)?\.weight_v"


def kernels(weights: dict[str, mx.array], part: str) -> int:
    """How many a coder has outside of its blocks: as many as the other one."""
    return sum(
        (match := re.fullmatch(CONV, name.replace(*WEIGHT_NORM))) is not None
        and match[1] == part
        and match[2].isdigit()
        for name in weights
    )


class Shapes(dict):
    """Shapes of kernels by the coder and the place in it."""

    def __missing__(self, key: tuple[str, str]) -> None:
        raise KeyError("{}.model.{}.conv.conv.weight_v".format(*key))


def codec_settings(weights: dict[str, mx.array], cfg: dict) -> dict[str, Any]:
    """What the shapes show and what `cfg` alone tells.

    `cfg` maps dotted names of `xp.cfg` to strings. Where it is silent the
    defaults of audiocraft's code hold.
    """
    # of the kernels (out, in, kernel), and (in, out, kernel) where the codec upsamples
    shapes = Shapes()
    for name, weight in weights.items():
        name = name.replace(*WEIGHT_NORM)
        if match := re.fullmatch(CONV, name):
            shapes[match.group(1, 2)] = weight.shape
    filters, channels, kernel_size = shapes["encoder", "0"]
    places = sorted(int(n) for part, n in shapes if part == "decoder" and n.isdigit())
    if len(places) < 3:  # first, one that upsamples, last
        raise KeyError("kernels of decoder.model")
    _, *upsampling, last = places
    hidden, _, residual_kernel_size = shapes["encoder", "1.block.1"]
    entries, width = weights["quantizer.vq.layers.0._codebook.embed"].shape
    embeds = [re.search(r"\.(\d+)\._codebook\.embed$", name) for name in weights]
    codebooks = 1 + max(int(match[1]) for match in embeds if match)
    codebooks = max(codebooks, int(cfg.get("rvq.n_q", 0)))
    rate = int(cfg.get("encodec.sample_rate") or cfg.get("sample_rate", 32000))
    ratios = [shapes["decoder", str(n)][2] // 2 for n in upsampling]
    bits = codebooks * math.ceil(math.log2(entries))
    return dict(
        audio_channels=channels,
        sampling_rate=rate,
        target_bandwidths=[bits * math.ceil(rate / math.prod(ratios)) / 1000],
        normalize=flag("encodec.renormalize", cfg.get("encodec.renormalize", "false")),
        chunk_length_s=None,
        overlap=None,
        hidden_size=width,
        num_filters=filters,
        num_residual_layers=places[2] - places[1] - 2,
        upsampling_ratios=ratios,
        norm_type="weight_norm",
        kernel_size=kernel_size,
        last_kernel_size=shapes["decoder", str(last)][2],
        residual_kernel_size=residual_kernel_size,
        dilation_growth_rate=int(cfg.get("seanet.dilation_base", 2)),
        use_causal_conv=flag("seanet.causal", cfg.get("seanet.causal", "false")),
        pad_mode=cfg.get("seanet.pad_mode", "reflect"),
        compress=filters // hidden,
        num_lstm_layers=len({n.rpartition("_l")[2] for n in weights if LSTM in n}),
        trim_right_ratio=1.0,
        codebook_size=entries,
        use_conv_shortcut=any(".shortcut." in name for name in weights),
    )


# The decoder

SELF_WAV = "condition_provider.conditioners.self_wav."  # the conditioner of a sound
WINDOW = f"{SELF_WAV}chroma.spec.window"


class Package(NamedTuple):
    """What a `state_dict.bin` holds."""

    cfg: dict[str, Any]  # `xp.cfg`: dotted names -> texts; lists
    config: dict[str, Any]  # the decoder's, as in our config.json
    decoder: dict[str, mx.array]  # weights by our names
    conditioner: dict[str, mx.array]  # weights by audiocraft's names
    window: int | None  # samples of a melody's frame, where the weights show it


@in_a_line
def read_decoder(path: Path) -> Package:
    """Read one of DECODERS. Raises ValueError naming the file and what it lacks, or the
    setting that is not ported."""
    package = load_package(path)
    try:
        cfg = read_settings(package)
        check_decoder(cfg)
        decoder, conditioner = split_conditioner(package["best_state"])
        config = decoder_settings(decoder, cfg)
        check_sizes(cfg, decoder_sizes(config, cfg))
        window = package["best_state"].get(WINDOW)
        size = None if window is None else window.size
        return Package(cfg, config, name_decoder(decoder), conditioner, size)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error!s:.200}.") from error
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not load: {misfit(error, spell)}") from error


def split_conditioner(
    weights: dict[str, mx.array],
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The decoder's weights, with the projection of the sound's states; and those of
    the conditioner of a sound, by their names in it."""
    decoder, conditioner = {}, {}
    for name, weight in weights.items():
        stem = name.removeprefix(SELF_WAV)
        if stem == name or stem.startswith("output_proj.") or name.endswith(COMPUTED):
            decoder[name] = weight
        else:
            conditioner[stem] = weight
    return decoder, conditioner


def decoder_settings(weights: dict[str, mx.array], cfg: dict) -> dict[str, Any]:
    """What the shapes show and what `cfg` alone tells.

    Where `cfg` is silent the published models' values hold: heads of width 64, and
    the delays that belong to the number of codebooks.
    """
    tables = [re.sub(r"^(emb|linears)\.\d+\.weight$", r"\1", name) for name in weights]
    K = max(tables.count("emb"), tables.count("linears"))
    entries, D = weights["emb.0.weight"].shape
    layers = {name.split(".")[2] for name in weights if "transformer.layers." in name}
    stereo = cfg.get("interleave_stereo_codebooks.use", str(K == 8).lower())
    name = f"{SELF_WAV}output_proj.weight"
    prefix = weights.get(name)
    if prefix is None and "self_wav" in (cfg.get("fuser.prepend") or ""):
        raise KeyError(name)
    config = dict(
        vocab_size=entries - 1,
        hidden_size=D,
        num_hidden_layers=len(layers),
        num_attention_heads=int(cfg.get("transformer_lm.num_heads", D // 64)),
        ffn_dim=weights["transformer.layers.0.linear1.weight"].shape[0],
        num_codebooks=K,
        audio_channels=2 if stereo == "true" else 1,
        prefix_width=0 if prefix is None else prefix.shape[1],
    )
    if is_magnet(cfg):
        config["delays"] = [0] * K
    elif (delays := cfg.get(f"{DELAY}delays")) not in SILENT:
        config["delays"] = [int(delay) for delay in delays]
    elif "codebooks_pattern.modeling" in cfg:  # as audiocraft has it, in stereo, too
        config["delays"] = list(range(K))
    return config


def masking_settings(cfg: dict[str, Any]) -> dict[str, int]:
    """How a MAGNeT was masked; the context has audiocraft's default."""
    names = {"span_len": "masking.span_len"}
    names["subcodes_context"] = context = "transformer_lm.subcodes_context"
    cfg = {context: "5"} | cfg
    return {own: number(name, cfg[name], int) for own, name in names.items()}


# What a take follows: the settings of conditioners of sounds.
#
# A setting that shapes a condition is followed, or refused by its name; those of the
# training alone are passed over; a name that audiocraft does not know is refused, as
# audiocraft does.

CHROMA = "conditioners.self_wav.chroma_stem."
CHROMA_RATE = 32000  # samples per second of which chroma is made
CHROMA_PASSED_OVER = (
    "match_len_on_eval",  # audiocraft itself sets it when it loads a model
    "n_eval_wavs",  # of eval_wavs, which are refused
    "cache_path",  # of the training
)


@in_a_line
def melody_settings(cfg: dict[str, Any], window: int | None = None) -> dict[str, Any]:
    """Values of MelodyConfig. `window` counts the samples of `chroma.spec.window`,
    which audiocraft keeps among the weights.

    Raises ValueError for settings that are not followed.
    """
    settings = section(cfg, CHROMA)
    exponent = number("radix2_exp", settings.get("radix2_exp", "14"), int)
    if not 6 <= exponent <= 17:  # before a power is taken of what a stranger wrote
        raise ValueError(f"radix2_exp must be from 6 to 17, got {exponent}")
    n_fft = 2**exponent
    if window is not None and window != n_fft:
        if "radix2_exp" in settings or window not in [2**i for i in range(6, 18)]:
            raise ValueError(
                f"radix2_exp must be that of the {window} samples of the window in the "
                f"weights, got {exponent}"
            )
        n_fft = window
    # audiocraft's default is false, and all published models have true
    argmax = flag("argmax", settings.get("argmax", "false" if settings else "true"))
    check_fixed("chroma_stem", settings, chroma_fixed(n_fft), CHROMA_PASSED_OVER)
    seconds = number("segment_duration", cfg.get("dataset.segment_duration", "30"))
    if not 0 < seconds <= 600:
        raise ValueError(f"segment_duration must be from 0 to 600 s, got {seconds}")
    samples = max(int(seconds * CHROMA_RATE), n_fft)
    return dict(
        kind="melody",
        num_chroma=number("n_chroma", settings.get("n_chroma", "12"), int),
        chroma_length=1 + samples // (n_fft // 4),
        n_fft=n_fft,
        argmax=argmax,
    )


def chroma_fixed(n_fft: int) -> dict[str, tuple[str, ...]]:
    """The values of each setting of chroma that are followed; () is any."""
    return {
        "n_chroma": (),
        "radix2_exp": (),
        "argmax": (),
        "sample_rate": (str(CHROMA_RATE),),
        "eval_wavs": ("null",),  # with them the melody that is given is not heard
        "nfft": (str(n_fft),),
        "winlen": (str(n_fft),),
        "winhop": (str(n_fft // 4),),
        "norm": (".inf", "inf"),
    }


STYLE = "conditioners.self_wav.style."
SCALES = {"xsmall": 8, "default": 8, "large": 16}  # heads of each transformer_scale
CODECS = ("//pretrained/facebook/encodec_32khz", "facebook/encodec_32khz")
STYLE_PASSED_OVER = (  # of the training; `length` and `varying_lengths` are followed
    "q_dropout",
    "compute_mask",
    "num_codebooks_lm",
    "ds_rate_compression",
    "rvq_threshold_ema_dead_code",
)


@in_a_line
def style_settings(weights: dict[str, mx.array], cfg: dict[str, Any]) -> dict[str, Any]:
    """Values of StyleConfig but `mert`, which is to be read where `encodec_n_q` is 0;
    from our weights, those of `StyleConditioner.sanitize`, and the settings.

    Raises ValueError for settings that are not followed, or tell of other weights.
    """
    for name in ("codebooks", "layers.0.linear1.weight"):
        if name not in weights:
            raise Misfit(name, "is missing")
    if (shape := weights["layers.0.linear1.weight"].shape)[1:] == ():
        raise Misfit(name, f"must have 2 dimensions, got {shape}")
    settings = section(cfg, STYLE)
    quantizers, bins, width = weights["codebooks"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    embeds = [re.fullmatch(r"embed\.(\d+)\.weight", name) for name in weights]
    count = 1 + max((int(match[1][:9]) for match in embeds if match), default=-1)
    config = dict(kind="style", width=width, num_layers=len(layers), bins=bins)
    config |= dict(num_quantizers=quantizers, encodec_n_q=count)
    config["hidden"] = weights["layers.0.linear1.weight"].shape[0]
    rate = cfg.get("sample_rate") or "32000"
    check_fixed("style", settings, style_fixed(config, rate), STYLE_PASSED_OVER)
    for name, value in style_sizes(config).items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value}, as in the weights, got {settings[name]}"
            )
    config["num_heads"] = SCALES[settings.get("transformer_scale", "default")]
    for name, kind in (("eval_q", int), ("ds_factor", int), ("length", float)):
        if name in settings:
            config[name] = number(name, settings[name], kind)
    if "varying_lengths" in settings:
        lengths = settings["varying_lengths"]
        lengths = lengths if isinstance(lengths, list) else [lengths]
        config["varying_lengths"] = [number("varying_lengths", x) for x in lengths]
    return config


def style_fixed(config: dict[str, int], rate: str) -> dict[str, tuple[str, ...]]:
    """The values of each setting of style that are followed; () is any."""
    return {
        "eval_q": (),
        "ds_factor": (),
        "length": (),
        "varying_lengths": (),
        "transformer_scale": tuple(SCALES),
        "batch_norm": ("true",),
        "use_middle_of_segment": ("false",),
        "sample_rate": (rate,),
        "encodec_checkpoint": CODECS if config["encodec_n_q"] else (),
    } | {name: () for name in style_sizes(config) | {"encodec_n_q": ""}}


def style_sizes(config: dict[str, int]) -> dict[str, str]:
    """Settings that tell what the weights show."""
    sizes = {"n_q_out": str(config["num_quantizers"]), "bins": str(config["bins"])}
    if config["encodec_n_q"] == 0:
        return sizes | {"model_name": "mert"}
    return sizes | {"model_name": "encodec", "encodec_n_q": str(config["encodec_n_q"])}


METHODS = ("sum", "cross", "prepend", "input_interpolate")


def has_text(package: Package) -> bool:
    """Whether a text reaches the decoder, alone or with a sound, as its weights or its
    settings tell."""
    names = [*package.cfg, *package.decoder]
    return any(
        name.startswith(("conditioners.description.", "output_proj.", "sound_proj."))
        or ".cross_attention." in name
        for name in names
    )


@in_a_line
def check_conditions(
    cfg: dict[str, Any], has_sound: bool, has_text: bool = True
) -> None:
    """Raise ValueError for other ways in which text, and with `has_sound` a sound,
    reach the decoder: text is attended, or it and the sound come before the codes."""
    lists = {m: cfg[f"fuser.{m}"] for m in METHODS if f"fuser.{m}" in cfg}
    wanted = {"cross": {"description"}} if has_text else {}
    if has_sound:
        wanted = {"prepend": {"self_wav", "description"}}
    for method in METHODS if lists else ():
        names, want = lists.get(method, []), wanted.get(method, set())
        names = set(names if isinstance(names, list) else [names])
        if names != want:
            raise ValueError(
                f"fuser.{method} must list {', '.join(sorted(want)) or 'nothing'}, got "
                f"{', '.join(sorted(names)) or 'nothing'}"
            )
    for name in ("fuser.cross_attention_pos_emb", T5_SETTINGS + "normalize_text"):
        if flag(name, cfg.get(name, "false")):
            raise ValueError(f"{name} must be false, got {cfg[name]}")


T5_SETTINGS = "conditioners.description.t5."


def section(cfg: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The settings below a dotted name, without those that say nothing."""
    own = {k.removeprefix(prefix): v for k, v in cfg.items() if k.startswith(prefix)}
    return {name: value for name, value in own.items() if value not in SILENT}


def check_fixed(
    part: str,
    settings: dict[str, Any],
    fixed: dict[str, tuple[str, ...]],
    passed_over: tuple[str, ...],
) -> None:
    """Raise ValueError for settings of a part that are not followed."""
    for name, value in settings.items():
        if name in passed_over:
            continue
        if name not in fixed:
            raise ValueError(
                f"{name} is set to {value} in {part}, which this program does not know"
            )
        text = str(value).lower() if str(value) in ("True", "False") else str(value)
        if fixed[name] and text not in fixed[name]:
            raise ValueError(f"{name} must be {' or '.join(fixed[name])}, got {value}")


def flag(name: str, text: str) -> bool:
    """A truth that `xp.cfg` gives as text."""
    if str(text).lower() not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {text}")
    return str(text).lower() == "true"
