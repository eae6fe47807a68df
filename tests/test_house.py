"""The folder: who imports whom, what a script needs beside it, how long things are."""

import ast
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import mlx.core as mx
from alone import TRIALS
from common import ROOT, Test, slow

from musicgen import MusicGen

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# Every import points to an earlier layer, from people at the end to leaves.
LAYERS = """
    options outputs together limits ported hub resample decoder test strict parallel quantize beat edit endings forms access group_norm bands matmul_conv
    messages torch_file settings audio decoder_names t5_files textless models peft_config sections
    progress lora loudness wav_stream synth demucs mert t5 audiocraft takes worker web diffusion_files
    training play stream encodec_files melody peft_files
    encodec adapters notes
    engine encodec_stream style train_codec
    prompt published conditioning
    checkpoints
    musicgen
    ranking magnet diffusion
    convert evaluate loops regenerate magnet_job diffusion_job
    job evaluate_score fill train_magnet train_lm
    train jobs recall evaluate_fill sound_tasks
    benchmark arguments lines sources
    fidelity remake tasks
    generate juce retakes
    serve
"""

# Those of many files, which say "and what these need".
ON_TOP = """
    serve juce retakes sound_tasks tasks generate remake sources job jobs lines arguments recall train train_lm train_magnet convert evaluate evaluate_score evaluate_fill benchmark fidelity
""".split()

TEXT_TO_MUSIC = ("musicgen", "decoder", "t5", "encodec", "options", "checkpoints")
LINES = 2000  # of these at most
FILE, FUNCTION, CLASS, TEST_FILE, README = 700, 50, 250, 600, 160  # lines


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


@cache
def imports(name: str) -> dict[str, bool]:
    """Scripts that one imports, and whether always; functions' own imports count, too,
    and those for type checkers do not."""
    found = {}

    def visit(node: ast.AST, always: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            modules = []
            if isinstance(child, ast.Import):
                modules = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom) and child.module:
                modules = [child.module]
            for module in {*modules} & {*SCRIPTS}:
                found[module] = found.get(module, False) or always
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            visit(child, always and not function)

    visit(tree(name), True)
    return found


def reach(names: set[str], step) -> set[str]:
    """The names, what `step` gives for each, and so on."""
    found, todo = set(), [*names]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += step(name)
    return found


@cache
def docstring(name: str) -> str:
    """Of a script, without its examples and what one would type."""
    text = re.sub(r"`python [^`]*`", "", ast.get_docstring(tree(name)))
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return " ".join(lines)


def named(text: str) -> set[str]:
    """Scripts that a text names."""
    return {*re.findall(r"\b(\w+)\.py\b", text)} & {*SCRIPTS}


@cache
def needs(name: str) -> set[str]:
    """Scripts that one cannot do without, as its docstring says: "Needs a.py beside it"
    up to the end of the sentence, or to a semicolon."""
    text = docstring(name)
    return named(" ".join(re.findall(r"Needs .*?(?=[.;](?: |$))", text))) - {name}


@cache
def needs_at_times(name: str) -> set[str]:
    """The others that it asks for: what follows the semicolon, or "are needed"."""
    sentences = re.split(r"(?<=\.) +", docstring(name))
    asking = [sentence for sentence in sentences if "eed" in sentence]
    return named(" ".join(asking)) - needs(name) - {name}


class TestImports(Test):
    def test_every_script_has_its_layer(self):
        self.assertEqual(sorted(LAYERS.split()), SCRIPTS)

    def test_no_import_points_up(self):
        layers = [layer.split() for layer in LAYERS.strip().splitlines()]
        place = {name: i for i, layer in enumerate(layers) for name in layer}
        for name in SCRIPTS:
            for other in imports(name):
                with self.subTest(f"{name} imports {other}"):
                    self.assertGreater(place[name], place[other])

    def test_no_circle(self):
        for name in SCRIPTS:
            below = reach({*imports(name)}, imports)
            self.assertNotIn(name, below)

    def test_no_layer_is_higher_than_it_must_be(self):
        """So that the layers tell how far a script is from the leaves."""
        layers = [set(layer.split()) for layer in LAYERS.strip().splitlines()]
        for i, layer in enumerate(layers[1:]):
            for name in layer:
                self.assertTrue(layers[i] & imports(name).keys(), name)


class TestDocstrings(Test):
    def test_name_all_that_is_needed_at_last(self):
        """What they need, and what that needs, so that nobody must look into another
        file. Of many files "and what these need" is enough."""
        for name in SCRIPTS:
            with self.subTest(name):
                told = re.search(
                    r"(what|all that) (that|these) needs?", docstring(name)
                )
                always = reach(needs(name), needs)
                at_times = reach(needs_at_times(name), needs) - always - {name}
                if name in ON_TOP:
                    self.assertTrue(told)
                else:
                    self.assertEqual(always, needs(name))
                    self.assertTrue(told or at_times <= named(docstring(name)))

    def test_name_all_that_is_imported(self):
        for name in SCRIPTS:
            with self.subTest(name):
                needed = reach(needs(name), needs)
                always = {other for other, at_once in imports(name).items() if at_once}
                self.assertLessEqual(always, needed)
                mentioned = reach(needs_at_times(name), needs) | named(docstring(name))
                self.assertLessEqual(imports(name).keys(), needed | mentioned)

    def test_name_nothing_else(self):
        for name in {*SCRIPTS} - {"test"}:
            with self.subTest(name):
                below = reach({*imports(name)}, imports)
                self.assertLessEqual(needs(name) | needs_at_times(name), below)
                alone = re.search(r"[Ss]tands\s+alone", docstring(name))
                self.assertEqual(bool(alone), not needs(name))


