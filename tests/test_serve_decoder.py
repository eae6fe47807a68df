"""The decoder that a request asks for: the same as generate.py makes with it."""

import contextlib
import io
import os
from types import SimpleNamespace
from unittest.mock import patch

from common import REFERENCE, Test, slow
from serving import (
    NOISE,
    Event,
    MadeTest,
    ServerTest,
    generate_beside,
    in_base64,
    sound_of,
)

import diffusion
import diffusion_job
import retakes
import serve
from forms import Form
from job import plan
from settings import load_codes, read_settings
from sound_tasks import Listen
from tasks import Decodings, Limits, count_decodings, read_order
from worker import Ticket

MODEL = str(REFERENCE / "mono-audiocraft")
DECODER = str(REFERENCE / "diffusion-audiocraft")
SHORT = dict(prompt="slow bell", seed=7, duration=0.1)
DIFFUSED = SHORT | dict(decoder="diffusion")
ENCODEC = dict(decoder="encodec")
AGAIN = "/takes/slow-bell-7/again"
EXTEND = "/takes/slow-bell-7/extend"
PART = "/takes/slow-bell-7/regenerate"
REDECODE = "/takes/slow-bell-7/redecode"


class DecoderTest(MadeTest):
    """With random weights of few channels for the model and for `diffusion`."""

    flags = ("--model", MODEL, "--decoder", DECODER)

    def in_two_steps(self) -> None:
        """For what does not depend on how long diffusion goes on."""
        self.enterContext(patch("diffusion.STEPS", diffusion.STEPS[-3:]))

    def other_decoder(self) -> None:
        """The take was decoded by one that is not served."""
        record = self.server.takes.find("slow-bell-7").settings
        self.enterContext(patch.dict(record, decoder="mine.th"))

    def sound(self, take: dict) -> bytes:
        return self.get(f"/takes/{take['id']}.wav").body

    def generate(self, name: str, *flags: str) -> bytes:
        """The file that generate.py makes, with its codes beside it."""
        return generate_beside(self.folder / name, *flags)

    def on(self, name: str, act) -> None:
        """Do something with the ticket, and with what is told, whenever it tells that."""
        tell = Ticket.tell

        def told(ticket, event, /, **data):
            tell(ticket, event, **data)
            if event == name:
                act(ticket, data)

        self.enterContext(patch.object(Ticket, "tell", told))


def named(events: list[Event], name: str) -> list[dict]:
    return [event.data for event in events if event.name == name]


class TestDiffusion(DecoderTest):
    @slow(8)
    def test_the_same_as_of_generate(self):
        """Its sound and its codes; and again, and longer."""
        want = self.same("a.wav", SHORT | dict(decoder=DECODER), MODEL)
        self.assertEqual(self.make(**DIFFUSED), want)
        codes, record = load_codes(self.takes / "slow-bell-7.safetensors")
        self.assertEqual(record["decoder"], DECODER)
        self.assertEqual(record, load_codes(self.folder / "a.safetensors")[1])
        (again,) = self.make(path=AGAIN, seed=7)["takes"]
        self.assertEqual(self.sound(again), want)
        (longer,) = self.make(path=EXTEND, seconds=0.1)["takes"]
        resume = f"--resume={self.folder / 'a.safetensors'}"
        want = self.generate("b.wav", resume, "--duration=0.2")
        self.assertEqual(self.sound(longer), want)

    def test_encodec_is_the_models_own(self):
        plain, named = (self.make(**SHORT | more) for more in ({}, ENCODEC))
        self.assertEqual(named, plain)

    def test_events(self):
        """The codec's sound is heard meanwhile, and the take is diffusion's."""
        plain = self.events(**SHORT)
        events = self.events(**DIFFUSED)
        self.assertSame(sound_of(events), sound_of(plain))
        names = [*dict.fromkeys(event.name for event in events)]
        order = ["queued", "loading", "start", "progress", "audio", "decoding"]
        self.assertEqual(names, [*order, "take", "done"])
        self.assertEqual(named(events, "loading"), [{"model": DECODER}])
        self.assertEqual(named(events, "start")[0]["decoder"], "diffusion")
        self.assertNotIn("decoder", named(plain, "start")[0])
        steps = [data["seconds"] for data in named(events, "decoding")]
        self.assertEqual((steps, steps[-1]), (sorted(steps), 0.1))
        self.assertGreater(len(steps), 1)
        (first,), (second,) = named(plain, "take"), named(events, "take")
        self.assertNotEqual(self.sound(first), self.sound(second))
        self.assertEqual(second["settings"]["decoder"], DECODER)

    def test_the_header_of_a_stream_tells_no_decoder(self):
        """For its samples are the codec's."""
        self.in_two_steps()
        order = read_order(Form(DIFFUSED | dict(stream="events")), self.server.limits)
        task = serve.Generate(self.server.takes, order)
        events = [*self.server.worker.submit(task)]
        (header,) = named(events, "header")
        self.assertIn(b'"seed"', header["data"])
        self.assertNotIn(b"decoder", header["data"])

    def test_a_stream_of_it(self):
        self.fails(400, "^decoder needs the whole take", **DIFFUSED, stream="wav")
        self.in_two_steps()
        self.make(**DIFFUSED)
        wav = self.make(path=AGAIN, stream="wav", seed=8)
        self.assertEqual(wav[:4], b"RIFF")
        settings = self.get("/takes/slow-bell-8").json["settings"]
        self.assertNotIn("decoder", settings)

    @slow(10)
    def test_several_takes_and_loops(self):
        """How far it is never goes back, and comes to the end."""
        self.in_two_steps()
        self.enterContext(patch("loops.AROUND", 0.4))
        loop = dict(loop=True, bpm=240, bars=0.25, duration=None)
        for more in ({}, loop):
            events = self.events(**DIFFUSED | more | dict(takes=2))
            told = named(events, "decoding")
            self.assertEqual(told[-1]["seconds"], told[-1]["of"])
            self.assertEqual(told[-1]["of"], named(events, "progress")[-1]["of"])
            steps = [data["seconds"] for data in told]
            self.assertEqual(steps, sorted(steps))
            decoders = [t["settings"]["decoder"] for t in named(events, "take")]
            self.assertEqual(decoders, [DECODER] * 2)


