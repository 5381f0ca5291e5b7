"""The home: one directory that holds everything one installation owns.

It is 0700 and the secrets in it are 0600, because a login node is shared. Paths are named here and nowhere else.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingsError

SECRET_BYTES = 32


@dataclass(frozen=True)
class Home:
    """The paths of one home."""

    root: Path

    @classmethod
    def locate(cls, given: Path | None = None) -> Home:
        """The home that was given, else `EDIF_HPC_HOME`, else `~/.edif-hpc`."""
        chosen = given or Path(os.environ.get("EDIF_HPC_HOME") or "~/.edif-hpc")
        return cls(chosen.expanduser().absolute())

    @property
    def config(self) -> Path:
        return self.root / "edif-hpc.toml"

    @property
    def secrets(self) -> Path:
        return self.root / "secrets"

    @property
    def run(self) -> Path:
        """Records of running components."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def redis(self) -> Path:
        return self.root / "redis"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def spool(self) -> Path:
        """Results that wait for the object store, and payloads being received."""
        return self.root / "spool"

    @property
    def hub(self) -> Path:
        """The default Hugging Face hub cache."""
        return self.root / "hub"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    def create(self) -> Home:
        """Make the home and its folders, private to this user. Refuses a home that others own or can enter."""
        for path in (self.root, self.secrets, self.run, self.logs, self.redis, self.store, self.spool, self.hub):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(
                    f"The home {self.root} cannot be made ({error.strerror}); choose another with --home."
                ) from error
        self.check()
        return self

    def check(self) -> None:
        """Raise SettingsError unless the home exists, is ours and is closed to others."""
        try:
            info = self.root.stat()
        except FileNotFoundError:
            raise SettingsError(f"There is no home at {self.root}; start one with `edif-hpc up`.") from None
        if info.st_uid != os.geteuid():
            raise SettingsError(f"The home {self.root} belongs to uid {info.st_uid}; choose your own with --home.")
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise SettingsError(f"Others can enter the home {self.root}; run `chmod 700 {self.root}`.")

    def secret(self, name: str, *, create: bool = True) -> str:
        """Read a secret, making it on first use.

        Two components may ask at once: the file is linked into place whole, and whoever comes second reads the first's.
        """
        path = self.secrets / name
        if create and not path.exists():
            self.write_private(path, secrets.token_urlsafe(SECRET_BYTES), replace=False)
        return read_secret(path)

    @staticmethod
    def write_private(path: Path, text: str, *, replace: bool = True) -> None:
        """Write a 0600 file so that no reader ever sees half of it."""
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        if replace:
            draft.replace(path)
            return
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        finally:
            draft.unlink()


def read_secret(path: Path) -> str:
    """Read a secret file, refusing one that others can read."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SettingsError(f"Others can read the secret {path}; run `chmod 600 {path}`.")
        return path.read_text().strip()
    except FileNotFoundError:
        raise SettingsError(f"The secret {path} is missing; start the service with `edif-hpc up`.") from None
