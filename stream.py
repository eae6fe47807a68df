"""Hear a take while it is made: samples go to a wav file or a pipe as they come.

    python generate.py --prompt "happy rock" --stream
    python generate.py --prompt "happy rock" --output - | ffplay -i -

The file is a whole wav after every piece, so that it can be played while it grows,
and keeps what was made when the run is killed.
"""

import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import BinaryIO

import mlx.core as mx
import numpy as np

import settings
from encodec import to_int16
from jobs import Course, Job, made_of
from musicgen import MusicGen

UNKNOWN = 0xFFFFFFFF  # the length that players take for "until the end"


def riff_chunk(name: bytes, content: bytes) -> bytes:
    """A name, the length, and the content, filled up to an even one."""
    return (
        struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
    )


def wav_header(channels: int, rate: int, size: int, comment: str = "") -> bytes:
    """What comes before 16-bit samples that take `size` bytes."""
    align = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * align, align, 16)
    chunks = riff_chunk(b"fmt ", form)
    if comment:
        text = riff_chunk(b"ICMT", comment.encode() + b"\0")
        chunks += riff_chunk(b"LIST", b"INFO" + text)
    chunks = b"WAVE" + chunks + struct.pack("<4sI", b"data", size)
    whole = min(len(chunks) + size, UNKNOWN)
    return struct.pack("<4sI", b"RIFF", whole) + chunks


class WavStream:
    """A wav file of 16-bit samples, with dither, that grows.

    Its header always tells what is there, but where it cannot be written again, as
    in a pipe (`rewinds`), it tells no length. Samples beyond 1 are clipped, with a
    warning.
    """

    def __init__(
        self,
        file: BinaryIO,
        channels: int,
        sampling_rate: int,
        comment: str = "",
        rewinds: bool = True,
    ):
        self._file, self._form, self._comment = file, (channels, sampling_rate), comment
        self._size, self._clipped = 0, False
        self._random = np.random.default_rng(0)
        self._rewinds = rewinds
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
        """Append samples (N, C). Raises ValueError for NaN."""
        audio = np.asarray(audio, dtype=np.float32)
        if not np.isfinite(audio).all():
            raise ValueError("The audio must be finite, but it holds NaN.")
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
    """The file to write, or standard output for "-". Raises OSError without one."""
    if path == "-" and sys.stdout is None:
        raise OSError("Standard output, to which --output - writes, is closed.")
    elif path == "-":
        yield sys.stdout.buffer
    else:
        with open(path, "wb") as file:
            yield file


def run(
    model: MusicGen,
    job: Job,
    chunk: float,
    callback: Callable[[int, int], None],
    course: Course = Course(),
) -> float:
    """Write the job's samples as they come; returns how many seconds there are.

    The codes are kept too, if the course wants them, after each chunk all that
    there are. A reader that closes the pipe ends it.
    """
    sound, prompt_frames = course.begin(model, job)
    told, codes = made_of(model, job, prompt_frames), []
    chunks = model.stream(
        job.prompt,
        chunk=chunk,
        seed=job.seed,
        audio_prompt=sound,
        codes_prompt=course.known,
        melody=job.tune(model),
        separate=False,  # done already
        style=job.manner(model),
        callback=callback,
        stop=course.stop,
        on_codes=codes.append,
        **asdict(job.options),
    )
    path, seconds = str(job.output), 0.0
    form = (model.channels, model.sampling_rate, settings.to_comment(told), path != "-")
    with open_output(path) as file:
        try:
            wav = WavStream(file, *form)
            for audio in chunks:
                if course.save_codes:  # first: what is heard can be gone on from
                    whole = mx.concatenate(codes, axis=1)
                    settings.save_codes(course.save_codes, whole, told)
                wav.write(audio)
                seconds = wav.seconds
        except BrokenPipeError:
            discard_output()
    return seconds


def discard_output() -> None:
    """Nobody reads standard output any more: what is left in it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
