"""A real Chromium, driven by the standard library alone.

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:8000/")
        page.run("document.title")
        page.click("#make")
        page.wait("state.takes.length == 1")

Chromium speaks the DevTools protocol over a pipe (file descriptors 3 and 4): a JSON text
a message, each ended by a zero byte. Its microphone is a fake one that beeps, and its
sound goes nowhere, in real time.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = """
    --headless=new --remote-debugging-pipe --no-first-run --no-default-browser-check
    --disable-gpu --disable-dev-shm-usage --disable-extensions --mute-audio
    --disable-background-networking --disable-component-update --disable-sync
    --use-fake-device-for-media-stream --use-fake-ui-for-media-stream
    --autoplay-policy=no-user-gesture-required --force-color-profile=srgb
    --disable-background-timer-throttling --disable-renderer-backgrounding
""".split()
KEYS = {
    " ": ("Space", 32, " "),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}


def find() -> str | None:
    """The path of a Chromium, or None."""
    paths = map(shutil.which, (os.environ.get("CHROMIUM") or "", *NAMES))
    return next(filter(None, paths), None)


class PageError(Exception):
    """What a page throws, or what Chromium refuses."""


class Browser:
    """A Chromium with an empty profile, which goes with it."""

    def __init__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.number, self.answers = 0, {}
        self.messages = Queue()  # what comes of the pipe
        self.events = []  # what no command asked for
        self.start()

    def start(self) -> None:
        reads, self.write_to = os.pipe()
        self.read_from, writes = os.pipe()
        # The child's ends must not be 3 or 4 already, or one would overwrite the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [find(), *FLAGS, *root, f"--user-data-dir={self.profile.name}"]
        self.process = subprocess.Popen(
            [*command, "about:blank"],
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)),
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (reads, writes, *ends):
            os.close(end)
        Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := os.read(self.read_from, 1 << 16):
                *texts, rest = (rest + data).split(b"\0")
                for text in texts:
                    self.messages.put(json.loads(text))
        self.messages.put(None)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict:
        """The result of a command. Raises PageError where Chromium refuses it."""
        self.number += 1
        message = dict(id=self.number, method=method, params=parameters)
        if session:
            message["sessionId"] = session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        number, deadline = self.number, time.monotonic() + 60
        while number not in self.answers:
            self.receive(deadline - time.monotonic())
        answer = self.answers.pop(number)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def receive(self, seconds: float) -> None:
        """Take a message of Chromium's. Raises PageError where none comes."""
        try:
            message = self.messages.get(timeout=max(seconds, 0))
        except Empty:
            raise PageError("Chromium does not answer.") from None
        if message is None:
            raise PageError("Chromium has ended.")
        if "id" in message:
            self.answers[message["id"]] = message
        else:
            self.events.append(message)

    def open(self, address: str, width: int = 1280, height: int = 900) -> "Page":
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attach = dict(targetId=target, flatten=True)
        session = self.send("Target.attachToTarget", **attach)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        page.resize(width, height)
        page.go(address)
        return page

    def close(self) -> None:
        with contextlib.suppress(PageError, OSError):
            self.send("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for end in (self.write_to, self.read_from):
            with contextlib.suppress(OSError):
                os.close(end)
        self.profile.cleanup()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target

    def send(self, method: str, **parameters: Any) -> dict:
        return self.browser.send(method, self.session, **parameters)

    def go(self, address: str) -> None:
        result = self.send("Page.navigate", url=address)
        if "errorText" in result:
            raise PageError(f"{address}: {result['errorText']}")
        self.wait("document.readyState == 'complete'")

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)

    def run(self, script: str) -> Any:
        """The value of an expression, also of one that is awaited. Raises PageError with
        what it throws."""
        options = dict(awaitPromise=True, returnByValue=True, userGesture=True)
        answer = self.send("Runtime.evaluate", expression=script, **options)
        if details := answer.get("exceptionDetails"):
            thrown = details.get("exception", {}).get("description")
            raise PageError(f"{script}: {thrown or details['text']}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        """Until an expression is true. Raises PageError where it does not become so."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > deadline:
                raise PageError(f"{script} is not so after {seconds} s.")
            time.sleep(0.03)

    def faults(self) -> list[str]:
        """What scripts threw, and what the browser or its policy refused."""
        faults = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                thrown = details.get("exception", {}).get("description")
                faults.append(thrown or details["text"])
            if event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error" and entry["source"] != "network":
                    faults.append(entry["text"])
        return faults

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        sizes = dict(width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **sizes)

    def prefer(self, theme: str) -> None:
        """The system's theme: "dark" or "light"."""
        feature = dict(name="prefers-color-scheme", value=theme)
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path | None = None) -> bytes:
        """A screenshot as PNG."""
        data = self.send("Page.captureScreenshot", format="png")["data"]
        if path:
            Path(path).write_bytes(base64.b64decode(data))
        return base64.b64decode(data)

    def centre(self, selector: str) -> tuple[float, float]:
        """Of an element, which is brought into view. Raises PageError where there is none,
        or another one lies over it, or it does not keep still."""
        script = f"""(async () => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "center", behavior: "instant"}});
            const place = () => {{
                const {{x, y, width, height}} = found.getBoundingClientRect();
                return [x + width / 2, y + height / 2];
            }};
            const before = place();
            await new Promise(requestAnimationFrame);
            const after = place();
            const still = before.every((value, i) => value === after[i]);
            return still && found.contains(document.elementFromPoint(...after)) && after;
        }})()"""
        deadline = time.monotonic() + 10
        while not (place := self.run(script)):
            if time.monotonic() > deadline:
                raise PageError(f"{selector} cannot be pressed.")
        return tuple(place)

    def mouse(self, kind: str, x: float, y: float, **parameters: Any) -> None:
        values = dict(type=kind, x=x, y=y, button="left", clickCount=1) | parameters
        self.send("Input.dispatchMouseEvent", **values)

    def click(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Along an element, from a share of its width to another."""
        x, y = self.centre(selector)
        width = self.run(
            f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().width"
        )
        left = x - width / 2
        self.mouse("mousePressed", left + start * width, y)
        for i in range(1, 9):
            at = start + (end - start) * i / 8
            self.mouse("mouseMoved", left + at * width, y, buttons=1)
        self.mouse("mouseReleased", left + end * width, y)

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press a key, by its name or letter."""
        letter = (f"Key{name.upper()}", ord(name[0].upper()), name)
        code, number, text = KEYS.get(name, letter)
        key = dict(key=name, code=code, windowsVirtualKeyCode=number)
        key |= dict(modifiers=modifiers)
        typed = {"text": text} if text and not modifiers else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **key, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def type(self, selector: str, text: str) -> None:
        """In place of what is there."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.run("document.activeElement.select()")
        self.send("Input.insertText", text=text)
        self.run(
            "document.activeElement.dispatchEvent(new Event('change', {bubbles: true}))"
        )

    def drop(self, selector: str, path: Path) -> None:
        """Drag a file in from outside, and let it fall on an element that appears."""
        data = dict(items=[], files=[str(path)], dragOperationsMask=1)
        where = dict(x=640, y=300, data=data)
        for kind in ("dragEnter", "dragOver"):
            self.send("Input.dispatchDragEvent", type=kind, **where)
        self.wait(f"document.querySelector({json.dumps(selector)})?.offsetWidth > 0")
        x, y = self.centre(selector)
        for kind in ("dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
