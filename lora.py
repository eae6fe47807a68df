"""Adapters: small changes to a decoder's layers, learned from a few clips.

Low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685). Beside each weight matrix
of the decoder's layers lies a product of two narrow matrices, and only these are
trained and saved. `train.py lora` makes an adapter. To use it:

    model = MusicGen.from_pretrained("small")
    load_adapter(model, "brass.safetensors", scale=0.8)

or `generate.py --adapter brass.safetensors`. Needs settings.py beside it; outputs.py is
needed to save one.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from settings import save_arrays

VERSION = 1  # of the file format
Linear = nn.Linear | nn.QuantizedLinear
SIZES = {  # sizes that must match: names in the file -> in the decoder's config
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "ffn_dim": "ffn_dim",
    "num_codebooks": "num_codebooks",
    "sound_width": "prefix_width",
}


class LoRALinear(nn.Module):
    """A linear layer with an adapter beside it: `layer(x) + scale * (x @ a) @ b`."""

    def __init__(self, layer: Linear, rank: int, scale: float):
        super().__init__()
        outputs, inputs = shape(layer)
        self.layer, self._scale = layer, scale
        self.a = mx.random.uniform(-1, 1, (inputs, rank)) / math.sqrt(inputs)
        self.b = mx.zeros((rank, outputs))  # a new adapter changes nothing

    def __call__(self, x: mx.array) -> mx.array:
        change = (x.astype(self.a.dtype) @ self.a) @ self.b
        return self.layer(x) + (self._scale * change).astype(x.dtype)

    def fused(self) -> nn.Linear:
        """The layer itself, with the adapter added to its weights."""
        change = self._scale * (self.a @ self.b).T
        weight = self.layer.weight
        self.layer.weight = (weight + change).astype(weight.dtype)
        return self.layer


def shape(layer: Linear) -> tuple[int, int]:
    """Outputs and inputs of a layer, quantized or not."""
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits  # words of 32 bits hold several weights
    return outputs, inputs


def add_adapters(decoder: nn.Module, rank: int, scale: float) -> None:
    """Put an adapter beside each linear layer in the decoder's layers.

    Raises ValueError unless `rank` is from 1 to the layers' width, and for a decoder
    that has adapters already.
    """
    if has_adapters(decoder):
        raise ValueError(
            "The model has an adapter already. Load the model again for another one."
        )
    width = decoder.config.hidden_size
    if type(rank) is not int or not 1 <= rank <= width:
        raise ValueError(f"rank must be from 1 to {width}, got {rank!r}.")
    for block, name, module in find(decoder, Linear):
        replace(block, name, LoRALinear(module, rank, scale))


def find(decoder: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    """The modules of a kind in the decoder's layers: the layer, the dotted name in it,
    and the module."""
    return [
        (block, name, module)
        for block in decoder.layers
        for name, module in block.named_modules()
        if isinstance(module, kind)
    ]


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of a dotted name."""
    *parents, last = name.split(".")
    for parent in parents:
        block = block[parent]
    block[last] = module


def fuse(decoder: nn.Module) -> None:
    """Add each adapter to its layer's weights. Beside quantized layers they stay."""
    for block, name, module in find(decoder, LoRALinear):
        if type(module.layer) is nn.Linear:
            replace(block, name, module.fused())


def has_adapters(decoder: nn.Module) -> bool:
    """Whether any layer has an adapter beside it. Fused ones do not count."""
    return bool(find(decoder, LoRALinear))


def save_adapter(
    path: str | Path, decoder: nn.Module, rank: int, settings: dict[str, Any]
) -> None:
    """Write the adapters as one safetensors file, with `settings` in its header.

    The file is written whole or not at all. Raises OSError.
    """
    arrays = {
        name: value.astype(mx.float32)
        for name, value in tree_flatten(decoder.parameters())
        if name.endswith((".a", ".b"))
    }
    sizes = {name: getattr(decoder.config, field) for name, field in SIZES.items()}
    metadata = dict(musicgen_adapter=VERSION, rank=rank, sizes=sizes) | settings
    save_arrays(path, arrays, {"adapter": json.dumps(metadata)})


def read_adapter(path: str | Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Arrays and metadata that `save_adapter` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged or no adapter.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no adapter {path}.")
    try:
        with safe_open(path, "numpy") as file:  # checks the header, too
            metadata = json.loads((file.metadata() or {}).get("adapter", "null"))
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no adapter: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("musicgen_adapter") != VERSION:
        raise ValueError(
            f"{path} must be an adapter that train.py wrote, but its header is of "
            "another kind or version."
        )
    return arrays, metadata


def load_adapter(
    model: nn.Module, path: str | Path, scale: float = 1.0, shared: bool = False
) -> None:
    """Add an adapter, weighted by `scale`, to the decoder of a MusicGen.

    It is added to the weights. Only beside quantized layers it stays separate, and such
    layers cannot be `shared` by processes.

    Raises FileNotFoundError, or ValueError for a scale beyond 100, an adapter of
    another model, and one that cannot be shared.
    """
    if not (isinstance(scale, int | float) and abs(scale) <= 100):
        raise ValueError(f"adapter_scale must be from -100 to 100, got {scale!r}.")
    arrays, metadata = read_adapter(path)
    check_adapter(model.decoder, arrays, metadata, path)
    add_adapters(model.decoder, metadata["rank"], scale)
    model.decoder.load_weights(list(arrays.items()), strict=False)
    fuse(model.decoder)
    if shared and has_adapters(model.decoder):
        raise ValueError(
            "An adapter on a quantized model cannot be shared by processes. Take the "
            "model that is not quantized."
        )


def check_adapter(
    decoder: nn.Module, arrays: dict[str, mx.array], metadata: dict, path: str | Path
) -> None:
    """Raise ValueError unless the adapter fits the sizes of the decoder.

    Models of the same sizes pass, since one may be a fine-tune of the other.
    """
    sizes, rank = metadata.get("sizes"), metadata.get("rank")
    if not isinstance(sizes, dict) or type(rank) is not int:
        raise ValueError(f"{path} must tell sizes and a rank, got {metadata!r:.80}.")
    for name, size in sizes.items():
        decoder_size = getattr(decoder.config, SIZES.get(name, name), None)
        if decoder_size != size:
            raise ValueError(
                f"{path} belongs to another model: its {name} is {size}, here it is "
                f"{decoder_size}."
            )
    shapes, numbers = {}, {id(block): i for i, block in enumerate(decoder.layers)}
    for block, name, module in find(decoder, Linear):
        outputs, inputs = shape(module)
        place = f"layers.{numbers[id(block)]}.{name}"
        shapes |= {f"{place}.a": (inputs, rank), f"{place}.b": (rank, outputs)}
    file_shapes = {name: array.shape for name, array in arrays.items()}
    for name in sorted(shapes.keys() | file_shapes.keys()):
        if shapes.get(name) != file_shapes.get(name):
            raise ValueError(
                f"{path} must have {name} of the shape {shapes.get(name)}, got "
                f"{file_shapes.get(name)}."
            )
