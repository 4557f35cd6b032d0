"""`kvasir bench` against an endpoint that is known: what it sends, what it counts, and how it ends."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Reply, running_endpoint

from kvasir_engine.client.bench.datasets import DatasetOptions
from kvasir_engine.client.bench.load import LoadOptions
from kvasir_engine.client.bench.measured import Point
from kvasir_engine.client.bench.run import BenchFailed, BenchRun, bench
from kvasir_engine.client.bench.settings import points_of
from kvasir_engine.client.endpoint import CallTimeouts, EndpointAddress, address_of
from kvasir_engine.errors import UserError

KVASIR = str(Path(sys.executable).with_name("kvasir"))


def measured(url: str, dataset: DatasetOptions, load: LoadOptions | None = None, **more: Any) -> list[Point]:
    rates, limits = more.pop("rates", "inf"), more.pop("concurrencies", "4")
    return bench(
        BenchRun(
            EndpointAddress(url),
            dataset,
            tuple(points_of(rates, limits)),
            load or LoadOptions(""),
            more.pop("timeouts", CallTimeouts(idle=5.0, total=20.0)),
            **more,
        )
    )


def three(path: str, body: dict[str, Any]) -> Reply:
    return Reply([" a", " b", " c"], cached=2)


def test_each_request_is_sent_and_counted_once() -> None:
    with running_endpoint(three) as stand:
        (point,) = measured(stand.url, DatasetOptions(number=10, input_len=6, output_len=3), warmup=2)
    assert (point.completed, point.errors, point.not_sent) == (10, {}, 0)
    assert (point.output_tokens, point.cached_tokens) == (30, 20)
    assert point.prompt_tokens > 10 * 6
    assert len(stand.calls) == 12
    assert stand.most_at_once <= point.most_at_once == 4
    body = stand.calls[-1][1]
    assert body.pop("prompt").count(" ") == 5
    assert body == {
        "model": "toy",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    prompts = [body["prompt"] for _, body in stand.calls if "prompt" in body]
    assert len(set(prompts)) == len(prompts)


def test_the_warm_up_shares_no_prompt_with_the_measurement() -> None:
    with running_endpoint(three) as stand:
        measured(stand.url, DatasetOptions("shared-prefix", number=3, input_len=4, prefix_len=20), warmup=1)
    first, *rest = [body["prompt"].split()[:20] for _, body in stand.calls]
    assert [each == rest[0] for each in rest] == [True] * 3
    assert first != rest[0]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_turns_have_what_was_said_and_answered_before(api: Any) -> None:
    dataset = DatasetOptions("multi-turn", number=2, input_len=3, turns=3)
    with running_endpoint(three) as stand:
        (point,) = measured(stand.url, dataset, LoadOptions("", api), warmup=0, concurrencies="1")
    assert point.completed == 6
    path, last = stand.calls[2]
    if api == "chat":
        assert path == "chat/completions"
        assert [each["role"] for each in last["messages"]] == ["user", "assistant", "user", "assistant", "user"]
        assert last["messages"][1]["content"] == " a b c"
    else:
        second = stand.calls[1][1]["prompt"]
        assert last["prompt"].startswith(second + " a b c ")
        assert second.startswith(stand.calls[0][1]["prompt"] + " a b c ")


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_times_are_those_of_the_endpoint(api: Any) -> None:
    """An event that only names the role, or the end, is no token. Each is sent when it is due, and read later."""
    paced = Reply([" a"] * 6, first=0.3, gap=0.05)
    with running_endpoint(lambda path, body: paced) as stand:
        (point,) = measured(stand.url, DatasetOptions(number=4), LoadOptions("", api), warmup=0)
    ttft, itl, tpot, whole = (point.spreads[name].mean for name in ("ttft", "itl", "tpot", "e2el"))
    assert ttft is not None
    assert itl is not None
    assert tpot is not None
    assert whole is not None
    assert ttft >= 295
    assert whole >= 545
    assert itl == pytest.approx(tpot, rel=0.02)
    assert tpot == pytest.approx((whole - ttft) / 5, rel=0.02)
    assert point.output_tokens == 24


def test_it_counts_what_the_load_client_counts() -> None:
    """The same load by bench/load.py: the same tokens, and no less than the endpoint's times."""
    from bench import load

    paced = Reply([" a"] * 4, first=0.2, gap=0.05)
    with running_endpoint(lambda path, body: paced) as stand:
        talks = tuple(load.Talk(("one two three",), 4) for _ in range(8))
        row = asyncio.run(load.measure(stand.url, "toy", "it", load.Workload(4, talks)))
        (point,) = measured(stand.url, DatasetOptions(number=8, input_len=3), warmup=0)
    ttft, whole = (point.spreads[name].percentiles[50] for name in ("ttft", "e2el"))
    assert row.tokens_out == point.output_tokens == 32
    assert row.errors == 0
    assert row.ttft_p50 is not None
    assert ttft is not None
    assert whole is not None
    assert ttft >= 195
    assert whole >= 345


