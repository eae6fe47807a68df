"""Evaluate how a part that is filled in fits what comes before it, and after.

    python evaluate_fill.py
    python evaluate_fill.py --model tiny-magnet --beside tiny --takes 200
    python evaluate_fill.py --temp 1 3 --max-guidance-coef 3 10

The takes are 8 s of the synthesizer that went through the codec, under prompts that name
a combination of traits which was not in the training (`synth.HELD_OUT`). Of each, 2 s in
the middle are made anew: a MAGNeT fills them in, for it hears both sides; the model
beside it, which must have the same codec, goes on from the left side alone, until the
right side comes. The last row has the same 2 s of another take in their place.

Several settings of the filling have a row each. The table tells how often tempo and
timbre of the whole take are judged to be what they were, as evaluate.py judges; how far
the sounds on both sides of the right seam are from each other, each 60 ms long, by the
spectrum, and how much farther than in the take as it was; and how far the onsets a
second, from 2 s before the seam to 2 s after it, are from the take's. Needs evaluate.py,
evaluate_score.py, fill.py, regenerate.py, magnet.py, musicgen.py, training.py, synth.py
and what these need beside it.
"""

import itertools
import signal
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import magnet
import synth
from evaluate import Judge, Measures, Parser, measure, onset_rate, prompts, show
from evaluate_score import AROUND, PART, Table, spectral_distance
from fill import fill, put_in
from messages import one_line
from musicgen import MusicGen
from regenerate import join, regenerate
from training import counted

SECONDS = 8.0  # of a take
BESIDE = 0.06  # seconds on each side of the seam
WHOLE = "the takes as they were"
FILLED = "filled in from both sides, temp {temp:g}, guidance {max_guidance_coef:g} to 1"
CONTINUED = "continued from the left side"
OTHER = "the part of another take"
Settings = list[dict[str, float]]  # of the filling: temp, max_guidance_coef


class Found(NamedTuple):
    """What is measured in a take."""

    measures: Measures | None  # of the whole
    jump: float  # dB: distance of the sounds on both sides of the seam
    onsets: float  # a second, around the seam


def find(sound: np.ndarray) -> Found:
    """Measure a take (N,) whose right seam is at the end of PART."""
    seam, near, far = (int(s * synth.RATE) for s in (PART[1], BESIDE, AROUND))
    jump = spectral_distance(sound[seam - near : seam], sound[seam : seam + near])
    around = sound[seam - far : seam + far]
    return Found(measure(sound), jump, onset_rate(around))


def codes_of(model: MusicGen, clip: synth.Clip, seed: int) -> mx.array:
    """Codes (1, T, K) of a clip that the synthesizer plays."""
    sound = synth.render(clip, np.random.default_rng(seed), SECONDS)
    return model.audio_encoder.encode(mx.array(sound)[None, :, None])[0].codes


def put_part_in(model: MusicGen, codes: mx.array, other: mx.array) -> mx.array:
    """Codes (1, T, K) with those of another take in PART."""
    first, end = map(model.frames_in, PART)
    return put_in(codes, other[:, first:end], first)


def versions(
    model: magnet.MAGNeT,
    beside: MusicGen,
    takes: int,
    seed: int,
    settings: Settings,
    **options,
) -> Iterator[dict[str, np.ndarray]]:
    """Of each take its sound (N,) as it was, and with PART made anew, by name; `options`
    are of each filling."""
    clips, texts = prompts(takes)
    hop = model.config.audio_encoder.hop_length
    frames = tuple(map(model.frames_in, PART))
    other = codes_of(model, clips[-1], seed + takes - 1)
    for i, (clip, text) in enumerate(zip(clips, texts)):
        codes, how = codes_of(model, clip, seed + i), dict(seed=seed + i)
        alone = regenerate(beside, codes, text, PART, candidates=1, **how)
        made = {
            FILLED.format(**own): fill(
                model, codes, text, [PART], **how | own | options
            )
            for own in settings
        }
        made |= {CONTINUED: alone.codes, OTHER: put_part_in(model, codes, other)}
        whole, other = model.decode(codes)[0], codes
        sounds = {
            name: join(whole, model.decode(new), frames, hop)[0]
            for name, new in made.items()
        }
        sounds = {WHOLE: whole} | sounds
        yield {name: np.array(sound)[:, 0] for name, sound in sounds.items()}


