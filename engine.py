"""The engine: the decoder's step again, fast and small.

The twin of `musicgen.PlainStep`, with the same codes. What it does beside the plain
step: all between two self-attentions is compiled, so that Python does not build the
graph anew in every step; rows without a text skip the cross-attention; on the CPU the
rows are two lanes, computed side by side; on an NVIDIA GPU products of few rows are
taken as columns. And what concerns a machine: a decoder quantized or shared among
processes, and what its memory holds. Needs decoder.py and parallel.py beside it;
quantize.py is needed to quantize; adapters.py, lora.py, settings.py and strict.py for an
adapter.

    forward = Engine(decoder, text, copies=2, steps=403)
    logits = forward(tokens)  # (B, S, K) -> (R, 1, K, V)
"""

import functools
import math
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear

from decoder import Condition, Decoder, KVCache, Layer, TextKV, attend, join_heads
from parallel import Stream, parallel_streams

if TYPE_CHECKING:
    from adapters import Weighted
    from musicgen import MusicGen
    from options import Options

State = tuple[mx.array, mx.array, mx.array]  # x, queries, keys and values of a layer


class Engine:
    """The decoder under the conditions of B takes, in `copies` rows each.

    `text` is a condition of R = B * copies rows; there are up to `steps` steps.
    """

    def __init__(self, decoder: Decoder, text: Condition, copies: int, steps: int):
        R = len(text.mask)
        max_columns()  # raises now what it would in a step
        self._copies = copies
        on_cpu = mx.default_device() == mx.cpu
        self._cut = R // 2 if on_cpu and R > 1 and decoder.group is None else R
        self._lanes = [
            Lane(decoder, rows, steps, stream)
            for rows, stream in zip(self._split(text), parallel_streams())
        ]
        self._halfway: list[State] = []  # of the step before
        keep_wired(self, R * cache_bytes(decoder, steps))

    def _split(self, rows: NamedTuple) -> list[NamedTuple]:
        """A tuple of arrays (R, ...) -> one for each lane."""
        kind = type(rows)
        parts = [kind(*(x[: self._cut] for x in rows))]
        if self._cut < len(rows[0]):
            parts.append(kind(*(x[self._cut :] for x in rows)))
        return parts

    def follow(self, text: Condition) -> None:
        """Attend another text from now on."""
        for lane, rows in zip(self._lanes, self._split(text)):
            lane.follow(rows)

    def rewind(self, sound: Condition | None = None) -> None:
        """Forget all steps, to begin a window, after the prefix of a sound if any."""
        sounds = [None] * len(self._lanes) if sound is None else self._split(sound)
        for lane, rows in zip(self._lanes, sounds):
            lane.rewind(rows)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits (R, 1, K, V) of what follows the tokens (B, S, K)."""
        rows = mx.concatenate([tokens] * self._copies)
        parts = [rows[: self._cut], rows[self._cut :]]
        if tokens.shape[1] > 1 or self._lanes[0].prefix is not None:
            steps = zip(self._lanes, parts)
            return mx.concatenate([lane.prefill(part) for lane, part in steps])
        states = [lane.lower(part) for lane, part in zip(self._lanes, parts)]
        self._keep_pace(tokens, states)
        steps = zip(self._lanes, states)
        return mx.concatenate([lane.upper(state) for lane, state in steps])

    def _keep_pace(self, tokens: mx.array, states: list[State]) -> None:
        """Start on the lower layers, when the step before is through with them.

        MLX writes into a cache only once all that reads it is done, and copies the
        whole of it otherwise. So half a step is under way while the other is built.
        """
        mx.eval(self._halfway)
        mx.async_eval(states)
        mx.eval(tokens)
        self._halfway = states


class Lane:
    """Some of the rows, on a stream of their own.

    A single step goes through compiled blocks, with the self-attention between them,
    whose shape grows.
    """

    def __init__(self, decoder: Decoder, text: Condition, steps: int, stream: Stream):
        self._decoder, self._stream = decoder, stream
        with mx.stream(stream):
            self._positions = decoder.positions(0, steps)
            # Now, for compiled steps would compute again whatever is still lazy.
            mx.eval(self._positions)
        self.follow(text)
        self._cache = decoder.make_cache(len(text.mask), steps)
        self._half = (len(self._cache) - 1) // 2
        self.prefix: mx.array | None = None

    def follow(self, text: Condition) -> None:
        with mx.stream(self._stream):
            self._text, self._text_kv = text, prepare_text(self._decoder, text)
            mx.eval(self._text_kv)
        self._compiled = threading.local()

    @property
    def _blocks(self) -> list[Callable]:
        """Compiled by each thread for itself. MLX keeps what it compiled by thread and
        by a function's address. What one function left in several threads would stay,
        and be taken for a later one at the same address."""
        if not hasattr(self._compiled, "blocks"):
            self._compiled.blocks = compile_blocks(self._decoder, self._text_kv)
        return self._compiled.blocks

    def rewind(self, sound: Condition | None) -> None:
        for layer in self._cache:
            layer.offset = 0
        with mx.stream(self._stream):
            self.prefix = sound and self._decoder.prefix(sound, self._text)

    def prefill(self, tokens: mx.array) -> mx.array:
        """Logits (R, 1, K, V) after tokens (R, S, K) and the prefix, if any."""
        prefix, self.prefix = self.prefix, None
        with mx.stream(self._stream):
            x = self._decoder.embed(tokens)
            x = x if prefix is None else mx.concatenate([prefix, x], axis=1)
            start = self._cache[0].offset
            x = x + self._positions[start : start + x.shape[1]]
            for layer, text, cache in zip(
                self._decoder.layers, self._text_kv, self._cache
            ):
                attended = attend_past(cache, *before(layer, x))
                x = after(layer, x, attended, text)
            return project_logits(self._decoder, x[:, -1:])

    def lower(self, tokens: mx.array) -> State:
        """The lower layers' part of a step on tokens (R, 1, K)."""
        with mx.stream(self._stream):
            state = self._blocks[0](tokens, self._positions[self._cache[0].offset])
            return self._climb(state, 0, self._half)

    def upper(self, state: State) -> mx.array:
        """Logits (R, 1, K, V), from what the lower layers gave."""
        with mx.stream(self._stream):
            x, *qkv = self._climb(state, self._half, len(self._cache) - 1)
            return self._blocks[-1](x, attend_past(self._cache[-1], *qkv))

    def _climb(self, state: State, first: int, end: int) -> State:
        blocks = self._blocks[1:-1]
        for cache, block in zip(self._cache[first:end], blocks[first:end]):
            x, *qkv = state
            state = block(x, attend_past(cache, *qkv))
        return state


