"""The folder of takes: what is listed, found, marked and removed."""

import json
import os
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import ScriptTest, Test

import takes
from audio import save_audio
from settings import save_codes, to_comment
from takes import Takes

RATE = 32000


class TakesTest(Test):
    def setUp(self):
        super().setUp()
        self.takes = Takes(self.folder)

    def write(self, name: str, made: float = 0.0, seconds=0.5, **settings) -> Path:
        """A sound file with settings, made at that time."""
        path = self.folder / name
        record = dict(prompt="slow bell", seed=7, model="tiny") | settings
        audio = np.zeros((int(seconds * RATE), 1), np.float32)
        save_audio(path, audio, RATE, to_comment(record))
        os.utime(path, (made, made))
        return path

    def codes(self, name: str) -> None:
        import mlx.core as mx

        save_codes(self.folder / name, mx.zeros((1, 3, 4), mx.uint32), dict(seed=7))

    def ids(self) -> list[str]:
        return [take.id for take in self.takes.every()]


class TestList(TakesTest):
    def test_newest_first(self):
        for i, name in enumerate(("b.wav", "a.flac", "c.ogg", "d.mp3")):
            self.write(name, made=i)
        self.assertEqual(self.ids(), ["d", "c", "a", "b"])

    def test_what_is_told(self):
        self.write("a.wav", made=5.0)
        self.codes("a.safetensors")
        (self.folder / "a.stems").mkdir()
        (self.folder / "a.stems" / "drums.wav").touch()
        told = self.takes.find("a").as_json()
        settings = dict(prompt="slow bell", seed=7, model="tiny")
        want = dict(id="a", seconds=0.5, sampling_rate=RATE, channels=1, made=5.0)
        want |= dict(starred=False, codes=True, suffix=".wav", stems=["drums"])
        self.assertEqual(told, want | settings | dict(settings=settings))
        json.dumps(told, allow_nan=False)

    def test_numbers_that_json_lacks_are_none(self):
        self.write("a.wav", score=-float("inf"))
        self.assertIsNone(self.takes.find("a").as_json()["settings"]["score"])

    def test_no_folder_yet(self):
        self.assertEqual(Takes(self.folder / "none").every(), [])

    def test_only_takes(self):
        """Other sounds, damaged ones, hidden ones, folders and what is no sound."""
        save_audio(self.folder / "other.wav", np.zeros((99, 1)), RATE)
        (self.folder / "damaged.wav").write_bytes(b"RIFF nothing")
        (self.folder / "empty.wav").touch()
        (self.folder / "folder.wav").mkdir()
        (self.folder / "starred.json").write_text("{damaged")
        self.write(".hidden.part.wav")
        self.write("a.wav")
        os.symlink(self.folder / "gone.wav", self.folder / "link.wav")
        self.assertEqual(self.ids(), ["a"])

    def test_pipes_and_links_to_other_places(self):
        """A pipe is never opened, which would wait for ever; what lies elsewhere is not
        taken for what belongs to a take."""
        self.write("a.wav")
        save_audio(self.folder / "b.wav", np.zeros((99, 1)), RATE)
        secret = self.folder / "other" / "secret"
        (self.folder / "a.stems").mkdir()
        secret.parent.mkdir()
        secret.write_text("secret")
        os.mkfifo(self.folder / "b.safetensors")
        os.mkfifo(self.folder / "a.stems" / "pipe.wav")
        (self.folder / "a.stems" / "folder.wav").mkdir()
        os.symlink(secret, self.folder / "a.stems" / "link.wav")
        os.symlink(secret, self.folder / "a.safetensors")
        with patch.object(takes, "safe_open", side_effect=AssertionError):
            found = self.takes.every()
        told = [(take.id, take.codes, take.stems) for take in found]
        self.assertEqual(told, [("a", None, {})])

    def test_a_take_that_is_a_link(self):
        """Where its codes lie beside it, these are its own."""
        (self.folder / "other").mkdir()
        for name in ("a.wav", "a.safetensors"):
            self.write("a.wav") if name == "a.wav" else self.codes(name)
            (self.folder / name).rename(self.folder / "other" / name)
            os.symlink(self.folder / "other" / name, self.folder / name)
        self.assertIsNotNone(self.takes.find("a").codes)

    def test_names_that_are_no_text(self):
        """Of other systems: no address could hold them."""
        self.write("a.wav")
        name = os.fsencode(self.folder) + b"/b\xff.wav"
        try:
            os.link(self.folder / "a.wav", name)
        except OSError:
            self.skipTest("this file system takes no such names")
        self.assertEqual(self.ids(), ["a"])

    def test_settings_beside_a_sound_that_has_none(self):
        """As of an .m4a that afconvert wrote."""
        save_audio(self.folder / "a.wav", np.zeros((99, 1)), RATE)
        self.codes("a.safetensors")
        self.assertEqual(self.takes.find("a").settings, dict(seed=7))

    def test_one_stem_two_suffixes(self):
        self.write("a.flac", made=2), self.write("a.wav", made=1)
        self.assertEqual(self.ids(), ["a.flac", "a"])
        self.assertEqual(self.takes.find("a.flac").path.name, "a.flac")

    def test_a_file_is_read_again_when_it_changes(self):
        self.write("a.wav", made=1)
        with patch.object(takes, "read", wraps=takes.read) as read:
            self.takes.every(), self.takes.every()
            self.assertEqual(read.call_count, 1)
            self.write("a.wav", made=2, prompt="fast saw")
            self.assertEqual(self.takes.find("a").settings["prompt"], "fast saw")
            self.assertEqual(read.call_count, 2)
        (self.folder / "a.wav").unlink()
        self.assertEqual((self.ids(), self.takes._cache), ([], {}))

    def test_many_threads(self):
        for i in range(20):
            self.write(f"{i}.wav", seconds=0.01)
        counts = []

        def work(i):
            self.takes.star(str(i), True)
            counts.append(len(self.takes.every()))

        threads = [threading.Thread(target=work, args=[i]) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(counts, [20] * 20)
        self.assertTrue(all(take.starred for take in self.takes.every()))


class TestFind(TakesTest):
    def test_an_id_is_no_path(self):
        """It is looked up in the listing; nothing outside of the folder is found."""
        self.write("a.wav")
        inner = Takes(self.folder / "inner")
        inner.folder.mkdir()
        for id in ("../a", "..", ".", "", "a.wav", "/etc/passwd", "inner/../a", "a\0"):
            for folder in (self.takes, inner):
                for ask in (
                    folder.find,
                    folder.delete,
                    lambda id: folder.star(id, True),
                ):
                    with self.subTest(id), self.assertRaises(KeyError):
                        ask(id)
        self.assertEqual(self.ids(), ["a"])

    def test_by_file(self):
        path = self.write("a.wav")
        self.assertEqual(self.takes.of(path).id, "a")
        with self.assertRaises(KeyError):
            self.takes.of("b.wav")


class TestFree(TakesTest):
    def test_a_name_for_sound_codes_and_stems(self):
        free = lambda: self.takes.free("Slow bell!", 7).name  # noqa: E731
        self.assertEqual(free(), "slow-bell-7.wav")
        for i, name in enumerate(("slow-bell-7.flac", "slow-bell-7-2.safetensors")):
            (self.folder / name).touch()
            self.assertEqual(free(), f"slow-bell-7-{i + 2}.wav")
        (self.folder / "slow-bell-7-3.stems").mkdir()
        self.assertEqual(free(), "slow-bell-7-4.wav")

    def test_makes_the_folder(self):
        path = Takes(self.folder / "b" / "c").free("", 1)
        self.assertEqual((path.name, path.parent.is_dir()), ("music-1.wav", True))


class TestDelete(TakesTest):
    def test_with_all_that_is_its_own(self):
        self.write("a.wav"), self.codes("a.safetensors")
        (self.folder / "a.stems").mkdir()
        (self.folder / "a.stems" / "drums.wav").touch()
        self.write("b.wav"), self.codes("b.safetensors")
        self.takes.delete("a")
        names = sorted(path.name for path in self.folder.iterdir())
        self.assertEqual(names, ["b.safetensors", "b.wav"])

    def test_codes_that_another_sound_shares_stay(self):
        self.write("a.wav", made=1), self.write("a.flac", made=2)
        self.codes("a.safetensors")
        self.takes.delete("a.flac")
        self.assertTrue(self.takes.find("a").codes)


class TestStars(TakesTest):
    def test_last(self):
        self.write("a.wav"), self.write("b.wav")
        self.assertTrue(self.takes.star("a", True).starred)
        again = Takes(self.folder)
        self.assertEqual(
            {t.id: t.starred for t in again.every()}, dict(a=True, b=False)
        )
        self.assertFalse(again.star("a", False).starred)
        self.assertEqual(json.loads((self.folder / "starred.json").read_text()), [])

    def test_a_damaged_list_is_none(self):
        self.write("a.wav")
        for text in ("[1, null]", '"a.wav"', "{", "\0"):
            (self.folder / "starred.json").write_text(text)
            self.assertFalse(self.takes.find("a").starred)


class TestOfGenerate(ScriptTest):
    def test_takes_of_the_command_line(self):
        where = ["--output", self.folder / "mine.flac"]
        where += ["--save-codes", self.folder / "mine.safetensors"]
        short = ["--model", "tiny", "--duration", "0.5", "--seed", "3"]
        self.assertEqual(self.run_script("slow bell", *where, *short)[0], 0)
        take = Takes(self.folder).find("mine")
        told = (take.settings["prompt"], take.settings["seed"], take.seconds)
        self.assertEqual(told, ("slow bell", 3, 0.5))
        self.assertEqual(take.codes, self.folder / "mine.safetensors")
