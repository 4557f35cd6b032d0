"""PURE: the settings of a role's workers, and where the spec sets each.

A setting is set by a field of `engine` (a role's over the service's), by `extraArgs`, or as a variable in the
role's template. The engine lets a flag win over a variable; a setting that has a field and is set a second time is
refused (`validation_settings.py`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvasir_engine.config import FIELDS, Field
from kvasir_operator.api.engine_settings import SETTINGS
from kvasir_operator.api.kinds import CONTAINER

if TYPE_CHECKING:
    from kvasir_operator.api import Spec, WorkerRole

BY_FLAG: Mapping[str, Field] = {field.flag: field for field in FIELDS.values()}
BY_VARIABLE: Mapping[str, Field] = {field.variable: field for field in FIELDS.values()}


class SpecSetting(msgspec.Struct, frozen=True):
    """The value of a setting, and the field of the spec that sets it."""

    value: str
    path: str

    @property
    def known(self) -> bool:
        """Whether it is the value itself, not a reference to one: `valueFrom`, or $(VARIABLE)."""
        return not self.value.startswith("{") and "$(" not in self.value


class ParsedFlag(msgspec.Struct, frozen=True):
    """A flag of `extraArgs`: the setting and its value, or what is `wrong` with it. `index`: of the flag."""

    index: int
    field: Field | None = None
    value: str = ""
    wrong: str = ""


def by_field(spec: "Spec", role: "WorkerRole") -> dict[str, SpecSetting]:
    """By flag, the settings that `engine` has, the role's over the service's."""
    found = {}
    for path, block in (("spec.engine", spec.engine), (f"spec.{role}.engine", spec.workers(role).engine)):
        for name in SETTINGS:
            value = getattr(block, name)
            if value is not None:
                found[FIELDS[name].flag] = SpecSetting(_text(value), f"{path}.{field_name(name)}")
    return found


def by_variable(spec: "Spec", role: "WorkerRole") -> dict[str, SpecSetting]:
    """By flag, the settings that the role's template has as variables. An empty variable sets nothing."""
    path = f"spec.{role}.template.spec.containers[{CONTAINER}].env"
    found = {}
    entries = _container(spec.workers(role).template).get("env")
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, Mapping):
            continue
        name = str(entry.get("name"))
        # Of a value from elsewhere only the place is known: equal places, equal values.
        value = entry["value"] if "value" in entry else json.dumps(entry.get("valueFrom"), sort_keys=True)
        if name in BY_VARIABLE and value != "":
            found[BY_VARIABLE[name].flag] = SpecSetting(str(value), f"{path}[{name}]")
    return found


def extra_args(spec: "Spec", role: "WorkerRole") -> Iterator[tuple[str, Sequence[str]]]:
    """The lists of further flags, each with its path, in the order of the command line."""
    workers = spec.workers(role)
    yield "spec.engine.extraArgs", spec.engine.extra_args
    yield f"spec.{role}.engine.extraArgs", workers.engine.extra_args
    yield f"spec.{role}.extraArgs", workers.extra_args


def by_flag(spec: "Spec", role: "WorkerRole") -> dict[str, SpecSetting]:
    """By flag, the settings in `extraArgs`."""
    return {
        each.field.flag: SpecSetting(each.value, path)
        for path, args in extra_args(spec, role)
        for each in parse_flags(args)
        if each.field is not None and not each.wrong
    }


def parse_flags(args: Sequence[str]) -> Iterator[ParsedFlag]:
    """The flags among the words of a command line, as `kvasir worker` reads them."""
    words = iter(enumerate(args))
    for index, word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        negated = name.removeprefix("no-")
        field = BY_FLAG.get(name)
        if not word.startswith("--"):
            yield ParsedFlag(index, wrong=f"{word!r} is no flag, nor the value of the flag before it")
        elif field is None and _is_switch(BY_FLAG.get(negated)):
            yield ParsedFlag(index, BY_FLAG[negated], "false", f"--{name} takes no value" if equals else "")
        elif field is None:
            yield ParsedFlag(index, wrong=f"--{name} is no flag of `kvasir worker`")
        elif field.type is bool:
            yield ParsedFlag(index, field, "true", f"--{name} takes no value" if equals else "")
        elif equals:
            yield ParsedFlag(index, field, value)
        else:
            _, following = next(words, (0, None))
            yield ParsedFlag(
                index, field, following or "", "" if following is not None else f"--{name} takes a value"
            )


def _is_switch(field: Field | None) -> bool:
    """Whether a setting has a flag --no-FLAG too."""
    return field is not None and field.type is bool and field.setting.negative


def flags_of(spec: "Spec", role: "WorkerRole") -> list[str]:
    """The worker's flags: those of fields, then `extraArgs`."""
    args = []
    for flag, setting in by_field(spec, role).items():
        field = BY_FLAG[flag]
        if field.type is not bool:
            args += [f"--{flag}", setting.value]
        elif setting.value == "true":
            args.append(f"--{flag}")
        elif field.setting.negative:
            args.append(f"--no-{flag}")
    return [*args, *(word for _, words in extra_args(spec, role) for word in words)]


def field_name(name: str) -> str:
    """The spec's name of a setting."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _container(template: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = template.get("spec")
    items = spec.get("containers") if isinstance(spec, Mapping) else None
    for item in items if isinstance(items, list) else ():
        if isinstance(item, Mapping) and item.get("name") == CONTAINER:
            return item
    return {}
