"""Jobs whose sound multi-band diffusion makes, in place of the codec's own decoder.

    decode = Decoder(model, "diffusion")
    audio = decode(codes, seeds=[7])  # (B, T, K) -> (B, N, C)

The seed of a take is also that of its noise. Needs hub.py beside it; where diffusion is
asked for diffusion.py and what that needs.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from hub import HUB_ID

if TYPE_CHECKING:
    from diffusion import Decoding, MultiBandDiffusion
    from musicgen import MusicGen

CODEC, DIFFUSION = "encodec", "diffusion"  # decoders
RELEASED = "musicgen"  # what `diffusion` is
STOPPED = "the diffusion was stopped, and the sound is the codec's own."
Watch = Callable[["Decoding"], Iterable["Decoding"]]


def make_decoder(name: Any) -> str | None:
    """The decoder of a job by its name: None for the codec's own, and one name for the
    released one. Raises ValueError for what is no name."""
    if not isinstance(name, str | None) or name == "" or "\0" in (name or ""):
        raise ValueError(
            f"decoder must be {CODEC}, {DIFFUSION}, a file, a folder or a Hub id, got "
            f"{name!r:.80}."
        )
    if name in (None, CODEC):
        return None
    return DIFFUSION if name == RELEASED else os.path.expanduser(name)


def is_known(name: str) -> bool:
    """Whether a decoder is the released one, or is there, or may be on the Hub."""
    return bool(name == DIFFUSION or HUB_ID.fullmatch(name) or os.path.exists(name))


def check_decoder(name: str | None) -> None:
    """Raise ValueError for what is neither there nor a Hub id: before a model is read."""
    if name and not is_known(name):
        raise ValueError(
            f"decoder must be {CODEC}, {DIFFUSION}, a Hub id, or a file or folder that is "
            f"there, got {name!r:.80}."
        )


@functools.lru_cache(maxsize=1)
def load(name: str, dtype: mx.Dtype | None) -> "MultiBandDiffusion":
    """The decoder of that name, which is kept until another one is loaded."""
    from diffusion import MultiBandDiffusion

    return MultiBandDiffusion.from_pretrained(path_of(name), dtype=dtype)


def path_of(name: str) -> str:
    """The decoder of a job, as diffusion.py names it."""
    return RELEASED if name == DIFFUSION else name


class Decoder:
    """Codes (B, T, K) -> samples (B, N, C), by the decoder of that name; None: the
    codec's own.

    `watch` goes through the steps of diffusion. Where it leaves them early the codec's
    own sound is given, and `name` becomes None.
    """

    def __init__(self, model: "MusicGen", name: str | None, watch: Watch = iter):
        self.name, self._model, self._watch = name, model, watch

    def check(self) -> None:
        """Raise ValueError or OSError where it cannot decode the model's codes."""
        if self.name:
            from diffusion import check_codec, check_released

            codec = self._model.audio_encoder
            check_released(path_of(self.name), codec)
            check_codec(self._load(), codec)

    def __call__(self, codes: mx.array, seeds: list[int]) -> mx.array:
        if self.name:
            from diffusion import Decoding as Steps

            model = self._model
            of = (seeds, model.audio_encoder, model.channels)
            decoding = Steps(self._load(), codes, *of)
            for _ in self._watch(decoding):
                pass
            if decoding.audio is not None:
                return decoding.audio
            self.name = None
        return self._model.decode(codes)

    def _load(self) -> "MultiBandDiffusion":
        exact = self._model.decoder.dtype == mx.float32
        return load(self.name, mx.float32 if exact else None)
