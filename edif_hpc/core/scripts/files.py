"""Saved values as one file of a common format: safetensors, npz, parquet or json, by its suffix.

The worker writes these next to the model, so that whoever fetches one needs no torch; a script that runs on its
author's own machine writes the same. torch's own `pt` is not for this room.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from typing import Any

from ..errors import SavedError
from .plain import META, Array, Kept, listed

FORMS = ("pt", "safetensors", "npz", "parquet", "json")
"""Suffixes of the files that saved values can be written as."""
OWN_FORM = "file"
"""The form of a result that only the script itself can write."""
SAFETENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64",
}  # fmt: skip
ALIGNMENT = 8


def written(values: dict[str, Any], form: str) -> bytes:
    """The file of these values, which `plain` made.

    Raises:
        SavedError: a file of that form cannot hold them.
    """
    return {"safetensors": _safetensors, "npz": _npz, "parquet": _parquet, "json": _json}[form](values)


def check(name: str, value: Any, form: str) -> None:
    """Refuse what a file of this form cannot hold, as far as one value by itself tells.

    Raises:
        SavedError: naming the value.
    """
    if form in ("safetensors", "npz"):
        for _ in _arrays(name, value, form):
            pass


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(listed(values), ensure_ascii=False, indent=1, allow_nan=False).encode("utf-8", "replace")


def _npz(values: dict[str, Any]) -> bytes:
    import numpy as np

    arrays = {
        name: found.values if isinstance(found, Array) else np.array(found)
        for name, found in _flat(values, "npz").items()
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _safetensors(values: dict[str, Any]) -> bytes:
    header: dict[str, Any] = {}
    texts: dict[str, str] = {}
    parts: list[bytes] = []
    end = 0
    for name, value in _flat(values, "safetensors").items():
        if isinstance(value, str):
            texts[name] = value
            continue
        data = value.bits.tobytes()
        header[name] = {
            "dtype": SAFETENSORS[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + len(data)]
        }  # fmt: skip
        parts.append(data)
        end += len(data)
    head = json.dumps({**({"__metadata__": texts} if texts else {}), **header}).encode()
    head += b" " * (-len(head) % ALIGNMENT)
    return b"".join([struct.pack("<Q", len(head)), head, *parts])


def _flat(values: dict[str, Any], form: str) -> dict[str, Array | str]:
    found: dict[str, Array | str] = {}
    for given, value in values.items():
        for name, inner in _arrays(given, value, form):
            if name in found:
                raise SavedError(f"Two saved values come to the name {name!r} in a .{form} file; rename one.")
            found[name] = inner
    return found


def _arrays(name: str, value: Any, form: str) -> Iterator[tuple[str, Array | str]]:
    """Every array and text in a value, with the path to it for a name; a list of numbers is one array."""
    import numpy as np

    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Array):
        if form == "safetensors" and value.dtype not in SAFETENSORS:
            raise SavedError(f"The value {name!r} is of {value.dtype}, which a .{form} file cannot hold.")
        yield name, value
    elif isinstance(value, (bool, int, float)) or (isinstance(value, list) and _numbers(value)):
        array = np.array(value)
        if array.dtype.kind not in "biuf":
            raise SavedError(f"The value {name!r} has a number that a .{form} file cannot hold: it is too large.")
        yield name, Array(array, str(array.dtype))
    elif isinstance(value, Kept):
        yield f"{name}.{META}", json.dumps(listed(value.rest))
        for key, inner in value.arrays.items():
            yield f"{name}.{key}", inner
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _arrays(f"{name}.{key}", inner, form)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _arrays(f"{name}.{number}", inner, form)
    else:
        raise SavedError(f"The value {name!r} is {value!r}, which a .{form} file cannot hold; leave it out.")


def _numbers(items: list[Any]) -> bool:
    return bool(items) and all(isinstance(item, (bool, int, float)) for item in items)


def _parquet(values: dict[str, Any]) -> bytes:
    """One table: each value is a column, or the only one is the whole table (a dict of columns, a list of rows)."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise SavedError("There is no pyarrow where the script ran, so it cannot leave a .parquet file.") from None
    only = next(iter(values.values())) if len(values) == 1 else None
    if isinstance(only, Kept):
        if only.table is None:
            raise SavedError(f"{only.rest.get('result', 'This')} is no table; take another suffix than .parquet.")
        only = only.table
    if isinstance(only, list) and only and all(isinstance(row, dict) for row in only):
        columns: dict[str, Any] = {key: [row.get(key) for row in only] for row in only for key in row}
    else:
        columns = only if isinstance(only, dict) else values
    try:
        arrays = {name: _column(pa, value) for name, value in columns.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name!r} has {length}" for name, length in lengths.items())
            raise SavedError(f"A .parquet file is one table, so all values must be of one length: {told}.")
        buffer = io.BytesIO()
        parquet.write_table(pa.table(arrays), buffer)
    except (pa.ArrowException, OverflowError) as error:
        why = str(error).splitlines()[0]
        raise SavedError(f"The saved values make no .parquet file ({why}); take another suffix.") from None
    return buffer.getvalue()


def _column(pa: Any, value: Any) -> Any:
    if isinstance(value, Array) and value.shape:
        flat = pa.array(value.values.reshape(-1))
        for width in reversed(value.shape[1:]):
            if not width:
                return pa.array(value.values.tolist())
            flat = pa.FixedSizeListArray.from_arrays(flat, width)
        return flat
    found = listed(value)
    return pa.array(found if isinstance(found, list) else [found])
