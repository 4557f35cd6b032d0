"""What the endpoints share: from a request's bytes to the engine's request."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.answer_reading import AnswerReading
from kvasir_engine.api.auth import ApiKeys, salt_within
from kvasir_engine.api.caller import CALLER, Caller
from kvasir_engine.api.chat_template import TemplateError
from kvasir_engine.api.detokenizer import Detokenizer
from kvasir_engine.api.encoding import OffLoop, TooLong
from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.generation import Choice, TokenClock, UsageCounter
from kvasir_engine.api.grammar_check import GrammarCheck
from kvasir_engine.api.http_responses import while_client_stays
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.api.params import Params, check_prompt_scores, choice_seed, scored_from
from kvasir_engine.api.prompts import characters_of, check_tokens, room, too_long
from kvasir_engine.api.rendering import AS_USUAL, Rendering
from kvasir_engine.api.request_body import most_body_bytes, read_body
from kvasir_engine.api.structured import refused
from kvasir_engine.api.tokenizer import ServedModel, UnusedName
from kvasir_engine.bounds import MOST_PRIORITY
from kvasir_engine.engine_client import EngineClient, GenerateRequest
from kvasir_engine.grammar.base import GrammarBusy, GrammarError

MOST_LENGTH = 2**20  # of a prompt, while no worker has said what it takes

B = TypeVar("B", bound=msgspec.Struct)
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Service:
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
        """The maximum number of tokens of a prompt, as far as known."""
        return self.client.max_length or MOST_LENGTH

    @property
    def most_bytes(self) -> int:
        """The maximum size of a request's body, in bytes."""
        return most_body_bytes(self.client.max_length)

    async def read(self, request: Request, kind: type[B]) -> B:
        return await read_body(request, kind, self.most_bytes, self.off_loop)

    def caller(self, request: Request, key_header: str | None = None) -> Caller:
        """The caller by the `Authorization` header, or the header with the bare key. Raises ApiError."""
        known = request.scope.get(CALLER)
        if isinstance(known, Caller):
            return known
        if self.keys is None:
            return Caller("")
        authorization = request.headers.get("authorization")
        bare = None if key_header is None else request.headers.get(key_header)
        if authorization is None and bare is not None:
            authorization = f"Bearer {bare}"
        return Caller(self.keys.salt(authorization))

    def clock(self, caller: Caller) -> TokenClock:
        return TokenClock(None if caller.in_background else self.metrics)

    def check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ApiError(
                404,
                f"The model '{name}' does not exist or you do not have access to it.",
                code="model_not_found",
                param="model",
            )

    async def check_ready(self, request: Request) -> None:
        """Wait until an engine is ready, as long as the client stays. Raises ApiError when none will be soon."""
        reason = await while_client_stays(request, self.client.wait_ready())
        if reason is not None:
            message = f"The model is not ready to serve: {reason}."
            raise ApiError(503, message, code="no_worker", type="server_error")

    async def tokens(
        self,
        request: Request,
        text: str | Messages,
        param: str,
        truncate: int | None,
        how: Rendering = AS_USUAL,
        around: bool | None = None,
    ) -> list[int]:
        """The tokens of a prompt, cut to the last ones by `truncate`. Raises ApiError for one that is too long.

        `around`: with what the model puts around every text; by default around prompts, not around messages. Raises
        ApiError when the client disconnects, too.
        """
        longest, most = self.model.tokenizer.longest, self.most
        characters = len(text) if isinstance(text, str) else characters_of(text)
        if characters > most * longest:
            raise too_long(characters // longest, most, param)
        tokenizer = self.model.tokenizer
        if isinstance(text, str):
            begin = partial(tokenizer.plain, text, around is not False)
        else:
            begin = partial(tokenizer.rendered, text, how, bool(around))
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
        """Raise ApiError for a grammar that cannot be compiled."""
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
        """The last `count` tokens; -1: as many as leave room for one more."""
        return tokens[-(count if count > 0 else self.most - 1) :]

    async def prompt(self, request: Request, prompt: str | list[int], truncate: int | None) -> list[int]:
        """The tokens of one of a completion's prompts. Raises ApiError."""
        if isinstance(prompt, str):
            return await self.tokens(request, prompt, "prompt", truncate)
        await asyncio.sleep(0)  # checking many lists takes long
        tokens = prompt if truncate is None else self.last(prompt, truncate)
        check_tokens(tokens, self.model.vocab_size, self.most)
        return tokens

    def text(self, prompt: str | list[int], tokens: list[int], truncate: int | None) -> str:
        """A prompt as it is echoed: as it was sent, or the text of its truncated tokens."""
        if isinstance(prompt, str) and truncate is None:
            return prompt
        return b"".join(map(self.model.tokenizer.token_bytes, tokens)).decode("utf-8", "replace")

    def choices(
        self,
        id: str,
        caller: Caller,
        params: Params,
        prompts: list[list[int]],
        param: str,
        reading: AnswerReading | None = None,
    ) -> list[Choice]:
        if caller.behind and params.priority < 0:
            raise bad_request("Invalid 'priority': a batch's requests cannot go before others.", "priority")
        check_prompt_scores(params, map(len, prompts))
        choices: list[Choice] = []
        for place, tokens in enumerate(prompts):
            most = room(len(tokens), params.max_tokens, self.client.max_length, param)
            start = 0 if params.sampling.prompt_logprobs is None else scored_from(params, len(tokens))
            for n in range(params.candidates):
                index = len(choices)
                seed = choice_seed(params.sampling.seed, n)
                sampling = msgspec.structs.replace(params.sampling, max_tokens=most, seed=seed, logprob_start=start)
                vocabulary = self.model.tokenizer if reading is None else reading.vocabulary
                detokenizer = Detokenizer(vocabulary, params.stop, sampling.min_tokens)
                tenant = salt_within(caller.salt, params.cache_salt)
                priority = min(params.priority + caller.behind, MOST_PRIORITY)
                request = GenerateRequest(f"{id}-{index}", tokens, sampling, tenant, priority)
                parser = None if reading is None else reading.parser()
                choices.append(Choice(index, place, request, detokenizer, params.token_ids, parser, params.silent))
        return choices

    def answer(
        self,
        id: str,
        params: Params,
        prompts: list[list[int]],
        choices: list[Choice],
        echo: list[str] | None = None,
        reasons: bool = False,
    ) -> Answer:
        return Answer(
            prompt_logprobs=params.prompt_logprobs,
            echo_logprobs=params.echo_logprobs,
            id=id,
            created=int(time.time()),
            model=self.model.name,
            choices=len(choices),
            prompt_tokens=sum(map(len, prompts)),
            counter=UsageCounter(len(prompts)),
            include_usage=params.include_usage,
            continuous_usage=params.continuous_usage,
            prompts=prompts if params.token_ids else None,
            echo=echo,
            reasons=reasons,
        )
