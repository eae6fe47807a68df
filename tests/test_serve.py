"""What the server makes: the same as generate.py, heard while it is made."""

import json
import os
import shutil
import threading
import time
from unittest.mock import patch

import numpy as np
import soundfile
from common import REFERENCE, slow
from serving import (
    BELL,
    GENERATIONS,
    NOISE,
    Gate,
    MadeTest,
    ServerTest,
    flags_of,
    generate_py,
    in_base64,
    read_events,
    sound_of,
)

import jobs
import serve
from settings import load_codes, read_settings
from worker import Ticket


class TestSameAsGenerate(MadeTest):
    @slow(4)
    def test_a_take(self):
        """Its file, its codes and what is told of it."""
        fields = BELL | dict(negative_prompt="drums", temp=0.9, loudness=-20, bpm=100)
        want = self.same("slow-bell-7.wav", fields)
        answer = self.post(GENERATIONS, fields)
        self.assertEqual((answer.status, answer.body), (200, want))
        told = {name: answer.headers[name] for name in ("X-Take-Id", "X-Seed")}
        self.assertEqual(told, {"X-Take-Id": "slow-bell-7", "X-Seed": "7"})
        self.assertEqual((self.takes / "slow-bell-7.wav").read_bytes(), want)
        codes, settings = load_codes(self.takes / "slow-bell-7.safetensors")
        wanted, record = load_codes(self.folder / "slow-bell-7.safetensors")
        self.assertSame(codes, wanted)
        self.assertEqual(settings, record)

    @slow(4)
    def test_several_takes(self):
        fields = BELL | dict(takes=2)
        self.same("slow.wav", fields)
        takes = self.make(**fields)["takes"]
        self.assertEqual([take["id"] for take in takes], ["slow-bell-7", "slow-bell-8"])
        for i, take in enumerate(takes, 1):
            want = (self.folder / f"slow-{i}.wav").read_bytes()
            self.assertEqual(self.get(f"/takes/{take['id']}.wav").body, want)
            self.assertTrue(take["codes"])

    @slow(4)
    def test_sections_in_a_loop_and_the_best_of_two(self):
        for fields in (
            dict(prompt="0: slow bell | 0.4: fast saw", fade_in=0.1, fade_out=0.2),
            dict(prompt="happy saw", loop=True, bpm=120, bars=0.5, best_of=2),
        ):
            fields |= dict(seed=3) | ({} if "loop" in fields else dict(duration=1))
            with self.subTest(fields):
                want = self.same(f"{len(fields)}.wav", fields)
                self.assertEqual(self.make(**fields), want)

    @slow(4)
    def test_a_magnet(self):
        fields = BELL | dict(decoding_steps="2,1,1,1", max_guidance_coef=4.0)
        want = self.same("a.wav", fields, "tiny-magnet")
        self.assertEqual(self.make(model="tiny-magnet", **fields), want)

    @slow(4)
    def test_streamed(self):
        """Header and samples are those of a pipe, and events have the same samples.
        What is kept is the whole take, as without a stream."""
        whole = self.same("slow-bell-7.wav", BELL)
        flags = flags_of(BELL | dict(model="tiny", output="-"))
        want = generate_py(self.folder, "--stream", *flags)
        for stream in (True, "wav"):
            with self.asking("POST", GENERATIONS, BELL | dict(stream=stream)) as answer:
                self.assertEqual(answer.headers["Transfer-Encoding"], "chunked")
                self.assertEqual(answer.read(), want)
        events = self.events(**BELL)
        samples = np.frombuffer(want[-2 * 32000 :], "<i2")[:, None]
        self.assertSame(sound_of(events), samples)
        for take in self.get("/takes").json["takes"]:
            self.assertEqual(self.get(f"/takes/{take['id']}.wav").body, whole)


