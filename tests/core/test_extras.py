"""An installation without an extra says so, in one line, where it would show a traceback."""

import subprocess
import sys

import pytest

from kvasir_engine.extras import explain

REQUIRED = [
    "httpx>=0.27",
    "prometheus-client>=0.20; extra == 'engine'",
    "llguidance>=1.9.1; extra == 'engine'",
    'kopf>=1.38; extra == "operator"',
    "prometheus-client>=0.20 ; extra == 'operator'",
]


@pytest.mark.parametrize(
    ("module", "preferred", "extra"),
    [
        ("llguidance", "engine", "engine"),
        ("llguidance.hf", "operator", "engine"),
        ("prometheus_client", "engine", "engine"),
        ("prometheus_client", "operator", "operator"),
        ("kopf", "engine", "operator"),
    ],
)
def test_a_package_of_an_extra_is_named_with_it(module: str, preferred: str, extra: str) -> None:
    package = module.partition(".")[0].replace("_", "-")
    assert str(explain(ModuleNotFoundError(name=module), preferred, REQUIRED)) == (
        f"{package} is not installed: it comes with `pip install kvasir[{extra}]`, and is in the {extra}'s image"
    )


@pytest.mark.parametrize("module", ["httpx", "kvasir_engine.typo", "kop", "other", "", None])
def test_any_other_module_that_is_not_there_is_a_fault(module: str | None) -> None:
    assert explain(ModuleNotFoundError(name=module), "engine", REQUIRED) is None


@pytest.mark.parametrize(
    ("module", "program", "arguments", "error"),
    [
        ("uvicorn", "kvasir_engine.entrypoints.main", ["serve", "package://x"], "kvasir: error: uvicorn"),
        ("kopf", "kvasir_operator.entrypoint", ["crd"], "kvasir-operator: error: kopf"),
    ],
)
def test_a_program_without_its_extra_ends_with_one_line(
    module: str, program: str, arguments: list[str], error: str
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from {program} import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{error} is not installed: it comes with `pip install kvasir[")
    assert done.stderr.count("\n") == 1
