"""Streams of MLX for work that can be done side by side.

    for part, stream in zip(parts, parallel_streams()):
        with mx.stream(stream):
            ...

On the CPU each is a thread, and the plain BLAS of MLX's Linux wheel keeps to the thread
that calls it. Stands alone.
"""

import functools

import mlx.core as mx

Stream = mx.Device | mx.ThreadLocalStream


def parallel_streams() -> list[Stream]:
    """The default stream of the device, and on the CPU a second one, always the same.

    MLX binds a stream to the thread that made it. What is given here is bound to none:
    in each thread it stands for a stream of that thread's own.
    """
    device = mx.default_device()
    return [device, second_stream()] if device == mx.cpu else [device]


@functools.cache
def second_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)
