"""A program as a solver: one instance in by its stdin, lines of x, y and time out by its stdout, an end of its own.

What it says is data: nothing of it is run, every line is checked, and whatever it does it cannot stop the caller. A
program that ends well has an `Outcome` without a word; any other has one of `formats.PROGRAM`, NONFINITE, or
UNSUPPORTED where it said so itself, and a reason, and its lines are not looked at.
"""

import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.errors import UsageError
from bilevel.backend.compilation import user_environment
from bilevel.backend.schema import Misfit, parse_json, printable

MOST_LINES, MOST_NUMBERS = 1000, 5_000_000  # of a program; at most the first, as many as the second allows, and ten
DIGITS = 64  # characters for a number, at most, on average
LAST_WORDS = 300  # characters of stderr that are shown
PATIENCE = 1.0  # seconds for the threads to end, once the program has


class Line(NamedTuple):
    """A point that a program told."""

    x: list[float]
    y: list[float]
    time: float
    """Seconds since its start: by its own clock where it tells them, else by ours, when the line came."""
    converged: bool = False
    """Whether it says that it has converged there."""
    gradient: list[float] | None = None
    """What it says is grad F(x)."""


class Outcome(NamedTuple):
    """How a program ended."""

    word: str | None
    """None where it ended well; else of `formats.PROGRAM`, NONFINITE, or UNSUPPORTED."""
    reason: str | None
    lines: list[Line]
    """Empty where there is a word."""
    seconds: float
    """From its start to its end."""


class _Wrong(Exception):
    """What a program did wrong: (word, reason)."""


