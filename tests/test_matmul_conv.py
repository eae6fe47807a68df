"""matmul_conv.py against MLX's own convolutions."""

import mlx.core as mx
from common import Test

from matmul_conv import Conv1d, ConvTranspose1d, StridedConv1d


class TestConvolutions(Test):
    def setUp(self):
        super().setUp()
        mx.random.seed(0)

    def test_dilated(self):
        x = mx.random.normal((2, 33, 5))
        for taps, dilation in ((1, 1), (3, 1), (3, 2), (5, 3)):
            conv = Conv1d(5, 7, taps, dilation)
            conv.bias = mx.random.normal((7,))
            weight, reach = conv.weight.transpose(2, 0, 1), taps // 2 * dilation
            want = mx.conv1d(x, weight, padding=reach, dilation=dilation) + conv.bias
            self.assertClose(conv(x), want, 1e-5)

    def test_strided_and_transposed(self):
        for taps, stride in ((8, 4), (4, 4), (12, 4), (6, 2), (9, 3)):
            how = dict(stride=stride, padding=(taps - stride) // 2)
            down, up = (
                kind(5, 7, taps, stride) for kind in (StridedConv1d, ConvTranspose1d)
            )
            x = mx.random.normal((2, 12 * stride, 5))
            want = mx.conv1d(x, down.weight.transpose(2, 0, 1), **how)
            self.assertClose(down(x), want, 1e-5)
            x = mx.random.normal((2, 12, 5))
            want = mx.conv_transpose1d(x, up.weight.transpose(2, 0, 1), **how)
            self.assertClose(up(x), want, 1e-5)
