"""The OpenAI endpoint: how it is reached, and by whom."""

from typing import Annotated, Any, Literal

from kvasir_operator.api.engine import IMAGE
from kvasir_operator.api.fields import OBJECT_NAME, Part, about, count, entries, text
from kvasir_operator.api.workers import PodClaim, Resources

_NAME = OBJECT_NAME.strip("^$")
_HOST = rf"^(\*\.)?{_NAME}$"
_CLASS_NAME = rf"^{_NAME}(/{_NAME})?$"


class EndpointPicker(Part, frozen=True):
    """The endpoint picker of an InferencePool, which is not Kvasir's to install."""

    name: Annotated[str, text("Its Service, of the same namespace.", OBJECT_NAME, 253)]
    port: Annotated[int, count("The Service's port that speaks ext-proc.", 1, 65535)] = 9002
    failure_mode: Annotated[
        Literal["FailOpen", "FailClose"],
        about("What becomes of a request when the picker does not answer: any router has it, or it fails."),
    ] = "FailOpen"


class Expose(Part, frozen=True):
    """How clients outside the cluster reach the router."""

    type: Annotated[
        Literal["Service", "Ingress", "HTTPRoute", "InferencePool"],
        about(
            "Service: inside the cluster only. Ingress and HTTPRoute also give the /v1 paths to the outside. "
            "InferencePool: a pool of the routers for the Gateway API Inference Extension, and with className an "
            "HTTPRoute to it."
        ),
    ] = "Service"
    host: Annotated[str, text("Host name of the Ingress or HTTPRoute. Default: any.", _HOST, 253)] = ""
    class_name: Annotated[
        str,
        text(
            "The IngressClass, or the Gateway of the HTTPRoute, as name or namespace/name.",
            _CLASS_NAME,
            253,
        ),
    ] = ""
    tls_secret_name: Annotated[
        str, text("Ingress only: the Secret with the certificate; a Gateway has its own.", OBJECT_NAME, 253)
    ] = ""
    endpoint_picker: Annotated[
        EndpointPicker | None, about("InferencePool only, and required there: who chooses a router.")
    ] = None
    annotations: Annotated[
        dict[str, Annotated[str, text("The annotation's value.", None, 16384)]],
        entries(
            "Annotations of the object that type names, over Kvasir's own: on an Ingress those by which nginx "
            "keeps streams of up to an hour and does not buffer them.",
            64,
        ),
    ] = {}


class Auth(Part, frozen=True):
    """Who may ask."""

    secret_name: Annotated[
        str,
        text(
            "Secret whose values are API keys, one a key or one a line. Default: no key is asked for.",
            OBJECT_NAME,
            253,
        ),
    ] = ""


class Router(Part, frozen=True):
    """The OpenAI endpoint."""

    replicas: Annotated[int, count("Number of routers.", 0, 1000)] = 1
    expose: Annotated[Expose, about("How clients outside the cluster reach the router.")] = Expose()
    auth: Annotated[Auth, about("Who may ask.")] = Auth()
    image: Annotated[str, text("Image of the routers alone. Default: engine.image.", IMAGE, 1024)] = ""
    resources: Annotated[
        Resources, about("Requests and limits of the router's container, merged over Kvasir's own.")
    ] = Resources()
    template: Annotated[
        dict[str, Any], about("Pod template merged over the router's rendered one, as prefill.template is.")
    ] = {}

    @property
    def resource_claims(self) -> list[PodClaim]:
        """A router's claims are its template's alone."""
        return []
