"""From a pod bound to a node to what `PodRunner` and `sandbox.py` are given: volumes, credentials, one honest lie.

`PodRunner` would rewrite mount paths, as it has no mount namespace. Here the sandbox mounts volumes at their real
paths, so the pod handed to the runner has its volumes taken out and its commands run as they were rendered.
"""

import base64
import copy
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from e2e import netns
from e2e.node.api import Api, ApiError
from e2e.node.config import EMULATED_DEVICE, Config, Node
from kvasir_engine.private_folders import private_folder, run_folder
from kvasir_operator.pods import Host, Image, PodError, podspec, volumes

Object = dict[str, Any]

#: A pod's hosts file, below its folder.
HOSTS = Path("etc/hosts")
#: Compiled kernels, which a pod would keep in its own /tmp: 13 seconds of a core at each start of a worker. They
#: are this user's own, which other tests have compiled already.
KERNELS = "/var/lib/kvasir-kernels"
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TOKEN_SECONDS = 24 * 3600
_CAPABILITIES = {"NET_BIND_SERVICE": 10, "IPC_LOCK": 14, "SYS_PTRACE": 19, "SYS_NICE": 23}
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def environment() -> dict[str, str]:
    """What every container starts from: the checkout's commands on PATH, and the API server's Service."""
    commands = Path(sys.executable).parent
    return {
        "PATH": f"{commands}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "NUMBA_CACHE_DIR": KERNELS,
        "OMP_NUM_THREADS": "1",  # in place of the cgroup that would keep a pod to its share of the cores
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
    }


#: What the images' entry points start, by the images' names, without tini.
ENTRY_POINTS = {"kvasir-engine": ("kvasir",), "kvasir-operator": ("kvasir-operator",)}


def image() -> list[str]:
    """Folders that stand for the image: this interpreter, its environment, and the checkout."""
    paths = {sys.prefix, sys.base_prefix, *(path for path in sys.path if Path(path).is_dir())}
    paths = {str(Path(path).resolve()) for path in paths}
    return sorted(path for path in paths if not any(path.startswith(f"{other}/") for other in paths))


def _referenced(spec: Mapping[str, Any], kind: str) -> set[str]:
    """Names of the secrets or config maps that a pod's volumes and environment refer to. Raises PodError."""
    volume, name, source, whole = {
        "secrets": ("secret", "secretName", "secretKeyRef", "secretRef"),
        "configmaps": ("configMap", "name", "configMapKeyRef", "configMapRef"),
    }[kind]
    found = {v[volume][name] for v in spec.get("volumes") or () if volume in v}
    for container in spec["containers"]:
        found |= {
            e["valueFrom"][source]["name"] for e in container.get("env") or () if source in e.get("valueFrom", {})
        }
        found |= {e[whole]["name"] for e in container.get("envFrom") or () if whole in e}
    return found


async def _data(api: Api, namespace: str, kind: str, names: set[str]) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name in names:
        item = await api.find(f"/api/v1/namespaces/{namespace}/{kind}/{name}")
        if item is None:
            continue
        plain = {} if kind == "secrets" else {k: v.encode() for k, v in (item.get("data") or {}).items()}
        encoded = item.get("data") if kind == "secrets" else item.get("binaryData")
        found[name] = plain | {k: base64.b64decode(v) for k, v in (encoded or {}).items()}
    return found


async def _claims(api: Api, namespace: str, spec: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of the claims that a pod's volumes name. Raises PodError for one that is bound to no folder."""
    found: dict[str, Path] = {}
    for volume in spec.get("volumes") or ():
        if not (source := volume.get("persistentVolumeClaim")):
            continue
        name = source["claimName"]
        claim = await api.find(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
        bound = (claim or {}).get("spec", {}).get("volumeName")
        target = await api.find(f"/api/v1/persistentvolumes/{bound}") if bound else None
        if target is None or "hostPath" not in target["spec"]:
            raise PodError(f"persistentvolumeclaim {name!r} is not bound to a hostPath volume")
        found[name] = Path(target["spec"]["hostPath"]["path"])
    return found


async def _credentials(api: Api, pod: Object, config: Config, folder: Path) -> Path:
    """A token bound to the pod, the authority's certificate and the namespace, as files. Raises PodError."""
    meta, account = pod["metadata"], pod["spec"].get("serviceAccountName") or "default"
    reference = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [], "expirationSeconds": _TOKEN_SECONDS, "boundObjectRef": reference},
    }
    path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
    try:
        answer = await api.request("POST", path, request)
    except ApiError as error:
        raise PodError(f"token of service account {account!r}: {error}") from error
    _write(
        folder,
        {
            "token": answer["status"]["token"],
            "ca.crt": config.ca.read_text(),
            "namespace": meta["namespace"],
        },
    )
    return folder


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, text in files.items():
        (folder / name).write_text(text)


