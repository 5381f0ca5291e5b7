"""A script next to its model, at every level: the numbers, the words and the files are those it has at home."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

import edif_hpc
from edif_hpc import toolkit
from edif_hpc.core.errors import MethodError

from .laptop import Laptop

EXPERIMENT = """
    import sys
    import edif_hpc
    from nnsight import TransformersModel

    NAME = "edif-test/gpt2"
    model = TransformersModel(NAME, task="text-generation")

    def layer(number):
        with model.trace("The Eiffel Tower is located in the city of", remote=REMOTE):
            hidden = model.transformer.h[number].output[0].save()
        return hidden

    REMOTE = "--here" not in sys.argv
    if __name__ == "__main__":
        for number in range(2):
            edif_hpc.save(f"layer {number}", layer(number))
        with model.generate("Once", max_new_tokens=4, do_sample=False, remote=REMOTE) as tracer:
            ids = tracer.result.save()
        with model.session(remote=REMOTE):
            with model.trace("a"):
                first = model.lm_head.output[0, -1].save()
            with model.trace("b"):
                difference = (model.lm_head.output[0, -1] - first).save()
        edif_hpc.save("ids", ids)
        edif_hpc.save("difference", difference)
        edif_hpc.save("words", {"said": model.tokenizer.decode(ids[0]), "count": len(ids[0])})
        print("done", *sys.argv[1:])
"""


def test_the_same_file_gives_the_same_numbers_here_and_there(laptop: Laptop) -> None:
    file = laptop.write(EXPERIMENT)
    laptop.python(file, "--here")
    done = laptop.run("submit", file, "--follow", "--out", "remote.pt", "--", "with", "--some arguments")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["done with --some arguments"]
    local = torch.load(laptop.folder / "experiment.saved.pt")
    remote = torch.load(laptop.folder / "remote.pt")
    assert list(local) == list(remote) == ["layer 0", "layer 1", "ids", "difference", "words"]
    assert local["words"] == remote["words"]
    assert local["layer 0"].shape[-1] == 64
    for name in ("layer 0", "layer 1", "ids", "difference"):
        assert torch.equal(local[name], remote[name]), name


def test_what_only_says_where_weights_lie_means_nothing_and_names_are_the_scripts_own(laptop: Laptop) -> None:
    script = """
        import warnings
        warnings.simplefilter("ignore")
        import edif_hpc
        from nnsight import CONFIG, LanguageModel
        CONFIG.API.HOST = "https://elsewhere.invalid"
        edif_hpc.connect("https://elsewhere.invalid", "edif_key")
        model = LanguageModel("edif-test/gpt2", device_map="auto", dispatch=True, dtype="bfloat16",
                              rename={"transformer.h": "layers"}, attn_implementation="eager")
        with model.trace("a b c", remote=True, output_attentions=True):
            hidden = model.layers[1].output.save()
            attention = model.output.attentions[0].save()
        print(type(model).__name__, hidden.dtype, tuple(attention.shape), model.repo_id)
        with model.trace("a b c"):
            print("inside", model.layers[1].output.shape[-1])
    """
    told, *rest = laptop.prints(script)
    assert told == "edif-test/gpt2 is held in float32 here, and the script asks for bfloat16: it runs in float32."
    shape = tuple(json.loads(rest[0].partition("(")[2].partition(")")[0].join("[]")))
    assert rest[0].startswith("LanguageModel torch.float32 (1, 4, ")
    assert shape[2] == shape[3]
    assert rest[0].endswith(") edif-test/gpt2")
    assert rest[1] == "inside 64"
    plain = """
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        print(model.attn_implementation, hasattr(model, "layers"))
    """
    assert laptop.prints(plain) == ["sdpa False"]


def test_our_client_finds_the_values_of_a_script_again(laptop: Laptop) -> None:
    script = """
        import edif_hpc
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        edif_hpc.save("answer", [42])
    """
    finding = laptop.write(
        """
        import sys
        import edif_hpc
        edif_hpc.connect(progress=False)
        found = edif_hpc.get(sys.argv[1])
        try:
            print(found.result())
        except edif_hpc.Misused as error:
            print(error, open(found.download(sys.argv[2])).read())
        """,
        "finding.py",
    )
    values, file = (laptop.submit(script, "--form", form).stdout.split()[0] for form in ("pt", "json"))
    assert laptop.python(finding, values, "unused").strip() == "{'answer': [42]}"
    said = laptop.python(finding, file, "answer.json")
    assert said.startswith("This request left a .json file, which torch did not write: .download('FILE') fetches it. {")


def test_an_adapter_that_the_admin_allowed(laptop: Laptop) -> None:
    script = """
        import edif_hpc
        from nnsight import TransformersModel
        import sys
        model = TransformersModel("edif-test/gpt2", task="text-generation", peft=sys.argv[1])
        with model.trace("a b c"):
            logits = model.output.logits.sum().save()
        print(model.peft is not None, sum("lora" in name for name, _ in model._module.named_modules()) > 0)
    """
    assert laptop.prints(script, "--", "edif-test/gpt2-lora") == ["True True"]
    refused = laptop.submit(script, "--", "somebody/else", code=3)
    assert "The adapter 'somebody/else' may not be used here (allowed: edif-test/gpt2-lora)" in refused.stderr
    assert "Traceback" not in refused.stderr


VALUES = """
    import edif_hpc, torch
    import numpy as np
    from nnsight import TransformersModel
    model = TransformersModel("edif-test/gpt2", task="text-generation")
    with model.trace("a b c"):
        hidden = model.transformer.h[0].output[0].save()
    edif_hpc.save("first", hidden[:3, :2].to(torch.bfloat16))
    edif_hpc.save("names", ["a", "b", "c"])
    edif_hpc.save("numbers", np.arange(3, dtype=np.int32))
    print([float(value) for value in hidden[:3, :2].to(torch.bfloat16).flatten()])
