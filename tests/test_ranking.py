"""How likely codes are: against each code by itself, and against the originals."""

import shutil
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import EXPECTED, REFERENCE, Test, exact, last

import ranking
from conditioning import Prefixes, make_requests
from decoder import Condition
from musicgen import MusicGen, delay, encode_text
from options import Options
from ranking import log_likelihood, order, text_scores, windows_back
from sections import Sections

V = 64  # entries of the tiny models' codebooks


def random_codes(rows: int, frames: int, codebooks: int) -> mx.array:
    mx.random.seed(1)
    return mx.random.randint(0, V, (rows, frames, codebooks)).astype(mx.uint32)


def sound() -> mx.array:
    return mx.array(np.sin(np.arange(32000) / 12).astype(np.float32))[:, None]


class TestRanking(Test):
    def naive(
        self,
        model: MusicGen,
        prompt: str,
        codes: mx.array,
        first: int,
        last: int,
        **how,
    ) -> float:
        """The mean of codes (1, T, K), each by itself: all tokens up to it, one after the
        other, under the text of the frame at each, none after the code's own."""
        null, prefixes = how.pop("null", False), None
        config, decoder = model.config.decoder, model.decoder
        delays, logs = config.delays, []
        start = max(last - model.longest_window, 0)
        delayed = delay(codes[:, start:last], delays, last - start, config.vocab_size)
        tokens = mx.pad(delayed, [(0, 0), (1, 0), (0, 0)], constant_values=V)
        if model.conditioner is not None:
            requests = make_requests(model, Options(), 1, **how)
            seconds = codes.shape[1] / model.frame_rate
            prefixes = Prefixes(model, requests, [0], seconds)

        def text_at(frame: int) -> Condition:
            text = prompt
            if isinstance(prompt, Sections):
                seconds = (frame + 0.5) / model.frame_rate
                begun = [words for at, words in prompt.sections if at <= seconds]
                text = begun[-1]
            row = encode_text(model, [text], Options(guidance_coef=1.0))
            return Condition(*map(mx.zeros_like, row)) if null else row

        for frame in range(first, last):
            for k, behind in enumerate(delays):
                step, prefix = frame - start + behind, None
                cache = decoder.make_cache(1, step + 60)
                for i in range(step + 1):
                    text = text_at(min(start + i, frame))
                    if prefixes and i == 0:
                        text = text_at(frame)
                        given = prefixes.window([0], start, 2)
                        row = slice(1, 2) if null else slice(0, 1)
                        given = Condition(*(x[row] for x in given))
                        prefix = decoder.prefix(given, text)
                    text_kv = decoder.text_kv(text)
                    logits = decoder(tokens[:, i : i + 1], text_kv, cache, prefix)
                    prefix = None
                logits = logits[0, 0, k]
                code = codes[0, frame, k]
                logs.append((logits[code] - mx.logsumexp(logits)).item())
        return float(np.mean(logs))

    def compare(self, model: MusicGen, prompts: list[str], frames: int, **how):
        codes = random_codes(len(prompts), frames, model.config.decoder.num_codebooks)
        for null in (False, True):
            for first, last in ((0, frames), (3, frames - 2), (frames - 1, frames)):
                got = log_likelihood(
                    model, prompts, codes, first, last, null=null, **how
                )
                want = [
                    self.naive(
                        model, text, codes[i : i + 1], first, last, null=null, **how
                    )
                    for i, text in enumerate(prompts)
                ]
                self.assertClose(got, mx.array(want), 1e-5)

    def test_each_code_by_itself(self):
        for name in ("mono-transformers", "stereo-audiocraft"):
            self.compare(exact(name), ["drums", "a slow piano, in the rain"], 9)

    def test_as_audiocraft_computes_them(self):
        want = mx.load(str(REFERENCE / "ranking.safetensors"))
        for name in ("mono-audiocraft", "stereo-audiocraft"):
            codes, model = last(want[f"{name}_codes"]), exact(name)
            prompts = EXPECTED[name]["prompts"][: len(codes)]
            for kind in ("text", "null"):
                logs = last(want[f"{name}_{kind}"])
                for first in range(codes.shape[1]):
                    how = dict(first=first, null=kind == "null")
                    got = log_likelihood(model, prompts, codes, **how)
                    self.assertClose(got, logs[:, first:].mean(axis=(1, 2)), 1e-4)

    def test_pieces_change_nothing(self):
        model = exact("mono-transformers")
        codes = random_codes(2, 30, 4)
        options = dict(prompts=["drums", "piano"], codes=codes, first=4, last=29)
        whole = log_likelihood(model, **options)
        for size in (1, 7, 33):
            with self.subTest(size), patch.object(ranking, "PIECE", size):
                self.assertClose(log_likelihood(model, **options), whole, 1e-5)
        self.assertClose(log_likelihood(model, **options, batch_size=1), whole, 1e-5)

    def test_in_the_window_that_ends_there(self):
        model = exact("mono-transformers")
        model.config.max_duration = 8 / 50
        codes = random_codes(1, 12, 4)
        got = log_likelihood(model, "drums", codes, 8, 12)
        want = self.naive(model, "drums", codes, 8, 12)
        self.assertClose(got, mx.array([want]), 1e-5)
        # What stands before the window changes nothing.
        other = mx.concatenate([1 + 0 * codes[:, :4], codes[:, 4:]], axis=1)
        self.assertSame(log_likelihood(model, "drums", other, 8, 12), got)

    def test_windows_back(self):
        self.assertEqual(windows_back(600, 850, 1500, 600), [(0, 600, 850)])
        self.assertEqual(windows_back(1700, 2000, 1500, 600), [(500, 1700, 2000)])
        self.assertEqual(
            windows_back(100, 3000, 1500, 600),
            [(1500, 2100, 3000), (600, 1200, 2100), (0, 100, 1200)],
        )

    def test_long_takes(self):
        model = exact("mono-transformers")
        model.config.max_duration = 10 / 50  # 4 frames of which are context
        codes = random_codes(1, 20, 4)
        parts = [(14, 20), (8, 14), (0, 8)]
        want = sum(
            self.naive(model, "drums", codes, *part) * (part[1] - part[0])
            for part in parts
        )
        got = log_likelihood(model, "drums", codes)
        self.assertClose(got * 20, mx.array([want]), 1e-5)

    def test_under_sections(self):
        song = Sections([(0, "drums"), (4 / 50, "a slow piano"), (7 / 50, "rain")])
        other = Sections([(0, "a"), (4 / 50, "b"), (7 / 50, "a longer text")])
        self.compare(exact("mono-transformers"), [song, other], 10)
        self.compare(
            exact("melody-transformers"), [song], 10, melody=sound(), separate=False
        )

    def test_models_that_follow_a_sound(self):
        self.compare(exact("melody-audiocraft"), ["drums", "a piano"], 6)
        self.compare(
            exact("melody-audiocraft"),
            ["drums", "a slow piano"],
            6,
            melody=sound(),
            separate=False,
        )

    def test_scores(self):
        model = exact("mono-transformers")
        codes = random_codes(3, 9, 4)
        given = log_likelihood(model, "drums", codes, 2)
        null = log_likelihood(model, "", codes, 2)
        scores = text_scores(model, "drums", codes, 2)
        self.assertClose(scores, given - null, 1e-6)
        self.assertGreater(float(mx.abs(scores).max()), 0.01)
        best = order(scores)
        self.assertEqual([*best], np.argsort(-np.array(scores)).tolist())
        self.assertEqual(order([1.0, 3.0, 3.0]), [1, 2, 0])

    def test_what_a_take_is_given_is_likelier(self):
        model = exact("mono-transformers")
        options = dict(duration=0.4, seed=0, temp=0.3, guidance_coef=1.0)
        codes = model.generate_codes("drums", **options)
        own = log_likelihood(model, "drums", codes, temp=0.3, guidance_coef=1.0)
        other = log_likelihood(model, "drums", random_codes(1, 20, 4))
        self.assertGreater(own.item(), other.item() + 1)

    def test_errors(self):
        model = exact("mono-transformers")
        codes = random_codes(2, 9, 4)
        for message, arguments in (
            ("some of the 9", dict(first=9)),
            ("some of the 9", dict(first=3, last=3)),
            ("some of the 9", dict(last=10)),
            ("some of the 9", dict(first=-1)),
            ("2 prompts", dict(prompts=["a"])),
            ("4 codebooks", dict(codes=codes[..., :3])),
            ("melody must go", dict(melody=sound())),
        ):
            arguments = dict(prompts="a", codes=codes) | arguments
            with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                log_likelihood(model, **arguments)
        folder = self.copy("mono-audiocraft")
        shutil.rmtree(folder / "t5-base")
        shutil.copy(REFERENCE / "textless-audiocraft" / "state_dict.bin", folder)
        silent = MusicGen.from_pretrained(folder, mx.float32)
        with self.assertRaisesRegex(ValueError, "no text"):
            text_scores(silent, "", codes)
        with self.assertRaisesRegex(ValueError, "must be empty"):
            log_likelihood(silent, "drums", codes)
