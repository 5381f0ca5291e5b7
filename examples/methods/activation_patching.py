"""activation_patching: where does the model keep that the Eiffel Tower, and not the Colosseum, is meant?

Run it against a service that is up, as `python examples/methods/activation_patching.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import activation_patching

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

pair = {
    "clean": "The Eiffel Tower is in the city of",
    "corrupt": "The Colosseum is in the city of",
    "answer": " Paris",
    "wrong": " Rome",
}

# Every layer and token of the residual stream, one at a time, all in one request.
found = activation_patching(model, **pair, remote=True)
print(f"logit difference: clean {found.clean[0]:.2f}, corrupt {found.corrupt[0]:.2f}")
for layer in (22, 23):
    subject, last = found.recovery[0, layer, 2], found.recovery[0, layer, -1]
    print(f"layer {layer} brings back {subject:.0%} at the subject, {last:.0%} at the last token")
found.plot(FOLDER / "patching.html")

# In layer 23 it moves to the last token. Which heads carry it?
heads = activation_patching(model, **pair, component="head", layers=range(20, 30), positions="last", remote=True)
layer, head = divmod(int(heads.recovery[0, :, 0].argmax()), len(heads.heads))
share = heads.recovery[0, layer, 0, head]
print(f"head {heads.heads[head]} of layer {heads.layers[layer]} alone brings back {share:.0%}")
heads.plot(FOLDER / "patching_heads.html")
