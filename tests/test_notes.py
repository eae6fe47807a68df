"""Typed tunes, held to the sounds of the same notes."""

import json
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
import sounds
from common import EXPECTED, REFERENCE, FollowingTest, Test, exact, expected, last

import settings
import synth
from beat import Beat
from melody import RATE, MelodyConfig, MelodyRequest, draw, extract_chroma
from notes import Note, Tune, parse
from prompt import check_codes

NAMES = "C C# Db D D# Eb E F F# Gb G G# Ab A A# Bb B".split()
STEADY = ("sine", "square", "sawtooth", "brass")  # voices of synth.py


def played(tune: Tune, voice: str) -> mx.array:
    """Samples (N, 1) of synth.py, each note of the length that it gives it there."""
    random, track = np.random.default_rng(0), np.zeros(round(tune.duration * RATE))
    begins = 0.0
    for note in tune.notes:
        lasts = tune.beat.beats(note.beats)
        if note.pitch is not None:
            hertz = synth.frequency(note.pitch)
            sound = synth.VOICES[voice](hertz, 0.95 * lasts, random)
            synth.add(track, begins, sound)
        begins += lasts
    return mx.array(0.3 * track, mx.float32)[:, None]


def random_tune(random: np.random.Generator, bpm: float) -> Tune:
    """16 notes, an eighth of them rests."""
    names = [f"{random.choice(NAMES)}{random.choice([3, 4, 5])}" for _ in range(16)]
    words = ["-" if random.random() < 1 / 8 else name for name in names]
    beats = random.choice(["", ":2", ":1.5", ":0.5"], 16)
    return parse(" ".join(map("".join, zip(words, beats))), Beat(bpm))


def typed(which: int) -> Tune:
    """A tune of the reference, whose notes have half a second each."""
    pitches = EXPECTED["melody-transformers"]["tunes"][which]
    sharps = [name for name in NAMES if "b" not in name]
    words = [f"{sharps[pitch % 12]}{pitch // 12 - 1}" for pitch in pitches]
    return parse(" ".join(words), Beat(120))


