"""The codec's decoding in pieces, against the plain one."""

import mlx.core as mx
import numpy as np
from common import REFERENCE, Test, exact, slow

import encodec_stream
import prompt
from encodec import LSTM, Encodec, EncodecConfig
from encodec_stream import DecodingStream


class TestEncodecStream(Test):
    def setUp(self):
        super().setUp()
        self.random = np.random.default_rng(0)

    def assertSamePieces(self, model: Encodec, codes: mx.array):
        """However codes (B, T, K) are cut, decoded they are the plain decode's."""
        whole, T = model.decode_chunk(codes), codes.shape[1]
        self.assertEqual(whole.shape[1:], (T * model.config.hop_length, model.channels))
        for _ in range(4):
            cuts = self.random.integers(0, T + 1, self.random.integers(0, 5))
            cuts = sorted(cuts.tolist())
            stream = DecodingStream(model)
            pieces = [
                stream.push(codes[:, start:stop], last=stop is None)
                for start, stop in zip([0, *cuts], [*cuts, None])
            ]
            self.assertClose(mx.concatenate(pieces, axis=1), whole, 1e-5)

    def test_stream_equals_the_whole(self):
        for name in ("encodec_24khz", "encodec_32khz", "mono-audiocraft"):
            model = Encodec.from_pretrained(REFERENCE / name)
            K = model.config.num_codebooks()
            for T in (1, 2, 4, 7, 23, 60):
                codes = mx.array(self.random.integers(0, 64, (5, T, K)))
                self.assertSamePieces(model, codes)

    def test_stream_of_other_codecs(self):
        """Two channels, dilated blocks, other kernels, no LSTM."""
        sizes = dict(num_filters=4, hidden_size=6, codebook_size=16)
        sizes |= dict(audio_channels=2, target_bandwidths=(1.0,))
        for shape in (
            dict(num_residual_layers=3, dilation_growth_rate=3, residual_kernel_size=5),
            dict(upsampling_ratios=(2, 3, 7), kernel_size=4, last_kernel_size=10),
            dict(use_causal_conv=True, trim_right_ratio=0.4, pad_mode="constant"),
            dict(num_lstm_layers=0, use_conv_shortcut=True, compress=1),
        ):
            mx.random.seed(0)
            model = Encodec(EncodecConfig(**sizes | shape))
            K = model.config.num_codebooks()
            for T in (1, 3, 40):
                codes = mx.array(self.random.integers(0, 16, (2, T, K)))
                self.assertSamePieces(model, codes)

    def test_stream_cut_anywhere(self):
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            K = model.config.num_codebooks()
            codes = mx.array(self.random.integers(0, 64, (1, 16, K)))
            whole = model.decode_chunk(codes)
            for cut in range(17):
                stream = DecodingStream(model)
                parts = stream.push(codes[:, :cut]), stream.push(codes[:, cut:], True)
                self.assertClose(mx.concatenate(parts, axis=1), whole, 1e-5)

    def test_long_music(self):
        """Longer than the pieces that are decoded at a time to save memory."""
        model = Encodec.from_pretrained(REFERENCE / "encodec_32khz")
        codes = self.random.integers(0, 64, (3, 1100, model.config.num_codebooks()))
        codes = mx.array(codes)
        audio = DecodingStream(model).push(codes, last=True)
        self.assertClose(audio, model.decode_chunk(codes), 1e-5)

    def test_mono_and_stereo_models(self):
        """What `MusicGen.decode` gives, plain and not."""
        for name, channels in (("mono-transformers", 1), ("stereo-transformers", 2)):
            model = exact(name)
            K = model.config.decoder.num_codebooks
            for T in (1, 5, 130):
                codes = mx.array(self.random.integers(0, 64, (2, T, K)))
                model.plain = False
                fast = model.decode(codes)
                model.plain = True
                plain = model.decode(codes)
                self.assertEqual(plain.shape, (2, T * 640, channels))
                self.assertClose(fast, plain, 1e-5)
            left, right = codes[..., ::channels], codes[..., channels - 1 :: channels]
            for side, own in ((0, left), (-1, right)):
                alone = model.audio_encoder.decode_chunk(own)[..., 0]
                self.assertClose(plain[..., side], alone, 1e-5)

    def test_lstm(self):
        config = EncodecConfig(num_lstm_layers=3)
        lstm, x = LSTM(config, 6), mx.random.normal((2, 23, 6))
        for layer in lstm.lstm:
            layer.bias = mx.random.normal(layer.bias.shape)
        whole = lstm(x)
        self.assertClose(encodec_stream.advance(lstm, x)[0], whole, 1e-6)
        pieces, states = [], None
        for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
            piece, states = encodec_stream.advance(lstm, piece, states)
            pieces.append(piece)
        self.assertClose(mx.concatenate(pieces, axis=1), whole, 1e-6)

    def test_codes_are_the_plain_ones(self):
        for name in ("encodec_24khz", "encodec_32khz", "mono-audiocraft"):
            model = Encodec.from_pretrained(REFERENCE / name)
            bandwidth = model.config.target_bandwidths[-1]
            K = model.config.num_codebooks(bandwidth)
            for N in (1, 700, 32_000):
                audio = 0.1 * mx.random.normal((3, N, 1), key=mx.random.key(N))
                (want,) = model.encode(audio, bandwidth)
                self.assertSame(encodec_stream.encode(model, audio, K), want.codes)

    @slow(4)
    def test_codes_in_pieces_are_the_plain_ones(self):
        """However many frames are encoded at a time, and however the sound ends."""
        sizes = dict(num_filters=4, hidden_size=6, codebook_size=16)
        sizes |= dict(audio_channels=2, target_bandwidths=(1.0,))
        models = [
            Encodec.from_pretrained(REFERENCE / name)
            for name in ("encodec_24khz", "encodec_32khz")
        ]
        for shape in (
            dict(num_residual_layers=3, dilation_growth_rate=3, residual_kernel_size=5),
            dict(upsampling_ratios=(2, 3, 7), kernel_size=4, last_kernel_size=10),
            dict(use_causal_conv=True, trim_right_ratio=0.4, pad_mode="constant"),
            dict(num_lstm_layers=0, use_conv_shortcut=True, compress=1),
        ):
            mx.random.seed(0)
            models.append(Encodec(EncodecConfig(**sizes | shape)))
        for model in models:
            hop, K = model.config.hop_length, model.config.num_codebooks()
            for N in (1, hop, 5 * hop + 1, 23 * hop - 1, 40 * hop):
                shape = (2, N, model.channels)
                audio = mx.array(self.random.normal(size=shape) / 9, mx.float32)
                want = model.encode_chunk(audio, K).codes
                least = 2 if N < 6 * hop else 14
                for frames in (least, *self.random.integers(least, 90, 2).tolist()):
                    codes = encodec_stream.encode(model, audio, K, frames)
                    self.assertSame(codes, want)

    def test_downsampling_reach(self):
        """A frame does not depend on samples out of it, but on some near by."""
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            reach = encodec_stream.downsampling_reach(model.config)
            hop, layers = model.config.hop_length, model.encoder.layers
            (lstm,) = [i for i, x in enumerate(layers) if isinstance(x, LSTM)]
            for place in (0, 12 * hop, 12 * hop + hop // 2, 25 * hop - 1):
                audio = mx.zeros((1, 25 * hop, 1))
                changed = audio + (mx.arange(25 * hop)[:, None] == place)
                one, other = (
                    encodec_stream.apply(layers[:lstm], x) for x in (audio, changed)
                )
                different = mx.abs(one - other).max(axis=(0, 2)).tolist()
                frames = [i for i, much in enumerate(different) if much > 0]
                self.assertGreaterEqual(min(frames), place // hop - reach + 1)
                self.assertLessEqual(max(frames), place // hop + reach - 1)
                self.assertGreater(len(frames), int(0 < place < 24 * hop))

    def test_memory_of_a_long_prompt(self):
        if mx.default_device() != mx.cpu:
            self.skipTest("a GPU's memory comes in larger blocks")
        model, peaks = exact("mono-transformers"), []
        for seconds in (4, 40):
            audio = 0.1 * mx.random.normal((32000 * seconds, 1))
            mx.eval(audio)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            codes = prompt.encode_prompt(model, audio, frames=3000)
            mx.eval(codes)
            peaks.append(mx.get_peak_memory() - before - 2 * audio.nbytes)
        model.plain = True
        self.assertSame(codes, prompt.encode_prompt(model, audio, frames=3000))
        self.assertLess(peaks[1], 1.5 * peaks[0])

    def test_upsampling_in_pieces(self):
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            x = mx.random.normal((2, 23, 32))
            whole = x
            for layer in model.decoder.layers[2:]:
                whole = layer(whole)
            for frames in (1, 3, 4, 22, 100):
                upsample = encodec_stream.make_upsampler(model, 2, 2 * frames)
                self.assertClose(upsample(x, last=True), whole, 1e-5)

    def test_reach_is_exact(self):
        # changing a frame changes no sample out of reach, but the last one within
        for name in ("encodec_24khz", "encodec_32khz"):
            model = Encodec.from_pretrained(REFERENCE / name)
            before, after = encodec_stream.upsampling_reach(model.config)
            hop, x = model.config.hop_length, mx.random.normal((1, 15, 32))
            changed = x + mx.where(mx.arange(15)[:, None] == 7, 1.0, 0.0)

            def decode(x: mx.array) -> mx.array:
                for layer in model.decoder.layers[2:]:
                    x = layer(x)
                return x

            different = np.abs(np.array(decode(x) - decode(changed)))[0, :, 0] > 0
            (places,) = np.nonzero(different)
            self.assertGreaterEqual(places.min(), 7 * hop - after)
            self.assertLess(places.max(), 8 * hop + before)
            self.assertLessEqual(places.min(), 7 * hop - after + 1)
        self.assertEqual(encodec_stream.upsampling_reach(EncodecConfig())[1], 482)

    def test_group_norm_cannot_stream(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_48khz")
        with self.assertRaisesRegex(ValueError, "cannot decode a stream"):
            DecodingStream(model)
