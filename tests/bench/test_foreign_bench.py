"""The operator is not sent other people's pods, however many there are; it asks for its own only."""

import asyncio

from bench.foreign import report, run

from kvasir_operator.controller import WATCHED


def test_the_operator_asks_for_no_pod_but_its_own() -> None:
    found, server = asyncio.run(run(700, settle=0.0))
    assert found.sent["pods"] == 0
    assert {plural: server.selectors[plural] for _, _, plural in WATCHED} == dict.fromkeys(
        (plural for _, _, plural in WATCHED), "serving.kvasir.dev/inferenceservice"
    )
    assert server.selectors["inferenceservices"] == "", "a user need not label a service"
    assert report(700, found, found)[-1].endswith("0 pods were sent to it")
