"""What a request sends: JSON or a form with files, read in constant memory.

    with tempfile.TemporaryDirectory() as folder:
        form = read_form(handler.rfile, handler.headers, folder, most=64 * 2**20)
        form.fields["prompt"], form.files["melody"]  # a text, a Path in the folder

A file is a part of multipart/form-data (RFC 7578) that has a file name, or in JSON
`{"melody": {"name": "hum.wav", "base64": "UklGR..."}}`. Its bytes go to the folder as
they come, also out of JSON: the longest text that is held is `TEXT` bytes. All may be a
stranger's: what cannot be read raises BadRequest with the status to answer, after which
the rest of the body is unread and the connection can only be closed. Stands alone.
"""

import base64
import errno
import io
import json
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 2**16  # bytes to read at once
TEXT = 2**20  # bytes of all that is no file
LONG = 2**16  # characters from which on a text of JSON can only be a file's
HEADER = 2**13  # bytes of a part's header
PARTS = 100  # of a form, or files in JSON
SECONDS = 120  # for all of a body
NAME = 100  # characters of a name that are kept

UPLOADS = ("audio_prompt", "melody", "style")  # are files, never names of ours
BASE64 = ("audio_data",)  # a plug-in's recording: a file that is nothing but base64
TEXTS = ("prompt", "negative_prompt", "notes", "model")  # of a form, not even numbers

# JSON cut into quotes and what stands between them; an escape is never cut in two
TOKENS = re.compile(rb'"|(?:[^"\\]+|\\.)+|\\', re.DOTALL)


class BadRequest(ValueError):
    """A request that cannot be read, and the status of HTTP that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Form:
    """Fields by name; files in a folder of ours, and how the client calls them."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def read_form(
    stream: BinaryIO,
    headers: Message,
    folder: str | Path,
    most: int,
    seconds: float = SECONDS,
) -> Form:
    """Read a request's body, at most `most` bytes in `seconds`, its files to a folder.

    The `stream` is as socketserver's rfile: it has `read1`, and raises TimeoutError
    where nothing comes for long. Raises BadRequest, and ConnectionError where nobody is
    there to be answered.
    """
    body, kind = Body(stream, headers, most, seconds), headers.get_content_type()
    try:
        if kind == "application/json":
            return read_json(body, Path(folder))
        if kind == "multipart/form-data":
            return read_parts(body, Path(folder), headers.get_boundary())
    except (BadRequest, ConnectionError):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise BadRequest(507, f"The upload cannot be kept: {reason}.") from error
    raise BadRequest(
        415,
        "The body must be application/json or multipart/form-data, and its Content-Type "
        "must say so.",
    )


class Body:
    """As many bytes of a stream as the request's header says."""

    def __init__(self, stream: BinaryIO, headers: Message, most: int, seconds: float):
        self.stream, self.seconds = stream, seconds
        self.length = self.left = content_length(headers)
        if self.length > most:
            raise BadRequest(
                413, f"The body has {self.length} bytes; at most {most} are read."
            )
        self.end = time.monotonic() + seconds

    def read(self) -> bytes:
        """Some bytes, none at the end."""
        if not self.left:
            return b""
        try:
            piece = self.stream.read1(min(PIECE, self.left))
        except TimeoutError as error:
            raise BadRequest(408, "The body came too slowly.") from error
        if not piece:
            came = self.length - self.left
            wrong = f"The body ended after {came} of its {self.length} bytes."
            raise BadRequest(400, wrong)
        self.left -= len(piece)
        if time.monotonic() > self.end:
            raise BadRequest(408, f"The body took more than {self.seconds:g} s.")
        return piece


def content_length(headers: Message) -> int:
    """Bytes of the body; none where no length is given, as HTTP/1.1 has it."""
    if headers.get("Transfer-Encoding"):
        raise BadRequest(
            411, "The body must come with a Content-Length, not in chunks of its own."
        )
    lengths = headers.get_all("Content-Length", ["0"])
    number = re.fullmatch(r"[0-9]{1,18}", str(lengths[0]).strip())
    if len(lengths) > 1 or not number:
        text = ", ".join(map(str, lengths))
        raise BadRequest(400, f"Content-Length must be one number, got {text!r:.60}.")
    return int(number[0])


class Files:
    """The files of a form, written to a folder under names of ours."""

    def __init__(self, form: Form, folder: Path):
        self.form, self.folder, self.count = form, folder, 0

    def new(self, suffix: str = "") -> tuple[Path, BinaryIO]:
        self.count += 1
        if self.count > PARTS:
            raise BadRequest(400, f"The body holds more than {PARTS} files.")
        path = self.folder / f"{self.count}{suffix}"
        return path, open(path, "xb")

    def add(self, key: str, name: str) -> BinaryIO:
        """A file to be written, of which the client gave the name."""
        if key in self.form.files:
            raise twice(key)
        name = last_component(name) or key
        suffix = re.search(r"\.[a-z0-9]{1,5}$", name.lower())
        self.form.files[key], file = self.new(suffix[0] if suffix else "")
        self.form.names[key] = name
        return file


