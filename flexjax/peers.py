"""The other processes of a job: what each has said, who is alive, and how all of them end.

    alive    jax's coordination service, in process 0, hears every process's heartbeats. They come from C++ threads, so a long
             call that holds Python's lock is no death.
    said     goes through the service's key-value store, never through the devices: it works in any thread, whatever the
             devices do.
    gone     one thread watches who is alive, another what was said. Whoever is gone ends everybody else: one line on stderr
             and exit code 75, from that thread, since the main thread may be stuck in a collective.

A process that loses process 0, and the service with it, is aborted by jax's client, at once if the connection closes. It asks
nobody before, so the signal is caught (`on_abort`), and the process leaves with the same line and exit code.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from flexjax import errors

HEARTBEAT_SECONDS = 15  # a process that was not heard for so long is gone; the others have left some 2 s later
WATCH_SECONDS = 1.0  # between two looks at the others
HURRY_SECONDS = 0.05  # the same while something is being agreed
GRACE_SECONDS = 5.0  # in which a process may meet by itself the error that another one announced
LEAVE_SECONDS = 15.0  # a process that has announced its end takes at most so long
BOARD = "flexjax/board/"  # keys: end/I, the exit code of process I; wish/I, it was asked to stop; calls/I, how far it was
AGAIN = "start the same command again on all hosts; committed steps are kept"

_abort_handlers: list[Any] = []  # C code holds their addresses, so they stay


def on_abort(react: Callable[[], None] | None) -> None:
    """Calls `react` when C++ code aborts this process, in whatever thread; if it returns, the abort goes on.

    With None an abort is an abort again.
    """
    address = ctypes.c_void_p(None)
    if react:
        _abort_handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: react()))
        address = ctypes.cast(_abort_handlers[-1], ctypes.c_void_p)
    set_handler = ctypes.CDLL(None).signal  # Python's own would wait for the main thread
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    set_handler(signal.SIGABRT, address)


def leave(line: str, code: int) -> NoReturn:
    """Ends the process at once with a line on stderr, from any thread, without a wait for anything."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
    finally:  # nobody may listen any more
        os._exit(code)


