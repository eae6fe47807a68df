"""A job: one sound file to make, with all its settings, checked before it is tried.

    jobs = plan(["happy rock", "calm piano"], values, takes=4)  # seeds counted up
    job = make_job(dict(prompt="happy rock", seed=0, output="rock.wav"))
    job.check()  # raises ValueError or OSError

The settings may be a stranger's: of a command line, a line of a file of prompts, or a
sound file's comment. Needs audio.py, beat.py, endings.py, loops.py, loudness.py,
magnet_job.py, notes.py, options.py, outputs.py, sections.py, strict.py and
diffusion_job.py beside it, with what these need; to time and level a take, the model's own config.
"""

import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from audio import check_audio_path
from beat import Beat, make_beat
from diffusion_job import check_decoder, make_decoder
from endings import FADE, Ending, make_ending
from loops import check_loop, take_seconds
from loudness import CEILING, to_loudness, to_peak
from magnet_job import MAGNET_KEYS, OPTIONS, asked_for, fit, options_record, refuse
from notes import Tune
from notes import parse as parse_notes
from options import STYLE_OPTIONS, Options, row_seeds
from outputs import check_apart, check_new, default_name, free
from sections import Sections, check_end, parse, times
from strict import in_a_line

if TYPE_CHECKING:
    from magnet import MagnetOptions
    from musicgen import MusicGen

SHORTEST = 0.4  # seconds over which loudness is measured
BATCH_OF_FILE = 8  # lines at once, so that an interruption loses little


class AudioPrompt(NamedTuple):
    """What part of which sound file a take starts with, and whether it stays."""

    path: str
    start: float = 0.0  # seconds
    length: float | None = None  # seconds; None: to the end
    drop: bool = False


class MelodyFile(NamedTuple):
    """Which sound file's tune a take follows, from which second on, and whether drums
    and bass are taken away first."""

    path: str
    start: float = 0.0
    separate: bool = True


