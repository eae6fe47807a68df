"""Measure how fast a model generates, and what limits it.

    python benchmark.py --random small
    python benchmark.py --model medium --duration 30 --q-bits 8
    python benchmark.py --random small --plain
    python benchmark.py --random magnet-small-30secs --batch 16
    python benchmark.py --random htdemucs --duration 30

`--random` needs no download: the real shapes with random values. `--plain` measures the
plain step and decode in place of engine.py's and encodec_stream.py's. Needs
musicgen.py, magnet.py, engine.py, quantize.py, hub.py, messages.py, outputs.py and all
that these need beside it; demucs.py, and train.py for `--lora`.
"""

import argparse
import io
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import magnet
from checkpoints import MusicGenConfig
from decoder import Condition, Decoder, DecoderConfig
from encodec import EncodecConfig
from engine import Lane
from hub import MAGNETS
from magnet import MAGNeT
from messages import one_line
from musicgen import MusicGen, PlainStep, encode_text
from options import Options
from outputs import print_result
from quantize import add_flags, quantize_model
from t5 import T5Config

SIZES = {  # hidden size, layers
    "small": (1024, 24),
    "medium": (1536, 48),
    "large": (2048, 48),
}
VIEWS = {  # operations of the graph that move no data
    *("Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice"),
    *("Split", "Squeeze", "Transpose", "Unflatten"),
}
DEMUCS = "htdemucs"
COLUMNS = "MUSICGEN_COLUMNS"  # see `engine.max_columns`
PROMPT = "90s rock song with loud guitars and heavy drums"


class Words:
    """Stands for the tokenizer of a random model: any ids will do."""

    def encode(self, text: str) -> list[int]:
        return [2 + len(word) for word in text.split()] + [1]


def published_config(name: str) -> MusicGenConfig:
    """The sizes of a published model."""
    if name in MAGNETS:
        return magnet_config(name)
    stereo, size = name.startswith("stereo-"), name.removeprefix("stereo-")
    hidden, layers = SIZES[size]
    config = DecoderConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        ffn_dim=4 * hidden,
        num_codebooks=8 if stereo else 4,
        audio_channels=2 if stereo else 1,
        delays=(0, 0, 1, 1, 2, 2, 3, 3) if stereo else (0, 1, 2, 3),
    )
    return MusicGenConfig(config)


def magnet_config(name: str) -> MusicGenConfig:
    """The sizes of a published MAGNeT: a MusicGen's, and how it is masked. The models of
    sounds have T5-large, and a codec of 16 kHz."""
    size = next(size for size in SIZES if size in name)
    config = published_config(size)
    config.max_duration = config.default_duration = 30.0 if "30secs" in name else 10.0
    config.masking = dict(span_len=3, subcodes_context=5)
    if name.startswith("audio"):
        large = dict(d_model=1024, d_ff=4096, num_layers=24, num_heads=16)
        config.text_encoder = T5Config(**large)
        rate = dict(sampling_rate=16000, upsampling_ratios=(8, 5, 4, 2))
        config.audio_encoder = EncodecConfig(**rate)
    return config


def random_model(name: str, dtype: mx.Dtype, *quantization: int | str) -> MusicGen:
    """A model of a published size with random weights, decoder in `dtype`, quantized
    where bits, group size or mode are given (see quantize.py)."""
    config = published_config(name)
    model = (MusicGen if config.masking is None else MAGNeT)(config, Words())
    model.decoder.set_dtype(dtype)
    quantize_model(model, *quantization)
    model.read_now()
    return model


