"""How likely codes are: what ranks takes, and cuts of takes.

    log_p = log_likelihood(model, "happy rock", codes)  # (B, T, K) -> (B,), per code
    log_p = log_likelihood(model, "happy rock", codes, first=600, last=850)
    scores = text_scores(model, "happy rock", codes)  # how well they follow the text
    best_first = order(scores)  # [2, 0, 1]
    best = best_of(model, "happy rock", 8, duration=8.0, seed=0)  # codes, scores, seeds

The codes are teacher-forced: the decoder is given them all at once, and asked for each
how likely it was after those before it. All are means per code, in nats, so that parts
of different lengths compare; times `(last - first) * K` they are sums. Needs
musicgen.py, decoder.py, t5.py, encodec.py, options.py, checkpoints.py, prompt.py,
audio.py, resample.py and outputs.py beside it; sections.py and beat.py for texts that
change; conditioning.py, and melody.py or style.py with what these need, for models that
follow a sound; textless.py for those without text.
"""

from typing import Any, NamedTuple

import mlx.core as mx

from decoder import Condition, Decoder
from musicgen import MusicGen, delay, delay_mask, encode_text
from options import Options, check_batch_size, check_prompts, is_whole, row_seeds
from prompt import check_codes

PIECE = 100  # steps whose logits are in memory at once
MOST = 64  # takes of which the best is chosen
Texts = list[tuple[int, Condition]]  # the frame from which on, and the text


class Window(NamedTuple):
    """Frames that the decoder is given at once, of which the last ones count."""

    start: int
    first: int  # that counts
    end: int


def log_likelihood(
    model: MusicGen,
    prompts: str | list[str],
    codes: mx.array,
    first: int = 0,
    last: int | None = None,
    *,
    null: bool = False,
    seed: int | list[int] | None = 0,
    melody: Any = None,
    separate: bool = True,
    style: Any = None,
    condition: Any = None,
    batch_size: int | None = None,
    **options,
) -> mx.array:
    """Log-likelihood of frames of codes (B, T, K): (B,) float32, the mean per code, in
    nats.

    Args:
        prompts: a text for all rows, or one each, or `sections.Sections`. A frame's
            text is its section's; a fade counts as a switch.
        first, last: the frames from `first` on, less those from `last` on; None: all.
            They are given what stands before them in the longest window that ends at
            `last`. What that does not reach is counted in windows before it.
        null: without text and sound, as in the rows that guidance moves away from.
        seed, melody, separate, style, condition, options: as of `MusicGen.steps`. The
            duration, and what concerns drawing, such as temp or guidance_coef, change
            nothing.
        batch_size: rows to run at once; None: as many as memory holds.

    Raises ValueError for codes that are not the model's, for frames that they have not,
    and for a MAGNeT, which makes no frame after the other.
    """
    check_autoregressive(model)
    check_codes(model, codes)
    B, T, K = codes.shape
    last = T if last is None else last
    if not 0 <= first < last <= T:
        raise ValueError(
            f"The frames must be some of the {T} that there are, got {first} to {last}."
        )
    prompts = check_prompts([prompts] * B if isinstance(prompts, str) else prompts)
    if len(prompts) != B:
        raise ValueError(f"There must be {B} prompts, one for each row of codes.")
    check_batch_size(batch_size)
    options = Options(**options | dict(duration=T / model.frame_rate))
    if model.config.text_encoder is None:
        from textless import without_text

        options = without_text(model.name, prompts, options)
    sounds = (melody, style, condition, separate)
    prefixes = make_prefixes(model, options, row_seeds(seed, B), *sounds)
    spans = windows_back(first, last, model.longest_window, context(model))
    rows_at_once = batch_size or rows_that_fit(model, options)
    sums = [mx.zeros(())] * B
    for rows in batches(prompts, prefixes, rows_at_once):
        texts = section_texts(model, [prompts[row] for row in rows], null)
        for window in spans:
            sound = prefixes and prefixes.window(rows, window.start, 2)
            if sound:
                half = slice(len(rows), None) if null else slice(len(rows))
                sound = Condition(*(x[half] for x in sound))
            batch = codes[mx.array(rows)].astype(mx.uint32)
            logs = window_logs(model, batch, window, texts, sound)
            for row, log in zip(rows, logs):
                sums[row] = sums[row] + log
    return mx.stack(sums) / ((last - first) * K)


