"""Files to write: their names, what is never overwritten, and two writers of one."""

import errno
import os
import subprocess
import sys
import threading
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ROOT, ScriptTest, Test, slow

import audio
import outputs
import settings


def tone(value: float, seconds: float = 1.0) -> np.ndarray:
    return np.full((int(32000 * seconds), 1), value, np.float32)


class TestNames(Test):
    def test_of_prompt_and_seed(self):
        for prompt, name in (
            ("Happy Rock!", "happy-rock-7.wav"),
            ("8-bit  arcade / lead", "8-bit-arcade-lead-7.wav"),
            ("", "music-7.wav"),
            ("../..", "music-7.wav"),
            ("-rf .hidden", "rf-hidden-7.wav"),
            ("très вуснае 音楽", "très-вуснае-音楽-7.wav"),
            ("word " * 20, "word-word-word-word-word-word-word-word-7.wav"),
            ("a" * 300, f"{'a' * 40}-7.wav"),
        ):
            self.assertEqual(outputs.default_name(prompt, 7), name)

    def test_free(self):
        path = self.folder / "x.wav"
        for name in ("x.wav", "x-2.wav", "x-3.wav"):
            self.assertEqual(outputs.free(path), self.folder / name)
            (self.folder / name).write_bytes(b"sound")
        (self.folder / "y.wav").touch()  # is nothing that could be lost
        self.assertEqual(outputs.free(self.folder / "y.wav").name, "y.wav")

    def test_names_of_one_file(self):
        path, link, hard = (self.folder / name for name in ("x", "link", "hard"))
        path.write_bytes(b"sound")
        link.symlink_to(path)
        os.link(path, hard)
        with chdir(self.folder):
            for other in (path, link, hard, "x", f"../{self.folder.name}/x"):
                self.assertTrue(outputs.same_file(path, other), other)
        for other in ("y", "X", "x\0"):
            self.assertFalse(outputs.same_file(path, self.folder / other))

    def test_file_systems_that_ignore_case(self):
        self.assertFalse(outputs.ignores_case(str(self.folder)))
        with patch("outputs.os.path.exists", return_value=True):
            other = self.folder / "other"
            other.mkdir()
            self.assertTrue(outputs.ignores_case(str(other)))
        names = [self.folder / name for name in ("Über.wav", "u\u0308BER.wav")]
        self.assertFalse(outputs.same_file(*names))
        with patch("outputs.ignores_case", return_value=True):
            self.assertTrue(outputs.same_file(*names))


class TestStandardOutput(Test):
    def test_a_reader_that_has_had_enough(self):
        """As `head` has. In every script that prints what it did."""
        sound = tone(0.1) * np.sin(np.arange(32000) / 20)[:, None]
        audio.save_audio(self.folder / "in.wav", sound, 32000)
        model = str(REFERENCE / "encodec_32khz")
        for words in (
            ["melody.py", "in.wav"],
            ["audio.py", "in.wav", "out.wav"],
            ["loudness.py", "in.wav"],
            ["encodec.py", "in.wav", "code.wav", "--model", model],
            ["demucs.py", "in.wav", "--model", str(REFERENCE / "htdemucs")],
            ["synth.py", "--listen", "2"],
        ):
            reader, writer = os.pipe()
            os.close(reader)
            command = [sys.executable, str(ROOT / words[0]), *words[1:]]
            options = dict(stdout=writer, stderr=subprocess.PIPE, text=True)
            run = subprocess.run(command, cwd=self.folder, **options)
            os.close(writer)
            with self.subTest(words[0]):
                errors = [x for x in run.stderr.splitlines() if "warning:" not in x]
                self.assertEqual((run.returncode, errors), (0, []))
        for path in ("out.wav", "code.wav", "stems/vocals.wav", "clips/001.wav"):
            self.assertTrue((self.folder / path).exists(), path)


