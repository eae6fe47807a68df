"""Settings and codes in files: --again, --resume, --redecode."""

import json
import os
from contextlib import chdir
from pathlib import Path
from unittest.mock import Mock, patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ScriptTest, exact

import generate
import hub
import settings
import sources
from audio import load_audio, save_audio
from prompt import encode_prompt


class TestSettings(ScriptTest):
    wanted = dict(model="small", prompt='häppy "rock" \\ 🎸', seed=2**63, temp=0.7)

    def test_round_trip_in_every_container(self):
        for prompt in (self.wanted["prompt"], "long " * 4000):
            wanted = self.wanted | {"prompt": prompt}
            comment = settings.to_comment(wanted)
            for suffix in (".wav", ".flac", ".ogg", ".mp3"):
                path = self.folder / f"x{suffix}"
                save_audio(path, mx.zeros((32001, 2)), 32000, comment)
                self.assertEqual(settings.read_settings(path), wanted)
                self.assertEqual(soundfile.info(path).frames, 32001)

    def test_codes(self):
        path = self.folder / "x.safetensors"
        codes = mx.array(np.random.default_rng(0).integers(0, 2048, (1, 9, 8)))
        settings.save_codes(path, codes, self.wanted)
        found, told = settings.load_codes(path)
        self.assertSame(found, codes)
        self.assertEqual((told, settings.read_settings(path)), (self.wanted,) * 2)
        self.assertEqual([p.name for p in self.folder.iterdir()], ["x.safetensors"])

    model = str(REFERENCE / "stereo-audiocraft")

    def make(self, name: str, *more: str) -> np.ndarray:
        """The samples of a file that the script makes with the flags."""
        output = self.folder / name
        status, _, err = self.run_script("--output", output, "--force", *more)
        self.assertEqual(status, 0, err)
        return soundfile.read(output)[0]

    def test_again(self):
        first = ["-p", "drums", "--model", self.model, "--duration", "0.3"]
        first += ["--temp", "0.7", "--top-k", "20", "--negative-prompt", "piano"]
        for suffix in (".wav", ".flac"):
            take = self.make(f"first{suffix}", *first)
            source = self.folder / f"first{suffix}"
            again = self.make(f"again{suffix}", "--again", source)
            self.assertSame(again, take)
            longer = self.make("longer.wav", "--again", source, "--duration", "0.4")
            self.assertEqual(longer.shape, (12800, 2))
            other = self.make("other.wav", "--again", source, "-p", "piano")
            self.assertNotEqual(other.tolist(), take.tolist())
            told = settings.read_settings(self.folder / "other.wav")
            self.assertEqual((told["prompt"], told["temp"]), ("piano", 0.7))
        save_audio(self.folder / "bare.wav", mx.zeros((9, 1)), 32000)
        status, _, err = self.run_script("--again", self.folder / "bare.wav")
        self.assertEqual(status, 1)
        self.assertRegex(err, "^generate.py: error: .*bare.wav holds no settings.*\n$")

    def test_codes_of_tiny(self):
        for name in ("tiny", "here/tiny"):
            (self.folder / name).mkdir(parents=True)
        tiny = str(self.folder / "tiny")
        self.enterContext(patch.dict(hub.MODELS, tiny=tiny))
        self.enterContext(chdir(self.folder / "here"))
        source, told = Path("x.safetensors"), {"model": "tiny"}
        model = Mock(revision=None)
        for model.name in ("tiny", "../tiny", tiny):
            sources.check_source(source, told, model)
        for model.name in ("./tiny", "small"):
            with self.assertRaisesRegex(ValueError, "holds codes of tiny, not of"):
                sources.check_source(source, told, model)

    def test_resume(self):
        path, longer = (self.folder / f"{n}.safetensors" for n in ("codes", "longer"))
        flags = ["-p", "drums", "--model", self.model, "--seed", "9"]
        whole = self.make("whole.wav", *flags, "--duration", "0.8", "--peak", "-3")
        self.make("short.wav", *flags, "--duration", "0.3", "--save-codes", path)
        self.assertEqual(settings.load_codes(path)[0].shape, (1, 15, 8))
        more = ["--duration", "0.8", "--peak", "-3", "--save-codes", longer]
        resumed = self.make("resumed.wav", "--resume", path, *more)
        self.assertSame(resumed, whole)
        self.assertEqual(settings.load_codes(longer)[0].shape, (1, 40, 8))
        level = ["--peak", "-3"]
        again = self.make("redecoded.wav", "--redecode", longer, *level)
        self.assertSame(again, whole)
        output = self.folder / "none.wav"
        for flags, pattern in (
            (["--duration", "0.2"], "0.3 s long already"),
            (["--model", str(REFERENCE / "mono-audiocraft")], "holds codes of"),
        ):
            status, _, err = self.run_script(
                "--resume", path, "--output", output, *flags
            )
            self.assertEqual(status, 1)
            self.assertRegex(err, f"generate.py: error: .*{pattern}.*\n$")
            self.assertFalse(output.exists())
        codes, told = settings.load_codes(path)
        settings.save_codes(self.folder / "bad.safetensors", codes + 999, told)
        for flag, *more in (["--redecode"], ["--resume", "--duration", "0.8"]):
            status, _, err = self.run_script(
                flag, self.folder / "bad.safetensors", "--output", output, *more
            )
            self.assertEqual(status, 1)
            self.assertRegex(
                err, "generate.py: error: The codes must be .* in 8 codebooks: .*\n$"
            )
        for flags in (["--takes", "2"], ["--save-codes", "x.npz"]):
            status, _, err = self.run_script("--resume", path, *flags)
            self.assertEqual(status, 2)
            self.assertRegex(err, "^generate.py: error: .*--save-codes.*\n$")
        status, _, err = self.run_script("--redecode", path, "--stream")
        self.assertEqual(status, 2)
        self.assertRegex(err, "^generate.py: error: --redecode writes a file.*\n$")

    def refused(self, *flags: str, status: int, pattern: str) -> None:
        """The flags get one line, and leave no file."""
        before = sorted(self.folder.iterdir())
        got, _, err = self.run_script("--output", self.folder / "no.wav", *flags)
        self.assertEqual(got, status, err)
        self.assertRegex(err, f"^(0step.*\r?)*generate.py: error: .*{pattern}.*\n$")
        self.assertEqual(sorted(self.folder.iterdir()), before)

    def test_only_settings_are_recalled(self):
        path, other = self.folder / "x.safetensors", self.folder / "other.safetensors"
        told = dict(model=self.model, prompt="drums", seed=3, duration=0.2)
        codes = mx.zeros((1, 9, 8), mx.uint32)
        hostile = dict(save_codes=str(other), takes=3, stream=True, redecode="x")
        settings.save_codes(path, codes, told | hostile)
        self.make("again.wav", "--again", path)
        names = sorted(p.name for p in self.folder.iterdir())
        self.assertEqual(names, ["again.wav", "x.safetensors"])
        for wrong in (
            dict(seed=[1]),
            dict(seed=1.5),
            dict(dtype="nonsense"),
            dict(dtype=3),
            dict(model=5),
            dict(temp="hot"),
            dict(temp={}),
            dict(top_k=None, temp=-1),
            dict(duration=[2]),
            dict(audio_prompt=7),
        ):
            settings.save_codes(path, codes, told | wrong)
            status, _, err = self.run_script("--again", path, "--output", other)
            self.assertIn(status, (1, 2), wrong)
            self.assertRegex(err, "^generate.py: error: .*\n$")

    def test_types_that_no_setting_has(self):
        path, codes = self.folder / "x.safetensors", mx.zeros((1, 9, 8), mx.uint32)
        told = dict(model=self.model, prompt="drums", seed=3, duration=0.4)
        for wrong in (
            *({"prompt_frames": v} for v in ({}, [], "x", None, -1, 1.5, True, 1e999)),
            *({"model": v} for v in ({}, 3, None, ["tiny"])),
            *({"revision": v} for v in ({}, 3)),
            *({"prompt": v} for v in ({}, 3, None)),
            {"anything": {"else": 3}},
        ):
            settings.save_codes(path, codes, told | wrong)
            for flag in ("--redecode", "--resume", "--again"):
                output = ["--output", self.folder / "no.wav"]
                status, _, err = self.run_script(flag, path, *output)
                self.assertEqual(status, 1, wrong)
                self.assertRegex(err, "^generate.py: error: .* is damaged: .*\n$")
        self.assertEqual([*self.folder.iterdir()], [path])

    def test_flags_replace_settings(self):
        first = ["-p", "drums", "--model", self.model, "--duration", "0.5"]
        self.make("loud.wav", *first, "--loudness", "-20")
        loud = ["--again", self.folder / "loud.wav"]
        self.assertLess(np.abs(self.make("x.wav", *loud, "--peak", "-6")).max(), 0.51)
        self.make("x.wav", *loud, "--stream")
        self.make("float.wav", *first, "--subtype", "float")
        self.make("x.flac", "--again", self.folder / "float.wav")
        lines = self.folder / "lines.txt"
        lines.write_text("piano\n")
        more = ["--prompts", lines, "--duration", "0.6"]
        self.run_script("--output", self.folder / "line.wav", *loud, *more)
        told = settings.read_settings(self.folder / "line-1.wav")
        self.assertEqual((told["prompt"], told["loudness"]), ("piano", -20))

    def test_what_does_not_go_together(self):
        path = self.folder / "c.safetensors"
        flags = ["-p", "drums", "--model", self.model, "--duration", "0.4"]
        self.make("x.wav", *flags, "--save-codes", path)
        for more, pattern in (
            (
                ["--redecode", path, "--temp", "0.1"],
                "--redecode takes codes as they are",
            ),
            (["--redecode", path, "--q-mode", "mxfp4"], "leave out --q-mode"),
            (["--redecode", path, "--q-bits", "8"], "leave out --q-bits"),
            (["--redecode", path, "--q-group-size", "32"], "out --q-group-size"),
            (["--redecode", path, "--dtype", "float16"], "leave out --dtype"),
            (["--redecode", path, "--adapter", "x"], "leave out --adapter"),
            (["--redecode", path, "--adapter-scale", "2"], "out --adapter-scale"),
            (["--redecode", path, "--batch-size", "2"], "leave out --batch-size"),
            (["--redecode", path, "--again", path], "must not come together"),
            (["--resume", path, "--audio-prompt", "a.wav"], "goes on from codes"),
        ):
            self.refused(*more, status=2, pattern=pattern)
        for more, pattern in (
            (["--save-codes", "/none/x.safetensors"], "folder /none"),
            (["--loudness", "-14", "--duration", "0.3"], "loudness needs a duration"),
        ):
            self.refused(*flags, *more, status=1, pattern=pattern)
        spelled = os.path.relpath(self.model)
        self.make("y.wav", "--redecode", path, "--model", f"./{spelled}/")

    def test_resume_needs_no_audio_prompt(self):
        sound, path = self.folder / "s.wav", self.folder / "c.safetensors"
        save_audio(sound, 0.1 * mx.random.normal((6400, 1)), 32000)
        flags = ["-p", "drums", "--model", self.model, "--seed", "9"]
        flags += ["--audio-prompt", sound, "--drop-prompt", "--dtype", "float32"]
        whole = self.make("whole.wav", *flags, "--duration", "0.8")
        model = exact("stereo-audiocraft")
        known = encode_prompt(model, load_audio(sound, 32000, 2), 40)
        told = settings.read_settings(self.folder / "whole.wav")
        self.assertEqual(told["prompt_frames"], 10)
        settings.save_codes(path, known, told)  # stopped after the prompt
        sound.unlink()
        longer = [
            "--duration",
            "0.8",
            "--save-codes",
            self.folder / "longer.safetensors",
        ]
        self.assertSame(self.make("resumed.wav", "--resume", path, *longer), whole)
        again = self.make("again.wav", "--redecode", self.folder / "longer.safetensors")
        self.assertSame(again, whole)

    def test_bad_files(self):
        sound, codes = self.folder / "x.wav", self.folder / "x.safetensors"
        deep = "[" * 40_000
        for comment in ("", "[]", "{}", "3", '"a"', "{", '{"other": 1}', deep):
            save_audio(sound, mx.zeros((9, 1)), 32000, comment)
            with self.assertRaisesRegex(ValueError, "x.wav holds no settings"):
                settings.read_settings(sound)
        with self.assertWarnsRegex(UserWarning, "x.wav takes no comment as long"):
            save_audio(sound, mx.zeros((9, 1)), 32000, "[" * 100_000)
        with self.assertRaisesRegex(ValueError, "x.wav holds no settings"):
            settings.read_settings(sound)
        for version in (99, "1", None):
            save_audio(
                sound, mx.zeros((9, 1)), 32000, json.dumps(dict(musicgen=version))
            )
            with self.assertRaisesRegex(ValueError, "x.wav is of a later version"):
                settings.read_settings(sound)
        sound.write_text("no sound")
        with self.assertRaisesRegex(ValueError, "x.wav is not a readable sound file"):
            settings.read_settings(sound)
        for content in (b"", b"junk" * 99):
            codes.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "x.safetensors is damaged"):
                settings.load_codes(codes)
        for array in (mx.zeros((1, 2)), mx.zeros((1, 2, 3)), mx.zeros((2, 2, 3))):
            mx.save_safetensors(str(codes), {"codes": array})
            with self.assertRaisesRegex(ValueError, "must hold codes"):
                settings.load_codes(codes)
        mx.save_safetensors(str(codes), {"codes": mx.zeros((1, 2, 3), mx.uint16)})
        with self.assertRaisesRegex(ValueError, "holds no settings"):
            settings.load_codes(codes)
        with self.assertRaisesRegex(FileNotFoundError, "no file"):
            settings.read_settings(self.folder / "none.wav")

    def test_a_sound_holds_no_codes(self):
        """What could be named in its place is told."""
        sound = self.folder / "x.wav"
        save_audio(sound, mx.zeros((9, 1)), 32000, settings.to_comment({"seed": 1}))
        wanted = "x.wav holds no codes: name a .safetensors file of --save-codes.$"
        with self.assertRaisesRegex(ValueError, wanted):
            settings.load_codes(sound)
        save_audio(sound, mx.zeros((9, 1)), 32000)
        status, _, err = self.run_script("--again", sound)
        self.assertEqual(status, 1)
        self.assertRegex(err, "it is no sound of .*, nor codes of --save-codes")
        for flag in ("--resume", "--redecode"):
            status, _, err = self.run_script(flag, sound)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"{flag} needs a .safetensors of --save-codes, got")

    def test_codes_that_another_program_wrote(self):
        """Meanwhile: they stay, and it is told."""
        flags = ["-p", "drums", "--model", self.model, "--duration", "0.2"]
        for more in ((), ("--stream",)):
            path = self.folder / f"c{len(more)}.safetensors"

            def load(*given, load=generate.load, path=path):
                path.write_text("theirs")
                return load(*given)

            with patch("generate.load", load):
                output = self.folder / f"x{len(more)}.wav"
                made = self.run_script(
                    *flags, *more, "--save-codes", path, "--output", output
                )
            self.assertEqual((made[0], path.read_text()), (1, "theirs"), made[2])
            self.assertRegex(made[2], "c.*.safetensors is there already")
