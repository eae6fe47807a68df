"""The small codec: its loss, its codebooks, its start."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import Test

import synth
import train_codec
from encodec import Encodec


class TestTrainCodec(Test):
    def test_codebooks_follow(self):
        seen = mx.random.normal((64, 4), key=mx.random.key(0)) + 3
        books = mx.zeros((8, 4))
        state = dict(counts=mx.zeros(8), sums=mx.zeros((8, 4)))
        for _ in range(300):
            _, _, (taken,) = train_codec.quantize(seen, [books])
            key = mx.random.key(1)
            books, state = train_codec.follow(books, state, seen, taken, key)
        _, _, (taken,) = train_codec.quantize(seen, [books])
        self.assertEqual(len(set(taken.tolist())), 8)  # the dead were revived
        for entry in range(8):
            own = seen[mx.array(np.flatnonzero(np.array(taken) == entry))]
            self.assertClose(books[entry], own.mean(axis=0), 0.1)

    def test_elu_can_be_trained(self):
        """Where x is large, too, of which `nn.elu` makes no number."""
        x = mx.array([-50.0, -3.0, -0.5, 0.5, 3.0, 100.0])
        slope = mx.grad(lambda x: train_codec.elu(x).sum())(x)
        self.assertClose(slope, mx.where(x > 0, 1, mx.exp(x)), 1e-6)
        self.assertSame(train_codec.elu(x), nn.elu(x))
        codec = train_codec.with_gradients(Encodec(train_codec.CODEC))
        kinds = {type(m) for _, m in codec.named_modules()}
        self.assertIn(train_codec.ELU, kinds)
        self.assertNotIn(nn.ELU, kinds)

    def test_codec_starts_even(self):
        """Sound comes through before any step, quietly."""
        codec = Encodec(train_codec.CODEC)
        train_codec.start_even(codec)
        sound = mx.array(synth.make(1, seconds=1.0)[2])[None, :, None]
        states = codec.encoder(sound)
        self.assertTrue(0.1 < mx.abs(states).mean() < 1)
        self.assertTrue(0.01 < mx.abs(codec.decoder(states)).mean() < 0.2)

    def test_codec_learns_through_its_codes(self):
        """The encoder hears of the sound, not of the codebooks alone."""
        codec = train_codec.with_gradients(Encodec(train_codec.CODEC))
        train_codec.start_even(codec)
        state = train_codec.first_codebooks(mx.random.key(0))
        sound = mx.array(synth.make(1, seconds=0.5)[2])[None]

        def encoder_gradient(part: int) -> float:
            loss = lambda m: train_codec.codec_loss(m, state, sound)[1][
                part
            ]  # noqa: E731
            gradient = nn.value_and_grad(codec, loss)(codec)[1]
            return mx.abs(gradient["encoder"]["layers"][0]["conv"]["weight"]).max()

        for part in range(3):
            self.assertGreater(encoder_gradient(part).item(), 1e-6)

    def test_stft_distance(self):
        sound = mx.random.normal((1, 8000), key=mx.random.key(0))
        self.assertEqual(train_codec.stft_distance(sound, sound).item(), 0)
        self.assertGreater(train_codec.stft_distance(sound, 0.5 * sound).item(), 0.4)
