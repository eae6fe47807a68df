"""Several adapters on the command line and in sound files; training for PEFT."""

import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock, patch

import mlx.core as mx
import sounds
from common import REFERENCE, ScriptTest, Test, exact
from mlx.utils import tree_flatten
from safetensors import safe_open

import adapters
import convert
import lora
import peft_files
import quantize
import settings
import train
from arguments import parse_arguments
from audio import save_audio
from musicgen import MusicGen

MODEL = REFERENCE / "mono-transformers"
PEFT, OURS = REFERENCE / "peft" / "mono", REFERENCE / "peft" / "ours-mono.safetensors"
GREEDY = dict(duration=0.3, temp=0)


class TestKinds(Test):
    def test_ours_is_a_file(self):
        plain = self.folder / "adapter_model.safetensors"
        plain.touch()
        for path, own in (
            (OURS, True),
            (plain, True),
            ("no-such.safetensors", True),
            ("clips/no-such.safetensors", True),
            ("./no/such/folder", True),
            (PEFT, False),
            (str(PEFT), False),
            (PEFT / peft_files.WEIGHTS, False),
            ("owner/name-v1.2", False),
        ):
            self.assertEqual(adapters.is_own(path), own, path)

    def test_scales(self):
        for scales, wanted in (
            (0.5, [0.5, 0.5]),
            ([0.5], [0.5, 0.5]),
            ([1, 2], [1, 2]),
        ):
            pairs = adapters.weighted(["a", "b"], scales)
            self.assertEqual(pairs, [*zip("ab", wanted)])
        self.assertEqual(adapters.weighted([], 1.0), [])

    def test_files_are_read_before_the_model(self):
        adapters.check_files([PEFT, OURS])
        for path in (self.folder / "none", self.folder):
            with self.assertRaises(FileNotFoundError):
                adapters.check_files([PEFT, path])

    def test_what_names_none(self):
        config = PEFT / peft_files.CONFIG
        none = "adapter must be a file of train.py lora, .* folder or Hub id .*, got "
        for path, pattern in (
            ("", f"{none}''"),
            (" ", f"{none}' '"),
            (5, f"{none}5"),
            ({"a": 3}, f"{none}{{'a': 3}}"),
            (b"a", f"{none}b'a'"),
            (config, f"adapter must be the folder .*, got its .*: take {PEFT}$"),
            (str(config), f"take {PEFT}$"),
        ):
            for ask in (
                adapters.check_files,
                lambda path: adapters.weighted(path, 1.0),
                lambda path: MusicGen.from_pretrained(MODEL, adapter=path),
                lambda path: MusicGen.from_pretrained(MODEL, adapter=[PEFT, path]),
            ):
                with self.subTest(path=path):
                    with self.assertRaisesRegex(ValueError, pattern):
                        ask(path)

    def test_no_adapter_at_all(self):
        model = MusicGen.from_pretrained(MODEL, adapter=[])
        self.assertEqual(model.adapter, {})

    def test_scale_that_no_adapter_needs(self):
        for scale in (0.5, 0, [0.5], [1, 0.5]):
            for adapter in (None, []):
                words = r"adapter_scale must come with an adapter, got [\[\d]"
                read = patch("musicgen.read", side_effect=AssertionError)
                with read, self.assertRaisesRegex(ValueError, words):
                    asked = dict(adapter=adapter, adapter_scale=scale)
                    MusicGen.from_pretrained(MODEL, **asked)
            with self.assertRaisesRegex(ValueError, words):
                target = self.folder / "x"
                convert.convert(MODEL, target, mx.float16, adapter_scale=scale)
        self.assertEqual([*self.folder.iterdir()], [])
        for scale in (1, 1.0, [1.0]):
            MusicGen.from_pretrained(MODEL, adapter_scale=scale)


