"""Sound files: read, resample and write them.

    audio = load_audio("in.mp3", 32000, 2)  # (N, 2) float32
    save_audio("out.flac", audio, 32000)

or `python audio.py in.mp3 out.flac --sampling-rate 32000 --channels 2`. It reads what
soundfile reads: wav, flac, ogg, opus, mp3 and more. All else, such as m4a and webm,
goes through macOS's afconvert or through ffmpeg, where one of them is there. Needs
resample.py and outputs.py beside it.
"""

import argparse
import functools
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import soundfile

from outputs import check_apart, check_new, print_out, whole_file
from resample import filter_width, resample, true_peak

RATES = (100, 768_000)  # Hz of a file: a damaged header may say anything
MOST = 2**29  # samples of all channels to hold at once: 2 GB, 100 minutes in stereo
BLOCK = 4096  # samples to read at once: where one is damaged, no more are lost
SEEKABLE = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF")  # to a sample


def load_audio(
    path: str | Path,
    sampling_rate: int,
    channels: int,
    start: int = 0,
    count: int | None = None,
) -> mx.array:
    """Read a sound file as samples (N, channels), float32, at `sampling_rate` Hz.

    Mono is copied to every channel. For one channel all are averaged. A file with more
    channels than asked for gives its first ones. `start` and `count` choose a part, in
    samples at `sampling_rate`; no more of the file is read than it needs. A damaged one
    is read up to the damage, with a warning.

    Raises FileNotFoundError, or ValueError for a file that is no sound, is empty, ends
    before `start`, holds NaN, is longer than memory should hold, has too few channels
    or a rate that is not from 100 to 768000 Hz, and for a rate or channels below 1.
    """
    return mx.array(read_sound(path, sampling_rate, channels, start, count)[0])


def read_sound(
    path: str | Path,
    sampling_rate: int | None = None,
    channels: int | None = None,
    start: int = 0,
    count: int | None = None,
) -> tuple[np.ndarray, int]:
    """Samples as of `load_audio`, and their rate. None: the file's own."""
    for name, value in (("sampling_rate", sampling_rate), ("channels", channels)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}.")
    with open_sound(path) as file:
        source, target = file.samplerate, sampling_rate or file.samplerate
        channels = channels or file.channels
        if 1 < file.channels < channels:
            raise ValueError(
                f"{path} has {file.channels} channels, but {channels} are needed: name "
                "a file with as many, or ask for fewer."
            )
        first, skip, last = part_of(start, count, source, target)
        most = MOST // (max(1, math.ceil(target / source)) * channels)
        blocks, size = [np.empty((0, channels), np.float32)], 0
        for block in read_blocks(path, file, first, last):
            blocks.append(to_channels(block, channels))
            size += len(block)
            if size > most:
                raise ValueError(
                    f"{path} is longer than the {most / source / 60:.0f} minutes that "
                    "memory should hold: cut it, or take a part."
                )
        audio = np.concatenate(blocks)
        if size == 0 and start == 0:
            raise ValueError(f"{path} must hold sound, but it is empty.")
        if not np.isfinite(audio).all():
            raise ValueError(f"{path} must hold sound, but it holds NaN or infinity.")
        audio = resample(audio, source, target)[skip:]
        if len(audio) == 0:
            raise ValueError(f"{path} ends before {start / target:g} s.")
        return audio[:count], target


