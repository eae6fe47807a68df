"""MAGNeT from the command line: names, options, files, what is refused."""

import io
import json
import signal
from contextlib import redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ScriptTest, Test, random_magnet

import benchmark
import convert
import engine
import hub
import lines
import magnet
import magnet_job
import progress
import ranking
from audio import save_audio
from job import make_job, plan
from magnet import MAGNeT, MagnetOptions
from musicgen import MusicGen
from options import Options
from regenerate import regenerate
from settings import load_codes, read_settings

SHORT = ["--decoding-steps", "2,1,1,1"]


class MagnetTest(ScriptTest):
    """With a folder that holds a MAGNeT of 1 s."""

    def setUp(self):
        super().setUp()
        self.model = self.folder / "magnet"
        self.model.mkdir()
        convert.save(random_magnet(), self.model)

    def run_script(self, *arguments: str) -> tuple[int, str, str]:
        return super().run_script("--model", self.model, *arguments)

    def make(self, *arguments: str) -> str:
        """What is printed. Fails where it fails."""
        status, out, err = self.run_script(*arguments, *SHORT)
        self.assertEqual((status, err), (0, ""))
        return out

    def refused(self, message: str, *arguments: str) -> None:
        """In one line, and nothing is written."""
        before = {*self.folder.iterdir()}
        status, out, err = self.run_script(*arguments)
        self.assertIn(status, (1, 2), err)
        self.assertIn(message, err)
        self.assertEqual((out, err.count("\n")), ("", 1), err)
        self.assertLessEqual(len(err), 420)
        self.assertEqual({*self.folder.iterdir()}, before)