class TestCommands(ScriptTest):
    model = str(REFERENCE / "stereo-audiocraft")
    flags = ["-p", "Happy rock", "--seed", "7", "--duration", "0.1", "--model", model]

    def setUp(self):
        super().setUp()
        self.enterContext(chdir(self.folder))

    def found(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def test_default_names(self):
        for _ in range(2):
            status, out, err = self.run_script(*self.flags)
            self.assertEqual(status, 0, err)
        self.assertRegex(out, "^happy-rock-7-2.wav: 0.10 s")
        self.assertEqual(self.found(), ["happy-rock-7-2.wav", "happy-rock-7.wav"])
        self.run_script(*self.flags, "-p", "calm", "--stream", "--takes", "1")
        self.run_script(*self.flags, "--stream")
        self.assertIn("happy-rock-7-3.wav", self.found())

    def test_what_is_there_is_refused(self):
        path, codes = Path("x.wav"), Path("x.safetensors")
        for more in ([], ["--stream"], ["--takes", "2"]):
            for there in (path, Path("x-2.wav"), codes):
                there.write_bytes(b"of somebody")
            keep = ["--save-codes", codes] * (more != ["--takes", "2"])
            for flags in (["--output", path], ["--output", "y.wav", *keep]):
                if flags == ["--output", "y.wav"]:
                    continue
                status, out, err = self.run_script(*self.flags, *flags, *more)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, "^generate.py: error: x.* is there already.*\n$")
            for there in (path, Path("x-2.wav"), codes):
                self.assertEqual(there.read_bytes(), b"of somebody")
            flags = ["--output", path, "--force", *keep]
            status, _, err = self.run_script(*self.flags, *flags, *more)
            self.assertEqual(status, 0, err)
            written = (path, codes) if keep else (Path("x-2.wav"),)
            for there in written:
                self.assertGreater(there.stat().st_size, 99)

    def test_an_empty_file_is_nothing(self):
        Path("x.wav").touch()
        self.assertEqual(self.run_script(*self.flags, "--output", "x.wav")[0], 0)

    def test_what_is_read_is_never_written(self):
        model = self.copy("stereo-audiocraft")
        sound, codes = Path("song.wav"), Path("c.safetensors")
        audio.save_audio(sound, tone(0.1, 0.05), 32000)
        self.run_script(*self.flags, "--output", "x.wav", "--save-codes", codes)
        Path("link.wav").symlink_to(sound)
        os.link(codes, "hard.safetensors")
        weights = model / "weights.safetensors"
        weights.write_bytes(b"weights")
        kept = {p: p.read_bytes() for p in (sound, codes, weights, Path("x.wav"))}
        own, more = ["--audio-prompt", sound], ["--duration", "0.2"]
        for flags in (
            [*self.flags, *own, "--output", sound],
            [*self.flags, *own, "--output", "link.wav"],
            [*self.flags, *own, "--output", "link.wav", "--stream"],
            [*self.flags, "--adapter", codes, "--save-codes", codes],
            ["--resume", codes, *more, "--save-codes", "hard.safetensors"],
            ["--again", "x.wav", "--output", "x.wav"],
            [*self.flags, "--model", model, "--save-codes", weights],
        ):
            status, _, err = self.run_script(*flags, "--force")
            self.assertEqual(status, 2, err)
            self.assertRegex(err, "^generate.py: error: .* must not be written.*\n$")
        for path, content in kept.items():
            self.assertEqual(path.read_bytes(), content)

    def test_input_that_differs_in_case(self):
        """On Linux these are two files, on most Macs one."""
        audio.save_audio("Song.wav", tone(0.1, 0.05), 32000)
        flags = [*self.flags, "--audio-prompt", "Song.wav", "--output", "song.WAV"]
        with patch("outputs.ignores_case", return_value=True):
            self.assertEqual(self.run_script(*flags)[0], 2)
        self.assertEqual(self.run_script(*flags)[0], 0)

    def test_a_file_that_another_program_wrote_meanwhile(self):
        def decode(model, codes):
            Path("x.wav").write_bytes(b"of another")
            return mx.zeros((1, 3200, 2))

        with patch("musicgen.MusicGen.decode", decode):
            status, out, err = self.run_script(*self.flags, "--output", "x.wav")
        self.assertEqual(status, 0)
        self.assertRegex(out, "^x-2.wav: 0.10 s")
        self.assertIn("Another program wrote x.wav", err)
        self.assertEqual(Path("x.wav").read_bytes(), b"of another")
        self.assertEqual(self.found(), ["x-2.wav", "x.wav"])


WRITER = """
import sys, numpy as np, mlx.core as mx
import audio, settings
value, path = float(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    audio.save_audio(f"{path}.mp3", np.full((320000, 1), value, np.float32), 32000)
    settings.save_arrays(f"{path}.safetensors", {"a": mx.full((500_000,), value)}, {})
"""


