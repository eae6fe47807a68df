"""Notes of a sound, and the models that follow them."""

import json
import math
import subprocess
import sys
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds
from common import EXPECTED, REFERENCE, ROOT, Test, exact, expected, last

import convert
import demucs
import melody
import musicgen
from audio import load_audio, resample, save_audio
from decoder import Condition
from musicgen import MusicGen


class TestMelody(Test):
    def test_notes_are_those_of_transformers(self):
        want = mx.load(str(REFERENCE / "chroma.safetensors"))
        for rate in (32000, 44100):
            for make in (sounds.sweep, sounds.chords, sounds.noise):
                with self.subTest(make=make.__name__, rate=rate):
                    chroma = melody.extract_chroma(make(rate), rate)
                    self.assertSame(chroma.sum(axis=1), mx.ones(len(chroma)))
                    notes = mx.argmax(chroma, axis=1)
                    self.assertSame(notes, want[f"{make.__name__}_{rate}"])

    def test_chromagram_is_that_of_librosa(self):
        want = mx.load(str(REFERENCE / "chroma.safetensors"))
        for seed in range(20):
            audio = sounds.noise(32000, seed, seconds=0.6)
            found = melody.chromagram(audio, 32000)
            self.assertClose(found, want[f"librosa_{seed}"], 1e-5)

    def test_in_parts(self):
        audio = sounds.noise(32000)
        whole = melody.chromagram(audio, 32000)
        with patch("melody.FRAMES_AT_ONCE", 5):
            self.assertClose(melody.chromagram(audio, 32000), whole, 1e-5)

    def test_thirty_seconds_are_235_frames(self):
        audio = sounds.noise(32000, seconds=30)
        self.assertEqual(melody.extract_chroma(audio, 32000).shape, (235, 12))

    def test_channels_are_averaged(self):
        left = sounds.tune(32000, [60, 62])
        both = np.concatenate(
            [left, -0.9 * left + 1e-2 * sounds.noise(32000)[:32000]], 1
        )
        mono = both.mean(axis=1, keepdims=True)
        found = [melody.extract_chroma(x, 32000) for x in (both, mono)]
        self.assertSame(*found)

    def test_repeat(self):
        chroma = mx.eye(12)[:5]
        self.assertSame(melody.repeat(chroma, 3), chroma[:3])
        longer = melody.repeat(chroma, 12)
        rows = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
        self.assertSame(longer, chroma[mx.array(rows)])

    def test_tune_under_drums_and_bass(self):
        """The notes are those of the tune, once what covers them is taken away."""
        rate, notes = 44100, [60, 64, 67, 72, 71, 67, 65, 62]
        tune = sounds.tune(rate, notes)
        bass = 5 * sounds.tune(rate, [49] * len(notes))
        drums = 0.5 * sounds.noise(rate, seconds=len(tune) / rate)[: len(tune)]

        class Told:  # a separation that knows the parts
            sampling_rate, channels = rate, 2
            config = demucs.HTDemucsConfig()

            def separate(self, audio):
                parts = dict(drums=drums, bass=bass, other=tune, vocals=0 * tune)
                stems = [parts[name] for name in self.config.sources]
                return mx.array(np.stack(stems).repeat(2, axis=-1))

        mix = mx.array(tune + bass + drums)
        covered = melody.extract_chroma(mix, rate)
        clear = melody.extract_chroma(melody.isolate_melody(mix, rate, Told()), rate)
        beats = [int((i + 0.5) * 0.5 * 32000 / 4096) for i in range(len(notes))]
        heard = np.array(mx.argmax(clear, axis=1))[beats]
        self.assertEqual(heard.tolist(), [note % 12 for note in notes])
        drowned = np.array(mx.argmax(covered, axis=1))[beats]
        self.assertGreater((drowned == 1).sum(), 4)  # C#, which the bass plays

    def test_isolate_melody(self):
        model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        audio = mx.array(sounds.noise(32000, seconds=0.75))
        found = melody.isolate_melody(audio, 32000, model)
        self.assertEqual(found.shape, (24000, 1))
        low = resample(np.array(audio), 32000, 4000).repeat(2, axis=1)
        stems = model.separate(low)
        both = np.array(stems[2] + stems[3]).mean(axis=1, keepdims=True)
        self.assertClose(found, resample(both, 4000, 32000))

    def test_bad_input(self):
        for audio, pattern in (
            (mx.zeros((1, 20_000, 1)), "must have the shape"),
            (mx.zeros((20_000, 0)), "must have the shape"),
            (mx.ones((16383, 1)), "must have at least 0.512 s, got 0.512 s"),
            (mx.ones((0, 1)), "must have the shape"),
            (mx.full((20_000, 2), math.nan), "must be finite"),
            (mx.zeros((20_000, 2)), "must not be silent"),
        ):
            with self.assertRaisesRegex(ValueError, f"melody {pattern}"):
                melody.extract_chroma(audio, 32000)
        for tune in (mx.ones((16384, 1)), np.ones(16384)):  # mono, or (N,)
            self.assertEqual(melody.extract_chroma(tune, 32000).shape[0], 5)

    def test_drawing(self):
        chroma = mx.eye(12)[mx.array([0, 0, 4, 11])]
        lines = melody.draw(chroma).split("\n")
        self.assertEqual([line.split()[0] for line in lines], list(melody.NOTES[::-1]))
        self.assertEqual(lines[-1], "C  ██")
        self.assertEqual((lines[7], lines[0]), ("E    █", "B     █"))
        half = melody.draw(mx.eye(12)[mx.array([0, 4] * 50)], width=50).split("\n")
        self.assertEqual((half[-1], half[7]), ("C  " + "▒" * 50, "E  " + "▒" * 50))

    def test_script(self):
        path = self.folder / "tune.wav"
        save_audio(path, sounds.tune(44100, [60, 67]), 44100)
        command = [sys.executable, str(ROOT / "melody.py")]
        drawn = subprocess.run([*command, path], capture_output=True, text=True)
        self.assertEqual(drawn.stdout.count("\n"), 12, drawn.stderr)
        lost = subprocess.run([*command, "none.wav"], capture_output=True, text=True)
        self.assertEqual(lost.returncode, 1)
        self.assertRegex(lost.stderr, "^melody.py: error: There is no .*none.wav.\n$")


