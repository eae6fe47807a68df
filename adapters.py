"""Adapters of a model, one or several: which kind each is, and in which order they come.

    adapters = weighted(["owner/name", "brass.safetensors"], [0.5, 1.0])
    beside = work_in(model, adapters, mx.float16)
    load_adapters(model, beside)  # of lora.py

PEFT's are worked into the weights before the decoder is cast and quantized, those of
`train.py lora` after it, since they lie beside quantized layers. Needs lora.py,
settings.py and strict.py beside it; peft_files.py and peft_config.py are needed for one
of PEFT, hub.py for one on the Hub, torch_file.py for one in a `.bin`, and outputs.py to
save one.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from lora import check_scale, read_adapter

if TYPE_CHECKING:
    from musicgen import MusicGen

Adapters = str | Path | list[str | Path]
CONFIG = "adapter_config.json"  # of PEFT
Weighted = tuple[str | Path, float]  # an adapter and how many times it counts


def is_own(path: str | Path) -> bool:
    """Whether an adapter is a file of `train.py lora`. One of PEFT is a folder, the file
    in it, or lies on the Hub."""
    path = Path(os.path.expanduser(path))
    if path.is_file():
        beside = path.with_name(CONFIG).is_file()
        return not (beside and path.name.startswith("adapter_model."))
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix())
    return not (path.is_dir() or on_hub and path.suffix != ".safetensors")


def listed(adapters: Adapters) -> list[str | Path]:
    """One adapter or several as a list. Raises ValueError for what can name none."""
    paths = [*adapters] if isinstance(adapters, list | tuple) else [adapters]
    for path in paths:
        if not isinstance(path, str | os.PathLike) or str(path).strip() == "":
            raise ValueError(
                "adapter must be a file of train.py lora, or the folder or Hub id of one "
                f"of PEFT, got {path!r:.80}."
            )
        if os.path.basename(path) == CONFIG and os.path.isfile(path):
            raise ValueError(
                f"adapter must be the folder of an adapter of PEFT, got its {CONFIG}: "
                f"take {os.path.dirname(path) or '.':.250}"
            )
    return paths


def check_files(adapters: Adapters) -> None:
    """Read adapters for their faults alone. Raises as `listed`, `read_adapter`, and as
    `read` of peft_files.py."""
    for path in listed(adapters):
        if is_own(path):
            read_adapter(path)
        else:
            from peft_files import read

            read(path)


def checksum(adapters: Adapters | None) -> str | None:
    """What tells the files of adapters from others of their names: 16 hexadecimal digits
    of each, of its SHA-256. None where there is no adapter, or one lies elsewhere."""
    digests = []
    for path in [] if adapters is None else listed(adapters):
        try:
            files = [Path(os.path.expanduser(path))]
            if not is_own(path):
                from peft_files import locate

                files = locate(path) if files[0].exists() else ()
            digest = hashlib.sha256()
            for file in files:
                digest.update(file.read_bytes())
        except OSError:
            return None
        digests += [digest.hexdigest()[:16]] if files else []
    return (
        " ".join(digests) if len(digests) == len(listed(adapters or [])) > 0 else None
    )


def weighted(adapters: Adapters, scales: float | list[float]) -> list[Weighted]:
    """Each adapter with its scale: one for all, or each its own.

    Raises ValueError as `listed`, for a scale beyond 100, where there are not as many,
    and for one that no adapter needs.
    """
    adapters = listed(adapters)
    if not adapters and scales not in (1, [1], (1,)):
        raise ValueError(
            f"adapter_scale must come with an adapter, got {scales!r:.80}."
        )
    if isinstance(scales, mx.array | np.ndarray):
        scales = scales.tolist()
    if not isinstance(scales, list | tuple):
        scales = [scales] * len(adapters)
    elif len(scales) == 1:
        scales = [*scales] * len(adapters)
    if len(scales) != len(adapters):
        raise ValueError(
            "adapter_scale must be one number, or one for each adapter in turn, got "
            f"{len(scales)} for {len(adapters)}."
        )
    return [*zip(adapters, map(check_scale, scales))]


def work_in(
    model: "MusicGen", adapters: list[Weighted], dtype: mx.Dtype | None = None
) -> list[Weighted]:
    """Work PEFT's adapters into a model's weights, and cast the decoder. Returns the
    others. Raises ValueError, too, for what is beyond that dtype."""
    changed = {}
    for path, scale in adapters:
        if not is_own(path):
            from peft_files import merge_unread

            changed |= merge_unread(model, path, scale)
    if dtype is not None:
        model.decoder.set_dtype(dtype)
    if changed:
        from peft_files import check_sums

        check_sums(model, changed)
    if adapters:
        names, scales = ([*column] for column in zip(*adapters))
        names = [*map(str, names)]
        one = len(adapters) == 1
        model._adapter = dict(adapter=names[0] if one else names)
        model._adapter["adapter_scale"] = scales[0] if one else scales
        model._adapter_hash = checksum(names)
    return [(path, scale) for path, scale in adapters if is_own(path)]
