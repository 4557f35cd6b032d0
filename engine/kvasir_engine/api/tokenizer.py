"""Tokenizes and detokenizes text for one model folder.

All functions are thread-safe: encoding uses the stateless Rust tokenizer, and not transformers' call path, which
changes truncation and padding settings.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from kvasir_engine.api.chat_template import TemplateCost, TemplateError, renderers
from kvasir_engine.api.encoding import Encoding
from kvasir_engine.api.rendering import AS_USUAL, Rendering, template_text, template_variables
from kvasir_engine.api.special_token_policy import ParseSpecial
from kvasir_engine.api.special_tokens import Markers, Segment, Strips, Unmarkable
from kvasir_engine.api.text_splitting import divisible
from kvasir_engine.api.tool_history import arguments_as_text
from kvasir_engine.api.tools.flags import AUTO, Parsers
from kvasir_engine.api.tools.formats import OutputFormat, output_format
from kvasir_engine.errors import UserError


class TokenizerError(UserError):
    """The model folder has no usable tokenizer; the message is one sentence for the user."""


class UnusedName(Exception):
    """The chat template ignores the name of the message at `place`."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class TokenBytes(Protocol):
    """The interface for detokenizing."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to the text; none for a special token or one outside the vocabulary."""
        ...

    def token_name(self, token: int) -> str | None:
        """What a token is called that adds no bytes to the text; None if it has no name either."""
        ...


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted (github.com/openai/gpt-2, `encoder.py`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return table


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(each) for each in decoder["decoders"]))
    return {decoder["type"]}


def _in_brackets(name: str) -> bool:
    return len(name) > 2 and name[0] + name[-1] in ("<>", "[]")


def _without_markers(described: Mapping[str, Any], markers: Mapping[str, int]) -> Any:
    """The tokenizer with special tokens and `markers` as plain text."""
    from tokenizers import Tokenizer as Backend

    added = [
        {**each, "special": each["special"] or each["content"] in markers} for each in described["added_tokens"]
    ]
    backend = Backend.from_str(json.dumps({**described, "added_tokens": added}))
    backend.encode_special_tokens = True
    return backend


