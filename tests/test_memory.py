"""Memory on a Mac, by what MLX is asked there: nothing here runs on Metal."""

import re
from contextlib import contextmanager
from unittest.mock import patch

import mlx.core as mx
from common import ROOT, Test, exact, random_decoder
from mlx.utils import tree_flatten

import benchmark
import engine
import magnet
import quantize
from musicgen import MusicGen
from options import Options

GB = 10**9


class Mac:
    """What MLX would say and do there; counts what it is asked."""

    def __init__(self, ram: int, wired: int = 7):
        self.info = {"memory_size": ram, engine.RECOMMENDED: ram * 2 // 3}
        self.wired, self.history = wired, []
        self.limits, self.synchronized = {}, 0

    def set_wired_limit(self, size: int) -> int:
        assert self.synchronized > len(self.history)
        before, self.wired = self.wired, size
        self.history.append(size)
        return before

    def synchronize(self):
        self.synchronized += 1


@contextmanager
def on_mac(ram: int):
    mac = Mac(ram)
    names = ("set_memory_limit", "set_cache_limit")
    fakes = {
        name: lambda size, name=name: mac.limits.update({name: size}) or 2**40
        for name in names
    }
    fakes |= dict(set_wired_limit=mac.set_wired_limit, synchronize=mac.synchronize)
    fakes |= dict(device_info=lambda: mac.info, get_memory_limit=lambda: ram)
    engine.limit_memory.cache_clear()
    try:
        with patch.multiple("engine.mx", **fakes):
            yield mac
    finally:
        engine.limit_memory.cache_clear()


class TestBudget(Test):
    def test_of_macs(self):
        for ram, size in (
            (8 * 2**30, 8 * 2**30 - 3.5 * GB),  # 5.1 GB, where Metal recommends 5.7
            (16 * 2**30, 16 * 2**30 * 2 // 3),
            (64 * 2**30, 64 * 2**30 * 2 // 3),
        ):
            with on_mac(ram) as mac:
                self.assertEqual(engine.memory_size(), size)
                engine.limit_memory()
                self.assertEqual(mac.limits["set_memory_limit"], size)
                cache = {} if ram > 17.2 * GB else {"set_cache_limit": 2**29}
                self.assertEqual(mac.limits, {"set_memory_limit": size} | cache)
                mac.limits.clear()
                engine.limit_memory()  # the limits are set once
                self.assertEqual(mac.limits, {})

    def test_a_lower_limit_of_the_user_stays(self):
        with on_mac(16 * 2**30), patch("engine.mx.get_memory_limit", lambda: 2 * GB):
            self.assertEqual(engine.memory_size(), 2 * GB)

    def test_a_lower_cache_limit_of_the_user_stays(self):
        limits = [2**20]

        def set_cache_limit(size: int) -> int:
            limits.append(size)
            return limits[-2]

        with on_mac(8 * 2**30), patch("engine.mx.set_cache_limit", set_cache_limit):
            engine.limit_memory()
        self.assertEqual(limits[-1], 2**20)

    def test_elsewhere_nothing_is_limited(self):
        engine.limit_memory.cache_clear()
        with patch("engine.mx.set_memory_limit", side_effect=AssertionError):
            engine.limit_memory()
        self.assertEqual(engine.memory_size(), mx.get_memory_limit())

    def test_a_take_sets_it_before_it_runs(self):
        model = exact("mono-audiocraft")
        for size in (None, 1):
            with on_mac(8 * 2**30) as mac:
                next(iter(model.steps("a", duration=0.1, batch_size=size)))
                self.assertIn("set_memory_limit", mac.limits)
                self.assertIn("set_cache_limit", mac.limits)

    def test_rows_that_fit(self):
        """Of the published `small` at 30 s: an 8 GB Mac does not take ten at once."""
        model = exact("mono-audiocraft")
        loaded, row = int(1.51 * GB), 2 * int(0.147 * GB)
        fakes = dict(get_active_memory=lambda: loaded)
        with on_mac(8 * 2**30), patch.multiple("engine.mx", **fakes):
            with patch("engine.cache_bytes", lambda decoder, steps: row // 2):
                self.assertEqual(engine.rows_that_fit(model, Options(30.0)), 8)

    def test_memory_of_t5_is_given_back(self):
        """Not kept in MLX's cache, nor by what is still to be computed with it."""
        model, active = exact("mono-transformers"), []
        weights = tree_flatten(model.text_encoder.parameters())
        size = sum(weight.nbytes for _, weight in weights)
        del weights
        before = mx.get_active_memory()

        def clear():
            active.append(mx.get_active_memory())

        with patch("engine.mx.get_memory_limit", return_value=10**6):
            with patch("engine.mx.clear_cache", clear):
                next(iter(model.steps("drums", duration=0.1)))
        self.assertEqual(len(active), 1)
        self.assertLess(active[0], before - 0.8 * size)


def needs(name: str, bits: int) -> int:
    """Bytes that a take of 30 s takes: nothing is computed."""
    config = benchmark.published_config(name)
    kind = MusicGen if config.masking is None else magnet.MAGNeT
    model = kind(config, benchmark.Words())
    model.decoder.set_dtype(mx.float16)
    if bits < 16:
        quantize.quantize(model.decoder, bits)
    weights = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    caches = 2 * engine.cache_bytes(model.decoder, 30 * 50 + 3)
    if kind is not MusicGen:
        caches = magnet.pass_bytes(config.decoder, model.longest_window, 2)
    return weights + max(caches, engine.DECODING_MEMORY)


class TestTable(Test):
    def test_which_mac_holds_which_model(self):
        """What the README says, by the sizes, and by the budget of each Mac."""
        text = (ROOT / "README.md").read_text()
        row = r"^(\| `(\w+)`, `stereo-\2`(?:, `[\w-]+`)* \|.*)$"
        rows = re.findall(row, text, re.MULTILINE)
        self.assertEqual([name for _, name in rows], [*benchmark.SIZES])
        for row, name in rows:
            told = re.findall(r"\| ([\d.]+) GB: (\d+) GB ", row)
            for bits, (size, mac) in zip((16, 8, 4), told, strict=True):
                with self.subTest(name, bits=bits):
                    names = re.findall(r"`([\w-]+)`", row)
                    need = max(needs(one, bits) for one in names)
                    self.assertEqual(f"{need / GB:.1f}", size)
                    macs = []
                    for ram in (8, 16, 24, 32):
                        with on_mac(ram * 2**30):
                            macs += [ram] * (need <= engine.memory_size())
                    self.assertEqual(macs[0], int(mac))
        for ram, spare in re.findall(r"of (\d+) GB (?:these are )?([\d.]+)", text):
            with on_mac(int(ram) * 2**30):
                self.assertEqual(f"{engine.memory_size() / GB:.1f}", spare.strip("."))


class TestWired(Test):
    def test_as_much_as_an_engine_needs(self):
        decoder, text, _ = random_decoder()
        for recommended, size in ((50 * GB, 4 * GB), (3 * GB, 3 * GB)):
            with on_mac(96 * GB) as mac:
                mac.info[engine.RECOMMENDED] = recommended
                with patch("engine.mx.get_active_memory", lambda: 3 * GB):
                    forward = engine.Engine(decoder, text, 1, 9)
                caches = 0 if size == 3 * GB else 2 * engine.cache_bytes(decoder, 9)
                self.assertEqual(mac.history, [size + caches])
                del forward
                self.assertEqual(mac.wired, 7)

    def test_put_back_however_a_take_ends(self):
        model = exact("mono-audiocraft")
        with on_mac(16 * GB) as mac:
            model.generate("a", duration=0.1)
            self.assertGreater(mac.history[0], GB)
            self.assertEqual(mac.history[1:], [7])
            for step in model.steps("a", duration=0.1):
                self.assertGreater(mac.wired, GB)
                break
            self.assertEqual(mac.wired, 7)
            take = iter(model.steps("a", duration=0.1))
            next(take)
            self.assertGreater(mac.wired, GB)
            take.close()
            del take  # in some Pythons a closed generator keeps its frame until then
            self.assertEqual(mac.wired, 7)
            with patch("engine.Lane.lower", side_effect=KeyboardInterrupt):
                with self.assertRaises(KeyboardInterrupt):
                    model.generate("a", duration=0.1)
            self.assertEqual(mac.wired, 7)

    def test_two_at_once(self):
        wired = engine.Wired()
        with on_mac(16 * GB) as mac:
            for size in (3, 5, 4):
                wired.add(size * 10)
            wired.remove(50)
            self.assertEqual(mac.wired, 40)
            wired.remove(30)
            wired.remove(40)
            self.assertEqual(mac.history, [30, 50, 50, 40, 40, 7])

    def test_elsewhere_nothing_is_asked(self):
        decoder, text, _ = random_decoder()
        with patch("engine.mx.set_wired_limit", side_effect=AssertionError):
            engine.Engine(decoder, text, 1, 9)