@dataclass(frozen=True)
class Job:
    """One sound file to make."""

    prompt: str
    seed: int
    output: Path
    options: "Options | MagnetOptions"
    audio_prompt: AudioPrompt | None = None
    melody: MelodyFile | None = None
    style: str | None = None  # sound file
    beat: Beat | None = None
    loop: float | None = None  # bars
    loudness: float | None = None  # LUFS
    peak: float | None = None  # dB of full scale
    subtype: str | None = None  # of the file's samples; None: the format's own
    mp3_bitrate: int | None = None  # kbit/s
    decoder: str | None = None  # of its codes; None: the codec's own
    best_of: int | None = None  # takes, of which the best is kept
    keep_all: bool = False  # the others, too
    rank: str = "text"  # by what they are ranked
    line: int | None = None  # in the file of prompts
    fault: str | None = None  # of that line, which then cannot be made
    overwrite: bool = False  # what is there
    seed_is_given: bool = True  # not any
    prompt_is_given: bool = True  # false: for a model without text
    notes: str | None = None  # a typed tune, to the beat
    ending: Ending = Ending()
    given: dict[str, Any] = field(default_factory=dict, compare=False)  # not by default
    magnet: bool | None = None  # whether it is for a MAGNeT; None: not known yet

    @in_a_line
    def check(self, writes: bool = True, reads: bool = True) -> None:
        """Raise ValueError or OSError for what cannot be made, before it is tried.

        `writes` is false where the output goes to a pipe or is another process's,
        and `reads` where the audio prompt is not wanted, its codes being there.
        """
        if self.fault:
            raise ValueError(self.fault)
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, got {self.prompt!r}.")
        row_seeds([self.seed], rows=1)
        self.check_options()
        if self.best_of and self.certain:
            raise ValueError(f"best_of needs takes that differ: {DIFFER}.")
        check_level(self.loudness, self.peak)
        if writes:
            check_audio_path(self.output, self.subtype, self.mp3_bitrate)
        check_decoder(self.decoder)
        duration = self.options.duration  # None: the model's own
        if duration is not None:
            check_end(self.prompt, duration)
            check_loop(self.beat, self.loop, duration)
            self.ending.check(self.made.duration)
        if self.loop is not None:
            check_end(self.prompt, self.beat.bars(self.loop))
        if self.loudness is not None and duration and duration < SHORTEST:
            raise ValueError(
                f"loudness needs a duration of {SHORTEST} s or more, got "
                f"{duration:g}."
            )
        for path in self.inputs().values():
            if reads and not Path(path).is_file():
                raise FileNotFoundError(f"There is no sound file {path}.")
        for output in self.outputs() if writes else ():
            check_apart(output, self.inputs())
            if not self.overwrite:
                check_new(output)

    def check_options(self) -> None:
        """Raise ValueError for options that no model takes. A MAGNeT takes others than a
        MusicGen, and which it is may not be known yet."""
        unknown = self.magnet is None and self.given
        magnets = unknown and self.given.keys() & {*MAGNET_KEYS}
        try:
            if not magnets:
                return self.options.check(max_duration=math.inf)
        except ValueError:
            if not unknown:
                raise
        fit(self.given, True).check(max_duration=math.inf)

    def outputs(self) -> list[Path]:
        """The files that it writes."""
        return [job.output for job in self.contenders() if job.keep_all or job is self]

    def contenders(self) -> list["Job"]:
        """The takes of which the best is kept, the seeds counted up: the job itself and
        others, whose files are numbered."""
        count, jobs = self.best_of or 1, [self]
        for i in range(1, count):
            output = Path(numbered(str(self.output), i, count))
            jobs.append(replace(self, seed=self.seed + i, output=output))
        return jobs

    def timed(self, model: "MusicGen") -> "Job":
        """The same, as long as the model's own takes where no duration is given, and
        with its own options; with a fault where it cannot be this model's."""
        config = model.config
        try:
            job = self.fitted(config.masking is not None)
        except ValueError as error:
            job = replace(self, fault=str(error))
        own = config.max_duration if job.magnet else config.default_duration
        if job.options.duration is not None:
            return job
        return replace(job, options=replace(job.options, duration=own))

    def fitted(self, magnet: bool) -> "Job":
        """The same for a MAGNeT, or for a MusicGen, if it is not known yet for which it
        is. Raises ValueError for what does not apply to it."""
        if self.magnet is not None:
            return self
        refuse(self.given, magnet)
        options = fit(self.given, True) if magnet else self.options
        return replace(self, options=options, magnet=magnet)

    def level(self, audio: mx.array, sampling_rate: int) -> np.ndarray:
        """Samples (N, C) brought to the loudness or peak that is asked for."""
        audio = np.array(audio)
        if self.loudness is not None and len(audio) < SHORTEST * sampling_rate:
            warnings.warn(
                f"{self.output} is shorter than {SHORTEST} s: its loudness stays as it is."
            )
            return audio
        if self.loudness is not None:
            return to_loudness(audio, sampling_rate, self.loudness, self.output)
        return audio if self.peak is None else to_peak(audio, self.peak)

    @property
    def made(self) -> Options:
        """The options of all that is made, of which an ending keeps a part."""
        if not self.ending.tail or self.options.duration is None:
            return self.options
        return replace(self.options, duration=self.options.duration + self.ending.tail)

    @property
    def tune(self) -> Tune | None:
        """Its notes, if any."""
        return self.notes and parse_notes(self.notes, self.beat)

    @property
    def ceiling(self) -> float:
        """dB of full scale that no true peak of its file exceeds."""
        return CEILING if self.loudness is not None else self.peak or 0.0

    @property
    def certain(self) -> bool:
        """Whether the seed changes nothing, be it a draw of codes or of an excerpt."""
        options = self.options
        likeliest = options.temp == 0 or options.top_k == 1 and not options.top_p
        return likeliest and not (self.style and options.style_start is None)

    def runs_with(self, other: "Job") -> bool:
        """Whether both can be rows of one batch."""
        if self.best_of or other.best_of:
            return False
        mine, theirs = [
            (
                job.made,
                job.ending.tail,
                job.audio_prompt,
                times(job.prompt),
                job.decoder,
            )
            for job in (self, other)
        ]
        return mine == theirs

    @property
    def text(self) -> str:
        """The prompt as the model is given it: with the tempo."""
        if self.beat is None:
            return self.prompt
        if isinstance(self.prompt, Sections):
            return self.prompt.each(self.beat.named)
        return self.beat.named(self.prompt)

    def inputs(self) -> dict[str, str]:
        """The sound files that it reads, by what they are."""
        melody, style = self.melody and self.melody.path, self.style
        paths = {"audio_prompt": self.audio_prompt and self.audio_prompt.path}
        paths |= {"melody": melody, "style": style}
        return {name: path for name, path in paths.items() if path}

    @property
    def follows(self) -> dict[str, str]:
        """What it follows besides its text: settings, and the kind of their model."""
        kinds = dict(melody="melody", notes="melody", style="style")
        return {name: kind for name, kind in kinds.items() if getattr(self, name)}

    def record(self) -> dict[str, Any]:
        """Its settings, for the file's comment."""
        record = options_record(self.options)
        record |= dict(prompt=self.prompt, seed=self.seed)
        record |= dict(loudness=self.loudness, peak=self.peak, subtype=self.subtype)
        record |= dict(mp3_bitrate=self.mp3_bitrate)
        record |= {"decoder": self.decoder} if self.decoder else {}
        if self.beat:
            record |= self.beat._asdict()
        if self.loop is not None:
            record |= dict(loop=True, bars=self.loop)
        if isinstance(self.prompt, Sections):
            values = (self.prompt.fade or None, self.prompt.context)
            given = zip(SECTION_KEYS, values)
            record |= {key: value for key, value in given if value is not None}
        if self.audio_prompt:
            record |= dict(zip(AUDIO_KEYS, self.audio_prompt))
        record |= self.ending.record()
        record |= {"notes": self.notes} if self.notes else {}
        if self.melody:
            path, start, separate = self.melody
            record |= dict(melody=path, melody_start=start, no_separate=not separate)
        if self.best_of:
            record |= dict(best_of=self.best_of, rank=self.rank)
        return record | ({"style": self.style} if self.style else {})


