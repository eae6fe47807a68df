"""What people read: messages of one line, to a terminal that may be gone.

    sys.stderr = Forgiving(sys.stderr)
    print(one_line(error), file=sys.stderr)

Needs strict.py beside it.
"""

from typing import Any

from strict import LONGEST as LONGEST
from strict import one_line as one_line


class Forgiving:
    """A stream that loses what cannot be written: no take ends for a line about it.
    Characters that its encoding lacks are spelled out."""

    def __init__(self, stream: Any):
        self.original = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def write(self, text: str) -> int:
        try:
            return self.original.write(text)
        except UnicodeEncodeError:
            spelled = self._spelled(text)
            return len(text) if spelled == text else self.write(spelled)
        except (AttributeError, OSError, ValueError):  # it is gone, or closed
            return len(text)

    def _spelled(self, text: str) -> str:
        """The text with `\\u97f3` for what the stream's encoding lacks."""
        encoding = getattr(self.original, "encoding", None) or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def flush(self) -> None:
        try:
            self.original.flush()
        except (AttributeError, OSError, ValueError):
            pass
