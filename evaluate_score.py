"""Evaluate what edits a take as a score: parts made again, the best, sections, loops.

    python evaluate_score.py seams --takes 100
    python evaluate_score.py best-of --prompts 200 --best-of 8
    python evaluate_score.py sections --pairs 100
    python evaluate_score.py loops --takes 50

All are of prompts that name a combination of traits which was not in the training of
`tiny` (`synth.HELD_OUT`), and of the sound alone, as in evaluate.py.

`seams` makes 2 s in the middle of takes of 8 s again, eight times each, and tells how the
winner and another candidate, drawn by lot, go on: how far their onsets a second, from 2 s
before the part's end to 2 s after it, are from the take's; and how far 0.5 s that they go
on with if they are let is from what comes in the take, by the spectrum. `best-of` tells
how well the traits are followed by the best of several takes, and by all of them.
`sections` tells the same of each of two sections of 4 s, and of single takes of 4 s; of
the second one also where it hears nothing of the first.
`loops` cuts a loop of two bars out of each take, and tells how it goes from its last
sample to its first one, beside 20 cuts of as much of the take's sound at any place.

Needs evaluate.py, regenerate.py, ranking.py, loops.py, sections.py, beat.py, synth.py,
musicgen.py and what these need beside it.
"""

import sys
import warnings

import mlx.core as mx
import numpy as np

import synth
from beat import Beat
from evaluate import (
    Judge,
    Parser,
    frames_of,
    measured,
    onset_rate,
    prompts,
    share,
    show,
)
from loops import best_cut, decode_round, loop_frames, loop_samples, take_seconds
from messages import one_line
from musicgen import MusicGen
from ranking import RANKS, order
from regenerate import FOLLOW, join, score
from sections import Sections

PART = (3.0, 5.0)  # seconds of a take of 8 that are made again
AFTER = 0.5  # seconds that a candidate goes on for
AROUND = 2.0  # seconds before the part's end and after it that tell the tempo
EDGE = 4  # frames that the codec hears of what comes then
SECTION = 4.0  # seconds
ROWS = 16  # at once
Table = dict[str, dict[str, str]]


def spectral_distance(one: np.ndarray, other: np.ndarray) -> float:
    """RMS difference of two sounds (N,) in dB, over half-octave bands and 8 ms."""
    edges, levels = np.unique(np.geomspace(2, 256, 16).astype(int)), []
    for sound in (one, other):
        frames = frames_of(sound, 1024, 256) * np.hanning(1024)
        power = np.abs(np.fft.rfft(frames)) ** 2
        bands = np.add.reduceat(power, edges, axis=1)[:, :-1]
        levels.append(10 * np.log10(bands + 1e-3))
    return float(np.sqrt(np.mean((levels[0] - levels[1]) ** 2)))


def seam(model: MusicGen, prompt: str, seed: int, count: int) -> np.ndarray:
    """Of one take, the distances (count, 2) of each candidate, the winner's first: of
    onsets a second, and of the spectrum in dB."""
    codes = model.generate_codes(prompt, 8.0, seed=seed)
    first, end = map(model.frames_in, PART)
    seeds = [10_000 * (seed + 1) + i for i in range(count)]
    how = dict(seed=seeds, codes_prompt=codes[:, :first], batch_size=count)
    take, last = model.steps([prompt] * count, 8.0, **how), model.frames_in(AFTER) + end
    for _ in take:
        if take.frames >= last + EDGE:
            break
    made = take.codes
    rest = mx.repeat(codes[:, end:], count, axis=0)
    whole = mx.concatenate([made[:, :end], rest], axis=1)
    after = model.frames_in(FOLLOW)
    scores, _ = score(model, prompt, whole, (first, end), after, seed=seeds)

    hop, rate = model.config.audio_encoder.hop_length, model.sampling_rate
    true = model.decode(codes)[0]
    joined = np.array(join(true, model.decode(whole), (first, end), hop))[..., 0]
    goes_on, true = np.array(model.decode(made))[..., 0], np.array(true)[:, 0]
    around = slice(end * hop - int(AROUND * rate), end * hop + int(AROUND * rate))
    comes = slice(end * hop, last * hop)
    tempo = onset_rate(true[around])
    return np.array(
        [
            [
                abs(onset_rate(joined[i][around]) - tempo),
                spectral_distance(goes_on[i][comes], true[comes]),
            ]
            for i in order(scores)
        ]
    )


