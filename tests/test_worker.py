"""The thread that owns the model: its queue, its models, and how work is cancelled."""

import gc
import subprocess
import sys
import threading
import time
from textwrap import dedent
from unittest.mock import patch

import mlx.core as mx
from common import ROOT, Test

import magnet
import worker
from worker import Refused, Ticket, Worker


class Steps:
    """A task that waits in each of its steps until it may go on."""

    quick = False

    def __init__(self, log: list, name: str = "", steps: int = 1):
        self.log, self.name, self.steps = log, name, steps
        self.go, self.began = threading.Event(), threading.Event()

    def run(self, worker: Worker, ticket: Ticket) -> None:
        for _ in range(self.steps):
            self.began.set()
            assert self.go.wait(10)
            worker.do_quick()
            if ticket.stops():
                return
        self.log.append(self.name)


class Quick:
    quick = True

    def run(self, worker: Worker, ticket: Ticket) -> None:
        ticket.tell("thread", name=threading.current_thread().name)


class Failing:
    quick = False

    def __init__(self, error: Exception):
        self.error = error

    def run(self, worker: Worker, ticket: Ticket) -> None:
        raise self.error


class Loading:
    quick = False

    def __init__(self, name: str):
        self.name = name

    def run(self, worker: Worker, ticket: Ticket) -> None:
        ticket.tell("loaded", same=worker.use(self.name, ticket) is worker.model)


class WorkerTest(Test):
    def setUp(self):
        super().setUp()
        self.log = []
        self.worker = self.make(magnet.load)

    def make(self, load, **options) -> Worker:
        made = Worker(load, **options)
        self.addCleanup(made.close)
        return made

    def names(self, ticket: Ticket) -> list[str]:
        return [event.name for event in ticket]

    def last(self, task) -> worker.Event:
        return [*self.worker.submit(task)][-1]


class TestQueue(WorkerTest):
    def test_order(self):
        tasks = [Steps(self.log, str(i)) for i in range(5)]
        tickets = [self.worker.submit(task) for task in tasks]
        for task in tasks:
            task.go.set()
        for ticket in tickets:
            self.assertEqual(self.names(ticket)[-1], "done")
        self.assertEqual(self.log, ["0", "1", "2", "3", "4"])
        self.assertFalse(self.worker.waiting)

    def test_places(self):
        """Each ticket is told how many are before it, and when that changes."""
        tasks = [Steps(self.log, str(i)) for i in range(3)]
        tickets = [self.worker.submit(task, str(i)) for i, task in enumerate(tasks)]
        self.assertTrue(tasks[0].began.wait(10))
        self.assertEqual((self.worker.waiting, self.worker.busy), (2, True))
        tickets[1].cancel()
        for task in tasks:
            task.go.set()
        told = [[(e.name, e.data.get("place")) for e in ticket] for ticket in tickets]
        done = ("done", None)
        self.assertEqual(told[0], [("queued", 0), done])
        self.assertEqual(told[1], [("queued", 1), ("cancelled", None)])
        self.assertEqual(told[2][:2], [("queued", 2), ("queued", 1)])
        self.assertEqual(told[2][-1], done)
        self.assertEqual(self.log, ["0", "2"])

    def test_too_many(self):
        few = self.make(magnet.load, most=2)
        tasks = [Steps(self.log) for _ in range(4)]
        few.submit(tasks[0])
        tasks[0].began.wait(10)
        few.submit(tasks[1]), few.submit(tasks[2])
        with self.assertRaisesRegex(Refused, "2 requests wait") as raised:
            few.submit(tasks[3])
        self.assertEqual(raised.exception.status, 503)
        for task in tasks:
            task.go.set()

    def test_after_is_called_once_whatever_happens(self):
        calls = []
        steps = [Steps(self.log), Steps(self.log)]
        tasks = [*steps, Failing(ValueError("no"))]
        tickets = [
            self.worker.submit(task, after=lambda i=i: calls.append(i))
            for i, task in enumerate(tasks)
        ]
        tickets[1].cancel()
        self.assertEqual(calls, [1])
        for task in steps:
            task.go.set()
        for ticket in tickets:
            self.assertTrue(ticket.ended.wait(10))
            ticket.cancel()
        self.assertEqual(calls, [1, 0, 2])

    def test_an_after_that_fails_is_not_the_workers_end(self):
        def fail():
            raise OSError("no")

        with patch("sys.stderr"):
            ticket = self.worker.submit(Failing(ValueError("why")), after=fail)
            self.assertEqual([*ticket][-1].data["error"], "why")
        self.assertEqual(self.last(Quick()).name, "done")


