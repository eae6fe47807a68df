"""What parts of which take are to be made again, as the flags of generate.py say it.

    args = Namespace(regenerate=["8:12", "take.safetensors"], candidates=None, ...)
    set_edit(args)  # raises ValueError
    args.regenerate.part, args.candidates  # (8.0, 12.0), 8

`--fill` is `--regenerate` by another name. A MusicGen makes one part again, from what
comes before it, and `candidates` of it; a MAGNeT fills in one or several, from both
sides. Stands alone.
"""

import argparse
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

PART = re.compile(r"(\d+(?:\.\d*)?):(\d+(?:\.\d*)?)s?")
CANDIDATES, MOST_CANDIDATES = 8, 64
# Other ways to begin; --again is one, too, but for takes that were filled in.
OTHERS = ("prompts", "resume", "redecode", "best_of", "loop", "decoder")


class Edit(NamedTuple):
    """Parts to be made again, and which take's: codes, or some of a sound file."""

    parts: tuple[tuple[float, float], ...]  # of each its first second and its end
    path: Path
    start: float = 0.0  # seconds
    length: float | None = None  # seconds; None: to the end

    @property
    def part(self) -> tuple[float, float]:
        """The only one. Raises ValueError where there are several."""
        if len(self.parts) > 1:
            raise ValueError(
                f"A MusicGen makes one part again, got {self.name}: give one, or fill "
                "in several with a MAGNeT, such as --model magnet-small-10secs."
            )
        return self.parts[0]

    @property
    def name(self) -> str:
        """Of the parts."""
        return " ".join(f"{first:g}:{end:g}" for first, end in self.parts)


def split(words: list[str]) -> tuple[list[tuple[float, float]], list[str]]:
    """The parts that stand first, and the other words."""
    parts = []
    for i, word in enumerate(words):
        if not (found := PART.fullmatch(word)):
            return parts, words[i:]
        parts.append(tuple(map(float, found.groups())))
    return parts, []


def edited_file(words: list[str] | None) -> list[Path]:
    """The file that --regenerate names after its parts, if it does."""
    parts, files = split(words or [])
    return [Path(os.path.expanduser(word)) for word in files[:1] if parts]


def set_edit(args: argparse.Namespace) -> None:
    """What --regenerate asks for. Raises ValueError for what does not go with it."""
    if not args.regenerate:
        if args.candidates is not None:
            raise ValueError("--candidates needs --regenerate")
        return
    parts, files = split(args.regenerate)
    if not parts:
        raise ValueError(
            "--regenerate, or --fill, needs the part first, such as 8:12 for the seconds 8 to 12, "
            f"got {files[0]!r:.40}"
        )
    if len(files) + bool(args.audio_prompt) != 1:
        raise ValueError(
            "--regenerate needs one take: a file after the part, or --audio-prompt; the "
            "prompt goes to --prompt"
        )
    if args.prompt is None:
        raise ValueError(
            f"{files[0] if files else args.audio_prompt} names no prompt: give --prompt, "
            'which may be ""'
        )
    check_edit(args)
    if not getattr(args, "magnet", None):  # which has no candidates
        args.candidates = count_candidates(args)
    if files:
        args.audio_prompt = files[0]
    sound = (args.prompt_start or 0.0, args.prompt_length)
    place = Path(os.path.expanduser(args.audio_prompt))
    if place.suffix == ".safetensors" and sound != (0.0, None):
        raise ValueError("--prompt-start and --prompt-length need a sound, not codes")
    args.regenerate = Edit(tuple(parts), place, *sound)
    args.audio_prompt = args.prompt_start = args.prompt_length = None


def count_candidates(args: argparse.Namespace) -> int:
    """How many candidates of the part are made. Raises ValueError for too few or many."""
    count = CANDIDATES if args.candidates is None else args.candidates
    if not 1 <= count <= MOST_CANDIDATES:
        raise ValueError(f"--candidates must be 1 to {MOST_CANDIDATES}, got {count}")
    if args.takes > count:
        raise ValueError(f"--takes must be at most the {count} --candidates")
    return count


def check_edit(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go with --regenerate."""
    for name in (*OTHERS, "drop_prompt", "ending", "stream", "tensor_parallel"):
        if getattr(args, name):
            raise ValueError(f"--regenerate goes without --{name.replace('_', '-')}")
    if args.duration is not None:
        raise ValueError("an edit keeps the take's length: leave out --duration")
    if len(args.prompt) > 1:
        raise ValueError("--regenerate takes one prompt; --takes gives the best of it")
    if args.save_codes and args.takes > 1:
        raise ValueError("--save-codes goes with one take")


def check_take(path: Path, record: dict[str, Any]) -> None:
    """Raise ValueError for a take of which no part can be made again, by its settings."""
    if record.get("loop"):
        raise ValueError(
            f"{path!s:.150} is a loop, whose end goes on to its beginning: make a loop "
            "anew with --again and another --seed."
        )
    if record.get("ending") and path.suffix == ".safetensors":
        raise ValueError(
            f"{path!s:.150} holds codes of a take that --ending cut: give the sound file "
            "instead."
        )


def seeds(first: int, count: int, own: object) -> int | list[int]:
    """Of so many candidates, counted up from the first one's, without the take's own,
    which would give the old part back."""
    if own not in range(first, first + count):
        return first
    return [seed for seed in range(first, first + count + 1) if seed != own]


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What of an edit's settings stays in those of a take that is made from its codes."""
    if "regenerated" not in record:
        return {}
    told = {key: record[key] for key in ("regenerated", "part") if key in record}
    return told | dict(part_seed=record.get("part_seed", record.get("seed")))
