"""alone.py's trials of what trains."""

from argparse import Namespace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def try_train_codec(train_codec):
    import encodec

    codec = train_codec.with_gradients(encodec.Encodec(train_codec.CODEC))
    state = train_codec.first_codebooks(mx.random.key(0))
    noise = mx.array(np.random.default_rng(0).normal(size=(1, 6400)) / 9)
    loss, losses, _ = train_codec.codec_loss(codec, state, noise)
    assert mx.isfinite(loss).item() and losses.shape == (3,)


def try_train_lm(train_lm):
    songs = train_lm.attended(mx.ones((2, 1, 3), mx.bool_), mx.array([4]), 6)
    assert songs.shape == (1, 6, 6) and songs[0, 3, :3].all() and songs[0, 4, 3:].all()


def try_train_magnet(train_magnet):
    spans = train_magnet.Spans(30, 3)
    sizes = [mx.array(x) for x in ([0.5, 0.5], [0, 10], [30, 5])]
    masked = spans(*sizes, mx.random.key(0))
    assert masked.shape == (2, 30) and 5 <= masked[0].sum().item() <= 25
    assert not masked[1, :10].any() and masked[1, 10:15].any()


def try_training(training):
    args = Namespace(lr=0.1, steps=2, seconds=9, seed=0, resume=False)
    loss = lambda model, x: (model(x).sum(), mx.zeros(1), {})  # noqa: E731
    trained = training.Training(nn.Linear(2, 1), loss, args, Path(), {}, {})
    trained.run(lambda: (mx.ones((1, 2)),), ("loss",), lambda: None)
    assert trained.done == 2
