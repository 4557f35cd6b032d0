"""Each example runs: on a scripted endpoint with structured output, and those that need none on `kvasir serve`."""

import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from fake_endpoint import Reply, prompt_of, running_endpoint

from kvasir.program import Endpoint, Method, State, assistant, select, user

CITIES = [" Paris", " London", " Berlin near the river"]
Load = Callable[[str], ModuleType]
Choose = Callable[[str, list[str]], str]
Write = Callable[[str, dict[str, Any]], str]


class Scripted:
    """Chooses by `choose` where it is asked to, writes by `write` else; knows no log-probabilities."""

    def __init__(self, choose: Choose, write: Write) -> None:
        self.choose, self.write = choose, write

    def __call__(self, path: str, body: dict[str, Any]) -> Reply:
        if {"echo", "prompt_logprobs", "logprobs"} & body.keys():
            return Reply(status=400)
        if choices := body.get("structured_outputs", {}).get("choice"):
            return Reply([self.choose(prompt_of(body), choices)])
        return Reply(re.findall(r"\S+|\s+", self.write(prompt_of(body), body)))


def nobody_chooses(prompt: str, choices: list[str]) -> str:
    raise AssertionError(prompt)


def test_the_agent_calls_tools_and_answers(example: Load) -> None:
    lines = {"Thought": [" I need prices.", " And milk.", " Add them.", " I know."], "Answer": [" 2.6"]}
    arguments = ["apple", "milk", "3 * 0.5 + 1.1"]
    tools = [" price", " price", " calculate", " finish"]

    def write(prompt: str, body: dict[str, Any]) -> str:
        last = prompt.rpartition("\n")[2]
        return arguments.pop(0) if last.endswith("(") else lines[last.removeprefix("assistant: ")[:-1]].pop(0)

    script = Scripted(lambda prompt, choices: tools.pop(0), write)
    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        state = example("agent").agent.run(endpoint, question="What do three apples and a milk cost?")
        said = state.wait().messages[-1].text
    assert state.returned == "2.6"
    assert "Action: price(apple)\nResult: 0.5\n" in said
    assert "Action: calculate(3 * 0.5 + 1.1)\nResult: 2.6\n" in said
    assert said.endswith("Action: finish\nAnswer: 2.6")


@pytest.mark.parametrize(
    ("text", "result"),
    [("2 + 3 * 4", "14"), ("7 / 2", "3.5"), ("1 / 0", "error"), ("__import__('os')", "error"), ("9 ** 9", "error")],
)
def test_the_agents_calculator_is_no_interpreter(example: Load, text: str, result: str) -> None:
    assert example("agent").calculate(text).startswith(result)


def test_the_tree_keeps_what_is_rated_best(example: Load) -> None:
    """A step's rating is the number that it ends with; each level's best step is the last of its forks."""

    def write(prompt: str, body: dict[str, Any]) -> str:
        return " 40" if prompt.endswith("Answer:") else f" try {body['seed']}"

    def choose(prompt: str, choices: list[str]) -> str:
        steps = re.findall(r"Step \d: try (\d)", prompt)
        return str(int(steps[-1]) + 1)

    with running_endpoint(Scripted(choose, write)) as stand, Endpoint(stand.url) as endpoint:
        state = example("tree_of_thought").tree_of_thought.run(endpoint, problem="?", breadth=3, keep=1, depth=2)
    assert state.returned == "40"
    assert stand.calls[-1][1]["messages"][-1]["content"] == "Answer:"
    final = prompt_of(stand.calls[-1][1])
    assert final.count("Step 1: try 2") == 1
    assert final.count("Step 2: try 2") == 1
    assert "Rate the steps so far" not in final
    assert state.usage.calls == 3 + 3 + 3 + 3 + 1


def test_each_text_gets_its_label(example: Load) -> None:
    def choose(prompt: str, choices: list[str]) -> str:
        text = prompt.rpartition("Text: ")[2]
        return " positive" if "love" in text or "delighted" in text else " negative" if "!" in text else " neutral"

    module = example("classification")
    with running_endpoint(Scripted(choose, lambda prompt, body: "")) as stand, Endpoint(stand.url) as endpoint:
        states = module.classify.run_batch(endpoint, [{"text": text} for text in module.TEXTS])
    assert [each.returned for each in states] == [
        "positive",
        "neutral",
        "neutral",
        "positive",
        "neutral",
        "neutral",
    ]
    assert {each.meta("label").method for each in states} == {"structured"}


