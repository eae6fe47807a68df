"""Convert published MusicGen checkpoints to a folder of this project's own.

    python convert.py --hf-path facebook/musicgen-stereo-large --mlx-path DIR

The folder holds `config.json`, `model.safetensors` and `spiece.model`: decoder,
T5 encoder and codec together, in our names and layouts, ready to be loaded by
`MusicGen.from_pretrained(DIR)` or uploaded.

The first half reads PyTorch's `.bin` files without PyTorch. They hold a pickle,
a program that may call anything, so this reader knows just the few names that
tensors need, and checks every tensor against the bytes that are there.
"""

import argparse
import io
import json
import math
import pickle
import pickletools
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

DTYPES = {  # torch's storages; numpy has no bfloat16, so its bits travel as uint16
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

OPCODES = frozenset(  # what torch writes into a pickle of tensors and plain data
    "PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "APPEND APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT GLOBAL BINPERSID REDUCE BUILD".split()
)


class Storage(NamedTuple):
    """A run of numbers in the file, named by `key`."""

    kind: str
    key: str
    size: int  # elements


class Tensor(NamedTuple):
    """A view of a storage; offset and stride count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Dict(dict):
    """Stands for OrderedDict; drops the attributes that a pickle sets on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """Makes plain data and `Tensor` records of a pickle, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": self._dict,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" not in known:
            raise ValueError(
                f"it names {module}.{name}, which no checkpoint needs. The file is "
                "damaged or hostile: fetch it again from a source you trust"
            )
        return known[f"{module}.{name}"]

    def persistent_load(self, reference: tuple) -> Storage:
        tag, kind, key, _, size, *view = reference
        if tag != "storage" or kind not in DTYPES or (view and view != [None]):
            raise ValueError(f"it holds an unknown kind of storage, {reference}")
        return Storage(kind, str(key), size)

    def _dict(self) -> Dict:
        return Dict()

    def _tensor(self, storage, offset, shape, stride, *_) -> Tensor:
        return Tensor(storage, offset, tuple(shape), tuple(stride))

    def _parameter(self, tensor, *_) -> Tensor:
        return tensor


def unpickle(stream: BinaryIO) -> Any:
    """Read one pickle from `stream`, leaving it behind its end."""
    start = stream.tell()
    for opcode, argument, position in pickletools.genops(stream):
        if opcode.name not in OPCODES:
            raise ValueError(f"it holds the pickle opcode {opcode.name}")
        if opcode.name == "LONG_BINPUT" and argument > position:
            raise ValueError("it numbers more objects than it has")
    end = stream.tell()
    stream.seek(start)
    tree = Unpickler(io.BytesIO(stream.read(end - start))).load()
    stream.seek(end)
    return tree


def view(tensor: Tensor, data: np.ndarray) -> mx.array:
    """The tensor as an array, after checking that it lies within `data`."""
    storage, offset, shape, stride = tensor
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor has the shape {shape}, stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if math.prod(shape) > len(data) or (math.prod(shape) and last >= len(data)):
        raise ValueError(
            f"a tensor of shape {shape} reaches beyond its {len(data)} numbers"
        )
    steps = tuple(step * data.itemsize for step in stride)
    window = np.lib.stride_tricks.as_strided(
        data[offset:], shape, steps, writeable=False
    )
    array = mx.array(window)
    return array.view(mx.bfloat16) if storage.kind == "BFloat16Storage" else array


Numbers = Callable[[Storage], np.ndarray]


def zip_form(path: Path) -> tuple[Any, Numbers]:
    """Object tree of torch's zip form, and where each storage's numbers lie."""
    data = np.memmap(path, np.uint8, "r")
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError("its entries must be stored, not compressed")
        (pickled,) = (name for name in entries if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        tree = unpickle(io.BytesIO(archive.read(pickled)))
        order = root + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("its numbers must be little-endian")

    def numbers(storage: Storage) -> np.ndarray:
        info = entries[f"{root}data/{storage.key}"]
        # The local header's own lengths count: torch pads there to align.
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name + extra
        return cut(data[start : start + info.file_size], storage)

    return tree, numbers


def legacy_form(path: Path) -> tuple[Any, Numbers]:
    """The same of the form before torch 1.6: five pickles, then the numbers."""
    data = np.memmap(path, np.uint8, "r")
    with open(path, "rb") as file:
        magic, version, system, tree, keys = (unpickle(file) for _ in range(5))
        start = file.tell()
    if magic != 0x1950A86A20F9469CFC6C or not system["little_endian"]:
        raise ValueError("it has neither of torch's two forms")
    itemsizes = {s.key: DTYPES[s.kind].itemsize for s in storages(tree)}
    places = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, start)
        places[key] = start + 8
        start += 8 + count * itemsizes[key]
    return tree, lambda storage: cut(data[places[storage.key] :], storage)


def cut(data: np.ndarray, storage: Storage) -> np.ndarray:
    """The storage's numbers, which must lie at the start of `data`."""
    dtype = DTYPES[storage.kind]
    if (
        type(storage.size) is not int
        or not 0 <= storage.size <= len(data) // dtype.itemsize
    ):
        raise ValueError(f"storage {storage.key} reaches beyond the file")
    return data[: storage.size * dtype.itemsize].view(dtype)


def storages(tree: Any) -> Iterator[Storage]:
    """Every storage that the object tree mentions."""
    if isinstance(tree, Tensor):
        yield tree.storage
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from storages(item)


def load_torch(path: str | Path) -> Any:
    """Read what `torch.save` wrote: plain data, with arrays for tensors.

    Both of torch's forms, memory-mapped. Raises ValueError naming the file when
    it is damaged, reaches outside itself, or asks for anything but tensors.
    """
    path = Path(path)

    def fill(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return view(tree, numbers(tree.storage))
        if isinstance(tree, dict):
            return {key: fill(value) for key, value in tree.items()}
        return [fill(value) for value in tree] if isinstance(tree, list) else tree

    try:
        form = zip_form if zipfile.is_zipfile(path) else legacy_form
        tree, numbers = form(path)
        return fill(tree)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path} is not a checkpoint that torch wrote: {error}"
        ) from error


