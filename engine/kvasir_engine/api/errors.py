"""Errors in OpenAI's form: an HTTP status and `{"error": {message, type, param, code}}`."""

import re

import msgspec

from kvasir_engine.engine_client import EngineError


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


_MOST_SHOWN = 2000  # characters: a message may repeat what the client sent


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


class ApiError(Exception):
    """A request's error. `detail` is the body, `status` the HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(_short(message), type, None if param is None else _short(param), code)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))


class AnthropicError(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "error"
    error: AnthropicError


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_body(error: ApiError) -> bytes:
    """The same in Anthropic's form, in which only the message names the field."""
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, usual)
    message, param = error.detail.message, error.detail.param
    if param is not None and param not in message:
        message = f"{param}: {message}"
    return msgspec.json.encode(AnthropicErrorBody(error=AnthropicError(kind, message)))


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def missing(param: str) -> ApiError:
    """A required field is missing."""
    return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")


def unsupported(param: str, message: str | None = None) -> ApiError:
    """The server cannot honour a value that would change the answer."""
    return bad_request(message or f"Unsupported value: '{param}' is not supported.", param, "unsupported_value")


def client_left() -> ApiError:
    """The client has disconnected; only the metrics see this status."""
    return ApiError(499, "The client has left.")


def unexpected() -> ApiError:
    message = "The server had an error while processing your request. Sorry about that!"
    return ApiError(500, message, type="server_error")


def from_engine(error: EngineError) -> ApiError:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return ApiError(error.status, error.message, code=error.code, type=kind)


_PATH = re.compile(r" - at `\$\.?(.*)`$")
_FIELD = re.compile(r"field `([^`]+)`")


def from_validation(error: msgspec.DecodeError) -> ApiError:
    """msgspec's validation error in OpenAI's words, with the path of the field as `param`."""
    if not isinstance(error, msgspec.ValidationError):
        return bad_request(f"We could not parse the JSON body of your request: {error}.", code=None)
    text = str(error)
    path = _PATH.search(text)
    where = path.group(1) if path else ""
    reason = text[: path.start()] if path else text
    field = _FIELD.search(reason)
    if field and reason.startswith(("Object contains unknown", "Object missing required")):
        name = f"{where}.{field.group(1)}" if where else field.group(1)
        if "unknown" in reason:
            return bad_request(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        return bad_request(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not where:
        return bad_request(f"Invalid request body: {reason}.", None, "invalid_type")
    return bad_request(f"Invalid value for '{where}': {reason}.", where, "invalid_type")