def text_scores(
    model: MusicGen,
    prompts: str | list[str],
    codes: mx.array,
    first: int = 0,
    **options,
) -> mx.array:
    """How well codes (B, T, K) follow their prompts: (B,), log p(codes | text) less
    log p(codes), of the frames from `first` on.

    A sound that is followed counts as the text does. Options as of `log_likelihood`.
    Raises ValueError for a model without text.
    """
    check_has_text(model)
    given = log_likelihood(model, prompts, codes, first, **options)
    return given - log_likelihood(model, prompts, codes, first, null=True, **options)


class Ranked(NamedTuple):
    """Takes of one prompt, the best first."""

    codes: mx.array  # (N, T, K)
    scores: list[float]  # as of `text_scores`
    seeds: list[int]


def best_of(
    model: MusicGen,
    prompt: str,
    count: int,
    duration: float | None = None,
    *,
    seed: int | list[int] | None = None,
    audio_prompt: Any = None,
    codes_prompt: mx.array | None = None,
    rank: str = "text",
    **options,
) -> Ranked:
    """So many takes of a prompt, ranked by one of RANKS, less what they start with.
    Options as of `MusicGen.steps`.

    Raises ValueError for what cannot be made, and for a model without text.
    """
    check_best_of(model, count, rank)
    starts, seeds = dict(codes_prompt=codes_prompt), row_seeds(seed, count)
    if audio_prompt is not None:
        starts |= dict(audio_prompt=audio_prompt)
    how = dict(seed=seeds, **options)
    take = model.steps([prompt] * count, duration, **starts, **how)
    first = take.frames
    for _ in take:
        pass
    scores = RANKS[rank](model, prompt, take.codes, first, **how)
    best = order(scores)
    codes, scores = take.codes[mx.array(best)], scores.tolist()
    return Ranked(codes, [scores[i] for i in best], [seeds[i] for i in best])


RANKS = {  # how much likelier the text makes the codes, or how likely it makes them
    "text": text_scores,
    "likelihood": log_likelihood,
}


def check_best_of(model: MusicGen, count: int, rank: str = "text") -> None:
    """Raise ValueError unless so many takes of the model can be ranked so."""
    if rank not in [*RANKS]:
        raise ValueError(f"rank must be one of {', '.join(RANKS)}, got {rank!r:.40}.")
    if not (is_whole(count) and 1 <= count <= MOST):
        raise ValueError(f"best_of must be from 1 to {MOST}, got {count!r:.40}.")
    check_autoregressive(model)
    if rank == "text":
        check_has_text(model)


def check_autoregressive(model: MusicGen) -> None:
    """Raise ValueError for a model that makes no frame after the other."""
    if model.config.masking is not None:
        raise ValueError(
            f"{model.name or 'This model':.100} is a MAGNeT, which does not know how "
            "likely codes are after those before them: take a MusicGen."
        )


def check_has_text(model: MusicGen) -> None:
    if model.config.text_encoder is None:
        raise ValueError(
            f"{model.name or 'This model':.100} follows no text, so that its takes "
            "cannot be ranked by how well they do: give rank likelihood."
        )


def order(scores: mx.array | list[float]) -> list[int]:
    """Numbers of the rows, the highest score first; of equal ones the first."""
    scores = scores.tolist() if isinstance(scores, mx.array) else scores
    return sorted(range(len(scores)), key=lambda row: -scores[row])


def context(model: MusicGen) -> int:
    """Frames before those that count, in a window that does not begin with the take:
    as in a take whose window slides."""
    stride = model.config.default_stride or 0.6 * model.config.max_duration
    return model.longest_window - model.frames_in(stride)


def windows_back(first: int, last: int, longest: int, before: int) -> list[Window]:
    """Windows of up to `longest` frames, from the one that ends at `last` back, until
    frame `first` counts. At least `before` frames stand before those that count, unless
    the take begins there:

        ....####        # counts, . is given
            ....####

    """
    found = []
    while first < last:
        start = max(last - longest, 0)
        counts = max(first, start + before) if start else first
        found.append(Window(start, counts, last))
        last = counts
    return found


def make_prefixes(
    model: MusicGen,
    options: Options,
    seeds: list[int],
    melody: Any,
    style: Any,
    condition: Any,
    separate: bool,
) -> Any:
    """What the rows follow besides their text; None in a model that follows no sound."""
    sounds = (melody, style, condition)
    given = options.has_style or any(sound is not None for sound in sounds)
    if model.conditioner is None and not given:
        return None
    from conditioning import Prefixes, make_requests

    requests = make_requests(model, options, len(seeds), *sounds, separate)
    return Prefixes(model, requests, seeds, options.duration)