def in_words(quantization: dict | None) -> str:
    """What the table says of it: ", 8 bit"; of a mode other than affine its name, too."""
    if quantization is None:
        return ""
    mode = quantization.get("mode", "affine")
    return f", {quantization['bits']} bit{'' if mode == 'affine' else f' ({mode})'}"


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of weights that one step reads.

    All but the embeddings, of which it takes K rows, and the projections of the
    text, which are used once.
    """
    once = ("emb.", "output_proj.")
    return sum(
        weight.nbytes
        for name, weight in tree_flatten(decoder.parameters())
        if not name.startswith(once) and ".kv_proj." not in name
    )


def count_operations(result: mx.array) -> int:
    """Operations in the graph of `result`, which must not be computed yet; no views."""
    graph = io.StringIO()
    mx.export_to_dot(graph, result)
    names = re.findall(r'label ?= ?"([A-Za-z]+)', graph.getvalue())
    return sum(name not in VIEWS for name in names)


def operations_per_step(model: MusicGen) -> int:
    """Operations of one step, without the sampling of tokens."""
    states = mx.zeros((2, 8, model.config.text_encoder.d_model))
    mask = mx.array([[True], [False]]) & mx.ones(8, mx.bool_)  # the second: null row
    text, K = Condition(states, mask), model.config.decoder.num_codebooks
    if model.plain:
        step, rows = PlainStep(model.decoder, text, 2, 3), 1
    else:
        lane = Lane(model.decoder, text, 3, mx.default_stream(mx.default_device()))
        step, rows = lambda x: lane.upper(lane.lower(x)), 2
    tokens = mx.zeros((rows, 1, K), mx.int32)
    mx.eval(step(tokens))  # the first call compiles
    return count_operations(step(tokens))


def prefill_time(model: MusicGen, batch: int, frames: int) -> float:
    """Seconds for one pass over many frames, as when audio is continued."""
    text = encode_text(model, [PROMPT] * batch)
    forward = model.make_forward(text, Options().copies, frames)
    tokens = mx.zeros((batch, frames, model.config.decoder.num_codebooks), mx.int32)
    mx.eval(tokens)
    start = time.perf_counter()
    mx.eval(forward(tokens))
    return time.perf_counter() - start


def step_times(model: MusicGen, prompts: list[str], duration: float) -> list[float]:
    """Milliseconds between one step of a take and the next."""
    stamps = []
    for _ in model.steps(prompts, duration=duration, seed=0):
        stamps.append(time.perf_counter())
    return [(b - a) * 1e3 for a, b in zip(stamps, stamps[1:])]


def columns_times(model: MusicGen, duration: float) -> dict[int, float]:
    """Milliseconds of a step of one take, the median, where products of so many rows
    are taken as columns: none, and two, which are all with guidance. In turns."""
    before, times = os.environ.get(COLUMNS), {0: [], 2: []}
    try:
        for columns in [*times] * 3:
            os.environ[COLUMNS] = str(columns)
            times[columns] += step_times(model, [PROMPT], duration)[3:]
    finally:
        os.environ.pop(COLUMNS)
        if before is not None:
            os.environ[COLUMNS] = before
    return {columns: statistics.median(gaps) for columns, gaps in times.items()}


def streaming_time(model: MusicGen, duration: float) -> tuple[float, float]:
    """Seconds until the first sound of a streamed take, and until its last."""
    start, times = time.perf_counter(), []
    for _ in model.stream(PROMPT, duration=duration, seed=0):
        times.append(time.perf_counter() - start)
    return times[0], times[-1]


def measure(model: MusicGen, duration: float, batch: int) -> dict[str, str]:
    """Rows of the table, for `batch` takes of `duration` seconds."""
    prompts, stamps = [PROMPT] * batch, []
    start = time.perf_counter()
    mx.eval(model.decoder.text_kv(encode_text(model, prompts)))
    text_time = time.perf_counter() - start

    start = time.perf_counter()
    take = model.steps(prompts, duration=duration, seed=0)
    for _ in take:
        stamps.append(time.perf_counter())
    codes = take.codes
    mx.eval(codes)
    generation = time.perf_counter() - start
    peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(model.decode(codes))
    decoding = time.perf_counter() - start
    decoding_peak = mx.get_peak_memory()
    first, streamed = streaming_time(model, duration)
    slower = f", {streamed / (generation + decoding) - 1:+.0%}" if batch == 1 else ""

    # The second stamp waits for the first step, which compiles.
    gaps = [(b - a) * 1e3 for a, b in zip(stamps[1:], stamps[2:])]
    step = statistics.fmean(gaps)
    size = weight_bytes(model.decoder)
    prefill = 500 if mx.default_device() == mx.gpu else 25
    return {
        "text": f"{text_time:.3f} s",
        "prefill": f"{prefill_time(model, batch, prefill):.3f} s for "
        f"{prefill / model.frame_rate:g} s of audio",
        "step": f"{step:.2f} ms mean, {statistics.median(gaps):.2f} median, "
        f"{max(gaps):.2f} worst",
        "steps per second": f"{1e3 / step:.1f}",
        "generation": f"{generation:.2f} s, "
        f"{batch * duration / generation:.2f} times real time",
        "decoding": f"{decoding:.2f} s, {decoding / generation:.1%} of the generation",
        "streaming": f"first sound after {first:.2f} s, a take in {streamed:.2f} s{slower}",
        "peak memory": f"{peak / 1e9:.2f} GB, decoding {decoding_peak / 1e9:.2f} GB",
        "weights per step": f"{size / 1e9:.3f} GB, {size / step / 1e6:.0f} GB/s",
        "operations per step": str(operations_per_step(model)),
    }


def pass_operations(model: MAGNeT, frames: int) -> float:
    """Multiplications and additions of a pass over the frames of one take, two rows with
    guidance: two for each weight of the layers and heads and each frame, and attention's
    products. The text's are few, and left out."""
    config = model.config.decoder
    D, F, T = config.hidden_size, config.ffn_dim, frames
    weights = config.num_hidden_layers * (6 * D * D + 2 * D * F)
    weights += D * config.num_codebooks * config.vocab_size
    attention = config.num_hidden_layers * 4 * T * D
    return 2 * T * (2 * weights + attention)


