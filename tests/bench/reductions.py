"""What it saves to reduce where the model is: `python -m tests.bench.reductions`, a part of `make bench`.

Two things that researchers ask of 1,000 prompts, the activations of all layers at the last token and the logit lens'
five likeliest tokens there. By the toolkit, as one request; and by plain remote traces of the same stock client, which
save what a trace has at hand and reduce it here: layers' outputs at all tokens, logits of all layers at the last one.
Both are given the same batches, of prompts of one length, so the answers must be the same.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from nnsight.modeling.transformers import TransformersModel

from edif_hpc.toolkit import extract_activations, logit_lens
from tests.support.proxy import Proxy

from . import line
from .line import Measured, measured, smollm2

BATCH = 50
"""Prompts of one plain trace."""
TOP = 5
TOKENS = 16
Found = tuple[torch.Tensor, ...]


def prompts_of(count: int) -> list[list[int]]:
    """Token ids drawn at random: sentences made from few words begin alike, and compress as no real ones do."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(1000, 40_000, (count, TOKENS), generator=generator).tolist()
    return found


def passes_alone(model: TransformersModel, prompts: list[list[int]]) -> Found:
    """What the model itself takes, which nothing can spare."""
    for rows in _batched(prompts):
        with model.trace(torch.tensor(rows), remote=True):
            model.lm_head.output[0, -1, 0].save()
    return ()


def plain_activations(model: TransformersModel, prompts: list[list[int]]) -> Found:
    """(prompts, layers, width)"""
    parts = []
    for rows in _batched(prompts):
        states: Any = None
        with model.trace(torch.tensor(rows), remote=True):
            states = [layer.output for layer in model.model.layers].save()
        parts.append(torch.stack([state[:, -1] for state in states], 1))
    return (torch.cat(parts),)


def plain_lens(model: TransformersModel, prompts: list[list[int]]) -> Found:
    """Ids and probabilities, (prompts, layers, top)"""
    parts = []
    for rows in _batched(prompts):
        logits: Any = None
        with model.trace(torch.tensor(rows), remote=True):
            logits = [model.lm_head(model.model.norm(layer.output[:, -1])) for layer in model.model.layers].save()
        found = [each.float().softmax(-1).topk(TOP, -1) for each in logits]
        parts.append(
            (torch.stack([each.indices for each in found], 1), torch.stack([each.values for each in found], 1))
        )
    ids, probabilities = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(probabilities)


def toolkit_activations(model: TransformersModel, prompts: list[list[int]]) -> Found:
    found = extract_activations(model, prompts, batch_tokens=BATCH * TOKENS, remote=True, progress=False)
    return (found.values[:, :, 0],)


def toolkit_lens(model: TransformersModel, prompts: list[list[int]]) -> Found:
    found = logit_lens(model, prompts, top=TOP, batch_tokens=BATCH * TOKENS, remote=True, progress=False)
    return found.ids[:, :, 0], found.probabilities[:, :, 0]


def _batched(prompts: list[list[int]]) -> list[list[list[int]]]:
    return [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]


ASKED: dict[str, Callable[[TransformersModel, list[list[int]]], Found]] = {
    "the forward passes alone": passes_alone,
    "last-token activations, plain traces": plain_activations,
    "last-token activations, toolkit": toolkit_activations,
    "top-5 logit lens, plain traces": plain_lens,
    "top-5 logit lens, toolkit": toolkit_lens,
}


def measure(proxy: Proxy, count: int, rounds: int, say: line.Say) -> dict[str, list[Measured]]:
    model, prompts = smollm2(), prompts_of(count)
    found: dict[str, list[Measured]] = {}
    answers: dict[str, Found] = {}
    for number, (name, ask) in itertools.product(range(rounds), ASKED.items()):
        say(f"round {number + 1} of {rounds}: {name}")

        def once(name: str = name, ask: Callable[..., Found] = ask) -> None:
            answers[name] = ask(model, prompts)

        found.setdefault(name, []).append(measured(proxy, once))
    plain = (*answers["last-token activations, plain traces"], *answers["top-5 logit lens, plain traces"])
    reduced = (*answers["last-token activations, toolkit"], *answers["top-5 logit lens, toolkit"])
    for one, other in zip(plain, reduced, strict=True):
        assert torch.equal(one, other), "the toolkit and a plain trace give different numbers"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.reductions", description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is asked (default 1)")
    options = parser.parse_args()
    say = line.teller()
    with line.at_the_end_of_a_line(say) as (_, proxy):
        found = measure(proxy, options.prompts, options.rounds, say)
    line.tell("reductions", f"SmolLM2, {options.prompts:,} prompts of {TOKENS} tokens", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
