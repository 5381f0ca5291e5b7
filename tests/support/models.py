"""Tiny models with real architectures, in an ordinary Hugging Face hub cache, for every test that needs a model.

Weights are random with fixed seeds, so numbers can be compared between a local and a remote run but mean nothing.
Each model is built once per version of this file and of the libraries, under EDIF_HPC_TEST_CACHE (default
`<repo>/.cache/tests`), behind a file lock, so that pytest-xdist workers share it. What it must not know: the service.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
TASKS = {"qwen2.5-vl": "image-text-to-text", "t5": "feature-extraction", "bart": "feature-extraction"}
"""The pipeline task to name in `TransformersModel(repo, task=…)`; everything else is text-generation.

Offline a task must be named, and transformers 5 has none left that loads a text encoder-decoder with its head: under
`text-generation` T5 is refused and BART silently loses its encoder. `feature-extraction` loads both halves.
"""

# 64 wide and 4 heads everywhere; 2 key-value heads, so that two tensor-parallel ranks can share them. Weights are five
# times the usual spread: with the usual one all logits of a tiny model are nearly equal and argmax tests prove little.
WIDE, LAYERS, HEADS, KV_HEADS, SPREAD = 64, 4, 4, 2, 0.1


def repo_id(name: str) -> str:
    """The hub id of a tiny model: `gpt2` -> `edif-test/gpt2`."""
    return f"{ORG}/{name}"


def task(name: str) -> str:
    """The pipeline task that fits this model."""
    return TASKS.get(name, "text-generation")


def sample(name: str, model: Any, prompt: str = "The Eiffel Tower is located in the city of") -> dict[str, Any]:
    """Keyword arguments of a trace that this model takes: `with model.trace(**sample(name, model)): …`."""
    if name == "qwen2.5-vl":
        from PIL import Image

        image = Image.linear_gradient("L").resize((84, 84)).convert("RGB")
        return {"text": f"<|vision_start|><|image_pad|><|vision_end|>{prompt}", "images": [image]}
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3]} if name in ("t5", "bart") else {"input_ids": ids}


def build_cache(root: Path, names: Iterable[str]) -> Path:
    """Lay the named models into `root/hub` (set HF_HOME to `root`) and return that hub cache directory."""
    hub = Path(root) / "hub"
    for name in _with_bases(names):
        _lay(_built(name), hub, repo_id(name))
    return hub


def smollm2(root: Path) -> Path:
    """Lay the real SmolLM2-135M-Instruct into `root/hub`, beside whatever is there; fetched and converted once."""
    from edif_hpc.fleet.demo_model import REPO_ID, bring
    from edif_hpc.hardware.checkpoint import entry_name

    shelf = test_cache() / "smollm2"
    with locked(test_cache() / "smollm2.lock"):
        bring(shelf / "hub", shelf / "downloads")
    hub = Path(root) / "hub"
    with locked(hub / ".locks" / "smollm2.lock"):
        if not (hub / entry_name(REPO_ID)).exists():
            making = Path(tempfile.mkdtemp(prefix=".laying-", dir=hub))
            shutil.copytree(shelf / "hub" / entry_name(REPO_ID), making / "entry", symlinks=True, copy_function=_link)
            (making / "entry").rename(hub / entry_name(REPO_ID))
            making.rmdir()
    return hub


def _link(source: str, target: str) -> None:
    """270 MB are shared, not copied, where the file system and its owner allow that."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


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
    with suppress(OSError):
        shelf.mkdir(parents=True, exist_ok=True)
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
    """Copy a model folder into a hub cache as a snapshot whose commit is named after the contents: as the Hub's own
    client does it, with the bytes in blobs/ and links to them in the snapshot."""
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
            making.chmod(0o755)
            (entry / "blobs").mkdir(parents=True, exist_ok=True)
            for path in files:
                blob = entry / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
                shutil.copy(path, blob)
                link = making / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blob, snapshot / path.relative_to(source).parent))
            snapshot.parent.mkdir(exist_ok=True)
            making.rename(snapshot)
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / "main").write_text(commit)


# -- the models -------------------------------------------------------------------------------------------------------


def _tokenizer(**extra: Any) -> Any:
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
        **extra,
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


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig

    _save(folder, LlamaConfig(**_decoder(), tie_word_embeddings=False), seed=2)


def _qwen3(folder: Path) -> None:
    from transformers import Qwen3Config

    _save(folder, Qwen3Config(**_decoder(), head_dim=WIDE // HEADS, tie_word_embeddings=True), seed=3)


def _gemma3(folder: Path) -> None:
    from transformers import Gemma3TextConfig

    # A window shorter than the tests' prompts, so that sliding and full attention really differ.
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
    shape = {"head_dim": WIDE // HEADS, "query_pre_attn_scalar": WIDE // HEADS}
    _save(folder, Gemma3TextConfig(**_decoder(), **windows, **shape), seed=4)


def _mixtral(folder: Path) -> None:
    from transformers import MixtralConfig

    _save(folder, MixtralConfig(**_decoder(), num_local_experts=4, num_experts_per_tok=2), seed=5)


def _t5(folder: Path) -> None:
    from transformers import T5Config

    shape = {"d_model": WIDE, "d_kv": WIDE // HEADS, "d_ff": 2 * WIDE, "num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(**_ids(), **shape, num_heads=HEADS, decoder_start_token_id=0)
    _save(folder, config, seed=6, auto="AutoModelForSeq2SeqLM")


def _bart(folder: Path) -> None:
    from transformers import BartConfig

    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 2 * WIDE, "decoder_ffn_dim": 2 * WIDE}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "max_position_embeddings": 256}
    config = BartConfig(**_ids(), **layers, **heads, d_model=WIDE, init_std=SPREAD, decoder_start_token_id=0)
    _save(folder, config, seed=7, auto="AutoModelForSeq2SeqLM")


def _qwen25_vl(folder: Path) -> None:
    from transformers import PaddleOCRVLProcessor, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

    tokenizer = _tokenizer(extra_special_tokens={"image_token": SPECIALS[-1]})
    start, end, pad = (tokenizer.convert_tokens_to_ids(token) for token in SPECIALS[3:])
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_heads": HEADS, "window_size": 56}
    config = Qwen2_5_VLConfig(
        text_config={**_decoder(), "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={**vision, "out_hidden_size": WIDE, "fullatt_block_indexes": [1]},
        image_token_id=pad,
        vision_start_token_id=start,
        vision_end_token_id=end,
        **_ids(),
    )
    _save(folder, config, seed=8, auto="AutoModelForImageTextToText")
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    # Qwen's own processor insists on a video half, which needs torchvision, whose wheel needs a CUDA build of torch.
    # PaddleOCR-VL's treats text and images in just the same way and has no video half.
    PaddleOCRVLProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(
        folder
    )


def _gpt2_lora(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(_built("gpt2"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        # Random B matrices too: with peft's zeros an adapter changes nothing and a test of it would prove nothing.
        config = LoraConfig(
            r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = repo_id("gpt2")
    adapted.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the Hub


BUILDERS: dict[str, Callable[[Path], None]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "t5": _t5,
    "bart": _bart,
    "qwen2.5-vl": _qwen25_vl,
    "gpt2-lora": _gpt2_lora,
}