def load_package(path: Path) -> dict[str, Any]:
    """Read what audiocraft exported: `best_state` and `xp.cfg`, or `pretrained`.

    Raises ValueError naming the file when it holds neither.
    """
    package = load_torch(path)
    if isinstance(package, dict) and "pretrained" in package:
        return package
    state = package.get("best_state") if isinstance(package, dict) else None
    if not isinstance(state, dict) or not isinstance(package.get("xp.cfg", ""), str):
        raise ValueError(f"{path} must hold what audiocraft exports, but does not.")
    if not all(
        isinstance(k, str) and isinstance(w, mx.array) for k, w in state.items()
    ):
        raise ValueError(f"best_state in {path} must map names to tensors.")
    return package


def read_yaml(text: str) -> dict[str, Any]:
    """Scalars and lists of scalars of a YAML text, as strings, by dotted name.

    Knows the block style that OmegaConf writes, which is how the checkpoints
    keep their settings, and lists in brackets; resolves values like `${encodec.causal}`.
    """
    values, path = {}, []
    for line in text.splitlines():
        body = line.lstrip(" ")
        indent = len(line) - len(body)
        key, colon, value = body.partition(":")
        value = value.strip().strip("'\"")
        if body.startswith("- "):
            values.setdefault(".".join(name for _, name in path), []).append(body[2:])
        elif colon:
            path = [part for part in path if part[0] < indent] + [(indent, key)]
            if value.startswith("["):
                value = [item.strip() for item in value[1:-1].split(",") if item]
            if value:
                values[".".join(name for _, name in path)] = value
    for name, value in values.items():
        seen = {name}
        while isinstance(value, str) and (m := re.fullmatch(r"\$\{(.+)\}", value)):
            value = "" if m[1] in seen else values.get(m[1], "")
            seen.add(m[1])
        values[name] = value
    return values


CARD = """---
library_name: mlx
license: cc-by-nc-4.0
pipeline_tag: text-to-audio
base_model: {source}
tags:
- mlx
- musicgen
---

# {name}

[{source}](https://huggingface.co/{source}) converted to MLX, decoder in {dtype}.

```
python generate.py --model {name} --prompt "happy rock"
```

The weights are Meta's, under CC-BY-NC 4.0.
"""


def convert(
    source: str,
    target: Path,
    dtype: mx.Dtype,
    q_bits: int | None = None,
    q_group_size: int = 64,
) -> None:
    """Write the model `source` (short name, Hub id or folder) to `target`.

    `q_bits` quantizes the decoder's layers, with a scale for `q_group_size` weights.

    Raises FileExistsError when `target` is there already. What is written
    appears under its name only when it is whole.
    """
    from musicgen import MusicGen

    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another folder.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} must exist.")
    model = MusicGen.from_pretrained(source, dtype, q_bits, q_group_size)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save(model, folder)
        folder.chmod(0o755)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: Any, folder: Path) -> None:
    """Write a MusicGen into `folder`: weights, config.json, spiece.model."""
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(folder / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    dtype = str(model.decoder.dtype).removeprefix("mlx.core.")
    config = {"model_type": "musicgen", "decoder_dtype": dtype} | asdict(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "spiece.model").write_bytes(model.tokenizer.serialized())


def upload(folder: Path, repo: str, source: str) -> None:
    """Publish a converted folder on the Hub, with a model card."""
    from huggingface_hub import HfApi

    dtype = json.loads((folder / "config.json").read_text())["decoder_dtype"]
    card = CARD.format(source=source, name=repo, dtype=dtype)
    (folder / "README.md").write_text(card)
    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder)
    print(f"Uploaded to https://huggingface.co/{repo}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert MusicGen to MLX.")
    add = parser.add_argument
    add("--hf-path", required=True, help="Hub id, short name or folder to convert")
    add("--mlx-path", required=True, type=Path, help="folder to write; must not exist")
    add(
        "--dtype",
        default="float16",
        choices=["float16", "bfloat16", "float32"],
        help="of the decoder; T5 and codec stay float32 (default: %(default)s)",
    )
    add("-q", "--quantize", action="store_true", help="quantize the decoder's layers")
    add("--q-bits", type=int, default=4, help="bits per weight (default: %(default)s)")
    add(
        "--q-group-size",
        type=int,
        default=64,
        help="weights that share a scale: 32, 64 or 128 (default: %(default)s)",
    )
    add(
        "--upload-repo", help="Hub repository to publish to, such as mlx-community/NAME"
    )
    args = parser.parse_args()
    try:
        q_bits = args.q_bits if args.quantize else None
        dtype = getattr(mx, args.dtype)
        convert(args.hf_path, args.mlx_path, dtype, q_bits, args.q_group_size)
        print(f"Wrote {args.mlx_path}")
        if args.upload_repo:
            upload(args.mlx_path, args.upload_repo, args.hf_path)
    except (OSError, ValueError) as error:
        sys.exit(f"convert.py: error: {error}")


if __name__ == "__main__":
    main()
