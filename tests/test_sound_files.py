"""Sound files as people have them: other kinds, damaged, huge, or cut short."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, ROOT, Test, slow

import audio
import settings
from audio import count_samples, load_audio, read_sound, save_audio

FAKE = """\
#!{python}
import os, shutil, sys
words = sys.argv[1:]
open({log!r}, "a").write(os.path.basename(sys.argv[0]) + " " + " ".join(words) + "\\n")
if {fails}:
    sys.exit("it is\\nno sound either")
source = words[words.index("-i") + 1] if "-i" in words else words[-2]
shutil.copy({wav!r} or source, words[-1])
"""


def m4a() -> bytes:
    """The beginning of one, which libsndfile does not know."""
    return struct.pack(">I4s4sI", 16, b"ftyp", b"M4A ", 0) + bytes(range(256)) * 20


class SoundTest(Test):
    def setUp(self):
        super().setUp()
        self.bin, self.log = self.folder / "bin", self.folder / "log"
        self.bin.mkdir()
        self.usual = os.environ["PATH"]
        self.enterContext(patch.dict(os.environ, {"PATH": str(self.bin)}))
        self.noise = np.random.default_rng(0).normal(size=(44100, 2)) * 0.1

    def fake(self, name: str, wav: Path | str = "", fails: bool = False) -> None:
        """A program on PATH that copies a wav, or its source, to its last argument."""
        path = self.bin / name
        values = dict(wav=str(wav), fails=fails, log=str(self.log))
        path.write_text(FAKE.format(python=sys.executable, **values))
        path.chmod(0o755)

    def write(self, name: str, content: bytes | np.ndarray, **options) -> Path:
        path = self.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            soundfile.write(path, content, 44100, **options)
        return path


class TestKinds(SoundTest):
    def test_the_name_says_nothing(self):
        """Of each kind under each name: the content says what it is."""
        for kind, subtype in (
            ("WAV", "FLOAT"),
            ("FLAC", "PCM_24"),
            ("OGG", "VORBIS"),
            ("MP3", "MPEG_LAYER_III"),
            ("AIFF", "PCM_24"),
        ):
            right = self.write(f"x.{kind.lower()}", self.noise, subtype=subtype)
            want, rate = read_sound(right)
            for ending in ("raw", "wav", "mp3", "m4a", "gsm", "vox", "txt", ""):
                path = self.folder / f"other.{ending}"
                path.write_bytes(right.read_bytes())
                found, same = read_sound(path)
                self.assertEqual((same, rate), (44100, 44100))
                self.assertSame(mx.array(found), mx.array(want))

    def test_headerless_is_refused_in_one_line(self):
        """In every script that reads sound."""
        path, style = self.write("x.raw", bytes(9999)), REFERENCE / "style-audiocraft"
        for words in (
            ["audio.py", path, "y.wav"],
            ["loudness.py", path],
            ["melody.py", path],
            ["settings.py", path],
            ["demucs.py", path, "--model", REFERENCE / "htdemucs"],
            ["mert.py", path, "--model", style / "MERT-v1-95M"],
            ["encodec.py", path, "y.wav", "--model", style / "encodec_32khz"],
        ):
            done = subprocess.run(
                [sys.executable, ROOT / words[0], *words[1:]],
                capture_output=True,
                text=True,
                cwd=self.folder,
            )
            self.assertEqual(done.returncode, 1)
            self.assertRegex(
                done.stderr, rf"^{words[0]}: error: .*x.raw is not a readable .*\n$"
            )

    def test_other_kinds_go_through_another_program(self):
        wav = self.write("sound.wav", self.noise, subtype="FLOAT")
        path = self.write("-i memo.m4a", m4a())
        for names, used in (
            (["ffmpeg"], "ffmpeg"),
            (["ffmpeg", "afconvert"], "afconvert"),
        ):
            for name in names:
                self.fake(name, wav)
            with chdir(self.folder):
                found = load_audio(path.name, 44100, 2)
            self.assertClose(found, mx.array(self.noise), 1e-6)
            told = self.log.read_text().splitlines()[-1]
            self.assertIn(f" {path.resolve()}", told)  # so that no name is a flag
            self.assertEqual(count_samples(path, 22050), 22050)
            told = self.log.read_text().splitlines()[-1]
            self.assertTrue(told.startswith(used), told)

    def test_the_next_program_is_tried(self):
        self.fake("afconvert", fails=True)
        self.fake("ffmpeg", self.write("sound.wav", self.noise, subtype="FLOAT"))
        found = load_audio(self.write("x.webm", m4a()), 44100, 2)
        self.assertEqual(found.shape, (44100, 2))
        self.assertEqual(len(self.log.read_text().splitlines()), 2)

    def test_without_a_program_the_command_is_told(self):
        path = self.write("my memo.m4a", m4a())
        for platform, command in (
            ("linux", "ffmpeg -i '{0}.m4a' '{0}-converted.wav'$"),
            ("darwin", "afconvert -f WAVE -d LEI16 '{0}.m4a' '{0}-converted.wav'$"),
        ):
            with patch("sys.platform", platform):
                command = command.format(path.with_suffix(""))
                with self.assertRaisesRegex(ValueError, command):
                    load_audio(path, 44100, 2)

    def test_where_all_fail_the_reason_is_told(self):
        self.fake("ffmpeg", fails=True)
        with self.assertRaisesRegex(ValueError, "file: ffmpeg: no sound either$"):
            load_audio(self.write("x.m4a", m4a()), 44100, 2)

    def test_a_program_that_is_ended_says_nothing_of_the_file(self):
        self.fake("ffmpeg")
        tool = self.bin / "ffmpeg"
        for name in ("SIGINT", "SIGKILL"):
            end = f"import os, signal\nos.kill(os.getpid(), signal.{name})"
            tool.write_text(f"#!{sys.executable}\n{end}\n")
            told = f"ffmpeg was ended by {name}: run the same again"
            with self.assertRaisesRegex(OSError, told):
                load_audio(self.write("x.m4a", m4a()), 44100, 2)
            with self.assertRaisesRegex(OSError, told):
                save_audio(self.folder / "y.m4a", self.noise, 44100)

    def test_ctrl_c_loses_no_sound_that_is_made(self):
        """It comes to the program that writes, which may end in good order."""
        self.fake("ffmpeg")
        tool = self.bin / "ffmpeg"
        told = f"open({str(self.log)!r}, 'a').write(str(os.getsid(0)))\n"
        tool.write_text(tool.read_text() + told)
        save_audio(self.folder / "x.m4a", self.noise, 44100)
        session = self.log.read_text().splitlines()[-1]
        self.assertNotEqual(int(session), os.getsid(0))

    def test_ctrl_c_ends_reading(self):
        """Also where it is only noted, as while a take is made."""
        self.fake("ffmpeg")
        (self.bin / "ffmpeg").write_text(
            f"#!{sys.executable}\nimport os, signal, time\n"
            "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(30)\n"
        )
        noted = []
        before = signal.signal(signal.SIGINT, lambda *_: noted.append(1))
        self.addCleanup(signal.signal, signal.SIGINT, before)
        start, handler = time.monotonic(), signal.getsignal(signal.SIGINT)
        with self.assertRaises(KeyboardInterrupt):
            load_audio(self.write("x.m4a", m4a()), 44100, 2)
        self.assertLess(time.monotonic() - start, 20)
        self.assertEqual((noted, signal.getsignal(signal.SIGINT)), ([], handler))

    def test_m4a_is_written(self):
        path, comment = self.folder / "x.m4a", '{"musicgen": 1, "prompt": "a {b}"}'
        with self.assertRaisesRegex(ValueError, "needs afconvert or ffmpeg"):
            save_audio(path, self.noise, 44100, comment)
        self.fake("ffmpeg")
        save_audio(path, self.noise, 44100, comment)
        self.assertClose(load_audio(path, 44100, 2), mx.array(self.noise), 1e-6)
        told = self.log.read_text()
        self.assertIn(f"comment={comment} -c:a aac", told)
        self.fake("afconvert")
        with self.assertWarnsRegex(UserWarning, "afconvert writes no comment"):
            save_audio(path, self.noise, 44100, comment)
        self.assertIn("afconvert -f m4af -d aac", self.log.read_text())
        self.fake("afconvert", fails=True)
        self.fake("ffmpeg", fails=True)
        with self.assertRaisesRegex(OSError, "ffmpeg: no sound either"):
            save_audio(path, self.noise, 44100, comment)
        self.assertEqual([*self.folder.glob(".*")], [])

    def test_settings_of_an_m4a(self):
        """As ffmpeg writes them; and no damage of theirs is worse than none."""

        def box(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I4s", 8 + len(content), name) + content

        told = json.dumps({"musicgen": 1, "prompt": "a"}).encode()
        data = box(b"data", bytes([0, 0, 0, 1, 0, 0, 0, 0]) + told)
        items = box(b"\xa9too", box(b"data", bytes(8) + b"x")) + box(b"\xa9cmt", data)
        meta = box(b"meta", bytes(4) + box(b"hdlr", bytes(25)) + box(b"ilst", items))
        moov = box(b"moov", box(b"mvhd", bytes(99)) + box(b"udta", meta))
        whole = box(b"ftyp", b"M4A ") + box(b"mdat", bytes(999)) + moov
        path = self.write("x.m4a", whole)
        self.assertEqual(settings.read_settings(path), {"prompt": "a"})
        for end in range(8, len(whole), 7):
            path.write_bytes(whole[:end])
            with self.assertRaises(ValueError):
                settings.read_settings(path)
        random = np.random.default_rng(0)
        for _ in range(300):
            damaged = bytearray(whole)
            for place in random.integers(1000, len(whole), 3):
                damaged[place] = random.choice([0, 1, 7, 128, 255])
            path.write_bytes(damaged)
            try:
                settings.read_settings(path)
            except ValueError:
                pass

    def test_real_ffmpeg(self):
        """Where the machine has one."""
        os.environ["PATH"] = self.usual
        if not any(map(audio.shutil.which, audio.TOOLS)):
            self.skipTest("no afconvert and no ffmpeg")
        path = self.folder / "x.m4a"
        tone = 0.5 * np.sin(np.arange(44100) / 20)[:, None]
        save_audio(path, tone, 44100, '{"musicgen": 1}')
        if not audio.shutil.which("afconvert"):
            self.assertEqual(settings.read_settings(path), {})
        found = load_audio(path, 44100, 1)
        middle = slice(10_000, 30_000)
        self.assertClose(found[middle], mx.array(tone)[middle], 0.05)


class TestParts(SoundTest):
    def test_are_those_of_the_whole(self):
        for name, kind, rate in (
            ("x.wav", "FLOAT", 32000),
            ("x.flac", "PCM_24", 32000),
            ("x.mp3", "MPEG_LAYER_III", 32000),
            ("x.ogg", "VORBIS", 48000),
            ("y.wav", "FLOAT", 44100),
            ("z.wav", "PCM_24", 44099),
        ):
            path = self.write(name, self.noise, subtype=kind)
            for channels in (1, 2):
                whole = load_audio(path, rate, channels)
                self.assertEqual(count_samples(path, rate), len(whole))
                for start, count in (
                    (0, 99),
                    (1, 2000),
                    (3200, 50),
                    (15_001, 7),
                    (31_990, None),
                ):
                    part = load_audio(path, rate, channels, start, count)
                    end = None if count is None else start + count
                    self.assertClose(part, whole[start:end], 1e-6)
                part = load_audio(path, rate, channels, len(whole) - 2, 9)
                self.assertClose(part, whole[-2:], 1e-6)
            for start in (len(whole), 10**7):
                with self.assertRaisesRegex(ValueError, "ends before"):
                    load_audio(path, rate, 1, start)

    def test_no_more_is_read_than_needed(self):
        path, sizes = self.write("x.wav", np.tile(self.noise, (100, 1))), []
        read = soundfile.SoundFile.read

        def spy(file, frames=-1, **options):
            block = read(file, frames, **options)
            sizes.append(len(block))
            return block

        with patch.object(soundfile.SoundFile, "read", spy):
            with patch.object(audio, "resample", wraps=audio.resample) as resample:
                load_audio(path, 32000, 1, 50 * 32000, 6400)
        self.assertLess(sum(sizes), 0.22 * 44100)
        self.assertLess(len(resample.call_args.args[0]), 0.22 * 44100)

    def test_nan_elsewhere_does_no_harm(self):
        self.noise[40_000] = np.nan
        path = self.write("x.wav", self.noise, subtype="FLOAT")
        load_audio(path, 44100, 2, 0, 30_000)
        with self.assertRaisesRegex(ValueError, "holds NaN"):
            load_audio(path, 44100, 2, 0, 40_001)


class TestDamage(SoundTest):
    def damaged(self, name: str) -> tuple[Path, mx.array]:
        """A file with some of its bytes wrong, and what was in it."""
        path = self.write(name, np.tile(self.noise, (4, 1)))
        whole, content = load_audio(path, 44100, 2), bytearray(path.read_bytes())
        half = len(content) // 2
        content[half : half + 3000] = bytes(3000)
        path.write_bytes(content)
        return path, whole

    def test_what_came_before_it_is_kept(self):
        for name in ("x.flac", "x.mp3"):
            path, whole = self.damaged(name)
            with self.assertWarnsRegex(
                UserWarning, rf"{name} is damaged: it is read up to 1\.\d+ s only"
            ) as told:
                found = load_audio(path, 44100, 2)
            seconds = len(found) / 44100
            self.assertGreater(seconds, 1.8)  # of about 2
            self.assertIn(f"{seconds:.2f} s only", str(told.warning))
            self.assertSame(found, whole[: len(found)])
            part = load_audio(path, 44100, 2, 22050, 22050)  # of which nothing is said
            self.assertClose(part, whole[22050:44100], 1e-6)

    def test_of_all_is_an_error(self):
        path, _ = self.damaged("x.flac")
        content = bytearray(path.read_bytes())
        first = content.index(b"\xff\xf8")
        content[first:] = bytes(len(content) - first)
        path.write_bytes(content)
        with self.assertRaisesRegex(
            ValueError, "x.flac is not a readable sound file: "
        ):
            load_audio(path, 44100, 2)


class TestPromises(SoundTest):
    """Files whose headers promise more than there is."""

    def test_frames_that_are_not_there(self):
        """A FLAC's header can say what it likes."""
        path = self.write("x.flac", self.noise)
        content = bytearray(path.read_bytes())
        place = content.index(b"fLaC") + 8 + 10  # rate, channels, bits, samples
        (fields,) = struct.unpack_from(">Q", content, place)
        self.assertEqual(fields & (2**36 - 1), 44100)
        want = load_audio(path, 44100, 2)
        for promised in (44101, 2**20, 2**36 - 1, 0):  # 0: not known
            wrong = (fields >> 36 << 36) | promised
            struct.pack_into(">Q", content, place, wrong)
            path.write_bytes(content)
            self.assertSame(load_audio(path, 44100, 2), want)
            count_samples.__globals__["count_frames"].cache_clear()
            self.assertEqual(count_samples(path, 44100), 44100)
            self.assertSame(load_audio(path, 44100, 2, 0, 10**12), want)

    def test_an_mp3_of_terabytes(self):
        path = self.write("x.mp3", self.noise)
        content = bytearray(path.read_bytes())
        place = content.index(b"Xing") + 4
        (flags,) = struct.unpack_from(">I", content, place)
        self.assertTrue(flags & 1)
        struct.pack_into(">I", content, place + 4, 2**31)  # frames of 1152 samples
        path.write_bytes(content)
        self.assertGreater(soundfile.info(path).frames, 2**40)
        found = load_audio(path, 44100, 2)
        self.assertAlmostEqual(len(found), 44100, delta=3000)
        self.assertEqual(count_samples(path, 44100), len(found))

    @slow(6)
    def test_silence_without_end(self):
        """Hours of it in a small file: refused at a bound, and a part is no matter."""
        with soundfile.SoundFile(
            self.folder / "x.flac", "w", 8000, 1, subtype="PCM_16"
        ) as file:
            for _ in range(50):
                file.write(np.zeros((2_000_000, 1), np.int16))
        self.assertLess((self.folder / "x.flac").stat().st_size, 10**6)
        with patch.object(audio, "MOST", 10**7):
            with self.assertRaisesRegex(ValueError, "longer than the 21 minutes"):
                load_audio(self.folder / "x.flac", 8000, 1)
            with self.assertRaisesRegex(ValueError, "longer than the 5 minutes"):
                load_audio(self.folder / "x.flac", 32000, 1)
            with self.assertRaisesRegex(ValueError, "longer than the 5 minutes"):
                load_audio(self.folder / "x.flac", 8000, 4)
            part = load_audio(self.folder / "x.flac", 32000, 1, 32000, 99)
            self.assertEqual(part.shape, (99, 1))
            self.assertEqual(count_samples(self.folder / "x.flac", 4000), 5 * 10**7)

    def test_no_memory_error(self):
        path = self.write("x.wav", self.noise)
        with patch("numpy.concatenate", side_effect=MemoryError):
            with self.assertRaisesRegex(ValueError, "more than memory can hold"):
                load_audio(path, 32000, 1)

    def test_settings_are_read_without_the_samples(self):
        path = self.write("x.wav", np.tile(self.noise, (20, 1)))
        save_audio(path, np.tile(self.noise, (20, 1)), 44100, "{" + " " * 5000 + "}")
        self.assertEqual(settings.wav_comment(path).strip("{} "), "")
        told = json.dumps({"musicgen": 1, "prompt": "a" * 9000})
        save_audio(path, np.tile(self.noise, (20, 1)), 44100, told)
        path = path.rename(self.folder / "x.raw")
        with patch.object(Path, "read_bytes", side_effect=MemoryError):
            self.assertEqual(settings.read_settings(path)["prompt"], "a" * 9000)
