"""What docs, docstrings and comments say of files, folders and import rules is what there is."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"(?<![\w./*$-])([\w./*-]*[\w*]\.py)\b")
FOLDER = re.compile(r"`((?:[\w-]+/)+)`")
MODULE = re.compile(r"\bkvasir_(?:engine|operator)(?:\.[a-z_]+)+")
# Files of other projects, named as the source of a fact.
ELSEWHERE = {"encoder.py", "convert_hf_to_gguf.py", "boolean.py"}
READ = {".md", ".py", ".toml", ".yaml", ".sh", ".tpl", ".txt", "Makefile", "Dockerfile"}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


FILES = tracked() if (ROOT / ".git").exists() else []
PYTHON = [name for name in FILES if name.endswith(".py")]
FOLDERS = {f"{parent}/" for name in FILES for parent in Path(name).parents if str(parent) != "."}


def texts() -> Iterator[tuple[str, int, str]]:
    """Each line that speaks of the tree: docs, charts, and code; tests make files of their own and are left out."""
    for name in FILES:
        path = ROOT / name
        if (path.suffix or path.name) in READ and not name.startswith(("tests/", "e2e/")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                yield name, number, line


def is_there(mentioned: str, among: list[str] | set[str]) -> bool:
    """Whether a name, with or without folders before it, is one of these paths; `*` is any text."""
    return any(fnmatch(path, mentioned) or fnmatch(path, f"*/{mentioned}") for path in among)


pytestmark = pytest.mark.skipif(not FILES, reason="not a git checkout")


def test_each_file_that_is_mentioned_exists() -> None:
    wrong = [
        f"{name}:{number}: {mentioned}"
        for name, number, line in texts()
        for mentioned in FILE.findall(line)
        if mentioned not in ELSEWHERE and not is_there(mentioned, PYTHON)
    ]
    assert wrong == []


def test_each_folder_in_the_docs_exists() -> None:
    wrong = [
        f"{name}:{number}: {mentioned}"
        for name, number, line in texts()
        if name.endswith(".md")
        for mentioned in FOLDER.findall(line)
        if not is_there(mentioned, FOLDERS)
    ]
    assert wrong == []


def test_each_module_in_docs_charts_and_images_exists() -> None:
    def exists(module: str) -> bool:
        parts = module.split(".")
        base = "engine" if parts[0] == "kvasir_engine" else "operator"
        # the last part may be a name within the module
        return any(
            (ROOT / base / Path(*tried)).with_suffix(".py").is_file()
            or (ROOT / base / Path(*tried) / "__init__.py").is_file()
            for tried in (parts, parts[:-1])
            if len(tried) > 1
        )

    wrong = [
        f"{name}:{number}: {module}"
        for name, number, line in texts()
        for module in MODULE.findall(line)
        if not name.startswith("bench/") and not exists(module)
    ]
    assert wrong == []


# -- CONTRIBUTING


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def folders_of(package: str) -> set[str]:
    inside = {name.removeprefix(f"{package}/") for name in PYTHON if name.startswith(f"{package}/")}
    return {name.split("/")[0] for name in inside if "/" in name}


@pytest.mark.parametrize("package", ["engine/kvasir_engine", "operator/kvasir_operator"])
def test_the_folder_table_of_contributing_is_the_tree(package: str) -> None:
    rows = re.findall(rf"^\| `{package}/([\w]+)/` \|", section("Folders"), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == folders_of(package)


def test_contributing_names_each_folder_at_the_top() -> None:
    top = {name.split("/")[0] for name in FILES if "/" in name and not name.startswith(".")}
    rows = set(re.findall(r"`(\w+)/", section("Folders")))
    assert top <= rows, top - rows


def test_the_import_rules_of_contributing_are_the_contracts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    rules = section("Import rules")
    named = re.findall(r"^- \*\*(.+?)\*\*", rules, re.MULTILINE)
    assert named == [contract["name"] for contract in contracts]
    for contract in contracts:
        if contract["type"] == "layers":
            layers = [layer.replace(" | ", ", ") for layer in contract["layers"]]
            assert " > ".join(layers) in " ".join(rules.split()), contract["name"]