class TestMaking(MagnetTest):
    def test_a_take_and_again(self):
        sound, codes = self.folder / "a.wav", self.folder / "a.safetensors"
        how = ["--seed", 5, "--temp", 2, "--max-guidance-coef", 4]
        how += ["--span-arrangement", "stride1", "--min-guidance-coef", 0.5]
        out = self.make("bell", "-o", sound, "--save-codes", codes, *how)
        self.assertIn("1.00 s of audio", out)
        made, record = load_codes(codes)
        self.assertEqual(read_settings(sound), record)
        want = dict(temp=2, top_k=0, top_p=0.9, max_guidance_coef=4, seed=5)
        want |= dict(min_guidance_coef=0.5, decoding_steps="2,1,1,1", duration=1)
        want |= dict(span_arrangement="stride1", negative_prompt="")
        self.assertEqual(want, {name: record[name] for name in want})
        self.assertFalse({"guidance_coef", "extend_stride"} & record.keys())
        options = {name: want[name] for name in ("temp", "seed", "span_arrangement")}
        options |= dict(max_guidance_coef=4, min_guidance_coef=0.5)
        model = magnet.load(self.model)
        self.assertIsInstance(model, MAGNeT)
        alone = model.generate_codes("bell", **options, decoding_steps=(2, 1, 1, 1))
        self.assertSame(made, alone)
        again = self.folder / "b.safetensors"
        status, _, err = super().run_script(
            *("--again", sound, "-o", self.folder / "b.wav", "--save-codes", again)
        )
        self.assertEqual((status, err), (0, ""))
        self.assertSame(load_codes(again)[0], made)
        self.assertEqual(load_codes(again)[1], record)
        other = self.folder / "d.wav"
        status, _, err = super().run_script("--again", sound, "--top-k", 5, "-o", other)
        told = read_settings(other)
        self.assertEqual((told["top_k"], told["top_p"], told["temp"]), (5, 0, 2))
        decoded = self.folder / "c.wav"
        status, _, err = super().run_script("--redecode", codes, "-o", decoded)
        self.assertEqual((status, err), (0, ""))
        self.assertEqual(decoded.read_bytes(), sound.read_bytes())

    def test_the_defaults_are_its_own(self):
        record = self.record("bell", "--duration", 0.2)
        for name, value in vars(MagnetOptions(0.2)).items():
            if name != "decoding_steps":
                self.assertEqual(record[name], value, name)
        self.assertEqual(record["duration"], 0.2)

    def record(self, *arguments: str) -> dict:
        sound = self.folder / "r.wav"
        self.make(*arguments, "-o", sound, "--force")
        return read_settings(sound)

    def test_takes_are_those_that_are_made_alone(self):
        song = self.folder / "t.wav"
        self.make("bell", "--takes", 3, "--seed", 4, "-o", song, "--duration", 0.4)
        alone = self.folder / "alone.wav"
        self.make("bell", "--seed", 6, "-o", alone, "--duration", 0.4)
        third = soundfile.read(self.folder / "t-3.wav")[0]
        self.assertEqual(len(third), 0.36 * 32000)  # whole spans of three frames
        self.assertTrue((third == soundfile.read(alone)[0]).all())
        first = soundfile.read(self.folder / "t-1.wav")[0]
        self.assertFalse((third == first).all())

    def test_a_sound_is_gone_on_from(self):
        song = self.folder / "song.wav"
        save_audio(song, mx.random.normal((9600, 1)) / 9, 32000)
        codes, sound = self.folder / "g.safetensors", self.folder / "g.wav"
        self.make("a", "--audio-prompt", song, "-o", sound, "--save-codes", codes)
        made, record = load_codes(codes)
        self.assertEqual((made.shape[1], record["prompt_frames"]), (48, 15))
        dropped = self.folder / "d.wav"
        self.make("a", "--audio-prompt", song, "--drop-prompt", "-o", dropped)
        self.assertEqual(soundfile.info(dropped).frames, (48 - 15) * 640)

    def test_a_file_of_prompts(self):
        path, output = self.folder / "p.jsonl", self.folder / "p.wav"
        rows = [dict(prompt="a", seed=3), dict(prompt="b", top_k=5, top_p=0)]
        rows += [dict(prompt="c", decoding_steps=[1, 1, 1, 2], duration=0.5)]
        rows += [dict(prompt="d", guidance_coef=3), dict(prompt="0: e | 0.4: f")]
        rows += [dict(prompt="g", loop=True, bpm=120, bars=1), dict(prompt="h", temp=0)]
        rows += [dict(prompt="i", duration=1.5), dict(prompt="j", decoding_steps="x")]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        flags = ["--prompts", path, "--output", output, "--seed", 9, *SHORT]
        status, out, err = self.run_script(*flags)
        self.assertEqual(status, 1)
        self.assertEqual(out.count("s of audio"), 4)
        for line, message in (
            (4, "guidance_coef does not apply to MAGNeT"),
            (5, "sections does not apply"),
            (6, "loop does not apply"),
            (8, "to the model's own 1 s, got 1.5"),
            (9, "decoding_steps must be the passes"),
        ):
            self.assertRegex(err, f"(?m)^.*, line {line}: .*{message}")
        self.assertEqual(err.count("\n"), 5, err)
        third = read_settings(self.folder / "p-3.wav")
        self.assertEqual((third["decoding_steps"], third["seed"]), ("1,1,1,2", 11))
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]))
        status, out, err = self.run_script(*flags)
        self.assertEqual((status, out.count("s of audio")), (0, 0), err)
        self.assertEqual(err.count("with these settings"), 3, err)
        status, out, err = self.run_script(*flags, "--temp", 1)
        self.assertIn("temp was 3.0 and is 1.0", err)
        self.assertEqual(out.count("s of audio"), 3)

    def test_a_file_of_prompts_of_another_kind_of_model(self):
        """The model is told, not what each kind has of its own."""
        path, output = self.folder / "q.txt", self.folder / "q.wav"
        path.write_text("bell\n")
        own = ["--prompts", path, "-o", output, "--duration", 0.3]
        status, _, err = self.run_script(*own, *SHORT)
        self.assertEqual(status, 0, err)
        status, _, err = super().run_script(*own, "--model", "tiny")
        told = f"q-1.wav is made again: model was '{self.model}' and is 'tiny'\n"
        self.assertEqual(status, 0, err)
        self.assertTrue(err.endswith(told), err)
        status, _, err = self.run_script(*own, *SHORT)
        told = f"q-1.wav is made again: model was 'tiny' and is '{self.model}'\n"
        self.assertEqual(status, 0, err)
        self.assertTrue(err.endswith(told), err)

    def test_ctrl_c_leaves_nothing(self):
        """And says so."""
        passes, forward = [], magnet.Forward.__call__

        def interrupt(*args):
            passes.append(1)
            if len(passes) == 2:
                signal.raise_signal(signal.SIGINT)
            return forward(*args)

        before = {*self.folder.iterdir()}
        with patch.object(magnet.Forward, "__call__", interrupt):
            status, out, err = self.run_script("bell", "-o", self.folder / "x.wav")
        self.assertEqual((status, out), (130, ""))
        self.assertEqual(err, "generate.py: stopped before anything was made.\n")
        self.assertEqual(({*self.folder.iterdir()}, len(passes)), (before, 2))

    def test_progress_counts_passes(self):
        told = []
        with patch.object(progress.Progress, "to", lambda self, n: told.append(n)):
            with patch.object(progress.Progress, "begin") as begin:
                self.make("bell", "--takes", 2, "-o", self.folder / "y.wav")
        begin.assert_called_once_with("generating", 5, "passes")
        self.assertEqual(told, [1, 2, 3, 4, 5])
        stream = io.StringIO()
        with patch("progress.MINUTE", 0), progress.Progress(stream=stream) as shows:
            shows.begin("take", 50, progress.PASSES)
            shows.to(12)
        self.assertEqual(stream.getvalue(), "take: pass 12 of 50\n")
        bar = progress.PASS.format(
            **dict(desc="take", percentage=24.0, bar="#", n=12, total=50, remaining="1")
        )
        self.assertIn("pass 12 of 50", bar)