def part_of(
    start: int, count: int | None, source: int, target: int
) -> tuple[int, int, int | None]:
    """Where to begin to read for `count` samples from `start` on at `target` Hz, how
    many samples there to leave out after resampling, and where to end.

    Reading begins at a whole period of both rates, so that the filter's phases stay.
    """
    source, target, width = filter_width(source, target)
    periods = max(start * source // target - width, 0) // source
    end = None if count is None else (start + count) * source // target + width + 2
    return periods * source, start - periods * target, end


def to_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """(N, C) -> (N, channels): the mean, copies of mono, or the first ones."""
    if channels == 1:
        return audio.mean(axis=1, keepdims=True)
    if audio.shape[1] == 1:
        return np.repeat(audio, channels, axis=1)
    return audio[:, :channels]


def count_samples(path: str | Path, sampling_rate: int) -> int:
    """How many samples `load_audio` gives at `sampling_rate` Hz of the whole file, that
    are really there; in a damaged one perhaps also those after the damage. Raises as
    that."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no sound file {path}.")
    changed = os.stat(path)
    count, rate = count_frames(str(path), changed.st_mtime_ns, changed.st_size)
    return count * sampling_rate // rate


@functools.lru_cache(maxsize=64)
def count_frames(path: str, *version: int) -> tuple[int, int]:
    """Samples of a channel in a `version` of a file, and their rate. Where the last one
    of those that its header promises is not there, they are counted."""
    with open_sound(path) as file:
        last = file.frames - 1
        if file.format in SEEKABLE and 0 <= last < 2**40:
            try:
                file.seek(last)
                if len(file.read(1)) == 1:
                    return last + 1, file.samplerate
            except soundfile.LibsndfileError:
                pass
    with open_sound(path) as file:
        return sum(map(len, read_blocks(path, file))), file.samplerate


def read_blocks(
    path: str | Path,
    file: soundfile.SoundFile,
    first: int = 0,
    last: int | None = None,
) -> Iterator[np.ndarray]:
    """Samples (N, C) of an open file, in float32, up to the end that it really has, or
    to where it is damaged: then a warning has its `path`."""
    place = 0
    if first and file.format in SEEKABLE:
        place = file.seek(min(first, file.frames))
    began = place
    while last is None or place < last:
        wanted = BLOCK if last is None else min(BLOCK, last - place)
        try:
            block = file.read(wanted, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            if place == began:
                raise
            seconds = place / file.samplerate
            warnings.warn(f"{path} is damaged: it is read up to {seconds:.2f} s only.")
            return
        place += len(block)
        if place > first:
            yield block[max(len(block) - (place - first), 0) :]
        if len(block) < wanted:
            return


@contextmanager
def open_sound(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """A sound file, by its content and whatever its name, to be read in blocks.

    Nothing is allocated by what its header promises. Raises as `load_audio`.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no sound file {path}.")
    try:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(by_content(path))
            except soundfile.LibsndfileError as error:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                wav = to_wav(path, Path(folder) / "sound.wav", error)
                file = stack.enter_context(by_content(wav))
            low, high = RATES
            if not low <= file.samplerate <= high:
                raise ValueError(
                    f"{path} must have a rate of {low} to {high} Hz, got "
                    f"{file.samplerate}."
                )
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable sound file: {error}") from error
    except MemoryError as error:
        raise ValueError(f"{path} is more than memory can hold: cut it.") from error


@contextmanager
def by_content(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """A sound file, opened without its name, whose extension soundfile would trust.

    Raises soundfile's error for what it does not know.
    """
    with open(path, "rb") as raw:
        with Forward(raw.fileno(), closefd=False) as file:
            yield file


class Forward(soundfile.SoundFile):
    """Read from front to back. SoundFile itself seeks after every read, which fails at
    the end of a file whose header promises more."""

    def seekable(self) -> bool:
        return False


# Other programs

TOOLS = {  # to wav and to AAC
    "afconvert": (
        "afconvert -f WAVE -d LEF32 {source} {target}",
        "afconvert -f m4af -d aac {source} {target}",
    ),
    "ffmpeg": (
        "ffmpeg -nostdin -v error -y -protocol_whitelist file -i {source} -vn "
        "-c:a pcm_f32le {target}",
        "ffmpeg -nostdin -v error -y -i {source} -metadata comment={comment} -c:a aac "
        "-b:a 192k {target}",
    ),
}


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends what is waited for here, also where it is only noted elsewhere."""
    before = signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_tools(which: int, **values: str | Path) -> tuple[str, str]:
    """The first program of TOOLS that does it, or "", and what the last one said. Raises
    OSError where one was ended by a signal."""
    said = ""
    for name, commands in TOOLS.items():
        if shutil.which(name):
            words = [word.format(**values) for word in shlex.split(commands[which])]
            # Ctrl-C ends the reading of a sound, and never loses one that is made.
            options = dict(stdin=subprocess.DEVNULL, start_new_session=which == 1)
            with interruptible() if which == 0 else nullcontext():
                done = subprocess.run(words, capture_output=True, **options)
            if done.returncode == 0 and Path(values["target"]).is_file():
                return name, ""
            if done.returncode < 0:  # it is not the file's fault
                number = signal.Signals(-done.returncode).name
                raise OSError(f"{name} was ended by {number}: run the same again.")
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            said = f"{name}: {lines[-1] if lines else done.returncode}"
    return "", said


def to_wav(path: str | Path, target: Path, error: Exception) -> Path:
    """Write what libsndfile cannot read, which was `error`, as a wav file, or raise
    ValueError."""
    source = Path(path).absolute()  # so that no name is taken for a flag
    tool, said = run_tools(0, source=source, target=target)
    if tool:
        return target
    reason = said or getattr(error, "error_string", str(error))
    if not said:
        wav = Path(path).with_name(f"{Path(path).stem}-converted.wav")
        command = (
            "afconvert -f WAVE -d LEI16" if sys.platform == "darwin" else "ffmpeg -i"
        )
        reason += f" If a player plays it, run: {command} {quoted(path)} {quoted(wav)}"
    raise ValueError(f"{path} is not a readable sound file: {reason}") from error


def quoted(path: str | Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def check_samples(
    name: str,
    audio: Any,
    sampling_rate: int,
    channels: int = 8,
    file_channels: int = 1,
    count: int | None = None,
) -> mx.array:
    """A caller's sound as samples (N, C) in float32, C at most `channels`.

    `audio` is samples (N, C) or (N,) at `sampling_rate` Hz, as `to_floats` takes them,
    or the path of a sound file, of which `file_channels` channels are made. `name` is
    its name in messages. The first `count` samples are enough. Raises ValueError for
    anything else, another shape, no samples, NaN and infinity, and as `load_audio`.
    """
    if isinstance(audio, str | Path):
        return load_audio(audio, sampling_rate, file_channels, 0, count)
    audio = to_floats(name, audio)
    audio = audio[:, None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or len(audio) == 0 or not 1 <= audio.shape[1] <= channels:
        hint = " Where channels come first, give audio.T." if audio.ndim == 2 else ""
        raise ValueError(
            f"{name} must have the shape (N, C), with N > 0 samples of 1 to {channels} "
            f"channels, got {audio.shape}.{hint}"
        )
    if not mx.isfinite(audio).all().item():
        raise ValueError(
            f"{name} must be finite, but it holds NaN or infinity. Look at where the "
            "samples come from."
        )
    if (peak := mx.abs(audio).max().item()) > 10:
        warnings.warn(f"{name} reaches {peak:.4g}, but floats are meant from -1 to 1.")
    return audio[:count]


INTEGERS = {"uint8": 8, "int8": 8, "int16": 16, "int32": 32}  # bits


def to_floats(name: str, audio: Any) -> mx.array:
    """An array of MLX or numpy, or what numpy makes one of, in float32.

    Floats of any type stay as they are. Integers are brought from their type's range to
    -1 to 1, as sound files hold them: int16 is divided by 32768, and uint8 is silent at
    128. Raises ValueError for all else, such as int64, whose range is no sound's.
    """
    wanted = (
        f"{name} must be samples (N, C) in floats from -1 to 1, or in integers of 8, 16 "
        "or 32 bits"
    )
    if isinstance(audio, int | None):
        raise ValueError(f"{wanted}, got {audio}.")
    try:
        array = audio if isinstance(audio, mx.array) else np.asarray(audio)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be samples (N, C): {error}") from error
    if isinstance(array, mx.array):
        kind = str(array.dtype).removeprefix("mlx.core.")
        floating = mx.issubdtype(array.dtype, mx.floating)
    else:
        kind = array.dtype.name
        floating = np.issubdtype(array.dtype, np.floating)
    if kind in INTEGERS:
        half = 2.0 ** (INTEGERS[kind] - 1)
        shift = half if kind == "uint8" else 0
        return mx.array((np.asarray(array).astype(np.float64) - shift) / half)
    if floating:
        if not isinstance(array, mx.array):
            array = mx.array(array.astype(np.float32))  # of float128 and byte orders
        return array.astype(mx.float32)
    raise ValueError(f"{wanted}, got {type(audio).__name__} of {kind}.")


SUBTYPES = {  # of soundfile, by extension; the first is the default
    ".wav": ("PCM_16", "PCM_24", "FLOAT"),
    ".flac": ("PCM_16", "PCM_24"),
    ".ogg": ("VORBIS",),
    ".mp3": ("MPEG_LAYER_III",),
    ".m4a": ("AAC",),  # which other programs write
}
LOSSY = (".ogg", ".mp3", ".m4a")
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz
BITRATES = (8, 320)  # kbit/s of mp3
OVER = 1.0005  # 0.004 dB above the ceiling: rounding


def save_audio(
    path: str | Path,
    audio: mx.array,
    sampling_rate: int,
    comment: str = "",
    subtype: str | None = None,
    bitrate: int | None = None,
    overwrite: bool = True,
    ceiling: float = 0.0,
) -> None:
    """Write samples (N, C) or (N,), as `to_floats` takes them.

    The extension names the format: wav, flac, ogg or mp3, and m4a where afconvert or
    ffmpeg is there. wav and flac have 16 bits, with dither, or the `subtype` "PCM_24",
    and wav "FLOAT", too. `bitrate` is that of an mp3, in kbit/s; None: it varies.
    `comment` is text inside the file.

    Where the true peak is above the `ceiling`, in dB of full scale (0: it would clip),
    the whole is scaled down, with a warning, but not in FLOAT. ogg, mp3 and m4a are
    heard again for that, since encoding raises peaks. The file appears under its
    name only when it is whole. Raises ValueError for another shape, NaN, a rate that is
    not from 1000 to 192000 Hz or that the format does not take, an unknown extension,
    subtype or bit rate, and OSError where nothing can be written: FileExistsError where
    a file is there, unless it is to `overwrite`.
    """
    path = check_audio_path(path, subtype, bitrate)
    subtype = choose_subtype(path, subtype)
    audio = np.array(to_floats(f"The audio for {path}", audio))
    audio = audio[:, None] if audio.ndim == 1 else audio
    if audio.ndim != 2 or not 1 <= audio.shape[1] <= 8:
        raise ValueError(
            f"The audio for {path} must have the shape (N, C) with 1 to 8 channels, "
            f"got {audio.shape}."
        )
    check_form(path, sampling_rate, audio.shape[1])
    if not np.isfinite(audio).all():
        raise ValueError(f"The audio for {path} must be finite, but it holds NaN.")
    if path.suffix.lower() in (".wav", ".m4a") and len(comment) > 50_000:
        warnings.warn(
            f"{path} takes no comment as long as its settings: it is without them."
        )
        comment = ""
    highest = 10 ** (ceiling / 20)
    why = (
        f"its peaks would be above {ceiling:g} dB"
        if ceiling
        else "its peaks would clip"
    )
    peak = 1.0 if subtype == "FLOAT" else true_peak(audio) / highest
    audio = scaled_down(path, audio, peak, why)
    with whole_file(path, overwrite) as part:
        write_samples(part, audio, sampling_rate, comment, subtype, bitrate)
        if path.suffix.lower() not in LOSSY:
            return
        raised = 1.0
        for margin in (0.999, 0.995, 0.99, 0.98, 0.95, 0.9, 0.8):
            if (peak := peak_of_file(part) / highest) <= OVER:
                break
            raised *= peak / margin
            quiet = audio / raised
            write_samples(part, quiet, sampling_rate, comment, subtype, bitrate)
        scaled_down(path, audio, raised, f"as {path.suffix} {why}")


def save_stems(
    stems: dict[Path, Any], sampling_rate: int, overwrite: bool = True
) -> Iterator[Path]:
    """Write samples (N, C) to the path of each, and yield that. All are made quieter
    alike, with a warning, where one would clip. Raises as `save_audio`."""
    loudest = max(1.0, *map(true_peak, stems.values()))
    if loudest > 1:  # all stems alike, so that they still add up to the song
        quieter = f"{20 * math.log10(loudest):.2g} dB quieter"
        warnings.warn(f"All stems were made {quieter}: one would have clipped.")
    for path, stem in stems.items():
        save_audio(path, stem / loudest, sampling_rate, overwrite=overwrite)
        yield path


def check_form(path: Path, sampling_rate: int, channels: int) -> None:
    """Raise ValueError for a rate or channels that the format does not take."""
    suffix = path.suffix.lower()
    if not 1000 <= sampling_rate <= 192_000:  # libsndfile crashes on others
        raise ValueError(
            f"sampling_rate must be from 1000 to 192000 Hz, got {sampling_rate}."
        )
    if suffix == ".mp3" and channels > 2:
        raise ValueError(
            f"{path} takes 1 or 2 channels, got {channels}: write a .wav, or fewer."
        )
    rates = ""
    if suffix == ".mp3" and sampling_rate not in MP3_RATES:
        rates = f"{', '.join(map(str, MP3_RATES[:-1]))} or {MP3_RATES[-1]} Hz"
    if suffix == ".flac" and sampling_rate > 65_535 and sampling_rate % 10:
        rates = "up to 65535 Hz, and above multiples of 10 Hz"
    if rates:
        raise ValueError(
            f"{path} takes {rates}, got {sampling_rate}: write a .wav, or resample the "
            "sound."
        )


def scaled_down(path: Path, audio: np.ndarray, peak: float, why: str) -> np.ndarray:
    """The samples divided by a peak above 1, with a warning that says why."""
    if peak <= OVER:
        return audio
    warnings.warn(f"{path} was scaled down by {20 * math.log10(peak):.2g} dB: {why}.")
    return audio / peak


def peak_of_file(path: Path) -> float:
    """The true peak of a sound file that was just written."""
    with open_sound(path) as file:
        blocks = list(read_blocks(path, file))
    return true_peak(np.concatenate(blocks)) if blocks else 0.0


def write_samples(
    path: Path,
    audio: np.ndarray,
    sampling_rate: int,
    comment: str,
    subtype: str,
    bitrate: int | None = None,
) -> None:
    """Write samples (N, C), which must be valid.

    Raises soundfile's errors, and OSError where the disk is full, which not every
    format reports.
    """
    if subtype == "AAC":
        write_aac(path, audio, sampling_rate, comment)
        return
    options = dict(channels=audio.shape[1], subtype=subtype)
    if bitrate:
        options |= constant_bitrate(bitrate, sampling_rate)
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


def constant_bitrate(bitrate: int, sampling_rate: int) -> dict[str, Any]:
    """soundfile's options of an mp3 with so many kbit/s. libsndfile counts them from 1
    down to 0, between the lowest and the highest rate of the format."""
    low = 32 if sampling_rate >= 32_000 else 8
    high = 320 if low == 32 else 160 if sampling_rate >= 16_000 else 64
    level = (high - min(max(bitrate, low), high)) / (high - low)
    return dict(compression_level=min(level, 0.9999), bitrate_mode="CONSTANT")


def write_aac(path: Path, audio: np.ndarray, sampling_rate: int, comment: str) -> None:
    """Write samples (N, C) as m4a by another program, or raise OSError."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "sound.wav"
        write_samples(wav, audio, sampling_rate, "", "FLOAT")
        tool, said = run_tools(1, source=wav, target=path, comment=comment)
    if not tool:
        raise OSError(said)
    if tool == "afconvert" and comment:
        warnings.warn("afconvert writes no comment: the .m4a is without its settings.")


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
    if subtypes == ("AAC",) and not any(map(shutil.which, TOOLS)):
        raise ValueError(
            f"{path} needs {' or '.join(TOOLS)}, and neither is there: write another "
            "format, or install ffmpeg."
        )
    if subtype is not None and suffix.lower() in LOSSY and subtype not in subtypes:
        raise ValueError(
            f"{path} takes no subtype, got {subtype!r}: leave it out, or write a .wav or "
            "a .flac."
        )
    if subtype is not None and subtype not in subtypes:
        raise ValueError(
            f"subtype of a {suffix} must be {' or '.join(subtypes)}, got {subtype!r}."
        )
    return subtype or subtypes[0]


def check_audio_path(
    path: str | Path, subtype: str | None = None, bitrate: int | None = None
) -> Path:
    """The path, if `save_audio` can write there.

    Raises OSError where no file can be written, ValueError for an unknown extension,
    subtype or bit rate.
    """
    choose_subtype(path, subtype)
    check_bitrate(path, bitrate)
    check_writable(path)
    return Path(os.path.expanduser(path))


def check_output(
    path: str | Path, source: str | Path, force: bool, bitrate: int | None = None
) -> None:
    """Raise as `check_audio_path`; ValueError where the path is that of the `source`,
    and FileExistsError where something is there, unless `force` allows it."""
    check_audio_path(path, bitrate=bitrate)
    check_apart(path, {"source": source})
    if not force:
        check_new(path)


def check_bitrate(path: str | Path, bitrate: int | None) -> None:
    """Raise ValueError unless it is None, or kbit/s of a file that is an mp3."""
    low, high = BITRATES
    if bitrate is not None and not (type(bitrate) is int and low <= bitrate <= high):
        raise ValueError(
            f"mp3_bitrate must be from {low} to {high} kbit/s, got {bitrate!r}."
        )
    if bitrate is not None and Path(path).suffix.lower() != ".mp3":
        raise ValueError(f"mp3_bitrate must go with an .mp3, got {path}.")


def check_writable(path: str | Path) -> None:
    """Raise OSError unless a file can be written at `path`."""
    path = Path(os.path.expanduser(path))
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


def warn(message: Warning | str, *_) -> None:
    print(f"audio.py: warning: {message}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = argparse.ArgumentParser(description="Convert a sound file.")
    add = parser.add_argument
    add("source", help="sound file to read")
    add("target", help="sound file to write")
    add("--sampling-rate", type=int, help="Hz (default: the source's)")
    add("--channels", type=int, help="1 to 8 (default: the source's)")
    add("--mp3-bitrate", type=int, help="kbit/s (default: it varies)")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args()
    try:
        check_output(args.target, args.source, args.force, args.mp3_bitrate)
        rate, channels = args.sampling_rate, args.channels
        if rate is not None and not 1000 <= rate <= 192_000:
            raise ValueError(f"--sampling-rate must be 1000 to 192000 Hz, got {rate}.")
        if channels is not None and not 1 <= channels <= 8:
            raise ValueError(f"--channels must be 1 to 8, got {channels}.")
        audio, rate = read_sound(args.source, rate, channels)
        written = dict(bitrate=args.mp3_bitrate, overwrite=args.force)
        save_audio(args.target, audio, rate, **written)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"audio.py: error: {' '.join(str(error).split()):.370}")
    except KeyboardInterrupt:
        sys.exit(130)
    print_out(f"{args.target}: {len(audio) / rate:.2f} s")


if __name__ == "__main__":
    main()
