"""`python -m e2e.crashing WRITES LIVES ARGUMENT...`: `kvasir-operator ARGUMENT...`, killed after its writes.

Each of the first LIVES lives (-1: every one) ends by SIGKILL as soon as WRITES of its writes took effect at the API
server, before the operator knows of the last; the next one begins at once. What is killed and where is on stderr.
Lives are forks of a process that has imported everything, so that they are short.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Mapping

from kvasir_operator.__main__ import app
from kvasir_operator.cluster.client import ClientTransport

_PR_SET_PDEATHSIG = 1


def mortal(writes: int) -> None:
    """Have this process die of its write number `writes`."""
    send, lock, left = ClientTransport.__call__, threading.Lock(), [writes]

    def counted(
        self: ClientTransport, method: str, path: str, query: Mapping[str, str], body: object, content_type: str
    ) -> tuple[int, bytes]:
        status, answer = send(self, method, path, query, body, content_type)
        if method != "GET" and status < 300:
            with lock:
                left[0] -= 1
                if not left[0]:
                    os.write(2, f"killed after {method} {path}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
        return status, answer

    ClientTransport.__call__ = counted  # type: ignore[method-assign]


def main() -> None:
    """Live again and again, until killed; ends as a life does that ends by itself."""
    writes, lives, arguments = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    while True:
        child = os.fork()
        if not child:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if lives:
                mortal(writes)
            app(arguments)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(f"the operator ended with {status}")
        lives -= lives > 0


if __name__ == "__main__":
    main()
