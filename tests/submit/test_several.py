"""Several models in one script: all in one executor, or a refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.delivery.scene import serves, worker
from tests.support import models
from tests.support.stack import Stack, running

from .conftest import SETTINGS
from .laptop import Laptop

COMPARISON = """
    import sys
    import edif_hpc
    from nnsight import TransformersModel

    one = TransformersModel("edif-test/gpt2", task="text-generation")
    other = TransformersModel("edif-test/llama", task="text-generation")
    for name, model in (("one", one), ("other", other)):
        with model.trace("The Eiffel Tower is located in the city of"):
            logits = model.lm_head.output[0, -1].save()
        edif_hpc.save(name, logits)
    with one.session(remote="--here" not in sys.argv):
        with one.trace("a b c"):
            first = one.lm_head.output[0, -1].save()
        with other.trace("a b c"):
            difference = (other.lm_head.output[0, -1] - first).save()
    edif_hpc.save("difference", difference)
    print(one.trace is not other.trace, len(list(one.modules())), len(list(other.modules())))
"""


def test_two_models_in_one_script_give_the_local_numbers(laptop: Laptop) -> None:
    file = laptop.write(COMPARISON)
    laptop.python(file, "--here")
    done = laptop.run("submit", file, "--follow", "--json", "--out", "remote.pt")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["models"] == ["edif-test/gpt2", "edif-test/llama"]
    local, remote = (torch.load(laptop.folder / name) for name in ("experiment.saved.pt", "remote.pt"))
    for name in ("one", "other", "difference"):
        assert torch.equal(local[name], remote[name]), name
    assert not torch.equal(remote["one"], remote["other"])


def test_models_that_only_the_options_name(laptop: Laptop) -> None:
    script = """
        import sys
        from nnsight import TransformersModel
        for name in sys.argv[1:]:
            model = TransformersModel(name, task="text-generation")
            with model.trace("a b"):
                shape = model.lm_head.output.shape
            print(name, model._module.config.model_type)
    """
    names = ["edif-test/llama", "edif-test/gpt2"]
    declared = [part for name in names for part in ("--model", name)]
    assert laptop.prints(script, *declared, "--", *names) == ["edif-test/llama llama", "edif-test/gpt2 gpt2"]


def test_writes_to_a_lent_model_stay_with_the_script(laptop: Laptop) -> None:
    if laptop.level == "none":
        pytest.skip("level none runs requests in the model host itself")
    script = """
        from nnsight import TransformersModel
        one = TransformersModel("edif-test/gpt2", task="text-generation")
        other = TransformersModel("edif-test/llama", task="text-generation")
        print(float(other._module.model.embed_tokens.weight.abs().sum()))
        other._module.model.embed_tokens.weight.data.zero_()
        one._module.transformer.wte.weight.data.zero_()
        print(float(other._module.model.embed_tokens.weight.abs().sum()))
    """
    first, second = laptop.prints(script), laptop.prints(script)
    assert first == second
    assert float(first[0]) > 0
    assert first[1] == "0.0"
    alone = """
        from nnsight import TransformersModel
        other = TransformersModel("edif-test/llama", task="text-generation")
        print(float(other._module.model.embed_tokens.weight.abs().sum()))
    """
    assert laptop.prints(alone) == first[:1]


TWICE = """
    import edif_hpc
    from nnsight import TransformersModel

    def model(**options):
        return TransformersModel("edif-test/{}", task="text-generation", **options)

    def logits(of):
        with of.trace("The Eiffel Tower is in"):
            found = of.lm_head.output[0, -1].save()
        return found

    base, other = model(attn_implementation="eager"), model({})
    edif_hpc.save("attention", [base.attn_implementation, other.attn_implementation])
    edif_hpc.save("alike", bool((logits(base) - logits(other)).abs().max() < 1e-4))
    with __import__("torch").no_grad():
        next(other._module.get_output_embeddings().parameters()).zero_()
    third = model()
    edif_hpc.save("base", logits(base))
    edif_hpc.save("changed", logits(other))
    edif_hpc.save("third", logits(third))
