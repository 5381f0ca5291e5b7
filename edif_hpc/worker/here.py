"""What a script finds when it runs next to its models: they are here already, and so is the service.

A model that it builds is one over the weights that lie here, with the names and the tokenizer it asked for; what only
says where and how to load weights means nothing any more. `remote=True` runs where it stands. Which models there are
was said at submission: another one is refused, since nothing else may be loaded here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nnsight.modeling.mixins.loadable import split_envoy_kwargs
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.modeling.transformers import TransformersModel

from edif_hpc.core.scripts.envelope import DEFAULT_TASK
from edif_hpc.core.wire import ModelKey
from edif_hpc.worker import again
from edif_hpc.worker.failures import Refusal

PREPROCESSORS = ("tokenizer", "processor", "image_processor", "feature_extractor")
ENVIRONMENT = ("attn_implementation", "peft")

Apply = Callable[[Any, dict[str, Any]], None]
"""Sets a model's attention and adapter, after checking that they may be had."""


class Models:
    """The models of one script, by key.

    Args:
        apply: see `Apply`.
        sealed: descriptors of untouched weights, for those that have them: see `again`.
        attention: what each of them uses when a script names nothing.
    """

    def __init__(
        self,
        residents: Mapping[str, Any],
        apply: Apply,
        sealed: Mapping[str, tuple[int, ...]],
        attention: Mapping[str, str | None],
    ) -> None:
        self._residents = {ModelKey.parse(key): model for key, model in residents.items()}
        self._apply = apply
        self._sealed = sealed
        self._attention = attention
        self._given: set[ModelKey] = set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While the script runs, nnsight's models are these."""
        build, backend = TransformersModel.__init__, Remotable._remote_backend

        def init(model: Any, repo_id: Any, *args: Any, **options: Any) -> None:
            if isinstance(repo_id, str):
                self._rebuild(build, model, repo_id, options)
            else:
                build(model, repo_id, *args, **options)

        TransformersModel.__init__ = init
        Remotable._remote_backend = lambda *_, **__: None
        try:
            yield
        finally:
            TransformersModel.__init__, Remotable._remote_backend = build, backend

    def _rebuild(self, build: Callable[..., None], model: Any, repo_id: str, options: dict[str, Any]) -> None:
        task, revision = options.pop("task", None), options.pop("revision", None)
        key, resident = self._resident(repo_id, revision, task)
        environment = {name: options.pop(name, None) for name in ENVIRONMENT}
        environment["attn_implementation"] = environment["attn_implementation"] or self._attention[str(key)]
        _tell_dtype(repo_id, resident, options.get("dtype", options.get("torch_dtype")))
        own = {name: options.pop(name, None) or getattr(resident, name) for name in PREPROCESSORS}
        envoy, _ = split_envoy_kwargs(options)
        found = {name: value for name, value in own.items() if value is not None}
        if key in self._given:
            module = again.module(resident, self._sealed.get(str(key), ()))
            build(model, module, task=resident.task, revision=revision, **found, **envoy)
            self._apply(model, environment)
        else:
            self._given.add(key)
            self._apply(resident, environment)
            build(model, resident._module, task=resident.task, revision=revision, **found, **envoy)
            model.peft = resident.peft
        model.repo_id = repo_id

    def _resident(self, repo_id: str, revision: str | None, task: str | None) -> tuple[ModelKey, Any]:
        named = {key: model for key, model in self._residents.items() if key.repo_id == repo_id}
        for key, model in named.items():
            if key.revision == revision and key.task == (task or key.task):
                return key, model
        asked = f"{repo_id!r}" + (f" at {revision}" if revision else "") + (f" for {task}" if task else "")
        have = ", ".join(_spelled(key) for key in self._residents)
        raise Refusal(
            f"The script builds {asked}, and what was brought here for it is {have}: name it with --model when you "
            "submit, or build just these."
        )


def _spelled(key: ModelKey) -> str:
    task = f" for {key.task}" if key.task != DEFAULT_TASK else ""
    return f"{key.repo_id!r}" + (f" at {key.revision}" if key.revision else "") + task


def _tell_dtype(repo_id: str, resident: Any, asked: Any) -> None:
    """Numbers of another dtype are other numbers: say so in the script's own output."""
    wanted, held = str(asked).removeprefix("torch."), str(resident._module.dtype).removeprefix("torch.")
    if asked is not None and wanted not in ("auto", held):
        print(f"{repo_id} is held in {held} here, and the script asks for {wanted}: it runs in {held}.")
