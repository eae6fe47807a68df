"""What of audiocraft's settings is ported: the values that the code here computes.

A checkpoint's `xp.cfg` may ask for another activation, another pattern of codebooks,
another conditioner: with these the same weights sound otherwise. Each such setting is
refused by its name, and so is one that tells of other weights than there are. Settings
are texts by dotted names, as audiocraft.py reads them. Stands alone.

    check_decoder({"transformer_lm.past_context": "5"})  # raises ValueError
"""

import math
import re
from typing import Any

SILENT = (None, "", "null")  # a setting that says nothing

# The codec. Of SEANet's settings either coder may have its own, below its name.

CODEC = {
    "compression_model": "encodec",
    "encodec.autoencoder": "seanet",
    "encodec.quantizer": "rvq",
}
CODERS = ("encoder", "decoder")
SEANET = {
    "activation": "ELU",
    "activation_params.alpha": "1.0",
    "activation_params.inplace": "false",
    "final_activation": "null",
    "norm": "weight_norm",
    "disable_norm_outer_blocks": "0",
    "trim_right_ratio": "1.0",
}
SHOWN = ", as in the weights"


def check_codec(cfg: dict[str, Any]) -> None:
    """Raise ValueError for settings of a codec that is not ported."""
    check_said(cfg)
    for name, value in CODEC.items():
        check_value(name, cfg.get(name, value), value)
    for part in CODERS:
        check_coder(cfg, part, SEANET)


