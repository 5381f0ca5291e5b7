"""Where does a language model find Paris? Its five likeliest next words, and a picture of how it came to them.

An ordinary nnsight script: the service is named by NDIF_HOST, and `remote=True` is all that sends the block there.
`make demo` runs it; so does `python examples/first_trace.py [PICTURE.png]` against a service that is up.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from nnsight.modeling.huggingface import _ID_CACHE
from nnsight.modeling.transformers import TransformersModel

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "The Eiffel Tower is located in the city of"
PICTURE = Path(sys.argv[1] if len(sys.argv) > 1 else "first_trace.png").absolute()

_ID_CACHE[REPO] = REPO  # offline: otherwise nnsight asks the Hub how this id is really spelled
model = TransformersModel(REPO, task="text-generation")  # its shape only: the service holds the weights

with model.trace(PROMPT, remote=True):
    tops, chances, ends = [], [], []
    for layer in model.model.layers:
        # The logit lens: read what this layer wrote as if it were the last one.
        lens = model.lm_head(model.model.norm(layer.output))[0].float().softmax(dim=-1)
        chance, top = lens.max(dim=-1)
        tops.append(top.tolist())
        chances.append(chance.tolist())
        ends.append(lens[-1])
    best = ends[-1].topk(5)
    # Reduced on the server: a few numbers travel back instead of 30 layers x 9 tokens x 49152 logits.
    words, odds = best.indices.tolist().save(), best.values.tolist().save()
    rise = [end[best.indices[0]].item() for end in ends].save()
    tops.save(), chances.save()


def word(token: int) -> str:
    """A token as it fits into a cell: short, and only what every font can draw."""
    text = model.tokenizer.decode(token)
    return text.strip().encode("ascii", "replace").decode()[:10] or ("↵" if "\n" in text else "␣")


print(f"{PROMPT} …")
for token, odd in zip(words, odds, strict=True):
    print(f"{odd:7.1%}  {model.tokenizer.decode(token)}")

prompt = [word(token) for token in model.tokenizer(PROMPT).input_ids]
layers = len(tops)
plt.switch_backend("Agg")  # a file, also where there is no display
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"})
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11.5, 9), width_ratios=[4, 1], sharey=True, layout="constrained", dpi=160
)

image = left.imshow(chances, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
for row in range(layers):
    for column, (token, chance) in enumerate(zip(tops[row], chances[row], strict=True)):
        look = {"color": "white" if chance > 0.55 else "#1b2a41", "weight": "bold" if token == words[0] else "normal"}
        left.text(column, row, word(token), ha="center", va="center", fontsize=8, parse_math=False, **look)
left.set_xticks(range(len(prompt)), prompt)
left.set_yticks(range(0, layers, 2), range(1, layers + 1, 2))
left.set_xlabel("word the model has just read", labelpad=8)
left.set_ylabel("layer")
left.tick_params(length=0)
left.spines[:].set_visible(False)
bar = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.01}
figure.colorbar(image, ax=left, label="probability of the likeliest next word", **bar)

right.plot(rise, range(layers), color="#c8553d", linewidth=2)
right.fill_betweenx(range(layers), rise, color="#c8553d", alpha=0.12)
right.set_xlim(0, 1)
right.set_xticks([0, 0.5, 1], ["0", "½", "1"])
right.set_xlabel(f"probability of “{word(words[0])}”\nafter “{prompt[-1]}”", labelpad=8)
right.tick_params(axis="y", length=0)
right.grid(axis="x", color="#e5e5e5", linewidth=0.8)
right.text(rise[-1] + 0.03, layers - 1, f"{rise[-1]:.0%}", va="center", color="#c8553d", weight="bold")

figure.suptitle(f"What SmolLM2-135M would say next, layer by layer: “{PROMPT} …”", fontsize=12.5, x=0.02, ha="left")
figure.savefig(PICTURE)
print(f"The logit lens is drawn in {PICTURE}")
