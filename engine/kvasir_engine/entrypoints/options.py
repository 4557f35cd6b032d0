"""The command line of `EngineConfig`: an option, and its environment variable, for each field."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
import typer

from kvasir_engine.config import FIELDS, Field


def option_of(field: Field) -> Any:
    """The annotation of a parameter that is the field's option."""
    setting, name = field.setting, f"--{field.flag}"
    declared = () if setting.negative else (name,)
    option = typer.Option(
        *declared,
        help=setting.help or None,
        min=setting.minimum if field.type in (int, float) and not setting.quantity else None,
        max=setting.maximum,
        envvar=field.variable,
    )
    kind = str if field.choices or setting.quantity else field.type
    return Annotated[kind, option]


def command(
    called_as: str,
    run: Callable[..., None],
    documentation: str,
    more: Mapping[str, tuple[Any, Any]],
    required: tuple[str, ...] = (),
    worker: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[..., None]:
    """A Typer command named `called_as` that calls `run` with each option's value by name.

    `more`: further parameters, with annotation and default; one with a field's name replaces it. `required`: fields
    without a default. `worker`: include the settings that only `kvasir worker` has.
    """
    said = {**{name: field.default for name, field in FIELDS.items()}, **(defaults or {})}
    parameters, annotations = [], {}
    for name, field in FIELDS.items():
        if name in more or (field.setting.worker_only and not worker):
            continue
        default = str(said[name]) if field.setting.quantity else said[name]
        must = name in required or default is msgspec.NODEFAULT
        annotations[name] = option_of(field)
        parameters.append((name, inspect.Parameter.empty if must else default))
    for name, (annotation, default) in more.items():
        annotations[name] = annotation
        parameters.append((name, default))

    def called(**values: Any) -> None:
        run(**values)

    kind = inspect.Parameter.KEYWORD_ONLY
    called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind, default=default, annotation=annotations[name])
            for name, default in parameters
        ]
    )
    called.__annotations__ = annotations
    called.__name__ = called_as
    called.__doc__ = documentation
    return called
