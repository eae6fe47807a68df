"""The page of serve.py, in a real Chromium, with a real server and `tiny`."""

import re
import time
import unittest

import numpy as np
import soundfile
import sounds
from browser import Page
from common import REFERENCE, ROOT, Test, slow
from paged import QUICK, PageTest, cases

from audio import save_audio

FIRST = 1.0  # seconds from the request to the first sound
TRIES = 5  # since other tests run beside it
SLOW = "60"  # of one that is stopped

# Seconds from a press on Make until something is heard.
HEAR = """new Promise((hear) => {
    const begin = performance.now();
    $("make").click();
    const look = () => {
        if (level() > -50) hear((performance.now() - begin) / 1000);
        else setTimeout(look, 3);
    };
    look();
})"""

# A tape behind the page's output, which is what one hears.
TAPING = """(async () => {
    listen();
    const source = new Blob([TAPE], {type: "text/javascript"});
    await player.context.audioWorklet.addModule(URL.createObjectURL(source));
    const tape = new AudioWorkletNode(player.context, "tape");
    window.taped = [];
    tape.port.onmessage = ({data}) => window.taped.push(...data);
    player.out.connect(tape);
    tape.connect(player.context.destination);
})()"""


class TestFile(Test):
    """What holds without a browser, too."""

    def test_it_is_one_plain_file(self):
        text = (ROOT / "page.html").read_text()
        self.assertLessEqual(len(text.splitlines()), 1500)
        own = text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        self.assertNotRegex(own, r"https?://|@import|<script src|url\((?!\"data:)")
        self.assertIn("default-src 'none'", text)

    def test_it_puts_in_text_and_never_html(self):
        text = (ROOT / "page.html").read_text()
        writes = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b"
        self.assertEqual(re.findall(f"{writes}|new Function|srcdoc", text), [])


