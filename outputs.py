"""Files to write: free names, never over what is read, and whole or not at all.

    path = free(default_name("happy rock", seed=841725207))  # happy-rock-841725207.wav
    check_apart(path, {"audio_prompt": "song.mp3"})
    with whole_file(path) as part:
        part.write_bytes(content)

Stands alone.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

LONGEST = 40  # characters of a prompt in a name
WEIGHTS = (".safetensors", ".bin", ".json", ".model")


def named_path(text: str) -> Path:
    """A path of a command line, in which ~ is the home folder. An empty one would be
    this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a file or a folder, got {text!r}")
    return Path(os.path.expanduser(text))


def default_name(prompt: str, seed: int, suffix: str = ".wav") -> str:
    """A file name from the words of a prompt, and its seed."""
    text = unicodedata.normalize("NFC", prompt).lower()
    words = "-".join(re.findall(r"[^\W_]+", text))
    if len(words) > LONGEST:
        words = words[: LONGEST + 1].rpartition("-")[0] or words[:LONGEST]
    return f"{words or 'music'}-{seed}{suffix}"


def free(path: str | Path) -> Path:
    """The path, or with the first number from 2 on under which nothing is there."""
    path = Path(os.path.expanduser(path))
    numbered, number = path, 2
    while is_there(numbered):
        numbered = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return numbered


def is_there(path: str | Path) -> bool:
    """Whether something would be lost by writing there: an empty file would not."""
    try:
        found = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(found.st_mode) or found.st_size > 0


def check_new(path: str | Path) -> None:
    """Raise FileExistsError where something is there."""
    if is_there(path):
        raise FileExistsError(
            f"{path} is there already: choose another name, or overwrite it with "
            "--force."
        )


def check_apart(output: str | Path, inputs: dict[str, str | Path | None]) -> None:
    """Raise ValueError where the output is a file that is read: one of `inputs`, which
    are paths by what they are, or of a model's folder among them."""
    for name, path in inputs.items():
        if path is None:
            continue
        for file in (path, *weights_in(path)):
            if same_file(file, output):
                raise ValueError(
                    f"{output} must not be written, since it is read as the {name}: "
                    "choose another name."
                )


def weights_in(folder: str | Path) -> Iterable[str]:
    """Paths of a model's files in a folder, and in its folders; none of a file."""
    for place, _, names in os.walk(os.path.expanduser(folder)):
        named = (name for name in names if name.endswith(WEIGHTS))
        yield from (os.path.join(place, name) for name in named)


def same_file(path: str | Path, other: str | Path) -> bool:
    """Whether both name one file, be it there or not."""
    path, other = os.path.expanduser(path), os.path.expanduser(other)
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them is not there
        return identity(path) == identity(other)


def identity(path: str | Path) -> tuple:
    """The same for all names of one file: links, and where the file system ignores
    case, `Song.wav` and `song.wav`."""
    try:
        folder, name = os.path.split(os.path.realpath(path))
        found = os.stat(folder)
    except (OSError, ValueError):
        return (str(path),)
    if ignores_case(folder):
        name = unicodedata.normalize("NFD", name).casefold()
    return found.st_dev, found.st_ino, name


@functools.cache
def ignores_case(folder: str) -> bool:
    """Whether names that differ in case are one file in a folder, as on most Macs."""
    try:
        with tempfile.NamedTemporaryFile(prefix=".Case-", dir=folder) as file:
            place, name = os.path.split(file.name)
            return os.path.exists(os.path.join(place, name.swapcase()))
    except OSError:
        return False


