"""Every key and channel in Redis, by name. Nothing else in the project spells one.

    request(id)       hash    one request: owner, model, state, latest status, current attempt's token
    payload(id)       string  a small payload; larger ones lie in the store. A failed request keeps it for another try
    result(id)        string  a small result, likewise
    events(id)        stream  what happened to the request, in order; the truth that sockets and polls read
    targets           zset    target (a model key, or several: core/target.py) -> waiting requests
    waiting(t, p)     zset    user -> virtual time, of those waiting for target t at priority p
    line(t, p, user)  list    request ids of one user, next first
    share(t)          hash    user -> virtual time, "@clock" -> the queue's own
    running(t)        zset    request id -> expected end, of those claimed
    estimates(t)      hash    kind -> learnt run time in ms
    dead              zset    request id -> when it was given up after too many losses, in ms
    leases            zset    request id -> end of its lease in ms
    waiting_since     zset    request id -> submission in ms, of all that wait
    user(u)           zset    request id -> submission in ms, a user's own recent requests
    open(u)           zset    request ids of a user that are not terminal
    session(s)        string  owner of a client's socket
    workers           zset    worker id -> end of its registration in ms
    worker(w)         string  JSON record of a worker, expires with its registration
    control(w)        list    commands to a worker
    objects           zset    object key in the store -> when it may be deleted, in ms
    sweep             hash    when leases were last looked at, and until when nothing may be reclaimed
    api_keys          hash    hash of a key -> JSON record
    components        hash    component name -> JSON record
    fleet_leader      string  token of the fleet that leads, expires unless renewed
    wanted            zset    model key -> Unix time, of models that an admin wants loaded without a request
    counters          hash    totals for /metrics
    slurm_commands    hash    kind -> commands given to Slurm, ever
    slurm_hour(h)     hash    the same of one hour, by its number since 1970; expires
    environment       string  versions of the last worker, for nnsight.compare()
    pools             hash    pool -> "stopped" by an admin, "held" since somebody's scancel, or "resumed" and when
    launches          hash    pool -> Unix time, of those an admin wants a worker of
    health            hash    pool -> JSON record of how launching went lately
    notices           hash    subject -> sentence that explains a pause to people
    lineage(l)        hash    who is which generation of a chain of allocations, who asks for the next, when it was used
    pace(pool)        hash    how long handovers of a pool took lately, in seconds

Channels carry only the doorbell: what changed, never what it is.
"""

PREFIX = "edif:"

TARGETS = PREFIX + "targets"
DEAD = PREFIX + "dead"
LEASES = PREFIX + "leases"
WAITING_SINCE = PREFIX + "waiting_since"
WORKERS = PREFIX + "workers"
OBJECTS = PREFIX + "objects"
SWEEP = PREFIX + "sweep"
API_KEYS = PREFIX + "api_keys"
COMPONENTS = PREFIX + "components"
FLEET_LEADER = PREFIX + "fleet_leader"
WANTED = PREFIX + "wanted"
COUNTERS = PREFIX + "counters"
SLURM_COMMANDS = PREFIX + "slurm_commands"
ENVIRONMENT = PREFIX + "environment"
NOTICES = PREFIX + "notices"
POOLS = PREFIX + "pools"
LAUNCHES = PREFIX + "launches"
HEALTH = PREFIX + "health"

BELL_REQUESTS = PREFIX + "bell:requests"
"""Message: `request id`; at submission `request id session id`; for the terminal event `request id !`."""
THE_END = "!"
BELL_QUEUE = PREFIX + "bell:queue"
"""Message: a target with something to claim."""
BELL_WORKERS = PREFIX + "bell:workers"
"""Message: a worker id with a command in control(w)."""


def request(request_id: str) -> str:
    return f"{PREFIX}request:{request_id}"


def payload(request_id: str) -> str:
    return f"{PREFIX}payload:{request_id}"


def result(request_id: str) -> str:
    return f"{PREFIX}result:{request_id}"


def events(request_id: str) -> str:
    return f"{PREFIX}events:{request_id}"


def share(target: str) -> str:
    return f"{PREFIX}share:{target}"


def estimates(target: str) -> str:
    return f"{PREFIX}estimates:{target}"


def running(target: str) -> str:
    return f"{PREFIX}running:{target}"


def waiting(priority_and_target: str) -> str:
    return f"{PREFIX}waiting:{priority_and_target}"


def line(priority_user_and_target: str) -> str:
    return f"{PREFIX}line:{priority_user_and_target}"


def user(name: str) -> str:
    return f"{PREFIX}user:{name}"


def open_requests(name: str) -> str:
    return f"{PREFIX}open:{name}"


def session(session_id: str) -> str:
    return f"{PREFIX}session:{session_id}"


def worker(worker_id: str) -> str:
    return f"{PREFIX}worker:{worker_id}"


def control(worker_id: str) -> str:
    return f"{PREFIX}control:{worker_id}"


def lineage(name: str) -> str:
    return f"{PREFIX}lineage:{name}"


def pace(pool: str) -> str:
    return f"{PREFIX}pace:{pool}"


def slurm_hour(number: int | str) -> str:
    return f"{PREFIX}slurm_hour:{number}"


LUA_KEYS = f"""
local P = '{PREFIX}'
local TARGETS, LEASES, WAITING_SINCE, DEAD = '{TARGETS}', '{LEASES}', '{WAITING_SINCE}', '{DEAD}'
local OBJECTS, SWEEP, COUNTERS = '{OBJECTS}', '{SWEEP}', '{COUNTERS}'
local THE_END = '{THE_END}'
local BELL_REQUESTS, BELL_QUEUE, BELL_WORKERS = '{BELL_REQUESTS}', '{BELL_QUEUE}', '{BELL_WORKERS}'
local function k_request(id) return P .. 'request:' .. id end
local function k_payload(id) return P .. 'payload:' .. id end
local function k_result(id) return P .. 'result:' .. id end
local function k_events(id) return P .. 'events:' .. id end
local function k_share(target) return P .. 'share:' .. target end
local function k_estimates(target) return P .. 'estimates:' .. target end
local function k_running(target) return P .. 'running:' .. target end
local function k_waiting(target, priority) return P .. 'waiting:' .. priority .. ':' .. target end
local function k_line(target, priority, user) return P .. 'line:' .. priority .. ':' .. user .. ':' .. target end
local function k_user(user) return P .. 'user:' .. user end
local function k_open(user) return P .. 'open:' .. user end
local function k_session(session) return P .. 'session:' .. session end
local function k_worker(worker) return P .. 'worker:' .. worker end
local function k_control(worker) return P .. 'control:' .. worker end
"""
"""The same names for the scripts, which work out keys from what they read."""
