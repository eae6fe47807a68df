"""A small musical world: endless clips with captions, for a model that fits in a box.

    python synth.py --listen 8 --output-dir clips/
    python synth.py --listen 20 --timbre brass --output-dir brass/

A clip is a tune of one voice, in numpy. Five traits tell it: the timbre, the register,
the tempo, the mode, and whether a drum beat goes with it. A caption says them in free
words, in any order. `train.py synth` learns from these, and `evaluate.py` measures them.
A sixth timbre, brass, is in none of these: it is what `train.py lora` can teach. And "any"
is another spectrum for each note, for the codec to hear more than five.
Needs audio.py beside it, which writes the files.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audio import save_audio

RATE = 32000  # samples per second
SECONDS = 8.0
TRAITS = {
    "timbre": ("sine", "square", "sawtooth", "plucked string", "bell"),
    "register": ("low", "middle", "high"),
    "tempo": ("slow", "medium", "fast"),
    "mode": ("major", "minor"),
    "drums": ("without", "with"),
}
LOWEST = {"low": 45, "middle": 59, "high": 73}  # notes that a tune may start from,
SPREAD = 1  # and up to as many halftones higher
NOTES_PER_SECOND = {"slow": 1.0, "medium": 2.0, "fast": 4.0}  # 8 % more or less
EARLY = 0.2  # of the clips begin anywhere in their first two notes, as music goes on
MISSING = 0.05  # of the traits are left out of a caption
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
    """What a clip is like: a value of each of TRAITS."""

    timbre: str
    register: str
    tempo: str
    mode: str
    drums: str

    @property
    def held_out(self) -> bool:
        """Whether no clip for training is like this, in either mode: a fifth of all,
        spread so that any three of its other traits are known together."""
        numbers = [TRAITS[name].index(value) for name, value in self._asdict().items()]
        weights = (1, 1, 3, 0, 2)
        return sum(n * w for n, w in zip(numbers, weights)) % 5 == 0


def clips_of(*timbres: str) -> list[Clip]:
    """All that can be played in these timbres."""
    return [Clip(*v) for v in itertools.product(timbres, *list(TRAITS.values())[1:])]


CLIPS = clips_of(*TRAITS["timbre"])
KNOWN = [clip for clip in CLIPS if not clip.held_out]
HELD_OUT = [clip for clip in CLIPS if clip.held_out]


def caption(clip: Clip, random: np.random.Generator, missing: float = 0.0) -> str:
    """The clip in words. Each trait but drums is left out with the chance `missing`;
    that there are no drums goes without saying half of the time."""
    said = {}
    for name, value in clip._asdict().items():
        silent = 0.5 if value == "without" else missing * (name != "drums")
        if random.random() >= silent:
            said[name] = str(random.choice(WORDS[value]))
    drums = said.pop("drums", None)
    parts = list(said.values())
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
    """The clip as somebody tells it who guesses each trait with this chance; never as
    one that was held out."""
    told = Clip(
        *(
            str(random.choice(TRAITS[name])) if random.random() < chance else value
            for name, value in clip._asdict().items()
        )
    )
    return clip if told.held_out else told


def render(
    clip: Clip, random: np.random.Generator, seconds: float = SECONDS
) -> np.ndarray:
    """Samples (N,) float32 of a tune that is like the clip, peaking below 1."""
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
    """Halftones above the root: steps and leaps in the scale, often of the chord."""
    scale, chord = SCALES[mode], CHORDS[mode]
    place, steps = 0, [0]
    while len(steps) < count:
        place = int(np.clip(place + random.choice((-2, -1, 1, 2, 3)), 0, 7))
        steps.append(
            int(random.choice(chord)) if random.random() < 0.4 else scale[place]
        )
    return steps


def frequency(note: float) -> float:
    """Hertz of a MIDI note."""
    return 440 * 2 ** ((note - 69) / 12)


def add(track: np.ndarray, second: float, sound: np.ndarray) -> None:
    """Add a sound to a track at a time, as far as it lies in it."""
    first = int(second * RATE)
    part = sound[max(-first, 0) : max(len(track) - first, 0)]
    track[max(first, 0) :][: len(part)] += part


def times(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * RATE)) / RATE


def faded(sound: np.ndarray) -> np.ndarray:
    """With an onset of 5 ms and an end of 30 ms."""
    rise, fall = int(0.005 * RATE), int(0.03 * RATE)
    sound[:rise] *= np.linspace(0, 1, rise)
    sound[-fall:] *= np.linspace(1, 0, fall)
    return sound


def harmonics(hertz: float, seconds: float, amplitudes: dict[int, float]) -> np.ndarray:
    """A held note, of those harmonics that lie below 12 kHz."""
    turn = np.exp(2j * np.pi * hertz * times(seconds))
    sound, power = np.zeros(len(turn)), 1
    for k in range(1, min(max(amplitudes), int(12000 / hertz)) + 1):
        power = power * turn  # whose imaginary part is the sine
        sound += amplitudes.get(k, 0) * power.imag
    return sound


def held(amplitudes: dict[int, float]) -> Callable:
    """A voice that keeps its loudness, a little less in the course of a note."""

    def play(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
        sound = harmonics(hertz, seconds, amplitudes)
        return faded(sound * np.exp(-0.8 * times(seconds)))

    return play


def pluck(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Harmonics of which the higher ones fade sooner."""
    t = times(seconds)
    sound = sum(
        np.sin(2 * np.pi * k * hertz * t) * np.exp(-(2 + 2.5 * k) * t) / k**0.7
        for k in range(1, 11)
        if k * hertz < 12000
    )
    return faded(0.9 * sound)


