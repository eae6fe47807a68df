"""Sound files: read, resample and write them; and a wav file that grows.

    audio = load_audio("in.mp3", 32000, 2)  # (N, 2) float32
    save_audio("out.flac", audio, 32000)

or `python audio.py in.mp3 out.flac --sampling-rate 32000 --channels 2`. It reads what
soundfile reads: wav, flac, ogg, mp3 and more. Stands alone.
"""

import argparse
import hashlib
import math
import os
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import soundfile


def load_audio(path: str | Path, sampling_rate: int, channels: int) -> mx.array:
    """Read a sound file as samples (N, channels), float32, at `sampling_rate` Hz.

    Mono is copied to every channel. For one channel all are averaged. A file with more
    channels than asked for gives its first ones. Raises FileNotFoundError, or
    ValueError for a file that is no sound, is empty, holds NaN, has too few channels or
    a rate that is not from 100 to 768000 Hz.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no sound file {path}.")
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable sound file: {error}") from error
    if len(audio) == 0 or not np.isfinite(audio).all():
        raise ValueError(f"{path} must hold sound, but it is empty or holds NaN.")
    if not 100 <= rate <= 768_000:  # a damaged header may say anything
        raise ValueError(f"{path} must have a rate of 100 to 768000 Hz, got {rate}.")
    file_channels = audio.shape[1]
    if channels == 1:
        audio = audio.mean(axis=1, keepdims=True)
    elif file_channels == 1:
        audio = np.repeat(audio, channels, axis=1)
    elif file_channels < channels:
        raise ValueError(
            f"{path} has {file_channels} channels, but {channels} are needed."
        )
    return mx.array(resample(audio[:, :channels], rate, sampling_rate))


def resample(audio: np.ndarray, source: int, target: int) -> np.ndarray:
    """(N, C) at `source` Hz -> (floor(N * target / source), C) at `target` Hz.

    The filter is that of julius, which audiocraft uses
    (https://github.com/adefossez/julius): a sinc with 24 zero crossings and a squared
    cosine as its window, cut off at 0.945 of the lower Nyquist frequency. Beyond the
    ends the first and the last sample go on.
    """
    if source == target:
        return audio
    zeros, rolloff = 24, 0.945
    divisor = math.gcd(source, target)
    source, target = source // divisor, target // divisor
    rate = min(source, target) * rolloff
    width = math.ceil(zeros * source / rate)
    taps = np.arange(-width, width + 2)

    phase = (np.arange(target) * source % target) / target  # of a sample, 0 to 1
    time = (taps - phase[:, None]) * rate / source
    time = np.clip(time, -zeros, zeros)
    kernels = np.sinc(time) * np.cos(np.pi * time / zeros / 2) ** 2
    kernels = (kernels / kernels.sum(axis=1, keepdims=True)).astype(np.float32)

    output = np.empty((len(audio) * target // source, audio.shape[1]), np.float32)
    for start in range(0, len(output), 65536):  # to bound the memory of the windows
        places = np.arange(start, min(start + 65536, len(output)))
        window = (places * source // target)[:, None] + taps
        window = audio[np.clip(window, 0, len(audio) - 1)]
        output[places] = np.einsum("nt,ntc->nc", kernels[places % target], window)
    return output


def check_samples(name: str, audio: Any, channels: int = 8) -> mx.array:
    """A caller's sound as samples (N, C) in float32, C at most `channels`.

    `audio` is an array of MLX or numpy, and `name` is its name in messages. Raises
    ValueError for anything else, another shape, no samples, NaN and infinity.
    """
    if isinstance(audio, str | Path):
        raise ValueError(
            f"{name} must be samples (N, C), got {str(audio)!r}. Read the file with "
            "load_audio first."
        )
    try:
        audio = mx.array(audio).astype(mx.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be samples (N, C), got {type(audio).__name__}. Give an array."
        ) from error
    if audio.ndim != 2 or len(audio) == 0 or not 1 <= audio.shape[1] <= channels:
        raise ValueError(
            f"{name} must have the shape (N, C), with N > 0 samples of 1 to {channels} "
            f"channels, got {audio.shape}. Mono is audio[:, None]; where channels come "
            "first, give audio.T."
        )
    if not mx.isfinite(audio).all().item():
        raise ValueError(
            f"{name} must be finite, but it holds NaN or infinity. Look at where the "
            "samples come from."
        )
    return audio


SUBTYPES = {  # of soundfile, by extension; the first is the default
    ".wav": ("PCM_16", "PCM_24", "FLOAT"),
    ".flac": ("PCM_16", "PCM_24"),
    ".ogg": ("VORBIS",),
    ".mp3": ("MPEG_LAYER_III",),
}


def save_audio(
    path: str | Path,
    audio: mx.array,
    sampling_rate: int,
    comment: str = "",
    subtype: str | None = None,
) -> None:
    """Write float samples (N, C) or (N,); the extension names the format.

    The formats are wav, flac, ogg and mp3. wav and flac have 16 bits, with dither, or
    the `subtype` "PCM_24", and wav "FLOAT", too. `comment` is text inside the file.

    Samples beyond 1 would clip. Then the whole sound is scaled down to a peak of 1,
    with a warning, but not in FLOAT. The file appears under its name only when it is
    whole. Raises ValueError for another shape, NaN, a rate that is not from 1000 to
    192000 Hz, an unknown extension or subtype, and OSError where nothing can be
    written.
    """
    path = check_audio_path(path, subtype)
    subtype = choose_subtype(path, subtype)
    audio = np.asarray(audio, dtype=np.float32)
    audio = audio[:, None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or not 1 <= audio.shape[1] <= 8:
        raise ValueError(
            f"The audio for {path} must have the shape (N, C) with 1 to 8 channels, "
            f"got {audio.shape}."
        )
    if not 1000 <= sampling_rate <= 192_000:  # libsndfile crashes on others
        raise ValueError(
            f"sampling_rate must be from 1000 to 192000 Hz, got {sampling_rate}."
        )
    peak = np.abs(audio).max(initial=0)
    if not np.isfinite(peak):
        raise ValueError(f"The audio for {path} must be finite, but it holds NaN.")
    if peak > 1 and subtype != "FLOAT":
        warnings.warn(f"{path} was scaled down: its peak of {peak:.2f} would clip.")
        audio = audio / peak
    if path.suffix.lower() == ".wav" and len(comment) > 50_000:
        warnings.warn(
            f"{path} takes no comment as long as its settings: it is without them."
        )
    target = path.resolve()  # where a link points to, so that the link stays
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    part = target.with_name(f".{digest}.part{target.suffix}")
    try:
        write_samples(part, audio, sampling_rate, comment, subtype)
        part.replace(target)
    except (OSError, soundfile.LibsndfileError) as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_samples(
    path: Path, audio: np.ndarray, sampling_rate: int, comment: str, subtype: str
) -> None:
    """Write samples (N, C), which must be valid.

    Raises soundfile's errors, and OSError where the disk is full, which not every
    format reports.
    """
    options = dict(channels=audio.shape[1], subtype=subtype)
    random = np.random.default_rng(0)  # the same samples give the same file
    with soundfile.SoundFile(path, "w", sampling_rate, **options) as file:
        if comment:
            file.comment = comment
        # In blocks, since libsndfile's Vorbis encoder crashes on minutes in one call.
        for start in range(0, len(audio), 65536):
            block = audio[start : start + 65536]
            file.write(to_int16(block, random) if subtype == "PCM_16" else block)
    if soundfile.info(path).frames < len(audio):
        raise OSError("the disk is full")


def to_int16(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Float samples (N, C) -> int16. Samples beyond 1 are clipped.

    Triangular dither of one step to both sides turns the rounding error into a constant
    hiss, in which sounds quieter than a step are heard without distortion.
    """
    noise = random.random((*audio.shape, 2), np.float32)
    steps = np.clip(audio, -1, 1) * 32766 + noise[..., 0] - noise[..., 1]
    return np.rint(steps).astype(np.int16)


def choose_subtype(path: str | Path, subtype: str | None = None) -> str:
    """The subtype of a sound file: the given one, or the default of its extension.

    Raises ValueError for an extension that is not in SUBTYPES, or a subtype that the
    extension does not have.
    """
    suffix = Path(path).suffix
    subtypes = SUBTYPES.get(suffix.lower())
    if subtypes is None:
        raise ValueError(
            f"{path} must end in one of {', '.join(SUBTYPES)}, got '{suffix}'."
        )
    if subtype is not None and subtype not in subtypes:
        raise ValueError(
            f"subtype of a {suffix} must be {' or '.join(subtypes)}, got {subtype!r}."
        )
    return subtype or subtypes[0]


def check_audio_path(path: str | Path, subtype: str | None = None) -> Path:
    """The path, if `save_audio` can write there.

    Raises OSError where no file can be written, ValueError for an unknown extension or
    subtype.
    """
    choose_subtype(path, subtype)
    check_writable(path)
    return Path(path)


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be written at `path`."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} of {path.name} must exist.")
    if os.path.exists(path) and not path.is_file():
        raise PermissionError(f"{path} is no ordinary file; choose another place.")
    if len(os.fsencode(path.name)) > 255:
        raise PermissionError(
            f"{path.name:.40}... is too long a name: choose one of at most 255 bytes."
        )
    try:  # a trial, since permissions alone do not say it
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except (OSError, RuntimeError) as error:
        raise PermissionError(
            f"{path} cannot be written; choose another place: {error}"
        ) from error


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a sound file.")
    parser.add_argument("source", help="sound file to read")
    parser.add_argument("target", help="sound file to write")
    parser.add_argument("--sampling-rate", type=int, help="Hz (default: the source's)")
    parser.add_argument("--channels", type=int, help="(default: the source's)")
    args = parser.parse_args()
    try:
        if not Path(args.source).is_file():
            raise FileNotFoundError(f"There is no sound file {args.source}.")
        info = soundfile.info(args.source)
        rate = args.sampling_rate or info.samplerate
        if not 1000 <= rate <= 192_000:
            raise ValueError(f"sampling_rate must be 1000 to 192000, got {rate}.")
        audio = load_audio(args.source, rate, args.channels or info.channels)
        save_audio(args.target, audio, rate)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"audio.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{args.target}: {len(audio) / rate:.2f} s")


if __name__ == "__main__":
    main()