def cancel(ticket: Ticket, data: dict, after: float = 0) -> None:
    """Once so many seconds are done."""
    if data["seconds"] >= after:
        ticket.cancel()


class TestStop(DecoderTest):
    def test_while_it_is_decoded(self):
        """Then the take has the codec's sound, and says so."""
        plain = self.make(**SHORT)
        self.on("decoding", cancel)
        events = self.events(**DIFFUSED)
        self.assertEqual([event.name for event in events][-2:], ["take", "cancelled"])
        self.assertEqual(len(named(events, "decoding")), 1)
        (take,) = named(events, "take")
        self.assertEqual(self.sound(take), plain)
        self.assertTrue(take["codes"])

    def test_while_its_codes_are_made(self):
        self.enterContext(patch("tasks.OFTEN", 0))
        self.on("progress", lambda *told: cancel(*told, after=0.05))
        events = self.events(**DIFFUSED)
        self.assertEqual([event.name for event in events][-2:], ["take", "cancelled"])
        self.assertEqual(named(events, "decoding"), [])
        self.assertNotIn("decoder", named(events, "take")[0]["settings"])

    def test_after_the_last_step_it_is_whole(self):
        self.in_two_steps()
        self.on("decoding", lambda *told: cancel(*told, after=0.1))
        take = named(self.events(**DIFFUSED), "take")[0]
        self.assertEqual(take["settings"]["decoder"], DECODER)

    def test_quick_tasks_are_done_between_steps(self):
        worker, quick, ended = self.server.worker, [], []

        def ask(*_):
            ended.extend(ticket.ended.is_set() for ticket in quick)
            if not quick:
                quick.append(worker.submit(Listen(Form(dict(notes="C E G", bpm=60)))))

        self.on("decoding", ask)
        self.make(**DIFFUSED)
        self.assertGreater(len(ended), 0)
        self.assertTrue(all(ended))

    def test_redecoding(self):
        """Nothing is left of it."""
        self.make(**SHORT)
        before = os.listdir(self.takes)
        self.on("decoding", cancel)
        self.fails(409, "^It was cancelled before", REDECODE, decoder="diffusion")
        self.assertCountEqual(os.listdir(self.takes), before)