class Peers:
    """All processes of a job, seen from one of them.

    Args:
      client: of the coordination service.
      index, count: of this process, and how many there are.
    """

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._client = client
        self._answered = self._complete = time.monotonic()  # when the store answered; when all were alive
        self._ends: dict[int, int] = {}  # exit codes, as announced
        self._ending: int | None = None  # ours
        self._lost: set[int] = set()
        self._rounds: Counter[str] = Counter()
        self._leaving = threading.Lock()
        self._news, self._alone, self._over = threading.Event(), threading.Event(), threading.Event()
        self._boundary = threading.Condition()
        self._calls, self._wanted, self._counted, self._last = 0, False, False, sys.maxsize
        self.hosts = ["its host"] * count
        on_abort(self._aborted)
        try:
            client.key_value_set(f"flexjax/host/{index}", socket.gethostname())
        except jax.errors.JaxRuntimeError:  # it is there
            self._stop(f"process {index} was started while others still ran with an earlier one", announced=False)
        self._born = self._alive()  # waits for all; a process that is started again gets another number
        if len(self._born) < count:
            self._stop("a process was gone before all had begun")
        self.hosts = [host for _, host in sorted(self._said("flexjax/host/").items(), key=lambda item: int(item[0]))]
        self._threads = [threading.Thread(target=task, daemon=True) for task in (self._watch_alive, self._watch_board)]
        for thread in self._threads:
            thread.start()

    def who(self, number: int) -> str:
        """A process, for whoever reads a message."""
        return f"process {number} on {self.hosts[number]}"

    def exchange(self, name: str, value: Any, timeout: float) -> list[Any]:
        """Everybody's values, by process; `distributed.exchange` says more."""
        self._rounds[name] += 1
        folder = f"flexjax/exchange/{urllib.parse.quote(name, safe='')}/"
        this_round = f"{folder}{self._rounds[name]}/"
        self._client.key_value_set(f"{this_round}{self.index}", json.dumps(value))
        end, pause = time.monotonic() + timeout, 0.005
        while len(values := self._said(this_round)) < self.count:
            if time.monotonic() > end:
                missing = ", ".join(self.who(number) for number in range(self.count) if str(number) not in values)
                raise errors.Preempted(f"{missing} did not come to '{name}' within {timeout:g} s; {AGAIN}")
            time.sleep(pause)  # not inside the service: signals are to be heard
            pause = min(1.5 * pause, 0.25)
        if self.index == 0:  # all are here, so all have read the round before
            self._client.key_value_delete(f"{folder}{self._rounds[name] - 1}/")
        return [json.loads(values[str(number)]) for number in range(self.count)]

    def stop_requested(self, wanted: bool) -> bool:
        """Whether all stop at this boundary; `distributed.stop_requested` says more."""
        with self._boundary:
            if wanted and not self._wanted:
                self._wanted = True
                self._news.set()
            while self._counted and self._last == sys.maxsize:  # once, until everybody's count is known
                self._boundary.wait()
            self._calls += 1
            return self._calls >= self._last

    def finish(self, code: int) -> None:
        """Announces this process's end; `distributed.finish` says more."""
        if self._ending or self._over.is_set():
            return
        self._ending = code
        self._news.set()
        self._announce(code)
        if code:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):  # it is ending already
                    signal.signal(number, signal.SIG_IGN)
            end = threading.Timer(LEAVE_SECONDS, os._exit, [code])
            end.daemon = True
            end.start()
            atexit.register(_leave_quietly, code)  # runs before jax's, which waits for the devices and the others
            self._outlast(GRACE_SECONDS + 4 * WATCH_SECONDS)
            return
        while len(self._ends) < self.count or self._failed():  # if one has failed, a thread ends this process
            time.sleep(HURRY_SECONDS)
        if self.index == 0:
            self._alone.wait(LEAVE_SECONDS)
        self._over.set()
        self._news.set()
        jax.distributed.shutdown()
        on_abort(None)
        for thread in self._threads:  # one that is inside C++ while the interpreter ends would crash the process
            thread.join(WATCH_SECONDS)
        if any(thread.is_alive() for thread in self._threads):
            atexit.register(_leave_quietly, code)

    def _announce(self, code: int) -> None:
        self._call_store(self._client.key_value_set, f"{BOARD}end/{self.index}", str(code), True)

    def _call_store(self, function: Callable[..., Any], *arguments: Any) -> bool:
        """Whether a call came back, in a second: the store may be what is gone."""
        done = threading.Event()

        def call() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                function(*arguments)
                done.set()

        threading.Thread(target=call, daemon=True).start()
        return done.wait(1.0)

    def _outlast(self, seconds: float) -> None:
        """Keeps the store, which is in process 0, until the others have read there that this is the end."""
        until = time.monotonic() + seconds
        while self.index == 0 and len(self._lost | set(self._failed())) < self.count - 1 and time.monotonic() < until:
            time.sleep(HURRY_SECONDS)
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._read_board()

    def _failed(self) -> list[int]:
        """The others that ended with an error, or else were asked to stop or followed one that did."""
        failed = [number for number, code in self._ends.items() if code and number != self.index]
        return sorted(failed, key=lambda number: (self._ends[number] == errors.Preempted.exit_code, number))

    def _said(self, folder: str) -> dict[str, str]:
        return {key.removeprefix(folder): value for key, value in self._client.key_value_dir_get(folder)}

    def _alive(self) -> dict[int, int]:
        """A number for each process that lives; waits until all of these have asked."""
        return dict(self._client.get_live_nodes(list(range(self.count))))

    def _watch_alive(self) -> None:
        while not self._over.wait(WATCH_SECONDS if self._ending is None else HURRY_SECONDS):
            try:
                alive = self._alive()
                gone = [number for number in range(self.count) if alive.get(number) != self._born[number]]
                if gone:
                    self._read_board()
            except jax.errors.JaxRuntimeError:
                continue  # lost process 0; the abort handler sees to it
            if not gone:
                self._complete = time.monotonic()
            elif lost := set(gone) - set(self._ends):
                self._lost = lost
                self._stop(self._gone(self.index if self.index in lost else min(lost), self._complete))
            elif len(alive) == 1:
                self._alone.set()

    def _watch_board(self) -> None:
        failed_since = None
        while not self._over.is_set():
            try:
                said = self._read_board()
                hurry = self._agree_on_stop(said) or self._ending is not None
            except jax.errors.JaxRuntimeError:
                hurry = False
            if failed := self._failed():
                failed_since = failed_since or time.monotonic()
                if self._ending == 0 or time.monotonic() > failed_since + GRACE_SECONDS:
                    self._stop(
                        f"{self.who(failed[0])} ended with exit code {self._ends[failed[0]]}, its own last line says why"
                    )
            self._news.wait(HURRY_SECONDS if hurry else WATCH_SECONDS)
            self._news.clear()

    def _read_board(self) -> dict[str, str]:
        said = self._said(BOARD)
        self._answered = time.monotonic()
        self._ends = {int(key.removeprefix("end/")): int(code) for key, code in said.items() if key.startswith("end/")}
        return said

    def _agree_on_stop(self, said: dict[str, str]) -> bool:
        """One round of `stop_requested`; whether an answer is still due."""
        with self._boundary:
            if self._last < sys.maxsize:
                return False
            if self._wanted and f"wish/{self.index}" not in said:
                self._client.key_value_set(f"{BOARD}wish/{self.index}", "", allow_overwrite=True)
            if not self._counted and (self._wanted or any(key.startswith("wish/") for key in said)):
                self._counted = True  # from now on nobody passes a boundary here
                self._client.key_value_set(f"{BOARD}calls/{self.index}", str(self._calls))
            calls = [int(value) for key, value in said.items() if key.startswith("calls/")]
            if len(calls) == self.count:
                self._last = max(calls) + 1
                self._boundary.notify_all()
                return False
            return self._counted

    def _aborted(self) -> None:
        """Tells an abort by jax's client, which then holds its own lock, from one by other C++ code of this process."""
        if self._over.is_set():
            os._exit(self._ending or 0)
        if not self._call_store(self._client.get_live_nodes, [self.index]):
            self._stop(self._gone(0, self._answered), announced=False)
        on_abort(None)

    def _gone(self, number: int, last_heard: float) -> str:
        seconds = time.monotonic() - last_heard
        if number == self.index:
            return f"this process stood still or was cut off for {seconds:.0f} s, and is given up by the others"
        return f"{self.who(number)} is gone since {seconds:.0f} s"

    def _stop(self, reason: str, announced: bool = True) -> None:
        """Ends this process because of another one: with a line, unless it is ending with one of its own."""
        if self._ending or not self._leaving.acquire(blocking=False):
            threading.Event().wait()
        if announced:
            self._announce(errors.Preempted.exit_code)
            self._outlast(2 * WATCH_SECONDS)
        leave(f"stopped: {reason}; {AGAIN}", errors.Preempted.exit_code)


def _leave_quietly(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)
