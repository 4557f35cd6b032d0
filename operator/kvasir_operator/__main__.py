"""`kvasir-operator`: the commands."""

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from kvasir_engine.environment import refuse_unknown
from kvasir_engine.errors import UserError
from kvasir_engine.interruptible import run_interruptible
from kvasir_operator.api import API_VERSION, KIND
from kvasir_operator.api.structural_schema import LIMIT
from kvasir_operator.cluster.client import ClientTransport, Cluster, connect
from kvasir_operator.cluster.election import wait_for_leader
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_client import ClusterLease
from kvasir_operator.controller import Controller, ControllerSettings, WatchDied, Webhook
from kvasir_operator.crd import crd_yaml, role_crd_yaml
from kvasir_operator.plan import trace
from kvasir_operator.pod_validation import RESTRICTED, Level, PodPolicy
from kvasir_operator.render import Issuer, Options

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def begin() -> None:
    """Serves InferenceServices in a cluster."""
    try:
        refuse_unknown(os.environ)
    except UserError as error:
        _fail(str(error))


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
    leader_elect: Annotated[
        bool, typer.Option(help="Work only while holding a Lease, so that several replicas can run.")
    ] = False,
    lease_name: Annotated[str, typer.Option(help="Name of the Lease, in the operator's namespace.")] = "kvasir",
    authority_secret: Annotated[
        str,
        typer.Option(help="Secret in the operator's namespace with the authority that signs pods' certificates."),
    ] = "kvasir-authority",
    metrics_port: Annotated[int, typer.Option(help="Port of the operator's own metrics; 0: none.")] = 0,
    webhook_port: Annotated[int, typer.Option(help="Port of the admission webhook; 0: none.")] = 0,
    webhook_certificates: Annotated[
        Path, typer.Option(help="Folder with the webhook's tls.crt and tls.key.")
    ] = Path("/etc/kvasir/webhook"),
    operator_class: Annotated[
        str, typer.Option(help="Serve InferenceServices with this spec.operatorClass. Default: those without.")
    ] = "",
    pod_monitors: Annotated[bool, typer.Option(help="Make PodMonitors where they are served.")] = True,
    issuer_name: Annotated[
        str,
        typer.Option(
            help="Have cert-manager issue pods' certificates by this issuer. Default: the operator signs."
        ),
    ] = "",
    issuer_kind: Annotated[
        str, typer.Option(help="Its kind: Issuer (one in each service's namespace), ClusterIssuer, or another's.")
    ] = Issuer("").kind,
    issuer_group: Annotated[str, typer.Option(help="Its API group.")] = Issuer("").group,
    template_policy: Annotated[
        Level, typer.Option(help="The level of the Pod Security Standards that pods may have.")
    ] = RESTRICTED.level,
    rdma: Annotated[
        bool, typer.Option(help="Let pods with transfer.rdmaResource have IPC_LOCK at any level.")
    ] = RESTRICTED.rdma,
) -> None:
    """Run the controller until SIGTERM."""
    if bool(namespace) == all_namespaces:
        _fail("give either --namespace or --all-namespaces")
    if not issuer_name and (issuer_kind, issuer_group) != (Issuer("").kind, Issuer("").group):
        _fail("--issuer-kind and --issuer-group are of an issuer: say --issuer-name")
    if not own_namespace:
        _fail("--own-namespace is needed: the authority that signs pods' certificates is there, and the Lease")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for quiet in ("kopf", "aiohttp.access"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    try:
        client = connect()
        if not Cluster(ClientTransport(client)).serves(API_VERSION, KIND):
            _fail(f"the cluster does not know {KIND} of {API_VERSION}; apply the CustomResourceDefinition first")
    except ClusterError as error:
        _fail(str(error))
    options = Options(
        engine_image=engine_image,
        operator_namespace=own_namespace,
        metrics_namespace=metrics_namespace,
        pod_monitors=pod_monitors,
        issuer=Issuer(issuer_name, issuer_kind, issuer_group) if issuer_name else None,
        operator_class=operator_class,
        operator=f"{own_namespace}/{lease_name}" if leader_elect else "",
        template_policy=PodPolicy(template_policy, rdma),
    )
    lease = (own_namespace, lease_name) if leader_elect else None
    files = [str(webhook_certificates / name) for name in ("tls.crt", "tls.key")]
    webhook = Webhook(webhook_port, *files) if webhook_port else None
    setup = ControllerSettings(
        tuple(namespace or ()), options, liveness, (own_namespace, authority_secret), lease, metrics_port, webhook
    )
    controller = Controller(client, setup)
    try:
        run_interruptible(controller.run())
    except WatchDied as error:
        typer.echo(f"kvasir-operator: error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def check(
    own_namespace: Annotated[str, typer.Option(help="Where the operator runs.")],
    lease_name: Annotated[str, typer.Option(help="Name of its Lease.")] = "kvasir",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a sign of life.")] = 60.0,
) -> None:
    """Say whether the installation works: the resource is known, and an operator renews its Lease."""
    try:
        transport = ClientTransport(connect())
        if not Cluster(transport).serves(API_VERSION, KIND):
            _fail(f"the cluster does not know {KIND} of {API_VERSION}")
        holder = wait_for_leader(ClusterLease(transport, own_namespace, lease_name), timeout)
    except ClusterError as error:
        _fail(str(error))
    if not holder:
        _fail(f"no operator renewed the Lease {own_namespace}/{lease_name} within {timeout:g} s")
    typer.echo(f"{holder} leads")


@app.command()
def crd(
    rules: Annotated[bool, typer.Option(help="With CEL rules, which API servers know from 1.25 on.")] = True,
    roles: Annotated[bool, typer.Option("--roles", help="The definition of InferenceRole instead.")] = False,
) -> None:
    """Print the CustomResourceDefinition as YAML."""
    typer.echo(role_crd_yaml() if roles else crd_yaml(rules), nl=False)


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


def _fail(reason: str) -> NoReturn:
    typer.echo(f"kvasir-operator: error: {reason}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The console script."""
    app(prog_name="kvasir-operator")


if __name__ == "__main__":
    main()
