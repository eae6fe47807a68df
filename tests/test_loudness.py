"""Loudness and peak."""

import io
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
import soundfile
from common import ROOT, Test, slow

import jobs
import loudness as loudness_script
from audio import save_audio
from job import Job
from options import Options
from resample import true_peak


class TestLoudness(Test):
    def tones(self, *parts: tuple[float, float], rate: int = 48000) -> np.ndarray:
        """Stereo tones of 1 kHz: peak in dB of full scale, seconds."""
        levels = [np.full(round(s * rate), 10 ** (level / 20)) for level, s in parts]
        level = np.concatenate(levels)
        tone = level * np.sin(2 * np.pi * 1000 * np.arange(len(level)) / rate)
        return np.stack([tone, tone], axis=1)

    @slow(4)
    def test_ebu_tech_3341_cases_1_to_5(self):
        for parts, loudness in (
            ([(-23, 20)], -23),
            ([(-33, 20)], -33),
            ([(-36, 10), (-23, 60), (-36, 10)], -23),
            ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
            ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
        ):
            for rate in (48000, 32000):
                tones = self.tones(*parts, rate=rate)
                got = loudness_script.integrated_loudness(tones, rate)
                self.assertAlmostEqual(got, loudness, delta=0.1)

    def test_filters_are_those_of_the_recommendation(self):
        # BS.1770-4, tables 1 and 2, for 48 kHz
        frequencies = np.array([20.0, 100, 1000, 4000, 15000])
        shelf = (1.53512485958697, -2.69169618940638, 1.19839281085285)
        poles = (1.0, -1.69065929318241, 0.73248077421585)
        want = loudness_script.biquad(shelf, poles, frequencies, 48000)
        poles = (1.0, -1.99004745483398, 0.99007225036621)
        want *= loudness_script.biquad((1.0, -2.0, 1.0), poles, frequencies, 48000)
        got = loudness_script.k_weighting(frequencies, 48000)
        self.assertClose(mx.array(np.abs(got - want)), mx.zeros(5), 1e-6)

    def test_pieces_join(self):
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(25 * 8000, 1))
        whole = loudness_script.weigh(noise, 8000)
        again = loudness_script.weigh(
            np.concatenate([np.zeros((9000, 1)), noise]), 8000
        )
        self.assertClose(mx.array(again[9000:]), mx.array(whole), 1e-5)

    def test_sets_loudness_and_never_clips(self):
        quiet = self.tones((-40, 2))
        louder = loudness_script.to_loudness(quiet, 48000, -20)
        got = loudness_script.integrated_loudness(louder, 48000)
        self.assertAlmostEqual(got, -20, delta=0.01)
        peaky = quiet.copy()
        peaky[100:102] = 0.5  # between which it is higher
        with self.assertWarnsRegex(UserWarning, "^a.wav is silent and stays so"):
            loudness_script.to_loudness(np.zeros((48000, 1)), 48000, -10, "a.wav")
        for sound in (quiet, peaky):
            peak = true_peak(loudness_script.to_peak(sound, -6))
            self.assertAlmostEqual(peak, 10 ** (-6 / 20))
        peak = loudness_script.to_peak(np.zeros((9, 1)), -6)
        self.assertSame(peak, np.zeros((9, 1)))

    def drums(self, rate: int = 32000) -> np.ndarray:
        """Four seconds of soft stereo noise, with a beat on the left in each."""
        sound = 0.08 * np.random.default_rng(0).normal(size=(4 * rate, 2))
        beat = np.exp(-np.arange(1000) / 200) * np.sin(0.05 * np.arange(1000))
        for start in range(0, len(sound), rate):
            sound[start : start + 1000, 0] += 0.9 * beat
        return sound.astype(np.float32)

    def test_limiter_reaches_what_peaks_stand_in_the_way_of(self):
        sound = self.drums()
        source = loudness_script.integrated_loudness(sound, 32000)
        target = source + 6
        gain = 10 ** (6 / 20)
        over = 20 * np.log10(gain * true_peak(sound)) + 1
        self.assertGreater(over, 4)  # dB by which peaks are too high
        with self.assertWarnsRegex(
            UserWarning, "^The sound is at .*: a limiter"
        ) as told:
            louder = loudness_script.to_loudness(sound, 32000, target)
        got = loudness_script.integrated_loudness(louder, 32000)
        self.assertAlmostEqual(got, target, delta=0.05)
        self.assertLessEqual(true_peak(louder), 10 ** (-1 / 20))
        taken = float(re.search(r"by up to ([\d.]+) dB\.", str(told.warning))[1])
        ratios = 20 * np.log10(np.abs(louder).max(axis=1) / np.abs(sound).max(axis=1))
        self.assertAlmostEqual(ratios.max() - ratios.min(), taken, delta=0.1)
        self.assertGreater(taken, over - 0.1)
        both = louder[:, 0] * sound[:, 1] - louder[:, 1] * sound[:, 0]
        self.assertLess(np.abs(both).max(), 1e-6)  # left and right are lowered alike

    def test_limiter_leaves_the_rest_alone(self):
        sound = self.tones((-20, 4))
        click = sound.copy()
        click[96000:96003] = 1.0
        told = "^a.wav is at -14 LUFS: a limiter lowered its peaks by up to .* dB.$"
        with self.assertWarnsRegex(UserWarning, told):
            louder = loudness_script.to_loudness(click, 48000, -14, "a.wav")
        ratio = np.abs(louder[sound != 0] / click[sound != 0]).reshape(-1)
        self.assertLessEqual(true_peak(louder), 10 ** (-1 / 20))
        place = np.flatnonzero(ratio < 0.999 * ratio.max()) / 2  # stereo
        self.assertGreater(place.min(), 96000 - 0.009 * 48000)
        self.assertGreater(place.max(), 96000 + 0.1 * 48000)  # it comes back slowly
        self.assertLess(place.max(), 96000 + 0.5 * 48000)

    def test_limiter_is_not_driven_beyond_what_it_is_worth(self):
        with self.assertWarnsRegex(
            UserWarning, r"^a.wav missed 0 LUFS and is at -[\d.]+: .* and more would"
        ) as told:
            louder = loudness_script.to_loudness(self.drums(), 32000, 0, "a.wav")
        self.assertLessEqual(true_peak(louder), 10 ** (-1 / 20))
        self.assertLess(
            float(re.search(r"up to ([\d.]+) dB", str(told.warning))[1]), 18
        )
        self.assertGreater(
            loudness_script.integrated_loudness(louder, 32000),
            loudness_script.integrated_loudness(self.drums(), 32000) + 3,
        )

    def test_levels_hold_in_files_whose_encoding_raises_peaks(self):
        """Of jobs of generate.py, and of loudness.py."""
        sound, model = mx.array(self.drums()), Mock(sampling_rate=32000)
        options, highest = Options(duration=4), {"loudness": -1, "peak": -6}
        kept = [("peak", "x.mp3")]  # the one that happens to raise nothing
        for level, asked in (("loudness", -9), ("peak", -6)):
            for name in ("x.ogg", "x.mp3", "x.wav"):
                path = self.folder / name
                job = Job("a", 0, path, options, overwrite=True, **{level: asked})
                with self.subTest(f"{level} {name}"), warnings.catch_warnings(
                    record=True
                ) as caught:
                    warnings.simplefilter("always")
                    jobs.save(model, job, sound, {})
                    found = soundfile.read(path)[0]
                    over = 20 * np.log10(true_peak(found)) - highest[level]
                    self.assertLess(over, 0.01)
                    self.assertGreater(over, -1.5)
                    told = [str(warning.message) for warning in caught]
                    raised = f"its peaks would be above {highest[level]} dB"
                    does_raise = (level, name) not in kept and name != "x.wav"
                    self.assertEqual(any(raised in text for text in told), does_raise)
                    for text in told:
                        self.assertTrue(text.startswith(f"{path} "), text)
        save_audio(self.folder / "in.wav", sound, 32000, subtype="FLOAT")
        flags = ["--loudness", "-9", "--output", "y.ogg"]
        run = subprocess.run(
            [sys.executable, ROOT / "loudness.py", "in.wav", *flags],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        told = r"loudness.py: warning: y.ogg was .* by .* dB: .* above -1 dB\.\n$"
        self.assertRegex(run.stderr, told)
        found = true_peak(soundfile.read(self.folder / "y.ogg")[0])
        self.assertLess(20 * np.log10(found), -0.99)

    def test_script(self):
        source, target = self.folder / "in.wav", self.folder / "out.wav"
        save_audio(source, mx.array(self.tones((-30, 2))), 48000)
        arguments = ["loudness.py", str(source)]
        for more, told in (([], "-30.0"), (["--loudness", "-14", "--output"], "-30.0")):
            more = [*more, str(target)] if more else more
            with patch("sys.argv", arguments + more):
                with redirect_stdout(io.StringIO()) as out:
                    loudness_script.main()
            self.assertEqual(out.getvalue(), f"{source}: {told} LUFS\n")
        audio, _ = soundfile.read(target)
        got = loudness_script.integrated_loudness(audio, 48000)
        self.assertAlmostEqual(got, -14, delta=0.05)
        before = {path: path.read_bytes() for path in (source, target)}
        for words, pattern in (
            (["none.wav"], ".*none.wav"),
            (["in.wav", "out.wav"], ".*out.wav is there already: .* with --force"),
            (["in.wav", "in.wav", "--force"], ".*in.wav must not be written, since it"),
        ):
            paths = [str(self.folder / word) for word in words[:2]]
            more = ["--loudness", "-20", "--output", *paths[1:], *words[2:]]
            arguments = ["loudness.py", paths[0], *(more if paths[1:] else [])]
            with patch("sys.argv", arguments):
                with self.assertRaisesRegex(
                    SystemExit, f"loudness.py: error: {pattern}"
                ):
                    loudness_script.main()
        self.assertEqual({path: path.read_bytes() for path in before}, before)
