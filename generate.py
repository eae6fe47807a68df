"""Generate music from the command line.

    python generate.py --prompt "epic orchestral soundtrack" --model stereo-large

`python generate.py --help` explains every flag; the work is in musicgen.py.
"""

import argparse
import secrets
import sys
import time
import warnings

import mlx.core as mx
from huggingface_hub.utils import logging, tqdm

from encodec import check_audio_path, check_suffix, save_audio
from musicgen import MODELS, MusicGen, Options, check_name, row_seeds

OPTIONS = ("duration", "temp", "top_k", "top_p", "guidance_coef")

HELP = {
    "prompt": 'what to play; "" for anything',
    "model": f"{', '.join(MODELS)}; a Hub id or a local folder (default: %(default)s)",
    "duration": "length in seconds, at most 30 (default: %(default)s)",
    "output": "file to write: .wav, .flac, .ogg or .mp3 (default: %(default)s)",
    "seed": "number that fixes the take (default: any)",
    "temp": "sampling temperature; 0 takes the likeliest (default: %(default)s)",
    "top_k": "draw from this many likeliest codes, 1 to 2048 (default: %(default)s)",
    "top_p": "draw from the likeliest codes that together reach this probability, "
    "0 to 1, instead of the top k; 0 is off (default: %(default)s)",
    "guidance_coef": "weight of the prompt; 1 is no guidance (default: %(default)s)",
    "dtype": "of the decoder (default: float16 on a GPU, float32 on the CPU)",
    "q_bits": "quantize the decoder's layers while loading: 4 or 8 bits per weight",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Generate music from a text with MusicGen.")

    def add(name: str, *short: str, **settings) -> None:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, *short, help=HELP[name], **settings)

    add("prompt", "-p", required=True)
    add("model", default="small")
    add("duration", type=float, default=8.0)
    add("output", default="out.wav")
    add("seed", type=int)
    add("temp", type=float, default=1.0)
    add("top_k", type=int, default=250)
    add("top_p", type=float, default=0.0)
    add("guidance_coef", type=float, default=3.0)
    add("dtype", choices=["float16", "bfloat16", "float32"])
    add("q_bits", type=int, choices=[4, 8])
    args = parser.parse_args()
    if args.seed is None:
        args.seed = secrets.randbits(32)
    try:
        check_name(args.model)
        check_suffix(args.output)
        Options(**{name: getattr(args, name) for name in OPTIONS}).check()
        row_seeds(args.seed, rows=1)
    except ValueError as error:
        parser.error(str(error))
    return args


def run(args: argparse.Namespace) -> None:
    check_audio_path(args.output)
    dtype = getattr(mx, args.dtype) if args.dtype else None
    model = MusicGen.from_pretrained(args.model, dtype, args.q_bits)
    options = {name: getattr(args, name) for name in OPTIONS}

    start = time.perf_counter()
    with tqdm(unit="step") as bar:

        def progress(step: int, steps: int) -> None:
            bar.total = steps
            bar.update()

        codes = model.generate_codes(
            args.prompt, seed=args.seed, callback=progress, **options
        )
        audio = model.decode(codes)[0]
        mx.eval(audio)
    taken = time.perf_counter() - start

    save_audio(args.output, audio, model.sampling_rate)
    length = len(audio) / model.sampling_rate
    speed = length / taken
    print(
        f"{args.output}: {length:.2f} s of audio in {taken:.1f} s, "
        f"{speed:.2f} times real time, seed {args.seed}"
    )


def warn(message: Warning | str, *_) -> None:
    print(f"generate.py: warning: {message}", file=sys.stderr)


def main() -> None:
    args = parse_arguments()
    warnings.showwarning = warn
    logging.set_verbosity_error()  # the Hub's retries; the end result is reported
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