@contextlib.contextmanager
def whole_file(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """A hidden file beside `path`, which takes its name at the end, or is gone.

    Each writer has its own, and the last one wins. Raises OSError where it cannot be
    written, FileExistsError where a file is there that is not to be overwritten.
    """
    target = Path(
        os.path.expanduser(path)
    ).resolve()  # where a link points to, so that the link stays
    try:
        part, file = open_hidden(target)
        with file, contextlib.ExitStack() as stack:
            stack.callback(part.unlink, missing_ok=True)
            try:
                yield part
            except (OSError, RuntimeError) as error:
                raise OSError(reason(file, error)) from error
            give_name(part, target, overwrite)
    except FileExistsError as error:
        raise FileExistsError(
            f"{path} is there already: choose another name."
        ) from error
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def open_hidden(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside another, to write that under, locked as long as it is open: its
    writer lives. What a killed process left under such names is removed."""
    while True:
        part = hidden_path(target)
        file = open(part, "xb")
        if lock_own(file.fileno(), part):
            return part, file
        file.close()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which takes its name at the end, or is gone.
    Raises FileExistsError where another program took the name meanwhile."""
    target = Path(os.path.abspath(os.path.expanduser(path)))
    while True:
        part = hidden_path(target)
        part.mkdir()
        lock = os.open(part, os.O_RDONLY)
        if lock_own(lock, part):
            break
        os.close(lock)
    try:
        yield part
        take_name(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def take_name(part: Path, target: Path) -> None:
    try:
        part.rename(target)
    except OSError as error:
        if not is_there(target):
            raise
        raise FileExistsError(
            f"{target} was written by another program meanwhile: choose another folder."
        ) from error


def hidden_path(target: Path) -> Path:
    """A new name beside a file. What nobody writes any more under such names goes."""
    hidden = "." + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    for part in target.parent.glob(f"{hidden}-*"):
        remove_if_left(part)
    return target.with_name(f"{hidden}-{secrets.token_hex(4)}.part{target.suffix}")


def lock_own(file: int, part: Path) -> bool:
    """Lock an open file or folder; False where it was taken for one that was left."""
    with contextlib.suppress(OSError):  # of file systems without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file), os.stat(part))
    except OSError:
        return False


def remove_if_left(part: Path) -> None:
    """Remove a hidden file or folder whose writer was killed: nobody holds its lock."""
    with contextlib.suppress(OSError):
        lock = os.open(part, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        finally:
            os.close(lock)


def give_name(part: Path, target: Path, overwrite: bool) -> None:
    """Give a hidden file its name. Raises FileExistsError where there is a file, which
    is not empty, that is not to be overwritten."""
    if overwrite or target.exists() and target.stat().st_size == 0:
        part.replace(target)
        return
    try:
        os.link(part, target)
        part.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if target.exists():
            raise FileExistsError(f"{target} is there already.") from None
        part.replace(target)


def reason(file: BinaryIO, error: Exception) -> str:
    """Why an open file cannot be written: libraries do not tell of a full disk."""
    try:
        os.lseek(file.fileno(), 0, os.SEEK_END)
        for _ in range(2):  # the first may write a part
            os.write(file.fileno(), bytes(2**20))
        os.fsync(file.fileno())
    except OSError as cause:
        return in_words(cause)
    return str(error)


def reason_in(folder: Path, error: Exception) -> str:
    """Why a file in a folder cannot be written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return reason(file, error)


def print_out(text: object) -> None:
    """Print a line about what was made. Standard output may be full, or read no more, as
    by `head`: the line is lost then. What its encoding lacks is spelled out."""
    write_out(text, sys.stdout)


def print_result(text: object) -> None:
    """Print what a command was asked for. Where nobody reads any more the command ends;
    where it cannot be written for another reason, with a line and status 1."""
    error = write_out(text, getattr(sys.stdout, "original", sys.stdout))
    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    if error:
        name = os.path.basename(sys.argv[0])
        sys.exit(f"{name}: error: standard output: {in_words(error)}")


def write_out(text: object, stream: TextIO | None) -> OSError | None:
    """Print to a stream, None where it is closed. Returns what went wrong."""
    if stream is None:
        return None
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = str(text).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, file=stream, flush=True)
    except OSError as error:  # else Python tells of it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error


def leave_nothing() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit, so that hidden files go."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as of nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def in_words(error: OSError) -> str:
    """What the system says, plainly of a full disk."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else error.strerror or str(error)
