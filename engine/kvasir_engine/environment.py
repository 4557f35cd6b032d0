"""The variables KVASIR_* that there are. One that is none of them is a mistake, and is refused."""

import difflib
import re
from collections.abc import Iterable, Mapping

from kvasir_engine.config import FIELDS, PREFIX
from kvasir_engine.errors import UserError

PROCESS = frozenset({"KVASIR_CACHE", "KVASIR_RUN_DIR", "KVASIR_FAULT", "KVASIR_TRITON_AHEAD"})
"""Those that are no flag and that every process reads, or that the image sets for all of them."""

ROUTER = frozenset(
    PREFIX + name
    for name in (
        "MODEL",
        "REVISION",
        "SERVED_MODEL_NAME",
        "MAX_LENGTH",
        "HOST",
        "PORT",
        "WORKER",
        "WATCH_PODS",
        "WATCH_OWNER",
        "NAMESPACE",
        "API_KEYS_FILE",
        "BATCH_DIR",
        "PARSE_SPECIAL_TOKENS",
        "TOOL_CALL_PARSER",
        "REASONING_PARSER",
        "REMOTE_THRESHOLD",
        "DRAIN_SECONDS",
        "HOLD_SECONDS",
        "HOLD_REQUESTS",
        "TLS_DIR",
        "PLAIN_WORKERS",
        "JSON_WHITESPACE",
    )
)
"""Flags of `kvasir router`; some are those of `kvasir serve` too."""

WORKER = frozenset(field.variable for field in FIELDS.values())
"""Flags of `kvasir worker`."""

_OTHERS = frozenset(
    {
        "KVASIR_API_PROCESSES",  # `kvasir serve`
        "KVASIR_API_KEY",  # `kvasir bench`, `chat` and `complete`, and kvasir.program
        "KVASIR_STATE",  # runs of `kvasir up`
        "KVASIR_ENGINE_IMAGE",  # kvasir-operator
        "KVASIR_WHEELS",  # bench/h100.sh
        "KVASIR_BENCH_SMALL_PAGES",  # bench/handoff.py
        "KVASIR_FUZZ_SEED",  # the tests
    }
)
KNOWN = PROCESS | ROUTER | WORKER | _OTHERS

# What Kubernetes puts into pods for a Service called kvasir-...: they are nobody's settings.
_SERVICE = re.compile(
    r"KVASIR_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def why_unknown(name: str, known: Iterable[str] = KNOWN) -> str | None:
    """Why a variable is refused, as one clause that may say which is meant; None for one that is known."""
    names = sorted(known)
    if not name.startswith(PREFIX) or name in names:
        return None
    own = [each.removeprefix(PREFIX) for each in names]
    near = difflib.get_close_matches(name.removeprefix(PREFIX), own, 1)
    return f"{name} is no variable of Kvasir's" + (f"; did you mean {PREFIX}{near[0]}?" if near else "")


def refuse_unknown(environment: Mapping[str, str]) -> None:
    """Raise UserError for a variable KVASIR_* that nothing reads."""
    for name, value in sorted(environment.items()):
        linked = _SERVICE.fullmatch(name) or (name.endswith("_PORT") and _ADDRESS.match(value))
        reason = None if linked else why_unknown(name)
        if reason is not None:
            raise UserError(reason)
