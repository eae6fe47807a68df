"""How takes begin and end: fades, and cuts where the music rests."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import soundfile
from common import ROOT, ScriptTest, Test, slow

import endings
import jobs
import loudness
import settings
import synth
from audio import save_audio
from endings import CUT_FADE, FADE, Ending, fade, find_cut, make_ending
from job import make_job
from loops import decode_round
from musicgen import MusicGen
from resample import true_peak

RATE = 32000


def voice(notes: list[tuple[float, float]], seconds: float) -> np.ndarray:
    """Samples (N, 1) of notes that begin and last so many seconds."""
    random, track = np.random.default_rng(0), np.zeros(int(seconds * RATE))
    for i, (begins, lasts) in enumerate(notes):
        hertz = synth.frequency(60 + 5 * (i % 3))
        synth.add(track, begins, 0.3 * synth.VOICES["square"](hertz, lasts, random))
    return track.astype(np.float32)[:, None]


class TestFades(Test):
    def test_a_fade_is_half_a_cosine(self):
        ones = np.ones((100, 2), np.float32)
        faded = fade(ones, 1000, fade_in=0.01, fade_out=0.04)
        self.assertSame(ones, np.ones((100, 2)))
        self.assertSame(faded[10:60], ones[10:60])
        for i in range(40):
            want = math.cos(math.pi / 2 * (i + 1) / 40) ** 2
            self.assertAlmostEqual(faded[60 + i, 1], want, 6)
        self.assertEqual((faded[-1, 0], faded[0, 0]), (0, 0))
        self.assertAlmostEqual(faded[4, 0], 0.5 - 0.5 * math.cos(math.pi * 0.4), 6)

    def test_nothing_to_fade(self):
        noise = np.random.default_rng(0).normal(size=(500, 1)).astype("f4")
        for same in (fade(noise, 1000), Ending().apply(noise, 1000, 0)):
            self.assertSame(same, noise)
        self.assertEqual(fade(noise[:0], 1000, 1.0, 1.0).shape, (0, 1))

    def test_one_that_is_longer_than_the_sound(self):
        faded = fade(np.ones((20, 1)), 1000, fade_out=9.0)
        self.assertSame(faded, fade(np.ones((20, 1)), 1000, fade_out=0.02))

    def test_settings(self):
        self.assertEqual(make_ending(), Ending(0.0, None, 0.0))
        self.assertEqual(make_ending(fade_out=FADE, seeks=True)[1:], (CUT_FADE, 2.0))
        self.assertEqual(make_ending(1, 3, True, 1.5), Ending(1.0, 3, 1.5))
        self.assertEqual(make_ending(None, 0, True)[1:], (0, 2.0))
        for bad in (-1, math.nan, math.inf, "1", True, 1e6):
            for name in ("fade_in", "fade_out"):
                with self.assertRaisesRegex(ValueError, f"{name} must be 0 s or more"):
                    make_ending(**{name: bad})
        with self.assertRaisesRegex(ValueError, "ending must be true or false, got 2"):
            make_ending(seeks=2)


class TestCuts(Test):
    def test_at_the_end_of_a_note(self):
        """Of four beats the one after which nothing sounds for a while, or the first
        end of a note."""
        steady = [(i / 2, 0.45) for i in range(12)]
        gap = [note for note in steady if note[0] != 5.0]
        cut = find_cut(voice(gap, 6.0), RATE, 4 * RATE) / RATE
        self.assertTrue(4.95 <= cut <= 5.5, cut)
        cut = find_cut(voice(steady, 6.0), RATE, 4 * RATE) / RATE
        self.assertTrue(cut >= 4 and 0.445 <= cut % 0.5 <= 0.5, cut)

    def test_where_few_notes_begin(self):
        """Of two stretches that are as loud."""
        for busy, calm in ((4, 5), (5, 4)):
            notes = [(i / 4, 0.25) for i in range(16)]
            notes += [(calm, 1.0)] + [(busy + i / 16, 1 / 16) for i in range(16)]
            sound = voice(notes, 6.0)
            power = [(sound[s * RATE :][:RATE] ** 2).mean() for s in (busy, calm)]
            sound[busy * RATE :][:RATE] *= math.sqrt(power[1] / power[0])
            strengths = endings.onsets(sound, 160).reshape(-1, 200).sum(axis=1)
            self.assertGreater(strengths[busy], 2 * strengths[calm])
            cut = find_cut(sound[:-1], RATE, 4 * RATE + 1) / RATE
            self.assertTrue(calm < cut <= calm + 1.07, cut)

    def test_where_it_is_quiet(self):
        noise = np.random.default_rng(0).normal(size=(4 * RATE, 2)).astype("f4") / 9
        noise[int(3.2 * RATE) : int(3.5 * RATE)] /= 10
        cut = find_cut(noise, RATE, 2 * RATE) / RATE
        self.assertTrue(3.2 < cut <= 3.5, cut)
        self.assertTrue(3.6 <= find_cut(noise, RATE, int(3.6 * RATE)) / RATE <= 4)

    def test_little_or_nothing(self):
        noise = np.random.default_rng(0).normal(size=(4 * RATE, 1)).astype("f4")
        for sound, first in ((noise, 4 * RATE), (noise, 5 * RATE), (noise[:9], 0)):
            self.assertEqual(find_cut(sound, RATE, first), len(sound))
        self.assertGreaterEqual(find_cut(0 * noise, RATE, 3 * RATE), 3 * RATE)
        self.assertLessEqual(find_cut(noise[:3000], RATE, 0), 3000)

    @slow(20)
    def test_takes_of_tiny(self):
        """Most stop in mid-note, and none that an ending is sought for does, even
        before it is faded."""
        prompts = [synth.make(100 + i)[1] for i in range(8)]
        model = MusicGen.from_pretrained(ROOT / "tiny")
        seeds = [*range(100, 108)]
        audio = np.array(model.generate(prompts, 10.0, seed=seeds))
        loud = lambda sound: np.abs(sound[-RATE // 200 :]).max() >= 0.2  # noqa: E731
        self.assertGreater(sum(loud(take[: 8 * RATE]) for take in audio), 4)
        cuts = [find_cut(take, RATE, 8 * RATE) for take in audio]
        self.assertEqual(sum(loud(take[:cut]) for take, cut in zip(audio, cuts)), 0)


class TestEndings(ScriptTest):
    first = ["-p", "fast square", "-m", "tiny", "-d", "1", "-s", "3"]

    def setUp(self):
        super().setUp()
        model = MusicGen.from_pretrained(ROOT / "tiny")
        self.codes = model.generate_codes("fast square", 3.0, seed=3)
        self.model = model

    def make(self, name: str, *flags: str, base: list[str] | None = None) -> np.ndarray:
        """The samples (N, 1) of a file of generate.py."""
        output = ["--output", self.folder / name, "--force", "--subtype", "float"]
        base = self.first if base is None else base
        status, out, err = self.run_script(*base, *output, *flags)
        self.assertEqual(status, 0, err)
        sound = soundfile.read(self.folder / name, always_2d=True, dtype="float32")[0]
        self.assertIn(f": {len(sound) / RATE:.2f} s of audio", out)
        return sound

    def settings(self, name: str) -> dict:
        return settings.read_settings(self.folder / name)

    def test_the_last_20_ms_fade(self):
        want = np.array(self.model.generate("fast square", 1.0, seed=3)[0])
        plain = self.make("a.wav", "--fade-out", "0")
        self.assertClose(plain, want, 1e-6)
        self.assertGreater(np.abs(plain[-640:]).max(), 0.01)
        faded = self.make("b.wav")
        self.assertSame(faded[:-640], plain[:-640])
        slope = 0.5 + 0.5 * np.cos(np.pi * np.arange(1, 641) / 640)
        self.assertClose(faded[-640:], plain[-640:] * slope[:, None], 1e-6)
        self.assertEqual(faded[-1, 0], 0)
        told = [self.settings(name).get("fade_out") for name in ("a.wav", "b.wav")]
        self.assertEqual(told, [0, FADE])

    def test_fades_of_any_length(self):
        plain = self.make("a.wav", "--fade-out", "0")
        faded = self.make("b.wav", "--fade-out", "0.5", "--fade-in", "0.25")
        self.assertSame(faded, fade(plain, RATE, 0.25, 0.5))
        self.assertFalse(np.array_equal(faded, plain))
        told = self.settings("b.wav")
        self.assertEqual((told["fade_in"], told["fade_out"]), (0.25, 0.5))

    def test_again_makes_the_same_file(self):
        for flags in (
            [],
            ["--fade-out", "0"],
            ["--fade-out", "0.5", "--fade-in", "0.1"],
            ["--ending"],
            ["--ending", "--bpm", "240", "--fade-out", "0"],
        ):
            codes = self.folder / "a.safetensors"
            first = self.make("a.wav", *flags, "--save-codes", codes)
            for source in (["--again", self.folder / "a.wav"], ["--redecode", codes]):
                second = self.make("b.wav", base=source)
                self.assertSame(second, first)
                self.assertEqual(self.settings("a.wav"), self.settings("b.wav"))
            plain = self.make("c.wav", "--fade-out", "0", base=["--redecode", codes])
            again = ["--again", self.folder / "a.wav", "--fade-out", "0"]
            self.assertSame(self.make("d.wav", base=again), plain)
            self.assertEqual(len(plain), len(first))

    def test_codes_and_what_goes_on_from_them_have_no_fade(self):
        codes, longer = (self.folder / f"{name}.safetensors" for name in "ab")
        self.make("a.wav", "--save-codes", codes, "--fade-out", "0.5")
        want = self.model.generate_codes("fast square", 1.0, seed=3)
        self.assertSame(settings.load_codes(codes)[0], want)
        more = ["--duration", "2", "--save-codes", longer]
        base = ["--resume", codes]
        resumed = self.make("b.wav", *more, base=base)
        want = self.model.generate_codes("fast square", 2.0, seed=3)
        self.assertSame(settings.load_codes(longer)[0], want)
        whole = np.array(self.model.decode(want)[0])
        self.assertClose(resumed, fade(whole, RATE, 0, 0.5), 1e-6)

    def test_a_stream_is_not_faded(self):
        output, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        stream = ["--stream", "--output", output, "--save-codes", codes]
        self.assertEqual(self.run_script(*self.first, *stream)[0], 0)
        want = self.make("b.wav", "--fade-out", "0")
        got = soundfile.read(output, always_2d=True)[0]
        self.assertClose(got, want, 4 / 32768)  # dither and rounding
        self.assertNotIn("fade_out", self.settings("a.wav"))
        self.assertSame(
            self.make("c.wav", base=["--redecode", codes]), fade(want, RATE, 0, FADE)
        )
        faded = self.folder / "d.wav"
        self.make("d.wav", "--ending", "--fade-in", "0.1")
        again = ["--again", faded, "--stream", "--output", output, "--force"]
        self.assertEqual(self.run_script(*again)[0], 0)
        self.assertClose(soundfile.read(output, always_2d=True)[0], got, 4 / 32768)

    def test_in_python_nothing_fades(self):
        path = self.folder / "a.wav"
        values = dict(prompt="fast square", seed=3, output=path, subtype="float")
        job = make_job(values | dict(duration=1.0))
        for batch in jobs.run(self.model, [job], 1):
            for _ in batch:
                pass
            self.assertEqual([result.error for result in batch.save()], [None])
        want = self.model.generate("fast square", 1.0, seed=3)[0]
        got = soundfile.read(path, always_2d=True, dtype="float32")[0]
        self.assertClose(got, want, 1e-6)
        codes = self.model.generate_codes("fast square", 1.0, seed=3)
        self.assertClose(want, self.model.decode(codes)[0], 1e-6)

    def test_an_ending(self):
        """Two seconds more are made; or a bar; and the codes are all kept."""
        for flags, bar in ((["--ending"], 2.0), (["--bpm", "240", "--ending"], 1.0)):
            kept = self.folder / "a.safetensors"
            sound = self.make("a.wav", *flags, "--save-codes", kept)
            codes, told = settings.load_codes(kept)
            self.assertEqual(codes.shape[1], 50 * (1 + bar))
            if bar == 2:
                self.assertSame(codes, self.codes)
            self.assertEqual((told["duration"], told["ending"]), (1, True))
            whole = np.array(self.model.decode(codes)[0])
            cut = find_cut(whole, RATE, RATE)
            self.assertTrue(RATE <= cut < len(whole), cut)
            self.assertClose(sound, fade(whole[:cut], RATE, 0, CUT_FADE), 1e-6)

    def test_a_loop_is_not_faded(self):
        loop = ["--loop", "--bpm", "240", "--bars", "1", "--duration", "1.2"]
        kept = self.folder / "a.safetensors"
        sound = self.make("a.wav", *loop, "--save-codes", kept)
        self.assertEqual(len(sound), RATE)
        self.assertSame(sound, self.make("b.wav", *loop, "--fade-out", "0"))
        self.assertNotIn("fade_out", self.settings("a.wav"))
        again = self.make("c.wav", base=["--again", self.folder / "a.wav"])
        self.assertSame(again, sound)
        first = round(50 * self.settings("a.wav")["loop_start"])
        codes, _ = settings.load_codes(kept)
        want = decode_round(self.model, codes[:, first : first + 50], RATE)
        self.assertClose(sound, want, 1e-6)
        for more in (["--ending"], ["--fade-out", "1"], ["--fade-in", "1"]):
            output = ["--output", self.folder / "x.wav"]
            status, _, err = self.run_script(*self.first, *loop, *more, *output)
            self.assertEqual(status, 2)
            self.assertIn("loop does not go with ending, fade_in or fade_out", err)

    def test_a_part_made_again(self):
        """Of codes the end fades as that of their take; a sound's own end stays."""
        kept = self.folder / "a.safetensors"
        first = self.make("a.wav", "--save-codes", kept)
        plain = self.make("b.wav", "--fade-out", "0", "--fade-in", "0.1")
        for source in (kept, self.folder / "a.wav", self.folder / "b.wav"):
            base = ["--regenerate", "0.3:0.5", source, "-p", "bell", "-m", "tiny"]
            base += ["--candidates", "1"]
            sound = self.make("c.wav", base=base)
            want = plain if source.stem == "b" else first
            self.assertClose(sound[:3200], want[:3200], 1e-6)
            self.assertClose(sound[-6400:], want[-6400:], 1e-6)
            self.assertGreater(np.abs(sound - want).max(), 1e-3)
        faded = self.make("d.wav", "--fade-out", "0.2", base=[*base, "--seed", "1"])
        self.assertEqual(faded[-1, 0], 0)
        self.assertClose(faded[-6400:], fade(plain, RATE, 0, 0.2)[-6400:], 1e-6)
        with self.subTest("an ending has no part"):
            output = ["--output", self.folder / "x.wav"]
            status, _, err = self.run_script(*base, "--ending", *output)
            self.assertEqual(status, 2)
            self.assertIn("--regenerate goes without --ending", err)

    def test_each_of_a_batch_has_its_own(self):
        output = ["--output", self.folder / "x.wav", "--subtype", "float", "--ending"]
        status, _, err = self.run_script(*self.first, *output, "--takes", "3")
        self.assertEqual(status, 0, err)
        sounds = [soundfile.read(self.folder / f"x-{i}.wav")[0] for i in (1, 2, 3)]
        self.assertEqual(len({*map(len, sounds)}), 3)
        alone = self.make("a.wav", "--ending", "--seed", "4")
        self.assertClose(sounds[1][:, None], alone, 1e-5)

    def test_after_a_prompt_that_is_dropped(self):
        sound = self.folder / "s.wav"
        save_audio(sound, voice([(0, 0.4)], 0.5), RATE)
        flags = ["--audio-prompt", sound, "--ending"]
        whole = self.make("a.wav", *flags)
        rest = self.make("b.wav", *flags, "--drop-prompt")
        self.assertGreaterEqual(len(whole), RATE)
        self.assertGreaterEqual(len(rest), RATE // 2)
        again = self.make("c.wav", base=["--again", self.folder / "b.wav"])
        self.assertSame(again, rest)

    def test_the_duration_counts_what_is_dropped(self):
        """The end of a take of 1 s is sought after half a second of the rest."""
        values = dict(prompt="a", seed=0, output="x.wav", audio_prompt="s.wav")
        values |= dict(drop_prompt=True, duration=1.0, ending=True)
        noise = np.random.default_rng(0).normal(size=(5 * RATE // 2, 1)) / 9
        for quiet in (0.2, 0.7):
            noise[int(quiet * RATE) :][: RATE // 10] /= 99
        sound = jobs.ended(self.model, make_job(values), mx.array(noise), 25)
        self.assertTrue(0.7 < len(sound) / RATE <= 0.8, len(sound))
        self.assertEqual(sound[-1, 0], 0)

    def test_level_and_peak_are_those_of_the_file(self):
        flags = ["--duration", "3", "--fade-out", "2", "--fade-in", "0.5"]
        sound = self.make("a.wav", *flags, "--loudness", "-30")
        measured = loudness.integrated_loudness(sound, RATE)
        self.assertAlmostEqual(measured, -30, delta=0.05)
        sound = self.make("b.wav", *flags, "--peak", "-6")
        self.assertAlmostEqual(true_peak(sound), 10 ** (-6 / 20), 3)
        for more in (["--loudness", "-9"], ["--ending", "--loudness", "-9"]):
            sound = self.make("c.wav", *more)
            self.assertLessEqual(true_peak(sound), 10 ** (-1 / 20) + 1e-4)
            self.assertEqual(sound[-1, 0], 0)

    def test_lines(self):
        lines, names = self.folder / "lines.jsonl", ("a", "b", "c")
        told = [dict(prompt="bell", seed=1, fade_out=0.1, fade_in=0.05)]
        told += [dict(prompt="bell", seed=1, ending=True), dict(prompt="bell", seed=1)]
        told = [
            x | {"output": str(self.folder / f"{n}.wav")} for x, n in zip(told, names)
        ]
        lines.write_text("\n".join(map(json.dumps, told)))
        command = ["--prompts", lines, "-m", "tiny", "-d", "0.2"]
        self.assertEqual(self.run_script(*command)[0], 0)
        found = [self.settings(f"{name}.wav") for name in names]
        self.assertEqual([x["fade_out"] for x in found], [0.1, CUT_FADE, FADE])
        self.assertEqual([x.get("ending") for x in found], [None, True, None])
        _, _, err = self.run_script(*command)
        self.assertEqual(err.count("it is there, with these settings"), 3, err)
        self.assertEqual(self.run_script(*command, "--fade-out", "0")[0], 0)
        found = [self.settings(f"{name}.wav")["fade_out"] for name in names]
        self.assertEqual(found, [0.1, 0, 0])

    def test_files_of_earlier_versions_are_not_made_again(self):
        lines, path = self.folder / "lines.txt", self.folder / "x-1.wav"
        lines.write_text("bell")
        command = ["--prompts", lines, "-m", "tiny", "-d", "0.2", "-s", "1"]
        command += ["--output", self.folder / "x.wav"]
        self.assertEqual(self.run_script(*command)[0], 0)
        record = settings.read_settings(path)
        self.assertEqual(record.pop("fade_out"), FADE)
        save_audio(path, mx.zeros((6400, 1)), RATE, settings.to_comment(record))
        _, _, err = self.run_script(*command)
        self.assertIn("it is there, with these settings", err)
        _, _, err = self.run_script(*command, "--fade-out", "0.1")
        self.assertIn("fade_out was None and is 0.1", err)

    def test_bad_input(self):
        output = self.folder / "x.wav"
        codes = self.folder / "c.safetensors"
        settings.save_codes(
            codes, self.codes, dict(model="tiny", duration=3.0, prompt="a")
        )
        flags = [*self.first, "--output", output]
        for bad, pattern in (
            (["--fade-out", "-1"], "fade_out must be 0 s or more, got -1"),
            (["--fade-in", "nan"], "fade_in must be 0 s or more, got nan"),
            (["--fade-in", "x"], "invalid float value"),
            (["--fade-out", "1.1"], "fade_out must not be longer than the take, 1 s"),
            (["--fade-in", "9"], "fade_in must not be longer than the take, 1 s"),
            (["--ending", "--stream"], "need the whole take: leave out --stream"),
            (["--fade-out", "1", "--stream"], "need the whole take"),
            (["--fade-in", "1", "--stream"], "need the whole take"),
        ):
            with self.subTest(bad):
                status, _, err = self.run_script(*flags, *bad)
                self.assertIn(status, (1, 2))
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
        status, _, err = self.run_script("--redecode", codes, "--ending")
        self.assertEqual(status, 2)
        self.assertIn("--redecode takes codes as they are: leave out --ending", err)
        self.assertFalse(Path(output).exists())
