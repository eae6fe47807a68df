"""The flags of generate.py, without making anything."""

import contextlib
import io
import os
from unittest.mock import patch

import mlx.core as mx
from common import ScriptTest

import arguments
import settings
from arguments import FLAGS, make_parser, parse_arguments


class TestArguments(ScriptTest):
    def refused(self, *argv: str) -> str:
        """What is said of flags that cannot be."""
        with contextlib.redirect_stderr(io.StringIO()) as told:
            with self.assertRaises(SystemExit) as ended:
                parse_arguments([*argv])
        self.assertEqual(ended.exception.code, 2)
        self.assertRegex(told.getvalue(), "^generate.py: error: .*\n$")
        return told.getvalue()

    def test_short_ones(self):
        args = parse_arguments("-p a -m tiny -d 2 -o x.flac -s 7".split())
        self.assertEqual((args.prompt, args.model), (["a"], "tiny"))
        self.assertEqual((args.duration, args.output, args.seed), (2.0, "x.flac", 7))

    def test_prompt_without_a_flag(self):
        self.assertEqual(parse_arguments(["happy rock"]).prompt, ["happy rock"])
        self.assertEqual(parse_arguments(["a", "-p", "b"]).prompt, ["b", "a"])
        self.assertEqual(parse_arguments([""]).prompt, [""])
        self.assertIn("stands in quotes", self.refused("happy", "rock"))
        self.assertIn("a prompt must be given", self.refused())
        self.assertIn("not be given together", self.refused("a", "--prompts", "b"))

    def test_prompt_of_standard_input(self):
        with patch("sys.stdin", io.StringIO("happy rock\n")):
            self.assertEqual(parse_arguments(["-"]).prompt, ["happy rock"])
        with patch("sys.stdin", io.StringIO("b\n")):
            self.assertEqual(parse_arguments(["-p", "a", "-p", "-"]).prompt, ["a", "b"])
        closed = io.StringIO()
        closed.close()
        for stdin in (None, closed):
            with patch("sys.stdin", stdin):
                self.assertIn("standard input, which is closed", self.refused("-"))
        with patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8")):
            self.assertIn("standard input must be a text", self.refused("-"))
        with patch("sys.stdin", io.StringIO(" \n")):
            self.assertIn("standard input is empty", self.refused("-"))
        self.assertIn("stands in quotes", self.refused("-", "-"))

    def test_prompt_of_a_file_recalled(self):
        out = self.folder / "x.wav"
        status, *_ = self.run_script("drums", "-m", "tiny", "-d", "0.1", "-o", out)
        self.assertEqual(status, 0)
        self.assertEqual(parse_arguments(["--again", str(out)]).prompt, ["drums"])
        self.assertEqual(parse_arguments(["b", "--again", str(out)]).prompt, ["b"])

    def test_a_setting_of_a_file_that_cannot_be(self):
        path = self.folder / "c.safetensors"
        settings.save_codes(path, mx.zeros((1, 9, 4), mx.uint32), {"temp": "hot"})
        said = self.refused("--again", str(path), "-m", "tiny")
        self.assertIn(f"{path}: argument --temp: invalid float value: 'hot'", said)

    def test_did_you_mean(self):
        for wrong, right in (("--modle", "--model"), ("--Duration=3", "--duration")):
            self.assertIn(f"did you mean {right}?", self.refused("a", wrong))
        self.assertNotIn("did you mean", self.refused("a", "--zzzzzz"))

    def test_home_folder(self):
        with patch.dict(os.environ, HOME=str(self.folder)):
            args = parse_arguments(
                ["a", "--output=~/x.wav", "--save-codes=~/c.safetensors"]
            )
        self.assertEqual(args.output, str(self.folder / "x.wav"))
        self.assertEqual(args.save_codes, self.folder / "c.safetensors")

    def test_help_has_groups_and_examples(self):
        text = make_parser().format_help()
        for title, flags in FLAGS.items():
            self.assertIn(f"\n{title}:\n", text)
            for name in flags:
                self.assertIn("--" + name.replace("_", "-"), text)
        self.assertLess(text.index("--duration"), text.index("--tensor-parallel"))
        for line in arguments.EXAMPLES.splitlines()[1:]:
            self.assertIn(line, text)

    def test_version(self):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            with self.assertRaises(SystemExit) as ended:
                parse_arguments(["--version"])
        self.assertEqual(ended.exception.code, 0)
        self.assertRegex(
            told.getvalue(), r"^MusicGen for MLX: mlx [\d.]+, Python 3\.\d"
        )

    def test_play_and_a_pipe(self):
        self.assertIn("leave one of them out", self.refused("a", "--play", "-o", "-"))

    def test_an_output_that_nobody_named(self):
        said = self.refused("a", "-m", "tiny", "--mp3-bitrate", "128")
        self.assertIn("mp3_bitrate must go with an .mp3, got a .wav.", said)

    def test_limits_that_are_not_known_yet(self):
        said = self.refused("a", "-m", "tiny", "--extend-stride", "0")
        self.assertIn("must be from 1/50 s to less than a window, got 0.0.", said)


class TestWhatIsSaid(ScriptTest):
    def test_quiet(self):
        flags = ("drums", "-m", "tiny", "-d", "0.1", "-o", self.folder / "x.wav")
        self.assertEqual(self.run_script(*flags, "--quiet"), (0, "", ""))
        status, out, _ = self.run_script(*flags, "-s", "3", "--force")
        self.assertRegex(out, '^.*x.wav: 0.10 s of audio in .*, seed 3, "drums"\n$')

    def test_play(self):
        player = self.folder / "bin" / "ffplay"
        player.parent.mkdir()
        player.write_text('#!/bin/sh\necho "$@" >> "$0.log"\ncat > "$0.wav"\n')
        player.chmod(0o755)
        log, out = player.with_name("ffplay.log"), self.folder / "x.wav"
        flags = ("drums", "-m", "tiny", "-d", "0.1", "--play", "--force", "-o", out)
        with patch.dict(os.environ, PATH=f"{player.parent}:/usr/bin:/bin"):
            self.assertEqual(self.run_script(*flags, "--takes", "2")[0], 0)
            for n in (1, 2):
                self.assertIn(f"x-{n}.wav", log.read_text())
            log.unlink()
            self.assertEqual(self.run_script(*flags, "--stream")[0], 0)
            self.assertRegex(log.read_text(), "^[^\n]* -i -\n$")  # and not once more
        with patch.dict(os.environ, PATH=""):
            status, _, err = self.run_script(*flags)
        self.assertEqual(status, 1)
        self.assertIn("nothing that plays a .wav here. Install ffmpeg", err)
