"""Every command and every piece of Python in the documents, on small models.

What needs a published model runs on `tiny`, or on a random model of reference/, and
takes are a twentieth as long. What takes minutes, or several processes, is only parsed.
"""

import io
import os
import re
import runpy
import shlex
import signal
import warnings
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from common import REFERENCE, ROOT, Test, slow

import synth
from audio import save_audio

DOCUMENTS = ("README.md", "GUIDE.md", "TRAINING.md", "SPEED.md", "tiny/README.md")
DOCUMENTS += ("tiny-magnet/README.md",)
FENCE = re.compile(r"^```(\w*) ?(.*)\n([\s\S]*?)^```$", re.MULTILINE)
COMMAND = re.compile(r"\bpython (\w+\.py\b.*?)(?= \| (?![\dA-G])|$)", re.MULTILINE)
NOT_RUN = re.compile(
    r"serve\.py|synth --(codec|lm|magnet)|tiny-new|--tensor-parallel|--random|evaluate(_\w+)?\.py|test\.py"
)
READ = re.compile(r".+\.(wav|mp3|txt|jsonl|safetensors)")  # unless a flag says WRITTEN
WRITTEN = re.compile(r"--(output|save-\w+)")
PUBLISHED = re.compile(r"(facebook/musicgen-)?(stereo-)?(small|medium|large)")
STANDINS = {
    "melody": str(REFERENCE / "melody-audiocraft"),
    "style": str(REFERENCE / "style-audiocraft"),
    "audiogen-medium": str(REFERENCE / "audiogen-audiocraft"),
    "small": str(REFERENCE / "mono-audiocraft"),  # in Python
    "musicgen": str(REFERENCE / "diffusion-audiocraft"),
}
SHORTER, LONGEST = 20, 0.6  # how many times, and no more seconds
WHOLE = {"--loudness", "--save-codes", "--prompts", "--audio-prompt"}  # else half
CHEAP = {  # flags that come after those of the document
    "benchmark.py": "--duration 0.1",
    "demucs.py": f"--model {REFERENCE / 'htdemucs'}",
    "fidelity.py": "--duration 0.1",
    "synth.py": "--listen 1",
    "train.py lora": "--steps 1 --batch 1 --crop 0.2",
    "train.py synth": "--listen 1",
}


class Block(NamedTuple):
    """What stands between two fences, with its first line's number."""

    line: int
    language: str
    file: str  # that it shows, if any
    text: str


def blocks(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, match.start()) + 2, *match.groups())
        for match in FENCE.finditer(text)
    ]


@lru_cache
def known_flags(script: str) -> set[str]:
    """All flags of a script, or of its subcommand: `train.py lora`."""
    return {*re.findall(r"(?<![\w-])--?[a-z][a-z-]*", run([*script.split(), "--help"]))}


def run(words: list[str]) -> str:
    """Run a script in this process, as by its name; returns what it prints.

    Raises AssertionError where it fails.
    """
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), undisturbed():
        with patch("sys.argv", words):
            try:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            except SystemExit as stop:
                if stop.code:
                    raise AssertionError(f"{stop.code} {err.getvalue()[-500:]}")
    return out.buffer.getvalue().decode(errors="replace")


