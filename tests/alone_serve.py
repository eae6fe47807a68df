"""The trials of `alone.py` of what serves takes to others."""

import io
from email.message import Message


def try_forms(forms):
    headers = Message()
    headers["Content-Type"], headers["Content-Length"] = "application/json", "8"
    form = forms.read_form(io.BytesIO(b'{"a": 1}'), headers, ".", most=8)
    assert form.fields == {"a": 1} and not form.files
