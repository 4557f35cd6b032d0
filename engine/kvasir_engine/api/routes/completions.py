"""`POST /v1/completions`."""

import secrets
from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.completions import completion_body, completion_events
from kvasir_engine.api.generation import run_choices
from kvasir_engine.api.http_responses import EventResponse, JsonResponse
from kvasir_engine.api.params import completion_params
from kvasir_engine.api.prompts import completion_prompts
from kvasir_engine.api.schemas import CompletionRequest
from kvasir_engine.api.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        caller = service.caller(request)
        clock = service.clock(caller)
        body = await service.read(request, CompletionRequest)
        service.check_model(body.model)
        params = completion_params(body, service.model)
        prompts_given = completion_prompts(body, service.most * (1 if params.truncate is None else 8))
        await service.check_ready(request)
        prompts = [await service.prompt(request, each, params.truncate) for each in prompts_given]
        await service.check_grammar(request, params)
        id = f"cmpl-{secrets.token_hex(12)}"
        choices = service.choices(id, caller, params, prompts, "prompt")
        echo = (
            [service.text(*each, params.truncate) for each in zip(prompts_given, prompts, strict=True)]
            if body.echo
            else None
        )
        answer = service.answer(id, params, prompts, choices, echo)
        pieces = partial(run_choices, service.client, choices, answer.counter, clock)
        scored = params.logprobs
        if params.stream:
            return EventResponse(lambda: completion_events(answer, pieces(), scored))
        return JsonResponse(lambda: completion_body(answer, pieces(), scored, params.n, params.candidates))
