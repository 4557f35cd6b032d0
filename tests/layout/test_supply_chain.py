"""What the images are made of is named so that nobody can put something else in its place."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from licenses import closure
from locks import FOLDER, LOCKS, ROOT, Lock, requirements, torch_version
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINE = re.compile(r"([a-z0-9-]+)==(\S+)((?: --hash=sha256:[0-9a-f]{64})+)")
DIGEST = re.compile(r"\S+@sha256:[0-9a-f]{64}")
DOCKERFILES = ("engine/Dockerfile", "operator/Dockerfile")
COMMIT = re.compile(r"@[0-9a-f]{40}$")


def locked(lock: Lock) -> dict[str, str]:
    """The versions of a lock by name; every line has a hash."""
    lines = (FOLDER / f"{lock.name}.txt").read_text().splitlines()
    packages = [each for each in lines if not each.startswith(("#", "--extra-index-url "))]
    found = [LINE.fullmatch(each) for each in packages]
    assert all(found), [line for line, match in zip(packages, found, strict=True) if not match]
    return {match[1]: match[2] for match in found if match}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_an_image_installs_the_versions_that_the_tests_ran_with_and_all_that_it_needs(lock: Lock) -> None:
    found, tested = locked(lock), constraints()
    different = {
        name: (version, tested[name])
        for name, version in found.items()
        if name in tested and version.partition("+")[0] != tested[name]
    }
    assert not different, "make locks"
    wanted = {canonicalize_name(Requirement(each).name) for each in requirements(lock)}
    assert wanted <= found.keys(), "make locks"
    image = "operator" if lock.name == "operator" else "engine"
    assert closure(image) <= found.keys(), "make locks"


def test_torch_for_cpus_is_pytorchs_own_build_and_for_gpus_the_indexs() -> None:
    versions = {lock.name: locked(lock).get("torch") for lock in LOCKS}
    torch = torch_version()
    assert versions == {"operator": None, "engine": f"{torch}+cpu", "engine-cuda": torch}
    assert not [name for name in locked(LOCKS[2]) if name.startswith("nvidia-")]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_an_image_takes_bases_by_digest_and_packages_by_hash(path: str) -> None:
    text = (ROOT / path).read_text().replace("\\\n", " ")
    bases = dict(re.findall(r"^ARG (BASE|RUNTIME)=(\S+)$", text, flags=re.M))
    assert bases
    assert all(map(DIGEST.fullmatch, bases.values())), bases
    assert {each.strip("${}") for each in re.findall(r"^FROM (\S+)", text, flags=re.M)} == set(bases)
    installs = re.findall(r"pip install[^&;\n]*", text)
    assert installs
    for each in installs:
        assert "--require-hashes" in each or "--no-deps --no-build-isolation ." in each, each


@pytest.mark.parametrize("path", DOCKERFILES)
@pytest.mark.parametrize(
    ("base", "unpinned", "taken"),
    [("a:1", "no", False), ("a:1@sha256:0", "no", True), ("a:1", "yes", True), ("", "no", False)],
)
def test_a_base_without_a_digest_is_refused_unless_it_is_asked_for(
    path: str, base: str, unpinned: str, taken: bool
) -> None:
    (check,) = re.findall(r"^RUN (case \"\$\{UNPINNED\}.*esac)$", (ROOT / path).read_text(), flags=re.M)
    given = {"BASE": base, "RUNTIME": base, "UNPINNED": unpinned}
    found = subprocess.run(["sh", "-c", check], env=given, capture_output=True, text=True)
    assert (found.returncode == 0) == taken
    assert taken or "by digest" in found.stderr


def test_an_engine_of_which_one_base_has_a_digest_is_refused() -> None:
    (check,) = re.findall(r"^RUN (case.*UNPINNED.*esac)$", (ROOT / "engine/Dockerfile").read_text(), flags=re.M)
    for one, other in (("a@sha256:0", "b"), ("a", "b@sha256:0")):
        given = {"BASE": one, "RUNTIME": other, "UNPINNED": "no"}
        assert subprocess.run(["sh", "-c", check], env=given, capture_output=True).returncode == 1


def test_models_in_examples_are_named_by_commit() -> None:
    pages = [*ROOT.glob("manifests/**/*.yaml"), *ROOT.glob("examples/**/*"), *ROOT.glob("bench/*.yaml")]
    pages += [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    found = {
        (page.name, uri)
        for page in pages
        if page.is_file()
        for uri in re.findall(r"hf://[\w.-]+/[\w.@-]+", page.read_text(errors="ignore"))
        if "hf://org/name" not in uri
    }
    assert len(found) >= 3
    assert not [each for each in found if not COMMIT.search(each[1])]


def test_the_bill_of_materials_has_every_package_of_the_images(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    command = (ROOT / "Makefile").read_text()
    (words,) = re.findall(r"cyclonedx-py (environment .*) --output-file", command)
    words = words.replace("$(BIN)/python", sys.executable).split()
    tool = "import sys; from cyclonedx_py._internal.cli import run; sys.exit(run())"
    subprocess.run([sys.executable, "-c", tool, *words, "--output-file", str(made)], check=True, cwd=ROOT)
    bill = json.loads(made.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "kvasir"
    named = {canonicalize_name(each["name"]): each["version"] for each in bill["components"]}
    assert closure("engine") | closure("operator") <= named.keys()
    for name, version in constraints().items():
        if name in closure("operator"):
            assert named[name] == version
