"""Bad envelopes, keys and versions get one clear sentence; the binary frame is what torch.save would write."""

from __future__ import annotations

import json

import pytest

from edif_hpc.core import links, wire
from edif_hpc.core.errors import ClientVersionError, EnvelopeError, ModelKeyError

pytestmark = pytest.mark.fast
CLASS = "nnsight.modeling.transformers.TransformersModel"


def key(**fields: object) -> str:
    return f"{CLASS}:{json.dumps({'repo_id': 'org/name', 'revision': None, 'task': 'text-generation', **fields})}"


def test_equal_models_have_equal_keys_however_they_are_spelled() -> None:
    spelled = f'{CLASS}:{{"task":"text-generation","repo_id":"org/name"}}'
    assert str(wire.ModelKey.parse(spelled)) == str(wire.ModelKey.parse(key())) == key()


@pytest.mark.parametrize(
    "text",
    [
        "os.system:{}",
        "nnsight.modeling.diffusion.DiffusionModel:{}",
        CLASS,
        f"{CLASS}:not json",
        f"{CLASS}:[]",
        key(repo_id="../../etc/passwd"),
        key(repo_id="a/b/c"),
        key(repo_id="org/na..me"),
        key(repo_id=None),
        key(repo_id=7),
        key(revision="../main"),
        key(revision="a b"),
        key(task="text generation"),
        key(trust_remote_code="yes"),
    ],
)
def test_a_key_that_could_name_something_else_is_refused(text: str) -> None:
    with pytest.raises(ModelKeyError) as refusal:
        wire.ModelKey.parse(text)
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_key": 3}', '{"model_key": "x", "env": []}', '{"model_key": "' + "x" * 3000 + '"}']
)
def test_a_malformed_envelope_names_its_first_wrong_field(text: str) -> None:
    with pytest.raises(EnvelopeError, match="wrong at"):
        wire.Envelope.read(text)


def test_an_env_may_not_be_a_payload_of_its_own() -> None:
    with pytest.raises(EnvelopeError, match="env is larger"):
        wire.Envelope.read(json.dumps({"model_key": "x", "env": {"a": "b" * 20_000}}))


def test_ids_users_and_times_in_the_envelope_are_ignored() -> None:
    envelope = wire.Envelope.read('{"model_key": "x", "id": "mine", "user": "root", "time": 1}')
    assert set(envelope.model_dump()) == {"model_key", "session_id", "compress", "env"}


@pytest.mark.parametrize("version", ["0.7.0", "0.9.0", "1.0", "new"])
def test_an_unsupported_client_learns_the_supported_range(version: str) -> None:
    with pytest.raises(ClientVersionError, match=r">=0\.8\.1"):
        wire.check_client_version(version)


def test_supported_clients_pass() -> None:
    for version in ("0.8.1", "0.8.2", "0.8.1.post1", ""):
        wire.check_client_version(version)


def test_links_are_bound_to_their_request_and_end() -> None:
    link = links.make("secret", "http://here/", "r1", 60)
    expires, signature = link.split("expires=")[1].split("&signature=")
    assert link.startswith("http://here/result/r1?")
    assert links.valid("secret", "r1", int(expires), signature)
    assert not links.valid("secret", "r2", int(expires), signature)
    assert not links.valid("other", "r1", int(expires), signature)
    assert not links.valid("secret", "r1", int(expires) + 1, signature)
    old = links.make("secret", "http://here", "r1", -1)
    expires, signature = old.split("expires=")[1].split("&signature=")
    assert not links.valid("secret", "r1", int(expires), signature)
