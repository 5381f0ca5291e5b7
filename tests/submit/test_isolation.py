"""A script has no more than a block has: what its level denies is denied, and what it spoils is its own."""

from __future__ import annotations

import json

import pytest

from tests.support.servers import eventually

from .laptop import Laptop

ATTEMPTS = """
    import json, os, socket, subprocess, sys, threading
    from nnsight import TransformersModel
    model = TransformersModel("edif-test/gpt2", task="text-generation")

    def tried(action):
        try:
            return str(action())
        except BaseException as error:
            return type(error).__name__

    address, cache = sys.argv[1:3]
    trace = f"/tmp/edif-submit-script-was-here-{os.getpid()}"
    host, port = address.rpartition("//")[2].split(":")
    print(json.dumps({
        "network": tried(lambda: socket.create_connection((host, int(port)), 5).close()),
        "exec": tried(lambda: subprocess.run(["/bin/true"]).returncode),
        "fork": tried(lambda: os.waitpid(os.fork() or os._exit(0), 0)[1]),
        "password": tried(lambda: open("/etc/passwd").read()[:4]),
        "cache": tried(lambda: len(os.listdir(cache)) > 0),
        "write": tried(lambda: (open(trace, "w").close(), os.unlink(trace))),
        "kill": tried(lambda: os.kill(os.getppid(), 0)),
        "memory": tried(lambda: bytearray(2 * 2**30) and "had"),
        "secrets": [name for name in os.environ if "KEY" in name or "REDIS" in name or "SECRET" in name],
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}").partition(" ")[0].partition(":")[0]
                              for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")),
    }))
"""
BOTH = '\n    TransformersModel("edif-test/llama", task="text-generation")\n'


@pytest.mark.parametrize("several", [False, True], ids=["one model", "two models"])
def test_what_the_level_denies(laptop: Laptop, several: bool) -> None:
    script = ATTEMPTS + (BOTH if several else "")
    (line,) = laptop.prints(script, "--", laptop.url, str(laptop.cache))
    found = json.loads(line)
    denied = {"network", "exec", "fork", "password", "cache", "write", "kill"}
    refused = {name for name in denied if found[name] == "PermissionError"}
    assert found["memory"] == "MemoryError"
    assert found["secrets"] == []
    if laptop.level == "locked":
        assert refused == denied, found
    else:
        assert found["exec"] == "0", found
        assert found["password"] == "root", found
    if laptop.level != "none":
        # Nothing of the service or another request: the channel, what comes, what goes twice, and /dev/null; and for
        # each model the sealed files of its weights and of what lies where in them.
        kinds = [kind for kind in found["descriptors"] if not kind.startswith("/proc")]
        assert kinds == ["/dev/null"] * 3 + ["/memfd"] * (3 + 2 * (1 + several)) + ["socket"], found


def test_the_weights_that_everybody_maps_cannot_be_written_to(laptop: Laptop) -> None:
    if laptop.level == "none":
        pytest.skip("level none runs requests in the model host itself")
    (line,) = laptop.prints("""
        import fcntl, json, mmap, os
        from nnsight import TransformersModel
        TransformersModel("edif-test/gpt2", task="text-generation")

        def tried(action):
            try:
                return str(action())
            except OSError as error:
                return type(error).__name__

        found = {}
        for fd in map(int, os.listdir("/proc/self/fd")):
            path = f"/proc/self/fd/{fd}"
            name = os.readlink(path) if os.path.islink(path) else ""
            if "edif-weights" in name or "edif-manifest" in name:
                found[name.split(" ")[0]] = [
                    tried(lambda: os.pwrite(fd, b"x", 0)),
                    tried(lambda: os.ftruncate(fd, 0)),
                    tried(lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE)),
                    tried(lambda: os.pwrite(os.open(path, os.O_RDWR), b"x", 0)),
                    tried(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)),
                ]
        print(json.dumps(found))
    """)
    found = json.loads(line)
    assert found == dict.fromkeys(("/memfd:edif-weights", "/memfd:edif-manifest"), ["PermissionError"] * 5)


def test_a_crash_is_the_scripts_own_and_the_next_one_runs(laptop: Laptop) -> None:
    crash = """
        import ctypes
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        print("before", flush=True)
        ctypes.string_at(0)
    """
    done = laptop.submit(crash, code=3)
    assert "a segmentation fault" in done.stderr
    assert "Traceback" not in done.stderr
    fine = (
        "from nnsight import TransformersModel\nTransformersModel('edif-test/gpt2', task='text-generation')\nprint(1)"
    )
    assert laptop.prints(fine) == ["1"]


def test_what_comes_after_a_script_sees_nothing_of_it(laptop: Laptop) -> None:
    leaving = """
        import os
        import edif_hpc, torch
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        os.environ["LEFT"] = "behind"
        torch.set_default_dtype(torch.float64)
        edif_hpc.save("left", 1)
    """
    laptop.submit(leaving)
    looking = """
        import os, sys
        import edif_hpc, torch
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        print("LEFT" in os.environ, sys.argv, torch.get_default_dtype(), __name__)
    """
    assert laptop.prints(looking) == ["False ['experiment.py'] torch.float32 __main__"]


def test_a_script_that_ends_only_when_it_is_killed(laptop: Laptop) -> None:
    script = """
        import signal, time
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        print("begun", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """
    command = laptop.start("submit", laptop.write(script), "--follow")
    assert command.stdout is not None
    request_id = command.stdout.readline().strip()
    assert command.stdout.readline() == "begun\n"
    assert laptop.run("cancel", request_id).returncode == 0
    command.communicate(timeout=60)
    assert command.returncode == 3
    eventually(lambda: laptop.shown(request_id)["status"] == "ERROR", what="the end of the request")