class TestRedecode(DecoderTest):
    @slow(12)
    def test_the_same_as_of_generate(self):
        self.make(**SHORT, loudness=None, peak=-3)
        for i, fields in enumerate(
            (
                dict(decoder="diffusion"),
                dict(decoder="diffusion", fade_in=0.02, peak=-9, subtype="PCM_24"),
                dict(decoder="encodec", fade_out=0),
                dict(),
            )
        ):
            with self.subTest(**fields):
                (take,) = self.make(path=REDECODE, **fields)["takes"]
                flags = fields | ({"decoder": DECODER} if i < 2 else {})
                flags = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
                codes = self.takes / "slow-bell-7.safetensors"
                want = self.generate(f"{i}.wav", f"--redecode={codes}", *flags)
                path = self.takes / f"{take['id']}.wav"
                self.assertEqual(path.read_bytes(), want)
                beside = path.with_suffix(".safetensors")
                wanted = (self.folder / f"{i}.safetensors").read_bytes()
                self.assertEqual(beside.read_bytes(), wanted)
                self.assertSame(load_codes(beside)[0], load_codes(codes)[0])
        self.assertEqual(len(self.get("/takes").json["takes"]), 5)

    def test_and_back(self):
        """Of what diffusion decoded, and without a decoder by that again."""
        plain = self.make(**SHORT)
        diffused = self.make(path=REDECODE, decoder="diffusion")["takes"][0]
        path = f"/takes/{diffused['id']}/redecode"
        (again,) = self.make(path=path)["takes"]
        self.assertEqual(self.sound(again), self.sound(diffused))
        (back,) = self.make(path=path, **ENCODEC)["takes"]
        self.assertEqual(self.sound(back), plain)

    def test_events(self):
        self.make(**SHORT)
        self.in_two_steps()
        events = self.events(REDECODE, decoder="diffusion")
        names = [*dict.fromkeys(event.name for event in events)]
        self.assertEqual(names, ["queued", "loading", "decoding", "take", "done"])
        self.assertEqual(named(events, "decoding")[-1], dict(seconds=0.1, of=0.1))

    def test_what_it_followed_need_not_come_along(self):
        sound = in_base64(NOISE)
        fields = dict(audio_prompt=sound, prompt_length=0.1, drop_prompt=True)
        self.make(**SHORT | fields | dict(duration=0.3))
        (take,) = self.make(path=REDECODE)["takes"]
        found = read_settings(self.takes / f"{take['id']}.wav")
        self.assertEqual((take["seconds"], found["audio_prompt"]), (0.2, "a.wav"))
        first = self.get("/takes/slow-bell-7.wav").body
        self.assertEqual(self.sound(take), first)

    def test_a_loop(self):
        """Goes round as before."""
        loop = dict(loop=True, bpm=240, bars=0.25, duration=None)
        first = self.make(**SHORT | loop)
        (take,) = self.make(path=REDECODE)["takes"]
        self.assertEqual(self.sound(take), first)
        self.assertIn("loop_start", take["settings"])

    def test_an_edit(self):
        """What was made of which part stays told."""
        self.make(**SHORT | dict(duration=0.4))
        fields = dict(part="0.2:0.3", candidates=1, seed=3)
        (edited,) = self.make(path=PART, **fields)["takes"]
        self.in_two_steps()
        path = f"/takes/{edited['id']}/redecode"
        (take,) = self.make(path=path, decoder="diffusion")["takes"]
        told = {key: take["settings"][key] for key in ("regenerated", "part")}
        want = {key: edited["settings"][key] for key in told}
        self.assertEqual(told, want)
        again = f"/takes/{take['id']}/again"
        (other,) = self.make(path=again, candidates=1)["takes"]
        self.assertNotIn("decoder", other["settings"])

    def test_what_cannot_be(self):
        self.make(**SHORT)
        for pattern, fields in (
            ("^The codes are taken as they are: leave out temp", dict(temp=1)),
            ("leave out takes", dict(takes=2)),
            ("leave out seed", dict(seed=7)),
            ("leave out model", dict(model="tiny")),
            ("leave out audio_prompt", dict(audio_prompt=in_base64(NOISE))),
            ("^'part' is unknown", dict(part="1:2")),
            ('^stream must be "events"', dict(stream=True)),
            ('^decoder must be "encodec" or "diffusion"', dict(decoder=DECODER)),
            ("^peak must be", dict(peak=3)),
            ("not be given together", dict(peak=-1, loudness=-14)),
            ("^subtype of a .wav", dict(subtype="VORBIS")),
        ):
            with self.subTest(**fields):
                self.fails(400, pattern, REDECODE, **fields)
        (self.takes / "slow-bell-7.safetensors").unlink()
        self.fails(409, "no codes", REDECODE, **ENCODEC)
        self.fails(404, "no take", "/takes/none/redecode", **ENCODEC)


