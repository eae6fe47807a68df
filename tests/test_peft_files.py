"""Adapters of PEFT: read, merged and written."""

import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock, patch

import mlx.core as mx
import sounds
from common import REFERENCE, Test, exact, expected, last
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from mlx.utils import tree_flatten

import adapters
import convert
import hub
import lora
import peft_config
import peft_files
from decoder import Condition
from musicgen import MusicGen
from quantize import quantize

ADAPTERS = REFERENCE / "peft"
ABOUT = json.loads((ADAPTERS / "expected.json").read_text())
PROMPTS = ["slow piano ballad with soft strings", "808 drums"]
TUNES = [[60, 64, 67, 72, 71], [69, 65, 62, 57, 59, 64]]  # of make_melody.py
GREEDY = dict(duration=0.3, temp=0, guidance_coef=3.0)
LAYER = "base_model.model.decoder.model.decoder.layers.0."


def adapted(name: str, adapter, scale=1.0, **options) -> MusicGen:
    options |= dict(adapter=adapter, adapter_scale=scale)
    return MusicGen.from_pretrained(REFERENCE / name, mx.float32, **options)


def codes_of(model: MusicGen) -> mx.array:
    if model.conditioner is None:
        return model.generate_codes(PROMPTS, **GREEDY)
    melody = [mx.array(sounds.tune(32000, notes)) for notes in TUNES]
    options = GREEDY | dict(melody=melody, separate=False)
    return model.generate_codes(PROMPTS, **options)


def logits_of(model: MusicGen, name: str) -> mx.array:
    """After the tokens of the checkpoint's own reference values: (2, S, K, V)."""
    values = expected(name)
    mask = values["text_mask"][:2].astype(mx.bool_)
    text = Condition(model.text_encoder(values["text_ids"][:2], mask), mask)
    decoder = model.decoder
    no_cache = [None] * len(decoder.layers)
    return decoder(last(values["tokens"]), decoder.text_kv(text), no_cache)


class TestAgainstPeft(Test):
    def assertIsAs(self, model: MusicGen, name: str, values: dict, case: str):
        self.assertSame(codes_of(model), last(values[f"{case}codes"]))
        if f"{case}logits" in values:
            wanted = values[f"{case}logits"].transpose(0, 2, 1, 3)
            self.assertClose(logits_of(model, name), wanted)

    def test_each_target_and_setting(self):
        """At three scales: nothing, half, and all of it."""
        for case in (
            "mono",
            "mono-text",
            "mono-saved",
            "mono-bias",
            "stereo",
            "melody",
        ):
            values = mx.load(str(ADAPTERS / case / "expected.safetensors"))
            name = ABOUT[case]["model"]
            for scale in (0.0, 0.5, 1.0):
                with self.subTest(f"{case}, {scale}"):
                    model = adapted(name, ADAPTERS / case, scale)
                    self.assertIsAs(model, name, values, f"scale_{scale:g}_")

    def test_a_saved_table_that_t5_does_not_read(self):
        """PEFT replaces `shared`, and T5's encoder goes on with its own table."""
        case, name = "mono-shared", "mono-transformers"
        values = mx.load(str(ADAPTERS / case / "expected.safetensors"))
        saved = mx.load(str(ADAPTERS / case / peft_files.WEIGHTS))
        plain = exact(name).text_encoder.shared.weight
        table = saved["base_model.model.text_encoder.shared.weight"]
        self.assertTrue((table != plain).any())
        for scale in (0.5, 1.0):
            with self.assertWarnsRegex(UserWarning, "text_encoder.shared is left out"):
                model = adapted(name, ADAPTERS / case, scale)
            self.assertIsAs(model, name, values, f"scale_{scale:g}_")

    def test_several(self):
        values = mx.load(str(ADAPTERS / "two" / "expected.safetensors"))
        paths = [ADAPTERS / case for case in ABOUT["two"]["adapters"]]
        model = adapted("mono-transformers", paths, ABOUT["two"]["scales"])
        self.assertIsAs(model, "mono-transformers", values, "")
        told = dict(adapter=[*map(str, paths)], adapter_scale=ABOUT["two"]["scales"])
        self.assertEqual(model.adapter, told)

    def test_ours_in_transformers(self):
        """What was trained here gives the same there, where PEFT loads it."""
        for kind in ("mono", "stereo", "melody"):
            name, path = f"{kind}-transformers", ADAPTERS / f"ours-{kind}"
            values = mx.load(str(path / "expected.safetensors"))
            before = codes_of(exact(name))
            self.assertTrue((before != last(values["codes"])).any())
            for adapter in (f"{path}.safetensors", path):
                with self.subTest(adapter):
                    self.assertIsAs(adapted(name, adapter), name, values, "")

    def test_written_as_it_was(self):
        """The files that the reference values were made with."""
        for kind in ("mono", "stereo", "melody"):
            there, here = ADAPTERS / f"ours-{kind}", self.folder / kind
            peft_files.write(here, *lora.read_adapter(f"{there}.safetensors"))
            for name in (peft_files.CONFIG, peft_files.WEIGHTS):
                wanted = (there / name).read_bytes()
                self.assertEqual((here / name).read_bytes(), wanted, name)


