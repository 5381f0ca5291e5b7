"""What a model knows, asked in many ways: one script next to the model, a table comes back.

    edif-hpc submit answers.py --out answers.parquet -- --top 3
    python answers.py --top 3            # the same against a service, block by block; it writes answers.saved.pt

Columns of one length make a table, so the result can be parquet as well as pt, npz, safetensors or json.
"""

import argparse

import torch
from nnsight.modeling.transformers import TransformersModel

import edif_hpc

COUNTRIES = {"France": " Paris", "Italy": " Rome", "Spain": " Madrid", "Egypt": " Cairo", "Japan": " Tokyo"}
QUESTIONS = ["The capital of {} is", "The capital city of {} is called", "In {} the government sits in"]

parser = argparse.ArgumentParser()
parser.add_argument("--top", type=int, default=1, help="right when the capital is among so many likeliest words")
asked = parser.parse_args()

edif_hpc.connect()  # next to the model there is nothing to connect to, and this does nothing
model = TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct", task="text-generation")

rows = {"question": [], "country": [], "probability": [], "right": []}
for question in QUESTIONS:
    for country, capital in COUNTRIES.items():
        with model.trace(question.format(country), remote=True):
            chances = model.lm_head.output[0, -1].float().softmax(-1).save()
        (word,) = model.tokenizer(capital, add_special_tokens=False).input_ids
        rows["question"].append(question)
        rows["country"].append(country)
        rows["probability"].append(float(chances[word]))
        rows["right"].append(bool((chances.topk(asked.top).indices == torch.tensor(word)).any()))
    print(f"{sum(rows['right'][-len(COUNTRIES) :])} of {len(COUNTRIES)}: {question}")

for name, column in rows.items():
    edif_hpc.save(name, column)
