"""group_norm.py: right for sounds of any length, where MLX's own may not be."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import Test

from encodec import EncodecConfig, group_norm
from group_norm import GroupNorm


def exact(x: mx.array, groups: int) -> np.ndarray:
    """In float64."""
    rows = np.array(x, np.float64).reshape(len(x), x.shape[1], groups, -1)
    rows = rows - rows.mean(axis=(1, 3), keepdims=True)
    power = (rows**2).mean(axis=(1, 3), keepdims=True)
    return (rows / np.sqrt(power + 1e-5)).reshape(x.shape)


class TestGroupNorm(Test):
    def test_short_sounds_as_mlx_has_them(self):
        mx.random.seed(0)
        x = mx.random.normal((2, 37, 12)) + 3
        own, other = GroupNorm(4, 12), nn.GroupNorm(4, 12, pytorch_compatible=True)
        weights = dict(weight=mx.random.normal((12,)), bias=mx.random.normal((12,)))
        own.update(weights), other.update(weights)
        self.assertClose(own(x), other(x), 1e-5)
        self.assertEqual(own.parameters().keys(), other.parameters().keys())

    def test_long_sounds(self):
        """Of three seconds at 48 kHz, in one group and in four."""
        mx.random.seed(0)
        x = mx.random.normal((1, 144_000, 32)) + 0.7
        for groups in (1, 4):
            made = GroupNorm(groups, 32)(x)
            self.assertClose(made, mx.array(exact(x, groups), mx.float32), 1e-5)

    def test_in_float16(self):
        """Sums are float32's, where those of float16 would be infinite."""
        mx.random.seed(0)
        x = (mx.random.normal((1, 144_000, 32)) + 2).astype(mx.float16)
        made = GroupNorm(4, 32)(x)
        self.assertEqual(made.dtype, mx.float16)
        want = mx.array(exact(x, 4), mx.float32)
        self.assertClose(made.astype(mx.float32), want, 1e-3)

    def test_the_codec_has_it(self):
        """At 48 kHz, where a chunk of a second is normalised as a whole."""
        norm = group_norm(EncodecConfig(norm_type="time_group_norm"), 32)
        mx.random.seed(0)
        x = mx.random.normal((1, 48_000, 32))
        self.assertClose(norm(x), mx.array(exact(x, 1), mx.float32), 1e-5)