def check_level(loudness: float | None, peak: float | None) -> None:
    """Raise ValueError for a level that cannot be."""
    for name, level, least, unit in (
        ("loudness", loudness, -70, "LUFS"),
        ("peak", peak, -100, "dB"),
    ):
        number = type(level) in (int, float) and least <= level <= 0
        if not (level is None or number):
            raise ValueError(f"{name} must be from {least} to 0 {unit}, got {level!r}.")
    if loudness is not None and peak is not None:
        raise ValueError("loudness and peak must not be given together.")


LEVELS = ("loudness", "peak")
KEYS = ("prompt", "seed", "output", *OPTIONS, *MAGNET_KEYS, *LEVELS, "subtype")
KEYS += ("mp3_bitrate", "decoder")
AUDIO_KEYS = ("audio_prompt", "prompt_start", "prompt_length", "drop_prompt")
MELODY_KEYS = ("melody", "melody_start", "no_separate")
STYLE_KEYS = ("style", *STYLE_OPTIONS)
BEAT_KEYS = ("bpm", "beats_per_bar", "loop", "bars", "notes")
SECTION_KEYS = ("section_fade", "section_context")
BEST_KEYS = ("best_of", "keep_all", "rank")
ENDING_KEYS = ("fade_in", "fade_out", "ending")
SCORE_KEYS = (*BEAT_KEYS, *SECTION_KEYS, *BEST_KEYS, *ENDING_KEYS)
ALL_KEYS = (
    *dict.fromkeys((*KEYS, *AUDIO_KEYS, *MELODY_KEYS, *STYLE_KEYS, *SCORE_KEYS)),
)
DIFFER = "with temp 0, or top_k 1, all seeds make the same; give others"
MOST_TAKES = 64  # of which the best is kept
RANKS = ("text", "likelihood")  # as in ranking.py


def sound_name(key: str, path: Any) -> str | None:
    """A path, in which ~ is the home folder, or None for none. Raises ValueError, which
    has the `key`, for what is no path."""
    if not isinstance(path, str | Path | None) or "\0" in str(path):
        raise ValueError(f"{key} must name a sound file, got {path!r:.80}.")
    return os.path.expanduser(path) if path else None


def make_audio_prompt(path, start, length, drop) -> AudioPrompt | None:
    """From values of AUDIO_KEYS. Raises ValueError naming a bad one."""
    for name, seconds, least in (
        ("prompt_start", start, 0),
        ("prompt_length", length, 1e-4),
    ):
        number = type(seconds) in (int, float) and least <= seconds < 1e6
        if seconds is not None and not number:
            raise ValueError(f"{name} must be {least:g} s or more, got {seconds!r}.")
    path = sound_name("audio_prompt", path)
    if drop not in (None, False, True):
        raise ValueError(f"drop_prompt must be true or false, got {drop!r}.")
    if not path and (start is not None or length is not None or drop):
        raise ValueError(
            "prompt_start, prompt_length and drop_prompt need an audio_prompt."
        )
    return AudioPrompt(path, start or 0.0, length, bool(drop)) if path else None


