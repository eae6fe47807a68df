"""The trials of `alone.py` of what serves takes to others."""

import io
from email.message import Message

import numpy as np


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