def measure_passes(model: MAGNeT, duration: float, batch: int) -> dict[str, str]:
    """Rows of the table, for `batch` takes of `duration` seconds of a MAGNeT."""
    prompts, options = [PROMPT] * batch, dict(seed=0, batch_size=batch)
    short = dict(decoding_steps=[1] * model.config.decoder.num_codebooks)
    model.generate_codes(prompts, duration=duration, **short, **options)  # compiles
    mx.reset_peak_memory()
    start = time.perf_counter()
    take = model.steps(prompts, duration=duration, **options)
    for _ in take:
        pass
    mx.eval(codes := take.codes)
    generation, peak = time.perf_counter() - start, mx.get_peak_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(model.decode(codes))
    decoding = time.perf_counter() - start
    operations = batch * take.total * pass_operations(model, codes.shape[1])
    return {
        "passes": f"{take.total}, {generation / take.total * 1e3:.2f} ms each",
        "generation": f"{generation:.2f} s, {generation / batch:.2f} s a take, "
        f"{batch * duration / generation:.2f} times real time",
        "arithmetic": f"{operations / batch / 1e12:.3g} T operations a take, "
        f"{operations / generation / 1e12:.3g} T a second",
        "decoding": f"{decoding:.2f} s, {decoding / generation:.1%} of the generation",
        "peak memory": f"{peak / 1e9:.2f} GB, decoding "
        f"{mx.get_peak_memory() / 1e9:.2f} GB",
    }


def measure_training(model: MusicGen, duration: float, batch: int, rank: int) -> dict:
    """Rows of the table for steps of `train.py lora`, on any codes."""
    from lora import add_adapters
    from train import adapt_only, lm_loss
    from training import Training

    add_adapters(model.decoder, rank, 1.0)
    adapt_only(model)
    frames = model.frames_in(duration)
    codes = mx.zeros((batch, frames, model.config.decoder.num_codebooks), mx.int32)
    ids, mask = mx.ones((batch, 16), mx.int32), mx.ones((batch, 16), mx.bool_)
    given = (ids, mask, mx.ones(batch, mx.bool_), codes)
    args = argparse.Namespace(lr=1e-4, steps=10, seconds=60, seed=0, resume=False)
    training = Training(model, lm_loss, args, Path(), {}, {})
    mx.reset_peak_memory()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        mx.eval(training.step(given), model.trainable_parameters())
        times.append(time.perf_counter() - start)
    return {
        "training step": f"{statistics.median(times[2:]):.3f} s for {batch} of "
        f"{duration:g} s, rank {rank}",
        "peak memory": f"{mx.get_peak_memory() / 1e9:.2f} GB",
    }


