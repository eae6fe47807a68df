"""The page's choice of a decoder, in a real Chromium, with random weights of few channels
for the model and for diffusion."""

import unittest

import numpy as np
import soundfile
from browser import Page
from common import REFERENCE, slow
from paged import PageTest, cases

MODEL, DECODER = (
    str(REFERENCE / name) for name in ("mono-audiocraft", "diffusion-audiocraft")
)
BAR = """window.shares = [], window.lines = [];
    const own = showProgress;
    showProgress = (making, ...says) => {
        own(making, ...says);
        shares.push(making.share), lines.push(making.line.textContent);
    }"""  # what the bar of what is made shows, and its line


class TestDecoder(PageTest):
    def open_it(self) -> Page:
        server = self.serve("--model", MODEL, "--decoder", DECODER)
        page = self.browser.open(server.address)
        page.wait("state.models.length && $('health').textContent")
        self.addCleanup(lambda: self.assertEqual(page.faults(), []))
        page.run("document.querySelector('details').open = true")
        page.run(BAR)
        return page

    def settings(self, page: Page) -> dict:
        """Of the newest take."""
        return page.run("state.takes[0].settings")

    def sound(self, page: Page) -> np.ndarray:
        id = page.run("state.takes[0].id")
        return soundfile.read(self.takes / f"{id}.wav")[0]

    @slow(6)
    def test_a_take_is_decoded_by_diffusion(self):
        """The bar goes from codes to sound without going back; Edit knows the choice,
        though the take's settings have the server's own name for it."""
        page = self.open_it()
        page.run("$('field-decoder').value = 'diffusion'")
        self.make(page, "slow bell", "0.2", seed="7")
        self.finish(page, 1)
        self.assertEqual(self.settings(page)["decoder"], DECODER)
        shares, lines = page.run("[shares, lines]")
        self.assertEqual((shares, shares[-1]), (sorted(shares), 1))
        made = [share for share, line in zip(shares, lines) if line.endswith("made")]
        self.assertEqual(max(made), 0.5)
        self.assertIn("0.2 of 0.2 s decoded", lines)
        said = "document.querySelector('#takes .words span').textContent"
        self.assertIn("diffusion", page.run(said))
        page.run("$('field-decoder').value = ''")
        page.click("#edit")
        self.assertEqual(page.run("$('field-decoder').value"), "diffusion")
        self.assertEqual(page.run("givenFields().decoder"), "diffusion")

    @slow(6)
    def test_a_take_is_decoded_anew(self):
        """By the decoder that it does not have, where that is said."""
        page = self.open_it()
        self.make(page, "slow bell", "0.2", seed="7")
        self.finish(page, 1)
        self.assertEqual(max(page.run("shares")), 1)  # without a second half
        plain = self.sound(page)
        self.assertNotIn("decoder", self.settings(page))
        page.run("shares.length = 0")
        page.click("#redecode")
        page.wait("$('ask').open")
        self.assertIn("diffusion", page.run("$('ask-title').textContent"))
        page.key("Escape")
        self.finish(page, 1)
        page.click("#redecode")
        page.click("#ask .loud")
        page.wait("state.takes.length === 2")
        self.finish(page, 2)
        self.assertEqual(self.settings(page)["decoder"], DECODER)
        shares = page.run("shares")
        self.assertEqual((shares, shares[-1]), (sorted(shares), 1))
        self.assertEqual(page.run("onDeck().id"), page.run("state.takes[0].id"))
        page.wait("player.sound.tracks.length")
        page.click("#redecode")
        self.assertIn("encodec", page.run("$('ask-title').textContent"))
        page.click("#ask .loud")
        page.wait("state.takes.length === 3")
        self.finish(page, 3)
        self.assertNotIn("decoder", self.settings(page))
        self.assertSame(self.sound(page), plain)

    @slow(3)
    def test_only_codes_are_decoded(self):
        self.put("slow bell", 1)
        page = self.open_it()
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.take")
        self.assertTrue(page.run("$('redecode').hidden"))


def load_tests(loader, *_) -> unittest.TestSuite:
    tests = map(loader.loadTestsFromTestCase, cases(__name__))
    return unittest.TestSuite(tests)
