"""A browser on the page of a server of its own, for the tests of the page."""

import subprocess
import sys
import unittest
from pathlib import Path

import sounds
from browser import Browser, Page, find
from common import ROOT, Test

from audio import save_audio
from settings import to_comment

QUICK = "0.6"  # seconds of a take whose length does not matter


class Server:
    """A serve.py of its own process."""

    def __init__(self, takes: Path, *arguments: str):
        command = [sys.executable, "serve.py", "--model", "tiny", "--no-open"]
        command += ["--port", "0", "--takes-dir", str(takes), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True)
        self.address = self.process.stdout.readline().strip().split()[-1]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


class PageTest(Test):
    """A browser, a server and an empty folder of takes."""

    def setUp(self):
        super().setUp()
        self.takes = self.folder / "takes"
        self.takes.mkdir()
        self.browser = Browser()
        self.addCleanup(self.browser.close)

    def serve(self, *arguments: str) -> Server:
        server = Server(self.takes, *arguments)
        self.addCleanup(server.close)
        return server

    def open(self, *size: int) -> Page:
        """The page, once it has asked for all that it shows."""
        page = self.browser.open(self.serve().address, *size)
        page.wait("state.models.length && $('health').textContent")
        self.addCleanup(lambda: self.assertEqual(page.faults(), []))
        return page

    def put(self, prompt: str, seed: int, **more) -> Path:
        """A take that generate.py might have written, of 4 s."""
        tune = sounds.tune(32000, [60, 64, 67, 72, 67, 64, 60, 55])
        path = self.takes / f"take-{seed}.wav"
        values = dict(prompt=prompt, seed=seed, model="tiny", duration=4.0, **more)
        save_audio(path, tune, 32000, to_comment(values))
        return path

    def make(self, page: Page, prompt: str, seconds: str = QUICK, **fields) -> None:
        """Fill in the form, and press Make."""
        page.type("#prompt", prompt)
        for name, value in dict(duration=seconds, **fields).items():
            page.type(f"#{name}", value)
        page.click("#make")

    def finish(self, page: Page, takes: int) -> None:
        """Wait until nothing is made, and so many takes are there."""
        page.wait("state.makings.length === 0", 60)
        told = page.run("$('notice').textContent.trim()")
        self.assertEqual(page.run("state.takes.length"), takes, told)


class TestNoBrowser(Test):
    @unittest.skip("no Chromium is here to test the page in: apt-get install chromium")
    def test_page(self):
        """In place of all that need one."""


def cases(module: str) -> list[type[Test]]:
    """A file's own tests of the page, or none where there is no browser."""
    classes = [case for case in PageTest.__subclasses__() if case.__module__ == module]
    return classes if find() else [TestNoBrowser]
