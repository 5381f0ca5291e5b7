"""One process per home that keeps the others running, and the orderly end of them all.

Components do not die with their supervisor: they are found again by their records. So a supervisor that was killed is
replaced by running `up` again, and `down` needs none. But when somebody deletes the home, records and all, nobody could
find them again: then the supervisor stops them and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc import __version__
from edif_hpc.core.endpoints import embedded_ports
from edif_hpc.core.errors import ComponentError, EdifError
from edif_hpc.core.home import Home

from . import ports, process, state
from .components import STOP_SECONDS, Component
from .process import Record

BACKOFF_SECONDS = (0.2, 1.0, 5.0, 15.0, 60.0)
HEAD_START_SECONDS = 2.0
SETTLED_SECONDS = 30.0
"""A component that lived this long has recovered: its next death starts the back-off anew."""
BUSY_POLL_SECONDS = 0.05
CALM_POLL_SECONDS = 0.5
ROTATE_SECONDS = 30.0
LET_GO_SECONDS = 5.0
LET_GO = signal.SIGUSR1
RETRY = signal.SIGUSR2
GONE_SECONDS = 2.0
"""A home that is missing for this long was deleted; shorter, it may be a file system that stumbles."""
SUPERVISOR = "supervisor"
GATEWAY = "gateway"
WORKER = "worker"
SUCCESSOR = "gateway-next"
"""A gateway that starts beside the one that runs; see takeover.py."""
MANY = (GATEWAY, WORKER)
"""Kinds of which several may run, each told to end before any of them is waited for."""
STOP_ORDER = ("fleet", WORKER, "gateway", "store", "relay", "redis")

Tell = Callable[[str], None]


@dataclass
class Kept:
    """One component and how it fares."""

    component: Component
    record: Record | None = None
    child: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    due: float = 0.0
    since: float = 0.0
    answered: bool = False

    @property
    def alive(self) -> bool:
        if self.child:
            return self.child.poll() is None
        return self.record is not None and self.record.alive


class Supervisor:
    """Starts what is missing, restarts what dies, until a signal says otherwise."""

    def __init__(
        self, home: Home, components: list[Component], tell: Tell, ready: Callable[[], None] = lambda: None
    ) -> None:
        self.home = home
        self.tell = tell
        self.ready = ready
        self.began = time.monotonic()
        self.kept = {component.name: Kept(component) for component in components}
        self.known: dict[str, Record] = {}
        """Everything that lives, workers included, remembered for the day the home is gone."""
        self._successor: subprocess.Popen[bytes] | None = None
        self._draining: list[subprocess.Popen[bytes]] = []
        self._folder = _identity(home)
        self._missing_since: float | None = None

    def run(self) -> signal.Signals:
        """Keep everything running; returns the signal that ended it. LET_GO leaves the components as they are.

        Raises:
            ComponentError: the home was deleted; everything is stopped.
        """
        ending = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LET_GO}
        awaited = {*ending, RETRY, signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
        try:
            with process.recorded(self.home, SUPERVISOR):
                self._adopt()
                return self._until(ending, awaited)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _until(self, ending: set[signal.Signals], awaited: set[signal.Signals]) -> signal.Signals:
        rotated = time.monotonic()
        announced = False
        while True:
            if self._deleted():
                self._stop_known()
                raise ComponentError(f"The home {self.home.root} was deleted or moved; all that ran in it is stopped.")
            pending = self._keep_all()
            self._look_after_gateways()
            if not announced and self._answers("gateway"):
                announced = True
                self.ready()
            busy = pending or self._successor
            heard = signal.sigtimedwait(awaited, BUSY_POLL_SECONDS if busy else CALM_POLL_SECONDS)
            if heard and heard.si_signo in ending:
                return signal.Signals(heard.si_signo)
            if heard and heard.si_signo == RETRY:
                for kept in self.kept.values():
                    kept.due, kept.deaths = 0.0, 0
                self._replace_gateway()
            if time.monotonic() - rotated > ROTATE_SECONDS:
                rotated = time.monotonic()
                for log in self.home.logs.glob("*.log"):
                    process.rotate(log)
                process.remove_old_logs(self.home)

    def _deleted(self) -> bool:
        """Whether the home is gone for good; another one at the same path is not ours. Else note what lives in it."""
        if _identity(self.home) == self._folder:
            self._missing_since = None
            seen = {record.name: record for record in process.records(self.home) if record.pid != os.getpid()}
            self.known = {name: record for name, record in {**self.known, **seen}.items() if record.alive}
            return False
        self._missing_since = self._missing_since or time.monotonic()
        return time.monotonic() - self._missing_since > GONE_SECONDS

    def _stop_known(self) -> None:
        for name in STOP_ORDER:
            _stop(name, [record for record in self.known.values() if _is(record, name)], self.tell)
        for kept in self.kept.values():
            if kept.child and kept.child.poll() is None:  # started in the last moment, before anybody saw its record
                kept.child.kill()
                kept.child.wait()

    def _keep_all(self) -> list[Kept]:
        """Look after every component; those about which something is pending."""
        if self._missing_since is not None:
            return []
        try:
            return [kept for kept in self.kept.values() if not self._keep(kept)]
        except FileNotFoundError:
            if _identity(self.home) == self._folder:
                raise
            return []

    def _adopt(self) -> None:
        """Take over what an earlier supervisor left running."""
        state.write_failures(self.home, {})
        restart_file(self.home).unlink(missing_ok=True)
        for name, kept in self.kept.items():
            kept.record = process.living(self.home, name)
            if kept.record:
                kept.since = time.monotonic()
                self.tell(f"{name} runs already (pid {kept.record.pid})")

    def _keep(self, kept: Kept) -> bool:
        """Look after one component. True when nothing about it is pending."""
        now = time.monotonic()
        if kept.alive:
            if kept.deaths and now - kept.since > SETTLED_SECONDS:
                kept.deaths = 0
                self._write_failures()
            if not kept.answered:
                kept.answered = kept.component.answers()
            return kept.answered
        if self._successor and kept.component.name == GATEWAY:
            return False  # the next one is on its way
        if kept.record:
            self._mourn(kept, now)
        head_start = kept.component.after if now - self.began < HEAD_START_SECONDS else ()
        if now >= kept.due and all(self._answers(name) for name in (*kept.component.needs, *head_start)):
            self._start(kept, now)
        return False

    def _answers(self, name: str) -> bool:
        kept = self.kept.get(name)
        return kept is None or (kept.alive and kept.answered)

    def _mourn(self, kept: Kept, now: float) -> None:
        name = kept.component.name
        how = _how_it_ended(kept.child)
        pause = BACKOFF_SECONDS[min(kept.deaths, len(BACKOFF_SECONDS) - 1)]
        kept.deaths += 1
        kept.due = now + pause
        if kept.record:
            process.forget(self.home, kept.record)
        kept.record, kept.child, kept.answered = None, None, False
        self.tell(f"{name} {how}; starting it again in {pause:g} s (see `edif-hpc logs {name}`)")
        self._write_failures()

    def _start(self, kept: Kept, now: float) -> None:
        component = kept.component
        before = embedded_ports(self.home).get(component.name)
        try:
            command = component.command()
            kept.child = process.spawn(
                self.home,
                component.name,
                command,
                address=component.address(),
                environment=component.environment,
                folder=component.folder,
            )
        except (EdifError, OSError, subprocess.SubprocessError) as error:
            kept.deaths += 1
            kept.due = now + BACKOFF_SECONDS[min(kept.deaths, len(BACKOFF_SECONDS)) - 1]
            self.tell(f"{component.name} cannot start: {error}")
            self._write_failures()
            return
        kept.record = process.read(self.home, component.name)
        kept.since = now
        self.tell(f"{component.name} started (pid {kept.child.pid})")
        if before and embedded_ports(self.home).get(component.name) != before:
            self._readdress(component.name)

    def _replace_gateway(self) -> None:
        """Start a gateway that takes over from the one that runs, if somebody asked for it."""
        kept = self.kept.get(GATEWAY)
        if not restart_file(self.home).exists() or self._successor or not kept:
            return
        if not kept.alive:  # a new one starts anyway
            restart_file(self.home).unlink(missing_ok=True)
            return
        component = kept.component
        try:
            self._successor = process.spawn(
                self.home,
                SUCCESSOR,
                [*component.command(), "--takeover"],
                address=component.address(),
                environment=component.environment,
                log=GATEWAY,
            )
        except (EdifError, OSError, subprocess.SubprocessError) as error:
            self.tell(f"the new gateway cannot start: {error}")
            restart_file(self.home).unlink(missing_ok=True)

    def _look_after_gateways(self) -> None:
        """See whether a new gateway has taken over, and forget those that have drained."""
        self._draining = [child for child in self._draining if child.poll() is None]
        if self._missing_since is not None:
            return
        for path in self.home.run.glob(f"{GATEWAY}-*{process.RECORD_SUFFIX}"):
            record = process.read(self.home, path.stem)
            if record and record.here and not record.alive:
                process.forget(self.home, record)
        if not self._successor:
            return
        kept, record = self.kept[GATEWAY], process.living(self.home, GATEWAY)
        if record and record.pid == self._successor.pid:
            if kept.child:
                self._draining.append(kept.child)
            kept.record, kept.child, kept.since, kept.answered = record, self._successor, time.monotonic(), True
            self.tell(f"a new gateway serves (pid {record.pid}); the old one drains")
        elif self._successor.poll() is not None:
            self.tell(f"the new gateway {_how_it_ended(self._successor)}; the old one goes on")
        else:
            return
        self._successor = None
        restart_file(self.home).unlink(missing_ok=True)

    def _readdress(self, moved: str) -> None:
        """Restart those who know the old address of a component that had to move to another port."""
        self.tell(f"{moved} moved to another port: restarting those who use it")
        for kept in self.kept.values():
            if moved in kept.component.follows and kept.record and kept.alive:
                process.stop(kept.record, STOP_SECONDS[kept.component.name], family=False)
        for record in _workers(self.home):
            process.stop(record, LET_GO_SECONDS)

    def _write_failures(self) -> None:
        state.write_failures(self.home, {name: kept.deaths for name, kept in self.kept.items() if kept.deaths})


def restart_file(home: Home) -> Path:
    """There while somebody waits for a new gateway."""
    return home.run / "restart"


def _how_it_ended(child: subprocess.Popen[bytes] | None) -> str:
    if child is None or child.returncode is None:
        return "ended"
    if child.returncode < 0:
        return f"was killed by {signal.Signals(-child.returncode).name}"
    return f"ended with status {child.returncode}"


def refuse_foreign(home: Home) -> None:
    """Raise ComponentError when another version, or another machine, has components of this home."""
    for record in process.records(home):
        if not record.here:
            raise ComponentError(
                f"The home {home.root} is in use on {record.host}: run `edif-hpc down` there, or, if that machine is "
                f"gone, remove {process.path_of(home, record.name)}."
            )
        if record.alive and record.version != __version__:
            raise ComponentError(
                f"The {record.name} running in {home.root} is of version {record.version} and this is {__version__}: "
                "run `edif-hpc down` first."
            )


def let_go(home: Home) -> None:
    """End the supervisor of a home, if there is one, without touching its components."""
    record = process.living(home, SUPERVISOR)
    if record and record.pid != os.getpid():
        process.stop(record, LET_GO_SECONDS, how=LET_GO, family=False)


def stop_all(home: Home, tell: Tell, *, forget: bool = True) -> list[str]:
    """Stop every component of this home on this machine, in order. Returns what had to be killed.

    Args:
        forget: what `up` was told; not while allocations go on, which get successors by it.
    """
    killed = [each for name in STOP_ORDER for each in stop_kind(home, name, tell)]
    if forget:
        state.forget_up(home)
    return killed


def stop_kind(home: Home, name: str, tell: Tell) -> list[str]:
    """Stop the component of this name, or all workers or gateways on this machine. Returns what had to be killed."""
    many = [record for record in process.records(home) if record.here and _is(record, name)]
    found = many if name in MANY else [record for record in [process.read(home, name)] if record]
    killed = _stop(name, found, tell)
    for record in found:
        process.forget(home, record)
    if name == "store":
        ports.remove_sockets(embedded_ports(home))
    return killed


def _stop(name: str, found: list[Record], tell: Tell) -> list[str]:
    """Stop all that is recorded of one kind. Returns what had to be killed."""
    killed = []
    alive = [record for record in found if record.alive]
    told = name in MANY
    if told:  # once each: a gateway takes a second word for impatience
        for record in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGTERM)
    for record in alive:
        tell(f"stopping {record.name} …")
        how = None if told else signal.SIGTERM
        ended = process.stop(record, STOP_SECONDS[name], how=how, family=name != "fleet")
        if not ended and name != "store":
            killed.append(record.name)
            tell(f"{record.name} did not end within {STOP_SECONDS[name]:g} s and was killed")
    return killed


def _workers(home: Home) -> list[Record]:
    return [record for record in process.records(home) if record.here and _is(record, WORKER)]


def _is(record: Record, kind: str) -> bool:
    return record.name == kind or (kind in MANY and record.name.startswith(f"{kind}-"))


def _identity(home: Home) -> tuple[int, int] | None:
    """Which folder holds the records, or None while there is none."""
    try:
        info = home.run.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return info.st_dev, info.st_ino
