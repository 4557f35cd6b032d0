"""The engine's image, what all pods that run it have in common, and what all workers are told."""

from typing import Annotated, Literal

from kvasir_operator.api.engine_settings import EngineSettings
from kvasir_operator.api.fields import OBJECT_NAME, Part, about, listed, text

IMAGE = r"^[a-z0-9]([-._:/@A-Za-z0-9]*[A-Za-z0-9])?$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"

PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Variable(Part, frozen=True):
    """A variable of the environment."""

    name: Annotated[str, text("Name of the variable.", _VARIABLE, 253)]
    value: Annotated[str, text("Its value.", None, 4096)] = ""


class Engine(EngineSettings, frozen=True):
    """The engine's image, what all pods that run it have in common, and what all workers are told."""

    image: Annotated[
        str,
        text(
            "Image of workers, routers and the Job that loads the model. Default: the operator's, as "
            "imagePolicy says.",
            IMAGE,
            1024,
        ),
    ] = ""
    image_policy: Annotated[
        Literal["Keep", "FollowOperator"],
        about(
            "Keep: pods keep the image and defaults of the operator that made the service, until image changes: an "
            "upgrade of the operator rolls nothing. FollowOperator: pods have those of the operator that runs, and "
            "are rolled when it is upgraded."
        ),
    ] = "Keep"
    image_pull_policy: Annotated[
        PullPolicy | None, about("When the image is pulled. Default: Kubernetes' own.")
    ] = None
    env: Annotated[
        list[Variable],
        listed(
            "Environment of all pods: proxies (HTTPS_PROXY, NO_PROXY), another model hub (HF_ENDPOINT). "
            "Kvasir's own "
            "variables are not set here.",
            64,
        ),
    ] = []
    ca_config_map_name: Annotated[
        str,
        text(
            "ConfigMap whose key ca.crt holds the certificates that all pods trust, in place of the image's.",
            OBJECT_NAME,
            253,
        ),
    ] = ""
