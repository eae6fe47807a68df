"""What a job may ask of MAGNeT, of its own and what of MusicGen's.

    is_magnet("magnet-small-10secs")  # True; None where only its files tell
    options = fit(dict(temp=2.0), magnet=True)  # MagnetOptions, with MAGNeT's defaults

A job remembers which options it was given; the others take the defaults of the model
that it meets, which may be known only when it is loaded. What does not apply is refused,
with what does. Needs options.py, hub.py and strict.py beside it; for MAGNeT's options,
magnet.py and what that needs; to look into audiocraft's files, published.py and what
that needs.
"""

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from hub import MAGNETS, MODELS, local
from options import Options
from strict import small_text

if TYPE_CHECKING:
    from magnet import MagnetOptions

COEFS = ("max_guidance_coef", "min_guidance_coef")
MAGNET_KEYS = (*COEFS, "decoding_steps", "span_arrangement")
DRAWING = {  # what one kind of model has otherwise than the other
    *("temp", "top_k", "top_p", "guidance_coef", "extend_stride", *MAGNET_KEYS),
}
REFUSED = {  # settings and flags that are MusicGen's, and what to do
    "stream": "all frames are made at once, so none can be heard before: leave it out, "
    "and give output a file",
    "resume": "its takes have one length: give --fill 8:12 to make a part of one again",
    "tensor_parallel": "it runs in one process: leave it out",
    "adapter": "adapters are trained on MusicGen: take the model of the adapter",
    "candidates": "it ranks none: --takes writes several",
    "melody": "it follows a text alone: take --model melody",
    "notes": "it follows a text alone: take --model melody",
    "style": "it follows a text alone: take --model style",
    "sections": "it takes one text: leave out the times, or take --model small",
    "guidance_coef": f"its guidance falls from one weight to another: give {COEFS[0]} "
    f"and {COEFS[1]}",
    "extend_stride": "no window slides: a take is as long as the model's own, or less",
    "loop": "no end is joined to a beginning: take a MusicGen, such as --model small",
    "ending": "a take is as long as the model's own: fade_out ends it",
    "best_of": "it does not know how likely codes are: give several takes",
}
INSTEAD = {  # MAGNeT's own, and what a MusicGen has
    **dict.fromkeys(COEFS, "give guidance_coef"),
    "decoding_steps": "a MusicGen takes a step for each frame",
    "span_arrangement": "a MusicGen masks nothing",
}
OPTIONS = tuple(field.name for field in fields(Options))


def is_magnet(model: str) -> bool | None:
    """Whether a model is a MAGNeT, by its name or a folder's settings; None where only
    the Hub knows, or the folder is damaged, which is told when it is loaded."""
    names = [name for name, repo in MODELS.items() if model in (name, repo)]
    if not (folder := local(model)):
        return names[0] in MAGNETS if names else None
    try:
        if not (folder / "config.json").is_file():
            from published import is_magnet as is_published_magnet

            return is_published_magnet(folder)
        config = json.loads(small_text(folder / "config.json"))
        return config.get("masking") is not None
    except (AttributeError, OSError, RecursionError, TypeError, ValueError):
        return None


def asked_for(values: dict[str, Any]) -> dict[str, Any]:
    """Of settings or flags those that are given, and that shape the drawing or one of
    the kinds refuses. Raises ValueError for passes that are none."""
    names = [name for name in (*OPTIONS, *MAGNET_KEYS) if values.get(name) is not None]
    names += [name for name in REFUSED if values.get(name) not in (None, False)]
    given = {name: values[name] for name in names}
    if "decoding_steps" in given:
        given["decoding_steps"] = read_passes(given["decoding_steps"])
    return given


def read_passes(value: Any) -> tuple[int, ...]:
    """Passes of each codebook, of a list or of a text such as "20,10,10,10". Raises
    ValueError for what is neither."""
    words = value.split(",") if isinstance(value, str) else value
    try:
        if isinstance(words, list | tuple) and not any(type(w) is float for w in words):
            return tuple(int(word) for word in words)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "decoding_steps must be the passes of each codebook, such as 20,10,10,10, got "
        f"{value!r:.80}."
    )


def refuse(given: dict[str, Any], magnet: bool) -> None:
    """Raise ValueError for the first of what `asked_for` gives that does not apply."""
    for name in given:
        if magnet and name in REFUSED:
            raise ValueError(f"{name} does not apply to MAGNeT: {REFUSED[name]}.")
        if not magnet and name in INSTEAD:
            raise ValueError(f"{name} applies to MAGNeT alone: {INSTEAD[name]}.")


def fit(given: dict[str, Any], magnet: bool | None) -> "Options | MagnetOptions":
    """The options among what `asked_for` gives, the rest by the kind's own defaults. Where
    it is not known yet they are MusicGen's. Raises ValueError for what does not apply.
    """
    if magnet is not None:
        refuse(given, magnet)
    if not magnet:
        return Options(**{name: given[name] for name in OPTIONS if name in given})
    from magnet import MagnetOptions

    names = [field.name for field in fields(MagnetOptions)]
    options = {name: given[name] for name in names if name in given}
    if "top_k" in given:  # which the default of top_p would put out of force
        options = {"top_p": 0.0} | options
    return MagnetOptions(**options)


def options_record(options: "Options | MagnetOptions") -> dict[str, Any]:
    """The options for a file's settings: passes are a text there."""
    told = asdict(options)
    if "decoding_steps" in told:
        told["decoding_steps"] = ",".join(map(str, told["decoding_steps"]))
    return told


def is_of_magnet(settings: dict[str, Any]) -> bool:
    """Whether the settings of a file are those of a MAGNeT's take."""
    return "decoding_steps" in settings
