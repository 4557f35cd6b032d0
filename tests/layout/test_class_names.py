"""Two classes have one name only where they are one thing, or the frames of two protocols."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "engine" / "kvasir_engine", ROOT / "operator" / "kvasir_operator")

# A type of the InferenceService's spec has the name of its field.
SPEC = {"Drain", "Engine", "Placement"}
ALLOWED: dict[str, str] = {
    **dict.fromkeys(SPEC, "a type of the spec, by its field"),
    "Abort": "the frame, and what can be read of a bad one",
    "Step": "the frame, and what can be read of a bad one",
    "Leased": "the frame, and what can be read of a bad one",
    "Reserve": "the frame, and what can be read of a bad one",
    "Submit": "the frame, and what can be read of a bad one",
    "Failed": "tags: a lease that failed, and an event of `up`",
}


def classes() -> dict[str, list[str]]:
    """The files of each class at the top of a module, by name."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(str(path.relative_to(ROOT)))
    return found


def test_no_two_classes_of_different_meaning_have_one_name() -> None:
    doubled = {name: files for name, files in classes().items() if len(files) > 1 and name not in ALLOWED}
    assert doubled == {}


def test_each_allowed_name_is_still_that_of_two_classes() -> None:
    found = classes()
    assert [name for name in ALLOWED if len(found.get(name, [])) < 2] == []
