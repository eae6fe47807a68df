"""Torch's files without torch, hostile ones too."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import soundfile
from common import REFERENCE, Test

import published
import torch_file
from musicgen import MusicGen


class TestTorchFiles(Test):
    def fails(self, pattern: str, content: bytes):
        path = self.folder / "x.bin"
        path.write_bytes(content)
        with self.assertRaisesRegex(
            ValueError, "x.bin is not a checkpoint.*" + pattern
        ):
            torch_file.load_torch(path)
        path = path.rename(self.folder / "checkpoint.th")  # as a training's
        not_read = "must hold what audiocraft exports"  # nor is the damage then
        told = f"checkpoint.th (is not a checkpoint.*{pattern}|{not_read})"
        with self.assertRaisesRegex(ValueError, told) as caught:
            published.read(self.folder)
        message = str(caught.exception)
        self.assertLessEqual(len(message) - len(str(path)), 300)
        self.assertNotIn("\n", message)
        path.unlink()

    def test_round_trip(self):
        numbers = np.arange(12, dtype=np.float32)
        for form in (zip_file, legacy_file):
            path = self.folder / "x.bin"
            path.write_bytes(form(tensor_pickle((2, 3), (3, 1), offset=4), numbers))
            found = torch_file.load_torch(path)["x"]
            self.assertSame(found, numbers[4:10].reshape(2, 3))
            path.write_bytes(form(tensor_pickle((3, 2), (1, 3)), numbers))
            self.assertSame(
                torch_file.load_torch(path)["x"], numbers[:6].reshape(2, 3).T
            )
            path.write_bytes(form(tensor_pickle((), (), offset=11), numbers))
            self.assertEqual(torch_file.load_torch(path)["x"].item(), 11)

    def test_bfloat16(self):
        content = tensor_pickle((3,), (1,), kind="BFloat16Storage")
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(content, np.array([0x3F80] * 12, np.uint16)))
        found = torch_file.load_torch(path)["x"]
        self.assertEqual((found.dtype, found.tolist()), (mx.bfloat16, [1, 1, 1]))

    def test_reads_nothing_out_of_bounds(self):
        numbers = np.arange(12, dtype=np.float32)
        for shape, stride, offset in (
            ((2, 3), (6, 3), 1),  # last element 13
            ((12,), (1,), 1),
            ((2,), (-1,), 3),
            ((2,), (1,), -1),
            ((2, 2), (1,), 0),
            ((10**9, 10**9), (0, 0), 0),
            ((-1,), (1,), 0),
        ):
            content = tensor_pickle(shape, stride, offset)
            for form in (zip_file, legacy_file):
                self.fails("a tensor", form(content, numbers))
        for size in (13, 2**60):
            content = tensor_pickle((1,), (1,), size=size)
            self.fails("storage 0 reaches beyond", zip_file(content, numbers))
        content = tensor_pickle((1,), (1,), size=-1)
        self.fails("a storage has no name or size", zip_file(content, numbers))

    def test_parameter(self):
        tensor = tensor_pickle((2,), (1,))
        start, stop = tensor.index(b"ctorch._utils"), tensor.rindex(b"s.")
        wrapped = b"ctorch._utils\n_rebuild_parameter\n(" + tensor[start:stop]
        content = tensor[:start] + wrapped + b"\x89ccollections\nOrderedDict\n)RtRs."
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(content, np.arange(12, dtype=np.float32)))
        self.assertSame(torch_file.load_torch(path)["x"], [0, 1])

    def test_refuses_what_torch_does_not_write(self):
        numbers = np.zeros(12, np.float32)
        new = b"\x80\x02ccollections\nOrderedDict\n)\x81."
        self.fails("NEWOBJ class argument must be a type", zip_file(new, numbers))
        floats = tensor_pickle((2,), (1,)).replace(
            b"(J\x02\0\0\0t", b"(G" + struct.pack(">d", 2) + b"t"
        )
        self.fails("a tensor has a size", zip_file(floats, numbers))
        content = tensor_pickle((2,), (1,))
        big = zip_file(content, numbers, {"any/byteorder": "big"})
        self.fails("little-endian", big)
        self.fails("neither of torch's", legacy_file(content, numbers, little=False))
        old = legacy_file(content.replace(b"VIEW", b"K\x01"), numbers)
        self.fails("unknown kind of storage", old)

    def test_runs_nothing(self):
        witness = self.folder / "witness"

        class Hostile:
            def __reduce__(self):
                return (os.mkdir, (str(witness),))

        class Building:
            def __reduce__(self):
                return (torch_file.Dict, (), {"a": 1})

        numbers = np.zeros(12, np.float32)
        for content in (
            pickle.dumps(Hostile(), 2),
            pickle.dumps({"x": [Hostile()]}, 2),
            pickle.dumps(Building(), 2),
            pickle.dumps(Hostile(), 4),
            b"cbuiltins\neval\n(U\x0c__import__('U\x01'tR.",
            b"\x80\x02cos\nsystem\nq\x00.",
            b"\x80\x02ctorch\nload\n.",
            b"\x80\x02cos\nFloatStorage\n.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
        ):
            refused = "it (names|holds the pickle opcode)"
            self.fails(refused, zip_file(content, numbers))
            self.fails(refused, legacy_file(content, numbers))
            self.fails(refused, content)
        self.assertFalse(witness.exists())

    def test_opcodes_are_those_that_torch_needs(self):
        """None beside them: each would be one more tool of who writes a hostile file."""
        needed = {"SHORT_BINSTRING"}  # a text by Python 2, which follows below
        for path in REFERENCE.rglob("*"):
            if path.suffix in (".bin", ".th"):
                needed |= opcodes(program(path))
        plain = [None, True, False, 1, 300, 70000, -1, 2**40, 1.5, "a", (), (1,)]
        plain += [(1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1], {}, {"a": 1}, {1: 2, 3: 4}]
        many = [f"text {i}" for i in range(300)]
        needed |= opcodes(pickle.dumps([plain, many, many[0], many[-1]], 2))
        self.assertEqual(torch_file.OPCODES, needed)
        written = tensor_pickle((2,), (1,)).replace(b"X\1\0\0\0x", b"U\1x")
        path = self.folder / "python2.bin"
        path.write_bytes(zip_file(written, np.arange(12, dtype=np.float32)))
        self.assertSame(torch_file.load_torch(path)["x"], [0, 1])

    def test_refuses_every_other_opcode(self):
        others = {op for op in pickletools.opcodes if op.name not in torch_file.OPCODES}
        self.assertGreater(len(others), 30)
        for opcode in others:
            with self.subTest(opcode.name):
                content = b"\x80\x02" + spelled_out(opcode) + b"N."
                told = f"it holds the pickle opcode {opcode.name}\\b"
                self.fails(told, zip_file(content, np.zeros(1)))

    def test_hostile_opcodes(self):
        """With these a few bytes nest without end, hide what they call, or call it
        without a name that is looked up."""
        for name, content in (
            ("DUP", b")" + 60 * b"2\x86"),  # tuples of tuples, 2**60 of them
            ("DUP", b"]" + 60 * b"2a"),
            ("POP", b"cos\nsystem\n0N"),
            ("POP_MARK", b"(cos\nsystem\n1N"),
            ("INST", b"(K\1ios\nsystem\n"),
            ("OBJ", b"(cos\nsystem\nK\1o"),
            ("STACK_GLOBAL", b"X\2\0\0\0osX\6\0\0\0system\x93"),
            ("NEWOBJ_EX", b"ccollections\nOrderedDict\n)}\x92"),
            ("EXT1", b"\x82\x01"),
            ("MEMOIZE", b"]" + 9 * b"\x94"),
            ("FRAME", b"\x95" + b"\xff" * 8),
            ("LONG4", b"\x8b" + struct.pack("<i", 2**20) + bytes(2**20)),
        ):
            with self.subTest(name):
                told = f"it holds the pickle opcode {name}\\b"
                self.fails(told, zip_file(b"\x80\x02" + content + b".", np.zeros(1)))

    def test_tells_what_is_missing(self):
        numbers = np.arange(12, dtype=np.float32)
        content = zip_file(tensor_pickle((2,), (1,)), numbers)
        for left_out, told in (
            ("any/data/0", "it lacks 'any/data/0'"),
            ("any/data.pkl", "it must hold one data.pkl, but has 0"),
        ):
            buffer = io.BytesIO()
            with (
                zipfile.ZipFile(io.BytesIO(content)) as whole,
                zipfile.ZipFile(buffer, "w") as part,
            ):
                for name in whole.namelist():
                    if name != left_out:
                        part.writestr(name, whole.read(name))
            self.fails(told, buffer.getvalue())
        twice = zip_file(tensor_pickle((2,), (1,)), numbers, {"b/data.pkl": "N."})
        self.fails("it must hold one data.pkl, but has 2", twice)
        old = legacy_file(tensor_pickle((2,), (1,)), numbers)
        other = old.replace(pickle.dumps(["0"], 2), pickle.dumps(["1"], 2))
        self.assertNotEqual(other, old)
        self.fails("it lacks ", other)
        short = b"\x80\x02(X\x07\0\0\0storagetQ."
        for named in (short, b"\x80\x02K\1Q."):
            self.fails("an unknown kind of storage", zip_file(named, numbers))

    def test_sets_nothing_on_our_functions(self):
        for name in ("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2"):
            content = b"\x80\x02c" + name.encode() + b"\n}X\x01\0\0\0aK\x01sb."
            self.fails("has no attribute '__dict__'", zip_file(content, np.zeros(1)))
            slots = b"\x80\x02c" + name.encode() + b"\n(N}X\x04\0\0\0makeK\x01stb."
            self.fails("can't set attribute", zip_file(slots, np.zeros(1)))
        for maker in torch_file.KNOWN.values():
            self.assertFalse(hasattr(maker, "a"))
            if not isinstance(maker, type):
                self.assertFalse(hasattr(maker, "__dict__"))

    def test_arguments_of_another_kind(self):
        for name in ("_rebuild_parameter", "_rebuild_tensor_v2"):
            content = b"\x80\x02ctorch._utils\n" + name.encode()
            content += b"\n(X\x03\0\0\0heyK\0))tR."
            self.fails(
                "it makes a (parameter|tensor) of something else",
                zip_file(content, np.zeros(1)),
            )
        content = b"\x80\x02cos\x1b[31m\nsystem\n."
        self.fails(r"it names 'os\\x1b\[31m.system'", zip_file(content, np.zeros(1)))

    def test_what_is_held_often_is_made_once(self):
        laughs = b"\x80\x02]q\0"
        for level in range(60):  # each list holds the one before it ten times
            inner = b"h" + bytes([level])
            laughs += b"](" + 10 * inner + b"eq" + bytes([level + 1])
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(laughs + b".", np.zeros(1)))
        torch_file.load_torch(path)
        tensor = tensor_pickle((6,), (1,))
        again = tensor.removesuffix(b"s.") + b"q\0sX\x01\0\0\0yh\0s."
        path.write_bytes(zip_file(again, np.arange(12, dtype=np.float32)))
        found = torch_file.load_torch(path)
        self.assertIs(found["x"], found["y"])

    def test_nests_no_tuples(self):
        bomb = b"\x80\x02}(K\x01t" + b"".join(
            b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
        )
        for content in (bomb + b"K\x01s.", bomb + b"."):  # as a key, and alone
            self.fails("holds a tuple twice", zip_file(content, np.zeros(1)))
        with self.assertRaisesRegex(ValueError, "a size, stride"):
            huge = (2**64,) * 3
            torch_file.make_tensor(
                torch_file.Storage("FloatStorage", "0", 1), 0, huge, huge
            )
        with self.assertRaisesRegex(ValueError, "something else"):
            many = (1,) * 9
            torch_file.make_tensor(
                torch_file.Storage("FloatStorage", "0", 1), 0, many, many
            )

    def test_state_must_map_names_to_tensors(self):
        folder = self.copy("stereo-transformers")
        path = folder / "pytorch_model-00001-of-00002.bin"
        for content in (
            b"].",
            b"N.",
            b"K\x03.",
            b"}X\x01\0\0\0aK\x01s.",
            b"}K\x01K\x02s.",
        ):
            path.write_bytes(zip_file(b"\x80\x02" + content, np.zeros(1)))
            with self.assertRaisesRegex(ValueError, "00001-of-00002.bin must map"):
                MusicGen.from_pretrained(folder)

    def test_cut_short_says_what_to_do(self):
        content = (REFERENCE / "mono-audiocraft" / "state_dict.bin").read_bytes()
        for size in (0, 1, 2, 100, len(content) // 2, len(content) - 1):
            self.fails("fetch it again", content[:size])

    def test_files_of_another_kind(self):
        """Their bytes are not shown, and what to name is told."""
        notes = io.BytesIO()
        soundfile.write(notes, np.zeros((9, 1)), 32000, format="WAV")
        for content in (notes.getvalue(), b"RIFFDb\x10", b"I7;\n.", b"Fa'b\n."):
            self.fails(r"[^:'\"]*\. Name a \.bin or \.th file; if .*again\.$", content)
        error = torch_file.in_words(ValueError())
        self.assertEqual(error, "it holds something else")

    def test_overlapping_tensors_do_not_multiply(self):
        numbers = np.zeros(1000, np.float32)
        start, stop = b"\x80\x02]", b"."
        body = b"".join(
            tensor_pickle((1000 - i,), (1,), i, size=1000)[2:].removesuffix(b".") + b"a"
            for i in range(20)
        )
        self.fails("far more than the file", zip_file(start + body + stop, numbers))

    def test_memory_is_not_for_the_asking(self):
        bomb = b"\x80\x02}r\xff\xff\xff\xff."  # memo entry 2**32 - 1
        self.fails("numbers more objects", zip_file(bomb, np.zeros(1, np.float32)))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(10**6))
        self.fails("stored", buffer.getvalue())

    def test_checksums(self):
        numbers = np.arange(12, dtype=np.float32)
        content = zip_file(tensor_pickle((2, 3), (3, 1)), numbers)
        place = content.index(numbers.tobytes())
        for i in (place, place + 47, content.index(b"_rebuild_tensor_v2") + 40):
            damaged = bytearray(content)
            damaged[i] ^= 1
            self.fails(r"checksum \(CRC\) of its 'any/data(/0|.pkl)'", bytes(damaged))
        path = self.folder / "x.bin"
        path.write_bytes(without_sums(content))  # torch.serialization.set_crc32_options
        found = torch_file.load_torch(path)["x"]
        self.assertSame(found, numbers[:6].reshape(2, 3))

    def test_damaged(self):
        content = (REFERENCE / "mono-audiocraft" / "state_dict.bin").read_bytes()
        step = len(content) // 7
        for damaged in (b"", b"PK\x03\x04", *(content[: i * step] for i in range(7))):
            self.fails("", damaged)
        rng = np.random.default_rng(0)
        path = self.folder / "x.bin"
        for _ in range(200):  # flipped bytes: any outcome but a crash
            flipped = bytearray(content[:60000] + content[-40000:])
            for place in rng.integers(0, len(flipped), 20):
                flipped[place] ^= int(rng.integers(1, 256))
            path.write_bytes(flipped)
            try:
                torch_file.load_torch(path)
            except ValueError:
                pass

    def test_script(self):
        numbers = np.arange(12, dtype=np.float32)
        path = self.folder / "x.bin"
        path.write_bytes(zip_file(tensor_pickle((2, 3), (3, 1)), numbers))
        with patch("sys.argv", ["torch_file.py", str(path)]):
            with redirect_stdout(io.StringIO()) as out:
                torch_file.main()
        self.assertEqual(out.getvalue(), "x: float32 (2, 3)\n")
        path.write_bytes(b"noise")
        for name in (path, self.folder / "none.bin"):
            with patch("sys.argv", ["torch_file.py", str(name)]):
                with self.assertRaisesRegex(SystemExit, f"error: .*{name.name}"):
                    torch_file.main()


def program(path: Path) -> bytes:
    """The pickle in a file of torch's zip format."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        return archive.read(name)


