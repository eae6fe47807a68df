"""Texts that change during a take."""

import pickle
from dataclasses import replace

import mlx.core as mx
import numpy as np
from common import ROOT, ScriptTest, Test, exact, slow

import job
from beat import Beat, make_beat
from decoder import Condition
from musicgen import MusicGen, encode_text, guide, undelay
from options import Options
from sections import Sections, cut, parse
from settings import read_settings

FRAME = 0.02  # seconds


def song(*sections: tuple[int, str], fade: int = 0) -> Sections:
    """By first frame and text."""
    return Sections([(first * FRAME, text) for first, text in sections], fade * FRAME)


def load(name: str) -> MusicGen:
    """With windows of 15 frames."""
    model = exact(name)
    model.config = replace(model.config, max_duration=15 * FRAME)
    return model


def naive_codes(model: MusicGen, prompt: Sections, frames: int) -> mx.array:
    """Greedy codes (1, T, K) of one window, a step at a time and from the first one on
    wherever a section begins: with a fade, once under each of the two texts."""
    decoder, options, config = model.decoder, Options(1.0), model.config.decoder
    firsts = [round(seconds / FRAME) for seconds, _ in prompt.sections]
    fade, blank = round(prompt.fade / FRAME), config.vocab_size
    texts = [encode_text(model, [text], options) for text in prompt.texts]
    columns = [[blank] * len(config.delays)]  # the step before the first

    def logits_of(last: int) -> mx.array:
        """After all columns, each under its frame's text, but of none after the last."""
        cache = decoder.make_cache(2, len(columns))
        for step, column in enumerate(columns):
            at = max(i for i in range(last + 1) if firsts[i] <= step)
            tokens = mx.array([[column]] * 2)
            logits = decoder(tokens, decoder.text_kv(texts[at]), cache)
        return guide(logits, options)[0, 0]

    for i, first in enumerate(firsts):
        stop = [*firsts, frames][i + 1]
        for step in range(len(columns) - 1, stop + max(config.delays)):
            new, old = logits_of(i), logits_of(max(i - 1, 0))
            column = []
            for k, delay in enumerate(config.delays):
                frame = step - delay
                weight = min((frame - first + 1) / (fade + 1), 1) if i else 1
                mixed = old[k] + (new[k] - old[k]) * weight
                column.append(mx.argmax(mixed).item() if 0 <= frame < frames else blank)
                if i and frame < first:  # made before
                    column[k] = kept[step][k]
            columns.append(column)
        kept = columns[1:]
        del columns[1 + stop :]
    return undelay(mx.array([kept]), config.delays)


