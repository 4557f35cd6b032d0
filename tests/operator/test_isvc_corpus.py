"""An upgrade of the operator rolls no pod of a service that is there, unless that is declared."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from kvasir_operator.admission import parse
from kvasir_operator.api.validation import semantic_problems
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.render.options import DEFAULTS

CORPUS = Path(__file__).parent / "corpus"


def load() -> ModuleType:
    found = importlib.util.spec_from_file_location("corpus_freeze", CORPUS / "freeze.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


freeze = load()


@pytest.mark.parametrize("defaults", range(1, DEFAULTS + 1))
def test_pods_are_what_was_declared_last(defaults: int) -> None:
    """Also those of services that keep the defaults that they were made with."""
    last = freeze.last(defaults)
    rendered = freeze.rendered(defaults)
    rolled = [
        f"{case} {role}"
        for case in rendered
        for role in rendered[case]
        if last.get(case, {}).get(role) != rendered[case][role]
    ]
    assert not rolled, (
        f"an upgrade would roll the pods of {', '.join(rolled)}. Where that must be: "
        'python tests/operator/corpus/freeze.py "why"'
    )
    assert set(last) == set(rendered)


def test_pods_of_what_users_write_are_what_was_frozen() -> None:
    frozen = yaml.safe_load(freeze.USERS.read_text())
    assert len(frozen[DEFAULTS]) >= 60
    assert frozen == freeze.users_revisions(), 'python tests/operator/corpus/freeze.py "why"'


def test_every_declaration_has_a_reason_and_changed_something() -> None:
    entries = freeze.declared()
    assert all(len(entry["why"]) > 10 for entry in entries)
    for defaults in range(1, DEFAULTS + 1):
        revisions = [entry["revisions"] for entry in entries if entry.get("defaults", 1) == defaults]
        assert all(before != after for before, after in pairwise(revisions))


@pytest.mark.parametrize("path", freeze.cases(), ids=lambda path: path.stem)
def test_what_an_older_operator_took_is_taken(path: Path) -> None:
    assert not list(semantic_problems(parse(yaml.safe_load(path.read_text()), policy=UNRESTRICTED)))


def test_the_corpus_shows_a_change_of_any_role() -> None:
    """It can fail: another image is another revision of every pod."""
    assert all(set(roles) == {"prefill", "decode", "router"} for roles in freeze.rendered().values())
    before = freeze.rendered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "OPTIONS", type(freeze.OPTIONS)(engine_image="another"))
        after = freeze.rendered()
    assert all(before[case][role] != after[case][role] for case in before for role in before[case])
