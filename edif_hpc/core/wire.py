"""What travels between a stock nnsight client and the gateway, checked without nnsight.

The gateway never looks into a payload: what it checks is the envelope around it. See `Envelope` for the fields a
client sends, `ModelKey` for the one that names an import path, and `binary_frame` for the one answer that is not JSON.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ClientVersionError, EnvelopeError, ModelKeyError

SUPPORTED_NNSIGHT = SpecifierSet(">=0.8.1,<0.9")
"""The payload is nnsight's own pickle, so another minor version is another protocol."""

ALLOWED_CLASSES = frozenset({"nnsight.modeling.transformers.TransformersModel"})
"""A model key names a Python import path; importing what a stranger wrote is not acceptable. LanguageModel and
VisionLanguageModel are aliases that nnsight keys as TransformersModel."""

FORMAT_HEADER = "edif-result-format"
ENV_BYTES = 16 * 1024
REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
TASK = re.compile(r"[a-z0-9][a-zA-Z0-9_-]{0,63}")


class Status(StrEnum):
    """Where a request is. LOG is a line that the block printed: no stage, never stored as the latest status."""

    RECEIVED = "RECEIVED"
    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    DEPLOYING = "DEPLOYING"
    DISPATCHED = "DISPATCHED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    ERROR = "ERROR"
    LOG = "LOG"

    @property
    def terminal(self) -> bool:
        return self in (Status.COMPLETED, Status.ERROR)


class Kind(StrEnum):
    """What a request's payload is: a block that nnsight traced, or a script that runs as a whole."""

    TRACE = "trace"
    SCRIPT = "script"


class ResultFormat(StrEnum):
    """How a result's bytes are to be read: those of a trace are a file of torch.save in the end.

    A stock client can read the first two and chooses by `compress`; `planes` is described in `core.planes`. What a
    script leaves is a file as its user wants it, and nothing is packed around it.
    """

    PLAIN = "plain"
    ZSTD = "zstd"
    PLANES = "planes"
    FILE = "file"

    @classmethod
    def of(cls, asked: str, compress: bool) -> ResultFormat:
        """The format for what a request's header asks, which is empty or `planes`.

        Raises:
            EnvelopeError: it is something else.
        """
        if asked not in ("", cls.PLANES):
            raise EnvelopeError(
                f"The header {FORMAT_HEADER} is {asked[:40]!r}; leave it out, or ask for {cls.PLANES.value!r}."
            )
        return cls.PLANES if asked else cls.ZSTD if compress else cls.PLAIN


@dataclass(frozen=True)
class ModelKey:
    """A model's remote identity: the wrapper class, and what to load with it."""

    class_path: str
    repo_id: str
    revision: str | None
    task: str | None
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, text: str) -> ModelKey:
        """Read a client's `model_key`.

        Raises:
            ModelKeyError: the class is not allowed, or the key is malformed.
        """
        class_path, colon, suffix = text.partition(":")
        if not colon:
            raise ModelKeyError("The model key has no ':' after its class; build it with a stock nnsight model.")
        if class_path not in ALLOWED_CLASSES:
            raise ModelKeyError(
                f"This service does not serve models of class {class_path[:120]!r}; "
                f"use one of: {', '.join(sorted(ALLOWED_CLASSES))}."
            )
        try:
            data = json.loads(suffix)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ModelKeyError("The model key does not end in a JSON object; build it with a stock nnsight model.")
        trust = data.get("trust_remote_code", False)
        if not isinstance(trust, bool):
            raise ModelKeyError("trust_remote_code in the model key must be true or false.")
        return cls(
            class_path=class_path,
            repo_id=_matching(data, "repo_id", REPO_ID, required=True) or "",
            revision=_matching(data, "revision", REVISION),
            task=_matching(data, "task", TASK),
            trust_remote_code=trust,
        )

    def __str__(self) -> str:
        """The canonical key: equal models have equal strings, whoever spelled them."""
        data: dict[str, Any] = {"repo_id": self.repo_id, "revision": self.revision}
        if self.trust_remote_code:
            data["trust_remote_code"] = True
        data["task"] = self.task
        return f"{self.class_path}:{json.dumps(data)}"


def _matching(data: dict[str, Any], field: str, pattern: re.Pattern[str], required: bool = False) -> str | None:
    value = data.get(field)
    if value is None and not required:
        return None
    if not isinstance(value, str) or not pattern.fullmatch(value) or ".." in value:
        raise ModelKeyError(f"The model key's {field} is {str(value)[:120]!r}, which cannot name one on the Hub.")
    return value


class Envelope(BaseModel):
    """The JSON beside the payload. Other fields a client may send (ids, users, times) are ignored on purpose."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_key: str = Field(max_length=2048)
    session_id: str = Field(default="", max_length=128)
    compress: bool = False
    env: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, text: str | bytes) -> Envelope:
        """Read and check an envelope.

        Raises:
            EnvelopeError: with the first wrong field.
        """
        try:
            envelope = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "data"
            raise EnvelopeError(f"The request's envelope is wrong at {where}: {first['msg']}.") from None
        if len(json.dumps(envelope.env)) > ENV_BYTES:
            raise EnvelopeError(f"The request's env is larger than {ENV_BYTES} bytes.")
        return envelope


def check_client_version(version: str) -> None:
    """Refuse an nnsight outside the supported range; a client that names none is let through to its payload."""
    if not version:
        return
    try:
        supported = SUPPORTED_NNSIGHT.contains(Version(version), prereleases=True)
    except InvalidVersion:
        supported = False
    if not supported:
        raise ClientVersionError(
            f"This service speaks nnsight {SUPPORTED_NNSIGHT}, and your client is {version[:40]}; "
            "install a supported one, for example `pip install nnsight==0.8.1`."
        )


def status_message(
    request_id: str, status: str, description: str = "", data: str | None = None, meta: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One status as the JSON object a client parses."""
    return {"id": request_id, "status": status, "description": description, "data": data, "meta": meta}


def binary_frame(request_id: str, result: bytes, meta: dict[str, Any] | None, description: str = "") -> bytes:
    """COMPLETED with the result in it: what `torch.save` would write, without torch.

    A file of torch.save is an ordinary zip with a pickle inside. Protocol 4, since protocol 2 has no opcode for bytes.
    """
    message = status_message(request_id, Status.COMPLETED.value, description, None, meta)
    message["data"] = result
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(message, protocol=4))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()
