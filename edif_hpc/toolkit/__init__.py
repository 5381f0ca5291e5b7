"""Interpretability methods written as nnsight traces: one function a method, here or at the service, by `remote=`.

    from edif_hpc.toolkit import logit_lens

    lens = logit_lens(model, "The Eiffel Tower is in the city of", tokens=" Paris", remote=True)
    lens.plot("lens.html")
    lens.save("lens.safetensors")

Each reduces where the model is and gives back a small frozen dataclass of tensors on the CPU, with `.plot()`,
`.save()` and a `record` of what it was made with. With `remote=True` a call is one request.
Inside a session of nnsight's the same functions run where the session does, without `remote=`, and give the same
results, which the next step takes; what should come back is marked with `.save()`:

    with model.session(remote=True):
        found = extract_activations(model, prompts)
        learnt = probe(found, labels, held_out=0.25).save()

Everything that is wrong with a call raises `MethodError`, before anything is sent: one sentence with what to do.

What this must not know: the service. It imports nnsight, torch, `edif_hpc.core` and nothing else of the project.
"""

from edif_hpc.core.errors import MethodError

from ._by_name import travel_by_name
from ._methods import run_method
from ._result import Result, load
from .attention import AttentionPatterns, attention_patterns
from .attribution import Attribution, attribution_patching
from .extraction import Activations, extract_activations
from .lens import LogitLens, logit_lens
from .neurons import TopNeurons, top_neurons
from .patching import Patching, activation_patching
from .probing import Probe, probe
from .steering import Steered, SteeringVector, steer, steering_vector

travel_by_name()

__all__ = [
    "Activations",
    "AttentionPatterns",
    "Attribution",
    "LogitLens",
    "MethodError",
    "Patching",
    "Probe",
    "Result",
    "Steered",
    "SteeringVector",
    "TopNeurons",
    "activation_patching",
    "attention_patterns",
    "attribution_patching",
    "extract_activations",
    "load",
    "logit_lens",
    "probe",
    "run_method",
    "steer",
    "steering_vector",
    "top_neurons",
]
