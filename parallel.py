"""Streams of MLX for work that can be done side by side.

    for part, stream in zip(parts, parallel_streams()):
        with mx.stream(stream):
            ...

On the CPU each is a thread, and the plain BLAS of MLX's Linux wheel keeps to the thread
that calls it. Stands alone.
"""

import functools

import mlx.core as mx


def parallel_streams() -> list[mx.Stream]:
    """The default stream of the device, and on the CPU a second one, always the same."""
    device = mx.default_device()
    streams = [mx.default_stream(device)]
    # by name: devices that are equal are different keys of a cache
    return streams + ([second_stream(str(device))] if device == mx.cpu else [])


@functools.cache
def second_stream(device: str) -> mx.Stream:
    return mx.new_stream(mx.default_device())
