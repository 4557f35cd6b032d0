"""The OpenAI-compatible HTTP application over an EngineClient."""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.auth import ApiKeys, narrowed
from kvasir_engine.api.body_budget import BodyBudget
from kvasir_engine.api.chat import chat_body, chat_events
from kvasir_engine.api.chat_template import TemplateError
from kvasir_engine.api.completions import completion_body, completion_events
from kvasir_engine.api.detokenizer import Detokenizer
from kvasir_engine.api.encoding import OffLoop, TooLong
from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.generation import Choice, Tally, TokenClock, run_choices
from kvasir_engine.api.grammar_check import GrammarCheck
from kvasir_engine.api.http.limits import HttpLimits
from kvasir_engine.api.http_responses import (
    EventResponse,
    JsonResponse,
    as_api_error,
    error_headers,
    while_client_stays,
)
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.api.params import Params, chat_params, choice_seed, completion_params
from kvasir_engine.api.prompts import (
    characters_of,
    chat_messages,
    check_tokens,
    completion_prompts,
    rendering,
    room,
    too_long,
)
from kvasir_engine.api.rendering import AS_USUAL, Rendering
from kvasir_engine.api.request_body import most_body_bytes, read_body
from kvasir_engine.api.request_meter import RequestMeter
from kvasir_engine.api.schemas import ChatRequest, CommonRequest, CompletionRequest, ModelCard, ModelList
from kvasir_engine.api.structured import refused
from kvasir_engine.api.tokenizer import ServedModel, UnusedName
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.engine_client import EngineClient, GenerateRequest
from kvasir_engine.grammar.base import GrammarBusy, GrammarError

MOST_LENGTH = 2**20  # of a prompt, while no worker has said what it takes

