"""What can be done with a sound, without the model that made it: stems, level, chroma.

    task = Separate(takes, take)  # by Demucs
    task = read_level(takes, take, Form({"loudness": -14}))
    task = Listen(Form({"notes": "C E G:2", "bpm": 120}))
    ticket = worker.submit(task)

Tasks for worker.py, as those of tasks.py. Needs worker.py, takes.py, forms.py, audio.py,
demucs.py, melody.py, notes.py, beat.py, loudness.py, loops.py, settings.py, outputs.py,
job.py and what these need beside it.
"""

from typing import TYPE_CHECKING

import settings
from audio import load_audio, read_sound, save_audio, save_stems
from beat import make_beat
from forms import Form
from job import check_level
from loops import write_loop_points
from loudness import CEILING, to_loudness, to_peak
from melody import RATE, MelodyConfig, extract_chroma
from notes import Tune, parse
from outputs import whole_folder
from takes import Take, Takes
from worker import Refused, Ticket, Worker

if TYPE_CHECKING:
    from demucs import HTDemucs

LISTENS = 120.0  # seconds of a sound of which chroma is shown


class Separate:
    """The stems of a take, by Demucs, in a folder beside it."""

    quick = False

    def __init__(self, takes: Takes, take: Take):
        self._takes, self._take = takes, take

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Tells `progress`, and `take` at the end."""
        if not self._take.stems:
            from demucs import REPO, HTDemucs

            ticket.tell("loading", model=REPO)
            try:
                model = HTDemucs.from_pretrained(REPO)
            except OSError as error:
                raise Refused(502, str(error)) from error
            self._separate(model, worker, ticket)
        if not ticket.heeded:
            ticket.tell("take", **self._takes.find(self._take.id).as_json())

    def _separate(self, model: "HTDemucs", worker: Worker, ticket: Ticket) -> None:
        path, of = self._take.path, self._take.seconds
        audio = load_audio(path, model.sampling_rate, model.channels)
        for done, pieces, stems in model.separate_steps(audio):
            ticket.tell("progress", seconds=round(of * done / pieces, 3), of=of)
            worker.do_quick()
            if ticket.stops():
                return
        with whole_folder(self._takes.stems_folder(path)) as folder:
            names = model.config.sources
            named = {folder / f"{name}.wav": stem for name, stem in zip(names, stems)}
            for _ in save_stems(named, model.sampling_rate):
                pass


class Level:
    """A take at another loudness, in LUFS, or with another peak, in dB."""

    quick = False

    def __init__(
        self, takes: Takes, take: Take, loudness: float | None, peak: float | None
    ):
        self._takes, self._take = takes, take
        self._loudness, self._peak = loudness, peak

    def check(self) -> None:
        """Raise ValueError for a level that cannot be, and for none."""
        check_level(self._loudness, self._peak)
        if self._loudness is None and self._peak is None:
            raise ValueError("loudness or peak must be given, such as loudness -14.")

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Tells `take`."""
        take, loudness, peak = self._take, self._loudness, self._peak
        audio, rate = read_sound(take.path)
        codes = settings.load_codes(take.codes)[0] if take.codes else None
        seed = take.settings.get("seed", 0)
        path = self._takes.free(str(take.settings.get("prompt", "")), seed)
        if loudness is not None:
            audio = to_loudness(audio, rate, loudness, path.name)
        else:
            audio = to_peak(audio, peak)
        record = take.settings | dict(loudness=loudness, peak=peak, subtype=None)
        ceiling = CEILING if loudness is not None else peak
        comment = settings.to_comment(record)
        save_audio(path, audio, rate, comment, overwrite=False, ceiling=ceiling)
        if "loop_start" in record:
            write_loop_points(path, len(audio), rate)
        if codes is not None:
            beside = path.with_suffix(".safetensors")
            settings.save_codes(beside, codes, record, overwrite=False)
        ticket.tell("take", **self._takes.of(path).as_json())


def read_level(takes: Takes, take: Take, form: Form) -> Level:
    """Raises ValueError for other fields than `loudness`, `peak` and `stream`."""
    if unknown := form.fields.keys() - {"loudness", "peak", "stream"}:
        raise ValueError(f"'{min(unknown):.60}' is unknown; known are loudness, peak.")
    return Level(takes, take, form.fields.get("loudness"), form.fields.get("peak"))


class Listen:
    """The chroma of a sound, or of typed notes, that a melody model would follow: twelve
    notes a frame, from C on. Drums are not taken away."""

    quick = True

    def __init__(self, form: Form):
        self._form = form

    def check(self) -> None:
        """Raise ValueError unless there is either a melody or notes."""
        fields, path = self._form.fields, self._form.files.get("melody")
        if unknown := fields.keys() - {"notes", "bpm", "beats_per_bar"}:
            raise ValueError(
                f"'{min(unknown):.60}' is unknown; known are melody, notes, bpm, "
                "beats_per_bar."
            )
        if (path is None) == (fields.get("notes") is None):
            raise ValueError("melody, which is a file, or notes must be given.")
        if path is None:
            self._tune()

    def _tune(self) -> Tune:
        fields = self._form.fields
        beat = make_beat(fields.get("bpm"), fields.get("beats_per_bar"))
        if beat is None:
            raise ValueError("notes need a bpm, such as 120.")
        return parse(fields["notes"], beat)

    def run(self, worker: Worker, ticket: Ticket) -> None:
        """Tells `chroma` (T, 12), and its frames a second."""
        config = MelodyConfig()
        if path := self._form.files.get("melody"):
            audio = load_audio(path, RATE, 1, 0, int(LISTENS * RATE))
            chroma = extract_chroma(audio, RATE)
        else:
            chroma = self._tune().chroma(config, seconds=LISTENS)
        rate = RATE / (config.n_fft / 4)
        ticket.tell("chroma", chroma=chroma.tolist(), frame_rate=rate)
