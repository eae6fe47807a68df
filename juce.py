"""The protocol of gary4juce, a plug-in (AU, VST3) that continues what a DAW plays.

    plugin = Plugin(worker, takes, Limits("small"))
    status, answer = plugin.process_audio(form)
    status, answer = plugin.poll_status(answer["session_id"])  # every few seconds

What follows was read in its source, github.com/betweentwomidnights/gary4juce at 3cd2063,
of which no code is here; "local" is its own back end for a Mac, ...-localhost-installer-mac
at 53bec14, g4l_localhost.py and g4laudio_mlx.py. It asks http://localhost:8000, and tries
http://127.0.0.1:8000/health every 3 s (PluginProcessor.cpp:292, PluginEditor.cpp:2250):
"status" must be a word such as "ok" (PluginProcessor.cpp:33).

It posts JSON: model_name, prompt_duration (1 to 15 s), audio_data (base64 of a wav: what
was recorded, 16 bits, up to 180 s, or the last answer), top_k, temperature, cfg_coef,
description and seed, -1 for any (PluginEditor.cpp:3503, 3774); to retry, session_id in
place of audio_data (4016). It reads success, session_id, seed and error (3597).

It polls every 3 s (2265) for success, generation_in_progress, generation_seed, progress
(0 to 100), queue_status {status, message, position, estimated_seconds}, status, error
and audio_data (2925 to 3306). Without a queue_status it takes a run that stands still for
stalled. A failure is "success": true, "status": "failed": of one without success it
reads the error, and polls on for ever where that speaks of a download (2936). There is
no route to stop: it polls no more.

A new sound begins with the first prompt_duration seconds of the recording, a continued
one with the last; 30 s are made, these included, and what was before them is put in front
(local: g4laudio_mlx.py:1829, 1932). The answer has the rate and channels that came.

Needs worker.py, takes.py, tasks.py, forms.py, hub.py, audio.py and wav_stream.py beside
it, with what these need.
"""

import base64
import io
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from audio import open_sound, read_sound
from forms import Form
from hub import BESIDE
from takes import Takes
from tasks import Generate, Limits, read_order
from wav_stream import WavStream
from worker import LAST, Event, Refused, Ticket, Worker

SECONDS = 30.0  # that are made, with those that are given
PROMPT = 6.0  # seconds that are given where nothing is said
KEPT = 3600.0  # seconds that a session can be asked for, as in the plug-in
QUIET = 15.0  # seconds without a poll after which a run gives way to a new one
MOST = 50  # sessions
RECORDING = "recording.wav"  # its name, also in a take's settings
OVERLAP = 0.01  # seconds over which a recording goes over into what continues it
SIZES = ("small", "medium", "large")  # headings of the plug-in's list of models

NAMES = {  # the plug-in's, and ours
    "model_name": "model",
    "description": "prompt",
    "top_k": "top_k",
    "temperature": "temp",
    "cfg_coef": "guidance_coef",
    "seed": "seed",
}

Answer = tuple[int, dict[str, Any]]  # the status of HTTP, and an object of JSON


@dataclass
class Session:
    """A run that the plug-in asks after. It is made without a `ticket`, and gets one
    before anybody can ask."""

    id: str
    recording: Path
    fields: dict[str, Any]  # as they came
    continues: bool
    start: float = 0.0  # second of the recording with which the take begins
    seed: int = 0
    ticket: Ticket | None = None
    polled: float = field(default_factory=time.monotonic)
    lock: Any = field(default_factory=threading.Lock)
    progress: int = 0
    queue: dict[str, Any] = field(default_factory=dict)
    take: str = ""

    @property
    def is_over(self) -> bool:
        return self.ticket.ended.is_set()


class Timed(Generate):
    """Takes that are timed: `began` is set when the worker begins to make them."""

    began: float | None = None

    def run(self, worker: Worker, ticket: Ticket) -> None:
        self.began = time.monotonic()
        super().run(worker, ticket)