class TestRefused(MagnetTest):
    def test_in_one_line(self):
        song = self.folder / "song.wav"
        save_audio(song, mx.random.normal((9600, 1)) / 9, 32000)
        codes = self.folder / "c.safetensors"
        self.make("a", "-o", self.folder / "c.wav", "--save-codes", codes)
        for message, *flags in (
            ("all frames are made at once", "--stream"),
            ("all frames are made at once", "-o", "-"),
            ("to the model's own 1 s, got 1.5", "--duration", 1.5),
            ("--model melody", "--melody", song),
            ("--model melody", "--notes", "C E", "--bpm", 120),
            ("--model style", "--style", song),
            ("leave out the times", "--prompt", "0: a | 0.5: b"),
            ("give max_guidance_coef and min_guidance_coef", "--guidance-coef", 2),
            ("no window slides", "--extend-stride", 0.5),
            ("no end is joined", "--loop", "--bpm", 120, "--bars", 1),
            ("fade_out ends it", "--ending"),
            ("give several takes", "--best-of", 2),
            ("adapters are trained on MusicGen", "--adapter", song),
            ("it runs in one process", "--tensor-parallel"),
            ("--fill 8:12", "--resume", codes),
            ("4 numbers of passes", "--decoding-steps", "2,1"),
            ("such as 20,10,10,10, got '2;1'", "--decoding-steps", "2;1"),
            ("from 1 to 1000, got (0, 1, 1, 1)", "--decoding-steps", "0,1,1,1"),
            ("top_p must be between 0", "--top-p", 2),
            ("temp must be 0", "--temp", -1),
            ("max_guidance_coef must be a number", "--max-guidance-coef", "nan"),
            ("invalid choice: 'stride3'", "--span-arrangement", "stride3"),
        ):
            with self.subTest(flags):
                output = [] if "-o" in flags else ["-o", self.folder / "x.wav"]
                text = [] if {"--prompt", "--resume"} & {*flags} else ["-p", "bell"]
                self.refused(message, *text, *flags, *output)

    def test_its_own_with_a_musicgen(self):
        for flags in (
            ["--max-guidance-coef", "4"],
            ["--min-guidance-coef", "4"],
            ["--decoding-steps", "2,1,1,1"],
            ["--span-arrangement", "stride1"],
        ):
            name = flags[0].removeprefix("--").replace("-", "_")
            told = ScriptTest.run_script(self, "bell", "--model", "tiny", *flags)
            self.assertEqual(told[:2], (2, ""))
            self.assertIn(f"{name} applies to MAGNeT alone: ", told[2])
            self.assertEqual(told[2].count("\n"), 1)
        told = ScriptTest.run_script(self, "bell", "--model", "tiny", "--top-k", "0")
        self.assertIn("top_k must be from 1 to 2048", told[2])

    def test_where_only_the_hub_knows(self):
        """A MAGNeT that shows itself once it is loaded."""
        load, name = magnet.load, "someone/model"

        def given(path, *how, **options):
            model = load(self.model, *how, **options)
            model.name = path
            return model

        own = ["--model", name, "-o", self.folder / "h.wav", *SHORT]
        with patch("generate.magnet.load", given):
            for flags, message in (
                (["--guidance-coef", 2], "guidance_coef does not apply to MAGNeT"),
                (["--stream"], "stream does not apply to MAGNeT"),
                (["-p", "0: a | 0.5: b"], "sections does not apply to MAGNeT"),
            ):
                text = [] if "-p" in flags else ["bell"]
                told = ScriptTest.run_script(self, *text, *own, *flags)
                self.assertTrue(told[0] in (1, 2) and told[1] == "", told)
                self.assertIn(message, told[2])
                self.assertEqual(told[2].count("\n"), 1, told[2])
            how = ["--top-k", 0, "--top-p", 0.5]
            told = ScriptTest.run_script(self, "bell", *own, *how)
            self.assertEqual((told[0], told[2]), (0, ""))
        record = read_settings(self.folder / "h.wav")
        self.assertEqual((record["top_k"], record["temp"]), (0, 3.0))
        path = self.folder / "p.txt"
        path.write_text("bell\nsaw\n")
        with patch("generate.magnet.load", given):
            own[3] = self.folder / "l.wav"
            own += ["--duration", 0.3]
            told = ScriptTest.run_script(self, "--prompts", path, *own)
            self.assertEqual(told[1].count("s of audio"), 2, told)
            told = ScriptTest.run_script(self, "--prompts", path, *own)
            self.assertIn("skipped", told[2])

    def test_where_only_the_hub_knows_a_musicgen(self):
        load, name = magnet.load, "someone/model"
        given = lambda path, *how, **options: load("tiny", *how, **options)  # noqa
        own = ["--model", name, "-o", self.folder / "h.wav", "--duration", 0.1]
        with patch("generate.magnet.load", given):
            for flags, message in (
                (SHORT, "decoding_steps applies to MAGNeT alone"),
                (["--top-k", 0], "top_k must be from 1 to 2048"),
            ):
                told = ScriptTest.run_script(self, "bell", *own, *flags)
                self.assertEqual(told[:2], (1, ""))
                self.assertIn(message, told[2])