class TestMerging(Test):
    def test_before_the_decoder_is_cast_and_quantized(self):
        """In float32: a small change is not lost beside a large weight."""
        name, path = self.copy("mono-transformers"), ADAPTERS / "mono"
        weights = mx.load(str(name / "model.safetensors"))
        weights = {k: w * 1.0003 for k, w in weights.items()}  # no float16 holds them
        mx.eval(weights)
        mx.save_safetensors(str(name / "model.safetensors"), weights)
        whole = adapted(name, path)
        half = MusicGen.from_pretrained(name, mx.float16, adapter=path)
        wanted = dict(tree_flatten(whole.decoder.parameters()))
        for key, value in tree_flatten(half.decoder.parameters()):
            self.assertSame(value, wanted[key].astype(mx.float16))
        packed = adapted(name, path, q_bits=8, q_group_size=32)
        quantize(whole.decoder, 8, 32)
        wanted = dict(tree_flatten(whole.decoder.parameters()))
        got = dict(tree_flatten(packed.decoder.parameters()))
        self.assertEqual(got.keys(), wanted.keys())
        for key, value in got.items():
            self.assertSame(value, wanted[key])
        self.assertFalse(lora.has_adapters(packed.decoder))

    def test_beside_one_of_ours(self):
        """Named in either order, quantized or not."""
        name = "mono-transformers"
        paths = [ADAPTERS / "mono", ADAPTERS / "ours-mono.safetensors"]
        folders = [ADAPTERS / "mono", ADAPTERS / "ours-mono"]
        wanted = logits_of(adapted(name, folders, [0.5, 0.25]), name)
        for adapters, scales in ((paths, [0.5, 0.25]), (paths[::-1], [0.25, 0.5])):
            self.assertClose(logits_of(adapted(name, adapters, scales), name), wanted)
        few = dict(q_bits=8, q_group_size=32)
        both = adapted(name, paths, [0.5, 0.25], **few)
        self.assertTrue(lora.has_adapters(both.decoder))
        self.assertClose(logits_of(both, name), wanted, 0.1)
        twice = [paths[1], paths[1]]  # beside each other
        wanted = logits_of(adapted(name, paths[1], 0.75, **few), name)
        self.assertClose(
            logits_of(adapted(name, twice, [0.5, 0.25], **few), name), wanted
        )
        wanted = logits_of(adapted(name, paths[1], 0.75), name)
        self.assertClose(logits_of(adapted(name, twice, [0.5, 0.25]), name), wanted)

    def test_text_encoder_that_was_freed(self):
        model = adapted("mono-transformers", ADAPTERS / "mono-text", 0.5)
        again = dict(model.read_text_encoder())
        plain = dict(tree_flatten(exact("mono-transformers").text_encoder.parameters()))
        for key, value in tree_flatten(model.text_encoder.parameters()):
            self.assertSame(again[key], value)
        self.assertTrue(any((again[key] != plain[key]).any() for key in plain))

    def test_converted(self):
        target = self.folder / "converted"
        paths = [ADAPTERS / "mono-text", ADAPTERS / "ours-mono.safetensors"]
        flags = ["--hf-path", REFERENCE / "mono-transformers", "--mlx-path", target]
        flags += ["--dtype", "float32", "--adapter", paths[0], "--adapter", paths[1]]
        flags += ["--adapter-scale", "0.5", "--adapter-scale", "0.25"]
        with patch("sys.argv", ["convert.py", *map(str, flags)]):
            with redirect_stdout(io.StringIO()):
                convert.main()
        wanted = adapted("mono-transformers", paths, [0.5, 0.25])
        got = MusicGen.from_pretrained(target, mx.float32)
        wanted = dict(tree_flatten(wanted.parameters()))
        for key, value in tree_flatten(got.parameters()):
            self.assertSame(value, wanted[key])

    def test_pickled_tensors(self):
        """`adapter_model.bin`, which older versions of PEFT wrote."""
        pickled = adapted("mono-transformers", ADAPTERS / "pickled")
        wanted = adapted("mono-transformers", ADAPTERS / "mono-bias")
        wanted = dict(tree_flatten(wanted.parameters()))
        for key, value in tree_flatten(pickled.parameters()):
            self.assertSame(value, wanted[key])
        plain = exact("mono-transformers")
        self.assertTrue(
            (plain.decoder.linears.weight != pickled.decoder.linears.weight).any()
        )

    def test_from_the_hub(self):
        def download(repo: str, name: str, **options) -> str:
            self.assertEqual(repo, "someone/adapter")
            if not (ADAPTERS / "mono" / name).is_file():
                raise EntryNotFoundError("no such file")
            return str(ADAPTERS / "mono" / name)

        with patch("huggingface_hub.hf_hub_download", download):
            with patch.object(hub, "no_network", return_value=""):
                model = adapted("mono-transformers", "someone/adapter")
        wanted = adapted("mono-transformers", ADAPTERS / "mono")
        self.assertSame(model.decoder.linears.weight, wanted.decoder.linears.weight)
        self.assertEqual(model.adapter["adapter"], "someone/adapter")
        reason = patch.object(hub, "no_network", return_value="there is no network.")
        with reason, self.assertRaisesRegex(OSError, "a/b, .*: there is no network"):
            adapted("mono-transformers", "a/b")
        response = Mock(headers={}, status_code=404)
        for error, why in (
            (EntryNotFoundError("no such file " * 99), "no such file|lacks|no file"),
            (
                RepositoryNotFoundError("no such file " * 99, response=response),
                "there is none of this name",
            ),
        ):
            with patch.object(hub, "no_network", return_value=""):
                with patch("huggingface_hub.hf_hub_download", side_effect=error):
                    with self.assertRaisesRegex(OSError, why) as caught:
                        adapted("mono-transformers", "a/b")
            self.assertLessEqual(len(str(caught.exception)), 400)