class TestWriters(Test):
    def write(self, value: float, times: int) -> subprocess.Popen:
        arguments = [str(value), str(self.folder / "x"), str(times)]
        command = [sys.executable, "-c", WRITER, *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=ROOT, **pipes)

    @slow(4)
    def test_two_of_one_name(self):
        """Both end well, and under the name there is always one whole take."""
        processes = [self.write(value, 8) for value in (0.25, -0.5)]
        mixed, reads = [], 0
        while any(process.poll() is None for process in processes):
            try:
                array = np.array(mx.load(str(self.folder / "x.safetensors"))["a"])
                sound, _ = soundfile.read(self.folder / "x.mp3")
            except (OSError, RuntimeError):
                self.assertFalse(reads, "a file is gone, or not whole")
                continue
            reads += 1
            middle = sound[5000:-5000]
            if len({*array.tolist()}) != 1 or np.ptp(middle) > 0.01:
                mixed.append(reads)
            self.assertEqual((len(array), len(sound)), (500_000, 320_000))
        for process in processes:
            told = process.communicate()
            self.assertEqual((process.returncode, told[1]), (0, ""))
        self.assertGreater(reads, 3)
        self.assertEqual(mixed, [])
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["x.mp3", "x.safetensors"])

    def test_what_a_killed_writer_left_goes(self):
        process = self.write(0.25, 99)
        process.stdout.readline()
        while not [*self.folder.glob(".*.part*")]:
            self.assertIsNone(process.poll())
        process.kill()
        process.communicate()
        audio.save_audio(self.folder / "x.mp3", tone(0.25), 32000)
        settings.save_arrays(self.folder / "x.safetensors", {"a": mx.ones(1)}, {})
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["x.mp3", "x.safetensors"])

    def test_what_is_being_written_stays(self):
        path = self.folder / "x.wav"
        with outputs.whole_file(path) as part:
            audio.save_audio(path, tone(0.25), 32000)
            self.assertTrue(part.exists())
            part.write_bytes(b"the last one wins")
        self.assertEqual(path.read_bytes(), b"the last one wins")
        self.assertEqual([*self.folder.iterdir()], [path])

    def test_threads(self):
        path, errors = self.folder / "x.flac", []

        def write(value: float) -> None:
            try:
                for _ in range(20):
                    audio.save_audio(path, tone(value), 32000)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(v,)) for v in (0.1, 0.2, 0.3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((errors, [*self.folder.iterdir()]), ([], [path]))
        self.assertLess(np.ptp(soundfile.read(path)[0]), 0.001)

    def test_only_new(self):
        path = self.folder / "x.wav"
        audio.save_audio(path, tone(0.1), 32000, overwrite=False)
        for links in (os.link, OSError("no links here")):
            with patch("outputs.os.link", side_effect=links):
                with self.assertRaisesRegex(FileExistsError, "is there already"):
                    audio.save_audio(path, tone(0.2), 32000, overwrite=False)
        self.assertAlmostEqual(soundfile.read(path)[0][0], 0.1, 3)
        self.assertEqual([*self.folder.iterdir()], [path])

    def test_what_standard_output_cannot_take(self):
        """Is spelled out, or lost: what was made is there."""
        program = "import sys; from outputs import print_out; print_out(sys.argv[1])"
        command = [sys.executable, "-c", program, "na\u00efve \u97f3"]
        for encoding, told in (
            ("ascii", r"na\xefve \u97f3"),
            ("latin-1", "na\u00efve \\u97f3"),
        ):
            env = os.environ | {"PYTHONIOENCODING": encoding}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertEqual(done.stdout.decode(encoding), told + "\n")
        if Path("/dev/full").exists():
            with open("/dev/full", "w") as full:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE
                )
            self.assertEqual((done.returncode, done.stderr), (0, b""))

    def test_a_full_disk_says_so(self):
        """As do others: a limit of 200,000 bytes a file is one."""
        full = OSError(errno.ENOSPC, "No space left on device")
        with patch("outputs.os.write", side_effect=full):
            with patch(
                "audio.write_samples", side_effect=RuntimeError("System error.")
            ):
                with self.assertRaisesRegex(
                    OSError, "x.wav could not.*the disk is full"
                ):
                    audio.save_audio(self.folder / "x.wav", tone(0.1), 32000)
            with patch("mlx.core.save_safetensors", side_effect=RuntimeError("write")):
                with self.assertRaisesRegex(OSError, "x.safe.*the disk is full"):
                    settings.save_arrays(self.folder / "x.safetensors", {}, {})
        program = (
            "import resource as r, numpy as np, sys, audio, settings, mlx.core as mx\n"
            "r.setrlimit(r.RLIMIT_FSIZE, (200_000, r.RLIM_INFINITY))\n"
            "for end in ('.wav', '.flac', '.ogg', '.mp3', '.safetensors'):\n"
            "    sound = np.random.default_rng(0).normal(size=(10**6, 1)) / 9\n"
            "    try:\n"
            "        if end == '.safetensors':\n"
            "            settings.save_arrays(sys.argv[1] + end, {'a': mx.array(sound)}, {})\n"
            "        audio.save_audio(sys.argv[1] + end, sound, 32000)\n"
            "    except OSError as error:\n"
            "        print(error)\n"
        )
        command = [sys.executable, "-c", program, str(self.folder / "x")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = result.stdout.splitlines()
        self.assertEqual(len(lines), 5, result.stderr)
        for line in lines:
            self.assertRegex(line, r"x\.\w+ could not be written: File too large$")
        self.assertEqual([*self.folder.iterdir()], [])