class TestNames(Test):
    def test_which_is_one(self):
        for name in hub.MODELS:
            for spelled in (name, hub.MODELS[name]):
                is_one = magnet_job.is_magnet(spelled)
                self.assertEqual(is_one, name in hub.MAGNETS or name == "tiny-magnet")
        self.assertIsNone(magnet_job.is_magnet("someone/model"))
        folder = self.folder / "one"
        folder.mkdir()
        self.assertIsNone(magnet_job.is_magnet(str(folder)))
        convert.save(random_magnet(), folder)
        self.assertTrue(magnet_job.is_magnet(str(folder)))
        for name in ("mono-transformers", "mono-audiocraft", "solver-audiocraft"):
            self.assertIs(magnet_job.is_magnet(str(REFERENCE / name)), False, name)
        path = self.copy("mono-audiocraft") / "state_dict.bin"
        path.write_bytes(path.read_bytes()[:-999])
        self.assertIsNone(magnet_job.is_magnet(str(path.parent)))
        path.unlink()
        self.assertIsNone(magnet_job.is_magnet(str(path.parent)))

    def test_shapes(self):
        """By which an adapter finds its model."""
        shape = hub.shape_of("audio-magnet-small")
        self.assertEqual((shape["width"], shape["sampling_rate"]), (1024, 16000))
        shape = hub.shape_of("facebook/magnet-medium-30secs")
        self.assertEqual((shape["width"], shape["sampling_rate"]), (1536, 32000))

    def test_own_settings(self):
        for name, seconds in (
            ("magnet-small-10secs", 10.0),
            ("facebook/magnet-medium-30secs", 30.0),
            ("audio-magnet-small", 10.0),
            ("small", 8.0),
            ("audiogen-medium", 5.0),
        ):
            self.assertEqual(lines.own_settings(name)["duration"], seconds, name)
        folder = self.folder / "one"
        folder.mkdir()
        convert.save(random_magnet(2.0), folder)
        self.assertEqual(lines.own_settings(str(folder))["duration"], 2.0)

    def test_converted(self):
        """With the masking in its config; quantized, too."""
        first, second = self.folder / "a", self.folder / "b"
        first.mkdir()
        convert.save(random_magnet(), first)
        convert.convert(str(first), second, mx.float32, q_bits=8, q_group_size=32)
        config = json.loads((second / "config.json").read_text())
        self.assertEqual(config["masking"], dict(span_len=3, subcodes_context=5))
        self.assertEqual(config["quantization"]["bits"], 8)
        model = magnet.load(second)
        self.assertRegex(repr(model), r"^MAGNeT\(.*, float32, channels=1\)$")
        how = dict(seed=0, duration=0.3, decoding_steps=(1, 1, 1, 1), temp=0)
        self.assertEqual(model.generate_codes("a", **how).shape, (1, 15, 4))
        with self.assertRaisesRegex(ValueError, "a MAGNeT, not a MusicGen"):
            MusicGen.from_pretrained(second)
        again = magnet.load(first, q_bits=8, q_group_size=32)
        self.assertSame(
            again.generate_codes("a", **how), model.generate_codes("a", **how)
        )
        with self.assertRaisesRegex(ValueError, "it takes no adapter"):
            convert.convert(
                *(str(first), self.folder / "c", mx.float32),
                adapter=REFERENCE / "peft" / "ours-mono.safetensors",
            )
        self.assertFalse((self.folder / "c").exists())

    def test_how_likely_codes_are_it_does_not_know(self):
        model = random_magnet()
        codes = mx.zeros((1, 10, 4), mx.uint32)
        for ask in (
            lambda: ranking.log_likelihood(model, "a", codes),
            lambda: ranking.best_of(model, "a", 2, duration=0.2),
            lambda: regenerate(model, codes, "a", (0.1, 0.2)),
        ):
            with (
                patch.object(MAGNeT, "steps") as steps,
                self.assertRaisesRegex(ValueError, "a MAGNeT, .* take a MusicGen"),
            ):
                ask()
            steps.assert_not_called()  # it is refused before anything is made

    def test_benchmark(self):
        folder = self.folder / "m"
        folder.mkdir()
        convert.save(random_magnet(0.5), folder)
        flags = ["--model", str(folder), "--batch", "2"]
        with patch("sys.argv", ["benchmark.py", *flags]):
            with redirect_stdout(io.StringIO()) as out:
                benchmark.main()
        self.assertRegex(out.getvalue(), r"\| takes \| 2 of 0.5 s \|")
        self.assertRegex(out.getvalue(), r"\| passes \| 50, [\d.]+ ms each \|")
        self.assertRegex(out.getvalue(), r"generation \| [\d.]+ s, [\d.]+ s a take, ")
        self.assertRegex(
            out.getvalue(), r"(?m)^To send: .*; passes|; 50, [\d.]+ ms each"
        )
        for name in hub.MAGNETS:
            config = benchmark.published_config(name)
            self.assertEqual(config.max_duration, 30 if "30secs" in name else 10)
            sounds = name.startswith("audio")
            self.assertEqual(config.text_encoder.d_model, 1024 if sounds else 768)
            rate = config.audio_encoder.sampling_rate
            self.assertEqual(rate, 16000 if sounds else 32000)
            self.assertEqual(config.audio_encoder.frame_rate, 50)

    def test_operations_of_a_pass(self):
        """Those of the matrices, counted in the graph's shapes."""
        model = random_magnet()
        config, T = model.config.decoder, 30
        names = ("in_proj", "out_proj", "q_proj", "linear1", "linear2")
        weights = sum(
            module.weight.size
            for name, module in model.decoder.named_modules()
            if name.rpartition(".")[2] in (*names, "linears")
        )
        layers, D = config.num_hidden_layers, config.hidden_size
        want = 2 * T * (2 * weights + layers * 4 * T * D)
        self.assertEqual(benchmark.pass_operations(model, T), want)

    def test_rows_that_fit(self):
        """Of the medium one of 30 s on a GPU of 80 GB some dozens, in a little memory
        one; more of a shorter take."""
        config = benchmark.published_config("magnet-medium-30secs").decoder
        row = magnet.pass_bytes(config, 1500, 2)
        self.assertTrue(0.2e9 < row < 1e9, row)
        model = random_magnet()
        options = MagnetOptions(1.0)
        own = magnet.pass_bytes(model.config.decoder, 50, 4)
        there = mx.get_active_memory() + engine.DECODING_MEMORY
        with patch("engine.memory_size", lambda: there + 7.5 * own):
            with patch("magnet.mx.get_active_memory", lambda: there - 10**9):
                self.assertEqual(model.rows_that_fit(options), 7)
                self.assertGreater(model.rows_that_fit(MagnetOptions(0.5)), 14)
                take = model.steps(["a"] * 8, decoding_steps=(1, 1, 1, 1))
                self.assertEqual(take.total, 2 * 4)
        with patch("engine.memory_size", lambda: 0):
            self.assertEqual(model.rows_that_fit(options), 1)
        model.plain = True
        self.assertGreater(model.rows_that_fit(options), 1000)


