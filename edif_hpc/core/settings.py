"""Every setting, with its default, its unit and its reason.

Order of strength: what a command was given, `EDIF_HPC_*` variables (`EDIF_HPC_GATEWAY__PORT=8002`), the TOML file, the
defaults below. Secrets are never settings: settings name the files that hold them. `docs` in the README is generated
from the descriptions here.
"""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from . import contradictions
from .errors import SettingsError
from .isolation import Isolation
from .pools import Pool

KIB, MIB, GIB = 1024, 1024**2, 1024**3
HOUR = 3600.0


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class GatewaySettings(Section):
    host: str = Field("127.0.0.1", description="Address the gateway listens on.")
    port: int = Field(8001, ge=1, le=65535, description="Port the gateway listens on.")
    public_url: str = Field("", description="Address clients use, when a proxy stands in front; empty: as they came.")
    trust_owner: bool = Field(
        True, description="Let the service's own uid go without a key on loopback (see Keys in the README)."
    )
    ping_seconds: float = Field(20.0, gt=0, description="WebSocket ping interval; proxies drop silent sockets.")
    link_seconds: float = Field(6 * HOUR, gt=0, description="How long a signed result link is valid.")


class RedisSettings(Section):
    url: str = Field("", description="External Redis, as rediss://host:6379/0; empty: the embedded one.")
    username: str = Field("", description="ACL user of an external Redis; empty: the default user.")
    password_file: str = Field("", description="0600 file with the password of an external Redis.")
    port: int = Field(0, ge=0, le=65535, description="Port of the embedded Redis; 0: a free one, kept in the home.")
    maxmemory_bytes: int = Field(1 * GIB, ge=64 * MIB, description="Memory of the embedded Redis (noeviction).")
    inline_total_bytes: int = Field(
        512 * MIB, ge=0, description="Above this much memory in Redis, small payloads and results go to the store too."
    )

    @field_validator("url")
    @classmethod
    def no_secret_in_url(cls, url: str) -> str:
        if "@" in url:
            raise ValueError("put the password into redis.password_file and the user into redis.username")
        if url and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return url


class StoreSettings(Section):
    endpoint: str = Field("", description="External S3 endpoint URL; empty: the embedded SeaweedFS.")
    region: str = Field("us-east-1", description="S3 region.")
    bucket: str = Field("edif-hpc", description="Bucket; made when missing.")
    credentials_file: str = Field("", description="0600 file with two lines, access key and secret key.")
    port: int = Field(0, ge=0, le=65525, description="S3 port of the embedded store; 0: a free one, kept in the home.")
    delivery: str = Field(
        "gateway",
        pattern="^(gateway|presigned)$",
        description="How clients download large results: streamed by the gateway, or by presigned links to the store.",
    )
    public_endpoint: str = Field("", description="Endpoint that presigned links name, where it differs for clients.")


class LimitSettings(Section):
    payload_bytes: int = Field(256 * MIB, gt=0, description="Largest request body.")
    inline_bytes: int = Field(1 * MIB, ge=0, description="Payloads and results up to this size ride in Redis.")
    result_bytes: int = Field(4 * GIB, gt=0, description="Largest result.")
    run_seconds: float = Field(600.0, gt=0, description="Longest run of one traced block.")
    script_seconds: float = Field(HOUR, gt=0, description="Longest run of one script, or of a method by its name.")
    memory_bytes: int = Field(8 * GIB, gt=0, description="Memory one request may use on top of the model.")
    queue_seconds: float = Field(24 * HOUR, gt=0, description="Longest wait in the queue.")
    log_lines: int = Field(1000, ge=0, description="Printed lines kept per request.")
    open_requests: int = Field(1000, gt=0, description="Requests one user may have waiting or running.")
    retention_seconds: float = Field(24 * HOUR, gt=0, description="How long results, events and what failed are kept.")
    attempts: int = Field(3, gt=0, description="Unexplained losses after which a request is dead-lettered.")

    @property
    def payload_seconds(self) -> float:
        """How long a payload in the store is kept at most, should its request never tell of its end."""
        return 2 * self.queue_seconds + self.retention_seconds


