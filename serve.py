"""A page to play on: a server of this machine, for a browser and for other programs.

    python serve.py --model tiny

prints an address, and opens it in the browser. GUIDE.md tells what can be asked of it.
What is made lies in the folder `takes`. A request goes this way:

    in the thread of its connection         in the thread of the model
    web.py      line, headers, form
    access.py   may it be asked?
    serve.py    route
    tasks.py, retakes.py, sound_tasks.py, juce.py
                form -> task           ->   worker.py   queue
                                            tasks.py    task -> takes, in takes.py's folder
    serve.py    wav, events or JSON    <-   worker.py   events, while they are made

Needs web.py, access.py, worker.py, tasks.py, retakes.py, sound_tasks.py, juce.py,
takes.py, magnet.py, diffusion_job.py, models.py and quantize.py beside it, with what
these need, and page.html, which is the page.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the rest is imported is no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import json
import os
import secrets
import sys
import tempfile
import threading
import time
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import mlx.core as mx

import diffusion_job
import juce
import magnet
from access import Access, is_any, is_loopback
from audio import open_sound, read_sound, write_samples
from forms import Form
from hub import MODELS, check_name, follows, local, same_model
from lines import own_settings
from magnet_job import is_magnet
from messages import Forgiving, one_line
from models import missing
from outputs import in_words, leave_nothing, named_path
from quantize import BITS
from retakes import read_again, read_edit, read_extension, read_redecoding
from settings import to_comment
from sound_tasks import Listen, Separate, read_level
from takes import Take, Takes
from tasks import Generate, Limits, read_order
from web import Request, Server
from worker import LAST, MOST, Event, Refused, Task, Ticket, Worker, status_of

PAGE = Path(__file__).with_name("page.html")
POLICY = (  # the page takes nothing from elsewhere, and stands in no other page
    "default-src 'self' blob: data:; script-src 'self' 'unsafe-inline' blob:; style-src "
    "'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
)
LOOK = 0.5  # seconds between two looks whether a client is still there
CONTENT_TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".ogg": "audio/ogg"}
CONTENT_TYPES |= {".mp3": "audio/mpeg", ".m4a": "audio/mp4"}
ByName = dict[str, list[dict[str, Any]]]  # the data of events


class Page(Request):
    """A request to the page's server: finds its route, if it may be asked."""

    server: "PageServer"

    def answer(self) -> None:
        self.server.access.check(self.headers, self.query)
        method = "GET" if self.command == "HEAD" else self.command
        methods = []
        for route in ROUTES:
            words = route.match(self.words)
            if words is not None and route.method == method:
                return route.answer(self, **words)
            methods += [route.method] if words is not None else []
        if methods:
            raise Refused(405, f"This address takes {' or '.join(methods)}.")
        raise Refused(404, f"There is nothing at {self.path:.80}.")

    def fail(self, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):  # removed since it was listed
            error = Refused(404, "It is not there any more.")
        elif isinstance(error, KeyError):
            error = Refused(404, f"There is no take {error.args[0]!r:.80}.")
        elif isinstance(error, OSError | ValueError):
            if not isinstance(error, TimeoutError) and not hasattr(error, "status"):
                error = Refused(status_of(error), in_a_sentence(error))
        super().fail(error)

    def take(self, id: str) -> Take:
        """The take of that id. Raises KeyError."""
        return self.server.takes.find(id)

    def sounds(self) -> Form:
        """The fields and files of the body. Raises ValueError for a file that is no
        sound."""
        form = self.form()
        for path in form.files.values():
            with open_sound(path) as file:
                file.read(1)
        return form


def in_a_sentence(error: Exception) -> str:
    """What an error says, plainly of one of the system's."""
    return in_words(error) if isinstance(error, OSError) else str(error)


class Route(NamedTuple):
    """A method and a path, and the function that answers them. A word of the path in
    braces stands for any, and is given to the function by that name."""

    method: str
    path: str
    answer: Callable[..., None]

    def match(self, words: list[str]) -> dict[str, str] | None:
        """The words in the braces of the path, or None where it is another."""
        pattern = self.path.split("/")[1:]
        if len(pattern) != len(words):
            return None
        pairs = [*zip(pattern, words)]
        if any(part != word for part, word in pairs if not part.startswith("{")):
            return None
        return {part[1:-1]: word for part, word in pairs if part.startswith("{")}


