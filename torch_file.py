"""PyTorch's files without PyTorch: `.bin` and `.th` -> arrays of MLX.

    weights = load_state("pytorch_model.bin")  # tensors by name
    package = load_torch("state_dict.bin")  # dicts and lists of these, and plain data

or `python torch_file.py state_dict.bin`, which lists what is in it. Such a file holds a
pickle, and a pickle is a program that may call anything. This reader allows only the
few names that tensors need, and those of omegaconf's settings, for which it puts
records that do nothing; it checks that every tensor that is read lies within the file,
and in the zip format that its bytes are those that were written. Stands alone; outputs.py is needed to list a file.
"""

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np


def load_torch(path: str | Path, keys: tuple[str, ...] | None = None) -> Any:
    """Read a file that `torch.save` wrote: plain data, with arrays for tensors.

    Reads both of torch's formats. omegaconf's settings become dicts and lists. The file
    is memory-mapped: of a dict only what has one of the `keys` is read, where these are
    given. Raises FileNotFoundError, or ValueError naming a file that is damaged, points
    outside itself, or holds anything but tensors and plain data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            read = read_zip if file.read(2) == b"PK" else read_legacy
        tree, numbers = read(path)
        if keys is not None and isinstance(tree, dict):
            tree = {key: tree[key] for key in keys if key in tree}
        return fill(tree, numbers, room=2 * path.stat().st_size)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        told = (
            f"{path!s:.150} is not a checkpoint that torch wrote: {in_words(error)}. "
            "Name a .bin or .th file; if the download was cut short, fetch it again."
        )
        raise ValueError(f"{told:.370}") from error


def in_words(error: Exception) -> str:
    """Why a file cannot be read, in a line, without bytes of it and the last full stop."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = f"it lacks {text}"
    if isinstance(error, RecursionError):
        text = "it holds what holds itself, or goes too deep"
    if text == "" or "b'" in text:
        return "it holds something else"
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text.rstrip(". "))
    return f"{''.join(shown):.180}"


def load_state(path: str | Path) -> dict[str, mx.array]:
    """Read tensors by name. Raises as `load_torch`, and as `check_state`."""
    return check_state(Path(path), load_torch(path))


def check_state(path: Path, state: Any) -> dict[str, mx.array]:
    """The state, if it maps names to tensors; else a ValueError naming the file."""
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(w, mx.array) for k, w in state.items()
    ):
        raise ValueError(
            f"{path!s:.200} must map names to tensors, but holds something else."
        )
    return state


