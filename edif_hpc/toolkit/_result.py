"""What every method gives back: numbers with a record of how they came about, kept in a file and found again.

A result is a frozen dataclass of tensors on the CPU and plain values. Files hold no code: safetensors, npz and json are
read by anything, and `load` makes the same result of them. What is a table can be kept as parquet too, for data frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Self

import nnsight
import numpy as np
import torch

from edif_hpc.core.errors import MethodError
from edif_hpc.core.scripts import here
from edif_hpc.core.scripts.plain import META, listed, plain
from edif_hpc.core.whole import whole

KINDS: dict[str, type[Result]] = {}
"""By the name that files carry."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result:
    """The root of all results.

    Attributes:
        record: the method, its parameters, the model with revision, dtype, device and attention implementation, and
            versions: what is needed to make the result again.
    """

    record: dict[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def __repr__(self) -> str:
        parts = [f"{name}={_shape(value)}" for name, value in vars(self).items() if name != "record"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def save(self, path: str | Path | None = None) -> Self:
        """Keep the result in a file, or have it leave a block.

        Args:
            path: a file that ends in .safetensors, .npz, .json or .pt, or, where the result is a table, in .parquet.
                It is there whole or not at all.
                None, inside a trace or session: mark the result as what comes back from there, as nnsight's own `save`.

        Returns:
            The result itself.

        Raises:
            MethodError: the file's name ends in something else, or the result is no table.
            OSError: it cannot be written there.
        """
        if path is None:
            nnsight.save(self)
            return self
        target = Path(path).expanduser()
        suffixes = [suffix for suffix in WRITERS if suffix != PARQUET or self.table() is not None]
        suffix = target.suffix.lower()
        if not target.suffix and here.taker() is not None:
            raise MethodError(
                f"{str(path)!r} tells no form of file; next to its model a script keeps a result with "
                "edif_hpc.save(name, result), in the form that was asked for."
            )
        if suffix not in suffixes:
            raise MethodError(
                f"A result cannot be kept as {target.name!r}; end the name in {', '.join(suffixes)}, or draw it with "
                ".plot(path), which writes .html, .png, .svg and .pdf."
            )
        with whole(target) as file:
            WRITERS[suffix](self, file)
        return self

    def table(self) -> dict[str, list[Any]] | None:
        """The result as columns of one length, for a data frame; None where it is no table."""
        return None

    def parts(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What files hold of it: everything but tensors, with the kind of result and its record; and the tensors."""
        return self._plain(), self._tensors()

    def _tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, value in _values(self):
            if isinstance(value, torch.Tensor):
                found[name] = value.contiguous()
            elif _is_tensors(value):
                found |= {f"{name}.{key}": one.contiguous() for key, one in value.items()}
        return found

    def _plain(self) -> dict[str, Any]:
        found = {
            name: value
            for name, value in _values(self)
            if not isinstance(value, torch.Tensor) and not _is_tensors(value)
        }
        return {"result": type(self).__name__, **found}


def load(path: str | Path, name: str = "") -> Result:
    """The result in a file that its `save` made, or `edif_hpc.save` in a script, of its own class.

    Args:
        name: what `edif_hpc.save` was told to call it, in a .safetensors, .npz or .json file.

    Raises:
        MethodError: the file is no such result, or holds none of this name.
        OSError: it is not there, or cannot be read.
    """
    source = Path(path).expanduser()
    suffix = source.suffix.lower()
    if suffix not in READERS:
        raise MethodError(f"{source.name!r} is no kept result; those end in {', '.join(READERS)}.")
    try:
        return _made(*READERS[suffix](source, name))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - what readers say to a file that is something else is without end
        which = f" by the name {name!r}" if name else ""
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise MethodError(
            f"{source} holds no result of the toolkit{which} ({told}); make it anew with .save(path)."
        ) from None


def _made(rest: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Result:
    kind = KINDS[rest.pop("result")]
    values: dict[str, Any] = {}
    for path_in_it, tensor in tensors.items():
        outer, dot, inner = path_in_it.partition(".")
        if dot:
            values.setdefault(outer, {})[inner] = tensor
        else:
            values[path_in_it] = tensor
    return kind(**rest, **values)


def _values(result: Result) -> list[tuple[str, Any]]:
    return [(each.name, getattr(result, each.name)) for each in fields(result)]


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(one, torch.Tensor) for one in value.values())


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{len(value)}]"
    if _is_tensors(value):
        return f"{{{', '.join(f'{key}: {_shape(one)}' for key, one in value.items())}}}"
    return repr(value)


# -- files -------------------------------------------------------------------------------------------------------------

Parts = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _to_safetensors(result: Result, file: IO[bytes]) -> None:
    from safetensors.torch import save

    file.write(save(result._tensors(), metadata={META: json.dumps(result._plain())}))


def _from_safetensors(path: Path, name: str) -> Parts:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            texts, names = file.metadata() or {}, list(file.keys())
            return json.loads(texts[_inside(name, META)]), {
                inner: file.get_tensor(each) for each, inner in _of(names, name)
            }
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _inside(name: str, entry: str) -> str:
    """What an entry of a result is called in a file of several."""
    return f"{name}.{entry}" if name else entry


def _of(entries: Iterable[str], name: str) -> list[tuple[str, str]]:
    """The entries of the result of this name, and what each is called in it; without those that hold no tensor."""
    start = _inside(name, "")
    found = [(entry, entry.removeprefix(start)) for entry in entries if entry.startswith(start)]
    return [(entry, inner) for entry, inner in found if inner != META]


def _to_npz(result: Result, file: IO[bytes]) -> None:
    """numpy knows no bfloat16, which becomes float32."""
    arrays = {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        for name, value in result._tensors().items()
    }
    arrays[META] = np.array(json.dumps(result._plain()))
    np.savez_compressed(file, allow_pickle=False, **arrays)


def _from_npz(path: Path, name: str) -> Parts:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # of what is no archive numpy closes nothing
        return json.loads(str(file[_inside(name, META)])), {
            inner: torch.from_numpy(file[each]) for each, inner in _of(file.files, name)
        }


def _to_json(result: Result, file: IO[bytes]) -> None:
    """What is no number (nan, infinity) is null, as JSON has none."""
    file.write(json.dumps(listed(plain("result", result)), allow_nan=False).encode())


def _from_json(path: Path, name: str) -> Parts:
    whole = json.loads(path.read_text())
    whole = whole[name] if name else whole
    return whole[META], {inner: _tensor(**one) for inner, one in whole["tensors"].items()}


def _tensor(values: list[Any], dtype: str) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point:  # null becomes nan
        return torch.from_numpy(np.array(values, np.float64)).to(kind)
    return torch.tensor(values, dtype=kind)


def _to_pt(result: Result, file: IO[bytes]) -> None:
    torch.save({META: json.dumps(result._plain()), **result._tensors()}, file)


def _from_pt(path: Path, name: str) -> Parts:
    if name:
        raise ValueError("what edif_hpc.save kept as .pt is read by edif_hpc.load")
    whole = torch.load(path, weights_only=True)
    return json.loads(whole.pop(META)), whole


def _to_parquet(result: Result, file: IO[bytes]) -> None:
    """The table; the record lies in the metadata of its schema, as JSON."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MethodError("A .parquet file needs pyarrow: pip install pyarrow, or take another suffix.") from None
    table = pa.table(result.table()).replace_schema_metadata({META: json.dumps(result.record)})
    parquet.write_table(table, file)


PARQUET = ".parquet"
WRITERS = {".safetensors": _to_safetensors, ".npz": _to_npz, ".json": _to_json, ".pt": _to_pt, PARQUET: _to_parquet}
READERS = {".safetensors": _from_safetensors, ".npz": _from_npz, ".json": _from_json, ".pt": _from_pt}