class TestNotes(Test):
    def test_parse(self):
        tune = parse("C E5 G:2 | A - F#:.5|Bb3 Cb B#:1.", Beat(120))
        pitches = [60, 76, 67, 69, None, 66, 58, 59, 72]
        self.assertEqual([note.pitch for note in tune.notes], pitches)
        self.assertEqual([n.beats for n in tune.notes], [1, 1, 2, 1, 1, 0.5, 1, 1, 1])
        self.assertEqual(tune.duration, 9.5 * 0.5)
        self.assertEqual(parse("-:3 C", Beat(60)).notes, (Note(None, 3), Note(60)))

    def test_bad_notes(self):
        for text, pattern in (
            ("C H", "got 'H'"),
            ("c", "got 'c'"),
            ("C##", "got 'C##'"),
            ("C44", "got 'C44'"),
            ("C:", "got 'C:'"),
            ("C:0", "beats above 0 .* got 'C:0'"),
            ("C:-1", "got 'C:-1'"),
            ("C:1e9", "got 'C:1e9'"),
            ("C:99999", "got 'C:99999'"),
            ("C:nan", "got"),
            ("-#", "got '-#'"),
            ("", "empty"),
            (" | ", "empty"),
            (3, "must be a text, got 3"),
        ):
            with self.assertRaisesRegex(ValueError, f"notes .*{pattern}"):
                parse(text, Beat(120))

    def test_frames_are_those_of_the_played_notes(self):
        """Of eight tunes for each tempo and voice at least 95 in 100."""
        for voice in STEADY:
            for bpm in (60, 90, 110, 120, 140, 200):
                random, same, count = np.random.default_rng(1), 0, 0
                for _ in range(8):
                    tune = random_tune(random, bpm)
                    got = tune.chroma()
                    want = extract_chroma(played(tune, voice), RATE)
                    self.assertEqual(got.shape, want.shape)
                    self.assertSame(got.sum(axis=1), mx.ones(len(got)))
                    same += (got == want).all(axis=1).sum().item()
                    count += len(got)
                with self.subTest(voice=voice, bpm=bpm):
                    self.assertGreaterEqual(same / count, 0.95)

    def test_no_frames_are_those_of_all_voices(self):
        """A sine's and a bell's differ so often that frames which agree with 95 in 100 of
        the one's cannot agree with as many of the other's."""
        random, same, count = np.random.default_rng(1), 0, 0
        for _ in range(8):
            tune = random_tune(random, 110)
            sine, bell = (
                extract_chroma(played(tune, voice), RATE) for voice in ("sine", "bell")
            )
            same += (sine == bell).all(axis=1).sum().item()
            count += len(sine)
        self.assertLess(same / count, 0.9)

    def test_a_rest_is_silence(self):
        """Frames that no note reaches are what `extract_chroma` gives for zeros: C."""
        tune = parse("A -:4 A", Beat(60))
        notes = mx.argmax(tune.chroma(), axis=1).tolist()
        self.assertEqual(notes[0], 9)
        silent = [i for i in range(len(notes)) if 1.26 < i * 4096 / RATE < 4.74]
        self.assertEqual([notes[i] for i in silent], [0] * len(silent))
        self.assertGreater(len(silent), 20)
        with patch("melody.check_melody", lambda audio, *_: audio):
            want = extract_chroma(mx.zeros((RATE, 1)), RATE)
        self.assertSame(
            tune.chroma()[mx.array(silent)], want[mx.array([0] * len(silent))]
        )

    def test_octaves_and_bars_change_nothing(self):
        low, high = (parse(text, Beat(90)) for text in ("C2 E G:2", "C7 | E5 | G3:2"))
        self.assertSame(low.chroma(), high.chroma())

    def test_windows_of_a_long_take(self):
        """Each goes on where the last began, and the tune goes round, as the sound."""
        tune, config = typed(0), MelodyConfig(chroma_length=8)
        conditioner = config.build(exact("melody-audiocraft").audio_encoder, 1.0)
        sound = mx.array(sounds.tune(RATE, [note.pitch for note in tune.notes]))
        requests = (MelodyRequest(tune), MelodyRequest(sound, separate=False))
        for start in (None, 0, 24000, 60000, 72000):
            states = [
                conditioner.states([conditioner.prepare(r, 0, 3.0)], start)[0]
                for r in requests
            ]
            self.assertEqual(states[0].shape, (1, 8, 12))
            self.assertSame(*states)

    def test_other_models_notes(self):
        """Of models that keep all notes, or tell more apart, or look shorter."""
        tune = typed(0)
        soft = tune.chroma(MelodyConfig(argmax=False))
        self.assertSame(mx.argmax(soft, 1), mx.argmax(tune.chroma(), 1))
        self.assertSame(soft.max(axis=1), mx.ones(len(soft)))
        self.assertGreater((soft > 0).sum().item(), len(soft))
        fine = tune.chroma(MelodyConfig(num_chroma=24))
        self.assertSame(fine[:, ::2], tune.chroma())
        short = tune.chroma(MelodyConfig(n_fft=4096))
        self.assertEqual(len(short), 1 + round(tune.duration * RATE) // 1024)
        with self.assertRaisesRegex(ValueError, "notes must .* twelve .* not 10"):
            tune.chroma(MelodyConfig(num_chroma=10))


class TestModels(Test):
    """Greedy codes are those that the originals made of the played notes."""

    prompts = EXPECTED["mono-transformers"]["prompts"][:2]

    def test_transformers(self):
        for name in ("melody-transformers", "stereo-melody-transformers"):
            model, want = exact(name), expected(name)
            for which in (0, 1):
                options = dict(duration=0.3, temp=0, melody=typed(which))
                codes = model.generate_codes(self.prompts, **options)
                self.assertSame(last(codes), want[f"tune_{which}_codes"])

    def test_audiocraft(self):
        """In one window, and in several."""
        model, want = exact("melody-audiocraft"), expected("melody-audiocraft")
        told = EXPECTED["melody-audiocraft"]
        for frames in told["frames"]:
            for which in (0, 1):
                codes = model.generate_codes(
                    self.prompts,
                    duration=(frames + 0.5) / 50,
                    extend_stride=told["stride"] / 50,
                    temp=0,
                    condition=MelodyRequest(typed(which)),
                )
                self.assertSame(last(codes), want[f"tune_{which}_{frames}"])

    def test_codes_of_a_played_tune(self):
        model, tune = exact("melody-audiocraft"), parse("A:3 F# C5:2", Beat(110))
        sound = played(tune, "square")
        self.assertSame(tune.chroma()[:8], extract_chroma(sound, RATE)[:8])
        options = dict(duration=0.6, temp=0, separate=False)
        got, want, other = (
            model.generate_codes("drums", melody=melody, **options)
            for melody in (tune, sound, parse("C:9", Beat(110)))
        )
        self.assertSame(got, want)
        self.assertFalse(mx.array_equal(got, other))

    def test_a_batch_of_with_and_without(self):
        model = exact("melody-transformers")
        melodies = [typed(0), None, typed(1)]
        options = dict(duration=0.3, temp=0)
        batch = model.generate_codes(["a", "b", "c"], melody=melodies, **options)
        for i, (prompt, tune) in enumerate(zip("abc", melodies)):
            alone = model.generate_codes(prompt, melody=tune, **options)
            self.assertSame(alone[0], batch[i])

    def test_bad_input(self):
        model = exact("melody-transformers")
        for text, pattern in (
            ("C:.1", "notes must last at least 0.512 s, got 0.050 s"),
            ("-:9", "notes must have a note, not rests alone"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.generate_codes("a", duration=0.2, melody=parse(text, Beat(120)))
        with self.assertRaisesRegex(ValueError, "must go with a melody model"):
            exact("mono-transformers").generate_codes("a", melody=typed(0))


class TestNotesCommands(FollowingTest):
    model = str(REFERENCE / "melody-transformers")
    tune = ["--notes", "C E G:2 | A - F#:3", "--bpm", "110"]

    def test_notes(self):
        codes = self.folder / "a.safetensors"
        audio = self.make("a.wav", "-p", "drums", *self.tune, "--save-codes", codes)
        beat = Beat(110.0)
        options = dict(duration=0.3, seed=3, melody=parse(self.tune[1], beat))
        model = exact("melody-transformers")
        want = model.generate_codes("drums, 110 bpm", **options)
        self.assertSame(settings.load_codes(codes)[0], want)
        check_codes(model, want)
        told = settings.read_settings(self.folder / "a.wav")
        self.assertEqual((told["notes"], told["bpm"]), (self.tune[1], 110))
        again = self.make("b.wav", "--again", self.folder / "a.wav")
        self.assertSame(again, audio)
        other = self.make("c.wav", "--again", self.folder / "a.wav", "--notes", "C:9")
        self.assertFalse(np.array_equal(other, audio))
        self.make("stream.wav", "-p", "drums", *self.tune, "--stream")

    def test_again_with_a_melody_in_their_place(self):
        self.make("a.wav", "-p", "drums", *self.tune)
        soundfile.write(self.folder / "t.wav", sounds.tune(32000, [60, 64]), 32000)
        melody = ["--melody", self.folder / "t.wav", "--no-separate"]
        self.make("b.wav", "--again", self.folder / "a.wav", *melody)
        told = settings.read_settings(self.folder / "b.wav")
        self.assertNotIn("notes", told)
        self.make("c.wav", "--again", self.folder / "b.wav", *self.tune)
        told = settings.read_settings(self.folder / "c.wav")
        self.assertEqual((told["notes"], "melody" in told), (self.tune[1], False))

    def test_show(self):
        flags = ["-p", "drums", "--output", self.folder / "a.wav", "--show-melody"]
        _, out, err = self.run_script(*flags, *self.tune)
        drawn = draw(parse(self.tune[1], Beat(110)).chroma())
        self.assertEqual(out.splitlines()[:12], drawn.splitlines(), err)

    def test_lines(self):
        lines = self.folder / "lines.jsonl"
        told = [dict(prompt="drums", notes=self.tune[1], bpm=110), dict(prompt="drums")]
        told += [dict(prompt="drums", notes="H", bpm=110), told[0] | dict(bpm=None)]
        lines.write_text("\n".join(map(json.dumps, told)))
        output = ["--output", self.folder / "x.wav"]
        status, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(status, 1)
        self.assertRegex(err, "line 3: notes must be such as .*got 'H'")
        self.assertRegex(err, "line 4: notes need a bpm")
        made = sorted(path.name for path in self.folder.glob("x-*.wav"))
        self.assertEqual(made, ["x-1.wav", "x-2.wav"])
        record = settings.read_settings(self.folder / "x-1.wav")
        self.assertEqual(record["notes"], self.tune[1])
        self.assertNotIn("notes", settings.read_settings(self.folder / "x-2.wav"))
        _, _, err = self.run_script("--prompts", lines, *output)
        self.assertEqual(err.count("it is there, with these settings"), 2, err)
        told[0]["notes"] = "C:4"
        lines.write_text("\n".join(map(json.dumps, told)))
        _, _, err = self.run_script("--prompts", lines, *output)
        self.assertIn("x-1.wav is made again: notes was 'C E G:2 | A - F#:3' and", err)

    def test_lines_of_a_model_that_follows_none(self):
        lines = self.folder / "lines.jsonl"
        lines.write_text(json.dumps(dict(prompt="bell", notes="C:4", bpm=110)))
        with patch.object(self, "model", "tiny"):
            status, _, err = self.run_script(
                "--prompts", lines, "--output", self.folder / "x.wav"
            )
        self.assertEqual(status, 1)
        self.assertIn("line 1: notes needs a model that follows one", err)

    def test_bad_input(self):
        sound = self.folder / "sound.wav"
        soundfile.write(sound, sounds.tune(32000, [60, 64]), 32000)
        bpm = ["--bpm", "110"]
        for flags, status, pattern in (
            (["--notes", "C H", *bpm], 2, "notes must be such as .*got 'H'"),
            (["--notes", "C:x", *bpm], 2, "with beats above 0 .*got 'C:x'"),
            (["--notes", "", *bpm], 2, "notes must name a note.*empty"),
            (["--notes", "C:9"], 2, "notes need a bpm"),
            (["--notes", "C:9", "--bpm", "19"], 2, "bpm must be from 20 to 400"),
            (["--notes", "C:9", "--bpm", "401"], 2, "bpm must be from 20 to 400"),
            (["--notes", "C", "--bpm", "400"], 1, "notes must last at least 0.512 s"),
            (["--notes", "- -:9", *bpm], 1, "not rests alone"),
            (["--notes", "C:9", *bpm, "--melody", sound], 2, "not be given together"),
            (["--notes", "C:9", *bpm, "--save-melody", sound], 2, "need a --melody"),
        ):
            with self.subTest(flags=flags):
                output = ["--output", self.folder / "no.wav", "-p", "a"]
                got, _, err = self.run_script(*output, *flags)
                self.assertEqual(got, status, err)
                self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
                self.assertLess(len(err), 400)
        for model, pattern in (
            ("tiny", "--notes needs a model that follows one"),
            ("small", "--notes needs a model that follows one"),
            (str(REFERENCE / "mono-transformers"), "notes must go with a melody model"),
        ):
            with patch.object(self, "model", model):
                status, _, err = self.run_script(*output, "--notes", "C:9", *bpm)
            self.assertIn(status, (1, 2))
            self.assertRegex(err, pattern)
        self.assertFalse((self.folder / "no.wav").exists())
