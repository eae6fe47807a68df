"""What people read: messages of one line, to a terminal that may be gone.

    sys.stderr = Forgiving(sys.stderr)
    print(one_line(error), file=sys.stderr)

Stands alone.
"""

from typing import Any

LONGEST = 390  # characters


def one_line(message: object) -> str:
    """A message on one line, cut in the middle where it is long. What a terminal would
    obey, or cannot show, is spelled out: texts from files may hold anything."""
    text = " ".join(str(message).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


class Forgiving:
    """A stream that loses what cannot be written: no take ends for a line about it.
    Characters that its encoding lacks are spelled out."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            spelled = self._spelled(text)
            return len(text) if spelled == text else self.write(spelled)
        except (AttributeError, OSError, ValueError):  # it is gone, or closed
            return len(text)

    def _spelled(self, text: str) -> str:
        """The text with `\\u97f3` for what the stream's encoding lacks."""
        encoding = getattr(self._stream, "encoding", None) or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
