"""What is made of a take: the same as generate.py and the other scripts make."""

import os
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from common import REFERENCE, slow
from serving import BELL, NOISE, MadeTest, ServerTest, generate_beside, in_base64

import demucs
from audio import load_audio, read_sound, save_audio
from beat import Beat
from loudness import integrated_loudness
from melody import extract_chroma
from notes import parse
from resample import true_peak
from settings import load_codes, read_settings
from worker import Ticket

AGAIN = "/takes/slow-bell-7/again"
EXTEND = "/takes/slow-bell-7/extend"
PART = "/takes/slow-bell-7/regenerate"
LEVEL = "/takes/slow-bell-7/loudness"


class RetakeTest(MadeTest):
    """With a take of a second."""

    def setUp(self):
        super().setUp()
        self.take()

    def made(self, status: int = 200, **fields):
        """The takes that are made by the route `path`, the best first."""
        answer = self.make(status, **fields)
        return answer["takes"] if status == 200 else answer

    def bytes_of(self, take: dict) -> bytes:
        return self.get(f"/takes/{take['id']}.wav").body

    def generate(self, name: str, *flags: str) -> bytes:
        return generate_beside(self.folder / name, *flags)


class TestAgain(RetakeTest):
    @slow(3)
    def test_with_other_settings(self):
        (take,) = self.made(path=AGAIN, temp=0.5, seed=9)
        again = f"--again={self.takes / 'slow-bell-7.wav'}"
        want = self.generate("a.wav", again, "--temp=0.5", "--seed=9")
        self.assertEqual(self.bytes_of(take), want)
        self.assertEqual((take["id"], take["codes"]), ("slow-bell-9", True))

    def test_any_seed(self):
        seeds = {self.made(path=AGAIN)[0]["seed"] for _ in range(2)}
        self.assertEqual(len(seeds - {7}), 2)

    def test_of_another_model(self):
        """What that does not take is left out, as by --again."""
        fields = dict(model="tiny-magnet", decoding_steps="1,1,1,1")
        (take,) = self.made(path=AGAIN, **fields)
        self.assertEqual((take["model"], take["prompt"]), ("tiny-magnet", "slow bell"))

    def test_a_stream_of_it(self):
        events = self.events(AGAIN, temp=0.9)
        self.assertEqual([e.name for e in events][-2:], ["take", "done"])
        self.assertTrue(any(event.name == "audio" for event in events))

    def test_what_it_followed_is_sent_along(self):
        """A file is not kept. The same one keeps what else was said of it."""
        sound = in_base64(NOISE)
        fields = dict(audio_prompt=sound, prompt_start=0.1, prompt_length=0.2)
        first = self.take(**fields)
        path = f"/takes/{first['id']}/again"
        self.fails(409, r"follows a\.wav, which is not kept", path)
        (again,) = self.made(path=path, audio_prompt=sound, seed=7)
        self.assertEqual(self.bytes_of(again), self.bytes_of(first))
        other = sound | dict(name="b.wav")
        (again,) = self.made(path=path, audio_prompt=other, prompt_length=0.3, seed=7)
        self.assertEqual(again["settings"]["prompt_start"], 0.0)

    def test_a_path_in_the_settings_is_never_read(self):
        """A client chooses the name of what it sends."""
        save_audio(self.folder / "mine.wav", NOISE, 32000)
        sound = in_base64(NOISE) | dict(name="mine.wav")
        take = self.take(audio_prompt=sound, prompt_length=0.2)
        old = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, old)
        self.fails(409, "mine.wav", f"/takes/{take['id']}/again")

    def test_an_adapter_that_is_not_served(self):
        record = self.server.takes.find("slow-bell-7").settings
        with patch.dict(record, adapter="mine.safetensors"):
            self.fails(409, "adapter mine.safetensors", AGAIN)


