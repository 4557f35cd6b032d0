"""The fixture of pods that are stopped at the end of the test."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from local_pods import SERVER, MakePod, Pod, free_port

from kvasir_operator.pods import Host, Image


@pytest.fixture
async def make_pod(tmp_path: Path) -> AsyncIterator[MakePod]:
    pods: list[Pod] = []

    def make(
        flags: list[str] | None = None,
        host: Host | None = None,
        pod_spec: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **container: Any,
    ) -> Pod:
        port = free_port()
        state = tmp_path / f"pod{len(pods)}"
        spec = {
            "metadata": {"name": "web-0", "namespace": "shop", "labels": {"tier": "front"}, "uid": "u1"},
            "spec": {
                "terminationGracePeriodSeconds": 20,
                "containers": [
                    {
                        "name": "main",
                        "image": "server:1",
                        "args": ["--port", "$(PORT)", *(flags or [])],
                        "env": [
                            {"name": "PORT", "value": str(port)},
                            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                            {"name": "CONTROL", "value": str(state / "control")},
                        ],
                        "ports": [{"name": "http", "containerPort": port}],
                        **container,
                    }
                ],
                **(pod_spec or {}),
            },
        }
        image = Image((sys.executable, str(SERVER)))
        pods.append(Pod(spec, state, host or Host(images={"server:1": image}), **(options or {})))
        return pods[-1]

    yield make
    for pod in pods:
        pod.runner.kill()
        await pod.runner.stop(0)
