"""diffusion_files.py: published files, damaged ones, and those of strangers."""

import math
import os
import zipfile
from unittest.mock import patch

import manifests
import mlx.core as mx
from common import REFERENCE, Test
from mlx.utils import tree_flatten

import bands
import diffusion
import diffusion_files
from diffusion import MultiBandDiffusion, UNet, UNetConfig
from diffusion_files import read_parts, setting
from torch_file import load_torch

FOLDER = REFERENCE / "diffusion-audiocraft"


def merged(first: dict, own: dict) -> dict:
    """Settings of a band, whose manifest tells only what is not the first one's."""
    both = {k: merged(first[k], v) for k, v in own.items() if isinstance(v, dict)}
    return first | own | both


class TestPublished(Test):
    def test_all_load_strictly_at_full_size(self):
        for name in manifests.DIFFUSION:
            package = manifests.read()["diffusion"][name]
            rate, first = package["sample_rate"], package["0"]
            tensors = manifests.expand(first["model_state"])
            state = {name: mx.zeros(shape) for name, (_, shape) in tensors.items()}
            for number in map(str, range(package["n_bands"])):
                own = package[number]
                cfg = merged(first["cfg"], own["cfg"])
                if cfg["processor"]["power_std"] is None:  # which the manifest lacks
                    cfg["processor"]["power_std"] = 0.4
                shapes = {k: shape for k, (_, shape) in own["processor_state"].items()}
                processor = {k: mx.ones(shape) for k, shape in shapes.items()}
                parts = read_parts(
                    dict(cfg=cfg, model_state=state, processor_state=processor)
                )
                with self.subTest(name, band=number):
                    self.check_band(parts)
                    self.assertEqual(parts.processor is None, not processor)
                if processor:
                    taps = shapes["split_bands.lowpass.filters"][2]
                    self.assertEqual(bands.low_pass_filters(rate, 8).shape, (7, taps))

    def check_band(self, parts: diffusion_files.Parts) -> None:
        """Nothing is computed: the weights stay lazy."""
        before, config = mx.get_active_memory(), UNetConfig(**parts.sizes)
        self.assertEqual(config, UNetConfig())
        unet = UNet(config)
        diffusion.load(unet, parts.weights, mx.float32)
        sizes = [array.size for _, array in tree_flatten(unet.parameters())]
        self.assertEqual((len(sizes), sum(sizes)), (158, 286_435_008))
        self.assertLess(mx.get_active_memory() - before, 2**20)
        self.assertEqual(diffusion.Schedule(**parts.schedule).clip, 5)

    def test_what_all_bands_take(self):
        """All are kept where twice the weights fit into what memory is left."""
        files = diffusion_files.open_files(FOLDER)
        size, used = files.path.stat().st_size, mx.get_active_memory()
        for free, dtype, fits in (
            (2 * size + 1, mx.float32, True),
            (2 * size, mx.float32, False),
            (size + 1, mx.float16, True),
        ):
            with (
                patch("mlx.core.get_memory_limit", return_value=used + free),
                patch("mlx.core.get_active_memory", return_value=used),
            ):
                self.assertEqual(diffusion_files.fits(files, dtype), fits)


