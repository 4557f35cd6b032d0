"""The model: where it comes from, and where it is kept."""

from typing import Annotated, Any, Literal

from kvasir_operator.api.fields import OBJECT_NAME, Part, Quantity, about, count, text
from kvasir_operator.api.workers import PodClaim, Resources


class Preload(Part, frozen=True):
    """The Job that loads the model into a claim."""

    resources: Annotated[
        Resources, about("Requests and limits of the Job's container, merged over Kvasir's own.")
    ] = Resources()
    template: Annotated[
        dict[str, Any], about("Pod template merged over the Job's rendered one, as prefill.template is.")
    ] = {}

    @property
    def resource_claims(self) -> list[PodClaim]:
        """The Job's claims are its template's alone."""
        return []

    @property
    def is_set(self) -> bool:
        """Whether the spec sets any of it."""
        return self != Preload()


class Cache(Part, frozen=True):
    """Where a model that is downloaded is kept."""

    claim_name: Annotated[
        str,
        text(
            "PersistentVolumeClaim that all pods share (ReadWriteMany, unless all run on one node). A Job loads "
            "the model into it.",
            OBJECT_NAME,
            253,
        ),
    ] = ""
    host_path: Annotated[
        str,
        text(
            "Folder that every node has and user 65532 may write to. The first worker on a node loads the model "
            "for the others. Pod security levels restricted and baseline forbid it.",
            r"^(/[A-Za-z0-9][-A-Za-z0-9._]*)+$",
            1024,
        ),
    ] = ""
    preload: Annotated[Preload, about("The Job that loads the model into claimName.")] = Preload()


class Model(Part, frozen=True):
    """The model to serve."""

    uri: Annotated[
        str,
        text(
            "hf://org/name@revision, pvc://claim/path, file:///path or package://name.",
            r"^(hf|pvc|file|package)://.+$",
            1024,
        ),
    ]
    name: Annotated[
        str,
        text(
            "Name by which clients ask for the model. Default: the InferenceService's own name.",
            r"^[A-Za-z0-9][-A-Za-z0-9._:/]*$",
            253,
        ),
    ] = ""
    revision: Annotated[
        str, text("Branch, tag or commit of an hf:// model.", r"^[A-Za-z0-9][-A-Za-z0-9._/]*$", 253)
    ] = ""
    max_length: Annotated[
        int, count("Most tokens of one sequence, prompt and output together. 0: the model's own.", 0)
    ] = 0
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        about("Type of weights, activations and KV cache. auto: bfloat16."),
    ] = "auto"
    size: Annotated[
        Quantity,
        about(
            "Bytes of the weights, for example 16Gi: a pod that does not listen after the time that loading so "
            "much may take is restarted. Default: after an hour."
        ),
    ] = 0
    cache: Annotated[
        Cache,
        about("Where a downloaded model is kept. Default: in each pod, as long as it lives."),
    ] = Cache()
    token_secret_name: Annotated[
        str,
        text(
            "Secret whose key token holds the hub's access token, for private and gated models.", OBJECT_NAME, 253
        ),
    ] = ""
