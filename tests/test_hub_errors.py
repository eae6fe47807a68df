"""What is said where the Hub does not give what was asked for, each with the way out."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock, patch

from common import REFERENCE, ROOT, Test
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

import encodec_files
import hub
import t5_files
from strict import LONGEST

REFUSALS = {  # repository: status and code of the error, as the Hub gives them
    "some/gated": (401, "GatedRepo"),
    "some/gated-still": (403, "GatedRepo"),
    "some/missing": (404, "RepoNotFound"),
    "some/private": (401, "RepoNotFound"),
    "some/token": (401, None),
    "facebook/musicgen-small": (404, "EntryNotFound"),
    "some/empty": (404, "EntryNotFound"),
}
TELLS = {
    "some/gated": r"gated \(HTTP 401\). Ask for access at {url}/some/gated, and set HF_T",
    "some/gated-still": r"gated \(HTTP 403\). Ask for access at .*, and set HF_TOKEN to",
    "some/missing": r"there is none of this name, or it is private \(HTTP 404\). Compare",
    "some/private": r"there is none of this name, or it is private \(HTTP 401\). .*TOKEN",
    "some/token": r"it refused the token \(HTTP 401\). Correct HF_TOKEN, or unset it",
}
PROGRAM = """
import json, sys
import hub, t5_files, encodec_files, mert, demucs
told = {}
for repo in sys.argv[1:]:
    for name, ask in dict(
        model=hub.fetch, T5=t5_files.locate, codec=encodec_files.read,
        MERT=mert.locate, Demucs=demucs.locate,
    ).items():
        try:
            ask("small" if repo.endswith("-small") else repo)
        except OSError as error:
            told[f"{repo} {name}"] = str(error)
print(json.dumps(told))
"""


class Refusing(BaseHTTPRequestHandler):
    """A Hub that gives nothing."""

    def refuse(self):
        repo = next((r for r in REFUSALS if f"/{r}/" in f"{self.path}/"), None)
        status, code = REFUSALS.get(repo, (404, None))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if repo == "some/token":
            wrong = "Invalid credentials in Authorization header"
            self.send_header("X-Error-Message", wrong)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = refuse

    def log_message(self, *_):
        pass


class TestRefusals(Test):
    def test_each_is_told_apart(self):
        """Of the model and of all its parts, by huggingface_hub's own reading of the
        answers."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}"
        env = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(self.folder), "no_proxy": "*"}
        env |= {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}
        command = [sys.executable, "-c", PROGRAM, *REFUSALS]
        ran = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        self.assertEqual(ran.returncode, 0, ran.stderr)
        told = json.loads(ran.stdout)
        for repo, pattern in TELLS.items():
            for name in ("model", "T5", "codec", "MERT", "Demucs"):
                with self.subTest(repo, part=name):
                    said = told[f"{repo} {name}"]
                    self.assertRegex(said, f"{name}.*{repo}.*{pattern.format(url=url)}")
                    self.assertLessEqual(len(said), 400)
                    self.assertNotIn("\n", said)
        for name, lacks in (
            ("facebook/musicgen-small model", "state_dict.bin"),
            ("some/empty T5", "config.json"),
            ("some/empty codec", "config.json"),
            ("some/empty MERT", "config.json"),
        ):
            self.assertIn(f"it has no {lacks} (HTTP 404)", told[name])


