"""Makes the operator's table of pod fields: `make pod-fields`, after a newer version of kubernetes-validate.

The table says of each type below a pod template what its fields are called and of what type they are.
"""

import json
from pathlib import Path
from typing import Any

from kube_schemas import VERSIONS, definitions

TABLE = Path(__file__).parents[2] / "operator/kvasir_operator/pod_validation/fields.json"
ROOT = "io.k8s.api.core.v1.PodTemplateSpec"
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
_PLAIN = {
    _QUANTITY: "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "int-or-string",
    "io.k8s.apimachinery.pkg.apis.meta.v1.Time": "string",
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1": "object",
}


def table() -> str:
    """The table as it is to stand in the file."""
    types: dict[str, Any] = definitions(VERSIONS[-1])["$defs"]
    found: dict[str, Any] = {}

    def type_of(schema: dict[str, Any]) -> str:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name in _PLAIN:
                return _PLAIN[name]
            add(name)
            return str(name.rpartition(".")[2])
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        (kind,) = set(kinds) - {"null"}
        if kind == "array":
            return f"[{type_of(schema['items'])}]"
        if "additionalProperties" in schema:
            return f"{{{type_of(schema['additionalProperties'])}}}"
        return str(kind)

    def add(name: str) -> None:
        short = name.rpartition(".")[2]
        if short in found:
            return
        schema = types[name]
        found[short] = {}
        for field, below in sorted(schema.get("properties", {}).items()):
            mark = "!" if field in schema.get("required", ()) else ""
            found[short][field] = type_of(below) + mark

    add(ROOT)
    lines = ",\n".join(f'"{name}": {json.dumps(fields)}' for name, fields in sorted(found.items()))
    return f'{{"kubernetes": "{VERSIONS[-1]}", "types": {{\n{lines}\n}}}}\n'


if __name__ == "__main__":
    TABLE.write_text(table())
