"""The synthetic sounds, and what is measured in them."""

import io
import itertools
from contextlib import redirect_stdout
from unittest.mock import patch

import numpy as np
from common import Test, slow

import evaluate
import synth


class TestSynth(Test):
    def test_world(self):
        self.assertEqual((len(synth.KNOWN), len(synth.HELD_OUT)), (144, 36))
        for traits in itertools.combinations((0, 1, 2, 4), 3):  # all but the mode
            known, all_clips = (
                {tuple(clip[i] for i in traits) for clip in clips}
                for clips in (synth.KNOWN, synth.CLIPS)
            )
            self.assertEqual(known, all_clips)
        for i, values in enumerate(synth.TRAITS.values()):  # each is asked for
            self.assertEqual({clip[i] for clip in synth.HELD_OUT}, set(values))
        measured = [
            {c._replace(mode="") for c in x} for x in (synth.KNOWN, synth.HELD_OUT)
        ]
        self.assertFalse(measured[0] & measured[1])

    def test_clips(self):
        again = [synth.make(7) for _ in range(2)]
        self.assertEqual(again[0][:2], again[1][:2])
        self.assertSame(again[0][2], again[1][2])
        for seed in range(8):
            clip, text, sound = synth.make(seed, seconds=2.0)
            self.assertIn(clip, synth.KNOWN)
            self.assertEqual(sound.shape, (64000,))
            self.assertTrue(0.05 < np.abs(sound).max() <= 1)
            self.assertGreater(len(text.split()), 1)
        begun = []
        for share in (0, 1):  # from the first note, or from anywhere
            with patch.object(synth, "EARLY", share):
                begun.append(synth.make(7, seconds=2.0)[2])
        self.assertGreater(np.abs(begun[0] - begun[1]).max(), 0.1)

    def test_script(self):
        """Clips that are there are not lost unasked, nor are captions."""
        folder = self.folder / "clips"
        command = ["synth.py", "--listen", "2", "--output-dir", str(folder)]

        def make(*more: str) -> None:
            with patch("sys.argv", [*command, *more]):
                with redirect_stdout(io.StringIO()):
                    synth.main()

        make()
        wav, text = folder / "001.wav", folder / "001.txt"
        made = {path: path.read_bytes() for path in (wav, text)}
        text.write_text("my own words")
        for path in (folder / "000.wav", folder / "000.txt", wav):
            told = f"synth.py: error: {path.with_name('001.txt')} is there already"
            path.unlink()
        with self.assertRaisesRegex(SystemExit, told):
            make()
        self.assertEqual(sorted(folder.iterdir()), [text])
        make("--force")
        self.assertEqual({path: path.read_bytes() for path in made}, made)

    def test_words_tell_all_traits(self):
        random = np.random.default_rng(0)
        for clip in synth.CLIPS:
            text = synth.caption(clip, random)
            for name, value in clip._asdict().items():
                said = any(word in text for word in synth.WORDS[value])
                self.assertTrue(said or value == "without", text)

    @slow(6)
    def test_measures(self):
        """On clips that the timbres were not fitted to."""
        judge = evaluate.Judge(150)
        random = np.random.default_rng(5)
        clips = synth.CLIPS[::4]
        own = [synth.render(clip, random, 4.0) for clip in clips]
        found = evaluate.share(clips, [*map(judge.name, evaluate.measured(own))])
        for name, least in (("register", 0.95), ("tempo", 0.95), ("drums", 0.95)):
            self.assertGreaterEqual(found[name], least, name)
        self.assertGreaterEqual(found["timbre"], 0.95)
