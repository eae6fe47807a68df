"""The settings of a take, inside its sound file, and its codes in a file of their own.

    python settings.py take.wav

prints the settings of a sound file or a codes file that `generate.py` wrote. In a sound
file they stand in its comment, as JSON. Stands alone; outputs.py is needed to
write codes, and to print.
"""

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import soundfile
from safetensors import SafetensorError, safe_open

VERSION = 1  # of the settings' format
LONGEST = 2**20  # bytes of a comment that are read
KINDS = {"model": str, "prompt": str, "revision": str | None, "prompt_frames": int}
LISTS = {"adapter": str, "adapter_scale": int | float, "scores": int | float}


def to_comment(settings: dict[str, Any]) -> str:
    """Settings as one line of JSON, in ASCII, which every sound format can hold."""
    return json.dumps({"musicgen": VERSION} | settings)


def from_comment(comment: str, path: Path) -> dict[str, Any]:
    """The settings in a comment of the file at `path`.

    Raises ValueError for a comment without settings, or with those of a later version.
    """
    try:
        settings = json.loads(comment.rstrip("\0"))
        version = settings.pop("musicgen")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError(
            f"{path!s:.150} holds no settings of a take: it is no sound of generate.py, "
            "nor codes of --save-codes (.safetensors)."
        ) from None
    if type(version) is not int or version > VERSION:
        raise ValueError(
            f"{path!s:.150} is of a later version, {version!s:.40}; this program reads "
            f"{VERSION}. Use the program that wrote it."
        )
    check_types(settings, path)
    return settings


def check_types(settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError for settings of types that none has: a file may be anybody's."""
    for name, value in settings.items():
        kind = KINDS.get(name, str | int | float | None)  # bool is an int
        if isinstance(value, list) and name in LISTS:
            kind = list if all(isinstance(x, LISTS[name]) for x in value) else ()
        if not isinstance(value, kind) or name in KINDS and value is True:
            raise ValueError(
                f"{path!s:.150} is damaged: its setting {name!r:.80} is of a wrong type, "
                f"{value!r:.60}"
            )
    frames = settings.get("prompt_frames", 0)
    if not 0 <= frames < 10**9:
        raise ValueError(
            f"{path!s:.150} is damaged: its prompt_frames are {frames!r:.60}."
        )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings of a wav, flac, ogg, mp3 or m4a file, or of a codes file.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds none.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path!s:.200}.")
    if path.suffix == ".safetensors":
        return load_codes(path)[1]
    try:
        if not (comment := m4a_comment(path) or wav_comment(path)):
            with open(path, "rb") as raw:  # by its content, not by its name
                with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
                    comment = file.comment
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path!s:.150} is not a readable sound file: {error!s:.150}"
        ) from error
    return from_comment(comment, path)


def wav_comment(path: Path) -> str:
    """The comment of a wav file, or "". libsndfile reads none longer than 2 KB.

    It lies in an ICMT chunk within a LIST chunk of the kind INFO.
    """
    with open(path, "rb") as file:
        if file.read(12)[:4] != b"RIFF":
            return ""
        place, parent = 12, b""
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"LIST" and file.read(4) == b"INFO":
                place, parent = place + 12, b"INFO"
                continue
            if name == b"ICMT" and parent == b"INFO":
                comment = file.read(min(size, LONGEST)).rstrip(b"\0")
                return comment.decode("utf-8", "replace")
            place += 8 + size + size % 2  # chunks begin at even places
            file.seek(place)
    return ""


def m4a_comment(path: Path) -> str:
    """The comment of an m4a file, or "". It lies in boxes within boxes, whose
    beginnings are their lengths and names."""
    with open(path, "rb") as file:
        end, place = os.fstat(file.fileno()).st_size, 0
        if file.read(8)[4:] != b"ftyp":
            return ""
        for wanted in (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"):
            while True:
                file.seek(place)
                header = file.read(8)
                if place + 8 > end or len(header) < 8:
                    return ""
                size, name = struct.unpack(">I4s", header)
                if size == 1 and len(long := file.read(8)) == 8:
                    size = int.from_bytes(long, "big")
                if size < 8:
                    return ""
                if name == wanted:
                    break
                place += size
            end = min(end, place + size)
            place += {b"meta": 12, b"data": 16}.get(wanted, 8)
        file.seek(place)
        return file.read(min(max(end - place, 0), LONGEST)).decode("utf-8", "replace")


def save_codes(
    path: str | Path, codes: mx.array, settings: dict[str, Any], overwrite: bool = True
) -> None:
    """Write codes (1, T, K) with their settings as a safetensors file.

    The file is written whole or not at all. Raises OSError: FileExistsError where one
    is there, unless it is to `overwrite`.
    """
    arrays = {"codes": codes.astype(mx.uint16)}
    save_arrays(path, arrays, {"settings": to_comment(settings)}, overwrite)


def save_arrays(
    path: str | Path,
    arrays: dict[str, mx.array],
    metadata: dict[str, str],
    overwrite: bool = True,
) -> None:
    """Write a safetensors file, whole or not at all. Raises OSError."""
    from outputs import whole_file

    with whole_file(path, overwrite) as part:
        mx.save_safetensors(str(part), arrays, metadata)


def load_codes(path: str | Path) -> tuple[mx.array, dict[str, Any]]:
    """Read codes (1, T, K) and settings that `save_codes` wrote.

    Raises FileNotFoundError, or ValueError for a file that is damaged or has no codes.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path!s:.200}.")
    try:
        with safe_open(path, "numpy") as file:
            comment = (file.metadata() or {}).get("settings", "")
            codes = mx.load(str(path))["codes"]
        mx.eval(codes)
    except (KeyError, RuntimeError, SafetensorError) as error:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path!s:.150} holds no codes: name a .safetensors file of "
                "--save-codes."
            ) from error
        raise ValueError(
            f"{path!s:.150} is damaged or holds no codes: {error!s:.150}"
        ) from error
    if codes.ndim != 3 or codes.shape[0] != 1 or codes.dtype != mx.uint16:
        raise ValueError(
            f"{path!s:.150} must hold codes (1, T, K) in uint16, got {codes.shape} in "
            f"{str(codes.dtype).removeprefix('mlx.core.')}."
        )
    return codes.astype(mx.uint32), from_comment(comment, path)


def main() -> None:
    from outputs import print_result

    if len(sys.argv) < 2:
        sys.exit("usage: python settings.py FILE ...")
    try:
        for name in sys.argv[1:]:
            print_result(json.dumps(read_settings(name), indent=2))
    except (OSError, ValueError) as error:
        sys.exit(f"settings.py: error: {' '.join(str(error).split()):.370}")


if __name__ == "__main__":
    main()