class TestMaking(PageTest):
    @slow(8)
    def test_sound_comes_at_once(self):
        page = self.open()
        page.type("#prompt", "slow bell melody")
        waits = []
        while len(waits) < TRIES and (not waits or min(waits) > FIRST):
            page.wait("level() === -60")
            waits.append(page.run(HEAR))
            page.run("stop(state.makings[0])")
            page.wait("state.makings.length === 0")
            page.key(" ")
        print(f"first sound after {', '.join(f'{wait:.2f}' for wait in waits)} s")
        self.assertLess(min(waits), FIRST)

    @slow(8)
    def test_what_is_heard_is_the_take(self):
        """To the sample, each piece where the last one ends, unless it came too late. A
        busy machine may lose some of the tape, so there are several tries."""
        page = self.open()
        page.run(TAPING)
        for seed in range(TRIES):
            heard, planned = self.tape(page, seed)
            if len(heard) == len(planned) and np.allclose(heard, planned, atol=1e-4):
                break
        np.testing.assert_allclose(heard, planned, atol=1e-4)

    def tape(self, page: Page, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """What was heard of a take, and what its pieces say, up to where it fades."""
        page.run("window.taped.length = 0")
        self.make(page, "fast happy saw", "3", seed=str(seed))
        page.wait("player.playing && (window.plan = player.plan).length")
        page.wait("level() > -40")
        self.assertEqual(page.run("$('title').textContent"), "fast happy saw")
        self.finish(page, seed + 1)
        page.wait("!player.playing")
        plan, rate = page.run("plan"), 32000
        self.assertGreaterEqual(len(plan), 3)
        joins = [
            abs(after["time"] - before["time"] - before["seconds"]) < 1e-6
            for before, after in zip(plan, plan[1:])
        ]
        self.assertGreater(sum(joins), len(joins) / 2)
        path = self.takes / f"fast-happy-saw-{seed}.wav"
        audio, begin = soundfile.read(path, dtype="float32")[0], plan[0]["time"]
        planned = np.zeros(round((plan[-1]["time"] - begin + 1) * rate), np.float32)
        for part in plan:
            start, at = round((part["time"] - begin) * rate), round(part["at"] * rate)
            piece = audio[at : at + round(part["seconds"] * rate)]
            planned[start : start + len(piece)] = piece
        heard = np.array(page.run("window.taped"), np.float32)
        first, start = [(abs(sound) > 0.01).argmax() for sound in (heard, planned)]
        length = round((plan[-1]["time"] - begin) * rate) - start
        return heard[first : first + length], planned[start : start + length]

    @slow(3)
    def test_a_slow_model_is_heard_in_few_breaks(self):
        """Ten pieces of 0.1 s that come every 0.2 s would have nine breaks."""
        page = self.open()
        script = """(async () => {
            const sound = newSound({whole: false, of: 1});
            openSound(sound, 0);
            for (let i = 0; i < 10; i++) {
                addPiece(sound, new AudioBuffer({length: 3200, sampleRate: 32000}));
                await new Promise((done) => setTimeout(done, 200));
            }
            sound.whole = true;
            feed();
            return player.plan;
        })()"""
        plan = page.run(script)
        self.assertEqual([round(10 * part["at"]) for part in plan], [*range(10)])
        waits = [
            after["time"] - before["time"] - before["seconds"]
            for before, after in zip(plan, plan[1:])
        ]
        self.assertGreater(min(waits), -1e-6)
        breaks = sum(wait > 1e-6 for wait in waits)
        self.assertTrue(1 <= breaks <= 3, waits)

    @slow(6)
    def test_stop_keeps_and_a_restart_finds(self):
        server = self.serve()
        page = self.browser.open(server.address)
        page.wait("state.models.length")
        self.make(page, "low square", SLOW)
        page.wait("player.sound?.seconds > 1")
        page.click("#halt")
        self.finish(page, 1)
        seconds = page.run("player.sound.take.seconds")
        self.assertTrue(1 <= seconds < 30, seconds)
        self.assertEqual(page.run("$('halt').hidden"), True)
        page.run("toggleStar(state.takes[0].id)")
        page.wait("state.takes[0].starred")
        server.close()
        page.click("#make")
        page.wait("!$('notice').hidden")
        self.assertIn("does not answer", page.run("$('notice').textContent"))
        page.close()
        page = self.open()
        page.wait("document.querySelector('#takes .open')")
        self.assertEqual(page.run("state.takes[0].starred"), True)
        page.click("#takes .open")
        page.wait("player.playing && level() > -50")
        self.assertEqual(page.run("$('title').textContent"), "low square")

    @slow(4)
    def test_several_takes_and_what_is_folded_away(self):
        page = self.open()
        page.run("document.querySelector('details').open = true")
        page.type("#field-top_k", "20")
        page.type("#field-fade_in", "0.1")
        page.run("countFields()")
        self.assertEqual(page.run("$('given').textContent"), "2")
        words = dict(count="2", seed="7", negative_prompt="drums")
        self.make(page, "slow bell", **words)
        self.finish(page, 2)
        settings = page.run("state.takes.map(({settings}) => settings)")
        self.assertEqual({each["seed"] for each in settings}, {7, 8})
        for each in settings:
            self.assertEqual((each["top_k"], each["fade_in"]), (20, 0.1))
            self.assertEqual(each["negative_prompt"], "drums")
        page.run("setPrompt('else'); $('field-top_k').value = ''")
        page.click("#takes .open")
        page.click("#edit")
        values = "[$('prompt').value, $('field-top_k').value, $('duration').value]"
        self.assertEqual(page.run(values), ["slow bell", "20", QUICK])
        page.type("#field-top_k", "0")
        page.click("#make")
        page.wait("!$('notice').hidden")
        self.assertIn("top_k", page.run("$('notice').textContent"))

    @slow(4)
    def test_sections_on_the_time_line(self):
        page = self.open()
        page.type("#duration", "2")
        page.type("#prompt", "slow bell")
        page.click("#section-more")
        page.type("#prompt", "fast saw")
        self.assertEqual(page.run("promptText()"), "0: slow bell | 1: fast saw")
        page.run("document.querySelector('.edge').focus()")
        page.key("ArrowRight")
        self.assertEqual(page.run("promptText()"), "0: slow bell | 1.1: fast saw")
        page.drag("#lane", 0.55, 0.75)
        self.assertEqual(page.run("promptText()"), "0: slow bell | 1.5: fast saw")
        page.click("#make")
        self.finish(page, 1)
        prompt = page.run("state.takes[0].prompt")
        self.assertEqual(prompt, "0: slow bell | 1.5: fast saw")
        self.assertEqual(page.run("marks(player.sound).length"), 2)
        page.click("#section-less")
        self.assertEqual(page.run("promptText()"), "slow bell")
        page.type("#prompt", "0: calm | 0.5bars: loud")
        self.assertEqual(page.run("promptText()"), "0: calm | 1: loud")


class TestTake(PageTest):
    @slow(10)
    def test_a_part_is_made_again_and_one_is_kept(self):
        page = self.open()
        self.make(page, "happy bell", "2", seed="3")
        self.finish(page, 1)
        page.wait("player.sound.tracks.length")
        page.drag("#wave", 0.25, 0.5)
        self.assertEqual(page.run("state.part"), [0.5, 1.0])
        page.type("#part-of", "3")
        page.type("#part-keep", "2")
        page.click("#part-make")
        page.wait("state.candidates", 60)
        self.finish(page, 3)
        self.assertEqual(page.run("state.candidates.ids.length"), 2)
        page.wait("player.playing && player.until === 2")
        page.key("2")
        page.wait("player.sound.take.id === state.candidates.ids[1]")
        page.wait("player.sound.tracks.length")
        page.click("#audition button:nth-last-of-type(2)")  # keep this one
        page.wait("state.takes.length === 2")
        sounds = [soundfile.read(path)[0] for path in self.takes.glob("*.wav")]
        self.assertEqual(len(sounds), 2)
        self.assertEqual(len(list(self.takes.glob("*.safetensors"))), 2)
        change = abs(sounds[0] - sounds[1])
        self.assertLess(change[: int(0.3 * 32000)].max(), 1e-3)
        self.assertGreater(change[int(0.5 * 32000) : 32000].max(), 0.01)

    @slow(8)
    def test_extend_another_seed_and_delete(self):
        page = self.open()
        self.make(page, "happy bell", seed="3")
        self.finish(page, 1)
        page.click("#extend")
        page.type("#ask input", "0.4")
        page.key("Enter")
        page.wait("state.takes.length === 2")
        self.finish(page, 2)
        page.wait("player.sound.tracks.length")
        self.assertAlmostEqual(page.run("player.sound.seconds"), 1.0, 2)
        page.click("#again")
        page.wait("state.takes.length === 3")
        self.finish(page, 3)
        seeds = page.run("state.takes.map(({seed}) => seed)")
        self.assertEqual(seeds[1:], [3, 3])
        self.assertNotEqual(seeds[0], 3)
        page.click("#delete")
        page.key("Escape")
        self.assertEqual(page.run("$('ask').open"), False)
        page.click("#delete")
        page.click("#ask .loud")
        page.wait("state.takes.length === 2")
        self.assertEqual(len(list(self.takes.glob("*.wav"))), 2)

    @slow(3)
    def test_stems_are_mixed(self):
        stems = self.put("two stems", 1).with_suffix(".stems")
        stems.mkdir()
        time = np.arange(64000) / 32000
        for name, hertz in (("bass", 110), ("drums", 440)):
            wave = 0.4 * np.sin(2 * np.pi * hertz * time)
            save_audio(stems / f"{name}.wav", wave.astype(np.float32), 32000)
        page = self.open()
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.tracks.length === 1")
        page.click("#stems")
        page.wait("player.sound.tracks.length === 2")
        page.key(" ")
        page.wait("level() > -5")
        page.click(".stem button[aria-label='solo bass']")
        page.wait("level() < -7 && level() > -9")
        page.click(".stem button[aria-label='mute bass']")
        page.wait("level() === -60")
        gains = page.run("player.sound.tracks.map(({gain}) => gain.gain.value)")
        self.assertLess(max(gains), 0.01)

    @slow(2)
    def test_a_file_goes_out(self):
        """By its link, and dragged, as Chromium asks for."""
        self.put("slow bell", 1)
        page = self.open()
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.take")
        link = page.run("[$('wav').href, $('wav').download]")
        self.assertEqual(link[1], "take-1.wav")
        page.send("Input.setInterceptDrags", enabled=True)
        x, y = page.centre("#wav")
        page.mouse("mousePressed", x, y)
        for step in range(1, 6):
            page.mouse("mouseMoved", x, y + 9 * step, buttons=1)
        page.browser.send("Target.getTargets")
        deadline = time.monotonic() + 10
        while not (dragged := self.dragged(page)) and time.monotonic() < deadline:
            page.run("0")
        types = {item["mimeType"]: item["data"] for item in dragged}
        self.assertEqual(types["downloadurl"], f"audio/wav:take-1.wav:{link[0]}")

    def dragged(self, page: Page) -> list[dict]:
        for event in page.browser.events:
            if event["method"] == "Input.dragIntercepted":
                return event["params"]["data"]["items"]
        return []


class TestFiles(PageTest):
    @slow(6)
    def test_what_is_dropped_is_followed_or_refused(self):
        path = self.folder / "hum <b>.wav"
        save_audio(path, sounds.tune(32000, [60, 64, 67]), 32000)
        page = self.open()
        page.drop("#drop [data-slot=melody]", path)
        page.wait("state.files.melody && state.chroma")
        self.assertTrue(page.run("$('drop').hidden"))
        name = "document.querySelector('#slots .cut').textContent"
        self.assertEqual(page.run(name), "Melody: hum <b>.wav")
        self.make(page, "slow bell")
        page.wait("!$('notice').hidden")
        self.assertIn("melody", page.run("$('notice').textContent"))
        self.finish(page, 0)
        page.click("#slots .bare")
        page.wait("!state.files.melody")
        page.drop("#drop [data-slot=audio_prompt]", path)
        page.wait("state.files.audio_prompt")
        self.make(page, "slow bell", "2")
        self.finish(page, 1)
        settings = page.run("state.takes[0].settings")
        self.assertEqual(settings["audio_prompt"], "hum <b>.wav")

    @slow(4)
    def test_a_melody_is_followed_and_goes_along_again(self):
        path = self.folder / "hum.wav"
        save_audio(path, sounds.tune(32000, [60, 64, 67]), 32000)
        model = REFERENCE / "melody-audiocraft"
        page = self.browser.open(self.serve("--model", str(model)).address)
        page.wait("state.models.length")
        page.drop("#drop [data-slot=melody]", path)
        page.wait("state.chroma")
        page.run("$('field-no_separate').checked = true")
        self.make(page, "bell")
        self.finish(page, 1)
        self.assertEqual(page.run("state.takes[0].settings.melody"), "hum.wav")
        page.click("#again")
        page.wait("state.takes.length === 2")
        self.finish(page, 2)
        self.assertEqual(page.run("state.takes[0].settings.melody"), "hum.wav")
        page.click("#slots .bare")
        page.click("#again")
        page.wait("!$('notice').hidden")
        self.assertIn("hum.wav", page.run("$('notice').textContent"))

    @slow(4)
    def test_the_microphone_is_recorded_and_its_chroma_drawn(self):
        page = self.open()
        page.click("#record")
        page.wait("state.recording?.seconds > 1.2")
        page.click("#record")
        page.wait("state.chroma")
        size = page.run("state.files.melody.size")
        self.assertGreater(size, 2 * 1.2 * 16000)
        self.assertEqual(page.run("state.chroma[0].length"), 12)
        self.assertRegex(
            page.run("$('chroma').getAttribute('aria-label')"), "^Chroma: mostly [A-G]"
        )
        inked = """[...$("chroma").getContext("2d").getImageData(0, 0, 2000, 500).data]
            .filter((value, i) => i % 4 === 3 && value > 60).length"""
        self.assertGreater(page.run(inked), 500)
        whole = """state.files.melody.arrayBuffer()
            .then((bytes) => decoder.decodeAudioData(bytes))
            .then((buffer) => Math.max(...buffer.getChannelData(0)))"""
        self.assertGreater(page.run(whole), 0.05)


class TestLooks(PageTest):
    def test_it_fits_a_telephone(self):
        self.put("a very long prompt without a break: " + "x" * 200, 1)
        self.put("0: calm | 2: loud", 2)
        page = self.open(375, 800)
        page.wait("state.takes.length === 2")
        page.key("ArrowDown")
        page.wait("player.sound?.tracks.length")
        page.run("document.querySelector('details').open = true")
        page.run("addSection(), selectPart(1, 2), $('part').hidden = false")
        page.run("$('notice').hidden = false, tell('x '.repeat(200))")
        wide = page.run("document.documentElement.scrollWidth")
        self.assertEqual(wide, page.run("document.documentElement.clientWidth"))
        outside = """[...document.querySelectorAll("main *")].filter((each) =>
            each.getBoundingClientRect().right > innerWidth).map((each) => each.id)"""
        self.assertEqual(page.run(outside), [])

    def test_both_themes(self):
        self.put("slow bell", 1)
        page = self.open()
        paper = "getComputedStyle(document.body).backgroundColor"
        colours = []
        for theme in ("light", "dark"):
            page.prefer(theme)
            page.wait(f"document.documentElement.dataset.theme === '{theme}'")
            colours.append(page.run(paper))
        self.assertNotEqual(*colours)
        page.click("#theme")
        self.assertEqual(page.run(paper), colours[0])
        page.send("Page.reload")
        page.wait("document.readyState === 'complete' && state.models.length")
        self.assertEqual(page.run(paper), colours[0])  # the choice is remembered
        faint = """["light", "dark"].flatMap((theme) => {
            document.documentElement.dataset.theme = theme;
            return [["ink", "paper"], ["soft", "paper"], ["soft", "sheet"],
                    ["accent", "sheet"], ["on-accent", "accent"]].map(contrast);
        })"""
        contrast = """const luminance = (name) => {
            const part = (at) => parseInt(colour(name).trim().slice(at, at + 2), 16) / 255;
            const linear = (x) => x < 0.04 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
            return [1, 3, 5].map(part).map(linear)
                .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0.05);
        };
        const contrast = ([a, b]) => {
            const [x, y] = [luminance(a), luminance(b)];
            return Math.max(x, y) / Math.min(x, y);
        };"""
        values = page.run(f"(() => {{ {contrast} return {faint}; }})()")
        self.assertGreater(min(values), 4.5)  # what WCAG asks of text

    def test_what_others_wrote_is_only_text(self):
        bad = "<img src=x onerror='window.hurt=1'><script>window.hurt=1</script>"
        self.put(bad, 1, negative_prompt=bad)
        page = self.open()
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.tracks.length")
        page.click("#edit")
        page.click("#make")
        page.wait("state.makings.length")
        self.assertEqual(page.run("$('title').textContent"), bad)
        self.finish(page, 2)
        page.run("tell(state.takes[0].prompt)")
        self.assertIsNone(page.run("window.hurt"))
        self.assertEqual(page.run("document.querySelectorAll('main img').length"), 0)

    def test_keys(self):
        for seed in (1, 2, 3):
            self.put("slow bell", seed)
        page = self.open()
        page.wait("state.takes.length === 3")
        ids = page.run("state.takes.map(({id}) => id)")
        page.key("ArrowDown")
        page.key("ArrowDown")
        page.wait("player.sound.tracks.length")
        self.assertEqual(page.run("player.sound.take.id"), ids[1])
        page.key("ArrowUp")
        page.wait("player.sound.tracks.length")
        self.assertEqual(page.run("player.sound.take.id"), ids[0])
        page.key("ArrowRight")
        self.assertEqual(page.run("position()"), 1)
        page.key(" ")
        page.wait("player.playing && level() > -50")
        page.key(" ")
        self.assertFalse(page.run("player.playing"))
        page.key("s")
        page.wait("state.takes[0].starred")
        page.click("#prompt")
        for key in (" ", "s", "Enter", "ArrowDown"):
            page.key(key)
        self.assertEqual(page.run("$('prompt').value"), " s\n")
        self.assertEqual(page.run("[player.playing, state.makings.length]"), [False, 0])
        page.type("#duration", QUICK)
        page.key("Escape")
        page.key("Enter")
        page.wait("state.makings.length || state.takes.length === 4")
        self.finish(page, 4)

    def test_a_reader_of_screens_finds_names(self):
        self.put("slow bell", 1)
        page = self.open()
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.tracks.length")
        page.run("document.querySelector('details').open = true")
        page.run("selectPart(1, 2), $('part').hidden = false")
        nodes = page.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "searchbox", "combobox", "spinbutton", "slider"}
        roles |= {"checkbox", "link", "meter", "img", "dialog"}
        values = [
            (node["role"]["value"], node.get("name", {}).get("value"))
            for node in nodes
            if not node["ignored"]
        ]
        found = [(role, name) for role, name in values if role in roles]
        self.assertGreater(len(found), 40)
        self.assertEqual([pair for pair in found if not pair[1]], [])


class TestToken(PageTest):
    @slow(3)
    def test_it_is_sent(self):
        self.put("slow bell", 1)
        server = self.serve("--token", "secret")
        self.assertTrue(server.address.endswith("?token=secret"))
        page = self.browser.open(server.address)
        page.wait("state.takes.length === 1")
        page.key("ArrowDown")
        page.wait("player.sound?.tracks.length")
        status = "fetch($('wav').href).then(({status}) => status)"
        self.assertEqual(page.run(status), 200)
        self.make(page, "slow bell")
        self.finish(page, 2)
        bare = "fetch('/takes').then(({status}) => status)"
        self.assertEqual(page.run(bare), 401)


def load_tests(loader, *_) -> unittest.TestSuite:
    tests = [TestFile, *cases(__name__)]
    return unittest.TestSuite(map(loader.loadTestsFromTestCase, tests))