class TestSections(Test):
    def test_against_a_naive_loop(self):
        model = load("mono-audiocraft")
        for fade in (0, 3):
            prompt = song((0, "drums"), (4, "piano"), (9, "loud guitar"), fade=fade)
            want = naive_codes(model, prompt, 15)
            for plain in (True, False):
                model.plain = plain
                codes = model.generate_codes(prompt, 15 * FRAME, temp=0)
                self.assertSame(codes, want.astype(codes.dtype))
        self.assertNotEqual(
            want.tolist(), naive_codes(model, prompt.each(str.upper), 15)
        )

    def test_equal_texts_are_the_plain_take(self):
        for name in ("mono-audiocraft", "stereo-transformers", "melody-audiocraft"):
            model = load(name)
            for frames in (12, 40):
                options = dict(duration=frames * FRAME, seed=3)
                plain = model.generate_codes("drums", **options)
                same = song((0, "drums"), (5, "drums"), (9, "drums"), fade=2)
                self.assertSame(model.generate_codes(same, **options), plain)
                audio = model.generate(same, **options)
                self.assertSame(audio, model.generate("drums", **options))

    def test_frames_before_a_switch_are_unchanged(self):
        for name in ("mono-audiocraft", "stereo-audiocraft", "melody-audiocraft"):
            model = load(name)
            options = dict(duration=40 * FRAME, seed=3)
            plain = model.generate_codes("drums", **options)
            for first in (1, 2, 5, 14, 15, 16, 29, 39):
                for fade in (0, 1):
                    prompt = song((0, "drums"), (first, "loud piano"), fade=fade)
                    codes = model.generate_codes(prompt, **options)
                    self.assertSame(codes[:, :first], plain[:, :first])
                    if first < 30:  # in so many frames something is other
                        self.assertFalse(mx.array_equal(codes, plain).item())

    @slow(4)
    def test_long_batched_streamed_and_resumed(self):
        rng = np.random.default_rng(0)
        for name in ("mono-audiocraft", "stereo-transformers", "melody-audiocraft"):
            model = load(name)
            fade = 3 if name.startswith("mono") else 0
            first = song((0, "a"), (4, "loud drums"), (17, "b"), (33, "c d"), fade=fade)
            prompts = [first, "plain drums", first.each(lambda text: f"{text} low")]
            prompts.append(song((0, "x"), (21, "y"), fade=5))
            options = dict(duration=40 * FRAME)
            batch = model.generate_codes(prompts, seed=[5, 6, 7, 8], **options)
            take = model.steps(prompts, seed=[5, 6, 7, 8], **options)
            self.assertEqual(take.total, sum(1 for _ in take))
            for i, prompt in enumerate(prompts):
                alone = dict(prompts=prompt, seed=5 + i, **options)
                codes = model.generate_codes(**alone)
                self.assertSame(codes[0], batch[i])
                model.plain = True
                self.assertSame(model.generate_codes(**alone), codes)
                model.plain = False
                for T in rng.choice(np.arange(1, 40), 8, replace=False):
                    again = model.generate_codes(codes_prompt=codes[:, :T], **alone)
                    self.assertSame(again, codes)
            pieces = model.stream(prompts[0], seed=5, chunk=0.1, **options)
            streamed = mx.concatenate(list(pieces))
            self.assertClose(streamed, model.decode(batch[:1])[0], 1e-5)

    def test_context(self):
        """A section in a window of its own is a take that begins with what it hears."""
        model = load("mono-audiocraft")
        options = dict(duration=60 * FRAME, seed=3)
        plain = model.generate_codes("drums", **options)
        pairs = [(first * FRAME, text) for first, text in ((0, "drums"), (21, "piano"))]
        for context in (0, 3, 8, 20):
            prompt = Sections(pairs, context=context * FRAME)
            codes = model.generate_codes(prompt, **options)
            self.assertSame(codes[:, :21], plain[:, :21])
            for T in (1, 20, 21, 22, 30, 45, 55):
                again = model.generate_codes(
                    prompt, codes_prompt=codes[:, :T], **options
                )
                self.assertSame(again, codes)
        prompt = Sections([(0, "drums"), (4 * FRAME, "piano")], context=0)
        options = dict(duration=15 * FRAME, temp=0)
        codes = model.generate_codes(prompt, **options)
        self.assertSame(codes[:, 4:], model.generate_codes("piano", 11 * FRAME, temp=0))
        melody = load("melody-audiocraft")
        with self.assertRaisesRegex(ValueError, "section_context needs a model that"):
            melody.generate_codes(prompt, **options)

    def test_style_models(self):
        model = load("style-audiocraft")
        prompt = song((0, "a"), (4, "loud drums"), fade=2)
        sound = mx.random.normal((100000, 1), key=mx.random.key(0)) / 9
        options = dict(duration=12 * FRAME, seed=3, style=sound, guidance_beta=2.0)
        plain = model.generate_codes("a", **options)
        codes = model.generate_codes(prompt, **options)
        self.assertSame(codes[:, :4], plain[:, :4])
        self.assertFalse(mx.array_equal(codes, plain).item())

    def test_negative_prompt_and_no_guidance(self):
        model = load("mono-audiocraft")
        prompt = song((0, "drums"), (5, "piano"))
        for options in (dict(negative_prompt="loud"), dict(guidance_coef=1.0)):
            options |= dict(duration=12 * FRAME, seed=3)
            plain = model.generate_codes("drums", **options)
            codes = model.generate_codes(prompt, **options)
            self.assertSame(codes[:, :5], plain[:, :5])
            self.assertFalse(mx.array_equal(codes, plain).item())

    def test_a_fade_comes_in_slowly(self):
        """Of equally likely codes those of the new text are drawn more and more."""
        model = load("mono-audiocraft")
        model.config = replace(model.config, max_duration=8.0)
        makes = {"low": 3, "high": 7}

        class Step:
            def __init__(self, text: Condition, copies: int, steps: int):
                self.follow(text)

            def follow(self, text: Condition) -> None:
                self.code = makes[told[text.states.sum().item()]]

            def rewind(self, sound=None) -> None: ...

            def __call__(self, tokens: mx.array) -> mx.array:
                logits = mx.where(mx.arange(64) == self.code, 8.0, 0.0)
                return mx.broadcast_to(logits, (len(tokens), 1, 4, 64))

        options = dict(duration=6.0, guidance_coef=1.0, temp=1.0, top_k=64)
        told = {
            encode_text(model, [text], Options(**options)).states.sum().item(): text
            for text in makes
        }
        model.make_forward = Step
        prompt = Sections([(0, "low"), (2.0, "high")], fade=2.0)
        codes = np.array(model.generate_codes(prompt, seed=0, **options)[0])
        high = (codes == 7).mean(axis=1)
        self.assertLess(high[:100].mean(), 0.02)
        self.assertLess(high[100:120].mean(), 0.1)
        self.assertGreater(high[180:200].mean(), 0.8)
        self.assertGreater(high[200:].mean(), 0.95)
        low = (codes == 3).mean(axis=1)
        self.assertGreater(low[100:120].mean(), 0.8)
        self.assertLess(low[200:].mean(), 0.02)


