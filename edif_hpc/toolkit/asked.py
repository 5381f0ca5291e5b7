"""What a request for a method by name runs: the method beside its model, its result as a file of the form asked for."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import torch
from nnsight.modeling.transformers import TransformersModel

from edif_hpc.core.errors import MethodError
from edif_hpc.core.scripts import here
from edif_hpc.core.scripts.by_name import Asked

from ._methods import run_method
from ._result import WRITERS, Result

SEED = 0
"""Of methods without a parameter `seed`, which draw no random numbers."""


def main() -> None:
    """Run what the script's argument asks for; a mistake that only the model shows ends it with one sentence."""
    take = here.taker_of_the_whole()
    if take is None:
        raise RuntimeError("This runs in a request that `edif-hpc submit --method` made; call run_method instead.")
    asked = Asked.read(sys.argv[1])
    model = TransformersModel(asked.repo_id, revision=asked.revision, task=asked.task)
    file = io.BytesIO()
    try:
        WRITERS[f".{asked.form}"](_made(model, asked), file)
    except MethodError as error:
        sys.exit(error)  # type: ignore[arg-type] # any object will do, and the worker shows it as it is
    take(file.getbuffer())


def _made(model: TransformersModel, asked: Asked) -> Result:
    seed = asked.parameters.get("seed", SEED)
    with torch.random.fork_rng(devices=[]):  # this process may serve others after us
        torch.manual_seed(seed)
        result = run_method(asked.method, model, asked.parameters, remote=True)
    return replace(result, record={**result.record, "seed": seed})
