"""What every body and chunk of one answer says about it."""

from dataclasses import dataclass

from kvasir_engine.api.generation import Tally
from kvasir_engine.api.schemas import PromptTokensDetails, Usage


@dataclass(frozen=True)
class Answer:
    """`created` is in seconds since 1970; `choices` is how many there will be."""

    id: str
    created: int
    model: str
    choices: int
    prompt_tokens: int
    tally: Tally

    def usage(self) -> Usage:
        """Tokens so far: the whole usage once all choices have ended."""
        completion = self.tally.completion_tokens
        return Usage(
            self.prompt_tokens,
            completion,
            self.prompt_tokens + completion,
            PromptTokensDetails(self.tally.cached_tokens),
        )
