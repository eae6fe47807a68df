"""What a take starts with: the codes of a sound, or codes that were kept.

    codes = encode_prompt(model, audio, frames=400)  # (N, C) -> (1, T, K)
    codes = encode_prompt(model, "song.mp3", frames=13000)

Needs audio.py, resample.py and outputs.py beside it, and a MusicGen; unless that is
plain, encodec_stream.py and what that needs are needed, too.
"""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from audio import check_samples, count_samples

if TYPE_CHECKING:
    from musicgen import MusicGen


def start_with(
    model: "MusicGen",
    audio: Any,
    codes: mx.array | None,
    duration: float,
) -> mx.array:
    """Codes (1, T, K) of a sound (N, C) or its file, or those that are given.

    Raises ValueError for both, and for as much as the take of `duration` seconds.
    """
    if audio is not None and codes is not None:
        raise ValueError("audio_prompt and codes_prompt must not come together.")
    frames = model.frames_in(duration)
    if codes is not None:
        return check_prompt(model, codes, frames)
    return encode_prompt(model, audio, frames)


def encode_prompt(model: "MusicGen", audio: Any, frames: int) -> mx.array:
    """Codes (1, T, K) of a sound: of samples (N, C) or (N,), mono or stereo, at the
    model's rate, or of a file.

    Raises ValueError for another shape, NaN, or `frames` frames or more, and as
    `audio.load_audio` for a file.
    """
    K, C = model.config.decoder.num_codebooks, model.channels
    rate, most = model.sampling_rate, max(frames - 1, 0)
    most *= model.config.audio_encoder.hop_length
    sound = check_samples("audio_prompt", audio, rate, 2, C, most + 1)
    if len(sound) > most:
        check_length(model, length_of(model, audio), frames)
    audio = sound
    if mx.abs(audio).max() < 1e-4:
        warnings.warn("The audio prompt is silent; the music may be, too.")
    audio = audio.mean(axis=1, keepdims=True) if C == 1 else audio
    audio = mx.broadcast_to(audio, (len(audio), C))
    codes = encode(model, audio.T[..., None], K // C)  # (C, T, K / C)
    return codes.transpose(1, 2, 0).reshape(1, -1, K).astype(mx.uint32)


def length_of(model: "MusicGen", audio: Any) -> int:
    """Samples of a sound, (N, C) or (N,), or of a file at the model's rate."""
    if isinstance(audio, str | Path):
        return count_samples(audio, model.sampling_rate)
    return len(audio)


def check_length(model: "MusicGen", samples: int, frames: int) -> None:
    """Raise ValueError for so many samples of a sound as take `frames` or more."""
    hop, rate = model.config.audio_encoder.hop_length, model.sampling_rate
    if samples > (frames - 1) * hop:
        raise ValueError(
            f"The audio prompt is {samples / rate:g} s long, but a duration of "
            f"{frames * hop / rate:g} s has room for {(frames - 1) * hop / rate:g} s: "
            "give a longer duration, or take less of the prompt."
        )


def prompt_frames(model: "MusicGen", audio: Any) -> int:
    """Frames that a sound (N, C), or its file, takes; none for None."""
    hop = model.config.audio_encoder.hop_length
    return 0 if audio is None else math.ceil(length_of(model, audio) / hop)


def generate_rest(
    model: "MusicGen", prompts: str | list[str], duration: float | None, **options
) -> mx.array:
    """What `generate` makes, (B, N, C), after the whole frames of its audio prompt.

    Raises ValueError where there is none, before anything is made.
    """
    if (audio := options.get("audio_prompt")) is None:
        raise ValueError("drop_prompt must come with an audio_prompt.")
    made = model.generate(prompts, duration, **options)
    hop = model.config.audio_encoder.hop_length
    mx.eval(rest := made[:, prompt_frames(model, audio) * hop :])
    return rest


def encode(model: "MusicGen", audio: mx.array, num_codebooks: int) -> mx.array:
    """Codes (B, T, K) of mono audio (B, N, 1)."""
    if model.plain:
        return model.audio_encoder.encode_chunk(audio, num_codebooks).codes
    import encodec_stream

    return encodec_stream.encode(model.audio_encoder, audio, num_codebooks)


def check_prompt(model: "MusicGen", codes: mx.array, frames: int) -> mx.array:
    """Codes (1, T, K) that a take of `frames` can start with, else ValueError."""
    shape = getattr(codes, "shape", None)
    if not isinstance(codes, mx.array) or len(shape) != 3 or shape[0] != 1:
        raise ValueError(
            f"codes_prompt must be codes (1, T, K), got {shape or codes!r:.80}."
        )
    T, rate = codes.shape[1], model.frame_rate
    if T > 0:
        check_codes(model, codes)
    if T >= frames:
        raise ValueError(
            f"The codes are {T / rate:g} s long already, but the duration is "
            f"{frames / rate:g} s: give a longer duration."
        )
    return codes


def check_codes(model: "MusicGen", codes: mx.array) -> None:
    """Raise ValueError unless codes (B, T, K) can be this model's."""
    config = model.config.decoder
    if (
        codes.ndim != 3
        or not mx.issubdtype(codes.dtype, mx.integer)
        or codes.shape[2] != config.num_codebooks
        or codes.size == 0
        or codes.min().item() < 0
        or codes.max().item() >= config.vocab_size
    ):
        raise ValueError(
            f"The codes must be numbers from 0 to {config.vocab_size - 1} in "
            f"{config.num_codebooks} codebooks: take the model that they were made with."
        )
