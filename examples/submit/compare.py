"""Two models side by side in one process: where in the layers they part, and what that does to what they say.

    edif-hpc submit compare.py --model ORG/ONE --model ORG/OTHER --out compare.json -- ORG/ONE ORG/OTHER

Activations of both meet next to the models, and some hundred numbers come back. They need the same tokenizer, as many
layers and the same width: a model and its quantised, pruned or fine-tuned self. `../notebooks/comparing_models.ipynb`
draws what this finds.
"""

import sys

import torch
from nnsight.modeling.transformers import TransformersModel

import edif_hpc

QUESTIONS = {
    "The Eiffel Tower is in the city of": " Paris",
    "The Colosseum is in the city of": " Rome",
    "The capital of Japan is": " Tokyo",
    "The capital of Egypt is": " Cairo",
    "The capital of Russia is": " Moscow",
    "The opposite of hot is": " cold",
    "The opposite of up is": " down",
    "If it rains, take an": " umbrella",
    "The sun rises in the": " east",
    "One, two, three, four,": " five",
    "Monday, Tuesday, Wednesday,": " Thursday",
    "She opened the door with her": " key",
}
TEXT = (
    "The river rises in the hills and runs through three towns before it reaches the sea. Most of its water comes from "
    "melting snow, so it is highest in late spring and lowest in autumn. In the last town there is an old stone "
    "bridge, and every year on the first Sunday of May the people who live there close it to cars and dance on it "
    "until night."
)

one, other = (TransformersModel(name, task="text-generation") for name in sys.argv[1:3])


def looked_into(model, prompt):
    """The residual stream behind each layer, what each would say next, as log probabilities, and the model's logits."""
    with model.trace(prompt, remote=True):
        states = torch.stack([layer.output[0] for layer in model.model.layers])
        lens = model.lm_head(model.model.norm(states[:, -1])).float().log_softmax(-1).save()
        logits = model.lm_head.output[0].float().save()
        states.save()
    return states.float(), lens, logits


@torch.no_grad()
def main():
    cosines, errors, divergences, chances = [], [], [], []
    for prompt, answer in QUESTIONS.items():
        (here, told, said), (there, other_told, other_said) = (looked_into(model, prompt) for model in (one, other))
        # The first token is left out: its vector is far longer than all others, whatever the prompt.
        cosines.append(torch.cosine_similarity(here[:, 1:], there[:, 1:], dim=-1).mean(1))
        errors.append((there - here)[:, 1:].norm(dim=-1).mean(1) / here[:, 1:].norm(dim=-1).mean(1))
        divergences.append((told.exp() * (told - other_told)).sum(-1))
        (word,) = one.tokenizer(answer, add_special_tokens=False).input_ids
        chances.append([float(logits[-1].softmax(-1)[word]) for logits in (said, other_said)])
    edif_hpc.save("cosine", torch.stack(cosines).tolist())
    edif_hpc.save("error", torch.stack(errors).tolist())
    edif_hpc.save("lens_kl", torch.stack(divergences).tolist())
    edif_hpc.save("prompts", list(QUESTIONS))
    edif_hpc.save("answers", list(QUESTIONS.values()))
    edif_hpc.save("probability", chances)

    ids = torch.tensor(one.tokenizer(TEXT).input_ids)
    losses = []
    for model in (one, other):
        *_, logits = looked_into(model, TEXT)
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])))
    edif_hpc.save("nats_a_token", losses)
    print(f"{len(QUESTIONS)} prompts, {len(ids)} tokens of text: {losses[0]:.2f} and {losses[1]:.2f} nats a token")


main()