class TestExtend(RetakeTest):
    @slow(3)
    def test_goes_on_from_the_codes(self):
        (take,) = self.made(path=EXTEND, seconds=0.5)
        resume = f"--resume={self.takes / 'slow-bell-7.safetensors'}"
        want = self.generate("a.wav", resume, "--duration=1.5")
        self.assertEqual(self.bytes_of(take), want)
        codes, _ = load_codes(self.takes / f"{take['id']}.safetensors")
        self.assertSame(codes, load_codes(self.folder / "a.safetensors")[0])

    def test_stopped_before_there_is_more(self):
        """Then no take is left that is shorter than the old one."""
        before, tell = os.listdir(self.takes), Ticket.tell

        def stop(ticket, name, /, **data):
            tell(ticket, name, **data)
            if name == "start":
                ticket.cancel()

        with patch.object(Ticket, "tell", stop):
            self.fails(409, "^It was cancelled before", EXTEND, seconds=0.5)
        self.assertCountEqual(os.listdir(self.takes), before)

    def test_of_a_take_that_began_with_a_sound(self):
        """Which lies in the codes: it need not come along."""
        sound = in_base64(NOISE)
        take = self.take(audio_prompt=sound, prompt_length=0.2)
        (longer,) = self.made(path=f"/takes/{take['id']}/extend", seconds=0.2)
        self.assertAlmostEqual(longer["seconds"], 1.2)
        self.assertEqual(longer["settings"]["audio_prompt"], "a.wav")

    def test_what_cannot_be(self):
        for pattern, fields in (
            ("^seconds must be", {}),
            ("^seconds must be", dict(seconds="1")),
            ("^seconds must be", dict(seconds=-1)),
            ("leave out duration and takes", dict(seconds=1, duration=9)),
            ("leave out duration and takes", dict(seconds=1, takes=2)),
            ("^duration must be at most 600", dict(seconds=600)),
            ("^'part' is unknown", dict(seconds=1, part="1:2")),
        ):
            with self.subTest(**fields):
                self.fails(400, pattern, EXTEND, **fields)
        magnet = self.take(model="tiny-magnet", decoding_steps="1,1,1,1")
        path = f"/takes/{magnet['id']}/extend"
        self.fails(400, "^resume does not apply to MAGNeT", path, seconds=1)
        (self.takes / "slow-bell-7.safetensors").unlink()
        self.fails(409, "no codes", EXTEND, seconds=1)


