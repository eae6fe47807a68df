"""Convolutions over time as matrix products, for wide ones of few taps.

    conv = Conv1d(768, 768, 3, dilation=2)  # (B, N, 768) -> (B, N, 768)
    down = StridedConv1d(48, 192, 8, stride=4)  # (B, N, 48) -> (B, N / 4, 192)
    up = ConvTranspose1d(192, 48, 8, stride=4)  # (B, N, 192) -> (B, 4 N, 48)

The results are those of `mx.conv1d` and `mx.conv_transpose1d` but for rounding. A product
for each tap takes no copy of the input, and there is no slow way for dilation: see
"Multi-band diffusion" in GUIDE.md for what that gains. Weights are (taps, in, out).
Stands alone.
"""

import math

import mlx.core as mx
import mlx.nn as nn


def drawn(taps: int, inputs: int, outputs: int) -> mx.array:
    """Weights (taps, in, out) to begin with, as `nn.Conv1d` draws them."""
    bound = 1 / math.sqrt(inputs * taps)
    return mx.random.uniform(-bound, bound, (taps, inputs, outputs))


class Conv1d(nn.Module):
    """As many frames as before: an odd number of taps, around each frame."""

    def __init__(self, inputs: int, outputs: int, taps: int, dilation: int = 1):
        super().__init__()
        self.weight, self.bias = drawn(taps, inputs, outputs), mx.zeros((outputs,))
        self._dilation = dilation

    def __call__(self, x: mx.array) -> mx.array:
        N, taps, d = x.shape[1], len(self.weight), self._dilation
        x, y = pad(x, taps // 2 * d, taps // 2 * d), self.bias
        for i in range(taps):
            y = mx.addmm(y, x[:, i * d : i * d + N], self.weight[i])
        return y


class Strided(nn.Module):
    """What both ways have in common."""

    def __init__(self, inputs: int, outputs: int, taps: int, stride: int):
        super().__init__()
        self.weight, self._stride = drawn(taps, inputs, outputs), stride


class StridedConv1d(Strided):
    """One frame of `stride`, which N is a multiple of; taps are a multiple of it, too.
    Of the taps that reach out, half are on each side."""

    def __call__(self, x: mx.array) -> mx.array:
        (B, N, C), stride = x.shape, self._stride
        taps, _, outputs = self.weight.shape
        out = taps - stride
        groups = pad(x, out // 2, out - out // 2).reshape(B, -1, stride * C)
        weight = self.weight.reshape(-1, stride * C, outputs)
        frames = N // stride
        return sum(groups[:, i : i + frames] @ w for i, w in enumerate(weight))


class ConvTranspose1d(Strided):
    """`stride` frames of one; the other way round than `StridedConv1d`."""

    def __call__(self, x: mx.array) -> mx.array:
        (B, N, C), stride = x.shape, self._stride
        taps, _, outputs = self.weight.shape
        weight = self.weight.reshape(-1, stride, C, outputs).swapaxes(1, 2)
        last = len(weight) - 1
        made = [x @ w.reshape(C, stride * outputs) for w in weight]
        y = sum(pad(one, i, last - i) for i, one in enumerate(made))
        first = (taps - stride) // 2
        return y.reshape(B, -1, outputs)[:, first : first + N * stride]


def pad(x: mx.array, before: int, after: int) -> mx.array:
    """x (B, N, C) with so many frames of zeros."""
    return mx.pad(x, [(0, 0), (before, after), (0, 0)])
