"""Endpoints of OpenAI's API and vLLM's that this server does not have: each error says what is missing."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.errors import bad_request
from kvasir_engine.api.service import Service

_VECTORS = "it generates text and gives no vectors of texts"
_SCORES = "it generates text and has no head that scores texts"
_LABELS = "it generates text and has no head that classifies texts"
_SOUND = "it takes and gives text only, no audio"
_PICTURES = "it takes and gives text only, no images"
_VIDEO = "it takes and gives text only, no video"
_JUDGES = "it was not trained to moderate texts"
_TRAINING = "this server computes answers and trains no models"
_STATE = "this server keeps no conversations: send the whole conversation to /v1/chat/completions or /v1/responses"
_STORES = "this server keeps no documents"

LACKING: dict[str, str] = {
    "/v1/embeddings": _VECTORS,
    "/pooling": _VECTORS,
    "/v1/score": _SCORES,
    "/score": _SCORES,
    "/rerank": _SCORES,
    "/v1/rerank": _SCORES,
    "/v2/rerank": _SCORES,
    "/classify": _LABELS,
    "/v1/moderations": _JUDGES,
    "/v1/audio/speech": _SOUND,
    "/v1/audio/transcriptions": _SOUND,
    "/v1/audio/translations": _SOUND,
    "/v1/realtime/sessions": _SOUND,
    "/v1/images/generations": _PICTURES,
    "/v1/images/edits": _PICTURES,
    "/v1/images/variations": _PICTURES,
    "/v1/videos": _VIDEO,
    "/v1/fine_tuning/jobs": _TRAINING,
    "/v1/fine_tuning/jobs/{rest:path}": _TRAINING,
    "/v1/assistants": _STATE,
    "/v1/conversations": _STATE,
    "/v1/threads": _STATE,
    "/v1/threads/{rest:path}": _STATE,
    "/v1/vector_stores": _STORES,
}
WITHOUT_FOLDER = ("/v1/files", "/v1/batches", "/v1/batches/{rest:path}")


def add_without_folder(app: FastAPI, service: Service) -> None:
    """The refusals for files and batches, where there is no folder for them."""
    for path in WITHOUT_FOLDER:
        _refuse(app, service, path, "This server does not support {path}: it was started without --batch-dir.")


def _refuse(app: FastAPI, service: Service, path: str, message: str) -> None:
    async def refused(request: Request) -> Response:
        service.caller(request)
        raise bad_request(message.replace("{path}", request.url.path), code="unsupported_endpoint")

    app.add_api_route(path, refused, methods=["GET", "POST"], response_model=None)


def add(app: FastAPI, service: Service) -> None:
    for path, reason in LACKING.items():
        _refuse(app, service, path, f"The model '{service.model.name}' does not support {{path}}: {reason}.")
