"""Adapters: small changes to a decoder's layers, learned from a few clips.

Low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685). Beside each weight matrix
of the decoder's layers lies a product of two narrow matrices, and only these are
trained and saved; beside embeddings, heads and projections, too, where that is asked
for. `train.py lora` makes an adapter. To use it:

    model = MusicGen.from_pretrained("small")
    load_adapter(model, "brass.safetensors", scale=0.8)

or `generate.py --adapter brass.safetensors`. Needs settings.py and strict.py beside it;
outputs.py is needed to save one.
"""

import json
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from settings import save_arrays
from strict import in_a_line

VERSION = 1  # of the file format
Linear = nn.Linear | nn.QuantizedLinear
SIZES = {  # sizes that must match: names in the file -> in the decoder's config
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "ffn_dim": "ffn_dim",
    "num_codebooks": "num_codebooks",
    "sound_width": "prefix_width",
}
TARGETS = {  # beside the layers: what can be adapted, and the decoder's names of it
    "embeddings": ("emb",),
    "heads": ("linears",),
    "projections": ("output_proj", "sound_proj"),
}
LAYERS = ("layers",)  # what is adapted unless more is asked for


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


class LoRAEmbedding(nn.Module):
    """The same beside a table: `table(x) + scale * a[x] @ b`."""

    def __init__(self, layer: nn.Embedding, rank: int, scale: float):
        super().__init__()
        entries, width = layer.weight.shape
        self.layer, self._scale = layer, scale
        self.a = mx.random.uniform(-1, 1, (entries, rank)) / math.sqrt(width)
        self.b = mx.zeros((rank, width))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer(x)
        return y + (self._scale * self.a[x] @ self.b).astype(y.dtype)

    def fused(self) -> nn.Embedding:
        """The table itself, with the adapter added to it."""
        weight = self.layer.weight
        change = self._scale * (self.a @ self.b)
        self.layer.weight = (weight + change).astype(weight.dtype)
        return self.layer


Adapted = LoRALinear | LoRAEmbedding


def shape(layer: Linear | nn.Embedding) -> tuple[int, int]:
    """Outputs and inputs of a layer, quantized or not; a table's inputs are one-hot."""
    if isinstance(layer, nn.Embedding):
        return layer.weight.shape[::-1]
    outputs, inputs = layer.weight.shape
    if isinstance(layer, nn.QuantizedLinear):
        inputs = inputs * 32 // layer.bits  # words of 32 bits hold several weights
    return outputs, inputs


def add_adapters(
    decoder: nn.Module, rank: int, scale: float, targets: tuple[str, ...] = LAYERS
) -> None:
    """Put an adapter beside each linear layer in the decoder's layers, or beside other
    `targets`, of "layers" and the names in TARGETS.

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
    for block, name, module in find_targets(decoder, targets):
        kind = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
        replace(block, name, kind(module, rank, scale))


def lay_beside(decoder: nn.Module, arrays: dict[str, mx.array], scale: float) -> None:
    """Put an adapter's arrays beside their layers, or beside what lies there already."""
    for name in (name[:-2] for name in arrays if name.endswith(".a")):
        a, b, module = arrays[f"{name}.a"], arrays[f"{name}.b"], at(decoder, name)
        if isinstance(module, Adapted):  # one sum of both products
            a = mx.concatenate([module.a, a], axis=1)
            b = mx.concatenate([module._scale * module.b, scale * b])
            module.a, module.b, module._scale = a, b, 1.0
        else:
            kind = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
            adapted = kind(module, a.shape[1], scale)
            adapted.a, adapted.b = a, b
            replace(decoder, name, adapted)