"""


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_that_is_built_again_is_another_one(laptop: Laptop, name: str) -> None:
    file = laptop.write(TWICE.format(name, ""))
    laptop.python(file)
    done = laptop.run("submit", file, "--model", f"edif-test/{name}", "--follow", "--out", "remote.pt")
    assert done.returncode == 0, done.stderr
    local, remote = (torch.load(laptop.folder / name) for name in ("experiment.saved.pt", "remote.pt"))
    assert local["attention"] == remote["attention"] == ["eager", "sdpa"]
    assert local["alike"] is remote["alike"] is True
    assert not remote["changed"].any()
    for each in ("base", "changed", "third"):
        assert torch.equal(local[each], remote[each]), each


def test_a_model_and_the_same_with_an_adapter(laptop: Laptop) -> None:
    file = laptop.write(TWICE.format("gpt2", 'peft="edif-test/gpt2-lora"'))
    laptop.python(file)
    done = laptop.run("submit", file, "--model", "edif-test/gpt2", "--follow", "--out", "remote.pt")
    assert done.returncode == 0, done.stderr
    local, remote = (torch.load(laptop.folder / name) for name in ("experiment.saved.pt", "remote.pt"))
    assert local["alike"] is remote["alike"] is False
    for each in ("base", "third"):
        assert torch.equal(local[each], remote[each]), each


def test_the_adapter_first_is_the_same_or_refused(laptop: Laptop) -> None:
    """Sealed weights make a new model of it; without them, at level none, there is nothing to copy."""
    script = """
        import edif_hpc
        from nnsight import TransformersModel
        TransformersModel("edif-test/gpt2", task="text-generation", peft="edif-test/gpt2-lora")
        base = TransformersModel("edif-test/gpt2", task="text-generation")
        with base.trace("The Eiffel Tower is in"):
            logits = base.lm_head.output[0, -1].save()
        edif_hpc.save("base", logits)
    """
    if laptop.level == "none":
        assert "the one without an adapter first" in laptop.submit(script, "--wait", code=3).stderr
        return
    laptop.python(laptop.write(script))
    laptop.submit(script, "--out", "remote.pt")
    local, remote = (torch.load(laptop.folder / name) for name in ("experiment.saved.pt", "remote.pt"))
    assert torch.equal(local["base"], remote["base"])


def test_traces_go_on_after_a_model_was_lent(laptop: Laptop) -> None:
    """At level none lending moves a model's weights: whoever traces it afterwards gets the same numbers."""
    alone = """
        from nnsight import TransformersModel
        model = TransformersModel("edif-test/{}", task="text-generation")
        with model.trace("The Eiffel Tower"):
            logits = model.lm_head.output[0, -1].save()
        print(logits.double().abs().sum().item())
    """
    both = "from nnsight import TransformersModel\n" + "".join(
        f"TransformersModel('edif-test/{name}', task='text-generation')\n" for name in ("gpt2", "llama")
    )
    before = [laptop.prints(alone.format(name)) for name in ("gpt2", "llama")]
    laptop.prints(both)
    assert [laptop.prints(alone.format(name)) for name in ("gpt2", "llama")] == before


def test_a_failure_among_several_models_is_the_scripts_own(laptop: Laptop) -> None:
    script = COMPARISON + "\n    raise LookupError('nothing to compare')\n"
    done = laptop.submit(script, code=3)
    assert done.stderr.rstrip().endswith("LookupError: nothing to compare")


SLOW = """
    import time
    import edif_hpc
    from nnsight import TransformersModel
    one = TransformersModel("edif-test/gpt2", task="text-generation")
    other = TransformersModel("edif-test/llama", task="text-generation")
    print("begun", flush=True)
    time.sleep(4)
    with other.trace("a b c"):
        logits = other.lm_head.output[0, -1].save()
    edif_hpc.save("sum", float(logits.sum()))
"""


def begun(laptop: Laptop) -> tuple[subprocess.Popen[str], str]:
    command = laptop.start("submit", laptop.write(SLOW), "--follow", "--out", "sum.json")
    assert command.stdout is not None
    request_id = command.stdout.readline().strip()
    assert command.stdout.readline() == "begun\n"
    return command, request_id