B = TypeVar("B", bound=CommonRequest)
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class _Service:
    """What the endpoints share."""

    client: EngineClient
    model: ServedModel
    metrics: ApiMetrics
    lifecycle: Lifecycle
    keys: ApiKeys | None
    off_loop: OffLoop
    grammars: GrammarCheck

    def unready_reason(self) -> str | None:
        return "draining" if self.lifecycle.draining else self.client.unready_reason()

    @property
    def most(self) -> int:
        """Most tokens of a prompt, as far as known."""
        return self.client.max_length or MOST_LENGTH

    async def read(self, request: Request, kind: type[B]) -> B:
        return await read_body(request, kind, most_body_bytes(self.client.max_length), self.off_loop)

    def salt(self, request: Request) -> str:
        return "" if self.keys is None else self.keys.salt(request.headers.get("authorization"))

    def check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ApiError(
                404,
                f"The model '{name}' does not exist or you do not have access to it.",
                code="model_not_found",
                param="model",
            )

    async def check_ready(self, request: Request) -> None:
        """Refuse a request that no engine will take soon. Until one does, the client may leave."""
        reason = await while_client_stays(request, self.client.wait_ready())
        if reason is not None:
            message = f"The model is not ready to serve: {reason}."
            raise ApiError(503, message, code="no_worker", type="server_error")

    async def tokens(
        self, request: Request, text: str | Messages, param: str, truncate: int | None, how: Rendering = AS_USUAL
    ) -> list[int]:
        """The tokens of a prompt, the last ones of `truncate`, unless it is too long or the client leaves.

        Raises ApiError.
        """
        longest, most = self.model.tokenizer.longest, self.most
        characters = len(text) if isinstance(text, str) else characters_of(text)
        if characters > most * longest:
            raise too_long(characters // longest, most, param)
        tokenizer = self.model.tokenizer
        begin = partial(tokenizer.plain, text) if isinstance(text, str) else partial(tokenizer.rendered, text, how)
        try:
            fitting = most if truncate is None else characters
            tokens = await while_client_stays(request, self.off_loop.tokens(begin, fitting))
            return tokens if truncate is None else self.last(tokens, truncate)
        except TooLong as error:
            raise too_long(error.tokens, most, param) from None
        except UnusedName as error:
            name = f"{param}[{error.place}].name"
            message = f"Unsupported parameter: '{name}'. This model's chat template does not show names."
            raise unsupported(name, message) from None
        except RecursionError:
            raise bad_request(
                "A value of 'chat_template_kwargs' is nested too deeply.", "chat_template_kwargs"
            ) from None
        except TemplateError as error:
            message = f"The model's chat template refuses the messages: {error}."
            raise ApiError(400, message, code="invalid_value", param=param) from None

    async def check_grammar(self, request: Request, params: Params) -> None:
        """Refuse a grammar that cannot be compiled. Raises ApiError."""
        grammar = params.sampling.grammar
        if grammar is None:
            return
        try:
            await while_client_stays(request, self.grammars.checked(grammar))
        except GrammarError as error:
            raise refused(params.grammar_field, error) from None
        except GrammarBusy as error:
            raise ApiError(
                503, f"The server is overloaded: {error}.", code="overloaded", type="server_error"
            ) from None

    def last(self, tokens: list[int], count: int) -> list[int]:
        """The last `count` of them; -1: as many as leave room for one more."""
        return tokens[-(count if count > 0 else self.most - 1) :]

    async def prompt(self, request: Request, prompt: str | list[int], truncate: int | None) -> list[int]:
        """The tokens of one of a completion's prompts. Raises ApiError."""
        if isinstance(prompt, str):
            return await self.tokens(request, prompt, "prompt", truncate)
        await asyncio.sleep(0)  # checking many lists takes long
        tokens = prompt if truncate is None else self.last(prompt, truncate)
        check_tokens(tokens, self.model.vocab_size, self.most)
        return tokens

    def text(self, asked: str | list[int], tokens: list[int], truncate: int | None) -> str:
        """A prompt as it is echoed: what was asked, or the text of the tokens that count."""
        if isinstance(asked, str) and truncate is None:
            return asked
        return b"".join(map(self.model.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")

    def choices(self, id: str, salt: str, params: Params, prompts: list[list[int]], param: str) -> list[Choice]:
        choices: list[Choice] = []
        for place, tokens in enumerate(prompts):
            most = room(len(tokens), params.max_tokens, self.client.max_length, param)
            for n in range(params.candidates):
                index = len(choices)
                sampling = msgspec.structs.replace(
                    params.sampling, max_tokens=most, seed=choice_seed(params.sampling.seed, n)
                )
                detokenizer = Detokenizer(self.model.tokenizer, params.stop, sampling.min_tokens)
                tenant = narrowed(salt, params.cache_salt)
                request = GenerateRequest(f"{id}-{index}", tokens, sampling, tenant, params.priority)
                choices.append(Choice(index, place, request, detokenizer))
        return choices

    def answer(
        self,
        id: str,
        params: Params,
        prompts: list[list[int]],
        choices: list[Choice],
        echo: list[str] | None = None,
    ) -> Answer:
        return Answer(
            id=id,
            created=int(time.time()),
            model=self.model.name,
            choices=len(choices),
            prompt_tokens=sum(map(len, prompts)),
            tally=Tally(len(prompts)),
            include_usage=params.include_usage,
            continuous_usage=params.continuous_usage,
            prompts=prompts if params.token_ids else None,
            echo=echo,
        )


def _error_response(error: ApiError) -> Response:
    return Response(error.body, error.status, error_headers(error), "application/json")


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def create_app(
    client: EngineClient,
    model: ServedModel,
    *,
    registry: CollectorRegistry,
    lifecycle: Lifecycle,
    executor: Executor,
    long_ones: int = 1,
    keys: ApiKeys | None = None,
    over: Callable[[], str | None] = lambda: None,
    body_bytes: int = HttpLimits.body_bytes,
    grammars: GrammarCheck | None = None,
) -> FastAPI:
    """The application. `executor` runs tokenizing and chat templates; the caller shuts it down. Long texts get
    `long_ones` of its threads at most.

    `registry` gets the request metrics and is what /metrics shows. Without `keys` everyone may use the API, as one
    tenant. /health, /ready and /metrics ask for no key.
    `over` says why the process serves no more, if it does not.
    `body_bytes`: of all requests' bodies together. `grammars`: who tries them, if not new processes that end with
    this one.
    """
    metrics = ApiMetrics(registry)
    grammars = grammars or GrammarCheck(partial(vocabulary_of, model))
    service = _Service(client, model, metrics, lifecycle, keys, OffLoop(executor, long_ones), grammars)
    app = FastAPI(title="Kvasir", openapi_url=None)
    app.add_middleware(BodyBudget, most=body_bytes)
    app.add_middleware(RequestMeter, metrics=metrics, lifecycle=lifecycle)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            message = f"Not allowed to {request.method} on {request.url.path}."
        return _error_response(ApiError(error.status_code, message))

    async def on_error(_: Request, error: Exception) -> Response:
        return _error_response(as_api_error(error))

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(Exception, on_error)

    @app.get("/health")
    async def health() -> Response:
        reason = over()
        return Response(reason or "ok", 503 if reason else 200, media_type="text/plain")

    @app.get("/ready")
    async def ready() -> Response:
        reason = over() or service.unready_reason()
        body = msgspec.json.encode({"reason": reason} if reason else {})
        return Response(body, 503 if reason else 200, media_type="application/json")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def card() -> ModelCard:
        return ModelCard(id=model.name, created=model.created, max_model_len=client.max_length or None)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.salt(request)
        return _json(ModelList(data=[card()]))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        service.salt(request)
        service.check_model(name)
        return _json(card())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        clock = TokenClock(metrics)
        salt = service.salt(request)
        body = await service.read(request, ChatRequest)
        service.check_model(body.model)
        params = chat_params(body, model)
        messages = chat_messages(body, service.most)
        how = rendering(body, model.tokenizer.template_variables)
        if not model.tokenizer.has_chat_template:
            raise ApiError(
                400, f"The model '{model.name}' has no chat template: use /v1/completions.", param="messages"
            )
        await service.check_ready(request)
        tokens = await service.tokens(request, messages, "messages", params.truncate, how)
        await service.check_grammar(request, params)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        choices = service.choices(id, salt, params, [tokens], "messages")
        answer = service.answer(id, params, [tokens], choices)
        pieces = partial(run_choices, client, choices, answer.tally, clock)
        scored = params.sampling.logprobs is not None
        if params.stream:
            return EventResponse(lambda: chat_events(answer, pieces(), scored))
        return JsonResponse(lambda: chat_body(answer, pieces(), scored))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        clock = TokenClock(metrics)
        salt = service.salt(request)
        body = await service.read(request, CompletionRequest)
        service.check_model(body.model)
        params = completion_params(body, model)
        asked = completion_prompts(body, service.most * (1 if params.truncate is None else 8))
        await service.check_ready(request)
        prompts = [await service.prompt(request, each, params.truncate) for each in asked]
        await service.check_grammar(request, params)
        id = f"cmpl-{secrets.token_hex(12)}"
        choices = service.choices(id, salt, params, prompts, "prompt")
        echo = (
            [service.text(*each, params.truncate) for each in zip(asked, prompts, strict=True)]
            if body.echo
            else None
        )
        answer = service.answer(id, params, prompts, choices, echo)
        pieces = partial(run_choices, client, choices, answer.tally, clock)
        scored = params.logprobs
        if params.stream:
            return EventResponse(lambda: completion_events(answer, pieces(), scored))
        return JsonResponse(lambda: completion_body(answer, pieces(), scored, params.n, params.candidates))

    return app
