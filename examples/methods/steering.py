"""steering_vector and steer: a direction from praise to blame, added while the model writes.

Run it against a service that is up, as `python examples/methods/steering.py [FOLDER]`.
"""

import sys
from pathlib import Path

from nnsight.modeling.transformers import TransformersModel

import edif_hpc
from edif_hpc.toolkit import steer, steering_vector

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
edif_hpc.connect()
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

PRAISE = ["wonderful", "great", "excellent", "superb", "delightful", "brilliant", "amazing", "fantastic", "lovely"]
BLAME = ["terrible", "awful", "horrible", "dreadful", "boring", "disappointing", "bad", "poor", "dull"]

with model.session(remote=True):  # the vector never leaves the service unless it is asked for
    vector = steering_vector(
        model, [f"I think this is {word}" for word in PRAISE], [f"I think this is {word}" for word in BLAME], layers=15
    )
    steered = steer(
        model, ["The movie was", "The food here is"], vector, factors=[-2, -1, 0, 1, 2], new_tokens=12, answer=" good",
        wrong=" bad",
    ).save()  # fmt: skip

for prompt, texts, differences in zip(steered.prompts, steered.texts, steered.difference.tolist(), strict=True):
    for factor, text, difference in zip(steered.factors, texts, differences, strict=True):
        print(f"{factor:+.0f}  good less bad {difference:+.2f}  {prompt}{text!r}")
steered.plot(FOLDER / "steering.html")