@contextmanager
def undisturbed():
    """Signals and warnings are afterwards what they were before."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def stand_in(model: str) -> str:
    return "tiny" if PUBLISHED.fullmatch(model) else STANDINS.get(model, model)


def shorten(text: str) -> str:
    """A command, Python or JSON with seconds, and steps of a take, divided."""
    seconds = r'(?:duration|length|start|stride|fade(?:[-_](?:in|out))?)(?:"?[=:] ?| )'
    section = r'\| (?=[\d.]+\w*: )|\((?=[\d.]+, ")'
    number = rf"({seconds}|{section}|int\(|take\.step [=>]+ )([\d.]+)"

    def divide(match: re.Match) -> str:
        number = float(match[2]) / SHORTER
        return f"{match[1]}{number if 'step' in match[1] else min(number, LONGEST):g}"

    def divide_both(match: re.Match) -> str:
        first, end = float(match[2]) / SHORTER, float(match[4]) / SHORTER
        return f"{match[1]}{first:g}{match[3]}{end:g}"

    before = r"part=\(|parts = \[\(|--(?:regenerate|fill) |(?<=\d) "
    part = rf"({before})([\d.]+)(, |:)([\d.]+)"
    return re.sub(part, divide_both, re.sub(number, divide, text))


def cheapen(command: str) -> list[str]:
    """The words of a command that does the same on a small model, in short."""
    words = shlex.split(shorten(command))
    for i, flag in enumerate(words[:-1], 1):
        if flag in ("--model", "--hf-path"):
            words[i] = stand_in(words[i])
        if flag == "--bars":
            words[i] = "0.25"
    if words[0] == "generate.py":
        kept = {"--again", "--redecode", "--regenerate", "--fill"}
        if "tiny-magnet" in words and "--decoding-steps" not in words:
            words += ["--decoding-steps", "2,1,1,1"]
        if not {"--duration", "--loop", *kept} & {*words}:
            whole = WHOLE & {*words} or " | " in command
            words += ["--duration", str((8 if whole else 4) / SHORTER)]
        if not {"--model", "--resume", *kept} & {*words}:
            words += ["--model", "tiny"]
        words += ["--no-separate"] * ("--melody" in words)
        words += ["--takes", "2"] * ("--takes" in words)
    if "--decoder" in words or words[0] == "diffusion.py":
        decodes = ["--decoder", str(REFERENCE / "diffusion-audiocraft")]
        words += decodes
        if "--redecode" not in words and words[0] == "generate.py":
            words += ["--model", str(REFERENCE / "mono-audiocraft")]
    for script, flags in CHEAP.items():
        if words[: len(script.split())] == script.split():
            words += flags.split()
    return words


class TestDocuments(Test):
    def setUp(self):
        """A folder with what the documents call the reader's own."""
        super().setUp()
        self.enterContext(chdir(self.folder))
        clip = synth.render(synth.KNOWN[0], np.random.default_rng(0), 3.7)[:, None]
        os.mkdir("clips")
        for path in ("song.mp3", "hummed.wav", "clips/a.wav"):
            save_audio(path, clip[: 40000 if path.startswith("clips") else None], 32000)
        (self.folder / "clips/a.txt").write_text("a bell melody")
        (self.folder / "prompts.txt").write_text("slow guitar\nfast bell\n")

    def follow(self, document: str):
        """Do all that a document says, in its order and in one folder."""
        names = {}
        for block in blocks((ROOT / document).read_text()):
            with self.subTest(place=f"{document}:{block.line}"):
                self.do(block, names)

    def do(self, block: Block, names: dict):
        if block.file:
            (self.folder / block.file).write_text(shorten(block.text))
        elif block.language == "python":
            self.execute(block.text, names)
        elif block.language == "shell":
            for command in COMMAND.findall(block.text):
                with self.subTest(command=command):
                    self.command(command)

    def execute(self, text: str, names: dict):
        for name, path in STANDINS.items():
            text = text.replace(
                f'from_pretrained("{name}")', f"from_pretrained({path!r})"
            )
        with redirect_stdout(io.StringIO()), undisturbed():
            exec(compile(shorten(text), "document", "exec"), names)

    def command(self, command: str):
        words = shlex.split(command)
        script = " ".join(words[: 1 + (words[0] == "train.py")])
        self.assertTrue((ROOT / words[0]).is_file(), words[0])
        if given := {word for word in words if re.match(r"--?[a-z]", word)}:
            self.assertLessEqual(given, known_flags(script))
        if not NOT_RUN.search(command):
            run(cheapen(command))
            return
        for flag, word in zip(words, words[1:]):
            if READ.fullmatch(word) and not WRITTEN.fullmatch(flag):
                self.assertTrue((self.folder / word).is_file(), word)

    @slow(4)
    def test_readme(self):
        self.follow("README.md")

    @slow(6)
    def test_guide(self):
        self.follow("GUIDE.md")

    def test_training(self):
        self.follow("TRAINING.md")

    def test_speed(self):
        self.follow("SPEED.md")

    def test_tiny(self):
        self.follow("tiny/README.md")
        self.follow("tiny-magnet/README.md")

    def test_faults_are_found(self):
        """The last line is as long as its take, so there is nothing to be made."""
        short, long = (
            '{"prompt": "a"',
            ', "audio_prompt": "song.mp3", "prompt_length": 8',
        )
        lines = f"{short}}}\n{short}{long}}}\n"
        self.do(Block(1, "json", "lines.jsonl", lines), {})
        with self.assertRaisesRegex(NameError, "load_audio"):
            self.execute('sound = load_audio("song.mp3")', {})
        for command, message in (
            ("generate.py --prompts lines.jsonl", "line 2: "),
            ("generate.py -p a --audio-prompt none.wav", "no sound file none.wav"),
            ("generate.py -p a --no-flag", "--no-flag"),
            ("no_script.py", "no_script.py"),
        ):
            with self.assertRaisesRegex(AssertionError, message):
                self.command(command)

    def test_links(self):
        """Links to files and to headings of the documents lead somewhere."""
        for document in DOCUMENTS:
            text = (ROOT / document).read_text()
            for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
                with self.subTest(document=document, link=f"{path}#{anchor}"):
                    source = ROOT / document
                    target = source.parent / path if path else source
                    self.assertTrue(target.exists())
                    if anchor:
                        self.assertIn(anchor, headings(target.read_text()))

    def test_scripts_that_are_named_are_there(self):
        folders = (ROOT, REFERENCE, ROOT / "tests")
        there = {path.name for folder in folders for path in folder.glob("*.py")}
        for document in DOCUMENTS:
            named = {*re.findall(r"\w+\.py\b", (ROOT / document).read_text())}
            with self.subTest(document=document):
                self.assertEqual(named - there, set())

    def test_comments_do_no_harm(self):
        """A Mac's shell takes them for commands, unless it is told otherwise. So they
        must have no quotes and nothing else that it reads."""
        for document in DOCUMENTS:
            for block in blocks((ROOT / document).read_text()):
                if block.language == "shell":
                    for line in block.text.splitlines():
                        if "#" in line:
                            self.assertRegex(line, r"^# [\w ,.:-]+$")

    def test_readme_shows_what_is_printed(self):
        text = (ROOT / "README.md").read_text()
        shown = next(block.text for block in blocks(text) if block.language == "text")
        printed = run(cheapen(COMMAND.search(text)[1]))
        number = re.compile(r"\d[\d.]*")
        self.assertEqual(number.sub("0", printed), number.sub("0", shown))

    def test_readme_is_short(self):
        text = (ROOT / "README.md").read_text()
        self.assertLessEqual(len(text.splitlines()), 160)

    def test_the_files_names_every_script_once(self):
        text = (ROOT / "GUIDE.md").read_text()
        table = text.split("\n## The files\n")[1].split("\n## ")[0]
        named = re.findall(r"\[(\w+\.py)\]\((\w+\.py)\)", table)
        self.assertTrue(all(name == path for name, path in named))
        scripts = sorted(path.name for path in ROOT.glob("*.py"))
        self.assertEqual(sorted(name for name, _ in named), scripts)


def headings(text: str) -> list[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
