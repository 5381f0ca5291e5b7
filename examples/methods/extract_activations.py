"""extract_activations: one vector a prompt and layer, from as many prompts as one likes; only they come back.

Run it against a service that is up, as `python examples/methods/extract_activations.py [FOLDER]`.
"""

import sys
from pathlib import Path

import torch
from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import extract_activations, load

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

COUNTRIES = ["France", "Italy", "Spain", "Egypt", "Japan", "Norway", "Peru", "Kenya"]
found = extract_activations(
    model, [f"The capital of {country} is" for country in COUNTRIES], layers=[5, 15, 25], remote=True
)
print(found)
found.save(FOLDER / "capitals.npz")

# Another day, from the file: which two countries does layer 25 hold most alike?
vectors = load(FOLDER / "capitals.npz").at(25)[:, 0].float()
vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=-1)
alike = (vectors @ vectors.T).fill_diagonal_(-1)
one, other = divmod(int(alike.argmax()), len(COUNTRIES))
print(f"{COUNTRIES[one]} and {COUNTRIES[other]} lie closest: cosine {alike[one, other]:.2f}")
found.plot(FOLDER / "capitals.html")
