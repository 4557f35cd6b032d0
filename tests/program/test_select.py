"""`select` gives the likeliest choice by whatever way the endpoint knows, and says by which."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from fake_endpoint import Reply, running_endpoint
from toy_model import ANSWERS, START, ToyModel

from kvasir.program import Endpoint, ProgramError, State, assistant, select, user
from kvasir.program.likelihood import ScoredChoice, ScoredToken, likeliest_continuation, scores_of

ALL = {"echo", "prompt_logprobs", "logprobs", "structured_outputs"}
WITHOUT = {"echo": set[str](), "prompt_logprobs": {"echo"}, "greedy": {"echo", "prompt_logprobs"}}


def chosen(endpoint: Endpoint, choices: Sequence[str], chat: bool = False, **how: Any) -> State:
    state = State(endpoint)
    if chat:
        state += user("Well?") + assistant("Answer:" + select("x", choices, **how))
    else:
        state += "Answer:" + select("x", choices, **how)
    return state


@pytest.mark.parametrize(
    ("method", "chat"),
    [
        ("echo", False),
        ("prompt_logprobs", False),
        ("prompt_logprobs", True),
        ("greedy", False),
        ("greedy", True),
        ("structured", False),
        ("structured", True),
    ],
)
def test_each_way_finds_the_likeliest(method: str, chat: bool) -> None:
    knows = ALL - WITHOUT.get(method, {"echo", "prompt_logprobs", "logprobs"})
    with running_endpoint(ToyModel(knows)) as stand, Endpoint(stand.url) as endpoint:
        state = chosen(endpoint, [" yes", " no", " maybe"], chat, normalize="none")
        assert (state["x"], state.meta("x").method) == (" no", method)
        assert (state.wait().text or state.wait().messages[-1].text).endswith("Answer: no")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("method", ["echo", "prompt_logprobs"])
def test_scores_are_the_log_likelihoods(method: str, bos: bool) -> None:
    choices = [" yes", " no", " nothing", " maybe"]
    with running_endpoint(ToyModel(ALL, bos)) as stand, Endpoint(stand.url) as endpoint:
        sums = chosen(endpoint, choices, method=method, normalize="none").meta("x").scores
        means = chosen(endpoint, choices, method=method).meta("x").scores
    for choice in choices:
        # what begins with "no" may go on
        likely = math.log(ANSWERS[choice.strip()] + (ANSWERS["nothing"] if choice == " no" else 0))
        assert sums[choice] == pytest.approx(likely)
        assert means[choice] == pytest.approx(likely / len(choice.strip()))


def test_a_token_of_the_prompt_that_merges_with_a_choice_is_scored_with_it() -> None:
    """The prompt ends with a space, which the choices' first letters take into their tokens."""
    with running_endpoint(ToyModel(ALL)) as stand, Endpoint(stand.url) as endpoint:
        state = State(endpoint)
        state += "Answer: " + select("x", ["yes", "no", "maybe"], normalize="none", method="echo")
        scores = state.meta("x").scores
    assert scores["yes"] == pytest.approx(math.log(0.2))
    assert scores["maybe"] == pytest.approx(math.log(0.25))
    assert state["x"] == "no"


def test_echo_is_one_request_for_all_choices() -> None:
    with running_endpoint(ToyModel(ALL)) as stand, Endpoint(stand.url) as endpoint:
        chosen(endpoint, [" yes", " no"]).wait()
    ((path, body),) = stand.calls
    assert path == "completions"
    assert body["prompt"] == ["Answer: yes", "Answer: no"]
    assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 1, 1)


QUESTION = "This is a question of many words, and each of them is a token of its own. Answer:"


