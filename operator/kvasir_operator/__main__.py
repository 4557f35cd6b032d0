"""`kvasir-operator`: kopf wiring only. Events come in and queue their InferenceService; nothing is decided here."""

import asyncio
import json
import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import kopf
import typer

from kvasir_operator.ask import PodReader
from kvasir_operator.cluster import Cluster, connect
from kvasir_operator.crd import crd_yaml
from kvasir_operator.facts import FactsReader
from kvasir_operator.plan import trace
from kvasir_operator.port import ClusterError
from kvasir_operator.queue import WorkQueue
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.render import Options
from kvasir_operator.render.names import SERVICE_LABEL
from kvasir_operator.schema import LIMIT
from kvasir_operator.spec import API_VERSION, GROUP, KIND, PLURAL, VERSION

log = logging.getLogger("kvasir.operator")
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

# What an InferenceService's status and next steps depend on, beside itself.
WATCHED = (("apps", "v1", "deployments"), ("", "v1", "pods"), ("", "v1", "services"), ("batch", "v1", "jobs"))

# How often a service is looked at while its model is loaded, of which no event tells.
PROGRESS_SECONDS = 5.0

Key = tuple[str, str]


@app.command()
def run(
    namespace: Annotated[list[str] | None, typer.Option(help="Watch this namespace; may be repeated.")] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", help="Watch all namespaces.")] = False,
    engine_image: Annotated[
        str, typer.Option(envvar="KVASIR_ENGINE_IMAGE", help="Image of routers and workers.")
    ] = Options().engine_image,
    liveness: Annotated[str, typer.Option(help="URL to serve liveness at.")] = "http://0.0.0.0:8080/healthz",
    own_namespace: Annotated[
        str, typer.Option(envvar="POD_NAMESPACE", help="Where the operator runs: NetworkPolicies let it in.")
    ] = "",
    metrics_namespace: Annotated[
        str, typer.Option(help="Where metrics are collected: NetworkPolicies let its pods in.")
    ] = "",
    pod_monitors: Annotated[bool, typer.Option(help="Make PodMonitors where they are served.")] = True,
) -> None:
    """Run the controller until SIGTERM."""
    if bool(namespace) == all_namespaces:
        _fail("give either --namespace or --all-namespaces")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        cluster = connect()
        if not cluster.serves(API_VERSION, KIND):
            _fail(f"the cluster does not know {KIND} of {API_VERSION}; apply the CustomResourceDefinition first")
    except ClusterError as error:
        _fail(str(error))
    options = Options(
        engine_image=engine_image,
        operator_namespace=own_namespace,
        metrics_namespace=metrics_namespace,
        pod_monitors=pod_monitors,
    )
    asyncio.run(_operate(cluster, options, namespace or [], liveness))


@app.command()
def crd() -> None:
    """Print the CustomResourceDefinition as YAML."""
    typer.echo(crd_yaml(), nl=False)


@app.command()
def plan(
    prefill: Annotated[int, typer.Option(min=0, max=1000, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=0, max=1000, help="Decode workers.")] = 1,
    max_surge: Annotated[str, typer.Option(help="A count or a percentage, a role.")] = "1",
    max_unavailable: Annotated[str, typer.Option(help="A count or a percentage, a role.")] = "0",
    from_state: Annotated[
        str, typer.Option(metavar="JSON", help="Begin here instead: a state of -o json, @FILE, or - for stdin.")
    ] = "",
    output: Annotated[Literal["table", "json"], typer.Option("-o", "--output", help="Form.")] = "table",
) -> None:
    """Print the states that a rollout to another KV fingerprint passes through. Asks no cluster."""
    try:
        if from_state:
            start = trace.parse_state(_text(from_state).encode())
        else:
            for flag, value in (("--max-surge", max_surge), ("--max-unavailable", max_unavailable)):
                if not re.match(LIMIT, value):
                    _fail(f"{flag} must be a count or a percentage, is {value!r}")
            start = trace.beginning(prefill, decode, max_surge, max_unavailable)
    except (trace.BadState, OSError) as error:
        _fail(f"--from-state: {error}")
    passed = list(trace.trace(start))
    typer.echo(json.dumps(trace.document(passed), indent=2) if output == "json" else "\n".join(trace.table(passed)))


def _text(value: str) -> str:
    if value == "-":
        return sys.stdin.read()
    return Path(value[1:]).read_text() if value.startswith("@") else value


async def _operate(cluster: Cluster, options: Options, namespaces: list[str], liveness: str) -> None:
    loop = asyncio.get_running_loop()

    def again(namespace: str, name: str) -> None:
        loop.call_soon_threadsafe(queue.add_later, (namespace, name), PROGRESS_SECONDS)

    reconciler = Reconciler(cluster, options, FactsReader().read, progress=PodReader().progress, again=again)

    async def handle(key: Key) -> bool:
        return await asyncio.to_thread(reconciler.reconcile, *key)

    queue: WorkQueue[Key] = WorkQueue(handle)
    log.info("watching namespaces=%s", ",".join(namespaces) or "all")
    try:
        await kopf.operator(
            registry=_registry(queue),
            settings=_settings(),
            standalone=True,  # kopf's peering is no leader election
            clusterwide=not namespaces,
            namespaces=namespaces,
            liveness_endpoint=liveness,
        )
    finally:
        await queue.close()


def _registry(queue: WorkQueue[Key]) -> kopf.OperatorRegistry:
    """Every event, whatever it says, queues its InferenceService. Event handlers leave no traces on objects."""
    registry = kopf.OperatorRegistry()

    async def on_service(namespace: str, name: str, **_: Any) -> None:
        queue.add((namespace, name), now=True)  # an edit may be what a failing one waits for

    async def on_part(namespace: str, labels: kopf.Labels, **_: Any) -> None:
        queue.add((namespace, labels[SERVICE_LABEL]))

    kopf.on.login(registry=registry)(kopf.login_via_client)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(on_service)
    for group, version, plural in WATCHED:
        kopf.on.event(group, version, plural, registry=registry, id=plural, labels={SERVICE_LABEL: kopf.PRESENT})(
            on_part
        )
    return registry


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True  # kinds and namespaces are given; no rights to list CRDs are needed
    settings.watching.connect_timeout = 10.0
    settings.watching.server_timeout = 240  # the API server takes whole seconds only
    return settings


def _fail(reason: str) -> NoReturn:
    typer.echo(f"kvasir-operator: error: {reason}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The console script."""
    app(prog_name="kvasir-operator")


if __name__ == "__main__":
    main()