class TestCancel(WorkerTest):
    def test_while_it_runs(self):
        task = Steps(self.log, steps=1000)
        ticket = self.worker.submit(task)
        task.began.wait(10)
        ticket.cancel()
        task.go.set()
        self.assertEqual(self.names(ticket)[-1], "cancelled")
        self.assertEqual(self.log, [])

    def test_while_it_waits_ends_it_at_once(self):
        first = Steps(self.log)
        self.worker.submit(first)
        ticket = self.worker.submit(Steps(self.log, "never"), "mine")
        first.began.wait(10)
        self.assertTrue(self.worker.cancel("mine"))
        self.assertTrue(ticket.ended.is_set())
        self.assertFalse(self.worker.cancel("mine"))
        self.assertFalse(self.worker.cancel("other"))
        first.go.set()

    def test_what_is_done_is_done(self):
        """A cancel that comes after the last look changes nothing."""

        class Late(Quick):
            def run(self, worker, ticket):
                ticket.cancel()

        self.assertEqual(self.last(Late()).name, "done")

    def test_close_ends_all(self):
        running, waiting = Steps(self.log, steps=9), Steps(self.log)
        tickets = [self.worker.submit(task) for task in (running, waiting)]
        running.began.wait(10)
        threading.Timer(0.05, running.go.set).start()
        self.assertTrue(self.worker.close())
        self.assertEqual([self.names(t)[-1] for t in tickets], ["cancelled"] * 2)
        with self.assertRaisesRegex(Refused, "ending"):
            self.worker.submit(Steps(self.log))


class TestQuick(WorkerTest):
    def test_between_the_steps_of_another(self):
        task = Steps(self.log, steps=2)
        long = self.worker.submit(task)
        task.began.wait(10)
        ticket = self.worker.submit(Quick())
        task.go.set()
        self.assertEqual(next(iter(ticket)).data, {"name": "worker"})
        self.assertEqual(self.names(long)[-1], "done")

    def test_alone(self):
        self.assertEqual(self.names(self.worker.submit(Quick())), ["thread", "done"])


class TestErrors(WorkerTest):
    def test_have_a_status_and_a_line(self):
        for error, status in (
            (ValueError("bad\nvalue"), 400),
            (Refused(409, "gone"), 409),
            (FileNotFoundError("no file"), 400),
            (OSError("a.wav could not be written: the disk is full"), 507),
            (OSError(28, "No space left on device"), 507),
            (OSError("The Hub did not give it"), 502),
            (OSError("no"), 500),
            (RuntimeError("out of memory"), 500),
        ):
            with self.subTest(error):
                event = self.last(Failing(error))
                line = " ".join(str(error).split())
                self.assertEqual(event, ("error", dict(error=line, status=status)))

    def test_a_fault_of_ours_is_told_and_survived(self):
        with patch("sys.stderr") as err:
            self.assertEqual(
                self.last(Failing(ZeroDivisionError())).data["status"], 500
            )
        written = "".join(call.args[0] for call in err.write.call_args_list)
        self.assertIn("ZeroDivisionError", written)
        self.assertEqual(self.last(Quick()).name, "done")


class TestModels(WorkerTest):
    def test_loaded_when_it_is_asked_for(self):
        self.assertIsNone(self.worker.name)
        names = self.names(self.worker.submit(Loading("tiny")))
        self.assertEqual(names, ["queued", "loading", "loaded", "done"])
        names = self.names(self.worker.submit(Loading("tiny")))
        self.assertEqual(names, ["queued", "loaded", "done"])
        self.assertEqual(self.worker.name, "tiny")

    def test_what_does_not_load(self):
        """The worker lives on, and keeps the model where the other is not even there."""
        self.last(Loading("tiny"))
        with patch("worker.fetch", side_effect=OSError("no network")):
            event = self.last(Loading("large"))
        self.assertEqual(event.data, dict(error="no network", status=502))
        self.assertEqual(self.worker.name, "tiny")
        event = self.last(Loading("no such"))
        self.assertEqual(event.data["status"], 404)
        (self.folder / "config.json").write_text("{}")
        event = self.last(Loading(str(self.folder)))
        self.assertEqual((event.name, event.data["status"]), ("error", 400))
        self.assertEqual((self.worker.name, self.worker.loading), (None, False))
        self.assertEqual(self.last(Loading("tiny")).name, "done")

    def test_memory_is_given_back(self):
        """Before the next model comes: never are both there."""
        gc.collect()
        before = mx.get_active_memory()  # of other tests of this process
        self.last(Loading("tiny"))
        peaks, first = [], mx.get_active_memory() - before

        def load(name):
            peaks.append(mx.get_active_memory() - before)
            return magnet.load(name)

        with patch.object(self.worker, "_load", load):
            for _ in range(3):
                self.last(Loading("tiny-magnet"))
                self.last(Loading("tiny"))
        self.assertLess(max(peaks), first / 10)
        gc.collect()
        self.assertLess(mx.get_active_memory() - before, first * 1.05)


class TestStandsBy(Test):
    def test_a_script_that_ends_takes_the_thread_along(self):
        """Also one that forgets to close it, in the middle of a take."""
        script = f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}]
            import magnet
            from forms import Form
            from takes import Takes
            from tasks import Generate, Limits, read_order
            from worker import Worker

            order = read_order(Form(dict(prompt="a", duration=60)), Limits("tiny"))
            ticket = Worker(magnet.load).submit(Generate(Takes({str(self.folder)!r}), order))
            while next(iter(ticket)).name != "progress":
                pass
            print("over")
        """
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", dedent(script)], capture_output=True, text=True
        )
        self.assertEqual((done.returncode, done.stdout), (0, "over\n"), done.stderr)
        self.assertLess(time.monotonic() - began, 30)
