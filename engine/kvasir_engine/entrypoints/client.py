"""`kvasir bench`, `kvasir chat`, `kvasir complete`: their flags. What they need is imported when they run."""

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvasir_engine.errors import UserError

if TYPE_CHECKING:
    from kvasir_engine.client.endpoint import EndpointAddress

KEY_HELP = "Sent as a bearer token."
KEY_VARIABLES = ["KVASIR_API_KEY", "OPENAI_API_KEY"]
Key = Annotated[str, typer.Option("--api-key", help=KEY_HELP, envvar=KEY_VARIABLES, show_default=False)]
Model = Annotated[str, typer.Option("--model", help="Default: the first of the endpoint's /v1/models.")]
MaxTokens = Annotated[int, typer.Option(min=0, max=10_000_000, help="Of an answer; 0: the endpoint's default.")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2, help="Default: the endpoint's.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(bench)
    app.command()(chat)
    app.command()(complete)


def bench(
    url: Annotated[str, typer.Argument(help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000.")],
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    model: Model = "",
    api: Annotated[Literal["completions", "chat"], typer.Option(help="Which of /v1/ is asked.")] = "completions",
    api_key: Key = "",
    dataset: Annotated[
        Literal["random", "shared-prefix", "multi-turn", "sharegpt"], typer.Option(help="What is asked.")
    ] = "random",
    dataset_path: Annotated[str, typer.Option(help="A ShareGPT file.")] = "",
    num_prompts: Annotated[int, typer.Option(min=1, max=10_000_000, help="Prompts, or conversations.")] = 100,
    input_len: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens of a question.")] = 512,
    output_len: Annotated[int, typer.Option(min=1, max=10_000_000, help="Most tokens of an answer.")] = 128,
    range_ratio: Annotated[float, typer.Option(help="Lengths are (1 - r) to (1 + r) times what is said.")] = 0.0,
    prefix_len: Annotated[int, typer.Option(min=0, max=10_000_000, help="Tokens before each question.")] = 0,
    num_prefixes: Annotated[int, typer.Option(min=1, max=1_000_000, help="So many different prefixes.")] = 1,
    turns: Annotated[int, typer.Option(min=1, max=1000, help="Of each conversation.")] = 1,
    request_rate: Annotated[
        str, typer.Option(help="Conversations begun a second, inf: all at once; or several, by commas.")
    ] = "inf",
    burstiness: Annotated[float, typer.Option(help="1: Poisson; below: in bursts; above: more evenly.")] = 1.0,
    max_concurrency: Annotated[str, typer.Option(help="Most conversations at once; or several, by commas.")] = "",
    duration: Annotated[float, typer.Option(min=0, help="Seconds after which none begins; 0: no end.")] = 0.0,
    warmup: Annotated[int, typer.Option(min=0, max=10_000, help="Conversations before the measurement.")] = 1,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Limits in ms of ttft, tpot, itl, e2el: ttft:200 tpot:50.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers of full length.")] = False,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the prompts and of when they are sent.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="A tokenizer.json, or its folder: exact lengths.")] = "",
    extra_body: Annotated[str, typer.Option(help="Further fields of each request, as a JSON object.")] = "",
    header: Annotated[list[str] | None, typer.Option(help="NAME:VALUE; may be said several times.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    idle_timeout: Annotated[float, typer.Option(help="Seconds without a byte of an answer.")] = 120.0,
    output: Annotated[str, typer.Option(help="A file for the results as JSON.")] = "",
    plot: Annotated[str, typer.Option(help="A file for a picture of the sweep, .svg.")] = "",
) -> None:
    """Put load on an endpoint, and show what its clients see."""
    from pathlib import Path

    from kvasir_engine.client.bench.datasets import DatasetOptions
    from kvasir_engine.client.bench.load import LoadOptions
    from kvasir_engine.client.bench.run import BenchFailed, BenchRun
    from kvasir_engine.client.bench.run import bench as run_bench
    from kvasir_engine.client.bench.settings import (
        checked,
        counter,
        goodput_limits,
        headers_of,
        points_of,
    )
    from kvasir_engine.client.bench.settings import extra_body as parsed_body
    from kvasir_engine.client.endpoint import CallTimeouts, address_of

    if more and not goodput:
        raise UserError(f"{more[0]!r} is one argument too many; only --goodput has several values")
    if plot and not plot.endswith(".svg"):
        raise UserError(f"--plot {plot}: only .svg can be drawn")
    if not 0 < burstiness < float("inf"):
        raise UserError(f"--burstiness {burstiness:g}: has to be above 0 and finite")
    body: dict[str, Any] = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}
    run = BenchRun(
        address_of(url, api_key),
        checked(
            DatasetOptions(
                dataset,
                dataset_path,
                num_prompts,
                input_len,
                output_len,
                range_ratio,
                prefix_len,
                num_prefixes,
                turns,
                seed,
            )
        ),
        tuple(points_of(request_rate, max_concurrency)),
        LoadOptions(
            model,
            api,
            burstiness=burstiness,
            duration=duration or None,
            seed=seed,
            body={**body, **parsed_body(extra_body)},
            limits=goodput_limits([*(goodput or []), *(more or [])]),
        ),
        CallTimeouts(idle=idle_timeout, total=timeout),
        warmup,
        counter(tokenizer),
        headers_of(header or []),
        Path(output) if output else None,
        Path(plot) if plot else None,
    )
    try:
        run_bench(run)
    except BenchFailed as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("kvasir: stopped\n")
        raise typer.Exit(130) from None


def chat(
    url: Annotated[str, typer.Argument(help="An endpoint. Default: that of `kvasir up` on this machine.")] = "",
    system: Annotated[str, typer.Option(help="The system prompt.")] = "",
    model: Model = "",
    api_key: Key = "",
    max_tokens: MaxTokens = 0,
    temperature: Temperature = None,
) -> None:
    """Talk with a model in the terminal."""
    from kvasir_engine.client.terminal.console import Console, ConsoleFailed
    from kvasir_engine.client.terminal.console import chat as run_chat
    from kvasir_engine.client.terminal.conversation import ChatHistory

    console = Console(_address(url, api_key), model, _fields(max_tokens, temperature))
    try:
        run_chat(console, ChatHistory(system))
    except ConsoleFailed as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def complete(
    prompt: Annotated[str, typer.Argument(help="What is continued. Default: standard input.")] = "",
    url: Annotated[str, typer.Option(help="An endpoint. Default: that of `kvasir up` on this machine.")] = "",
    model: Model = "",
    api_key: Key = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends it; may be said several times.")] = None,
) -> None:
    """Continue a text."""
    from kvasir_engine.client.terminal.console import Console, ConsoleFailed
    from kvasir_engine.client.terminal.console import complete as run_complete

    console = Console(_address(url, api_key), model, _fields(max_tokens, temperature, stop))
    try:
        text = prompt or sys.stdin.read()
        if not text:
            raise UserError("there is no prompt, neither as an argument nor on standard input")
        run_complete(console, text)
    except ConsoleFailed as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _address(url: str, key: str) -> "EndpointAddress":
    """Of the endpoint that was named, or of the only local run. Raises UserError."""
    from kvasir_engine.client.endpoint import address_of

    if not url:
        from kvasir_operator.local import state
        from kvasir_operator.local.errors import LocalError

        try:
            url = state.find(None).url
        except LocalError as error:
            raise UserError(f"no URL was given, and {error}") from None
    return address_of(url, key)


def _fields(max_tokens: int, temperature: float | None, stop: list[str] | None = None) -> dict[str, Any]:
    said = {"max_tokens": max_tokens or None, "temperature": temperature, "stop": stop or None}
    return {name: value for name, value in said.items() if value is not None}


def _fail(message: str) -> None:
    sys.stderr.write(f"kvasir: error: {message}\n")
    raise typer.Exit(1) from None
