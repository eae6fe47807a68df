"""Models in other threads than the one that loaded them."""

import subprocess
import sys
from textwrap import dedent

from common import REFERENCE, ROOT, Test, slow

COMMON = """
    import asyncio, sys, threading
    from concurrent.futures import ThreadPoolExecutor

    import mlx.core as mx
    import numpy as np

    sys.path[:0] = {paths}
    from common import REFERENCE, ROOT
    from musicgen import MusicGen

    def in_threads(*works):
        \"\"\"What they return, each in a thread of its own, all at once.\"\"\"
        results = [None] * len(works)

        def run(i):
            try:
                results[i] = works[i]()
            except Exception as error:
                results[i] = error

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def in_turns(iterator):
        \"\"\"The items of an iterator, by two threads in turns.\"\"\"
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            while (item := one.submit(next, iterator, None).result()) is not None:
                yield item
                one, other = other, one

    def same(got, want):
        got, want = np.array(got), np.array(want)
        assert np.array_equal(got, want), np.abs(got - want).max()
"""
TAKES = """
    model = MusicGen.from_pretrained(REFERENCE / "{name}")
    model.plain = {plain}
    noise = mx.array(np.random.default_rng(0).normal(size=(9000, 1)) / 9, mx.float32)
    options = dict(duration=0.3, {options})
    mx.eval(options)  # what is lazy belongs to its thread

    def make(seed):
        return model.generate("drums", seed=seed, **options)

    def stream(seed):
        pieces = model.stream("drums", chunk=0.06, seed=seed, **options)
        return np.concatenate(list(map(np.array, pieces)))

    first = [in_threads(lambda: make(seed))[0] for seed in (0, 1, 0)]
    streamed = [in_threads(lambda: stream(seed))[0] for seed in (0, 1)]
    want = [np.array(make(seed)) for seed in (0, 1)]
    for got, seed in zip(first, (0, 1, 0)):
        same(got, want[seed])
    whole = [stream(seed) for seed in (0, 1)]
    for got, seed in zip(streamed, (0, 1)):
        same(got, whole[seed])
        assert np.abs(got - want[seed][0]).max() < 1e-5
    for _ in range(3):
        works = (lambda: make(0), lambda: make(1), lambda: stream(0), lambda: stream(1))
        for got, right in zip(in_threads(*works), want + whole):
            same(got, right)
    same(asyncio.run(asyncio.to_thread(make, 1)), want[1])
    with ThreadPoolExecutor(2) as pool:
        for got, seed in zip(pool.map(make, (0, 1, 0)), (0, 1, 0)):
            same(got, want[seed])

    # a take that is begun here, made by two threads in turns, and looked at here
    take = model.steps("drums", seed=0, **options)
    lengths = [take.codes.shape[1] for _ in in_turns(iter(take))]
    assert lengths == sorted(lengths) and lengths[-1] == 15, lengths
    same(model.decode(take.codes), want[0])
    pieces = in_turns(model.stream("drums", chunk=0.06, seed=0, **options))
    same(np.concatenate(list(map(np.array, pieces))), whole[0])
    same(make(0), want[0])
"""
WORKERS = """
    model = MusicGen.from_pretrained(ROOT / "tiny")
    options = [
        dict(prompts=prompt, duration=0.3, seed=1, temp=temp, guidance_coef=coef)
        for prompt in ("slow bell", "fast low saw", "sad guitar")
        for temp, coef in ((1, 3), (0.5, np.float32(5)))
    ]
    options[0]["negative_prompt"] = "noise"
    want = [np.array(model.generate_codes(**one)) for one in options]

    async def take(one):
        steps = iter(model.steps(**one))
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            made = step
        return made.codes

    async def serve(round):  # the pool's threads share the steps of two takes
        chosen = [(round + i) % len(options) for i in range(2)]
        made = await asyncio.gather(*(take(options[i]) for i in chosen))
        for i, codes in zip(chosen, made):
            same(codes, want[i])

    async def serve_all():
        for round in range(len(options)):
            await serve(round)
    asyncio.run(serve_all())

    # begun here, ended and freed in another thread; then others here
    for i in range(2 * len(options)):
        i, model.plain = i % len(options), i >= len(options)
        steps = iter(model.steps(**options[i]))
        next(steps), next(steps)
        rest = [steps]
        del steps
        in_threads(lambda: [None for _ in rest.pop()])
        for j in range(len(options)):
            same(model.generate_codes(**options[j]), want[j])
"""
PARTS = """
    from demucs import HTDemucs
    from encodec import Encodec
    from melody import extract_chroma
    from mert import MERT
    from t5 import T5

    noise = mx.array(np.random.default_rng(0).normal(size=(9000, 1)) / 9, mx.float32)
    codec = Encodec.from_pretrained(REFERENCE / "encodec_48khz")
    demucs = HTDemucs.from_pretrained(REFERENCE / "htdemucs")
    mert = MERT.from_pretrained(REFERENCE / "style-audiocraft" / "MERT-v1-95M")
    t5, tokenizer = T5.from_pretrained(REFERENCE / "t5-gated")
    lazy = MusicGen.from_pretrained(ROOT / "tiny", lazy=True)
    lazy.read_now()
    both = mx.repeat(noise, 2, axis=1)
    mx.eval(noise, both)

    def use():
        return (
            np.array(codec.decode(codec.encode(both[None]))),
            demucs.separate(both[:900]),  # not lazy, as what follows
            extract_chroma(mx.tile(noise, (4, 1)), 32000),
            np.array(mert(noise.T)),
            np.array(t5.encode([tokenizer.encode("drums")])[0]),
            lazy.generate("slow bell", duration=0.1, seed=0),
        )

    first, second = in_threads(use, use)
    for got in (first, second, in_threads(use)[0], use()):
        for part, right in zip(got, first):
            same(part, right)
"""
MAGNET = """
    from magnet import MAGNeT

    model = MAGNeT.from_pretrained(REFERENCE / "magnet-audiocraft")
    for arrangement in ("nonoverlap", "stride1"):
        options = dict(duration=0.3, decoding_steps=(3, 2, 2, 1), seed=0)
        options["span_arrangement"] = arrangement
        want = np.array(model.generate_codes("drums", **options))
        made = in_threads(*[lambda: model.generate_codes("drums", **options)] * 3)
        for codes in made:
            same(codes, want)
        for plan in (in_turns, iter):  # begun here, made by others
            take = model.steps("drums", **options)
            steps = [step.step for step in plan(iter(take))]
            assert steps == [*range(1, 9)], steps
            same(take.codes, want)
        steps = iter(take := model.steps("drums", **options))
        next(steps), next(steps)
        in_threads(lambda: [None for _ in steps])
        same(take.codes, want)
        same(model.generate_codes("drums", **options), want)
"""


