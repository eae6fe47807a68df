"""One thread that owns the model: what is asked of it waits in a queue, and tells how it
goes on.

    worker = Worker(load)  # load(name) gives a model; it is called in the thread
    ticket = worker.submit(task)
    for event in ticket:  # "queued", "loading", what the task tells, then one of LAST
        print(event.name, event.data)
    ticket.cancel()  # from any thread, at any time

MLX is touched by that thread alone. It waits for nobody: events pile up in a ticket until
they are taken. A task is any object with `quick` and `run(worker, ticket)`, see `Task`;
those of the page are in tasks.py. Models go by the names of hub.py. Needs hub.py,
messages.py and strict.py beside it.
"""

import atexit
import errno
import gc
import queue
import secrets
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from hub import check_name, fetch, local, same_model
from messages import one_line

LAST = ("done", "cancelled", "error")  # one of these ends a ticket
MOST = 100  # tasks that wait


class Event(NamedTuple):
    """What happened, such as "progress", and what belongs to it."""

    name: str
    data: dict[str, Any]


class Refused(ValueError):
    """What cannot be done, with the status of HTTP that says so."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Task(Protocol):
    """What is to be done. A `quick` one is done between two steps of another, which it
    holds up for less than a second; it does not touch the model."""

    quick: bool

    def run(self, worker: "Worker", ticket: "Ticket") -> None:
        """Do it, in the worker's thread, and tell the ticket. Whatever it raises ends
        the ticket with an error. It looks at `ticket.stops()` again and again."""


class Ticket:
    """A task in the queue, or under way: iterate to hear what happens, up to the last
    event. One thread listens. `ended` is set with the last event, and `heeded` says
    whether the task was told to stop."""

    def __init__(self, id: str, task: Task, after: Callable[[], None] | None = None):
        self.id, self.task, self.ended = id, task, threading.Event()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._stop, self.heeded, self._place = threading.Event(), False, -1
        self._after, self._withdraw = after, lambda ticket: None

    def __iter__(self) -> Iterator[Event]:
        while True:
            yield (event := self._events.get())
            if event.name in LAST:
                return

    def next(self, seconds: float) -> Event | None:
        """The next event, or None if there was none for so many seconds."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    def tell(self, name: str, /, **data: Any) -> None:
        """Add an event."""
        self._events.put(Event(name, data))

    def cancel(self) -> None:
        """Stop it: at once where it waits, else after the step at hand. What was made by
        then stays. Of a ticket that has ended nothing changes."""
        self._stop.set()
        self._withdraw(self)

    def stops(self) -> bool:
        """Whether the task must stop. Once it was told so it has to: its ticket ends as
        cancelled."""
        self.heeded = self.heeded or self._stop.is_set()
        return self.heeded

    def _at(self, place: int) -> None:
        if place != self._place:
            self._place = place
            self.tell("queued", id=self.id, place=place)

    def _end(self, name: str, /, **data: Any) -> None:
        try:
            if self._after:
                self._after()
        except Exception:  # such as a folder that cannot be removed
            traceback.print_exc(file=sys.stderr)
        self.tell(name, **data)
        self.ended.set()