def test_a_rate_paces_and_a_sweep_measures_each_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    with running_endpoint(three) as stand:
        began = time.monotonic()
        points = measured(
            stand.url,
            DatasetOptions(number=10),
            LoadOptions("", burstiness=1e6, limits={"ttft": 20.0}),
            rates="20,inf",
            concurrencies="2,8",
            output=output,
            plot=plot,
        )
        assert time.monotonic() - began > 2 * 9 / 20
    assert [point.request_rate for point in points] == [20, 20, float("inf"), float("inf")]
    assert [point.concurrency for point in points] == [2, 8, 2, 8]
    assert all(point.seconds >= 9 / 20 for point in points[:2])
    found = json.loads(output.read_text())
    assert (found["model"], found["goodput_limits_ms"], len(found["points"])) == ("toy", {"ttft": 20000}, 4)
    assert found["points"][0]["request_goodput"] == pytest.approx(found["points"][0]["request_throughput"])
    assert plot.read_text().startswith("<svg")
    shown = capsys.readouterr().out
    assert "rate 20/s, concurrency 8" in shown
    assert "Request goodput" in shown


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=500, error="broken"), "http_500"),
        (Reply([" a", " b"], cut_after=1), "closed"),
        (Reply([" a", " b"], error_after=1), "error_event"),
        (Reply([" a", " b"], hang_after=1), "idle"),
        (Reply([" a"], usage=False), "no_usage"),
    ],
)
def test_failures_are_counted_by_kind_and_the_others_go_on(reply: Reply, kind: str) -> None:
    asked: list[None] = []

    def script(path: str, body: dict[str, Any]) -> Reply:
        asked.append(None)
        return reply if len(asked) % 2 else three(path, body)

    with running_endpoint(script) as stand:
        times = CallTimeouts(idle=0.3, total=20)
        (point,) = measured(stand.url, DatasetOptions(number=8), warmup=0, timeouts=times)
    assert (point.errors, point.completed) == ({kind: 4}, 4)
    assert point.messages[kind]


def test_a_tokenizer_counts_where_the_endpoint_does_not() -> None:
    with running_endpoint(lambda path, body: Reply([" a", " b"], usage=False)) as stand:
        (point,) = measured(stand.url, DatasetOptions(number=3), warmup=0, count=lambda text: len(text.split()))
    assert (point.completed, point.output_tokens) == (3, 6)


def test_an_endpoint_that_dies_midway_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    cut = Reply([" a", " b"], cut_after=1)
    with (
        running_endpoint(lambda path, body: cut) as stand,
        pytest.raises(BenchFailed, match="no request was answered"),
    ):
        measured(stand.url, DatasetOptions(number=5000), warmup=0)
    assert 32 <= len(stand.calls) <= 40
    assert "Not sent" in capsys.readouterr().out


