"""The names of tokens in answers. Pure."""

from dataclasses import dataclass

from kvasir_engine.api.tokenizer import TokenBytes


@dataclass(frozen=True)
class NamedToken:
    """A token as answers show it. `raw` is None where it adds no text: a special token has only a name."""

    id: int
    name: str
    raw: bytes | None


def named(vocabulary: TokenBytes, token: int) -> NamedToken:
    """A token's name: its text, or for a part of a character its bytes, `bytes:\\xf0\\x9f`, as OpenAI writes it."""
    raw = vocabulary.token_bytes(token)
    if not raw:
        return NamedToken(token, vocabulary.token_name(token) or f"token_id:{token}", None)
    try:
        return NamedToken(token, raw.decode(), raw)
    except UnicodeDecodeError:
        return NamedToken(token, "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
