"""The table of the released models, against their manifests and the Hub's cache."""

import contextlib
import io
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import manifests
from common import ROOT, Test
from huggingface_hub import constants

import encodec_files
import hub
import mert
import models
import t5_files
from arguments import parse_arguments
from benchmark import published_config
from engine import DECODING_MEMORY
from magnet import pass_bytes

GB = 10**9
WIDTH = {"float16": 2, "float32": 4, "int64": 8}
TEXT = 512  # tokens before the codes of a melody or style, at most
PREFIXES = {"melody": 235 + TEXT, "style": 10 + TEXT}  # frames


def tensors(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return manifests.expand(manifests.read()["tensors"][name])


def size(name: str, prefix: str = "") -> float:
    """GB of the tensors of a manifest, or of a part of them."""
    wanted = {k: v for k, v in tensors(name).items() if k.startswith(prefix)}
    return sum(WIDTH[kind] * math.prod(shape) for kind, shape in wanted.values()) / GB


def manifest(name: str) -> str:
    return hub.MODELS[name].partition("/")[2]


class TestSizes(Test):
    """The table's figures are those of the files, to the digit that is shown."""

    def test_names(self):
        self.assertEqual({*models.RELEASED}, {*hub.MODELS} - {*hub.BESIDE})

    def test_download(self):
        compression = manifests.read()["compression"]
        for name, model in models.RELEASED.items():
            with self.subTest(name):
                decoder = size(f"{manifest(name)}.audiocraft")
                self.assertAlmostEqual(model.decoder, decoder, delta=0.0015)
                points = "pretrained" in compression[manifest(name)]
                self.assertEqual(models.CODEC in model.parts, points)
                self.assertEqual(model.codec == 0, points)
                if not points:
                    kind = "16khz_audiogen" if name.startswith("audio") else "32khz"
                    codec = size(f"encodec_{kind}.audiocraft")
                    self.assertAlmostEqual(model.codec, codec, delta=0.0005)

    def test_parts(self):
        for part, name, files in (
            (models.T5, "t5-base.transformers", t5_files.FILES),
            (models.T5_LARGE, "t5-large.transformers", t5_files.FILES),
            (models.CODEC, "encodec_32khz.transformers", encodec_files.FILES),
            (models.MERT, "mert-v1-95m.transformers", mert.FILES),
        ):
            self.assertEqual(models.PARTS[part][0], files)
            self.assertAlmostEqual(models.PARTS[part][1], size(name), delta=0.0015)
        self.assertEqual(models.MERT, mert.REPO)
        self.assertEqual(models.CODEC, encodec_files.REPOS["32khz"])
        for name, model in models.RELEASED.items():
            width = tensors(f"{manifest(name)}.audiocraft")[
                "condition_provider.conditioners.description.output_proj.weight"
            ][1][1]
            t5 = {768: models.T5, 1024: models.T5_LARGE}[width]
            self.assertIn(t5, model.parts)
            self.assertEqual(models.MERT in model.parts, name == "style")

    def test_memory(self):
        """Decoder, T5's encoder, codec and MERT; and the caches of a window, or what
        decoding takes."""
        for name, model in models.RELEASED.items():
            with self.subTest(name):
                source = f"{manifest(name)}.audiocraft"
                width = tensors(source)["emb.0.weight"][1][1]
                own = [k for k in tensors(source) if k.startswith("transformer.layers")]
                layers = 1 + max(int(k.split(".")[2]) for k in own)
                large = models.T5_LARGE in model.parts
                short = large or "10secs" in name
                steps = (500 if short else 1500) + 3
                steps += PREFIXES.get(hub.follows(name), 0)
                caches = (
                    2 * layers * 2 * width * steps * 2 / GB
                )  # rows, keys and values
                if name in hub.MAGNETS:  # no caches, but a pass over all frames
                    config = published_config(name).decoder
                    caches = pass_bytes(config, steps - 3, 2) / GB
                t5 = f"t5-{'large' if large else 'base'}.transformers"
                need = size(source) + size(t5, "encoder.") + size(t5, "shared.")
                need += size("encodec_32khz.audiocraft")
                need += models.PARTS[models.MERT][1] * (name == "style")
                need += max(caches, DECODING_MEMORY / GB)
                self.assertAlmostEqual(model.memory, need, delta=0.06)

    def test_the_guide_and_the_readme_say_the_same(self):
        guide, readme = (ROOT / f"{name}.md" for name in ("GUIDE", "README"))
        for name, follows, _, download, memory, _ in models.rows():
            if name in hub.BESIDE:
                continue
            rows = self.rows(guide, own := f"| `{name}` |")
            (line,) = [row for row in rows if row.startswith(own)]
            self.assertIn(f"| {follows} |", line)
            self.assertIn(f"| {download} |", line)
            for row in self.rows(readme, f"`{name}`"):
                self.assertIn(f" | {memory}: ", row)
        self.assertEqual(len(self.rows(readme, "`audiogen-medium`")), 1)

    @staticmethod
    def rows(document: Path, text: str) -> list[str]:
        """Of its tables those with a text."""
        lines = document.read_text().splitlines()
        return [line for line in lines if line.startswith("|") and text in line]


class TestCache(Test):
    def setUp(self):
        super().setUp()
        self.enterContext(patch.object(constants, "HF_HUB_CACHE", str(self.folder)))

    def put(self, repo: str, *files: str) -> None:
        folder = self.folder / f"models--{repo.replace('/', '--')}"
        for file in (*(f"snapshots/{'0' * 40}/{f}" for f in files), "refs/main"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("0" * 40)

    def cached(self) -> dict[str, str]:
        return {name: cached for name, *_, cached in models.rows()}

    def test_nothing(self):
        told = self.cached()
        for name in hub.BESIDE:
            self.assertEqual(told.pop(name), "beside the scripts")
        self.assertEqual({*told.values()}, {"no"})

    def test_whole_and_in_part(self):
        self.put("facebook/musicgen-small", *hub.AUDIOCRAFT_FILES)
        self.assertEqual(self.cached()["small"], "all but 0.9 GB")
        self.put("google-t5/t5-base", *t5_files.FILES[:2])
        self.assertEqual(self.cached()["small"], "all but 0.9 GB")
        self.put("google-t5/t5-base", *t5_files.FILES)
        told = self.cached()
        self.assertEqual((told["small"], told["medium"]), ("yes", "all but 3.9 GB"))
        self.assertEqual(told["audiogen-medium"], "no")
        self.put("facebook/musicgen-stereo-small", hub.AUDIOCRAFT_FILES[0])
        self.put("facebook/encodec_32khz", *encodec_files.FILES)
        self.assertEqual(self.cached()["stereo-small"], "all but a few KB")
        self.put("facebook/musicgen-stereo-small", hub.AUDIOCRAFT_FILES[1])
        self.assertEqual(self.cached()["stereo-small"], "yes")

    def test_a_damaged_entry_hides_nothing(self):
        self.put("facebook/musicgen-small", *hub.AUDIOCRAFT_FILES)
        folder = self.folder / "models--facebook--musicgen-small"
        (folder / "refs/main").write_bytes(b"\xff\xfe")
        told = self.cached()
        self.assertEqual((told["small"], told["tiny"]), ("no", "beside the scripts"))

    def test_flag_asks_nobody(self):
        asked = AssertionError("the Hub is asked")
        with (
            patch("socket.getaddrinfo", side_effect=asked),
            contextlib.redirect_stdout(io.StringIO()) as told,
            self.assertRaises(SystemExit) as ended,
        ):
            parse_arguments(["--list-models"])
        self.assertEqual(ended.exception.code, 0)
        self.assertEqual(told.getvalue(), f"{models.table()}\n")
        for line in told.getvalue().splitlines():
            self.assertLess(len(line), 88 + len(str(self.folder)))
        for name in hub.MODELS:
            self.assertRegex(told.getvalue(), rf"(?m)^{name} ")

    def test_flag_stands_alone(self):
        """Beside it nothing would be made, in silence."""
        for words in (
            ["--list-models", "--prompt", "bell"],
            ["bell", "--list-models"],
            ["--list-models", "--model", "small", "--output", "a.wav"],
            ["--list-models", "--takes", "1"],
        ):
            with (
                contextlib.redirect_stdout(io.StringIO()) as out,
                contextlib.redirect_stderr(io.StringIO()) as told,
                self.assertRaises(SystemExit) as ended,
            ):
                parse_arguments(words)
            self.assertEqual((ended.exception.code, out.getvalue()), (2, ""))
            self.assertRegex(
                told.getvalue(), "error: --list-models makes nothing: leave"
            )

    def test_no_model_is_loaded_for_it(self):
        program = "import models, sys; models.table(); print('mlx' in sys.modules)"
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        self.assertEqual((ran.stdout, ran.stderr), ("False\n", ""))
