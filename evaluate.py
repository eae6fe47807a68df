"""Whether music follows its prompt: measured from the sound alone.

    python evaluate.py --model tiny
    python evaluate.py --model tiny --guidance-coef 1
    python evaluate.py --codec tiny
    python evaluate.py --model tiny --adapter brass.safetensors --timbre brass

The first makes takes of prompts whose combination of words was not in the training
(`synth.HELD_OUT`) and tells how often the register (pitch, by autocorrelation), the
tempo (onsets a second), the timbre (shape of the spectrum) and the drums (beats below
the lowest note) are what the prompt says, beside what these measures make of the
synthesizer's own clips, as they are and as the codec gives them back. Chance is how
often the takes are what the prompts in another order say. `--codec` tells how much of the
sound the codec keeps; `--timbre` asks for one that an adapter was taught. Needs
musicgen.py, train_codec.py, synth.py and all that these need beside it.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import synth
from musicgen import MusicGen

FRAME, HOP = 4096, 1024  # samples in which pitch is sought
REGISTERS = (240.0, 540.0)  # Hz between low, middle and high
TEMPI = (1.41, 2.83)  # onsets a second between slow, medium and fast
DRUMS = -10.0  # dB of beats below 85 Hz, beside all, from which on there is a kick
HARMONICS = 8


class Measured(NamedTuple):
    """What is found in a sound."""

    pitch: float  # Hz
    onsets: float  # a second
    spectrum: np.ndarray  # features of the timbre
    beat: float  # dB of what comes and goes below the notes, beside all


def frames_of(sound: np.ndarray, size: int, hop: int) -> np.ndarray:
    """(T, size) windows of samples (N,)."""
    return np.lib.stride_tricks.sliding_window_view(sound, size)[::hop]


def band(sound: np.ndarray, low: float, high: float) -> np.ndarray:
    """The part of samples (N,) between two frequencies."""
    spectrum = np.fft.rfft(sound)
    hertz = np.fft.rfftfreq(len(sound), 1 / synth.RATE)
    spectrum[(hertz < low) | (hertz > high)] = 0
    return np.fft.irfft(spectrum, len(sound))


def pitches(frames: np.ndarray) -> np.ndarray:
    """Hz of each frame (T, size): the first lag at which it is nearly as like itself as
    at any, from 1900 down to 95 Hz."""
    size = frames.shape[1]
    window = np.hanning(size)
    power = np.abs(np.fft.rfft(frames * window, 2 * size)) ** 2
    alike = np.fft.irfft(power)[:, : size // 2]
    alike = alike / np.correlate(window, window, "full")[size - 1 :][: size // 2]
    first, last = int(synth.RATE / 1900), int(synth.RATE / 95)
    found = alike[:, first:last]
    peaks = (found[:, 1:-1] > found[:, :-2]) & (found[:, 1:-1] >= found[:, 2:])
    high = found[:, 1:-1] > 0.85 * found.max(axis=1, keepdims=True)
    return synth.RATE / (first + 1 + np.argmax(peaks & high, axis=1))


def onset_rate(sound: np.ndarray) -> float:
    """Onsets a second, by the rise of the bands, half an octave each, that rise most."""
    frames = frames_of(sound, 1024, 256) * np.hanning(1024)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = np.unique(np.geomspace(2, 256, 16).astype(int))
    levels = np.log(np.add.reduceat(power, edges, axis=1)[:, :-1] + 0.3)
    rise = np.sort(np.maximum(levels[3:] - levels[:-3], 0))[:, -2:].mean(axis=1)
    second = synth.RATE / 256
    least, near = 0.5 * np.sort(rise)[-8:].mean(), int(0.1 * second)
    onsets = [
        i
        for i in range(len(rise))
        if rise[i] > least and rise[i] == rise[max(i - near, 0) : i + near + 1].max()
    ]
    if len(onsets) < 2:
        return len(onsets) / (len(sound) / synth.RATE)
    return (len(onsets) - 1) * second / (onsets[-1] - onsets[0])


def shape(frames: np.ndarray, hertz: np.ndarray) -> np.ndarray:
    """How strong each harmonic is beside all, and how much lies between them, in dB:
    the quartiles of the frames (T, size) with these pitches (T,)."""
    size = frames.shape[1]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    places = np.arange(1, HARMONICS + 1)[:, None] * hertz / (synth.RATE / size)
    bins = np.rint(places).astype(int)[..., None] + np.arange(-2, 3)
    rows = np.arange(len(frames))[None, :, None]
    found = power[rows, np.minimum(bins, size // 2)].sum(axis=-1)  # (K, T)
    found[places > size // 2] = 0
    total = power[:, int(100 / synth.RATE * size) :].sum(axis=1)
    between = 1 - np.minimum(found.sum(axis=0) / total, 1)
    shares = np.vstack([found / total, between])
    quarters = np.quantile(10 * np.log10(shares + 1e-4), (0.25, 0.5, 0.75), axis=1)
    return quarters.ravel()


def measure(sound: np.ndarray) -> Measured | None:
    """Samples (N,) -> what is found in them; None for silence."""
    if not np.abs(sound).max() > 1e-3:
        return None
    tones = band(sound, 100, 15000)
    frames = frames_of(tones, FRAME, HOP)
    loud = (frames**2).mean(axis=1)
    steady = frames[loud > 0.2 * np.sort(loud)[-5:].mean()]
    hertz = pitches(steady)
    level = 10 * np.log10(loud + 1e-7)
    falls = (level[4:] - level[:-4])[level[:-4] > level.max() - 10]
    spectrum = np.append(shape(steady, hertz), np.quantile(falls, (0.25, 0.5, 0.75)))
    return Measured(float(np.median(hertz)), onset_rate(sound), spectrum, beat(sound))


def beat(sound: np.ndarray) -> float:
    """How far what lies below the notes rises above its lower quartile, in dB."""
    bass = (frames_of(band(sound, 20, 85), 4000, 2000) ** 2).mean(axis=1)
    rise = np.quantile(bass, 0.95) - np.quantile(bass, 0.25)
    return 10 * np.log10(rise / (sound**2).mean() + 1e-6)


class Judge:
    """Names the traits of what is measured. The timbres are told apart by the means of
    their features over the synthesizer's clips, under their common covariance."""

    def __init__(
        self, count: int = 400, timbres: tuple[str, ...] = synth.TRAITS["timbre"]
    ):
        features, names, clips = [], [], synth.clips_of(*timbres)
        for seed in range(5000, 5000 + count):
            clip, _, sound = synth.make(seed, clips, seconds=4.0)
            features.append(measure(sound).spectrum)
            names.append(clip.timbre)
        features, names = np.array(features), np.array(names)
        self.timbres = timbres
        self.means = np.array([features[names == t].mean(axis=0) for t in timbres])
        places = [timbres.index(name) for name in names]
        spread = np.cov((features - self.means[places]).T)
        self.inverse = np.linalg.inv(spread + 0.1 * np.eye(len(spread)))

    def distances(self, found: Measured | None) -> np.ndarray:
        """How far what is measured is from each timbre (K,): Mahalanobis's, squared.
        Silence is infinitely far."""
        if found is None:
            return np.full(len(self.means), np.inf)
        apart = self.means - found.spectrum
        return np.einsum("kd,de,ke->k", apart, self.inverse, apart)

    def name(self, found: Measured | None) -> dict[str, str]:
        """The traits of what is measured, but for the mode; none of silence."""
        if found is None:
            return dict.fromkeys(("register", "tempo", "timbre", "drums"), "")
        nearest = np.argmin(self.distances(found))
        register = int(np.searchsorted(REGISTERS, found.pitch))
        tempo = int(np.searchsorted(TEMPI, found.onsets))
        return {
            "register": synth.TRAITS["register"][register],
            "tempo": synth.TRAITS["tempo"][tempo],
            "timbre": self.timbres[nearest],
            "drums": synth.TRAITS["drums"][int(found.beat > DRUMS)],
        }


