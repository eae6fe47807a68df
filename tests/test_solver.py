"""audiocraft's own training output: `checkpoint.th`, against what audiocraft makes of it,
and hostile settings in it."""

import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import EXPECTED, REFERENCE, Test, expected
from test_torch_file import legacy_file, zip_file

import audiocraft
import torch_file
from musicgen import MusicGen

NAME = "solver-audiocraft"
FILES = ("checkpoint.th", "state_dict.bin")
PROMPTS = EXPECTED["mono-audiocraft"]["prompts"]


class SolverTest(Test):
    def folder_with(self, *files: Path) -> Path:
        """mono-audiocraft's T5 and codec beside other files of a decoder."""
        folder = self.copy("mono-audiocraft")
        (folder / "state_dict.bin").unlink()
        for file in files:
            shutil.copy(file, folder)
        return folder

    def assertGreedy(self, folder: Path, prompts: list[str], name: str):
        model = MusicGen.from_pretrained(folder, mx.float32)
        for coef in (1, 3):
            options = dict(temp=0, guidance_coef=coef)
            codes = model.generate_codes(prompts, 15 / 50, **options)
            self.assertSame(codes.swapaxes(1, 2), expected(name)[f"g{coef}_codes"])


class TestSolver(SolverTest):
    def test_codes(self):
        """Of the training's file, and of what audiocraft's export_lm makes of it: both
        in bfloat16."""
        for file in FILES:
            with self.subTest(file):
                path = REFERENCE / NAME / file
                state = audiocraft.load_package(path)["best_state"]
                self.assertEqual({w.dtype for w in state.values()}, {mx.bfloat16})
                folder = self.folder_with(path)
                self.assertGreedy(folder, PROMPTS, NAME)
                shutil.rmtree(folder)

    def test_settings_are_those_of_the_export(self):
        settings = {}
        for file in FILES:
            package = audiocraft.load_package(REFERENCE / NAME / file)
            found = audiocraft.read_settings(package)
            self.assertEqual(
                float(found.pop("optim.adam.eps")), 1e-8
            )  # in two spellings
            self.assertEqual(found["deadlock.use"], "false")  # "${fsdp.use}"
            self.assertEqual(found["optim.adam.betas"], ["0.9", "0.95"])
            settings[file] = found
        self.assertEqual(*settings.values())
        self.assertGreater(len(found), 60)
        self.assertNotIn("omegaconf", sys.modules)

    def test_only_what_is_needed_is_read(self):
        """Not the optimizer, which takes four times as much."""
        with patch.object(torch_file, "view", side_effect=torch_file.view) as view:
            package = audiocraft.load_package(REFERENCE / NAME / "checkpoint.th")
        self.assertEqual(view.call_count, len(package["best_state"]))
        whole = torch_file.load_torch(REFERENCE / NAME / "checkpoint.th")
        self.assertEqual(len(whole["optimizer"]["state"]), len(package["best_state"]))
        self.assertEqual(whole["xp.sig"], "f10c7e5b")

    def test_what_is_exported_comes_first(self):
        folder = self.folder_with(REFERENCE / NAME / FILES[0])
        self.assertEqual(audiocraft.find_decoder(folder).name, FILES[0])
        shutil.copy(REFERENCE / NAME / FILES[1], folder)
        self.assertEqual(audiocraft.find_decoder(folder).name, FILES[1])

    def test_codec_that_is_only_named(self):
        """By a file, or by the settings of the training alone."""
        folder = self.folder_with(REFERENCE / NAME / FILES[0])
        stereo = REFERENCE / "stereo-audiocraft"
        shutil.copytree(stereo / "encodec_32khz", folder / "encodec_32khz")
        (folder / "compression_state_dict.bin").unlink()
        self.assertGreedy(folder, PROMPTS, NAME)
        shutil.copy(stereo / "compression_state_dict.bin", folder)
        self.assertGreedy(folder, PROMPTS, NAME)
        (folder / "compression_state_dict.bin").unlink()
        shutil.rmtree(folder / "encodec_32khz")
        with patch("huggingface_hub.hf_hub_download", side_effect=OSError("offline")):
            with self.assertRaisesRegex(
                OSError, "needs the codec facebook/encodec_32khz in .*(offline|OFFLINE)"
            ):
                MusicGen.from_pretrained(folder)

    def test_only_what_is_read_is_checked(self):
        """As the guide says."""
        path = Path(shutil.copy(REFERENCE / NAME / FILES[0], self.folder))
        content = bytearray(path.read_bytes())
        state = audiocraft.load_package(path)["best_state"]
        sizes = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                sizes[info.filename] = info
        with patch.object(torch_file, "cut", side_effect=torch_file.cut) as cut:
            audiocraft.load_package(path)
        read = {call.args[1].key for call in cut.call_args_list}
        unread = next(
            info
            for name, info in sizes.items()
            if "/data/" in name and Path(name).name not in read and info.file_size > 8
        )
        lengths = struct.unpack_from("<HH", content, unread.header_offset + 26)
        content[unread.header_offset + 30 + sum(lengths)] ^= 255
        path.write_bytes(content)
        again = audiocraft.load_package(path)["best_state"]
        self.assertEqual(again.keys(), state.keys())
        with self.assertRaisesRegex(ValueError, "checksum"):
            torch_file.load_torch(path)

    def test_states(self):
        path, state = Path("checkpoint.th"), {"a": mx.zeros(1)}
        for package, wanted in (
            ({"best_state": state}, state),
            ({"best_state": {"model": state}}, state),
            ({"best_state": {"model": state}, "fsdp_best_state": {}}, state),
            ({"best_state": {"model": {}}, "fsdp_best_state": {"model": state}}, state),
        ):
            self.assertEqual(audiocraft.best_state(path, package), wanted)
        empty = {"best_state": {"model": {}}, "fsdp_best_state": {}}
        with self.assertRaisesRegex(ValueError, "checkpoint.th must hold a best state"):
            audiocraft.best_state(path, empty)
        for package in ({}, {"best_state": {"model": {"a": 3}}}, {"best_state": 3}):
            with patch.object(audiocraft, "load_torch", return_value=package):
                with self.assertRaisesRegex(ValueError, "checkpoint.th must"):
                    audiocraft.load_package(path)


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def record(name: str, key: str, value: bytes) -> bytes:
    """The pickle of an object of omegaconf with one attribute."""
    module, _, kind = name.rpartition(".")
    head = f"c{module}\n{kind}\n".encode() + b")\x81"
    return head + b"}" + text(key) + value + b"sb"