# What is asked


def get_page(request: Page) -> None:
    kind, more = "text/html; charset=utf-8", {"Content-Security-Policy": POLICY}
    request.send_whole(PAGE.read_bytes(), kind, Cache_Control="no-cache", **more)


def get_health(request: Page) -> None:
    worker = request.server.worker
    health = dict(status="ok", model=worker.name, loading=worker.loading)
    request.json(health | dict(queue=worker.waiting, busy=worker.busy))


def get_models(request: Page) -> None:
    request.json({"data": describe_models(request.server)})


def describe_models(server: "PageServer") -> list[dict[str, Any]]:
    """The server's own model first, then the one that is loaded, and all released ones."""
    own, loaded = server.limits.model, server.worker.name
    names = dict.fromkeys([own, *([loaded] if loaded else []), *MODELS])
    return [describe_model(name, loaded) for name in names]


def describe_model(name: str, loaded: str | None) -> dict[str, Any]:
    here = local(name) is not None or name in MODELS and missing(name) == 0
    here = here or name == loaded
    is_loaded = loaded is not None and same_model(name, loaded)
    model = dict(id=name, object="model", loaded=is_loaded, local=here)
    return model | dict(kind=kind_of(name), duration=own_settings(name).get("duration"))


def kind_of(model: str) -> str:
    """What a model follows, or makes, in a word."""
    if is_magnet(model):
        return "magnet"
    return follows(model) or ("sound" if model.startswith("audio") else "text")


def get_takes(request: Page) -> None:
    request.json({"takes": [take.as_json() for take in request.server.takes.every()]})


def get_take(request: Page, id: str) -> None:
    """A take's settings, or with a suffix its sound or its codes."""
    stem, dot, suffix = id.rpartition(".")
    try:
        return request.json(request.take(id).as_json())
    except KeyError:
        if not dot:
            raise
        take, suffix = request.take(stem), dot + suffix
    if suffix == ".json":
        request.json(take.as_json())
    elif suffix == take.path.suffix:
        request.file(take.path, CONTENT_TYPES[suffix.lower()])
    elif suffix == ".safetensors" and take.codes:
        request.file(take.codes, "application/octet-stream")
    elif suffix in (".wav", ".flac"):
        convert(request, take, suffix)
    else:
        raise KeyError(id)


def convert(request: Page, take: Take, suffix: str) -> None:
    """Answer with a take's sound in another format, without touching MLX."""
    audio, rate = read_sound(take.path)
    with tempfile.TemporaryDirectory(prefix="musicgen-") as folder:
        path = Path(folder) / f"sound{suffix}"
        write_samples(path, audio, rate, to_comment(take.settings), "PCM_16")
        request.file(path, CONTENT_TYPES[suffix])


def get_stem(request: Page, id: str, name: str) -> None:
    path = request.take(id).stems.get(name.removesuffix(".wav"))
    if path is None:
        raise Refused(404, f"There is no stem {name!r:.40}.")
    request.file(path, CONTENT_TYPES[".wav"])


def delete_take(request: Page, id: str) -> None:
    request.server.takes.delete(id)
    request.json({"deleted": id})


def star(request: Page, id: str) -> None:
    starred = request.form().fields.get("starred")
    if not isinstance(starred, bool):
        raise ValueError(f"starred must be true or false, got {starred!r:.40}.")
    request.json(request.server.takes.star(id, starred).as_json())


def cancel(request: Page, id: str) -> None:
    request.form()
    if not request.server.worker.cancel(id):
        raise Refused(404, f"There is no request {id!r:.40} under way.")
    request.json({"cancelled": id})


def generate(request: Page) -> None:
    order = read_order(request.sounds(), request.server.limits)
    task = Generate(request.server.takes, order)
    if order.takes > 1:
        answer(request, task, order.stream)
    else:
        answer(request, task, order.stream, answer_file)