class TestMelodyModels(Test):
    def tune(self, which: int) -> mx.array:
        notes = EXPECTED["melody-transformers"]["tunes"][which]
        return mx.array(sounds.tune(32000, notes))

    def test_greedy_codes(self):
        prompts = EXPECTED["mono-transformers"]["prompts"][:2]
        for name in ("melody-transformers", "stereo-melody-transformers"):
            model, want = exact(name), expected(name)
            for which in (0, 1, "none"):
                with self.subTest(name, which=which):
                    tune = None if which == "none" else self.tune(which)
                    options = dict(duration=0.3, temp=0, melody=tune, separate=False)
                    codes = model.generate_codes(prompts, **options)
                    self.assertSame(last(codes), want[f"tune_{which}_codes"])

    def test_audiocraft(self):
        """One window, and several, through which the melody moves and wraps."""
        model, want = exact("melody-audiocraft"), expected("melody-audiocraft")
        told, prompts = (EXPECTED["melody-audiocraft"], EXPECTED["mono-transformers"])
        self.assertEqual(model.config.conditioner.chroma_length, 8)
        self.assertEqual(model.config.max_duration, 1.0)
        for frames in told["frames"]:
            for which in (0, 1, "none"):
                with self.subTest(frames=frames, which=which):
                    codes = model.generate_codes(
                        prompts["prompts"][:2],
                        duration=(frames + 0.5) / 50,
                        extend_stride=told["stride"] / 50,
                        temp=0,
                        melody=None if which == "none" else self.tune(which),
                        separate=False,
                    )
                    self.assertSame(last(codes), want[f"tune_{which}_{frames}"])

    def test_folders_as_they_were_written_once(self):
        path = self.folder / "out"
        convert.convert(str(REFERENCE / "melody-transformers"), path, mx.float32)
        config = json.loads((path / "config.json").read_text())
        own = config.pop("conditioner")
        self.assertEqual(config["decoder"].pop("prefix_width"), 12)
        config["decoder"] |= {k: own[k] for k in ("num_chroma", "chroma_length")}
        (path / "config.json").write_text(json.dumps(config))
        weights = mx.load(str(path / "model.safetensors"))
        weights = {
            k.replace("sound_proj", "melody_proj"): w for k, w in weights.items()
        }
        mx.eval(weights)
        mx.save_safetensors(str(path / "model.safetensors"), weights)
        model = MusicGen.from_pretrained(path)
        self.assertEqual(model.config, exact("melody-transformers").config)
        twice = {k.replace("melody_proj", "sound_proj"): w for k, w in weights.items()}
        mx.save_safetensors(str(path / "model.safetensors"), weights | twice)
        with self.assertRaisesRegex(ValueError, "safetensors: .*sound_proj.*twice"):
            MusicGen.from_pretrained(path)

    def test_batch_of_with_and_without(self):
        prompts = EXPECTED["mono-transformers"]["prompts"][:2]
        for name in ("melody-transformers", "stereo-melody-transformers"):
            model, want = exact(name), expected(name)
            for batch in (prompts, prompts[:1] * 3, prompts * 2):
                melodies = [self.tune(0), None, self.tune(1), None][: len(batch)]
                codes = model.generate_codes(
                    batch, duration=0.3, temp=0, melody=melodies, separate=False
                )
                which = ["0", "none", "1", "none"]
                for i, prompt in enumerate(batch):
                    row = prompts.index(prompt)
                    expected_row = want[f"tune_{which[i]}_codes"][row]
                    self.assertSame(last(codes)[i], expected_row)

    def test_samples_alone_and_in_a_batch(self):
        model, prompts = exact("melody-transformers"), ["a", "slow piano", "b", "drums"]
        melodies = [self.tune(0), None, None, self.tune(1)]
        options = dict(duration=0.4, separate=False, negative_prompt="soft strings")
        batch = model.generate_codes(prompts, seed=4, melody=melodies, **options)
        for i, (prompt, tune) in enumerate(zip(prompts, melodies)):
            alone = model.generate_codes(prompt, seed=4 + i, melody=tune, **options)
            self.assertSame(alone[0], batch[i])

    def test_one_dtype(self):
        for dtype in (mx.float16, mx.bfloat16):
            model = MusicGen.from_pretrained(REFERENCE / "melody-transformers", dtype)
            text = musicgen.encode_text(model, ["drums"])
            notes = mx.repeat(mx.eye(12)[None, :9], 2, axis=0)
            for model.plain in (True, False):
                forward = model.make_forward(text, 2, 40)
                forward.rewind(Condition(notes, mx.ones((2, 9), mx.bool_)))
                for _ in range(2):
                    logits = forward(mx.zeros((1, 1, 4), mx.int32))
                    self.assertEqual(logits.dtype, dtype)
                parts = [forward] if model.plain else forward._lanes
                for part in parts:
                    cache = part.cache if model.plain else part._cache
                    late = cache[-1].update_and_fetch(mx.zeros((2, 1, 0, 16), dtype))
                    self.assertEqual({array.dtype for array in late}, {dtype})

    def test_stream(self):
        model = exact("melody-transformers")
        options = dict(duration=0.5, seed=1, melody=self.tune(0), separate=False)
        whole = model.generate("drums", **options)
        pieces = list(model.stream("drums", chunk=0.1, **options))
        self.assertClose(mx.concatenate(pieces), whole[0], 1e-5)

    def test_files_and_integers(self):
        model, path = exact("melody-transformers"), self.folder / "x.wav"
        integers = np.rint(np.array(self.tune(0)) * 32000).astype(np.int16)
        soundfile.write(path, integers, 44100)
        options = dict(duration=0.2, seed=3, separate=False)
        with patch.object(model.conditioner, "max_duration", 0.6):
            sound = load_audio(path, 32000, 1)
            want = model.generate_codes(["a", "b"], melody=sound, **options)
            with patch("audio.resample", side_effect=resample) as resampled:
                for given in (path, [path, str(path)]):
                    got = model.generate_codes(["a", "b"], melody=given, **options)
                    self.assertSame(got, want)
            self.assertEqual(resampled.call_count, 2)  # rows share a file
        want = model.generate_codes("a", melody=mx.array(integers / 32768), **options)
        for given in (integers, mx.array(integers), integers[:, 0]):
            got = model.generate_codes("a", melody=given, **options)
            self.assertSame(got, want)

    def test_bad_input(self):
        with self.assertRaisesRegex(ValueError, "must go with a melody model"):
            exact("mono-transformers").generate_codes("a", melody=self.tune(0))
        model = exact("melody-transformers")
        for tune, pattern in (
            ([self.tune(0)], "a list of 2, one for each prompt, got a list of 1"),
            (mx.zeros((99, 1)), "at least 0.512 s"),
            ([None, mx.zeros((32000, 1))], "must not be silent"),
        ):
            options = dict(melody=tune, separate=False, duration=0.2)
            with self.assertRaisesRegex(ValueError, pattern):
                model.generate_codes(["a", "b"], **options)