class ModelSettings(Section):
    cache: str = Field("", description="Hugging Face hub cache shared with the workers; empty: hub/ in the home.")
    allow: list[str] = Field(["*"], description="Models requests may bring up: repo ids or patterns such as `org/*`.")
    trust_remote_code: list[str] = Field([], description="Repo ids whose own Python code may run on load.")
    adapters: list[str] = Field([], description="PEFT adapters (repo ids in the cache) that requests may name.")
    dtype: dict[str, str] = Field({}, description="dtype per repo id; others are held as their checkpoint says.")
    weights: str = Field(
        "read",
        pattern="^(read|prefetch|stage)$",
        description="Before loading: read (nothing more), prefetch (into the page cache), stage (a copy in $TMPDIR).",
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Ranks (GPUs, or processes on a CPU) that share each model; above 1: isolation none.",
    )


class WorkerSettings(Section):
    isolation: Isolation | None = Field(None, description="none, process or locked; empty: the strongest offered.")
    required_isolation: Isolation = Field(Isolation.NONE, description="Refuse to run requests below this level.")
    memory_bytes: int = Field(0, ge=0, description="Memory for models on one worker; 0: three quarters of what it has.")
    concurrency: int = Field(1, ge=1, le=64, description="Requests one model runs at a time.")
    threads: int = Field(0, ge=0, description="torch threads per request and rank; 0: cores / concurrency / ranks.")
    spares: int = Field(2, ge=0, le=16, description="Executors forked ahead of need, per model.")
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto: what is found.")
    heartbeat_seconds: float = Field(3.0, gt=0, description="How often a worker says that it lives.")
    lease_heartbeats: int = Field(3, ge=2, description="Heartbeats a worker may miss before its requests move on.")
    idle_seconds: float = Field(600.0, gt=0, description="A worker without requests ends after this time.")
    offline_seconds: float = Field(600.0, gt=0, description="A worker without Redis for this long gives up.")
    upload_seconds: float = Field(
        HOUR, gt=0, description="A result that the object store does not take for this long is given up, with an ERROR."
    )
    spool: str = Field(
        "",
        description="Local folder for results while the object store is away; empty: the worker's own in $TMPDIR.",
    )
    spool_bytes: int = Field(
        16 * GIB,
        ge=0,
        description="Most bytes that wait there; what does not fit keeps its place at its model.",
    )

    @property
    def lease_seconds(self) -> float:
        return self.heartbeat_seconds * self.lease_heartbeats


class NetworkSettings(Section):
    address: str = Field(
        "", description="Host name or address of this machine that compute nodes reach; empty: loopback only."
    )

    @field_validator("address")
    @classmethod
    def one_interface(cls, address: str) -> str:
        try:
            given = ip_address(address)
        except ValueError:
            if address and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", address):
                raise ValueError("must be a host name or an address alone, without a port") from None
            return address
        if given.is_unspecified or given.is_loopback:
            raise ValueError(f"{address} is no address of one machine; name one that compute nodes reach")
        return str(given)


class SlurmSettings(Section):
    sbatch: str = Field("sbatch", min_length=1, description="The site's sbatch, as `sbatch.tinygpu`.")
    squeue: str = Field("squeue", min_length=1, description="The site's squeue.")
    scancel: str = Field("scancel", min_length=1, description="The site's scancel.")

    @field_validator("sbatch", "squeue", "scancel")
    @classmethod
    def one_program(cls, name: str) -> str:
        if any(character.isspace() for character in name):
            raise ValueError(f"{name!r} has spaces; it is the name of a program, and options belong into the pools")
        return name


class FleetSettings(Section):
    workers: int = Field(1, ge=0, le=64, description="Most local workers at a time.")
    tick_seconds: float = Field(1.0, gt=0, description="How often the fleet looks at the queue.")
    backoff_seconds: list[float] = Field(
        [],
        description="Pauses after workers that die young, one more of which pauses their pool; empty: 1, 5 and 15 s "
        "for processes, 1, 5, 15 and 60 minutes for allocations.",
    )
    alert_url_file: str = Field(
        "", description="0600 file with the URL that alerts are posted to as JSON (paused, stopped, silent Slurm)."
    )

    @field_validator("backoff_seconds")
    @classmethod
    def no_negative_pause(cls, pauses: list[float]) -> list[float]:
        if any(pause < 0 for pause in pauses):
            raise ValueError("must be seconds of 0 or more, as [60, 300, 900]")
        return pauses