class TestCommandLine(ScriptTest):
    def test_what_is_no_adapter_is_told_before_the_model_is_read(self):
        flags = ["--prompt", "drums", "--model", MODEL, "--output", self.folder / "a"]
        with patch.object(MusicGen, "from_pretrained", side_effect=AssertionError):
            for path, told in (
                ("", "argument --adapter: must name a file or a folder, got ''"),
                (PEFT / peft_files.CONFIG, f"take {PEFT}"),
            ):
                status, _, err = self.run_script(
                    *flags[:-1], "a.wav", "--adapter", path
                )
                self.assertIn(status, (1, 2))
                self.assertIn(told, err)
                self.assertEqual(err.count("\n"), 1)

    def make(self, name: str, *flags) -> tuple[dict, list]:
        """Settings and samples of a file that generate.py writes."""
        path = self.folder / f"{name}.wav"
        common = ["--output", path, "--seed", "3"]
        status, _, err = self.run_script(*flags, *common)
        self.assertEqual(status, 0, err)
        return settings.read_settings(path), path.read_bytes()[-4000:]

    def test_several_are_kept_and_made_again(self):
        flags = ["--prompt", "drums", "--model", MODEL, "--duration", "0.3"]
        both = ["--adapter", PEFT, "--adapter", OURS]
        record, sound = self.make("a", *flags, *both, "--adapter-scale", "0.5")
        self.assertEqual(record["adapter"], [str(PEFT), str(OURS)])
        self.assertEqual(record["adapter_scale"], [0.5, 0.5])
        again, same = self.make("b", "--again", self.folder / "a.wav")
        self.assertEqual((again, same), (record, sound))
        scales = ["--adapter-scale", "0.5", "--adapter-scale", "1"]
        other, changed = self.make("c", "--again", self.folder / "a.wav", *scales)
        self.assertEqual(other["adapter"], record["adapter"])
        self.assertEqual(other["adapter_scale"], [0.5, 1.0])
        self.assertNotEqual(changed, sound)
        one, alone = self.make("d", "--again", self.folder / "a.wav", "--adapter", OURS)
        self.assertEqual((one["adapter"], one["adapter_scale"]), (str(OURS), 1.0))
        self.assertNotIn(alone, (sound, changed))

    def test_lines_of_a_file(self):
        """Are made again with another adapter or scale only."""
        prompts = self.folder / "prompts.txt"
        prompts.write_text("drums\n")
        flags = ["--prompts", prompts, "--model", MODEL, "--duration", "0.3"]
        flags += ["--output", self.folder / "x.wav", "--seed", "3", "--adapter", PEFT]
        for more, said in (
            ([], ""),
            ([], "skipped"),
            (["--adapter", OURS], "made again: adapter was"),
            (["--adapter", OURS], "skipped"),
            (["--adapter", OURS, "--adapter-scale", "0.5"], "adapter_scale was"),
        ):
            status, out, err = self.run_script(*flags, *more)
            self.assertEqual(status, 0, err)
            self.assertIn(said, out + err)

    def train_again(self, path: Path) -> None:
        """What an adapter's folder or file holds, another time."""
        if path.is_dir():
            path = path / peft_files.WEIGHTS
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        arrays = {name: value * 1.5 for name, value in mx.load(str(path)).items()}
        mx.eval(arrays)
        mx.save_safetensors(str(path), arrays, metadata)

    def test_one_that_was_trained_again(self):
        """At the same path: lines are made again, and --again warns."""
        prompts = self.folder / "prompts.txt"
        prompts.write_text("drums\n")
        own = Path(shutil.copy(OURS, self.folder / "own.safetensors"))
        peft = Path(shutil.copytree(PEFT, self.folder / "peft"))
        for name, paths in (("a", [own]), ("b", [peft]), ("c", [peft, own])):
            sound = self.folder / f"{name}.wav"
            flags = [x for path in paths for x in ("--adapter", path)]
            flags += ["--prompts", prompts, "--model", MODEL, "--duration", "0.3"]
            flags += ["--seed", "3", "--output", sound]
            sound = self.folder / f"{name}-1.wav"
            self.run_script(*flags)
            record = settings.read_settings(sound)
            self.assertEqual(record["adapter_hash"], adapters.checksum(paths))
            self.assertRegex(record["adapter_hash"], "^[0-9a-f]{16}( [0-9a-f]{16})?$")
            self.assertIn("skipped", "".join(self.run_script(*flags)[1:]))
            again = ["--again", sound, "--output", self.folder / "again.wav", "--force"]
            self.assertNotIn("another adapter", self.run_script(*again)[2])
            self.train_again(paths[-1])
            status, _, err = self.run_script(*again)
            self.assertEqual(status, 0)
            self.assertRegex(err, f"warning: .*{name}-1.wav was made with another adap")
            status, out, err = self.run_script(*flags)
            self.assertRegex(out + err, "made again: adapter_hash was '[0-9a-f ]*' and")
            self.assertIn("skipped", "".join(self.run_script(*flags)[1:]))
        self.assertIsNone(adapters.checksum([own, "owner/name"]))
        self.assertIsNone(adapters.checksum(None))

    def test_takes_of_older_versions(self):
        """They do not tell of the adapter's file: it is not asked for."""
        prompts, sound = self.folder / "prompts.txt", self.folder / "x-1.wav"
        prompts.write_text("drums\n")
        flags = ["--prompts", prompts, "--model", MODEL, "--duration", "0.3"]
        flags += ["--output", self.folder / "x.wav", "--seed", "3", "--adapter", PEFT]
        with patch("adapters.checksum", return_value=None):
            self.run_script(*flags)
        self.assertNotIn("adapter_hash", settings.read_settings(sound))
        self.assertIn("skipped", "".join(self.run_script(*flags)[1:]))
        again = ["--again", sound, "--output", self.folder / "again.wav"]
        status, _, err = self.run_script(*again)
        self.assertEqual((status, "another adapter" in err), (0, False))

    def test_flags(self):
        args = parse_arguments(["a", "--adapter", "b/c"])
        self.assertEqual((args.adapter, args.adapter_scale), (Path("b/c"), 1.0))
        args = parse_arguments(["a", "--adapter-scale", "1"])
        self.assertEqual((args.adapter, args.adapter_scale), (None, 1.0))
        for flags, pattern in (
            (["--adapter-scale", "0.5"], "--adapter-scale needs an --adapter"),
            (
                ["--adapter", PEFT, *["--adapter-scale", "1"] * 2],
                "once for each --adapter, got 2 for 1",
            ),
            (
                ["--adapter", OURS, "--adapter", PEFT, "--save-codes", OURS],
                "read as the",
            ),
            (
                ["--adapter", PEFT, "--adapter", OURS, "--save-codes", OURS],
                "read as the",
            ),
        ):
            status, _, err = self.run_script("--prompt", "a", *flags)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
        status, _, err = self.run_script("--prompt", "a", "--adapter", self.folder)
        self.assertEqual(status, 1)
        self.assertRegex(err, "must hold adapter_config.json beside .*\n$")

    def test_settings_of_a_stranger(self):
        path = self.folder / "x.safetensors"
        codes = mx.zeros((1, 9, 4), mx.uint16)
        for wrong in (
            dict(adapter=[1]),
            dict(adapter=[["a"]]),
            dict(adapter_scale=["a"]),
            dict(model=["a"]),
        ):
            settings.save_codes(path, codes, wrong)
            with self.assertRaisesRegex(ValueError, "is of a wrong type"):
                settings.read_settings(path)


