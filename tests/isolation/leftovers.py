"""What one request might leave for the next: changed modules, weights, threads and globals, or another user's data.

Above `none` a request has a process of its own that ends with it. At `none` it has not, and these rows say what that
costs: such a service is for one's own use.
"""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import linecache
import os
import signal
import sys
import threading
import time

import torch

from tests.isolation.helpers import call, read
from tests.isolation.table import DID, NONE, REFUSED, SPARED, case

CLEAN = "nothing"


def pid_is_gone(ground: object, level: str, said: str) -> None:
    """The process that the block named has ended, and did nothing more on its way out."""
    from tests.isolation.ground import gone

    if level != NONE and said != REFUSED:
        gone(int(said))
        assert not ground.mark("late").exists()


# -- changes -----------------------------------------------------------------------------------------------------------


@case(DID, DID, DID, spoils=(NONE,))
def replace_a_function_of_torch(g: dict) -> object:
    original = torch.nn.functional.layer_norm
    torch.nn.functional.layer_norm = lambda *a, **k: original(*a, **k) * 0
    return None


@case(DID, DID, DID)  # torch's modes and random state are put back even at none
def change_torchs_modes(g: dict) -> object:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    return None


@case(DID, DID, DID, spoils=(NONE,))
def overwrite_the_weights(g: dict) -> object:
    found = 0
    gc.unfreeze()
    for thing in gc.get_objects():
        if isinstance(thing, torch.nn.Module):
            for parameter in thing.parameters():
                with torch.no_grad():
                    parameter.zero_()
                found += 1
    assert found > 10
    return None


@case(DID, DID, DID)
def change_the_environment(g: dict) -> object:
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ["PYTHONPATH"] = g["folder"]
    linecache.cache.clear()
    return None


# -- things that go on -------------------------------------------------------------------------------------------------


@case(r"\d+", r"\d+", r"\d+", after=pid_is_gone)
def leave_a_thread(g: dict) -> object:
    late = g["folder"] + "/late"

    def work() -> None:
        time.sleep(30)
        open(late, "w").close()

    threading.Thread(target=work).start()  # not a daemon: an orderly end of the interpreter would wait for it
    return os.getpid()


@case(r"\d+", r"\d+", r"\d+", after=pid_is_gone)
def leave_an_exit_handler(g: dict) -> object:
    late = g["folder"] + "/late"
    atexit.register(lambda: open(late, "w").close())
    return os.getpid()


@case(r"\d+", r"\d+", r"\d+", after=pid_is_gone)
def leave_an_alarm(g: dict) -> object:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    return os.getpid()


@case(
    SPARED, r"\d+", "refused", after=lambda ground, level, said: level == "locked" or pid_is_gone(ground, level, said)
)
def leave_a_child_in_a_session_of_its_own(g: dict) -> object:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            time.sleep(3600)
        os._exit(0)
    found = os.read(reader, 100).decode()
    os.close(reader)
    os.close(writer)
    return found


# -- other people's data -----------------------------------------------------------------------------------------------
# Another user's request with the canary in prompt, code and result ran just before each of these.


@case(f"{CLEAN}|found", CLEAN, CLEAN)
def search_all_objects_for_the_canary(g: dict) -> object:
    canary = g["canary"][::-1]
    gc.unfreeze()
    for thing in gc.get_objects():
        if type(thing) is list and len(thing) < 1000:
            texts = thing
        elif type(thing) is dict and len(thing) < 1000 and thing is not g:
            texts = [*thing.keys(), *thing.values()]
        else:
            continue
        if any(type(text) is str and text is not canary and canary in text for text in texts):
            return "found"
    return "nothing"


# In the model host, at `none`, other threads may unmap what is just being read.
@case(f"{CLEAN}|found|ERROR.*SIGSEGV", CLEAN, CLEAN)
def search_the_memory_for_the_canary(g: dict) -> object:
    # Twice the canary, as the other user's result has it. It is never spelled out here, and compared from behind, so
    # that this search cannot find itself. Through ctypes: no permission is needed to look at one's own memory.
    behind = (g["canary"] * 2).encode()
    start_of_it = g["canary"][:-9:-1].encode()
    with open("/proc/self/maps") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        span, rights, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if not rights.startswith("rw") or end - start > 2**26 or "stack" in line:
            continue
        seen = ctypes.string_at(start, end - start)
        at = seen.find(start_of_it)
        while at >= 0:
            if seen[at : at + len(behind)][::-1] == behind:
                return "found"
            at = seen.find(start_of_it, at + 1)
    return "nothing"


@case(f"{CLEAN}|found", CLEAN, CLEAN)
def search_modules_and_sources_for_the_canary(g: dict) -> object:
    canary = g["canary"][::-1]
    places = [repr(linecache.cache)]
    places += [repr(vars(module)) for name, module in list(sys.modules.items()) if name.startswith(("nnsight", "edif"))]
    return "found" if any(canary in place for place in places) else "nothing"


@case(SPARED, CLEAN, REFUSED)
def search_the_initial_environment_for_anything(g: dict) -> object:
    call("prctl", 4, 1, 0, 0, 0)  # without this the kernel shows it to nobody
    return "found" if read("/proc/self/environ").strip(b"\0") else "nothing"


@case("planted", "planted", "planted")
def plant_something_for_the_next(g: dict) -> object:
    builtins.planted_by_a_stranger = sys.modules["planted_by_a_stranger"] = torch
    return "planted"


@case("found", CLEAN, CLEAN)  # comes right after the row above
def find_what_was_planted(g: dict) -> object:
    found = hasattr(builtins, "planted_by_a_stranger") or "planted_by_a_stranger" in sys.modules
    if found:
        del builtins.planted_by_a_stranger, sys.modules["planted_by_a_stranger"]
    return "found" if found else "nothing"
