"""MAGNeT: text -> music, all frames at once, in about fifty passes.

The masked language model over EnCodec codes of Ziv et al.
(https://arxiv.org/abs/2401.04577). Its weights are MusicGen's decoder; what differs is
here. A stage for each codebook begins with all frames masked. Each pass fills in all of
them and then masks again those of which it was least sure, fewer from pass to pass. So a
part in the midst of a take is filled as well as one at the end. From the whole to its
parts: `MAGNeT`; the take that it makes; a stage and its passes; sampling; the masks.
Needs musicgen.py, decoder.py, t5.py, encodec.py, options.py and checkpoints.py beside it;
engine.py, encodec_stream.py and parallel.py to fill the memory and to decode faster; and
prompt.py, and what that needs, to begin with a sound or with codes.

    model = MAGNeT.from_pretrained("magnet-small-10secs")
    audio = model.generate(["happy rock", "calm piano"], seed=0)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from checkpoints import MusicGenConfig, read
from decoder import Condition, Decoder, DecoderConfig
from musicgen import MusicGen, Texts, encode_text, make_sampler, sampling_keys
from options import Options, check_batch_size, check_prompts, is_whole, row_seeds
from t5 import Tokenizer

NEVER = -1e4  # the score of what is not masked again
COLDEST = 0.01  # the temperature at which the annealing ends
PASSES = (20, 10, 10, 10)  # of the four codebooks


@dataclass
class MaskingConfig:
    """How the model was trained, spelled as in audiocraft's settings."""

    span_len: int = 3  # frames that are masked together
    subcodes_context: int = 5  # frames that later codebooks see to either side

    @classmethod
    def from_dict(cls, section: Any) -> "MaskingConfig":
        """Take both. Raises ValueError for what is none."""
        limits = {"span_len": (1, 100), "subcodes_context": (-1, 2**16)}
        if not isinstance(section, dict) or section.keys() != limits.keys():
            raise ValueError(
                f"masking must hold {' and '.join(limits)}, got {section!r:.80}."
            )
        for name, (low, high) in limits.items():
            if not (type(section[name]) is int and low <= section[name] <= high):
                raise ValueError(
                    f"{name} must be from {low} to {high}, got {section[name]!r:.80}."
                )
        return cls(**section)


@dataclass(frozen=True)
class MagnetOptions:
    """What shapes a take, besides its prompt and seed.

    duration: seconds, up to the model's own. None: the model's own.
    temp: sampling temperature of a stage's first pass, which falls to nearly 0; 0 takes
        the likeliest code.
    top_k: draw from this many likeliest codes; 0 is off.
    top_p: draw from the likeliest codes that together reach this probability, instead
        of the top k; 0 is off.
    max_guidance_coef, min_guidance_coef: weight of the text against no text where all
        is masked, and towards which it falls.
    decoding_steps: passes of each codebook.
    span_arrangement: mask "nonoverlap" spans, or "stride1", which begin anywhere.
    negative_prompt: what to move away from, in place of no text.
    """

    duration: float | None = None
    temp: float = 3.0
    top_k: int = 0
    top_p: float = 0.9
    max_guidance_coef: float = 10.0
    min_guidance_coef: float = 1.0
    decoding_steps: tuple[int, ...] = PASSES
    span_arrangement: str = "nonoverlap"
    negative_prompt: str = ""

    copies = 2  # decoder rows that each take needs

    def check(
        self,
        max_duration: float = 30.0,
        frame_rate: int = 50,
        codebooks: int | None = None,
    ) -> None:
        """Raise ValueError, saying what must hold, for what cannot be made. The number
        of codebooks may be known to the model alone."""
        steps, least = self.decoding_steps, 1 / frame_rate
        each = isinstance(steps, list | tuple) and len(steps) == (
            codebooks or len(steps) or 1
        )
        each = each and all(is_whole(n) and 1 <= n <= 1000 for n in steps)
        own = self.duration is None or number(self.duration, least, max_duration)
        longest = (
            f", to the model's own {max_duration:g} s" if max_duration < 1e6 else ""
        )
        count = f"{codebooks} " if codebooks else ""
        arranged = self.span_arrangement in [*ARRANGEMENTS]
        for name, holds, rule in (
            ("duration", own, f"from a frame, 1/{frame_rate} s{longest or ' up'}"),
            ("temp", number(self.temp, 0, 0) or number(self.temp, 1e-3), "0 (greedy) or "
             "0.001 up"),
            ("top_k", is_whole(self.top_k) and 0 <= self.top_k <= 2048, "from 0 (off) "
             "to 2048"),
            ("top_p", number(self.top_p, 0, 1), "between 0 (off) and 1"),
            ("max_guidance_coef", number(self.max_guidance_coef), "a number below 1e6"),
            ("min_guidance_coef", number(self.min_guidance_coef), "a number below 1e6"),
            ("decoding_steps", each, f"{count}numbers of passes, from 1 to 1000"),
            ("span_arrangement", arranged, " or ".join(ARRANGEMENTS)),
            ("negative_prompt", isinstance(self.negative_prompt, str), "a text"),
        ):  # fmt: skip
            if not holds:
                got = repr(getattr(self, name))
                raise ValueError(f"{name} must be {rule}, got {got:.80}.")


