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
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
from huggingface_hub.utils import logging
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


class Maker(NamedTuple):
    """Stands for a function of torch. A tuple, so a pickle cannot set anything
    on it, as it could on the function itself."""

    make: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


def make_tensor(storage, offset, shape, stride, *_) -> Tensor:
    # By their types, for what a pickle holds can take for ever to be printed.
    flat = all(type(sizes) is tuple and len(sizes) <= 8 for sizes in (shape, stride))
    if not isinstance(storage, Storage) or not flat or len(shape) != len(stride):
        raise ValueError("it makes a tensor of something else")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor has a size, stride or offset that is no number")
    return Tensor(storage, offset, shape, stride)


def make_parameter(tensor, *_) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("it makes a parameter of something else than a tensor")
    return tensor


KNOWN = {
    "collections.OrderedDict": Maker(lambda: Dict()),
    "torch._utils._rebuild_tensor_v2": Maker(make_tensor),
    "torch._utils._rebuild_parameter": Maker(make_parameter),
}


class Unpickler(pickle.Unpickler):
    """Makes plain data and `Tensor` records of a pickle, and nothing else."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: set[Storage] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" not in KNOWN:
            raise ValueError(
                f"it names {f'{module}.{name}'!r:.80}, which no checkpoint needs. The "
                "file is damaged or hostile: take it from a source you trust"
            )
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, reference: tuple) -> Storage:
        tag, kind, key, _, size, *view = reference
        whole = len(view) == 0 or view == [None]
        if tag != "storage" or type(kind) is not str or kind not in DTYPES or not whole:
            raise ValueError("it holds an unknown kind of storage")
        if type(key) is not str or type(size) is not int or not 0 <= size < 2**63:
            raise ValueError("a storage has no name or size")
        storage = Storage(kind, key, size)
        self.storages.add(storage)
        return storage


def unpickle(stream: BinaryIO) -> tuple[Any, set[Storage]]:
    """Read one pickle and the storages it names, leaving `stream` behind its end."""
    start, last, tuples = stream.tell(), "", set()
    for opcode, argument, position in pickletools.genops(stream):
        name = opcode.name
        if name not in OPCODES:
            raise ValueError(f"it holds the pickle opcode {name}")
        if name == "LONG_BINPUT" and argument > position:
            raise ValueError("it numbers more objects than it has")
        if name in ("BINPUT", "LONG_BINPUT") and last.startswith("TUPLE"):
            tuples.add(argument)
        if name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise ValueError("it holds a tuple twice, which nests without end")
        last = name
    end = stream.tell()
    stream.seek(start)
    unpickler = Unpickler(io.BytesIO(stream.read(end - start)))
    tree = unpickler.load()
    stream.seek(end)
    return tree, unpickler.storages


def view(tensor: Tensor, data: np.ndarray) -> mx.array:
    """The tensor as an array, after checking that it lies within `data`."""
    storage, offset, shape, stride = tensor
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
        tree, _ = unpickle(io.BytesIO(archive.read(pickled)))
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
        (magic, _), _, (system, _) = (unpickle(file) for _ in range(3))
        (tree, storages), (keys, _) = unpickle(file), unpickle(file)
        start = file.tell()
    if magic != 0x1950A86A20F9469CFC6C or not system["little_endian"]:
        raise ValueError("it has neither of torch's two forms")
    itemsizes = {s.key: DTYPES[s.kind].itemsize for s in storages}
    places = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, start)
        places[key] = start + 8
        start += 8 + count * itemsizes[key]
    return tree, lambda storage: cut(data[places[storage.key] :], storage)


def cut(data: np.ndarray, storage: Storage) -> np.ndarray:
    """The storage's numbers, which must lie at the start of `data`."""
    dtype = DTYPES[storage.kind]
    if storage.size > len(data) // dtype.itemsize:
        raise ValueError(f"storage {storage.key} reaches beyond the file")
    return data[: storage.size * dtype.itemsize].view(dtype)