class Plugin:
    """The sessions of the plug-in, with their recordings in a folder of their own.

    The model of the `limits` is taken where a request names none. It does not stand in
    for one that is named and cannot be had: that run fails, and the plug-in says why.
    """

    def __init__(self, worker: Worker, takes: Takes, limits: Limits):
        self.worker, self.takes, self.limits = worker, takes, limits
        self._folder = tempfile.TemporaryDirectory(prefix="musicgen-")
        self._sessions: dict[str, Session] = {}
        self._lock, self._took = threading.Lock(), 0.0  # seconds, of the last run

    def close(self) -> None:
        """Remove the recordings."""
        self._folder.cleanup()

    def process_audio(self, form: Form) -> Answer:
        """Begin with the first seconds of a recording. Raises ValueError, or Refused."""
        return self._begin(form.fields, recording_of(form), False)

    def continue_music(self, form: Form) -> Answer:
        """Go on after a recording. Raises as `process_audio`."""
        return self._begin(form.fields, recording_of(form), True)

    def retry_music(self, form: Form) -> Answer:
        """Make a session's take again, with what is given in place of what it had, and
        with any seed where none is given. Raises as `process_audio`."""
        old = self._find(form.fields.get("session_id"))
        given = {key: value for key, value in form.fields.items() if value is not None}
        fields = old.fields | {"seed": None} | given
        return self._begin(fields, old.recording, old.continues)

    def poll_status(self, id: str) -> Answer:
        """How far a session is, and at the end its sound. Raises Refused (404) for one
        that is not there."""
        session = self._find(id)
        with session.lock:
            session.polled = time.monotonic()
            while event := session.ticket.next(0):
                self._hear(session, event)
            status = session.queue["status"]
            answer = {
                "success": True,
                "status": status,
                "generation_in_progress": status not in ("completed", "failed"),
                "transform_in_progress": False,
                "generation_seed": session.seed,
                "progress": session.progress,
                "queue_status": session.queue,
            }
            if status == "failed":
                answer["error"] = session.queue["message"]
            elif status == "completed":
                answer |= self._audio_data(session)
            return 200, answer

    def _audio_data(self, session: Session) -> dict[str, Any]:
        """The sound of a session that is over, or why there is none any more."""
        try:
            return {"audio_data": base64.b64encode(self._sound(session)).decode()}
        except (KeyError, OSError, ValueError) as error:
            reason = f"The take cannot be read any more: {error}."
            return {"status": "failed", "error": reason}

    def _begin(self, fields: dict[str, Any], path: Path, continues: bool) -> Answer:
        self._make_room()
        id = secrets.token_hex(16)
        folder = Path(self._folder.name) / id
        folder.mkdir()
        try:
            recording = folder / RECORDING
            shutil.copyfile(path, recording)
            session = Session(id, recording, fields, continues)
            self._submit(session)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._sessions[id] = session
        return 200, dict(success=True, session_id=id, seed=session.seed)

    def _submit(self, session: Session) -> None:
        given = session.fields.get("prompt_duration")
        prompt = PROMPT if given is None else given
        if type(prompt) not in (int, float) or not 0 < prompt < SECONDS:
            raise ValueError(
                f"prompt_duration must be more than 0 and less than {SECONDS:g} s, got "
                f"{prompt!r:.40}."
            )
        with open_sound(session.recording) as sound:
            length = sound.frames / sound.samplerate
        if session.continues:
            session.start = max(0.0, length - prompt)
        values = ours(session.fields) | dict(duration=SECONDS, fade_out=0.0)
        values |= dict(prompt_start=session.start)
        values |= dict(prompt_length=min(float(prompt), length - session.start))
        files, names = {"audio_prompt": session.recording}, {"audio_prompt": RECORDING}
        order = read_order(Form(values, files, names), self.limits)
        task = Timed(self.takes, order)
        task.check()
        session.seed = order.values["seed"]
        session.queue = queue_status("queued", "It waits.", 0)
        after = partial(self._note, task)
        session.ticket = self.worker.submit(task, session.id, after)

    def _note(self, task: Timed) -> None:
        """How long a run took, by which the plug-in says how long others will wait."""
        if task.began:
            self._took = time.monotonic() - task.began

    def _hear(self, session: Session, event: Event) -> None:
        """Take an event of the worker's into what the plug-in is told."""
        data = event.data
        if event.name == "queued":
            place, seconds = data["place"], round(data["place"] * self._took)
            session.queue = queue_status("queued", "It waits.", place, seconds)
        elif event.name == "loading":
            session.queue = queue_status("warming", f"loading {data['model']}")
        elif event.name == "start":
            session.queue = queue_status("processing", "It is made.")
        elif event.name == "progress":
            session.progress = min(99, int(100 * data["seconds"] / data["of"]))
        elif event.name == "take":
            session.take = data["id"]
        elif event.name == "done":
            session.progress = 100
            session.queue = queue_status("completed", "It is made.")
        elif event.name in LAST:
            reason = data.get("error", "It was cancelled.")
            session.queue = queue_status("failed", reason)

    def _sound(self, session: Session) -> bytes:
        """A wav of the take, after what was before it in the recording, with its rate
        and channels."""
        path = self.takes.find(session.take).path
        recording, rate = read_sound(session.recording)
        audio = read_sound(path, rate, recording.shape[1])[0]
        audio = joined(recording, audio, round(session.start * rate), rate)
        with io.BytesIO() as file:
            wav = WavStream(file, audio.shape[1], rate)
            wav.write(np.clip(audio, -1, 1))
            return file.getvalue()

    def _find(self, id: Any) -> Session:
        with self._lock:
            session = self._sessions.get(id) if isinstance(id, str) else None
        if session is None:
            raise Refused(404, "There is no such session any more: begin anew.")
        return session

    def _make_room(self) -> None:
        """Stop what nobody asks after, and forget what is old."""
        now = time.monotonic()
        with self._lock:
            sessions = sorted(self._sessions.values(), key=lambda one: one.polled)
            over = [session for session in sessions if session.is_over]
            many = len(sessions) - MOST + 1
            old = over[: max(many, 0)]
            old += [s for s in over[len(old) :] if now - s.polled > KEPT]
            for session in old:
                del self._sessions[session.id]
        for session in old:
            shutil.rmtree(session.recording.parent, ignore_errors=True)
        for session in sessions:
            if not session.is_over and now - session.polled > QUIET:
                session.ticket.cancel()


