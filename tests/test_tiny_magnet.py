"""The trained MAGNeT in tiny-magnet/."""

import mlx.core as mx
import numpy as np
from common import ROOT, Test, slow

import evaluate
import magnet
from evaluate_fill import codes_of
from fill import fill

PART = (3.0, 5.0)


class TestTinyMagnet(Test):
    """What only a trained model can show, on combinations that it never heard."""

    @classmethod
    def setUpClass(cls):
        cls.judge = evaluate.Judge(150)
        cls.model = magnet.load("tiny-magnet", mx.float32)
        clips, texts = evaluate.prompts(36)
        places = np.random.default_rng(0).permutation(36)
        cls.clips, cls.texts = zip(*((clips[i], texts[i]) for i in places))

    def names(self, audio: mx.array) -> list[dict[str, str]]:
        """What sounds (B, N, 1) are judged to be."""
        return [*map(self.judge.name, evaluate.measured(np.array(audio[..., 0])))]

    def test_size(self):
        files = [path for path in (ROOT / "tiny-magnet").iterdir() if path.is_file()]
        self.assertLessEqual(sum(path.stat().st_size for path in files), 6e6)
        self.assertEqual(len(files), 4)

    def test_codec_and_t5_are_those_of_tiny(self):
        new, old = (
            mx.load(str(ROOT / name / "model.safetensors"))
            for name in ("tiny-magnet", "tiny")
        )
        kept = [name for name in old if not name.startswith("decoder.")]
        self.assertGreater(len(kept), 50)
        for name in kept:
            self.assertSame(new[name], old[name])

    @slow(40)
    def test_prompts_are_followed(self):
        how = dict(temp=1.0, max_guidance_coef=3.0)
        audio = self.model.generate([*self.texts[:12]], 3.0, seed=0, **how)
        found, clips = self.names(audio), [*self.clips[:12]]
        right = evaluate.share(clips, found)
        least = dict(register=0.9, drums=0.9, tempo=0.75, timbre=0.75)
        for trait, share in least.items():
            self.assertGreaterEqual(right[trait], share, f"{trait}: {right}")
        others = evaluate.share(clips[1:] + clips[:1], found)  # these measures can fail
        self.assertLess(others["timbre"], 0.5)

    @slow(20)
    def test_a_part_is_filled_in(self):
        """Nothing else changes; tempo and timbre of the whole stay."""
        kept, places = [], np.arange(400)
        inside = (150 <= places) & (places < 250)
        for i in range(4):
            codes = codes_of(self.model, self.clips[i], seed=i)
            new = fill(self.model, codes, self.texts[i], [PART], seed=i)
            changed = np.array(new != codes)[0].any(axis=1)
            self.assertFalse(changed[~inside].any())
            self.assertGreater(changed[inside].mean(), 0.5)
            before, after = self.names(
                mx.concatenate([self.model.decode(x) for x in (codes, new)])
            )
            kept.append([after[t] == before[t] for t in ("tempo", "timbre")])
        self.assertGreaterEqual(np.mean(kept), 0.75)
