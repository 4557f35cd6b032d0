"""`kvasir worker` and `kvasir serve`: from the command line to a served port.

Imports of torch and NIXL wait until a command runs, so that `kvasir --help` is quick.
"""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvasir_engine.api.special_token_policy import PARSE_HELP, ParseSpecial, parse_special
from kvasir_engine.connector.fabric import FABRICS
from kvasir_engine.core.waiting_queue import QueueLimits
from kvasir_engine.errors import UserError
from kvasir_engine.executor.node_protocol import nodes_of
from kvasir_engine.protocol import CAPABILITIES, LATEST, VERSION, Hello, Role
from kvasir_engine.thread_wait_policy import let_threads_sleep

if TYPE_CHECKING:
    from kvasir_engine.entrypoints.build import EngineOptions

Named = TypeVar("Named", bound=str)

log = logging.getLogger("worker")

Model = Annotated[
    str, typer.Option(help="hf://org/name[@rev], file:///path or package://name", envvar="KVASIR_MODEL")
]
Revision = Annotated[str, typer.Option(help="of a hub model", envvar="KVASIR_REVISION")]
ServedName = Annotated[str, typer.Option(help="the name in the API", envvar="KVASIR_SERVED_MODEL_NAME")]
MaxLength = Annotated[
    int, typer.Option(min=0, help="most tokens of a sequence, 0: the model's own", envvar="KVASIR_MAX_LENGTH")
]
Host = Annotated[str, typer.Option(envvar="KVASIR_HOST")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: a free one", envvar="KVASIR_PORT")]
DType = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32", envvar="KVASIR_DTYPE")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda", envvar="KVASIR_DEVICE")]
Attention = Annotated[
    str, typer.Option(help="auto, torch or flashinfer (NVIDIA GPUs)", envvar="KVASIR_ATTENTION_BACKEND")
]
OverlapName = Annotated[
    str,
    typer.Option(
        help="prepare a step while the one before runs: auto (on GPUs), on or off", envvar="KVASIR_OVERLAP"
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="on GPUs: decode without CUDA graphs", envvar="KVASIR_ENFORCE_EAGER"),
]
GraphBatch = Annotated[
    int,
    typer.Option(
        min=0,
        help="sequences of the largest decode batch that is a CUDA graph, 0: max-running, up to 1024",
        envvar="KVASIR_CUDA_GRAPH_MAX_BS",
    ),
]
TensorParallel = Annotated[int, typer.Option(min=1, help="processes, or GPUs", envvar="KVASIR_TENSOR_PARALLEL")]
PageSize = Annotated[int, typer.Option(min=1, max=256, help="tokens a page", envvar="KVASIR_PAGE_SIZE")]
GpuSharers = Annotated[
    int,
    typer.Option(
        min=1,
        help="workers that divide a GPU's memory among them, this one included",
        envvar="KVASIR_GPU_SHARERS",
    ),
]
CacheMemory = Annotated[
    str,
    typer.Option(
        help="memory of the KV pool, all ranks, such as 512Mi; 0: from what is free",
        envvar="KVASIR_KV_CACHE_MEMORY",
    ),
]
MaxRunning = Annotated[int, typer.Option(min=1, help="most sequences in a batch", envvar="KVASIR_MAX_RUNNING")]
PrefillChunk = Annotated[int, typer.Option(min=1, help="most prompt tokens a step", envvar="KVASIR_PREFILL_CHUNK")]
FabricName = Annotated[str, typer.Option(help="auto, rdma, tcp or shm", envvar="KVASIR_FABRIC")]
Digests = Annotated[bool, typer.Option(help="check each page that moved before use", envvar="KVASIR_KV_DIGESTS")]
CheckPages = Annotated[
    bool,
    typer.Option(help="debugging: check at each step that every page has one owner", envvar="KVASIR_CHECK_PAGES"),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        help="the same bits for a request in any batch, on CPUs in bfloat16; slower", envvar="KVASIR_DETERMINISTIC"
    ),
]
Quantized = Annotated[
    str,
    typer.Option(
        help="none, or int8: of the layers' weights, a scale an output, on CPUs", envvar="KVASIR_QUANTIZATION"
    ),
]
MaxWaiting = Annotated[
    int, typer.Option(min=0, help="most requests that wait, 0: any; more get 503", envvar="KVASIR_MAX_WAITING")
]
QueueSeconds = Annotated[
    float,
    typer.Option(min=0, help="longest wait for a first step, 0: any; then 503", envvar="KVASIR_QUEUE_SECONDS"),
]
NodeCount = Annotated[
    int, typer.Option(min=1, help="machines that the ranks are divided among, evenly", envvar="KVASIR_NNODES")
]
NodeRank = Annotated[
    int,
    typer.Option(
        help="which of them this is; 0 leads. The others load the model themselves, have to be told the same as "
        "the leader, and leave to it what concerns requests: lengths, limits, queues, overlap, names",
        envvar="KVASIR_NODE_RANK",
    ),
]
LeaderAddress = Annotated[
    str,
    typer.Option(help="HOST:PORT at which the leader listens for the other nodes", envvar="KVASIR_DIST_INIT_ADDR"),
]
DrainSeconds = Annotated[float, typer.Option(min=0, help="to finish what runs", envvar="KVASIR_DRAIN_SECONDS")]

UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity in bytes. Raises UserError."""
    digits = quantity.rstrip("kKMGTi")
    try:
        value = float(digits) * UNITS[quantity[len(digits) :]]
    except (KeyError, ValueError):
        value = -1.0
    if not 0 <= value < 2**60:
        raise UserError(f"{quantity!r} is no amount of memory; write for example 512Mi or 4Gi")
    return int(value)


def one_of(what: str, name: str, known: Iterable[Named]) -> Named:
    """The one called so. Raises UserError, which says what there is."""
    choices = list(known)
    found = next((each for each in choices if each == name), None)
    if found is None:
        raise UserError(f"{what} {name!r} is none of {', '.join(choices)}")
    return found


def worker(
    role: Annotated[str, typer.Option(help="prefill, decode or both", envvar="KVASIR_ROLE")],
    model: Model,
    revision: Revision = "",
    served_model_name: ServedName = "",
    max_length: MaxLength = 0,
    host: Host = "0.0.0.0",
    port: Port = 8000,
    dtype: DType = "auto",
    device: Device = "auto",
    attention_backend: Attention = "auto",
    overlap: OverlapName = "auto",
    enforce_eager: EnforceEager = False,
    cuda_graph_max_bs: GraphBatch = 0,
    tensor_parallel: TensorParallel = 1,
    page_size: PageSize = 16,
    kv_cache_memory: CacheMemory = "0",
    gpu_sharers: GpuSharers = 1,
    max_running: MaxRunning = 64,
    prefill_chunk: PrefillChunk = 512,
    fabric: FabricName = "auto",
    kv_digests: Digests = True,
    check_pages: CheckPages = False,
    deterministic: Deterministic = False,
    quantization: Quantized = "none",
    max_waiting: MaxWaiting = 1024,
    queue_seconds: QueueSeconds = 0.0,
    drain_seconds: DrainSeconds = 600.0,
    nnodes: NodeCount = 1,
    node_rank: NodeRank = 0,
    dist_init_addr: LeaderAddress = "",
) -> None:
    """One worker: computes prompts (prefill), generates (decode), or both."""
    let_threads_sleep(device)
    from kvasir_engine.attention.registry import BACKENDS
    from kvasir_engine.entrypoints.build import OVERLAPS, EngineOptions
    from kvasir_engine.executor.model_runner import QUANTIZATIONS

    chosen = one_of("role", role, ROLES)
    over = one_of("fabric", fabric, FABRICS)
    options = EngineOptions(
        model=model,
        revision=revision or None,
        dtype=dtype,
        device=device,
        attention_backend=one_of("attention backend", attention_backend, BACKENDS),
        overlap=one_of("overlap", overlap, OVERLAPS),
        enforce_eager=enforce_eager,
        cuda_graph_max_bs=cuda_graph_max_bs,
        tensor_parallel=tensor_parallel,
        max_length=max_length,
        page_size=page_size,
        kv_cache_memory=bytes_of(kv_cache_memory),
        gpu_sharers=gpu_sharers,
        max_running=max_running,
        prefill_chunk=prefill_chunk,
        fabric=over,
        kv_digests=kv_digests,
        check_pages=check_pages,
        deterministic=deterministic,
        quantization=one_of("quantization", quantization, QUANTIZATIONS),
        queue=QueueLimits(max_waiting, queue_seconds),
        nodes=nodes_of(nnodes, node_rank, dist_init_addr, tensor_parallel),
    )
    if node_rank:
        from kvasir_engine.entrypoints.follower_node import follow

        follow(options, chosen, host, port, drain_seconds)
        return
    asyncio.run(_worker(options, chosen, served_model_name or model, host, port, drain_seconds))


async def _worker(options: "EngineOptions", role: Role, name: str, host: str, port: int, drain: float) -> None:
    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import check_port, end_at_sigterm, listen, serve
    from kvasir_engine.entrypoints.build import build
    from kvasir_engine.entrypoints.worker_server import WorkerServer
    from kvasir_engine.keepalive import notice_silence
    from kvasir_engine.supervisor import end_process

    end_at_sigterm()
    check_port(host, port)  # before minutes of loading; the port opens after it
    loop, leave = asyncio.get_running_loop(), asyncio.Event()

    def another_leaves() -> None:
        loop.call_soon_threadsafe(leave.set)

    thread, handoff = await asyncio.to_thread(build, options, role, True, another_leaves, end_process)
    assert handoff is not None
    hello = Hello(
        VERSION,
        thread.engine.epoch,
        role,
        name,
        thread.engine.max_length,
        options.max_running,
        handoff.endpoint,
        latest=LATEST,
        capabilities=CAPABILITIES,
    )
    server = WorkerServer(thread, hello)
    leaving = GracefulShutdown(server, drain)
    server.show_status(leaving)
    try:
        sock = listen(host, port)
        notice_silence(sock)  # requests of a router whose machine is lost are aborted
        log.info("serving role=%s address=%s:%d", role, *sock.getsockname()[:2])
        await serve(server.app, sock, leaving, leave)
    finally:
        thread.stop()
        handoff.stop()
        thread.engine.runner.close()


def serve(
    model: Annotated[str, typer.Argument(help="hf://org/name[@rev], file:///path or package://name")],
    revision: Revision = "",
    served_model_name: ServedName = "",
    max_length: MaxLength = 0,
    host: Host = "0.0.0.0",
    port: Port = 8000,
    dtype: DType = "auto",
    device: Device = "auto",
    attention_backend: Attention = "auto",
    overlap: OverlapName = "auto",
    enforce_eager: EnforceEager = False,
    cuda_graph_max_bs: GraphBatch = 0,
    tensor_parallel: TensorParallel = 1,
    page_size: PageSize = 16,
    kv_cache_memory: CacheMemory = "0",
    max_running: MaxRunning = 64,
    prefill_chunk: PrefillChunk = 512,
    check_pages: CheckPages = False,
    deterministic: Deterministic = False,
    quantization: Quantized = "none",
    max_waiting: MaxWaiting = 1024,
    queue_seconds: QueueSeconds = 0.0,
    api_keys_file: Annotated[str, typer.Option(envvar="KVASIR_API_KEYS_FILE")] = "",
    parse_special_tokens: Annotated[
        str, typer.Option(help=PARSE_HELP, envvar="KVASIR_PARSE_SPECIAL_TOKENS")
    ] = "prompts",
    drain_seconds: DrainSeconds = 30.0,
) -> None:
    """The OpenAI API over one engine, in one process."""
    let_threads_sleep(device)
    from kvasir_engine.attention.registry import BACKENDS
    from kvasir_engine.entrypoints.build import OVERLAPS, EngineOptions
    from kvasir_engine.executor.model_runner import QUANTIZATIONS

    options = EngineOptions(
        model=model,
        revision=revision or None,
        dtype=dtype,
        device=device,
        attention_backend=one_of("attention backend", attention_backend, BACKENDS),
        overlap=one_of("overlap", overlap, OVERLAPS),
        enforce_eager=enforce_eager,
        cuda_graph_max_bs=cuda_graph_max_bs,
        tensor_parallel=tensor_parallel,
        max_length=max_length,
        page_size=page_size,
        kv_cache_memory=bytes_of(kv_cache_memory),
        max_running=max_running,
        prefill_chunk=prefill_chunk,
        check_pages=check_pages,
        deterministic=deterministic,
        quantization=one_of("quantization", quantization, QUANTIZATIONS),
        queue=QueueLimits(max_waiting, queue_seconds),
    )
    parse = parse_special(parse_special_tokens)
    asyncio.run(_serve(options, served_model_name or model, parse, host, port, api_keys_file, drain_seconds))


async def _serve(
    options: "EngineOptions", name: str, parse: ParseSpecial, host: str, port: int, keys_file: str, drain: float
) -> None:
    from prometheus_client import CollectorRegistry

    from kvasir_engine.api.app import create_app
    from kvasir_engine.api.auth import ApiKeys
    from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
    from kvasir_engine.api.http.server import check_port, listen
    from kvasir_engine.api.http.server import serve as serve_app
    from kvasir_engine.api.lifecycle import Lifecycle
    from kvasir_engine.api.tokenizer import load_served_model
    from kvasir_engine.core.inprocess_client import InProcessClient
    from kvasir_engine.core.metrics import EngineCollector
    from kvasir_engine.entrypoints.build import build
    from kvasir_engine.model.loading.resolver import resolve
    from kvasir_engine.supervisor import end_process

    check_port(host, port)
    thread, _ = await asyncio.to_thread(build, options, "both", False, ended=end_process)
    model = await asyncio.to_thread(load_served_model, resolve(options.model, options.revision), name, parse)
    registry, lifecycle = CollectorRegistry(), Lifecycle()
    registry.register(EngineCollector(thread.engine))
    keys = ApiKeys(Path(keys_file)) if keys_file else None
    try:
        with ThreadPoolExecutor(2, "kvasir-tokenizer") as executor:
            client = InProcessClient(thread)
            app = create_app(client, model, registry=registry, lifecycle=lifecycle, executor=executor, keys=keys)
            leaving = GracefulShutdown(lifecycle, drain)
            sock = listen(host, port)
            log.info("serving model=%r address=%s:%d", name, *sock.getsockname()[:2])
            await serve_app(app, sock, leaving)
    finally:
        thread.stop()
        thread.engine.runner.close()
