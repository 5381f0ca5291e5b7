"""Turn a GGUF file into an ordinary save_pretrained folder: `python -m edif_hpc.worker.convert_gguf IN.gguf OUT`.

A program of its own because it imports torch, which the login-node rooms never do: `fleet.demo_model` runs it as a
child. The quantised weights are unpacked once, so that serving needs neither gguf nor a quantiser. What it must not
know: caches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert(source: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write model and tokenizer of `source` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=held)
    # transformers would save the GGUF quantiser's settings beside weights that are no longer quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the conversion that the command line names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m edif_hpc.worker.convert_gguf IN.gguf OUT")
    convert(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())


if __name__ == "__main__":
    main()
