"""The plug-in's protocol: requests as gary4juce sends them, and what it reads of the answers."""

import base64
import io
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import soundfile
from common import ScriptTest, Test
from served import Answer, ServedTest

import juce
from audio import read_sound
from settings import load_codes, read_settings

RATE, SECONDS = 44100, 2.0
STEPS = 3 / 2**15  # of 16 bits: rounded twice, with dither
AGENT = "User-Agent: JUCE/8.0.8\r\nConnection: close"
WARMS_UP = ("download", "loading model", "loading weights", "warm", "huggingface")
WARMS_UP += ("initializing",)  # of which the plug-in thinks that it goes on


def wav(audio: np.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def tune(seconds: float, channels: int = 2) -> np.ndarray:
    """What a DAW might play: (N, C)."""
    times = np.arange(int(seconds * RATE)) / RATE
    notes = [np.sin(2 * np.pi * 220 * (2 + c) * times) for c in range(channels)]
    return 0.3 * np.stack(notes, 1) * (1 + np.sin(2 * np.pi * 3 * times))[:, None] / 2


class PluginTest(ServedTest):
    """Answers are of 2 s in place of 30."""

    def setUp(self):
        self.enterContext(patch.object(juce, "SECONDS", SECONDS))
        super().setUp()

    def post(self, name: str, fields: dict[str, Any]) -> Answer:
        """As its sendToGary, continueMusic and retryLastContinuation do."""
        body = json.dumps(fields, indent=2).replace("\n", "\r\n").encode()
        head = (
            f"POST /api/juce/{name} HTTP/1.1\r\nHost: localhost:{self.port}\r\n{AGENT}"
        )
        head += "\r\nContent-Type: application/json\r\n"
        head += f"Content-length: {len(body)}\r\n\r\n"
        return self.send(head.encode() + body, "POST")

    def get(self, path: str) -> Answer:
        """As its pollForResults does."""
        head = f"GET {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\n{AGENT}"
        head += "\r\nAccept: application/json\r\nContent-Type: application/json\r\n\r\n"
        return self.send(head.encode())

    def begin(self, name: str, audio: np.ndarray | None, **more: Any) -> dict[str, Any]:
        """A session, with what the plug-in sends of itself."""
        fields: dict[str, Any] = dict(model_name="tiny", prompt_duration=1)
        if audio is not None:
            fields["audio_data"] = base64.b64encode(wav(audio)).decode()
        fields |= dict(top_k=250, temperature=1.0, cfg_coef=3.0)
        answer = self.post(name, fields | dict(description="slow bell", seed=-1) | more)
        self.assertEqual(answer.status, 200, answer.body)
        self.assertIs(answer.json["success"], True)
        self.assertRegex(answer.json["session_id"], r"^[0-9a-f]{32}$")
        self.assertGreaterEqual(answer.json["seed"], 0)
        return answer.json

    def poll(self, session: dict[str, Any]) -> dict[str, Any]:
        """The last answer; each before it is one that keeps the plug-in waiting."""
        before = 0
        for _ in range(600):
            answer = self.get(f"/api/juce/poll_status/{session['session_id']}")
            told = answer.json
            self.assertEqual((answer.status, told["success"]), (200, True))
            self.assertFalse(told["transform_in_progress"])
            self.assertEqual(told["generation_seed"], session["seed"])
            self.assertGreaterEqual(told["progress"], before)
            before = told["progress"]
            if not told["generation_in_progress"]:
                return told
            self.assertLess(told["progress"], 100)
            waits = ("queued", "warming", "processing")
            self.assertIn(told["queue_status"]["status"], waits)
            self.assertIn("message", told["queue_status"])
            self.assertNotIn("audio_data", told)
            time.sleep(0.05)
        self.fail("It does not end.")

    def sound(self, session: dict[str, Any]) -> np.ndarray:
        told = self.poll(session)
        self.assertEqual(told["status"], "completed", told.get("error"))
        self.assertEqual(told["progress"], 100)
        file = io.BytesIO(base64.b64decode(told["audio_data"], validate=True))
        audio, rate = soundfile.read(file, always_2d=True)
        self.assertEqual(rate, RATE)
        return audio

    def take(self) -> Path:
        """The newest file."""
        paths = [path for path in self.files() if path.suffix == ".wav"]
        return max(paths, key=lambda path: path.stat().st_mtime_ns)


class TestConnection(PluginTest):
    def test_health(self):
        """As on a Mac, and on Windows, where it wants the length of the body."""
        head = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
        head += "Accept: application/json\r\nConnection: close\r\n\r\n"
        for answer in (self.get("/health"), self.send(head.encode())):
            self.assertEqual(answer.status, 200)
            self.assertIn(answer.json["status"], ("live", "healthy", "ok", "ready"))
            self.assertEqual(int(answer.headers["Content-Length"]), len(answer.body))

    def test_models(self):
        told = self.get("/api/models").json
        self.assertTrue(told["success"])
        tiny = dict(name="tiny", path="tiny", type="single")
        self.assertEqual(told["models"]["small"][0], tiny)
        self.assertEqual([*told["models"]], ["small", "medium", "large"])

    def test_list_of_models(self):
        described = [
            dict(id=id, kind=kind, local=here)
            for id, kind, here in (
                ("small", "text", True),
                ("medium", "text", False),
                ("large", "text", True),
                ("stereo-small", "text", True),
                ("stereo-melody", "melody", True),
                ("magnet-small-10secs", "magnet", True),
                ("audiogen-medium", "sound", True),
                ("tiny", "text", True),
                ("thepatch/bleeps-large-6", "text", False),
                ("stereo-large", "text", True),
            )
        ]
        found = juce.models(described, "thepatch/bleeps-large-6")["models"]
        paths = {size: [model["path"] for model in found[size]] for size in found}
        large = ["thepatch/bleeps-large-6", "large", "stereo-large"]
        want = dict(small=["small", "stereo-small"], medium=["stereo-melody"])
        self.assertEqual(paths, want | dict(large=large))
        self.assertEqual(found["large"][0]["name"], "bleeps-large-6")
        folder = juce.models([dict(id="/a/b/", kind="text", local=True)], "/a/b/")
        self.assertEqual(folder["models"]["small"][0]["name"], "b")


class TestTakes(PluginTest, ScriptTest):
    def alone(self, recording: np.ndarray, *flags: Any) -> np.ndarray:
        """Codes of the same take, made by generate.py."""
        path, codes = self.folder / "rec.wav", self.folder / "codes.safetensors"
        path.write_bytes(wav(recording))
        common = [
            "-m",
            "tiny",
            "-p",
            "slow bell",
            "-d",
            SECONDS,
            "--audio-prompt",
            path,
        ]
        common += ["--save-codes", codes, "-o", self.folder / "alone.wav", "--force"]
        status, _, err = self.run_script(*common, *flags)
        self.assertEqual(status, 0, err)
        return np.array(load_codes(codes)[0])

    def codes(self) -> np.ndarray:
        return np.array(load_codes(self.take().with_suffix(".safetensors"))[0])

    def test_a_new_sound_begins_with_the_first_seconds(self):
        recording = tune(1.7)
        more = dict(top_k=100, temperature=0.9, cfg_coef=2.5, seed=7)
        session = self.begin("process_audio", recording, **more)
        self.assertEqual(session["seed"], 7)
        audio = self.sound(session)
        self.assertEqual(audio.shape, (round(SECONDS * RATE), 2))
        flags = ["--top-k", 100, "--temp", 0.9, "--guidance-coef", 2.5, "--seed", 7]
        alone = self.alone(recording, *flags, "--prompt-length", 1)
        self.assertSame(self.codes(), alone)
        made, _ = read_sound(self.take(), RATE, 2)
        self.assertLess(np.abs(audio - np.clip(made, -1, 1)).max(), STEPS)
        found = read_settings(self.take())
        told = (found["audio_prompt"], found["prompt_length"], found["fade_out"])
        self.assertEqual(told, ("recording.wav", 1.0, 0.0))

    def test_a_continued_one_goes_on_from_the_tail(self):
        recording = tune(3.25)
        audio = self.sound(self.begin("continue_music", recording, seed=7))
        start = round(2.25 * RATE)
        self.assertEqual(audio.shape, (start + round(SECONDS * RATE), 2))
        self.assertLess(np.abs(audio[:start] - recording[:start]).max(), STEPS)
        made, _ = read_sound(self.take(), RATE, 2)
        rest = start + round(juce.OVERLAP * RATE)
        wrong = np.abs(audio[rest:] - np.clip(made[rest - start :], -1, 1)).max()
        self.assertLess(wrong, STEPS)
        flags = ["--prompt-start", 2.25, "--prompt-length", 1, "--seed", 7]
        self.assertSame(self.codes(), self.alone(recording, *flags))

    def test_the_answer_is_continued_in_turn(self):
        audio = self.sound(self.begin("process_audio", tune(2, channels=1)))
        for times in (1, 2):
            longer = self.sound(self.begin("continue_music", audio))
            kept = len(audio) - RATE
            self.assertEqual(longer.shape, (kept + round(SECONDS * RATE), 1))
            self.assertLess(np.abs(longer[:kept] - audio[:kept]).max(), STEPS)
            audio = longer

    def test_a_continuation_is_tried_again(self):
        """From the same recording, with what is set now."""
        first = self.begin("continue_music", tune(2.5), seed=5)
        audio = self.sound(first)
        same = self.begin("retry_music", None, session_id=first["session_id"], seed=5)
        self.assertNotEqual(same["session_id"], first["session_id"])
        self.assertSame(self.sound(same), audio)
        other = self.begin("retry_music", None, session_id=same["session_id"])
        self.assertFalse((self.sound(other) == audio).all())
        self.assertEqual(len(self.sound(other)), len(audio))  # it can be asked again
        any_seed = self.post("retry_music", {"session_id": first["session_id"]})
        self.assertNotEqual(any_seed.json["seed"], 5)
        more = dict(session_id=first["session_id"], prompt_duration=1.5, seed=5)
        self.assertGreater(
            len(audio), len(self.sound(self.begin("retry_music", None, **more)))
        )

    def test_a_recording_that_is_shorter_than_the_prompt(self):
        for name in ("process_audio", "continue_music"):
            audio = self.sound(self.begin(name, tune(0.5), prompt_duration=1))
            self.assertEqual(len(audio), round(SECONDS * RATE))
            self.assertEqual(read_settings(self.take())["prompt_length"], 0.5)

    def test_what_is_not_said_and_what_is_not_known(self):
        """A later plug-in may send more, an earlier one less."""
        data = base64.b64encode(wav(tune(1))).decode()
        fields = dict(
            audio_data=data, quantization_mode="q4", seed=None, description=None
        )
        fields |= dict(prompt_duration=1)
        answer = self.post("process_audio", fields)
        self.sound(answer.json)
        found = read_settings(self.take())
        self.assertEqual((found["prompt"], found["model"]), ("", "tiny"))


class TestErrors(PluginTest):
    def test_bad_requests(self):
        good = dict(
            audio_data=base64.b64encode(wav(tune(1))).decode(), prompt_duration=1
        )
        for more, words in (
            ({"audio_data": "%%%"}, "'audio_data' must be base64"),
            ({"audio_data": "QUFB"}, "audio_data is not a readable sound"),
            ({"audio_data": ""}, "audio_data is not a readable sound"),
            ({"audio_data": None}, "audio_data must be the recording"),
            ({"prompt_duration": 2}, "prompt_duration must be more than 0 and less"),
            ({"prompt_duration": 0}, "prompt_duration must be"),
            ({"prompt_duration": "6"}, "prompt_duration must be"),
            ({"prompt_duration": True}, "prompt_duration must be"),
            ({"seed": "7"}, "seed"),
            ({"seed": 2**70}, "seed"),
            ({"temperature": -1}, "temp"),
            ({"cfg_coef": "x"}, "guidance_coef"),
            ({"top_k": -5}, "top_k"),
            ({"description": 5}, "prompt"),
            ({"description": "a" * 20_000}, "prompt"),
            ({"model_name": 5}, "model"),
        ):
            answer = self.post("process_audio", good | more)
            self.assertEqual(answer.status, 400, more)
            self.assertFalse(answer.json.get("success"))
            self.assertIn(words, answer.json["error"])
        self.assertEqual(self.files(), [])
        self.assertEqual([*Path(self.server.plugin._folder.name).iterdir()], [])

    def test_what_is_no_sound(self):
        """No place of ours is told, which the plug-in could not reach."""
        for name in ("process_audio", "continue_music"):
            for data in ("", base64.b64encode(b"no sound").decode()):
                answer = self.post(name, dict(audio_data=data, prompt_duration=1))
                error = answer.json["error"]
                self.assertRegex(error, "^audio_data is not a readable sound file")
                self.assertNotIn(tempfile.gettempdir(), error)

    def test_unknown_sessions(self):
        for id in ("", "x", "..", "%2e%2e", "a" * 5000, "0" * 32):
            answer = self.get(f"/api/juce/poll_status/{id}")
            self.assertEqual(answer.status, 404)
            self.assertFalse(answer.json.get("success"))
        for id in ("0" * 32, None, 5, [], {"a": 1}):
            answer = self.post("retry_music", {"session_id": id})
            self.assertIn(answer.status, (400, 404))
            error = answer.json["error"].lower()
            self.assertFalse([word for word in WARMS_UP if word in error])

    def test_a_model_that_cannot_be_had(self):
        """The run fails; an answer without success would keep the plug-in waiting."""
        with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            name = "thepatch/vanya_ai_dnb_0.1"
            told = self.poll(self.begin("process_audio", tune(1), model_name=name))
        self.assertEqual((told["success"], told["status"]), (True, "failed"))
        self.assertIn(name, told["error"])
        self.assertNotIn("audio_data", told)
        self.sound(self.begin("process_audio", tune(1)))  # the server lives

    def test_a_take_that_is_gone(self):
        session = self.begin("process_audio", tune(1))
        self.sound(session)
        for path in self.files():
            path.unlink()
        told = self.poll(session)
        self.assertEqual((told["success"], told["status"]), (True, "failed"))
        self.assertIn("cannot be read any more", told["error"])


class TestSessions(PluginTest):
    def status(self, session: dict[str, Any]) -> dict[str, Any]:
        return self.get(f"/api/juce/poll_status/{session['session_id']}").json

    def test_they_wait_for_each_other(self):
        first, second, third = [
            self.begin("process_audio", tune(1), seed=i) for i in range(3)
        ]
        told = self.status(third)["queue_status"]
        self.assertEqual((told["status"], told["position"]), ("queued", 2))
        for session in (first, second, third):
            self.sound(session)
        waiting = [self.begin("process_audio", tune(1), seed=i) for i in range(2)]
        told = self.status(waiting[1])["queue_status"]
        self.assertGreaterEqual(told["estimated_seconds"], 0)
        for session in waiting:
            self.sound(session)
        seeds = [
            int(re.search(r"-(\d)(-\d)?$", path.stem)[1]) for path in self.ordered()
        ]
        self.assertEqual(seeds, [0, 1, 2, 0, 1])

    def ordered(self) -> list[Path]:
        paths = [path for path in self.files() if path.suffix == ".wav"]
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns)

    def test_a_run_that_nobody_asks_after_gives_way(self):
        first = self.begin("process_audio", tune(1))
        second = self.begin("process_audio", tune(1))
        with patch.object(juce, "QUIET", 0.0):
            third = self.begin("process_audio", tune(1))
        for session in (first, second):
            self.assertEqual(self.poll(session)["status"], "failed")
        self.sound(third)

    def test_no_more_than_some_are_kept(self):
        with patch.object(juce, "MOST", 2):
            sessions = [self.begin("process_audio", tune(1)) for _ in range(1)]
            for _ in range(3):
                self.sound(sessions[-1])
                sessions.append(self.begin("process_audio", tune(1)))
            self.sound(sessions[-1])
        kept = sorted(self.server.plugin._sessions)
        self.assertEqual(kept, sorted(one["session_id"] for one in sessions[-2:]))
        folder = Path(self.server.plugin._folder.name)
        self.assertEqual(sorted(path.name for path in folder.iterdir()), kept)
        with patch.object(juce, "KEPT", 0.0):
            last = self.begin("process_audio", tune(1))
        self.sound(last)
        self.assertEqual([*self.server.plugin._sessions], [last["session_id"]])
        self.server.plugin.close()
        self.assertFalse(folder.exists())


class TestJoined(Test):
    def test_samples(self):
        recording, audio = np.full((100, 2), 1.0), np.full((50, 2), 3.0)
        got = juce.joined(recording, audio, 60, 1000)
        self.assertEqual(got.shape, (110, 2))
        self.assertTrue((got[:60] == 1).all() and (got[70:] == 3).all())
        self.assertClose(got[60:70, 1], np.linspace(1, 3, 10), 1e-6)
        self.assertTrue((juce.joined(recording, audio, 0, 1000) == audio).all())
        self.assertEqual(len(juce.joined(recording, audio, 99, 1000)), 149)
        self.assertEqual(len(juce.joined(recording, audio, 100, 1000)), 150)
