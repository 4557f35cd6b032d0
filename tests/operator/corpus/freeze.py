"""Declare that an upgrade rolls pods: `python tests/operator/corpus/freeze.py "why"`.

Each InferenceService of this folder is rendered, and the revisions of its pods are appended to `revisions.yaml`
with the reason. A test fails while what is rendered is not what was declared last: operators are upgraded while
models are served, and a pod that is rolled by surprise is a model that is loaded again.
"""

import sys
from pathlib import Path

import msgspec
import yaml

from kvasir_operator.api import parse
from kvasir_operator.api.kinds import SET_KIND
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.names import REVISION_LABEL, ROLE_LABEL
from kvasir_operator.render.options import DEFAULTS

HERE = Path(__file__).parent
DECLARED = HERE / "revisions.yaml"
OPTIONS = Options(engine_image="registry.example/kvasir-engine:frozen", operator_namespace="kvasir-system")


def cases() -> list[Path]:
    """The frozen InferenceServices."""
    return sorted(path for path in HERE.glob("*.yaml") if path != DECLARED)


def rendered(defaults: int = DEFAULTS) -> dict[str, dict[str, str]]:
    """The revision of each role's pods, by case, of services that were made with these defaults."""
    options, found = msgspec.structs.replace(OPTIONS, defaults=defaults), {}
    for path in cases():
        objects = render(parse(yaml.safe_load(path.read_text())), options)
        templates = [_pods(o)["metadata"]["labels"] for o in objects if o["kind"] in ("Deployment", SET_KIND)]
        found[path.stem] = {labels[ROLE_LABEL]: labels[REVISION_LABEL] for labels in templates}
    return found


def _pods(item: Object) -> Object:
    """The template of a Deployment's pods, or of the leaders of a set, whose revision is that of all its pods."""
    spec = item["spec"]
    template: Object = spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["leaderTemplate"]
    return template


def declared() -> list[dict[str, object]]:
    """What was declared, the oldest first: `why`, `defaults` (without them 1) and `revisions`."""
    entries: list[dict[str, object]] = yaml.safe_load(DECLARED.read_text()) if DECLARED.exists() else []
    return entries


def main() -> None:
    """Append what is rendered now."""
    entry = {"why": sys.argv[1], "defaults": DEFAULTS, "revisions": rendered()}
    DECLARED.write_text(yaml.safe_dump([*declared(), entry], sort_keys=False, default_flow_style=None, width=110))


if __name__ == "__main__":
    main()