class TestParse(Test):
    def test_plain_texts(self):
        for text in ("", "happy rock", "12: drums", "10: a | 12: b", "a 0: b", "00: a"):
            self.assertIs(parse(text), text)

    def test_sections(self):
        for text, beat, sections in (
            ("0: calm pads", None, [(0, "calm pads")]),
            ("0:a|1.5: b : c |  2s:d", None, [(0, "a"), (1.5, "b : c"), (2, "d")]),
            ("0: a | 8bars: b", Beat(120), [(0, "a"), (16, "b")]),
            ("0:00: a | 1:30 : b|2:05.5: c", None, [(0, "a"), (90, "b"), (125.5, "c")]),
            ("0: 80s | 1: 30: b", None, [(0, "80s"), (1, "30: b")]),
            ("0bars: a | 1bar: b | 7: c", Beat(90, 3), [(0, "a"), (2, "b"), (7, "c")]),
        ):
            got = parse(text, beat, 0.5)
            self.assertEqual((got.sections, got, got.fade), (sections, text, 0.5))
            self.assertEqual(pickle.loads(pickle.dumps(got)).sections, sections)

    def test_text_of_a_list(self):
        prompt = Sections([(0.0, "calm"), (12, "drums")])
        self.assertEqual(prompt, "0: calm | 12: drums")
        self.assertEqual(parse(str(prompt)).sections, prompt.sections)

    def test_neighbours_with_one_text_are_one(self):
        prompt = Sections([(0, "a"), (1, "b"), (2, "b"), (3, "a")])
        self.assertEqual(prompt.texts, ["a", "b", "a"])

    def test_what_cannot_be(self):
        for text, told in (
            ("0: a | 3: b | 2: c", "^Sections must be in order: 2 s comes after 3 s"),
            ("0: a | 3: b | 3: c", "in order: 3 s comes after 3 s"),
            ("0: a | 2:", "^The section at 2 s must have a text"),
            ("0:", "^The section at 0 s must have a text"),
            ("0: a | b", "^A section must be a time and a text, .* got 'b'"),
            ("0: a | -1: b", "got '-1: b'"),
            ("0: a | 1e9: b", "got '1e9: b'"),
            ("0: a | 4bars: b", "^4bars needs a bpm"),
        ):
            with self.assertRaisesRegex(ValueError, told):
                parse(text)
        for sections, fade, told in (
            ([], 0, "There must be a section"),
            ([(1, "a")], 0, "must begin at 0, got 1 s"),
            ([(0, 5)], 0, "pairs of seconds and text"),
            (None, 0, "pairs of seconds and text, got None"),
            (["ab", "c"], 0, "pairs of seconds and text"),
            ("0: a", 0, "There must be a section"),
            ([(True, "a"), (1, "b")], 0, "must begin at 0"),
            ([(float("nan"), "a")], 0, "pairs of seconds and text"),
            (
                [(0, "a"), (2, "b")],
                2.5,
                "section_fade must be from 0 s to the shortest",
            ),
            ([(0, "a"), (2, "b")], -1, "section_fade must be"),
            ([(0, "a"), (2, "b")], "1", "section_fade must be"),
        ):
            with self.assertRaisesRegex(ValueError, told):
                Sections(sections, fade)
        for context in (-1, "1", float("nan")):
            with self.assertRaisesRegex(
                ValueError, "section_context must be 0 s or more"
            ):
                Sections([(0, "a")], context=context)
        model, late = exact("mono-audiocraft"), song((0, "a"), (10, "b"))
        with self.assertRaisesRegex(ValueError, "must begin before the take ends"):
            model.steps(late, 10 * FRAME)
        self.assertEqual(model.steps(late, 11 * FRAME).total, 11 + 3 + 3)

    def test_windows(self):
        model = load("mono-audiocraft")
        prompt = song((0, "a"), (4, "b"), (15, "c"), (20, "d"))
        plan = [(0, 15, 15), (9, 24, 24), (18, 30, 30)]
        want = [(0, 4, 15), (0, 15, 15), (9, 20, 24), (9, 24, 24), (18, 30, 30)]
        self.assertEqual(cut(plan, prompt, model, 30 * FRAME), want)


