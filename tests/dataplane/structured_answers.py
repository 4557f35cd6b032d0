"""Answers by many schemas from a server, asked for in many ways, and what came of them."""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from openai import OpenAI

Schema = dict[str, Any]
TOGETHER = 8
LEAVING = 0.1  # share of the clients that leave before the end


@dataclass
class Outcomes:
    """How answers ended: `whole`, `cut` by max_tokens, `left` by their client. `wrong` names what is not valid."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Asker:
    """Asks one server; the ways follow from a schema's name alone. `at_piece` is set when some stream has begun."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.outcomes = Outcomes()
        self.at_piece = threading.Event()
        self._url = url
        self._max_tokens = max_tokens
        self._lock = threading.Lock()

    def ask_all(self, schemas: Sequence[tuple[str, Schema]], meanwhile: Callable[[], None] = lambda: None) -> None:
        """`meanwhile` runs once some stream has begun."""
        with ThreadPoolExecutor(TOGETHER) as threads:
            asked = [threads.submit(self.ask, name, schema) for name, schema in schemas]
            assert self.at_piece.wait(300)
            meanwhile()
            for each in asked:
                each.result()

    def ask(self, name: str, schema: Schema) -> None:
        """One answer, checked."""
        rng = random.Random(name)
        streamed, leaves = rng.random() < 0.5, rng.random() < LEAVING
        how: dict[str, Any] = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": f"{rng.randrange(1000)}: a short {name} as JSON."}],
            "max_tokens": self._max_tokens,
            "temperature": rng.choice([0.0, 0.8]),
            "seed": rng.randrange(1000),
            "logprobs": rng.random() < 0.3,
            "extra_body": {"structured_outputs": {"json": schema, "disable_any_whitespace": rng.random() < 0.7}},
        }
        with OpenAI(base_url=self._url + "/v1", api_key="none", max_retries=0, timeout=600) as client:
            if streamed or leaves:
                text, finish, scored = self._streamed(client, how, leaves)
            else:
                whole = client.chat.completions.create(**how)
                (choice,) = whole.choices
                text, finish = choice.message.content or "", choice.finish_reason
                scored = [] if choice.logprobs is None else [each.token for each in choice.logprobs.content or []]
        fault = None if finish == "left" else fault_of(schema, text, finish, scored if how["logprobs"] else None)
        with self._lock:
            self.outcomes.ended[{"stop": "whole", "length": "cut"}.get(finish, finish)] += 1
            if fault is not None:
                self.outcomes.wrong.append(f"{name}: {fault}")

    def _streamed(self, client: OpenAI, how: dict[str, Any], leaves: bool) -> tuple[str, str, list[str]]:
        parts: list[str] = []
        finish, scored = "none", []
        stream = client.chat.completions.create(**how, stream=True)
        for part in stream:
            self.at_piece.set()
            if leaves:
                stream.close()
                return "", "left", []
            (choice,) = part.choices
            parts.append(choice.delta.content or "")
            if choice.logprobs is not None:
                scored += [each.token for each in choice.logprobs.content or []]
            finish = choice.finish_reason or finish
        return "".join(parts), finish, scored


def fault_of(schema: Schema, text: str, finish: str, scored: list[str] | None) -> str | None:
    """What is wrong with an answer, if anything. `scored`: its tokens that came with log-probabilities."""
    if finish not in ("stop", "length"):
        return f"it ends by {finish!r}"
    if scored is not None and not "".join(scored).startswith(text) and text.isascii():
        return f"the scored tokens {scored!r} are not those of {text!r}"
    if finish == "length":
        return None
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error)[:300]}"
    return None
