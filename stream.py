"""Hear a take while it is made: samples go to a wav file or a pipe as they come.

    python generate.py --prompt "happy rock" --stream
    python generate.py --prompt "happy rock" --output - | ffplay -i -

The file is a whole wav after every piece, so that it can be played while it grows,
and keeps what was made when the run is killed.
"""

import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from jobs import Job
from musicgen import MusicGen

UNKNOWN = 0xFFFFFFFF  # the length that players take for "until the end"


def wav_header(channels: int, rate: int, size: int) -> bytes:
    """44 bytes for 16-bit samples that take `size` bytes."""
    whole = min(size + 36, UNKNOWN)
    align = 2 * channels
    head = struct.pack("<4sI4s", b"RIFF", whole, b"WAVE")
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * align, align, 16)
    data = struct.pack("<4sI", b"data", size)
    return head + struct.pack("<4sI", b"fmt ", len(form)) + form + data


class WavStream:
    """A wav file of 16-bit samples that grows.

    Where the file can be rewound its header always tells what is there; in a
    pipe it tells no length. Samples beyond 1 are clipped, with a warning.
    """

    def __init__(self, file: BinaryIO, channels: int, sampling_rate: int):
        self._file, self._form = file, (channels, sampling_rate)
        self._size, self._clipped = 0, False
        self._rewinds = file.seekable()
        file.write(wav_header(*self._form, 0 if self._rewinds else UNKNOWN))
        file.flush()

    @property
    def seconds(self) -> float:
        """Length of what was written."""
        channels, rate = self._form
        return self._size / (2 * channels * rate)

    def write(self, audio: mx.array) -> None:
        """Append samples (N, C)."""
        audio = np.asarray(audio, dtype=np.float32)
        if np.abs(audio).max(initial=0) > 1 and not self._clipped:
            self._clipped = True
            warnings.warn("Samples beyond 1 are clipped: a stream cannot be scaled.")
        data = (np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes()
        self._file.write(data)
        self._size += len(data)
        if self._rewinds:  # the samples first: a header may tell less, never more
            self._file.flush()
            self._file.seek(0)
            self._file.write(wav_header(*self._form, self._size))
            self._file.seek(0, 2)
        self._file.flush()


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """The file to write, or standard output for "-"."""
    if path == "-":
        yield sys.stdout.buffer
    else:
        with open(path, "wb") as file:
            yield file


def run(
    model: MusicGen,
    job: Job,
    chunk: float,
    callback: Callable[[int, int], None],
    stop: Callable[[], bool] | None = None,
) -> float:
    """Write the job's samples as they come; returns how many seconds there are.

    A reader that closes the pipe ends it, and so does `stop`, once it is true.
    """
    chunks = model.stream(
        job.prompt,
        chunk=chunk,
        seed=job.seed,
        audio_prompt=job.sound(model),
        callback=callback,
        stop=stop,
        **asdict(job.options),
    )
    with open_output(str(job.output)) as file:
        wav = WavStream(file, model.channels, model.sampling_rate)
        try:
            for audio in chunks:
                wav.write(audio)
        except BrokenPipeError:
            pass
        return wav.seconds