class TestBadFiles(Test):
    def setUp(self):
        super().setUp()
        self.adapter = Path(shutil.copytree(ADAPTERS / "mono", self.folder / "bad"))
        self.config = json.loads((self.adapter / peft_files.CONFIG).read_text())
        self.tensors = mx.load(str(self.adapter / peft_files.WEIGHTS))

    def assertRefused(self, pattern: str, name: str = "mono-transformers", **options):
        path = options.pop("adapter", self.adapter)
        with self.assertRaisesRegex((OSError, ValueError), pattern) as caught:
            adapted(name, path, **options)
        self.assertLessEqual(len(str(caught.exception)), 400)

    def set_config(self, **settings):
        text = json.dumps(self.config | settings)
        (self.adapter / peft_files.CONFIG).write_text(text)

    def set_tensors(self, **tensors):
        tensors = {LAYER + k.replace("__", "."): v for k, v in tensors.items()}
        kept = {k: v for k, v in (self.tensors | tensors).items() if v is not None}
        mx.save_safetensors(str(self.adapter / peft_files.WEIGHTS), kept)

    def test_settings(self):
        for settings, pattern in (
            (dict(peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'. In PEFT"),
            (dict(peft_type=None), "peft_type must be 'LORA', got None"),
            (dict(use_dora=True), "use_dora must be off, got True"),
            (dict(fan_in_fan_out=True), "fan_in_fan_out must be off"),
            (dict(lora_bias=True), "lora_bias must be off"),
            (dict(layer_replication=[[0, 1]]), "layer_replication must be off"),
            (
                dict(init_lora_weights="pissa"),
                "init_lora_weights must leave .* 'pissa'",
            ),
            (dict(r=0), "r must be above 0, got 0"),
            (dict(r=2.5), "r must be a whole number above 0, got 2.5"),
            (dict(lora_alpha="x"), "lora_alpha must be a number above 0, got 'x'"),
            (dict(lora_alpha=float("nan")), "lora_alpha must be above 0, got nan"),
            (dict(rank_pattern=[1]), "rank_pattern must be an object"),
            (dict(rank_pattern={"fc1": -1}), "rank_pattern of fc1 must be above 0"),
            (dict(alpha_pattern={"(a+)+": 3}), "the pattern '.*': it is too intricate"),
            (dict(alpha_pattern={"(": 3}), r"the pattern '\(': missing \)"),
            (dict(rank_pattern={"fc1": 3}), "fc1.lora_A.* must be of rank 3, .* got"),
            (dict(use_rslora="no"), "use_rslora must be true or false, got 'no'"),
            (dict(use_rslora=1), "use_rslora must be true or false, got 1"),
            (dict(use_dora="false"), "use_dora must be true or false, got 'false'"),
            (dict(use_qalora=0), "use_qalora must be true or false, got 0"),
            (dict(lora_bias=[]), r"lora_bias must be true or false, got \[\]"),
            (dict(fan_in_fan_out=""), "fan_in_fan_out must be true or false, got ''"),
            (
                dict(init_lora_weights=1),
                "init_lora_weights must be true or .*text, got",
            ),
            (dict(alpha_pattern="fc1"), "alpha_pattern must be an object, got 'fc1'"),
            (dict(modules_to_save={}), "modules_to_save must be a list, got {}"),
            (dict(target_modules=3), "target_modules must be a list, or a text, got 3"),
            (dict(bias=True), "bias must be a text, got True"),
            (dict(inference_mode="no"), "inference_mode must be true or false, got"),
            (dict(layers_to_transform=0.5), "must be a list, or a whole number, got"),
            (dict(base_model_name_or_path=[1]), "base_model_name_or_path must be a te"),
        ):
            with self.subTest(pattern):
                self.set_config(**settings)
                self.assertRefused(f"bad/.*{pattern}")

    def test_files(self):
        config, weights = (
            self.adapter / name for name in (peft_files.CONFIG, peft_files.WEIGHTS)
        )
        for text, pattern in (("[]", "must hold an object"), ("{", "does not load")):
            config.write_text(text)
            self.assertRefused(pattern)
        config.unlink()
        self.assertRefused("bad must hold adapter_config.json beside .*, but lacks it")
        self.assertRefused("One of PEFT needs adapter_config.json", adapter=weights)
        self.set_config()
        weights.write_bytes(b"noise")
        self.assertRefused("adapter_model.safetensors is damaged")
        weights.unlink()
        self.assertRefused("bad must hold adapter_model.safetensors, but lacks it")

    def test_settings_that_are_null(self):
        """Are PEFT's own."""
        wanted = adapted("mono-transformers", self.adapter)
        names = " ".join(peft_config.KINDS).split()
        self.set_config(**dict.fromkeys(names))
        found = adapted("mono-transformers", self.adapter)
        self.assertSame(found.decoder.linears.weight, wanted.decoder.linears.weight)

    def test_nothing_at_all(self):
        path = self.adapter / peft_files.WEIGHTS
        unused = "base_model.model.decoder.model.decoder.embed_positions.weights"
        for tensors in ({}, {unused: mx.zeros(3)}):
            mx.save_safetensors(str(path), tensors)
            self.assertRefused("bad/adapter_model.safetensors changes nothing: it hol")
            self.assertRefused("changes nothing", scale=0)
            with self.assertRaisesRegex(ValueError, "changes nothing"):
                adapters.check_files(self.adapter)

    def test_what_is_not_finite(self):
        key = LAYER + "fc1.lora_A.weight"
        for wrong in (math.nan, math.inf, -math.inf):
            for dtype in (mx.float32, mx.float16, mx.bfloat16):
                tensor = mx.array(self.tensors[key])
                tensor[1, 3] = wrong
                self.set_tensors(fc1__lora_A__weight=tensor.astype(dtype))
                self.assertRefused("fc1.lora_A.weight must be finite, but holds NaN or")
                with self.assertRaisesRegex(ValueError, "must be finite"):
                    adapters.check_files(self.adapter)

    def test_pickled(self):
        """The same of a .bin."""
        key = LAYER + "fc1.lora_A.weight"
        for wrong, pattern in (
            ({}, "pickled/adapter_model.bin changes nothing"),
            ({key: mx.array([[math.nan]])}, "fc1.lora_A.weight must be finite"),
        ):
            with patch("torch_file.load_state", return_value=wrong):
                self.assertRefused(pattern, adapter=ADAPTERS / "pickled")

    def test_tensors(self):
        narrow = self.tensors[LAYER + "fc1.lora_A.weight"][:, :9]
        integers = mx.zeros((2, 32), mx.int32)
        for tensors, pattern in (
            ({"fc9__lora_A__weight": narrow}, "fc9.lora_A.weight has no place in this"),
            ({"fc1__lora_A__weight": None}, "fc1.lora_B.weight has no partner"),
            (
                {"fc1__lora_A__weight": narrow},
                r"fc1.* is for a weight of \(64, 9\), here",
            ),
            ({"fc1__lora_A__weight": integers}, "fc1.lora_A.weight must hold floats"),
            ({"fc1__lora_magnitude_vector": narrow}, "magnitude_vector has no place"),
            (
                {"final_layer_norm__bias": mx.ones(3)},
                r"norm.bias is for a weight of \(3,",
            ),
        ):
            with self.subTest(pattern):
                self.set_tensors(**tensors)
                self.assertRefused(pattern)
        key = "base_model.model.decoder.lm_heads.4.lora_A.weight"
        mx.save_safetensors(str(self.adapter / peft_files.WEIGHTS), {key: narrow})
        self.assertRefused("lm_heads.4.* has no place .* another, mono-transformers")

    def test_of_another_model(self):
        self.assertRefused(
            "belongs to another model|has no place", "melody-transformers"
        )
        shutil.copytree(ADAPTERS / "stereo", self.folder / "two-channels")
        path = self.folder / "two-channels"
        self.assertRefused("has no place in this model", adapter=path)
        self.set_config(base_model_name_or_path="facebook/musicgen-small")
        adapter = peft_files.read(self.adapter)
        for name in ("medium", "facebook/musicgen-melody"):
            with self.assertRaisesRegex(
                ValueError, "another model: .*-small, not .*musi"
            ):
                peft_files.check_base(adapter, name)
        for name in ("small", "facebook/musicgen-small", "someone/fine-tune", "./x"):
            peft_files.check_base(adapter, name)
        with patch.dict(hub.MODELS, other=str(REFERENCE / "mono-transformers")):
            self.assertRefused("belongs to another model: facebook/musicgen-small, not")

    def test_model_that_is_quantized(self):
        target = self.folder / "few"
        source = str(REFERENCE / "mono-transformers")
        convert.convert(source, target, mx.float32, 8, 32)
        with self.assertRaisesRegex(
            ValueError, "which is quantized: take the model that"
        ):
            MusicGen.from_pretrained(target, adapter=self.adapter)

    def test_scales(self):
        for scale in (float("nan"), 101, "x", [1, float("inf")]):
            paths = [self.adapter] * 2
            self.assertRefused(
                "adapter_scale must be .*from", adapter=paths, scale=scale
            )
        self.assertRefused("one for each adapter in turn, got 2 for 1", scale=[1, 1])


class TestWriting(Test):
    def run_script(self, *arguments) -> tuple[int | str | None, str]:
        out, status = io.StringIO(), 0
        with patch("sys.argv", ["peft_files.py", *map(str, arguments)]):
            with redirect_stdout(out), redirect_stderr(out):
                try:
                    peft_files.main()
                except SystemExit as stop:
                    status = stop.code
        return status, out.getvalue()

    def test_command(self):
        source, target = ADAPTERS / "ours-mono.safetensors", self.folder / "out"
        self.assertEqual(self.run_script(source, target), (0, f"Wrote {target}\n"))
        self.assertRegex(self.run_script(source, target)[0], "out exists already")
        self.assertRegex(
            self.run_script("none", target / "x")[0], "There is no adapter"
        )

    def test_what_is_pefts_already(self):
        target = self.folder / "out"
        for source in (ADAPTERS / "mono", ADAPTERS / "mono" / peft_files.WEIGHTS):
            status, _ = self.run_script(source, target)
            self.assertRegex(status, f"error: {source} is PEFT's already: it is named")
        status, _ = self.run_script(ADAPTERS / "ours-mono.safetensors", "")
        self.assertRegex(status, "The folder to write must have a name, got ''")

    def test_two_at_once(self):
        """The first one's folder stays as it is."""
        source, target = ADAPTERS / "ours-mono.safetensors", self.folder / "out"
        write = peft_files.write

        def written_meanwhile(folder, arrays, metadata):
            write(folder, arrays, metadata)
            if not target.exists():
                target.mkdir()
                (target / peft_files.CONFIG).write_text("theirs")

        with patch.object(peft_files, "write", written_meanwhile):
            status, _ = self.run_script(source, target)
        self.assertRegex(status, "out was written by another program meanwhile: choose")
        self.assertEqual([*target.iterdir()], [target / peft_files.CONFIG])
        self.assertEqual((target / peft_files.CONFIG).read_text(), "theirs")
        self.assertEqual([*self.folder.iterdir()], [target])

    def test_a_damaged_pickle(self):
        path = Path(shutil.copytree(ADAPTERS / "pickled", self.folder / "p"))
        (path / peft_files.PICKLE).write_bytes(b"noise" * 99)
        with self.assertRaisesRegex(
            ValueError, "adapter_model.bin is damaged, fetch it"
        ):
            peft_files.read(path)

    def test_a_folder_in_none(self):
        source = ADAPTERS / "ours-mono.safetensors"
        (self.folder / "file").touch()
        for parent in ("none", "file"):
            target = self.folder / parent / "out"
            told = f"peft_files.py: error: The folder {target.parent} must exist."
            self.assertEqual(self.run_script(source, target)[0], told)
        self.assertFalse((self.folder / "none").exists())

    def test_damaged_adapters_of_ours(self):
        arrays, metadata = lora.read_adapter(ADAPTERS / "ours-mono.safetensors")
        name = min(arrays).removesuffix(".a")
        half = {k: v for k, v in arrays.items() if k != f"{name}.b"}
        for tensors, header in (
            (arrays, metadata | {"sizes": []}),
            (arrays, {k: v for k, v in metadata.items() if k != "sizes"}),
            (half, metadata),
        ):
            path = self.folder / "mine.safetensors"
            text = {"adapter": json.dumps(header)}
            mx.save_safetensors(str(path), tensors, text)
            status, _ = self.run_script(path, self.folder / "out")
            self.assertRegex(status, "^peft_files.py: error: .*mine.safetensors is dam")

    def test_names_of_the_base(self):
        for model, base in (
            ("stereo-small", "facebook/musicgen-stereo-small"),
            ("someone/fine-tune", "someone/fine-tune"),
            (str(self.folder), None),  # means nothing elsewhere
            ("tiny", None),
            (None, None),
        ):
            config = peft_files.peft_config(4, ["q_proj"], model)
            self.assertEqual(config["base_model_name_or_path"], base)
            self.assertEqual((config["r"], config["lora_alpha"]), (4, 4))

    def test_style_models_are_not_known_there(self):
        arrays, metadata = lora.read_adapter(ADAPTERS / "ours-melody.safetensors")
        metadata["sizes"]["sound_width"] = 512
        with self.assertRaisesRegex(ValueError, "no model that follows a style"):
            peft_files.write(self.folder / "out", arrays, metadata)
        self.assertEqual([*self.folder.iterdir()], [])
