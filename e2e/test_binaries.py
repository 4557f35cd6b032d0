"""The programs' cache: whole toolsets or none, however often it runs and wherever it was cut off."""

import threading
import time
from pathlib import Path

import pytest

from e2e.controlplane import binaries, build
from e2e.controlplane.binaries import Toolset, ensure


def _program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_two_runs_at_once_make_a_toolset_once(tmp_path: Path) -> None:
    made: list[Path] = []
    running = threading.Event()

    def make(work: Path, out: Path) -> None:
        made.append(out)
        running.set()
        time.sleep(0.1)  # the other run arrives at the lock meanwhile, or later: both are right
        _program(out / "tool")

    toolset = Toolset("tools", ("tool",), make)
    other = threading.Thread(target=ensure, args=(toolset, tmp_path))
    other.start()
    running.wait()
    assert ensure(toolset, tmp_path) == tmp_path / "tools"
    other.join()
    assert len(made) == 1


def test_a_failed_build_leaves_nothing_that_passes_for_a_toolset(tmp_path: Path) -> None:
    def broken(work: Path, out: Path) -> None:
        _program(out / "first")
        raise build.BuildError("no second")

    programs = ("first", "second")
    with pytest.raises(build.BuildError, match="no second"):
        ensure(Toolset("tools", programs, broken), tmp_path)
    assert not (tmp_path / "tools").exists()

    def works(work: Path, out: Path) -> None:
        for program in programs:
            _program(out / program)

    (tmp_path / "tools.new-killed" / "out").mkdir(parents=True)
    ensure(Toolset("tools", programs, works), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tools", "tools.lock"]


def test_a_build_that_leaves_a_program_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="left out one of tool"):
        ensure(Toolset("tools", ("tool",), lambda work, out: None), tmp_path)


def test_assets_are_used_when_they_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        _program(tmp_path / program)
    cache = tmp_path / "cache"
    helm = cache / binaries.HELM.folder
    helm.mkdir(parents=True)
    _program(helm / "helm")
    monkeypatch.setenv(binaries.ASSETS, str(tmp_path))
    monkeypatch.setenv("KVASIR_CACHE", str(cache))
    found = binaries.find()
    assert found.apiserver == tmp_path / "kube-apiserver"
    assert found.helm == helm / "helm"


def test_the_machines_own_mirror_comes_first(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian bookworm main\n"
        "deb [arch=amd64] https://mirror.example/debian/ trixie main\n"
        "deb https://other.example/tool stable main\n"
        "deb https://mirror.example/debian-security trixie-security main\n"
    )
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text("Types: deb\nURIs: http://second.example/debian\n")
    assert build.mirrors(tmp_path) == [
        "https://mirror.example/debian",
        "http://second.example/debian",
        "http://deb.debian.org/debian",
    ]
