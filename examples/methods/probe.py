"""probe: from which layer on does the model hold whether something is praised? Read and learnt in one request.

Run it against a service that is up, as `python examples/methods/probe.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import extract_activations, probe

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

PRAISE = ["wonderful", "great", "excellent", "superb", "delightful", "brilliant", "amazing", "fantastic", "lovely"]
BLAME = ["terrible", "awful", "horrible", "dreadful", "boring", "disappointing", "bad", "poor", "dull"]
TEMPLATES = ["The film was {}, and so we", "I found the book {}, and so I", "My dinner was {}, and so they"]

prompts = [template.format(word) for template in TEMPLATES for word in PRAISE + BLAME]
labels = (["praise"] * len(PRAISE) + ["blame"] * len(BLAME)) * len(TEMPLATES)
unseen = [template == TEMPLATES[-1] for template in TEMPLATES for _ in PRAISE + BLAME]  # a whole template is held out

with model.session(remote=True):
    found = extract_activations(model, prompts)
    learnt = probe(found, labels, held_out=unseen).save()

for layer in range(0, 30, 3):
    print(f"layer {layer:2}: {learnt.accuracy[layer]:.0%} right on the template that it never saw")
learnt.plot(FOLDER / "probe.html")
learnt.save(FOLDER / "probe.json")
