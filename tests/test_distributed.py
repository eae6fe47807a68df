"""Several processes."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
from common import REFERENCE, ROOT, Test, slow

import engine
from musicgen import MusicGen


class TestDistributed(Test):
    """Two processes on the loopback ring, started by MLX's own launcher."""

    model = str(REFERENCE / "stereo-audiocraft")

    def setUp(self):
        super().setUp()
        if not mx.distributed.is_available("ring"):
            self.skipTest("MLX was built without its ring backend")
        if not Path(sys.executable).with_name("mlx.launch").exists():
            self.skipTest("mlx.launch does not lie beside this Python")

    def launch(self, *arguments: str, name: str, port: int) -> str:
        """What two processes print; their files are NAME-1.wav and so on."""
        launcher = Path(sys.executable).with_name("mlx.launch")
        command = [str(launcher), "-n", "2", "--backend", "ring", "-p", str(port)]
        command += ["--", *self.command(*arguments, name=name)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return result.stdout + result.stderr

    def command(self, *arguments: str, name: str) -> list[str]:
        prompts, output = self.folder / "prompts.txt", self.folder / f"{name}.wav"
        if not prompts.exists():
            prompts.write_text("drums\nslow piano\nguitar\n")
        command = [sys.executable, str(ROOT / "generate.py"), *arguments]
        command += ["--prompts", str(prompts), "--output", str(output)]
        return command + ["--model", self.model, "--seed", "3", "--duration", "0.3"]

    def sounds(self, name: str) -> list[str]:
        paths = sorted(self.folder.glob(f"{name}-*.wav"))
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    @slow(4)
    def test_file_of_prompts(self):
        subprocess.run(self.command(name="one"), capture_output=True, check=True)
        told = self.launch(name="two", port=32423)
        self.assertEqual(len(self.sounds("one")), 3, told)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    @slow(4)
    def test_tensor_parallel(self):
        greedy = ("--temp", "0")
        one = self.command(*greedy, name="one")
        subprocess.run(one, capture_output=True, check=True)
        told = self.launch(*greedy, "--tensor-parallel", name="two", port=32433)
        self.assertEqual(told.count("seed"), 3, told)  # by one of the processes
        self.assertEqual(len(self.sounds("one")), 3, told)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    @slow(4)
    def test_tensor_parallel_quantized(self):
        """Each process has whole groups of its share."""
        self.model = str(REFERENCE / "mono-transformers")
        flags = ("--temp", "0", "--q-mode", "nvfp4")
        subprocess.run(
            self.command(*flags, name="one"), capture_output=True, check=True
        )
        told = self.launch(*flags, "--tensor-parallel", name="two", port=32473)
        self.assertEqual(len(self.sounds("one")), 3, told)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    @slow(4)
    def test_a_process_that_fails_leaves_the_other_its_lines(self):
        lines = ['{"prompt": "a", "audio_prompt": "none.wav"}', '{"prompt": "b"}'] * 4
        (self.folder / "prompts.txt").write_text("\n".join(lines))
        told = self.launch("--batch-size", "1", name="two", port=32453)
        self.assertEqual(len(self.sounds("two")), 4, told)
        self.assertEqual(told.count("no sound file none.wav"), 4, told)

    @slow(3)
    def test_takes_are_shared(self):
        (self.folder / "prompts.txt").touch()
        launcher = Path(sys.executable).with_name("mlx.launch")
        command = [str(launcher), "-n", "2", "--backend", "ring", "-p", "32463", "--"]
        command += [sys.executable, str(ROOT / "generate.py"), "--prompt", "a"]
        command += ["--takes", "3", "--duration", "0.1", "--model", self.model]
        output = ["--output", str(self.folder / "x.wav")]
        result = subprocess.run(
            command + output, cwd=ROOT, capture_output=True, text=True
        )
        self.assertEqual(result.stdout.count(" seed "), 3, result.stdout)
        seeds = set(re.findall(r"seed (\d+),", result.stdout))
        first = min(map(int, seeds))
        self.assertEqual(seeds, {str(first + i) for i in range(3)}, result.stdout)
        self.assertEqual(len(self.sounds("x")), 3)

    def test_tensor_parallel_needs_processes(self):
        command = self.command("--tensor-parallel", name="one")
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr, "^generate.py: error: .*needs mlx.launch.*\n$")

    @slow(4)
    def test_killed_and_repeated(self):
        one = self.command("--batch-size", "1", name="one")
        process = subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()  # the first file is there
        process.kill()
        process.communicate()
        made = {path: path.stat().st_mtime_ns for path in self.folder.glob("one-*.wav")}
        self.assertIn(len(made), (1, 2))
        told = self.launch("--batch-size", "1", name="one", port=32443)
        self.assertEqual(told.count(" seed "), 3 - len(made), told)
        for path, stamp in made.items():
            self.assertEqual(path.stat().st_mtime_ns, stamp)
        subprocess.run(self.command(name="two"), capture_output=True, check=True)
        self.assertEqual(self.sounds("two"), self.sounds("one"), told)

    def test_processes_that_do_not_divide_the_heads(self):
        class Three:
            def size(self):
                return 3

        model = MusicGen.from_pretrained(self.model)
        with self.assertRaisesRegex(ValueError, "must divide num_attention_heads"):
            engine.shard(model.decoder, Three())

    def test_processes_that_do_not_divide_the_groups(self):
        class Two:
            def size(self):
                return 2

        folder = REFERENCE / "mono-transformers"
        model = MusicGen.from_pretrained(folder, q_mode="mxfp4")
        pattern = "matrices' width, 16, must be a multiple of q_group_size, 32: take"
        with self.assertRaisesRegex(ValueError, pattern):
            engine.shard(model.decoder, Two())
