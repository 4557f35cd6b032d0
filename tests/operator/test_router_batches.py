"""Batches in an object store, as a router's template names it."""

from typing import Any

from isvc_cases import deployments, document, main_container

from kvasir_operator.admission import parse
from kvasir_operator.admission.webhook import refusal
from kvasir_operator.render import Options, render


def router(*env: dict[str, Any], **more: Any) -> dict[str, Any]:
    kvasir = {"name": "kvasir", "env": list(env), **more}
    return {"replicas": 2, "template": {"spec": {"containers": [kvasir]}}}


def test_an_address_and_a_secret_of_the_template_are_the_routers_alone() -> None:
    place = {"name": "KVASIR_BATCH_DIR", "value": "s3://bucket/llama"}
    secret = [{"secretRef": {"name": "batches"}}]
    found = deployments(render(parse(document(router=router(place, envFrom=secret))), Options()))
    main = main_container(found["router"])
    assert place in main["env"]
    assert main["envFrom"] == secret
    assert {"name": "tmp", "mountPath": "/tmp"} in main["volumeMounts"]
    for role in ("prefill", "decode"):
        assert "envFrom" not in main_container(found[role])
        assert place not in main_container(found[role]).get("env", [])


def test_a_misspelt_variable_is_refused() -> None:
    wrong = document(router=router({"name": "KVASIR_BATCHES_DIR", "value": "s3://bucket/llama"}))
    said = refusal(wrong, None, lambda _: None)
    assert said is not None
    assert "did you mean KVASIR_BATCH_DIR?" in said
