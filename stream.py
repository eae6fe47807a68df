"""Hear a take while it is made: samples go to a wav file or a pipe as they come.

    python generate.py --prompt "happy rock" --stream
    python generate.py --prompt "happy rock" --output - | ffplay -i -

The file is a whole wav after every piece, so that it can be played while it grows, and
keeps what was made when the run is killed. Needs audio.py beside it.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import mlx.core as mx

from audio import WavStream


def write(
    path: str,
    pieces: Iterable[mx.array],
    channels: int,
    sampling_rate: int,
    comment: str = "",
) -> float:
    """Write pieces of samples (N, C) as they come; returns how many seconds there are.

    A reader that closes the pipe, which "-" is, ends it.
    """
    seconds = 0.0
    with open_output(path) as file:
        try:
            wav = WavStream(file, channels, sampling_rate, comment, rewinds=path != "-")
            for piece in pieces:
                wav.write(piece)
                seconds = wav.seconds
        except BrokenPipeError:
            discard_output()
    return seconds


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """The file to write, or standard output for "-". Raises OSError without one."""
    if path == "-" and sys.stdout is None:
        raise OSError("Standard output, to which --output - writes, is closed.")
    elif path == "-":
        yield sys.stdout.buffer
    else:
        with open(path, "wb") as file:
            yield file


def discard_output() -> None:
    """Nobody reads standard output any more: what is left in it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
