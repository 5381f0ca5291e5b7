"""Bringing a home up and down: the checks before, the waiting after, and who supervises in between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from edif_hpc.core.endpoints import redis_endpoint
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home
from edif_hpc.core.settings import Settings

from . import ahead, embedded, network, ports, process, state
from .components import components, gateway_answers, own_command, own_environment
from .slurm.books import books
from .slurm.commands import Slurm
from .slurm.ending import end_allocations
from .supervise import LET_GO, RETRY, SUPERVISOR, Supervisor, Tell, let_go, refuse_foreign, stop_all, stop_kind

READY_SECONDS = 60.0
GIVE_UP_DEATHS = 3
"""A component that died this often while `up` waits will not come: say why instead of waiting on."""
POLL_SECONDS = 0.03
"""How long `up` and `down` sleep between two looks: nothing wakes them, and somebody watches a prompt meanwhile."""
LOCK_SECONDS = 10.0
TURN_SECONDS = 60.0
"""Longer than a `down` that has to kill everything."""


def check(home: Home, settings: Settings) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        SettingsError: workers on other machines could not reach the servers, or an image is missing.
        ComponentError: the home is in use elsewhere or by another version, a server is not installed, or the
            gateway's port is taken.
    """
    network.refuse_loopback(settings)
    ahead.refuse_missing_images(settings)
    refuse_foreign(home)
    embedded.check_installed(settings)
    gateway = process.living(home, "gateway")
    url = state.gateway_url(settings)
    if gateway and gateway.address != url:
        raise ComponentError(
            f"This home already runs at {gateway.address}; run `edif-hpc down` before giving it the address {url}."
        )
    if not gateway and not ports.is_free(settings.gateway.port, settings.gateway.host):
        raise ComponentError(
            f"Port {settings.gateway.port} on {settings.gateway.host} is taken by another program; "
            "choose another with --port."
        )
    for server, port in {"redis": settings.redis.port, "store": settings.store.port}.items():
        if (
            port
            and not process.living(home, server)
            and not ports.are_free(port, ports.hosts_of(home, settings, server))
        ):
            raise ports.taken(server, port)
    _refuse_readdressed(home, settings)


def _refuse_readdressed(home: Home, settings: Settings) -> None:
    """Raise ComponentError when what runs was started for another `network.address`."""
    for name in ("store", "relay"):
        running = process.living(home, name)
        host = urlsplit(running.address).hostname if running else None
        reached = "" if host == network.LOOPBACK else host
        if running and reached != settings.network.address.lower():
            raise ComponentError(
                f"The {name} of this home runs at {running.address}; run `edif-hpc down` before changing "
                "network.address."
            )


def turn(home: Home) -> int | None:
    """The lock that makes its holder the home's supervisor, or None when one holds it already.

    Waits while another `up` or `down` is at work, for which the lock is held and no supervisor is recorded.

    Raises:
        ComponentError: it does not come to an end.
    """
    deadline = time.monotonic() + TURN_SECONDS
    while (held := state.lock(home)) is None and not process.living(home, SUPERVISOR):
        if time.monotonic() > deadline:
            raise _busy(home)
        time.sleep(POLL_SECONDS)  # polled with a deadline: nothing wakes us
    return held


def supervise(home: Home, settings: Settings, tell: Tell, ready: Callable[[], None] = lambda: None) -> None:
    """Be the supervisor of a home whose lock this process holds; returns when everything is down, or was let go.

    `ready` is called once, when the gateway answers for the first time.
    """
    ports.reserve(home, settings)
    heard = Supervisor(home, components(home, settings), tell, ready).run()
    if heard == LET_GO:
        tell("let go; the components are somebody else's now")
        return
    stop_all(home, tell)


def detach(home: Home, lock: int) -> None:
    """Start the supervisor as a process of its own, handing it the lock."""
    os.set_inheritable(lock, True)
    child = process.spawn(
        home, SUPERVISOR, own_command(home, "supervise"), environment=own_environment(), keep_open=(lock,)
    )
    # Nobody here waits for it: it is meant to outlive this process.
    child.returncode = 0


def wait_ready(home: Home, settings: Settings) -> None:
    """Return when the gateway answers and everything else has been started.

    Raises:
        ComponentError: it will not, with the last words of whatever keeps dying.
    """
    deadline = time.monotonic() + READY_SECONDS
    names = [component.name for component in components(home, settings)]
    while not gateway_answers(settings) or not all(process.living(home, name) for name in names):
        for name, deaths in state.failures(home).items():
            if deaths >= GIVE_UP_DEATHS:
                raise ComponentError(_why(home, name, "keeps dying"))
        if not state.supervised(home):
            raise ComponentError(_why(home, SUPERVISOR, "ended"))
        if time.monotonic() > deadline:
            raise ComponentError(_why(home, "gateway", f"does not answer after {READY_SECONDS:g} s"))
        time.sleep(POLL_SECONDS)  # polled with a deadline: nothing wakes us


def _why(home: Home, name: str, how: str) -> str:
    words = process.last_words(home, name)
    return f"The {name} {how}; its last words: {words or 'none'} (see `edif-hpc logs {name}`)."


def poke(home: Home) -> None:
    """Tell a supervisor that already runs to try again at once whatever it is waiting to restart."""
    record = process.living(home, SUPERVISOR)
    if record:
        with suppress(ProcessLookupError):  # it ends in this moment
            os.kill(record.pid, RETRY)


def down(home: Home, tell: Tell, *, keep_allocations: bool = False) -> list[str]:
    """Stop everything, whether a supervisor lives or not. Returns what had to be killed.

    The fleet first, which would replace what ends; then the allocations, whose workers hand back to a Redis that lives.

    Args:
        keep_allocations: leave them alone, with the settings that they were started with; their workers wait for Redis
            to come back, for `worker.offline_seconds`.
    """
    let_go(home)
    with _alone(home):
        refuse_foreign_hosts(home)
        settings = state.settings_of(home).settings
        killed = stop_kind(home, "fleet", tell)
        if not keep_allocations and any(pool.launcher == "slurm" for pool in settings.pool):
            with books(lambda: redis_endpoint(home, settings)) as count:
                end_allocations(home.root, Slurm(settings.slurm, count), tell)
        return killed + stop_all(home, tell, forget=not keep_allocations)


def refuse_foreign_hosts(home: Home) -> None:
    for record in process.records(home):
        if not record.here:
            raise ComponentError(f"The home {home.root} is in use on {record.host}; run `edif-hpc down` there.")


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    """Hold the supervisor's lock, so that nobody starts what is being stopped."""
    deadline = time.monotonic() + LOCK_SECONDS
    while (held := state.lock(home)) is None:
        if time.monotonic() > deadline:
            raise _busy(home)
        time.sleep(POLL_SECONDS)  # polled with a deadline: nothing wakes us
    try:
        yield
    finally:
        os.close(held)


def _busy(home: Home) -> ComponentError:
    return ComponentError(f"Another `edif-hpc up` or `down` is at work in {home.root}; try again.")