class TestPart(RetakeTest):
    def test_a_loop(self):
        """Is never longer, and no part of it is made again; but it is made anew."""
        loop = dict(prompt="saw", seed=3, loop=True, bpm=120, bars=0.5)
        self.make(**loop)
        self.fails(409, "saw-3 is a loop", "/takes/saw-3/extend", seconds=1)
        self.fails(400, "is a loop", "/takes/saw-3/regenerate", part="0.3:0.5")
        (take,) = self.made(path="/takes/saw-3/again", bars=0.25)
        self.assertEqual((take["seconds"], take["settings"]["bars"]), (0.5, 0.25))

    @slow(5)
    def test_made_again(self):
        """The best of the candidates, as generate.py makes them."""
        for part in ("0.3:0.6", [0.3, 0.6]):
            takes = self.made(path=PART, part=part, candidates=3, takes=2, seed=3)
            self.assertEqual(len(takes), 2)
        codes = self.takes / "slow-bell-7.safetensors"
        flags = ["--regenerate", "0.3:0.6", str(codes), "--candidates=3", "--seed=3"]
        want = self.generate("a.wav", *flags)
        self.assertEqual(self.bytes_of(takes[0]), want)
        scores = [take["settings"]["score"] for take in takes]
        self.assertEqual(scores, sorted(scores, reverse=True))
        self.assertTrue(all(take["codes"] for take in takes))

    @slow(5)
    def test_filled_in_by_a_magnet(self):
        """Of its own codes, and of another model's take its sound."""
        steps = dict(decoding_steps="1,1,1,1", takes=1, seed=3)
        own = self.take(model="tiny-magnet", decoding_steps="1,1,1,1", seed=5)
        name = own["id"]
        parts = dict(parts=["0.2:0.4", [0.6, 0.8]])
        path = f"/takes/{name}/regenerate"
        (take,) = self.made(path=path, takes=1, seed=3, **parts)
        codes = str(self.takes / f"{name}.safetensors")
        flags = ["--fill", "0.2:0.4", "0.6:0.8", codes, "--seed=3"]
        self.assertEqual(self.bytes_of(take), self.generate("a.wav", *flags))
        (take,) = self.made(path=PART, part="0.2:0.4", model="tiny-magnet", **steps)
        sound = str(self.takes / "slow-bell-7.wav")
        self.assertEqual(take["settings"]["regenerated"], sound)
        self.fails(400, "^candidates does not", path, candidates=2, **parts)

    def test_events(self):
        events = self.events(PART, part="0.3:0.6", candidates=2)
        names = {event.name: event.data for event in events}
        self.assertEqual([*names], ["queued", "progress", "take", "done"])
        self.assertEqual(len([e for e in events if e.name == "take"]), 2)
        self.assertAlmostEqual(names["progress"]["of"], 0.6)

    def test_once_more(self):
        """Of a take that was edited the same part of the same take is made again."""
        (edited,) = self.made(path=PART, part="0.3:0.6", candidates=1, prompt="saw")
        path = f"/takes/{edited['id']}/again"
        (again,) = self.made(path=path, candidates=1, seed=edited["seed"])
        self.assertEqual(self.bytes_of(again), self.bytes_of(edited))
        self.ask("DELETE", "/takes/slow-bell-7")
        self.fails(409, "was made of slow-bell-7.*gone", path)

    def test_what_cannot_be(self):
        for pattern, fields in (
            ("^parts? must be", {}),
            ("^part must be such as", dict(part="8")),
            ("^part must be such as", dict(part=[1])),
            ("^part must be such as", dict(part=[1, "2"])),
            ("^part must be such as", dict(part=[-1, 2])),
            ("^part and parts must not", dict(part="1:2", parts=["1:2"])),
            ("^parts must be a list", dict(parts="1:2")),
            ("^parts must be a list", dict(parts=["1:2"] * 17)),
            ("^A MusicGen makes one part", dict(parts=["0.1:0.2", "0.4:0.5"])),
            ("is not in it", dict(part="0.5:9")),
            ("is empty", dict(part="0.5:0.5")),
            ("reaches the take's beginning", dict(part="0:0.5")),
            ("^candidates must be from 1 to 64", dict(part="0.3:0.5", candidates=65)),
            ("^takes must be at most", dict(part="0.3:0.5", candidates=2, takes=3)),
            ("keeps the take's duration", dict(part="0.3:0.5", duration=2)),
            ('^stream must be "events"', dict(part="0.3:0.5", stream=True)),
            ("^candidates must differ", dict(part="0.3:0.5", temp=0)),
        ):
            with self.subTest(**fields):
                self.fails(400, pattern, PART, **fields)
        self.assertEqual(len(self.get("/takes").json["takes"]), 1)


class TestLevel(RetakeTest):
    def test_loudness_and_peak(self):
        for name, level in (("loudness", -23), ("peak", -6)):
            (take,) = self.made(path=LEVEL, **{name: level})
            path = self.takes / f"{take['id']}.wav"
            audio, rate = read_sound(path)
            found = 20 * np.log10(true_peak(audio))
            found = integrated_loudness(audio, rate) if name == "loudness" else found
            self.assertAlmostEqual(found, level, delta=0.1)
            self.assertEqual(read_settings(path)[name], level)
            codes, _ = load_codes(path.with_suffix(".safetensors"))
            old, _ = load_codes(self.takes / "slow-bell-7.safetensors")
            self.assertSame(codes, old)

    def test_what_cannot_be(self):
        for pattern, fields in (
            ("^loudness or peak must be given", {}),
            ("^loudness must be", dict(loudness=3)),
            ("^loudness must be", dict(loudness=False)),
            ("^peak must be", dict(peak="0")),
            ("not be given together", dict(loudness=-14, peak=-1)),
            ("^'temp' is unknown", dict(temp=1)),
        ):
            self.fails(400, pattern, LEVEL, **fields)

    def test_of_damaged_codes_nothing_is_left(self):
        (self.takes / "slow-bell-7.safetensors").write_bytes(b"damaged")
        before = os.listdir(self.takes)
        self.fails(400, "is damaged or holds no codes", LEVEL, peak=-6)
        self.assertCountEqual(os.listdir(self.takes), before)


