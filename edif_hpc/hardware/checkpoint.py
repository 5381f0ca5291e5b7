"""What a model in the shared cache is and how big: read from file headers on a login node, without torch.

The gateway asks on every request, so answers are kept until the files change. Names come from strangers: they are
checked here before they touch a path. What this module must not know: who asks, and how a model is loaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edif_hpc.core.errors import ModelError
from edif_hpc.hardware.safetensors import Shard, read_shard
from edif_hpc.hardware.tensor_parallel import Split, split_of

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
LONGEST_REVISION = 128
LARGEST_JSON = 64 * 1024 * 1024
"""Bytes. The index of a model with thousands of experts has about 10 MB."""
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
CODE_POINTERS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """One model at one commit in the cache.

    Args:
        commit: the resolved revision, 40 hex digits.
        path: the snapshot's directory.
        dtype: torch's name of the type that "auto" loads.
        parameters: elements of all tensors in the safetensors files; stored duplicates count twice.
        stored_bytes: their size as stored.
        counts: elements by stored type, as safetensors names them ("BF16").
        custom_code: loading it runs Python from the repository (auto_map), which needs an admin's word.
        quantization: the method of a quantised checkpoint ("gptq", "mxfp4"), else None.
        base: for a PEFT adapter the model it belongs to; None for a full model.
        split: over how many ranks it can be split.
    """

    repo_id: str
    commit: str
    path: Path
    dtype: str
    parameters: int
    stored_bytes: int
    counts: tuple[tuple[str, int], ...]
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    custom_code: bool = False
    quantization: str | None = None
    base: str | None = None
    split: Split = field(default_factory=Split)

    @property
    def adapter(self) -> bool:
        """Whether this is a PEFT adapter, which cannot be served by itself."""
        return self.base is not None


def describe(cache: Path, repo_id: str, revision: str | None = None) -> Checkpoint:
    """Describe a model of the hub cache `cache` (the directory that holds `models--ORG--NAME` folders).

    Raises:
        ModelError: not in the cache, incomplete, damaged, or of a form that cannot be loaded; one sentence.
    """
    key = (str(cache), repo_id, revision)
    known = _KNOWN.get(key)
    if known is not None and _stamps(known.watched) == known.stamps:
        return known.checkpoint
    _KNOWN.pop(key, None)
    watched, checkpoint = _read(cache, repo_id, revision)
    # Only what exists is kept, so strangers cannot make this grow with made-up names.
    _KNOWN[key] = _Known(checkpoint, watched, _stamps(watched))
    return checkpoint


def list_models(cache: Path) -> list[Checkpoint]:
    """Every model in the cache at its main revision, by name; `broken_models` names those that cannot be read."""
    return [found for _, found in _survey(cache) if isinstance(found, Checkpoint)]


def broken_models(cache: Path) -> dict[str, str]:
    """Entries of the cache that cannot be served, each with the sentence that says why."""
    return {name: str(found) for name, found in _survey(cache) if isinstance(found, ModelError)}


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files that hold its weights: links to blobs, as the Hub's own client lays them.

    Raises:
        ModelError: some are gone since it was described.
    """
    return _weight_files(checkpoint.path, checkpoint.repo_id, "adapter_model" if checkpoint.adapter else "model")


def check_repo_id(repo_id: str) -> str:
    """Give back a repository id that is safe to make a path of.

    Raises:
        ModelError: it could not name one on the Hub.
    """
    if not NAME.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith((".git", "-", ".")):
        raise ModelError(f"{repo_id[:120]!r} cannot be the name of a model; write it as ORG/NAME, as on the Hub.")
    return repo_id


def entry_name(repo_id: str) -> str:
    """The folder of a model in a hub cache: `models--ORG--NAME`."""
    return "models--" + check_repo_id(repo_id).replace("/", "--")


# -- remembering ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    checkpoint: Checkpoint
    watched: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...] | None


_KNOWN: dict[tuple[str, str, str | None], _Known] = {}


def _stamps(paths: tuple[str, ...]) -> tuple[tuple[int, int], ...] | None:
    """Inode and time of each path, or None when one is gone."""
    try:
        return tuple((found.st_ino, found.st_mtime_ns) for found in map(os.stat, paths))
    except OSError:
        return None


# -- finding ----------------------------------------------------------------------------------------------------------


def _read(cache: Path, repo_id: str, revision: str | None) -> tuple[tuple[str, ...], Checkpoint]:
    entry = _entry(cache, repo_id)
    ref, commit = _resolve(entry, repo_id, revision)
    snapshot = entry / "snapshots" / commit
    config_file = snapshot / "config.json"
    adapter_file = snapshot / "adapter_config.json"
    watched = tuple(str(path) for path in (ref, snapshot, config_file, adapter_file) if path.exists())
    if adapter_file.is_file() and not config_file.is_file():
        return watched, _adapter(repo_id, commit, snapshot)
    return watched, _model(repo_id, commit, snapshot)


def _entry(cache: Path, repo_id: str) -> Path:
    entry = cache / entry_name(repo_id)
    missing = ModelError(
        f"The model {repo_id!r} is not in this service's cache; ask its admin to run `edif-hpc models pull {repo_id}`."
    )
    try:
        real = entry.resolve(strict=True)
    except (OSError, RuntimeError):
        raise missing from None
    # Files may be links to anywhere (an admin's shared storage); the folder itself has to be in the cache.
    if real.parent != cache.resolve() or not real.is_dir():
        raise missing
    return entry


