"""True peaks. Resampling is tested with the files that need it, in test_audio.py."""

import mlx.core as mx
import numpy as np
from common import Test

import resample as resample_script
from resample import peaks_between, resample, true_peak


class TestTruePeak(Test):
    def test_between_samples(self):
        """A tone of a quarter of the rate whose samples all miss its tops."""
        for turn, sampled in ((np.pi / 4, 0.5**0.5), (np.pi / 2, 1.0)):
            tone = np.sin(np.pi / 2 * np.arange(4000) + turn)[:, None]
            tone[:500] *= np.linspace(0, 1, 500)[:, None]
            tone[-500:] *= np.linspace(1, 0, 500)[:, None]
            self.assertAlmostEqual(np.abs(tone).max(), sampled, 6)
            self.assertAlmostEqual(true_peak(tone), 1, delta=0.001)

    def test_ebu_tech_3341_cases_15_to_19(self):
        """Tones of a quarter, sixth, eighth of 48 kHz at -6 dB, and one at +3."""
        for part, degrees, level in (
            (4, 0, -6),
            (4, 45, -6),
            (6, 60, -6),
            (8, 67.5, -6),
            (4, 45, 3),
        ):
            phase = 2 * np.pi * np.arange(9600) / part + np.radians(degrees)
            fade = np.minimum(
                1, np.minimum(np.arange(9600), np.arange(9600)[::-1]) / 960
            )
            tone = fade * 10 ** (level / 20) * np.sin(phase)
            got = 20 * np.log10(true_peak(tone[:, None]))
            self.assertGreater(got, level - 0.4)  # as the case says
            self.assertLess(got, level + 0.2)

    def test_channels_and_blocks(self):
        noise = np.random.default_rng(0).normal(size=(5000, 2)).astype(np.float32)
        noise = np.cumsum(noise, axis=0) / 50  # one that would ring where it is cut
        whole = peaks_between(noise)
        alone = [peaks_between(noise[:, c : c + 1]) for c in range(2)]
        self.assertSame(whole, np.maximum(*alone))
        with self.subTest("pieces"):
            for size in (100, 333, 4999):
                resample_script.BLOCK, kept = size, resample_script.BLOCK
                self.addCleanup(setattr, resample_script, "BLOCK", kept)
                self.assertAlmostEqual(true_peak(noise), whole.max(), 5)
        self.assertEqual(true_peak(np.zeros((0, 1))), 0)
        self.assertEqual(true_peak(np.zeros((9, 1))), 0)

    def test_arrays_of_mlx(self):
        noise = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
        for target in (44100, 32000):
            want = resample(noise, 44100, target)
            found = resample(mx.array(noise), 44100, target)
            self.assertIsInstance(found, np.ndarray)
            self.assertSame(found, want)
        self.assertEqual(true_peak(mx.array(noise)), true_peak(noise))
        self.assertSame(peaks_between(mx.array(noise)), peaks_between(noise))
        for audio in (noise[:, 0], mx.array(noise)[None]):
            for do in (peaks_between, true_peak, lambda x: resample(x, 44100, 32000)):
                with self.assertRaisesRegex(ValueError, r"the shape \(N, C\), got"):
                    do(audio)

    def test_memory_of_rates_without_a_common_factor(self):
        """As many filters as there are samples, not as many as the rate has phases."""
        shapes, filters = [], resample_script.filters

        def spy(phases, *rest):
            shapes.append(len(phases))
            return filters(phases, *rest)

        resample_script.filters = spy
        self.addCleanup(setattr, resample_script, "filters", filters)
        few = resample(np.ones((3000, 1), np.float32), 767_999, 32_000)
        self.assertEqual((few.shape, sum(shapes)), ((125, 1), 125))
        self.assertClose(mx.array(few), mx.ones((125, 1)), 1e-5)
        shapes.clear()
        resample(np.ones((800_000, 1), np.float32), 767_999, 32_000)
        self.assertEqual(sum(shapes), 32_000)
        self.assertLess(max(shapes), 4000)
