"""Strict loading told in a line: what a file lacks, and what has no place in a model.

MLX lists every tensor that does not fit, hundreds at times, by our names. Here the first
one is named, as its file spells it. Stands alone.

    try:
        model.load_weights(weights)
    except ValueError as error:
        raise ValueError(misfit(error)) from error
"""

import re
from collections.abc import Callable


class Misfit(ValueError):
    """A tensor that does not fit: its name, ours, and why, beginning with a verb."""

    def __str__(self) -> str:
        return " ".join(self.args)


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
        return f"{spell(name):.150} {why:.150}"
    text = str(error)
    for pattern, verdict in LISTS:
        if match := re.fullmatch(pattern, text, re.DOTALL):
            first, *others = match[1].split(",\n")
            more = f", and so are {len(others)} more" if verdict == "is missing" else ""
            more = more or f", nor have {len(others)} more"
            return f"{spell(first):.200} {verdict}{more if others else ''}"
    if match := re.fullmatch(SHAPES, text):
        want, got, name = match.groups()
        return f"{spell(name):.180} must have the shape {want}, as laid out here, got {got}"
    return f"{' '.join(text.split()):.300}"
