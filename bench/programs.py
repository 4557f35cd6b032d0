"""What programs gain by forks and batches: time and cache hits against the same calls as plain requests.

    python -m bench.programs [URL]

Without a URL it starts `kvasir serve` with SmolLM2 on a free port. Each example is run on a cache of its own
(`cache_salt`); then the same bodies are sent one after another, in the order in which they were first sent, on
another one. `plain, no cache`: the same again, each request with a salt of its own, as if nothing were shared. The
extraction needs an endpoint with structured output; where it is refused, the row says so.
"""

import argparse
import importlib.util
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
from bench import systems

from kvasir.program import Endpoint, ProgramError, ProgramUsage

EXAMPLES = Path(__file__).parents[1] / "examples"
STEP_TOKENS = 16
Call = tuple[str, dict[str, Any]]
Run = Callable[[ModuleType, Endpoint], ProgramUsage]


@dataclass(frozen=True)
class Cost:
    """What some calls took."""

    seconds: float
    prompt_tokens: int
    cached_tokens: int

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that was cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def _agent(module: ModuleType, endpoint: Endpoint) -> ProgramUsage:
    question = "What do three apples and a milk cost together?"
    return module.agent.run(endpoint, question=question, most_actions=3).usage  # type: ignore[no-any-return]


def _tree(module: ModuleType, endpoint: Endpoint) -> ProgramUsage:
    run = module.tree_of_thought.run(endpoint, problem=module.PROBLEM, step_tokens=STEP_TOKENS, method="greedy")
    return run.usage  # type: ignore[no-any-return]


def _classification(module: ModuleType, endpoint: Endpoint) -> ProgramUsage:
    states = module.classify.run_batch(endpoint, [{"text": text, "method": "greedy"} for text in module.TEXTS])
    for state in states:
        if state.error:
            raise ProgramError(state.error)
    used = [state.usage for state in states]
    return ProgramUsage(
        sum(each.calls for each in used),
        sum(each.prompt_tokens for each in used),
        sum(each.cached_tokens for each in used),
        sum(each.completion_tokens for each in used),
    )


def _extraction(module: ModuleType, endpoint: Endpoint) -> ProgramUsage:
    return module.extract.run(endpoint, document=module.DOCUMENT).usage  # type: ignore[no-any-return]


def _consistency(module: ModuleType, endpoint: Endpoint) -> ProgramUsage:
    return module.most_say.run(endpoint, question=module.QUESTION).usage  # type: ignore[no-any-return]


RUNS: dict[str, Run] = {
    "agent": _agent,
    "tree_of_thought": _tree,
    "classification": _classification,
    "extraction": _extraction,
    "self_consistency": _consistency,
}


def example(name: str) -> ModuleType:
    """A file of `examples/` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_program(url: str, name: str) -> tuple[Cost, list[Call]]:
    """Run an example; what it took, and its calls. Raises ProgramError."""
    calls: list[Call] = []
    module = example(name)
    salt = {"cache_salt": secrets.token_hex(8)}
    with Endpoint(url, extra_body=salt, observe=lambda path, body: calls.append((path, body))) as endpoint:
        began = time.perf_counter()
        usage = RUNS[name](module, endpoint)
        return Cost(time.perf_counter() - began, usage.prompt_tokens, usage.cached_tokens), calls


def as_requests(url: str, calls: list[Call], shared: bool) -> Cost:
    """Send the calls one after another; what that took. `shared`: with one cache for all of them."""
    salt, prompts, cached = secrets.token_hex(8), 0, 0
    with httpx.Client(timeout=600) as client:
        model = client.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"]
        began = time.perf_counter()
        for place, (path, body) in enumerate(calls):
            own = {"model": model, "cache_salt": salt if shared else f"{salt}-{place}"}
            answer = client.post(f"{url}/v1/{path}", json={**own, **body})
            if answer.status_code == 200:  # else: a way of `select` that the endpoint does not know
                usage = answer.json()["usage"]
                prompts += usage["prompt_tokens"]
                cached += usage["prompt_tokens_details"]["cached_tokens"]
        return Cost(time.perf_counter() - began, prompts, cached)


def row(url: str, name: str) -> str:
    """An example's line of the table."""
    try:
        program, calls = as_program(url, name)
    except ProgramError as error:
        return f"| {name} | did not run: {error} | | | | | |"
    plain, apart = as_requests(url, calls, True), as_requests(url, calls, False)
    times = [program.seconds, plain.seconds, apart.seconds]
    cells = [name, str(len(calls)), f"{program.hit_rate:.1%}", f"{plain.hit_rate:.1%}"]
    return f"| {' | '.join([*cells, *(f'{each:.1f}' for each in times)])} |"


def report(url: str, names: list[str]) -> None:
    """Print the table."""
    print("| program | calls | cached | plain: cached | seconds | plain: seconds | plain, no cache: seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        print(row(url, name), flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Programs against the same calls as plain requests.")
    parser.add_argument("url", nargs="?", help="an endpoint that serves already")
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS])
    arguments = parser.parse_args()
    if arguments.url:
        report(arguments.url.rstrip("/"), arguments.only)
        return
    with tempfile.TemporaryDirectory() as scratch:
        server = systems.Server("kvasir", systems.colocated(Path(scratch)), Path(scratch) / "log")
        try:
            server.wait_ready()
            report(server.url, arguments.only)
        except systems.Failed as error:
            sys.exit(f"programs: {error}")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