def leaf(value: bytes) -> bytes:
    return record("omegaconf.nodes.AnyNode", "_val", value)


def mapping(value: bytes) -> bytes:
    return record("omegaconf.dictconfig.DictConfig", "_content", value)


def program(value: bytes) -> bytes:
    """{"best_state": {}, "xp.cfg": value}, as a program."""
    head = b"\x80\x02}" + text("best_state") + b"}s" + text("xp.cfg")
    return head + value + b"s."


class TestShards(Test):
    def test_of_fsdp_are_refused_in_a_line(self):
        """And whatever else a training may pickle beside tensors."""
        path = self.folder / "checkpoint.th"
        for name in (
            "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
            "torch.distributed.fsdp.api.FullStateDictConfig",
            "pathlib.PosixPath",
            "audiocraft.solvers.musicgen.MusicGenSolver",
        ):
            content = program(record(name, "a", leaf(text("b"))))
            path.write_bytes(zip_file(content, np.zeros(1, np.float32)))
            with self.assertRaises(ValueError) as caught:
                MusicGen.from_pretrained(self.folder)
            told = str(caught.exception)
            self.assertRegex(
                told, f"checkpoint.th is no.* it names '{name[:20]}.*, which"
            )
            self.assertLessEqual(len(told), 400)
            self.assertNotIn("\n", told)


