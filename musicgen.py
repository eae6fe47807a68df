"""MusicGen: text -> music.

The single-stage language model over EnCodec codes of Copet et al.
(https://arxiv.org/abs/2306.05284): a decoder that attends a text and writes K codes for
every frame of 20 ms, the k-th codebook a little later than the first. From the whole to
its parts: `MusicGen`, text encoder, decoder and codec together; the take that it makes;
the loop (`generate_step`), guidance and sampling; the delay pattern. Needs decoder.py,
t5.py, encodec.py, options.py and checkpoints.py beside it. Beside them, engine.py,
encodec_stream.py and parallel.py make it faster. To begin with a sound, prompt.py and
what that needs are needed; to follow one, conditioning.py; for texts that change,
sections.py and beat.py; quantize.py; textless.py.

    model = MusicGen.from_pretrained("stereo-small")
    audio = model.generate(["happy rock", "calm piano"], duration=8.0, seed=0)
    save_audio("out.wav", audio[0], model.sampling_rate)  # of audio.py
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from checkpoints import Checkpoint, MusicGenConfig, read
from decoder import Condition, Decoder, DecoderConfig, stack_rows
from encodec import Encodec, by_channel
from options import Options, check_batch_size, check_dtype, check_prompts, row_seeds
from t5 import T5, Tokenizer

TWINS = ("engine.py", "encodec_stream.py", "parallel.py")  # what makes it faster
Seconds = float | None  # None: the model's own, 8, and AudioGen's 5
Window = tuple[int, int, int]  # first frame, where the loop stops, end
Texts = str | list[str] | None  # None: the model knows no text


class MusicGen(nn.Module):
    """Text encoder, decoder and codec together."""

    # True: the plain step and the plain decode run, as they do without the twins.
    plain = not all(Path(__file__).with_name(name).is_file() for name in TWINS)

    def __init__(self, config: MusicGenConfig, tokenizer: Tokenizer | None):
        super().__init__()
        if config.masking is not None and type(self) is MusicGen:
            raise ValueError("it is a MAGNeT, not a MusicGen: magnet.load takes both")
        self.config, self.tokenizer, text = config, tokenizer, config.text_encoder
        self.text_encoder = text and T5(text)
        self.decoder = Decoder(config.decoder, text.d_model if text else 0)
        self.audio_encoder = Encodec(config.audio_encoder)
        self.conditioner = None
        if config.conditioner:
            from conditioning import build

            self.conditioner = build(config, self.audio_encoder)
        if config.quantization is not None:
            from quantize import quantize

            quantize(self.decoder, **config.quantization)
        self.name, self.revision = "", None  # that from_pretrained loaded
        self._adapter: dict[str, Any] = {}  # its file and scale, if there is one
        self.read_text_encoder: Callable[[], dict] | None = None  # after it was freed

    def __repr__(self) -> str:
        kind, dtype = type(self).__name__, str(self.decoder.dtype).split(".")[-1]
        return f"{kind}({self.name!r}, {dtype}, channels={self.channels})"

    @property
    def sampling_rate(self) -> int:
        """Samples per second."""
        return self.audio_encoder.sampling_rate

    @property
    def frame_rate(self) -> int:
        """Frames per second."""
        return self.config.audio_encoder.frame_rate

    @property
    def channels(self) -> int:
        """Audio channels: 1, or 2 in the stereo models."""
        return self.config.decoder.audio_channels

    @property
    def longest_window(self) -> int:
        """Frames of the longest audio that the decoder was trained on."""
        return self.frames_in(self.config.max_duration)

    def frames_in(self, seconds: float) -> int:
        """Whole frames. 2.3 s are 115, though 2.3 * 50 is less, for it is rounded."""
        near = round(frames := seconds * self.frame_rate)
        return near if math.isclose(frames, near, rel_tol=1e-12) else int(frames)

    @property
    def adapter(self) -> dict[str, Any]:
        """File and scale of the adapter, by these names; empty without one."""
        return self._adapter

    def generate(
        self,
        prompts: Texts = None,
        duration: Seconds = None,
        *,
        drop_prompt: bool = False,
        **options,
    ) -> mx.array:
        """Music for each prompt: (B, N, C) float32 samples in about -1 to 1.

        Takes the options of `steps`: seed, audio_prompt, codes_prompt, melody, separate,
        style, condition, batch_size; and of `Options`: temp=1.0, top_k=250, top_p=0.0,
        guidance_coef=3.0, negative_prompt="", extend_stride, guidance_beta, style_start,
        style_length, style_quantizers. `drop_prompt` leaves out what `audio_prompt` gave.
        """
        if drop_prompt:
            from prompt import generate_rest

            return generate_rest(self, prompts, duration, **options)
        audio = self.decode(self.generate_codes(prompts, duration=duration, **options))
        mx.eval(audio)
        return audio

    def generate_codes(
        self, prompts: Texts = None, duration: Seconds = None, **options
    ) -> mx.array:
        """Codes (B, T, K), T = frames_in(duration); options as of `steps`."""
        take = self.steps(prompts, duration, **options)
        for _ in take:
            pass
        return take.codes

    def stream(
        self,
        prompt: str | None = None,
        duration: Seconds = None,
        *,
        chunk: float = 0.5,
        **options,
    ) -> Iterator[mx.array]:
        """The samples that `generate` gives for one prompt, while they are made.

        Yields arrays (N, C) of about `chunk` seconds; a sample waits for delay pattern
        and look-ahead of the codec, together 0.135 s at 32 kHz. Options as of `steps`.
        """
        from encodec_stream import play_prompt

        return play_prompt(self, prompt, duration, chunk, **options)

    def steps(
        self,
        prompts: Texts = None,
        duration: Seconds = None,
        *,
        seed: int | list[int] | None = None,
        audio_prompt: mx.array | str | Path | None = None,
        codes_prompt: mx.array | None = None,
        melody: Any = None,
        separate: bool = True,
        style: Any = None,
        condition: Any = None,
        batch_size: int | None = None,
        **options,
    ) -> "Take":
        """Codes while they are made, to be iterated over: under all that generates.

        Args:
            prompts: one text, Sections, or several; "" is unconditional. None: no text.
            duration: seconds. Beyond the longest window, one slides. None: the model's.
            seed: row i draws from seed + i, or from the i-th of a list; a row's
                codes depend on its own prompt and seed only. None: any.
            audio_prompt: sound (N, C) at `sampling_rate`, or its file, to start with.
            codes_prompt: codes (1, T, K) to start with, such as a stopped take's.
            melody: such a sound, or file, whose tune a melody model follows, or one or
                None for each prompt. Repeated where it is too short.
            separate: take drums and bass away from it first, with Demucs.
            style: likewise, in whose manner a style model plays.
            condition: such a request to the conditioner, in place of either.
            batch_size: rows to run at once; None: as many as memory holds.
            options: the fields of `options.Options`, such as temp and top_k.

        Raises ValueError for what cannot be made.
        """
        duration = self.config.default_duration if duration is None else duration
        options = Options(duration, **options)
        options.check(self.config.max_duration, self.frame_rate)
        if self.config.text_encoder is None:
            from textless import without_text

            prompts, options = without_text(self.name, prompts, options)
        prompts = check_prompts(prompts)
        seeds = row_seeds(seed, len(prompts))
        check_batch_size(batch_size)
        prompt_codes = mx.zeros((1, 0, self.config.decoder.num_codebooks), mx.uint32)
        if audio_prompt is not None or codes_prompt is not None:
            from prompt import start_with

            prompt_codes = start_with(self, audio_prompt, codes_prompt, duration)
        prefixes, sounds = None, (melody, style, condition)
        if options.has_style or any(x is not None for x in (self.conditioner, *sounds)):
            from conditioning import Prefixes, make_requests

            requests = make_requests(self, options, len(prompts), *sounds, separate)
            if self.conditioner is not None:
                prefixes = Prefixes(self, requests, seeds, duration)
        return Take(self, prompts, seeds, prompt_codes, prefixes, batch_size, options)

    def make_forward(
        self, text: Condition, copies: int, steps: int
    ) -> Callable[[mx.array], mx.array]:
        """The decoder under a text, to be called as `PlainStep`. It may free T5."""
        if self.plain:
            return PlainStep(self.decoder, text, copies, steps)
        from engine import Engine, make_room

        make_room(self, text, steps)
        return Engine(self.decoder, text, copies, steps)

    def rows_that_fit(self, options: Options) -> int:
        """How many prompts memory holds at once; the plain step does not ask."""
        if self.plain:
            return 10_000
        from engine import rows_that_fit

        return rows_that_fit(self, options)

    def decode(self, codes: mx.array) -> mx.array:
        """Samples (B, N, C) of codes (B, T, K), else ValueError; N = T * hop_length."""
        shape, K = getattr(codes, "shape", ()), self.config.decoder.num_codebooks
        if len(shape) != 3 or shape[2] != K:
            raise ValueError(f"codes must have the shape (B, T, {K}), got {shape}.")
        norm = self.config.audio_encoder.norm_type
        if self.plain or norm != "weight_norm":  # group norm looks at all samples
            return by_channel(self.audio_encoder.decode_chunk, codes, self.channels)
        from encodec_stream import DecodingStream

        push = DecodingStream(self.audio_encoder).push
        return by_channel(lambda rows: push(rows, last=True), codes, self.channels)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        dtype: mx.Dtype | None = None,
        q_bits: int | None = None,
        q_group_size: int | None = None,
        lazy: bool = False,
        group: mx.distributed.Group | None = None,
        adapter: str | Path | list[str | Path] | None = None,
        adapter_scale: float | list[float] = 1.0,
        q_mode: str | None = None,
        files: Checkpoint | None = None,
    ) -> "MusicGen":
        """Load a model: a short name ("small"), a Hub id or a folder of any layout.

        `dtype` is the decoder's: by default float32 on the CPU, on a GPU what
        `convert.py` wrote, else float16. T5 and codec are always float32. `q_bits` or
        `q_mode` quantizes the decoder's layers, unless the folder holds them so. `lazy`
        reads weights when they are needed. `group` shares the layers among processes,
        which must all generate the same. `adapter` (or a list) is a file of `train.py
        lora`, PEFT's folder or Hub id. `files` were read. Raises ValueError or OSError.
        """
        check_dtype(dtype)
        changes = (q_bits, q_group_size, q_mode, group, adapter)
        adjust = lambda model, dtype: model.decoder.set_dtype(dtype)  # noqa: E731
        if any(x is not None for x in changes) or adapter_scale != 1:
            from engine import adjustment

            adjust = adjustment(*changes, adapter_scale)
        files, on_cpu = files or read(str(path_or_repo)), mx.default_device() == mx.cpu
        try:
            model = cls(files.config, files.tokenizer)
            model.load_weights(list(files.weights.items()))
            files.weights.clear()  # so that what is cast or quantized goes
        except (TypeError, ValueError) as error:
            raise ValueError(files.misfit(error)) from error
        model.name, model.revision = str(path_or_repo), files.revision
        model.read_text_encoder = files.read_text_encoder
        adjust(model, dtype or (mx.float32 if on_cpu else files.dtype))
        if not lazy:
            model.read_now()
        return model

    def read_now(self) -> None:
        """Read the weights that are still lazy. Raises ValueError where that fails."""
        try:
            mx.eval(self.state)
        except RuntimeError as error:
            raise ValueError(f"{self.name} cannot be read: {error}") from error
        if mx.default_device() == mx.cpu and not self.plain:
            from engine import store_columns

            store_columns(self.decoder)


def encode_text(
    model: MusicGen, prompts: list[str], options: Options = Options()
) -> Condition:
    """T5's states of the prompts, with the rows that guidance needs after them.

    In a row of an empty prompt nothing is attended, nor in null rows, which hold the
    negative prompt if there is one. Longer prompts than T5 knows lose their end, with a
    warning.
    """
    if model.config.text_encoder is None:
        empty = mx.zeros((len(prompts), 1, 1), mx.bool_)
        return Condition(empty, empty[..., 0])
    if (encoder := model.text_encoder) is None:  # another thread may free it again
        encoder = T5(model.config.text_encoder)
        mx.eval(encoder.load_weights(list(model.read_text_encoder().items())).state)
        model.text_encoder = encoder
    count, negative = len(prompts), options.negative_prompt
    texts = [*prompts, negative] if negative else prompts
    ids = [model.tokenizer.encode(text) for text in texts]
    longest = model.config.text_encoder.n_positions
    for i, row in enumerate(ids):
        if len(row) > longest:
            which = f"Prompt {i + 1}" if i < count else "The negative prompt"
            warnings.warn(
                f"{which} has {len(row)} tokens; T5 takes {longest}, so the rest is left "
                "out."
            )
            ids[i] = row[: longest - 1] + row[-1:]  # which ends the text
    states, mask = encoder.encode(ids)
    mask = mask & mx.array([text != "" for text in texts])[:, None]
    text = Condition(states[:count], mask[:count])
    null = Condition(*map(mx.zeros_like, text))
    rows = [text, null, null][: options.copies]
    if negative:
        rows[-1] = Condition(*(mx.repeat(x[-1:], count, 0) for x in (states, mask)))
    return stack_rows(rows)


class Take:
    """Rows of codes that are made while one iterates, a decoder step at a time.

        take = model.steps("happy rock", duration=30)
        for _ in take:
            print(take.step, "of", take.total)
        take.codes  # (B, T, K)

    Where the loop is left early, `codes` are the whole frames that there are.
    """

    def __init__(
        self,
        model: MusicGen,
        prompts: list[str],
        seeds: list[int],
        prompt_codes: mx.array,
        prefixes: Any,
        batch_size: int | None,
        options: Options,
    ):
        self._model, self._options, self._prefixes = model, options, prefixes
        self.prompts, self._seeds, self._prompt_codes = prompts, seeds, prompt_codes
        T, self._delays = prompt_codes.shape[1], model.config.decoder.delays
        self._frames = model.frames_in(options.duration)
        own = model.config.default_stride or 0.6 * model.config.max_duration
        stride = model.frames_in(options.extend_stride or own)
        self._sizes = model.longest_window, stride
        size, groups = batch_size or model.rows_that_fit(options), [range(len(prompts))]
        if prefixes:  # which must be of one length
            groups = prefixes.group(prompts, options.negative_prompt)
        elif any(hasattr(prompt, "sections") for prompt in prompts):
            from sections import group

            groups, size = group(prompts, size)
        self._batches = [
            list(rows[start : start + size])
            for rows in groups
            for start in range(0, len(rows), size)
        ]
        passes = sum(len(self._plan(rows)) for rows in self._batches)
        steps = (self._frames - T) * len(self._batches) + max(self._delays) * passes
        self.step, self.total = 0, steps  # steps made, and in all
        self._finished: dict[int, mx.array] = {}  # rows of earlier batches
        self._open(self._batches[0])

    def _open(self, rows: list[int]) -> None:
        self._rows, self._start = rows, 0
        self._past = mx.repeat(self._prompt_codes, len(rows), axis=0)  # windows before
        mx.eval(self._past)  # here, for what is lazy belongs to this thread
        self._columns: list[mx.array] = []  # of this window, delayed
        self._width = 0  # how many columns

    def __iter__(self) -> Iterator["Take"]:
        self.step, self._finished, turn = 0, {}, object()
        self._turn = turn  # another iteration starts the take anew
        sample = make_step_sampler(self._options)
        for rows in self._batches:
            self._open(rows)
            plan = self._plan(rows)
            forward = self._forward(rows, plan)
            seeds = [self._seeds[row] for row in rows]
            keys = sampling_keys(seeds, self._frames + max(self._delays))
            for window in plan:
                sound = None
                if self._prefixes:
                    sound = self._prefixes.window(rows, window[0], self._options.copies)
                forward.rewind(sound)
                for _ in self._window(window, forward, sample, keys):
                    yield self
                    if self._turn is not turn:
                        raise RuntimeError("This take has been started anew since.")
            mx.eval(codes := [*self._past])
            self._finished |= zip(rows, codes)

    def _plan(self, rows: list[int]) -> list[Window]:
        """The windows in which some rows are made."""
        plan, prompt = windows(self._frames, *self._sizes), self.prompts[rows[0]]
        plan = [(start, end, end) for start, end in plan]
        if hasattr(prompt, "sections"):
            from sections import cut

            plan = cut(plan, prompt, self._model, self._options.duration)
        T = self._prompt_codes.shape[1]
        return [window for window in plan if window[1] > T]

    def _forward(self, rows: list[int], plan: list[Window]) -> Callable:
        """The decoder under the prompts of some rows, ready for the windows."""
        prompts, options = [self.prompts[row] for row in rows], self._options
        steps = min(self._frames, self._model.longest_window) + max(self._delays)
        if self._prefixes:
            steps += self._prefixes.steps(rows, self.prompts, options.negative_prompt)
        encode = lambda texts: encode_text(self._model, texts, options)  # noqa: E731
        if hasattr(prompts[0], "sections"):
            from sections import SectionStep

            return SectionStep(self._model, prompts, encode, options, steps, plan)
        return self._model.make_forward(encode(prompts), options.copies, steps)

    def _window(self, window: Window, forward, sample, keys) -> Iterator[None]:
        """The steps of a window, after those of its frames that there are."""
        (start, stop, end), config = window, self._model.config.decoder
        prompt, keys = self._past[:, start:], keys[start:]
        delayed = delay(prompt, config.delays, end - start, config.vocab_size)
        self._start, self._width = start, prompt.shape[1]
        self._columns = [delayed[:, : self._width]]
        mx.eval(self._columns)
        steps = generate_step(forward, sample, prompt, end - start, keys, config)
        count = stop - start - self._width + max(self._delays)
        for _, tokens in zip(range(count), steps):
            self._columns.append(tokens)
            self._width += 1
            self.step += 1
            yield
        self._past, self._columns, self._width = self._batch_codes(), [], 0
        mx.eval(self._past)

    @property
    def frames(self) -> int:
        """Whole frames that there are of the batch at hand."""
        made = self._start + self._width - max(self._delays)
        return max(made if self._width else 0, self._past.shape[1])

    @property
    def codes(self) -> mx.array:
        """Codes (B, T, K) of the whole frames that there are.

        Of several batches: the rows from the first on that are as long as the longest.
        """
        codes = dict(zip(self._rows, self._batch_codes())) | self._finished
        longest, rows = max(map(len, codes.values())), []
        while len(rows) in codes and len(codes[len(rows)]) == longest:
            rows.append(codes[len(rows)])
        mx.async_eval(codes := mx.stack(rows))
        return codes

    def _batch_codes(self) -> mx.array:
        if self.frames == self._past.shape[1]:
            return self._past
        self._columns = [mx.concatenate(self._columns, axis=1)]
        made = undelay(self._columns[0], self._delays)
        return mx.concatenate([self._past[:, : self._start], made], axis=1)


def windows(frames: int, longest: int, stride: int) -> list[tuple[int, int]]:
    """First frame and end of the windows in which `frames` frames are made.

    Each starts `stride` frames after the one before, and takes what that one made
    from there on as its beginning. 60 s in windows of 30 s, each dot 6 s:

        ##...
           **###
              **###     # made here, * taken over

    """
    starts = range(0, max(frames - longest, 0) + stride, stride)
    return [(start, min(start + longest, frames)) for start in starts]


def generate_step(
    forward: Callable[[mx.array], mx.array],
    sample: Callable[..., mx.array],
    prompt: mx.array,
    frames: int,
    keys: mx.array,
    config: DecoderConfig,
) -> Iterator[mx.array]:
    """Yield a window's delayed tokens, (B, 1, K) a step, after `prompt` (B, T, K).

    `forward` maps tokens (B, S, K) to logits (R, 1, K, V) of what follows them.
    """
    delays, blank, T = config.delays, config.vocab_size, prompt.shape[1]
    given = delay(prompt, delays, frames, blank)  # (B, S, K)
    free = delay_mask(frames, delays, start=T)  # (S, K)
    first = mx.full(given[:, :1].shape, blank, given.dtype)
    tokens = mx.concatenate([first, given[:, :T]], axis=1)
    for step in range(T, len(free)):  # the first takes T + 1 tokens, each other one
        logits = forward(tokens)  # (R, 1, K, V)
        tokens = sample(logits, keys[step], free[step], given[:, step : step + 1])
        mx.async_eval(tokens)
        yield tokens


class PlainStep:
    """The decoder under the conditions of B takes, in `copies` rows each.

    engine.py has its faster twin. Text keys and values are made once, the caches
    allocated once, for up to `steps` steps.
    """

    def __init__(self, decoder: Decoder, text: Condition, copies: int, steps: int):
        self.decoder, self.copies = decoder, copies
        self.follow(text)
        self.cache = decoder.make_cache(len(text.mask), steps)
        self.prefix: mx.array | None = None

    def follow(self, text: Condition) -> None:
        """Attend another text from now on."""
        self.text, self.text_kv = text, self.decoder.text_kv(text)

    def rewind(self, sound: Condition | None = None) -> None:
        """Forget all steps, to begin a window, after the prefix of a sound if any."""
        for layer in self.cache:
            layer.offset = 0
        self.prefix = None if sound is None else self.decoder.prefix(sound, self.text)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits (R, 1, K, V) of what follows the tokens (B, S, K)."""
        rows = mx.concatenate([tokens] * self.copies)
        prefix, self.prefix = self.prefix, None
        return self.decoder(rows, self.text_kv, self.cache, prefix)[:, -1:]


