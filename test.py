"""Find and run tests/test_*.py, in as many processes as there are cores.

    python test.py [-v] [NAME ...]

NAME is a file (encodec), a class (TestEncodec) or a test (encodec.TestEncodec.test_lstm).
Nothing needs a network, torch or released weights: `reference/` holds tiny random
checkpoints in the published layouts and what the original implementations compute.
"""

import argparse
import io
import os
import sys
import tempfile
import unittest
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import current_process, get_context
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 products are to be exact
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "tests"), str(HERE), str(HERE / "reference")]


def own_folder() -> None:
    """MLX compiles into TMPDIR, where two processes must not write the same file."""
    folder = Path(tempfile.gettempdir(), f"musicgen-{current_process().name}")
    folder.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def run(name: str) -> tuple[str, str, float]:
    """What became of a test, what there is to tell of it, and its seconds of CPU."""
    log, start = io.StringIO(), sum(os.times()[:4])
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    result = unittest.TextTestRunner(log, verbosity=0).run(suite)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell each test")
    args = parser.parse_args()
    found = find(unittest.defaultTestLoader.discover(str(HERE / "tests")))
    tests = [test for test in found if is_asked(test, args.names)]
    tests.sort(key=found.get, reverse=True)  # so that all processes end together
    counts = dict(passed=0, failed=0, skipped=0)
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), own_folder)
    try:
        jobs = {pool.submit(run, name): name for name in tests}
        for job in as_completed(jobs):
            error = job.exception()
            outcome, told, cpu = ("failed", repr(error), 0) if error else job.result()
            counts[outcome] += 1
            if told or args.verbose:
                print(f"{outcome} {jobs[job]} ({cpu:.1f} s) {told}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    sys.exit(counts["failed"] > 0 or not tests)


if __name__ == "__main__":
    main()
