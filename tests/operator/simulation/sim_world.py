"""One simulation: a seed in, a history out, and what went wrong in it.

First everything happens at once: edits, faults, crashes, two operators. Then it stops, and what is there must
become what the InferenceServices say, and stay so without another write.

`python tests/operator/simulation/sim_world.py SEED` tells a seed's history.
"""

import asyncio
import hashlib
import logging
import math
import random
import sys

from sim_apply import Object, leaves
from sim_capacity import CapacityWatch
from sim_clock import run
from sim_controllers import Controllers, Weather, is_ready
from sim_load import Decision, Demand, FlapWatch, sizes
from sim_operator import Network, Operator, Request
from sim_server import SETS, Server, object_path
from sim_user import NAMESPACE, User

from kvasir_operator.admission import parse
from kvasir_operator.api import PLURAL, WORKER_ROLES, InferenceService, InvalidService
from kvasir_operator.api.kinds import SET_KIND, SET_PLURAL
from kvasir_operator.plan.observed import reference, workload_name
from kvasir_operator.plan.wanted import runs_pods
from kvasir_operator.plan.wanted import wanted as wanted_of
from kvasir_operator.render import Options, render
from kvasir_operator.render.groups import numbered
from kvasir_operator.render.names import SERVICE_LABEL
from kvasir_operator.scaling.roles import remembered, resized

CHAOS_SECONDS = 180.0
ACT_SECONDS = 8.0
# Longer than the queue's resync, after which a missed event no longer matters, and than any rollout here.
QUIET_SECONDS = 7200.0
RESYNC_SECONDS = 600.0
CALM_SECONDS = 400.0
LOOK_SECONDS = 20.0


