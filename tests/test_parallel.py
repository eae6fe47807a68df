"""Streams for work side by side."""

import mlx.core as mx
from common import Test

from parallel import parallel_streams


class TestParallel(Test):
    def test_streams_are_made_once(self):
        first, again = (parallel_streams() for _ in range(2))
        self.assertEqual(first, again)
        self.assertEqual(len(first), 2 if mx.default_device() == mx.cpu else 1)