def prepare_text(decoder: Decoder, text: Condition) -> list[TextKV | None]:
    """The text's keys and values in each layer. Where all rows of the second half have
    no text, as null rows, they are left out.

    They are copied once to lie as they are attended, the mask for each head. Metal's
    attention would copy them in every step otherwise, where there are several rows.
    A lane of nothing but null rows attends zeros all the same: two lanes that keep step
    read each matrix from memory once (the step of `small` takes 0.77 of the time).
    """
    R = len(text.mask)
    has_null = R % 2 == 0 and not text.mask[R // 2 :].any().item()
    text = type(text)(*(x[: R // 2] for x in text)) if has_null else text
    all_attended = (text.mask | ~text.mask.any(axis=1, keepdims=True)).all().item()
    return [kv and lay_out(kv, all_attended) for kv in decoder.text_kv(text)]


def lay_out(text: TextKV, all_attended: bool) -> TextKV:
    """The same, each array in one piece; with no mask where all are attended."""
    keys, values, mask = text
    R, H, L, _ = keys.shape
    mask = None if all_attended else mx.contiguous(mx.broadcast_to(mask, (R, H, 1, L)))
    return TextKV(mx.contiguous(keys), mx.contiguous(values), mask)


def compile_blocks(decoder: Decoder, text: list[TextKV | None]) -> list[Callable]:
    """A step in blocks: from tokens (R, 1, K) to the first self-attention, between each
    two, and from the last one to logits (R, 1, K, V)."""
    layers = decoder.layers

    def enter(tokens: mx.array, position: mx.array) -> State:
        x = decoder.embed(tokens) + position
        return x, *before(layers[0], x)

    def between(i: int) -> Callable:
        def block(x: mx.array, attended: mx.array) -> State:
            x = after(layers[i], x, attended, text[i])
            return x, *before(layers[i + 1], x)

        return block

    def leave(x: mx.array, attended: mx.array) -> mx.array:
        return project_logits(decoder, after(layers[-1], x, attended, text[-1]))

    blocks = [enter, *map(between, range(len(layers) - 1)), leave]
    return [mx.compile(block) for block in blocks]


def before(layer: Layer, x: mx.array) -> tuple[mx.array, mx.array]:
    """A layer up to its self-attention: queries (1, R * H, S, d), keys and values
    (2, R * H, S, d) of x (R, S, D)."""
    attention = layer.self_attn
    return attention.split_heads(project(attention.in_proj, layer.norm1(x)))


def attend_past(cache: KVCache, queries: mx.array, keys_values: mx.array) -> mx.array:
    """Append keys and values to the cache, and attend all that is in it."""
    mask = "causal" if queries.shape[2] > 1 else None
    return attend(queries, *cache.update_and_fetch(keys_values), mask)


def after(
    layer: Layer, x: mx.array, attended: mx.array, text: TextKV | None
) -> mx.array:
    """A layer from its self-attention on: its output (R, S, D)."""
    x = project(layer.self_attn.out_proj, join_heads(attended, len(x)), x)
    if text is not None:
        x = add_text(layer, x, text)
    hidden = nn.gelu(project(layer.linear1, layer.norm2(x)))
    return project(layer.linear2, hidden, x)


def add_text(layer: Layer, x: mx.array, text: TextKV) -> mx.array:
    """Add to the rows that have a text, the first, what they find in it: (R, S, D)."""
    attention, rows = layer.cross_attention, len(text.keys)
    queries = project(attention.q_proj, layer.norm_cross(x[:rows]))
    attended = join_heads(attend(attention.split_heads(queries), *text), rows)
    update = project(attention.out_proj, attended)
    parts = x.reshape(-1, *update.shape)
    has_text = mx.array([True] + [False] * (len(parts) - 1))[:, None, None, None]
    return (parts + mx.where(has_text, update, 0)).reshape(x.shape)


def project_logits(decoder: Decoder, x: mx.array) -> mx.array:
    """(R, S, D) -> (R, S, K, V)."""
    R, S, _ = x.shape
    x = project(decoder.linears, decoder.out_norm(x))
    return x.reshape(R, S, decoder.config.num_codebooks, -1)


# cublasLt, which MLX's CUDA build asks for a product with several rows, costs the
# host 12 to 18 microseconds a call; the same product as matrix times columns is one
# kernel of 4 to 6. It reads the matrix again for each row, so where that is much, no.
MAX_READ = 2**26  # numbers, for all rows together


def max_columns() -> int:
    """The most rows that are taken as columns: MUSICGEN_COLUMNS in the environment, else
    16 on an NVIDIA GPU and none elsewhere. Raises ValueError for what is no number."""
    default = "16" if mx.cuda.is_available() else "0"
    value = os.environ.get("MUSICGEN_COLUMNS", default)
    if not (value.isascii() and value.isdecimal()):
        raise ValueError(
            f"MUSICGEN_COLUMNS must be a whole number from 0 on, got {value!r:.40}."
        )
    return int(value)


def project(
    layer: nn.Module, x: mx.array, residual: mx.array | None = None
) -> mx.array:
    """`layer(x)`, plus `residual`: (R, S, D) -> (R, S, D') in the fewest operations."""
    R, S, _ = x.shape
    if not isinstance(layer, nn.Linear):  # quantized, shared, or with an adapter
        y = layer(x)
    elif S == 1 < R <= max_columns() and R * layer.weight.size <= MAX_READ:
        y = (layer.weight @ x.swapaxes(1, 2)).swapaxes(1, 2)
    elif residual is None:
        return layer(x)
    else:
        return mx.addmm(residual, x, layer.weight.T)
    return y if residual is None else residual + y


def store_columns(decoder: Decoder) -> None:
    """Store the matrices column after column, shapes unchanged.

    For the CPU: with two rows the plain BLAS of MLX's Linux wheel then takes
    0.7 of the time a step, and OpenBLAS 0.4.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight = mx.contiguous(module.weight.T).T
            mx.eval(module.weight)


def adjustment(
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str | None,
    group: mx.distributed.Group | None,
    adapter: str | Path | list[str | Path] | None,
    adapter_scale: float | list[float],
) -> Callable[["MusicGen", mx.Dtype], None]:
    """What `from_pretrained` is asked to do with a model, checked before files are read.

    Raises ValueError for numbers that cannot be, or that nothing needs.
    """
    quantization, weights = (q_bits, q_group_size, q_mode), None
    if any(value is not None for value in quantization):
        from quantize import asked

        asked(*quantization)
    if adapter is not None or adapter_scale != 1:
        from adapters import weighted

        weights = weighted([] if adapter is None else adapter, adapter_scale)
    return lambda model, dtype: adjust(model, dtype, quantization, group, weights)


def adjust(
    model: "MusicGen",
    dtype: mx.Dtype,
    quantization: tuple[int | None, int | None, str | None],
    group: mx.distributed.Group | None,
    adapters: "list[Weighted] | None",
) -> None:
    """Adapt a model, cast and quantize it, and share it."""
    beside, shared = [], group is not None and group.size() > 1
    if model.config.masking is not None and (adapters or shared):
        raise ValueError(
            f"{model.name:.100} is a MAGNeT: it takes no adapter, for these are trained "
            "on MusicGen, and runs in one process."
        )
    if adapters:
        from adapters import work_in

        beside = work_in(model, adapters, dtype)
    model.decoder.set_dtype(dtype)
    if any(value is not None for value in quantization):
        from quantize import quantize_model

        quantize_model(model, *quantization)
    if beside:
        from lora import load_adapters

        load_adapters(model, beside, shared)
    if shared:
        shard(model.decoder, group)


def shard(decoder: Decoder, group: mx.distributed.Group) -> None:
    """Keep this process's share of every layer: some of the heads, and of the
    feed-forward's width. Raises ValueError when they do not divide, or where they are
    quantized not into whole groups."""
    for name in ("num_attention_heads", "ffn_dim"):
        if getattr(decoder.config, name) % group.size():
            raise ValueError(
                f"The number of processes must divide {name}, "
                f"{getattr(decoder.config, name)}, got {group.size()}."
            )

    config, linear = decoder.config, decoder.layers[0].linear1
    width = math.gcd(config.hidden_size, config.ffn_dim) // group.size()
    if width % getattr(linear, "group_size", 1):
        raise ValueError(
            f"A process's share of the quantized matrices' width, {width}, must be a "
            f"multiple of q_group_size, {linear.group_size}: take fewer processes, a "
            "smaller q_group_size, or the model that is not quantized."
        )

    def share(module: nn.Module, name: str, way: str, segments: int = 1) -> None:
        linear = shard_linear(module[name], way, segments=segments, group=group)
        setattr(module, name, linear)

    for layer in decoder.layers:
        share(layer.self_attn, "in_proj", "all-to-sharded", 3)
        share(layer.self_attn, "out_proj", "sharded-to-all")
        layer.self_attn.heads //= group.size()
        if "cross_attention" in layer:
            share(layer.cross_attention, "q_proj", "all-to-sharded")
            share(layer.cross_attention, "kv_proj", "all-to-sharded", 2)
            share(layer.cross_attention, "out_proj", "sharded-to-all")
            layer.cross_attention.heads //= group.size()
        share(layer, "linear1", "all-to-sharded")
        share(layer, "linear2", "sharded-to-all")
    decoder.group = group


DECODING_MEMORY = 10**9  # bytes that making audio of codes takes beyond the weights
SYSTEM_MEMORY = int(3.5e9)  # bytes of a Mac's that are left to all else
RECOMMENDED = "max_recommended_working_set_size"  # which Metal alone tells


def memory_size() -> int:
    """Bytes that MLX may use on this machine: its limit, and on a Mac what Metal
    recommends, but not what the system and other programs need."""
    device, limit = mx.device_info(), mx.get_memory_limit()
    if RECOMMENDED not in device:
        return limit
    return min(limit, device[RECOMMENDED], device["memory_size"] - SYSTEM_MEMORY)


@functools.cache
def limit_memory() -> None:
    """Hold MLX to that on a Mac, once in a process. On one of 16 GB or less MLX keeps
    half a GB of what was freed, and gives back the rest."""
    device = mx.device_info()
    if RECOMMENDED in device:
        mx.set_memory_limit(memory_size())
        if device["memory_size"] <= 16 * 2**30:
            mx.set_cache_limit(min(2**29, mx.set_cache_limit(2**29)))
            mx.clear_cache()


class Wired:
    """What generations under way keep in memory, which macOS may not move to the disk:
    as much as the one that needs most, and afterwards what was kept before."""

    def __init__(self):
        self._sizes, self._before, self._lock = [], 0, threading.RLock()

    def add(self, size: int) -> None:
        with self._lock:
            self._sizes.append(size)
            before = self._set(max(self._sizes))
            self._before = self._before if len(self._sizes) > 1 else before

    def remove(self, size: int) -> None:
        with self._lock:
            self._sizes.remove(size)
            self._set(max(self._sizes, default=self._before))

    def _set(self, size: int) -> int:
        mx.synchronize()  # MLX forbids it while something is computed
        return mx.set_wired_limit(size)


WIRED = Wired()


def keep_wired(engine: Engine, caches: int) -> None:
    """Keep in memory, on a Mac, what is there and the bytes that the engine's caches
    and decoding take, while the engine lives: also where its take is left early."""
    device = mx.device_info()
    if RECOMMENDED in device:
        size = mx.get_active_memory() + caches + DECODING_MEMORY
        size = min(size, device[RECOMMENDED])
        WIRED.add(size)
        weakref.finalize(engine, WIRED.remove, size).atexit = False


def cache_bytes(decoder: Decoder, steps: int) -> int:
    """Bytes that the caches of one row of `steps` steps take."""
    width = decoder.config.hidden_size // decoder.config.num_attention_heads
    heads = decoder.layers[0].self_attn.heads  # fewer where they are shared
    return 2 * len(decoder.layers) * heads * width * steps * decoder.dtype.size


def rows_that_fit(model: "MusicGen", options: "Options") -> int:
    """How many prompts fit into memory beside what is there, at least one."""
    limit_memory()
    steps = min(model.longest_window, model.frames_in(options.duration))
    if model.conditioner is not None:
        steps += model.conditioner.longest + model.config.text_encoder.n_positions
    room = memory_size() - mx.get_active_memory() - DECODING_MEMORY
    return max(int(room // (cache_bytes(model.decoder, steps) * options.copies)), 1)


def make_room(model: "MusicGen", text: Condition, steps: int) -> None:
    """Free T5, whose states of R rows these are, where memory does not hold it beside
    caches of so many rows and steps, and then decoding. It can be read again."""
    limit_memory()
    mx.eval(text)  # T5 is needed no more
    size = max(len(text.mask) * cache_bytes(model.decoder, steps), DECODING_MEMORY)
    if model.read_text_encoder and mx.get_active_memory() + size > memory_size():
        model.text_encoder = None
        mx.clear_cache()  # or MLX would keep its memory
