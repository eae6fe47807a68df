"""EnCodec, fast: in pieces, its decoder while codes come, and its LSTM compiled.

The twin of `Encodec.decode_chunk` and `Encodec.encode`, with the same samples and
codes. A sample of the 32 kHz codec depends on the 3 3/4 frames around its own, so
pieces can be decoded one after another, each with a few frames of its neighbours, in
little memory. Needs encodec.py and parallel.py beside it.

    stream = DecodingStream(codec)
    for codes in pieces:  # (B, T, K), T of any size
        write(stream.push(codes))  # (B, N, C)
    write(stream.push(codes[:, :0], last=True))  # what is left
"""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import TYPE_CHECKING

import mlx.core as mx

from encodec import LSTM, Encodec, EncodecConfig, by_channel, trim_right
from parallel import parallel_streams

if TYPE_CHECKING:
    from musicgen import MusicGen, Take


class DecodingStream:
    """The codec's decoder on frames as they come.

    What `push` returns is, put together, what decoding all frames at once gives,
    however they are split. The LSTM keeps its state; the convolutions before and
    after it wait for the frames on which a sample depends.
    """

    def __init__(self, model: Encodec):
        config = model.config
        if config.norm_type != "weight_norm":
            raise ValueError(
                "A codec with group norm, which looks at all samples at once, cannot "
                "decode a stream; use decode."
            )
        self._model = model
        first, lstm, *_ = model.decoder.layers
        reach = convolution_reach(config, config.kernel_size)
        self._convolve = Lookahead(
            lambda x, window, place: first(x[:, window])[:, place],
            *(1, *reach, 1000, first.conv.bias.size),
        )
        self._states: list[LSTMState | None] = [None] * len(lstm.lstm)
        self._upsample: list[Lookahead] = []  # for two rows each, to save memory

    def push(self, codes: mx.array, last: bool = False) -> mx.array:
        """Samples (B, N, C) that the codes (B, T, K) complete; N can be 0.

        `last` hands out all that is left, and ends the stream.
        """
        x = self._convolve(self._model.quantizer.decode(codes), last)
        if x.shape[1] > 0:
            x, self._states = advance(self._model.decoder.layers[1], x, self._states)
            # or pieces side by side would wait for each other
            mx.async_eval(x, self._states)
        if not self._upsample:
            self._upsample = [
                make_upsampler(self._model, min(len(x) - i, 2))
                for i in range(0, len(x), 2)
            ]
        rows = [up(x[2 * i : 2 * i + 2], last) for i, up in enumerate(self._upsample)]
        return mx.concatenate(rows)


def play_prompt(
    model: "MusicGen",
    prompt: str | None,
    duration: float | None,
    chunk: float,
    **options,
) -> Iterator[mx.array]:
    """What `MusicGen.stream` yields. Raises ValueError unless the prompt is one text, or
    None for a model that knows none, and as `play`."""
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt must be one text, got {prompt!r:.80}.")
    return play(model, model.steps(prompt, duration, **options), chunk)


def play(
    model: "MusicGen",
    take: "Take",
    chunk: float = 0.5,
    steps: "Iterable[Take] | None" = None,
) -> Iterator[mx.array]:
    """The samples (N, C) of a take of one prompt while it is made, `chunk` seconds
    each.

    `steps` is the iteration over the take, where something else goes along. Raises
    ValueError for pieces shorter than a frame, and for several prompts.
    """
    if len(take.prompts) > 1:
        raise ValueError(f"A take of one prompt can play, not of {len(take.prompts)}.")
    least = 1 / model.frame_rate
    if not isinstance(chunk, Real) or not least <= chunk < 1e6:
        raise ValueError(f"chunk must be at least 1/{model.frame_rate} s, got {chunk}.")
    return pieces_of(
        model, take, model.frames_in(chunk), take if steps is None else steps
    )


def pieces_of(
    model: "MusicGen", take: "Take", frames: int, steps: "Iterable[Take]"
) -> Iterator[mx.array]:
    """Samples (N, C) of `frames` frames and more. A piece is handed out when the next
    step is under way, so that a GPU always has work."""
    push, done, waiting = DecodingStream(model.audio_encoder).push, 0, []
    for _ in steps:
        yield from waiting
        waiting = []
        if take.frames >= done + frames:
            sound = by_channel(push, take.codes[:, done:], model.channels)[0]
            mx.async_eval(sound)
            done, waiting = take.frames, [sound] if len(sound) else []
    yield from waiting
    finish, rest = functools.partial(push, last=True), take.codes[:, done:]
    if len(sound := by_channel(finish, rest, model.channels)[0]) > 0:
        mx.async_eval(sound)
        yield sound