class TestStems(RetakeTest):
    """With a small random Demucs."""

    def setUp(self):
        super().setUp()
        self.model = demucs.HTDemucs.from_pretrained(REFERENCE / "htdemucs")
        load = patch("demucs.HTDemucs.from_pretrained", return_value=self.model)
        self.enterContext(load)

    def test_in_files_beside_the_take(self):
        path = "/takes/slow-bell-7/stems"
        stems, events = self.make(path=path)["stems"], self.events(path)
        self.assertEqual(sorted(stems), ["bass", "drums", "other", "vocals"])
        take = self.get("/takes/slow-bell-7").json
        self.assertEqual(
            (sorted(take["stems"]), events[-2].data), (sorted(stems), take)
        )
        (self.folder / "a.wav").write_bytes(self.get(f"{path}/drums.wav").body)
        model, form = self.model, (self.model.sampling_rate, self.model.channels)
        song = load_audio(self.takes / "slow-bell-7.wav", *form)
        made = model.separate(song)
        want = made[model.config.sources.index("drums")]
        loudest = max(1.0, *map(true_peak, made))
        got = load_audio(self.folder / "a.wav", *form)
        self.assertLess(mx.abs(got - want / loudest).max().item(), 2**-13)
        for name in ("piano.wav", "..", "%2e%2e%2fslow-bell-7.wav", ".wav"):
            self.assertEqual(self.get(f"{path}/{name}").status, 404)
        self.ask("DELETE", "/takes/slow-bell-7")
        self.assertEqual(os.listdir(self.takes), [])

    def test_where_there_is_no_demucs(self):
        error = OSError("The Hub did not give Demucs.")
        with patch("demucs.HTDemucs.from_pretrained", side_effect=error):
            self.fails(502, "did not give Demucs", "/takes/slow-bell-7/stems")

    def test_stopped_between_its_pieces(self):
        worker = self.server.worker
        quick = lambda: worker._current.cancel()  # noqa: E731
        with patch.object(worker, "do_quick", quick):
            self.fails(409, "cancelled", "/takes/slow-bell-7/stems")
        self.assertEqual(self.get("/takes/slow-bell-7").json["stems"], [])


class TestChroma(ServerTest):
    def test_of_a_sound(self):
        times = np.arange(64000) / 32000
        sound = np.sin(2 * np.pi * 440 * times)[:, None] / 2
        told = self.make(path="/v1/audio/chroma", melody=in_base64(sound))
        self.assertAlmostEqual(told["frame_rate"], 32000 / 4096)
        want = np.array(extract_chroma(mx.array(sound, mx.float32), 32000))
        self.assertSame(np.array(told["chroma"]), want)
        self.assertEqual({row.index(1) for row in told["chroma"]}, {9})  # A

    def test_of_notes(self):
        fields = dict(notes="C E G:2", bpm=60)
        told = self.make(path="/v1/audio/chroma", **fields)["chroma"]
        want = np.array(parse("C E G:2", Beat(60)).chroma())
        self.assertSame(np.array(told), want)

    def test_while_a_take_is_made(self):
        """It does not wait for the take's end."""
        with self.asking(
            "POST", "/v1/audio/music-generations", BELL | dict(duration=8, stream=True)
        ) as answer:
            answer.read(1)
            self.make(path="/v1/audio/chroma", notes="C E G", bpm=60)
            self.assertTrue(self.get("/health").json["busy"])

    def test_what_cannot_be(self):
        path = "/v1/audio/chroma"
        for pattern, fields in (
            ("^melody, which is a file, or notes", {}),
            (
                "^melody, which is a file, or notes",
                dict(melody=in_base64(NOISE), notes="C"),
            ),
            ("^notes need a bpm", dict(notes="C")),
            ("^notes must", dict(notes="H", bpm=60)),
            ("^notes must", dict(notes=7, bpm=60)),
            ("^'temp' is unknown", dict(temp=1)),
            ("silen", dict(melody=in_base64(0 * NOISE))),
        ):
            with self.subTest(pattern):
                self.fails(400, pattern, path, **fields)
