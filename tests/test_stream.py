"""--stream, stopping and killing."""

import errno
import io
import os
import re
import shlex
import signal as signals
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ROOT, TELLING, ScriptTest, slow

import audio
import generate
import jobs
import settings
import stream
import wav_stream
from musicgen import MusicGen


class TestStreamedFile(ScriptTest):
    model = str(REFERENCE / "stereo-audiocraft")

    def command(self, output: str, duration: str = "1") -> list[str]:
        command = [sys.executable, str(ROOT / "generate.py"), "-p", "drums"]
        command += ["--model", self.model, "--seed", "3", "--duration", duration]
        return command + ["--stream", "--chunk", "0.1", "--output", output]

    def samples(self) -> np.ndarray:
        model = MusicGen.from_pretrained(self.model)
        audio = np.array(model.generate("drums", duration=1.0, seed=3)[0])
        return np.clip(audio, -1, 1)

    def test_file_and_pipe(self):
        path = self.folder / "out.wav"
        result = subprocess.run(self.command(str(path)), capture_output=True, text=True)
        self.assertRegex(
            result.stdout, r'^.*out.wav: 1.00 s of audio in .* seed 3, "drums"\n$'
        )
        audio, rate = soundfile.read(path)
        self.assertEqual(rate, 32000)
        self.assertClose(mx.array(audio), mx.array(self.samples()), 1e-4)
        piped = subprocess.run(self.command("-"), capture_output=True)
        sounds = (soundfile.read(f)[0] for f in (io.BytesIO(piped.stdout), path))
        self.assertSame(*sounds)
        again = self.folder / "again.wav"
        self.run_script("--again", path, "--stream", "--output", again)
        self.assertEqual(*(settings.read_settings(p) for p in (path, again)))
        self.assertClose(mx.array(soundfile.read(again)[0]), mx.array(audio), 1e-4)
        self.assertIn(b"standard output: 1.00 s of audio", piped.stderr)

    def test_closed_pipe_ends_the_run(self):
        process = subprocess.Popen(
            self.command("-", "1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.read(100)
        process.stdout.close()
        message = process.stderr.read().decode()
        process.stderr.close()
        self.assertEqual(process.wait(), 0, message)
        self.assertNotIn("Traceback", message)

    def test_pipes_and_redirections(self):
        command = " ".join(map(shlex.quote, self.command("-", "0.3")))
        for line, status in (
            (f"{command} | true; exit ${{PIPESTATUS[0]}}", 0),
            (f"{command} >&-", 1),
        ):
            result = subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True
            )
            self.assertEqual(result.returncode, status, result.stderr)
            self.assertNotIn("Traceback", result.stderr)
        path = self.folder / "both.bin"
        line = ["bash", "-c", f"(echo hello; {command}) >> {path}"]
        subprocess.run(line, check=True, stderr=subprocess.DEVNULL)
        head, _, rest = path.read_bytes().partition(b"\n")
        self.assertEqual((head, rest.count(b"RIFF")), (b"hello", 1))
        self.assertEqual(soundfile.info(io.BytesIO(rest)).frames, 9600)

    def kill(self, signal: str, wait: float) -> int:
        """Exit status of a run of 35 s that gets a signal on its way."""
        path, codes = self.folder / f"{signal}.wav", self.folder / signal
        command = self.command(str(path), "35")
        process = subprocess.Popen(
            [*command, "--save-codes", f"{codes}.safetensors"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not path.exists() or path.stat().st_size < 50_000:
            self.assertIsNone(process.poll())
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(getattr(signals, signal))
        return process.wait()

    @slow(12)
    def test_killed_and_resumed(self):
        model = MusicGen.from_pretrained(self.model)
        codes = model.generate_codes("drums", duration=35, seed=3)
        sound = np.clip(np.array(model.decode(codes)[0]), -1, 1)
        rng = np.random.default_rng()
        for signal, status in (("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)):
            self.assertEqual(self.kill(signal, rng.uniform(0, 0.5)), status)
            path, kept = (
                self.folder / f"{signal}{end}" for end in (".wav", ".safetensors")
            )
            made, _ = soundfile.read(path)
            self.assertGreater(len(made), 0.3 * 32000)
            self.assertLess(len(made), 20 * 32000)  # far from the first window's end
            self.assertLessEqual(4 * len(made), path.stat().st_size - 44)
            sure = len(made) - (4 * 640 if signal == "SIGINT" else 0)  # else an end
            steps = 4 / 32768  # dither, rounding, and full scale being 32766
            self.assertClose(mx.array(made[:sure]), mx.array(sound[:sure]), steps)
            frames = settings.load_codes(kept)[0].shape[1]
            self.assertGreaterEqual(640 * frames, len(made))
            longer, whole = self.folder / "x.safetensors", self.folder / "whole.wav"
            command = ["--resume", kept, "--duration", "35", "--save-codes", longer]
            command += ["--stream", "--chunk", "3", "--output", whole, "--force"]
            self.assertEqual(self.run_script(*command)[0], 0)
            self.assertSame(settings.load_codes(longer)[0], codes)
            resumed, _ = soundfile.read(whole)
            self.assertClose(mx.array(resumed), mx.array(sound), steps)
        # One that was killed while it wrote leaves a part, which the next writer removes.
        settings.save_codes(self.folder / "SIGKILL.safetensors", codes, {})
        left = [path.name for path in self.folder.iterdir() if "part" in path.name]
        self.assertEqual(left, [])

    def stopped(self, *more: str, times: int = 1) -> tuple[int, str]:
        """Exit status and messages of a run that is interrupted on its way."""
        command = self.command(str(self.folder / "stopped.wav"), "60")
        command = [
            part for part in command if part not in ("--stream", "--chunk", "0.1")
        ]
        command = [sys.executable, "-c", TELLING, *command[2:], *more]
        ends = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        process = subprocess.Popen(command, cwd=ROOT, **ends)
        told = b""
        while not re.search(rb"ing: (0\.[6-9]|[1-9])", told):
            more = process.stderr.read1(100)
            self.assertTrue(more, told)
            told += more
        for _ in range(times):
            process.send_signal(signals.SIGINT)
            time.sleep(0.005)  # less than it takes to decode and write
        told += process.stderr.read()
        process.stderr.close()
        return process.wait(), told.decode()

    def test_stop_and_keep(self):
        codes = self.folder / "codes.safetensors"
        status, told = self.stopped("--save-codes", str(codes))
        self.assertEqual(status, 130, told)
        self.assertIn(f"To go on: --resume {codes} --duration 60", told)
        kept, _ = settings.load_codes(codes)
        frames = soundfile.info(self.folder / "stopped.wav").frames
        self.assertEqual(frames, kept.shape[1] * 640)
        self.assertGreater(kept.shape[1], 20)
        model = MusicGen.from_pretrained(self.model)
        T = kept.shape[1]
        known = kept[:, : T - 2]
        duration = (T + 10) / 50
        whole = model.generate_codes("drums", duration=duration, seed=3)
        options = dict(duration=duration, seed=3, codes_prompt=known)
        self.assertSame(model.generate_codes("drums", **options), whole)
        self.assertSame(kept, whole[:, :T])

    def test_stop_of_a_stream(self):
        status, told = self.stopped("--stream", "--chunk", "0.1")
        self.assertEqual(status, 130, told)
        self.assertGreater(soundfile.info(self.folder / "stopped.wav").frames, 640)

    def test_stop_while_decoding_changes_nothing(self):
        decode, flags = jobs.decode, ["--output", self.folder / "x.wav"]

        def press(*arguments):
            os.kill(os.getpid(), signals.SIGINT)
            return decode(*arguments)

        with patch("jobs.decode", press):
            flags += ["-p", "drums", "--duration", "0.2", "--model", self.model]
            status, out, err = self.run_script(*flags)
        signals.signal(signals.SIGINT, signals.default_int_handler)
        self.assertEqual(status, 0, err)
        self.assertIn("x.wav: 0.20 s of audio", out)

    def test_stop_at_once(self):
        status, told = self.stopped(times=2)
        self.assertEqual(status, 130, told)
        self.assertNotIn("Traceback", told)
        self.assertEqual([p.name for p in self.folder.iterdir()], [])

    def test_header_is_right_after_every_write(self):
        path = self.folder / "x.wav"
        with open(path, "wb") as file:
            wav = wav_stream.WavStream(file, 2, 32000)
            for n in range(1, 4):
                self.assertEqual(soundfile.info(path).frames, 100 * (n - 1))
                wav.write(mx.full((100, 2), 0.25))
                self.assertEqual(soundfile.info(path).frames, 100 * n)
            with self.assertWarnsRegex(UserWarning, "clipped"):
                wav.write(mx.full((100, 2), 2.0))
        samples, _ = soundfile.read(path)
        self.assertEqual((samples[0, 0], round(samples[-1, 0], 3)), (0.25, 1.0))

    def test_a_file_that_is_there_goes_only_for_a_longer_one(self):
        """A run that ends early leaves it, and what was made beside it."""
        path, seconds = self.folder / "x.wav", lambda p: soundfile.info(p).duration
        audio.save_audio(path, mx.full((6400, 2), 0.1), 32000)
        before, pieces = path.read_bytes(), [mx.full((3200, 2), 0.2)] * 4
        lengths = []

        def watched(count: int):
            for piece in pieces[:count]:
                yield piece
                lengths.append(seconds(path))

        with self.assertWarnsRegex(
            UserWarning, "x.wav is longer, so it stays.*x-2.wav"
        ):
            written = stream.write(str(path), watched(1), 2, 32000, whole=lambda: False)
        self.assertEqual((written.seconds, Path(written.path).name), (0.1, "x-2.wav"))
        self.assertEqual((path.read_bytes(), seconds(written.path)), (before, 0.1))
        lengths.clear()
        stream.write(str(path), watched(4), 2, 32000, whole=lambda: False)
        for got, want in zip(lengths, (0.2, 0.2, 0.3, 0.4), strict=True):
            self.assertAlmostEqual(got, want)
        self.assertAlmostEqual(seconds(path), 0.4)
        stream.write(str(path), watched(1), 2, 32000)  # whole, as it was asked for
        self.assertAlmostEqual(seconds(path), 0.1)
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["x-2.wav", "x.wav"])

    def test_killed_while_it_overwrites(self):
        path = self.folder / "x.wav"
        audio.save_audio(path, mx.full((32000 * 60, 2), 0.1), 32000)
        before = path.read_bytes()
        for signal in (signals.SIGKILL, signals.SIGTERM):
            command = [*self.command(str(path), "100")[2:], "--force"]
            command = [sys.executable, "-c", TELLING, *command]
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
            told = b""
            while b"streaming: 1." not in told:
                self.assertIsNone(process.poll(), told)
                told += process.stderr.read1(100)
            process.send_signal(signal)
            process.communicate()
            self.assertEqual(path.read_bytes(), before)
        beside = self.folder / "x-2.wav"
        self.assertGreater(soundfile.info(beside).frames, 640)  # of the last one
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["x-2.wav", "x.wav"])

    def test_two_streams_of_one_name(self):
        path = self.folder / "x.wav"

        def pieces(other: bool):
            for _ in range(3):
                yield mx.full((3200, 1), 0.2)
                if other:
                    stream.write(str(path), pieces(False), 1, 32000)

        with self.assertRaisesRegex(OSError, "wrote .*x.wav, so this take is lost: "):
            stream.write(str(path), pieces(True), 1, 32000)
        self.assertAlmostEqual(soundfile.info(path).duration, 0.3)
        with self.assertWarnsRegex(UserWarning, "Another program wrote .*x-2.wav"):
            first = stream.write(str(path), pieces(False), 1, 32000, overwrite=False)
        self.assertEqual(Path(first.path).name, "x-2.wav")

    def test_a_take_that_is_lost_is_no_success(self):
        """One line, which says what to do, and exit status 1."""
        path, play = self.folder / "x.wav", generate.play_take

        def pieces(*arguments):
            for piece in play(*arguments):
                yield piece
                other = path.with_name("other.wav")
                audio.save_audio(other, mx.zeros((9, 2)), 32000)
                other.replace(path)

        command = ["-p", "drums", "--stream", "--model", self.model, "--output", path]
        with patch("generate.play_take", pieces):
            status, out, err = self.run_script(*command, "--duration", "0.2")
        self.assertEqual((status, out), (1, ""))
        lost = "error: Another program wrote .*x.wav, so this take is lost: run it "
        self.assertRegex(
            err, f"(?m)^generate.py: {lost}again with another --output.\n$"
        )

    def test_full_disk(self):
        error = OSError(errno.ENOSPC, "No space left on device")
        with patch("wav_stream.WavStream.write", side_effect=error):
            with self.assertRaisesRegex(OSError, "x.wav could not .* disk is full$"):
                pieces = [mx.ones((9, 1))]
                stream.write(str(self.folder / "x.wav"), pieces, 1, 32000)

    def test_pieces_of_what_is_not_streamed(self):
        command = ["-p", "a", "--model", self.model, "--chunk", "0.2"]
        status, _, err = self.run_script(*command)
        self.assertEqual(status, 2)
        self.assertRegex(err, "^generate.py: error: --chunk goes with --stream: .*\n$")

    def test_wrong_command_lines(self):
        for arguments, pattern in (
            (["--output", "a.flac"], "--stream writes .wav or -"),
            (["--takes", "2"], "--stream makes one take"),
            (["--chunk", "0"], "--chunk must"),
            (["--chunk", "nan"], "--chunk must"),
            (["--subtype", "float"], "--stream writes pcm_16"),
        ):
            command = ["-p", "a", "--stream", "--model", self.model, *arguments]
            status, _, err = self.run_script(*command)
            self.assertEqual(status, 2)
            self.assertRegex(err, f"^generate.py: error: .*{pattern}.*\n$")
