"""AudioGen: sounds of 16 kHz by T5-large, with a window, stride and duration of its own."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import manifests
import mlx.core as mx
import soundfile
from common import EXPECTED, REFERENCE, ScriptTest, Test, exact, expected, last, slow

import audiocraft
import checkpoints
import convert
import decoder
import encodec_files
import hub
import lines
import published
import settings
import t5_files
from checkpoints import MusicGenConfig, read_config
from decoder import Decoder
from encodec import Encodec, EncodecConfig
from musicgen import MusicGen
from options import Options
from prompt import encode_prompt
from t5 import T5, T5Config

NAME = "audiogen-audiocraft"


class TestAgainstAudiocraft(Test):
    """Nothing but the prompt and greedy choices is given to either."""

    def test_greedy_codes_of_a_window(self):
        model, want = exact(NAME), expected(NAME)
        codes = model.generate_codes(EXPECTED[NAME]["prompts"], temp=0)
        self.assertEqual(codes.shape, (3, 250, 4))  # 5 s
        self.assertSame(last(codes), want["codes"])
        asked = asdict(Options(temp=0))
        alone = model.generate_codes(EXPECTED[NAME]["prompts"][1], **asked)
        self.assertSame(alone[0], codes[1])

    @slow(3)
    def test_greedy_codes_of_several_windows(self):
        model, want = exact(NAME), expected(NAME)
        options = dict(duration=EXPECTED[NAME]["long"], temp=0)
        codes = model.generate_codes(EXPECTED[NAME]["prompts"][0], **options)
        self.assertSame(last(codes), want["long_codes"])
        start, stop = EXPECTED[NAME]["seam"]
        audio = model.decode(codes[:, start:stop])
        self.assertClose(last(audio), want["long_audio"])
        other = dict(extend_stride=6.0) | options
        other = model.generate_codes(EXPECTED[NAME]["prompts"][0], **other)
        self.assertSame(other[:, :500], codes[:, :500])
        self.assertNotEqual(other.tolist(), codes.tolist())

    def test_sound(self):
        model, want = exact(NAME), expected(NAME)
        self.assertEqual((model.sampling_rate, model.frame_rate), (16000, 50))
        self.assertEqual((model.channels, model.longest_window), (1, 500))
        codes = last(want["codes"])[:1, :15]
        self.assertClose(last(model.decode(codes)), want["audio"])
        for sound, heard in zip(want["sound"], want["sound_codes"]):
            codes = encode_prompt(model, sound.T, 100)
            self.assertSame(last(codes)[0], heard)

    def test_a_stream_lasts_as_long(self):
        model = exact(NAME)
        model.config.default_duration = 0.3
        audio = mx.concatenate([*model.stream("drums", seed=1)])
        self.assertClose(audio, model.generate("drums", seed=1)[0])
        self.assertEqual(audio.shape, (4800, 1))


class TestDefaults(Test):
    def test_of_each_layout(self):
        folder = self.folder / "ours"
        convert.convert(str(REFERENCE / NAME), folder, mx.float32)
        for path in (REFERENCE / NAME, folder):
            config = checkpoints.read(str(path)).config
            self.assertEqual((config.max_duration, config.default_duration), (10, 5))
            self.assertEqual(config.default_stride, 2)
        self.assertEqual(MusicGen.from_pretrained(folder).sampling_rate, 16000)
        for name in ("mono-audiocraft", "mono-transformers"):
            config = checkpoints.read(str(REFERENCE / name)).config
            self.assertEqual(
                (config.default_duration, config.default_stride), (8, None)
            )

    def test_by_the_solver_and_else_by_the_rate(self):
        for cfg, rate, seconds, own in (
            ({"solver": "audiogen"}, 16000, 10.0, True),
            ({"solver": "audiogen"}, 32000, 10.0, True),
            ({"solver": "musicgen"}, 16000, 10.0, False),
            ({}, 16000, 10.0, True),
            ({}, 32000, 30.0, False),
            ({"solver": "audiogen"}, 16000, 2.0, False),  # no stride of 2 s in 2 s
        ):
            codec = {"sampling_rate": rate}
            found = published.own_defaults(cfg, codec, seconds)
            self.assertEqual(found, published.AUDIOGEN if own else {}, (cfg, rate))

    def test_absurd_ones_are_refused(self):
        folder = self.folder / "ours"
        convert.convert(str(REFERENCE / NAME), folder, mx.float16)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, values in (
            ("default_duration", (0, -1, 1e9, "5", None, True, float("nan"))),
            ("default_stride", (0, -1, 10.1, "2", [2], True, float("nan"))),
        ):
            for value in values:
                path.write_text(json.dumps(config | {name: value}))
                pattern = f"{path} does not load: {name} must be from .* seconds, got"
                with self.assertRaisesRegex(ValueError, pattern):
                    MusicGen.from_pretrained(folder)

    def test_lines_know_them_all(self):
        """Of files made before the model is loaded."""
        own = {
            published.AUDIOGEN["default_duration"],
            MusicGenConfig().default_duration,
        }
        self.assertEqual({*lines.DURATIONS}, own)


class TestCommand(ScriptTest):
    """Where no --duration is given, the model's own counts."""

    def setUp(self):
        super().setUp()
        model = self.folder / "model"
        convert.convert(str(REFERENCE / NAME), model, mx.float16)
        path = model / "config.json"
        config = json.loads(path.read_text()) | {"default_duration": 0.3}
        path.write_text(json.dumps(config))
        self.model, self.out = str(model), self.folder / "x.wav"

    def make(self, *flags: str, name: str = "x.wav") -> dict:
        status, _, err = self.run_script(*flags, "-o", self.folder / name, "--force")
        self.assertEqual(status, 0, err)
        return settings.read_settings(self.folder / name)

    def test_a_take(self):
        told = self.make("drums", "-m", self.model, "-s", "1")
        self.assertEqual(told["duration"], 0.3)
        self.assertEqual(soundfile.info(self.out).frames, 4800)
        again = self.make("--again", self.out, "--temp", "0.9", name="again.wav")
        self.assertEqual(again["duration"], 0.3)
        longer = self.make("--again", self.out, "-d", "0.4", name="longer.wav")
        self.assertEqual(longer["duration"], 0.4)
        told = self.make("drums", "-m", self.model, "--stream", name="stream.wav")
        self.assertEqual(told["duration"], 0.3)

    def test_eight_may_be_asked_of_a_file(self):
        """A flag of the usual length counts beside what the file says."""
        self.make("drums", "-m", self.model, "-s", "1")
        with patch("generate.make", return_value=0) as make:
            self.run_script("--again", self.out, "-d", "8", "-o", "y.wav")
        self.assertEqual(make.call_args.args[0][0].options.duration, 8)

    def test_codes_go_on(self):
        codes = self.folder / "c.safetensors"
        self.make("drums", "-m", self.model, "--save-codes", codes)
        told = self.make("--resume", codes, "-d", "0.5", name="longer.wav")
        self.assertEqual(told["duration"], 0.5)

    def test_a_file_of_prompts(self):
        prompts = self.folder / "p.jsonl"
        prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "duration": 0.2}\n')
        flags = ("--prompts", prompts, "-m", self.model, "-s", "1")
        flags += ("-o", self.folder / "p.wav")
        status, out, err = self.run_script(*flags)
        self.assertEqual((status, out.count("times real time")), (0, 2), err)
        lengths = [soundfile.info(self.folder / f"p-{n}.wav").duration for n in (1, 2)]
        self.assertEqual(lengths, [0.3, 0.2])
        status, out, err = self.run_script(*flags)
        self.assertEqual((out, err.count("skipped")), ("Nothing is left to make.\n", 2))
        _, _, err = self.run_script(*flags, "-d", "0.1")
        self.assertIn("p-1.wav is made again: duration was 0.3 and is 0.1", err)
        _, _, err = self.run_script(*flags)
        self.assertIn("p-1.wav is made again: duration was 0.1 and is 0.3", err)


