"""Loops: their length, where they are cut, how they are decoded, what a wav says."""

import json
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
import soundfile
from common import ROOT, ScriptTest, Test, exact, slow

import loops
from audio import save_audio
from beat import Beat
from loops import best_cut, cut_scores, decode_round, loop_frames, loop_samples, splash
from ranking import log_likelihood
from sections import Sections
from settings import load_codes, read_settings, to_comment


def loop_points(path) -> tuple[int, int, int]:
    """First sample, end and repetitions of a wav's one loop, as libsndfile reads them:
    its end is the sample after the last, where the chunk has the last."""
    ffi, lib = soundfile._ffi, soundfile._snd
    instrument = ffi.new("char[]", 12 + 4 + 16 * 16 + 64)
    with soundfile.SoundFile(path) as file:
        get_instrument = 0x10D0
        size = 12 + 4 + 16 * 16  # of its SF_INSTRUMENT
        found = lib.sf_command(file._file, get_instrument, instrument, size)
    assert found == 1, "there is no smpl chunk"
    numbers = np.frombuffer(bytes(ffi.buffer(instrument, size)), np.uint32)
    count, (mode, first, end, times) = numbers[3], numbers[4:8]
    assert count == 1 and mode == 801, numbers  # SF_LOOP_FORWARD
    return int(first), int(end), int(times)