def encode(
    model: Encodec, audio: mx.array, num_codebooks: int, frames: int = 100
) -> mx.array:
    """Codes (B, T, K) of audio (B, N, C), as `Encodec.encode` gives for one piece.

    They are made of so many frames of a row at a time: a second of sound takes 0.2 GB.
    Group norm looks at all samples, so with it there is one piece.
    """
    config, T = model.config, math.ceil(audio.shape[1] / model.config.hop_length)
    frames = max(frames // len(audio), 1) if config.norm_type == "weight_norm" else T
    layers = model.encoder.layers
    place = [isinstance(layer, LSTM) for layer in layers].index(True)
    width, reach = config.hidden_size, convolution_reach(
        config, config.last_kernel_size
    )
    finish = Lookahead(
        lambda x, window, place: apply(layers[-2:], x[:, window])[:, place],
        *(1, *reach, 1000, width),
    )
    codes, states = [], None
    for start in range(0, T, frames):
        stop = min(start + frames, T)
        x = downsample(model, layers[:place], audio, start, stop)
        x, states = advance(layers[place], x, states)
        x = finish(x, last=stop == T)
        if x.shape[1] > 0:
            codes.append(model.quantizer.encode(x, num_codebooks))
        mx.eval(codes, states)
    return mx.concatenate(codes, axis=1)


def apply(layers: list, x: mx.array) -> mx.array:
    """What the layers make of x, one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def downsample(
    model: Encodec, layers: list, audio: mx.array, start: int, stop: int
) -> mx.array:
    """Frames (B, stop - start, D) of audio (B, N, C) by the layers before the LSTM,
    from as much of the audio as they depend on."""
    hop, reach = model.config.hop_length, downsampling_reach(model.config)
    first = max(start - reach, 0)
    x = apply(layers, audio[:, first * hop : (stop + reach) * hop])
    return x[:, start - first : stop - first]


def downsampling_reach(config: EncodecConfig) -> int:
    """Frames before and after its own on whose samples a frame depends at most, in the
    layers before the LSTM: 5 for the 32 kHz codec.

    Counted is what a layer sees from one end of its kernel to the other, and a stride
    more: so much its padding can reflect at the ends of the sound.
    """
    step, samples = 1, config.kernel_size  # between two positions of a layer; in all
    for ratio in reversed(config.upsampling_ratios):
        for i in range(config.num_residual_layers):
            span = (config.residual_kernel_size - 1) * config.dilation_growth_rate**i
            samples += step * (span + 1)
        samples += step * 3 * ratio
        step *= ratio
    return math.ceil(samples / config.hop_length) + 1


def advance(
    lstm: LSTM, x: mx.array, states: "list[LSTMState | None] | None" = None
) -> "tuple[mx.array, list[LSTMState]]":
    """The output of the stack for x (B, T, D), and the layers' next states.

    MLX's LSTM takes twelve operations a step. Each is tiny, so on a GPU their number
    decides; here ten steps are compiled together.
    """
    hidden, next_states = x, []
    for layer, state in zip(lstm.lstm, states or [None] * len(lstm.lstm)):
        inputs = mx.addmm(layer.bias, hidden, layer.Wx.T)
        zeros, pieces = mx.zeros((len(x), layer.hidden_size), x.dtype), []
        state = state or (zeros, zeros)
        for start in range(0, x.shape[1], 10):
            piece, state = lstm_steps(inputs[:, start : start + 10], layer.Wh, *state)
            pieces.append(piece)
        hidden = mx.concatenate(pieces, axis=1)
        next_states.append(state)
    return hidden + x, next_states


LSTMState = tuple[mx.array, mx.array]  # hidden and cell (B, D)


@mx.compile
def lstm_steps(
    inputs: mx.array, recurrent: mx.array, hidden: mx.array, cell: mx.array
) -> tuple[mx.array, LSTMState]:
    """Hidden states (B, T, D), and the state after the last.

    `inputs` (B, T, 4 D) are projected already, for the gates in, forget, new and out;
    `recurrent` (4 D, D) is the matrix for the hidden state.
    """
    steps = []
    for x in mx.unstack(inputs, axis=1):
        # sums of parts, not parts of a sum, so that all but the product is one kernel
        gates = zip(mx.split(x, 4, -1), mx.split(hidden @ recurrent.T, 4, -1))
        i, f, g, o = (a + b for a, b in gates)
        cell = mx.sigmoid(f) * cell + mx.sigmoid(i) * mx.tanh(g)
        hidden = mx.sigmoid(o) * mx.tanh(cell)
        steps.append(hidden)
    return mx.stack(steps, axis=1), (hidden, cell)


class Lookahead:
    """Applies layers that reach over few frames to frames as they come.

    `apply` maps frames (B, T, D) to `rate` outputs for each. An output is handed
    out when all it depends on is there: `before` and `after` its own place, counted
    in outputs. So each piece takes some frames along on both sides and drops the
    outputs they give, and what is left is what one pass over all would give.
    """

    def __init__(
        self, apply, rate: int, before: int, after: int, frames: int, width: int
    ):
        self._apply, self._rate, self._frames = apply, rate, frames
        self._before, self._after, self._width = before, after, width
        # Where more is seen before than after, reflection at the beginning shows the
        # first outputs what comes as much later.
        self._hold = before + 1 if before > after else 0
        self._buffer = None  # the frames that are still needed
        self._start = 0  # number of its first frame
        self._done = 0  # outputs handed out

    def __call__(self, x: mx.array, last: bool) -> mx.array:
        """The outputs (B, N, C) that frames (B, T, D) complete; N can be 0."""
        rate, size = self._rate, self._frames * self._rate
        buffer = x if self._buffer is None else mx.concatenate([self._buffer, x], 1)
        end = self._start + buffer.shape[1]
        stop = end * rate - self._after
        stop = self._done if stop < max(self._hold, self._done) else stop
        stop = end * rate if last else stop
        pieces = []
        for a in range(self._done, stop, size):
            b = min(a + size, stop)
            first = max((a - self._before) // rate, 0)
            until = min(math.ceil((max(b, self._hold) + self._after) / rate), end)
            window = slice(first - self._start, until - self._start)
            place = slice(a - first * rate, b - first * rate)
            pieces.append(self._apply(buffer, window, place))
        keep = max((stop - self._before) // rate, 0)
        self._buffer = buffer[:, keep - self._start :]
        mx.async_eval(self._buffer)  # the next frames may come from another thread
        self._start, self._done = keep, stop
        nothing = mx.zeros((len(x), 0, self._width))
        return mx.concatenate(pieces, axis=1) if pieces else nothing


def make_upsampler(model: Encodec, rows: int, frames: int = 200) -> Lookahead:
    """The layers after the LSTM, on few frames of all rows at a time, to save memory."""
    streams = parallel_streams()
    waiting, turn = [], itertools.cycle(streams)

    def apply(x: mx.array, window: slice, place: slice) -> mx.array:
        with mx.stream(next(turn)):
            x = x[:, window]
            for layer in model.decoder.layers[2:]:
                x = layer(x)
            waiting.append(x[:, place])
        piece = waiting[-1]
        if len(waiting) == len(streams):  # together, so that they interleave
            mx.async_eval(waiting)
            waiting.clear()
        return piece

    frames = math.ceil(frames / (rows * len(streams)))
    reach = upsampling_reach(model.config)
    return Lookahead(apply, model.config.hop_length, *reach, frames, model.channels)


def convolution_reach(
    config: EncodecConfig, kernel_size: int, dilation: int = 1
) -> tuple[int, int]:
    """Positions before and after its own that a convolution sees."""
    total = (kernel_size - 1) * dilation
    after = 0 if config.use_causal_conv else total // 2
    return total - after, after


def upsampling_reach(config: EncodecConfig) -> tuple[int, int]:
    """Samples before and after its own on whose frames a sample depends, in the
    layers after the LSTM: 482 after it, 3/4 of a frame, for the 32 kHz codec."""
    before = after = 0
    step = config.hop_length  # samples between two positions of a layer
    for ratio in config.upsampling_ratios:
        step //= ratio
        right = trim_right(config, ratio)
        reaches = [(right, ratio - right)]
        for i in range(config.num_residual_layers):
            dilation = config.dilation_growth_rate**i
            kernel_size = config.residual_kernel_size
            reaches.append(convolution_reach(config, kernel_size, dilation))
        before += step * sum(left for left, _ in reaches)
        after += step * sum(right for _, right in reaches)
    left, right = convolution_reach(config, config.last_kernel_size)
    return before + left, after + right
