"""top_neurons: which neurons are most active when the model is about to say Paris?

Run it against a service that is up, as `python examples/methods/top_neurons.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import top_neurons

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

PROMPTS = ["The Eiffel Tower is in the city of", "The Louvre is in the city of", "The Colosseum is in the city of"]
found = top_neurons(model, PROMPTS, layers=range(20, 30), top=20, remote=True)
print("layer 29:", found.ids[0, -1, 0, :5].tolist(), [round(value, 1) for value in found.values[0, -1, 0, :5].tolist()])

# Neurons that both places in Paris have among their twenty, and the one in Rome has not.
for number, layer in enumerate(found.layers):
    tower, louvre, colosseum = (set(found.ids[prompt, number, 0].tolist()) for prompt in range(3))
    print(f"layer {layer}: {sorted(tower & louvre - colosseum)}")
found.plot(FOLDER / "neurons.html")
