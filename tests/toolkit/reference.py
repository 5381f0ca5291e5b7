"""The methods computed once more, with transformers and plain PyTorch hooks: no nnsight, nothing of the toolkit.

What the toolkit gives must be what this gives. Prompts are run one by one, sites are patched one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Site = tuple[int, int, int | None]


class Plain:
    """A transformers model, and the names that its architecture has for its parts."""

    def __init__(self, module: Any) -> None:
        self.module = module
        gpt2 = hasattr(module, "transformer")
        base = module.transformer if gpt2 else module.model
        self.layers = base.h if gpt2 else base.layers
        self.norm = base.ln_f if gpt2 else base.norm
        self.embedding = base.wte if gpt2 else base.embed_tokens
        self.attentions = [layer.attn if gpt2 else layer.self_attn for layer in self.layers]
        self.projections = [each.c_proj if gpt2 else each.o_proj for each in self.attentions]
        self.ends = [layer.mlp.c_proj if gpt2 else layer.mlp.down_proj for layer in self.layers]
        self.heads = module.config.num_attention_heads

    def logits(self, ids: list[int]) -> torch.Tensor:
        """(tokens, vocabulary)."""
        with torch.no_grad():
            return self.module(torch.tensor([ids])).logits[0]

    @contextmanager
    def touched(
        self, layer: int, component: str, touch: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> Iterator[None]:
        """`touch` sees what a component hands on, (rows, tokens, …), and may give something else in its place."""

        def after(_: Any, __: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            changed = touch(value)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def before(_: Any, inputs: Any) -> Any:
            changed = touch(inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        if component == "head":
            handle = self.projections[layer].register_forward_pre_hook(before)
        elif component == "neuron":
            handle = self.ends[layer].register_forward_pre_hook(before)
        else:
            owner = {"residual": self.layers, "attention": self.attentions, "mlp": [one.mlp for one in self.layers]}
            handle = owner[component][layer].register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def activations(self, ids: list[int], layer: int, component: str) -> torch.Tensor:
        """(tokens, width); for heads (tokens, heads, width of one)."""
        found: list[torch.Tensor] = []
        with self.touched(layer, component, lambda value: found.append(value.detach().clone())):
            self.logits(ids)
        (value,) = found
        return value[0].reshape(len(ids), self.heads, -1) if component == "head" else value[0]

    def lens(self, ids: list[int], layer: int) -> torch.Tensor:
        """Probabilities (tokens, vocabulary)."""
        with torch.no_grad():
            return self.module.lm_head(self.norm(self.activations(ids, layer, "residual"))).softmax(-1)

    def patched(self, clean: list[int], corrupt: list[int], component: str, site: Site) -> torch.Tensor:
        """The next token's logits of the corrupt prompt with one site of the clean one, (vocabulary,)."""
        layer, place, head = site
        source = self.activations(clean, layer, component)

        def put(value: torch.Tensor) -> torch.Tensor:
            changed = value.clone()
            if component == "head":
                shaped = changed.view(1, len(corrupt), self.heads, -1)
                shaped[0, place, head] = source[place, head]
            else:
                changed[0, place] = source[place]
            return changed

        with self.touched(layer, component, put):
            return self.logits(corrupt)[-1]

    def attribution(
        self, clean: list[int], corrupt: list[int], component: str, layer: int, answer: int, wrong: int
    ) -> torch.Tensor:
        """(tokens,), for heads (tokens, heads): by a step of the component's own values, one layer by itself."""
        source = self.activations(clean, layer, component)
        base = self.activations(corrupt, layer, component)
        moved: list[torch.Tensor] = []

        def leaf(value: torch.Tensor) -> torch.Tensor:
            moved.append(value.detach().clone().requires_grad_(True))
            return moved[0]

        with self.touched(layer, component, leaf):
            logits = self.module(torch.tensor([corrupt])).logits[0, -1]
        (gradient,) = torch.autograd.grad(logits[answer] - logits[wrong], moved)
        shaped = gradient[0].reshape(source.shape)
        return ((source - base) * shaped).sum(-1)

    def attention(self, ids: list[int], layer: int) -> torch.Tensor:
        """(heads, tokens, tokens)."""
        with torch.no_grad():
            return self.module(torch.tensor([ids]), output_attentions=True).attentions[layer][0]

    def steered(self, ids: list[int], layer: int, shift: torch.Tensor) -> torch.Tensor:
        """The next token's logits with `shift` added to every token behind a layer."""
        with self.touched(layer, "residual", lambda value: value + shift):
            return self.logits(ids)[-1]

    def written(self, ids: list[int], layer: int, shift: torch.Tensor, count: int) -> list[int]:
        """Greedy tokens under steering, each from a whole run without a cache."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.steered(ids, layer, shift).argmax()))
        return ids[-count:]
