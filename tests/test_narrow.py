"""Models whose text is as wide as the decoder: transformers makes no projection."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import sounds
from common import EXPECTED, REFERENCE, Test, last

import checkpoints
from convert import convert
from musicgen import MusicGen
from published import read_weights

WIDTH = 24  # of T5
CASES = {  # name: model, changes of its decoder's config, of the whole config
    "mono": ("mono-transformers", {}, {}),
    "stereo": ("stereo-transformers", {}, {}),
    "pairs": ("mono-transformers", {"audio_channels": 2}, {}),
    "melody": ("melody-transformers", {}, {}),
    "chroma": ("melody-transformers", {}, {"num_chroma": WIDTH}),
}
WANTED = mx.load(str(REFERENCE / "narrow.safetensors"))


class TestNarrow(Test):
    def cut(self, name: str) -> Path:
        """What reference/make_narrow.py cuts: a decoder as wide as its T5."""
        source, decoder, whole = CASES[name]
        target = Path(shutil.copytree(REFERENCE / source, self.folder / name))
        path, first = target / "config.json", WANTED[f"{name}_first"].item()
        kept = mx.arange(first, first + WIDTH)
        config = json.loads(path.read_text())
        wide = config["decoder"]["hidden_size"]
        config["decoder"] |= {"hidden_size": WIDTH} | decoder
        path.write_text(json.dumps(config | whole))
        left_out = ("enc_to_dec_proj.", *["audio_enc_to_dec_proj."] * bool(whole))
        state = {}
        for key, weight in read_weights(target).items():
            if key.startswith(("decoder.", "audio_enc_to_dec_proj.")):
                for axis, size in enumerate(weight.shape):
                    weight = mx.take(weight, kept, axis) if size == wide else weight
            if not key.startswith(left_out) and "embed_positions" not in key:
                state[key] = weight
        mx.eval(state)  # before what they are read from is written
        for shard in target.glob("pytorch_model*"):
            shard.unlink()
        mx.save_safetensors(str(target / "model.safetensors"), state)
        return target

    def assertCodes(self, name: str, model: MusicGen):
        prompts, follows = EXPECTED["mono-transformers"]["prompts"], {}
        if name in ("melody", "chroma"):
            tunes = EXPECTED["melody-transformers"]["tunes"]
            tunes = [mx.array(sounds.tune(32000, tune)) for tune in tunes]
            follows = dict(melody=tunes, separate=False)
        for coef in (1, 3):
            options = dict(temp=0, guidance_coef=coef) | follows
            codes = model.generate_codes(prompts[:2], 0.3, **options)
            self.assertSame(last(codes), WANTED[f"{name}_g{coef}"])

    def test_codes(self):
        for name in CASES:
            folder = self.cut(name)
            for plain in (False, True):
                with self.subTest(name, plain=plain):
                    model = MusicGen.from_pretrained(folder, mx.float32)
                    model.plain = plain
                    self.assertCodes(name, model)

    def test_converted(self):
        for name in CASES:
            folder, target = self.cut(name), self.folder / "converted"
            convert(str(folder), target, mx.float32)
            with self.subTest(name):
                self.assertCodes(name, MusicGen.from_pretrained(target, mx.float32))
            shutil.rmtree(target)

    def test_a_projection_that_is_missing(self):
        """Where the widths differ, and where half of it is there: it is told."""
        for name, width in (("mono", 32), ("melody", 32), ("chroma", 12)):
            folder = self.cut(name)
            path = folder / "config.json"
            config = json.loads(path.read_text())
            if name == "chroma":
                config["num_chroma"] = width
            else:
                config["text_encoder"]["d_model"] = width
            path.write_text(json.dumps(config))
            told = r"(audio_)?enc_to_dec_proj\.bias of model.safetensors is missing"
            with self.subTest(name), self.assertRaisesRegex(ValueError, told):
                MusicGen.from_pretrained(folder)
            shutil.rmtree(folder)
        folder = self.cut("mono")
        path = str(folder / "model.safetensors")
        weights = mx.load(path) | {"enc_to_dec_proj.weight": mx.eye(WIDTH)}
        mx.eval(weights)
        mx.save_safetensors(path, weights)
        with self.assertRaisesRegex(ValueError, "proj.bias of .* is missing"):
            MusicGen.from_pretrained(folder)

    def test_delays_that_a_config_does_not_give(self):
        settings = json.loads((REFERENCE / "mono-transformers/config.json").read_text())
        for codebooks, channels, delays in (
            (4, 1, (0, 1, 2, 3)),
            (3, 1, (0, 1, 2)),
            (4, 2, (0, 0, 1, 1)),
            (8, 2, (0, 0, 1, 1, 2, 2, 3, 3)),
        ):
            sizes = dict(num_codebooks=codebooks, audio_channels=channels)
            decoder = settings["decoder"] | sizes
            config = checkpoints.read_config(settings | {"decoder": decoder})
            self.assertEqual(config.decoder.delays, delays)
        for sizes, told in (
            (dict(num_codebooks=3, audio_channels=2), "num_codebooks must be even"),
            (dict(num_codebooks=10**12), "num_codebooks must be from 1 to 64"),
            (dict(num_codebooks="4"), "num_codebooks must be from 1 to 64"),
            (dict(audio_channels=3), "audio_channels must be from 1 to 2, got 3"),
            (dict(audio_channels=0), "audio_channels must be from 1 to 2, got 0"),
        ):
            decoder = settings["decoder"] | sizes
            with self.assertRaisesRegex(ValueError, told):
                checkpoints.read_config(settings | {"decoder": decoder})