def find(decoder: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    """The modules of a kind in the decoder's layers, then those beside them: the layer
    or the decoder, the dotted name in it, and the module."""
    return find_targets(decoder, (*LAYERS, *TARGETS), kind)


def find_targets(
    decoder: nn.Module, targets: tuple[str, ...], kind: type = Linear | nn.Embedding
) -> list[tuple[nn.Module, str, nn.Module]]:
    """The same of some targets alone."""
    found = [
        (block, name, module)
        for block in (decoder.layers if "layers" in targets else [])
        for name, module in block.named_modules()
    ]
    names = [
        name for target in TARGETS if target in targets for name in TARGETS[target]
    ]
    found += [(decoder, name, decoder[name]) for name in names if name in decoder]
    return [place for place in found if isinstance(place[2], kind)]


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of a dotted name."""
    parents, _, last = name.rpartition(".")
    at(block, parents)[last] = module


def at(block: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name in another, itself where there is none."""
    for part in filter(None, name.split(".")):
        block = block[int(part) if part.isdecimal() else part]
    return block


def fuse(decoder: nn.Module) -> None:
    """Add each adapter to its layer's weights. Beside quantized layers they stay."""
    for block, name, module in find(decoder, Adapted):
        if not isinstance(module.layer, nn.QuantizedLinear):
            replace(block, name, module.fused())


def has_adapters(decoder: nn.Module) -> bool:
    """Whether any layer has an adapter beside it. Fused ones do not count."""
    return bool(find(decoder, Adapted))


def save_adapter(
    path: str | Path, decoder: nn.Module, rank: int, settings: dict[str, Any]
) -> None:
    """Write the adapters as one safetensors file, with `settings` in its header.

    The file is written whole or not at all. Raises OSError.
    """
    arrays, metadata = content(decoder, rank, settings)
    save_arrays(path, arrays, {"adapter": json.dumps(metadata)})


def content(
    decoder: nn.Module, rank: int, settings: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Arrays and metadata of such a file."""
    arrays = {
        name: value.astype(mx.float32)
        for name, value in tree_flatten(decoder.parameters())
        if name.endswith((".a", ".b"))
    }
    sizes = {name: getattr(decoder.config, field) for name, field in SIZES.items()}
    return arrays, dict(musicgen_adapter=VERSION, rank=rank, sizes=sizes) | settings


@in_a_line
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
            "another kind or version. One of PEFT needs adapter_config.json beside it, "
            "and is named by their folder."
        )
    check_finite(path, arrays)
    return arrays, metadata


def check_finite(path: Path, arrays: dict[str, mx.array]) -> None:
    """Raise ValueError unless there are arrays, all of finite floats."""
    if not arrays:
        raise ValueError(f"{path} changes nothing: it holds no tensor. Train it again.")
    for name, array in arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{path}: {name} must hold floats, got {array.dtype}.")
        if not mx.isfinite(array).all():
            raise ValueError(
                f"{path}: {name} must be finite, but holds NaN or infinity. Train it "
                "again, with a lower --lr."
            )


def check_scale(scale: float) -> float:
    """The scale as Python's number, which settings of a take can hold. Raises ValueError
    for one beyond 100, and for what is no number."""
    if getattr(scale, "ndim", None) == 0:  # of MLX or NumPy
        scale = scale.item()
    is_real = isinstance(scale, Real) and type(scale) is not bool
    if not (is_real and abs(scale) <= 100):
        kind = "" if is_real else "a number "
        raise ValueError(
            f"adapter_scale must be {kind}from -100 to 100, got {scale!r:.80}."
        )
    return scale if type(scale) in (int, float) else float(scale)


def load_adapter(
    model: nn.Module, path: str | Path, scale: float = 1.0, shared: bool = False
) -> None:
    """Add an adapter, weighted by `scale`, to the decoder of a MusicGen.

    It is added to the weights. Only beside quantized layers it stays separate, and such
    layers cannot be `shared` by processes.

    Raises FileNotFoundError, or ValueError for a scale beyond 100, an adapter of
    another model, and one that cannot be shared.
    """
    load_adapters(model, [(path, scale)], shared)


@in_a_line
def load_adapters(
    model: nn.Module, adapters: list[tuple[str | Path, float]], shared: bool = False
) -> None:
    """The same of several, each a file and its scale."""
    decoder, parts = model.decoder, []
    for path, scale in adapters:
        scale = check_scale(scale)
        arrays, metadata = read_adapter(path)
        check_adapter(decoder, arrays, metadata, path)
        parts.append((arrays, scale, path))
    if has_adapters(decoder):
        raise ValueError(
            "The model has an adapter already. Load the model again for another one."
        )
    for arrays, scale, path in parts:
        lay_beside(decoder, arrays, scale)
        fuse(decoder)
        check_sums(decoder, arrays, path)
    if shared and has_adapters(decoder):
        raise ValueError(
            "An adapter on a quantized model cannot be shared by processes. Take the "
            "model that is not quantized."
        )


def check_sums(
    decoder: nn.Module, arrays: dict[str, mx.array], path: str | Path
) -> None:
    """Raise ValueError where an adapter makes weights, or beside quantized layers its own
    product, NaN or infinite in the decoder's dtype."""
    for name in sorted(name[:-2] for name in arrays if name.endswith(".a")):
        module = at(decoder, name)
        if isinstance(module, Adapted):
            change = (module._scale * (module.a @ module.b)).astype(decoder.dtype)
        else:
            change = module.weight
        if not mx.isfinite(change).all():
            kind = str(decoder.dtype).removeprefix("mlx.core.")
            raise ValueError(
                f"{path} makes the weights of {name} NaN or infinite in {kind}: take a "
                "smaller scale, or float32."
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
    targets = metadata.get("targets", [*LAYERS])
    if not isinstance(targets, list) or not all(
        t in (*LAYERS, *TARGETS) for t in targets
    ):
        raise ValueError(f"{path} must tell known targets, got {targets!r:.80}.")
    shapes, numbers = {}, {id(block): i for i, block in enumerate(decoder.layers)}
    for block, name, module in find_targets(decoder, targets):
        outputs, inputs = shape(module)
        place = name if block is decoder else f"layers.{numbers[id(block)]}.{name}"
        shapes |= {f"{place}.a": (inputs, rank), f"{place}.b": (rank, outputs)}
    file_shapes = {name: array.shape for name, array in arrays.items()}
    for name in sorted(shapes.keys() | file_shapes.keys()):
        if shapes.get(name) != file_shapes.get(name):
            raise ValueError(
                f"{path} must have {name} of the shape {shapes.get(name)}, got "
                f"{file_shapes.get(name)}."
            )
