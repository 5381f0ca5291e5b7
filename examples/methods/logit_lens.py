"""logit_lens: when does the model know? Each layer read as if it were the last.

Run it against a service that is up, as `python examples/methods/logit_lens.py [FOLDER]`; pictures go into the folder.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import logit_lens

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

lens = logit_lens(
    model, "The Eiffel Tower is in the city of", positions="all", tokens=[" Paris", " Rome", " Berlin"], remote=True
)
for layer in lens.layers[-6:]:
    words, odds = lens.words[0][layer][-1], lens.probabilities[0, layer, -1]
    print(f"layer {layer}: " + ", ".join(f"{word!r} {odd:.0%}" for word, odd in zip(words, odds.tolist(), strict=True)))

lens.plot(FOLDER / "logit_lens.html")
lens.plot_followed(FOLDER / "logit_lens_followed.html")
lens.save(FOLDER / "logit_lens.safetensors")