class TestHostileSettings(Test):
    def read(self, content: bytes, form=zip_file):
        path = self.folder / "checkpoint.th"
        path.write_bytes(form(content, np.zeros(1, np.float32)))
        return audiocraft.load_package(path)

    def fails(self, pattern: str, content: bytes, forms=(zip_file, legacy_file)):
        for form in forms:
            with self.assertRaisesRegex(ValueError, pattern) as caught:
                self.read(content, form)
            message = str(caught.exception)
            self.assertIn("checkpoint.th", message)
            self.assertLess(len(message), 400)
            self.assertNotIn("\n", message)

    def test_settings(self):
        inner = mapping(b"}" + text("b") + leaf(b"K\x03") + b"s")
        found = self.read(program(mapping(b"}" + text("a") + inner + b"s")))
        self.assertEqual(audiocraft.read_settings(found), {"a.b": "3"})
        whole = self.read(program(mapping(text("${other}"))))  # all is a reference
        self.assertEqual(whole["xp.cfg"], "${other}")

    def test_runs_nothing(self):
        witness = self.folder / "witness"

        class Hostile:
            def __reduce__(self):
                return (os.mkdir, (str(witness),))

        run = pickle.dumps(Hostile(), 2)[2:-1]
        for value in (
            run,
            leaf(run),
            mapping(run),
            mapping(b"}" + text("a") + run + b"s"),
        ):
            self.fails("it names '(os|posix|nt).mkdir'", program(value))
        factory = b"ccollections\ndefaultdict\ncos\nsystem\n\x85R"
        self.fails("it names 'os.system'", program(factory))
        self.assertFalse(witness.exists())

    def test_names_that_are_not_listed(self):
        for name in (
            "omegaconf.omegaconf.OmegaConf",
            "omegaconf.dictconfig.os",
            "omegaconf.base.Container",
            "omegaconf.DictConfig",
            "omegaconf.dictconfig.DictConfig.__init__",
            "__builtin__.eval",
            "__builtin__.getattr",
            "builtins.dict",
            "typing.ForwardRef",
            "collections.Counter",
            "copyreg.__newobj__",
        ):
            module, _, kind = name.rpartition(".")
            call = f"c{module}\n{kind}\n".encode() + b")R"
            self.fails(f"it names '{name}', which no checkpoint needs", program(call))

    def test_names_of_types_call_nothing(self):
        for name in torch_file.TYPES:
            module, _, kind = name.rpartition(".")
            kind = f"c{module}\n{kind}\n".encode()
            self.fails("not callable", program(kind + b"]\x85R"))
            self.fails("must be a type", program(kind + b")\x81"))
            found = self.read(program(mapping(b"}" + text("a") + leaf(kind) + b"s")))
            self.assertEqual(found["xp.cfg"], {"a": name.rpartition(".")[2]})

    def test_records_take_nothing_else(self):
        for name, maker in torch_file.KNOWN.items():
            if isinstance(maker, type):
                module, _, kind = name.rpartition(".")
                kind = f"c{module}\n{kind}\n".encode()
                for call in (b"K\x03\x85\x81", b"K\x03\x85R"):
                    self.fails("argument", program(kind + call))
                self.fails("argument", program(kind + b"}b"))  # set on the class
                slots = b"(N}" + text("_state") + b"K\x03stb"
                self.fails("argument", program(kind + slots))
                for state in (slots, b"NK\x03\x86b", b"]b", b"Nb"):
                    self.fails(
                        "settings of another kind", program(kind + b")\x81" + state)
                    )
                self.assertEqual(maker()._state, {})

    def test_trees_without_end(self):
        circle = mapping(b"}q\0" + text("a") + b"h\0s")
        self.fails("holds itself", program(circle), (zip_file,))
        parent = (
            b"comegaconf.dictconfig\nDictConfig\n)\x81q\0}" + text("_content") + b"}s"
        )
        parent += text("_parent") + b"h\0sb"  # which is as omegaconf has it
        self.assertEqual(self.read(program(parent))["xp.cfg"], {})

    def test_trees_that_multiply(self):
        for end in (b"}", b"]", b"K\x03"):
            levels = b"](" + end + b"q\0"
            for level in range(60):
                inner = b"h" + bytes([level])
                items = b"".join(text(str(i)) + inner for i in range(10))
                levels += b"}(" + items + b"uq" + bytes([level + 1])
            before = b"\x80\x02}" + text("pretrained") + levels + b"es"
            after = program(b"h" + bytes([60])).removeprefix(b"\x80\x02}")
            package = self.read(before + after)
            with self.assertRaisesRegex(ValueError, "more settings than any training"):
                audiocraft.read_settings(package)
        long = mapping(
            b"}" + text("a" * 600) + mapping(b"}" + text("b" * 600) + b"}s") + b"s"
        )
        with self.assertRaisesRegex(ValueError, "more settings than any training"):
            audiocraft.read_settings(self.read(program(long)))
