"""PURE: a Dockerfile as the steps of its stages. What is not understood here is an error, never passed over.

Understood are FROM (with AS), ARG, RUN (shell form), COPY (with --from), ENV (NAME=VALUE), WORKDIR, USER (by
number), EXPOSE and ENTRYPOINT (exec form); comments, lines that go on after a backslash, `$NAME` and `${NAME}`.
"""

import json
import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\\|\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>[A-Za-z_]\w*))?")
_NAME = re.compile(r"[A-Za-z_]\w*")
_DIRECTIVE = re.compile(r"#\s*(syntax|escape|check)\s*=", re.IGNORECASE)


class DockerfileError(Exception):
    """A Dockerfile that is wrong or has what is not understood; the message begins with the line."""


@dataclass(frozen=True)
class Instruction:
    """An instruction as written, its lines joined."""

    line: int
    name: str
    text: str


@dataclass(frozen=True)
class Run:
    """A command of `/bin/sh -c`."""

    command: str
    environment: Mapping[str, str]
    directory: str
    user: str
    line: int


@dataclass(frozen=True)
class Copy:
    """Files of the context, or of an earlier stage, by name."""

    sources: tuple[str, ...]
    target: str
    stage: str
    line: int


@dataclass(frozen=True)
class MakeFolder:
    """The folder that WORKDIR names."""

    path: str


