"""Log-probabilities of prompts in answers: `prompt_logprobs` as vLLM has it, and `echo` with `logprobs`."""

import itertools
import math
from typing import Any

import pytest
from api_support import ScriptedEngine, prompt_scores, saying, tiny_tokenizer
from test_parameters import HELLO, letters, post

from kvasir_engine.api.prompt_report import PromptReport
from kvasir_engine.api.schemas import PromptLogprob
from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.protocol import PromptLogprobs

streams = pytest.mark.parametrize("stream", [False, True])


def shown(model: ServedModel, tokens: list[int], most: int) -> list[dict[str, Any] | None]:
    """What is to be said of a prompt of letters, of which none is among the likeliest."""
    found: list[dict[str, Any] | None] = [None]
    for token, score in zip(tokens[1:], prompt_scores(tokens, most), strict=True):
        entry = {str(token): {"logprob": score.logprob, "rank": score.rank, "decoded_token": text_of(model, token)}}
        for rank, (other, logprob) in enumerate(score.top, 1):
            entry[str(other)] = {"logprob": logprob, "rank": rank, "decoded_token": text_of(model, other)}
        found.append(entry)
    return found


def text_of(model: ServedModel, token: int) -> str:
    return model.tokenizer.token_bytes(token).decode()


@streams
@pytest.mark.parametrize("most", [0, 2])
async def test_completions_have_them_in_each_choice_and_a_stream_in_its_first_event(
    model: ServedModel, stream: bool, most: int
) -> None:
    engine = ScriptedEngine(saying(letters(model, "€y"), cached=0))  # whose first token alone is no text
    asked = [letters(model, "pqr"), letters(model, "s")]
    answer = await post(engine, model, "completions", prompt=asked, prompt_logprobs=most, n=2, stream=stream)
    told: dict[int, list[Any]] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk["choices"]:
            told.setdefault(choice["index"], []).append(choice.get("prompt_logprobs"))
            assert choice["logprobs"] is None
    for index, (first, *rest) in told.items():
        assert first == shown(model, asked[index // 2], most)
        assert rest == [None] * len(rest)
    assert set(told) == {0, 1, 2, 3}
    assert {request.sampling.prompt_logprobs for request in engine.requests} == {most}
    assert {request.sampling.logprobs for request in engine.requests} == {None}


@streams
async def test_a_chat_has_them_once(model: ServedModel, stream: bool) -> None:
    engine = ScriptedEngine(saying(letters(model, "xy")))
    answer = await post(
        engine, model, "chat/completions", messages=HELLO, prompt_logprobs=1, n=2, stream=stream, logprobs=True
    )
    chunks = answer if stream else [answer]
    told = [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk]
    tokens = engine.requests[0].tokens
    assert len(told) == 1
    assert "prompt_logprobs" in chunks[0]
    assert len(told[0]) == len(tokens)
    assert told[0][0] is None
    marker = next(place for place, token in enumerate(tokens[1:], 1) if token >= 256)
    assert told[0][marker][str(tokens[marker])]["decoded_token"] == "<|im_end|>"


def test_the_prompts_own_token_is_named_once_and_first(model: ServedModel) -> None:
    score = PromptLogprobs(-0.5, 2, [(66, -0.25), (65, -0.5), (67, -math.inf)])
    entries = PromptReport(model.tokenizer, [1, 65], [score]).shown(2)
    names = [text_of(model, token) for token in (65, 66)]
    assert entries == [
        None,
        {"65": PromptLogprob(-0.5, 2, names[0]), "66": PromptLogprob(-0.25, 1, names[1])},
    ]
    assert entries[1] is not None
    assert list(entries[1]) == ["65", "66"]


async def logprobs_of(
    model: ServedModel, stream: bool, engine: ScriptedEngine, **body: Any
) -> dict[int, tuple[str, dict[str, list[Any]]]]:
    """The text of each choice, and its logprobs, those of a stream joined."""
    answer = await post(engine, model, "completions", stream=stream, **body)
    texts: dict[int, str] = {}
    joined: dict[int, dict[str, list[Any]]] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            into = joined.setdefault(index, {})
            for name, values in choice["logprobs"].items():
                into.setdefault(name, []).extend(values or [])
    return {index: (texts[index], joined[index]) for index in texts}


@streams
@pytest.mark.parametrize("most", [0, 1])
async def test_echoed_prompts_begin_the_logprobs(model: ServedModel, stream: bool, most: int) -> None:
    prompts, answer = ["p€q", "<|im_end|>é"], letters(model, "x€")
    engine = ScriptedEngine(saying(answer))
    told = await logprobs_of(model, stream, engine, prompt=prompts, echo=True, logprobs=most, n=2)
    assert set(told) == {0, 1, 2, 3}
    for index, (text, logprobs) in told.items():
        prompt = prompts[index // 2]
        tokens = letters(model, prompt)
        assert text == prompt + "x€"
        count = len(tokens) + len(answer)
        assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "text_offset")] == [count] * 3
        scores = [score.logprob for score in prompt_scores(tokens, most)]
        assert logprobs["token_logprobs"] == [None, *scores, *[-0.25] * len(answer)]
        assert logprobs["text_offset"][len(tokens)] == len(prompt)
        places = [*logprobs["text_offset"], len(text)]
        pieces = [text[begin:end] for begin, end in itertools.pairwise(places)]
        assert "".join(pieces) == text
        whole = [token for token in logprobs["tokens"] if not token.startswith("bytes:")]
        assert [piece for piece in pieces if piece and piece not in "€é"] == whole
        if most:
            assert logprobs["top_logprobs"][0] is None
            assert all(len(each) == 2 for each in logprobs["top_logprobs"][1:])
        else:
            assert logprobs["top_logprobs"] == []


@streams
async def test_no_token_is_generated_where_the_echo_alone_is_asked_for(model: ServedModel, stream: bool) -> None:
    engine = ScriptedEngine(saying(letters(model, "xy")))
    told = await logprobs_of(model, stream, engine, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    text, logprobs = told[0]
    assert text == "abc"
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["text_offset"] == [0, 1, 2]
    whole = await post(engine, model, "completions", prompt="abc", echo=True, max_tokens=0, return_token_ids=True)
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["choices"][0]["finish_reason"] == "length"
    assert (whole["choices"][0]["text"], whole["choices"][0]["token_ids"]) == ("abc", [])


async def test_each_of_two_numbers_of_alternatives_is_its_own(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    answer = await post(engine, model, "completions", prompt="pq", echo=True, logprobs=1, prompt_logprobs=3)
    choice = answer["choices"][0]
    assert engine.requests[0].sampling.prompt_logprobs == 3
    assert choice["prompt_logprobs"] == shown(model, letters(model, "pq"), 3)
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2


async def test_best_of_echoes_its_prompts(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    answer = await post(engine, model, "completions", prompt=["ab", "c"], echo=True, logprobs=0, best_of=3)
    assert [choice["logprobs"]["tokens"] for choice in answer["choices"]] == [["a", "b", "x"], ["c", "x"]]


def offsets(model: ServedModel, tokens: list[int], text: str) -> list[int]:
    scores = PromptReport(model.tokenizer, tokens, [PromptLogprobs(-1.0, 1)] * (len(tokens) - 1))
    return [each.offset for each in scores.echoed(text, 0)]


def test_offsets_of_tokens_that_the_text_has_not_or_has_by_name(model: ServedModel) -> None:
    a, b, space = (letters(model, each)[0] for each in "ab ")
    assert offsets(model, [256, a, b], "ab") == [0, 0, 1]
    assert offsets(model, [a, 256, b], "a<|im_start|>b") == [0, 1, 13]
    assert offsets(model, [space, a, b], "ab") == [0, 0, 1]
    assert offsets(model, [space, a], " a") == [0, 1]
    assert Tokenizer(tiny_tokenizer()).token_bytes(space) == b" "


def expected(tokens: list[int], start: int) -> list[int]:
    """The places of a prompt that have a score."""
    return list(range(max(1, start if start >= 0 else len(tokens) + start), len(tokens)))


@streams
@pytest.mark.parametrize("start", [0, 1, 3, 4, 100, -1, -2, -100])
async def test_from_a_place_on_the_entries_before_it_are_null(model: ServedModel, stream: bool, start: int) -> None:
    prompts = ["pqrs", "t"]
    engine = ScriptedEngine(saying(letters(model, "x")))
    answer = await post(
        engine, model, "completions", prompt=prompts, prompt_logprobs=1, logprob_start_len=start, stream=stream
    )
    first: dict[int, Any] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk["choices"]:
            first.setdefault(choice["index"], choice.get("prompt_logprobs"))
    for index, prompt in enumerate(prompts):
        tokens = letters(model, prompt)
        places = expected(tokens, start)
        whole = shown(model, tokens, 1)
        assert first[index] == [whole[place] if place in places else None for place in range(len(tokens))]


@streams
@pytest.mark.parametrize("start", [2, -1])
async def test_from_a_place_on_an_echo_has_null_before_it(model: ServedModel, stream: bool, start: int) -> None:
    engine, tokens = ScriptedEngine(saying(letters(model, "x"))), letters(model, "pqrs")
    asked: dict[str, Any] = {"prompt": "pqrs", "echo": True, "logprobs": 1, "logprob_start_len": start}
    told = await logprobs_of(model, stream, engine, **asked)
    ((text, logprobs),) = told.values()
    assert text == "pqrsx"
    places, scores = expected(tokens, start), [None, *(each.logprob for each in prompt_scores(tokens, 1))]
    before = [scores[place] if place in places else None for place in range(4)]
    assert logprobs["token_logprobs"] == [*before, -0.25]
    assert [top is None for top in logprobs["top_logprobs"]] == [score is None for score in before] + [False]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]


async def test_a_chat_has_them_from_its_end(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    answer = await post(engine, model, "chat/completions", messages=HELLO, prompt_logprobs=0, logprob_start_len=-3)
    scores = answer["prompt_logprobs"]
    assert [score is None for score in scores] == [True] * (len(scores) - 3) + [False] * 3
    assert engine.requests[0].sampling.logprob_start == len(scores) - 3


async def test_only_what_is_scored_counts_for_the_most(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    prompts = ["a" * 70] * 100
    asked: dict[str, Any] = {"prompt": prompts, "prompt_logprobs": 20, "max_tokens": 1}
    answer = await post(engine, model, "completions", **asked, logprob_start_len=-10)
    assert len(answer["choices"]) == 100
