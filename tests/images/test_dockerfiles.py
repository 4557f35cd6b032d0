"""The Dockerfiles, read: they are understood whole, take what is there, and begin with what hands on signals."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from base_image import ENVIRONMENT
from build_context import ContextError, make_context, taken
from dockerfile import Copy, DockerfileError, MakeFolder, Run, Stage, stages
from e2e.node.sandboxed import ENTRY_POINTS

from kvasir_engine.environment import refuse_unknown
from kvasir_operator.render.pod import USER_ID
from kvasir_operator.render.storage import CACHE_PATH

ROOT = Path(__file__).parents[2]
PYTHON = "python:3.11-slim-bookworm"
CPU = {"EXTRAS": "engine", "BASE": PYTHON, "RUNTIME": PYTHON}
FORMS = {"operator": ("operator", {}), "engine": ("engine", {}), "engine for CPUs": ("engine", CPU)}
every_form = pytest.mark.parametrize(("folder", "arguments"), FORMS.values(), ids=FORMS)


def read(folder: str, arguments: dict[str, str]) -> list[Stage]:
    return stages((ROOT / folder / "Dockerfile").read_text(), arguments, ENVIRONMENT)


def runs(found: list[Stage]) -> list[Run]:
    return [step for stage in found for step in stage.steps if isinstance(step, Run)]


@every_form
def test_an_image_begins_with_what_hands_on_signals(folder: str, arguments: dict[str, str]) -> None:
    last = read(folder, arguments)[-1]
    first, separator, program = last.entrypoint
    assert (first, separator) == ("tini", "--")
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert ENTRY_POINTS[f"kvasir-{folder}"] == (program,)  # what the end-to-end tests' nodes start
    installs = [step.command for step in runs([last]) if "apt-get install" in step.command]
    assert any(re.search(r"\btini\b", command) for command in installs)


@every_form
def test_an_image_is_what_pods_ask_for(folder: str, arguments: dict[str, str]) -> None:
    last = read(folder, arguments)[-1]
    assert last.user == f"{USER_ID}:{USER_ID}"
    assert last.environment["PATH"].startswith("/opt/kvasir/bin:")
    assert last.environment.get("KVASIR_CACHE", CACHE_PATH) == CACHE_PATH
    refuse_unknown(last.environment)


@every_form
def test_a_builder_is_sent_what_is_copied(folder: str, arguments: dict[str, str], tmp_path: Path) -> None:
    make_context(ROOT, tmp_path)
    found = read(folder, arguments)
    copies = [step for stage in found for step in stage.steps if isinstance(step, Copy)]
    sources = [source for step in copies if not step.stage for source in step.sources]
    assert sources
    assert [source for source in sources if not (tmp_path / source).exists()] == []
    assert not [path for path in tmp_path.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]
    # What the package is built of is there: its version, readme and modules.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", project["project"]["readme"], *(name.split("/")[0] for name in packages)}
    assert needed <= set(sources)


@every_form
def test_commands_are_a_shells_and_name_variables_that_are_set(folder: str, arguments: dict[str, str]) -> None:
    for step in runs(read(folder, arguments)):
        done = subprocess.run(["sh", "-n", "-c", step.command], capture_output=True, text=True, check=False)
        assert not done.returncode, f"line {step.line}: {done.stderr}"
        named = set(re.findall(r"\$\{?([A-Za-z_]\w*)", step.command))
        assigned = set(re.findall(r"([A-Za-z_]\w*)=", step.command))
        assert named - assigned <= set(step.environment), f"line {step.line}"


def test_the_stages_of_an_image_have_the_base_that_was_asked_for() -> None:
    assert [stage.base for stage in read("engine", CPU)] == [PYTHON, PYTHON]
    assert [stage.base for stage in read("operator", {"BASE": "x@sha256:0"})] == ["x@sha256:0"] * 2
    assert all(stage.base.startswith("nvidia/cuda:") for stage in read("engine", {}))


WHOLE = r"""
# a comment
ARG BASE=debian:12
FROM ${BASE} AS build
ARG MORE
ARG WHAT=$MORE-tools
WORKDIR /src
WORKDIR deep
ENV A=1 B="two words" PATH=/opt:$PATH
RUN echo one && \
    # a comment between
    echo $WHAT
COPY a b ./
COPY a named