def _continuing(part: Any) -> Any:
    """A part of a tokenizer, changed to add no prefix: the text continues another."""
    if isinstance(part, list):
        return [kept for kept in map(_continuing, part) if kept is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    part = {key: _continuing(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        part["add_prefix_space"] = False
    return part


class Tokenizer:
    """A byte-level (GPT-2, Llama 3, Qwen, SmolLM) or SentencePiece-like (Llama 2, Mistral) tokenizer.

    Takes a transformers tokenizer with a `tokenizer.json`. Raises TokenizerError for any other kind: their tokens
    have no bytes of their own, so text could not be streamed exactly.
    """

    def __init__(self, hf_tokenizer: Any, parse_special: ParseSpecial = "prompts") -> None:
        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError("the model's tokenizer has no tokenizer.json form")
        backend.no_truncation()
        backend.no_padding()
        described = json.loads(backend.to_str())
        kinds = _decoder_kinds(described["decoder"])
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"Metaspace", "ByteFallback"}:
            raise TokenizerError(
                f"the model's tokenizer decodes by {sorted(kinds)}, which cannot be streamed exactly"
            )
        self._hf = hf_tokenizer
        self._backend = backend
        self._parse_special = parse_special
        added = backend.get_added_tokens_decoder()
        self._added: dict[int, bytes] = {
            token: b"" if each.special else each.content.encode() for token, each in added.items()
        }
        self._bytes: dict[int, bytes] = dict(self._added)
        self._special: dict[str, int] = {each.content: token for token, each in added.items() if each.special}
        others = {each.content: token for token, each in added.items() if _in_brackets(each.content)}
        strips = Strips(
            frozenset(each.content for each in added.values() if each.lstrip),
            frozenset(each.content for each in added.values() if each.rstrip),
        )
        self._markers = Markers(self._special, others, strips)
        self._as_text = _without_markers(described, others)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size: int = max(vocabulary.values()) + 1
        self.longest: int = max(map(len, map(self.token_bytes, vocabulary.values())))
        self.longest = max(self.longest, *map(len, self._special), 1)
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self.has_chat_template: bool = hf_tokenizer.chat_template is not None
        self.template: str = template_text(hf_tokenizer)
        self.template_variables: frozenset[str] = template_variables(hf_tokenizer)
        self._around = self._put_around()
        self._divisible = divisible(lambda text: self._ids(backend, text))

    @classmethod
    def load(cls, folder: Path, parse_special: ParseSpecial = "prompts") -> "Tokenizer":
        """The tokenizer of a Hugging Face folder. The first call takes seconds: it imports transformers."""
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            return cls(loaded, parse_special)
        except TokenizerError:
            raise
        except BaseException as error:  # a model's files make the libraries raise anything, Rust's panics included
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise TokenizerError(f"cannot load a tokenizer from {folder}: {first}") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the model's prefix for every text (a BOS token, or nothing)."""
        return self.plain(text).run()

    def chat(self, messages: Sequence[Mapping[str, Any]], how: Rendering = AS_USUAL) -> list[int]:
        """Tokens of `messages` in the chat template. Raises as `rendered` does."""
        return self.rendered(messages, how).run()

    def bare(self, text: str) -> list[int]:
        """Tokens of a short text alone: without prefix and suffix, and with names of special tokens
        as plain text.
        """
        return self._ids(self._as_text, text)

    def plain(self, text: str, around: bool = True) -> Encoding:
        """The encoding of a plain prompt, not started; without `around` it has no prefix and suffix."""
        before, after = self._around if around else ([], [])
        backend = self._as_text if self._parse_special == "none" else self._backend
        return self._encoding(backend, [*before, text, *after])

    def rendered(
        self, messages: Sequence[Mapping[str, Any]], how: Rendering = AS_USUAL, around: bool = False
    ) -> Encoding:
        """The encoding, not begun, of `messages` in the chat template, up to where the assistant begins; with
        `around` in what the model puts before and after every text.

        Special tokens are those that the template writes; the messages' own text is text, unless `parse_special`
        is "all". Raises TemplateError, and UnusedName.
        """
        mark = None
        if self._parse_special != "all":
            try:
                said: dict[str, Any] = {"variables": how.variables, "tools": how.tools}
                (*messages, said), mark = self._markers.escape([*messages, said])
                how = replace(how, variables=said["variables"], tools=said["tools"])
            except Unmarkable as error:
                raise TemplateError(str(error)) from error
        text = self._render(messages, how)
        self._check_names(messages, how, text)
        before, after = self._around if around else ([], [])
        if mark is None:
            return self._encoding(self._backend, [*before, text, *after])
        return self._encoding(self._as_text, [*before, *self._markers.split(text, mark), *after])

    def check_template(self) -> None:
        """Raise TokenizerError when the chat template exceeds its limits for a short message."""
        try:
            if self.has_chat_template:
                self._render([{"role": "user", "content": "Hello"}], AS_USUAL)
        except TemplateCost as error:
            raise TokenizerError(f"the model's chat template cannot be used: {error}") from None
        except TemplateError:
            pass  # it may want other messages

    def _render(self, messages: Sequence[Mapping[str, Any]], how: Rendering = AS_USUAL) -> str:
        try:
            template = self._hf.get_chat_template(tools=how.tools)
        except ValueError as error:
            raise TemplateError(str(error)) from error
        try:
            return renderers.render(template, messages, self._hf.special_tokens_map, how)
        except TemplateCost:
            raise
        except TemplateError:
            written = arguments_as_text(messages)
            if written is None:
                raise
        # Some templates, such as DeepSeek's first, take arguments as OpenAI has them.
        return renderers.render(template, written, self._hf.special_tokens_map, how)

    def _check_names(self, messages: Sequence[Mapping[str, Any]], how: Rendering, text: str) -> None:
        named = ((place, message) for place, message in enumerate(messages) if "name" in message)
        places = {str(message["role"]): place for place, message in named if message["role"] != "tool"}
        for role, place in places.items():
            unnamed = [
                {key: value for key, value in message.items() if key != "name" or message["role"] != role}
                for message in messages
            ]
            if self._render(unnamed, how) == text:
                raise UnusedName(place)

    def continuation(self) -> Callable[[str], list[int]]:
        """A function that tokenizes a text that continues another: without prefix, with names of special tokens as
        plain text, and with the other added tokens as in any text.
        """
        from tokenizers import Tokenizer as Backend

        described = json.loads(self._backend.to_str())
        for key in ("normalizer", "pre_tokenizer"):
            described[key] = _continuing(described[key])
        backend = Backend.from_str(json.dumps(described))
        backend.encode_special_tokens = True
        return lambda text: self._ids(backend, text)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The special tokens by name."""
        return self._special

    def special_token(self, name: str) -> int | None:
        """The special token of this name."""
        return self._special.get(name)

    def _encoding(self, backend: Any, segments: Sequence[Segment]) -> Encoding:
        return Encoding(segments, lambda text: self._ids(backend, text), self._divisible)

    @staticmethod
    def _ids(backend: Any, text: str) -> list[int]:
        # The batch calls let other threads run meanwhile; `encode` does not.
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def _put_around(self) -> tuple[list[int], list[int]]:
        """The model's prefix and suffix of every text."""
        bare = self._ids(self._backend, "a")
        whole: list[int] = self._backend.encode("a").ids
        for at in range(len(whole) if bare else 0):
            if whole[at : at + len(bare)] == bare:
                return whole[:at], whole[at + len(bare) :]
        return whole, []

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones by name; incomplete characters are replaced."""
        parts = [self.token_bytes(each) or self._special_name(each) for each in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def _special_name(self, token: int) -> bytes:
        return (self.token_name(token) or "").encode()

    def token_name(self, token: int) -> str | None:
        """What a token is called that adds no bytes to the text; None if it has no name either."""
        name: str | None = self._backend.id_to_token(token)
        return name

    def token_bytes(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._piece_bytes(self._backend.id_to_token(token))
        return known

    def _piece_bytes(self, piece: str | None) -> bytes:
        if piece is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


@dataclass(frozen=True)
class ServedModel:
    """The one model that a front end serves.

    `vocab_size` bounds the token ids that a client may send; `eos` are the tokens that end an answer; `created` is
    in seconds since 1970. `parsers` are what the command line names, `json_whitespace` is that of constrained JSON
    where a request does not say, as Grammar.whitespace has it.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    eos: tuple[int, ...]
    created: int
    parsers: Parsers = AUTO
    json_whitespace: str | None = None

    @cached_property
    def output(self) -> OutputFormat:
        """The format of the model's answers."""
        return output_format(self.tokenizer.template, self.parsers.tools, self.parsers.reasoning)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; empty if the file is missing. Raises TokenizerError."""
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _ids(value: object) -> list[int]:
    return (
        [value]
        if isinstance(value, int)
        else [v for v in value if isinstance(v, int)]
        if isinstance(value, list)
        else []
    )


def load_served_model(
    folder: Path, name: str, parse_special: ParseSpecial = "prompts", parsers: Parsers = AUTO
) -> ServedModel:
    """The front end's view of a resolved model folder. Raises TokenizerError."""
    tokenizer = Tokenizer.load(folder, parse_special)
    tokenizer.check_template()
    return served_by(tokenizer, folder, name, parsers)


def served_by(tokenizer: Tokenizer, folder: Path, name: str, parsers: Parsers = AUTO) -> ServedModel:
    """The model of a folder with this tokenizer. Raises TokenizerError.

    The end tokens are generation_config.json's, or else config.json's, and the tokenizer's own besides.
    """
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    eos = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    if tokenizer.eos_token_id is not None:
        eos.append(tokenizer.eos_token_id)
    vocab_size = config.get("vocab_size")
    return ServedModel(
        name=name,
        tokenizer=tokenizer,
        vocab_size=vocab_size if isinstance(vocab_size, int) else tokenizer.size,
        eos=tuple(dict.fromkeys(eos)),
        created=int(folder.stat().st_mtime),
        parsers=parsers,
    )