class TestLength(Test):
    def test_samples_of_fifty_tempi(self):
        model = exact("mono-audiocraft")
        rate, hop = model.sampling_rate, model.config.audio_encoder.hop_length
        rng = np.random.default_rng(0)
        for bpm in [20, 400, 120, 59.94, *rng.uniform(20, 400, 46)]:
            beat = Beat(float(bpm), int(rng.integers(2, 8)))
            bars = float(rng.choice([0.25, 0.5, 1, 2]))
            want = round(bars * beat.beats_per_bar * 60 / bpm * rate)
            self.assertEqual(loop_samples(beat, bars, rate), want)
            frames = loop_frames(beat, bars, model.frame_rate)
            self.assertLessEqual(abs(frames * hop - want), hop // 2)
            if frames < 60:
                codes = mx.array(rng.integers(0, 8, (1, frames, 4)))
                self.assertEqual(decode_round(model, codes, want).shape, (want, 1))

    def test_a_take_is_longer(self):
        self.assertEqual(loops.take_seconds(Beat(120), 4), 8 + 2)
        self.assertEqual(loops.take_seconds(Beat(60), 4), 16 + 4)


class TestCut(Test):
    def test_the_likeliest_wrap_is_taken(self):
        model = exact("mono-audiocraft")
        codes = model.generate_codes("drums", duration=0.5, seed=1)
        first, score = best_cut(model, "drums", codes, 18)
        scores = []
        for start in range(8):
            loop = codes[:, start : start + 18]
            both = mx.concatenate([loop, loop], axis=1)
            scores.append(log_likelihood(model, "drums", both, 18).item())
        self.assertEqual(first, int(np.argmax(scores)))
        self.assertAlmostEqual(score, max(scores), 4)
        self.assertGreater(max(scores), min(scores) + 0.01)
        some = cut_scores(model, "drums", codes, 18, [3, 5]).tolist()
        self.assertTrue(np.allclose(some, [scores[3], scores[5]], atol=1e-4))

    def test_a_loop_that_was_repeated_is_found(self):
        """Where the model knows what comes next, the wrap that goes on so is likeliest."""
        model = exact("mono-audiocraft")
        rng = np.random.default_rng(0)
        other, loop = rng.integers(0, 60, (1, 7, 4)), rng.integers(0, 60, (1, 20, 4))
        codes = mx.array(np.concatenate([other, loop, loop[:, :3]], axis=1))

        def known(model, prompt, rows, first):
            """1 for each code that follows as in the loop."""
            told = {
                tuple(a): tuple(b) for a, b in zip(loop[0], np.roll(loop[0], -1, 0))
            }
            rows = np.array(rows)
            return mx.array(
                [
                    np.mean(
                        [told.get(tuple(a)) == tuple(b) for a, b in zip(row, row[1:])]
                    )
                    for row in rows[:, first - 1 :]
                ]
            )

        with patch("ranking.log_likelihood", known):
            self.assertEqual(best_cut(model, "a", codes, 20), (7, 1.0))
            first, score = best_cut(model, "a", codes, 19)
        self.assertLess(score, 1)

    def test_the_likeliest_few_are_heard(self):
        """Of the likeliest sixth of the places that one is taken which has the least
        over the wrap, as it sounds when it is repeated."""
        model = exact("mono-audiocraft")
        codes = model.generate_codes("drums", duration=1.0, seed=7)
        hop, firsts = model.config.audio_encoder.hop_length, [*range(25)]
        scores = cut_scores(model, "drums", codes, 26, firsts).tolist()
        heard = []
        for first in firsts:
            loop = codes[:, first : first + 26]
            sound = np.array(model.decode(mx.concatenate([loop] * 6, axis=1))[0])
            heard.append(splash(sound, 4 * 26 * hop, model.sampling_rate))
        got = loops.cut_splashes(model, codes, 26, firsts)
        self.assertTrue(np.allclose(got, heard, atol=0.01), np.subtract(got, heard))
        likeliest = sorted(firsts, key=scores.__getitem__)[-4:]
        first, score = best_cut(model, "drums", codes, 26)
        self.assertEqual(first, min(likeliest, key=heard.__getitem__))
        self.assertAlmostEqual(score, scores[first], 4)
        self.assertNotIn(first, (likeliest[-1], int(np.argmin(heard))))

    def test_splash(self):
        """A click is heard, whatever the sound; what goes on is not, nor its level."""
        time = np.arange(19200) / 32000
        noise = np.random.default_rng(0).normal(size=(19200, 2)) / 10
        saw = sum(np.sin(2 * np.pi * 220 * k * time) / k for k in range(1, 60))[:, None]
        for sound in (noise, saw, np.repeat(saw, 2, axis=1)):
            self.assertLess(abs(splash(sound, 9600, 32000)), 1)
            self.assertAlmostEqual(
                splash(sound, 9600, 32000), splash(3 * sound, 9600, 32000), 1
            )
            found = []
            for height in (3, 10, 30):
                clicks = sound.copy()
                clicks[9600] += height
                found.append(splash(clicks, 9600, 32000))
                beside = splash(clicks, 9600 - 1600, 32000)
                self.assertLess(beside, 0.5)
            self.assertEqual(found, sorted(found))
            self.assertGreater(found[-1], 10)

    def test_sections_stay_where_they_are(self):
        model = exact("mono-audiocraft")
        song = Sections([(0, "drums"), (0.2, "piano")])
        codes = model.generate_codes(song, duration=0.5, seed=1)
        first, score = best_cut(model, song, codes, 18)
        self.assertEqual(first, 0)
        want = cut_scores(model, "drums", codes, 18, [0]).item()
        self.assertAlmostEqual(score, want, 4)

    def test_too_short(self):
        model = exact("mono-audiocraft")
        with self.assertRaisesRegex(ValueError, "must not be longer than the take"):
            best_cut(model, "a", mx.zeros((1, 10, 4), mx.uint32), 11)


class TestSound(Test):
    @slow(3)
    def test_it_is_decoded_round_the_corner(self):
        """As the middle of a sound that repeats: the codec hears both sides."""
        for name in ("mono-audiocraft", "stereo-audiocraft"):
            model = exact(name)
            codes = model.generate_codes("drums", duration=1.0, seed=2)
            T, hop = codes.shape[1], model.config.audio_encoder.hop_length
            middle = model.decode(mx.concatenate([codes] * 7, axis=1))[0]
            got = decode_round(model, codes, T * hop)
            self.assertClose(got, middle[5 * T * hop : 6 * T * hop], 1e-4)
            alone = model.decode(codes)[0]
            self.assertGreater(mx.abs(got - alone)[:hop].max().item(), 1e-3)
            self.assertGreater(mx.abs(got - alone)[-hop:].max().item(), 1e-3)

    def test_resampled_as_a_circle(self):
        for N, count in ((640, 700), (700, 640), (641, 701), (641, 640), (640, 641)):
            turns = np.array([0, 1, 7, 200])

            def wave(n):
                time = np.arange(n)[:, None] / n
                return np.cos(2 * np.pi * turns * time + 0.3).astype(np.float32)

            got = loops.resample_circle(mx.array(wave(N)), count)
            self.assertClose(got, mx.array(wave(count)), 1e-5)

    def test_loop_points(self):
        path = self.folder / "a.wav"
        for count, subtype, channels in (
            (1000, "PCM_16", 1),
            (1001, "PCM_24", 1),
            (999, "FLOAT", 2),
        ):
            sound = mx.random.uniform(-0.5, 0.5, (count, channels))
            save_audio(path, sound, 32000, to_comment({"prompt": "a"}), subtype)
            before = soundfile.read(path)[0]
            loops.write_loop_points(path, count, 32000)
            self.assertEqual(loop_points(path), (0, count, 0))
            self.assertTrue((soundfile.read(path)[0] == before).all())
            self.assertEqual(read_settings(path), {"prompt": "a"})
            self.assertEqual(path.read_bytes()[4:8], size_of(path))


def size_of(path) -> bytes:
    return (path.stat().st_size - 8).to_bytes(4, "little")


class TestCommand(ScriptTest):
    def run_tiny(self, *arguments):
        return self.run_script("--model", ROOT / "tiny", *arguments)

    @slow(12)
    def test_files(self):
        first, second = self.folder / "a.wav", self.folder / "b.wav"
        flags = ("--loop", "--bpm", "173", "--bars", "1", "--beats-per-bar", "3")
        with patch("loops.CUTS", 3):
            status, _, err = self.run_tiny("happy saw", *flags, "-o", first, "-s", "1")
            self.assertEqual(status, 0, err)
            count = round(3 * 60 / 173 * 32000)
            self.assertEqual(soundfile.info(first).frames, count)
            self.assertEqual(loop_points(first), (0, count, 0))
            record = read_settings(first)
            kept = {key: record[key] for key in ("bpm", "bars", "loop", "prompt")}
            want = dict(bpm=173.0, bars=1.0, loop=True, prompt="happy saw")
            self.assertEqual(kept, want)
            self.assertLess(record["loop_score"], 0)
            self.assertEqual(self.run_script("--again", first, "-o", second)[0], 0)
            self.assertEqual(first.read_bytes(), second.read_bytes())
            short = [*flags[:2], "174.55", "--bars", "1", "--beats-per-bar", "3"]
            whole = ("-d", "1.0313", "-o", self.folder / "d.wav")
            status, _, err = self.run_tiny("happy saw", *short, *whole)
            self.assertEqual(status, 0, err)
            self.assertEqual(soundfile.info(self.folder / "d.wav").frames, 32999)
            line = dict(prompt="saw", loop=True, bars=1, bpm=173, beats_per_bar=3)
            path = self.folder / "songs.jsonl"
            path.write_text(json.dumps(line | {"output": str(self.folder / "c.flac")}))
            status, out, err = self.run_tiny("--prompts", path)
            self.assertEqual(status, 0, err)
            self.assertEqual(soundfile.info(self.folder / "c.flac").frames, count)
            self.assertIn("skipped", self.run_tiny("--prompts", path)[2])

    @slow(4)
    def test_stopped(self):
        """What there is is written as it is, and gone on from to the loop."""
        sound, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        output = ("-o", sound, "--save-codes", codes, "--force")
        flags = ("saw", "--loop", "--bpm", "240", "--bars", "1", "-s", "1")
        for steps in (40, 120):  # less than the loop of 50 frames, and than the take
            stop = Mock(side_effect=[False] * steps + [True] * 99, heeded=True)
            with patch("generate.Stop", lambda: stop):
                status, _, err = self.run_tiny(*flags, *output)
            self.assertEqual(status, 130, err)
            self.assertIn(f"To go on: --resume {codes} --duration 3\n", err)
            kept, record = load_codes(codes)
            self.assertIn(kept.shape[1], range(steps - 3, steps + 1))
            self.assertEqual(soundfile.info(sound).frames, kept.shape[1] * 640)
            self.assertNotIn(b"smpl", sound.read_bytes())
            self.assertEqual((record["loop"], record["bars"]), (True, 1.0))
            self.assertEqual(read_settings(sound), record)
            again = ("--redecode", codes, "-o", self.folder / "b.wav", "--force")
            self.assertEqual(self.run_script(*again)[0], 0)
            self.assertEqual((self.folder / "b.wav").read_bytes(), sound.read_bytes())
        with patch("loops.CUTS", 3):
            status, _, err = self.run_script("--resume", codes, *output[:2], "--force")
        self.assertEqual(status, 0, err)
        self.assertEqual(loop_points(sound), (0, 32000, 0))

    def test_what_cannot_be(self):
        loop = ["a", "--loop", "--bpm", "120", "--bars", "4"]
        for arguments, told in (
            (["a", "--loop"], "loop needs bpm and bars"),
            (["a", "--loop", "--bars", "4"], "loop needs bpm and bars"),
            (["a", "--bpm", "120", "--bars", "4"], "bars needs a loop"),
            ([*loop, "--stream"], "--loop needs the whole take"),
            (
                [*loop, "-d", "7"],
                "of 4 bars is 8 s long, more than the duration allows",
            ),
            (["0: a | 4bars: b", *loop[1:]], "section at 8 s, 'b', must begin before"),
            (loop[:4] + ["--bars", "0"], "bars must be from 0.25 to 1000, got 0"),
            (loop[:4] + ["--bars", "nan"], "bars must be from 0.25 to 1000, got nan"),
            ([*loop, "--bpm", "19"], "bpm must be from 20 to 400"),
        ):
            status, _, err = self.run_tiny(*arguments, "-o", self.folder / "x.wav")
            self.assertIn(status, (1, 2))
            self.assertIn(told, err)
            self.assertEqual(err.count("\n"), 1, err)
