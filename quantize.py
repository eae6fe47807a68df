"""Quantization: a decoder's matrices in few bits, with a scale for each group of weights.

    quantize(model.decoder, bits=8)
    quantize(model.decoder, mode="mxfp4")

The modes are MLX's, with the names and defaults of mlx-lm (`MODES`):

    affine         whole numbers of 2 to 8 bits, times a scale, plus a bias
    mxfp4, mxfp8   floats of 4 or 8 bits; 32 of them share a power of two
    nvfp4          floats of 4 bits; 16 of them share a float of 8 bits

What a mode costs in quality is measured by `python fidelity.py`. Stands alone: of a
decoder it takes `layers`, and the sizes `hidden_size` and `ffn_dim` of its `config`.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from decoder import Decoder
    from musicgen import MusicGen


class Mode(NamedTuple):
    """What MLX can do in a mode. The first of each is what the mode takes unasked."""

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]  # weights in a row that share a scale


MODES = {
    "affine": Mode((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": Mode((4,), (32,)),
    "nvfp4": Mode((4,), (16,)),
    "mxfp8": Mode((8,), (32,)),
}
BITS = sorted({bits for mode in MODES.values() for bits in mode.bits})
GROUP_SIZES = sorted({size for mode in MODES.values() for size in mode.group_sizes})


def complete(
    bits: int | None = None, group_size: int | None = None, mode: str | None = None
) -> dict[str, Any]:
    """The settings as mlx-lm writes them into config.json, under `quantization`.

    What is None is the mode's own; the mode itself is then affine. Raises ValueError
    for what MLX cannot do.
    """
    mode = "affine" if mode is None else mode
    own = MODES[mode] if isinstance(mode, str) and mode in MODES else MODES["affine"]
    settings = {
        "group_size": own.group_sizes[0] if group_size is None else group_size,
        "bits": own.bits[0] if bits is None else bits,
        "mode": mode,
    }
    check_quantization(settings)
    return settings


def asked(
    bits: int | None = None, group_size: int | None = None, mode: str | None = None
) -> dict[str, Any]:
    """Of the settings those that a caller means: none where nothing is given, and a
    group size only where one is. Raises ValueError for what MLX cannot do."""
    if bits is None and mode is None:
        if group_size is not None:
            raise ValueError("q_group_size must come with q_bits or q_mode.")
        return {}
    settings = complete(bits, group_size, mode)
    if group_size is None:
        del settings["group_size"]
    return settings


def check_quantization(settings: dict[str, Any]) -> None:
    """Raise ValueError unless MLX can quantize so. Older folders have no mode."""
    keys = {"bits", "group_size"}
    if not isinstance(settings, dict) or settings.keys() | {"mode"} != keys | {"mode"}:
        raise ValueError(
            "quantization must give bits and group_size, and perhaps a mode, got "
            f"{settings!r:.80}."
        )
    mode = settings.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"q_mode must be one of {', '.join(MODES)}, got {mode!r:.80}.")
    for name, choices in zip(("bits", "group_size"), MODES[mode]):
        value = settings[name]
        if type(value) is not int or value not in choices:
            words = ", ".join(map(str, sorted(choices)))
            some = "one of " if len(choices) > 1 else ""
            raise ValueError(
                f"q_{name} must be {some}{words} in the q_mode {mode}, got "
                f"{value!r:.80}."
            )


def quantize(
    decoder: "Decoder",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
) -> dict[str, Any]:
    """Store the layers' matrices in `bits` bits, with a scale for each group.

    Embeddings and output heads stay as they are, and the keys and values of the text,
    which are made once. Returns the settings, complete. Raises ValueError for what MLX
    cannot do, and for a decoder that is quantized already.
    """
    settings = complete(bits, group_size, mode)
    if not any(in_every_step(*named) for named in decoder.named_modules()):
        raise ValueError(
            "The decoder has no matrix to quantize: it is quantized already. Load the "
            "model that it was made from."
        )
    width, size = common_width(decoder), settings["group_size"]
    if width % size:
        fitting = [
            f"{size} of {name}"
            for name, own in MODES.items()
            for size in sorted(own.group_sizes)
            if width % size == 0
        ]
        raise ValueError(
            f"q_group_size must divide the matrices' width, a multiple of {width}; got "
            f"{size}. What does: "
            f"{', '.join(fitting) or f'none of any mode, as none divides {width}'}."
        )
    nn.quantize(decoder, **settings, class_predicate=in_every_step)
    return settings


def common_width(decoder: "Decoder") -> int:
    """Of which the widths of all that is quantized are multiples."""
    return math.gcd(decoder.config.hidden_size, decoder.config.ffn_dim)


def in_every_step(name: str, module: nn.Module) -> bool:
    """Whether a decoder's module is a matrix of a layer that each step reads."""
    in_layer = isinstance(module, nn.Linear) and name.startswith("layers.")
    return in_layer and not name.endswith("kv_proj")


def quantize_model(
    model: "MusicGen",
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
) -> None:
    """Quantize a model's decoder, unless nothing is given or it is so already.

    Raises ValueError where it is in another way, or MLX cannot do it.
    """
    wanted, stored = asked(bits, group_size, mode), model.config.quantization
    if wanted and stored is None:
        model.config.quantization = quantize(model.decoder, **wanted)
        return
    stored = {"mode": "affine"} | (stored or {})
    if any(stored[name] != value for name, value in wanted.items()):
        raise ValueError(
            f"{model.name:.100} has {stored['bits']} bits a weight already, of the q_mode "
            f"{stored['mode']} in groups of {stored['group_size']}: leave out q_bits, "
            "q_group_size and q_mode, or quantize the original."
        )


def check_stored(settings: Any, weights: dict[str, mx.array]) -> None:
    """Raise ValueError unless MLX can quantize so, and the arrays of a file are such.

    MLX would take scales of another kind for numbers without a word.
    """
    check_quantization(settings)
    mode = settings.get("mode", "affine")
    scales = mx.floating if mode == "affine" else mx.uint8
    kinds = {"weight": mx.uint32, "scales": scales, "biases": mx.floating}
    for name, weight in weights.items():
        stem, _, part = name.rpartition(".")
        kind = kinds.get(part, mx.floating)
        if f"{stem}.scales" in weights and not mx.issubdtype(weight.dtype, kind):
            wanted = "floats" if kind == mx.floating else str(kind)
            raise ValueError(
                f"{name:.150} must hold {wanted.removeprefix('mlx.core.')} in the q_mode "
                f"{mode}, but holds {str(weight.dtype).removeprefix('mlx.core.')}."
            )


def add_flags(add: Callable) -> None:
    """The flags of a command line, by its parser's `add_argument`."""
    bits = "quantize the decoder's layers: bits a weight (default: the mode's own)"
    add("--q-bits", type=int, choices=BITS, help=bits)
    size = "weights that share a scale (default: the mode's own)"
    add("--q-group-size", type=int, choices=GROUP_SIZES, help=size)
    add("--q-mode", choices=MODES, help="how they are stored (default: affine)")