DTYPES = {  # of torch's storages; numpy has no bfloat16, so its bits come as uint16
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

OPCODES = frozenset(  # that torch uses in a pickle of tensors, plain data and settings
    "PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "APPEND APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING BINGET LONG_BINGET BINPUT "
    "LONG_BINPUT GLOBAL BINPERSID REDUCE BUILD NEWOBJ".split()
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
    """In place of OrderedDict: ignores the attributes that a pickle sets on it."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Record:
    """In place of an object of omegaconf: keeps what a pickle sets on it, and does
    nothing. What is of use in it is below `key`; a record without one says nothing."""

    __slots__ = ("_state",)
    key: str | None = None

    def __new__(cls) -> "Record":
        record = object.__new__(cls)
        record._state = {}
        return record

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict:
            raise ValueError("it holds settings of another kind")
        self._state = state

    def plain(self) -> Any:
        """A dict or list of records, or a value."""
        return self._state.get(self.key)


class Container(Record):
    """Of settings by name, or of a list. It knows what it lies in, too (`_parent`),
    where a walk would never end."""

    __slots__ = ()
    key = "_content"


class Leaf(Record):
    """A single setting."""

    __slots__ = ()
    key = "_val"


class Maker(NamedTuple):
    """In place of a function of torch. It is a tuple, because a pickle could set
    attributes of a function."""

    make: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


def make_tensor(storage, offset, shape, stride, *_) -> Tensor:
    """A tensor of a pickle, after checking the kinds of its parts."""
    # Messages do not show the parts: a hostile one may take for ever to print.
    flat = all(type(sizes) is tuple and len(sizes) <= 8 for sizes in (shape, stride))
    if not isinstance(storage, Storage) or not flat or len(shape) != len(stride):
        raise ValueError("it makes a tensor of something else")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor has a size, stride or offset that is no number")
    return Tensor(storage, offset, shape, stride)


def make_parameter(tensor, *_) -> Tensor:
    """The tensor of a parameter."""
    if not isinstance(tensor, Tensor):
        raise ValueError("it makes a parameter of something else than a tensor")
    return tensor


KNOWN = {  # all that a pickle may call
    "collections.OrderedDict": Maker(lambda: Dict()),
    "torch._utils._rebuild_tensor_v2": Maker(make_tensor),
    "torch._utils._rebuild_parameter": Maker(make_parameter),
    "collections.defaultdict": Maker(lambda *_: Dict()),
    "omegaconf.dictconfig.DictConfig": Container,
    "omegaconf.listconfig.ListConfig": Container,
    "omegaconf.nodes.AnyNode": Leaf,
    "omegaconf.base.ContainerMetadata": Record,
    "omegaconf.base.Metadata": Record,
}
TYPES = (  # that settings are said to be of; a text stands for each, and calls nothing
    *("__builtin__.dict", "__builtin__.list", "__builtin__.long", "typing.Any"),
)


class Unpickler(pickle.Unpickler):
    """Reads plain data and `Tensor` records from a pickle, and nothing else."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream)
        self.storages: set[Storage] = set()

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        if f"{module}.{name}" in TYPES:
            return name
        if f"{module}.{name}" not in KNOWN:
            raise ValueError(
                f"it names {f'{module}.{name}'!r:.80}, which no checkpoint needs. The "
                "file is damaged or hostile: take it from a source you trust"
            )
        return KNOWN[f"{module}.{name}"]

    def persistent_load(self, reference: tuple) -> Storage:
        if type(reference) is not tuple or len(reference) < 5:
            raise ValueError("it holds an unknown kind of storage")
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
    """Read one pickle, and the storages that it names.

    The stream is left behind the pickle's end. Raises ValueError for opcodes that torch
    does not use, and for tricks that would fill the memory.
    """
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
    """A tensor of the numbers `data` as an array. Raises ValueError where it reaches
    beyond them."""
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


Numbers = Callable[[Storage], np.ndarray]  # gives the numbers of a storage


def read_zip(path: Path) -> tuple[Any, Numbers]:
    """Read torch's zip format: the tree of objects, and the numbers of storages."""
    data, sound = np.memmap(path, np.uint8, "r"), set()
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise ValueError("its entries must be stored, not compressed")
    # torch can be told to leave the sums out, and then writes zeros.
    has_sums = any(info.CRC for info in entries.values())

    def content(name: str) -> np.ndarray:
        if (info := entries.get(name)) is None:
            raise ValueError(f"it lacks {name!r:.80}")
        # Lengths of the local header, where torch pads to align, not the directory's.
        lengths = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + sum(lengths)
        found = data[start : start + info.file_size]
        if has_sums and name not in sound and zlib.crc32(found) != info.CRC:
            raise ValueError(f"the checksum (CRC) of its {name!r:.80} does not match")
        sound.add(name)
        return found

    programs = [name for name in entries if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"it must hold one data.pkl, but has {len(programs)}")
    (program,) = programs
    root = program.removesuffix("data.pkl")
    tree, _ = unpickle(io.BytesIO(content(program).tobytes()))
    order = root + "byteorder"
    if order in entries and content(order).tobytes() != b"little":
        raise ValueError("its numbers must be little-endian")
    return tree, lambda storage: cut(content(f"{root}data/{storage.key}"), storage)


def read_legacy(path: Path) -> tuple[Any, Numbers]:
    """The same from the format before torch 1.6: five pickles, then the numbers."""
    data = np.memmap(path, np.uint8, "r")
    with open(path, "rb") as file:
        (magic, _), _, (system, _) = (unpickle(file) for _ in range(3))
        (tree, storages), (keys, _) = unpickle(file), unpickle(file)
        start = file.tell()
    if magic != 0x1950A86A20F9469CFC6C or not system["little_endian"]:
        raise ValueError("it has neither of torch's two formats")
    itemsizes = {s.key: DTYPES[s.kind].itemsize for s in storages}
    places = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, start)  # elements, not bytes
        places[key] = start + 8
        start += 8 + count * itemsizes[key]

    def numbers(storage: Storage) -> np.ndarray:
        if storage.key not in places:
            raise ValueError(f"it lacks the numbers of storage {storage.key:.80}")
        return cut(data[places[storage.key] :], storage)

    return tree, numbers


def cut(data: np.ndarray, storage: Storage) -> np.ndarray:
    """The storage's numbers at the start of the bytes `data`. Raises ValueError where
    there are fewer."""
    dtype = DTYPES[storage.kind]
    if storage.size > len(data) // dtype.itemsize:
        raise ValueError(f"storage {storage.key:.80} reaches beyond the file")
    return data[: storage.size * dtype.itemsize].view(dtype)


def fill(tree: Any, numbers: Numbers, room: int) -> Any:
    """The tree with arrays in place of its tensors, of `room` bytes at most in all.

    What stands in the tree several times is built once: a small file may hold one list
    or tensor in a great many places. Raises ValueError where `room` is too small.
    """
    nodes = {}

    def build(node: Any) -> Any:
        nonlocal room
        if not isinstance(node, Tensor | Record | dict | list):
            return node
        key = node if isinstance(node, Tensor) else id(node)
        if key not in nodes:
            if isinstance(node, Tensor):
                nodes[key] = view(node, numbers(node.storage))
                room -= nodes[key].nbytes
                if room < 0:
                    raise ValueError("its tensors hold far more than the file")
            elif isinstance(node, Record):
                nodes[key] = build(node.plain())
            elif isinstance(node, dict):
                nodes[key] = {name: build(item) for name, item in node.items()}
            else:
                nodes[key] = [build(item) for item in node]
        return nodes[key]

    return build(tree)


def describe(tree: Any, name: str = "") -> None:
    """Print a file's tensors and plain data, one a line."""
    from outputs import print_result

    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            describe(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, mx.array):
        print_result(
            f"{name}: {str(tree.dtype).removeprefix('mlx.core.')} {tree.shape}"
        )
    else:
        print_result(f"{name}: {tree!r:.80}")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python torch_file.py FILE ...")
    try:
        for path in sys.argv[1:]:
            describe(load_torch(path))
    except (OSError, ValueError) as error:
        sys.exit(f"torch_file.py: error: {' '.join(str(error).split()):.370}")


if __name__ == "__main__":
    main()
