"""A pod's processes: probes, restarts, stops, and nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from local_pods import MakePod, http_probe, wait_gone

from kvasir_operator.pods import Backoff, Host, Image


async def test_readiness_follows_the_probe_in_both_directions(make_pod: MakePod) -> None:
    pod = make_pod(readinessProbe=http_probe("/ready"))
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    (pod.control / "no-ready").touch()
    await pod.until(lambda: not pod.runner.ready)
    conditions = {c["type"]: c for c in pod.runner.status()["conditions"]}
    assert conditions["Ready"]["status"] == "False"
    assert conditions["Ready"]["reason"] == "ContainersNotReady"
    assert "main" in conditions["ContainersReady"]["message"]
    (pod.control / "no-ready").unlink()
    await pod.until(lambda: pod.runner.ready)
    assert pod.container["restartCount"] == 0


async def test_without_a_readiness_probe_a_started_container_is_ready(make_pod: MakePod) -> None:
    pod = make_pod()
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    assert pod.runner.status()["phase"] == "Running"


async def test_a_readiness_threshold_needs_that_many_results_in_a_row(make_pod: MakePod) -> None:
    pod = make_pod(readinessProbe=http_probe("/ready", successThreshold=3))
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    # The first checks may find the port still closed: those reach no server.
    assert (pod.control / "asked").read_text().splitlines() == ["/ready"] * 3


async def test_liveness_failure_restarts_the_container_and_only_it(make_pod: MakePod) -> None:
    pod = make_pod(
        startupProbe=http_probe("/up", failureThreshold=300),
        livenessProbe=http_probe("/health"),
        readinessProbe=http_probe("/ready"),
    )
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    first = pod.runner.pid
    (pod.control / "no-health").touch()
    await pod.until(lambda: pod.runner.restarts == 1)
    (pod.control / "no-health").unlink()
    await pod.until(lambda: pod.runner.ready)
    assert pod.runner.pid != first
    assert (pod.control / "terminated").exists(), "a graceful end, not a kill"
    assert any(r == "Unhealthy" and "Liveness" in m and "503" in m for r, m in pod.events)
    assert "terminated" in pod.container["lastState"]


async def test_the_startup_probe_holds_the_others_back(make_pod: MakePod) -> None:
    pod = make_pod(
        startupProbe=http_probe("/up", failureThreshold=300),
        livenessProbe=http_probe("/health"),
        readinessProbe=http_probe("/ready"),
    )
    (pod.control / "no-up").touch()
    await pod.runner.start()
    await pod.until(lambda: pod.lines.count("GET /up") >= 4)
    assert set(pod.lines) == {"listening", "GET /up"}
    assert not pod.runner.ready
    assert pod.container["started"] is False
    (pod.control / "no-up").unlink()
    await pod.until(lambda: pod.runner.ready)
    assert pod.container["started"] is True
    await pod.until(lambda: {"GET /up", "GET /ready"} <= set(pod.lines))


async def test_a_startup_probe_that_gives_up_restarts_the_container(make_pod: MakePod) -> None:
    pod = make_pod(startupProbe=http_probe("/up", initialDelaySeconds=0.5, failureThreshold=2))
    (pod.control / "no-up").touch()
    await pod.runner.start()
    await pod.until(lambda: pod.runner.restarts >= 1)
    assert any("Startup probe failed" in m for _, m in pod.events)


async def test_crashes_back_off_and_tell_why(make_pod: MakePod) -> None:
    # One that ran for twice the cap is no crash in a row: it has to be long beside a start of a process here.
    pod = make_pod(["--fail", "kvasir: error: no such model"], options={"backoff": Backoff(base=0.05, cap=60)})

    def delays() -> list[str]:
        return [m.split()[1] for r, m in pod.events if r == "BackOff"]

    await pod.runner.start()
    await pod.until(lambda: "waiting" in pod.container["state"] and len(delays()) >= 2)
    assert pod.container["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    last = pod.container["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (2, "Error", "kvasir: error: no such model")
    assert pod.runner.status()["phase"] == "Running"
    assert delays()[:2] == ["0.05s", "0.1s"], "the first restart is at once, then the delays double"
    assert pod.runner.failure is not None


async def test_the_message_is_the_log_s_end_when_no_error_line_was_printed(make_pod: MakePod) -> None:
    pod = make_pod(["--fail", "Traceback: boom"], pod_spec={"restartPolicy": "Never"})
    await pod.runner.start()
    await pod.runner.wait()
    ended = pod.container["state"]["terminated"]
    assert ended["message"] == "about to fail\nTraceback: boom"
    assert pod.runner.status()["phase"] == "Failed"
    assert pod.runner.restarts == 0


async def test_on_failure_does_not_restart_what_succeeded(make_pod: MakePod) -> None:
    pod = make_pod(command=["true"], pod_spec={"restartPolicy": "OnFailure"})
    await pod.runner.start()
    await pod.runner.wait()
    assert pod.runner.status()["phase"] == "Succeeded"
    assert pod.container["state"]["terminated"]["reason"] == "Completed"


async def test_a_command_that_is_not_there_is_a_clear_failure(make_pod: MakePod) -> None:
    pod = make_pod(command=["no-such-program"], pod_spec={"restartPolicy": "Never"})
    await pod.runner.start()
    await pod.runner.wait()
    ended = pod.container["state"]["terminated"]
    assert ended["exitCode"] == 127
    assert "cannot run no-such-program" in ended["message"]


async def test_a_stop_runs_the_hook_before_sigterm(make_pod: MakePod) -> None:
    pod = make_pod(
        readinessProbe=http_probe("/ready"),
        lifecycle={"preStop": {"httpGet": {"path": "/note/hook", "port": "http"}}},
    )
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    await pod.runner.stop()
    hook, terminated = pod.control / "hook", pod.control / "terminated"
    assert hook.stat().st_mtime_ns <= terminated.stat().st_mtime_ns
    ended = pod.container["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (0, "Completed")
    assert pod.runner.status()["phase"] == "Succeeded"
    assert pod.runner.restarts == 0


async def test_an_exec_hook_runs_in_the_container_s_environment(make_pod: MakePod) -> None:
    write = "import os, pathlib; pathlib.Path(os.environ['CONTROL'], 'hook').write_text(os.environ['HOSTNAME'])"
    pod = make_pod(lifecycle={"preStop": {"exec": {"command": [sys.executable, "-c", write]}}})
    await pod.runner.start()
    await pod.until(lambda: "listening" in pod.lines)
    await pod.runner.stop()
    assert (pod.control / "hook").read_text() == "web-0"


async def test_what_ignores_sigterm_is_killed_after_the_grace_period(make_pod: MakePod) -> None:
    pod = make_pod(["--ignore-term"], pod_spec={"terminationGracePeriodSeconds": 0.3})
    await pod.runner.start()
    await pod.until(lambda: "listening" in pod.lines)
    await pod.runner.stop()
    assert pod.container["state"]["terminated"]["exitCode"] == 137


async def test_a_kill_hurries_a_graceful_stop(make_pod: MakePod) -> None:
    pod = make_pod(["--ignore-term"], pod_spec={"terminationGracePeriodSeconds": 3600})
    await pod.runner.start()
    await pod.until(lambda: "listening" in pod.lines)
    stopping = asyncio.ensure_future(pod.runner.stop())
    await asyncio.sleep(0)
    pod.runner.kill()
    async with asyncio.timeout(60):
        await stopping
    assert pod.container["state"]["terminated"]["exitCode"] == 137


async def test_a_stop_during_back_off_ends_the_wait(make_pod: MakePod) -> None:
    pod = make_pod(["--fail", "x"], options={"backoff": Backoff(base=3600, cap=3600)})
    await pod.runner.start()
    await pod.until(lambda: "waiting" in pod.container["state"] and pod.runner.restarts == 1)
    async with asyncio.timeout(60):
        await pod.runner.stop()
    assert "terminated" in pod.container["state"]


async def test_what_a_container_started_ends_with_it(make_pod: MakePod) -> None:
    pod = make_pod(["--child"])
    await pod.runner.start()
    await pod.until(lambda: "listening" in pod.lines)
    child = int((pod.control / "child").read_text())
    os.kill(child, 0)
    await pod.runner.stop()
    assert wait_gone(child)


async def test_a_container_killed_from_outside_is_restarted(make_pod: MakePod) -> None:
    pod = make_pod(["--child"], readinessProbe=http_probe("/ready"))
    await pod.runner.start()
    await pod.until(lambda: pod.runner.ready)
    assert pod.runner.pid is not None
    child = int((pod.control / "child").read_text())
    os.kill(pod.runner.pid, signal.SIGKILL)
    await pod.until(lambda: pod.runner.restarts == 1 and pod.runner.ready)
    assert pod.container["lastState"]["terminated"]["exitCode"] == 137
    assert wait_gone(child)


def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    server = Path(__file__).with_name("podserver.py")
    program = f"""
        import asyncio, sys
        from pathlib import Path
        from kvasir_operator.pods import Host, Image, PodRunner
        pod = {{"metadata": {{"name": "a"}}, "spec": {{"containers": [{{"name": "c", "image": "i",
                "args": ["--child"],
                "env": [{{"name": "POD_IP", "value": "127.0.0.1"}},
                        {{"name": "CONTROL", "value": {str(tmp_path)!r}}}]}}]}}}}
        async def main():
            host = Host(any_image=Image((sys.executable, {str(server)!r})))
            runner = PodRunner(pod, "127.0.0.1", Path({str(tmp_path)!r}) / "s", host,
                               on_line=lambda c, line: print(line, runner.pid, flush=True))
            await runner.start()
            await runner.wait()
        asyncio.run(main())
    """
    supervisor = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    line, pid = supervisor.stdout.readline().split()
    assert line == "listening"
    child = int((tmp_path / "child").read_text())
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    assert wait_gone(int(pid))
    assert wait_gone(child), "a grandchild in a session of its own dies too"


async def test_two_pods_of_one_program_do_not_share_an_environment(make_pod: MakePod) -> None:
    image = Image((sys.executable, "-c", "import os; print(os.environ['NAME'], os.environ.get('KVASIR_PORT'))"))
    os.environ["KVASIR_PORT"] = "1"
    try:
        host = Host(any_image=image)
    finally:
        del os.environ["KVASIR_PORT"]
    pods = [
        make_pod(host=host, env=[{"name": "NAME", "value": name}], args=[], pod_spec={"restartPolicy": "Never"})
        for name in ("a", "b")
    ]
    for pod in pods:
        await pod.runner.start()
        await pod.runner.wait()
    assert [pod.lines for pod in pods] == [["a None"], ["b None"]]
