"""Rendered pods as supervised processes of this machine: what `kvasir up` and the end-to-end node agent run."""

from kvasir_operator.pods.container import Backoff
from kvasir_operator.pods.host import ENGINE, Host, Image, host_environment
from kvasir_operator.pods.podspec import PodError
from kvasir_operator.pods.runner import PodRunner
from kvasir_operator.pods.status import Terminated

__all__ = ["ENGINE", "Backoff", "Host", "Image", "PodError", "PodRunner", "Terminated", "host_environment"]