"""


def test_every_form_is_made_next_to_the_model_and_needs_no_torch_here(laptop: Laptop) -> None:
    expected: list[float] = []
    for form in ("safetensors", "npz", "parquet", "json"):
        out = laptop.folder / f"values.{form}"
        expected = json.loads(laptop.submit(VALUES, "--out", out, without_torch=True).stdout.splitlines()[1])
        assert read(out) == {"first": expected, "names": ["a", "b", "c"], "numbers": [0, 1, 2]}
    assert len(set(expected)) == 6


def read(file: Path) -> dict[str, list[object]]:
    """What such a file holds, flat, as the library reads it that belongs to it."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            assert opened.get_tensor("first").dtype == torch.bfloat16
            texts = [text for _, text in sorted(opened.metadata().items())]
            values = {name: opened.get_tensor(name).flatten().tolist() for name in opened.keys()}  # noqa: SIM118
        return {**values, "names": texts}
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            found = {name: arrays[name].flatten().tolist() for name in arrays}
        names = [found.pop(f"names.{number}")[0] for number in range(3)]
        return {**found, "names": names}
    if file.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(file).to_pydict()
    else:
        table = json.loads(file.read_text())
    return {**table, "first": [number for row in table["first"] for number in row]}


def test_a_file_that_the_script_writes_itself_comes_as_it_is(laptop: Laptop) -> None:
    script = """
        import os
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        for text in ("a first try, which is longer", "token,logit\\n"):
            with open(os.environ.get("EDIF_HPC_OUTPUT", "here.csv"), "w") as file:
                file.write(text)
        with open(os.environ.get("EDIF_HPC_OUTPUT", "here.csv"), "a") as file:
            file.write("Paris,12.5\\n")
    """
    laptop.submit(script, "--out", "table.csv")
    assert (laptop.folder / "table.csv").read_text() == "token,logit\nParis,12.5\n"
    laptop.python(laptop.write(script))
    assert (laptop.folder / "here.csv").read_text() == (laptop.folder / "table.csv").read_text()
    request_id = laptop.submit(script).stdout.split()[0]
    fetched = laptop.run("result", request_id)
    assert fetched.returncode == 0, fetched.stderr
    assert (laptop.folder / f"{request_id}.out").read_text() == "token,logit\nParis,12.5\n"


