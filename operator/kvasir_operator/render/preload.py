"""The Job that loads a model into the shared cache once, so that no GPU waits for a download."""

from kvasir_operator.api import InferenceService
from kvasir_operator.render.defaults import preload_resources
from kvasir_operator.render.merge import merged, with_spec_resources
from kvasir_operator.render.names import Object, labels, metadata, revision_of
from kvasir_operator.render.options import Options
from kvasir_operator.render.pod import PORT, container, pod_spec
from kvasir_operator.render.storage import preloads

# Loading goes on where it was cut off, so a hub that is away for a while costs tries and nothing else.
_TRIES = 20


def preload_job(service: InferenceService, options: Options) -> list[Object]:
    """The Job, where a claim keeps the model. It is named after its pod, as a Job's pod cannot be changed."""
    if not preloads(service):
        return []
    own_labels = labels(service, "preload")
    template: Object = {"metadata": {"labels": own_labels}, "spec": _pod(service, options)}
    template = merged(template, service.spec.model.cache.preload)
    name = f"{service.name}-preload-{revision_of(template)}"
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata(service, name, own_labels),
            "spec": {"backoffLimit": _TRIES, "template": template},
        }
    ]


def _pod(service: InferenceService, options: Options) -> Object:
    model = service.spec.model
    revision = ["--revision", model.revision] if model.revision else []
    args = ["fetch", model.uri, *revision, "--progress-port", str(PORT)]
    resources = with_spec_resources(preload_resources(options), model.cache.preload)
    main = container(options, args, {}, resources)
    return {**pod_spec(service, main, token=True), "restartPolicy": "OnFailure"}