class TestSettings(Test):
    """Of the reference's file, changed."""

    def setUp(self):
        super().setUp()
        self.part = load_torch(FOLDER / "mbd_tiny.th", keys=(1,))[1]

    def test_links(self):
        """What refers to another setting is that one; what refers to itself is refused."""
        settings = self.part["cfg"]
        self.assertEqual(settings["channels"], "${one}")
        self.assertEqual(setting(settings, "channels"), 1)
        for links in (dict(a="${a}"), dict(a="${b}", b="${c}", c="${b}")):
            with self.assertRaisesRegex(ValueError, "refers to itself"):
                setting(links, "a")
        with self.assertRaisesRegex(ValueError, "its settings must have b"):
            setting(dict(a="${b}"), "a")

    def test_links_as_omegaconf_has_them(self):
        """From the top, from beside, from above, on the way, and of links to links."""
        settings = dict(a=dict(b=7, c="${.b}", d="${..e}"), e=5, f="${a}", g="${f.c}")
        settings |= {"h": dict(i="${ a.b }"), "j-k": 3, "l": "${j-k}"}
        for name, value in (
            ("a.c", 7),
            ("a.d", 5),
            ("f.b", 7),
            ("f.c", 7),
            ("g", 7),
            ("h.i", 7),
            ("l", 3),
        ):
            self.assertEqual(setting(settings, name), value, name)
        for name, link in (("a", "${a.b}"), ("a.b", "${.b}"), ("a.b", "${....b}")):
            with self.assertRaisesRegex(ValueError, "refers to itself|must have"):
                setting(dict(a=dict(b=link) if "." in name else link), name)

    def test_settings_within_themselves(self):
        cfg = dict(self.part["cfg"])
        cfg["again"] = cfg
        self.assertEqual(read_parts(self.part | dict(cfg=cfg)).sizes["hidden"], 4)

    def test_what_is_missing_or_not_ported(self):
        model = MultiBandDiffusion(diffusion_files.open_files(FOLDER))
        for place, value, told in (
            (("schedule", "repartition"), "linear", "repartition must be 'power'"),
            (("schedule", "beta_exp"), None, "must have schedule.beta_exp"),
            (("schedule", "beta_exp"), "7.5", "number from 0.01 to 1000, got '7.5'"),
            (("schedule", "beta_exp"), 0, "beta_exp must be a number from 0.01"),
            (("schedule", "beta_t1"), -0.1, "beta_t1 must be a number from 1e-09"),
            (("schedule", "noise_scale"), math.nan, "noise_scale must be a number"),
            (("schedule", "clip"), 10**30, "clip must be a number from 0 to 1e"),
            (("schedule", "num_steps"), 50, "schedule.num_steps must be 1000, got 50"),
            (("diffusion_unet", "bilstm"), True, "diffusion_unet.bilstm must be False"),
            (("diffusion_unet", "codec_dim"), None, "must have diffusion_unet.codec_d"),
            (("diffusion_unet", "hidden"), None, "must have diffusion_unet.hidden"),
            (("diffusion_unet", "hidden"), 8, "must be of shape"),
            (("diffusion_unet", "hidden"), 6, "norm_groups must divide"),
            (("diffusion_unet", "hidden"), 10**9, "from 1 to 4096, got 1000000000"),
            (("diffusion_unet", "depth"), 4, "lacks the tensor"),
            (("diffusion_unet", "depth"), 2, "has the unknown tensor"),
            (("diffusion_unet", "depth"), 10**9, "from 1 to 12, got 1000000000"),
            (("diffusion_unet", "depth"), True, "from 1 to 12, got True"),
            (
                ("diffusion_unet", "kernel"),
                9,
                "kernel must be a multiple of its stride",
            ),
            (("diffusion_unet", "stride"), 0, "from 1 to 256, got 0"),
            (("diffusion_unet", "emb_all_layers"), 1, "must be true or false"),
            (("processor", "use"), None, "must have processor.use"),
            (("processor", "n_bands"), 9, "must have 9 bands, got sum_x of "),
            (("processor", "n_bands"), 65, "n_bands must be from 1 to 64, got 65"),
            (("processor", "power_std"), [1, 2], "a number, or 8, got .1, 2."),
            (("processor", "power_std"), "1", "a number, or 8, got '1'"),
            (("processor", "use"), "${${one}}", "processor.use must be true or false"),
            (("processor", "name"), "other", "name must be multi_band_processor, got"),
            (("processor", "power_std"), None, "must have processor.power_std"),
        ):
            cfg = {
                k: dict(v) if isinstance(v, dict) else v
                for k, v in self.part["cfg"].items()
            }
            cfg[place[0]][place[1]] = value
            if value is None:
                del cfg[place[0]][place[1]]
            with self.subTest(told), self.assertRaisesRegex(ValueError, told):
                model._build(read_parts(self.part | dict(cfg=cfg)))

    def test_a_power_for_each_band(self):
        gains = {}
        for power in (1, 0.5, [1.0, 0.5] * 4):
            cfg = dict(self.part["cfg"])
            cfg["processor"] = cfg["processor"] | dict(power_std=power)
            gains[str(power)[:3]] = read_parts(self.part | dict(cfg=cfg)).processor[1]
        self.assertSame(gains["[1."][::2], gains["1"][::2])
        self.assertSame(gains["[1."][1::2], gains["0.5"][1::2])

    def test_channels(self):
        cfg = self.part["cfg"] | dict(one=2)
        with self.assertRaisesRegex(ValueError, "channels must be 1, got 2"):
            read_parts(self.part | dict(cfg=cfg))

    def test_thousand_steps_as_a_float(self):
        cfg = self.part["cfg"] | dict(schedule=self.part["cfg"]["schedule"].copy())
        cfg["schedule"]["num_steps"] = 1000.0
        parts = read_parts(self.part | dict(cfg=cfg))
        self.assertEqual(diffusion.Schedule(**parts.schedule).remains.shape, (1000,))

    def test_states_of_strangers(self):
        """Each is told of in plain words, before anything is computed of it."""
        state, ones = self.part["processor_state"], mx.ones(8)
        for place, value, told in (
            ("model_state", None, "its model_state must map names to tensors"),
            ("model_state", [ones], "its model_state must map names to tensors"),
            ("model_state", {1: ones}, "its model_state must map names to tensors"),
            ("model_state", dict(a=1), "its model_state must map names to tensors"),
            ("model_state", {"conv_codec.weight": mx.ones((2, 2, 3))}, "lacks the "),
            ("processor_state", None, "its processor_state must map names to tens"),
            ("processor_state", {}, "processor_state must have counts"),
            ("processor_state", state | dict(counts=mx.zeros(1)), "finite means and"),
            ("processor_state", state | dict(counts=mx.ones(2)), "got counts of .2,."),
            ("processor_state", state | dict(sum_target_x2=ones * 0), "finite means"),
            ("cfg", None, "its settings must have schedule.repartition"),
        ):
            model = MultiBandDiffusion(diffusion_files.open_files(FOLDER))
            with self.subTest(told), self.assertRaisesRegex(ValueError, told):
                model._build(read_parts(self.part | {place: value}))
        with self.assertRaisesRegex(ValueError, "there is no such band"):
            read_parts([1])