def _resolve(entry: Path, repo_id: str, revision: str | None) -> tuple[Path, str]:
    """The file that the answer hangs on, and the commit."""
    wanted = "main" if revision is None else revision
    if len(wanted) > LONGEST_REVISION or not REVISION.fullmatch(wanted) or ".." in wanted:
        raise ModelError(f"{wanted[:120]!r} cannot be a revision; name a branch, a tag or a commit of {repo_id}.")
    ref = entry / "refs" / wanted
    commit = wanted if COMMIT.fullmatch(wanted) else _commit_in(ref)
    snapshot = entry / "snapshots" / (commit or "-")
    if commit is None or not snapshot.is_dir():
        pull = f"edif-hpc models pull {repo_id}" + (f" --revision {wanted}" if revision is not None else "")
        raise ModelError(
            f"The model {repo_id!r} is in this service's cache, but not its revision {wanted!r}; "
            f"ask its admin to run `{pull}`."
        )
    return (snapshot if commit == wanted else ref), commit


def _commit_in(ref: Path) -> str | None:
    try:
        with ref.open() as handle:
            text = handle.read(64).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if COMMIT.fullmatch(text) else None


def _survey(cache: Path) -> Iterator[tuple[str, Checkpoint | ModelError]]:
    for folder in sorted(cache.glob("models--*")):
        repo_id = folder.name.removeprefix("models--").replace("--", "/")
        try:
            yield repo_id, describe(cache, repo_id)
        except ModelError as error:
            yield repo_id, error


# -- reading ----------------------------------------------------------------------------------------------------------


def _model(repo_id: str, commit: str, snapshot: Path) -> Checkpoint:
    config = _json(snapshot / "config.json", repo_id)
    if config is None:
        raise ModelError(f"The model {repo_id!r} has no config.json, so transformers cannot load it; pull it again.")
    shards = [read_shard(path, repo_id) for path in _weight_files(snapshot, repo_id, "model")]
    counts = _sum(shards)
    return Checkpoint(
        repo_id=repo_id,
        commit=commit,
        path=snapshot,
        dtype=_declared_dtype(config) or _stored_dtype(counts),
        parameters=sum(counts.values()),
        stored_bytes=sum(shard.data_bytes for shard in shards),
        counts=tuple(sorted(counts.items())),
        architectures=_strings(config.get("architectures")),
        model_type=_string(config.get("model_type")) or "",
        custom_code=any("auto_map" in (_json(snapshot / name, repo_id) or {}) for name in CODE_POINTERS),
        quantization=_quantization(config),
        split=split_of(config),
    )


def _adapter(repo_id: str, commit: str, snapshot: Path) -> Checkpoint:
    config = _json(snapshot / "adapter_config.json", repo_id) or {}
    shards = [read_shard(path, repo_id) for path in _weight_files(snapshot, repo_id, "adapter_model")]
    counts = _sum(shards)
    return Checkpoint(
        repo_id=repo_id,
        commit=commit,
        path=snapshot,
        dtype=_stored_dtype(counts),
        parameters=sum(counts.values()),
        stored_bytes=sum(shard.data_bytes for shard in shards),
        counts=tuple(sorted(counts.items())),
        base=_string(config.get("base_model_name_or_path")) or "",
    )


def _weight_files(snapshot: Path, repo_id: str, stem: str) -> list[Path]:
    """The safetensors files that transformers would load: those of the index, or the single one."""
    index = _json(snapshot / f"{stem}.safetensors.index.json", repo_id)
    single = snapshot / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    if index is None:
        if any((snapshot / name).exists() for name in PICKLED):
            raise ModelError(
                f"The model {repo_id!r} has only pickled weights (.bin), which this service does not load; "
                "pull a revision with safetensors (the Hub often has one at refs/pr/N) or convert it with "
                "save_pretrained and pull that folder."
            )
        raise ModelError(f"The model {repo_id!r} has no safetensors weights in the cache; pull it again.")
    weight_map = index.get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ModelError(f"The index of the weights of {repo_id!r} is damaged; pull it again.")
    absent = [name for name in names if not (snapshot / name).is_file()]
    if absent:
        raise ModelError(
            f"The model {repo_id!r} is incomplete in the cache ({len(absent)} of {len(names)} weight files are "
            "missing); pull it again."
        )
    return [snapshot / name for name in names]


def _json(path: Path, repo_id: str) -> dict[str, Any] | None:
    """A JSON object, None when there is no such file."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError("too large")
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{path.name} of the model {repo_id!r} cannot be read; pull it again.") from None
    return data


def _sum(shards: list[Shard]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shard in shards:
        for kind, count in shard.counts.items():
            counts[kind] = counts.get(kind, 0) + count
    return counts


# -- what the config says ---------------------------------------------------------------------------------------------

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _declared_dtype(config: dict[str, Any]) -> str | None:
    """`dtype`, or `torch_dtype` before transformers 5. A multimodal one may say it only for its text half."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        named = _string(place.get("dtype")) or _string(place.get("torch_dtype"))
        if named and named != "auto":
            return named.removeprefix("torch.")
    return None


def _stored_dtype(counts: dict[str, int]) -> str:
    """The floating type most parameters are stored in: what transformers falls back to."""
    floating = {kind: count for kind, count in counts.items() if kind in TORCH_NAMES}
    return TORCH_NAMES[max(floating, key=lambda kind: floating[kind])] if floating else "float32"


def _quantization(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return (_string(found.get("quant_method")) or "unnamed") if isinstance(found, dict) else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