def last_component(name: str) -> str:
    """Of a path of any system, without what no line may hold."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(c for c in name if c.isprintable()).strip()
    return "" if name in (".", "..") else name[-NAME:]


def twice(key: str) -> BadRequest:
    return BadRequest(400, f"The field {key!r:.60} is given twice.")


# JSON


def read_json(body: Body, folder: Path) -> Form:
    """A form of an object's keys; an empty body is an empty object."""
    form = Form()
    files = Files(form, folder)
    text, long = without_long(body, files)
    for key, value in parse(text or "{}").items():
        if key in BASE64 and isinstance(value, str):
            value = {"base64": value}
        if isinstance(value, dict):
            add_base64(files, key, value, long)
        elif has_long(value, long):
            wrong = f"{key!r:.60} is longer than {LONG} characters."
            raise BadRequest(413, wrong)
        elif key in UPLOADS and value is not None:
            raise no_upload(key)
        else:
            form.fields[key] = value
    for path in long.values():
        path.unlink()
    return form


def without_long(body: Body, files: Files) -> tuple[str, dict[str, Path]]:
    """JSON with marks in the place of its long texts, and by mark the files that hold
    them."""
    shorter, carry = Shorter(files), b""
    while piece := body.read():
        tokens, carry = TOKENS.findall(carry + piece), b""
        if tokens[-1] == b"\\":  # half an escape
            carry = tokens.pop()
        for token in tokens:
            shorter.take(token)
        shorter.move()
        if len(shorter.text) > TEXT:
            raise BadRequest(413, f"The body has more than {TEXT} bytes of no file.")
    if shorter.string is not None:
        raise BadRequest(400, "The body is no JSON: a text in it has no end.")
    return as_text(bytes(shorter.text + carry)), shorter.long


class Shorter:
    """Takes JSON in tokens, and moves its long texts to files."""

    def __init__(self, files: Files):
        self.files, self.text = files, bytearray()
        self.string: bytearray | None = None  # that has not ended
        self.file: BinaryIO | None = None  # of it, where it is long
        self.long: dict[str, Path] = {}
        self.mark = secrets.token_hex(16)  # which nobody can guess

    def take(self, token: bytes) -> None:
        if token != b'"':
            (self.text if self.string is None else self.string).extend(token)
        elif self.string is None:
            self.string = bytearray()
        else:
            self.move()
            self.text += b'"' + self.string + b'"'
            self.string = None
            if self.file:
                self.text[-1:] = f'{self.mark} {len(self.long)}"'.encode()
                self.file = self.file.close()

    def move(self) -> None:
        """Write what came of a long text to its file."""
        if self.string is None or not self.file and len(self.string) <= LONG:
            return
        if self.file is None:
            path, self.file = self.files.new()
            self.long[f"{self.mark} {len(self.long) + 1}"] = path
        self.file.write(self.string.replace(b"\\/", b"/"))
        self.string.clear()


def as_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(400, "The body must be a text in UTF-8.") from error


def parse(text: str) -> dict[str, Any]:
    """An object. Numbers are finite, and texts can be written as UTF-8."""
    try:
        value = json.loads(text, parse_constant=finite, parse_float=finite)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        wrong = f"The body is no JSON: {error.msg} at character {error.pos + 1}."
        raise BadRequest(400, wrong) from error
    except UnicodeEncodeError as error:
        raise BadRequest(400, "The body holds half a character of UTF-16.") from error
    except RecursionError as error:
        raise BadRequest(400, "The body is no JSON that is meant: too deep.") from error
    except ValueError as error:
        raise BadRequest(400, f"The body is no JSON: {error!s:.150}.") from error
    if not isinstance(value, dict):
        raise BadRequest(400, f"The body must be an object, got {text[:40]!r}.")
    return value


def finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number:.40} is no number of JSON")
    return value


def has_long(value: Any, long: dict[str, Path]) -> bool:
    """Whether something stands there in the place of a long text."""
    return bool(long) and any(mark in json.dumps(value) for mark in long)


def no_upload(key: str) -> BadRequest:
    example = f'{{"{key}": {{"name": "hum.wav", "base64": "..."}}}}'
    return BadRequest(400, f"{key} must be a file: a form's, or in JSON {example}.")


