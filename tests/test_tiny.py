"""The trained model in tiny/."""

from functools import cache

import mlx.core as mx
import numpy as np
from common import ROOT, Test, slow

import evaluate
import synth
from musicgen import MusicGen


@cache
def judge_and_model() -> tuple[evaluate.Judge, MusicGen]:
    return evaluate.Judge(150), MusicGen.from_pretrained("tiny", mx.float32)


class TestTiny(Test):
    """What only a trained model can show, with the one in tiny/, on combinations that
    it never heard."""

    @classmethod
    def setUpClass(cls):
        random = np.random.default_rng(0)
        cls.clips = [synth.HELD_OUT[i] for i in random.permutation(36)]
        cls.texts = [synth.caption(clip, random) for clip in cls.clips]
        cls.judge, cls.model = judge_and_model()

    def assertFollowed(self, audio: mx.array, least: float, names: str, clips=None):
        """Sounds (B, N, 1) that are like the clips in the traits with these names."""
        found = [*map(self.judge.name, evaluate.measured(np.array(audio[..., 0])))]
        right = evaluate.share((clips or self.clips)[: len(found)], found)
        for name in names.split():
            self.assertGreaterEqual(right[name], least, f"{name}: {right}")

    def test_size(self):
        files = [path for path in (ROOT / "tiny").iterdir() if path.is_file()]
        self.assertLessEqual(sum(path.stat().st_size for path in files), 10e6)

    @slow(30)
    def test_prompts_are_followed(self):
        audio = self.model.generate(self.texts[:28], duration=3.0, seed=0)
        self.assertFollowed(audio, 0.9, "register drums")
        self.assertFollowed(audio, 0.75, "tempo timbre")
        others = self.clips[1:] + self.clips[:1]  # that these measures can fail
        with self.assertRaises(AssertionError):
            self.assertFollowed(audio, 0.75, "timbre", others)

    @slow(30)
    def test_quantized_prompts_are_followed(self):
        model = MusicGen.from_pretrained("tiny", mx.float32, q_bits=4)
        audio = model.generate(self.texts[:16], duration=3.0, seed=0)
        self.assertFollowed(audio, 0.85, "register drums")
        self.assertFollowed(audio, 0.75, "tempo timbre")

    @slow(3)
    def test_stream_resume_and_batch(self):
        options = dict(duration=2.0, seed=5)
        codes = self.model.generate_codes(self.texts[0], **options)
        pieces = list(self.model.stream(self.texts[0], chunk=0.3, **options))
        whole = self.model.decode(codes)[0]
        self.assertClose(mx.concatenate(pieces), whole, 1e-4)
        begun = dict(codes_prompt=codes[:, :37], **options)
        self.assertSame(self.model.generate_codes(self.texts[0], **begun), codes)
        rows = self.model.generate_codes(self.texts[:3], **options)
        self.assertSame(rows[:1], codes)

    @slow(30)
    def test_long_audio_stays(self):
        """Past the 8 s that it was trained on."""
        codes = self.model.generate_codes(self.texts[:6], duration=11.0, seed=0)
        late = self.model.decode(codes[:, -250:])[:, -4 * synth.RATE :]
        self.assertFollowed(late, 0.75, "register drums timbre tempo")

    @slow(30)
    def test_continuation_keeps_tempo_and_timbre(self):
        """Of a sound, with a text that says nothing of them."""
        kept = []
        for clip in self.clips[:12]:
            sound = synth.render(clip, np.random.default_rng(1), 2.5)[:, None]
            options = dict(audio_prompt=mx.array(sound), drop_prompt=True, seed=2)
            audio = self.model.generate("a melody", duration=5.5, **options)
            kept.append(audio)
        self.assertFollowed(mx.concatenate(kept), 0.8, "tempo timbre")