def again(request: Page, id: str) -> None:
    retake(request, id, read_again)


def extend(request: Page, id: str) -> None:
    retake(request, id, read_extension)


def regenerate(request: Page, id: str) -> None:
    retake(request, id, read_edit)


def redecode(request: Page, id: str) -> None:
    retake(request, id, read_redecoding)


def retake(request: Page, id: str, read: Callable[..., Generate]) -> None:
    """Make something of a take, as `read` reads it from the form."""
    take, server = request.take(id), request.server
    task = read(server.takes, take, request.sounds(), server.limits)
    answer(request, task, task.order.stream)


def stems(request: Page, id: str) -> None:
    task = Separate(request.server.takes, request.take(id))
    answer(request, task, stream_of(request.form()), answer_stems)


def loudness(request: Page, id: str) -> None:
    take, form = request.take(id), request.form()
    answer(request, read_level(request.server.takes, take, form), stream_of(form))


def chroma(request: Page) -> None:
    answer(request, Listen(request.sounds()), "", answer_chroma)


def plugin_begins(request: Page, name: str) -> None:
    """A request of gary4juce, to begin, to continue or to retry."""
    if name not in ("process_audio", "continue_music", "retry_music"):
        raise Refused(404, f"There is nothing at {request.path:.80}.")
    status, reply = getattr(request.server.plugin, name)(request.sounds())
    request.json(reply, status)


def plugin_polls(request: Page, id: str) -> None:
    status, reply = request.server.plugin.poll_status(id)
    request.json(reply, status)


def plugin_models(request: Page) -> None:
    described = describe_models(request.server)
    request.json(juce.models(described, request.server.limits.model))


def stream_of(form: Form) -> str:
    """Whether events are asked for, where nothing else streams. Raises ValueError."""
    stream = form.fields.get("stream", False)
    if stream not in (False, "events"):
        raise ValueError(f'stream must be "events" here, got {stream!r:.40}.')
    return stream or ""


# How it is answered


def answer(
    request: Page, task: Task, stream: str, whole: "Callable | None" = None
) -> None:
    """Do a task, and answer with its events, with a wav that grows, or, once it is done,
    with what `whole` makes of the events (None: the takes, as JSON)."""
    if hasattr(task, "check"):  # for stems there is nothing to check
        task.check()
    after = request.hand_over()
    try:
        ticket = request.server.worker.submit(task, request.id, after)
    except Refused:
        after()
        raise
    with closing(until_gone(request, ticket)) as events:
        if stream:
            streams = answer_events if stream == "events" else answer_wav
            return streams(request, events)
        by_name = gather(events)
    (whole or answer_takes)(request, by_name)


def until_gone(request: Page, ticket: Ticket) -> Iterator[Event]:
    """The events of a ticket, which is cancelled when the client goes."""
    try:
        while True:
            event = ticket.next(LOOK)
            if request.is_gone():
                raise ConnectionError("The client is gone.")
            if event:
                yield event
                if event.name in LAST:
                    return
    finally:
        ticket.cancel()


def gather(events: Iterator[Event]) -> ByName:
    """The data of all events but `audio`, by the events' names. Raises Refused for an
    error, and where nothing was made."""
    by_name: ByName = {}
    for name, data in events:
        if name == "error":
            raise Refused(data["status"], data["error"])
        if name != "audio":
            by_name.setdefault(name, []).append(data)
    if "cancelled" in by_name and "take" not in by_name:
        raise Refused(409, "It was cancelled before anything was made.")
    return by_name


def answer_takes(request: Page, events: ByName) -> None:
    request.json({"takes": events.get("take", [])})


def answer_file(request: Page, events: ByName) -> None:
    """The bytes of the only take's file."""
    if not events.get("take"):
        raise Refused(500, "Nothing was made.")
    take = events["take"][0]
    data = request.take(take["id"]).path.read_bytes()
    request.send_whole(data, CONTENT_TYPES[take["suffix"]], **take_headers(take))


def take_headers(take: dict[str, Any]) -> dict[str, Any]:
    return {"X-Take-Id": quote(take["id"]), "X-Seed": take["seed"]}