def fill(tree: Any, numbers: Numbers, room: int) -> Any:
    """The tree with arrays for its tensors, of `room` bytes at most in all.

    What the tree holds several times is made once, for a small file can hold
    one list or tensor in a great many places.
    """
    made = {}

    def build(node: Any) -> Any:
        nonlocal room
        if not isinstance(node, Tensor | dict | list):
            return node
        key = node if isinstance(node, Tensor) else id(node)
        if key not in made:
            if isinstance(node, Tensor):
                made[key] = view(node, numbers(node.storage))
                room -= made[key].nbytes
                if room < 0:
                    raise ValueError("its tensors hold far more than the file")
            elif isinstance(node, dict):
                made[key] = {name: build(item) for name, item in node.items()}
            else:
                made[key] = [build(item) for item in node]
        return made[key]

    return build(tree)


def load_torch(path: str | Path) -> Any:
    """Read what `torch.save` wrote: plain data, with arrays for tensors.

    Both of torch's forms; the file is mapped, so that its bytes are read once,
    into the arrays. Raises ValueError naming the file when it is damaged, reaches
    outside itself, or asks for anything but tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            form = zip_form if file.read(2) == b"PK" else legacy_form
        tree, numbers = form(path)
        return fill(tree, numbers, room=2 * path.stat().st_size)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path} is not a checkpoint that torch wrote: {error or type(error)}. If "
            "the download was cut short, fetch it again."
        ) from error


def load_state(path: Path) -> dict[str, mx.array]:
    """Read tensors by name. Raises ValueError naming the file that holds others."""
    return check_state(path, load_torch(path))


def check_state(path: Path, state: Any) -> dict[str, mx.array]:
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(w, mx.array) for k, w in state.items()
    ):
        raise ValueError(f"{path} must map names to tensors, but holds something else.")
    return state


def load_package(path: Path) -> dict[str, Any]:
    """Read what audiocraft exported: `best_state` and `xp.cfg`, or `pretrained`.

    Raises ValueError naming the file when it holds neither.
    """
    package = load_torch(path)
    if not isinstance(package, dict):
        raise ValueError(f"{path} must hold what audiocraft exports, but does not.")
    if isinstance(package.get("pretrained"), str):
        return package
    if "best_state" not in package or not isinstance(package.get("xp.cfg", ""), str):
        raise ValueError(f"{path} must hold what audiocraft exports, but does not.")
    check_state(path, package["best_state"])
    return package


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
            values.setdefault(name, []).append(scalar(body[2:]))
        elif colon:
            path = [part for part in path if part[0] < indent] + [(indent, key)]
            if value.startswith(("|", ">")):
                value, text_indent = "", indent
            elif value.startswith("["):
                items = value.strip("[]").split(",")
                value = [scalar(item) for item in items if item]
            if value:
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


CARD = """---
library_name: mlx
license: {license}
pipeline_tag: text-to-audio
{base_model}tags:
- mlx
- musicgen
---

# {name}

{source} converted to MLX, decoder in {dtype}.

```
python generate.py --model {name} --prompt "happy rock"
```

{rights}
"""


def convert(
    source: str,
    target: Path,
    dtype: mx.Dtype,
    q_bits: int | None = None,
    q_group_size: int = 64,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
) -> None:
    """Write the model `source` (short name, Hub id or folder) to `target`.

    `q_bits` quantizes the decoder's layers, with a scale for `q_group_size` weights.
    An `adapter` of `train.py lora` is worked in, `adapter_scale` times.

    Raises FileExistsError when `target` is there already. What is written
    appears under its name only when it is whole.
    """
    from lora import has_adapters
    from musicgen import MusicGen

    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists already; choose another folder.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} must exist.")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        options = dict(lazy=True, adapter=adapter, adapter_scale=adapter_scale)
        sizes = (None if adapter else q_bits, q_group_size)
        model = MusicGen.from_pretrained(source, dtype, *sizes, **options)
        if has_adapters(model.decoder):
            raise ValueError(
                f"An adapter cannot be worked into {source}, which is quantized; take "
                "the model that it was made from."
            )
        if adapter is not None and q_bits is not None:  # with the change in them
            model.quantize(q_bits, q_group_size)
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


def is_converted(folder: Path) -> bool:
    """Whether `folder` is one that `convert` wrote."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, RecursionError, ValueError):
        return False
    return isinstance(config, dict) and "decoder_dtype" in config


