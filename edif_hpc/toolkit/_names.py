"""The parts of a model by names that hold across architectures: the layers, what is in each, the head.

Why not nnterp, which is made for this. Tried: nnterp 1.3.0, the latest, with nnsight 0.8.1 and transformers 5.22.2, on
SmolLM2, GPT-2, Qwen3 and Gemma 3:

1. `import nnterp` raises ModuleNotFoundError: it takes `Object` from `nnsight.intervention.tracing.globals`, which
   nnsight 0.8 has no more.
2. With that replaced by hand, `StandardizedTransformer(...)` raises AttributeError: it reads `model._model`, which is
   called `_module` now.
3. With that too, renaming works on all four, but `enable_attention_probs=True` raises SourceNotAvailable
   ("'attention_interface_0' is an assignment, not a call"): its way to the attention weights names an operation of a
   source that transformers 5 writes otherwise.

It also is a class of its own that the model has to be made with, while methods here take the model that a user already
has. Names that a user gave with nnsight's `rename=` are found as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy

from edif_hpc.core.errors import MethodError

BASES = ("model", "transformer", "gpt_neox", "model.decoder", "model.language_model", "language_model.model", "")
"""Where the decoder is, from the model's root."""
LAYERS = ("layers", "h", "blocks")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm")
HEADS = ("lm_head", "embed_out", "language_model.lm_head")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense")
MLPS = ("mlp", "feed_forward", "ffn")
MLP_ENDS = ("down_proj", "c_proj", "dense_4h_to_h", "fc_out", "w2", "fc2")


@dataclass(frozen=True)
class Names:
    """One model's parts. Modules are nnsight's envoys: inside a trace they have `.input` and `.output`."""

    model: Any
    layers: Any
    embedding: Any
    norm: Any
    head: Any
    heads: int
    """Attention heads a layer, as queries count them."""
    width: int
    """Of the residual stream."""

    @classmethod
    def of(cls, model: Any) -> Names:
        """Find them.

        Raises:
            MethodError: it is no nnsight model of text, or this architecture names a part in a way that is not known
                here.
        """
        if not isinstance(model, Envoy) or not hasattr(getattr(model._module, "config", None), "get_text_config"):
            raise MethodError(
                "The first argument is an nnsight model of text, as "
                f"TransformersModel('openai-community/gpt2', task='text-generation'), and not {_what(model)}."
            )
        base, layers = _base(model)
        config = model._module.config.get_text_config()
        return cls(
            model,
            layers,
            _part(base, EMBEDDINGS, "an embedding"),
            _part(base, NORMS, "a last norm"),
            _part(model, HEADS, "a head to its vocabulary"),
            config.num_attention_heads,
            config.hidden_size,
        )

    def attention(self, layer: int) -> Any:
        return _part(self.layers[layer], ATTENTIONS, "an attention")

    def projection(self, layer: int) -> Any:
        """The linear map from the heads, side by side, to the residual stream."""
        return _part(self.attention(layer), PROJECTIONS, "an attention's projection")

    def mlp(self, layer: int) -> Any:
        return _part(self.layers[layer], MLPS, "an MLP")

    def mlp_end(self, layer: int) -> Any:
        """The linear map from an MLP's neurons to the residual stream. A mixture of experts has none of its own."""
        return _part(self.mlp(layer), MLP_ENDS, "an MLP's last map")

    def neurons(self, layer: int) -> int:
        """How many the MLP has: what its last map takes."""
        end = self.mlp_end(layer)._module
        if hasattr(end, "nx"):  # GPT-2's maps
            return int(end.nx)
        return int(end.in_features if hasattr(end, "in_features") else end.weight.shape[-1])

    def read(self, layer: int, component: str) -> torch.Tensor:
        """Inside a trace: what this component of a layer has just computed. Changes in place count.

        Returns:
            (rows, tokens, width); for `head` (rows, tokens, heads, width of one); for `neuron` (rows, tokens, neurons).
        """
        return self.shaped(self.raw(layer, component), component)

    def raw(self, layer: int, component: str) -> torch.Tensor:
        """The same as the model itself hands it on, heads side by side: what a gradient can be taken of."""
        if component == "residual":
            return tensor(self.layers[layer].output)
        if component == "attention":
            return tensor(self.attention(layer).output)
        if component == "mlp":
            return tensor(self.mlp(layer).output)
        if component == "neuron":
            return tensor(self.mlp_end(layer).input)
        return tensor(self.projection(layer).input)

    def shaped(self, values: torch.Tensor, component: str) -> torch.Tensor:
        """From `raw` to `read`, without a copy."""
        return values.view(*values.shape[:-1], self.heads, -1) if component == "head" else values

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Inside a trace: a residual stream (…, width), read as the last layer's, as float32 logits (…, vocabulary)."""
        raw = self.head(self.norm(state)).float()
        config = self.model._module.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        capped: torch.Tensor = cap * torch.tanh(raw / cap) if cap else raw
        return capped


def tensor(value: Any) -> torch.Tensor:
    """What a module handed on, without the caches and weights that some put beside it."""
    found: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return found


def _base(model: Any) -> tuple[Any, Any]:
    for path in BASES:
        base = _at(model, path) if path else model
        layers = base and next((found for name in LAYERS if (found := _at(base, name)) is not None), None)
        if layers is not None:
            return base, layers
    raise MethodError(
        f"{_kind(model)} has no layers under a name that is known here ({', '.join(LAYERS)}); make the model with "
        'nnsight\'s rename=, as TransformersModel(…, rename={"their.name": "layers"}).'
    )


def _part(parent: Any, names: tuple[str, ...], what: str) -> Any:
    for name in names:
        found = _at(parent, name)
        if found is not None:
            return found
    raise MethodError(
        f"{_kind(parent)} has no {what.split(' ', 1)[1]} under a name that is known here ({', '.join(names)}); choose "
        f'another component, or make the model with nnsight\'s rename=, as rename={{"theirs": "{names[0]}"}}.'
    )


def _at(parent: Any, path: str) -> Any:
    """The envoy at a dotted path; None where there is no module of that name."""
    found = reduce(lambda at, name: None if at is None else getattr(at, name, None), path.split("."), parent)
    return found if isinstance(found, Envoy) else None


def _what(thing: Any) -> str:
    kind = f"a {type(thing).__name__}"
    return f"{kind} around a {_kind(thing)}" if isinstance(thing, Envoy) else kind


def _kind(envoy: Any) -> str:
    return type(envoy._module).__name__