def make_step_sampler(options: Options) -> Callable[..., mx.array]:
    """A function from logits (R, 1, K, V), keys (B, 2), which codebooks are free (K,)
    and what the others hold (B, 1, K), to tokens (B, 1, K)."""
    draw = make_sampler(options.temp, options.top_k, options.top_p)
    own = threading.local()  # as in the engine, each thread compiles for itself

    def sample(logits, keys, free, given):
        return mx.where(free, draw(guide(logits, options), keys), given)

    def step(*arrays: mx.array) -> mx.array:
        if not hasattr(own, "sample"):  # as one: so rounding is always the same
            own.sample = mx.compile(sample)
        return own.sample(*arrays)

    return step


def guide(logits: mx.array, options: Options) -> mx.array:
    """Classifier-free guidance in float32: rows (R, S, K, V) -> (B, S, K, V).

    The B takes stand one, two or three times among the rows:

        guidance_coef 1    text and sound
        any other          text and sound; neither
        guidance_beta      text and sound; sound alone; neither

    and "neither" is what the logits move away from. With beta the text counts so many
    times beside the sound (section 4.3 of https://arxiv.org/abs/2407.12563).
    """
    logits = logits.astype(mx.float32)
    if options.copies == 1:
        return logits
    *conditioned, null = mx.split(logits, options.copies)
    aim = conditioned[-1]
    if options.guidance_beta is not None:
        aim = aim + (conditioned[0] - aim) * options.guidance_beta
    return null + (aim - null) * options.guidance_coef


