"""A small musical world: endless clips with captions, to train and test a tiny model.

    python synth.py --listen 8 --output-dir clips/
    python synth.py --listen 20 --timbre brass --output-dir brass/

A clip is a tune of one voice, made with numpy. It has five traits: the timbre, the
register, the tempo, the mode, and whether drums play. Its caption names them in various
words, in any order. `train.py synth` trains on clips, and `evaluate.py` measures them.

Two timbres are not among those of the training. "brass" is there for `train.py lora` to
teach. "any" has another spectrum for each note; the codec is trained on it, too, so
that it hears more than five spectra. Needs audio.py, resample.py and outputs.py beside
it.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audio import save_audio
from outputs import check_new, print_out

RATE = 32000  # samples per second
SECONDS = 8.0
TRAITS = {
    "timbre": ("sine", "square", "sawtooth", "plucked string", "bell"),
    "register": ("low", "middle", "high"),
    "tempo": ("slow", "medium", "fast"),
    "mode": ("major", "minor"),
    "drums": ("without", "with"),
}
LOWEST = {"low": 45, "middle": 59, "high": 73}  # MIDI notes that a tune starts from
SPREAD = 1  # halftones that it may start higher
NOTES_PER_SECOND = {"slow": 1.0, "medium": 2.0, "fast": 4.0}  # 8 % more or less
EARLY = (
    0.2  # share of clips that begin within their first two notes, as an excerpt does
)
MISSING = 0.05  # share of traits that a caption leaves out
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11, 12), "minor": (0, 2, 3, 5, 7, 8, 10, 12)}
CHORDS = {"major": (0, 4, 7, 12), "minor": (0, 3, 7, 12)}

WORDS = {
    "sine": ("sine", "sine wave", "pure tone", "flute-like sine"),
    "square": ("square wave", "chiptune square", "8-bit square", "square"),
    "sawtooth": ("sawtooth", "saw wave", "buzzing sawtooth", "saw synth"),
    "plucked string": ("plucked string", "guitar", "plucked guitar", "harp-like pluck"),
    "bell": ("bell", "bells", "chiming bell", "glockenspiel"),
    "brass": ("brass", "trumpet", "brass section", "horn"),
    "any": ("any sound",),
    "low": ("low", "deep", "low-pitched", "bass"),
    "middle": ("middle", "mid-range", "medium-pitched", "middle register"),
    "high": ("high", "high-pitched", "treble", "shrill"),
    "slow": ("slow", "unhurried", "calm", "slow-paced"),
    "medium": ("moderate", "medium tempo", "walking pace", "mid-tempo"),
    "fast": ("fast", "quick", "rapid", "lively"),
    "major": ("major", "happy", "cheerful", "in a major key"),
    "minor": ("minor", "sad", "melancholic", "in a minor key"),
    "with": ("with drums", "with a drum beat", "with percussion", "over a drum beat"),
    "without": ("without drums", "no drums", "solo", "unaccompanied"),
}
NOUNS = ("melody", "tune", "song", "music", "piece")


class Clip(NamedTuple):
    """The traits of a clip: a value of each of TRAITS."""

    timbre: str
    register: str
    tempo: str
    mode: str
    drums: str

    @property
    def held_out(self) -> bool:
        """Whether the training has no clip with these traits, in either mode.

        A fifth of all clips are held out. Any three of their traits other than the mode
        are together in some clip of the training.
        """
        numbers = [TRAITS[name].index(value) for name, value in self._asdict().items()]
        weights = (1, 1, 3, 0, 2)
        return sum(n * w for n, w in zip(numbers, weights)) % 5 == 0


def clips_of(*timbres: str) -> list[Clip]:
    """All combinations of traits with these timbres."""
    return [Clip(*v) for v in itertools.product(timbres, *list(TRAITS.values())[1:])]


CLIPS = clips_of(*TRAITS["timbre"])
KNOWN = [clip for clip in CLIPS if not clip.held_out]
HELD_OUT = [clip for clip in CLIPS if clip.held_out]


def caption(clip: Clip, random: np.random.Generator, missing: float = 0.0) -> str:
    """A caption of a clip, in random words.

    Each trait but drums is left out with the probability `missing`. Drums are always
    named; their absence is named in half of the captions.
    """
    words = {}
    for name, value in clip._asdict().items():
        probability = 0.5 if value == "without" else missing * (name != "drums")
        if random.random() >= probability:
            words[name] = str(random.choice(WORDS[value]))
    drums = words.pop("drums", None)
    parts = list(words.values())
    random.shuffle(parts)
    noun = str(random.choice(NOUNS))
    if random.random() < 0.5:  # "slow sad bell melody", or "a melody, slow, sad, bell"
        text = " ".join([*parts, noun])
    else:
        text = ", ".join([f"a {noun}", *parts])
    if drums is None:
        return text
    return f"{text} {drums}" if random.random() < 0.7 else f"{drums}: {text}"


def misheard(clip: Clip, random: np.random.Generator, chance: float) -> Clip:
    """The clip with each trait replaced by a random one with the probability `chance`;
    the clip itself where that would be one that is held out."""
    guess = Clip(
        *(
            str(random.choice(TRAITS[name])) if random.random() < chance else value
            for name, value in clip._asdict().items()
        )
    )
    return clip if guess.held_out else guess


def render(
    clip: Clip, random: np.random.Generator, seconds: float = SECONDS
) -> np.ndarray:
    """A random tune with the traits of a clip: samples (N,), float32 from -1 to 1."""
    pace = NOTES_PER_SECOND[clip.tempo] * random.uniform(0.92, 1.08)
    length = int(seconds * RATE)
    early = random.uniform(0, 2 / pace) * (random.random() < EARLY)
    starts = np.arange(-early, seconds, 1 / pace)
    root = LOWEST[clip.register] + int(random.integers(SPREAD + 1))
    voice, beat = np.zeros(length), np.zeros(length)
    for i, (start, step) in enumerate(
        zip(starts, tune(clip.mode, len(starts), random))
    ):
        sound = VOICES[clip.timbre](frequency(root + step), 0.95 / pace, random)
        add(voice, start, sound)
        if clip.drums == "with":
            add(beat, start, snare(random) if i % 2 else kick())
    sound = voice * random.uniform(0.28, 0.36) + 0.5 * beat
    return np.clip(sound, -1, 1).astype(np.float32)


def tune(mode: str, count: int, random: np.random.Generator) -> list[int]:
    """A random tune: `count` notes in halftones above the root, the first one the root.

    It steps and leaps in the scale, and often goes to a note of the chord.
    """
    scale, chord = SCALES[mode], CHORDS[mode]
    place, steps = 0, [0]
    while len(steps) < count:
        place = int(np.clip(place + random.choice((-2, -1, 1, 2, 3)), 0, 7))
        steps.append(
            int(random.choice(chord)) if random.random() < 0.4 else scale[place]
        )
    return steps


def frequency(note: float) -> float:
    """Frequency of a MIDI note in Hz."""
    return 440 * 2 ** ((note - 69) / 12)


def add(track: np.ndarray, second: float, sound: np.ndarray) -> None:
    """Add a sound (M,) to a track (N,) at a time; what lies outside is cut off."""
    first = int(second * RATE)
    part = sound[max(-first, 0) : max(len(track) - first, 0)]
    track[max(first, 0) :][: len(part)] += part


def times(seconds: float) -> np.ndarray:
    """The times (N,) of samples, in seconds."""
    return np.arange(int(seconds * RATE)) / RATE


def fade(sound: np.ndarray) -> np.ndarray:
    """Fade a sound (N,) in over 5 ms and out over 30 ms, in place."""
    rise, fall = int(0.005 * RATE), int(0.03 * RATE)
    sound[:rise] *= np.linspace(0, 1, rise)
    sound[-fall:] *= np.linspace(1, 0, fall)
    return sound


def harmonics(hertz: float, seconds: float, amplitudes: dict[int, float]) -> np.ndarray:
    """A sum of harmonics with amplitudes by number, without those above 12 kHz."""
    turn = np.exp(2j * np.pi * hertz * times(seconds))
    sound, power = np.zeros(len(turn)), 1
    for k in range(1, min(max(amplitudes), int(12000 / hertz)) + 1):
        power = power * turn  # its imaginary part is the sine of harmonic k
        sound += amplitudes.get(k, 0) * power.imag
    return sound


def steady(amplitudes: dict[int, float]) -> Callable:
    """A voice with these harmonics, whose notes fade only a little."""

    def play(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
        sound = harmonics(hertz, seconds, amplitudes)
        return fade(sound * np.exp(-0.8 * times(seconds)))

    return play


def pluck(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A plucked string: the higher a harmonic, the sooner it fades."""
    t = times(seconds)
    sound = sum(
        np.sin(2 * np.pi * k * hertz * t) * np.exp(-(2 + 2.5 * k) * t) / k**0.7
        for k in range(1, 11)
        if k * hertz < 12000
    )
    return fade(0.9 * sound)