def add_base64(files: Files, key: str, value: dict, long: dict[str, Path]) -> None:
    """Write the file that an object of JSON holds."""
    name, text = value.get("name", ""), value.get("base64")
    if not (isinstance(name, str) and isinstance(text, str)) or has_long(name, long):
        wrong = f'{key!r:.60} must be as {{"name": "hum.wav", "base64": "..."}}.'
        raise BadRequest(400, wrong)
    if unknown := value.keys() - {"name", "base64"}:
        raise BadRequest(400, f"{key!r:.60} has the unknown key {min(unknown)!r:.60}.")
    source = open(long[text], "rb") if text in long else io.BytesIO(text.encode())
    with source, files.add(key, name) as file:
        while piece := source.read(PIECE):
            if b"=" in piece and source.read(1):
                raise no_base64(key)
            try:
                file.write(base64.b64decode(piece, validate=True))
            except ValueError as error:
                raise no_base64(key) from error


def no_base64(key: str) -> BadRequest:
    wrong = f"{key!r:.60} must be base64 of one piece, without breaks or a prefix."
    return BadRequest(400, wrong)


# multipart/form-data


def read_parts(body: Body, folder: Path, boundary: str | None) -> Form:
    """A form of parts: those that have a file's name are files, the others texts."""
    if not boundary or len(boundary) > 70 or not boundary.isascii():
        raise BadRequest(400, "The Content-Type must give the boundary of the parts.")
    form, room, count = Form(), TEXT, 0
    files, parts = Files(form, folder), Parts(body, boundary)
    parts.until(parts.mark, lambda _: None)  # what stands before them
    while not parts.at_end():
        count += 1
        if count > PARTS:
            raise BadRequest(400, f"The form has more than {PARTS} parts.")
        key, name = part_names(parts.header())
        if name is None:
            text = parts.text(room)
            room -= len(text)
            add_text(form, key, text)
        elif name == "":  # a browser's, where no file was chosen
            if parts.text(room):
                raise BadRequest(400, f"The file of {key!r:.60} has no name.")
        else:
            with files.add(key, name) as file:
                parts.until(parts.mark, file.write)
    return form


class Parts:
    """The parts of a body, as they come."""

    def __init__(self, body: Body, boundary: str):
        self.body, self.mark = body, b"\r\n--" + boundary.encode()
        self.buffer = b"\r\n"  # with which the first mark may begin

    def until(self, mark: bytes, write: Callable[[bytes], Any]) -> None:
        """Write what comes before a mark, and go on behind it."""
        while True:
            before, found, after = self.buffer.partition(mark)
            if found:
                write(before)
                self.buffer = after
                return
            ready = max(len(self.buffer) - len(mark) + 1, 0)
            write(self.buffer[:ready])
            self.buffer = self.buffer[ready:] + self.more()

    def more(self) -> bytes:
        if piece := self.body.read():
            return piece
        raise BadRequest(400, "The form breaks off: its last boundary is missing.")

    def at_end(self) -> bool:
        """Whether no part follows a boundary. What comes after the last one is lost."""
        while len(self.buffer) < 2:
            self.buffer += self.more()
        if ended := self.buffer.startswith(b"--"):
            while self.body.read():
                pass
        return ended

    def header(self) -> str:
        """The lines before a part's empty line."""
        # they begin with the end of the boundary's own line
        raw = self.bounded(b"\r\n\r\n", HEADER, 400, "The header of a part")
        if not re.match(rb"[ \t]*(\r\n|$)", raw):
            raise BadRequest(400, "A line of the form begins as its boundary does.")
        return as_text(raw.lstrip())

    def text(self, most: int) -> bytes:
        return self.bounded(self.mark, most, 413, "The text of the form")

    def bounded(self, mark: bytes, most: int, status: int, what: str) -> bytes:
        """What comes before a mark, where that is not too long."""
        held = bytearray()

        def hold(piece: bytes) -> None:
            held.extend(piece)
            if len(held) > most:
                raise BadRequest(status, f"{what} is too long.")

        self.until(mark, hold)
        return bytes(held)


def part_names(header: str) -> tuple[str, str | None]:
    """The name of a part's field, and of its file: None where it is none."""
    part = message_from_string(header)
    key = part.get_param("name", header="content-disposition")
    if part.get_content_disposition() != "form-data" or not isinstance(key, str):
        raise BadRequest(
            400, "Each part of the form must have a Content-Disposition with a name."
        )
    return key, part.get_filename()


def add_text(form: Form, key: str, raw: bytes) -> None:
    text = as_text(raw)
    if key in form.fields:
        raise twice(key)
    if key in UPLOADS:
        raise no_upload(key)
    form.fields[key] = text if key in TEXTS else number_or_text(text)


def number_or_text(text: str) -> Any:
    """A number, true or false where the text is nothing else."""
    try:
        value = json.loads(text, parse_constant=finite, parse_float=finite)
    except (RecursionError, ValueError):
        return text
    return value if isinstance(value, int | float) else text
