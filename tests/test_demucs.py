"""The separation of stems."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import mlx.core as mx
import soundfile
from common import REFERENCE, ROOT, Test
from safetensors import safe_open

import demucs
from audio import save_audio
from resample import true_peak


class TestDemucs(Test):
    folder_of_reference = REFERENCE / "htdemucs"

    def load(self) -> tuple[demucs.HTDemucs, dict[str, mx.array]]:
        model = demucs.HTDemucs.from_pretrained(self.folder_of_reference)
        expected = self.folder_of_reference / "expected" / "expected.safetensors"
        return model, mx.load(str(expected))

    def test_stems(self):
        model, want = self.load()
        self.assertEqual((model.sampling_rate, model.channels), (4000, 2))
        self.assertEqual(model.config.segment_length, 1200)
        self.assertClose(model.separate(want["audio"]), want["stems"], 1e-5)
        *steps, last = model.separate_steps(want["audio"])
        self.assertEqual(steps, [(done, 4, None) for done in range(4)])
        self.assertEqual(last[:2], (4, 4))
        self.assertSame(last[2], model.separate(want["audio"]))
        *_, (done, pieces, _) = model.separate_steps(want["audio"], shifts=2)
        self.assertEqual(done, pieces)
        self.assertGreater(pieces, 4)

    def test_spectrogram_and_back(self):
        rates = mx.array([[0.05], [0.3], [1.1]])
        audio = mx.sin(mx.arange(1000) * rates)
        spectrum = demucs.spectrogram(audio, 256)
        self.assertEqual(spectrum.shape, (3, 128, 16))
        back = demucs.waveform(spectrum, 1000)
        # as in the original the frames at the ends are left out, and a frequency
        inner = slice(128, -128)
        self.assertClose(back[:, inner], audio[:, inner], 1e-3)

    def test_shifts(self):
        model, want = self.load()
        once, again = (model.separate(want["audio"], shifts=2) for _ in range(2))
        self.assertEqual(once.shape, want["stems"].shape)
        self.assertSame(once, again)
        self.assertNotEqual(once.tolist(), want["stems"].tolist())

        class Same(demucs.HTDemucs):
            def __call__(self, audio):  # nothing that a shift could change
                return mx.repeat(audio[:, None], 4, axis=1)

        same = Same(model.config)
        for options in (dict(shifts=3), dict(overlap=0.0), dict(overlap=0.9)):
            stems = same.separate(want["audio"], **options)
            self.assertClose(stems, mx.stack([want["audio"]] * 4), 1e-6)

    def test_short_sound(self):
        model, want = self.load()
        for length in (1, 7, 1199, 1200, 1201):
            stems = model.separate(want["audio"][:length])
            self.assertEqual(stems.shape, (4, length, 2))
            self.assertTrue(mx.isfinite(stems).all().item())

    def test_bad_input(self):
        model, want = self.load()
        for audio, options, pattern in (
            (mx.zeros((9,)), {}, "audio must have the shape"),
            (mx.zeros((9, 1)), {}, "audio must have the shape"),
            (mx.zeros((0, 2)), {}, "audio must have the shape"),
            (mx.full((9, 2), math.nan), {}, "must be finite"),
            (want["audio"], dict(overlap=1), "overlap must be"),
            (want["audio"], dict(shifts=-1), "shifts must be a whole number"),
            (want["audio"], dict(shifts=1.5), "shifts must be a whole number"),
        ):
            with self.assertRaisesRegex(ValueError, pattern):
                model.separate(audio, **options)

    def test_bad_files(self):
        source = self.folder_of_reference / "model.safetensors"
        weights = mx.load(str(source))
        with safe_open(source, "numpy") as file:
            about = file.metadata()
        path = self.folder / "model.safetensors"

        def kwargs(**other) -> dict[str, str]:
            found = json.loads(about["kwargs"]) | other
            return about | {"kwargs": json.dumps(found)}

        some = dict(list(weights.items())[1:])
        lost = weights.keys() - some.keys()
        for wrong, told, pattern in (
            (weights, {}, "must hold an HTDemucs, but holds none"),
            (weights, {"klass": "demucs.hdemucs.HDemucs"}, "must hold an HTDemucs"),
            (weights, about | {"kwargs": "{"}, "does not load"),
            (weights, about | {"kwargs": "[]"}, "does not load"),
            (weights, kwargs(t_emb="cape"), "t_emb must be 'sin', got 'cape'"),
            (weights, kwargs(nfft=16), "nfft must be a multiple"),
            (weights, kwargs(t_heads=3), "bottom_channels must be a multiple"),
            (weights, kwargs(channels="many"), "does not load"),
            (weights, kwargs(channels=4), "does not load"),
            (weights, kwargs(depth=0), "does not load"),
            (weights, kwargs(sources=["../x", "b", "c", "d"]), "sources must be"),
            (weights, kwargs(sources=["b", "b", "c", "d"]), "sources must be"),
            (weights, kwargs(segment=1e9), "segment must be 0.1 to 600"),
            (weights, kwargs(samplerate=2**40), "samplerate must be"),
            (weights, kwargs(t_layers=10**9), "t_layers must be"),
            (weights, kwargs(growth=True), "growth must be"),
            (weights, kwargs(freq_emb=math.nan), "freq_emb must be"),
            (weights, about | {"kwargs": "[" * 10**5}, "does not load"),
            (
                weights | {"freq_emb.embedding.weight": mx.zeros((32, 8), mx.int8)},
                about,
                "must hold floats",
            ),
            (some, about, f"{min(lost)} is missing$"),
            (
                weights | {"more": mx.zeros(3)},
                about,
                "does not load: more has no place",
            ),
        ):
            mx.save_safetensors(str(path), wrong, told)
            with self.assertRaisesRegex(ValueError, pattern):
                demucs.HTDemucs.from_pretrained(self.folder)
        path.write_bytes(b"nothing")
        with self.assertRaisesRegex(ValueError, "model.safetensors is damaged"):
            demucs.HTDemucs.from_pretrained(self.folder)
        shutil.copy(source, self.folder / "other.safetensors")
        with self.assertRaisesRegex(FileNotFoundError, "one .safetensors file"):
            demucs.HTDemucs.from_pretrained(self.folder)
        with self.assertRaisesRegex(FileNotFoundError, "must be a folder or a Hub"):
            demucs.HTDemucs.from_pretrained("none")

    def run_script(self, *arguments: str) -> str:
        """What the script prints; SystemExit says what is wrong."""
        model = ["--model", str(self.folder_of_reference)]
        with patch("sys.argv", ["demucs.py", *map(str, arguments), *model]):
            with redirect_stdout(io.StringIO()) as out:
                with redirect_stderr(io.StringIO()) as err:
                    try:
                        demucs.main()
                    except SystemExit as stop:
                        return err.getvalue() if stop.code == 2 else str(stop.code)
        return out.getvalue()

    def test_stems_that_would_clip_are_turned_down_alike(self):
        """By the true peak of the loudest, so that they still add up to the song. And
        nothing else is said where there is no terminal."""
        model, want = self.load()
        source, folder = self.folder / "song.wav", self.folder / "stems"
        loud = 8 * want["audio"] / mx.abs(want["audio"]).max().item()
        save_audio(source, loud, 4000, subtype="FLOAT")
        run = subprocess.run(
            [sys.executable, ROOT / "demucs.py", source, "--output-dir", folder]
            + ["--model", self.folder_of_reference],
            capture_output=True,
            text=True,
        )
        told = r"^demucs.py: warning: All stems were made ([\d.]+) dB quieter: .*\n$"
        self.assertRegex(run.stderr, told)
        self.assertEqual(run.returncode, 0)
        stems = model.separate(loud)
        peaks = [true_peak(stem) for stem in stems]
        quieter = float(re.match(told, run.stderr)[1])
        self.assertAlmostEqual(20 * math.log10(max(peaks)), quieter, delta=0.6)
        self.assertGreater(sorted(peaks)[-2], 1)  # more than one would clip
        for name, stem in zip(model.config.sources, stems):
            found = soundfile.read(folder / f"{name}.wav")[0]
            self.assertClose(mx.array(found), stem / max(peaks), 1e-3)

    def test_what_the_hub_did_not_give(self):
        with patch("demucs.snapshot_download", side_effect=OSError("no answer.")):
            told = r"HTDemucs: .*\w\. Or name a folder with its .safetensors file\.$"
            with self.assertRaisesRegex(OSError, told):
                demucs.HTDemucs.from_pretrained()

    def test_script(self):
        _, want = self.load()
        source, folder = self.folder / "song.wav", self.folder / "stems"
        save_audio(source, want["audio"], 4000, subtype="FLOAT")
        told = self.run_script(source, "--output-dir", folder)
        names = ["drums", "bass", "other", "vocals"]
        self.assertEqual(told.split(), [str(folder / f"{n}.wav") for n in names])
        for name, stem in zip(names, want["stems"]):
            found = mx.array(soundfile.read(folder / f"{name}.wav")[0])
            self.assertClose(found, stem / max(1, mx.abs(stem).max().item()), 2e-4)
        before = (folder / "bass.wav").read_bytes()
        told = self.run_script(folder / "bass.wav", "--output-dir", folder)
        self.assertRegex(told, "drums.wav is there already: .* with --force")
        again = ("--output-dir", folder, "--force")
        told = self.run_script(folder / "bass.wav", *again)
        self.assertRegex(told, "bass.wav must not be written, since it is read")
        self.assertEqual((folder / "bass.wav").read_bytes(), before)
        told = self.run_script(source, *again, "--stems", " bass ")
        self.assertEqual(told.split(), [str(folder / "bass.wav")])
        for flags, pattern in (
            (["--stems", "bass,flute"], "--stems must be of drums, .*'flute'"),
            (["--overlap", "1"], "overlap must be"),
            (["--shifts", "x"], "invalid int"),
        ):
            self.assertRegex(self.run_script(source, *flags), pattern)
        self.assertRegex(self.run_script("none.wav"), "There is no sound file none.wav")
