"""What a pod's program is told: environment, arguments, volumes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from local_pods import MakePod

from kvasir_operator.pods import ENGINE, Host, Image, PodError, PodRunner
from kvasir_operator.pods.environment import expand
from kvasir_operator.pods.volumes import Mounts

DUMP = Image((sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"))
ONCE = {"restartPolicy": "Never"}


async def run(make_pod: MakePod, host: Host, **fields: Any) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment that a container with these fields sees."""
    fields.setdefault("args", [])
    pod = make_pod(host=host, **fields)
    await pod.runner.start()
    await pod.runner.wait()
    args, env = json.loads(pod.lines[-1])
    return args, env


def modes(directory: Path) -> list[int]:
    return [file.stat().st_mode for file in directory.iterdir()]


def environ(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


async def test_the_downward_api_names_the_pod(make_pod: MakePod) -> None:
    env = [
        from_field("NAME", "metadata.name"),
        from_field("NAMESPACE", "metadata.namespace"),
        from_field("UID", "metadata.uid"),
        from_field("TIER", "metadata.labels['tier']"),
        from_field("IP", "status.podIP"),
        from_field("HOST_IP", "status.hostIP"),
        from_field("NODE", "spec.nodeName"),
        from_field("ACCOUNT", "spec.serviceAccountName"),
    ]
    host = Host(any_image=DUMP, node_name="node-a", host_ip="10.0.0.1")
    _, seen = await run(make_pod, host, env=env, pod_spec=ONCE)
    assert {entry["name"]: seen[entry["name"]] for entry in env} == {
        "NAME": "web-0",
        "NAMESPACE": "shop",
        "UID": "u1",
        "TIER": "front",
        "IP": "127.0.0.1",
        "HOST_IP": "10.0.0.1",
        "NODE": "node-a",
        "ACCOUNT": "default",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)/$(B)", "1/2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$A ${A} $", "$A ${A} $"),
        ("$(A", "$(A"),
    ],
)
def test_references_expand_as_in_kubernetes(text: str, expected: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == expected


async def test_arguments_and_later_entries_may_refer_to_earlier_ones(make_pod: MakePod) -> None:
    env = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)2"},
        {"name": "C", "value": "$(D)"},
        {"name": "D"},
    ]
    args, seen = await run(make_pod, Host(any_image=DUMP), env=env, args=["--b=$(B)", "$(HOME)"], pod_spec=ONCE)
    assert args == ["--b=12", "$(HOME)"], "the machine's own environment is no source of references"
    assert (seen["B"], seen["C"], seen["D"]) == ("12", "$(D)", "")


async def test_secrets_and_config_maps_are_values_and_files(make_pod: MakePod, tmp_path: Path) -> None:
    host = Host(
        any_image=DUMP, secrets={"keys": {"a": b"one", "b": b"two"}}, config_maps={"settings": {"LEVEL": b"info"}}
    )
    volumes = [
        {"name": "all", "secret": {"secretName": "keys"}},
        {"name": "some", "secret": {"secretName": "keys", "items": [{"key": "b", "path": "sub/renamed"}]}},
        {"name": "none", "secret": {"secretName": "absent", "optional": True}},
    ]
    args, seen = await run(
        make_pod,
        host,
        env=[
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a"}}},
            {"name": "GONE", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "a", "optional": True}}},
        ],
        envFrom=[{"configMapRef": {"name": "settings"}, "prefix": "S_"}],
        args=["/etc/all", "/etc/some", "/etc/none"],
        volumeMounts=[{"name": v["name"], "mountPath": f"/etc/{v['name']}"} for v in volumes],
        pod_spec={**ONCE, "volumes": volumes},
    )
    assert (seen["KEY"], seen["S_LEVEL"], "GONE" in seen) == ("one", "info", False)
    found = {str(p.relative_to(a)): p.read_text() for a in map(Path, args) for p in a.rglob("*") if p.is_file()}
    assert found == {"a": "one", "b": "two", "sub/renamed": "two"}
    assert all(mode & 0o077 == 0 for mode in modes(Path(args[0])))


