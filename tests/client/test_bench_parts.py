"""The parts of `kvasir bench` that are pure: prompts, arrivals, what is counted, what is shown."""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvasir_engine.client.bench.arrivals import arrival_times
from kvasir_engine.client.bench.datasets import DatasetOptions, conversations
from kvasir_engine.client.bench.measured import RequestRecord, percentile, point_of
from kvasir_engine.client.bench.plot import svg
from kvasir_engine.client.bench.report import as_json, sweep_table, table
from kvasir_engine.client.bench.settings import (
    LoadPoint,
    checked,
    counter,
    extra_body,
    goodput_limits,
    headers_of,
    points_of,
)
from kvasir_engine.client.chunks import EventSplitter
from kvasir_engine.errors import UserError


def words(text: str) -> int:
    return len(text.split())


def test_a_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    options = DatasetOptions(number=5, input_len=20, range_ratio=0.5, seed=3)
    first, again = conversations(options, None), conversations(options, None)
    assert first == again
    other = conversations(DatasetOptions(number=5, input_len=20, range_ratio=0.5, seed=4), None)
    assert {each.turns[0].text for each in first}.isdisjoint(each.turns[0].text for each in other)


def test_lengths_are_within_their_range() -> None:
    options = DatasetOptions(number=200, input_len=100, output_len=10, range_ratio=0.5)
    found = [each.turns[0] for each in conversations(options, None)]
    lengths = [words(each.text) for each in found]
    assert (min(lengths), max(lengths)) >= (50, 140)
    assert max(lengths) <= 150
    assert {each.max_tokens for each in found} == set(range(5, 16))
    exact = conversations(DatasetOptions(number=3, input_len=100, output_len=10), None)
    assert {(words(each.turns[0].text), each.turns[0].max_tokens) for each in exact} == {(100, 10)}


def test_a_tokenizer_makes_lengths_exact() -> None:
    """One that counts each letter: a text is as long as whole words allow."""
    for each in conversations(DatasetOptions(number=5, input_len=60), len):
        assert 60 - 12 < len(each.turns[0].text) <= 60


def test_prefixes_are_shared_by_turns() -> None:
    options = checked(DatasetOptions("shared-prefix", number=6, input_len=5, prefix_len=30, prefixes=2))
    found = [each.turns[0].text for each in conversations(options, None)]
    assert len({" ".join(text.split()[:30]) for text in found}) == 2
    assert len(set(found)) == 6
    assert {words(text) for text in found} == {35}


def test_conversations_have_their_turns() -> None:
    options = checked(DatasetOptions("multi-turn", number=3, input_len=5, turns=4, prefix_len=7))
    found = conversations(options, None)
    assert [[words(turn.text) for turn in each.turns] for each in found] == [[12, 5, 5, 5]] * 3


def test_a_sharegpt_file_gives_questions_and_the_lengths_of_their_answers(tmp_path: Path) -> None:
    def entry(question: int, answer: int) -> dict[str, Any]:
        said = [("human", "ask " * question), ("gpt", "say " * answer)]
        return {"id": "x", "conversations": [{"from": sender, "value": text} for sender, text in said]}

    file = tmp_path / "file.json"
    entries = [entry(10, 20), entry(1, 20), entry(10, 1), entry(2000, 5), entry(900, 1500), entry(30, 40)]
    file.write_text(json.dumps([*entries, {"id": "none"}]))
    found = conversations(DatasetOptions("sharegpt", str(file), number=10), words)
    assert sorted((words(each.turns[0].text), each.turns[0].max_tokens) for each in found) == [(10, 20), (30, 40)]
    assert len(conversations(DatasetOptions("sharegpt", str(file), number=1), words)) == 1


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[]", '[{"conversations": "x"}]', "\udc80"])
def test_what_is_no_sharegpt_file_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="--dataset-path"):
        conversations(DatasetOptions("sharegpt", str(file)), None)
    with pytest.raises(UserError, match=r"--dataset-path.*No such file"):
        conversations(DatasetOptions("sharegpt", str(tmp_path / "other")), None)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float) -> None:
    times = list(itertools.islice(arrival_times(8.0, burstiness, 5), 5_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.1)
    # of a gamma distribution: the variation's square is 1 / shape; 1 is a Poisson process
    assert (statistics.stdev(gaps) / statistics.mean(gaps)) ** 2 == pytest.approx(1 / burstiness, rel=0.25)
    assert times == list(itertools.islice(arrival_times(8.0, burstiness, 5), 5_001))


def test_an_infinite_rate_is_all_at_once() -> None:
    assert list(itertools.islice(arrival_times(math.inf, 1.0, 5), 3)) == [0.0, 0.0, 0.0]


def record(ttft: float, gaps: list[float], **more: Any) -> RequestRecord:
    return RequestRecord(
        ttft=ttft, itl=gaps, e2el=ttft + sum(gaps), prompt_tokens=10, output_tokens=len(gaps) + 1, **more
    )


def test_the_numbers_are_what_they_say() -> None:
    records = [record(0.1, [0.02, 0.04]), record(0.3, [0.06, 0.06]), RequestRecord(error="idle", message="late")]
    point = point_of(records, 2.0, {"ttft": 0.2, "tpot": 0.05}, (4.0, 8), 3, 2, 0.1)
    found = as_json(point)
    assert found["completed"] == 2
    assert (found["failed"], found["errors"], found["error_messages"]) == (1, {"idle": 1}, {"idle": "late"})
    assert (found["total_input_tokens"], found["total_output_tokens"], found["not_sent"]) == (20, 6, 3)
    assert (found["request_throughput"], found["request_goodput"]) == (1.0, 0.5)
    assert (found["output_throughput"], found["total_token_throughput"]) == (3.0, 13.0)
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (pytest.approx(200), pytest.approx(200))
    assert found["p99_ttft_ms"] == pytest.approx(298)
    assert (found["mean_tpot_ms"], found["mean_itl_ms"]) == (pytest.approx(45), pytest.approx(45))
    assert found["median_e2el_ms"] == pytest.approx((160 + 420) / 2)
    assert json.loads(json.dumps(found)) == found
    lines = table(point)
    assert any("Failed: idle" in line for line in lines)
    assert "idle: late" in lines
    assert len(sweep_table([point, point])) == 3


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 0.1}, True),
        ({"ttft": 0.09}, False),
        ({"itl": 0.03}, False),
        ({"itl": 0.04}, True),
        ({"tpot": 0.03001}, True),
        ({"tpot": 0.029}, False),
        ({"e2el": 0.161}, True),
        ({"e2el": 0.15}, False),
    ],
)
def test_goodput_counts_what_is_within_every_limit(limits: dict[str, float], good: bool) -> None:
    assert record(0.1, [0.02, 0.04]).meets(limits) is good
    assert not RequestRecord(error="idle").meets(limits)


