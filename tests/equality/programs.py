"""Programs that run locally and remotely alike. Each takes a model and how to run (`{}` or `{"remote": True}`).

They return what they saved; the suite compares that exactly. `Shape` hides the module names of an architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support import models

PROMPT = "The Eiffel Tower is located in the city of"
OTHER = "The Colosseum is located in the city of Rome"
How = dict[str, Any]
Program = Callable[[Any, str, How], dict[str, Any]]


def layers(model: Any, name: str) -> Any:
    """The residual stream's blocks."""
    if name == "gpt2":
        return model.transformer.h
    if name in ("t5", "bart"):
        return model.encoder.block if name == "t5" else model.encoder.layers
    if name == "qwen2.5-vl":
        return model.model.language_model.layers
    return model.model.layers


def norm(model: Any, name: str) -> Any:
    return model.transformer.ln_f if name == "gpt2" else model.model.norm


def hidden(block: Any) -> Any:
    """The hidden state of a block's output, which some architectures wrap in a tuple."""
    return block.output[0] if isinstance(block.output, tuple) else block.output


# -- every architecture ------------------------------------------------------------------------------------------------


def read(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(**models.sample(name, model), **how):
        first = hidden(blocks[0]).clone().save()
        last = hidden(blocks[-1]).clone().save()
    return {"first": first, "last": last}


def write(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(**models.sample(name, model), **how):
        hidden(blocks[1])[:, -1] = 0.5
        after = hidden(blocks[-1]).clone().save()
    return {"after": after}


def gradient(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(**models.sample(name, model), **how):
        early = hidden(blocks[0])
        early.requires_grad_(True)
        loss = hidden(blocks[-1]).float().pow(2).sum()
        with loss.backward():
            grad = early.grad.clone().save()
    return {"grad": grad}


# -- causal language models --------------------------------------------------------------------------------------------


def generate(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False, **how) as tracer:
        seen = [].save()
        for _ in tracer.iter[:3]:
            seen.append(hidden(blocks[1])[:, -1].clone())
        ids = tracer.result.save()
    return {"ids": ids, "seen": seen}


def steer_while_generating(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False, **how) as tracer:
        for _ in tracer.iter[:4]:
            hidden(blocks[2])[:] += 1.0
        ids = tracer.result.save()
    return {"ids": ids}


def session(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.session(**how):
        with model.trace(PROMPT):
            clean = hidden(blocks[1])[:, -1].clone().save()
        doubled = clean * 2
        with model.trace(OTHER):
            hidden(blocks[1])[:, -1] = doubled
            logits = model.lm_head.output[:, -1].clone().save()
        best = int(logits.argmax(-1)[0])
        best = torch.tensor([best]).save()
    return {"clean": clean, "logits": logits, "best": best}


def patching_with_a_barrier(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(**how) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(PROMPT):
            clean = hidden(blocks[1])[:, -1].clone()
            barrier()
        with tracer.invoke(OTHER):
            barrier()
            hidden(blocks[1])[:, -1] = clean
            patched = model.lm_head.output[:, -1].clone().save()
    return {"patched": patched}


def several_invokes(model: Any, name: str, how: How) -> dict[str, Any]:
    with model.trace(**how) as tracer:
        with tracer.invoke(PROMPT):
            one = model.lm_head.output[:, -1].clone().save()
        with tracer.invoke([OTHER, PROMPT]):
            two = model.lm_head.output[:, -1].clone().save()
    return {"one": one, "two": two}


def cache(model: Any, name: str, how: How) -> dict[str, Any]:
    path = layers(model, name)[1].path
    with model.trace(PROMPT, **how) as tracer:
        kept = tracer.cache(modules=[path]).save()
    value = kept[path].output
    return {"cached": value[0] if isinstance(value, tuple) else value}


def skip(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(PROMPT, **how):
        blocks[1].skip(blocks[0].output)
        logits = model.lm_head.output[:, -1].clone().save()
    return {"logits": logits}


def stop(model: Any, name: str, how: How) -> dict[str, Any]:
    with model.trace(PROMPT, **how) as tracer:
        kept = hidden(layers(model, name)[0]).clone().save()
        tracer.stop()
    return {"kept": kept}


def source(model: Any, name: str, how: How) -> dict[str, Any]:
    attention = layers(model, name)[0].attn if name == "gpt2" else layers(model, name)[0].self_attn
    with model.trace(PROMPT, **how):
        inner = attention.source.attention_interface_1.output[0].clone().save()
    return {"inner": inner}


def logit_lens(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    final = norm(model, name)
    with model.trace(PROMPT, **how):
        lens = [].save()
        for block in blocks:
            lens.append(model.lm_head(final(hidden(block)[:, -1])).softmax(-1).topk(5).values)
    return {"lens": lens}


def probe_trained_in_a_session(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.session(**how):
        rows = []
        for text in (PROMPT, OTHER, "The quick brown fox", "When Mary and John went to the store"):
            with model.trace(text):
                rows.append(hidden(blocks[2])[0, -1].detach().clone())
        features = torch.stack(rows)
        labels = torch.tensor([1.0, 1.0, 0.0, 0.0], device=features.device)
        torch.manual_seed(0)
        weights = torch.zeros(features.shape[1], requires_grad=True, device=features.device)
        optimizer = torch.optim.SGD([weights], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(features @ weights, labels).backward()
            optimizer.step()
        trained = weights.detach().clone().save()
    return {"trained": trained}


def edit(model: Any, name: str, how: How) -> dict[str, Any]:
    with model.edit() as (_, edited):
        hidden(layers(edited, name)[0])[:] *= 0.5
    with edited.trace(PROMPT, **how):
        logits = edited.lm_head.output[:, -1].clone().save()
    return {"logits": logits}


def halve(value: torch.Tensor) -> torch.Tensor:
    """A helper of this module, which the server has not: it travels by value."""
    return value / 2


def local_helper(model: Any, name: str, how: How) -> dict[str, Any]:
    with model.trace(PROMPT, **how):
        value = halve(hidden(layers(model, name)[0])).save()
    return {"value": value}


def eager_attention(model: Any, name: str, how: How) -> dict[str, Any]:
    before = model.attn_implementation
    model._module.set_attn_implementation("eager")
    try:
        with model.trace(PROMPT, **how):
            logits = model.lm_head.output[:, -1].clone().save()
    finally:
        model._module.set_attn_implementation(before)
    return {"logits": logits}


# -- what a model on several ranks holds in parts ----------------------------------------------------------------------


def read_parts(model: Any, name: str, how: How) -> dict[str, Any]:
    block = layers(model, name)[1]
    with model.trace(PROMPT, **how):
        embedded = model.model.embed_tokens.output.clone().save()
        query = block.self_attn.q_proj.output.clone().save()
        key = block.self_attn.k_proj.output.clone().save()
        heads = block.self_attn.o_proj.input.clone().save()
        attended = block.self_attn.output[0].clone().save()
        gate = block.mlp.gate_proj.output.clone().save()
        inner = block.mlp.down_proj.input.clone().save()
        down = block.mlp.down_proj.output.clone().save()
        logits = model.lm_head.output.clone().save()
    return {
        "embedded": embedded, "query": query, "key": key, "heads": heads, "attended": attended, "gate": gate,
        "inner": inner, "down": down, "logits": logits,
    }  # fmt: skip


def write_parts(model: Any, name: str, how: How) -> dict[str, Any]:
    first, second = layers(model, name)[:2]
    with model.trace(PROMPT, **how):
        model.model.embed_tokens.output[:, 0] = 0.25
        first.self_attn.q_proj.output[..., 5:40] = 0.5
        first.self_attn.o_proj.output = first.self_attn.o_proj.output * 2
        second.mlp.down_proj.input[:, -1, ::3] = 0.0
        second.mlp.down_proj.output[:, 2] += 1.0
        after = layers(model, name)[-1].output.clone().save()
        model.lm_head.output[..., :7] = -3.0
        logits = model.output.logits.clone().save()
    return {"after": after, "logits": logits}


def gradient_of_parts(model: Any, name: str, how: How) -> dict[str, Any]:
    blocks = layers(model, name)
    with model.trace(PROMPT, **how):
        embedded = model.model.embed_tokens.output
        embedded.requires_grad_(True)
        query = blocks[1].self_attn.q_proj.output
        inner = blocks[2].mlp.down_proj.input
        down = blocks[2].mlp.down_proj.output
        loss = model.lm_head.output[:, -1].float().pow(2).sum()
        with loss.backward():
            by_down = down.grad.clone().save()
            by_inner = inner.grad.clone().save()
            by_query = query.grad.clone().save()
            by_embedding = embedded.grad.clone().save()
    return {"down": by_down, "inner": by_inner, "query": by_query, "embedding": by_embedding}


def weights(model: Any, name: str, how: How) -> dict[str, Any]:
    block = layers(model, name)[0]
    with model.trace(PROMPT, **how):
        query = block.self_attn.q_proj.weight.save()
        norm_weight = block.input_layernorm.weight.save()
        embedding = model.model.embed_tokens.weight.save()
    return {"query": query, "norm": norm_weight, "embedding": embedding}


EVERYWHERE: list[Program] = [read, write, gradient]
CAUSAL: list[Program] = [
    generate, steer_while_generating, session, patching_with_a_barrier, several_invokes, cache, skip, stop, source,
    logit_lens, probe_trained_in_a_session, edit, local_helper, eager_attention,
]  # fmt: skip
IN_PARTS: list[Program] = [read_parts, write_parts, gradient_of_parts, weights]