def measure_separation(duration: float) -> dict[str, str]:
    """Rows of the table for Demucs, of the published size with random weights."""
    from demucs import HTDemucs, HTDemucsConfig

    model = HTDemucs(HTDemucsConfig())
    audio = 0.1 * mx.random.normal((int(duration * model.sampling_rate), 2))
    mx.eval(model.state, audio)
    model.separate(audio[: model.config.segment_length])  # compiles
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(model.separate(audio))
    seconds = time.perf_counter() - start
    return {
        "separation": f"{seconds:.2f} s for {duration:g} s of audio, "
        f"{duration / seconds:.2f} times real time",
        "peak memory": f"{mx.get_peak_memory() / 1e9:.2f} GB",
    }


def measure_model(args: argparse.Namespace) -> dict[str, str]:
    """Rows of the table for a MusicGen."""
    on_gpu = mx.default_device() == mx.gpu
    dtype = args.dtype or ("float16" if on_gpu else "float32")
    start = time.perf_counter()
    if args.random:
        quantization = args.q_bits, args.q_group_size, args.q_mode
        model = random_model(args.random, getattr(mx, dtype), *quantization)
    else:
        names = ("q_bits", "q_group_size", "q_mode")
        quantization = {name: getattr(args, name) for name in names}
        model = magnet.load(args.model, getattr(mx, dtype), **quantization)
    if model.config.text_encoder is None:
        raise ValueError(f"{args.model} follows no text; take a model that does.")
    model.plain = args.plain
    load = time.perf_counter() - start
    in_passes = isinstance(model, MAGNeT)
    if in_passes and args.lora:
        raise ValueError(f"{model.name} is a MAGNeT; --lora trains a MusicGen.")
    args.duration = args.duration or (model.config.max_duration if in_passes else 8.0)
    if args.lora:
        return measure_training(model, args.duration, args.batch, args.lora)
    rows = {
        "decoder": dtype + in_words(model.config.quantization),
        "takes": f"{args.batch} of {args.duration:g} s",
        "load": f"{load:.2f} s",
    }
    if in_passes:
        return rows | measure_passes(model, args.duration, args.batch)
    model.generate("a", duration=0.1)  # compiles what MLX compiles once
    mx.reset_peak_memory()
    rows |= measure(model, args.duration, args.batch)
    if on_gpu and not args.plain:  # on the CPU each row is alone, so there are none
        times = columns_times(model, min(args.duration, 4.0))
        texts = [f"{ms:.2f} ms with {COLUMNS}={n}" for n, ms in times.items()]
        rows["step, one take"] = ", ".join(texts)
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure generation.")
    names = [*SIZES, *(f"stereo-{size}" for size in SIZES), *MAGNETS, DEMUCS]
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="short name, Hub id or folder")
    source.add_argument("--random", choices=names, help="a size with random weights")
    add = parser.add_argument
    add("--duration", type=float, help="seconds (default: 8; MAGNeT: the model's own)")
    add("--batch", type=int, default=1, help="takes at once (default: %(default)s)")
    add("--lora", type=int, help="measure the training of adapters of this rank")
    add("--dtype", choices=["float16", "bfloat16", "float32"])
    add("--plain", action="store_true", help="measure the plain step and decode")
    add_flags(add)
    args = parser.parse_args()
    if not 0.02 <= (args.duration or 8) <= 30 or args.batch < 1:
        parser.error("--duration must be from 0.02 to 30, and --batch at least 1")
    return args


def to_send(rows: dict[str, str]) -> str:
    """What an owner of the machine may tell in one line."""
    names = ("device", "model", "decoder", "takes", "step", "step, one take")
    names += ("passes", "generation") if "passes" in rows else ()
    names += ("separation", "training step", "peak memory")
    texts = [rows[name] for name in names if name in rows]
    system = f"{platform.system()} {platform.mac_ver()[0] or platform.release()}"
    return "; ".join([*texts, f"MLX {mx.__version__}", system])


def main() -> None:
    args = parse_arguments()
    if args.random == DEMUCS:
        measured = measure_separation(args.duration or 8.0)
    else:
        measured = measure_model(args)
    rows = {
        "model": args.random or args.model,
        "device": str(mx.device_info().get("device_name", mx.default_device())),
    }
    print_result("| | |\n|---|---|")
    for name, value in (rows | measured).items():
        print_result(f"| {name} | {value} |")
    print_result(f"\nTo send: {to_send(rows | measured)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"benchmark.py: error: {one_line(error)}")