class TestFields(DecoderTest):
    def test_no_file_is_a_strangers_to_choose(self):
        names = (DECODER, "musicgen", "/etc/passwd", "~", "somebody/something", "")
        for decoder in (*names, 7, True, ["diffusion"]):
            with self.subTest(decoder):
                pattern = '^decoder must be "encodec" or "diffusion" here, got '
                self.fails(400, pattern, **SHORT | dict(decoder=decoder))
        file = dict(decoder=in_base64(NOISE))
        self.fails(400, "^'decoder' must not be a file", **SHORT | file)
        self.assertEqual(self.get("/takes").json["takes"], [])

    def test_a_decoder_that_is_not_served(self):
        """Is asked for by the settings of a take, unless the form gives one."""
        self.make(**SHORT)
        self.other_decoder()
        for path, more in ((AGAIN, {}), (EXTEND, dict(seconds=0.1)), (REDECODE, {})):
            said = "decoded by mine.th: start the server with --decoder"
            self.fails(409, said, path, **more)
            (take,) = self.make(path=path, **more | ENCODEC)["takes"]
            self.assertNotIn("decoder", take["settings"])

    def test_an_edit(self):
        """It goes without, whatever the take was decoded by."""
        self.make(**SHORT | dict(duration=0.4))
        part = dict(part="0.2:0.3", candidates=1)
        self.fails(400, "^An edit goes without decoder", PART, **part, **ENCODEC)
        self.other_decoder()
        (take,) = self.make(path=PART, **part)["takes"]
        self.assertNotIn("decoder", take["settings"])

    def test_a_codec_of_another_width(self):
        """Is told in a line, before anything is made."""
        tiny = SHORT | dict(model="tiny")
        self.make(**tiny)
        said = "^The diffusion decodes codes of a codec that is 16 wide"
        with patch("diffusion_job.Decoder.__call__", side_effect=AssertionError):
            self.fails(400, said, **tiny, decoder="diffusion")
            self.fails(400, said, REDECODE, decoder="diffusion")
        self.assertEqual(len(self.get("/takes").json["takes"]), 1)

    def test_where_the_hub_does_not_give_it(self):
        error = OSError("The Hub did not give the decoder.")
        with patch("diffusion_job.load", side_effect=error):
            self.fails(502, "did not give the decoder", **DIFFUSED)
            self.make(**SHORT)
            self.fails(502, "did not give", REDECODE, decoder="diffusion")

    def test_its_memory_goes_with_the_model(self):
        self.in_two_steps()
        self.make(**DIFFUSED)
        self.assertEqual(diffusion_job.load.cache_info().currsize, 1)
        self.make(**SHORT | dict(model="tiny"))
        self.assertEqual(diffusion_job.load.cache_info().currsize, 0)


class TestMelody(ServerTest):
    flags = ("--model", str(REFERENCE / "melody-audiocraft"))

    def test_what_is_decoded_anew_follows_nothing(self):
        fields = SHORT | dict(melody=in_base64(NOISE), no_separate=True)
        first = self.make(**fields)
        (take,) = self.make(path=REDECODE, **ENCODEC)["takes"]
        self.assertEqual(self.get(f"/takes/{take['id']}.wav").body, first)


class TestProgress(Test):
    def test_of_some_decodings(self):
        """Each is its share of all."""
        ticket, worker = Ticket("a", None), SimpleNamespace(do_quick=lambda: None)
        with patch("tasks.OFTEN", 0):
            decodings = Decodings(worker, ticket, 2, 8.0)
            for _ in range(2):
                steps = [SimpleNamespace(step=i, total=2) for i in (1, 2)]
                self.assertEqual([*decodings(steps)], steps)
        told = [ticket.next(0).data for _ in range(4)]
        self.assertEqual(told, [dict(seconds=s, of=8.0) for s in (2, 4, 6, 8)])

    def test_how_many_there_are(self):
        """Loops are decoded one by one, and of many takes the best."""
        values, loop = dict(seed=7, duration=2), dict(loop=True, bpm=120, bars=1)
        for want, more in (
            (1, {}),
            (2, loop),
            (2, loop | dict(best_of=3)),
            (6, loop | dict(best_of=3, keep_all=True)),
        ):
            wanted = plan(["a"], values | dict(duration=None) | more, takes=2)
            self.assertEqual(count_decodings(wanted, batches=1), want)


class TestFlag(Test):
    def test_it_is_the_released_one(self):
        self.assertEqual(serve.parse_arguments([]).decoder, "diffusion")
        self.assertEqual(Limits("tiny").decoder, "diffusion")

    def test_the_released_one_by_either_name(self):
        """What one of them made is gone on with by the other."""
        names = ("diffusion", "musicgen")
        for name, served in ((a, b) for a in names for b in names):
            take = SimpleNamespace(id="a", settings=dict(decoder=name))
            retakes.check_decoder(take, Limits("tiny", decoder=served))

    def test_what_it_may_be(self):
        for name in ("diffusion", "musicgen", DECODER, "somebody/something"):
            args = serve.parse_arguments(["--decoder", name])
            self.assertEqual(args.decoder, name)
        home = os.path.expanduser("~")
        self.assertEqual(serve.parse_arguments(["--decoder", "~"]).decoder, home)
        for name in ("encodec", "", "./none", "/none/at/all", "no such", "a/b/c"):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                with self.assertRaises(SystemExit):
                    serve.parse_arguments(["--decoder", name])
            self.assertIn("decoder must be", said.getvalue())