def answer_stems(request: Page, events: ByName) -> None:
    request.json({"stems": events["take"][0]["stems"]})


def answer_chroma(request: Page, events: ByName) -> None:
    request.json(events["chroma"][0])


def answer_events(request: Page, events: Iterator[Event]) -> None:
    """Server-sent events, with sound in base64."""
    request.begin(200, "text/event-stream", None, Cache_Control="no-store")
    for name, data in events:
        if name == "header":  # of a wav
            continue
        if name == "audio":
            data = {"data": base64.b64encode(data["data"]).decode()}
        if name == "error":
            data = {"error": request.as_sentence(data["error"])}
        request.chunk(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
    request.chunk()


def answer_wav(request: Page, events: Iterator[Event]) -> None:
    """A wav in chunks, as it is made. An error after its beginning cuts it off."""
    take: dict[str, Any] = {}
    for name, data in events:
        if name == "start":
            take = take_headers(data)
        elif name == "header":
            request.begin(200, CONTENT_TYPES[".wav"], None, **take)
        elif name == "error":
            raise Refused(data["status"], data["error"])
        elif name == "cancelled" and not take:
            raise Refused(409, "It was cancelled before anything was made.")
        if name in ("header", "audio"):
            request.chunk(data["data"])
    request.chunk()


ROUTES = [
    Route("GET", "/", get_page),
    Route("GET", "/health", get_health),
    Route("GET", "/v1/models", get_models),
    Route("POST", "/v1/audio/music-generations", generate),
    Route("POST", "/v1/audio/chroma", chroma),
    Route("GET", "/takes", get_takes),
    Route("GET", "/takes/{id}", get_take),
    Route("DELETE", "/takes/{id}", delete_take),
    Route("GET", "/takes/{id}/stems/{name}", get_stem),
    Route("POST", "/takes/{id}/again", again),
    Route("POST", "/takes/{id}/extend", extend),
    Route("POST", "/takes/{id}/regenerate", regenerate),
    Route("POST", "/takes/{id}/redecode", redecode),
    Route("POST", "/takes/{id}/stems", stems),
    Route("POST", "/takes/{id}/loudness", loudness),
    Route("POST", "/takes/{id}/star", star),
    Route("POST", "/cancel/{id}", cancel),
    Route("GET", "/api/models", plugin_models),
    Route("GET", "/api/juce/poll_status/{id}", plugin_polls),
    Route("POST", "/api/juce/{name}", plugin_begins),
]


# The server


class PageServer(Server):
    """The server, with all that its answers use: the `worker`, the folder of `takes`, the
    `limits` of what is served, and who has `access`."""

    def __init__(self, args: argparse.Namespace):
        adapter = args.adapter and str(args.adapter)
        self.limits = Limits(args.model, args.max_seconds, adapter, args.decoder)
        self.takes = Takes(args.takes_dir)
        super().__init__((args.host, args.port), Page)
        self.token = args.token
        if self.token is None and not is_loopback(args.host):
            self.token = secrets.token_urlsafe(16)
        self.access = Access(args.host, self.server_port, self.token)
        self.worker = Worker(partial(load, args=args), args.queue)
        self.plugin = juce.Plugin(self.worker, self.takes, self.limits)

    @property
    def address(self) -> str:
        """What a browser on this machine opens."""
        host = self.server_address[0]
        host = "127.0.0.1" if is_any(host) else f"[{host}]" if ":" in host else host
        token = f"?token={quote(self.token)}" if self.token else ""
        return f"http://{host}:{self.server_port}/{token}"


def load(name: str, args: argparse.Namespace) -> Any:
    """A model of that name; the one of the command line with its adapter. The decoder of
    what was made before gives its memory back, too."""
    diffusion_job.load.cache_clear()
    dtype = getattr(mx, args.dtype) if args.dtype else None
    changes = dict(q_bits=args.q_bits)
    if args.adapter and same_model(name, args.model):
        changes |= dict(adapter=args.adapter, adapter_scale=args.adapter_scale)
    return magnet.load(name, dtype, **changes)


SWITCH = dict(action="store_true")
DTYPES = ["float16", "bfloat16", "float32"]
FLAGS = {  # name, what it is, and how it is read
    "model": (
        "taken unless another is asked for; see generate.py --list-models",
        dict(default="small"),
    ),
    "host": (
        "address to listen at; at others than this machine's own a token is needed",
        dict(default="127.0.0.1"),
    ),
    "port": ("of the address", dict(type=int, default=8000)),
    "token": (
        "what every request must have; for another --host one is made and printed",
        dict(),
    ),
    "takes_dir": (
        "folder of what is made",
        dict(type=named_path, default="takes"),
    ),
    "no_open": ("open no browser", SWITCH),
    "max_seconds": ("longest take", dict(type=float, default=600.0)),
    "queue": ("requests that may wait", dict(type=int, default=MOST)),
    "dtype": ("of the decoder, as of generate.py", dict(choices=DTYPES)),
    "q_bits": (
        "quantize the decoder's layers while loading",
        dict(type=int, choices=BITS),
    ),
    "adapter": (
        "what changes --model: file of train.py lora, or PEFT's folder or Hub id",
        dict(type=Path),
    ),
    "adapter_scale": ("how far it changes it", dict(type=float, default=1.0)),
    "decoder": (
        "what diffusion is where a request asks for it: a file, a folder or a Hub id of "
        "such a decoder, or diffusion, which is the released one",
        dict(type=os.path.expanduser, default=diffusion_job.DIFFUSION),
    ),
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, checked. Ends the process with a line where they cannot be."""
    parser = argparse.ArgumentParser(description="Serve a page to make music on.")
    for name, (about, reads) in FLAGS.items():
        about += " (default: %(default)s)" if "default" in reads else ""
        parser.add_argument(f"--{name.replace('_', '-')}", help=about, **reads)
    args = parser.parse_args(argv)
    try:
        check_name(args.model)
        check_decoder(args.decoder)
    except ValueError as error:
        parser.error(one_line(error))
    if not 0 <= args.port < 2**16 or args.queue < 1 or not args.max_seconds > 0:
        parser.error(
            "--port must be 0 to 65535, --queue 1 or more, --max-seconds above 0"
        )
    if args.token is not None and not args.token.strip():
        parser.error("--token must not be empty: leave it out, or give one")
    if args.takes_dir.exists() and not args.takes_dir.is_dir():
        parser.error(f"--takes-dir must be a folder, but {args.takes_dir} is none")
    return args


def check_decoder(name: str) -> None:
    """Raise ValueError for what is no decoder's name, or the codec's own."""
    named = diffusion_job.make_decoder(name)
    if named is None or not diffusion_job.is_known(named):
        raise ValueError(
            f"--decoder must be {diffusion_job.DIFFUSION}, a Hub id, or a file or folder "
            f"that is there, got {name!r:.200}."
        )


def warn(message: Warning | str, *_) -> None:
    print(f"serve.py: warning: {one_line(message)}", file=sys.stderr)


def serve(server: PageServer) -> None:
    """Answer until Ctrl-C; then what is under way stops, and is kept."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopping; takes so far are kept.", file=sys.stderr)
    finally:
        server.server_close()
        ended = server.worker.close()
        server.plugin.close()
        time.sleep(0.2)  # in which the last events are sent
        if not ended:  # it is loading a model, which nothing stops
            os._exit(130)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_nothing()
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    args = parse_arguments(sys.argv[1:])
    warnings.showwarning = warn
    os.environ["HF_HUB_VERBOSITY"] = "error"  # no retries; the end result is reported
    try:
        server = PageServer(args)
    except (OSError, OverflowError, ValueError) as error:
        reason = one_line(in_a_sentence(error))
        sys.exit(f"serve.py: error: {args.host}:{args.port}: {reason}")
    print(server.address, flush=True)
    if not args.no_open:
        threading.Thread(target=webbrowser.open, args=[server.address]).start()
    try:
        serve(server)
    except KeyboardInterrupt:  # once more
        os._exit(130)


if __name__ == "__main__":
    main()