class TestJobs(Test):
    def test_what_was_given_is_kept_until_the_model_is_met(self):
        values = dict(prompt="a", seed=0, output="a.wav", temp=0.5)
        job = make_job(values)
        self.assertEqual(job.options, Options(temp=0.5))
        met = job.timed(random_magnet())
        self.assertEqual(met.options, MagnetOptions(1.0, temp=0.5))
        self.assertEqual((met.magnet, met.fault), (True, None))
        self.assertEqual(met.timed(random_magnet()), met)
        job = make_job(values | dict(magnet=True))
        self.assertEqual(job.options, MagnetOptions(temp=0.5))
        met = make_job(values | dict(top_k=7)).timed(random_magnet())
        self.assertEqual((met.options.top_k, met.options.top_p), (7, 0))
        met = make_job(values | dict(top_k=7, top_p=0.5)).timed(random_magnet())
        self.assertEqual((met.options.top_k, met.options.top_p), (7, 0.5))
        fault = make_job(values | dict(guidance_coef=2)).timed(random_magnet()).fault
        self.assertIn("guidance_coef does not apply", fault)
        model = MusicGen.from_pretrained(REFERENCE / "mono-transformers")
        fault = make_job(values | dict(decoding_steps="1,1,1,1")).timed(model).fault
        self.assertIn("decoding_steps applies to MAGNeT alone", fault)

    def test_what_no_magnet_takes(self):
        for name, value in (
            ("temp", False),
            ("temp", 0.0001),
            ("temp", "hot"),
            ("top_k", True),
            ("top_p", None),
            ("span_arrangement", ["stride1"]),
            ("span_arrangement", None),
            ("decoding_steps", 20),
            ("decoding_steps", ()),
            ("max_guidance_coef", float("inf")),
            ("min_guidance_coef", "1"),
            ("negative_prompt", 1),
            ("duration", 31.0),
        ):
            with self.assertRaisesRegex(ValueError, f"^{name} must be ", msg=value):
                MagnetOptions(**{name: value}).check()
        MagnetOptions(temp=0, decoding_steps=[1, 2]).check()

    def test_passes(self):
        for value in ("20,10,10,10", [20, 10, 10, 10], (20, 10, 10, 10)):
            self.assertEqual(magnet_job.read_passes(value), (20, 10, 10, 10))
        for value in ("", "20;10", 20, [1.5], [None], dict(a=1), "1,,2"):
            with self.assertRaisesRegex(
                ValueError, "decoding_steps must be the passes"
            ):
                magnet_job.read_passes(value)

    def test_nothing_is_refused_unasked(self):
        """Of what a command line gives where nothing is given."""
        values = dict(magnet=True, loop=False, best_of=None, adapter=None, ending=False)
        for job in plan(["a"], values | dict(seed=0), takes=2):
            job.check(writes=False)

    def test_a_file_of_a_musicgen_is_again_a_magnets(self):
        """What shapes the drawing of the one is no setting of the other."""
        test = ScriptTest()
        test.setUp()
        sound, folder = self.folder / "a.wav", self.folder / "m"
        folder.mkdir()
        convert.save(random_magnet(), folder)
        own = ["--model", REFERENCE / "mono-transformers", "--duration", "2"]
        status, _, err = test.run_script("bell", *own, "--top-k", 7, "-o", sound)
        self.assertEqual(status, 0, err)  # it may be too loud
        other = self.folder / "b.wav"
        flags = ["--again", sound, "--model", folder, "-o", other, *SHORT]
        status, _, err = test.run_script(*flags)
        self.assertEqual((status, err), (0, ""))
        record = read_settings(other)
        self.assertEqual((record["prompt"], record["duration"]), ("bell", 1.0))
        self.assertEqual((record["top_k"], record["top_p"]), (0, 0.9))
        self.assertTrue(np.isfinite(soundfile.read(other)[0]).all())
