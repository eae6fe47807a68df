"""Group norm of long sounds: sums in two stages, so that none of float32's digits go.

    norm = GroupNorm(4, channels=48)
    y = norm(x)  # (B, N, C) -> (B, N, C)

`nn.GroupNorm` of MLX 0.32 adds a whole group up one by one on a CPU: of a second at
48 kHz that is wrong by 0.7 %, of 20 seconds by 20 %. Weights are called as there. Stands
alone.
"""

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
        B, N, C = x.shape
        groups = x.reshape(B, N, self._groups, -1)
        groups = groups - mean(groups)
        groups = groups * mx.rsqrt(mean(groups * groups) + self._eps)
        return groups.reshape(B, N, C) * self.weight + self.bias


def mean(x: mx.array) -> mx.array:
    """Means (B, 1, G, 1) of x (B, N, G, C) over its N and C."""
    B, N, G, _ = x.shape
    x = x.mean(axis=3)
    x = mx.pad(x, [(0, 0), (0, -N % STEPS), (0, 0)]).reshape(B, -1, STEPS, G)
    return (x.sum(axis=2).sum(axis=1) / N)[:, None, :, None]
