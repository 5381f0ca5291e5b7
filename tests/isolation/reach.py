"""Attacks on what lies outside: files, other processes, the network, and the service's own servers.

At `none` and `process` a block has the service's uid, and the kernel grants it what that user has: files, network,
signals. What those two levels do keep are the memory and environment of the processes that make themselves undumpable.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess

from tests.isolation.helpers import call, chosen, each, get, read, talk
from tests.isolation.table import DID, EITHER, REFUSED, SPARED, case

# -- files -------------------------------------------------------------------------------------------------------------


@case(DID, DID, REFUSED)
def read_the_secrets(g: dict) -> object:
    return each({name: f"{g['home']}/secrets/{name}" for name in ("owner-key", "redis-password", "link-secret")}, read)


@case(DID, DID, REFUSED)
def read_the_configuration(g: dict) -> object:
    return each({name: f"{g['home']}/{name}" for name in ("edif-hpc.toml", "run/redis.conf", "run/up.json")}, read)


@case(DID, DID, REFUSED)
def list_the_home(g: dict) -> object:
    return each({"home": g["home"], "secrets": f"{g['home']}/secrets", "logs": f"{g['home']}/logs"}, os.listdir)


@case(DID, DID, REFUSED)
def write_into_the_home(g: dict) -> object:
    path = f"{g['home']}/planted"
    with open(path, "w") as file:
        file.write("x")
    os.unlink(path)
    return None


@case(DID, DID, REFUSED)
def follow_a_symlink_into_the_home(g: dict) -> object:
    link = f"{g['folder']}/link-{os.getpid()}"
    os.symlink(f"{g['home']}/secrets/owner-key", link)
    try:
        read(link)
    finally:
        os.unlink(link)
    return None


@case(DID, DID, REFUSED)
def write_to_temporary_places(g: dict) -> object:
    def write(path: str) -> None:
        with open(path, "w") as file:
            file.write("x")
        os.unlink(path)

    places = {"tmp": "/tmp", "shm": "/dev/shm", "folder": g["folder"], "here": os.getcwd()}
    return each({name: f"{path}/edif-isolation-{os.getpid()}" for name, path in places.items()}, write)


@case(DID, "OSError EFBIG", REFUSED)
def write_a_huge_file(g: dict) -> object:
    path = f"{g['folder']}/huge-{os.getpid()}"
    with open(path, "wb") as file:
        try:
            os.ftruncate(file.fileno(), 64 * 2**30)  # sparse: it is the size that a limit must refuse
        finally:
            os.unlink(path)
    return None


@case(EITHER, EITHER, REFUSED)  # the user's own checkout is theirs to change; a system-wide installation is not
def change_the_services_code(g: dict) -> object:
    os.close(os.open(g["source"], os.O_WRONLY | os.O_APPEND))
    return None


@case(DID, DID, REFUSED)
def read_the_user_list(g: dict) -> object:
    read("/etc/passwd")
    return None


# -- other processes ---------------------------------------------------------------------------------------------------


@case(DID, DID, REFUSED)
def read_a_bystanders_environment(g: dict) -> object:
    assert g["token"].encode() in read(f"/proc/{g['bystander']}/environ")
    return None


@case(REFUSED, REFUSED, REFUSED)
def read_the_agents_environment(g: dict) -> object:
    return each(chosen(g, "agent", "host", "zygote"), lambda pid: read(f"/proc/{pid}/environ"))


@case(REFUSED, REFUSED, REFUSED)
def open_the_agents_memory(g: dict) -> object:
    return each(chosen(g, "agent", "host", "zygote"), lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)))


@case(REFUSED, REFUSED, REFUSED)
def copy_the_agents_memory(g: dict) -> object:
    def copy(pid: int) -> None:
        buffer = ctypes.create_string_buffer(16)
        local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16)
        remote = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 16)
        call("process_vm_readv", pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)

    return each(chosen(g, "agent", "host", "zygote"), copy)


@case(REFUSED, REFUSED, REFUSED)
def trace_the_agent(g: dict) -> object:
    seize = 0x4206  # PTRACE_SEIZE: it does not stop what it is done to
    return each(chosen(g, "agent", "host", "zygote"), lambda pid: call("ptrace", seize, pid, 0, 0))


@case(REFUSED, REFUSED, REFUSED)
def take_the_agents_sockets(g: dict) -> object:
    def take(pid: int) -> None:
        pidfd = call("syscall", 434, pid, 0)  # pidfd_open
        try:
            for fd in range(3, 32):
                os.close(call("syscall", 438, pidfd, fd, 0))  # pidfd_getfd
        finally:
            os.close(pidfd)

    return each(chosen(g, "agent", "host", "zygote"), take)


@case(REFUSED, REFUSED, REFUSED)
def list_the_agents_descriptors(g: dict) -> object:
    return each(chosen(g, "agent", "host", "zygote"), lambda pid: os.listdir(f"/proc/{pid}/fd"))


# Not promised: what the gateway and the servers hold lies in the home too, which these levels do not keep from a block.
@case(EITHER, EITHER, REFUSED)
def open_the_memory_of_the_other_components(g: dict) -> object:
    others = chosen(g, "gateway", "redis", "store", "fleet", "supervisor")
    return each(others, lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)))


@case(DID, DID, REFUSED)
def read_command_lines(g: dict) -> object:
    return each(g["pids"], lambda pid: read(f"/proc/{pid}/cmdline"))


@case(DID, DID, REFUSED)
def list_all_processes(g: dict) -> object:
    assert len([name for name in os.listdir("/proc") if name.isdigit()]) > 3
    return None


@case(DID, DID, REFUSED)
def signal_the_components(g: dict) -> object:
    # Signal 0 asks whether one may. These two levels let a block stop its own user's service; it is started again.
    return each(g["pids"], lambda pid: os.kill(pid, 0))


@case(DID, DID, REFUSED)
def signal_everything(g: dict) -> object:
    return each({"all": -1, "bystander": g["bystander"], "parent": os.getppid()}, lambda pid: os.kill(pid, 0))


@case(DID, DID, REFUSED)
def signal_through_a_pidfd(g: dict) -> object:
    def tell(pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        finally:
            os.close(pidfd)

    return each({"bystander": g["bystander"]}, tell)


@case(DID, DID, REFUSED)
def queue_a_signal_for_the_agent(g: dict) -> object:
    # F_SETOWN has the kernel send a signal in our place: a way round a check of kill alone.
    import fcntl

    reader, writer = os.pipe()
    try:
        fcntl.fcntl(reader, fcntl.F_SETOWN, g["bystander"])
    finally:
        os.close(reader)
        os.close(writer)
    return None


@case(DID, DID, REFUSED)
def change_the_agents_priority(g: dict) -> object:
    return each({"bystander": g["bystander"]}, lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 1))


@case(DID, DID, REFUSED)
def lower_the_limits_of_others(g: dict) -> object:
    import resource

    return each({"bystander": g["bystander"]}, lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0)))


# -- programs and forks ------------------------------------------------------------------------------------------------


@case(DID, DID, REFUSED)
def fork(g: dict) -> object:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return None


@case(DID, DID, REFUSED)
def run_a_program(g: dict) -> object:
    assert subprocess.run(["/bin/echo", "hello"], capture_output=True, check=True).stdout == b"hello\n"
    return None


@case(DID, DID, REFUSED)
def become_a_program(g: dict) -> object:
    # A path that is not there: an exec that is allowed says so, one that is not is refused before it looks.
    try:
        os.execv("/nowhere", ["nowhere"])
    except FileNotFoundError:
        return None
    return None


@case(SPARED, "stopped", REFUSED)  # at none nothing limits the number of processes
def start_programs_without_end(g: dict) -> object:
    children = []
    try:
        for _ in range(2000):
            children.append(os.posix_spawn("/bin/sleep", ["sleep", "60"], {}))
    except BlockingIOError:
        return "stopped"
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


@case(SPARED, f"{EITHER}|OSError EINVAL", REFUSED)  # at none it would be the model host that moves
def enter_a_user_namespace(g: dict) -> object:
    call("unshare", 0x10000000)
    return None


# -- the network -------------------------------------------------------------------------------------------------------


@case(DID, DID, REFUSED)
def connect_by_tcp(g: dict) -> object:
    socket.create_connection(("127.0.0.1", g["tcp"]), timeout=5).close()
    return None


@case(DID, DID, REFUSED)
def send_by_udp(g: dict) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", g["udp"]))
    return None


@case(DID, DID, REFUSED)
def listen_on_a_port(g: dict) -> object:
    socket.create_server(("127.0.0.1", 0)).close()
    return None


@case(DID, DID, REFUSED)
def connect_to_a_unix_socket(g: dict) -> object:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(g["unix"])
    return None


@case(DID, DID, REFUSED)
def connect_to_an_abstract_socket(g: dict) -> object:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + g["abstract"])
    return None


@case(DID, DID, REFUSED)
def make_a_pair_of_sockets(g: dict) -> object:
    for end in socket.socketpair():
        end.close()
    return None


@case(DID, DID, REFUSED)
def list_the_machines_connections(g: dict) -> object:
    read("/proc/net/tcp")
    return None


# -- the service's own servers -----------------------------------------------------------------------------------------


@case("NOAUTH", "NOAUTH", REFUSED)
def use_redis_without_a_password(g: dict) -> object:
    return "NOAUTH" if b"NOAUTH" in talk(g["redis"], b"KEYS *\r\n") else None


@case(DID, DID, REFUSED)  # the home's secrets are this user's to read
def use_redis_with_the_homes_password(g: dict) -> object:
    password = read(f"{g['home']}/secrets/redis-password").strip()
    assert talk(g["redis"], b"AUTH gateway " + password + b"\r\n").startswith(b"+OK")
    return None


@case("403", "403", REFUSED)
def read_the_store_without_credentials(g: dict) -> object:
    request = f"GET /edif-hpc?list-type=2 HTTP/1.1\r\nhost: 127.0.0.1:{g['store']}\r\nconnection: close\r\n\r\n"
    return talk(g["store"], request.encode()).split()[1].decode()


# The owner's uid alone is not enough below `locked` once the home has two users, and this one has.
@case("nobody", "nobody", REFUSED)
def be_taken_for_the_owner(g: dict) -> object:
    found = get(g, "/whoami")
    assert b"200" in found.split(b"\r\n")[0]
    return "nobody" if b'"email":null' in found else None


@case("401", "401", REFUSED)
def list_requests_without_a_key(g: dict) -> object:
    return get(g, "/api/requests").split()[1].decode()


@case("401", "401", REFUSED)
def read_the_metrics_without_a_key(g: dict) -> object:
    return get(g, "/metrics").split()[1].decode()


@case(DID, DID, REFUSED)  # again: the home is not kept from a block at these levels
def use_the_gateway_with_the_owners_key(g: dict) -> object:
    key = read(f"{g['home']}/secrets/owner-key").decode().strip()
    assert b'"owner"' in get(g, "/whoami", key)
    return None