def model_card(folder: Path, repo: str, source: str) -> str:
    """The README of `repo`, for a folder converted from `source`."""
    from checkpoints import MODELS

    dtype = json.loads((folder / "config.json").read_text())["decoder_dtype"]
    source = MODELS.get(source, source)
    if Path(source).exists():  # a folder of this machine means nothing elsewhere
        base, link = "", "MusicGen"
    else:
        base = f"base_model: {source}\n"
        link = f"[{source}](https://huggingface.co/{source})"
    license, rights = "cc-by-nc-4.0", "The weights are Meta's, under CC-BY-NC 4.0."
    if source == MODELS["tiny"]:
        license, rights = "mit", "A toy, trained from nothing by this project."
    told = dict(base_model=base, source=link, name=repo, dtype=dtype)
    return CARD.format(**told, license=license, rights=rights)


def upload(folder: Path, repo: str, source: str) -> None:
    """Publish a converted folder on the Hub, with a model card.

    Raises OSError when the Hub does not take it.
    """
    from huggingface_hub import HfApi

    (folder / "README.md").write_text(model_card(folder, repo, source))
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # the network's, the Hub's or the disk's
        raise OSError(
            f"The Hub did not take {repo}: {error} {folder} is whole: the same "
            "command uploads it."
        ) from error
    print(f"Uploaded to https://huggingface.co/{repo}")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parse_arguments() -> argparse.Namespace:
    from checkpoints import check_name
    from musicgen import BITS, GROUP_SIZES

    parser = Parser(description="Convert MusicGen to MLX.")
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
    add("--q-bits", type=int, choices=BITS, help="bits per weight (default: 4)")
    add(
        "--q-group-size",
        type=int,
        choices=GROUP_SIZES,
        help="weights that share a scale (default: 64)",
    )
    add("--adapter", type=Path, help="file of train.py lora to work in")
    add("--adapter-scale", type=float, default=1.0, help="how much (default: 1)")
    add(
        "--upload-repo",
        help="Hub repository to publish to, such as mlx-community/NAME; where "
        "--mlx-path is converted already, it is uploaded as it is",
    )
    args = parser.parse_args()
    repo = args.upload_repo
    if repo is not None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        parser.error(f"--upload-repo must be OWNER/NAME, got '{repo}'")
    if (args.q_bits or args.q_group_size) and not args.quantize:
        parser.error("--q-bits and --q-group-size need --quantize")
    try:
        check_name(args.hf_path)
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    if args.upload_repo and is_converted(args.mlx_path):
        print(f"{args.mlx_path} is there already and is uploaded as it is")
    else:
        q_bits = (args.q_bits or 4) if args.quantize else None
        sizes = (getattr(mx, args.dtype), q_bits, args.q_group_size or 64)
        adapter = (args.adapter, args.adapter_scale)
        convert(args.hf_path, args.mlx_path, *sizes, *adapter)
        print(f"Wrote {args.mlx_path}")
    if args.upload_repo:
        upload(args.mlx_path, args.upload_repo, args.hf_path)


def warn(message: Warning | str, *_) -> None:
    print(f"convert.py: warning: {message}", file=sys.stderr)


def main() -> None:
    args = parse_arguments()
    warnings.showwarning = warn
    logging.set_verbosity_error()  # the Hub's retries; the end result is reported
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"convert.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
