"""What the parameters of all methods have in common: how they are checked, and how a mistake is told.

A method's parameters are data: they are checked where a person types them, on a login node without torch, and again
where the method runs. What needs the model itself (whether a layer exists, whether a word is one token) is checked by
`edif_hpc.toolkit`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from edif_hpc.core.errors import MethodError
from edif_hpc.core.scripts.files import FORMS

MAX_PROMPTS = 100_000


def _a_number(value: Any) -> Any:
    """True and False count as 1 and 0 in Python, and nobody means token 1 by them."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is no number")
    return value


Number = Annotated[int, BeforeValidator(_a_number)]
Text = Annotated[str, StringConstraints(min_length=1)]
Tokens = Annotated[list[Annotated[Number, Field(ge=0)]], Field(min_length=1)]


def _several(value: Any) -> Any:
    """One text or number stands for a list of one."""
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


Prompts = Annotated[list[Text | Tokens], BeforeValidator(_several), Field(min_length=1, max_length=MAX_PROMPTS)]
"""Texts, or lists of token ids."""
Words = Annotated[list[Text | Annotated[Number, Field(ge=0)]], BeforeValidator(_several)]
"""Texts of one token each, or token ids."""
Factors = Annotated[list[Annotated[float, BeforeValidator(_a_number)]], BeforeValidator(_several), Field(min_length=1)]
Layers = Annotated[list[Number], BeforeValidator(_several), Field(min_length=1)]
"""Layer numbers from 0; negative ones count from the last."""
Heads = Annotated[list[Annotated[Number, Field(ge=0)]], BeforeValidator(_several), Field(min_length=1)]
Positions = Literal["last", "all"] | Annotated[list[Number], BeforeValidator(_several), Field(min_length=1)]
"""Tokens of each prompt: the last, all, or these by number; negative ones count from its end."""
Component = Literal["residual", "attention", "mlp", "head"]
"""The residual stream behind a layer, what attention or MLP add to it, or what each head hands to the projection."""
Reduction = Literal["none", "mean", "max"]


class Method(BaseModel):
    """Parameters of one method. `name` is what the command line calls it."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    name: ClassVar[str] = ""
    gives: ClassVar[str] = ""
    """What its result is, for a list of methods."""
    is_table: ClassVar[bool] = False
    """Whether its result can be a .parquet file."""

    @classmethod
    def checked(cls, **parameters: Any) -> Self:
        """The parameters, checked.

        Raises:
            MethodError: the first that is wrong, and what it may be.
        """
        try:
            return cls.model_validate(parameters)
        except ValidationError as error:
            raise MethodError(sentence(cls, parameters, error)) from None

    @classmethod
    def forms(cls) -> list[str]:
        """Suffixes of the files that its result can be."""
        return [form for form in FORMS if form != "parquet" or cls.is_table]


class OverPrompts(Method):
    """What every method has that reads a list of prompts."""

    prompts: Prompts = Field(description="Texts, or lists of token ids.")
    layers: Layers | None = Field(None, description="Layers from 0, negative ones from the last; none: all.")
    batch_tokens: Number = Field(
        4096, ge=1, description="Tokens, padding included, that one forward pass holds; a longer prompt goes alone."
    )


class OnPositions(OverPrompts):
    positions: Positions = Field("last", description="last, all, or a list of token numbers; negative: from the end.")


def sentence(method: type[Method], parameters: dict[str, Any], error: ValidationError) -> str:
    """The first mistake of a pydantic error, as one sentence for a person."""
    found = error.errors(include_url=False)
    first = found[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    name = method.name
    if first["type"] == "extra_forbidden":
        near = get_close_matches(field, method.model_fields, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(method.model_fields)}."
        return f"{name} has no parameter {field!r}; {meant}"
    if first["type"] == "missing":
        return f"{name} needs {field!r}: {_described(method, field)}"
    if not field:
        return f"{name}: {first['msg'].removeprefix('Value error, ').rstrip('.')}."
    given = _shown(parameters.get(field))
    return f"{name}: {field} is {given}, which cannot be used; it takes: {_described(method, field)}"


def _described(method: type[Method], field: str) -> str:
    known = method.model_fields.get(field)
    return (known.description if known is not None and known.description else "another value.").strip()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
