"""Measure how far quantization moves a decoder: its size, its logits, its choices.

    python fidelity.py --random small
    python fidelity.py --model tiny --prompt "fast happy saw melody"
    python fidelity.py --model medium --q-mode mxfp4

A take is made with the decoder as it is, in float32. It is then given to each quantized
one, so that all see the same past (teacher forcing), and what they say of every next
code is compared: the logits after guidance, without what is the same for a whole
codebook, and the likeliest code. `--random` needs no download: the real shapes with
random values. What music makes of the rest `python evaluate.py` measures. Needs
musicgen.py, benchmark.py, quantize.py and all that these need beside it.
"""

import argparse
import sys
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmark import PROMPT, SIZES, random_model
from decoder import Condition, Decoder
from messages import one_line
from musicgen import MusicGen, delay, delay_mask, encode_text, guide
from options import Options
from outputs import print_result
from quantize import add_flags, asked, complete, quantize

CASES = [  # settings of each row, where no flag asks for one
    *(complete(bits) for bits in (8, 6, 5, 4, 3, 2)),
    *(complete(mode=mode) for mode in ("mxfp8", "mxfp4", "nvfp4")),
]
COLUMNS = (
    "bits a weight",
    "decoder in MB",
    "mean difference",
    "greatest",
    "choices that stay",
)


class Difference(NamedTuple):
    """Of logits from others, relative to the others' spread, and of the choices."""

    mean: float
    greatest: float
    same: float  # share of the choices


def variant(
    model: MusicGen, dtype: mx.Dtype, settings: dict[str, Any] | None = None
) -> Decoder:
    """The model's decoder in `dtype`, quantized by settings. The model's stays."""
    decoder = Decoder(model.config.decoder, model.config.text_encoder.d_model)
    decoder.update(model.decoder.parameters())
    decoder.set_dtype(dtype)
    if settings is not None:
        quantize(decoder, **settings)
    return decoder


def megabytes(decoder: Decoder) -> float:
    """What all of it takes, as in a file."""
    return sum(weight.nbytes for _, weight in tree_flatten(decoder.parameters())) / 1e6


def bits_per_weight(decoder: Decoder, original: Decoder) -> float:
    """Of the matrices that are quantized, with scales and biases."""
    counts = {k: weight.size for k, weight in tree_flatten(original.parameters())}
    stored = dict(tree_flatten(decoder.parameters()))
    stems = [name.removesuffix("scales") for name in stored if name.endswith(".scales")]
    parts = ("weight", "scales", "biases")
    size = sum(stored[s + p].nbytes for s in stems for p in parts if s + p in stored)
    return 8 * size / sum(counts[f"{stem}weight"] for stem in stems)


def take_tokens(model: MusicGen, prompt: str, duration: float, seed: int) -> mx.array:
    """The delayed tokens (1, S, K) that a take has before each of its S steps."""
    codes = model.generate_codes(prompt, duration=duration, seed=seed)
    config = model.config.decoder
    blank, delays = config.vocab_size, config.delays
    steps = delay(codes.astype(mx.int32), delays, codes.shape[1], blank)  # (1, S, K)
    return mx.concatenate([mx.full_like(steps[:, :1], blank), steps[:, :-1]], axis=1)


def next_logits(decoder: Decoder, text: Condition, tokens: mx.array) -> mx.array:
    """Logits (N, V) after guidance of the N codes that tokens (1, S, K) lead to."""
    options, past = Options(), [None] * len(decoder.layers)
    rows = mx.concatenate([tokens] * options.copies)
    logits = guide(decoder(rows, decoder.text_kv(text), past), options)[0]  # (S, K, V)
    delays = decoder.config.delays
    chosen = delay_mask(len(logits) - max(delays), delays).reshape(-1)  # no blanks
    places = [i for i, is_chosen in enumerate(chosen.tolist()) if is_chosen]
    return logits.reshape(-1, logits.shape[-1])[mx.array(places)]


def compare(logits: mx.array, others: mx.array) -> Difference:
    """Logits (N, V) with others: what is added to a whole row changes no choice."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (logits, others))
    difference, spread = mx.abs(a - b), mx.sqrt((b**2).mean())
    same = (a.argmax(axis=1) == b.argmax(axis=1)).mean()
    numbers = (difference.mean() / spread, difference.max() / spread, same)
    return Difference(*(number.item() for number in numbers))


def in_percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 2 - (share >= 0.01)}f} %"


def row(model: MusicGen, settings: dict | None, text, tokens, wanted) -> list[str]:
    """Cells of the table, for settings or for 16 bits."""
    stored = variant(model, mx.float16, settings)
    if settings is None:
        decoder, bits = stored, 16.0
        decoder.set_dtype(mx.float32)  # rounded to 16 bits it is compared, too
        size = megabytes(decoder) / 2
    else:
        decoder = variant(model, mx.float32, settings)
        bits, size = bits_per_weight(stored, model.decoder), megabytes(stored)
    found = compare(next_logits(decoder, text, tokens), wanted)
    cells = [f"{bits:g}", f"{size:.1f}" if size < 100 else f"{size:.0f}"]
    cells += [in_percent(found.mean), in_percent(found.greatest)]
    return [*cells, f"{found.same:.1%}"]


def measure(args: argparse.Namespace) -> None:
    """Print the table, a row at a time."""
    mx.random.seed(args.seed)
    if args.random:
        model = random_model(args.random, mx.float32)
    else:
        model = MusicGen.from_pretrained(args.model, mx.float32)
    if model.config.text_encoder is None:
        raise ValueError(f"{args.model} follows no text; take a model that does.")
    if model.config.quantization or model.config.decoder.prefix_width:
        raise ValueError(
            f"{args.model} must be a model that is not quantized and follows a text "
            "alone; take the original, or a text model of its size."
        )
    only = asked(args.q_bits, args.q_group_size, args.q_mode)
    tokens = take_tokens(model, args.prompt, args.duration, args.seed)
    text = encode_text(model, [args.prompt])
    wanted = next_logits(model.decoder, text, tokens)
    mx.eval(wanted)
    print_result(f"| {len(wanted)} choices | {' | '.join(COLUMNS)} |")
    print_result(f"|---|{'---|' * len(COLUMNS)}")
    for settings in [None, *([complete(**only)] if only else CASES)]:
        name = "float16"
        if settings is not None:
            name = f"{settings['mode']}, {settings['bits']} bits"
        try:
            cells = row(model, settings, text, tokens, wanted)
        except ValueError as error:  # matrices that are too narrow for its groups
            if only:
                raise
            print(f"fidelity.py: left out {name}: {one_line(error)}", file=sys.stderr)
            continue
        print_result(f"| {name} | {' | '.join(cells)} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what quantization changes.")
    names = [*SIZES, *(f"stereo-{size}" for size in SIZES)]
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="short name, Hub id or folder")
    source.add_argument("--random", choices=names, help="a size with random weights")
    add = parser.add_argument
    add("--prompt", default=PROMPT, help="of the take (default: %(default)s)")
    add("--duration", type=float, default=4.0, help="seconds (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add_flags(add)
    args = parser.parse_args()
    if not 0.1 <= args.duration <= 8:
        parser.error(f"--duration must be from 0.1 to 8 s, got {args.duration}")
    return args


def main() -> None:
    try:
        measure(parse_arguments())
    except (OSError, ValueError) as error:
        sys.exit(f"fidelity.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
