"""What every body and chunk of one answer says about it."""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.generation import Tally
from kvasir_engine.api.schemas import CompletionTokensDetails, PromptTokensDetails, Usage


@dataclass(frozen=True)
class Answer:
    """`created` is in seconds since 1970; `choices` is how many there will be.

    `include_usage` and `continuous_usage` are of streams. `prompts` are the prompts' tokens, if they are asked for,
    and `echo` their texts. `reasons`: reasoning is told from the answers.
    """

    id: str
    created: int
    model: str
    choices: int
    prompt_tokens: int
    tally: Tally
    include_usage: bool = False
    continuous_usage: bool = False
    prompts: Sequence[list[int]] | None = None
    echo: Sequence[str] | None = None
    reasons: bool = False

    def chunk_usage(self) -> Usage | UnsetType | None:
        """What a chunk that is not the last says of usage."""
        if self.continuous_usage:
            return self.usage()
        return None if self.include_usage else UNSET

    def prompt_ids(self, prompt: int) -> list[int] | UnsetType:
        """The tokens of a prompt, if they are to be shown."""
        return UNSET if self.prompts is None else self.prompts[prompt]

    def ids(self, pieces: Sequence[Piece]) -> list[int] | UnsetType:
        """The tokens of an answer's pieces, if they are to be shown."""
        return UNSET if self.prompts is None else [token for piece in pieces for token in piece.ids]

    def usage(self) -> Usage:
        """Tokens so far: the whole usage once all choices have ended."""
        completion = self.tally.completion_tokens
        return Usage(
            self.prompt_tokens,
            completion,
            self.prompt_tokens + completion,
            PromptTokensDetails(self.tally.cached_tokens),
            CompletionTokensDetails(self.tally.reasoning_tokens) if self.reasons else UNSET,
        )
