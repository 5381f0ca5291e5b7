"""attribution_patching: a first look at all heads from one gradient, verified where it points.

Run it against a service that is up, as `python examples/methods/attribution_patching.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import activation_patching, attribution_patching

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

pair = {
    "clean": "The Eiffel Tower is in the city of",
    "corrupt": "The Colosseum is in the city of",
    "answer": " Paris",
    "wrong": " Rome",
    "component": "head",
    "positions": "last",
}

guess = attribution_patching(model, **pair, remote=True)
guess.plot(FOLDER / "attribution.html")

for spot in guess.recovery[0, :, 0].flatten().topk(5).indices.tolist():
    layer, head = divmod(spot, len(guess.heads))
    exact = activation_patching(model, **pair, layers=layer, heads=head, remote=True)
    print(
        f"layer {layer}, head {head}: guessed {guess.recovery[0, layer, 0, head]:.0%}, is {exact.recovery.item():.0%}"
    )
