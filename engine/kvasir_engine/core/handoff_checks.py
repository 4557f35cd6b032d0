"""Checks of handoffs that routers request, before a request or a lease is created."""

from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.request_validation import fault_of_endpoint, fault_of_lease
from kvasir_engine.protocol import Endpoint, Lease, Reserve, Role, Submit
from kvasir_engine.transport_policy import TransportPolicy

Refusal = tuple[str, str]  # the code and the message of a failure


class HandoffChecks:
    """For a worker of this role. `connector` is `None` if KV never moves; `policy` is the worker's own."""

    def __init__(self, role: Role, connector: KVConnector | None, readback: Readback) -> None:
        self._role = role
        self._connector = connector
        self._readback = readback

    def of_submit(self, frame: Submit, policy: TransportPolicy) -> Refusal | None:
        """Why this worker cannot compute `frame` (under its lease, if it has one), or `None`."""
        lease, to = frame.lease, frame.to
        if (lease is None) != (to is None):
            return "bad_request", "a lease needs its holder's endpoint"
        if lease is None or to is None:
            only_leases = self._role == "prefill"
            return ("wrong_role", "a prefill worker computes only under a lease") if only_leases else None
        if self._role == "decode" or self._connector is None:
            return "wrong_role", f"a {self._role} worker pushes no KV"
        unsafe = _unsafe(policy, frame.place, lease.nonce > 0)
        if unsafe is not None:
            return "not_encrypted", unsafe
        wrong = fault_of_endpoint("to", to, self._connector.endpoint) or fault_of_lease(lease, to)
        if wrong is None and self._in_use(self._connector, lease, to):
            wrong = "the lease is in use"
        return None if wrong is None else ("bad_lease", wrong)

    def of_reserve(self, frame: Reserve, policy: TransportPolicy) -> Refusal | None:
        """Why this worker cannot lease pages for `frame`, or `None`."""
        if self._role == "prefill" or self._connector is None:
            return "wrong_role", f"a {self._role} worker grants no leases"
        problem = fault_of_endpoint("writer", frame.writer, self._connector.endpoint)
        if problem is not None:
            return "bad_request", problem
        unsafe = _unsafe(policy, frame.place, frame.nonces)
        return None if unsafe is None else ("not_encrypted", unsafe)

    def _in_use(self, connector: KVConnector, lease: Lease, to: Endpoint) -> bool:
        """Whether the id of the lease or of its loan is in use. A loan that is being read does not count."""
        if connector.busy(to, lease.id):
            return True
        loan = lease.loan
        return loan is not None and (to.agent, loan.id) not in self._readback.reads and connector.busy(to, loan.id)


def _unsafe(policy: TransportPolicy, place: str, nonces: bool) -> str | None:
    """Why KV must not move between this worker and one at `place`, or `None`."""
    if policy.encryption == "required" and not nonces:
        return "encryption is required, and the other worker, or the router, knows no nonces of leases"
    return policy.refusal(TransportPolicy("auto", place))
