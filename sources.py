"""What a run of generate.py begins with: saved codes, or the take that is to be edited.

    start = read_start(Path("take.safetensors"), model)  # to be decoded again
    start = read_start(Path("take.safetensors"), model, seconds=30.0)  # to go on from
    codes, audio = read_take(args.regenerate, model)

Codes of another model are refused, and of another revision or adapter told as a warning.
Needs edit.py, job.py, jobs.py, hub.py, settings.py, prompt.py and what these need beside
it.
"""

import math
import warnings
from pathlib import Path

import mlx.core as mx

import jobs
import settings
from edit import Edit, kept
from hub import same_model
from job import make_audio_prompt
from jobs import Start
from musicgen import MusicGen
from prompt import check_codes, encode_prompt


def read_start(source: Path, model: MusicGen, seconds: float | None = None) -> Start:
    """Saved codes to decode again, or to go on from to so many seconds.

    Raises ValueError for codes of another model, or as long as the take is to be.
    """
    codes, record = own_codes(source, model)
    prompt_frames = min(record.get("prompt_frames", 0), codes.shape[1])
    if seconds is not None:
        check_longer(source, model, codes, seconds)
        codes = sure_codes(model, codes, prompt_frames)
    return Start(codes, prompt_frames, kept(record))


def own_codes(source: Path, model: MusicGen) -> tuple[mx.array, dict]:
    """The model's own codes (1, T, K) in a file, and their settings; else ValueError."""
    codes, record = settings.load_codes(source)
    check_source(source, record, model)
    check_codes(model, codes)
    return codes, record


def check_source(source: Path, record: dict, model: MusicGen) -> None:
    """Raise ValueError for codes of another model; warn of another revision."""
    name = str(record.get("model"))
    if not same_model(name, model.name):
        raise ValueError(
            f"{source} holds codes of {name}, not of {model.name}: leave out --model, or "
            "give the sound of the take, which goes with any model."
        )
    if record.get("revision") != model.revision:
        warnings.warn(
            f"{source} is of revision {record.get('revision')}, not {model.revision}."
        )
    check_adapter(source, record, model)


def check_adapter(source: Path, record: dict, model: MusicGen) -> None:
    """Warn where the adapter is named as in a file's settings, but is not the same."""
    before, now = record.get("adapter_hash"), getattr(model, "_adapter_hash", None)
    name = model.adapter.get("adapter")
    if None not in (before, now) and record.get("adapter") == name and before != now:
        warnings.warn(
            f"{source} was made with another adapter {name} than is there now."
        )


def check_longer(
    source: Path, model: MusicGen, codes: mx.array, seconds: float
) -> None:
    """Raise ValueError for codes (1, T, K) that last as long as the take is to last."""
    T = codes.shape[1]
    if T >= model.frames_in(seconds):
        raise ValueError(
            f"{source} is {T / model.frame_rate:g} s long already; --duration must be "
            f"more, got {seconds:g}."
        )


def sure_codes(model: MusicGen, codes: mx.array, prompt_frames: int) -> mx.array:
    """Codes to go on from, less the last two frames that were generated: where a take
    ends, its later codebooks saw blanks instead of what comes now."""
    unsure = max(max(model.config.decoder.delays) - 1, 0)
    return codes[:, : max(codes.shape[1] - unsure, prompt_frames)]


def read_take(edit: Edit, model: MusicGen) -> tuple[mx.array, mx.array]:
    """Codes (1, T, K) and samples (N, C) of the take that is edited."""
    if edit.path.suffix == ".safetensors":
        codes, _ = own_codes(edit.path, model)
        return codes, model.decode(codes)[0]
    sound = make_audio_prompt(edit.path, edit.start, edit.length, False)
    audio, hop = jobs.read_part(model, sound), model.config.audio_encoder.hop_length
    return encode_prompt(model, audio, math.ceil(len(audio) / hop) + 1), audio
