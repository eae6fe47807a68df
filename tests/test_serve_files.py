"""What comes with a request: sounds that a take follows, or begins with."""

import json
import os
import tempfile
from unittest.mock import patch

from common import REFERENCE, slow
from serving import GENERATIONS, NOISE, MadeTest

from audio import save_audio
from settings import read_settings


class TestUploads(MadeTest):
    """Files that come with a request, to a melody model."""

    flags = ("--model", str(REFERENCE / "melody-audiocraft"))

    def setUp(self):
        super().setUp()
        save_audio(self.folder / "hum.wav", NOISE, 32000)
        save_audio(self.folder / "start.wav", NOISE[::-1] / 2, 32000)

    def form(self, fields: dict, **files: str) -> tuple[bytes, str]:
        """multipart/form-data, and its type."""
        parts = []
        for name, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value)
            parts.append(f'form-data; name="{name}"\r\n\r\n{text}'.encode())
        for name, file in files.items():
            head = f'form-data; name="{name}"; filename="C:\\x\\{file}"\r\n\r\n'
            parts.append(head.encode() + (self.folder / file).read_bytes())
        lines = [b"--b\r\nContent-Disposition: " + part + b"\r\n" for part in parts]
        return b"".join(lines) + b"--b--\r\n", "multipart/form-data; boundary=b"

    @slow(4)
    def test_the_same_as_of_files(self):
        """Also the settings: a file is called as the client calls it."""
        fields = dict(prompt="saw", seed=3, duration=0.5, no_separate=True)
        fields |= dict(melody_start=0.1, prompt_length=0.1)
        files = dict(melody="hum.wav", audio_prompt="start.wav")
        want = self.same("a.wav", fields, self.flags[1], **files)
        body, kind = self.form(fields, **files)
        answer = self.post(GENERATIONS, body, Content_Type=kind)
        self.assertEqual((answer.status, answer.body), (200, want))
        self.assertEqual(read_settings(self.folder / "a.wav")["melody"], "hum.wav")

    def test_they_go_with_the_request(self):
        with tempfile.TemporaryDirectory() as folder:
            with patch.object(tempfile, "tempdir", folder):
                body, kind = self.form(dict(duration=0.2), melody="hum.wav")
                for fields, status in ((dict(no_separate=True), 200), ({}, 502)):
                    body, kind = self.form(
                        fields | dict(duration=0.2), melody="hum.wav"
                    )
                    answer = self.post(GENERATIONS, body, Content_Type=kind)
                    self.assertEqual(answer.status, status, answer.body)
                self.assertEqual(os.listdir(folder), [])

    def test_what_is_no_sound(self):
        """No place of ours is told, which the client could not reach."""
        (self.folder / "a.txt").write_text("no sound")
        body, kind = self.form(dict(duration=0.2), melody="a.txt")
        answer = self.post(GENERATIONS, body, Content_Type=kind)
        self.assertEqual(answer.status, 400)
        self.assertRegex(answer.json["error"], r"^a\.txt is not a readable sound")
        self.assertIn("ffmpeg -i a.txt converted.wav", answer.json["error"])
        self.assertNotIn(tempfile.gettempdir(), answer.json["error"])
        body, kind = self.form(dict(duration=0.2), tune="hum.wav")
        answer = self.post(GENERATIONS, body, Content_Type=kind)
        self.assertEqual((answer.status, "tune" in answer.json["error"]), (400, True))