class TestFiles(Test):
    def test_no_file(self):
        (self.folder / "empty").mkdir()
        with self.assertRaisesRegex(FileNotFoundError, "holds no .th or .pt file"):
            MultiBandDiffusion.from_pretrained(self.folder / "empty")
        path = self.folder / "bad.th"
        path.write_bytes(b"PK" + bytes(99))
        with self.assertRaisesRegex(ValueError, "is not a checkpoint that torch wrote"):
            MultiBandDiffusion.from_pretrained(path)

    def test_a_folder_of_several(self):
        """Of all that Meta released MusicGen's is meant; else one is to be named."""
        source = FOLDER / "mbd_tiny.th"
        for name in ("mbd_comp_2.pt", "mbd_comp_8.pt"):
            (self.folder / name).symlink_to(source)
        told = "must hold one file, has mbd_comp_2.pt, mbd_comp_8.pt: name one"
        with self.assertRaisesRegex(ValueError, told):
            diffusion_files.find(str(self.folder))
        (self.folder / "mbd_musicgen_32khz.th").symlink_to(source)
        found = diffusion_files.find(str(self.folder))
        self.assertEqual(found.name, "mbd_musicgen_32khz.th")

    def test_the_hub_without_a_network(self):
        told = "The Hub did not give the decoder facebook/multiband-diffusion: .* name "
        told += "its file mbd_musicgen_32khz.th"
        with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            with self.assertRaisesRegex(OSError, told):
                MultiBandDiffusion.from_pretrained("musicgen")

    def test_a_name_of_nothing(self):
        """It may have been meant as a file."""
        told = "decoder /no/such.th, and there is no such file or folder: "
        with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            with self.assertRaisesRegex(OSError, told):
                MultiBandDiffusion.from_pretrained("/no/such.th")

    def test_a_file_of_a_model(self):
        path = REFERENCE / "mono-audiocraft" / "state_dict.bin"
        with self.assertRaisesRegex(ValueError, "must have a sample_rate, got None"):
            MultiBandDiffusion.from_pretrained(path)

    def test_a_foreign_name_is_refused(self):
        """A pickle may call anything: names that are not those of tensors and settings
        are not looked up."""
        path, bad = FOLDER / "mbd_tiny.th", self.folder / "bad.th"
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(bad, "w") as target:
            for entry in source.infolist():
                data = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    name = b"comegaconf.dictconfig\nDictConfig\n"
                    self.assertIn(name, data)
                    data = data.replace(name, b"csubprocess\nPopen\n")
                target.writestr(entry, data)
        with self.assertRaisesRegex(ValueError, "bad.th .*subprocess"):
            MultiBandDiffusion.from_pretrained(bad)

    def test_a_band_that_is_missing(self):
        model = MultiBandDiffusion.from_pretrained(FOLDER)
        files = model._files._replace(n_bands=4)
        with self.assertRaisesRegex(
            ValueError, "mbd_tiny.th, band 3: there is no such"
        ):
            MultiBandDiffusion(files).unet(3)