@dataclass
class Stage:
    """A stage: what it begins with (an image, or an earlier stage by name), its steps, and what it leaves."""

    base: str
    name: str
    environment: dict[str, str]
    steps: list[Run | Copy | MakeFolder] = field(default_factory=list)
    directory: str = "/"
    user: str = "0:0"
    ports: list[int] = field(default_factory=list)
    entrypoint: tuple[str, ...] = ()


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile. Raises DockerfileError."""
    joined, began = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            if _DIRECTIVE.match(line.lstrip()) and not began:
                raise DockerfileError(f"line {number}: parser directives are not understood")
            continue
        if not line.strip():
            continue
        began = began or number
        if line.endswith("\\"):
            joined += line[:-1]
            continue
        yield _instruction(began, (joined + line).strip())
        joined, began = "", 0
    if began:
        raise DockerfileError(f"line {began}: the last line goes on after a backslash")


def _instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    if not rest.strip():
        raise DockerfileError(f"line {line}: {name} says nothing")
    if "<<" in rest:
        raise DockerfileError(f"line {line}: here-documents are not understood")
    return Instruction(line, name, rest.strip())


def substituted(text: str, values: Mapping[str, str], line: int) -> str:
    """`text` with its variables. One that has no value is an error, where Docker would take an empty text."""

    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"] or ""
        if not _NAME.fullmatch(name):
            raise DockerfileError(f"line {line}: {match.group()} is not understood")
        if name not in values:
            raise DockerfileError(f"line {line}: {name} has no value")
        return values[name]

    return _VARIABLE.sub(value, text)


def stages(text: str, arguments: Mapping[str, str], environment: Mapping[str, str]) -> list[Stage]:
    """The stages with every variable replaced. `arguments`: --build-arg; `environment`: of the base images."""
    return _Reader(arguments, environment).read(text)


class _Reader:
    def __init__(self, arguments: Mapping[str, str], environment: Mapping[str, str]) -> None:
        self._arguments, self._environment = arguments, environment
        self._found: list[Stage] = []
        self._global: dict[str, str] = {}
        self._values: dict[str, str] = {}  # ARGs of this stage
        self._declared: set[str] = set()

    def read(self, text: str) -> list[Stage]:
        for each in instructions(text):
            act = getattr(self, f"_{each.name.lower()}", None) if each.name.isupper() else None
            if act is None:
                raise DockerfileError(f"line {each.line}: {each.name} is not understood")
            if not self._found and each.name not in ("ARG", "FROM"):
                raise DockerfileError(f"line {each.line}: {each.name} before FROM")
            act(each)
        if not self._found:
            raise DockerfileError("line 1: there is no FROM")
        if unknown := sorted(set(self._arguments) - self._declared):
            raise DockerfileError(f"line 1: no ARG {unknown[0]}")
        return self._found

    def _known(self) -> dict[str, str]:
        """What may be named: ENV goes before ARG."""
        return {**self._values, **self._found[-1].environment} if self._found else self._global

    def _say(self, each: Instruction) -> str:
        return substituted(each.text, self._known(), each.line)

    def _from(self, each: Instruction) -> None:
        words = substituted(each.text, self._global, each.line).split()
        if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
            raise DockerfileError(f"line {each.line}: FROM takes IMAGE or IMAGE AS NAME")
        name = words[2] if len(words) == 3 else ""
        before = {stage.name: stage for stage in self._found if stage.name}
        if name in before:
            raise DockerfileError(f"line {each.line}: there is a stage {name} before")
        below = before.get(words[0])
        stage = Stage(words[0], name, dict(below.environment if below else self._environment))
        if below:
            stage.directory, stage.user, stage.entrypoint = below.directory, below.user, below.entrypoint
        self._found.append(stage)
        self._values = {}

    def _arg(self, each: Instruction) -> None:
        name, equals, default = each.text.partition("=")
        if not _NAME.fullmatch(name) or " " in default:
            raise DockerfileError(f"line {each.line}: ARG takes NAME or NAME=VALUE")
        self._declared.add(name)
        where = self._values if self._found else self._global
        if name in self._arguments:
            where[name] = self._arguments[name]
        elif equals:
            where[name] = substituted(default, self._known(), each.line)
        elif self._found and name in self._global:
            where[name] = self._global[name]

    def _run(self, each: Instruction) -> None:
        if each.text.startswith(("[", "--")):
            raise DockerfileError(f"line {each.line}: RUN takes a command line, without options")
        stage = self._found[-1]
        stage.steps.append(Run(each.text, self._known(), stage.directory, stage.user, each.line))

    def _copy(self, each: Instruction) -> None:
        words, source = self._say(each).split(), ""
        if words[0].startswith("--from="):
            source = words.pop(0).removeprefix("--from=")
            if source not in {stage.name for stage in self._found[:-1] if stage.name}:
                raise DockerfileError(f"line {each.line}: there is no stage {source} before")
        if len(words) < 2 or words[0].startswith(("--", "[")):
            raise DockerfileError(f"line {each.line}: COPY takes SOURCE... TARGET, and of options --from")
        *sources, target = words
        if len(sources) > 1 and not target.endswith("/"):
            raise DockerfileError(f"line {each.line}: {target} has to end with / for several sources")
        if wild := [name for name in sources if re.search(r"[*?\[]|(^|/)\.\.(/|$)", name)]:
            raise DockerfileError(f"line {each.line}: {wild[0]} is not understood")
        path = posixpath.normpath(posixpath.join(self._found[-1].directory, target))
        self._found[-1].steps.append(Copy(tuple(sources), path + "/" * target.endswith("/"), source, each.line))

    def _env(self, each: Instruction) -> None:
        known = self._known()
        if "'" in each.text or "\\" in each.text:
            raise DockerfileError(
                f"line {each.line}: of quotes ENV takes double ones, and nothing behind a backslash"
            )
        try:
            words = shlex.split(each.text)
        except ValueError as error:
            raise DockerfileError(f"line {each.line}: {error}") from None
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or not _NAME.fullmatch(name):
                raise DockerfileError(f"line {each.line}: ENV takes NAME=VALUE")
            self._found[-1].environment[name] = substituted(value, known, each.line)

    def _workdir(self, each: Instruction) -> None:
        stage = self._found[-1]
        stage.directory = posixpath.normpath(posixpath.join(stage.directory, self._say(each)))
        stage.steps.append(MakeFolder(stage.directory))

    def _user(self, each: Instruction) -> None:
        if not re.fullmatch(r"\d+:\d+", user := self._say(each)):
            raise DockerfileError(
                f"line {each.line}: USER takes UID:GID: Kubernetes tells by a number who is not root"
            )
        self._found[-1].user = user

    def _expose(self, each: Instruction) -> None:
        for word in self._say(each).split():
            if not word.isdecimal() or not 0 < int(word) < 65536:
                raise DockerfileError(f"line {each.line}: {word} is no port")
            self._found[-1].ports.append(int(word))

    def _entrypoint(self, each: Instruction) -> None:
        try:
            words = json.loads(each.text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise DockerfileError(f"line {each.line}: ENTRYPOINT takes a list: a shell would not hand on signals")
        self._found[-1].entrypoint = tuple(words)