def make_melody(path, start, no_separate, overrides: set[str]) -> MelodyFile | None:
    """From values of MELODY_KEYS. Raises ValueError naming a bad one, or one of the
    job's `overrides`, which is no default of a file of prompts, without a melody."""
    path = sound_name("melody", path)
    if start is not None and not (type(start) in (int, float) and 0 <= start < 1e6):
        raise ValueError(f"melody_start must be 0 s or more, got {start!r}.")
    if no_separate not in (None, False, True):
        raise ValueError(f"no_separate must be true or false, got {no_separate!r}.")
    lone = {"melody_start": start is not None, "no_separate": no_separate}
    if not path and any(given and name in overrides for name, given in lone.items()):
        raise ValueError("melody_start and no_separate need a melody.")
    return MelodyFile(path, start or 0.0, not no_separate) if path else None


def make_style(values: dict[str, Any], overrides: set[str]) -> tuple[str | None, dict]:
    """The path among values of STYLE_KEYS, and the options. Raises ValueError naming a
    bad path, or one of the job's `overrides` options without one, as `make_melody`."""
    path = sound_name("style", values.get("style"))
    given = {k: v for k in STYLE_OPTIONS if (v := values.get(k)) is not None}
    if path:
        return path, given
    if lone := given.keys() & overrides:
        raise ValueError(f"{min(lone)} must come with a style.")
    return None, {}


def make_loop(
    values: dict[str, Any], beat: Beat | None, overrides: set[str]
) -> float | None:
    """Bars of a loop, or None for none. Raises ValueError naming a bad value, or `bars`
    without a loop, as `make_melody`."""
    loop, bars = values.get("loop"), values.get("bars")
    if loop not in (None, False, True):
        raise ValueError(f"loop must be true or false, got {loop!r:.40}.")
    if not loop:
        if bars is not None and "bars" in overrides:
            raise ValueError("bars needs a loop.")
        return None
    if beat is None or bars is None:
        raise ValueError("loop needs bpm and bars, such as 120 and 4.")
    if values.get("drop_prompt"):
        raise ValueError("loop does not go with drop_prompt.")
    if type(bars) not in (int, float) or not 0.25 <= bars <= 1000:
        raise ValueError(f"bars must be from 0.25 to 1000, got {bars!r:.40}.")
    return bars


def choose_ending(
    values: dict[str, Any], beat: Beat | None, loop: float | None
) -> Ending:
    """How it begins and ends. Raises ValueError naming a bad value, and for a loop that
    is to fade; of its own a loop does not."""
    fade_in, fade_out, seeks = (values.get(key) for key in ENDING_KEYS)
    if loop is not None and (fade_in or seeks or fade_out not in (None, 0, FADE)):
        raise ValueError("loop does not go with ending, fade_in or fade_out.")
    if loop is not None:
        return Ending()
    return make_ending(fade_in, fade_out, seeks, beat and beat.bars(1))


def make_prompt(values: dict[str, Any], beat: Beat | None, overrides: set[str]) -> str:
    """The prompt among the values, in sections where it has such. Raises ValueError
    naming a bad section, or what concerns sections without any, as `make_melody`."""
    prompt, (fade, context) = values["prompt"], map(values.get, SECTION_KEYS)
    if isinstance(prompt, str):
        prompt = parse(prompt, beat, 0.0 if fade is None else fade, context)
    negative = values.get("negative_prompt")
    if isinstance(negative, str) and isinstance(parse(negative, Beat(60)), Sections):
        raise ValueError("negative_prompt must be one text: it has no sections.")
    for name, value in zip(SECTION_KEYS, (fade, context)):
        if value is not None and name in overrides and type(prompt) is str:
            raise ValueError(
                f'{name} needs a prompt in sections, such as "0: calm | 12: loud".'
            )
    return prompt