class TestEvents(ServerTest):
    def test_in_their_order(self):
        events = self.events(**BELL | dict(takes=2))
        names = [event.name for event in events]
        order = [n for i, n in enumerate(names) if i == 0 or n != names[i - 1]]
        beginning = ["queued", "loading", "start", "progress", "audio"]
        self.assertEqual(order[:5], beginning)
        self.assertEqual(order[-2:], ["take", "done"])
        starts = [e.data for e in events if e.name == "start"]
        form = dict(sampling_rate=32000, channels=1, seconds=1, prompt="slow bell")
        self.assertEqual(starts[0], form | dict(id="slow-bell-7", seed=7))
        self.assertEqual(starts[1], form | dict(id="slow-bell-8", seed=8))
        steps = [e.data["seconds"] for e in events if e.name == "progress"]
        self.assertEqual((steps, steps[-1]), (sorted(steps), 1))
        takes = [e.data for e in events if e.name == "take"]
        self.assertEqual(takes, self.get("/takes").json["takes"][::-1])
        first = self.get("/takes/slow-bell-7.wav").body[-64000:]
        self.assertLess(
            np.abs(sound_of(events)[:31000, 0] - as_int(first)[:31000]).max(), 4
        )

    def test_a_magnet_has_no_sound_before_its_end(self):
        events = self.events(model="tiny-magnet", decoding_steps="1,1,1,1", **BELL)
        names = {event.name for event in events}
        self.assertEqual(
            names, {"queued", "loading", "start", "progress", "take", "done"}
        )

    def test_the_beginning_that_is_left_out_is_not_heard(self):
        """What is told is what is in the file."""
        sound = in_base64(NOISE)
        fields = dict(audio_prompt=sound, prompt_length=0.5, drop_prompt=True)
        events = self.events(**BELL | fields)
        take = next(e.data for e in events if e.name == "take")
        self.assertEqual(len(sound_of(events)), round(take["seconds"] * 32000))

    @slow(2)
    def test_the_first_sound_comes_within_a_second(self):
        """Of a request on two cores: also of the first one, which loads the model."""
        waits = []
        for _ in range(3):
            began = time.monotonic()
            with self.asking("POST", GENERATIONS, BELL | dict(stream="events")) as said:
                next(e for e in read_events(said) if e.name == "audio")
            waits.append(time.monotonic() - began)
        self.assertLess(min(waits), 1.0)