class TestAlone(Test):
    """Scripts in folders with only the files that they ask for."""

    def folder_of(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        for other in reach({name} | needs_at_times(name), needs):
            shutil.copy(ROOT / f"{other}.py", folder)
        return folder

    def run_in(self, folder: Path, *command: str, **options) -> str:
        """What a Python prints there. Fails where it fails."""
        options |= dict(cwd=folder, capture_output=True, text=True)
        process = subprocess.run([sys.executable, *command], **options)
        self.assertEqual((process.returncode, process.stderr), (0, ""))
        return process.stdout

    @slow(15)
    def test_each_imports_and_runs(self):
        names = [name for name in SCRIPTS if name != "test"]
        self.assertEqual(sorted(TRIALS), names)
        jobs = json.dumps([(name, str(self.folder_of(name))) for name in names])
        script = str(ROOT / "tests" / "alone.py")
        errors = json.loads(self.run_in(self.folder, script, input=jobs))
        self.assertEqual([*errors], names)
        for name, error in errors.items():
            with self.subTest(name):
                self.assertTrue(error is None, error)

    def test_the_runner_of_tests(self):
        folder = self.folder_of("test")
        (folder / "tests").mkdir()
        passing = """
            import unittest

            class TestX(unittest.TestCase):
                def test_x(self):
                    pass
        """
        (folder / "tests" / "test_x.py").write_text(dedent(passing))
        printed = self.run_in(folder, "test.py")
        first, last = printed.splitlines()
        self.assertRegex(first, r"^1 tests in \d+ processes$")
        self.assertEqual(last, "1 passed, 0 failed, 0 skipped")

    def test_the_runner_of_tests_ends_when_asked(self):
        folder = self.folder_of("test")
        (folder / "tests").mkdir()
        waiting = """
            import time
            import unittest
            from pathlib import Path

            class TestX(unittest.TestCase):
                def test_x(self):
                    Path("began").touch()
                    time.sleep(60)
        """
        (folder / "tests" / "test_x.py").write_text(dedent(waiting))
        command = [sys.executable, "test.py"]
        runner = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
        while not (folder / "began").exists():
            time.sleep(0.05)
        runner.terminate()
        printed, _ = runner.communicate(timeout=20)
        self.assertIn(b"stopped after 0 of 1 tests", printed)
        self.assertEqual(runner.returncode, 1)

    def test_text_to_music_in_six_files(self):
        """With a copy of `tiny`, or of any folder that `convert.py` wrote."""
        self.assertEqual(reach({"musicgen"}, needs), {*TEXT_TO_MUSIC})
        self.assertLessEqual(len(TEXT_TO_MUSIC), 6)
        paths = [ROOT / f"{name}.py" for name in TEXT_TO_MUSIC]
        self.assertLessEqual(sum(map(count_lines, paths)), LINES)
        for path in paths:
            shutil.copy(path, self.folder)
        shutil.copytree(ROOT / "tiny", self.folder / "tiny")
        make = 'MusicGen.from_pretrained("tiny").generate_codes("slow bell", 2, seed=0)'
        imports = "import mlx.core as mx\nfrom musicgen import MusicGen\n"
        program = f'{imports}mx.save("codes.npy", {make})'
        self.assertEqual(self.run_in(self.folder, "-c", program), "")
        whole = MusicGen.from_pretrained("tiny")
        self.assertFalse(whole.plain)
        codes = whole.generate_codes("slow bell", duration=2, seed=0)
        self.assertSame(mx.load(str(self.folder / "codes.npy")), codes)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


class TestRequirements(Test):
    def test_each_has_a_lowest_version(self):
        """With which `.ci/run` runs the tests, too."""
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        form = re.compile(r'(\w+)(\[\w+\])?>=([\d.]+)(; sys_platform == "\w+")?')
        lowest = [form.fullmatch(line).group(1, 3) for line in lines]
        self.assertEqual(lowest[0], lowest[1])  # of mlx: on a Mac, and on Linux
        for name, version in lowest:
            numbers = [list(map(int, version.split(".")))]
            numbers += [list(map(int, metadata.version(name).split(".")[:3]))]
            self.assertEqual(*map(len, numbers), name)
            self.assertLessEqual(*numbers, name)

    def test_uv_runs_the_command_with_the_same(self):
        text = (ROOT / "generate.py").read_text()
        block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text).group(1)
        header = tomllib.loads(block.replace("\n# ", "\n").removeprefix("# "))
        lines = (ROOT / "requirements.txt").read_text().splitlines()
        self.assertEqual(header["dependencies"], lines)
        self.assertEqual(header["requires-python"], ">=3.10")


class TestLengths(Test):
    def test_files(self):
        for limit, paths in (
            (FILE, ROOT.glob("*.py")),
            (TEST_FILE, ROOT.glob("tests/*.py")),
            (README, [ROOT / "README.md"]),
        ):
            for path in paths:
                with self.subTest(path.name):
                    self.assertLessEqual(count_lines(path), limit)

    def test_functions_and_classes(self):
        """Without their docstrings."""
        for name in SCRIPTS:
            for node in ast.walk(tree(name)):
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                if function or isinstance(node, ast.ClassDef):
                    with self.subTest(f"{node.name} of {name}.py"):
                        first = bool(ast.get_docstring(node)) and len(node.body) > 1
                        lines = node.end_lineno - node.body[first].lineno + 1
                        self.assertLessEqual(lines, FUNCTION if function else CLASS)
