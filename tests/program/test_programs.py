"""What a program says becomes these requests, in this order, and its variables what the model answers."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_endpoint import Reply, prompt_of, running_endpoint

from kvasir.program import Endpoint, ProgramError, State, assistant, gen, program, system, user
from kvasir_engine.errors import UserError


def counting(path: str, body: dict[str, Any]) -> Reply:
    """Answers with how long the prompt is."""
    return Reply([" <", str(len(prompt_of(body))), ">"])


def plain(s: State, about: str) -> None:
    s += "About " + about + ":"
    s += gen("first", max_tokens=5, stop="\n", temperature=0)
    s += " and" + gen("second")


def test_each_gen_continues_all_that_was_said() -> None:
    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        state = program(plain).run(endpoint, about="trees")
    assert [(path, body["prompt"]) for path, body in stand.calls] == [
        ("completions", "About trees:"),
        ("completions", "About trees: <12> and"),
    ]
    first = stand.calls[0][1]
    assert (first["model"], first["max_tokens"], first["stop"], first["temperature"]) == ("toy", 5, ["\n"], 0)
    assert {"max_tokens", "stop", "temperature"}.isdisjoint(stand.calls[1][1])
    assert (state["first"], state["second"]) == (" <12>", " <21>")
    assert (state.usage.calls, state.usage.completion_tokens) == (2, 6)


def test_several_gens_in_one_turn_of_the_assistant_continue_it() -> None:
    @program
    def told(s: State) -> None:
        s += system("Be short.") + user("Hello")
        s += assistant("Well," + gen("a") + " or" + gen("b"))
        s += user("Again") + assistant(gen("c"))

    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        state = told.run(endpoint)
        transcript = state.wait()
    bodies = [body for _, body in stand.calls]
    assert {path for path, _ in stand.calls} == {"chat/completions"}
    assert [each.get("continue_final_message") for each in bodies] == [True, True, None]
    assert [each.get("add_generation_prompt") for each in bodies] == [False, False, None]
    assert bodies[0]["messages"][-1] == {"role": "assistant", "content": "Well,"}
    assert bodies[1]["messages"][-1]["content"] == "Well," + state["a"] + " or"
    assert [each["role"] for each in bodies[2]["messages"]] == ["system", "user", "assistant", "user"]
    assert [each.role for each in transcript.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert transcript.messages[2].text == "Well," + state["a"] + " or" + state["b"]


def test_forms_are_sent_as_endpoints_take_them() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    @program
    def forms(s: State, chat: bool) -> None:
        for name, form in (("r", {"regex": "[0-9]+"}), ("c", {"choices": ["x", "y"]}), ("s", {"schema": schema})):
            s += (user("?") + assistant(gen(name, **form))) if chat else ("?" + gen(name, **form))

    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        forms.run(endpoint, chat=False)
        forms.run(endpoint, chat=True)
    outputs = [body.get("structured_outputs") for _, body in stand.calls]
    both = [{"regex": "[0-9]+"}, {"choice": ["x", "y"]}]
    assert outputs == [*both, {"json": schema}, *both, None]
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    assert stand.calls[5][1]["response_format"] == wanted


def test_a_class_is_a_schema() -> None:
    import msgspec

    class Point(msgspec.Struct):
        x: int

    found = gen("p", schema=Point).schema
    assert found is not None
    assert "Point" in str(found)


def test_forks_begin_with_what_was_said_and_go_on_at_once() -> None:
    hold = threading.Event()

    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply(["!"], hold=hold if "fork" in body["prompt"] else None)

    @program
    def forked(s: State) -> list[str]:
        s += "Said" + gen("before") + " then"
        forks = s.fork(3)
        for place, each in enumerate(forks):
            each += f" fork {place}" + gen("answer")
            assert each["before"] == "!"
        until(lambda: stand.most_at_once == 3)
        hold.set()
        forks.join()
        s += " on" + gen("after")
        return forks.values("answer")

    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        state = forked.run(endpoint)
    prompts = [body["prompt"] for _, body in stand.calls]
    assert sorted(prompts[1:4]) == [f"Said! then fork {place}" for place in range(3)]
    assert prompts[4] == "Said! then on"
    assert (state.returned, state.usage.calls) == (["!"] * 3, 5)


def until(true: Any, seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.002)


@pytest.mark.parametrize("how", ["forks", "batch"])
def test_of_calls_that_begin_alike_the_first_goes_ahead_to_its_first_token(how: str) -> None:
    hold = threading.Event()
    before: list[int] = []

    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply(["a", "b"], hold=hold)

    def release() -> None:
        until(lambda: stand.calls)
        before.append(len(stand.calls))
        hold.set()

    @program
    def forks(s: State) -> None:
        s += "long " * 400
        states = s.fork(4)
        for place, each in enumerate(states):
            each += f"{place}" + gen("x")
        release()

    @program
    def one(s: State, place: int) -> None:
        s += f"long {place}" + gen("x")
        if place == 0:
            release()

    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        if how == "forks":
            forks.run(endpoint)
        else:
            states = one.run_batch(endpoint, [{"place": place} for place in range(4)])
            assert [each["x"] for each in states] == ["ab"] * 4
    assert before == [1]
    assert len(stand.calls) == 4


def test_when_the_first_of_them_fails_the_others_go_on() -> None:
    calls: list[None] = []

    def script(path: str, body: dict[str, Any]) -> Reply:
        calls.append(None)
        return Reply(status=400, error="no") if len(calls) == 1 else Reply(["a"])

    @program
    def one(s: State, place: int) -> None:
        s += f"long {place}" + gen("x")

    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        states = one.run_batch(endpoint, [{"place": place} for place in range(4)])
        errors = [each.error for each in states if each.error]
        assert sum(each.error is None for each in states) == 3
    assert errors == [f"gen 'x': {stand.url}: http_400: no"]


def test_variables_stream_as_they_are_written() -> None:
    hold = threading.Event()
    calls: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Reply:
        calls.append(body["prompt"])
        return Reply(["one", "two"], hold=hold if len(calls) == 2 else None)

    @program
    def told(s: State) -> None:
        s += "?" + gen("a")
        s["a"]
        s += gen("b")

    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        running = told.start(endpoint)
        assert list(running.stream("a")) == ["one", "two"]
        hold.set()
        assert list(running.stream("b")) == ["one", "two"]
        with pytest.raises(KeyError, match="without a variable 'c'"):
            list(running.stream("c"))
        assert running.result(60)["b"] == "onetwo"


async def collected(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


async def test_the_same_with_asyncio() -> None:
    @program
    async def told(s: State, n: int) -> int:
        s += "?" + gen("a")
        assert await s.get("a") == " <1>"
        forks = s.fork(n)
        for each in forks:
            each += "!" + gen("b")
        await forks.ajoin()
        assert await collected(forks[0].astream("b")) == [" <", "6", ">"]
        return len(await forks.avalues("b"))

    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        assert (await told.arun(endpoint, n=2)).returned == 2
        batch = await told.arun_batch(endpoint, [{"n": 1}, {"n": 3}], parallel=1)
        assert [each.returned for each in batch] == [1, 3]
        assert (await program(plain).arun(endpoint, about="x"))["first"] == " <8>"
        running = told.start(endpoint, n=1)
        assert await collected(running.astream("a")) == [" <", "1", ">"]
        assert (await running.aresult()).returned == 1


def test_an_async_program_runs_where_there_is_no_loop() -> None:
    @program
    async def told(s: State) -> str:
        s += "?" + gen("a")
        return await s.get("a")

    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        assert told.run(endpoint).returned == " <1>"
        assert [each.returned for each in told.run_batch(endpoint, [{}, {}])] == [" <1>"] * 2


async def test_who_is_cancelled_ends_the_calls() -> None:
    @program
    async def told(s: State) -> None:
        s += "?" + gen("a")
        await s.get("a")

    @program
    def blocking(s: State) -> None:
        s += "?" + gen("a")
        s["a"]

    with running_endpoint(lambda path, body: Reply(["x"], hang_after=0)) as stand, Endpoint(stand.url) as endpoint:
        for each in (told, blocking):
            calls = len(stand.calls)
            task = asyncio.create_task(each.arun(endpoint))
            await asyncio.to_thread(until, lambda count=calls: len(stand.calls) > count)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 60)


# -- errors


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=400, error="max_tokens is bad"), "http_400: max_tokens is bad"),
        (Reply(["a", "b"], cut_after=1), "closed: "),
        (Reply(["a", "b"], error_after=1), "error_event: the engine died"),
        (Reply(["a", "b"], hang_after=1), "idle: nothing came for 0.3 s"),
        (Reply(["a"], hang_after=0), "idle: nothing came for 0.3 s"),
    ],
    ids=["refused", "cut", "error", "hang midway", "hang"],
)
def test_a_call_that_fails_is_the_programs_error_by_name(reply: Reply, kind: str) -> None:
    idle = 60.0 if reply.hang_after is None else 0.3
    with running_endpoint(lambda path, body: reply) as stand, Endpoint(stand.url, idle_timeout=idle) as endpoint:
        with pytest.raises(ProgramError, match="gen 'first'") as raised:
            program(plain).run(endpoint, about="x")
        assert kind in str(raised.value)
        state = State(endpoint)
        state += "?" + gen("a") + gen("b")
        for name in ("a", "b"):
            with pytest.raises(ProgramError, match="gen 'a'"):
                state[name]
        state += gen("c")
        with pytest.raises(ProgramError, match="gen 'a'"):
            state["c"]
        with pytest.raises(ProgramError, match="gen 'a'"):
            state.fork(2).join()


def test_a_whole_call_takes_no_longer_than_it_may() -> None:
    with running_endpoint(lambda path, body: Reply(["a"], hang_after=0)) as stand:
        endpoint = Endpoint(stand.url, timeout=0.3)
        with endpoint, pytest.raises(ProgramError, match=r"timeout: no whole answer within 0\.3 s"):
            program(plain).run(endpoint, about="x")


def test_no_server_is_an_error_that_names_it() -> None:
    endpoint = Endpoint("http://127.0.0.1:9", retries=1)
    with endpoint, pytest.raises(ProgramError, match=r"127\.0\.0\.1:9: connect"):
        program(plain).run(endpoint, about="x")


def test_an_overloaded_server_is_asked_again() -> None:
    replies = [Reply(status=503), Reply(status=429), Reply(["a"]), Reply(["b"])]
    with running_endpoint(lambda path, body: replies.pop(0)) as stand, Endpoint(stand.url) as endpoint:
        assert program(plain).run(endpoint, about="x")["second"] == "b"


def test_an_error_that_the_program_handles_is_not_the_runs() -> None:
    @program
    def tried(s: State) -> str:
        forks = s.fork(2)
        forks[0] += "bad" + gen("x")
        forks[1] += "good" + gen("x")
        try:
            return forks[0]["x"]
        except ProgramError:
            return forks[1]["x"]

    @program
    def careless(s: State) -> None:
        s.fork(1)[0].__iadd__("bad" + gen("x"))

    def script(path: str, body: dict[str, Any]) -> Reply:
        return Reply(status=400) if body["prompt"] == "bad" else Reply(["a"])

    with running_endpoint(script) as stand, Endpoint(stand.url) as endpoint:
        assert tried.run(endpoint).returned == "a"
        with pytest.raises(ProgramError, match="http_400"):
            careless.run(endpoint)


def test_what_the_function_raises_is_raised_and_ends_its_calls() -> None:
    @program
    def wrong(s: State, sure: bool) -> None:
        s += "?" + gen("x")
        raise LookupError("mine")

    with running_endpoint(lambda path, body: Reply(["a"], hang_after=0)) as stand, Endpoint(stand.url) as endpoint:
        with pytest.raises(LookupError, match="mine"):
            wrong.run(endpoint, sure=True)
        assert [each.error for each in wrong.run_batch(endpoint, [{"sure": True}])] == ["LookupError: mine"]
        with pytest.raises(TypeError, match="program wrong: missing a required argument: 'sure'"):
            wrong.run(endpoint)


def test_whoever_waits_is_told_that_the_endpoint_was_closed() -> None:
    @program
    def told(s: State) -> None:
        s += "?" + gen("a")
        s["a"]

    with running_endpoint(lambda path, body: Reply(["a"], hang_after=0)) as stand:
        endpoint = Endpoint(stand.url)
        running = told.start(endpoint)
        until(lambda: stand.calls)
        endpoint.close()
        with pytest.raises(ProgramError, match="the endpoint was closed"):
            running.result(60)
        with pytest.raises(ProgramError, match="the endpoint is closed"):
            told.run(endpoint)
    assert not [each for each in threading.enumerate() if each.name.startswith("kvasir-program")]


@pytest.mark.parametrize(
    ("say", "message"),
    [
        (lambda s: s.__iadd__(gen("x")), "no text yet"),
        (lambda s: s.__iadd__(user(gen("x"))), "within the role assistant"),
        (lambda s: s.__iadd__(user("a") + gen("x")), "within the role assistant"),
        (lambda s: s.__iadd__(assistant(gen("x"))), "no message yet"),
        (lambda s: s.__iadd__("text" + user("a")), "either roles or none"),
        (lambda s: s.__iadd__(user("a") + "text"), "outside of a role"),
        (lambda s: s.__iadd__(user("a" + assistant("b"))), "begins within user"),
    ],
)
def test_what_cannot_be_said_is_an_error(say: Any, message: str) -> None:
    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        state = State(endpoint)
        say(state)
        with pytest.raises(ProgramError, match=message):
            state.wait()
    assert stand.calls == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gen(""), "name"),
        (lambda: gen("x", max_tokens=0), "max_tokens"),
        (lambda: gen("x", regex="a", choices=["b"]), "regex and choices exclude"),
        (lambda: gen("x", choices=[]), "choices"),
        (lambda: gen("x", choices="abc"), "choices"),
        (lambda: gen("x", schema=3), "schema"),
        (lambda: gen("x", schema={"a": {1, 2}}), "no JSON"),
        (lambda: gen("x", n=3), "n is the program's own"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_said(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bad_url_is_refused() -> None:
    for url in ("localhost:8000", "ftp://a", "http://", "http://a b", "http://a:99999", "http://a/?q=1"):
        with pytest.raises(UserError, match="URL"):
            Endpoint(url)


def test_an_unknown_variable_names_those_there_are() -> None:
    with running_endpoint(counting) as stand, Endpoint(stand.url) as endpoint:
        state = State(endpoint)
        state += "?" + gen("a")
        with pytest.raises(KeyError, match="no variable 'b'; there are a"):
            state["b"]
