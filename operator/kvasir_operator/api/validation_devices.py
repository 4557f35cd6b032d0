"""What a schema cannot say about the devices of a role: how many GPUs, or of what in their place. Pure."""

import re
from collections.abc import Iterator
from decimal import Decimal

from kvasir_engine.quantity import amount
from kvasir_operator.api.devices import GPU, SLICE, whole_gpus
from kvasir_operator.api.structural_schema import Invalid, join
from kvasir_operator.api.workers import Workers


def device_problems(workers: Workers, path: str) -> Iterator[Invalid]:
    """Problems of the GPUs that a role asks for, or of what it asks for in their place."""
    for field in ("requests", "limits"):
        amounts: dict[str, int | str] = getattr(workers.resources, field)
        slices = [name for name in amounts if re.fullmatch(SLICE, name)]
        counts = (workers.ranks_per_pod, 0) if not whole_gpus(workers) else (workers.ranks_per_pod,)
        for name in amounts:
            where = join(f"{path}.resources.{field}", name)
            if name != GPU and name not in slices:
                continue
            if workers.device == "cpu":
                yield Invalid(where, "a role with device cpu asks for no GPU")
            elif name == GPU and amount(amounts[name]) not in counts:
                yield Invalid(where, _ranks(workers, str(amounts[name])))
        count = sum((amount(amounts[each]) or Decimal(0) for each in slices), Decimal(0))
        if slices and workers.device == "cuda" and count != workers.ranks_per_pod:
            yield Invalid(join(f"{path}.resources.{field}", slices[0]), _ranks(workers, str(count)))


def _ranks(workers: Workers, found: str) -> str:
    whose = "tensorParallel" if workers.nodes == 1 else "tensorParallel / nodes"
    return f"must equal {whose}, {workers.ranks_per_pod}, or be left out; is {found}"
