"""Names of models, and what is fetched of them."""

import os
import shutil
import subprocess
import sys
from contextlib import chdir
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, ROOT, Test
from huggingface_hub.errors import EntryNotFoundError

import checkpoints
import convert
import demucs
import encodec_files
import hub
import t5_files
from musicgen import MusicGen


class TestHub(Test):
    def test_what_is_fetched_of_the_transformers_layout(self):
        calls = []

        def snapshot(repo: str, allow_patterns: list[str]) -> str:
            calls.append(allow_patterns)
            return str(self.folder)

        with patch("hub.snapshot_download", snapshot):
            hub.fetch_transformers("a/b")
            (self.folder / "model-00001-of-00002.safetensors").touch()
            hub.fetch_transformers("a/b")
        common = ["config.json", "spiece.model", "preprocessor_config.json"]
        files = ["model*.safetensors", "model.safetensors.index.json"]
        wanted = [common + files, common + ["pytorch_model*"], common + files]
        self.assertEqual(calls, wanted)

    def test_short_name_does_not_fall_back(self):
        missing = EntryNotFoundError("no such file")
        for name, falls_back in (("small", False), ("someone/model", True)):
            with patch("hub.hf_hub_download", side_effect=missing):
                with patch("hub.fetch_transformers") as fetch:
                    if falls_back:
                        checkpoints.locate(name)
                    else:
                        with self.assertRaisesRegex(
                            OSError, "did not give.*--model tiny"
                        ):
                            checkpoints.locate(name)
            self.assertEqual(fetch.called, falls_back)

    def test_names_that_are_refused_before_the_hub_is_asked(self):
        path = self.folder / "file"
        path.touch()
        for name, pattern in (
            ("", "model must be one of"),
            (str(path), "model must be one of"),
            (f"{self.folder}/nothing", "model must be one of"),
            ("../no-such-folder", "model must be one of"),
            ("a/b/c", "model must be one of"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                checkpoints.locate(name)

    def test_short_names_come_before_folders(self):
        """`./small` is the folder."""
        self.enterContext(chdir(self.folder))
        names = [*hub.MODELS, "32khz", demucs.REPO]
        for name in names:
            shutil.copytree(REFERENCE / "mono-audiocraft", name)
        for name in {*hub.MODELS} - {"tiny"}:
            self.assertIsNone(hub.local(name))
            hub.check_name(f"./{name}")
            with patch("hub.hf_hub_download", return_value="cache/file") as fetch:
                self.assertEqual(str(checkpoints.locate(name)), "cache")
                self.assertEqual(fetch.call_args.args[0], hub.MODELS[name])
            self.assertEqual(str(checkpoints.locate(f"./{name}")), name)
        self.assertEqual(checkpoints.locate("tiny"), checkpoints.TINY)
        self.assertEqual(hub.MODELS.keys() - {"tiny"}, checkpoints.SHORT_NAMES)
        asked = AssertionError("the Hub is asked")
        with patch("encodec_files.hf_hub_download", side_effect=asked):
            with self.assertRaisesRegex(AssertionError, "the Hub is asked"):
                encodec_files.read("32khz")
            encodec_files.read("./32khz")
        with patch("demucs.snapshot_download", side_effect=asked):
            with self.assertRaisesRegex(AssertionError, "the Hub is asked"):
                demucs.locate(demucs.REPO)
            with self.assertRaisesRegex(OSError, "must hold one .safetensors file"):
                demucs.locate(f"./{demucs.REPO}")

    def test_names_of_one_model(self):
        self.enterContext(chdir(self.folder))
        for name in ("small", "mine"):
            (self.folder / name).mkdir()
        for name, other, same in (
            ("small", "facebook/musicgen-small", True),
            ("small", "./small", False),
            ("mine", f"{self.folder}/mine/", True),
            ("mine", "small", False),
            ("someone/model", "someone/model", True),
        ):
            self.assertEqual(hub.same_model(name, other), same, (name, other))
        for name, kind in (
            ("small", ""),
            ("tiny", ""),
            ("stereo-melody-large", "melody"),
            ("facebook/musicgen-style", "style"),
            ("someone/model", None),
            ("./small", None),
        ):
            self.assertEqual(hub.follows(name), kind, name)

    def test_unknown_name(self):
        with self.assertRaisesRegex(ValueError, "one of small, .*, style, tiny, a Hub"):
            MusicGen.from_pretrained("smal")

    def test_short_name_fetches_exactly_what_it_needs(self):
        folders = {
            "facebook/musicgen-stereo-small": REFERENCE / "stereo-audiocraft",
            "facebook/encodec_32khz": REFERENCE / "stereo-audiocraft/encodec_32khz",
            "google-t5/t5-base": REFERENCE / "stereo-audiocraft/t5-base",
        }
        fetched, cache = [], self.folder / "hub"

        def download(repo: str, name: str) -> str:
            fetched.append((repo, name))
            (cache / repo).mkdir(parents=True, exist_ok=True)
            return shutil.copy(folders[repo] / name, cache / repo / name)

        with patch("hub.hf_hub_download", download):
            with patch("t5_files.hf_hub_download", download):
                with patch("encodec_files.hf_hub_download", download):
                    MusicGen.from_pretrained("stereo-small")
        names = {
            "facebook/musicgen-stereo-small": hub.AUDIOCRAFT_FILES,
            "facebook/encodec_32khz": encodec_files.FILES,
            "google-t5/t5-base": t5_files.FILES,
        }
        wanted = [(repo, name) for repo, files in names.items() for name in files]
        self.assertEqual(sorted(fetched), sorted(wanted))

    def test_hub_id_from_the_cache_without_network(self):
        for name in ("mono-transformers", "mono-audiocraft"):
            repo = self.folder / "hub" / f"models--someone--{name}"
            snapshot = repo / "snapshots" / ("0" * 40)
            shutil.copytree(REFERENCE / name, snapshot)
            (repo / "refs").mkdir()
            (repo / "refs" / "main").write_text("0" * 40)
        ours = shutil.copytree(repo, repo.with_name("models--someone--ours"))
        shutil.rmtree(ours / "snapshots" / ("0" * 40))
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, ours / "snapshots" / ("0" * 40), mx.float16)
        script = (
            "import musicgen, sys; "
            "musicgen.MusicGen.from_pretrained(sys.argv[1]).generate('a', duration=0.1)"
        )
        offline = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.folder / "hub"),
        }

        def run(name: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-c", script, f"someone/{name}"]
            return subprocess.run(
                command, cwd=ROOT, env=offline, capture_output=True, text=True
            )

        for name in ("mono-transformers", "mono-audiocraft", "ours"):
            result = run(name)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.assertRegex(run("nothing").stderr, "To work offline, take --model tiny")
