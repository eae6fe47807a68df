"""Loudness and peak."""

import io
from contextlib import redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import Test, slow

import loudness as loudness_script
from audio import save_audio


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
        peaky[100] = 0.5
        with self.assertWarnsRegex(UserWarning, "would clip"):
            louder = loudness_script.to_loudness(peaky, 48000, -10)
        self.assertAlmostEqual(np.abs(louder).max(), 1)
        with self.assertWarnsRegex(UserWarning, "silent"):
            loudness_script.to_loudness(np.zeros((48000, 1)), 48000, -10)
        self.assertAlmostEqual(
            np.abs(loudness_script.to_peak(quiet, -6)).max(), 0.5012, 3
        )

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
        with patch("sys.argv", ["loudness.py", str(self.folder / "none.wav")]):
            with self.assertRaisesRegex(SystemExit, "loudness.py: error: .*none.wav"):
                loudness_script.main()
