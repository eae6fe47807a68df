"""Codes and sounds of prompts, whole and as a stream."""

import dataclasses
import inspect
import itertools
import math
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import (
    AUDIOCRAFT,
    EXPECTED,
    REFERENCE,
    TRANSFORMERS,
    Test,
    exact,
    expected,
    last,
    slow,
)
from mlx.utils import tree_flatten

from encodec_stream import play
from musicgen import MusicGen, encode_text
from options import Options


class TestFrames(Test):
    def test_whole_numbers_but_for_rounding(self):
        """All others are cut, as in the original."""
        model = MusicGen.from_pretrained("tiny")
        grid = [round(0.02 * i, 2) for i in range(1, 1501)]
        self.assertEqual(sum(int(50 * s) != i for i, s in enumerate(grid, 1)), 73)
        for frames, seconds in enumerate(grid, 1):
            self.assertEqual(model.frames_in(seconds), frames)
        for seconds in np.random.default_rng(0).uniform(0.02, 600, 10_000):
            self.assertEqual(model.frames_in(seconds), int(50 * seconds))
        for seconds, frames in (
            (2.3, 115),
            (2.2999999, 114),
            (2.31, 115),
            (2.319, 115),
        ):
            self.assertEqual(model.frames_in(seconds), frames)
        codes = model.generate_codes("bell", duration=2.3, temp=0)
        self.assertEqual(codes.shape[1], 115)
        take = model.steps("bell", duration=2.3, codes_prompt=codes[:, :114])
        self.assertEqual(take.total, 1 + 3)
        with self.assertRaisesRegex(ValueError, "The codes are 2.3 s long already"):
            model.steps("bell", duration=2.3, codes_prompt=codes)