class Settings(BaseSettings):
    """All settings of one installation."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="EDIF_HPC_", env_nested_delimiter="__")

    # Each {} becomes a section of its own, with that section's defaults, when it is validated.
    gateway: GatewaySettings = Field({}, validate_default=True)
    redis: RedisSettings = Field({}, validate_default=True)
    store: StoreSettings = Field({}, validate_default=True)
    limits: LimitSettings = Field({}, validate_default=True)
    models: ModelSettings = Field({}, validate_default=True)
    worker: WorkerSettings = Field({}, validate_default=True)
    fleet: FleetSettings = Field({}, validate_default=True)
    network: NetworkSettings = Field({}, validate_default=True)
    slurm: SlurmSettings = Field({}, validate_default=True)
    pool: list[Pool] = Field([], description="Pools, each a [[pool]] of its own; none: local processes.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="How much components log.")

    @field_validator("pool")
    @classmethod
    def names_of_their_own(cls, pools: list[Pool]) -> list[Pool]:
        names = [pool.name for pool in pools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two pools are named {twice!r}")
        return pools

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` hands over: the sources are merged there, so that their origin stays known."""
        return (init_settings,)


class Loaded(BaseModel):
    """The settings, and where each value that is not a default came from (`gateway.port` -> `EDIF_HPC_...`)."""

    settings: Settings
    origins: dict[str, str]


def load(file: Path, overrides: dict[str, Any] | None = None, *, must_exist: bool = False) -> Loaded:
    """Merge file, environment and overrides.

    Raises:
        SettingsError: naming the key, its origin and what is wrong with it.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers = [
        (_read_file(file, must_exist), str(file)),
        (EnvSettingsSource(Settings)(), "environment"),
        (overrides or {}, "command line"),
    ]
    for values, origin in layers:
        _merge(merged, values, origins, origin)
    try:
        loaded = Loaded(settings=Settings(**merged), origins=origins)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(_named(part, merged) for part in first["loc"])
        origin = origins.get(key) or origins.get(key.partition(".")[0], "settings")
        message = _unknown(first["loc"]) if first["type"] == "extra_forbidden" else first["msg"]
        raise SettingsError(
            f"The setting {key} ({origin}) is wrong: {message.removeprefix('Value error, ')}."
        ) from None
    if found := contradictions.first(loaded.settings):
        origin = origins.get(found.key) or origins.get(found.key.partition(".")[0], "settings")
        raise SettingsError(f"The setting {found.key} ({origin}) cannot be {found.value} here: {found.trouble}.")
    return loaded


def _unknown(place: tuple[int | str, ...]) -> str:
    """What is said of a key that does not exist, with the one that may be meant."""
    sections: dict[str, type[BaseModel]] = {
        name: Pool if name == "pool" else field.annotation  # type: ignore[misc]  # each section is a model of its own
        for name, field in Settings.model_fields.items()
    }
    known = sections[str(place[0])] if len(place) > 1 else Settings
    names = get_close_matches(str(place[-1]), known.model_fields)
    return f"there is no such setting; {names[0]} may be meant" if names else "there is no such setting"


def _named(part: int | str, values: dict[str, Any]) -> str:
    """A part of a key; for the number of a pool, its name."""
    pools = values.get("pool")
    if isinstance(part, int) and isinstance(pools, list) and part < len(pools) and isinstance(pools[part], dict):
        return str(pools[part].get("name", part))
    return str(part)


def _read_file(file: Path, must_exist: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        if must_exist:
            raise SettingsError(f"There is no settings file {file}.") from None
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {file} is not TOML: {error}.") from None
    except OSError as error:
        raise SettingsError(f"The settings file {file} cannot be read: {error.strerror}.") from None


def _merge(
    into: dict[str, Any], values: dict[str, Any], origins: dict[str, str], origin: str, prefix: str = ""
) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and isinstance(into.get(name, {}), dict):
            _merge(into.setdefault(name, {}), value, origins, origin, f"{key}.")
        else:
            into[name] = value
            origins[key] = f"EDIF_HPC_{key.replace('.', '__').upper()}" if origin == "environment" else origin