def bell(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A tuned bar: the note, a strong twelfth above it, and an octave above that."""
    t = times(seconds)
    sound = sum(
        a * np.sin(2 * np.pi * k * hertz * t) * np.exp(-decay * t)
        for k, a, decay in ((1, 1.0, 3), (3, 0.8, 4), (6, 0.45, 6))
    )
    return fade(1.1 * sound)


def brass(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Brass by frequency modulation: the louder, the brighter."""
    t = times(seconds)
    level = np.minimum(t / 0.06, 1) * (0.75 + 0.25 * np.exp(-6 * t))
    phase = 2 * np.pi * hertz * t
    return fade(1.1 * level * np.sin(phase + 1.5 * level * np.sin(phase)))


def any_sound(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A note with a random spectrum, bright or dark, that fades at a random rate."""
    slope = random.uniform(0.5, 5)
    amplitudes = {k: random.lognormal() / k**slope for k in range(1, 21)}
    sound = harmonics(hertz, seconds, amplitudes)
    decay = np.exp(-random.uniform(0.5, 5) * times(seconds))
    return fade(1.1 * sound / np.abs(sound).max() * decay)


VOICES = {  # by timbre: (hertz, seconds, random) -> samples (N,)
    "sine": steady({1: 1.3}),
    "square": steady({k: 1 / k for k in range(1, 40, 2)}),
    "sawtooth": steady({k: 0.7 / k for k in range(1, 40)}),
    "plucked string": pluck,
    "bell": bell,
    "brass": brass,
    "any": any_sound,
}


def kick() -> np.ndarray:
    """A bass drum: a sine that falls from 120 to 45 Hz."""
    t = times(0.2)
    phase = 2 * np.pi * np.cumsum(45 + 75 * np.exp(-40 * t)) / RATE
    return 1.2 * np.sin(phase) * np.exp(-14 * t)


def snare(random: np.random.Generator) -> np.ndarray:
    """A snare drum: a burst of noise."""
    t = times(0.1)
    return 0.35 * random.standard_normal(len(t)) * np.exp(-45 * t)


def make(
    seed: int, clips: list[Clip] = KNOWN, seconds: float = SECONDS
) -> tuple[Clip, str, np.ndarray]:
    """The clip of a seed, one of `clips`: its traits, its caption, its samples (N,)."""
    random = np.random.default_rng(seed)
    clip = clips[random.integers(len(clips))]
    return clip, caption(clip, random, MISSING), render(clip, random, seconds)


def listen(
    count: int, folder: Path, clips: list[Clip] = KNOWN, overwrite: bool = True
) -> None:
    """Write clips with their captions to a folder, and print the captions. Raises
    FileExistsError where one is there, unless it is to `overwrite`."""
    folder = Path(os.path.expanduser(folder))
    paths = [folder / f"{seed:03}.wav" for seed in range(count)]
    for path in [] if overwrite else paths:
        check_new(path)
        check_new(path.with_suffix(".txt"))
    folder.mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate(paths):
        _, text, sound = make(seed, clips)
        save_audio(path, sound[:, None], RATE, overwrite=overwrite)
        path.with_suffix(".txt").write_text(text + "\n")
        print_out(f"{path}: {text}")


class Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split()):.370}\n")


def warn(message: Warning | str, *_) -> None:
    print(f"synth.py: warning: {message}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = Parser(description="Make clips with captions.")
    add = parser.add_argument
    add("--listen", type=int, default=8, help="how many (default: 8)")
    add("--timbre", choices=VOICES, help="only clips of this timbre")
    add("--output-dir", type=Path, default=Path("clips"), help="(default: clips)")
    add("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args()
    if args.listen < 1:
        parser.error(f"--listen must be 1 or more, got {args.listen}")
    clips = KNOWN
    if args.timbre:
        clips = [clip for clip in clips_of(args.timbre) if clip not in HELD_OUT]
    try:
        listen(args.listen, args.output_dir, clips, args.force)
    except OSError as error:
        sys.exit(f"synth.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
