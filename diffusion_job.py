"""Jobs whose sound multi-band diffusion makes, in place of the codec's own decoder.

    decode = Decoder(model, "diffusion")
    audio = decode(codes, seeds=[7])  # (B, T, K) -> (B, N, C)

and `python diffusion.py take.safetensors take.wav`. The seed of a take is also that of its
noise. Needs diffusion.py, diffusion_files.py, settings.py, audio.py, outputs.py,
messages.py, progress.py, and musicgen.py for a model, with what these need.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from messages import one_line

if TYPE_CHECKING:
    from diffusion import Decoding, MultiBandDiffusion
    from encodec import Encodec
    from musicgen import MusicGen

CODEC, DIFFUSION = "encodec", "diffusion"  # decoders
RELEASED = "musicgen"  # what `diffusion` is
Watch = Callable[["Decoding"], Iterable["Decoding"]]


def make_decoder(name: Any) -> str | None:
    """The decoder of a job by its name: None for the codec's own. Raises ValueError for
    what is no name."""
    if not isinstance(name, str | None) or name == "" or "\0" in (name or ""):
        raise ValueError(
            f"decoder must be {CODEC}, {DIFFUSION}, a file, a folder or a Hub id, got "
            f"{name!r:.80}."
        )
    return None if name == CODEC else name and os.path.expanduser(name)


@functools.lru_cache(maxsize=1)
def load(name: str, dtype: mx.Dtype | None) -> "MultiBandDiffusion":
    """The decoder of that name, which is kept until another one is loaded."""
    from diffusion import MultiBandDiffusion

    path = RELEASED if name == DIFFUSION else name
    return MultiBandDiffusion.from_pretrained(path, dtype=dtype)


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
            from diffusion import check_codec

            check_codec(self._load(), self._model.audio_encoder)

    def __call__(self, codes: mx.array, seeds: list[int]) -> mx.array:
        if self.name:
            from diffusion import Decoding

            model = self._model
            of = (seeds, model.audio_encoder, model.channels)
            decoding = Decoding(self._load(), codes, *of)
            for _ in self._watch(decoding):
                pass
            if decoding.audio is not None:
                return decoding.audio
            self.name = None
            warnings.warn(
                "The diffusion was stopped: this sound is the codec's own. --redecode "
                "makes the other one of codes that were kept."
            )
        return self._model.decode(codes)

    def _load(self) -> "MultiBandDiffusion":
        exact = self._model.decoder.dtype == mx.float32
        return load(self.name, mx.float32 if exact else None)


def run(args: argparse.Namespace) -> None:
    """Decode one file."""
    import settings
    from audio import check_output, save_audio
    from diffusion import Decoding
    from options import row_seeds
    from outputs import print_out
    from progress import Progress

    codes, record = settings.load_codes(args.codes)
    check_output(args.output, args.codes, args.force)
    codec, channels = read_codec(args.model or str(record.get("model")), codes)
    seed = record.get("seed", 0) if args.seed is None else args.seed
    row_seeds([seed], rows=1)
    model = load(args.decoder, None)
    with Progress() as progress:
        decoding = Decoding(model, codes, [seed], codec, channels)
        progress.begin("decoding", decoding.seconds)
        for step in decoding:
            progress.to(step.seconds * step.step / step.total)
    told = record | dict(decoder=args.decoder, seed=seed)
    comment = settings.to_comment(told)
    audio, rate = decoding.audio[0], model.sampling_rate
    save_audio(args.output, audio, rate, comment, overwrite=args.force)
    print_out(f"{args.output}: {len(audio) / rate:.2f} s")


def read_codec(name: str, codes: mx.array) -> tuple["Encodec", int]:
    """The codec of a model, and of how many channels codes (1, T, K) of it are."""
    from musicgen import MusicGen
    from prompt import check_codes

    model = MusicGen.from_pretrained(name, lazy=True)  # its decoder is not read
    check_codes(model, codes)
    return model.audio_encoder, model.channels


def warn(message: Warning | str, *_) -> None:
    print(f"diffusion.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="diffusion.py", description="Decode a take's codes by multi-band diffusion."
    )
    add = parser.add_argument
    add("codes", type=Path, help="file of generate.py --save-codes, a .safetensors")
    add("output", type=Path, help="sound file to write")
    weights = f"{DIFFUSION} (the released one), a file, a folder or a Hub id (default: "
    add("--decoder", default=DIFFUSION, help=weights + "%(default)s)")
    add("--model", help="whose codec made the codes (default: the take's own model)")
    add("--seed", type=int, help="of the noise (default: the take's own)")
    add("--force", action="store_true", help="overwrite what is there")
    warnings.showwarning = warn
    os.environ["HF_HUB_VERBOSITY"] = "error"  # no retries; the end result is reported
    try:
        run(parser.parse_args())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"diffusion.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