class Worker:
    """The thread, its queue and its model.

    `load` gives a model by its name, and raises ValueError or OSError; `most` tasks may
    wait. `model` is None, and so is `name`, until a task asks for one.
    """

    def __init__(self, load: Callable[[str], Any], most: int = MOST):
        self.model: Any = None
        self.name: str | None = None
        self.loading = False
        self._load, self._most = load, most
        self._waiting: deque[Ticket] = deque()
        self._quick: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # MLX must not be at work when Python ends

    @property
    def busy(self) -> bool:
        """Whether a task is under way."""
        return self._current is not None

    @property
    def waiting(self) -> int:
        """Tasks that wait."""
        return len(self._waiting)

    def submit(
        self,
        task: Task,
        id: str | None = None,
        after: Callable[[], None] | None = None,
    ) -> Ticket:
        """Put a task at the end of the queue, under an `id` of one's own or any.

        `after` is called once it has ended, whatever became of it, before the last event
        is told. The first event is `queued`, with the `place`: how many tasks are before
        it. Raises Refused (503) where too many wait; then `after` is not called.
        """
        ticket = Ticket(id or secrets.token_hex(8), task, after)
        ticket._withdraw = self._withdraw
        with self._changed:
            line = self._quick if task.quick else self._waiting
            if self._closed:
                raise Refused(503, "The server is ending.")
            if len(line) >= self._most:
                raise Refused(
                    503, f"{self._most} requests wait already: try again later."
                )
            line.append(ticket)
            self._tell_places()
            self._changed.notify()
        return ticket

    def cancel(self, id: str) -> bool:
        """Cancel the ticket of that id; whether there is one that has not ended."""
        with self._changed:
            tickets = [self._current, *self._waiting, *self._quick]
            found = next((t for t in tickets if t and t.id == id), None)
        if found:
            found.cancel()
        return found is not None

    def close(self, seconds: float = 10.0) -> bool:
        """Cancel all and end the thread; whether it ended in time. What has an end of
        its own, such as loading, is waited for."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            tickets = [self._current, *self._waiting, *self._quick]
            self._changed.notify()
        for ticket in filter(None, tickets):
            ticket.cancel()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def use(self, name: str, ticket: Ticket) -> Any:
        """The model of that name, in the worker's thread: loaded unless it is there, after
        the other one's memory was given back. Raises Refused."""
        if self.name is not None and same_model(name, self.name):
            return self.model
        try:
            check_name(name)
        except ValueError as error:
            raise Refused(404, str(error)) from None
        ticket.tell("loading", model=name)
        self.loading = True
        try:
            if local(name) is None:
                fetch(name)  # before the other one goes
            self._forget()
            self.model, self.name = self._load(name), name
        except OSError as error:  # a folder's fault, or the Hub's
            raise Refused(400 if local(name) else 502, str(error)) from error
        finally:
            self.loading = False
        return self.model

    def do_quick(self) -> None:
        """Do what is quick and waits, in the worker's thread, between two steps."""
        while self._quick:
            with self._changed:
                ticket = self._quick.popleft() if self._quick else None
            if ticket:
                self._do(ticket)

    def _forget(self) -> None:
        """Give the memory of the model back."""
        self.model = self.name = None
        gc.collect()
        mx.clear_cache()

    def _withdraw(self, ticket: Ticket) -> None:
        """Take a ticket that waits out of the queue."""
        with self._changed:
            line = next((q for q in (self._waiting, self._quick) if ticket in q), None)
            if line is None:
                return
            line.remove(ticket)
            self._tell_places()
        ticket._end("cancelled")

    def _tell_places(self) -> None:
        running = int(self._current is not None)
        for place, ticket in enumerate(self._waiting, running):
            ticket._at(place)

    def _work(self) -> None:
        try:
            self._do_all()
        finally:
            self._forget()
            mx.clear_streams()  # whose threads must end before Python does

    def _do_all(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._tell_places()
                while not (self._waiting or self._quick or self._closed):
                    self._changed.wait()
                if self._closed and not self._waiting:
                    return
                if self._waiting:
                    self._current = self._waiting.popleft()
            self.do_quick()
            if self._current:
                self._do(self._current)

    def _do(self, ticket: Ticket) -> None:
        try:
            if not ticket.stops():
                ticket.task.run(self, ticket)
        except Exception as error:
            if not isinstance(error, OSError | RuntimeError | ValueError):
                traceback.print_exc(file=sys.stderr)  # a fault of ours
            said = one_line(str(error) or type(error).__name__)
            ticket._end("error", error=said, status=status_of(error))
        else:
            ticket._end("cancelled" if ticket.heeded else "done")


def status_of(error: Exception) -> int:
    """The status of HTTP for an error: 400 for what was asked wrongly, 502 for what the
    Hub did not give, 507 for what could not be written, 500 for what is nobody's fault.
    """
    if hasattr(error, "status"):
        return error.status
    if isinstance(error, ValueError | FileNotFoundError):
        return 400
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or " could not be written: " in str(error):  # as outputs.py says it
        return 507
    return 502 if str(error).startswith("The Hub did not give") else 500
