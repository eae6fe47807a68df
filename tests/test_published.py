"""Every published model loads strictly at full size from its list of tensors."""

import json
from unittest.mock import patch

import manifests
import mlx.core as mx
from common import ROOT, Test
from mlx.utils import tree_flatten

import checkpoints
import demucs
import encodec
import musicgen
import style
import t5
from encodec import Encodec, EncodecConfig
from mert import MERT, MERTConfig
from musicgen import MusicGen
from t5 import T5


class TestPublishedCheckpoints(Test):
    """Strict loads at full size, from lazy arrays that are never computed."""

    def arrays(self, name: str) -> dict[str, mx.array]:
        tensors = manifests.expand(manifests.read()["tensors"][name])
        return {
            name: mx.zeros(shape, getattr(mx, dtype))
            for name, (dtype, shape) in tensors.items()
        }

    def config(self, name: str) -> dict:
        return manifests.read()["configs"][name]

    def test_transformers(self):
        for name in manifests.MUSICGEN + manifests.MELODY:
            with self.subTest(name):
                config = musicgen.MusicGenConfig.from_dict(self.config(name))
                model = MusicGen(config, tokenizer=None)
                weights = self.arrays(f"{name}.transformers")
                again = {respell(k): v for k, v in weights.items()}
                for spelling in (weights, again):
                    found = checkpoints.sanitize(spelling)
                    model.load_weights(list(found.items()))
                ours = checkpoints.sanitize(dict(tree_flatten(model.parameters())))
                model.load_weights(list(ours.items()))

    def test_audiocraft(self):
        for name in manifests.MUSICGEN + manifests.MELODY:
            with self.subTest(name):
                weights = self.arrays(f"{name}.audiocraft")
                config = checkpoints.audiocraft_config(weights, {})
                published = musicgen.MusicGenConfig.from_dict(self.config(name))
                self.assertEqual(config, published.decoder)
                decoder = musicgen.Decoder(config, text_width=768)
                found = musicgen.Decoder.sanitize(weights)
                decoder.load_weights(list(found.items()))

    def test_style(self):
        weights, of_sound = checkpoints.part_sound(
            self.arrays(f"{manifests.STYLE[0]}.audiocraft")
        )
        decoder = checkpoints.audiocraft_config(weights, {})
        self.assertEqual((decoder.hidden_size, decoder.num_hidden_layers), (1536, 48))
        self.assertEqual(decoder.sound_width, 512)
        model = musicgen.Decoder(decoder, text_width=768)
        model.load_weights(list(musicgen.Decoder.sanitize(weights).items()))
        weights = MERT.sanitize(self.arrays("mert-v1-95m.transformers"))
        again = {
            respell(k): v for k, v in self.arrays("mert-v1-95m.transformers").items()
        }
        for weights in (weights, MERT.sanitize(again)):
            features = MERT(MERTConfig())
            features.load_weights(list(weights.items()))
        with patch.object(MERT, "from_pretrained", return_value=features):
            codec = Encodec(EncodecConfig.from_dict(self.config("encodec_32khz")))
            found = style.StyleConditioner.from_audiocraft(
                of_sound, {}, self.folder, codec
            )
        self.assertEqual(found.config, style.StyleConfig())

    def test_codecs(self):
        for name in ("encodec_24khz", "encodec_32khz", "encodec_48khz"):
            config = EncodecConfig.from_dict(self.config(name))
            weights = self.arrays(f"{name}.transformers")
            again = {respell(k): v for k, v in weights.items()}
            for spelling in (weights, again):
                Encodec(config).load_weights(list(Encodec.sanitize(spelling).items()))
        weights = Encodec.sanitize(self.arrays("encodec_32khz.audiocraft"))
        found = encodec.audiocraft_config(weights, {})
        published = EncodecConfig.from_dict(self.config("encodec_32khz"))
        self.assertEqual(found, published)
        Encodec(found).load_weights(list(weights.items()))

    def test_t5(self):
        model = T5(t5.T5Config.from_dict(self.config("t5-base")))
        weights = T5.sanitize(self.arrays("t5-base.transformers"))
        model.load_weights(list(weights.items()))

    def test_demucs(self):
        weights = demucs.HTDemucs.sanitize(self.arrays("htdemucs.demucs"))
        model = demucs.HTDemucs(demucs.HTDemucsConfig())
        model.load_weights(list(weights.items()))

    def test_manifests_equal_the_full_ones(self):
        folder = ROOT.parent / "shared" / "checkpoints"
        if not folder.is_dir():
            self.skipTest(f"{folder} is not there")
        for name in manifests.MUSICGEN + manifests.STYLE + manifests.MELODY:
            full = json.loads((folder / f"{name}.audiocraft.json").read_text())
            full = full["state_dict.bin"]["best_state"]
            ours = manifests.expand(manifests.read()["tensors"][f"{name}.audiocraft"])
            self.assertEqual({k: (d, tuple(s)) for k, (d, s) in full.items()}, ours)


def respell(name: str) -> str:
    """Weight norm as transformers has spelled it since 4.46."""
    name = name.replace(".weight_g", ".parametrizations.weight.original0")
    return name.replace(".weight_v", ".parametrizations.weight.original1")
