"""A saved value as what any file can hold: arrays, numbers, texts, and lists and dicts of them.

Tensors are taken by what they can do and not by their class, since torch is no business of this room. A value is
turned when it is saved, so that what cannot be written is told in that line, and what it is then is what is written.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

from ..errors import SavedError

BFLOAT16 = "bfloat16"
WIDEN = ("torch.float8", "torch.float4")
"""Beginnings of the dtypes that no file but torch's own holds: they become float32."""
META = "edif_hpc"
"""The entry of a kept result that holds everything but tensors, with the record of how it came about."""


@dataclass(frozen=True)
class Array:
    """Numbers in a row-major numpy array. Of bfloat16, which numpy lacks, the bits lie there as uint16."""

    bits: Any
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    @property
    def values(self) -> Any:
        """As numpy computes with them."""
        import numpy as np

        if self.dtype != BFLOAT16:
            return self.bits
        return (self.bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Kept:
    """A result of the toolkit, or what else comes apart as one does.

    Args:
        arrays: its tensors.
        rest: everything else, with the record of how it came about; plain.
        table: its columns, where it is a table.
    """

    arrays: dict[str, Array]
    rest: dict[str, Any]
    table: dict[str, Any] | None


def plain(name: str, value: Any) -> Any:
    """The value that a file can hold.

    Raises:
        SavedError: there is none.
    """
    found = _plain(value)
    if found is ...:
        raise SavedError(
            f"The value {name!r} is a {type(value).__name__}, or holds something that no file can: save tensors, "
            "arrays, numbers, texts, or lists and dicts of them, or have the result as .pt."
        )
    return found


def _plain(value: Any) -> Any:
    import numpy as np

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Array, Kept)):
        return value
    if hasattr(value, "parts") and hasattr(value, "table"):
        rest, tensors = value.parts()
        return Kept({name: _plain(tensor) for name, tensor in tensors.items()}, rest, value.table())
    if isinstance(value, dict):
        inner = {str(key): _plain(one) for key, one in value.items()}
        return ... if any(one is ... for one in inner.values()) else inner
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(one) for one in value]
        return ... if any(one is ... for one in items) else items
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        return _of_tensor(value.detach().cpu())
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a data frame
        return {str(column): _plain(np.asarray(value[column])) for column in value.columns}
    if isinstance(value, (np.ndarray, np.generic)):
        return _of_numpy(value) if value.shape or value.dtype.kind in "biufc" else _plain(value.item())
    return ...


def _of_tensor(tensor: Any) -> Any:
    import numpy as np

    dtype = str(tensor.dtype)
    if dtype.startswith(WIDEN):
        tensor = tensor.float()
    if dtype != f"torch.{BFLOAT16}":
        return _of_numpy(tensor.resolve_conj().resolve_neg().numpy())
    whole = tensor.contiguous()
    bits = np.empty(tuple(whole.shape), np.uint16)
    if bits.nbytes:  # numpy cannot look at such a tensor, and torch is not known here
        ctypes.memmove(bits.ctypes.data, whole.data_ptr(), bits.nbytes)
    return Array(bits, BFLOAT16)


def _of_numpy(array: Any) -> Any:
    import numpy as np

    if array.dtype.kind in "biufc":
        return Array(np.array(array, order="C"), str(array.dtype))
    if array.dtype.kind in "US":
        return array.tolist()
    return [_plain(one) for one in array.tolist()] if array.dtype.kind == "O" else ...


def listed(value: Any) -> Any:
    """The same in Python's own types: for JSON, where what is no number (nan, infinity) is null."""
    if isinstance(value, Array):
        return listed(value.values.tolist())
    if isinstance(value, Kept):
        tensors = {name: {"dtype": one.dtype, "values": listed(one)} for name, one in value.arrays.items()}
        return {META: listed(value.rest), "tensors": tensors}
    if isinstance(value, dict):
        return {key: listed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [listed(one) for one in value]
    if isinstance(value, complex):
        return [listed(value.real), listed(value.imag)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
