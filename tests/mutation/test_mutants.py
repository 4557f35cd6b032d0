"""The seeded faults still fit the code, and the suites still find them: all of them in the soak, a few always."""

import ast

import pytest
from check import PACKAGE, check, main
from mutants import MUTANTS, Mutant

ALWAYS = (
    "a fenced lease is freed after 30 s",
    "Stopped is sent while a write is under way",
    "a push does not hold its pages",
)


def test_every_fault_is_in_the_code_exactly_once_and_leaves_it_python() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24
    for mutant in MUTANTS:
        text = (PACKAGE / mutant.file).read_text()
        mutated = mutant.apply(text)
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text)), mutant.name


@pytest.mark.parametrize("name", ALWAYS)
def test_a_fault_is_caught(name: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    (outcome,) = check([mutant])
    assert outcome.caught, outcome.trouble or f"survived: {name}"


def test_a_change_that_is_no_fault_survives_and_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmless = Mutant("only a comment", "kv/hashing.py", "TOKEN_BYTES = 4\n", "TOKEN_BYTES = 4  # a comment\n")
    monkeypatch.setattr("check.MUTANTS", [harmless])
    monkeypatch.setattr("check.SUITES", ("tests/kv",))
    monkeypatch.setattr("sys.argv", ["check.py"])
    assert main() == 1
    assert "SURVIVED" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_fault_is_caught() -> None:
    bad = [f"{o.mutant.name}: {o.trouble or 'survived'}" for o in check(MUTANTS, jobs=2) if not o.caught]
    assert not bad, "\n".join(bad)