def as_int(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2").astype(int)


class TestStop(ServerTest):
    def setUp(self):
        super().setUp()
        self.gate = Gate(self)

    def kept(self) -> dict:
        """The only take, once it is there: some of it, with its codes."""
        for _ in range(200):
            if takes := self.get("/takes").json["takes"]:
                break
            time.sleep(0.05)
        (take,) = takes
        self.assertTrue(0 < take["seconds"] < 1, take["seconds"])
        codes, _ = load_codes(self.takes / f"{take['id']}.safetensors")
        self.assertEqual(codes.shape[1], round(take["seconds"] * 50))
        return take

    def test_by_its_id(self):
        with self.asking("POST", GENERATIONS, BELL | dict(stream="events")) as answer:
            self.gate.reached.wait(10)
            id = answer.headers["X-Request-Id"]
            self.assertEqual(self.post(f"/cancel/{id}").json, {"cancelled": id})
            self.gate.opened.set()
            events = [*read_events(answer)]
        self.assertEqual([e.name for e in events][-2:], ["take", "cancelled"])
        self.assertEqual(events[-2].data, self.kept())
        self.assertEqual(self.post(f"/cancel/{id}").status, 404)

    def test_without_a_stream_what_there_is_is_answered(self):
        answers = []
        ask = lambda: answers.append(self.post(GENERATIONS, BELL))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        self.gate.reached.wait(10)
        self.server.worker.cancel(self.server.worker._current.id)
        self.gate.opened.set()
        thread.join()
        take = self.kept()
        self.assertEqual(answers[0].status, 200)
        self.assertEqual(answers[0].body, self.get(f"/takes/{take['id']}.wav").body)

    def test_by_a_closed_connection(self):
        for stream in ("events", "wav", False):
            with self.subTest(stream):
                self.gate.opened.clear(), self.gate.reached.clear()
                connection = self.connect()
                body = json.dumps(BELL | dict(stream=stream)).encode()
                head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost:{self.port}\r\n"
                head += "Content-Type: application/json\r\nContent-Length: "
                connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
                self.gate.reached.wait(10)
                connection.close()
                ticket = self.server.worker._current
                self.assertTrue(ticket._stop.wait(5))
                self.gate.opened.set()
                self.assertTrue(ticket.ended.wait(10))
                take = self.kept()
                self.assertEqual(self.ask("DELETE", f"/takes/{take['id']}").status, 200)

    def test_while_it_waits(self):
        with self.asking("POST", GENERATIONS, BELL | dict(stream="events")):
            self.gate.reached.wait(10)
            with self.asking(
                "POST", GENERATIONS, BELL | dict(stream="events")
            ) as second:
                told = read_events(second)
                queued = next(told)
                self.assertEqual((queued.name, queued.data["place"]), ("queued", 1))
                self.assertEqual(self.get("/health").json["queue"], 1)
                self.post(f"/cancel/{queued.data['id']}")
                self.assertEqual([event.name for event in told], ["cancelled"])
            self.assertEqual(self.get("/health").json["queue"], 0)
            self.gate.opened.set()

    def test_nobody_listens(self):
        """The worker goes on, whoever does not take what it tells."""
        self.gate.opened.set()
        order = serve.read_order(serve.Form(BELL), self.server.limits)
        tasks = [
            serve.Generate(self.server.takes, order._replace(stream="events"))
            for _ in range(2)
        ]
        for ticket in [self.server.worker.submit(task) for task in tasks]:
            self.assertTrue(ticket.ended.wait(20))
        self.assertEqual(len(self.get("/takes").json["takes"]), 2)


class TestTakes(ServerTest):
    def test_what_is_there_after_a_restart(self):
        take = self.take()
        self.server.takes = serve.Takes(self.takes)
        self.assertEqual(self.get("/takes").json, {"takes": [take]})

    def test_each_form_of_one(self):
        take = self.take()
        path = self.takes / "slow-bell-7.wav"
        self.assertEqual(self.get("/takes/slow-bell-7").json, take)
        self.assertEqual(self.get("/takes/slow-bell-7.json").json, take)
        wav = self.get("/takes/slow-bell-7.wav")
        self.assertEqual(wav.headers["Content-Type"], "audio/wav")
        self.assertEqual(wav.body, path.read_bytes())
        codes = self.get("/takes/slow-bell-7.safetensors").body
        self.assertEqual(codes, path.with_suffix(".safetensors").read_bytes())
        flac = self.get("/takes/slow-bell-7.flac")
        self.assertEqual(flac.headers["Content-Type"], "audio/flac")
        (self.folder / "a.flac").write_bytes(flac.body)
        audio, rate = soundfile.read(self.folder / "a.flac")
        want, _ = soundfile.read(path)
        self.assertEqual((rate, audio.shape), (32000, want.shape))
        self.assertLess(np.abs(audio - want).max(), 2**-13)
        self.assertEqual(read_settings(self.folder / "a.flac"), take["settings"])

    def test_ranges(self):
        """As a browser asks for them, to seek."""
        self.take()
        whole = self.get("/takes/slow-bell-7.wav").body
        size = len(whole)
        for range_, start, stop in (
            ("bytes=0-", 0, size),
            ("bytes=0-99", 0, 100),
            ("bytes=100-", 100, size),
            ("bytes=-10", size - 10, size),
            (f"bytes=5-{9 * size}", 5, size),
        ):
            with self.subTest(range_):
                answer = self.get("/takes/slow-bell-7.wav", Range=range_)
                self.assertEqual(answer.body, whole[start:stop])
                part = (start, stop) != (0, size)
                self.assertEqual(answer.status, 206 if part else 200)
                told = f"bytes {start}-{stop - 1}/{size}" if part else None
                self.assertEqual(answer.headers["Content-Range"], told)
        for range_ in (f"bytes={size}-", "bytes=9-3", "bytes=-0"):
            answer = self.get("/takes/slow-bell-7.wav", Range=range_)
            self.assertEqual(answer.status, 416)
            self.assertEqual(answer.headers["Content-Range"], f"bytes */{size}")
        for range_ in ("bytes=0-1,5-6", "lines=1-2", "bytes=-"):
            self.assertEqual(
                self.get("/takes/slow-bell-7.wav", Range=range_).body, whole
            )

    def test_head(self):
        self.take()
        answer = self.ask("HEAD", "/takes/slow-bell-7.wav")
        size = (self.takes / "slow-bell-7.wav").stat().st_size
        self.assertEqual((answer.status, answer.body), (200, b""))
        self.assertEqual(int(answer.headers["Content-Length"]), size)

    def test_star_and_delete(self):
        self.take()
        starred = self.make(path="/takes/slow-bell-7/star", starred=True)
        self.assertTrue(starred["starred"])
        self.assertEqual(self.get("/takes").json["takes"], [starred])
        self.fails(400, "starred", "/takes/slow-bell-7/star", starred="yes")
        self.assertEqual(self.ask("DELETE", "/takes/slow-bell-7").status, 200)
        self.assertEqual(os.listdir(self.takes), ["starred.json"])
        for method, path in (
            ("GET", "/takes/slow-bell-7"),
            ("GET", "/takes/slow-bell-7.wav"),
            ("GET", "/takes/slow-bell-7/stems/drums.wav"),
            ("DELETE", "/takes/slow-bell-7"),
            ("POST", "/takes/slow-bell-7/again"),
        ):
            self.assertEqual(self.ask(method, path).status, 404, path)

    def test_a_file_that_is_gone_meanwhile(self):
        self.take()
        found = self.server.takes.find("slow-bell-7")
        found.path.unlink()
        with patch.object(self.server.takes, "find", side_effect=[KeyError, found]):
            answer = self.get("/takes/slow-bell-7.wav")
        self.assertEqual((answer.status, answer.json["error"][:9]), (404, "It is not"))


class TestFields(ServerTest):
    def test_names_that_have_others(self):
        fields = {"duration-seconds": 0.5, "guidance": 2.0, "negative": "drums"}
        take = self.take(duration=None, **fields)
        told = [take["settings"][k] for k in ("guidance_coef", "negative_prompt")]
        self.assertEqual((take["seconds"], told), (0.5, [2.0, "drums"]))

    def test_any_seed(self):
        seeds = {self.take(seed=None, duration=0.1)["seed"] for _ in range(2)}
        self.assertEqual(len(seeds), 2)

    def test_what_cannot_be(self):
        for pattern, fields in (
            ("^'sed' is unknown", dict(sed=7)),
            ("^'output' is unknown", dict(output="/etc/passwd")),
            ("^'magnet' is unknown", dict(magnet=True)),
            ("duration must not be given twice", {"duration_seconds": 2}),
            ("^prompt must be a text", dict(prompt=["a"])),
            ("^prompt must be a text", dict(prompt="a" * 20000)),
            ("^negative_prompt must be a text", dict(negative_prompt=7)),
            ("^duration must be at most 600", dict(duration=601)),
            ("^duration must", dict(duration="long")),
            ("^duration must", dict(duration=-1)),
            ("^takes must be from 1 to 16", dict(takes=17)),
            ("^takes must", dict(takes=True)),
            ("^stream must", dict(stream="mp3")),
            ("^stream must", dict(stream=1)),
            ("^seed must|^seeds? ", dict(seed=-1)),
            ("^seed", dict(seed="7")),
            ("^temp must", dict(temp=-1)),
            ("^top_k must", dict(top_k=[1])),
            ("^bpm must", dict(bpm=1e6)),
            ("^melody must be a file", dict(melody="/etc/passwd")),
            ("^melody_start and no_separate need", dict(melody_start=1)),
            ("^notes need", dict(notes="C E G")),
            ("melody", dict(notes="C E G", bpm=100)),
            ("^decoding_steps applies to MAGNeT", dict(decoding_steps="1,1,1,1")),
            ("^top_p", dict(top_p=True)),
            ("^fade_in", dict(fade_in=[1])),
            ("^mp3_bitrate must go with", dict(mp3_bitrate=128)),
            ("^subtype of a .wav must be", dict(subtype="VORBIS")),
        ):
            with self.subTest(**fields):
                self.fails(400, pattern, **BELL | fields)
        self.assertEqual(self.get("/takes").json["takes"], [])

    def test_what_cannot_be_streamed(self):
        for fields in (
            dict(takes=2),
            dict(loop=True, bpm=120, bars=1, duration=None),
            dict(best_of=2),
            dict(loudness=-14),
            dict(peak=-1),
            dict(ending=True),
            dict(fade_in=0.2),
            dict(fade_out=0.2),
            dict(subtype="PCM_24"),
        ):
            with self.subTest(**fields):
                name = [*fields][0]
                self.fails(
                    400, f"^{name} needs the whole", stream=True, **BELL | fields
                )
        magnet = BELL | dict(model="tiny-magnet")
        self.fails(400, "^stream does not apply to MAGNeT", stream=True, **magnet)

    def test_longest(self):
        self.server.limits = self.server.limits._replace(seconds=1.0)
        self.fails(400, "at most 1 s", **BELL | dict(duration=1.1))
        self.fails(400, "at most 1 s", prompt="a", loop=True, bpm=60, bars=1)


class TestModels(ServerTest):
    def test_list(self):
        self.take()
        models = {model["id"]: model for model in self.get("/v1/models").json["data"]}
        form = dict(object="model", duration=8.0)
        tiny = dict(id="tiny", loaded=True, local=True, kind="text")
        self.assertEqual(models["tiny"], form | tiny)
        self.assertEqual([*models][0], "tiny")
        kinds = {name: model["kind"] for name, model in models.items()}
        self.assertEqual(kinds["stereo-melody"], "melody")
        self.assertEqual((kinds["style"], kinds["small"]), ("style", "text"))
        self.assertEqual(kinds["audiogen-medium"], "sound")
        self.assertEqual(kinds["tiny-magnet"], "magnet")
        self.assertFalse(models["tiny-magnet"]["loaded"])

    def test_health(self):
        told = dict(status="ok", loading=False, queue=0, busy=False)
        self.assertEqual(self.get("/health").json, told | dict(model=None))
        self.take()
        self.assertEqual(self.get("/health").json, told | dict(model="tiny"))

    def test_what_is_not_served(self):
        """A folder is served by the command line alone."""
        here = [str(REFERENCE / "mono-transformers"), "./tiny", "../tiny", "/etc", ""]
        with patch("worker.fetch", side_effect=OSError("there is no network.")):
            for model in (*here, "no such", "a/b/c", "~"):
                with self.subTest(model):
                    self.fails(404, "^There is no model", model=model, **BELL)
            for model in ("small", "somebody/something"):
                self.fails(502, "no network", model=model, **BELL)
        self.assertEqual(self.make(**BELL)[:4], b"RIFF")

    def test_another_of_another_rate(self):
        self.take()
        self.take(model="tiny-magnet", decoding_steps="1,1,1,1")
        self.assertEqual(self.get("/health").json["model"], "tiny-magnet")


class TestFlags(MadeTest):
    """Those that change the model."""

    model, adapter = (
        str(REFERENCE / name)
        for name in ("mono-transformers", "peft/ours-mono.safetensors")
    )
    flags = ("--model", model, "--adapter", adapter, "--adapter-scale", "0.5")
    flags += ("--dtype", "float16")

    @slow(4)
    def test_the_same_as_of_generate(self):
        fields = dict(prompt="bell", seed=1, duration=0.3)
        more = dict(adapter=self.adapter, adapter_scale=0.5, dtype="float16")
        want = self.same("a.wav", fields | more, self.model)
        self.assertEqual(self.make(**fields), want)
        again = self.make(path="/takes/bell-1/again", seed=1)["takes"][0]
        self.assertEqual(self.get(f"/takes/{again['id']}.wav").body, want)
        tiny = self.take(model="tiny")["settings"]
        self.assertEqual(("adapter" in tiny, tiny["dtype"]), (False, "float16"))


class TestTrouble(ServerTest):
    def test_a_folder_that_goes_meanwhile(self):
        """Such as one that is emptied in the file manager: the take is not lost."""
        tell, folder = Ticket.tell, self.takes

        def leave(ticket, name, /, **data):
            tell(ticket, name, **data)
            if name == "progress" and data["seconds"] < data["of"]:
                shutil.rmtree(folder, ignore_errors=True)

        with patch.object(Ticket, "tell", leave):
            answer = self.post(GENERATIONS, BELL)
        self.assertEqual(answer.status, 200, answer.body[:200])
        self.assertEqual(self.get("/takes/slow-bell-7").json["codes"], True)

    def test_a_full_disk(self):
        full = OSError(28, "No space left on device")
        with patch("audio.write_samples", side_effect=full):
            self.fails(507, "No space left|disk is full", **BELL)
            last = self.events(**BELL)[-1]
        self.assertEqual(last.name, "error")
        self.assertRegex(last.data["error"], "No space left|disk is full")
        self.assertEqual(os.listdir(self.takes), [])
        self.assertEqual(self.make(**BELL)[:4], b"RIFF")

    def test_one_of_several_takes_is_lost(self):
        """The others are told, and then the error."""
        real = jobs.save_audio

        def save(path, *rest):
            if "-8" in path.name:
                raise OSError(28, "No space left on device")
            real(path, *rest)

        with patch.object(jobs, "save_audio", save):
            events = self.events(**BELL | dict(takes=3))
        self.assertEqual([e.name for e in events][-3:], ["take", "take", "error"])
        self.assertEqual(len(self.get("/takes").json["takes"]), 2)

    def test_a_fault_of_the_servers(self):
        with patch("sys.stderr") as err:
            with patch("serve.own_settings", side_effect=ZeroDivisionError("oh")):
                answer = self.get("/v1/models")
        self.assertEqual((answer.status, answer.json), (500, {"error": "oh."}))
        self.assertTrue(err.write.called)
        self.assertEqual(self.get("/health").status, 200)

    def test_paths_and_methods(self):
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/takes/", 404),
            ("GET", "/takes/a/b/c", 404),
            ("PUT", "/health", 405),
            ("OPTIONS", GENERATIONS, 405),
            ("GET", GENERATIONS, 405),
            ("DELETE", "/takes", 405),
        ):
            answer = self.ask(method, path)
            self.assertEqual(answer.status, status, path)
            self.assertEqual([*answer.json], ["error"])
            self.assertRegex(answer.headers["X-Request-Id"], "^[0-9a-f]{16}$")

    def test_the_queue_is_full(self):
        gate = Gate(self)
        self.server.worker._most = 1
        with self.asking("POST", GENERATIONS, BELL | dict(stream="events")):
            gate.reached.wait(10)
            with self.asking("POST", GENERATIONS, BELL | dict(stream="events")):
                answer = self.post(GENERATIONS, BELL)
                self.assertEqual(
                    (answer.status, answer.headers["Retry-After"]), (503, "10")
                )
                gate.opened.set()
