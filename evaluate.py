"""Evaluate whether music follows its prompt, from the sound alone.

    python evaluate.py --model tiny
    python evaluate.py --model tiny --guidance-coef 1
    python evaluate.py --codec tiny
    python evaluate.py --model tiny --adapter brass.safetensors --timbre brass

The takes are of prompts that name a combination of traits which was not in the training
(`synth.HELD_OUT`). The table says how often each trait of a take is what its prompt
says. The register is measured by the pitch (autocorrelation), the tempo by the onsets a
second, the timbre by the strengths of the harmonics, and the drums by the beats below
the lowest note. Other rows say the same of the synthesizer's own clips, as they are and
through the codec, and of the takes under other takes' prompts, which is chance.

`--codec` measures how well the codec reconstructs sound. `--timbre` asks for one
timbre, such as one that an adapter was taught. Needs musicgen.py, magnet.py,
train_codec.py, synth.py, quantize.py and all that these need beside it.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import magnet
import synth
from messages import one_line
from musicgen import MusicGen
from outputs import print_result
from quantize import add_flags

FRAME, HOP = 4096, 1024  # samples, for pitch and timbre
REGISTERS = (240.0, 540.0)  # Hz between low, middle and high
TEMPI = (1.41, 2.83)  # onsets a second between slow, medium and fast
DRUMS = -10.0  # dB: a louder beat below 85 Hz means drums
HARMONICS = 8  # of a note, that tell its timbre


class Measures(NamedTuple):
    """What is measured in a sound."""

    pitch: float  # Hz
    onsets: float  # a second
    timbre: np.ndarray  # features (D,)
    beat: float  # dB: power of the beat below the notes, relative to the whole


def frames_of(sound: np.ndarray, size: int, hop: int) -> np.ndarray:
    """Samples (N,) -> frames (T, size) that start `hop` samples apart."""
    return np.lib.stride_tricks.sliding_window_view(sound, size)[::hop]


def band(sound: np.ndarray, low: float, high: float) -> np.ndarray:
    """Samples (N,) with only the frequencies between two, in Hz."""
    spectrum = np.fft.rfft(sound)
    hertz = np.fft.rfftfreq(len(sound), 1 / synth.RATE)
    spectrum[(hertz < low) | (hertz > high)] = 0
    return np.fft.irfft(spectrum, len(sound))


def pitches(frames: np.ndarray) -> np.ndarray:
    """Pitches (T,) in Hz of frames (T, size), from 95 to 1900.

    A pitch is the first peak of the autocorrelation that is nearly as high as the
    highest; the highest alone may lie an octave lower.
    """
    size = frames.shape[1]
    window = np.hanning(size)
    power = np.abs(np.fft.rfft(frames * window, 2 * size)) ** 2
    correlation = np.fft.irfft(power)[:, : size // 2]
    overlap = np.correlate(window, window, "full")[size - 1 :][: size // 2]
    correlation = correlation / overlap  # or the window would favour short lags
    first, last = int(synth.RATE / 1900), int(synth.RATE / 95)
    lags = correlation[:, first:last]
    peaks = (lags[:, 1:-1] > lags[:, :-2]) & (lags[:, 1:-1] >= lags[:, 2:])
    high = lags[:, 1:-1] > 0.85 * lags.max(axis=1, keepdims=True)
    return synth.RATE / (first + 1 + np.argmax(peaks & high, axis=1))


def onset_rate(sound: np.ndarray) -> float:
    """Onsets a second of samples (N,): peaks in the rise of the bands' levels.

    A band is half an octave wide, and the two that rise most count. A peak is higher
    than all within 0.1 s, and at least half as high as the highest ones.
    """
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


def timbre_features(frames: np.ndarray, hertz: np.ndarray) -> np.ndarray:
    """Features (3 * HARMONICS + 3,) of frames (T, size) with the pitches `hertz` (T,).

    The power of each harmonic and of all that lies between them, in dB relative to the
    whole; of each the quartiles over the frames.
    """
    size = frames.shape[1]
    power = np.abs(np.fft.rfft(frames * np.hanning(size))) ** 2
    places = np.arange(1, HARMONICS + 1)[:, None] * hertz / (synth.RATE / size)
    bins = np.rint(places).astype(int)[..., None] + np.arange(-2, 3)
    rows = np.arange(len(frames))[None, :, None]
    harmonics = power[rows, np.minimum(bins, size // 2)].sum(axis=-1)
    harmonics[places > size // 2] = 0  # (HARMONICS, T)
    total = power[:, int(100 / synth.RATE * size) :].sum(axis=1)
    between = 1 - np.minimum(harmonics.sum(axis=0) / total, 1)
    shares = np.vstack([harmonics / total, between])
    quarters = np.quantile(10 * np.log10(shares + 1e-4), (0.25, 0.5, 0.75), axis=1)
    return quarters.ravel()


def measure(sound: np.ndarray) -> Measures | None:
    """Measure samples (N,); None for silence."""
    if not np.abs(sound).max() > 1e-3:
        return None
    tones = band(sound, 100, 15000)
    frames = frames_of(tones, FRAME, HOP)
    loud = (frames**2).mean(axis=1)
    steady = frames[loud > 0.2 * np.sort(loud)[-5:].mean()]
    hertz = pitches(steady)
    level = 10 * np.log10(loud + 1e-7)
    falls = (level[4:] - level[:-4])[level[:-4] > level.max() - 10]
    falls = falls if len(falls) else np.zeros(1)  # a sound that is loud at its end
    decays = np.quantile(falls, (0.25, 0.5, 0.75))  # dB over four hops
    timbre = np.append(timbre_features(steady, hertz), decays)
    return Measures(float(np.median(hertz)), onset_rate(sound), timbre, beat(sound))


def beat(sound: np.ndarray) -> float:
    """Power of the beat in samples (N,), in dB relative to the whole sound.

    The beat is what rises above the lower quartile in the band below the notes.
    """
    bass = (frames_of(band(sound, 20, 85), 4000, 2000) ** 2).mean(axis=1)
    rise = np.quantile(bass, 0.95) - np.quantile(bass, 0.25)
    return 10 * np.log10(rise / (sound**2).mean() + 1e-6)


class Judge:
    """Names the traits of a sound by its measures.

    Its timbre is the nearest one by Mahalanobis's distance, that is linear discriminant
    analysis. The means and the covariance come from `count` clips of the synthesizer.
    """

    def __init__(
        self, count: int = 400, timbres: tuple[str, ...] = synth.TRAITS["timbre"]
    ):
        features, names, clips = [], [], synth.clips_of(*timbres)
        for seed in range(5000, 5000 + count):
            clip, _, sound = synth.make(seed, clips, seconds=4.0)
            features.append(measure(sound).timbre)
            names.append(clip.timbre)
        features, names = np.array(features), np.array(names)
        self.timbres = timbres
        self.means = np.array([features[names == t].mean(axis=0) for t in timbres])
        labels = [timbres.index(name) for name in names]
        covariance = np.cov((features - self.means[labels]).T)
        self.inverse = np.linalg.inv(covariance + 0.1 * np.eye(len(covariance)))

    def distances(self, measures: Measures | None) -> np.ndarray:
        """Mahalanobis's distances, squared, to each of the timbres; of silence, inf."""
        if measures is None:
            return np.full(len(self.means), np.inf)
        differences = self.means - measures.timbre
        return np.einsum("kd,de,ke->k", differences, self.inverse, differences)

    def name(self, measures: Measures | None) -> dict[str, str]:
        """The sound's register, tempo, timbre and drums; "" for each of silence."""
        if measures is None:
            return dict.fromkeys(("register", "tempo", "timbre", "drums"), "")
        nearest = np.argmin(self.distances(measures))
        register = int(np.searchsorted(REGISTERS, measures.pitch))
        tempo = int(np.searchsorted(TEMPI, measures.onsets))
        return {
            "register": synth.TRAITS["register"][register],
            "tempo": synth.TRAITS["tempo"][tempo],
            "timbre": self.timbres[nearest],
            "drums": synth.TRAITS["drums"][int(measures.beat > DRUMS)],
        }