def emulate(container: Object, device: str) -> None:
    """Turn `--device cuda` of a rendered container into `--device DEVICE`; nothing else is changed.

    This is where the test departs from what was rendered: the pod was scheduled as one with GPUs, and this machine
    has none.
    """
    args = container.get("args") or []
    for i, arg in enumerate(args):
        if arg == "--device=cuda":
            args[i] = f"--device={device}"
        elif arg == "cuda" and i and args[i - 1] == "--device":
            args[i] = device
    for entry in container.get("env") or ():
        if entry["name"] == "KVASIR_DEVICE" and entry.get("value") == "cuda":
            entry["value"] = device


def quantity(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    digits = text.rstrip("kMGi")
    return int(float(digits) * _SUFFIXES[text[len(digits) :]])


def _capabilities(container: Mapping[str, Any]) -> list[int] | None:
    wanted = (container.get("securityContext") or {}).get("capabilities") or {}
    if "ALL" not in (wanted.get("drop") or ()):
        return None
    return [_CAPABILITIES[name] for name in wanted.get("add") or ()]


def _hosts(pod: Object, ip: str, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """/etc/hosts as a kubelet writes it (`names.py` adds to it), and no name server: there is none to ask."""
    files = {
        HOSTS.name: f"127.0.0.1 localhost\n{ip} {pod['metadata']['name']}\n",
        "resolv.conf": "options attempts:1\n",
    }
    _write(folder, files)
    for name in files:
        yield str(folder / name), f"/etc/{name}", True


async def prepare(
    api: Api, config: Config, node: Node, pod: Object, ip: str, host_ip: str, namespace: str, state: Path
) -> tuple[Object, Host, list[str]]:
    """The pod for the runner, the machine as it sees it, and the prefix of its commands. Raises PodError."""
    if len(pod["spec"]["containers"]) != 1:
        raise PodError("this node agent runs pods of one container")
    plain = copy.deepcopy(pod)
    spec, container = plain["spec"], plain["spec"]["containers"][0]
    if device := node.labels.get(EMULATED_DEVICE):
        emulate(container, device)

    mounts: list[tuple[str, str, bool]] = list(_hosts(pod, ip, state / HOSTS.parent))
    kernels = private_folder(run_folder() / "kernels")
    mounts.append((str(kernels), KERNELS, False))
    rest = []
    for mount in container.pop("volumeMounts", None) or []:
        if mount["mountPath"] == SERVICE_ACCOUNT:
            folder = await _credentials(api, pod, config, state / "serviceaccount")
            mounts.append((str(folder), SERVICE_ACCOUNT, True))
        else:
            rest.append(mount)
    data = {
        kind: await _data(api, pod["metadata"]["namespace"], kind, _referenced(spec, kind))
        for kind in ("secrets", "configmaps")
    }
    entry = ENTRY_POINTS.get(re.split("[:@]", container["image"].rpartition("/")[2])[0])
    host = Host(
        images={container["image"]: Image(entry)} if entry else {},
        volumes=config.volumes,
        secrets=data["secrets"],
        config_maps=data["configmaps"],
        claims=await _claims(api, pod["metadata"]["namespace"], spec),
        environ=environment(),
        node_name=node.name,
        host_ip=host_ip,
    )
    tmpfs = _memory(spec, rest)
    on_disk = [mount for mount in rest if mount["mountPath"] not in {target for target, _ in tmpfs}]
    described = {**plain, "spec": {**spec, "containers": [{**container, "volumeMounts": on_disk}]}}
    paths = volumes.materialise(podspec.parse(described), host, state)
    for mount in on_disk:
        source = paths[mount["name"]] / (mount.get("subPath") or "")
        if not source.exists():
            source.mkdir(parents=True)
        mounts.append((str(source), mount["mountPath"], bool(mount.get("readOnly"))))
    cwd = container.pop("workingDir", None) or "/"
    sandbox = {
        "netns": str(netns.DIRECTORY / namespace),
        "hostname": pod["metadata"]["name"][:63],
        "stage": str(state / "stage"),
        "read_only": bool((container.get("securityContext") or {}).get("readOnlyRootFilesystem")),
        "host_ipc": bool(spec.get("hostIPC")),
        "mounts": mounts,
        "tmpfs": tmpfs,
        "image": image(),
        "capabilities": _capabilities(container),
        "cwd": cwd,
    }
    (state / "stage").mkdir(parents=True, exist_ok=True)
    (state / "sandbox.json").write_text(json.dumps(sandbox))
    spec["volumes"] = []
    script = Path(__file__).with_name("sandbox.py")
    return plain, host, [sys.executable, "-I", "-S", str(script), str(state / "sandbox.json"), "--"]


def _memory(spec: Mapping[str, Any], mounts: list[Object]) -> list[tuple[str, str]]:
    """emptyDirs in memory, as mount path and size in bytes."""
    sources = {v["name"]: v["emptyDir"] for v in spec.get("volumes") or () if v.get("emptyDir")}
    found = []
    for mount in mounts:
        source = sources.get(mount["name"]) or {}
        if source.get("medium") == "Memory":
            limit = source.get("sizeLimit")
            found.append((mount["mountPath"], str(quantity(limit)) if limit else ""))
    return found
