"""What a caller may ask of MusicGen, and what is said where it cannot be done.

Every option is checked here, once, before anything is computed. Stands alone.
"""

import secrets
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

STYLE_OPTIONS = ("guidance_beta", "style_start", "style_length", "style_quantizers")


@dataclass(frozen=True)
class Options:
    """What shapes a take, besides its prompt and seed.

    duration: seconds; beyond the longest window, one slides. None: the model's own.
    temp: sampling temperature; 0 takes the likeliest code.
    top_k: draw from this many likeliest codes.
    top_p: draw from the likeliest codes that together reach this probability, instead
        of the top k; 0 is off.
    guidance_coef: weight of the text against no text; 1 is the text alone, and runs
        half the rows.
    negative_prompt: what to move away from, in place of no text.
    extend_stride: seconds from one window's start to the next's; what lies between that
        and the window's end begins the next. None: 3/5 of it, and AudioGen's 2.
    guidance_beta: how many times the text counts beside the style. None: they count
        alike.
    style_start, style_length: seconds of the style's excerpt. None: from anywhere on,
        by the seed, and the model's own, 3.
    style_quantizers: how much to keep to the style, 1 to 6. None: the model's own, 3.
    """

    duration: float | None = None
    temp: float = 1.0
    top_k: int = 250
    top_p: float = 0.0
    guidance_coef: float = 3.0
    negative_prompt: str = ""
    extend_stride: float | None = None
    guidance_beta: float | None = None
    style_start: float | None = None
    style_length: float | None = None
    style_quantizers: int | None = None

    @property
    def has_style(self) -> bool:
        """Whether any option of a style is given."""
        return any(getattr(self, name) is not None for name in STYLE_OPTIONS)

    @property
    def copies(self) -> int:
        """Decoder rows that each take needs."""
        return 3 if self.guidance_beta is not None else 1 + (self.guidance_coef != 1)

    def check(self, max_duration: float = 30.0, frame_rate: int = 50) -> None:
        """Raise ValueError, saying what must hold, for what cannot be made."""
        for name in ("duration", "temp", "top_p", "guidance_coef", *STYLE_OPTIONS):
            number = getattr(self, name)
            if not (number is getattr(Options, name) or is_number(number)):
                raise ValueError(
                    f"{name} must be a finite number below 1e6, got {number!r:.80}."
                )
        frame, least, stride = f"1/{frame_rate} s", 1 / frame_rate, self.extend_stride
        slides = stride is None or is_number(stride) and least <= stride < max_duration
        lasts = self.duration is None or self.duration >= least
        several = is_whole(self.top_k) and 1 <= self.top_k <= 2048
        whole = isinstance(self.style_quantizers, Integral | None)
        guided = not self.negative_prompt or self.copies > 1
        longest = f" of {max_duration:g} s" if max_duration < 1e6 else ""
        for name, holds, rule in (
            ("duration", lasts, f"at least a frame, {frame}"),
            ("temp", self.temp == 0 or self.temp >= 1e-3, "0 (greedy) or 0.001 up"),
            ("top_k", several, "from 1 to 2048; for greedy decoding give temp=0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 (off) and 1"),
            ("negative_prompt", isinstance(self.negative_prompt, str), "a text"),
            ("guidance_coef", guided, "other than 1 beside a negative_prompt"),
            ("extend_stride", slides, f"from {frame} to less than a window{longest}"),
            ("style_start", (self.style_start or 0) >= 0, "0 s or more"),
            ("style_quantizers", whole, "whole"),
        ):
            if not holds:
                got = repr(getattr(self, name))
                raise ValueError(f"{name} must be {rule}, got {got:.80}.")


def is_number(value: Any) -> bool:
    """Whether it is real and of a size that float32 can count with."""
    return isinstance(value, Real) and type(value) is not bool and abs(value) < 1e6


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and type(value) is not bool


def check_prompts(prompts: str | list[str]) -> list[str]:
    """A list of at least one text. Raises ValueError for anything else."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    several = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not several or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"There must be a prompt, or a list of them, got {prompts!r:.80}. "
            "An empty text generates freely."
        )
    return list(prompts)


def row_seeds(seed: int | list[int] | None, rows: int) -> list[int]:
    """One seed a row: counted up from `seed`, as listed, or any."""
    if seed is None:
        seed = secrets.randbits(32)
    if is_whole(seed):
        seed = [int(seed) + row for row in range(rows)]
    seeds = list(seed) if isinstance(seed, list | tuple) else []
    if len(seeds) != rows or not all(is_whole(s) and 0 <= s < 2**64 for s in seeds):
        many = f"{rows}, or a list of {rows}" if rows > 1 else "1"
        got = seeds[0] if len(seeds) == rows == 1 else seed
        raise ValueError(f"seed must be a number from 0 to 2**64 - {many}, got {got}.")
    return [int(s) for s in seeds]


def check_batch_size(size: int | None) -> None:
    """Raise ValueError unless it is None or 1 and more."""
    if size is not None and not (is_whole(size) and size > 0):
        raise ValueError(f"batch_size must be 1 or more, got {size!r:.80}.")


DTYPES = {name: getattr(mx, name) for name in ("float16", "bfloat16", "float32")}


def check_dtype(dtype: mx.Dtype | None) -> None:
    """Raise ValueError unless it is None or one that a decoder can have."""
    if dtype is not None and dtype not in [*DTYPES.values()]:
        raise ValueError(f"dtype must be mx.{', mx.'.join(DTYPES)}, got {dtype!r:.80}.")