class TestGenerate(Test):
    def test_greedy_codes(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model, want = exact(name), expected(name)
            prompts = EXPECTED[name]["prompts"]
            duration = EXPECTED[name]["frames"] / model.frame_rate
            for guidance in (1, 3, 4.5):
                options = dict(duration=duration, temp=0, guidance_coef=guidance)
                with self.subTest(name, guidance=guidance):
                    codes = model.generate_codes(prompts, **options)
                    self.assertSame(last(codes), want[f"batch_g{guidance}_codes"])
                    alone = model.generate_codes(prompts[0], **options)
                    self.assertSame(alone[0], codes[0])
                    if name in TRANSFORMERS:
                        self.assertSame(last(alone), want[f"one_g{guidance}_codes"])

    def test_audio(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            model, want = exact(name), expected(name)
            codes = want["batch_g3_codes"][:1]
            self.assertClose(last(model.decode(last(codes))), want["one_g3_audio"])

    def test_take_is_the_same_alone_and_in_a_batch(self):
        model = exact("stereo-audiocraft")
        prompts = [
            "slow piano",
            "",
            "808 drums and a very long guitar solo",
            "slow piano",
        ]
        batch = model.generate_codes(prompts, duration=0.4, seed=11)
        for row, prompt in enumerate(prompts):
            alone = model.generate_codes(prompt, duration=0.4, seed=11 + row)
            self.assertSame(alone[0], batch[row])
        listed = model.generate_codes(prompts[:2], duration=0.4, seed=[12, 12])
        self.assertSame(listed[1], batch[1])
        self.assertNotEqual(batch[0].tolist(), batch[3].tolist())

    def test_no_guidance_by_the_text_is_the_null_rows(self):
        model = exact("mono-audiocraft")
        null = model.generate_codes("", duration=0.3, temp=0, guidance_coef=1)
        guided = model.generate_codes("drums", duration=0.3, temp=0, guidance_coef=0)
        self.assertSame(guided, null)
        empty = model.generate_codes("", duration=0.3, temp=0, guidance_coef=3)
        self.assertSame(empty, null)
        mask = encode_text(model, ["", "drums"], Options(guidance_coef=1)).mask
        self.assertSame(mask.any(axis=1), [False, True])

    def test_text_encoder_is_freed_where_memory_is_short(self):
        for name in ("mono-transformers", "stereo-audiocraft"):
            model = exact(name)
            codes = model.generate_codes("drums", duration=0.1, seed=1)
            self.assertIsNotNone(model.text_encoder)
            with patch("engine.mx.get_memory_limit", return_value=10**6):
                for _ in range(2):  # and loaded again for the next text
                    again = model.generate_codes("drums", duration=0.1, seed=1)
                    self.assertIsNone(model.text_encoder)
                    self.assertSame(again, codes)

    def test_every_step_draws_anew(self):
        model = exact("mono-audiocraft")
        model.decoder.linears.weight *= 0  # all codes equally likely
        codes = np.array(model.generate_codes("a", duration=1.0, top_k=64, seed=0))
        for k in range(4):
            self.assertGreater(len(np.unique(codes[0, :, k])), 20)

    def test_dtype_on_a_gpu(self):
        with patch("musicgen.mx.default_device", return_value=mx.gpu):
            for name in ("mono-audiocraft", "mono-transformers"):
                model = MusicGen.from_pretrained(REFERENCE / name)
                self.assertEqual(model.decoder.dtype, mx.float16)
                for part in (model.text_encoder, model.audio_encoder):
                    dtypes = {w.dtype for _, w in tree_flatten(part.parameters())}
                    self.assertEqual(dtypes, {mx.float32})

    def test_shapes(self):
        model = exact("stereo-transformers")
        audio = model.generate(["a", "b"], duration=0.239, seed=0)
        self.assertEqual(audio.shape, (2, 11 * 640, 2))
        self.assertEqual(audio.dtype, mx.float32)
        self.assertEqual(model.generate_codes("a", duration=0.02).shape, (1, 1, 8))

    @slow(3)
    def test_half_precision(self):
        single = exact("mono-transformers")
        for dtype in (mx.float16, mx.bfloat16):
            model = MusicGen.from_pretrained(REFERENCE / "mono-transformers", dtype)
            self.assertEqual(model.decoder.dtype, dtype)
            codes = model.generate_codes("drums", duration=0.1, temp=0)
            want = single.generate_codes("drums", duration=0.1, temp=0)
            self.assertSame(codes[:, 0], want[:, 0])

    def test_codes_that_are_none(self):
        """MLX would read what lies beyond the codebooks."""
        for name in ("mono-audiocraft", "stereo-transformers"):
            model = MusicGen.from_pretrained(REFERENCE / name)
            K = model.config.decoder.num_codebooks
            good = mx.full((1, 9, K), 63)
            for plain in (False, True):
                model.plain = plain
                self.assertEqual(model.decode(good).shape[1], 9 * 640)
                for bad in (
                    good + 1,
                    good - 64,
                    good + 10**6,
                    good.astype(mx.float32),
                    good[0],
                    good[..., 1:],
                    good.swapaxes(1, 2),
                    mx.concatenate([good, good], axis=2),
                    np.array(good),
                    good.tolist(),
                    None,
                ):
                    with self.assertRaisesRegex(ValueError, "^codes must .*, got "):
                        model.decode(bad)

    def test_is_told_in_one_line(self):
        folder = REFERENCE / "stereo-audiocraft"
        model = MusicGen.from_pretrained(folder, dtype=mx.float32)
        self.assertRegex(
            repr(model), r"^MusicGen\('.*stereo-audiocraft', float32, channels=2\)$"
        )

    def test_help_names_every_option(self):
        said = MusicGen.generate.__doc__
        for name in inspect.signature(MusicGen.steps).parameters:
            if name not in ("self", "prompts", "duration", "options"):
                self.assertIn(f"{name}", said)
        for field in dataclasses.fields(Options)[1:]:
            value = "" if field.default is None else f"={field.default!r}"
            self.assertIn(f"{field.name}{value}".replace("''", '""'), said)

    def test_long_prompt_is_cut_with_a_warning(self):
        model = exact("mono-transformers")
        prompt = "drums " * 600
        ids = model.tokenizer.encode(prompt)[:511] + [1]
        with self.assertWarnsRegex(UserWarning, "T5 takes 512"):
            text, mask = encode_text(model, [prompt], Options(guidance_coef=1))
        self.assertSame(text, model.text_encoder.encode([ids])[0])
        self.assertTrue(mask.all().item())

    def test_bad_options(self):
        model = exact("mono-transformers")
        for name, values in {
            "duration": (0, -1, math.nan, 0.01, math.inf, 10**400),
            "temp": (-0.1, math.nan, "1", None, 1e-39),
            "top_k": (0, 2049, 2.5),
            "top_p": (-0.1, 1.1, math.nan),
            "guidance_coef": (math.nan, math.inf),
            "seed": (-1, 2**64, [1, 2], [0.5], 1.5),
        }.items():
            for value in values:
                with self.subTest(name, value=value):
                    with self.assertRaisesRegex(ValueError, f"^{name} must"):
                        model.generate_codes("a", **{name: value})
        for prompts in ([], [None], ["a", 3], None, 3):
            with self.assertRaisesRegex(ValueError, "must be a prompt"):
                model.generate_codes(prompts)
        codes = model.generate_codes("a", duration=0.1, seed=np.int64(3))
        self.assertSame(codes, model.generate_codes("a", duration=0.1, seed=3))


class TestStream(Test):
    @slow(3)
    def test_is_what_generate_gives(self):
        sound = mx.array(np.random.default_rng(0).normal(size=(1000, 1)), mx.float32)
        for name in TRANSFORMERS + AUDIOCRAFT:
            model = exact(name)
            model.config.max_duration = 15 / 50
            for duration in (0.02, 0.2, 0.9):
                options = dict(duration=duration, seed=3, negative_prompt="piano")
                if duration > 0.1:
                    options["audio_prompt"] = sound
                whole = model.generate("drums", **options)[0]
                for chunk in (0.02, 0.1, 0.2):
                    if chunk > duration:
                        continue
                    pieces = list(model.stream("drums", chunk=chunk, **options))
                    self.assertTrue(all(piece.shape[0] for piece in pieces))
                    self.assertClose(mx.concatenate(pieces), whole, 1e-5)

    def test_comes_while_it_is_made(self):
        model = exact("mono-audiocraft")
        take = model.steps("drums", duration=1.0)
        stream = play(model, take, chunk=0.2)
        self.assertEqual(take.step, 0)
        first = next(stream)
        # 10 frames and 3 of delay are made, and some steps more are under way;
        # the codec waits for 3 frames and 482 samples
        self.assertEqual(take.step, 13 + 1)
        self.assertEqual(first.shape[0], 7 * 640 - 482)
        sizes = [piece.shape[0] for piece in stream]
        self.assertEqual(sizes[:3], [6400] * 3)
        self.assertEqual(take.step, 53)

    def test_comes_in_time_for_any_chunk(self):
        model = exact("mono-audiocraft")
        for frames in (1, 2, 3, 5, 7, 25):
            take, made = model.steps("drums", duration=1.0), 0
            for piece in play(model, take, chunk=frames / 50):
                made += len(piece)
                if take.step < 53:  # all but delay, look-ahead and what is under way
                    behind = take.step * 640 - made
                    ahead = 3 + 4 + frames + 1
                    self.assertLessEqual(behind, 640 * ahead)
            self.assertEqual(made, 32000)

    def test_bad_options(self):
        model = exact("mono-audiocraft")
        for options, pattern in (
            (dict(chunk=0), "chunk must"),
            (dict(chunk=math.inf), "chunk must"),
            (dict(chunk=math.nan), "chunk must"),
            (dict(chunk="a"), "chunk must"),
            (dict(temp=-1), "temp must"),
            (dict(seed=-1), "seed must"),
            (dict(codes_prompt=mx.zeros((1, 4))), "codes_prompt must be"),
            (dict(codes_prompt=mx.zeros((2, 4, 4), mx.int32)), "codes_prompt must be"),
            (dict(codes_prompt=mx.zeros((1, 4, 4))), "codes must be"),
            (dict(codes_prompt=mx.zeros((1, 4, 4), mx.int32) - 1), "codes must be"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.stream("a", duration=1.0, **options)
        with self.assertRaisesRegex(ValueError, "prompt must be one text"):
            model.stream(["a", "b"], duration=1.0)
        both = dict(audio_prompt=mx.ones((640, 1)), codes_prompt=mx.zeros((1, 1, 4)))
        with self.assertRaisesRegex(ValueError, "must not come together"):
            model.generate_codes("a", duration=1.0, **both)

    def test_left_early(self):
        model = exact("mono-audiocraft")
        options = dict(duration=1.0, seed=3)
        whole = model.generate("drums", **options)[0]
        for stop in (1, 3, 4, 13, 30):
            take = model.steps("drums", **options)
            steps = itertools.islice(take, stop)
            pieces = list(play(model, take, 0.1, steps))
            frames = max(stop - 3, 0)
            self.assertEqual(take.codes.shape, (1, frames, 4))
            self.assertEqual(sum(map(len, pieces)), 640 * frames)
            self.assertTrue(all(map(len, pieces)))
            if frames > 4:  # of which the last three hear the end
                sure = 640 * (frames - 4)
                self.assertClose(mx.concatenate(pieces)[:sure], whole[:sure], 1e-5)

    def test_plays_one_prompt(self):
        model = exact("mono-audiocraft")
        for size in (1, 2):
            take = model.steps(["a", "b"], duration=0.2, batch_size=size)
            with self.assertRaisesRegex(ValueError, "one prompt can play, not of 2"):
                play(model, take)

    def test_stopped_among_batches(self):
        model = exact("mono-audiocraft")
        options = dict(duration=1.0, seed=3, batch_size=1)
        prompts = ["drums", "piano", "guitar"]
        whole = model.generate_codes(prompts, **options)
        for stop, rows, frames in ((21, 1, 18), (53, 1, 50), (60, 1, 50), (106, 2, 50)):
            take = model.steps(prompts, **options)
            for _ in take:
                if take.step == stop:
                    break
            # the others were not begun, or are shorter
            self.assertEqual(take.codes.shape, (rows, frames, 4))
            self.assertSame(take.codes, whole[:rows, :frames])
