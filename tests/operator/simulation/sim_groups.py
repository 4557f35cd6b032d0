"""The controller of LeaderWorkerSets, as far as sets of one group go: all pods of a group live and die together.

A group's pods have the names of their predecessors, so it is made anew when the last of those is gone.
"""

from collections.abc import Callable

from sim_apply import Object
from sim_server import Server

from kvasir_operator.pods import groups

GROUP = "leaderworkerset.sigs.k8s.io/name"
INDEX = "leaderworkerset.sigs.k8s.io/worker-index"


class Groups:
    """Makes and ends the pods of sets; `run` creates a pod at a path, `evict` begins to delete one."""

    def __init__(
        self,
        server: Server,
        run: Callable[[str, Object], None],
        evict: Callable[[str], None],
        is_ready: Callable[[Object], bool],
    ) -> None:
        self._server = server
        self._run = run
        self._evict = evict
        self._is_ready = is_ready

    def sync(self, path: str, item: Object) -> None:
        """Bring a set's one group closer to what it should be."""
        name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
        named = [(p, o) for p, o in self._server.items("pods") if o["metadata"]["labels"].get(GROUP) == name]
        own = [(p, o) for p, o in named if o["metadata"]["ownerReferences"][0]["uid"] == item["metadata"]["uid"]]
        present = [(p, o) for p, o in own if "deletionTimestamp" not in o["metadata"]]
        wanted = groups.size(item) if groups.replicas(item) else 0
        current = groups.revision(item)
        whole = len(present) == wanted and not any(self._ended(o, current) for _, o in present)
        if not whole:
            for each, _ in present:
                self._evict(each)
            if not named and wanted:
                self._make(item, namespace)
        ready = whole and wanted and all(self._is_ready(o) for _, o in present)
        counts = {"observedGeneration": item["metadata"]["generation"], "replicas": int(bool(own))}
        self._server.replace(path, status={**counts, "readyReplicas": 1} if ready else counts)

    @staticmethod
    def _ended(pod: Object, current: str) -> bool:
        """Whether a container of the pod was restarted, or the pod is of other templates."""
        restarted = any(each.get("lastState") for each in pod["status"].get("containerStatuses", []))
        return restarted or pod["metadata"]["labels"][groups.REVISION_LABEL] != current

    def _make(self, item: Object, namespace: str) -> None:
        """As in the real one a leader owns its followers, through a StatefulSet; here the set owns them all."""
        metadata = item["metadata"]
        owner = {"uid": metadata["uid"], "name": metadata["name"], "kind": "LeaderWorkerSet", "controller": True}
        for pod in groups.pods(item, 0):
            metadata = {**pod["metadata"], "ownerReferences": [owner]}
            path = f"/api/v1/namespaces/{namespace}/pods/{metadata['name']}"
            self._run(path, {"metadata": metadata, "spec": {}, "status": {"phase": "Pending"}})
