"""attention_patterns: which heads copy? On a text that is said twice, they look behind the first time.

Run it against a service that is up, as `python examples/methods/attention_patterns.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import attention_patterns

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

once = [7919 * number % 40000 + 1000 for number in range(1, 26)]  # tokens without a meaning, each of them once
scores = attention_patterns(model, [once + once], patterns=False, scores=["induction", "previous"], remote=True)
for name in ("induction", "previous"):
    for spot in scores.scores[name][0].flatten().topk(3).indices.tolist():
        layer, head = divmod(spot, len(scores.heads))
        print(f"{name}: layer {layer}, head {head}: {scores.scores[name][0, layer, head]:.2f}")
    scores.plot_scores(name, FOLDER / f"attention_{name}.html")

one = attention_patterns(model, "When Mary and John went out, John gave Mary", layers=18, heads=6, remote=True)
one.plot(FOLDER / "attention.html", layer=18, head=6)
