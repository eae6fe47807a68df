"""Names of models, and what is fetched of them."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import chdir
from unittest.mock import patch

import mlx.core as mx
from common import REFERENCE, ROOT, Test
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import checkpoints
import convert
import demucs
import encodec_files
import hub
import melody
import mert
import t5_files
from musicgen import MusicGen


class TestHub(Test):
    def test_what_is_fetched_of_the_transformers_layout(self):
        calls = []

        def snapshot(repo: str, allow_patterns: list[str], **options) -> str:
            calls.append(allow_patterns)
            return str(self.folder)

        with patch("huggingface_hub.snapshot_download", snapshot):
            hub.fetch_transformers("a/b")
            (self.folder / "model-00001-of-00002.safetensors").touch()
            hub.fetch_transformers("a/b")
        common = ["config.json", "spiece.model", "tokenizer.json"]
        common += ["preprocessor_config.json", "processor_config.json"]
        common += ["adapter_config.json"]
        files = ["model*.safetensors", "model.safetensors.index.json"]
        wanted = [common + files, common + ["pytorch_model*"], common + files]
        self.assertEqual(calls, wanted)

    def test_short_name_does_not_fall_back(self):
        missing = EntryNotFoundError("no such file")
        for name, falls_back in (("small", False), ("someone/model", True)):
            with patch("huggingface_hub.hf_hub_download", side_effect=missing):
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
            (str(path), "^.*/file is no folder.$"),
            (f"{self.folder}/nothing", "^There is no folder .*/nothing.$"),
            ("../no-such-folder", "^There is no folder ../no-such-folder.$"),
            ("~/no-such-folder", "^There is no folder ~/no-such-folder.$"),
            ("a/b/c", "^There is no folder a/b/c.$"),
            ("small/", "^There is no folder small/.$"),
            ("small:1", "model must be one of"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                checkpoints.locate(name)

    def test_short_names_come_before_folders(self):
        """`./small` is the folder."""
        self.enterContext(chdir(self.folder))
        names = [*hub.MODELS, "32khz", demucs.REPO]
        for name in names:
            shutil.copytree(REFERENCE / "mono-audiocraft", name)
        for name in {*hub.MODELS} - {*hub.BESIDE}:
            self.assertIsNone(hub.local(name))
            hub.check_name(f"./{name}")
            with patch(
                "huggingface_hub.hf_hub_download", return_value="cache/file"
            ) as fetch:
                self.assertEqual(str(checkpoints.locate(name)), "cache")
                self.assertEqual(fetch.call_args.args[0], hub.MODELS[name])
            self.assertEqual(str(checkpoints.locate(f"./{name}")), name)
        self.assertEqual(checkpoints.locate("tiny"), checkpoints.TINY)
        self.assertEqual(hub.MODELS.keys() - {*hub.BESIDE}, checkpoints.SHORT_NAMES)
        asked = AssertionError("the Hub is asked")
        with patch("huggingface_hub.hf_hub_download", side_effect=asked):
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
            ("tiny-magnet", ""),
            ("facebook/audiogen-medium", ""),
            ("stereo-melody-large", "melody"),
            ("facebook/musicgen-style", "style"),
            ("someone/model", None),
            ("./small", None),
        ):
            self.assertEqual(hub.follows(name), kind, name)

    def test_unknown_name(self):
        with self.assertRaisesRegex(
            ValueError, "one of small, .*, style, .*, tiny, tiny-magnet, a Hub"
        ):
            MusicGen.from_pretrained("nobody knows this")

    def test_a_misspelt_name_gets_a_question(self):
        for name, meant in (
            ("smal", "small"),
            ("Stereo_Melody", "stereo-melody"),
            ("musicgen-medium", "medium"),
            ("audiogen", "audiogen-medium"),
            ("nobody knows this", None),
            (f"{self.folder}/no-such-folder", None),
        ):
            with self.assertRaises(ValueError) as caught:
                MusicGen.from_pretrained(name)
            question = str(caught.exception).partition("'.")[2]
            self.assertEqual(question, f" Did you mean {meant}?" if meant else "")

    def test_a_path_from_home(self):
        codec = REFERENCE / "stereo-audiocraft/encodec_32khz"
        with patch.dict(os.environ, HOME=str(ROOT)):
            hub.check_name("~/tiny")
            self.assertTrue(hub.same_model("~/tiny", "tiny"))
            MusicGen.from_pretrained("~/tiny")
        with patch.dict(os.environ, HOME=str(codec.parent)):
            encodec_files.read("~/encodec_32khz")
            encodec_files.read("~")  # audiocraft's file names the folder beside it
            t5_files.read("~/t5-base")
        (self.folder / "stems").mkdir()
        for name in ("stems/x.safetensors", *mert.FILES):
            (self.folder / name).touch()
        with patch.dict(os.environ, HOME=str(self.folder)):
            self.assertTrue(demucs.locate("~/stems").is_file())
            self.assertTrue(mert.locate("~")[1].is_file())

    def test_short_name_fetches_exactly_what_it_needs(self):
        folders = {
            "facebook/musicgen-stereo-small": REFERENCE / "stereo-audiocraft",
            "facebook/encodec_32khz": REFERENCE / "stereo-audiocraft/encodec_32khz",
            "google-t5/t5-base": REFERENCE / "stereo-audiocraft/t5-base",
        }
        fetched, cache = [], self.folder / "hub"

        def download(repo: str, name: str, **options) -> str:
            fetched.append((repo, name))
            (cache / repo).mkdir(parents=True, exist_ok=True)
            return shutil.copy(folders[repo] / name, cache / repo / name)

        with patch("huggingface_hub.hf_hub_download", download):
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


class TestNoNetwork(Test):
    """With a server of this machine as the Hub, or none."""

    def setUp(self):
        super().setUp()
        hub.answers.cache_clear()
        self.addCleanup(hub.answers.cache_clear)
        proxies = ("http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE")
        names = {name for proxy in proxies for name in (proxy, proxy.upper())}
        self.enterContext(patch.dict(os.environ))
        for name in names:
            os.environ.pop(name, None)
        self.enterContext(patch.object(constants, "HF_HUB_OFFLINE", False))
        self.server = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        self.port = self.server.getsockname()[1]
        self.set_endpoint(f"http://localhost:{self.port}")

    def set_endpoint(self, url: str) -> None:
        self.enterContext(patch.object(constants, "ENDPOINT", url))

    def test_a_server_that_answers(self):
        self.assertEqual(hub.no_network(), "")

    def test_one_look_serves_the_parts_of_a_model(self):
        with patch("hub.connects", return_value=True) as connects:
            self.assertEqual((hub.no_network(), hub.no_network()), ("", ""))
        self.assertLessEqual(connects.call_count, 2)  # by IPv4 and IPv6

    def test_no_server(self):
        self.server.close()
        self.assertRegex(hub.no_network(), r"^there is no network \(localhost does not")

    def test_a_name_that_nobody_answers_for(self):
        """The lookup may take half a minute, as of Wi-Fi that leads nowhere."""

        def slow(*_) -> list:
            time.sleep(5)
            return []

        with patch("hub.socket.getaddrinfo", slow), patch("hub.LOOK", 0.2):
            start = time.monotonic()
            self.assertIn("no network", hub.no_network())
            self.assertLess(time.monotonic() - start, 3)
        self.assertLess(hub.LOOK, 3)

    def test_one_kind_of_address_is_enough(self):
        for works in (socket.AF_INET, socket.AF_INET6):
            hub.answers.cache_clear()
            with patch("hub.connects", lambda family, *_: family == works):
                self.assertEqual(hub.no_network(), "")

    def test_nobody_looks_behind_a_proxy_or_where_told(self):
        self.server.close()
        for name, value in (
            ("HTTP_PROXY", "http://proxy:3128"),
            ("all_proxy", "http://proxy:3128"),
            ("HF_HUB_OFFLINE", "0"),
        ):
            with patch.dict(os.environ, {name: value}):
                self.assertEqual(hub.no_network(), "", name)
        with patch.dict(os.environ, {"https_proxy": "http://proxy:3128"}):
            self.assertIn("no network", hub.no_network())  # the Hub's address is http
        self.set_endpoint("no-scheme")
        self.assertEqual(hub.no_network(), "")
        with patch.object(constants, "HF_HUB_OFFLINE", True):
            self.assertIn("HF_HUB_OFFLINE is set", hub.no_network())

    def test_each_part_is_named_with_the_ways_out(self):
        self.server.close()
        out = "there is no network .localhost does not answer.*cache. Connect, and .*"
        out += r"HF_HUB_OFFLINE=0\. "
        cache = patch.object(constants, "HF_HUB_CACHE", str(self.folder))
        for name, ask, pattern in (
            ("model", lambda: hub.fetch("small"), "model facebook/.*--model tiny"),
            ("other", lambda: hub.fetch("some/one"), "model some/one.*--model tiny"),
            (
                "T5",
                lambda: t5_files.read("google-t5/t5-base"),
                "T5, google-t5/t5-base, .*name a folder",
            ),
            (
                "codec",
                lambda: encodec_files.read("32khz"),
                "codec facebook/encodec_32khz, .*name a folder",
            ),
            (
                "MERT",
                lambda: mert.MERT.from_pretrained(),
                "MERT, m-a-p/.*name a folder",
            ),
            ("Demucs", demucs.HTDemucs.from_pretrained, "Demucs, ade.*name a folder"),
            ("melody", melody.published_demucs, "Demucs, .*--no-separate"),
        ):
            with self.subTest(name), cache:
                start = time.monotonic()
                with self.assertRaisesRegex(OSError, pattern) as caught:
                    ask()
                self.assertRegex(str(caught.exception), out)
                self.assertLess(time.monotonic() - start, 3)

    def test_reasons_end_as_sentences(self):
        """Whether the Hub's own message ends in a full stop or not."""
        for error in ("offline", "offline.", "offline.\n"):
            for ask in (
                lambda: hub.fetch("some/one"),
                lambda: t5_files.read("some/one"),
                lambda: encodec_files.read("some/one"),
                lambda: mert.MERT.from_pretrained("some/one"),
            ):
                wrong = dict(side_effect=OSError(error))
                with patch("huggingface_hub.hf_hub_download", **wrong):
                    wanted = "and there is no such folder: offline. To work offline, "
                    with self.assertRaisesRegex(OSError, wanted):
                        ask()

    def test_parts_without_hub_py(self):
        """What is copied without it waits for nothing, and prints nothing."""
        self.server.close()
        url = {"HF_ENDPOINT": f"http://localhost:{self.port}", "HF_HUB_OFFLINE": "0"}
        url["HF_HUB_CACHE"] = str(self.folder)
        ends = dict(capture_output=True, text=True, env=os.environ | url)
        for names, load in (
            (("t5", "t5_files", "limits", "strict"), "t5.T5"),
            (("encodec", "encodec_files", "limits", "strict"), "encodec.Encodec"),
            (
                ("mert", "audio", "resample", "outputs", "torch_file", "strict"),
                "mert.MERT",
            ),
        ):
            folder = self.folder / names[0]
            folder.mkdir()
            for name in names:
                shutil.copy(ROOT / f"{name}.py", folder)
            program = f"import {names[0]}\n{load}.from_pretrained('some/one')"
            start = time.monotonic()
            command = [sys.executable, "-c", program]
            told = subprocess.run(command, cwd=folder, **ends).stderr.strip()
            self.assertLess(time.monotonic() - start, 8, names)
            out = r"\nOSError: The Hub did not give .* and it is not in the cache\. To"
            self.assertRegex(told, out)
            self.assertNotIn("Retrying", told)

    def test_what_is_in_the_cache_is_found(self):
        """Of a repository that the Hub does not know."""
        self.server.close()
        for repo, files in (
            ("some/one", hub.AUDIOCRAFT_FILES),
            ("some/t5", t5_files.FILES),
            ("some/codec", encodec_files.FILES),
            ("some/mert", mert.FILES),
            ("some/stems", ("x.safetensors",)),
        ):
            folder = self.folder / f"models--{repo.replace('/', '--')}"
            for file in (*(f"snapshots/{'0' * 40}/{f}" for f in files), "refs/main"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text("0" * 40)
        with patch.object(constants, "HF_HUB_CACHE", str(self.folder)):
            self.assertEqual(hub.fetch("some/one").name, "0" * 40)
            self.assertEqual(len(t5_files.locate("some/t5")), 3)
            self.assertEqual(len(encodec_files.locate("some/codec")), 2)
            self.assertEqual(len(mert.locate("some/mert")), 2)
            self.assertEqual(demucs.locate("some/stems").name, "x.safetensors")


class TestAdapter(Test):
    def test_of_peft_is_no_model(self):
        """Its settings are fetched, and then it is told of."""
        missing = EntryNotFoundError("no such file")

        def snapshot(repo: str, allow_patterns: list[str], **options) -> str:
            files = sorted((REFERENCE / "peft" / "mono").iterdir())
            for path in files:
                if any(path.match(pattern) for pattern in allow_patterns):
                    shutil.copy(path, self.folder)
            return str(self.folder)

        with patch("hub.no_network", return_value=""):
            with patch("huggingface_hub.hf_hub_download", side_effect=missing):
                with patch("huggingface_hub.snapshot_download", snapshot):
                    with self.assertRaisesRegex(OSError, "an adapter of PEFT, and no"):
                        MusicGen.from_pretrained("owner/adapter")


class TestTraining(Test):
    """A repository that holds `checkpoint.th` of audiocraft's training."""

    def setUp(self):
        super().setUp()
        values = dict(HF_HUB_CACHE=str(self.folder / "hub"), HF_HUB_OFFLINE=True)
        self.enterContext(patch.multiple(constants, **values))

    def download(self, has: dict) -> list:
        """Let the Hub give these files; returns the names that are asked for."""
        asked = []

        def give(repo: str, name: str, **options) -> str:
            asked.append(name)
            if name not in has:
                raise EntryNotFoundError(f"no {name}")
            folder = self.folder / repo
            folder.mkdir(parents=True, exist_ok=True)
            return shutil.copy(has[name], folder / name)

        self.enterContext(patch("huggingface_hub.hf_hub_download", give))
        self.enterContext(patch("hub.no_network", return_value=""))
        return asked

    def test_loads_as_a_folder_does(self):
        """With a codec of its own, or one that the settings alone name."""
        checkpoint = REFERENCE / "solver-audiocraft" / "checkpoint.th"
        parts = REFERENCE / "stereo-audiocraft"
        t5 = [parts / "t5-base" / name for name in t5_files.FILES]
        codec = [parts / "encodec_32khz" / name for name in encodec_files.FILES]
        self.enterContext(patch("t5_files.fetch", return_value=t5))
        for own in (True, False):
            has = {"checkpoint.th": checkpoint}
            name = "compression_state_dict.bin"
            if own:
                has[name] = REFERENCE / "mono-audiocraft" / name
            with self.subTest(own), patch("encodec_files.fetch", return_value=codec):
                asked = self.download(has)
                model = MusicGen.from_pretrained(f"some/one-{own}", mx.float32)
                order = ["state_dict.bin", "config.json", "checkpoint.th", name]
                self.assertEqual(asked, order)
                self.assertEqual(model.config.decoder.num_codebooks, 4)
                folder = self.folder / f"some/one-{own}"
                self.assertEqual(
                    sorted(path.name for path in folder.iterdir()), sorted(has)
                )

    def test_transformers_layout_comes_first(self):
        """As where both lie in a folder."""
        config = REFERENCE / "mono-transformers" / "config.json"
        checkpoint = REFERENCE / "solver-audiocraft" / "checkpoint.th"
        for has, order in (
            ({}, ["state_dict.bin", "config.json", "checkpoint.th"]),
            (
                {"config.json": config, "checkpoint.th": checkpoint},
                ["state_dict.bin", "config.json"],
            ),
        ):
            asked = self.download(has)
            with patch("hub.fetch_transformers", return_value="transformers"):
                self.assertEqual(hub.fetch("some/one"), "transformers")
            self.assertEqual(asked, order)

    def test_from_the_cache(self):
        folder = self.folder / "hub" / "models--some--one"
        for file in (f"snapshots/{'0' * 40}/checkpoint.th", "refs/main"):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text("0" * 40)
        self.assertEqual(hub.fetch("some/one").name, "0" * 40)

    def test_a_connection_that_breaks(self):
        """It is no sign that the repository lacks a file."""
        broken = LocalEntryNotFoundError("An error happened")
        names = ("state_dict.bin", "config.json", "checkpoint.th")
        for name in (*names, "compression_state_dict.bin"):

            def give(repo: str, other: str, **options) -> str:
                if other == name:
                    raise broken
                if other in names[:2]:
                    raise EntryNotFoundError("no such file")
                return other

            with patch("hub.no_network", return_value=""):
                with patch("huggingface_hub.hf_hub_download", give):
                    with self.assertRaisesRegex(OSError, "the connection failed"):
                        hub.fetch("some/one")
