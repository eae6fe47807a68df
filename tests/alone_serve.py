"""The trials of `alone.py` of what serves takes to others."""

import io
import json
import threading
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TINY = Path(__file__).resolve().parent.parent / "tiny"


def try_forms(forms):
    headers = Message()
    headers["Content-Type"], headers["Content-Length"] = "application/json", "8"
    form = forms.read_form(io.BytesIO(b'{"a": 1}'), headers, ".", most=8)
    assert form.fields == {"a": 1} and not form.files


def try_juce(juce):
    recording, audio = np.zeros((100, 2)), np.ones((50, 2))
    assert juce.joined(recording, audio, 60, 1000).shape == (110, 2)
    tiny = dict(id="tiny", kind="text", local=True)
    assert juce.models([tiny], "tiny")["models"]["small"][0]["path"] == "tiny"


def try_access(access):
    headers = Message()
    headers["Host"] = "evil.example:8000"
    try:
        access.Access("127.0.0.1", 8000).check(headers, {})
    except access.Denied as error:
        assert error.status == 403
    else:
        raise AssertionError("It was let in.")


def try_web(web):
    class Mine(web.Request):
        def answer(self):
            self.json({"words": self.words})

    with web.Server(("127.0.0.1", 0), Mine) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        connection = HTTPConnection("127.0.0.1", server.server_port)
        connection.request("GET", "/a/b")
        assert json.load(connection.getresponse()) == {"words": ["a", "b"]}
        connection.close()
        server.shutdown()
        thread.join()


def try_worker(worker):
    class Task:
        quick = False

        def run(self, worker, ticket):
            ticket.tell("told", name=worker.use(str(TINY), ticket))

    made = worker.Worker(load=str)
    events = [*made.submit(Task())]
    assert [event.name for event in events] == ["queued", "loading", "told", "done"]
    assert made.close()


def try_takes(takes):
    from audio import save_audio
    from settings import to_comment

    save_audio("a.wav", np.zeros((100, 1)), 32000, to_comment(dict(seed=7)))
    folder = takes.Takes(".")
    assert folder.star("a", True).starred and folder.find("a").settings == dict(seed=7)
    folder.delete("a")
    assert folder.every() == []


def try_tasks(tasks):
    from forms import Form

    form, limits = Form(dict(prompt="a", duration=1)), tasks.Limits(str(TINY))
    order = tasks.read_order(form, limits)
    assert order.values["duration"] == 1.0 and order.takes == 1


def try_retakes(retakes):
    assert retakes.read_parts(None, ["8:12", [1, 2]]) == ((8.0, 12.0), (1, 2))


def try_sound_tasks(sound_tasks):
    from forms import Form

    told = []
    worker, ticket = None, SimpleNamespace(tell=lambda name, **data: told.append(data))
    task = sound_tasks.Listen(Form(dict(notes="C E", bpm=120)))
    task.check()
    task.run(worker, ticket)
    assert told[0]["chroma"][0].index(1.0) == 0


def try_serve(serve):
    assert serve.Route("GET", "/takes/{id}", None).match(["takes", "a"]) == {"id": "a"}
    assert serve.parse_arguments(["--model", "tiny"]).port == 8000
