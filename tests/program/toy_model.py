"""A model that is known whole: the probability of each next token, served with echo, prompt_logprobs or neither."""

import math
from typing import Any, Literal

from fake_endpoint import Reply, offsets_of, prompt_of, tokens_of

START = "logprob_start_len"
ANSWERS = {"yes": 0.2, "no": 0.5, "nothing": 0.05, "maybe": 0.25}


class ToyModel:
    """After a prompt it says one of ANSWERS, letter by letter; `knows` are the fields that it does not refuse.

    `start`: what becomes of `logprob_start_len`.
    """

    def __init__(
        self, knows: set[str], bos: bool = False, start: Literal["known", "ignored", "refused"] = "ignored"
    ) -> None:
        self.knows, self.bos, self.start = knows, bos, start

    def __call__(self, path: str, body: dict[str, Any]) -> Reply:
        asked = {"echo", "prompt_logprobs", "logprobs", "structured_outputs"} & body.keys()
        if asked - self.knows:
            return Reply(status=400, error=f"Unsupported parameter: '{min(asked - self.knows)}'")
        if START in body and self.start == "refused":
            return Reply(status=400, error=f"Unsupported parameter: '{START}'")
        start = body.get(START, 0) if self.start == "known" else 0
        if body.get("echo"):
            return Reply(
                raw={"choices": [self._echo(place, text, start) for place, text in enumerate(body["prompt"])]}
            )
        if "prompt_logprobs" in body:
            return Reply(
                raw=self._prompt_logprobs(path, prompt_of(body), start, body.get("return_token_ids", False))
            )
        if "structured_outputs" in body:
            return Reply([self.likeliest(body["structured_outputs"]["choice"])])
        return Reply(raw={"choices": [self._next(path, prompt_of(body))]})

    def likeliest(self, choices: list[str]) -> str:
        return max(choices, key=lambda each: ANSWERS.get(each.strip(), 0))

    def logprob(self, before: str, token: str) -> float:
        """Of `token` after `before`, whose last word is the answer as far as it is said."""
        begun = before.rpartition(" ")[2] if before.rpartition(" ")[2] in self._prefixes() else ""
        said = sum(p for answer, p in ANSWERS.items() if answer.startswith(begun))
        then = sum(p for answer, p in ANSWERS.items() if answer.startswith(begun + token.strip()))
        return math.log(then / said) if then else -20.0

    def _prefixes(self) -> set[str]:
        return {answer[:place] for answer in ANSWERS for place in range(len(answer) + 1)}

    def _scored(self, text: str) -> tuple[list[str], list[float | None]]:
        tokens = tokens_of(text)
        logprobs = [self.logprob("".join(tokens[:place]), token) for place, token in enumerate(tokens)]
        return (["<s>", *tokens], [None, *logprobs]) if self.bos else (tokens, [None, *logprobs[1:]])

    def _echo(self, place: int, text: str, start: int) -> dict[str, Any]:
        tokens, logprobs = self._scored(text)
        logprobs = hidden(logprobs, start)
        tokens, logprobs = [*tokens, "!"], [*logprobs, -1.0]
        found = {"tokens": tokens, "token_logprobs": logprobs, "text_offset": offsets_of(tokens)}
        return {"index": place, "text": text + "!", "logprobs": found, "finish_reason": "length"}

    def _prompt_logprobs(self, path: str, text: str, start: int, ids: bool) -> dict[str, Any]:
        tokens, logprobs = self._scored(text)
        logprobs = hidden(logprobs, start)
        found = [
            None if logprob is None else {f"{sum(map(ord, token))}": {"logprob": logprob, "decoded_token": token}}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        told: dict[str, Any] = {"prompt_logprobs": found}
        if ids:
            told["prompt_token_ids"] = [sum(map(ord, token)) for token in tokens]
        return {"choices": [{}], **told} if path != "completions" else {"choices": [told]}

    def _next(self, path: str, text: str) -> dict[str, Any]:
        letters = {(" " if text.endswith(":") else "") + each for each in "abeghimnorsty"}
        top = {letter: self.logprob(text, letter) for letter in letters}
        top = dict(sorted(top.items(), key=lambda each: -each[1])[:4])
        if path == "completions":
            return {"logprobs": {"top_logprobs": [top]}}
        return {"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}]}}


def hidden(logprobs: list[float | None], start: int) -> list[float | None]:
    """Those from place `start` on; from the end where it is negative."""
    first = start if start >= 0 else max(0, len(logprobs) + start)
    return [logprob if place >= first else None for place, logprob in enumerate(logprobs)]
