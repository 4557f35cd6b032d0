"""Tokens by the names that clients read. Pure."""

from dataclasses import dataclass

from kvasir_engine.api.tokenizer import TokenBytes


@dataclass(frozen=True)
class NamedToken:
    """A token as clients read of it. `raw` is None where it adds no text: a special token has a name only."""

    id: int
    name: str
    raw: bytes | None


def named(vocabulary: TokenBytes, token: int) -> NamedToken:
    """A token's name is its text; that of a part of a character its bytes, `bytes:\\xf0\\x9f`, as OpenAI has it."""
    raw = vocabulary.token_bytes(token)
    if not raw:
        return NamedToken(token, vocabulary.token_name(token) or f"token_id:{token}", None)
    try:
        return NamedToken(token, raw.decode(), raw)
    except UnicodeDecodeError:
        return NamedToken(token, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
