"""What a schema cannot say of the engine's settings: duplicates, wrong values, wrong combinations. Pure."""

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvasir_engine.config import EngineConfig, Field, bytes_of
from kvasir_engine.errors import UserError
from kvasir_operator.api.structural_schema import Invalid
from kvasir_operator.api.validation_derived import DERIVED
from kvasir_operator.api.worker_settings import (
    BY_FLAG,
    SpecSetting,
    by_field,
    by_flag,
    by_variable,
    extra_args,
    field_name,
    parse_flags,
)

if TYPE_CHECKING:
    from kvasir_operator.api import Spec, WorkerRole


def settings_problems(spec: "Spec", role: "WorkerRole") -> Iterator[Invalid]:
    """Problems of the settings of a role's workers."""
    if spec.workers(role).extra_args and spec.workers(role).engine.extra_args:
        yield Invalid(f"spec.{role}.extraArgs", f"spec.{role}.engine.extraArgs is set too; use that one alone")
    wrong = [*_flags(spec, role), *_values(spec, role), *_duplicates(spec, role)]
    yield from wrong
    if not wrong:
        yield from _combination(spec, role)


def _flags(spec: "Spec", role: "WorkerRole") -> Iterator[Invalid]:
    """Words of `extraArgs` that are no flags, or flags that are derived from other fields."""
    for path, args in extra_args(spec, role):
        whose = "spec.{prefill,decode}" if path.startswith("spec.engine") else f"spec.{role}"
        for each in parse_flags(args):
            where = f"{path}[{each.index}]"
            if each.field is not None and each.field.flag in DERIVED:
                reason = DERIVED[each.field.flag].format(role=whose)
                yield Invalid(where, f"--{each.field.flag} {reason}")
            elif each.wrong:
                yield Invalid(where, each.wrong + _suggestion(args[each.index]))
            elif each.field is not None and (reason := _why_wrong(each.field, each.value)):
                yield Invalid(where, reason)


def _suggestion(word: str) -> str:
    name = word.removeprefix("--").partition("=")[0]
    near = difflib.get_close_matches(name, [flag for flag in BY_FLAG if flag not in DERIVED], 1)
    return f"; did you mean --{near[0]}?" if near and name not in BY_FLAG else ""


def _values(spec: "Spec", role: "WorkerRole") -> Iterator[Invalid]:
    """Values that the engine would refuse."""
    for settings in (by_field(spec, role), by_variable(spec, role)):
        for flag, setting in settings.items():
            if flag not in DERIVED and (reason := _why_wrong(BY_FLAG[flag], setting.value)):
                yield Invalid(setting.path, reason)


def _duplicates(spec: "Spec", role: "WorkerRole") -> Iterator[Invalid]:
    """Settings that a field sets, and another place too: one of them would be ignored."""
    fields = by_field(spec, role)
    for settings in (by_variable(spec, role), by_flag(spec, role)):
        for flag, setting in settings.items():
            if flag in fields:
                own = f"spec.{role}.engine.{field_name(BY_FLAG[flag].name)}"
                also = "" if fields[flag].path == own else f"; for this role alone, use {own}"
                yield Invalid(setting.path, f"{flag} is set by {fields[flag].path} too: leave it out here{also}")


def _combination(spec: "Spec", role: "WorkerRole") -> Iterator[Invalid]:
    """What the engine itself refuses of all settings together."""
    workers = spec.workers(role)
    if workers.tensor_parallel % workers.nodes:
        return  # which is told at spec.ROLE.nodes
    settings = {**by_variable(spec, role), **by_flag(spec, role), **by_field(spec, role)}
    own: dict[str, SpecSetting] = {f: s for f, s in settings.items() if f not in DERIVED and s.known}
    values: dict[str, Any] = {BY_FLAG[flag].name: _value(BY_FLAG[flag], each.value) for flag, each in own.items()}
    try:
        EngineConfig(
            model=spec.model.uri,
            role=role,
            tensor_parallel=workers.tensor_parallel,
            nnodes=workers.nodes,
            dist_init_addr="leader:1" if workers.nodes > 1 else "",
            **values,
        )
    except UserError as error:
        yield Invalid(_field_of_error(str(error), own, f"spec.{role}"), str(error))


def _field_of_error(reason: str, settings: Mapping[str, SpecSetting], role: str) -> str:
    """The field of the setting that an error names first, of those that the spec sets."""
    named = sorted((reason.find(flag), setting.path) for flag, setting in settings.items() if flag in reason)
    return named[0][1] if named else role


def _why_wrong(field: Field, text: str) -> str:
    """Why the engine would not take a value, or nothing."""
    if not SpecSetting(text, "").known:
        return ""
    try:
        field.check(_value(field, text))
    except UserError as error:
        return str(error)
    except ValueError:
        kind = "true or false" if field.type is bool else "an integer" if field.type is int else "a number"
        return f"{field.flag} must be {kind}, is {text!r}"
    return ""


def _value(field: Field, text: str) -> Any:
    """The value that a text stands for. Raises ValueError or UserError."""
    if field.setting.quantity:
        return bytes_of(text)
    if field.type is bool:
        word = field.canonical(text)
        if word not in ("true", "false"):
            raise ValueError(text)
        return word == "true"
    return field.type(text) if field.type in (int, float) else text
