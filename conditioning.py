"""What a take follows besides its text: a condition made of a sound.

A condition is states (R, L, width) with a mask (R, L) of those that count. A text's are
cross-attended. Where a sound is followed, too, both come before the codes, as a prefix.
A new conditioner is a file of its own, and a function and a line in CONDITIONERS here:

    class LoudnessRequest(NamedTuple):  # what `generate(condition=...)` is given
        audio: mx.array

    @dataclass
    class LoudnessConfig:  # the section "conditioner" of config.json
        kind: str = "loudness"
        width: int = 3  # features of a prefix frame: the decoder's prefix_width

        @classmethod
        def from_dict(cls, section): ...  # from a stranger's file: check it here
        def build(self, codec, max_duration): return LoudnessConditioner(...)

    class LoudnessConditioner(nn.Module):  # its weights lie under "conditioner."
        kind = "loudness"
        uses_seed = False  # whether `prepare` draws by the seed
        longest = 235  # most prefix frames there can be, to estimate memory

        def prepare(self, request, seed, duration): ...
            # once a take: what `frames` and `states` want to know; None for no request
        def frames(self, prepared): ...
            # prefix frames of a take; rows that run together have as many
        def states(self, prepared, start): ...
            # of a list, one a row: values (B, T, width) and mask (B, T). `start` is the
            # sample at which the window begins; None: there is one window
        def null_states(self, shape): ...
            # the same for rows without a sound, which guidance moves away from

melody.py and style.py are such files, and needed beside it for such models, with what
these need; sections.py and beat.py for texts that change. Needs decoder.py and options.py
beside it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from decoder import Condition, stack_rows
from options import STYLE_OPTIONS, Options

if TYPE_CHECKING:
    from checkpoints import MusicGenConfig
    from encodec import Encodec
    from musicgen import MusicGen


def melody_config() -> type:
    from melody import MelodyConfig

    return MelodyConfig


def style_config() -> type:
    from style import StyleConfig

    return StyleConfig


CONDITIONERS = {"melody": melody_config, "style": style_config}


def read_config(settings: dict) -> Any | None:
    """The conditioner's config in a `config.json`, ours or transformers'; None without.

    transformers knows melodies alone. Raises ValueError for a kind that is not known.
    """
    section = settings.get("conditioner")
    if section is None and settings["model_type"] == "musicgen_melody":
        section = settings | {"kind": "melody"}
    elif section is None and settings["decoder"].get("num_chroma"):
        section = settings["decoder"] | {
            "kind": "melody"
        }  # as convert.py wrote it once
    if section is None:
        return None
    kind = section.get("kind") if isinstance(section, dict) else None
    if kind not in [*CONDITIONERS]:
        raise ValueError(
            f"conditioner must be an object of the kind {' or '.join(CONDITIONERS)}, "
            f"got {section!r:.80}."
        )
    return CONDITIONERS[kind]().from_dict(section)


def build(config: "MusicGenConfig", codec: "Encodec") -> nn.Module:
    """The conditioner of a model. Raises ValueError unless the decoder's prefix is as
    wide as its own."""
    width = config.conditioner.width
    if config.decoder.prefix_width != width:
        raise ValueError(
            f"prefix_width must be the conditioner's width, {width}, got "
            f"{config.decoder.prefix_width}."
        )
    return config.conditioner.build(codec, config.max_duration)


def make_requests(
    model: "MusicGen",
    options: Options,
    count: int,
    melody: Any = None,
    style: Any = None,
    condition: Any = None,
    separate: bool = True,
) -> list:
    """What each row's conditioner is asked for; None: nothing to follow.

    Raises ValueError for a kind that the model does not follow, and for options of a
    style without one.
    """
    melodies = one_each("melody", melody, count)
    styles = one_each("style", style, count)
    conditions = one_each("condition", condition, count)
    check_style(options, styles)
    sounds = {"melody": melodies, "style": styles, "condition": conditions}
    given = [k for k, rows in sounds.items() if any(x is not None for x in rows)]
    for kind in given:
        check_follows(model, kind)
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} must not come together.")
    if given == ["melody"]:
        from melody import MelodyRequest

        return each_once(melodies, lambda audio: MelodyRequest(audio, separate))
    if given == ["style"]:
        from style import StyleRequest

        excerpt = (options.style_start, options.style_length, options.style_quantizers)
        return each_once(styles, lambda audio: StyleRequest(audio, *excerpt))
    return conditions


def one_each(name: str, values: Any, count: int) -> list:
    """A value, or None, for each of `count` prompts: as listed, or the same for all."""
    if type(values) not in (list, tuple):  # a request is a NamedTuple
        return [values] * count
    if len(values) != count:
        raise ValueError(
            f"{name} must be one sound, or a list of {count}, one for each prompt, got "
            f"a list of {len(values)}."
        )
    return list(values)


def each_once(sounds: list, request: Callable[[Any], Any]) -> list:
    """A request for each sound; rows that share a sound, or a file, share it."""
    keys = [str(x) if isinstance(x, str | Path) else id(x) for x in sounds]
    requests = {k: None if x is None else request(x) for k, x in zip(keys, sounds)}
    return [requests[k] for k in keys]


def check_follows(model: "MusicGen", kind: str, name: str | None = None) -> None:
    """Raise ValueError, which has the `name` of what was given, unless the model follows
    such sounds: "melody", "style", or "condition" for any."""
    if kind == "condition" and model.conditioner is None:
        raise ValueError("condition must go with a model that follows a sound.")
    followed = getattr(model.conditioner, "kind", "the text alone")
    if kind not in ("condition", followed):
        raise ValueError(
            f"{name or kind} must go with a {kind} model, such as '{kind}', but "
            f"{model.name or 'this model':.100} follows {followed}."
        )


def check_style(options: Options, styles: list) -> None:
    """Raise ValueError for options of a style where a prompt has none."""
    given = [name for name in STYLE_OPTIONS if getattr(options, name) is not None]
    if given and all(style is None for style in styles):
        raise ValueError(f"{', '.join(given)} must come with a style.")
    if options.guidance_beta is not None and any(style is None for style in styles):
        raise ValueError("guidance_beta must come with a style for each prompt.")


class Prefixes:
    """What the rows of a take follow, prepared once, as a prefix for each window."""

    def __init__(
        self, model: "MusicGen", requests: list, seeds: list[int], duration: float
    ):
        self._conditioner, self._tokenizer = model.conditioner, model.tokenizer
        once, self._prepared = {}, []
        for request, seed in zip(requests, seeds):
            key = (id(request), seed if self._conditioner.uses_seed else None)
            if key not in once:
                once[key] = self._conditioner.prepare(request, seed, duration)
            self._prepared.append(once[key])
        mx.eval(self._prepared)  # here, for what is lazy belongs to this thread
        self._slides = model.frames_in(duration) > model.longest_window
        self._hop = model.config.audio_encoder.hop_length

    def group(self, prompts: list[str], negative_prompt: str) -> list[list[int]]:
        """Numbers of the rows whose prefixes, text and all, have one length."""
        groups = {}
        for row, prompt in enumerate(prompts):
            when = ()
            if hasattr(prompt, "sections"):
                from sections import times

                when = times(prompt)
            key = (self.tokens(prompt, negative_prompt), self.frames(row), when)
            groups.setdefault(key, []).append(row)
        return [*groups.values()]

    def tokens(self, prompt: str, negative_prompt: str) -> tuple[int, ...]:
        """Of a row's text, or of the texts of its sections."""
        count = lambda text: len(self._tokenizer.encode(text))  # noqa: E731
        texts = getattr(prompt, "texts", [prompt])
        return (*(max(count(text), count(negative_prompt)) for text in texts),)

    def frames(self, row: int) -> int:
        """Frames of a row's prefix, less its text."""
        return self._conditioner.frames(self._prepared[row])

    def steps(self, rows: list[int], prompts: list[str], negative_prompt: str) -> int:
        """The most that the prefix of such rows takes, text and all."""
        return self.frames(rows[0]) + max(
            self.tokens(prompts[rows[0]], negative_prompt)
        )

    def window(self, rows: list[int], start: int, copies: int) -> Condition:
        """The states of some rows for the window from frame `start` on, and those of
        their `copies` for guidance."""
        prepared = [self._prepared[row] for row in rows]
        place = start * self._hop if self._slides else None
        given = Condition(*self._conditioner.states(prepared, place))
        null = Condition(*self._conditioner.null_states(given.states.shape))
        return stack_rows(
            [given, null] if copies == 2 else [given, given, null][:copies]
        )
