"""convert.py: folders of our own layout."""

import errno
import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
from common import AUDIOCRAFT, REFERENCE, ROOT, TRANSFORMERS, Test

import checkpoints
import convert
from musicgen import MusicGen


class TestConvert(Test):
    def run_script(self, *arguments: str) -> str:
        with patch("sys.argv", ["convert.py", *arguments]):
            with redirect_stdout(io.StringIO()) as output:
                convert.main()
        return output.getvalue()

    def test_round_trip(self):
        for name in TRANSFORMERS + AUDIOCRAFT:
            source, target = REFERENCE / name, self.folder / name
            self.run_script(
                "--hf-path",
                str(source),
                "--mlx-path",
                str(target),
                "--dtype",
                "float32",
            )
            self.assertEqual(
                sorted(path.name for path in target.iterdir()),
                ["config.json", "model.safetensors", "spiece.model"],
            )
            before, after = (
                MusicGen.from_pretrained(p, mx.float32) for p in (source, target)
            )
            options = dict(prompts=["drums", "piano"], duration=0.2, seed=3)
            audio = before.generate(**options)
            self.assertSame(audio, after.generate(**options))

    def test_dtype(self):
        target = self.folder / "half"
        self.run_script(
            "--hf-path",
            str(REFERENCE / "mono-transformers"),
            "--mlx-path",
            str(target),
            "--dtype",
            "bfloat16",
        )
        weights = mx.load(str(target / "model.safetensors"))
        for name, weight in weights.items():
            ours = mx.bfloat16 if name.startswith("decoder.") else mx.float32
            self.assertEqual(weight.dtype, ours, name)
        self.assertEqual(checkpoints.read(str(target)).dtype, mx.bfloat16)

    def test_quantized(self):
        source = str(REFERENCE / "stereo-transformers")
        for bits in (4, 8):
            target = self.folder / f"q{bits}"
            self.run_script(
                "--hf-path",
                source,
                "--mlx-path",
                str(target),
                "--dtype",
                "float32",
                "-q",
                "--q-bits",
                str(bits),
                "--q-group-size",
                "32",
            )
            stored = MusicGen.from_pretrained(target)
            loaded = MusicGen.from_pretrained(source, mx.float32, bits, 32)
            self.assertEqual(stored.config.quantization["bits"], bits)
            for model in (stored, loaded):
                linear = model.decoder.layers[0].linear1
                self.assertEqual((linear.bits, linear.group_size), (bits, 32))
            options = dict(prompts="drums", duration=0.2, temp=0)
            codes = stored.generate_codes(**options)
            self.assertSame(codes, loaded.generate_codes(**options))
        with self.assertRaisesRegex(SystemExit, "q_group_size must divide"):
            self.run_script(
                "--hf-path", source, "--mlx-path", str(self.folder / "x"), "-q"
            )

    def test_refuses_to_overwrite(self):
        source = str(REFERENCE / "mono-transformers")
        with self.assertRaisesRegex(SystemExit, "exists already"):
            self.run_script("--hf-path", source, "--mlx-path", str(self.folder))
        with self.assertRaisesRegex(SystemExit, "must exist"):
            self.run_script("--hf-path", source, "--mlx-path", str(self.folder / "a/b"))

    def test_interrupted_leaves_nothing(self):
        target = self.folder / "new"
        with patch("convert.json.dumps", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                convert.convert(
                    str(REFERENCE / "mono-transformers"), target, mx.float16
                )
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_signals_leave_nothing(self):
        program = (
            "import convert, sys, time\n"
            "def save(model, folder):\n"
            "    (folder / 'weights').write_text('a part')\n"
            "    print('saving', flush=True)\n"
            "    time.sleep(60)\n"
            "convert.save = save\n"
            "convert.main()\n"
        )
        source, target = str(REFERENCE / "mono-transformers"), self.folder / "new"
        command = [sys.executable, "-c", program, "--hf-path", source]
        command += ["--mlx-path", str(target)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, status in (
            ("SIGTERM", 143),
            ("SIGHUP", 129),
            ("SIGINT", 130),
            ("SIGKILL", -9),
        ):
            process = subprocess.Popen(command, cwd=ROOT, **pipes)
            self.assertEqual(process.stdout.readline(), "saving\n")
            process.send_signal(getattr(signal, name))
            told = process.communicate()
            self.assertEqual((process.returncode, told), (status, ("", "")))
            if name != "SIGKILL":
                self.assertEqual([*self.folder.iterdir()], [], name)
        (left,) = self.folder.iterdir()  # of the one that was killed
        other = self.folder / ".new-of-somebody"
        other.mkdir()
        convert.convert(source, target, mx.float16)
        self.assertEqual(sorted(self.folder.iterdir()), [other, target])

    def test_a_full_disk_is_one_line(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        flags = ["--hf-path", str(REFERENCE / "mono-transformers")]
        flags += ["--mlx-path", str(self.folder / "new")]
        with patch("mlx.core.save_safetensors", side_effect=RuntimeError("write")):
            with patch("outputs.os.write", side_effect=full):
                with self.assertRaisesRegex(SystemExit, "new could not.*disk is full$"):
                    self.run_script(*flags)
        self.assertEqual([*self.folder.iterdir()], [])

    def test_appears_whole_or_not_at_all(self):
        target, written = self.folder / "new", convert.save

        def save(model: MusicGen, folder: Path) -> None:
            written(model, folder)
            self.assertFalse(target.exists())

        with patch("convert.save", save):
            source = str(REFERENCE / "mono-transformers")
            convert.convert(source, target, mx.float16)
        self.assertTrue((target / "config.json").is_file())
        self.assertEqual(target.stat().st_mode & 0o777, 0o755)

    def test_upload_without_a_network_can_be_repeated(self):
        source, target = str(REFERENCE / "mono-transformers"), self.folder / "new"
        arguments = ["--hf-path", source, "--mlx-path", str(target)]
        arguments += ["--upload-repo", "someone/model"]
        with patch("huggingface_hub.HfApi") as api:
            api().create_repo.side_effect = RuntimeError("no network")
            with self.assertRaisesRegex(SystemExit, "did not take someone/model.*same"):
                self.run_script(*arguments)
            api().create_repo.side_effect = None
            with patch("convert.convert") as again:
                self.assertIn("as it is", self.run_script(*arguments))
        again.assert_not_called()
        api().upload_folder.assert_called_once()

    def test_model_card(self):
        (self.folder / "config.json").write_text('{"decoder_dtype": "float16"}')
        card = convert.model_card(self.folder, "a/b", "small")
        self.assertIn("base_model: facebook/musicgen-small", card)
        card = convert.model_card(self.folder, "a/b", str(self.folder))
        self.assertNotIn("base_model", card)
        self.assertNotIn(str(self.folder), card)
        for name in ("tiny", "tiny-magnet"):
            with patch.dict(convert.MODELS, {name: str(self.folder)}):
                card = convert.model_card(self.folder, "a/b", name)
            self.assertIn("license: mit", card)
            self.assertNotIn("Meta", card)
            self.assertNotIn(str(self.folder), card)

    def test_tiny_by_its_short_name(self):
        folder, target = self.copy("mono-transformers"), self.folder / "x"
        with patch.object(checkpoints, "TINY", folder):
            self.run_script("--hf-path", "tiny", "--mlx-path", str(target))
        self.assertTrue(convert.is_converted(target))

    def test_wrong_command_lines(self):
        good = ["--hf-path", "small", "--mlx-path", str(self.folder / "x")]
        for bad, pattern in (
            (["--upload-repo", "nobody"], "must be OWNER/NAME"),
            (["--dtype", "int8"], "invalid choice"),
            (["--q-bits", "8"], "need --quantize"),
            (["--q-mode", "mxfp4"], "need --quantize"),
            (["--adapter-scale", "0.5"], "needs an --adapter"),
            (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "q_bits must be 4 in the"),
            (["-q", "--q-mode", "fp4"], "invalid choice"),
            (["-q", "--q-bits", "7"], "invalid choice"),
            (["--hf-path", "smal"], "must be one of small"),
        ):
            with redirect_stderr(io.StringIO()) as err:
                with self.assertRaisesRegex(SystemExit, "2"):
                    self.run_script(*good, *bad)
            self.assertRegex(err.getvalue(), rf"^convert.py: error: .*{pattern}.*\n$")

    def test_target_is_tried_before_the_model_is_loaded(self):
        with patch("pathlib.Path.mkdir", side_effect=PermissionError("no")):
            with patch.object(MusicGen, "from_pretrained") as load:
                with self.assertRaises(PermissionError):
                    convert.convert("small", self.folder / "x", mx.float16)
        load.assert_not_called()

    def test_folder_without_a_name(self):
        for name, text in (("--mlx-path", ""), ("--mlx-path", " "), ("--adapter", "")):
            flags = ["--hf-path", "tiny", "--mlx-path", str(self.folder / "x"), name]
            with redirect_stderr(io.StringIO()) as err:
                with self.assertRaises(SystemExit):
                    self.run_script(*flags, text)
            self.assertRegex(err.getvalue(), f"{name}: must name a .*, got '{text}'\n$")

    def test_adapter_of_peft_is_no_model(self):
        flags = ["--hf-path", str(REFERENCE / "peft/mono")]
        with self.assertRaises(SystemExit) as stop:
            self.run_script(*flags, "--mlx-path", str(self.folder / "x"))
        words = (
            "give the model that it was made for as --hf-path, and this as --adapter"
        )
        self.assertIn(words, str(stop.exception))

    def test_folder_that_another_program_wrote_meanwhile(self):
        target = self.folder / "x"

        def save(model, folder):
            (folder / "config.json").write_text("ours")
            target.mkdir()
            (target / "config.json").write_text("theirs")

        words = "x was written by another program meanwhile: choose another folder"
        with patch.object(convert, "save", save):
            with self.assertRaises(SystemExit) as stop:
                self.run_script("--hf-path", "tiny", "--mlx-path", str(target))
        self.assertRegex(str(stop.exception), f"^convert.py: error: .*{words}.$")
        self.assertEqual((target / "config.json").read_text(), "theirs")
        self.assertEqual([*self.folder.iterdir()], [target])

    def test_config_of_three_gigabytes(self):
        """A folder of such zeros is none that was converted."""
        path = self.folder / "config.json"
        path.touch()
        os.truncate(path, 3 * 2**30)
        self.assertFalse(convert.is_converted(self.folder))

    def test_upload(self):
        target = self.folder / "new"
        with patch("huggingface_hub.HfApi") as api:
            self.run_script(
                "--hf-path",
                str(REFERENCE / "mono-transformers"),
                "--mlx-path",
                str(target),
                "--upload-repo",
                "someone/model",
            )
        api().create_repo.assert_called_once_with("someone/model", exist_ok=True)
        card = (target / "README.md").read_text()
        self.assertIn("license: cc-by-nc-4.0", card)
        self.assertIn("--model someone/model", card)

    def test_upload_again(self):
        """A card that somebody has edited stays, and what failed is told in sentences."""
        target = self.folder / "new"
        convert.convert(str(REFERENCE / "mono-transformers"), target, mx.float16)
        card = target / "README.md"
        card.write_text("mine")
        words = ["--hf-path", "small", "--mlx-path", str(target)]
        for error in ("no network", "no network.\n"):
            with patch("huggingface_hub.HfApi") as api:
                api().upload_folder.side_effect = RuntimeError(error)
                with self.assertRaises(SystemExit) as stopped:
                    self.run_script(*words, "--upload-repo", "someone/model")
            wanted = f"someone/model: no network. {target} is whole: the same command"
            self.assertIn(wanted, str(stopped.exception))
            self.assertEqual(card.read_text(), "mine")