def seams(model: MusicGen, takes: int, count: int = 8, seed: int = 0) -> Table:
    """The table of how parts join: the winners', and those of others by lot."""
    random = np.random.default_rng(seed)
    texts = prompts(takes)[1]
    found = np.array(
        [seam(model, text, seed + i, count) for i, text in enumerate(texts)]
    )
    other = found[range(takes), random.integers(1, count, takes)]
    nearer = ((found[:, 0] < other) + (found[:, 0] == other) / 2).mean(axis=0)
    rows = {
        "the winner": found[:, 0].mean(axis=0),
        "another, by lot": other.mean(axis=0),
        "all candidates": found.mean(axis=(0, 1)),
    }
    table = {
        name: {
            "onsets a second off": f"{row[0]:.2f}",
            "spectrum off, dB": f"{row[1]:.2f}",
        }
        for name, row in rows.items()
    }
    table["the winner is nearer (ties: half)"] = {
        "onsets a second off": f"{nearer[0]:.0%}",
        "spectrum off, dB": f"{nearer[1]:.0%}",
    }
    return table


def percent(clips: list[synth.Clip], names: list[dict[str, str]]) -> dict[str, str]:
    """The share of each trait that is as the clips have it, and the mean of these."""
    shares = share(clips, names)
    shares["mean"] = float(np.mean([*shares.values()]))
    return {name: f"{value:.1%}" for name, value in shares.items()}


def best_of(model: MusicGen, count: int, takes: int = 8, seed: int = 0) -> Table:
    """The table of how well `count` prompts are followed: by the best of so many takes
    of 4 s, by all, and by the one that has the lowest score; by either rank."""
    clips, texts = prompts(count)
    judge, ranked, likely = Judge(), [], []
    for i, text in enumerate(texts):
        seeds = [seed + i * takes + j for j in range(takes)]
        how = dict(seed=seeds, batch_size=takes)
        codes = model.generate_codes([text] * takes, SECTION, **how)
        sounds = np.array(model.decode(codes))[..., 0]
        names = [judge.name(one) for one in measured(sounds)]
        for rank, rows in (("text", ranked), ("likelihood", likely)):
            best = order(RANKS[rank](model, text, codes, **how))
            rows.append([names[row] for row in best])
    every = [name for names in ranked for name in names]
    return {
        f"the best of {takes}": percent(clips, [names[0] for names in ranked]),
        "all of them": percent([c for c in clips for _ in range(takes)], every),
        "the last": percent(clips, [names[-1] for names in ranked]),
        "the best by likelihood": percent(clips, [names[0] for names in likely]),
    }


def sections(model: MusicGen, pairs: int, seed: int = 0) -> Table:
    """The table of how well takes of two sections follow each one's text, beside single
    takes as long as a section."""
    clips, texts = prompts(2 * pairs)
    places = np.random.default_rng(seed).permutation(2 * pairs)
    firsts, seconds = places[:pairs], places[pairs:]
    how = dict(seed=seed, batch_size=ROWS)

    def songs(context: float | None) -> np.ndarray:
        made = [
            Sections([(0.0, texts[a]), (SECTION, texts[b])], context=context)
            for a, b in zip(firsts, seconds)
        ]
        return np.array(model.generate(made, 2 * SECTION, **how))[..., 0]

    audio, anew = songs(None), songs(0.0)
    single = np.array(model.generate(texts, SECTION, **how))[..., 0]
    judge, middle = Judge(), int(SECTION * model.sampling_rate)
    rows = {
        "the first section": (audio[:, :middle], firsts),
        "single takes of its text": (single[firsts], firsts),
        "the second section": (audio[:, middle:], seconds),
        "... with a context of 0": (anew[:, middle:], seconds),
        "single takes of that text": (single[seconds], seconds),
    }
    return {
        name: percent(
            [clips[i] for i in chosen], [judge.name(one) for one in measured(sounds)]
        )
        for name, (sounds, chosen) in rows.items()
    }


