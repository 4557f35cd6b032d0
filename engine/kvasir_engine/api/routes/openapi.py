"""`GET /openapi.json`: the fields and limits that the server accepts."""

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from kvasir_engine.api.batch.schemas import Batch, BatchList, BatchRequest, FileDeleted, FileList, FileObject
from kvasir_engine.api.errors import AnthropicErrorBody
from kvasir_engine.api.field_limits import Schema
from kvasir_engine.api.message_schemas import (
    CountTokensRequest,
    MessageEvent,
    MessagesRequest,
    ModelMessage,
    TokensCount,
)
from kvasir_engine.api.openapi_document import Operation, Parameters, document
from kvasir_engine.api.response_schemas import ModelResponse, ResponseEvent, ResponsesRequest
from kvasir_engine.api.routes.not_served import LACKING
from kvasir_engine.api.routes.probes import kvasir_version
from kvasir_engine.api.schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Tokenized,
    TokenizeRequest,
    Version,
)
from kvasir_engine.api.service import Service

_BYTES = "application/octet-stream"
_TEXT: Schema = {"type": "string", "minLength": 1}
_ID: Parameters = {"id": ("path", _TEXT)}
_PAGE: Parameters = {
    "limit": ("query", {"type": "integer", "minimum": 1, "maximum": 100}),
    "after": ("query", _TEXT),
}
_FILES: Parameters = {
    "limit": ("query", {"type": "integer", "minimum": 1, "maximum": 10_000}),
    "after": ("query", _TEXT),
    "order": ("query", {"enum": ["asc", "desc"]}),
    "purpose": ("query", {"type": "string"}),
}
_UPLOAD: Schema = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch"]}},
            "required": ["file", "purpose"],
            "additionalProperties": False,
        }
    }
}

OPERATIONS = (
    Operation("get", "/health", "Whether the process is well.", answer="text/plain"),
    Operation("get", "/ready", "Whether requests are taken."),
    Operation("get", "/metrics", "Prometheus's metrics.", answer="text/plain"),
    Operation("get", "/version", "Kvasir's version.", answer=Version),
    Operation("get", "/openapi.json", "This document."),
    Operation("get", "/v1/models", "The model that is served.", answer=ModelList),
    Operation(
        "get",
        "/v1/models/{name}",
        "The model, by its name.",
        answer=ModelCard,
        parameters={"name": ("path", {"type": "string", "minLength": 1})},
    ),
    Operation(
        "post", "/v1/chat/completions", "Answer a conversation.", ChatRequest, ChatCompletion, events=ChatChunk
    ),
    Operation("post", "/v1/completions", "Continue prompts.", CompletionRequest, Completion, events=Completion),
    Operation(
        "post", "/v1/responses", "Answer a conversation.", ResponsesRequest, ModelResponse, events=ResponseEvent
    ),
    Operation(
        "post",
        "/v1/messages",
        "Answer a conversation, as at Anthropic.",
        MessagesRequest,
        ModelMessage,
        events=MessageEvent,
        error=AnthropicErrorBody,
    ),
    Operation(
        "post",
        "/v1/messages/count_tokens",
        "Count a conversation's tokens, as at Anthropic.",
        CountTokensRequest,
        TokensCount,
        error=AnthropicErrorBody,
    ),
    Operation("post", "/v1/files", "Keep a batch's input.", _UPLOAD, FileObject),
    Operation("get", "/v1/files", "The caller's files.", answer=FileList, parameters=_FILES),
    Operation("get", "/v1/files/{id}", "A file.", answer=FileObject, parameters=_ID),
    Operation("delete", "/v1/files/{id}", "Delete a file.", answer=FileDeleted, parameters=_ID),
    Operation("get", "/v1/files/{id}/content", "A file's content.", answer=_BYTES, parameters=_ID),
    Operation("post", "/v1/batches", "Answer a file of requests, behind all others.", BatchRequest, Batch),
    Operation("get", "/v1/batches", "The caller's batches.", answer=BatchList, parameters=_PAGE),
    Operation("get", "/v1/batches/{id}", "A batch.", answer=Batch, parameters=_ID),
    Operation("post", "/v1/batches/{id}/cancel", "End a batch early.", answer=Batch, parameters=_ID),
    Operation("post", "/tokenize", "The tokens of a prompt or a conversation.", TokenizeRequest, Tokenized),
    Operation("post", "/detokenize", "The text of tokens.", DetokenizeRequest, Detokenized),
)
LIMITED = (
    "StreamOptions",
    "ChatRequest",
    "ChatMessage",
    "MessageToolCall",
    "Tool",
    "NamedToolChoice",
    "AllowedTools",
    "AllowedTool",
    "CompletionRequest",
    "ResponsesRequest",
    "ResponseStreamOptions",
    "TextOptions",
    "TextFormat",
    "FlatTool",
    "FlatToolChoice",
    "FlatAllowedTool",
    "ReasoningOptions",
    "InputItem",
    "MessagesRequest",
    "CountTokensRequest",
    "TurnMessage",
    "ContentBlock",
    "TextBlock",
    "ThinkingOptions",
    "InputTool",
    "InputToolChoice",
    "AnswerFormat",
    "CacheControl",
    "BatchRequest",
    "TokenizeRequest",
    "DetokenizeRequest",
)
"""The structs of bodies with the limits of `field_limits.py`."""
UNDESCRIBED = frozenset({*LACKING, "/v1/responses/{id}"})
"""Paths that refuse every request."""


def add(app: FastAPI, service: Service) -> None:
    body = msgspec.json.encode(
        document(OPERATIONS, LIMITED, kvasir_version(), service.model.name, service.model.vocab_size)
    )

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(body, media_type="application/json")