class TestThreads(Test):
    maxDiff = None

    def run_program(self, program: str, **values):
        """In a process of its own, for the exit counts, too."""
        paths = [str(ROOT), str(ROOT / "tests"), str(REFERENCE)]
        program = dedent(COMMON + program).format(paths=paths, **values)
        command = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.returncode, 0)

    def take(self, name: str, plain: bool = False, options: str = ""):
        self.run_program(TAKES, name=name, plain=plain, options=options)

    @slow(2)
    def test_text(self):
        self.take("stereo-transformers", options="guidance_coef=2.0")

    @slow(2)
    def test_plain(self):
        self.take("mono-audiocraft", plain=True)

    @slow(2)
    def test_audio_prompt(self):
        self.take("mono-audiocraft", options="audio_prompt=noise[:1280] * 2")

    @slow(2)
    def test_melody(self):
        self.take(
            "melody-audiocraft", options="melody=mx.tile(noise, (3, 1)), separate=False"
        )

    @slow(2)
    def test_style(self):
        self.take("style-audiocraft", options="style=mx.tile(noise, (12, 1))")

    @slow(6)
    def test_workers(self):
        """MLX keeps what it compiled by thread and by a function's address: a function
        at the same address must not meet what another one left there."""
        self.run_program(WORKERS)

    @slow(2)
    def test_magnet(self):
        self.run_program(MAGNET)

    @slow(2)
    def test_parts(self):
        self.run_program(PARTS)