def number(value: Any, low: float = -1e6, high: float = 1e6) -> bool:
    """Whether it is real and lies there."""
    return isinstance(value, Real) and type(value) is not bool and low <= value <= high


def load(path_or_repo: str | Path, *how, **options) -> MusicGen:
    """A MAGNeT or a MusicGen, by what the files are; the rest as `from_pretrained`."""
    files = read(str(path_or_repo))
    kind = MusicGen if files.config.masking is None else MAGNeT
    return kind.from_pretrained(path_or_repo, *how, files=files, **options)


class MAGNeT(MusicGen):
    """Text encoder, decoder and codec together, as MusicGen's, and how it was masked."""

    def __init__(self, config: MusicGenConfig, tokenizer: Tokenizer | None):
        if config.masking is None:
            raise ValueError("it is a MusicGen, which musicgen.py loads")
        super().__init__(config, tokenizer)
        self.masking = MaskingConfig.from_dict(config.masking)

    def generate_codes(
        self, prompts: Texts = None, seed: int | list[int] | None = None, **options
    ) -> mx.array:
        """Codes (B, T, K); options as of `steps`. T is a multiple of the length of spans
        where these do not overlap, but for takes that are filled."""
        take = self.steps(prompts, seed=seed, **options)
        for _ in take:
            pass
        return take.codes

    def steps(
        self,
        prompts: Texts = None,
        duration: float | None = None,
        *,
        seed: int | list[int] | None = None,
        audio_prompt: Any = None,
        codes_prompt: mx.array | None = None,
        free: mx.array | None = None,
        batch_size: int | None = None,
        **options,
    ) -> "MagnetTake":
        """Codes while they are made, to be iterated over: under all that generates.

        Args:
            prompts: one text, or several; "" is unconditional.
            duration: seconds, at most the model's own, which None is.
            seed: row i draws from seed + i, or from the i-th of a list; a row's
                codes depend on its own prompt and seed only. None: any.
            audio_prompt: sound (N, C) at `sampling_rate`, or its file, to start with.
            codes_prompt: codes (1, T, K) to start with.
            free: booleans (T,): the frames of `codes_prompt` that are filled, instead
                of what comes after them. All others stay as they are.
            batch_size: rows to run at once; None: as many as memory holds.
            options: the fields of `MagnetOptions`, such as temp and decoding_steps.

        Raises ValueError for what cannot be made.
        """
        K, longest = self.config.decoder.num_codebooks, self.config.max_duration
        if free is not None:
            check_free(free, codes_prompt)
            duration = len(free) / self.frame_rate
        options = MagnetOptions(longest if duration is None else duration, **options)
        options.check(longest, self.frame_rate, K)
        prompts = check_prompts(prompts)
        if any(hasattr(prompt, "sections") for prompt in prompts):
            raise ValueError("A prompt must be one text for MAGNeT, got sections.")
        seeds = row_seeds(seed, len(prompts))
        check_batch_size(batch_size)
        given, T = mx.zeros((1, 0, K), mx.uint32), self.frames_in(options.duration)
        if free is None and options.span_arrangement == "nonoverlap":
            T = whole_spans(T, self.masking.span_len)
        if audio_prompt is not None or codes_prompt is not None:
            from prompt import start_with

            end = (T + (free is not None)) / self.frame_rate
            given = start_with(self, audio_prompt, codes_prompt, end)
        if free is None:
            free = mx.arange(T) >= given.shape[1]
        given = mx.pad(given, [(0, 0), (0, T - given.shape[1]), (0, 0)])
        return MagnetTake(self, prompts, seeds, given, free, batch_size, options)

    def stream(self, *args, **options):
        """Raises ValueError: no frame is there before all are."""
        raise ValueError("MAGNeT makes all frames at once: use generate.")

    def rows_that_fit(self, options: MagnetOptions) -> int:
        """How many prompts memory holds at once; the plain step does not ask."""
        if self.plain:
            return 10_000
        from engine import DECODING_MEMORY, limit_memory, memory_size

        limit_memory()
        frames, size = self.frames_in(options.duration), self.decoder.dtype.size
        room = memory_size() - mx.get_active_memory() - DECODING_MEMORY
        return max(int(room // pass_bytes(self.config.decoder, frames, size)), 1)


def pass_bytes(config: DecoderConfig, frames: int, size: int) -> int:
    """Bytes that a pass over the frames of a take holds at once, in numbers of `size`
    bytes: a layer's states and scores, the logits, and in float32 what is drawn."""
    wide = config.ffn_dim + 8 * config.hidden_size + config.num_attention_heads * frames
    wide += config.num_codebooks * config.vocab_size
    drawn = 6 * 4 * config.vocab_size
    return frames * (MagnetOptions.copies * wide * size + drawn)


def whole_spans(frames: int, length: int) -> int:
    """As many of the frames as spans fill. Raises ValueError where they fill none."""
    if frames < length:
        raise ValueError(
            f"A take must have a span of {length} frames or more where spans do not "
            f"overlap, got {frames}: give a longer duration."
        )
    return frames - frames % length


def check_free(free: mx.array, codes: mx.array | None) -> None:
    """Raise ValueError unless it names some frames (T,) of codes (1, T, K)."""
    frames = getattr(codes, "shape", (0, 0))[1:2]
    fits = isinstance(free, mx.array) and free.dtype == mx.bool_
    if not (fits and free.shape == frames and free.any().item()):
        raise ValueError(
            "free must be booleans, one for each frame of codes_prompt, and some of them "
            "true."
        )


class MagnetTake:
    """Rows of codes while they are made: iterate to make them, a pass at a time.

        take = model.steps("happy rock")
        for _ in take:
            print(take.step, "of", take.total)
        take.codes  # (B, T, K)

    No frame is there before a row's last pass.
    """

    def __init__(
        self,
        model: MAGNeT,
        prompts: list[str],
        seeds: list[int],
        given: mx.array,
        free: mx.array,
        batch_size: int | None,
        options: MagnetOptions,
    ):
        self._model, self._options = model, options
        self.prompts, self._seeds = prompts, seeds
        self._given, self._free = given, free  # (1, T, K) and (T,)
        mx.eval(given, free)  # here, for what is lazy belongs to this thread
        size, rows = batch_size or model.rows_that_fit(options), range(len(prompts))
        self._batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        passes = sum(options.decoding_steps)
        self.step, self.total = 0, passes * len(self._batches)  # made, and in all
        self._finished: list[mx.array] = []

    def __iter__(self) -> Iterator["MagnetTake"]:
        self.step, self._finished, turn = 0, [], object()
        self._turn = turn  # another iteration starts the take anew
        for rows in self._batches:
            for codes in self._passes(rows):
                self.step += 1
                if self.step % sum(self._options.decoding_steps) == 0:
                    self._finished.append(codes)
                yield self
                if self._turn is not turn:
                    raise RuntimeError("This take has been started anew since.")

    def _passes(self, rows: range) -> Iterator[mx.array]:
        """Codes (B, T, K) of some rows after each of their passes."""
        model, options, free = self._model, self._options, self._free
        negative = Options(negative_prompt=options.negative_prompt)
        text = encode_text(model, [self.prompts[row] for row in rows], negative)
        forward = Forward(model.decoder, text, model.masking.subcodes_context)
        spans = ARRANGEMENTS[options.span_arrangement](free, model.masking.span_len)
        seeds = [self._seeds[row] for row in rows]
        keys = iter(sampling_keys(seeds, sum(options.decoding_steps)))
        codes = mx.where(free[:, None], forward.blank, self._given)
        codes = mx.repeat(codes, len(rows), axis=0)
        for stage in range(codes.shape[2]):
            for codes in stage_passes(forward, codes, stage, spans, keys, options):
                yield codes

    @property
    def frames(self) -> int:
        """Frames of the take that there are: all or none."""
        return self.codes.shape[1]

    @property
    def codes(self) -> mx.array:
        """Codes (B, T, K) of the rows that are made; (1, 0, K) before any is."""
        if not self._finished:
            return self._given[:, :0]
        return mx.concatenate(self._finished)


def stage_passes(
    forward: "Forward",
    codes: mx.array,
    stage: int,
    spans: "Spans",
    keys: Iterator[mx.array],
    options: MagnetOptions,
) -> Iterator[mx.array]:
    """Yield codes (B, T, K) after each pass that makes the codebook `stage`.

    All that is masked is made in each pass. The spans of which it was least sure are
    masked again, fewer from pass to pass. 12 frames in spans of 3, 4 passes, a dot is
    masked:

        pass 1  ............ -> abcdefghijkl
        pass 2  ...def...... -> mnodefpqrstu
        pass 3  ...def...stu -> vwxdefyzastu
        pass 4  vwxdef...stu -> vwxdefbcdstu

    MAGNeT paper, section 3.
    """
    count, own = options.decoding_steps[stage], codes[..., stage]
    scores = mx.broadcast_to(mx.where(spans.free, 0.0, NEVER), (len(codes), spans.size))
    for step, share in enumerate(shares(count)):
        again = spans.worst(scores, max(int(share * np.float32(spans.count)), 1))
        own = mx.where(again & spans.free_frames, forward.blank, own)
        masked = own == forward.blank
        logits = guide(forward(put(codes, stage, own), stage), share.item(), options)
        temp = options.temp * (count - 1 - step) / count
        tokens, probs = sample(logits, temp, next(keys), options)
        own = mx.where(masked, tokens, own)
        scores = spans.scores(probs, masked)
        made = put(codes, stage, own)
        mx.async_eval(made, scores)  # the next pass may come from another thread
        yield made


def put(codes: mx.array, stage: int, own: mx.array) -> mx.array:
    """Codes (B, T, K) with those of one codebook, (B, T)."""
    return mx.where(mx.arange(codes.shape[2]) == stage, own[..., None], codes)


def shares(count: int) -> np.ndarray:
    """Of what is to be made, the share that is masked in each pass: a quarter of a
    cosine, in float32. Just below a half or just above makes a span more or less, so
    places (0 to 1) are rounded as torch.linspace does: from both ends, by one step."""
    step, place = float(np.float32(1 / max(count - 1, 1))), np.arange(count)
    places = np.where(place < max(count // 2, 1), place * step, 1 - place[::-1] * step)
    angles = places.astype(np.float32) * np.float32(math.pi / 2)
    return np.cos(angles.astype(np.float64)).astype(np.float32)


class Forward:
    """The decoder under a text, where all frames see each other: no past, no future."""

    def __init__(self, decoder: Decoder, text: Condition, context: int):
        self.decoder, self.context = decoder, context
        self.blank = decoder.config.vocab_size  # where a code is masked
        self.text_kv = decoder.text_kv(text)

    def __call__(self, codes: mx.array, stage: int) -> mx.array:
        """Logits (2 B, T, V) of a codebook's codes: under the text, and without it."""
        rows, no_cache = mx.concatenate([codes, codes]), [None] * len(self.text_kv)
        mask = self.mask(codes.shape[1]) if stage and self.context >= 0 else None
        return self.decoder(rows, self.text_kv, no_cache, mask=mask)[..., stage, :]

    def mask(self, frames: int) -> mx.array:
        """What is added to scores (T, T) of later codebooks, which see the few frames
        around their own: the first codebook has seen all."""
        place = mx.arange(frames)
        far = mx.abs(place[:, None] - place) > self.context
        return mx.where(far, -mx.inf, 0).astype(self.decoder.dtype)


def guide(logits: mx.array, share: float, options: MagnetOptions) -> mx.array:
    """Classifier-free guidance in float32, (2 B, T, V) -> (B, T, V): the less is masked,
    the nearer to its least."""
    text, null = mx.split(logits.astype(mx.float32), 2)
    most, least = options.max_guidance_coef, options.min_guidance_coef
    return null + (text - null) * (share * most + (1 - share) * least)


def sample(
    logits: mx.array, temp: float, key: mx.array, options: MagnetOptions
) -> tuple[mx.array, mx.array]:
    """Tokens (B, T) of logits (B, T, V), and their probabilities, which are those among
    the top k, but not those within the top p, as in audiocraft."""
    temp, V = max(temp, COLDEST), logits.shape[-1]
    probs = mx.softmax(logits / temp, axis=-1)
    if options.temp == 0:
        tokens = mx.argmax(logits, axis=-1)
    else:
        draw = make_sampler(temp, options.top_k or V, options.top_p)
        tokens = draw(logits, key)
    if options.top_p == 0 and 0 < options.top_k < V and options.temp > 0:
        least = mx.partition(probs, V - options.top_k, axis=-1)
        least = least[..., V - options.top_k, None]
        probs = mx.where(probs < least, 0, probs)
        probs = probs / probs.sum(axis=-1, keepdims=True)
    return tokens, mx.take_along_axis(probs, tokens[..., None], axis=-1).squeeze(-1)


class Spans:
    """Frames in spans that lie side by side: "nonoverlap"."""

    def __init__(self, free: mx.array, length: int):
        self.free_frames, self.length = free, length  # booleans (T,)
        self.free = self.group(free[None]).any(axis=-1)[0]  # those that are made
        self.size, self.count = self.free.size, self.free.sum().item()

    def group(self, x: mx.array) -> mx.array:
        """(B, T) -> (B, n, length), the last one filled up with 0."""
        short = -x.shape[1] % self.length
        return mx.pad(x, [(0, 0), (0, short)]).reshape(len(x), -1, self.length)

    def worst(self, scores: mx.array, count: int) -> mx.array:
        """Which frames (B, T) the spans with the highest scores (B, n) hold."""
        rank = mx.argsort(mx.argsort(-scores, axis=-1), axis=-1)
        return mx.repeat(rank < count, self.length, axis=-1)[:, : self.free_frames.size]

    def scores(self, probs: mx.array, masked: mx.array) -> mx.array:
        """How unsure each span (B, n) is, of its tokens' probabilities (B, T). What was
        not masked is not masked again."""
        again = self.group(masked).any(axis=-1)
        return mx.where(again, 1 - self.group(probs).max(axis=-1), NEVER)


class AnySpans:
    """Frames in spans that begin anywhere: "stride1". A score belongs to a frame."""

    def __init__(self, free: mx.array, length: int):
        self.free, self.free_frames = free, free
        self.length = min(length, free.size)
        self.size, self.count = free.size, free.sum().item()

    def worst(self, scores: mx.array, count: int) -> mx.array:
        """Which frames (B, T) to mask, as near to `count` as whole spans come."""
        return mx.array(np.stack([self._worst(row, count) for row in np.array(scores)]))

    def _worst(self, scores: np.ndarray, count: int) -> np.ndarray:
        """The same of a row, by halving. Like audiocraft's it takes the last mask that
        was tried, which may be one frame or two from the nearest."""
        view = np.lib.stride_tricks.sliding_window_view(scores, self.length)
        order = np.argsort(-view.sum(axis=-1), kind="stable")
        count = max(count, self.length)
        low, high = count // self.length, count - self.length + 1
        middle = round(0.5 * (low + high))
        mask = self.cover(order[:middle])
        while low < middle < high:
            mask = self.cover(order[:middle])
            low, high = (low, middle) if mask.sum() > count else (middle, high)
            middle = round(0.5 * (low + high))
        return mask

    def cover(self, starts: np.ndarray) -> np.ndarray:
        """The frames (T,) of spans that begin there."""
        mask = np.zeros(self.size, bool)
        mask[(starts[:, None] + np.arange(self.length)).ravel()] = True
        return mask

    def scores(self, probs: mx.array, masked: mx.array) -> mx.array:
        """How unsure each frame (B, T) is."""
        return mx.where(masked, -mx.log(probs), NEVER)


ARRANGEMENTS = {"nonoverlap": Spans, "stride1": AnySpans}
