"""Tiny models with real architectures, in an ordinary Hugging Face hub cache, for every test that needs a model.

Weights are random with fixed seeds, so numbers can be compared between a local and a remote run but mean nothing.
Each model is built once per version of this file and of the libraries, under EDIF_HPC_TEST_CACHE (default
`<repo>/.cache/tests`), behind a file lock, so that pytest-xdist workers share it. What it must not know: the service.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ORG = "edif-test"
REPO = Path(__file__).resolve().parents[2]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TASKS = {"qwen2.5-vl": "image-text-to-text"}
"""The pipeline task to name in `TransformersModel(repo, task=…)`; everything else is text-generation."""

# 64 wide and 4 heads everywhere; 2 key-value heads, so that two tensor-parallel ranks can share them. Weights are five
# times the usual spread: with the usual one all logits of a tiny model are nearly equal and argmax tests prove little.
WIDE, LAYERS, HEADS, KV_HEADS, SPREAD = 64, 4, 4, 2, 0.1


def repo_id(name: str) -> str:
    """The hub id of a tiny model: `gpt2` -> `edif-test/gpt2`."""
    return f"{ORG}/{name}"


def task(name: str) -> str:
    """The pipeline task that fits this model."""
    return TASKS.get(name, "text-generation")


def build_cache(root: Path, names: Iterable[str]) -> Path:
    """Lay the named models into `root/hub` (set HF_HOME to `root`) and return that hub cache directory."""
    hub = Path(root) / "hub"
    for name in _with_bases(names):
        _lay(_built(name), hub, repo_id(name))
    return hub


def offline_client(cache: Path) -> None:
    """Give this process what a stock nnsight client needs without a hub: offline mode and the ids it would ask for."""
    cache = Path(cache)
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(cache.parent), HF_HUB_CACHE=str(cache))
    import huggingface_hub.constants as constants

    # Both are read from the environment when huggingface_hub is first imported, which may have happened long ago.
    constants.HF_HUB_OFFLINE = True
    constants.HF_HUB_CACHE = str(cache)
    from nnsight.modeling.huggingface import _ID_CACHE

    for entry in cache.glob("models--*--*"):
        known = entry.name.removeprefix("models--").replace("--", "/")
        _ID_CACHE[known] = known


def _with_bases(names: Iterable[str]) -> list[str]:
    wanted: list[str] = []
    for name in names:
        if name not in BUILDERS:
            raise KeyError(f"no tiny model named {name!r}; there are {', '.join(BUILDERS)}")
        wanted += [base for base in (["gpt2"] if name == "gpt2-lora" else []) if base not in wanted]
        wanted += [name] if name not in wanted else []
    return wanted


# -- building once, sharing -------------------------------------------------------------------------------------------


def _shelf() -> Path:
    """Where built models are kept: a directory named by everything that their bytes depend on."""
    source = Path(__file__).read_bytes()
    libraries = " ".join(f"{name}={version(name)}" for name in ("torch", "transformers", "tokenizers", "peft"))
    key = hashlib.sha256(source + libraries.encode()).hexdigest()[:16]
    return test_cache() / f"models-{key}"


def test_cache() -> Path:
    """The directory that tests keep things in between runs."""
    named = os.environ.get("EDIF_HPC_TEST_CACHE")
    shelf = Path(named) if named else REPO / ".cache" / "tests"
    try:
        shelf.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if not os.access(shelf, os.W_OK):  # the checkout belongs to somebody else, as when tests run as an ordinary user
        shelf = Path(tempfile.gettempdir()) / f"edif-hpc-tests-{os.getuid()}"
        shelf.mkdir(mode=0o700, exist_ok=True)
    return shelf


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _built(name: str) -> Path:
    """The directory of one built model, in save_pretrained form; built when missing."""
    shelf = _shelf()
    done = shelf / name
    with locked(shelf / f"{name}.lock"):
        if not done.is_dir():
            making = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=shelf))
            BUILDERS[name](making)
            making.chmod(0o755)
            for path in making.rglob("*"):  # safetensors writes 0600, but tests also run as another user
                path.chmod(0o755 if path.is_dir() else 0o644)
            making.rename(done)
    return done


def _lay(source: Path, hub: Path, repo: str) -> None:
    """Copy a model folder into a hub cache as a snapshot whose commit is named after the contents."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    digest = hashlib.sha1()
    for path in files:
        digest.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes())
    commit = digest.hexdigest()
    entry = hub / f"models--{repo.replace('/', '--')}"
    snapshot = entry / "snapshots" / commit
    with locked(hub / ".locks" / f"{entry.name}.lock"):
        if not snapshot.is_dir():
            making = Path(tempfile.mkdtemp(prefix=".laying-", dir=hub))
            shutil.copytree(source, making, dirs_exist_ok=True)
            making.chmod(0o755)
            snapshot.parent.mkdir(parents=True, exist_ok=True)
            making.rename(snapshot)
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / "main").write_text(commit)


# -- the models -------------------------------------------------------------------------------------------------------


def _tokenizer() -> Any:
    """A byte-level BPE trained on this file's own words: any text goes in and comes out again unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set: its order changes from run to run
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=SPECIALS[0],
        bos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


CORPUS = [
    "The Eiffel Tower is located in the city of Paris. The Colosseum is located in the city of Rome.",
    "The quick brown fox jumps over the lazy dog. Madison Square Garden is located in the city of New York.",
    "When Mary and John went to the store, John gave a drink to Mary. When Tom and Anna went home, Anna slept.",
    "A language model predicts the next token; every layer writes into the residual stream and reads from it.",
]


def _save(folder: Path, config: Any, seed: int, auto: str = "AutoModelForCausalLM") -> None:
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, auto).from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _ids() -> dict[str, int]:
    """The special ids of every config. The vocabulary is a round 512 whatever the trainer found."""
    return {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _decoder() -> dict[str, Any]:
    return {
        **_ids(),
        "hidden_size": WIDE,
        "intermediate_size": 2 * WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "initializer_range": SPREAD,
    }


def _gpt2(folder: Path) -> None:
    from transformers import GPT2Config

    shape = {"n_embd": WIDE, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256, "initializer_range": SPREAD}
    _save(folder, GPT2Config(**_ids(), **shape), seed=1)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
}
