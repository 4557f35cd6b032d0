"""The ranges of numbers and the sizes of what crosses a process boundary: the wire's types are made of these.

A value beyond them is refused where it is decoded, and, where a client gave it, by the API, which names the field.
"""

from typing import Annotated

from msgspec import Meta

INT32 = 2**31 - 1
INT64 = 2**63 - 1
MOST_PRIORITY = INT64
MOST_STOP_IDS = 4096
MOST_LOGPROBS = 128
MOST_PROMPT_LOGPROBS = 20
MOST_TEMPERATURE = 100.0
MOST_PENALTY = 2.0
LEAST_REPETITION, MOST_REPETITION = 0.01, 100.0
MOST_BIAS = 100.0
MOST_BIASES = 1024
MOST_BAD_WORDS = 256
MOST_BAD_WORD_TOKENS = 1024
MOST_GRAMMAR_CHARACTERS = 1 << 18
MOST_WHITESPACE_CHARACTERS = 256
MOST_SECONDS = 86_400.0
MOST_PARTS = 1024
"""Ranks of a worker."""
MOST_PAGE_SIZE = 1 << 16
MOST_ITEMS = 1 << 24
"""Tokens, pages, digests or hashes of one frame."""

Count = Annotated[int, Meta(ge=0, le=INT64)]
Small = Annotated[int, Meta(ge=0, le=INT32)]
Positive = Annotated[int, Meta(ge=1, le=INT32)]
Token = Annotated[int, Meta(ge=0, le=INT32)]
Word64 = Annotated[int, Meta(ge=0)]
"""An address, a hash or a digest: msgpack itself ends at 2**64 - 1."""
Nonce = Annotated[int, Meta(ge=0)]
"""64 random bits, and never 0: that is none, of a peer of the version before."""
Priority = Annotated[int, Meta(ge=-MOST_PRIORITY - 1, le=MOST_PRIORITY)]
Seed = Annotated[int, Meta(ge=-INT64 - 1, le=INT64)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-MOST_PENALTY, le=MOST_PENALTY)]
Repetition = Annotated[float, Meta(ge=LEAST_REPETITION, le=MOST_REPETITION)]
Bias = Annotated[float, Meta(ge=-MOST_BIAS, le=MOST_BIAS)]
Rate = Annotated[float, Meta(ge=0.0, le=1e18)]
Seconds = Annotated[float, Meta(ge=0.0, le=MOST_SECONDS)]
Logprob = Annotated[float, Meta(le=1e-3)]
"""Minus infinity is one; rounding may leave it just above 0."""
Name = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=1 << 16)]
Metadata = Annotated[bytes, Meta(max_length=1 << 20)]
Tokens = Annotated[list[Token], Meta(max_length=MOST_ITEMS)]
Pages = Annotated[list[Small], Meta(max_length=MOST_ITEMS)]
Words = Annotated[list[Word64], Meta(max_length=MOST_ITEMS)]