@pytest.mark.parametrize("start", ["known", "ignored", "refused"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_only_the_choices_are_scored_where_the_endpoint_knows_how(start: Any, chat: bool, bos: bool) -> None:
    """The scores are the same as those of whole prompts, and a refusal is heard once."""
    method, choices = "prompt_logprobs" if chat else "echo", [" yes", " no", " nothing"]

    def scores(state: State) -> dict[str, float]:
        state += user(QUESTION) + assistant(select("x", choices)) if chat else QUESTION + select("x", choices)
        assert state.meta("x").method == method
        return state.meta("x").scores

    with running_endpoint(ToyModel(ALL - {"echo"} if chat else ALL, bos)) as stand, Endpoint(stand.url) as endpoint:
        whole = scores(State(endpoint))
    with (
        running_endpoint(ToyModel(ALL - {"echo"} if chat else ALL, bos, start)) as stand,
        Endpoint(stand.url) as endpoint,
    ):
        for _ in range(2):
            assert scores(State(endpoint)) == pytest.approx(whole)
    asked = [START in body for _, body in stand.calls]
    each = len(choices) if chat else 1
    assert asked == ([True, *[False] * 2 * each] if start == "refused" else [True] * 2 * each)


@pytest.mark.parametrize("method", ["echo", "prompt_logprobs"])
def test_where_tokens_before_the_last_count_the_whole_prompt_is_scored(method: str) -> None:
    """Before one of the choices, the prompt's last token is longer than what is asked for."""
    with running_endpoint(ToyModel(ALL, start="known")) as stand, Endpoint(stand.url) as endpoint:
        state = State(endpoint)
        state += "Answer: " + "y" * 40 + select("x", ["es", "ea"], method=method)  # type: ignore[arg-type]
        assert state["x"] in ("es", "ea")
    assert stand.calls


def test_what_an_endpoint_does_not_know_is_not_tried_again() -> None:
    with running_endpoint(ToyModel({"logprobs"})) as stand, Endpoint(stand.url) as endpoint:
        for _ in range(3):
            assert chosen(endpoint, [" yes", " maybe"])["x"] == " maybe"
    assert [("echo" in body, "prompt_logprobs" in body) for _, body in stand.calls] == [
        (True, False),
        (False, True),
        *[(False, False)] * 3,
    ]


def test_a_choice_that_begins_another_is_taken_when_the_text_more_likely_ends() -> None:
    with running_endpoint(ToyModel({"logprobs"})) as stand, Endpoint(stand.url) as endpoint:
        assert chosen(endpoint, [" no", " nothing", " yes"])["x"] == " no"
        assert chosen(endpoint, [" yes", " ye"])["x"] == " yes"


def test_where_no_way_is_known_the_error_says_each_reason() -> None:
    with running_endpoint(ToyModel(set())) as stand, Endpoint(stand.url) as endpoint:
        with pytest.raises(ProgramError, match=r"select 'x'.*echo: .*prompt_logprobs: .*greedy: .*structured: "):
            chosen(endpoint, [" yes", " no"])["x"]
        with pytest.raises(ProgramError, match=r"by no method \(echo: http_400: Unsupported parameter: 'echo'\)"):
            chosen(endpoint, [" yes", " no"], method="echo")["x"]


def test_an_endpoint_that_takes_the_fields_and_ignores_them_is_not_believed() -> None:
    with running_endpoint(lambda path, body: Reply(["blue"])) as stand:
        endpoint = Endpoint(stand.url)
        with endpoint, pytest.raises(ProgramError, match="'blue' is none of the choices"):
            chosen(endpoint, [" yes", " no"])["x"]


def test_an_overloaded_endpoint_is_no_endpoint_that_does_not_know() -> None:
    with running_endpoint(lambda path, body: Reply(status=503)) as stand:
        endpoint = Endpoint(stand.url, retries=0)
        with endpoint, pytest.raises(ProgramError, match="http_503"):
            chosen(endpoint, [" yes", " no"])["x"]
    assert len(stand.calls) == 1


def test_one_choice_needs_no_question_of_greedy() -> None:
    with running_endpoint(ToyModel({"logprobs"})) as stand, Endpoint(stand.url) as endpoint:
        assert chosen(endpoint, [" yes"], method="greedy")["x"] == " yes"
    assert stand.calls == []


def scored(begin: int, *tokens: tuple[str, float]) -> ScoredChoice:
    return ScoredChoice(tuple(ScoredToken(*each) for each in tokens), begin)


def test_only_what_differs_or_is_the_choices_counts() -> None:
    same = [("a", -9.0), ("b", -8.0)]
    first, second = scored(2, *same, ("c", -1.0), ("d", -3.0)), scored(2, *same, ("e", -1.5))
    assert scores_of([first, second], "none") == [-4.0, -1.5]
    assert scores_of([first, second], "tokens") == [-2.0, -1.5]
    merged = scored(1, ("a", -9.0), ("bx", -0.5))
    assert scores_of([first, merged], "none") == [-12.0, -0.5]


@pytest.mark.parametrize(
    ("left", "tokens", "taken"),
    [
        (["yes", "no"], {"y": -1.0, "n": -2.0}, "y"),
        (["yes", "no"], {"yes, of": -1.0, "n": -2.0}, "yes"),
        (["yes", "no"], {"x": -0.1, "no": -2.0}, "no"),
        (["yes", "no"], {"x": -0.1, "": -0.2}, None),
    ],
)
def test_a_token_is_taken_as_far_as_it_is_a_choices(left: list[str], tokens: Any, taken: str | None) -> None:
    found = likeliest_continuation(left, tokens)
    assert (found and found[0]) == taken