class TestPublished(Test):
    """Strict loads at full size, from lazy arrays that are never computed."""

    def arrays(self, name: str) -> dict[str, mx.array]:
        tensors = manifests.expand(manifests.read()["tensors"][name])
        return {
            name: mx.zeros(shape, getattr(mx, dtype))
            for name, (dtype, shape) in tensors.items()
        }

    def test_all_parts(self):
        weights = self.arrays("audiogen-medium.audiocraft")
        config = audiocraft.decoder_settings(weights, {})
        config = decoder.read_config(config, config["prefix_width"])
        self.assertEqual((config.hidden_size, config.num_hidden_layers), (1536, 48))
        self.assertEqual((config.num_codebooks, config.delays), (4, (0, 1, 2, 3)))
        text = T5Config.from_dict(manifests.read()["configs"]["t5-large"])
        model = Decoder(config, text_width=text.d_model)
        model.load_weights(list(audiocraft.name_decoder(weights).items()))
        weights = t5_files.sanitize(self.arrays("t5-large.transformers"))
        T5(text).load_weights(list(weights.items()))
        weights = self.arrays("encodec_16khz_audiogen.audiocraft")
        cfg = {"sample_rate": "16000", "seanet.pad_mode": "constant"}
        codec = EncodecConfig.from_dict(audiocraft.codec_settings(weights, cfg))
        self.assertEqual(
            (codec.upsampling_ratios, codec.frame_rate), ((8, 5, 4, 2), 50)
        )
        self.assertEqual((codec.codebook_size, codec.num_codebooks()), (2048, 4))
        Encodec(codec).load_weights(list(encodec_files.sanitize(weights).items()))
        settings = dict(model_type="musicgen", decoder=asdict(config))
        settings |= dict(text_encoder=asdict(text), audio_encoder=asdict(codec))
        read_config(settings | published.AUDIOGEN | {"max_duration": 10.0})  # in limits

    def test_short_name_fetches_exactly_what_it_needs(self):
        folders = {
            "facebook/audiogen-medium": REFERENCE / NAME,
            "google-t5/t5-large": REFERENCE / NAME / "t5-large",
        }
        fetched, cache = [], self.folder / "hub"

        def download(repo: str, name: str, **options) -> str:
            fetched.append((repo, name))
            (cache / repo).mkdir(parents=True, exist_ok=True)
            return shutil.copy(folders[repo] / name, cache / repo / name)

        with patch("huggingface_hub.hf_hub_download", download):
            model = MusicGen.from_pretrained("audiogen-medium")
        self.assertEqual(model.config.default_duration, 5)
        names = dict(zip(folders, (hub.AUDIOCRAFT_FILES, t5_files.FILES)))
        wanted = [(repo, name) for repo, files in names.items() for name in files]
        self.assertEqual(sorted(fetched), sorted(wanted))
        self.assertEqual(Path(hub.MODELS["audiogen-medium"]).name, "audiogen-medium")
