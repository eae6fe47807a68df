"""Hear a take while it is made: samples go to a wav file or a pipe as they come.

    python generate.py --prompt "happy rock" --stream
    python generate.py --prompt "happy rock" --output - | ffplay -i -

The file is a whole wav after every piece, so that it can be played while it grows, and
keeps what was made when the run is killed. Where a file is there that it overwrites, it
grows beside it, under a hidden name, until it is longer. Needs wav_stream.py, audio.py,
resample.py and outputs.py beside it.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mlx.core as mx
import soundfile

from outputs import free, give_name, in_words, open_hidden
from wav_stream import WavStream


class Written(NamedTuple):
    """How much a stream has written, and where: its file may be another's by now."""

    seconds: float
    path: str


def write(
    path: str,
    pieces: Iterable[mx.array],
    channels: int,
    sampling_rate: int,
    comment: str = "",
    overwrite: bool = True,
    whole: Callable[[], bool] = lambda: True,
) -> Written:
    """Write pieces of samples (N, C) as they come.

    A file that is there is lost only to one that is longer, or `whole`, as is asked
    after the last piece. A reader that closes the pipe, which "-" is, ends it. Raises
    OSError where nothing can be written, or where another program has taken the file.
    """
    if path == "-":
        return Written(write_to_pipe(pieces, channels, sampling_rate, comment), path)
    with open_output(path, overwrite) as output:
        wav = WavStream(output.file, channels, sampling_rate, comment)
        output.grow(0.0)
        for piece in pieces:
            wav.write(piece)
            output.grow(wav.seconds)
        if whole():
            output.appear()
    output.check_kept()
    return Written(wav.seconds, str(output.path))


def write_to_pipe(
    pieces: Iterable[mx.array], channels: int, sampling_rate: int, comment: str
) -> float:
    """Write pieces to standard output; returns the seconds. Raises OSError where that
    is closed."""
    file, seconds = getattr(sys.stdout, "buffer", None), 0.0
    if file is None:
        raise OSError("Standard output, to which --output - writes, is closed.")
    try:
        wav = WavStream(file, channels, sampling_rate, comment, rewinds=False)
        for piece in pieces:
            wav.write(piece)
            seconds = wav.seconds
    except BrokenPipeError:
        discard_output()
    return seconds


class Output:
    """A file that grows, hidden until it is longer than the one that is there."""

    def __init__(self, path: str, file: BinaryIO, part: Path, overwrite: bool):
        self.path, self.file = Path(path), file
        self._part, self._overwrite = part, overwrite
        self._seconds, self._least = 0.0, seconds_of(self.path)
        self._shown = self._lost = False  # whether it has its name, or had

    def grow(self, seconds: float) -> None:
        """It has so many seconds by now."""
        self._seconds = seconds
        if not self._shown and seconds > self._least:
            self.appear()

    def appear(self) -> None:
        """Take the name; another one where somebody else took it meanwhile."""
        while not self._shown:
            try:
                give_name(self._part, self.path.resolve(), self._overwrite)
                self._shown = True
            except FileExistsError:
                self._move(f"Another program wrote {self.path} meanwhile")

    def _move(self, why: str) -> None:
        self.path = free(self.path)
        warnings.warn(f"{why}: this take is in {self.path}.")

    def close(self) -> None:
        """Leave no hidden file, and find out whose the name is."""
        if not self._shown and self._seconds:
            self._overwrite = False
            self._move(f"{self.path} is longer, so it stays")
            self.appear()
        self._part.unlink(missing_ok=True)
        mine = os.fstat(self.file.fileno())
        self._lost = self._shown and not same(self.path, mine)

    def check_kept(self) -> None:
        """Raise OSError where the name is another's by now."""
        if self._lost:
            did = "wrote" if os.path.exists(self.path) else "moved or removed"
            raise OSError(
                f"Another program {did} {self.path}, so this take is lost: run it "
                "again with another --output."
            )


def seconds_of(path: Path) -> float:
    """The length of a sound file; of another file 0, and of none less than that."""
    try:
        return soundfile.info(path).duration
    except (OSError, RuntimeError):
        return 0.0 if os.path.exists(path) else -1.0


def same(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), file)
    except OSError:
        return False


@contextmanager
def open_output(path: str, overwrite: bool = True) -> Iterator[Output]:
    """A file to write, under a hidden name at first. Raises OSError without one."""
    try:
        part, file = open_hidden(Path(path).resolve())
        with file:
            output = Output(path, file, part, overwrite)
            try:
                yield output
            finally:
                output.close()
    except OSError as error:
        if error.errno is None:  # its message says all
            raise
        raise OSError(f"{path} could not be written: {in_words(error)}") from error


def discard_output() -> None:
    """Nobody reads standard output any more: what is left in it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