def fills(
    model: magnet.MAGNeT,
    beside: MusicGen,
    takes: int,
    seed: int,
    settings: Settings,
    **options,
) -> Table:
    """The table of how parts fit that are filled in, and others."""
    check_pair(model, beside)
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # one hears Ctrl-C for all
    with get_context("spawn").Pool(None, *deaf) as pool:  # they measure while one makes
        judge, rows = pool.apply_async(Judge), {}
        made = versions(model, beside, takes, seed, settings, **options)
        for sounds in counted(made, takes, "filling in parts", "takes"):
            for name, sound in sounds.items():
                found = pool.apply_async(find, (sound,))
                rows.setdefault(name, []).append(found)
        judge = judge.get()
        rows = {name: [one.get() for one in found] for name, found in rows.items()}
    return {name: cells(judge, found, rows[WHOLE]) for name, found in rows.items()}


def cells(judge: Judge, found: list[Found], whole: list[Found]) -> dict[str, str]:
    """A row of the table: what was found in takes, beside the same as they were."""
    pairs = [
        (judge.name(a.measures), judge.name(b.measures)) for a, b in zip(found, whole)
    ]
    kept = np.array([[a[t] == b[t] for t in ("tempo", "timbre")] for a, b in pairs])
    jumps = np.array([(a.jump, a.jump - b.jump) for a, b in zip(found, whole)])
    onsets = np.array([abs(a.onsets - b.onsets) for a, b in zip(found, whole)])
    return {
        "tempo kept": f"{kept[:, 0].mean():.1%}",
        "timbre kept": f"{kept[:, 1].mean():.1%}",
        "both": f"{kept.all(axis=1).mean():.1%}",
        "over the right seam, dB": f"{jumps[:, 0].mean():.2f}",
        "... more than it was": f"{jumps[:, 1].mean():.2f}",
        "onsets a second off": f"{onsets.mean():.2f}",
    }


def check_pair(model: MusicGen, beside: MusicGen) -> None:
    """Raise ValueError unless the one is a MAGNeT, the other none, and both have texts
    and one codec."""
    if model.config.masking is None or beside.config.masking is not None:
        raise ValueError("--model must be a MAGNeT, and --beside must be none.")
    if model.config.text_encoder is None or beside.config.text_encoder is None:
        raise ValueError("--model and --beside must follow a text.")
    books = [
        mx.stack([layer.codebook.embed for layer in one.audio_encoder.quantizer.layers])
        for one in (model, beside)
    ]
    if model.sampling_rate != synth.RATE or not mx.array_equal(*books):
        raise ValueError(f"Both must have one codec, of {synth.RATE} Hz.")


def warn(message: Warning | str, *_) -> None:
    print(f"evaluate_fill.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = Parser(description="Measure parts that a MAGNeT fills in.")
    add, options = parser.add_argument, magnet.MagnetOptions
    add("--model", default="tiny-magnet", help="a MAGNeT (default: %(default)s)")
    add("--beside", default="tiny", help="with the same codec (default: %(default)s)")
    add("--takes", type=int, default=200, help="how many (default: %(default)s)")
    several = dict(type=float, nargs="+")
    text = f"one or several (default: {options.temp:g})"
    add("--temp", **several, default=[options.temp], help=text)
    most = options.max_guidance_coef
    text = f"weight of the text at first, one or several (default: {most:g})"
    add("--max-guidance-coef", **several, default=[most], help=text)
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.takes < 2:
        parser.error(f"--takes must be 2 or more, got {args.takes}")
    pairs = itertools.product(args.temp, args.max_guidance_coef)
    settings = [dict(zip(("temp", "max_guidance_coef"), pair)) for pair in pairs]
    try:
        model, beside = magnet.load(args.model), magnet.load(args.beside)
        show(fills(model, beside, args.takes, args.seed, settings))
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