def share(clips: list[synth.Clip], found: list[dict[str, str]]) -> dict[str, float]:
    """How often each trait of the clips is what was found."""
    right = [[f[name] == getattr(c, name) for name in f] for c, f in zip(clips, found)]
    return dict(zip(found[0], np.mean(right, axis=0)))


def prompts(
    count: int, clips: list[synth.Clip] = synth.HELD_OUT, seed: int = 0
) -> tuple[list[synth.Clip], list[str]]:
    """These clips in turn, in any words; all traits are said, but that there are no
    drums goes without saying half of the time."""
    random = np.random.default_rng(seed)
    clips = [clips[i % len(clips)] for i in range(count)]
    return clips, [synth.caption(clip, random) for clip in clips]


def follow(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The table of how prompts are followed; with --timbre also of how far the sounds
    are from it, in the median."""
    model = MusicGen.from_pretrained(args.model, adapter=args.adapter)
    timbres, clips = synth.TRAITS["timbre"], synth.HELD_OUT
    if args.timbre:
        timbres = tuple(dict.fromkeys((*timbres, args.timbre)))
        clips = [c for c in synth.clips_of(args.timbre) if c not in synth.KNOWN]
    clips, texts = prompts(args.prompts, clips)
    random = np.random.default_rng(1)
    own = [synth.render(clip, random, args.duration) for clip in clips]
    options = dict(duration=args.duration, guidance_coef=args.guidance_coef)
    audio = model.generate(texts, seed=args.seed, batch_size=args.batch, **options)
    judge, takes = Judge(timbres=timbres), measured(np.array(audio[..., 0]))
    others = [clips[i] for i in np.random.default_rng(2).permutation(len(clips))]

    rows = {
        "the synthesizer's clips": (measured(own), clips),
        "these, through the codec": (measured(coded(model, own)), clips),
        f"takes, guidance {args.guidance_coef:g}": (takes, clips),
        "these, by chance": (takes, others),
    }
    return {k: cells(judge, *told, args.timbre) for k, told in rows.items()}


def measured(sounds: Iterable[np.ndarray]) -> list[Measured | None]:
    return [measure(sound) for sound in sounds]


def cells(
    judge: Judge,
    found: list[Measured | None],
    clips: list[synth.Clip],
    timbre: str | None,
) -> dict[str, str]:
    """A row of the table: how often what is measured is what the clips say, and how far
    it is from a timbre."""
    right = share(clips, [judge.name(one) for one in found])
    told = {name: f"{value:.1%}" for name, value in right.items()}
    if timbre:
        place = judge.timbres.index(timbre)
        apart = [judge.distances(one)[place] for one in found]
        told[f"distance to {timbre}"] = f"{np.median(apart):.0f}"
    return told


def coded(model: MusicGen, sounds: list[np.ndarray]) -> list[np.ndarray]:
    """Samples (N,) as the model's codec gives them back."""
    codec, again = model.audio_encoder, []
    for sound in sounds:
        codes = codec.encode(mx.array(sound)[None, :, None])[0].codes
        again.append(np.array(codec.decode_chunk(codes)[0, :, 0]))
    return again


def si_sdr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of samples (N,), in dB."""
    aim = wanted * (found @ wanted) / (wanted @ wanted)
    return 10 * np.log10((aim @ aim) / ((found - aim) @ (found - aim)))


def reconstruct(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The table of what the codec keeps of clips that it never heard."""
    from train_codec import stft_distance

    codec = MusicGen.from_pretrained(args.codec).audio_encoder
    sounds = [synth.make(seed, synth.HELD_OUT, 4.0)[2] for seed in range(9000, 9040)]
    audio = mx.array(np.stack(sounds))
    codes = codec.encode(audio[..., None])[0].codes
    table, most = {}, codes.shape[-1]
    for count in (1, 2, most):
        again = codec.decode_chunk(codes[..., :count])[..., 0]
        ratios = [si_sdr(a, b) for a, b in zip(np.array(again), sounds)]
        distance = stft_distance(again, audio).item()
        table[f"{count} of {most} codebooks"] = {
            "STFT distance": f"{distance:.2f}",
            "SI-SDR in dB": f"{np.median(ratios):.2f}",
        }
    return table


def show(table: dict[str, dict[str, str]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(row.values())} |")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main() -> None:
    parser = Parser(description="Measure the tiny model.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model whose takes to measure")
    what.add_argument("--codec", help="model whose codec to measure")
    add = parser.add_argument
    add("--adapter", help="file of train.py lora")
    add("--timbre", choices=synth.VOICES, help="only prompts of this timbre")
    add("--prompts", type=int, default=200, help="(default: %(default)s)")
    add("--duration", type=float, default=4.0, help="seconds (default: %(default)s)")
    add("--guidance-coef", type=float, default=3.0, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--batch", type=int, default=50, help="takes at once (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.duration <= 600 or args.prompts < 1 or args.batch < 1:
        parser.error(
            "--duration must be from 1 to 600 s, --prompts and --batch above 0"
        )
    if args.codec and (args.adapter or args.timbre):
        parser.error("--adapter and --timbre must go with --model")
    try:
        show(reconstruct(args) if args.codec else follow(args))
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
