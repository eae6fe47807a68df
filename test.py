"""Find and run tests/test_*.py, in as many processes as there are cores.

    python test.py [-v] [NAME ...]

NAME is a file (encodec), a class (TestEncodec) or a test
(encodec.TestEncodec.test_lstm). Nothing needs a network, torch or released weights:
`reference/` holds tiny random checkpoints in the published layouts and what the
original implementations compute.
"""

import argparse
import io
import os
import signal
import sys
import tempfile
import unittest
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from traceback import format_exception

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 products are to be exact
HERE, SHARED = Path(__file__).resolve().parent, Path(tempfile.gettempdir())
sys.path[:0] = [str(HERE / "tests"), str(HERE), str(HERE / "reference")]


def own_folder(parent: str) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(dir=parent)


def exchange(source: Path, target: Path) -> None:
    """Link what MLX compiled on the CPU. It writes and reads such files in TMPDIR with
    no lock: each process has its own folder, and others get a file when it is whole."""
    for path in source.glob("mlx/*/cpu/*.so"):
        copy = target / path.relative_to(source)
        with suppress(OSError):  # is there already, or may not be written
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)


def run(name: str) -> tuple[str, str, float]:
    """What became of a test, what there is to tell of it, and its seconds of CPU."""
    log, start = io.StringIO(), sum(os.times()[:4])
    exchange(SHARED, Path(os.environ["TMPDIR"]))
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    result = unittest.TextTestRunner(log, verbosity=0).run(suite)
    exchange(Path(os.environ["TMPDIR"]), SHARED)
    reasons = ", ".join(reason for _, reason in result.skipped)
    outcome, told = ("skipped", reasons) if reasons else ("passed", "")
    if not result.wasSuccessful():
        outcome, told = "failed", log.getvalue()
    return outcome, told, sum(os.times()[:4]) - start


def find(suite: unittest.TestSuite | unittest.TestCase) -> dict[str, float]:
    """All tests by name, with the seconds that `common.slow` tells of them."""
    if isinstance(suite, unittest.TestSuite):
        return {name: s for part in suite for name, s in find(part).items()}
    name = suite.id().removeprefix("unittest.loader._FailedTest.")
    return {name: getattr(getattr(suite, suite._testMethodName), "seconds", 0)}


def is_asked(test: str, names: list[str]) -> bool:
    whole = [f".{name}." in f".{test}." for name in names]
    files = [f"{test}.".startswith(f"test_{name}.") for name in names]
    return any(whole + files) or not names


def stop(*_) -> None:
    """At SIGTERM, as at Ctrl-C: the processes end, too, and their files go."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell each test")
    args = parser.parse_args()
    found = find(unittest.defaultTestLoader.discover(str(HERE / "tests")))
    tests = [test for test in found if is_asked(test, args.names)]
    tests.sort(key=found.get, reverse=True)  # so that all processes end together
    counts = dict(passed=0, failed=0, skipped=0)
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    setup = get_context("spawn"), own_folder, (folder.name,)
    pool = ProcessPoolExecutor(os.cpu_count(), *setup)
    signal.signal(signal.SIGTERM, stop)
    print(f"{len(tests)} tests in {os.cpu_count()} processes", flush=True)
    try:
        jobs = {pool.submit(run, name): name for name in tests}
        for job in as_completed(jobs):
            if error := job.exception():  # no test's own: a file that does not compile
                outcome, told, cpu = "failed", "".join(format_exception(error)), 0
            else:
                outcome, told, cpu = job.result()
            counts[outcome] += 1
            if told or args.verbose:
                print(f"{outcome} {jobs[job]} ({cpu:.1f} s) {told}", flush=True)
    except KeyboardInterrupt:
        for process in pool._processes.values():
            process.kill()
        print(f"stopped after {sum(counts.values())} of {len(tests)} tests")
    finally:
        pool.shutdown(cancel_futures=True)
        folder.cleanup()
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(counts["failed"] > 0 or sum(counts.values()) < len(tests) or not tests)


if __name__ == "__main__":
    main()
