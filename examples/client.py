"""What our own client adds to nnsight's: a look ahead, handles that outlive this process, many requests at once.

Run it against a service that is up, as `python examples/client.py [ORG/NAME]`; on the service's own machine it needs
nothing else, elsewhere NDIF_HOST and NDIF_API_KEY. Offline, set HF_HUB_OFFLINE=1.
"""

import sys

from nnsight.modeling.transformers import TransformersModel

import edif_hpc

REPO = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
CAPITALS = ["France", "Italy", "Spain", "Egypt", "Japan", "Norway", "Peru", "Kenya"]

edif_hpc.connect()
model = TransformersModel(REPO, task="text-generation")  # its shape only: the service holds the weights

# What would come back, and how large it is, before anything is sent.
report = edif_hpc.dry_run()
with model.trace(f"The capital of {CAPITALS[0]} is", backend=report):
    logits = model.lm_head.output.save()
print(report, end="\n\n")

# `remote=True` as ever, through restarts of the service and a laptop's sleep.
with model.trace(f"The capital of {CAPITALS[0]} is", remote=True):
    best = model.lm_head.output[0, -1].argmax().item().save()
print(f"The capital of {CAPITALS[0]} is{model.tokenizer.decode(best)}\n")

# Many blocks, of which eight wait or run at the service at a time.
with edif_hpc.batch(at_once=8) as batch:
    for country in CAPITALS:
        with model.trace(f"The capital of {country} is", backend=batch.submit()):
            top = model.lm_head.output[0, -1].softmax(-1).topk(1)
            word, chance = top.indices.item().save(), top.values.item().save()
for country, found in zip(CAPITALS, batch.results(), strict=True):
    if isinstance(found, dict):
        print(f"{found['chance']:6.1%}  The capital of {country} is{model.tokenizer.decode(found['word'])}")
    else:
        print(f"        {country}: {found}")

# A handle does not wait. This process may end: the id finds the request again, from anywhere, until it expires.
handle = edif_hpc.submit()
with model.trace("The capital of Iceland is", backend=handle):
    states = [layer.output[0, -1] for layer in model.modules() if layer.path.endswith("mlp")]
    states.save()
print(f'\nedif_hpc.get("{handle.id}").result() has {len(handle.result()["states"])} tensors')
