"""The codec: codes and samples."""

import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import soundfile
from common import EXPECTED, REFERENCE, Test, expected, last

import encodec
import encodec_files
import limits
from audio import save_audio
from encodec import Encodec, EncodecConfig


class TestEncodec(Test):
    def test_encode_and_decode(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            model, want = Encodec.from_pretrained(REFERENCE / name), expected(name)
            for bandwidth in EXPECTED[name]["bandwidths"]:
                with self.subTest(name, bandwidth=bandwidth):
                    chunks = model.encode(last(want["audio"]), bandwidth)
                    codes = want[f"codes_{bandwidth}"]
                    self.assertEqual(len(chunks), len(codes))
                    for i, (got, scale) in enumerate(chunks):
                        self.assertSame(last(got), codes[i, ..., : got.shape[1]])
                        if scale is not None:
                            scales = want[f"scales_{bandwidth}"][i]
                            self.assertClose(scale[..., 0], scales)
                    audio = model.decode(chunks)
                    self.assertClose(last(audio), want[f"decoded_{bandwidth}"])

    def test_audio_shorter_than_its_padding(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            model, want = Encodec.from_pretrained(REFERENCE / name), expected(name)
            bandwidth = model.config.target_bandwidths[-1]
            chunks = model.encode(last(want["short_audio"]), bandwidth)
            self.assertSame(last(chunks[0][0]), want["codes_short"][0])
            self.assertClose(last(model.decode(chunks)), want["decoded_short"])

    def test_audiocraft(self):
        model = Encodec.from_pretrained(REFERENCE / "mono-audiocraft")
        self.assertEqual(model.config.pad_mode, "constant")  # as its xp.cfg says
        want = expected("mono-audiocraft")
        for kind in ("", "short_"):
            ((codes, _),) = model.encode(last(want[f"{kind}audio"]))
            self.assertSame(last(codes), want[f"{kind}codes"])
            self.assertClose(last(model.decode_chunk(codes)), want[f"{kind}decoded"])

    def test_transposed_convolution(self):
        for causal, out_channels, stride in ((True, 3, 4), (False, 2, 5)):
            config = EncodecConfig(use_causal_conv=causal)
            layer = encodec.ConvTranspose1d(config, 6, out_channels, stride)
            layer.conv.bias = mx.random.normal((out_channels,))
            x = mx.random.normal((2, 7, 6))
            plain = mx.conv_transpose1d(
                x, layer.conv.weight.transpose(1, 0, 2), stride=stride
            )
            right = stride if causal else stride // 2
            plain = plain[:, stride - right : plain.shape[1] - right]
            self.assertClose(layer(x), plain + layer.conv.bias, 1e-5)

    def test_silence(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_48khz")
        chunk = model.encode(mx.zeros((1, 4000, 2)))[0]
        self.assertClose(1e8 * chunk.scale, mx.ones((1, 1, 1)), 1e-5)
        self.assertLess(mx.abs(model.decode([chunk])).max().item(), 1e-6)

    def test_default_bandwidth_is_the_smallest(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_24khz")
        audio = mx.random.normal((1, 4000, 1))
        smallest = min(model.config.target_bandwidths)
        self.assertSame(
            model.encode(audio)[0].codes, model.encode(audio, smallest)[0].codes
        )

    def test_bad_config(self):
        for change, pattern in (
            ({"upsampling_ratios": "abc"}, "upsampling_ratios must be a list"),
            ({"upsampling_ratios": [0, 1]}, "upsampling_ratios must be from 1"),
            ({"upsampling_ratios": []}, "upsampling_ratios must be a list of 1 to 8"),
            ({"upsampling_ratios": [2] * 9}, "ratios must be a list of 1 to 8"),
            ({"upsampling_ratios": [2**20]}, "upsampling_ratios must be from 1"),
            ({"upsampling_ratios": [[2]]}, "upsampling_ratios must be from 1"),
            ({"target_bandwidths": []}, "target_bandwidths must be a list of 1 to 8"),
            ({"target_bandwidths": ["1"]}, "target_bandwidths must be from"),
            ({"target_bandwidths": [1000]}, "target_bandwidths must .* 128 codebooks"),
            ({"sampling_rate": 0}, "sampling_rate must be"),
            ({"sampling_rate": 10**9}, "sampling_rate must be"),
            ({"sampling_rate": "x"}, "sampling_rate must be"),
            ({"codebook_size": 0}, "codebook_size must be"),
            ({"overlap": 1}, "overlap must be"),
            ({"overlap": math.nan}, "overlap must be"),
            ({"overlap": []}, "overlap must be"),
            ({"trim_right_ratio": [1]}, "trim_right_ratio must be"),
            ({"hidden_size": []}, "hidden_size must be"),
            ({"chunk_length_s": 1e-9}, "chunk_length_s must be"),
            (
                dict(chunk_length_s=1e-3, sampling_rate=900, target_bandwidths=[0.1]),
                "chunk_length_s must be at least a sample",
            ),
            ({"compress": 9999}, "compress must be at most num_filters, 2, got 9999"),
            ({"num_lstm_layers": 10**6}, "num_lstm_layers must be"),
            ({"num_residual_layers": 10**6}, "num_residual_layers must be"),
            ({"kernel_size": 10**6}, "kernel_size must be"),
            ({"num_filters": 10**12}, "num_filters must be"),
            ({"num_filters": None}, "num_filters must be"),
            ({"pad_mode": "edge"}, "pad_mode must be one of"),
            ({"normalize": "yes"}, "normalize must be one of"),
        ):
            with self.subTest(change):
                folder = self.copy("encodec_48khz")
                path = folder / "config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | change))
                with self.assertRaisesRegex(ValueError, f"Codec {folder}.*{pattern}"):
                    Encodec.from_pretrained(folder)
                shutil.rmtree(folder)
        folder = self.copy("encodec_48khz")
        for text in ("[]", "{", "[" * 100_000):
            (folder / "config.json").write_text(text)
            with self.assertRaisesRegex(ValueError, "config.json (must|is no JSON)"):
                Encodec.from_pretrained(folder)

    def test_unusual_codec(self):
        """Of 800 Hz, kernels of 101 and ratios of 80: not published, but no harm."""
        folder = self.copy("encodec_32khz")
        path = folder / "config.json"
        config = json.loads(path.read_text())
        usual, audio = Encodec.from_pretrained(folder), mx.random.normal((1, 3000, 1))
        rate, bandwidths = config["sampling_rate"], config["target_bandwidths"]
        frames = math.ceil(800 / usual.config.hop_length), usual.config.frame_rate
        bandwidths = [b * frames[0] / frames[1] for b in bandwidths]
        slow = {"sampling_rate": 800, "target_bandwidths": bandwidths}
        path.write_text(json.dumps(config | slow))
        codec = Encodec.from_pretrained(folder)
        self.assertEqual((codec.sampling_rate, rate), (800, usual.sampling_rate))
        chunks = codec.encode(audio)
        self.assertSame(chunks[0].codes, usual.encode(audio)[0].codes)
        self.assertSame(codec.decode(chunks), usual.decode(chunks))
        sizes = dict(num_filters=2, hidden_size=8, codebook_size=16, num_lstm_layers=1)
        sizes |= dict(upsampling_ratios=(80,), kernel_size=101, target_bandwidths=(6,))
        limits.check_codec(config := EncodecConfig(**sizes))
        codec = Encodec(config)
        again = codec.decode(codec.encode(audio))
        self.assertEqual(again.shape, (1, 3040, 1))
        self.assertTrue(mx.isfinite(again).all().item())

    def test_bad_input(self):
        model = Encodec.from_pretrained(REFERENCE / "encodec_24khz")
        for shape in ((1, 0, 1), (1, 100, 2), (100, 1)):
            with self.assertRaisesRegex(ValueError, "audio must have the shape"):
                model.encode(mx.zeros(shape))
        with self.assertRaisesRegex(ValueError, "bandwidth must be one of"):
            model.encode(mx.zeros((1, 100, 1)), bandwidth=5)

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.flac"
        save_audio(source, 0.1 * mx.random.normal((9000, 1)), 44100)
        model = str(REFERENCE / "encodec_48khz")
        arguments = ["encodec.py", str(source), str(target), "--model", model]
        with patch("sys.argv", arguments + ["--bandwidth", "3.6"]):
            with redirect_stdout(io.StringIO()):
                encodec_files.main(Encodec)
        audio, rate = soundfile.read(target)
        self.assertEqual((audio.shape, rate), ((9000 * 480 // 441, 2), 48000))
        with patch("sys.argv", arguments + ["--bandwidth", "99", "--force"]):
            with self.assertRaisesRegex(SystemExit, "bandwidth must be one of"):
                encodec_files.main(Encodec)
        for name, more, told in (
            ("out.xyz", [], "must end in"),
            ("no/out.wav", [], "must exist"),
            ("out.flac", [], "out.flac is there already: .* with --force"),
            ("in.wav", ["--force"], "in.wav must not be written, since it is read"),
        ):
            arguments[2:] = [str(self.folder / name), "--model", model, *more]
            with patch("sys.argv", arguments):
                with patch.object(Encodec, "from_pretrained") as load:
                    with redirect_stderr(io.StringIO()) as err:
                        with self.assertRaisesRegex(SystemExit, told) as stop:
                            encodec_files.main(Encodec)
            load.assert_not_called()
            self.assertEqual(f"{stop.exception}{err.getvalue()}".count("\n"), 0)