def make_best_of(values: dict[str, Any], overrides: set[str]) -> dict[str, Any]:
    """How many takes, whether all are kept, and by what they are ranked. Raises
    ValueError naming a bad one, or one without a number, as `make_melody`."""
    count, keep_all, rank = (values.get(key) for key in BEST_KEYS)
    if count is not None and not (type(count) is int and 2 <= count <= MOST_TAKES):
        raise ValueError(f"best_of must be from 2 to {MOST_TAKES}, got {count!r:.40}.")
    if keep_all not in (None, False, True):
        raise ValueError(f"keep_all must be true or false, got {keep_all!r:.40}.")
    if rank not in (None, *RANKS):
        raise ValueError(f"rank must be one of {', '.join(RANKS)}, got {rank!r:.40}.")
    for name, value in (("keep_all", keep_all), ("rank", rank)):
        if value and count is None and name in overrides:
            raise ValueError(f"{name} needs a best_of.")
    return dict(best_of=count, keep_all=bool(keep_all and count), rank=rank or RANKS[0])


def check_notes(notes: Any, beat: Beat | None, melody: MelodyFile | None) -> str | None:
    """The notes, if any. Raises ValueError for unknown ones, for notes without a beat
    and for notes beside a melody."""
    if notes is None:
        return None
    if melody:
        raise ValueError("notes and melody must not be given together.")
    if beat is None:
        raise ValueError("notes need a bpm, such as 120.")
    parse_notes(notes, beat)
    return notes


@in_a_line
def make_job(
    values: dict[str, Any], line: int | None = None, overrides: set[str] | None = None
) -> Job:
    """A job from values of ALL_KEYS, of which those named in `overrides` are no
    defaults; None: all. Raises ValueError naming a bad one."""
    sound = make_audio_prompt(*(values.get(key) for key in AUDIO_KEYS))
    overrides = {*values} if overrides is None else overrides
    melody = make_melody(*(values.get(key) for key in MELODY_KEYS), overrides)
    style, style_options = make_style(values, overrides)
    output = values["output"]
    if not isinstance(output, str | Path) or not str(output) or "\0" in str(output):
        raise ValueError(f"output must name a file, got {output!r}.")
    subtype = values.get("subtype")
    beat = make_beat(values.get("bpm"), values.get("beats_per_bar"))
    prompt = make_prompt(values, beat, overrides)
    loop = make_loop(values, beat, overrides)
    asked = {
        k: v for k, v in values.items() if k in ALL_KEYS and k not in STYLE_OPTIONS
    }
    sections = isinstance(prompt, Sections)
    given = asked_for(asked | style_options | dict(sections=sections))
    options = fit(given, values.get("magnet"))
    if loop is not None and options.duration is None:
        options = replace(options, duration=take_seconds(beat, loop))
    return Job(
        prompt,
        values["seed"],
        Path(output),
        options,
        audio_prompt=sound,
        melody=melody,
        style=style,
        beat=beat,
        loop=loop,
        loudness=values.get("loudness"),
        peak=values.get("peak"),
        subtype=subtype and str(subtype).upper(),
        mp3_bitrate=values.get("mp3_bitrate"),
        decoder=make_decoder(values.get("decoder")),
        **make_best_of(values, overrides),
        notes=check_notes(values.get("notes"), beat, melody),
        ending=choose_ending(values, beat, loop),
        line=line,
        overwrite=bool(values.get("force")),
        given=given,
        magnet=values.get("magnet"),
    )


def numbered(output: str, index: int, count: int) -> str:
    """`out.wav` -> `out-3.wav`, where there are several."""
    path = Path(output)
    return output if count == 1 else str(path.with_stem(f"{path.stem}-{index + 1}"))


def plan(prompts: list[str], values: dict[str, Any], takes: int = 1) -> list[Job]:
    """Jobs for `takes` takes of each prompt: seeds counted up, past those of which one
    is the best, files numbered. Without an output they are called after prompt and seed.
    """
    count, output = len(prompts) * takes, values.get("output")
    jobs, seeds = [], values.get("best_of") or 1  # of each
    for i in range(count):
        prompt, seed = prompts[i // takes], values["seed"] + i * seeds
        if output is None:
            path = free(default_name(prompt, seed))
        else:
            path = numbered(output, i, count)
        jobs.append(make_job(values | dict(prompt=prompt, seed=seed, output=path)))
    return jobs
