"""Group norm of long sounds: sums in two stages, so that none of float32's digits go.

    norm = GroupNorm(4, channels=48)
    y = norm(x)  # (B, N, C) -> (B, N, C)

`nn.GroupNorm` of MLX 0.32 adds a whole group up one by one on a CPU: of a second at
48 kHz that is wrong by 0.7 %, of 20 seconds by 20 %. It is computed in float32, whatever
x is. Weights are called as there. Stands alone.
"""

import functools

import mlx.core as mx
import mlx.nn as nn

STEPS = 1024  # that are added up at once


class GroupNorm(nn.Module):
    """Normalization over time and the channels of a group together, for each row."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = mx.ones((channels,)), mx.zeros((channels,))
        self._groups, self._eps = groups, eps

    def __call__(self, x: mx.array) -> mx.array:
        center = mean(x.astype(mx.float32), self._groups)
        spread = mean(square(x, center), self._groups)
        scale = mx.rsqrt(spread + self._eps) * self.weight
        return scaled(x, center, scale, self.bias).astype(x.dtype)


def mean(x: mx.array, groups: int) -> mx.array:
    """Of each channel of x (B, N, C) the mean of its group, over time and the group's
    channels: (B, 1, C)."""
    (B, N, C), blocks = x.shape, x.shape[1] // STEPS
    whole, rest = mx.split(x, [blocks * STEPS], axis=1)
    sums = whole.reshape(B, blocks, STEPS, C).sum(axis=2).sum(axis=1) + rest.sum(axis=1)
    means = sums.reshape(B, groups, -1).mean(axis=2) / N
    return mx.repeat(means, C // groups, axis=1)[:, None]


@functools.partial(mx.compile, shapeless=True)
def square(x: mx.array, center: mx.array) -> mx.array:
    return mx.square(x - center)


@functools.partial(mx.compile, shapeless=True)
def scaled(x: mx.array, center: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return (x - center) * scale + bias
