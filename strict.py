"""Strict loading told in a line: what a file lacks, and what has no place in a model.

MLX lists every tensor that does not fit, hundreds at times, by our names. Here the first
one is named, as its file spells it. A name in a file may be of any length, and hold
anything: `in_a_line` cuts what a function raises. Stands alone.

    try:
        model.load_weights(weights)
    except ValueError as error:
        raise ValueError(misfit(error)) from error
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

LONGEST = 370  # characters of a message; with the command before it less than 400


def one_line(message: object) -> str:
    """A message on one line, cut in the middle where it is long. What a terminal would
    obey, or cannot show, is spelled out: texts from files may hold anything."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(str(message).split())
    )
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} ... {text[5 - LONGEST // 3 :]}"
    return text


def small_text(path: Path, most: int = 2**26) -> str:
    """The text of a file that is small where it is what it says, such as a config.json.
    Raises ValueError for a larger one, which memory might not hold, and as `read_text`.
    """
    if (size := path.stat().st_size) > most:
        raise ValueError(
            f"it must be at most {most >> 20} MB, but has {size >> 20} MB."
        )
    return path.read_text(encoding="utf-8")


def in_a_line(function: Callable) -> Callable:
    """A function whose ValueError or OSError is told by `one_line`."""

    @functools.wraps(function)
    def told(*args, **options):
        try:
            return function(*args, **options)
        except (OSError, ValueError) as error:
            if len(error.args) == 1 and isinstance(error.args[0], str):
                error.args = (one_line(error.args[0]),)
            elif isinstance(getattr(error, "filename", None), str):  # of the system
                error.filename = f"{one_line(error.filename):.300}"
            raise

    return told


class Misfit(ValueError):
    """A tensor that does not fit: its name, ours, and why, beginning with a verb."""

    def __str__(self) -> str:
        return one_line(" ".join(self.args))


LISTS = (  # what MLX says -> what is said of the first tensor
    (r"Missing \d+ parameters: \n(.*)\.", "is missing"),
    (r"Received \d+ parameters not in model: \n(.*)\.", "has no place in this model"),
)
SHAPES = r"Expected shape (\(.*\)) but received shape (\(.*\)) for parameter (.*)"


def misfit(error: Exception, spell: Callable[[str], str] = str) -> str:
    """Why `load_weights`, or what prepares for it, failed: one line of at most 300
    characters.

    `spell` gives the name of a tensor, ours, as it is in its file, and may name the file.
    """
    if isinstance(error, Misfit):
        name, why = error.args
        return one_line(f"{one_line(spell(name)):.150} {one_line(why):.150}")
    text = str(error)
    for pattern, verdict in LISTS:
        if match := re.fullmatch(pattern, text, re.DOTALL):
            first, *others = match[1].split(",\n")
            more = f", and so are {len(others)} more" if verdict == "is missing" else ""
            more = more or f", nor have {len(others)} more"
            return one_line(
                f"{one_line(spell(first)):.200} {verdict}{more if others else ''}"
            )
    if match := re.fullmatch(SHAPES, text):
        want, got, name = match.groups()
        told = f"must have the shape {want}, as laid out here, got {got}"
        return one_line(f"{one_line(spell(name)):.180} {told}")
    return f"{one_line(text):.300}"
