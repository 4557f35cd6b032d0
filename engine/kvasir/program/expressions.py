"""The parts of a program: text, roles, and where the model writes (`gen`) or chooses (`select`). Pure."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Method = Literal["auto", "echo", "prompt_logprobs", "greedy", "structured"]
Normalize = Literal["tokens", "none"]
METHODS: tuple[Method, ...] = ("echo", "prompt_logprobs", "greedy", "structured")
MOST_CHOICES = 128


class Expression:
    """A part of a program. `+` joins parts, also with strings."""

    def __add__(self, other: "Expression | str") -> "Joined":
        return Joined((self, other))

    def __radd__(self, other: str) -> "Joined":
        return Joined((other, self))


@dataclass(frozen=True)
class Joined(Expression):
    """Several parts in order."""

    parts: tuple[Expression | str, ...]


@dataclass(frozen=True)
class InRole(Expression):
    """A whole message."""

    role: Role
    content: Expression | str


@dataclass(frozen=True)
class Gen(Expression):
    """See `gen`. `fields` go into the request as they are; `schema` is JSON Schema."""

    name: str
    fields: Mapping[str, Any]
    regex: str | None = None
    choices: tuple[str, ...] | None = None
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Select(Expression):
    """See `select`."""

    name: str
    choices: tuple[str, ...]
    method: Method = "auto"
    normalize: Normalize = "tokens"


@dataclass(frozen=True)
class Begin:
    role: Role


@dataclass(frozen=True)
class End:
    pass


Step = str | Gen | Select | Begin | End


def gen(
    name: str,
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    schema: Any = None,
    **fields: Any,
) -> Gen:
    """The model writes a text, which becomes the variable `name`, without the stop string.

    At most one of these constrains the text: `regex`, `choices` (the text is one of them) or `schema` (a JSON
    Schema, or a class of pydantic or msgspec). A parameter that is `None` has the endpoint's default. `fields` are
    further fields of the request, for example `top_k`. Raises ValueError.
    """
    _named(name)
    forms = [
        each for each, said in (("regex", regex), ("choices", choices), ("schema", schema)) if said is not None
    ]
    if len(forms) > 1:
        raise ValueError(f"gen {name!r}: {' and '.join(forms)} exclude each other")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"gen {name!r}: max_tokens has to be 1 at least, not {max_tokens}")
    said = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    request: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
    if stop:
        request["stop"] = [stop] if isinstance(stop, str) else list(stop)
    own = {"model", "prompt", "messages", "stream", "stream_options", "n", "echo"}
    for field in fields:
        if field in own:
            raise ValueError(f"gen {name!r}: {field} is the program's own to say")
    return Gen(
        name,
        {**request, **fields},
        regex,
        None if choices is None else _choices("gen", name, choices),
        None if schema is None else _schema(name, schema),
    )


def select(
    name: str, choices: Sequence[str], *, method: Method = "auto", normalize: Normalize = "tokens"
) -> Select:
    """The model continues with the most likely of `choices`, which becomes the variable `name`.

    `method` is one of docs/program.md; `auto` takes the first that the endpoint supports. `normalize`: compare the
    mean (`tokens`) or the sum (`none`) of the log-probabilities of a choice's tokens. Raises ValueError.
    """
    _named(name)
    if method not in ("auto", *METHODS):
        raise ValueError(f"select {name!r}: method {method!r} is none of auto, {', '.join(METHODS)}")
    if normalize not in ("tokens", "none"):
        raise ValueError(f"select {name!r}: normalize {normalize!r} is neither tokens nor none")
    return Select(name, _choices("select", name, choices), method, normalize)


def system(content: Expression | str) -> InRole:
    """A system message."""
    return InRole("system", content)


def user(content: Expression | str) -> InRole:
    """A user's message."""
    return InRole("user", content)


def assistant(content: Expression | str) -> InRole:
    """The assistant's message. It may hold any number of `gen` and `select`."""
    return InRole("assistant", content)


def steps_of(expression: Expression | str) -> Iterator[Step]:
    """The steps of an expression, in order. Raises TypeError if it is no expression."""
    match expression:
        case str() | Gen() | Select():
            yield expression
        case Joined(parts):
            for part in parts:
                yield from steps_of(part)
        case InRole(role, content):
            yield Begin(role)
            yield from steps_of(content)
            yield End()
        case _:
            raise TypeError(
                f"a {type(expression).__name__} is no part of a program: text, gen, select or a role is"
            )


def _named(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a variable's name has to be a text that is not empty, not {name!r}")


def _choices(what: str, name: str, choices: Sequence[str]) -> tuple[str, ...]:
    found = tuple(choices)
    if isinstance(choices, str) or not all(isinstance(each, str) and each for each in found):
        raise ValueError(f"{what} {name!r}: choices have to be texts that are not empty")
    if not 1 <= len(found) <= MOST_CHOICES or len(set(found)) < len(found):
        raise ValueError(f"{what} {name!r}: 1 to {MOST_CHOICES} different choices are needed, not {len(found)}")
    return found


def _schema(name: str, schema: Any) -> Mapping[str, Any]:
    if isinstance(schema, Mapping):
        found: Mapping[str, Any] = schema
    elif isinstance(schema, type):
        of_pydantic: Callable[[], Mapping[str, Any]] | None = getattr(schema, "model_json_schema", None)
        if of_pydantic is not None:
            found = of_pydantic()
        else:
            import msgspec

            found = msgspec.json.schema(schema)
    else:
        raise ValueError(f"gen {name!r}: schema has to be a mapping or a class, not {type(schema).__name__}")
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"gen {name!r}: schema is no JSON: {error}") from None
    return found