class TestTraining(Test):
    def setUp(self):
        super().setUp()
        self.clips = self.folder / "clips"
        self.clips.mkdir()
        save_audio(self.clips / "a.wav", sounds.tune(32000, [60, 64, 67]), 32000)
        (self.clips / "a.txt").write_text("a tune\n")

    def train(self, output: str, *flags: str, model: str = "mono-transformers"):
        """Exit status or message."""
        words = ["lora", "--model", REFERENCE / model, "--data", self.clips]
        words += ["--output", self.folder / output, "--rank", "3", "--steps", "2"]
        words += ["--dtype", "float32", "--lr", "0.02", *flags]
        with patch.object(sys, "argv", ["train.py", *map(str, words)]):
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
                try:
                    train.main()
                except SystemExit as stop:
                    return err.getvalue() if stop.code == 2 else stop.code
        return 0

    def test_both_formats_hold_the_same(self):
        """Of all targets; a melody's projection has none to learn from here."""
        every = ["--targets", "layers", "embeddings", "heads", "projections"]
        for kind in ("mono", "stereo", "melody"):
            name = f"{kind}-transformers"
            for output, flags in (
                (f"{kind}.safetensors", []),
                (kind, ["--format", "peft"]),
            ):
                self.assertEqual(self.train(output, *every, *flags, model=name), 0)
            models = [
                MusicGen.from_pretrained(REFERENCE / name, mx.float32, adapter=path)
                for path in (self.folder / f"{kind}.safetensors", self.folder / kind)
            ]
            plain = dict(tree_flatten(exact(name).decoder.parameters()))
            ours, theirs = (dict(tree_flatten(m.decoder.parameters())) for m in models)
            changed = {key for key in plain if (plain[key] != ours[key]).any()}
            for key, value in ours.items():
                self.assertClose(theirs[key], value, 1e-6)
            self.assertLessEqual(
                {"emb.weight", "linears.weight", "output_proj.weight"}, changed
            )

    def test_over_each_mode_of_quantization(self):
        """Two steps over layers in few bits, and then it plays over them."""
        for flags, asked in (
            (["--q-bits", "3", "--q-group-size", "32"], dict(bits=3, group_size=32)),
            (["--q-mode", "mxfp4"], dict(mode="mxfp4")),
            (["--q-mode", "nvfp4"], dict(mode="nvfp4")),
            (["--q-mode", "mxfp8", "--q-bits", "8"], dict(mode="mxfp8", bits=8)),
        ):
            wanted = quantize.complete(**asked)
            with patch("train.lm_loss", Mock(wraps=train.lm_loss)) as loss:
                self.assertEqual(self.train("x.safetensors", "--force", *flags), 0)
            model = loss.call_args.args[0]
            self.assertEqual(model.config.quantization, wanted)
            layer = model.decoder.layers[0].linear1.layer
            self.assertEqual((layer.mode, layer.bits), (wanted["mode"], wanted["bits"]))
            names = {f"q_{name}": value for name, value in wanted.items()}
            options = dict(adapter=self.folder / "x.safetensors", **names)
            played = MusicGen.from_pretrained(MODEL, mx.float32, **options)
            found = dict(tree_flatten(played.decoder.parameters()))
            learned = dict(tree_flatten(model.decoder.parameters()))
            self.assertGreater(mx.abs(learned["layers.0.linear1.b"]).max().item(), 0)
            same = found.keys() & learned.keys()  # the text's keys are not quantized
            self.assertIn("layers.0.linear1.layer.scales", same)
            for name in same:
                self.assertSame(found[name], learned[name])
        status = self.train("x.safetensors", "--resume", "--q-mode", "nvfp4")
        self.assertRegex(str(status), "q_bits must be as it was, 8|q_mode must be as")

    def test_what_mlx_cannot_quantize(self):
        for flags, pattern in (
            (["--q-bits", "7"], "--q-bits: invalid choice: 7"),
            (["--q-bits", "8", "--q-mode", "mxfp4"], "q_bits must be 4 in the q_mode"),
            (["--q-mode", "nvfp4", "--q-group-size", "32"], "must be 16 in the q_mode"),
            (["--q-group-size", "32"], "q_group_size must come with q_bits or q_mode"),
        ):
            with patch("train.MusicGen.from_pretrained", side_effect=AssertionError):
                message = self.train("x.safetensors", *flags)
            self.assertRegex(message, rf"^train.py lora: error: .*{pattern}|{pattern}")
            self.assertEqual(message.count("\n"), 1)
        status = self.train("x.safetensors", "--q-bits", "4")  # groups of 64 of 32
        self.assertRegex(str(status), "train.py: error: q_group_size must divide")

    def test_targets(self):
        for targets, wanted in (
            (["heads"], {"linears"}),
            (["embeddings", "projections"], {"emb", "output_proj"}),
            (["heads", "embeddings"], {"linears", "emb"}),
        ):
            flags = ["--targets", *targets, "--force"]
            self.assertEqual(self.train("x.safetensors", *flags), 0)
            arrays, metadata = lora.read_adapter(self.folder / "x.safetensors")
            self.assertEqual({name[:-2] for name in arrays}, wanted)
            self.assertEqual(metadata["targets"], targets)
            status = self.train("x.safetensors", "--resume", "--steps", "3")
            words = f"targets must be as it was, {' '.join(targets)}, .* got layers"
            self.assertRegex(str(status), words)
        model = MusicGen.from_pretrained(MODEL, mx.float32, q_bits=8, q_group_size=32)
        lora.load_adapter(model, self.folder / "x.safetensors")
        self.assertFalse(lora.has_adapters(model.decoder))  # none is quantized
        metadata |= {"targets": ["nonsense"]}
        with self.assertRaisesRegex(ValueError, "must tell known targets, got .*nons"):
            lora.check_adapter(model.decoder, arrays, metadata, "x")

    def test_layers_alone_are_as_ever(self):
        self.assertEqual(self.train("x.safetensors"), 0)
        self.assertNotIn("targets", lora.read_adapter(self.folder / "x.safetensors")[1])

    def test_what_is_lost_or_cannot_be(self):
        (self.folder / "file").touch()
        for output, flags, pattern in (
            ("x.safetensors", ["--format", "peft"], "must be a folder with --format"),
            ("file", ["--format", "peft"], "must be a folder with --format peft"),
            ("no/folder", ["--format", "peft"], "The folder .*no of folder must exist"),
            ("x", [], "must end in .safetensors"),
            ("x.safetensors", ["--targets", "drums"], "invalid choice: 'drums'"),
            ("x", ["--format", "peft", "--q-bits", "8"], "leave out --q-bits"),
            ("x", ["--format", "peft", "--q-mode", "mxfp4"], "leave out --q-mode"),
            ("x", ["--output", ""], "--output: must name a file or a folder, got ''"),
        ):
            self.assertRegex(str(self.train(output, *flags)), pattern)
        self.assertEqual(self.train("x", "--format", "peft"), 0)
        before = (self.folder / "x" / peft_files.WEIGHTS).read_bytes()
        status = self.train("x", "--format", "peft", "--seed", "1")
        self.assertRegex(str(status), "is there already: go on with it by --resume")
        after = (self.folder / "x" / peft_files.WEIGHTS).read_bytes()
        self.assertEqual(after, before)
        other = self.folder / "other"
        other.mkdir()
        (other / ".hidden").touch()
        (other / "config.json").write_text("{}")
        with patch("train.MusicGen.from_pretrained", side_effect=AssertionError):
            status = self.train("other", "--format", "peft")
        wanted = (
            "other holds other files than an adapter's, such as config.json: .*--fo"
        )
        self.assertRegex(str(status), wanted)
        self.assertEqual(self.train("other", "--format", "peft", "--force"), 0)
        self.assertTrue((other / "config.json").is_file())
        (other / "config.json").unlink()
        (self.folder / "empty").mkdir()
        self.assertEqual(self.train("empty", "--format", "peft"), 0)
        status = self.train("y", "--format", "peft", model="style-audiocraft")
        self.assertRegex(str(status), "no model that follows a style")
        self.assertFalse((self.folder / "y").exists())