def make_sampler(temp: float = 1.0, top_k: int = 250, top_p: float = 0.0) -> Callable:
    """A function from logits (B, S, K, V) and keys (B, 2) to tokens (B, S, K).

    `temp` 0 takes the likeliest. Otherwise `top_p` > 0 draws from the likeliest
    entries that together reach that probability, and `top_p` 0 from the `top_k`
    likeliest and what ties with the last of them. Every row draws by its own key.
    """

    def draw(logits: mx.array, keys: mx.array) -> mx.array:
        noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[1:], key=key))(keys)
        return mx.argmax(logits + noise, axis=-1)

    def greedy(logits: mx.array, keys: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1)

    def nucleus(logits: mx.array, keys: mx.array) -> mx.array:
        order = mx.argsort(-logits, axis=-1)
        logits = mx.take_along_axis(logits, order, axis=-1) / temp
        before = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1, inclusive=False)
        rank = draw(mx.where(before > top_p, -mx.inf, logits), keys)
        return mx.take_along_axis(order, rank[..., None], axis=-1).squeeze(-1)

    def likeliest(logits: mx.array, keys: mx.array) -> mx.array:
        place = max(logits.shape[-1] - top_k, 0)
        least = mx.partition(logits, place, axis=-1)[..., place : place + 1]
        return draw(mx.where(logits < least, -mx.inf, logits / temp), keys)

    if temp == 0:
        return greedy
    return nucleus if top_p > 0 else likeliest