def test_nothing_measured_is_shown_as_nothing() -> None:
    point = point_of([], 0.0, {}, (math.inf, None), 0, 0, 0.0)
    assert as_json(point)["mean_ttft_ms"] is None
    assert any(line.endswith("-") for line in table(point))
    ElementTree.fromstring(svg([point], "none"))


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], each) for each in (0, 50, 90, 100)] == [1.0, 2.5, 3.7, 4.0]
    assert percentile([], 50) is None


def test_the_picture_is_valid_and_has_each_load() -> None:
    points = [
        point_of([record(0.1 * each, [0.01])], 1.0, {"ttft": 1.0}, (each, None), 0, 1, 0.0) for each in (1, 2)
    ]
    root = ElementTree.fromstring(svg(points, "<a & b>"))
    texts = ["".join(each.itertext()) for each in root.iter() if each.tag.endswith("text")]
    assert "<a & b>" in texts
    assert {"1", "2", "request rate", "p99", "goodput"} <= set(texts)
    assert sum(each.tag.endswith("circle") for each in root.iter()) == 2 * (2 + 2 + 1 + 2)


def test_sweeps_are_lists_of_either() -> None:
    assert points_of("inf", "") == [LoadPoint(math.inf, None)]
    assert points_of("1, 2.5", "4,8") == [LoadPoint(rate, at) for rate in (1.0, 2.5) for at in (4, 8)]


@pytest.mark.parametrize(
    ("call", "flag"),
    [
        (lambda: points_of("0", ""), "--request-rate"),
        (lambda: points_of("nan", ""), "--request-rate"),
        (lambda: points_of("1,,2", ""), "--request-rate"),
        (lambda: points_of("x", ""), "--request-rate"),
        (lambda: points_of("1", "0"), "--max-concurrency"),
        (lambda: points_of("1", "1.5"), "--max-concurrency"),
        (lambda: points_of(",".join("1" * 101), ""), "100 are the most"),
        (lambda: goodput_limits(["ttft"]), "--goodput ttft"),
        (lambda: goodput_limits(["speed:3"]), "--goodput speed:3"),
        (lambda: goodput_limits(["ttft:0"]), "--goodput ttft:0"),
        (lambda: goodput_limits(["ttft:1", "ttft:2"]), "two limits"),
        (lambda: headers_of(["X"]), "--header 'X'"),
        (lambda: headers_of(["a b: c"]), "--header"),
        (lambda: headers_of(["a: c\r\nd: e"]), "--header"),
        (lambda: extra_body("{"), "--extra-body"),
        (lambda: extra_body("[]"), "--extra-body"),
        (lambda: extra_body('{"stream": false}'), "--extra-body: the benchmark sets stream"),
        (lambda: checked(DatasetOptions("sharegpt")), "--dataset-path"),
        (lambda: checked(DatasetOptions(path="x")), "--dataset-path"),
        (lambda: checked(DatasetOptions(range_ratio=1.0)), "--range-ratio"),
        (lambda: checked(DatasetOptions("shared-prefix")), "--prefix-len"),
        (lambda: checked(DatasetOptions("multi-turn")), "--turns"),
        (lambda: checked(DatasetOptions(turns=2)), "--turns"),
        (lambda: checked(DatasetOptions(number=2, prefixes=3)), "--num-prefixes"),
        (lambda: counter("/nowhere"), "--tokenizer"),
    ],
)
def test_what_is_wrong_is_named(call: Any, flag: str) -> None:
    with pytest.raises(UserError, match=flag) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_goodput_is_said_as_vllm_does() -> None:
    wanted = {"ttft": 0.2, "tpot": 0.05}
    for said in (["ttft:200", "tpot:50"], ["ttft:200 tpot:50"], ["ttft:200,tpot:50"]):
        assert goodput_limits(said) == wanted
    assert goodput_limits(["e2e:1000"]) == {"e2el": 1.0}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_found_however_they_are_cut(end: bytes, size: int) -> None:
    lines = [
        b"data: one",
        b"",
        b": comment",
        b"",
        b"event: x",
        b"data:two",
        b"data: more",
        b"",
        b"data: [DONE]",
        b"",
        b"",
    ]
    stream, splitter = end.join(lines), EventSplitter()
    found = [each for at in range(0, len(stream), size) for each in splitter.feed(stream[at : at + size])]
    assert found == [b"one", b"two\nmore"]
    assert splitter.done