def recording_of(form: Form) -> Path:
    if "audio_data" not in form.files:
        raise ValueError("audio_data must be the recording, a wav file in base64.")
    return form.files["audio_data"]


def ours(fields: dict[str, Any]) -> dict[str, Any]:
    """What the plug-in sends, by our names. What it may send besides, in later versions,
    is left out; a seed below 0 is none."""
    values = {NAMES[k]: v for k, v in fields.items() if k in NAMES and v is not None}
    if type(values.get("seed")) is int and values["seed"] < 0:
        del values["seed"]
    return values


def queue_status(
    status: str, message: str, position: int = 0, seconds: int = 0
) -> dict[str, Any]:
    queue = dict(status=status, message=message, position=position)
    return queue | dict(estimated_seconds=seconds)


def joined(
    recording: np.ndarray, audio: np.ndarray, start: int, rate: int
) -> np.ndarray:
    """Samples (N, C) of a recording up to `start`, and the audio (M, C) from there on."""
    count = min(round(OVERLAP * rate), len(recording) - start, len(audio))
    if start == 0 or count < 1:
        return np.concatenate([recording[:start], audio])
    rising = np.linspace(0, 1, count, dtype=np.float32)[:, None]
    both = recording[start : start + count] * (1 - rising) + audio[:count] * rising
    return np.concatenate([recording[:start], both, audio[count:]])


def models(described: list[dict[str, Any]], own: str) -> dict[str, Any]:
    """The plug-in's list of models, of that of GET /v1/models: those of music that are
    here, and the server's `own`, by size. It chooses the first one, or the one that it
    had before (PluginEditor.cpp:4312, 4472)."""
    by_size: dict[str, list] = {size: [] for size in SIZES}
    for model in sorted(described, key=lambda model: model["id"] != own):
        here = model["local"] and model["id"] not in BESIDE
        music = model["kind"] in ("text", "melody", "style")
        if music and here or model["id"] == own:
            name = model["id"].rstrip("/").rpartition("/")[2]
            entry = dict(name=name, path=model["id"], type="single")
            by_size[size_of(name)].append(entry)
    return dict(success=True, models=by_size)


def size_of(name: str) -> str:
    sizes = [size for size in SIZES if size in name]
    sizes += ["medium"] if "melody" in name or "style" in name else []
    return [*sizes, "small"][0]