def check_coders(cfg: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError for settings of SEANet that are not those of the codec, spelled
    as in transformers' `config.json`, or that nobody knows."""
    sizes = seanet_sizes(settings)
    for part in CODERS:
        check_coder(cfg, part, sizes, SHOWN)
    check_names(cfg, {*SEANET, *sizes})


def check_coder(cfg: dict, part: str, wanted: dict[str, Any], why: str = "") -> None:
    """Raise ValueError for a setting of a coder that is not what is wanted."""
    for name, value in wanted.items():
        for full in (f"seanet.{part}.{name}", f"seanet.{name}"):
            if full in cfg:
                check_value(full, cfg[full], value, why)
                break  # for the coder's own stands before that of both


def check_names(cfg: dict[str, Any], known: set[str]) -> None:
    """Raise ValueError for a setting of SEANet that is not known."""
    known |= {"", "compress"}  # the latter is seen in the shapes alone
    free = ("norm_params", "activation_params", "final_activation_params")
    for name in cfg:
        own = re.sub(r"^(encoder|decoder)(\.|$)", "", name.removeprefix("seanet."))
        unfree = own.split(".")[0] not in free or own.startswith("activation_params.")
        if name.startswith("seanet.") and unfree and own not in known:
            raise ValueError(f"{name} is a setting that this program does not know")


def seanet_sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """What SEANet's settings must be beside such settings of the codec."""
    return {
        "dimension": settings["hidden_size"],
        "channels": settings["audio_channels"],
        "n_filters": settings["num_filters"],
        "n_residual_layers": settings["num_residual_layers"],
        "ratios": settings["upsampling_ratios"],
        "kernel_size": settings["kernel_size"],
        "last_kernel_size": settings["last_kernel_size"],
        "residual_kernel_size": settings["residual_kernel_size"],
        "lstm": settings["num_lstm_layers"],
        "true_skip": not settings["use_conv_shortcut"],
        "causal": settings["use_causal_conv"],
        "dilation_base": settings["dilation_growth_rate"],
        "pad_mode": settings["pad_mode"],
    }


def codec_sizes(weights: dict, settings: dict, cfg: dict[str, Any]) -> dict[str, Any]:
    """Sizes of the quantizer and of the sound, by their names in `xp.cfg`. Where tables
    are missing, which loading tells, more of them may be said to be there."""
    tables = sum(name.endswith("._codebook.embed") for name in weights)
    return {
        "encodec.channels": settings["audio_channels"],
        "rvq.bins": settings["codebook_size"],
        "rvq.n_q": max(tables, int(cfg.get("rvq.n_q", 0))),
    }


def check_said(cfg: dict[str, Any]) -> None:
    """Raise ValueError where no setting is there, though audiocraft writes all."""
    if not any(cfg):  # the names of settings
        raise ValueError("its xp.cfg is empty: take the file as audiocraft wrote it")


def check_sizes(cfg: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Raise ValueError for a setting that tells of other weights than there are."""
    for name, size in sizes.items():
        check_value(name, cfg.get(name, size), size, SHOWN)


def check_value(name: str, value: Any, wanted: Any, why: str = "") -> None:
    """Raise ValueError unless a setting says what is wanted, in whatever spelling."""
    if plain(value) != plain(wanted):
        wanted = wanted if isinstance(wanted, str) else str(wanted).lower()
        raise ValueError(f"{name} must be {wanted}{why}, got {value!s:.80}")


def plain(value: Any) -> Any:
    """A setting as a number, as a text in small letters, or as a list of these."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    try:
        return float(str(value))
    except ValueError:
        return str(value).lower() or "null"


# The decoder

SETTINGS = {
    "lm_model": "transformer_lm",
    "transformer_lm.activation": "gelu",
    "transformer_lm.norm_first": "true",
    "transformer_lm.positional_embedding": "sin",
    "transformer_lm.positional_scale": "1.0",
    "transformer_lm.max_period": "10000",
    "transformer_lm.norm": "layer_norm",
    "transformer_lm.causal": "true",
    "transformer_lm.past_context": "null",
    "transformer_lm.layer_scale": "null",
    "transformer_lm.kv_repeat": "1",
    "codebooks_pattern.modeling": "delay",
    "codebooks_pattern.delay.flatten_first": "0",
    "codebooks_pattern.delay.empty_initial": "0",
    "interleave_stereo_codebooks.per_timestep": "false",
}
HIDDEN_SCALE, DELAY = "transformer_lm.hidden_scale", "codebooks_pattern.delay."


MAGNET = {  # what its settings say otherwise
    "lm_model": "transformer_lm_magnet",
    "transformer_lm.causal": "false",
    "codebooks_pattern.modeling": "parallel",
}


def is_magnet(cfg: dict[str, Any]) -> bool:
    """Whether the decoder is MAGNeT's, which its tensors do not show."""
    return cfg.get("lm_model") == MAGNET["lm_model"]


def check_decoder(cfg: dict[str, Any]) -> None:
    """Raise ValueError for settings of a decoder that is not ported."""
    check_said(cfg)
    wanted = SETTINGS | (MAGNET if is_magnet(cfg) else {})
    for name, value in wanted.items():
        check_value(name, cfg.get(name, value), value)
    for name, value in cfg.items():
        if re.fullmatch(r"conditioners\.\w+\.model", name) and "self_wav" not in name:
            if name != "conditioners.description.model":
                raise ValueError(f"{name} is {value!s:.80}, which is not ported")
            check_value(name, value, "t5")
        own = name.startswith(DELAY) and name.removeprefix(DELAY)
        if own and f"{DELAY}{own}" not in SETTINGS and own != "delays":
            raise ValueError(f"{name} is a setting that this program does not know")


def decoder_sizes(config: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    """Settings that tell what the weights show."""
    K, D, scale = config["num_codebooks"], config["hidden_size"], HIDDEN_SCALE
    sizes = {
        "transformer_lm.dim": D,
        "transformer_lm.num_layers": config["num_hidden_layers"],
        "transformer_lm.card": config["vocab_size"],
        "transformer_lm.n_q": K,
    }
    if int(number(scale, cfg.get(scale, "4")) * D) != config["ffn_dim"]:
        sizes[scale] = config["ffn_dim"] / D  # audiocraft cuts the product
    used = plain(cfg.get("compression_model_n_q", "null"))
    if used not in ("null", K, K / config["audio_channels"]):
        sizes["compression_model_n_q"] = K
    return sizes


def number(name: str, text: str, kind: type = float) -> int | float:
    """A finite number that `xp.cfg` gives as text."""
    try:
        value = kind(text)
        if math.isfinite(value):
            return value
    except (OverflowError, TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be a number, got {text}")
