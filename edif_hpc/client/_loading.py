"""From the file that torch.save wrote to Python values, without running what it names.

A pickle may name any function and have it called. nnsight's own client lets it, so whoever can answer in the
service's place, or alter a result on its way, runs code on the user's machine. Here only names on a list are found:
tensors and what they are made of, numbers, texts, containers, numpy arrays, nnsight's caches, the output and cache
classes of transformers, and the results of this project's toolkit. Every callable on it only builds a value. Anything
else is refused by name, unless the user says `trust`.

What this does not cover: a bug in torch's or numpy's own reading of bytes, values that are wrong, and attributes of
the classes on the list, which a forged pickle could set. torch's `weights_only` is no help: it reads no pickles of
protocol 4, which is what results are.
"""

from __future__ import annotations

import importlib
import io
import pickle
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ._errors import DownloadFailed, UntrustedResult

BUILTINS = frozenset({"set", "frozenset", "slice", "range", "complex", "bytearray", "list", "dict", "tuple", "object"})
TORCH_UTILS = frozenset(
    {
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
        "_rebuild_qtensor",
        "_rebuild_nested_tensor",
        "_rebuild_meta_tensor_no_storage",
        "_rebuild_device_tensor_from_numpy",
        "_rebuild_device_tensor_from_cpu_tensor",
    }
)
EXACT = {
    "torch": frozenset({"Size", "device", "Tensor", "Generator", "memory_format", "layout"}),
    "torch._utils": TORCH_UTILS,
    "torch._tensor": frozenset({"_rebuild_from_type_v2"}),
    "torch.storage": frozenset({"TypedStorage", "UntypedStorage"}),
    "torch.nn.parameter": frozenset({"Parameter", "Buffer"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict", "defaultdict", "Counter", "deque"}),
    "_codecs": frozenset({"encode"}),
    "copyreg": frozenset({"_reconstructor"}),
    "builtins": BUILTINS,
    "datetime": frozenset({"date", "datetime", "time", "timedelta"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "uuid": frozenset({"UUID"}),
    "numpy": frozenset({"ndarray", "dtype"}),
    "nnsight.intervention.cache": frozenset({"Cache", "CacheView", "Entry"}),
    "transformers.tokenization_utils_base": frozenset({"BatchEncoding"}),
    "tokenizers": frozenset({"Encoding"}),
}
TOOLKIT = {
    "attention": "AttentionPatterns",
    "attribution": "Attribution",
    "extraction": "Activations",
    "lens": "LogitLens",
    "neurons": "TopNeurons",
    "patching": "Patching",
    "probing": "Probe",
    "steering": "Steered SteeringVector",
}
EXACT |= {f"edif_hpc.toolkit.{module}": frozenset(names.split()) for module, names in TOOLKIT.items()}
"""What the toolkit's methods give back: dataclasses of tensors and plain values."""
NUMPY_PARTS = frozenset({"_reconstruct", "scalar", "_frombuffer"})
NUMPY_MODULES = tuple(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric"))


def load(source: Path | bytes | bytearray, *, lazy: bool = False, trust: bool = False) -> dict[str, Any]:
    """The saved values by name, tensors on the CPU.

    Args:
        source: the torch.save file, or its bytes.
        lazy: map the file into memory instead of reading it; only with a path.
        trust: load whatever type is named, running the code that this means.

    Raises:
        UntrustedResult: it names something that is not on the list.
        DownloadFailed: it is no such file.
    """
    import torch

    module = pickle if trust else _careful_pickle()
    opened = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        if not trust:
            _no_script(opened)
        found = torch.load(opened, map_location="cpu", weights_only=False, mmap=lazy or None, pickle_module=module)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, zipfile.BadZipFile) as error:
        where = source if isinstance(source, Path) else "what was read"
        raise DownloadFailed(f"The result in {where} cannot be loaded ({str(error)[:300]}); fetch it again.") from error
    if not isinstance(found, dict):
        raise DownloadFailed(f"The result is a {type(found).__name__}, not the values of a block; fetch it again.")
    return found


def load_file(path: str | Path, *, lazy: bool = False, trust: bool = False) -> dict[str, Any]:
    """The values in a file that `Request.download` made, by name; tensors on the CPU.

    Args:
        lazy: map the file into memory: tensors are read when they are used.
        trust: load whatever type is named, running the code that this means.

    Raises:
        UntrustedResult: it names a type that is not loaded without `trust`.
        DownloadFailed: it is no such file.
        FileNotFoundError: it is not there.
    """
    return load(Path(path).expanduser(), lazy=lazy, trust=trust)


def _no_script(opened: Path | io.BytesIO) -> None:
    """Refuse a TorchScript archive, which torch.load would hand to another loader."""
    with zipfile.ZipFile(opened) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise UntrustedResult("The result is a TorchScript archive, which no block's values are; fetch it again.")
    if isinstance(opened, io.BytesIO):
        opened.seek(0)


def _careful_pickle() -> ModuleType:
    """A stand-in for the pickle module: torch.load takes its Unpickler from there."""
    module = ModuleType("edif_hpc_careful_pickle")
    vars(module).update(vars(pickle))
    # A module of our making has the attributes that torch looks for, and none that mypy knows.
    module.Unpickler = _Careful  # type: ignore[attr-defined]  # see above
    module.load = lambda file, **options: _Careful(file, **options).load()  # type: ignore[attr-defined]  # too
    return module


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not _known(module, name):
            raise UntrustedResult(
                f"The result names {module}.{name}, which is not loaded without being told to; save "
                "tensors, numbers, texts or containers of them, or pass trust=True if you trust the service with this "
                "machine."
            )
        return super().find_class(module, name)


def _known(module: str, name: str) -> bool:
    if "." in name:  # a path through attributes could lead anywhere
        return False
    if name in EXACT.get(module, ()):
        return True
    if module == "torch":
        import torch

        found = getattr(torch, name, None)
        return isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage"))
    if module in NUMPY_MODULES:
        return name in NUMPY_PARTS
    if module == "numpy.dtypes":
        return name.endswith("DType")
    if module.startswith("transformers."):
        return _is_output(module, name)
    return False


def _is_output(module: str, name: str) -> bool:
    """Whether this is a class of transformers that only holds values: a model's output, or its keys and values."""
    try:
        found = getattr(importlib.import_module(module), name)
        from transformers import cache_utils
        from transformers.utils.generic import ModelOutput
    except (ImportError, AttributeError):
        return False
    names = ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin")  # the last since transformers 5
    holders = tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))
    return isinstance(found, type) and issubclass(found, (ModelOutput, *holders))