def share(clips: list[synth.Clip], names: list[dict[str, str]]) -> dict[str, float]:
    """The share of clips, from 0 to 1, whose traits the judge names right, by trait."""
    right = [
        [n[trait] == getattr(c, trait) for trait in n] for c, n in zip(clips, names)
    ]
    return dict(zip(names[0], np.mean(right, axis=0)))


def prompts(
    count: int, clips: list[synth.Clip] = synth.HELD_OUT, seed: int = 0
) -> tuple[list[synth.Clip], list[str]]:
    """The clips in turn until there are `count`, and a caption for each.

    A caption names all traits; only drums that are absent may go unsaid.
    """
    random = np.random.default_rng(seed)
    clips = [clips[i % len(clips)] for i in range(count)]
    return clips, [synth.caption(clip, random) for clip in clips]


def follow(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The table of how well takes follow their prompts: rows by name.

    With --timbre it has the median distance to that timbre, too.
    """
    asked = {name: getattr(args, name) for name in ("q_bits", "q_group_size", "q_mode")}
    asked = {name: value for name, value in asked.items() if value is not None}
    model = magnet.load(args.model, adapter=args.adapter, **asked)
    if model.config.text_encoder is None:
        raise ValueError(
            f"{args.model} follows no text, and how well a text is followed is measured "
            "here: take a model that does, or measure its codec alone with --codec."
        )
    timbres, clips = synth.TRAITS["timbre"], synth.HELD_OUT
    if args.timbre:
        timbres = tuple(dict.fromkeys((*timbres, args.timbre)))
        clips = [c for c in synth.clips_of(args.timbre) if c not in synth.KNOWN]
    clips, texts = prompts(args.prompts, clips)
    random = np.random.default_rng(1)
    sounds = [synth.render(clip, random, args.duration) for clip in clips]
    options, guided = dict(duration=args.duration), "guidance 10 to 1"
    if model.config.masking is None:
        coef = 3.0 if args.guidance_coef is None else args.guidance_coef
        options, guided = options | dict(guidance_coef=coef), f"guidance {coef:g}"
    elif args.guidance_coef is not None:
        raise ValueError(f"{args.model} is a MAGNeT: leave out --guidance-coef.")
    audio = model.generate(texts, seed=args.seed, batch_size=args.batch, **options)
    judge, takes = Judge(timbres=timbres), measured(np.array(audio[..., 0]))
    others = [clips[i] for i in np.random.default_rng(2).permutation(len(clips))]

    rows = {
        "the synthesizer's clips": (measured(sounds), clips),
        "these, through the codec": (measured(through_codec(model, sounds)), clips),
        f"takes, {guided}": (takes, clips),
        "these, by chance": (takes, others),
    }
    return {k: cells(judge, *row, args.timbre) for k, row in rows.items()}


def measured(sounds: Iterable[np.ndarray]) -> list[Measures | None]:
    """The measures of several sounds (N,)."""
    return [measure(sound) for sound in sounds]


def cells(
    judge: Judge,
    measures: list[Measures | None],
    clips: list[synth.Clip],
    timbre: str | None,
) -> dict[str, str]:
    """A row of the table: the share of each trait that is as the clips have it, and the
    median distance to a timbre."""
    shares = share(clips, [judge.name(one) for one in measures])
    row = {name: f"{value:.1%}" for name, value in shares.items()}
    if timbre:
        place = judge.timbres.index(timbre)
        distances = [judge.distances(one)[place] for one in measures]
        row[f"distance to {timbre}"] = f"{np.median(distances):.0f}"
    return row


def through_codec(model: MusicGen, sounds: list[np.ndarray]) -> list[np.ndarray]:
    """Sounds (N,) as the model's codec reconstructs them."""
    codec, outputs = model.audio_encoder, []
    for sound in sounds:
        codes = codec.encode(mx.array(sound)[None, :, None])[0].codes
        outputs.append(np.array(codec.decode_chunk(codes)[0, :, 0]))
    return outputs


def si_sdr(output: np.ndarray, target: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of samples (N,), in dB."""
    signal = target * (output @ target) / (target @ target)
    noise = output - signal
    return 10 * np.log10((signal @ signal) / (noise @ noise))


def reconstruct(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The table of how well a codec reconstructs clips that it was not trained on, with
    1, 2 and all of its codebooks."""
    from train_codec import stft_distance

    codec = magnet.load(args.codec).audio_encoder
    sounds = [synth.make(seed, synth.HELD_OUT, 4.0)[2] for seed in range(9000, 9040)]
    audio = mx.array(np.stack(sounds))
    codes = codec.encode(audio[..., None])[0].codes
    table, most = {}, codes.shape[-1]
    for count in (1, 2, most):
        output = codec.decode_chunk(codes[..., :count])[..., 0]
        ratios = [si_sdr(a, b) for a, b in zip(np.array(output), sounds)]
        distance = stft_distance(output, audio).item()
        table[f"{count} of {most} codebooks"] = {
            "STFT distance": f"{distance:.2f}",
            "SI-SDR in dB": f"{np.median(ratios):.2f}",
        }
    return table


def show(table: dict[str, dict[str, str]]) -> None:
    """Print a table in Markdown."""
    columns = list(next(iter(table.values())))
    print_result(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in table.items():
        print_result(f"| {name} | {' | '.join(row.values())} |")


class Parser(argparse.ArgumentParser):
    """A parser that prints an error as one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def warn(message: Warning | str, *_) -> None:
    print(f"evaluate.py: warning: {one_line(message)}", file=sys.stderr)


def main() -> None:
    warnings.showwarning = warn
    parser = Parser(description="Measure the tiny model.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="model whose takes to measure")
    source.add_argument("--codec", help="model whose codec to measure")
    add = parser.add_argument
    add("--adapter", help="file that train.py lora wrote, or PEFT's folder or Hub id")
    add_flags(add)
    add("--timbre", choices=synth.VOICES, help="only prompts of this timbre")
    add("--prompts", type=int, default=200, help="how many (default: %(default)s)")
    add("--duration", type=float, default=4.0, help="seconds (default: %(default)s)")
    add("--guidance-coef", type=float, help="(default: 3; a MAGNeT has its own)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--batch", type=int, default=50, help="takes at once (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.duration <= 600 or args.prompts < 1 or args.batch < 1:
        parser.error(
            "--duration must be from 1 to 600 s, --prompts and --batch 1 or more"
        )
    quantized = args.q_bits or args.q_group_size or args.q_mode
    if args.codec and (args.adapter or args.timbre or quantized):
        parser.error("--adapter, --timbre and --q-... must go with --model")
    try:
        show(reconstruct(args) if args.codec else follow(args))
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