class TestBeat(Test):
    def test_prompts(self):
        for prompt, want in (
            ("rock", "rock, 90.5 bpm"),
            ("", ""),
            ("rock at 120 BPM", "rock at 120 BPM"),
            ("120bpm", "120bpm"),
            ("rock by Bpm", "rock by Bpm, 90.5 bpm"),
        ):
            self.assertEqual(Beat(90.5).named(prompt), want)

    def test_what_cannot_be(self):
        for bpm, beats, told in (
            (19, None, "bpm must be from 20 to 400, got 19"),
            (401, None, "got 401"),
            (float("nan"), None, "got nan"),
            ("120", None, "got '120'"),
            (True, None, "got True"),
            (120, 0, "beats_per_bar must be from 1 to 32, got 0"),
            (120, 2.5, "got 2.5"),
            (None, 4, "beats_per_bar needs a bpm"),
        ):
            with self.assertRaisesRegex(ValueError, told):
                make_beat(bpm, beats)


class TestCommand(ScriptTest):
    def run_tiny(self, *arguments):
        return self.run_script("--model", ROOT / "tiny", *arguments)

    @slow(3)
    def test_a_take_again(self):
        first, second = self.folder / "a.wav", self.folder / "b.wav"
        prompt = "0: slow bell | 1bar: fast saw"
        flags = ("--bpm", "120", "--section-fade", "0.5", "--duration", "3")
        status, _, err = self.run_tiny("-p", prompt, *flags, "-o", first)
        self.assertEqual(status, 0, err)
        record = read_settings(first)
        kept = {key: record[key] for key in ("prompt", "bpm", "section_fade")}
        self.assertEqual(kept, dict(prompt=prompt, bpm=120.0, section_fade=0.5))
        self.assertEqual(self.run_script("--again", first, "-o", second)[0], 0)
        self.assertEqual(first.read_bytes(), second.read_bytes())
        status, out, _ = self.run_script("--again", first, "a", "-o", second, "--force")
        self.assertEqual(status, 0)  # a plain prompt puts the fade out of force

    @slow(3)
    def test_lines_of_a_file(self):
        path = self.folder / "songs.jsonl"
        line = '{"prompt": "0: bell | 0.2: saw", "duration": 0.4, "section_fade": 0.1}'
        path.write_text(f'{line}\n{{"prompt": "bell", "bpm": 90, "duration": 0.4}}\n')
        flags = ("--prompts", path, "-o", self.folder / "x.wav", "--seed", "1")
        status, out, err = self.run_tiny(*flags)
        self.assertEqual((status, out.count(" s of audio")), (0, 2), err)
        status, out, err = self.run_tiny(*flags)
        self.assertEqual((status, err.count("skipped")), (0, 2), err)

    def test_the_tempo_is_a_part_of_the_text(self):
        values = dict(seed=0, output="x.wav", bpm=120)
        for prompt, want in (
            ("0: a | 8bars: b, 90 bpm", ["a, 120 bpm", "b, 90 bpm"]),
            ("0: a", ["a, 120 bpm"]),
        ):
            made = job.make_job(values | dict(prompt=prompt))
            self.assertEqual((made.text.texts, made.prompt), (want, prompt))
        self.assertEqual(job.make_job(values | dict(prompt="a")).text, "a, 120 bpm")

    def test_what_cannot_be(self):
        for arguments, told in (
            (["0: a | 2bars: b"], "2bars needs a bpm"),
            (["0: a | 9: b"], "section at 9 s, 'b', must begin before the take ends"),
            (["0: a | 2: b", "-d", "2"], "must begin before the take ends, at 2 s"),
            (["a", "--section-fade", "1"], "section_fade needs a prompt in sections"),
            (["0: a | 1: b", "--section-fade", "2"], "the shortest section's length"),
            (["0: a | 0.001: b"], "section at 0 s must last a frame, 0.02 s"),
            (["a", "--negative-prompt", "0: b | 1: c"], "negative_prompt must be one"),
            (["a", "--bpm", "500"], "bpm must be from 20 to 400"),
            (["a", "--beats-per-bar", "3"], "beats_per_bar needs a bpm"),
        ):
            status, _, err = self.run_tiny(*arguments, "-o", self.folder / "x.wav")
            self.assertIn(status, (1, 2))
            self.assertRegex(err, told)
            self.assertEqual(err.count("\n"), 1, err)
