"""The folder of takes: which are there, and what stands in them.

    takes = Takes("takes")
    for take in takes.every():  # the newest first
        print(take.id, take.settings["prompt"], take.seconds)
    takes.star(take.id, True)
    takes.delete(take.id)

A take is a sound file with settings in it, as generate.py writes them, or with codes
beside it that have them: NAME.wav and NAME.safetensors. Its stems lie in NAME.stems. An
id is looked up among the files that are there, and is never made a path. Nothing is
computed with MLX, so any thread may ask. Needs settings.py, audio.py, resample.py and
outputs.py beside it.
"""

import json
import math
import os
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from audio import SUBTYPES, open_sound
from outputs import default_name, whole_file
from settings import from_comment, read_settings

STARRED = "starred.json"


@dataclass(frozen=True)
class Take:
    """A sound file of the folder."""

    id: str
    path: Path
    settings: dict[str, Any]
    seconds: float
    sampling_rate: int  # Hz
    channels: int
    made: float  # Unix time
    starred: bool = False
    codes: Path | None = None
    stems: dict[str, Path] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What a page is told of it."""
        names = ("id", "seconds", "sampling_rate", "channels", "made", "starred")
        fields = {name: getattr(self, name) for name in names}
        for name in ("prompt", "model", "seed"):
            fields[name] = self.settings.get(name)
        fields |= dict(codes=self.codes is not None, suffix=self.path.suffix)
        fields |= dict(settings=self.settings, stems=[*self.stems])
        return {key: finite(value) for key, value in fields.items()}


class Takes:
    """A folder of takes. It is made where there is none, once something is written."""

    def __init__(self, folder: str | Path):
        self.folder = Path(os.path.expanduser(folder))
        self._cache: dict[tuple, Take | None] = {}  # by file, its time and its size
        self._lock = threading.RLock()

    def every(self) -> list[Take]:
        """All that are there, the newest first."""
        with self._lock:
            stars, listed = self._stars(), self._listed()
            takes = [self._complete(id, take, stars) for id, take in listed.items()]
            return sorted(takes, key=lambda t: (-t.made, t.id))

    def find(self, id: str) -> Take:
        """The take of that id. Raises KeyError."""
        with self._lock:
            return self._complete(id, self._listed()[id], self._stars())

    def of(self, path: str | Path) -> Take:
        """The take in a file of the folder. Raises KeyError."""
        name = Path(path).name
        with self._lock:
            for id, take in self._listed().items():
                if take.path.name == name:
                    return self._complete(id, take, self._stars())
        raise KeyError(name)

    def star(self, id: str, starred: bool) -> Take:
        """Mark a take, or take the mark away. Raises KeyError, or OSError."""
        with self._lock:
            name, stars = self.find(id).path.name, self._stars()
            stars = stars | {name} if starred else stars - {name}
            with whole_file(self.folder / STARRED) as part:
                part.write_text(json.dumps(sorted(stars)))
            return self.find(id)

    def delete(self, id: str) -> None:
        """Remove a take's sound, its codes and its stems. Raises KeyError, or OSError."""
        with self._lock:
            take, all_takes = self.find(id), self._listed().values()
            take.path.unlink(missing_ok=True)
            alone = sum(other.path.stem == take.path.stem for other in all_takes) == 1
            if alone and take.codes:
                take.codes.unlink(missing_ok=True)
            if alone:
                shutil.rmtree(self.stems_folder(take.path), ignore_errors=True)

    def free(self, prompt: str, seed: int, suffix: str = ".wav") -> Path:
        """A path for a new take, called after its prompt and its seed, with a number
        where anything of that name is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = Path(default_name(prompt, seed)).stem
        stems = {name.partition(".")[0] for name in os.listdir(self.folder)}
        name, number = stem, 2
        while name in stems:
            name, number = f"{stem}-{number}", number + 1
        return self.folder / f"{name}{suffix}"

    def stems_folder(self, path: Path) -> Path:
        """Where the stems of a sound file of the folder lie."""
        return self.folder / f"{path.stem}.stems"

    def _listed(self) -> dict[str, Take]:
        """By id what the sound files say, the older first. Of two files with one stem the
        younger one has its whole name for an id."""
        cached, self._cache, found = self._cache, {}, []  # what is gone is forgotten
        for entry in self._sounds():
            try:
                stat = entry.stat()
            except OSError:  # it was removed meanwhile
                continue
            key = (entry.name, stat.st_mtime_ns, stat.st_size)
            take = cached[key] if key in cached else read(Path(entry.path))
            self._cache[key] = take
            if take:
                found.append(take)
        takes: dict[str, Take] = {}
        for take in sorted(found, key=lambda take: (take.made, take.path.name)):
            id = take.path.name if take.path.stem in takes else take.path.stem
            takes[id] = take
        return takes

    def _sounds(self) -> list[os.DirEntry]:
        try:
            entries = [*os.scandir(self.folder)]
        except OSError:  # there is none yet
            return []
        shown = [e for e in entries if not e.name.startswith(".") and is_text(e.name)]
        return [e for e in shown if Path(e.name).suffix.lower() in SUBTYPES]

    def _complete(self, id: str, take: Take, stars: set[str]) -> Take:
        """A take with what is not in its sound file."""
        folder = self.stems_folder(take.path)
        paths = [path for path in folder.glob("*.wav") if lies_in(path, folder)]
        stems = {path.stem: path for path in sorted(paths)}
        beside = dict(codes=codes_beside(take.path), stems=stems)
        return replace(take, id=id, starred=take.path.name in stars, **beside)

    def _stars(self) -> set[str]:
        try:
            names = json.loads((self.folder / STARRED).read_text())
        except (OSError, ValueError):
            return set()
        names = names if isinstance(names, list) else []
        return {name for name in names if isinstance(name, str)}


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Take | None:
    """The take in a sound file, without what lies beside it; None where there is none."""
    try:
        settings = read_settings(path)
    except (OSError, ValueError):
        settings = settings_beside(path)
    if settings is None:
        return None
    try:
        with open_sound(path) as file:
            rate, channels = file.samplerate, file.channels
            seconds = file.frames / rate
        made = path.stat().st_mtime
    except (OSError, ValueError):
        return None
    return Take(path.stem, path, settings, seconds, rate, channels, made)


def is_text(name: str) -> bool:
    """Whether a file's name is one, so that an address and JSON can hold it."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a file that lies in the folder: no pipe, and no link out of it."""
    return path.is_file() and path.resolve().parent == folder.resolve()


def codes_beside(path: Path) -> Path | None:
    """The codes beside a sound file, also where both are links to another folder."""
    codes = path.with_suffix(".safetensors")
    beside = lies_in(codes, path.parent) or lies_in(codes, path.resolve().parent)
    return codes if beside else None


def settings_beside(path: Path) -> dict[str, Any] | None:
    """The settings in the codes beside a sound file that has none itself."""
    codes = codes_beside(path)
    if codes is None:
        return None
    try:
        with safe_open(codes, "numpy") as file:
            return from_comment((file.metadata() or {}).get("settings", ""), codes)
    except (OSError, SafetensorError, ValueError):
        return None