def wrap_jumps(sound: np.ndarray, size: int = 640) -> tuple[float, float]:
    """Of a sound (N,) that repeats, the jump of the level from its last sample to its
    first, and of the spectrum: by how many dB there is more above 5 kHz in 20 ms across
    the wrap than in those beside it."""
    both = np.concatenate([sound[-2 * size :], sound[: 2 * size]])

    def treble(middle: int) -> float:
        part = both[middle - size // 2 : middle + size // 2] * np.hanning(size)
        power = np.abs(np.fft.rfft(part)) ** 2
        return 10 * np.log10(power[size * 5000 // synth.RATE :].sum() + 1e-6)

    beside = max(treble(size), treble(3 * size))
    return float(abs(sound[0] - sound[-1])), treble(2 * size) - beside


def wraps(model: MusicGen, takes: int, cuts: int = 20, seed: int = 0) -> Table:
    """The table of how loops wrap, and cuts of the same takes by lot."""
    random, found = np.random.default_rng(seed), []
    for i, text in enumerate(prompts(takes)[1]):
        beat = Beat(float(random.integers(80, 161)))
        named, seconds = beat.named(text), take_seconds(beat, 2)
        codes = model.generate_codes(named, seconds, seed=seed + i)
        frames = loop_frames(beat, 2, model.frame_rate)
        count = loop_samples(beat, 2, model.sampling_rate)
        first, _ = best_cut(model, named, codes, frames)
        loop = decode_round(model, codes[:, first : first + frames], count)
        sound = np.array(model.decode(codes))[0, :, 0]
        places = random.integers(0, len(sound) - count, cuts)
        parts = [sound[place : place + count] for place in places]
        found.append([wrap_jumps(part) for part in (np.array(loop)[:, 0], *parts)])
    found = np.array(found)  # (takes, 1 + cuts, 2)
    better = (found[:, :1] < found[:, 1:]).mean(axis=(0, 1))
    names = ("level", "spectrum, dB")
    means = {"the loop": found[:, 0], "a cut by lot": found[:, 1:]}
    table = {
        row: {n: f"{x:.3f}" for n, x in zip(names, part.reshape(-1, 2).mean(axis=0))}
        for row, part in means.items()
    }
    takes_better = (found[:, 0] < found[:, 1:].mean(axis=1)).mean(axis=0)
    for row, part in (
        ("the loop is better than a cut", better),
        ("... than the mean of its take's cuts", takes_better),
    ):
        table[row] = {n: f"{x:.0%}" for n, x in zip(names, part)}
    return table


def warn(message: Warning | str, *_) -> None:
    print(f"evaluate_score.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = Parser(description="Measure edited takes of the tiny model.")
    add = parser.add_argument
    add("what", choices=["seams", "best-of", "sections", "loops"])
    add("--model", default="tiny", help="(default: %(default)s)")
    add(
        "--takes",
        type=int,
        default=100,
        help="of seams and loops (default: %(default)s)",
    )
    add("--prompts", type=int, default=200, help="of best-of (default: %(default)s)")
    add("--pairs", type=int, default=100, help="of sections (default: %(default)s)")
    add("--best-of", type=int, default=8, help="takes of each (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    for name in ("takes", "prompts", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if not 2 <= args.best_of <= 64:
        parser.error(f"--best-of must be from 2 to 64, got {args.best_of}")
    try:
        model = MusicGen.from_pretrained(args.model)
        if model.config.text_encoder is None:
            raise ValueError(f"{args.model} follows no text.")
        if args.what == "seams":
            show(seams(model, args.takes, args.best_of, args.seed))
        elif args.what == "best-of":
            show(best_of(model, args.prompts, args.best_of, args.seed))
        elif args.what == "loops":
            show(wraps(model, args.takes, seed=args.seed))
        else:
            show(sections(model, args.pairs, args.seed))
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {one_line(error)}\n")


if __name__ == "__main__":
    main()
