"""A wav file that grows: it can be played while it is written, or go to a pipe.

    wav = WavStream(file, channels=1, sampling_rate=32000)
    wav.write(audio)  # (N, 1)

Needs audio.py, resample.py and outputs.py beside it.
"""

import struct
import warnings
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from audio import to_int16

UNKNOWN = 0xFFFFFFFF  # bytes: the length that players read as "until the end"


class WavStream:
    """A wav file that grows: 16-bit samples, with dither.

    The header is written again after each piece, so the file can be played at any time.
    `rewinds` is False where that cannot be done, as in a pipe; then the header gives no
    length. Samples beyond 1 are clipped, with a warning.
    """

    def __init__(
        self,
        file: BinaryIO,
        channels: int,
        sampling_rate: int,
        comment: str = "",
        rewinds: bool = True,
    ):
        self._file, self._comment = file, comment
        self._format = channels, sampling_rate
        self._size, self._clipped = 0, False  # bytes of samples; whether it has warned
        self._random = np.random.default_rng(0)
        self._rewinds = rewinds
        self._write_header(0 if self._rewinds else UNKNOWN)
        file.flush()

    def _write_header(self, size: int) -> None:
        self._file.write(wav_header(*self._format, size, self._comment))

    @property
    def seconds(self) -> float:
        """Seconds of sound in the file."""
        channels, rate = self._format
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
        if self._rewinds:  # samples first: a header never promises more than there is
            self._file.flush()
            self._file.seek(0)
            self._write_header(self._size)
            self._file.seek(0, 2)
        self._file.flush()


def riff_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk: its name, the length of its content, and the content, made even."""
    return (
        struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
    )


def wav_header(channels: int, rate: int, size: int, comment: str = "") -> bytes:
    """The bytes of a wav file before 16-bit samples that take `size` bytes."""
    align = 2 * channels
    content = struct.pack("<HHIIHH", 1, channels, rate, rate * align, align, 16)
    chunks = riff_chunk(b"fmt ", content)  # 1: linear PCM
    if comment:
        text = riff_chunk(b"ICMT", comment.encode() + b"\0")
        chunks += riff_chunk(b"LIST", b"INFO" + text)
    chunks = b"WAVE" + chunks + struct.pack("<4sI", b"data", min(size, UNKNOWN))
    whole = min(len(chunks) + size, UNKNOWN)
    return struct.pack("<4sI", b"RIFF", whole) + chunks