async def test_volumes_become_directories_of_the_machine(make_pod: MakePod, tmp_path: Path) -> None:
    models, cache, node = (tmp_path / name for name in ("models", "cache", "node"))
    volumes = [
        {"name": "scratch", "emptyDir": {}},
        {"name": "node", "hostPath": {"path": str(node), "type": "DirectoryOrCreate"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "shared"}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    paths = {
        "scratch": "/scratch",
        "node": "/node",
        "models": "/models/shared",
        "cache": "/var/cache",
        "shm": "/dev/shm",
        "tmp": "/tmp",
    }
    args, seen = await run(
        make_pod,
        Host(any_image=DUMP, volumes={"cache": cache}, claims={"shared": models}),
        env=[{"name": "CACHE", "value": "/var/cache/kvasir"}],
        args=["/scratch/x", "--n=/node", "file:///models/shared/m", "/dev/shm/a", "/tmp/a", "/var/cached"],
        volumeMounts=[{"name": name, "mountPath": path} for name, path in paths.items()],
        pod_spec={**ONCE, "volumes": volumes},
    )
    assert args[1:] == [f"--n={node}", f"file://{models}/m", "/dev/shm/a", "/tmp/a", "/var/cached"]
    assert Path(args[0]).parent.is_dir()
    assert Path(args[0]).name == "x"
    assert Path(args[0]).is_relative_to(tmp_path), "an emptyDir is in the pod's own state"
    assert seen["CACHE"] == f"{cache}/kvasir"
    assert node.is_dir()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data", "/host"),
        ("/data/", "/host/"),
        ("/data/deep/x", "/inner/x"),
        ("--path=/data/x", "--path=/host/x"),
        ("/a:/data:/b", "/a:/host:/b"),
        ("file:///data/x", "file:///host/x"),
        ('{"path": "/data/x"}', '{"path": "/host/x"}'),
        ("/database", "/database"),
        ("/other/data", "/other/data"),
        ("http://host/data", "http://host/data"),
        ("./data", "./data"),
    ],
)
def test_only_whole_mount_paths_are_rewritten(text: str, expected: str) -> None:
    assert Mounts({"/data": "/host", "/data/deep": "/inner"}).rewrite(text) == expected


def test_the_engine_s_command_is_this_python_s() -> None:
    host = Host(any_image=ENGINE)
    for command in ([], ["kvasir"]):
        assert host.command("kvasir-engine:latest", command) == (
            sys.executable,
            "-m",
            "kvasir_engine.entrypoints.cli",
        )
    assert host.command("kvasir-engine:latest", ["sleep", "1"]) == ("sleep", "1")


@pytest.mark.parametrize(
    ("pod_spec", "container", "message"),
    [
        ({"initContainers": [{"name": "a"}]}, {}, "spec.initContainers"),
        ({}, {"startupProbe": {"grpc": {"port": 1}}}, "spec.containers[0].startupProbe"),
        ({}, {"readinessProbe": {"httpGet": {"port": "admin"}}}, "no port named 'admin'"),
        ({}, {"lifecycle": {"postStart": {"exec": {"command": ["x"]}}}}, "lifecycle.postStart"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    pod_spec: dict[str, Any], container: dict[str, Any], message: str, tmp_path: Path
) -> None:
    spec = {"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c", **container}], **pod_spec}}
    with pytest.raises(PodError) as caught:
        PodRunner(spec, "127.0.0.1", tmp_path, Host())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ({"secret": {"secretName": "gone"}}, "secret 'gone' not found"),
        ({"persistentVolumeClaim": {"claimName": "gone"}}, "persistentvolumeclaim 'gone' not found"),
        ({"hostPath": {"path": "/no/such", "type": "Directory"}}, "/no/such is not a directory"),
        ({"nfs": {"server": "a"}}, "nfs cannot be mounted"),
    ],
)
async def test_a_volume_that_is_not_here_is_refused_by_name(
    make_pod: MakePod, volume: dict[str, Any], message: str
) -> None:
    mounts = [{"name": "v", "mountPath": "/v"}]
    pod = make_pod(pod_spec={"volumes": [{"name": "v", **volume}]}, volumeMounts=mounts)
    with pytest.raises(PodError) as caught:
        await pod.runner.start()
    assert message in str(caught.value)


async def test_an_image_without_a_command_is_refused_by_name(make_pod: MakePod) -> None:
    pod = make_pod(host=Host(), image="other:2")
    with pytest.raises(PodError, match="image 'other:2' has no command"):
        await pod.runner.start()


async def test_an_exec_prefix_stands_before_every_command(make_pod: MakePod) -> None:
    pod = make_pod(
        options={"exec_prefix": ["env", "PREFIXED=yes"]},
        readinessProbe={
            "exec": {"command": ["sh", "-c", 'test "$PREFIXED" = yes']},
            "periodSeconds": 0.1,
            "timeoutSeconds": 5,
        },
    )
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready and "listening" in pod.lines)  # a probe may be before its program
    assert pod.runner.pid is not None
    assert b"PREFIXED=yes" in environ(pod.runner.pid)