def test_a_script_that_saves_nothing_is_done_all_the_same(laptop: Laptop) -> None:
    script = """
        import sys
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        print("no newline", end="")
        print("to stderr", file=sys.stderr)
        sys.exit(0)
    """
    done = laptop.submit(script, "--out", "nothing.pt")
    assert done.stdout.splitlines()[1:] == ["no newlineto stderr"]
    assert torch.load(laptop.folder / "nothing.pt") == {}


def test_what_one_script_does_to_its_model_the_next_does_not_see(laptop: Laptop) -> None:
    if laptop.level == "none":
        pytest.skip("level none runs requests in the model host itself")
    script = """
        import torch
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/gpt2", task="text-generation")
        print(float(model._module.transformer.wte.weight.sum()))
        {write}
    """
    clean = script.format(write="")
    before = laptop.prints(clean)
    assert float(before[0]) != 0
    zero = "model._module.transformer.wte.weight.data.zero_(); print(float(model._module.transformer.wte.weight.sum()))"
    assert laptop.prints(script.format(write=zero)) == [*before, "0.0"]
    assert laptop.prints(clean) == before


KEPT = """
    import edif_hpc
    from edif_hpc.toolkit import attention_patterns, logit_lens
    from nnsight import TransformersModel

    model = TransformersModel("edif-test/gpt2", task="text-generation")
    lens = logit_lens(model, ["The Eiffel Tower", "a b"], tokens=[5], positions="all", remote=True)
    edif_hpc.save("lens", lens)
"""


@pytest.mark.parametrize("form", ["safetensors", "npz", "json"])
def test_a_result_of_the_toolkit_leaves_a_script_in_any_form(laptop: Laptop, form: str) -> None:
    more = """
    heads = attention_patterns(model, [[1, 2, 3, 4]], scores=["induction"], remote=True)
    edif_hpc.save("heads", heads)
    """
    laptop.submit(KEPT + more, "--out", f"kept.{form}")
    laptop.submit(KEPT, "--out", "kept.pt")
    expected = edif_hpc.load(laptop.folder / "kept.pt")["lens"]
    lens, heads = (toolkit.load(laptop.folder / f"kept.{form}", name) for name in ("lens", "heads"))
    assert type(lens) is type(expected)
    assert lens.record == expected.record
    for name, value in vars(expected).items():
        found = getattr(lens, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    assert heads.scores["induction"].isnan().all()  # nothing is repeated
    with pytest.raises(MethodError, match="no result of the toolkit by the name 'other'"):
        toolkit.load(laptop.folder / f"kept.{form}", "other")


def test_and_as_a_table(laptop: Laptop) -> None:
    laptop.submit(KEPT, "--out", "kept.parquet")
    laptop.submit(KEPT, "--out", "kept.pt")
    expected = edif_hpc.load(laptop.folder / "kept.pt")["lens"].table()
    assert pyarrow.parquet.read_table(laptop.folder / "kept.parquet").to_pydict().keys() == expected.keys()
    none = KEPT.replace("logit_lens", "extract_activations").replace("tokens=[5], ", "")
    said = laptop.submit(none, "--out", "none.parquet", code=3).stderr
    assert "Activations is no table; take another suffix than .parquet." in said
    said = laptop.submit(KEPT + "    lens.save(__import__('os').environ['EDIF_HPC_OUTPUT'])", "--wait", code=3).stderr
    assert "edif_hpc.save(name, result)" in said


def test_a_script_that_leaves_no_file_where_one_was_to_be(laptop: Laptop) -> None:
    script = "from nnsight import TransformersModel\nTransformersModel('edif-test/gpt2', task='text-generation')\n"
    said = laptop.submit(script, "--out", "own.csv", code=3).stderr
    assert said.endswith(
        "The script wrote nothing to EDIF_HPC_OUTPUT, and its result was to be that file: write to it, or use "
        "edif_hpc.save and take one of .pt, .safetensors, .npz, .parquet, .json for --out.\n"
    )