FROM debian:13
ENV A=$PATH
COPY --from=build /src /dst
USER 7:8
EXPOSE 80 443
ENTRYPOINT ["one", "two"]
"""


def test_a_dockerfile_becomes_steps_with_every_variable_replaced() -> None:
    first, last = stages(WHOLE, {"MORE": "build"}, {"PATH": "/bin"})
    seen = {"MORE": "build", "WHAT": "build-tools", "A": "1", "B": "two words", "PATH": "/opt:/bin"}
    assert first.base == "debian:12"
    assert first.steps == [
        MakeFolder("/src"),
        MakeFolder("/src/deep"),
        Run("echo one &&     echo $WHAT", seen, "/src/deep", "0:0", 10),
        Copy(("a", "b"), "/src/deep/", "", 13),
        Copy(("a",), "/src/deep/named", "", 14),
    ]
    assert last.environment == {"PATH": "/bin", "A": "/bin"}
    assert last.steps == [Copy(("/src",), "/dst", "build", 18)]
    assert (last.user, last.ports, last.entrypoint) == ("7:8", [80, 443], ("one", "two"))


def test_a_stage_may_begin_with_another() -> None:
    text = 'FROM a AS one\nENV X=1\nWORKDIR /w\nUSER 1:1\nENTRYPOINT ["e"]\nFROM one\nARG Y=$X\nRUN $Y'
    last = stages(text, {}, {})[-1]
    assert (last.base, last.directory, last.user, last.entrypoint) == ("one", "/w", "1:1", ("e",))
    assert last.steps == [Run("$Y", {"X": "1", "Y": "1"}, "/w", "1:1", 8)]


REFUSED = {
    "nothing": ("", "line 1: there is no FROM"),
    "an instruction that is not known": ("FROM a\nHEALTHCHECK NONE", "line 2: HEALTHCHECK is not understood"),
    "a small letter": ("from a", "line 1: from is not understood"),
    "a name of Python's": ("FROM a\nREAD x", "line 2: READ is not understood"),
    "a command": ('FROM a\nCMD ["x"]', "line 2: CMD is not understood"),
    "before FROM": ("RUN x", "line 1: RUN before FROM"),
    "nothing said": ("FROM a\nRUN", "line 2: RUN says nothing"),
    "a directive": ("# syntax=docker/dockerfile:1\nFROM a", "line 1: parser directives are not understood"),
    "a here-document": ("FROM a\nRUN cat <<E\nx\nE", "line 2: here-documents are not understood"),
    "no end": ("FROM a\nRUN x \\", "line 2: the last line goes on after a backslash"),
    "a variable without value": ("FROM a\nWORKDIR /$X", "line 2: X has no value"),
    "a default in a variable": ("FROM a\nENV X=${Y:-1}", "line 2: ${Y:-1} is not understood"),
    "a dollar alone": ("FROM a\nENV X=a$", "line 2: $ is not understood"),
    "an argument of another stage": ("FROM a\nARG X=1\nFROM b\nWORKDIR $X", "line 4: X has no value"),
    "a global argument in a stage": ("ARG X=1\nFROM a\nWORKDIR $X", "line 3: X has no value"),
    "a platform": ("FROM --platform=linux/amd64 a", "line 1: FROM takes IMAGE or IMAGE AS NAME"),
    "a stage twice": ("FROM a AS x\nFROM b AS x", "line 2: there is a stage x before"),
    "an argument's name": ("FROM a\nARG a-b=1", "line 2: ARG takes NAME or NAME=VALUE"),
    "two arguments": ("FROM a\nARG A=1 B=2", "line 2: ARG takes NAME or NAME=VALUE"),
    "a mount": ("FROM a\nRUN --mount=type=cache,target=/x y", "line 2: RUN takes a command line, without options"),
    "a list to run": ('FROM a\nRUN ["x"]', "line 2: RUN takes a command line, without options"),
    "an owner": ("FROM a\nCOPY --chown=1:1 a b", "line 2: COPY takes SOURCE... TARGET, and of options --from"),
    "one word": ("FROM a\nCOPY a", "line 2: COPY takes SOURCE... TARGET, and of options --from"),
    "an unknown stage": ("FROM a\nCOPY --from=other a b", "line 2: there is no stage other before"),
    "itself": ("FROM a AS me\nCOPY --from=me a b", "line 2: there is no stage me before"),
    "several into a file": ("FROM a\nCOPY a b c", "line 2: c has to end with / for several sources"),
    "a pattern": ("FROM a\nCOPY *.py d/", "line 2: *.py is not understood"),
    "out of the context": ("FROM a\nCOPY ../x d/", "line 2: ../x is not understood"),
    "ENV with a space": ("FROM a\nENV A 1", "line 2: ENV takes NAME=VALUE"),
    "a dollar as it is": ("FROM a\nENV A='$B'", "line 2: of quotes ENV takes double ones"),
    "a backslash": ("FROM a\nWORKDIR /\\$X", "line 2: \\ is not understood"),
    "an open quote": ('FROM a\nENV A="1', "line 2: No closing quotation"),
    "a user's name": ("FROM a\nUSER nobody", "line 2: USER takes UID:GID"),
    "a port's name": ("FROM a\nEXPOSE http", "line 2: http is no port"),
    "a port beyond": ("FROM a\nEXPOSE 65536", "line 2: 65536 is no port"),
    "a shell's entry point": ("FROM a\nENTRYPOINT kvasir", "line 2: ENTRYPOINT takes a list"),
    "numbers to enter": ("FROM a\nENTRYPOINT [1]", "line 2: ENTRYPOINT takes a list"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_its_line(text: str, message: str) -> None:
    with pytest.raises(DockerfileError, match=re.escape(message)):
        stages(text, {}, {})


def test_an_argument_that_no_arg_declares_is_refused() -> None:
    with pytest.raises(DockerfileError, match="no ARG EXTRA"):
        stages("ARG EXTRAS=1\nFROM a", {"EXTRA": "engine"}, {})


@pytest.mark.parametrize("text", ["", ".git", "*\n!a/b", "*\n!*.py", "*\ndist", "*\n**/x/y", "*\n**/x\n!a"])
def test_a_dockerignore_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ContextError):
        taken(text)


def test_a_dockerignore_takes_what_it_names() -> None:
    assert taken("# why\n*\n!a\n!b.txt\n**/*.pyc\n") == ({"a", "b.txt"}, ("*.pyc",))