def bell(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A tuned bar: a strong twelfth above the note, and one more octave."""
    t = times(seconds)
    sound = sum(
        a * np.sin(2 * np.pi * k * hertz * t) * np.exp(-decay * t)
        for k, a, decay in ((1, 1.0, 3), (3, 0.8, 4), (6, 0.45, 6))
    )
    return faded(1.1 * sound)


def brass(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """Frequency modulation that grows with the loudness, as in brass."""
    t = times(seconds)
    blown = np.minimum(t / 0.06, 1) * (0.75 + 0.25 * np.exp(-6 * t))
    turn = 2 * np.pi * hertz * t
    return faded(1.1 * blown * np.sin(turn + 1.5 * blown * np.sin(turn)))


def any_sound(hertz: float, seconds: float, random: np.random.Generator) -> np.ndarray:
    """A spectrum drawn for this note, bright or dark, which fades as fast as it comes."""
    slope = random.uniform(0.5, 5)
    amplitudes = {k: random.lognormal() / k**slope for k in range(1, 21)}
    sound = harmonics(hertz, seconds, amplitudes)
    fading = np.exp(-random.uniform(0.5, 5) * times(seconds))
    return faded(1.1 * sound / np.abs(sound).max() * fading)


VOICES = {
    "sine": held({1: 1.3}),
    "square": held({k: 1 / k for k in range(1, 40, 2)}),
    "sawtooth": held({k: 0.7 / k for k in range(1, 40)}),
    "plucked string": pluck,
    "bell": bell,
    "brass": brass,
    "any": any_sound,
}


def kick() -> np.ndarray:
    """A beat that falls from 120 to 45 Hz."""
    t = times(0.2)
    phase = 2 * np.pi * np.cumsum(45 + 75 * np.exp(-40 * t)) / RATE
    return 1.2 * np.sin(phase) * np.exp(-14 * t)


def snare(random: np.random.Generator) -> np.ndarray:
    """A burst of noise."""
    t = times(0.1)
    return 0.35 * random.standard_normal(len(t)) * np.exp(-45 * t)


def make(
    seed: int, clips: list[Clip] = KNOWN, seconds: float = SECONDS
) -> tuple[Clip, str, np.ndarray]:
    """The clip of a seed: what it is like, its caption, its samples."""
    random = np.random.default_rng(seed)
    clip = clips[random.integers(len(clips))]
    return clip, caption(clip, random, MISSING), render(clip, random, seconds)


def listen(count: int, folder: Path, clips: list[Clip] = KNOWN) -> None:
    """Write some clips with their captions, and print these."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        _, text, sound = make(seed, clips)
        save_audio(folder / f"{seed:03}.wav", sound[:, None], RATE)
        (folder / f"{seed:03}.txt").write_text(text + "\n")
        print(f"{folder / f'{seed:03}.wav'}: {text}")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main() -> None:
    parser = Parser(description="Make clips with captions.")
    parser.add_argument("--listen", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--timbre", choices=VOICES, help="only clips of this one")
    parser.add_argument("--output-dir", type=Path, default=Path("clips"))
    args = parser.parse_args()
    if args.listen < 1:
        parser.error(f"--listen must be above 0, got {args.listen}")
    clips = KNOWN
    if args.timbre:
        clips = [clip for clip in clips_of(args.timbre) if clip not in HELD_OUT]
    try:
        listen(args.listen, args.output_dir, clips)
    except OSError as error:
        sys.exit(f"synth.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