def test_a_script_goes_on_when_a_host_that_lent_it_a_model_dies(laptop: Laptop, stack: Stack) -> None:
    command, request_id = begun(laptop)
    held = [model for worker in stack.json("status")["workers"] for model in worker["models"]]
    (lender,) = [model["pids"]["host"] for model in held if "edif-test/llama" in model["model_key"]]
    os.kill(lender, signal.SIGKILL)
    _, words = command.communicate(timeout=90)
    assert command.returncode == 0, words
    assert laptop.shown(request_id)["attempt"] == 1
    expected = json.loads((laptop.folder / "sum.json").read_text())
    laptop.submit(SLOW, "--out", "again.json")  # the model has been brought back, and is lent again
    assert json.loads((laptop.folder / "again.json").read_text()) == expected


def test_a_script_whose_worker_dies_runs_again(laptop: Laptop, stack: Stack) -> None:
    command, request_id = begun(laptop)
    (worker,) = stack.json("status")["workers"]
    os.kill(worker["pid"], signal.SIGKILL)
    rest, words = command.communicate(timeout=110)
    assert command.returncode == 0, words
    assert rest == "begun\n"
    assert laptop.shown(request_id)["attempt"] == 2


def needed(cache: Path) -> dict[str, int]:
    """Bytes that each model takes on a worker."""
    from edif_hpc.hardware.checkpoint import describe
    from edif_hpc.hardware.memory import required_bytes

    return {name: required_bytes(describe(cache, models.repo_id(name), None)) for name in ("gpt2", "llama")}


ALONE = "from nnsight import TransformersModel\nTransformersModel('edif-test/llama', task='text-generation')"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Stack]:
    """A service whose workers hold either model, and not both."""
    needs = needed(cache).values()
    settings = SETTINGS.replace("[worker]", f"[worker]\nmemory_bytes = {max(needs) + min(needs) // 2}")
    with running(tmp_path_factory.mktemp("submit-small") / "home", cache, "process", settings) as found:
        found.level = "process"
        yield found


def test_what_no_worker_can_hold_is_refused_at_submission(small: Stack, cache: Path, tmp_path: Path) -> None:
    laptop = Laptop(tmp_path, small.url, small.key, cache, small.level)
    done = laptop.run("submit", laptop.write(COMPARISON))
    assert done.returncode == 1
    assert "edif-test/gpt2 and edif-test/llama need about" in done.stderr
    assert "and the largest worker has" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert laptop.run("requests", "list", "--json").stdout.strip() == "[]"
    laptop.submit(ALONE)


def test_what_one_worker_is_too_small_for_waits_for_a_larger_one(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, tmp_path: Path
) -> None:
    pools = "".join(f'[[pool]]\nname = "{name}"\nlauncher = "local"\nmax_workers = 0\n' for name in ("small", "large"))
    needs = needed(cache)
    light, heavy = sorted(needs, key=lambda name: needs[name])
    alone = {name: ALONE.replace("edif-test/llama", models.repo_id(name)) for name in needs}
    with running(tmp_path_factory.mktemp("submit-sizes") / "home", cache, "process", SETTINGS + pools) as stack:
        laptop = Laptop(tmp_path, stack.url, stack.key, cache, "process")
        room = (needs[light] + needs[heavy]) // 2
        limited = replace(stack, variables={"EDIF_HPC_WORKER__MEMORY_BYTES": str(room)})
        with worker(limited, "lesser", "--pool", "small"):
            serves(stack, "lesser")
            sent = [laptop.run("submit", laptop.write(each)).stdout.strip() for each in (COMPARISON, alone[heavy])]
            laptop.submit(alone[light])  # later, and served
            assert [laptop.shown(each)["attempt"] for each in sent] == [0, 0]
            with worker(stack, "greater", "--pool", "large"):
                for each in sent:
                    done = laptop.run("logs", "-f", each)
                    assert done.returncode == 0, done.stderr
                found = [laptop.shown(each) for each in sent]
    assert [(one["status"], one["worker"], one["attempt"]) for one in found] == [("COMPLETED", "greater", 1)] * 2, found