def test_an_endpoint_that_hangs_is_waited_for_a_few_times_only() -> None:
    hung, times = Reply([" a"], hang_after=0), CallTimeouts(idle=0.2, total=20)
    with (
        running_endpoint(lambda path, body: hung) as stand,
        pytest.raises(BenchFailed, match="no request was answered"),
    ):
        measured(stand.url, DatasetOptions(number=5000), warmup=0, concurrencies="2", timeouts=times)
    assert len(stand.calls) <= 6


def test_a_duration_ends_a_load() -> None:
    with running_endpoint(three) as stand:
        load = LoadOptions("", duration=0.5)
        (point,) = measured(stand.url, DatasetOptions(number=10_000), load, rates="50", warmup=0)
    assert point.seconds < 10
    assert point.completed + point.not_sent == 10_000
    assert point.completed > 0


def test_a_warm_up_that_fails_is_the_error() -> None:
    refused, message = Reply(status=404, error="no such model"), "at the warm-up: http_404: no such model"
    with running_endpoint(lambda path, body: refused) as stand, pytest.raises(BenchFailed, match=message):
        measured(stand.url, DatasetOptions(number=5))
    with pytest.raises(BenchFailed, match="does not list its models: connect: "):
        measured("http://127.0.0.1:9", DatasetOptions(number=5))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with running_endpoint(three) as stand, pytest.raises(UserError, match=r"--output .*: No such file"):
        measured(stand.url, DatasetOptions(number=5), output=tmp_path / "none" / "x.json")
    assert stand.calls == []


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([KVASIR, *arguments], capture_output=True, text=True, timeout=300)


def test_the_command_as_vllms_users_write_it(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with running_endpoint(three) as stand:
        words = (
            "--api chat --api-key secret --header X-Team:a --ignore-eos --seed 3 --num-prompts 6 --max-concurrency"
        )
        done = run(
            "bench",
            stand.url + "/v1",
            *words.split(),
            "2",
            "--goodput",
            "ttft:9000",
            "tpot:9000",
            "--output",
            str(output),
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Time to first token (TTFT)" in done.stdout
    assert json.loads(output.read_text())["goodput_limits_ms"] == {"ttft": 9000, "tpot": 9000}
    path, body = stand.calls[-1]
    assert (path, body["ignore_eos"], body["temperature"]) == ("chat/completions", True, 0.0)
    assert (stand.headers[-1]["Authorization"], stand.headers[-1]["X-Team"]) == ("Bearer secret", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localhost:8000"], "is no URL"),
        (["http://127.0.0.1:9", "tpot:50"], "one argument too many"),
        (["http://127.0.0.1:9", "--plot", "x.png"], "only .svg"),
        (["http://127.0.0.1:9", "--request-rate", "-1"], "--request-rate"),
        (["http://127.0.0.1:9", "--timeout", "0"], "timeout"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["bench", *arguments], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvasir: error: ")
    assert message in error
    assert error.count("\n") == 1


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The `kvasir` command within this process; its exit status."""
    from kvasir_engine.entrypoints import cli

    monkeypatch.setattr(sys, "argv", ["kvasir", *arguments])
    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_failed_run_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "http://127.0.0.1:9"], monkeypatch) == 1
    assert capsys.readouterr().err.startswith("kvasir: error: http://127.0.0.1:9 does not list its models")


@pytest.mark.parametrize(
    ("url", "base"),
    [("http://a:1", "http://a:1"), ("http://a:1/", "http://a:1"), ("https://a/x/v1/", "https://a/x")],
)
def test_an_address_is_with_or_without_v1(url: str, base: str) -> None:
    assert address_of(url, "").base == base


def test_a_key_comes_from_the_environment_kvasirs_first() -> None:
    keys: Callable[..., str] = lambda **said: address_of("http://a", None, said).key  # noqa: E731
    assert keys() == ""
    assert keys(OPENAI_API_KEY="o") == "o"
    assert keys(OPENAI_API_KEY="o", KVASIR_API_KEY="k") == "k"
    with pytest.raises(UserError, match="API key"):
        keys(KVASIR_API_KEY="a\nb")
