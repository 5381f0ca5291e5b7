"""The JSON beside a script: all that the queue must know of it, so that nobody but an executor reads it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import EnvelopeError
from ..wire import ALLOWED_CLASSES, ModelKey
from .files import FORMS, OWN_FORM

MOST_MODELS = 8
"""Each brings two descriptors along, in one message."""
DEFAULT_TASK = "text-generation"
NAME = r"^[^\x00-\x1f\x7f]*$"


class NamedModel(BaseModel):
    """A model as a script or `--model` names it; the task of most is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo_id: str
    revision: str | None = None
    task: str | None = None
    trust_remote_code: bool = False

    def key(self) -> ModelKey:
        """The model's key, in the one spelling that it has everywhere.

        Raises:
            ModelKeyError: a field that cannot be one.
        """
        given: dict[str, Any] = {**self.model_dump(), "task": self.task or DEFAULT_TASK}
        raw = ModelKey(class_path=next(iter(ALLOWED_CLASSES)), **given)
        return ModelKey.parse(str(raw))


class ScriptEnvelope(BaseModel):
    """What is asked for.

    Args:
        models: those that the script builds; all of them are at hand while it runs.
        form: how what it saves is written, one of `FORMS`, or `OWN_FORM`: only it writes its result.
        pool: the pool whose workers may take it; empty: any.
        seconds: how long it may run; 0: as long as the service allows.
        name: what its user calls it.
        file: the script's file name, for tracebacks.
    """

    model_config = ConfigDict(extra="ignore")

    models: list[NamedModel] = Field(min_length=1, max_length=MOST_MODELS)
    form: str = "pt"
    pool: str = Field(default="", max_length=64, pattern=NAME)
    seconds: float = Field(default=0.0, ge=0.0, lt=1e9)
    name: str = Field(default="", max_length=120, pattern=NAME)
    file: str = Field(default="script.py", max_length=255, pattern=NAME)

    @field_validator("form")
    @classmethod
    def known(cls, form: str) -> str:
        if form not in (*FORMS, OWN_FORM):
            raise ValueError(f"must be one of {', '.join((*FORMS, OWN_FORM))}")
        return form

    @classmethod
    def read(cls, text: str | bytes) -> ScriptEnvelope:
        """Read and check an envelope.

        Raises:
            EnvelopeError: with the first wrong field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "data"
            raise EnvelopeError(f"The script's envelope is wrong at {where}: {first['msg']}.") from None

    def keys(self) -> list[ModelKey]:
        """The models' keys, each once.

        Raises:
            ModelKeyError: one of them cannot be a model's.
        """
        return list(dict.fromkeys(model.key() for model in self.models))
