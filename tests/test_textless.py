"""Models without text, against audiocraft: mono and stereo, exported and not."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ScriptTest, exact, expected

import audiocraft
import checkpoints
import published
import train
from convert import convert
from musicgen import MusicGen
from options import Options
from textless import without_text

CASES = (  # model, where its codec is, its file
    ("textless-audiocraft", "mono-audiocraft", "state_dict.bin"),
    ("textless-audiocraft", "mono-audiocraft", "checkpoint.th"),
    ("stereo-textless-audiocraft", "stereo-audiocraft", "checkpoint.th"),
)


class TestTextless(ScriptTest):
    def folder_of(self, name: str, codec: str, file: str) -> Path:
        folder = Path(shutil.copytree(REFERENCE / codec, self.folder / name))
        shutil.rmtree(folder / "t5-base")
        (folder / "state_dict.bin").unlink()
        shutil.copy(REFERENCE / name / file, folder)
        return folder

    def assertCodes(self, model: MusicGen, name: str):
        """Whatever the guidance, and as often as it is asked for."""
        self.assertIsNone(model.text_encoder)
        self.assertIsNone(model.tokenizer)
        for coef in (1, 3):
            options = dict(temp=0, guidance_coef=coef)
            codes = model.generate_codes(["", ""], 15 / 50, **options)
            wanted = expected(name)[f"g{coef}_codes"]
            for row in codes.swapaxes(1, 2):
                self.assertSame(row[None], wanted)

    def test_codes(self):
        for name, codec, file in CASES:
            for plain in (False, True):
                with self.subTest((name, file, plain)):
                    folder = self.folder_of(name, codec, file)
                    with patch("huggingface_hub.hf_hub_download") as fetch:
                        model = MusicGen.from_pretrained(folder, mx.float32)
                    fetch.assert_not_called()
                    model.plain = plain
                    self.assertEqual(model.channels, 2 if "stereo" in name else 1)
                    self.assertCodes(model, name)
                    shutil.rmtree(folder)

    def test_logits(self):
        for name, codec, file in CASES[1:]:
            folder = self.folder_of(name, codec, file)
            decoder = MusicGen.from_pretrained(folder, mx.float32).decoder
            nothing = [None] * len(decoder.layers)
            tokens = expected(name)["tokens"].swapaxes(1, 2)
            logits = decoder(tokens, nothing, nothing)  # (B, S, K, V)
            self.assertClose(logits.swapaxes(1, 2), expected(name)["logits"])

    def test_converted(self):
        for name, codec, file in CASES[1:]:
            folder, target = self.folder_of(name, codec, file), self.folder / "out"
            convert(str(folder), target, mx.float32)
            files = sorted(path.name for path in target.iterdir())
            self.assertEqual(files, ["config.json", "model.safetensors"])
            settings = json.loads((target / "config.json").read_text())
            self.assertIsNone(settings["text_encoder"])
            self.assertCodes(MusicGen.from_pretrained(target, mx.float32), name)
            again = self.folder / "again"
            convert(str(target), again, mx.float16, q_bits=None)
            weights = mx.load(str(again / "model.safetensors"))
            self.assertFalse([k for k in weights if "text" in k or "output_proj" in k])
            for path in (target, again):
                shutil.rmtree(path)

    def test_a_text_is_refused(self):
        folder = self.folder_of(*CASES[0])
        model = MusicGen.from_pretrained(folder)
        for prompts, options in (
            ("happy rock", {}),
            (["", "happy rock"], {}),
            ("", dict(negative_prompt="noise")),
            ("x" * 9999, {}),
        ):
            with self.assertRaises(ValueError) as caught:
                model.steps(prompts, 0.1, **options)
            message = str(caught.exception)
            self.assertRegex(message, "prompt must be empty, .* trained without texts")
            self.assertLess(len(message), 400)
            self.assertNotIn("\n", message)

    def test_a_sound_is_not_followed(self):
        folder = self.folder_of(*CASES[0])
        model = MusicGen.from_pretrained(folder)
        sound = mx.zeros((3200, 1))
        for options in (dict(melody=sound), dict(style=sound), dict(condition=sound)):
            with self.assertRaisesRegex(ValueError, "must go with a"):
                model.steps("", 0.1, **options)
        codes = model.generate_codes("", 0.3, seed=1)
        begun = model.generate_codes("", 0.3, seed=1, codes_prompt=codes[:, :5])
        self.assertSame(begun, codes)

    def test_options(self):
        for coef in (1, 3.0):  # what is computed, and what stands where none is given
            asked = Options(guidance_coef=coef, temp=0.5)
            prompts, options = without_text("m", ["", ""], asked)
            self.assertEqual((options.copies, options.temp), (1, 0.5))
            self.assertEqual(prompts, ["", ""])
        self.assertEqual(without_text("m", None, asked)[0], [""])
        with self.assertRaisesRegex(
            ValueError, "guidance_coef must be left out, got 2"
        ):
            without_text("m", [""], Options(guidance_coef=2))
        with self.assertRaisesRegex(ValueError, "There must be a prompt"):
            without_text("m", [], Options())

    def test_no_prompt_in_python(self):
        """It need not be given, by any of the ways to generate."""
        model = MusicGen.from_pretrained(self.folder_of(*CASES[0]), mx.float32)
        options = dict(duration=0.3, temp=0)
        want = model.generate_codes("", **options)
        self.assertSame(model.generate_codes(**options), want)
        self.assertSame(model.generate_codes(None, **options), want)
        audio = model.generate("", **options)
        self.assertSame(model.generate(**options), audio)
        self.assertSame(model.generate(None, **options), audio)
        streamed = mx.concatenate([*model.stream(**options)])
        self.assertClose(streamed, audio[0])
        take = model.steps(None, 0.3, temp=0)
        self.assertEqual(take.prompts, [""])
        for make in (model.generate, model.stream):
            with self.assertRaisesRegex(ValueError, "guidance_coef must be left out"):
                make(duration=0.1, guidance_coef=5)
        with_text = exact("mono-audiocraft")
        for make in (with_text.generate, with_text.generate_codes, with_text.steps):
            with self.assertRaisesRegex(ValueError, "There must be a prompt"):
                make(duration=0.1)
        with self.assertRaisesRegex(ValueError, "There must be a prompt"):
            with_text.stream()

    def test_guidance_is_refused(self):
        folder, out = self.folder_of(*CASES[0]), self.folder / "out.wav"
        words = ["--model", folder, "--duration", "0.3", "--output", out]
        status, _, err = self.run_script(*words, "--guidance-coef", "7")
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("error: guidance_coef must be left out, got 7: ", err)
        self.assertFalse(out.exists())

    def test_lines_without_a_prompt(self):
        folder, lines = self.folder_of(*CASES[0]), self.folder / "lines.jsonl"
        lines.write_text(
            '{"seed": 1}\n{"prompt": null, "seed": 2}\n{"prompt": "", "seed": 1}\n'
            '{"guidance": 2}\n'
        )
        words = ["--prompts", lines, "--duration", "0.3"]
        words += ["--output", self.folder / "out.wav", "--model"]
        status, _, err = self.run_script(*words, folder)
        self.assertEqual(status, 1)
        self.assertRegex(err, "line 4: guidance_coef must be left out, got 2")
        self.assertNotRegex(err, "line [123]")
        made = [soundfile.read(self.folder / f"out-{i}.wav")[0] for i in (1, 2, 3)]
        self.assertSame(made[0], made[2])
        self.assertFalse(np.array_equal(made[0], made[1]))
        for model in ("tiny", REFERENCE / "mono-audiocraft"):
            status, _, err = self.run_script(*words, model)
            self.assertNotEqual(status, 0)
            self.assertRegex(err, "lines.jsonl, line 1 must have a prompt")

    def test_line_without_a_prompt_where_the_model_has_text(self):
        """As is known when it is loaded, and not before."""
        lines = self.folder / "lines.jsonl"
        lines.write_text('{"seed": 1}\n{"prompt": "bell"}\n')
        words = ["--prompts", lines, "--duration", "0.1", "--model", "tiny"]
        words += ["--output", self.folder / "out.wav"]
        with patch("arguments.may_lack_text", return_value=True):
            status, _, err = self.run_script(*words)
        self.assertEqual(status, 1)
        self.assertRegex(err, "line 1: there must be a prompt, for the model has text")
        made = sorted(path.name for path in self.folder.glob("*.wav"))
        self.assertEqual(made, ["out-2.wav"])

    def test_command(self):
        folder, out = self.folder_of(*CASES[0]), self.folder / "out.wav"
        common = ["--model", folder, "--duration", "0.3", "--output", out, "--force"]
        sounds = []
        for prompt in ([], ["--prompt", ""], ["--prompt", "", "--guidance-coef", "1"]):
            status, _, err = self.run_script(*prompt, *common, "--seed", "3")
            self.assertEqual(status, 0, err)
            sounds.append(soundfile.read(out)[0])
        for other in sounds[1:]:
            self.assertSame(other, sounds[0])
        self.assertGreater(np.abs(sounds[0]).max(), 0.01)
        status, _, err = self.run_script("happy rock", *common)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("generate.py: error: prompt must be empty, got 'happy rock'", err)

    def test_a_text_in_a_file_of_prompts_leaves_the_other_lines_alone(self):
        folder, lines = self.folder_of(*CASES[0]), self.folder / "lines.jsonl"
        lines.write_text('{"prompt": ""}\n{"prompt": "rock"}\n{"prompt": ""}\n')
        words = ["--model", folder, "--prompts", lines, "--duration", "0.3"]
        words += ["--output", self.folder / "out.wav"]
        status, _, err = self.run_script(*words)
        self.assertEqual(status, 1)
        self.assertRegex(err, "error: .*lines.jsonl, line 2: prompt must be empty")
        self.assertNotRegex(err, "line [13]")
        made = sorted(path.name for path in self.folder.glob("*.wav"))
        self.assertEqual(made, ["out-1.wav", "out-3.wav"])

    def test_no_prompt_of_a_model_with_text(self):
        for model in ("tiny", "stereo-small", REFERENCE / "mono-audiocraft"):
            status, _, err = self.run_script("--model", model, "--duration", "0.3")
            self.assertNotEqual(status, 0)
            self.assertIn("a prompt must be given", err)
            self.assertEqual(len(err.splitlines()), 1, err)

    def test_what_is_known_before_loading(self):
        folder, target = self.folder_of(*CASES[1]), self.folder / "out"
        convert(str(folder), target, mx.float32)
        for place in (folder, target, self.folder, self.folder / "none"):
            self.assertTrue(published.may_lack_text(place))
        for name in ("mono-audiocraft", "solver-audiocraft", "mono-transformers"):
            self.assertFalse(published.may_lack_text(REFERENCE / name))
        (folder / "checkpoint.th").write_bytes(b"noise")
        self.assertTrue(published.may_lack_text(folder))

    def test_nothing_to_train(self):
        folder = self.folder_of(*CASES[0])
        words = ["train.py", "lora", "--model", str(folder), "--data", str(self.folder)]
        with patch(
            "sys.argv", words + ["--output", str(self.folder / "a.safetensors")]
        ):
            with self.assertRaisesRegex(SystemExit, "has no text, so it cannot be"):
                train.main()

    def test_settings_that_name_a_text(self):
        """But no weights for one: it is told, and no text is left out in silence."""
        path = REFERENCE / "textless-audiocraft" / "state_dict.bin"
        package = audiocraft.read_decoder(path)
        self.assertFalse(audiocraft.has_text(package))
        named = package._replace(
            cfg=package.cfg | {"conditioners.description.model": "t5"}
        )
        self.assertTrue(audiocraft.has_text(named))
        lists = {"fuser.cross": ["description"]}
        with self.assertRaisesRegex(ValueError, "fuser.cross must list nothing"):
            audiocraft.check_conditions(lists, has_sound=False, has_text=False)

    def test_settings_that_list_what_reaches_the_decoder(self):
        """Which is nothing, as audiocraft writes it for such a model: it loads. One
        that lists a text does not."""
        folder = self.folder_of(*CASES[0])
        read = audiocraft.read_decoder
        empty = {f"fuser.{method}": [] for method in audiocraft.METHODS}
        for lists, told in (
            (empty, None),
            (empty | {"fuser.cross": ["description"]}, "fuser.cross must list nothing"),
            (
                empty | {"fuser.prepend": ["self_wav"]},
                "fuser.prepend must list nothing",
            ),
        ):

            def read_with(path: Path) -> audiocraft.Package:
                package = read(path)
                return package._replace(cfg=package.cfg | lists)

            with patch.object(audiocraft, "read_decoder", read_with):
                if told is None:
                    self.assertCodes(
                        MusicGen.from_pretrained(folder, mx.float32), CASES[0][0]
                    )
                    continue
                with self.assertRaisesRegex(ValueError, f"state_dict.bin .*{told}"):
                    MusicGen.from_pretrained(folder)

    def test_config_without_text(self):
        target = self.folder / "out"
        convert(str(self.folder_of(*CASES[0])), target, mx.float32)
        path = target / "config.json"
        settings = json.loads(path.read_text())
        self.assertIsNone(checkpoints.read_config(settings).text_encoder)
        shutil.copy(REFERENCE / "mono-transformers" / "spiece.model", target)
        for change, told in (
            ({"text_encoder": 0}, "must have 'text_encoder'"),
            ({"conditioner": {"kind": "melody"}}, "must have a text_encoder"),
        ):
            path.write_text(json.dumps(settings | change))
            with self.assertRaisesRegex(ValueError, told):
                MusicGen.from_pretrained(target)
        del settings["text_encoder"]
        path.write_text(json.dumps(settings))
        with self.assertRaisesRegex(ValueError, "must have 'text_encoder'"):
            MusicGen.from_pretrained(target)
        (target / "spiece.model").unlink()
        with self.assertRaisesRegex(FileNotFoundError, "must hold spiece.model"):
            MusicGen.from_pretrained(target)
