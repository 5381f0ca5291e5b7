"""A second model to compare with: the same one, its weights rounded to a few bits, as an ordinary local folder.

    python rounded.py HuggingFaceTB/SmolLM2-135M-Instruct ./smollm2-4-bits --bits 4
    edif-hpc models pull ./smollm2-4-bits              # to the service, as local/smollm2-4-bits

Rounding to nearest is the simplest quantisation there is: each row of a layer's matrices is cut into groups, and each
group has one scale, its largest weight. Embeddings, norms and the head stay as they are. What comes out is stored
in the dtype that went in, so that it shows what rounding does to the numbers and saves no memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """A matrix on a grid of 2**bits - 1 steps that lie around 0, each group of a row on its own."""
    steps = 2 ** (bits - 1) - 1
    parts = weight.float().unflatten(-1, (-1, min(group, weight.shape[-1])))
    scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / steps
    return ((parts / scale).round() * scale).flatten(-2).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="ORG/NAME in the Hugging Face cache or on the Hub, or a folder")
    parser.add_argument("folder", type=Path, help="where the new model goes")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale")
    asked = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    head = model.get_output_embeddings()
    matrices = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    with torch.no_grad():
        for matrix in matrices:
            matrix.weight.copy_(rounded(matrix.weight, asked.bits, asked.group))
    model.save_pretrained(asked.folder)
    AutoTokenizer.from_pretrained(asked.model).save_pretrained(asked.folder)
    print(f"{asked.folder}: {len(matrices)} matrices, {asked.bits} bits, groups of {asked.group}")


if __name__ == "__main__":
    main()
