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
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

import settings
from encodec import to_int16
from jobs import Job, told
from musicgen import MusicGen

UNKNOWN = 0xFFFFFFFF  # the length that players take for "until the end"


def riff_chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
    )


def wav_header(channels: int, rate: int, size: int, comment: str = "") -> bytes:
    """What comes before 16-bit samples that take `size` bytes."""
    align = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * align, align, 16)
    chunks = riff_chunk(b"fmt ", form)
    if comment:
        told = riff_chunk(b"ICMT", comment.encode() + b"\0")
        chunks += riff_chunk(b"LIST", b"INFO" + told)
    chunks = b"WAVE" + chunks + struct.pack("<4sI", b"data", size)
    whole = min(len(chunks) + size, UNKNOWN)
    return struct.pack("<4sI", b"RIFF", whole) + chunks


class WavStream:
    """A wav file of 16-bit samples, with dither, that grows.

    Where the file can be rewound its header always tells what is there; in a
    pipe it tells no length. Samples beyond 1 are clipped, with a warning.
    """

    def __init__(
        self, file: BinaryIO, channels: int, sampling_rate: int, comment: str = ""
    ):
        self._file, self._form, self._comment = file, (channels, sampling_rate), comment
        self._size, self._clipped = 0, False
        self._random = np.random.default_rng(0)
        self._rewinds = file.seekable()
        self._write_header(0 if self._rewinds else UNKNOWN)
        file.flush()

    def _write_header(self, size: int) -> None:
        self._file.write(wav_header(*self._form, size, self._comment))

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
        data = to_int16(audio, self._random).astype("<i2").tobytes()
        self._file.write(data)
        self._size += len(data)
        if self._rewinds:  # the samples first: a header may tell less, never more
            self._file.flush()
            self._file.seek(0)
            self._write_header(self._size)
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
    known: mx.array | None = None,
    save_codes: Path | None = None,
) -> float:
    """Write the job's samples as they come; returns how many seconds there are.

    `known` are codes (1, T, K) to go on from. The codes are kept in `save_codes`,
    after each chunk all that there are. A reader that closes the pipe ends it, and
    so does `stop`, once it is true.
    """
    made_of, codes = told(model, job), []
    chunks = model.stream(
        job.prompt,
        chunk=chunk,
        seed=job.seed,
        audio_prompt=job.sound(model),
        codes_prompt=known,
        callback=callback,
        stop=stop,
        on_codes=codes.append,
        **asdict(job.options),
    )
    form = (model.channels, model.sampling_rate, settings.to_comment(made_of))
    with open_output(str(job.output)) as file:
        wav = WavStream(file, *form)
        try:
            for audio in chunks:
                if save_codes:  # first, so that what is heard can be gone on from
                    settings.save_codes(save_codes, mx.concatenate(codes, 1), made_of)
                wav.write(audio)
        except BrokenPipeError:
            pass
        return wav.seconds