class World:
    """The cluster of one seed, and its history."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self.history: list[str] = []
        self.wrong: list[str] = []
        self.writes = 0
        self._missing: dict[tuple[str, str], float] = {}
        self._server = Server(self._loop.time)
        self._capacity = CapacityWatch(self._server)
        # Every other seed is steady: what operators see is late by little, pods that are ready stay so and nobody
        # meddles, and so no write may take paired capacity away. Edits, crashes and lost requests there are.
        self.steady = seed % 2 == 0
        self._weather, self._network = Weather(), Network()
        if self.steady:
            self._network.slow = self._network.stale = 0.0
        if self._chance.random() < 0.3:
            self._server.served.discard(SETS)  # it is installed later
        self._controllers = Controllers(self._server, self._chance, self._weather, self._note)
        self._demand = Demand(self._server, self._chance)
        self._unheard: set[Decision] = set()
        self._flaps = FlapWatch(self._server, self._unheard, self._fail)
        self._user = User(self._server, self._controllers, self._demand, self._chance, self._note)
        self._options = Options()
        self._operators: list[Operator] = []
        self._restarts: list[asyncio.Task[None]] = []
        self._started = 0
        self._loop.set_exception_handler(lambda _, context: self._fail(f"in the simulation: {context!r}"))

    def _note(self, what: str) -> None:
        self.history.append(f"{self._loop.time():9.3f} {what}")

    def _fail(self, what: str) -> None:
        self._note(f"WRONG {what}")
        self.wrong.append(what)

    async def live(self) -> None:
        """Run the seed to its end."""
        try:
            self._start_operator()
            while self._loop.time() < CHAOS_SECONDS:
                await asyncio.sleep(self._chance.expovariate(1 / ACT_SECONDS))
                await self._happen()
            await self._settle()
        finally:
            for operator in self._operators:
                await operator.stop()

    async def _happen(self) -> None:
        dice = self._chance.random()
        if dice < 0.60:
            self._user.act(meddle=not self.steady)
        elif dice < 0.72:
            await self._crash()
        elif dice < 0.77 and len(self._operators) < 2:
            self._start_operator()
        elif dice < 0.80:
            self._options = Options(engine_image=f"kvasir-engine:{self._chance.randint(1, 2)}")
            await self._crash()
        elif dice < 0.90 and self._operators:
            plural = self._chance.choice(("deployments", "pods", "services", SET_PLURAL, PLURAL))
            seconds = 240.0
            forever = self._chance.random() < 0.5
            self._chance.choice(self._operators).drop_watch(
                plural, math.inf if forever else self._chance.uniform(0, seconds)
            )
            self._note(f"a watch of {plural} dies" + (" for good" if forever else ""))
        elif dice < 0.95:
            self._note("the API server is gone")
            self._network.outage = True
            self._loop.call_later(self._chance.uniform(1, 40), self._network.__setattr__, "outage", False)
        else:
            self._server.served.add(SETS)

    def _start_operator(self) -> None:
        self._started += 1
        name = f"operator-{self._started}"
        self._note(f"{name} starts image={self._options.engine_image}")
        self._operators.append(
            Operator(
                name,
                self._server,
                self._network,
                self._options,
                self._demand,
                self._unheard,
                self._chance,
                self._before,
                self._observe,
                self._fail,
                self._restart,
            )
        )

    async def _crash(self, operator: Operator | None = None) -> None:
        if operator is None and self._operators:
            operator = self._chance.choice(self._operators)
        if operator not in self._operators:
            return  # dead already
        self._operators.remove(operator)
        self._note(f"{operator.name} dies")
        await operator.stop()
        if not self._operators:
            await asyncio.sleep(self._chance.uniform(0, 10))
            self._start_operator()

    def _restart(self, operator: Operator) -> None:
        self._note(f"{operator.name} has a dead watch")
        self._restarts.append(asyncio.create_task(self._crash(operator)))

    # What the operators may do

    def _before(self, request: Request) -> None:
        if self.steady and request.method != "GET":
            self._capacity.before(request.path)

    def _observe(self, operator: str, request: Request, status: int) -> None:
        """Called when a request has arrived and had its effect."""
        method, path = request.method, request.path
        if method == "GET":
            if status == 404:
                self._missing[operator, path] = self._loop.time()
            else:
                self._missing.pop((operator, path), None)
            return
        if "/events" in path:
            return
        self._note(f"{operator} {method} {path} {status}")
        if self.steady and (wrong := self._capacity.after(path)):
            self._fail(f"{operator} did {method} to {path}: {wrong}")
        if status < 300:
            self.writes += 1
        if path in self._user.foreign and status < 300:
            # Asked and told that nothing is there before it was made: no request of the API can close that gap.
            since = self._user.foreign_since[path]
            if self._missing.get((operator, path), math.inf) < since:
                self._user.foreign.pop(path)
            else:
                self._fail(f"{operator} did {method} to {path}, which is not its own")

    # The end

    async def _settle(self) -> None:
        self._note("the faults stop")
        self._network.fair = self._weather.fair = True
        self._network.outage = False
        self._server.served.add(SETS)
        self._user.leave_in_order()
        await asyncio.gather(*self._restarts)
        while len(self._operators) > 1:
            await self._crash()
        if self._operators[0].options != self._options:
            await self._crash()
        deadline = self._loop.time() + QUIET_SECONDS
        while lacking := self._lacking():
            if self._loop.time() > deadline:
                break
            await asyncio.sleep(LOOK_SECONDS)
        if lacking:
            self._fail(f"not there after {QUIET_SECONDS:g} s of quiet: {lacking}")
            return
        self._note("all is as it should be")
        await asyncio.sleep(RESYNC_SECONDS)  # watches that died come back, and statuses say the last word
        before = self.writes
        await asyncio.sleep(CALM_SECONDS)
        if self.writes != before:
            self._fail(f"{self.writes - before} writes though all was as it should be")
        for path, item in self._user.foreign.items():
            if self._server.get(path) != item:
                self._fail(f"{path} is not what its owner made it")

    def _lacking(self) -> str:
        """What is not as the InferenceServices say; empty when all is."""
        wanted: dict[str, Object] = {}
        for path, document in self._server.items(PLURAL):
            status = document.get("status", {})
            ready = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})
            if status.get("observedGeneration") != document["metadata"]["generation"]:
                return f"{path} has a status of another generation"
            try:
                service = parse(document)
            except InvalidService:
                if ready.get("reason") != "NotAccepted":
                    return f"{path} is not refused"
                return self._orphans(None)
            if (wants := sizes(document)) is not None:
                said = status.get("scaling", {})
                if any(said.get(role, {}).get("replicas") != size for role, size in wants.items()):
                    return f"{path} has not scaled itself to {wants}: {said}"
                service = resized(service, remembered(status))
            serving = service.spec.decode.replicas > 0 or service.spec.scaling.holds is not None
            if ready.get("status") != ("True" if serving else "False"):
                return f"{path} has Ready={ready.get('status')}: {ready.get('message')}"
            for item in render(service, self._kept(service, status)):
                where = object_path(NAMESPACE, item)
                if item["kind"] != SET_KIND and where.split("/namespaces/")[0] in self._server.served:
                    wanted[where] = item
            for role in WORKER_ROLES:
                found = wanted_of(render(service, self._kept(service, status)), role)
                if found.grouped:
                    there = [
                        p for p, o in self._server.items(SET_PLURAL) if workload_name(reference(o)) == found.name
                    ]
                    if len(there) != found.replicas:
                        return f"{found.name} has {len(there)} of {found.replicas} sets"
                    for at in there:
                        set_of_one = numbered(found.items[0], int(at.rpartition("-")[2]))
                        wanted[at] = {**set_of_one, "spec": {**set_of_one["spec"], "replicas": 1}}
        return self._different(wanted) or self._orphans(wanted)

    def _kept(self, service: InferenceService, status: Object) -> Options:
        """With which image the pods are to be: the operator's, or the one that is remembered."""
        if service.spec.engine.image_policy == "FollowOperator":
            return self._options
        return Options(engine_image=status["release"]["image"], defaults=status["release"]["defaults"])

    def _different(self, wanted: dict[str, Object]) -> str:
        for path, item in wanted.items():
            found = self._server.get(path)
            if found is None:
                return f"{path} is missing"
            said, there = leaves(item), leaves(found)
            different = [at for at, value in said.items() if there.get(at) != value]
            if different:
                return f"{path} differs at {different[0]}: {there.get(different[0])} for {said[different[0]]}"
            ours = self._server.managers(path).get("kvasir", frozenset())
            if left := [at for at in ours - said.keys() if at[:2] != ("metadata", "annotations")]:
                return f"{path} still has {left[0]}"
            if runs_pods(item) and (lacking := self._lacks_pods(item, found, wanted)):
                return f"{path} {lacking}"
        return ""

    def _lacks_pods(self, item: Object, found: Object, wanted: dict[str, Object]) -> str:
        """A router is ready only where it has workers."""
        name, labels = found["metadata"]["name"], item["metadata"]["labels"]
        service = labels[SERVICE_LABEL]
        decodes = [o for o in wanted.values() if o["metadata"]["name"].startswith(f"{service}-decode-")]
        idle = not any(o["spec"]["replicas"] for o in decodes if runs_pods(o))
        ready, asked = len(self._ready_pods(found)), item["spec"]["replicas"]
        asked *= item["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
        if ready == asked or (name == f"{service}-router" and idle and not ready):
            return ""
        return f"has {ready} of {asked} pods ready"

    def _ready_pods(self, deployment: Object) -> list[str]:
        uid = deployment["metadata"]["uid"]
        return [p for p, pod in self._server.items("pods") if is_ready(pod) and _owner(pod) == uid]

    def _orphans(self, wanted: dict[str, Object] | None) -> str:
        """What is there and not wanted; `None`: nothing is known of what is wanted."""
        services = {item["metadata"]["uid"] for _, item in self._server.items(PLURAL)}
        for path, item in self._server.everything():
            if path in self._user.foreign or "ownerReferences" not in item["metadata"] or "/pods/" in path:
                continue
            if _owner(item) not in services or (wanted is not None and path not in wanted):
                return f"{path} is left over"
        return ""


def _owner(item: Object) -> str:
    uid: str = item["metadata"]["ownerReferences"][0]["uid"]
    return uid


class Failed(AssertionError):
    """A seed that went wrong, with how to see it again."""

    def __init__(self, seed: int, wrong: list[str], history: list[str]) -> None:
        self.history = history
        tail = "\n".join(history[-40:])
        again = f"python {__file__} {seed}"
        super().__init__(f"seed {seed}: {'; '.join(wrong[:3])}\nthe whole history: {again}\n...\n{tail}")


def simulate(seed: int) -> list[str]:
    """The history of a seed. Raises Failed."""
    world: World | None = None

    async def main() -> None:
        nonlocal world
        world = World(seed)
        await world.live()

    logging.disable(logging.CRITICAL)
    try:
        run(main())
    finally:
        logging.disable(logging.NOTSET)
    assert world is not None
    if world.wrong:
        raise Failed(seed, world.wrong, world.history)
    return world.history


def digest(history: list[str]) -> str:
    """A history's fingerprint: equal where a seed is replayed."""
    return hashlib.sha256("\n".join(history).encode()).hexdigest()[:16]


if __name__ == "__main__":
    try:
        told = simulate(int(sys.argv[1]))
    except Failed as failure:
        told = failure.history
        print("\n".join(told))
        sys.exit(1)
    print("\n".join([*told, f"digest {digest(told)}"]))