def most_lines(sizes: tuple[int, int]) -> int:
    """How many points a program may tell of so many numbers of x and y."""
    return max(10, min(MOST_LINES, MOST_NUMBERS // max(sum(sizes), 1)))


def run(command: list[str], message: bytes, seconds: float, sizes: tuple[int, int], log: Path) -> Outcome:
    """Run a program on one instance.

    Args:
        command: the program and its arguments.
        message: one line of JSON, for its stdin.
        seconds: by when it must have ended, its own start-up included; then it and its children are killed.
        sizes: numbers of x and of y.
        log: a file for its stderr.

    Raises:
        UsageError: there is no such program.
    """
    lines: list[Line] = []
    with log.open("wb") as errors:
        talk = _Talk(command, errors, longest=1000 + DIGITS * sum(sizes))
        try:
            for arrived, data in talk.said(message, seconds):
                if data.strip():
                    lines.append(_read(data, sizes, arrived, lines))
                if len(lines) > most_lines(sizes):
                    raise _Wrong("NONSENSE", f"more than {most_lines(sizes)} lines; tell fewer points")
            code = talk.process.wait(max(talk.begin + seconds - time.monotonic(), 0.0))
            if code:
                raise _Wrong("CRASHED", f"exit code {code}")
            if not lines:
                raise _Wrong("SILENT", "it ended without a line")
            wrong = None
        except (subprocess.TimeoutExpired, queue.Empty):
            said = f"{len(lines)} line{'' if len(lines) == 1 else 's'}"
            wrong = "TIMED_OUT", f"it had not ended after {seconds:g} s, {said} said; it was killed"
        except _Wrong as error:
            wrong = error.args
        finally:
            ended = time.monotonic() - talk.begin
            talk.end()
    if wrong is None:
        return Outcome(None, None, lines, ended)
    words = "" if wrong[0] == "UNSUPPORTED" else _last_words(log)
    return Outcome(wrong[0], wrong[1] + words, [], ended)


class _Talk:
    """A process, in a group of its own, and two threads, since neither reading nor writing may wait for it."""

    def __init__(self, command: list[str], errors: IO[bytes], longest: int) -> None:
        """Start it, with the variables that the user has set and not those of ours. longest: characters of a line."""
        own: dict[str, Any] = {"start_new_session": True} if os.name == "posix" else {}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        self.begin = time.monotonic()
        try:
            self.process = subprocess.Popen(command, env=user_environment(), **pipes, **own)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--command: {command[0]!r} cannot be run ({getattr(error, 'strerror', None) or error}); expected a "
                "program and its arguments, as 'julia solver.jl'. For a line of the shell say \"sh -c '…'\"."
            ) from error
        self.longest, self.over = longest, threading.Event()
        self.heard: queue.Queue[tuple[float, bytes]] = queue.Queue(100)  # one that floods waits
        self.threads: list[threading.Thread] = []

    def said(self, message: bytes, seconds: float) -> Iterator[tuple[float, bytes]]:
        """(seconds since its start, line) of all that it says, up to the end of its stdout, or until it has ended and
        nothing more comes: what it leaves behind may hold the pipe open.

        Raises:
            queue.Empty: the time is over.
            _Wrong: a line that is too long to be one.
        """
        self.threads = [threading.Thread(target=self._feed, args=(message,), daemon=True)]
        self.threads.append(threading.Thread(target=self._listen, daemon=True))
        for thread in self.threads:
            thread.start()
        ended = None
        while True:
            left = self.begin + seconds - time.monotonic()
            try:
                arrived, data = self.heard.get(timeout=max(min(left, PATIENCE / 4), 0.001))
            except queue.Empty:
                if left <= 0:
                    raise
                if ended is None and self.process.poll() is not None:
                    ended = time.monotonic()
                if ended is not None and time.monotonic() - ended >= PATIENCE:
                    return
                continue
            if len(data) > self.longest:
                raise _Wrong("NONSENSE", f"a line of more than {self.longest} characters")
            if arrived > seconds:
                raise queue.Empty
            if not data:
                return
            yield arrived, data

    def _feed(self, message: bytes) -> None:
        stdin: Any = self.process.stdin
        with suppress(OSError, ValueError):  # it may not want to read
            stdin.write(message + b"\n")
        with suppress(OSError, ValueError):
            stdin.close()

    def _listen(self) -> None:
        stdout: Any = self.process.stdout
        while not self.over.is_set():
            data = stdout.readline(self.longest + 1)
            arrived = time.monotonic() - self.begin
            while not self.over.is_set():
                with suppress(queue.Full):
                    self.heard.put((arrived, data), timeout=0.1)
                    break
            if not data or len(data) > self.longest:
                return

    def end(self) -> None:
        """Kill what is left of it, children and all."""
        self.over.set()
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join(PATIENCE)
        for pipe, thread in zip((self.process.stdin, self.process.stdout), self.threads, strict=False):
            if pipe is not None and not thread.is_alive():  # else a grandchild holds it open, in a group of its own
                with suppress(OSError):
                    pipe.close()


def _read(data: bytes, sizes: tuple[int, int], arrived: float, before: list[Line]) -> Line:
    """The point that a line tells."""
    where = f"line {len(before) + 1}"
    try:
        found = parse_json(data.decode())
    except (Misfit, UnicodeDecodeError) as error:
        raise _Wrong("NONSENSE", f"{where}: {printable(str(error))}; got {printable(repr(data[:60]))}") from None
    if isinstance(found, dict) and isinstance(found.get("refuse"), str):
        raise _Wrong("UNSUPPORTED", printable(found["refuse"][:LAST_WORDS]))
    if not isinstance(found, dict) or not {"x", "y"} <= set(found):
        raise _Wrong("NONSENSE", f'{where}: expected {{"x": […], "y": […], "time": seconds}}, got {data[:60]!r}')
    x, y = (_point(f"{where}: {name}", found[name], size) for name, size in zip("xy", sizes, strict=True))
    claim, gradient, told = found.get("converged", False), found.get("gradient"), found.get("time")
    if not isinstance(claim, bool):
        raise _Wrong("NONSENSE", f"{where}: converged: got {str(claim)[:40]!r}; expected true or false")
    if gradient is not None:
        gradient = _point(f"{where}: gradient", gradient, sizes[0])
    if told is None:
        return Line(x, y, arrived, claim, gradient)
    earlier = before[-1].time if before else 0.0
    if isinstance(told, bool) or not isinstance(told, int | float) or not earlier <= told <= arrived + 0.01:
        raise _Wrong(
            "NONSENSE",
            f"{where}: time: got {str(told)[:40]}; expected seconds since the start, from {earlier:g} (the line "
            f"before) to {arrived:.3g} (when this one came)",
        )
    return Line(x, y, float(told), claim, gradient)


def _point(where: str, found: Any, size: int) -> list[float]:
    """`size` finite numbers."""
    if not isinstance(found, list) or len(found) != size:
        got = f"{len(found)} of them" if isinstance(found, list) else type(found).__name__
        raise _Wrong("NONSENSE", f"{where}: expected a list of {size} numbers, got {got}")
    for number in found:
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise _Wrong("NONSENSE", f"{where}: expected numbers, got {str(number)[:40]!r} among them")
    try:
        numbers = [math.nan if number is None else float(number) for number in found]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise _Wrong("NONFINITE", f"{where}: NaN or an infinite number among them")
    return numbers


def _last_words(log: Path) -> str:
    """The end of what the program wrote on stderr, as a clause."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4 * LAST_WORDS))
        words = " ".join(file.read().decode(errors="replace").split())
    return f". Its last words: {printable(words[-LAST_WORDS:])}" if words else ""