def test_fifty_fields_are_extracted_within_their_schemas(example: Load) -> None:
    schemas = []

    def write(prompt: str, body: dict[str, Any]) -> str:
        schema = body["response_format"]["json_schema"]["schema"]
        schemas.append(schema)
        of_kind = {"string": "DK", "number": 25, "boolean": True}
        found = {name: of_kind[field["anyOf"][0]["type"]] for name, field in schema["properties"].items()}
        found[next(iter(found))] = None
        jsonschema.validate(found, schema)
        return json.dumps(found)

    module = example("extraction")
    with running_endpoint(Scripted(nobody_chooses, write)) as stand, Endpoint(stand.url) as endpoint:
        fields = module.extract.run(endpoint, document=module.DOCUMENT).returned
    assert len(fields) == 50
    assert (fields["amounts.tax_rate"], fields["seller.name"], fields["payment.is_paid"]) == (25, None, True)
    assert len({prompt_of(body).partition("What does it say")[0] for _, body in stand.calls}) == 1
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)


def test_what_most_answers_say_is_believed(example: Load) -> None:
    def write(prompt: str, body: dict[str, Any]) -> str:
        return {0: "24 - 5 is 19.", 1: "It is 20", 2: "So 19", 3: "no idea", 4: "19 eggs"}[body["seed"]]

    module = example("self_consistency")
    with running_endpoint(Scripted(nobody_chooses, write)) as stand, Endpoint(stand.url) as endpoint:
        state = module.most_say.run(endpoint, question=module.QUESTION)
    assert state.returned == ("19", 3)


@pytest.mark.parametrize("name", ["agent", "tree_of_thought", "classification", "extraction", "self_consistency"])
def test_each_example_runs_as_a_program(example: Load, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write(prompt: str, body: dict[str, Any]) -> str:
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {"properties": {}})
        return json.dumps(dict.fromkeys(schema["properties"])) if schema["properties"] else " 7"

    with running_endpoint(Scripted(lambda prompt, choices: choices[-1], write)) as stand:
        example(name).main(stand.url)
    assert len(stand.calls) > 3
    assert capsys.readouterr().out


# -- on the real endpoint


@pytest.mark.dataplane
def test_the_tree_reads_nine_tenths_of_its_prompts_from_the_cache(example: Load, served: str) -> None:
    module = example("tree_of_thought")
    with Endpoint(served, extra_body={"cache_salt": "tree"}) as endpoint:
        state = module.tree_of_thought.run(
            endpoint, problem=module.PROBLEM, breadth=3, keep=2, depth=2, step_tokens=6, method="greedy"
        )
    assert state.usage.calls >= 3 + 3 + 6 + 6 + 1
    assert state.usage.hit_rate >= 0.9


@pytest.mark.dataplane
def test_the_other_examples_run_on_kvasir(example: Load, served: str) -> None:
    classification, agent = example("classification"), example("agent")
    with Endpoint(served) as endpoint:
        texts = [{"text": text, "method": "greedy"} for text in classification.TEXTS[:3]]
        states = classification.classify.run_batch(endpoint, texts)
        assert [each.error for each in states] == [None] * 3
        assert {each.returned for each in states} <= {label.strip() for label in classification.LABELS}
        # the prompts differ in their last line, and each but the first is asked when the first was computed
        assert all(each.usage.hit_rate > 0.5 for each in states[1:])
        run = agent.agent.run(endpoint, question="What do two milks cost?", most_actions=1)
        assert run["tool"].strip() in (*agent.TOOLS, "finish")
        most = example("self_consistency").most_say.run(endpoint, question="What is 2 + 3?", answers=2)
        assert most.usage.calls == 2


@pytest.mark.dataplane
@pytest.mark.parametrize("chat", [False, True])
def test_exact_scores_are_the_first_that_kvasir_is_asked_for(served: str, chat: bool) -> None:
    def chosen(endpoint: Endpoint, method: Method) -> State:
        state = State(endpoint)
        if chat:
            state += user("What is the capital of France?")
            state += assistant("The capital is" + select("x", CITIES, normalize="none", method=method))
        else:
            state += "The capital of France is" + select("x", CITIES, normalize="none", method=method)
        return state

    with Endpoint(served) as endpoint:
        first, second = chosen(endpoint, "auto"), chosen(endpoint, "prompt_logprobs")
        assert first["x"] == second["x"] == " Paris"
        assert first.meta("x").method == ("prompt_logprobs" if chat else "echo")
        scores, others = first.meta("x").scores, second.meta("x").scores
        assert set(scores) == set(CITIES)
        assert scores == pytest.approx(others, abs=0.3)
        assert scores[" Paris"] > max(scores[city] for city in CITIES[1:]) + 1