class TestHalfCached(Test):
    """HF_HUB_OFFLINE, or no network, with a part of the files."""

    def setUp(self):
        super().setUp()
        values = dict(HF_HUB_CACHE=str(self.folder), HF_HUB_OFFLINE=True)
        self.enterContext(patch.multiple(constants, **values))

    def put(self, repo: str, files: dict[str, str]) -> None:
        folder = self.folder / f"models--{repo.replace('/', '--')}"
        files = {f"snapshots/{'0' * 40}/{name}": text for name, text in files.items()}
        for file, text in (files | {"refs/main": "0" * 40}).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)

    def said(self, ask, *arguments: str) -> str:
        with self.assertRaises(OSError) as caught:
            ask(*arguments)
        said = str(caught.exception)
        self.assertLessEqual(len(said), 400)
        self.assertIn("HF_HUB_OFFLINE is set", said)
        return said

    def test_nothing(self):
        for name in ("small", "some/one"):
            self.assertIn("and it is not in the cache. To", self.said(hub.fetch, name))

    def test_one_of_audiocrafts_files(self):
        for name in ("small", "some/one"):
            for there, lacks in (hub.AUDIOCRAFT_FILES, hub.AUDIOCRAFT_FILES[::-1]):
                repo = f"{hub.MODELS.get(name, name)}"
                self.put(repo, {there: ""})
                said = self.said(hub.fetch, name)
                self.assertIn(f"only a part is in the cache, without {lacks}. To", said)
                folder = self.folder / f"models--{repo.replace('/', '--')}"
                (folder / "snapshots" / ("0" * 40) / there).unlink()

    def test_a_part_of_transformers_layout(self):
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        shards = {"model.safetensors.index.json": json.dumps(index)}
        for number, (files, lacks) in enumerate(
            (
                ({"config.json": ""}, "model.safetensors, spiece.model"),
                ({"config.json": "", "tokenizer.json": ""}, "model.safetensors"),
                ({"model.safetensors": "", "spiece.model": ""}, "config.json"),
                (
                    {"config.json": "", "spiece.model": "", "model-1.safetensors": ""}
                    | shards,
                    "model-2.safetensors",
                ),
            )
        ):
            self.put(f"some/one-{number}", files)
            said = self.said(hub.fetch, f"some/one-{number}")
            self.assertIn(f"only a part is in the cache, without {lacks}. To", said)

    def test_what_is_whole_is_read(self):
        whole = {"config.json": "", "spiece.model": ""}
        for number, files in enumerate(
            (
                whole | {"model.safetensors": ""},
                whole | {"pytorch_model.bin": ""},
                {"config.json": "", "tokenizer.json": "", "model.safetensors": ""},
            )
        ):
            self.put(f"some/one-{number}", files)
            self.assertTrue((hub.fetch(f"some/one-{number}") / "config.json").is_file())

    def test_a_damaged_index(self):
        for text in ("[]", "{}", '{"weight_map": 3}', "[" * 10**5, "\0"):
            folder = self.folder / "damaged"
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors.index.json").write_text(text)
            self.assertIn("config.json", hub.absent(folder))

    def test_parts(self):
        for ask, name, files in (
            (t5_files.read, "google-t5/t5-base", t5_files.FILES),
            (encodec_files.read, "32khz", encodec_files.FILES),
        ):
            repo = encodec_files.REPOS.get(name, name)
            self.put(repo, {files[0]: ""})
            lacks = ", ".join(files[1:])
            said = self.said(ask, name)
            self.assertIn(f"only a part is in the cache, without {lacks}. To", said)

    def test_t5_of_a_model_that_is_there(self):
        """The line names the folder in which T5 was looked for, too."""
        import published

        said = self.said(published.read_audiocraft, self.audiocraft())
        told = "needs T5 in t5-base/ or from the Hub: HF_HUB_OFFLINE is set, and it is"
        self.assertIn(f"{told} not in the cache.", said)

    def test_codec_and_mert_of_a_model_that_is_there(self):
        """Which files are missing, and where they may lie: one line, and not cut."""
        import published

        files = ", ".join(encodec_files.FILES)
        codec = f"the codec facebook/encodec_32khz in encodec_32khz/ ({files})"
        mert = "MERT in MERT-v1-95M/ (config.json, pytorch_model.bin)"
        gone = "there is no network (huggingface.co does not answer), and it is not in "
        gone += "the cache. Connect, and try again; where the network is slow, set "
        gone += "HF_HUB_OFFLINE=0."
        offline = "HF_HUB_OFFLINE is set, and it is not in the cache."
        for name, part, needs in (
            ("stereo-audiocraft", "encodec_32khz", codec),  # named by a file
            ("solver-audiocraft", "encodec_32khz", codec),  # by settings alone
            ("style-audiocraft", "MERT-v1-95M", mert),
        ):
            folder = self.copy(name)
            if name == "solver-audiocraft":
                (folder / "state_dict.bin").unlink()
                source = REFERENCE / "mono-audiocraft" / "t5-base"
                shutil.copytree(source, folder / "t5-base", dirs_exist_ok=True)
            shutil.rmtree(folder / part, ignore_errors=True)
            for reason in (gone, offline):
                missing = LocalEntryNotFoundError("Cannot find\nthe file\n" * 99)
                with patch("hub.no_network", return_value=reason):
                    with patch("huggingface_hub.hf_hub_download", side_effect=missing):
                        with self.assertRaises(OSError) as caught:
                            published.read(folder)
                told = str(caught.exception)
                wanted = f"{folder} needs {needs} or from the Hub: {reason}"
                if len(wanted) <= LONGEST:
                    self.assertEqual(told, wanted)
                self.assertLessEqual(len(told), LONGEST)
                self.assertIn(f"needs {needs}", told)
                self.assertRegex(told, r"HF_HUB_OFFLINE(=0| is set, .*)\.$")

    def audiocraft(self):
        folder = self.copy("mono-audiocraft")
        for path in (folder / "t5-base").iterdir():
            path.unlink()
        (folder / "t5-base").rmdir()
        return folder


class TestExplained(Test):
    def test_others_say_what_they_say(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        self.assertIn("No space left on device", hub.explain(full, "some/one"))
        self.assertEqual(hub.explain(OSError("offline.\n"), "some/one"), "offline")

    def test_a_hub_that_fails(self):
        for status in (429, 500, 503):
            answer = Mock(status_code=status, headers={})
            error = HfHubHTTPError("Server Error", response=answer)
            broken = LocalEntryNotFoundError("An error happened")
            broken.__cause__ = error  # as of a file
            for wrong in (error, broken):
                told = hub.explain(wrong, "some/one")
                self.assertEqual(
                    told, f"it answered with HTTP {status}. Try again later"
                )

    def test_a_connection_that_breaks(self):
        """After the first look, and behind a proxy, where there is none."""
        broken = LocalEntryNotFoundError("An error happened while trying")
        told = (
            "the connection failed, and it is not in the cache. Connect, and try again"
        )
        self.assertEqual(hub.explain(broken, "some/one"), told)
        with patch("hub.no_network", return_value=""):
            with patch("huggingface_hub.hf_hub_download", side_effect=broken):
                for name in ("small", "some/one"):
                    with self.assertRaisesRegex(OSError, told):
                        hub.fetch(name)

    def test_the_folder_of_a_finetune(self):
        """Nothing is asked of the Hub for what lies there whole."""
        with patch("huggingface_hub.hf_hub_download", side_effect=AssertionError):
            path = t5_files.find_spiece(
                REFERENCE / "finetune-float16", "google-t5/t5-base"
            )
        self.assertEqual(path.parent.name, "t5-base")