def rows_that_fit(model: MusicGen, options: Options) -> int:
    """How many rows memory holds at once."""
    return model.rows_that_fit(Options(options.duration, guidance_coef=1.0))


def batches(prompts: list[str], prefixes: Any, size: int) -> list[list[int]]:
    """Numbers of the rows that run together, as in a take."""
    groups = [range(len(prompts))]
    if prefixes:
        groups = prefixes.group(prompts, "")
    elif any(hasattr(prompt, "sections") for prompt in prompts):
        from sections import group

        groups, _ = group(prompts, size)
    return [
        list(rows[start : start + size])
        for rows in groups
        for start in range(0, len(rows), size)
    ]


def section_texts(model: MusicGen, prompts: list[str], null: bool) -> Texts:
    """The text of each section of prompts that run together; a plain one is one from
    frame 0 on. `null`: as many states, none of which counts."""
    parts = [getattr(prompt, "sections", [(0.0, prompt)]) for prompt in prompts]
    texts = []
    for section in zip(*parts):
        text = encode_text(model, [words for _, words in section], Options())
        text = Condition(*(x[: len(prompts)] for x in text))
        text = Condition(*map(mx.zeros_like, text)) if null else text
        texts.append((model.frames_in(section[0][0]), text))
    mx.eval([text for _, text in texts])
    return texts


def window_logs(
    model: MusicGen, codes: mx.array, window: Window, texts: Texts, sound: Any
) -> mx.array:
    """Sums (R,) of the log-likelihoods of a window's frames that count.

    Those of a section are computed with no text after its own, as they were made.
    """
    (start, first, end), total = window, mx.zeros(len(codes))
    ends = [frame for frame, _ in texts[1:]] + [end]
    for i, ((begin, text), after) in enumerate(zip(texts, ends)):
        begin, after = max(begin, first), min(after, end)
        if begin >= after:
            continue
        if sound is None:
            steps = [(max(frame - start, 0), text) for frame, text in texts[: i + 1]]
            prefix = None
        else:  # the text is a part of the prefix
            steps, prefix = [(0, text)], model.decoder.prefix(sound, text)
        part = codes[:, start:end]
        counts = (begin - start, after - start)
        total = total + forced_logs(model.decoder, part, counts, steps, prefix)
    return total


def forced_logs(
    decoder: Decoder,
    codes: mx.array,
    counts: tuple[int, int],
    texts: Texts,
    prefix: mx.array | None,
) -> mx.array:
    """Sums (R,) of log p of the frames `counts`, from and to, of codes (R, T, K), which
    are a window; each step under the text of its frame."""
    config, (R, T, _) = decoder.config, codes.shape
    first, end = counts
    delays, blank, S = config.delays, config.vocab_size, end + max(config.delays)
    wanted = delay(codes, delays, T, blank)[:, :S]  # (R, S, K)
    free = delay_mask(end, delays, start=first)[:S]  # (S, K)
    nothing = mx.full((R, 1, len(delays)), blank, wanted.dtype)
    tokens = mx.concatenate([nothing, wanted[:, :-1]], axis=1)
    wanted = mx.where(free, wanted, 0)
    texts = [(step, decoder.text_kv(text)) for step, text in texts]
    cache = decoder.make_cache(R, S + (0 if prefix is None else prefix.shape[1]))
    total = mx.zeros(R)
    for a, b in pieces(S, [step for step, _ in texts]):
        text_kv = [kv for step, kv in texts if step <= a][-1]
        logits = decoder(tokens[:, a:b], text_kv, cache, prefix).astype(mx.float32)
        found = mx.take_along_axis(logits, wanted[:, a:b, :, None], axis=-1)[..., 0]
        logs = found - mx.logsumexp(logits, axis=-1)  # (R, b - a, K)
        total = total + mx.where(free[a:b], logs, 0).sum(axis=(1, 2))
        mx.eval(total)
        prefix = None
    return total


def pieces(steps: int, cuts: list[int]) -> list[tuple[int, int]]:
    """So many steps in pieces that end at the cuts, and are never longer than PIECE."""
    ends = sorted({*range(0, steps, PIECE), steps, *(c for c in cuts if c < steps)})
    return list(zip(ends, ends[1:]))
