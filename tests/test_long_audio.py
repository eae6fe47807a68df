"""Windows that slide, audio prompts, batches."""

import math
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import AUDIOCRAFT, EXPECTED, REFERENCE, TRANSFORMERS, Test, exact, last

import engine
import musicgen
from musicgen import MusicGen
from prompt import encode_prompt


class TestLongAudio(Test):
    """Windows that slide, and codes that continue an audio prompt."""

    def load(self, name: str) -> MusicGen:
        model = exact(name)
        model.config.max_duration = 15 / 50
        return model

    def test_greedy_codes(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model = self.load(name)
            want = mx.load(str(REFERENCE / name / "continued.safetensors"))
            self.assertEqual("extended" in want, name in AUDIOCRAFT)
            sound, prompt = want["audio"][0].T, EXPECTED[name]["prompts"][0]
            self.assertSame(last(encode_prompt(model, sound, 15)), want["codes"])
            for case, audio_prompt in (
                ("continued", sound),
                ("extended", None),
                ("continued_extended", sound),
            ):
                if case not in want:
                    continue
                with self.subTest(name, case=case):
                    codes = model.generate_codes(
                        prompt,
                        duration=want[case].shape[2] / 50,
                        temp=0,
                        audio_prompt=audio_prompt,
                        extend_stride=9 / 50,
                    )
                    self.assertSame(last(codes), want[case])

    def test_windows(self):
        sixty = [(0, 1500), (900, 2400), (1800, 3000)]
        self.assertEqual(musicgen.windows(3000, 1500, 900), sixty)
        self.assertEqual(musicgen.windows(1500, 1500, 900), [(0, 1500)])
        self.assertEqual(musicgen.windows(1501, 1500, 900), [(0, 1500), (900, 1501)])
        self.assertEqual(musicgen.windows(1, 1500, 900), [(0, 1)])

    def test_stride_is_three_fifths_of_the_window(self):
        model = self.load("mono-audiocraft")
        options = dict(prompts="drums", duration=0.8, temp=0)
        codes = model.generate_codes(**options)
        self.assertSame(codes, model.generate_codes(**options, extend_stride=9 / 50))
        other = model.generate_codes(**options, extend_stride=5 / 50)
        self.assertNotEqual(other.tolist(), codes.tolist())
        self.assertSame(other[:, :15], codes[:, :15])

    def test_stopped_and_continued_is_the_same_take(self):
        model = self.load("stereo-audiocraft")

        options = dict(prompts="drums", seed=7, duration=0.8)
        whole = model.generate_codes(**options)
        self.assertEqual(whole.shape, (1, 40, 8))
        for T in (1, 14, 15, 16, 30, 39):
            codes = model.generate_codes(**options, codes_prompt=whole[:, :T])
            self.assertSame(codes, whole)

    def test_every_row_equals_its_run_alone(self):
        model = self.load("mono-audiocraft")
        rng = np.random.default_rng(0)
        words = "slow happy drums piano 808 loud guitar strings".split()
        sound = mx.array(rng.normal(size=(1000, 1)), mx.float32)
        for trial in range(4):
            B = int(rng.integers(2, 6))
            prompts = [
                " ".join(rng.choice(words, rng.integers(0, 8))) for _ in range(B)
            ]
            seeds = [int(seed) for seed in rng.integers(0, 2**63, B)]
            options = dict(
                duration=float(rng.uniform(0.1, 0.7)),
                guidance_coef=float(rng.choice([1, 3])),
                audio_prompt=sound if trial % 2 else None,
            )
            batch = model.generate_codes(prompts, seed=seeds, **options)
            split = model.generate_codes(prompts, seed=seeds, batch_size=2, **options)
            self.assertSame(split, batch)
            for row in range(B):
                alone = model.generate_codes(prompts[row], seed=seeds[row], **options)
                self.assertSame(alone[0], batch[row])

    def test_windows_draw_anew(self):
        model = self.load("mono-audiocraft")
        model.decoder.linears.weight *= 0  # all codes equally likely
        codes = np.array(model.generate_codes("a", duration=24 / 50, top_k=64, seed=0))
        # had the second window begun its noise again, 15 on would repeat 6 on
        self.assertLess((codes[0, 15:24] == codes[0, 6:15]).mean(), 0.2)

    def test_audio_prompt_ends_a_frame_before_the_end(self):
        model = self.load("mono-audiocraft")
        model.generate_codes("a", duration=0.1, audio_prompt=mx.ones((4 * 640, 1)))
        too_long = "audio prompt is 0.0800312 s long, but a duration of 0.1 s"
        with self.assertRaisesRegex(ValueError, too_long):
            longer = mx.ones((4 * 640 + 1, 1))
            model.generate_codes("a", duration=0.1, audio_prompt=longer)

    def test_negative_prompt(self):
        model = self.load("mono-audiocraft")
        options = dict(duration=0.2, temp=0)
        pulled = model.generate_codes(
            "drums", negative_prompt="piano", guidance_coef=0, **options
        )
        own = model.generate_codes("piano", guidance_coef=1, **options)
        self.assertSame(pulled, own)  # coefficient 0 leaves the null rows alone
        batch = model.generate_codes(["a", "drums"], negative_prompt="piano", **options)
        alone = model.generate_codes("drums", negative_prompt="piano", **options)
        self.assertSame(batch[1], alone[0])
        plain = model.generate_codes("drums", **options)
        self.assertNotEqual(alone.tolist(), plain.tolist())

    def test_memory_is_flat(self):
        if mx.default_device() != mx.cpu:
            self.skipTest("a GPU's memory comes in blocks larger than these caches")
        model = self.load("mono-audiocraft")
        peaks = {2: [], 10: []}
        for windows in (2, 10) * 3:  # the least of three: evaluation may lag behind
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            model.generate_codes("drums", duration=(15 + 9 * (windows - 1)) / 50)
            peaks[windows].append(mx.get_peak_memory() - before)
        # eight windows more, but not the caches of a single one; codes and keys grow
        caches = 2 * engine.cache_bytes(model.decoder, 15 + 3)
        self.assertLess(min(peaks[10]) - min(peaks[2]), caches)

    def test_split_where_memory_is_short(self):
        model, batches = self.load("mono-audiocraft"), []
        forward = model.make_forward

        def count(text, copies, steps):
            batches.append(len(text.mask) // copies)
            return forward(text, copies, steps)

        row = 2 * engine.cache_bytes(model.decoder, 10)
        room = engine.DECODING_MEMORY + 2.5 * row
        with patch("engine.memory_size", return_value=room), patch(
            "mlx.core.get_active_memory", return_value=0
        ):
            with patch.object(MusicGen, "make_forward", staticmethod(count)):
                model.generate_codes(["a"] * 5, duration=0.2)
        self.assertEqual(batches, [2, 2, 1])

    def test_progress(self):
        model = self.load("mono-audiocraft")
        codes = model.generate_codes("a", duration=0.8, seed=1)[:, :20]
        for prompts, batch_size, begin in (
            ("a", 1, None),
            (["a", "b", "c"], 2, None),
            ("a", 1, codes),
        ):
            take = model.steps(
                prompts, duration=0.8, batch_size=batch_size, codes_prompt=begin
            )
            total, steps = take.total, []
            self.assertEqual(take.step, 0)
            for same in take:
                self.assertIs(same, take)
                steps.append(take.step)
            self.assertEqual(steps, list(range(1, total + 1)))

    def test_channels_of_the_audio_prompt(self):
        rng = np.random.default_rng(0)
        sound = mx.array(rng.normal(size=(1300, 2)), mx.float32)
        mono, stereo = self.load("mono-audiocraft"), self.load("stereo-audiocraft")
        mixed = sound.mean(axis=1, keepdims=True)
        both = (encode_prompt(mono, audio, 9) for audio in (sound, mixed))
        self.assertSame(*both)
        codes = encode_prompt(stereo, mixed, 9)
        self.assertEqual(codes.shape, (1, 3, 8))
        self.assertSame(codes[..., ::2], codes[..., 1::2])
        own = encode_prompt(stereo, sound, 9)
        left = encode_prompt(stereo, sound[:, :1], 9)
        self.assertSame(own[..., ::2], left[..., ::2])
        self.assertNotEqual(own[..., 1::2].tolist(), left[..., 1::2].tolist())

    def test_drop_prompt(self):
        model = self.load("mono-audiocraft")
        sound = 0.1 * mx.random.normal((1300, 1))
        options = dict(prompts="a", duration=0.2, seed=0, audio_prompt=sound)
        whole = model.generate(**options)
        rest = model.generate(**options, drop_prompt=True)
        self.assertSame(rest, whole[:, 3 * 640 :])

    def test_bad_options(self):
        model = self.load("mono-audiocraft")
        for options, pattern in (
            (dict(extend_stride=0), "extend_stride must"),
            (dict(extend_stride=0.3), "extend_stride must"),
            (dict(extend_stride=math.nan), "extend_stride must"),
            (dict(batch_size=0), "batch_size must"),
            (dict(negative_prompt=None), "negative_prompt must"),
            (
                dict(negative_prompt="a", guidance_coef=1),
                "guidance_coef must be other than 1 beside a neg",
            ),
            (dict(audio_prompt=mx.zeros((0, 1))), "audio_prompt must have the shape"),
            (dict(audio_prompt=mx.zeros((9, 3))), "audio_prompt must have the shape"),
            (
                dict(audio_prompt=mx.zeros((1, 9, 1))),
                "audio_prompt must have the shape",
            ),
            (dict(audio_prompt=mx.array([[math.nan]])), "audio_prompt must be finite"),
            (
                dict(audio_prompt=mx.ones((6401, 1))),
                "audio prompt is 0.200031 s long, but a duration of 0.2 s",
            ),
        ):
            with self.subTest(pattern):
                with self.assertRaisesRegex(ValueError, pattern):
                    model.generate_codes("a", **(dict(duration=0.2) | options))
        with self.assertWarnsRegex(UserWarning, "silent"):
            model.generate_codes("a", duration=0.2, audio_prompt=mx.zeros((640, 1)))