def sampling_keys(seeds: list[int], steps: int) -> mx.array:
    """Random keys (S, B, 2): a word from the row's seed, and the step's number.

    So a row's draws depend on its seed alone, however many rows or steps.
    """
    words = mx.stack([mx.random.split(mx.random.key(s), 1)[0, 0] for s in seeds])
    numbers, words = mx.broadcast_arrays(mx.arange(steps)[:, None], words)
    return mx.stack([words, numbers.astype(mx.uint32)], axis=-1)


def delay_mask(frames: int, delays: tuple[int, ...], start: int = 0) -> mx.array:
    """Which cells of the delayed sequence hold a code of a frame from `start` on:
    (S, K) booleans.

    Codebook k writes frame t in step t + delays[k]. Four frames, mono, where a
    dot is a blank:

        step        0  1  2  3  4  5  6
        codebook 0  0  1  2  3  .  .  .
        codebook 1  .  0  1  2  3  .  .
        codebook 2  .  .  0  1  2  3  .
        codebook 3  .  .  .  0  1  2  3

    MusicGen paper, section 2.2.
    """
    frame = mx.arange(frames + max(delays))[:, None] - mx.array(delays)
    return (frame >= start) & (frame < frames)


def delay(
    codes: mx.array, delays: tuple[int, ...], frames: int, blank: int
) -> mx.array:
    """Put codes (B, T, K) where `delay_mask` has their frames: (B, S, K).

    The sequence is that of `frames` frames; its other cells hold `blank`.
    """
    S, T = frames + max(delays), codes.shape[1]
    columns = [
        mx.pad(codes[..., k], [(0, 0), (d, S - T - d)], constant_values=blank)
        for k, d in enumerate(delays)
    ]
    return mx.stack(columns, axis=-1)


def undelay(sequence: mx.array, delays: tuple[int, ...]) -> mx.array:
    """Realign the codebooks: (B, S, K) -> (B, T, K).

    S counts steps, T = S - max(delays) frames. Raises ValueError when S holds
    no whole frame.
    """
    frames = sequence.shape[1] - max(delays)
    if frames < 1:
        raise ValueError(
            f"The sequence must have more than {max(delays)} steps to hold a whole "
            f"frame, got {sequence.shape[1]}."
        )
    aligned = [sequence[:, d : d + frames, k] for k, d in enumerate(delays)]
    return mx.stack(aligned, axis=-1)
