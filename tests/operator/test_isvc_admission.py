"""The admission webhook says what the operator would say later, and nothing about what is stored already."""

from typing import Any

import pytest
from isvc_cases import document

from kvasir_operator.admission.webhook import refusal
from kvasir_operator.api import Model
from kvasir_operator.api.validation import ModelMetadata


def unknown(model: Model) -> ModelMetadata | None:
    return None


def smol(model: Model) -> ModelMetadata | None:
    return ModelMetadata(9, 3, 8192)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"prefill": {"replicas": -1}}, "spec.prefill.replicas"),
        ({"transfer": {"fabric": "rdma"}}, "spec.transfer.rdmaResource"),
        ({"decode": {"template": {"spec": {"containers": "none"}}}}, "spec.decode.template"),
        ({"decode": {"tensorParallel": 2}}, "spec.decode.tensorParallel"),
        ({"typo": 1}, "spec.typo"),
    ],
)
def test_what_cannot_work_is_refused_by_field(spec: dict[str, Any], path: str) -> None:
    assert (refusal(document(**spec), None, smol) or "").startswith(path)
    assert (refusal(document(**spec), document(), smol) or "").startswith(path)


def test_what_can_work_is_stored() -> None:
    assert refusal(document(decode={"replicas": 3}), None, smol) is None
    assert refusal(document(decode={"tensorParallel": 2}), None, unknown) is None, "nothing is known of the model"


def test_what_is_stored_already_can_be_edited_and_can_go() -> None:
    bad = document(prefill={"replicas": -1})
    annotated = {**bad, "metadata": {**bad["metadata"], "annotations": {"a": "b"}}}
    assert refusal(annotated, bad, unknown) is None
    going = {**bad, "metadata": {**bad["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    assert refusal(going, document(), unknown) is None


def test_a_name_that_the_api_server_will_make_is_no_reason() -> None:
    nameless = document()
    nameless["metadata"] = {"namespace": "default", "generateName": "llama-"}
    assert refusal(nameless, None, unknown) is None
    nameless["metadata"]["generateName"] = "Llama-"
    assert "metadata.name" in (refusal(nameless, None, unknown) or "")