def opcodes(content: bytes) -> set[str]:
    return {opcode.name for opcode, _, _ in pickletools.genops(content)}


def spelled_out(opcode: pickletools.OpcodeInfo) -> bytes:
    """An opcode with an argument, the smallest that it takes."""
    code, size = opcode.code.encode("latin-1"), opcode.arg and opcode.arg.n
    if size == pickletools.UP_TO_NEWLINE:
        several = (b"1\n", b"'1'\n", b"1\n1\n")
    else:
        several = (bytes(max(size or 0, 0)), *map(bytes, (1, 4, 8)))
    for argument in several:
        try:
            found = [op.name for op, _, _ in pickletools.genops(code + argument + b".")]
        except ValueError:
            continue
        if found == [opcode.name, "STOP"]:
            return code + argument
    raise AssertionError(opcode.name)


def tensor_pickle(shape, stride, offset=0, size=12, kind="FloatStorage") -> bytes:
    """The pickle that torch writes for {"x": tensor}, assembled by hand."""

    def number(n: int) -> bytes:
        if -(2**31) <= n < 2**31:
            return b"J" + struct.pack("<i", n)
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def text(string: str) -> bytes:
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n"
    storage += text("0") + text("cpu") + number(size)
    return (
        b"\x80\x02}"
        + text("x")
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        # the legacy form's sixth item, None, is left out of the zip form
        + storage
        + b"VIEW"
        + b"tQ"
        + number(offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def zip_file(content: bytes, numbers: np.ndarray, more: dict | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("any/data.pkl", content.replace(b"VIEW", b""))
        archive.writestr("any/data/0", numbers.tobytes())
        archive.writestr("any/version", "3\n")
        for name, text in (more or {}).items():
            archive.writestr(name, text)
    return buffer.getvalue()


def without_sums(content: bytes) -> bytes:
    """A zip file whose directory has zeros for checksums."""
    content = bytearray(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sums = [info.CRC for info in archive.infolist()]
    for entry in sums:
        place = content.rindex(struct.pack("<I", entry))  # of the directory, at the end
        content[place : place + 4] = bytes(4)
    return bytes(content)


def legacy_file(content: bytes, numbers: np.ndarray, little: bool = True) -> bytes:
    magic = 0x1950A86A20F9469CFC6C
    header = [magic, 1001, {"little_endian": little, "protocol_version": 1001}]
    head = b"".join(pickle.dumps(item, 2) for item in header)
    content = content.replace(b"VIEW", b"N") + pickle.dumps(["0"], 2)
    return head + content + struct.pack("<q", numbers.size) + numbers.tobytes()
