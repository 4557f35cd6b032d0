"""One configuration: its fields are the flags, the variables, what ranks are sent, and the fingerprint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import typer
from isvc_cases import SMOL, service
from safetensors.torch import save_file
from typer.testing import CliRunner

from kvasir_engine.config import FIELDS, KV_FIELDS, EngineConfig, config_of
from kvasir_engine.entrypoints.cli import app
from kvasir_engine.environment import KNOWN, ROUTER, WORKER, refuse_unknown
from kvasir_engine.errors import UserError
from kvasir_engine.executor.fingerprint import fingerprint_of
from kvasir_engine.executor.rank_protocol import Setup, decode_to_main, encode
from kvasir_engine.model.loading.weight_loader import choose_dtype
from kvasir_engine.model.models.registry import load_config
from kvasir_engine.protocol import Fingerprint
from kvasir_operator.__main__ import app as operator
from kvasir_operator.api import Spec
from kvasir_operator.api.kv_fingerprint import fingerprint as label

OTHER: dict[str, Any] = {
    "model": "other",
    "role": "decode",
    "revision": "v2",
    "served_model_name": "name",
    "max_length": 512,
    "host": "127.0.0.1",
    "port": 0,
    "dtype": "float32",
    "device": "cpu",
    "attention_backend": "torch",
    "overlap": "on",
    "jump_forward": "off",
    "enforce_eager": True,
    "cuda_graph_max_bs": 8,
    "tensor_parallel": 2,
    "page_size": 24,
    "kv_cache_memory": 1 << 20,
    "gpu_sharers": 2,
    "max_running": 8,
    "prefill_chunk": 64,
    "fabric": "tcp",
    "kv_digests": False,
    "check_pages": True,
    "deterministic": True,
    "quantization": "int8",
    "max_waiting": 3,
    "queue_seconds": 1.5,
    "drain_seconds": 1.0,
    "nnodes": 4,
    "node_rank": 1,
    "dist_init_addr": "127.0.0.1:5557",
    "tls_dir": "/etc/kvasir/tls",
    "worker_port": 9443,
    "verify_cached_pages": "sampled",
    "encryption": "off",
}
"""A value that is not the default of each field: a new field has to be said here."""
TOGETHER: dict[str, dict[str, Any]] = {
    "nnodes": {"tensor_parallel": 4, "dist_init_addr": "127.0.0.1:1"},
    "node_rank": {"nnodes": 2, "tensor_parallel": 2, "dist_init_addr": "127.0.0.1:1"},
    "dist_init_addr": {"nnodes": 2, "tensor_parallel": 2},
}
"""What a field takes with it."""


def test_every_field_has_another_value_here() -> None:
    assert set(OTHER) == set(FIELDS)


def model_in(folder: Path, value: float) -> str:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.full((32,), value)}, folder / "model.safetensors")
    return f"file://{folder}"


def of_engine(config: EngineConfig) -> Fingerprint:
    folder = Path(config.model.removeprefix("file://"))
    dtype = choose_dtype(config.dtype, torch.device("cpu"))
    return fingerprint_of(config, folder, load_config(folder), dtype)


def of_operator(name: str, value: Any) -> str:
    """The label of decode workers of a spec that says this the way a spec can: by its field, or as a variable."""
    if name == "model":
        return label(service(model={"uri": "hf://a/other"}).spec, "decode")
    if name in ("revision", "dtype"):
        return label(service(model={"uri": "hf://a/b", name: value}).spec, "decode")
    return label(with_variable(name, value), "decode")


def with_variable(name: str, value: Any) -> Spec:
    env = [{"name": FIELDS[name].variable, "value": str(value)}]
    role = {"template": {"spec": {"containers": [{"name": "kvasir", "env": env}]}}}
    return service(model={"uri": SMOL}, prefill=role, decode=role).spec


@pytest.mark.parametrize("name", KV_FIELDS)
def test_every_setting_that_changes_the_kv_changes_the_fingerprint_on_both_sides(name: str, tmp_path: Path) -> None:
    ours = EngineConfig(model_in(tmp_path / "one", 1.0))
    value = model_in(tmp_path / "two", 2.0) if name == "model" else OTHER[name]
    theirs = msgspec.structs.replace(ours, **{name: value})
    assert of_engine(ours).mismatch(of_engine(theirs)) is not None
    plain = service(model={"uri": SMOL if name not in ("revision", "dtype") else "hf://a/b"}).spec
    assert of_operator(name, value) != label(plain, "decode")


@pytest.mark.parametrize("name", sorted({*FIELDS} - {*KV_FIELDS}))
def test_no_other_setting_keeps_two_workers_from_pairing(name: str, tmp_path: Path) -> None:
    ours = EngineConfig(model_in(tmp_path / "one", 1.0))
    theirs = msgspec.structs.replace(ours, **{**TOGETHER.get(name, {}), name: OTHER[name]})
    assert of_engine(ours).mismatch(of_engine(theirs)) is None


@pytest.mark.parametrize("name", FIELDS)
def test_ranks_are_sent_every_setting(name: str) -> None:
    config = EngineConfig(**{"model": "file:///m", **TOGETHER.get(name, {}), name: OTHER[name]})
    setup = Setup(1, "file:///meeting", config)
    assert decode_to_main(encode(setup)) == setup


@pytest.mark.parametrize("name", FIELDS)
def test_nodes_agree_on_every_setting_that_their_leader_does_not_read_alone(name: str) -> None:
    base = {"model": "file:///m", "tensor_parallel": 4, "nnodes": 2, "dist_init_addr": "127.0.0.1:1"}
    other = {**base, name: OTHER[name]}
    if name in ("gpu_sharers", "quantization"):
        return  # a worker of several ranks takes neither
    reason = EngineConfig(**base).mismatch(EngineConfig(**other))  # type: ignore[arg-type]
    if FIELDS[name].setting.reader == "worker":
        assert reason is not None
        assert reason.startswith(f"{name} is ")
    else:
        assert reason is None


COMMANDS: Any = typer.main.get_command(app)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_a_flag_and_a_variable_of_the_worker(name: str) -> None:
    option = next(each for each in COMMANDS.commands["worker"].params if each.name == name)
    assert option.opts == [f"--{FIELDS[name].flag}"]
    assert option.envvar == FIELDS[name].variable


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"role": "all"}, "role 'all' is none of prefill, decode, both"),
        ({"page_size": 0}, "page-size 0 is less than 1"),
        ({"page_size": 257}, "page-size 257 is more than 256"),
        ({"max_running": 0}, "max-running 0 is less than 1"),
        ({"queue_seconds": float("nan")}, "queue-seconds nan is not a number of seconds"),
        ({"drain_seconds": float("inf")}, "drain-seconds inf is not a number of seconds"),
        ({"encryption": "off", "tls_dir": "/t"}, "encryption off and tls-dir /t: there is TLS or there is none"),
        ({"tls_dir": "/t", "port": 8443}, "worker-port 8443 is port too: with tls-dir they are two"),
        ({"encryption": "required"}, "encryption required: it needs --tls-dir"),
        (
            {"encryption": "required", "tls_dir": "/t", "fabric": "tcp"},
            "encryption required and fabric tcp: NIXL over tcp is not encrypted; shm stays within a machine",
        ),
        (
            {"encryption": "required", "tls_dir": "/t", "fabric": "rdma"},
            "encryption required and fabric rdma: NIXL over rdma is not encrypted; shm stays within a machine",
        ),
        (
            {
                "encryption": "required",
                "tls_dir": "/t",
                "nnodes": 2,
                "tensor_parallel": 2,
                "dist_init_addr": "10.0.0.1:1",
            },
            "encryption required and nnodes 2: what goes between machines is not encrypted",
        ),
    ],
)
def test_a_configuration_that_is_there_is_valid(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}$"):
        EngineConfig("file:///m", **settings)


def test_what_is_said_becomes_the_configuration() -> None:
    assert config_of({"model": "m", "kv_cache_memory": "4Ki"}).kv_cache_memory == 4096


# -- variables


def _names(envvar: str | list[str] | None) -> list[str]:
    """Kvasir's own among an option's variables."""
    names = [envvar] if isinstance(envvar, str) else list(envvar or ())
    return [name for name in names if name.startswith("KVASIR_")]


def test_every_variable_of_a_command_is_known() -> None:
    found = {
        name: {each for option in command.params for each in _names(option.envvar)}
        for name, command in COMMANDS.commands.items()
    }
    assert set().union(*found.values()) <= KNOWN
    assert found["router"] == ROUTER
    assert found["worker"] == WORKER


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "KVASIR_KV_CACHE_MEMROY",
            "KVASIR_KV_CACHE_MEMROY is no variable of Kvasir's; did you mean KVASIR_KV_CACHE_MEMORY?",
        ),
        ("KVASIR_PAGESIZE", "KVASIR_PAGESIZE is no variable of Kvasir's; did you mean KVASIR_PAGE_SIZE?"),
        ("KVASIR_FAULTS", "KVASIR_FAULTS is no variable of Kvasir's; did you mean KVASIR_FAULT?"),
        ("KVASIR_XYZZY", "KVASIR_XYZZY is no variable of Kvasir's"),
        ("KVASIR_", "KVASIR_ is no variable of Kvasir's"),
    ],
)
@pytest.mark.parametrize("command", ["worker", "serve", "router", "drain", "fetch"])
def test_a_variable_that_nothing_reads_is_refused_at_start(command: str, name: str, said: str) -> None:
    result = CliRunner().invoke(app, [command], env={name: "1"})
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == said


def test_what_kubernetes_says_of_services_is_no_mistake() -> None:
    links = {
        "KVASIR_WEBHOOK_SERVICE_HOST": "10.0.0.1",
        "KVASIR_WEBHOOK_SERVICE_PORT": "443",
        "KVASIR_WEBHOOK_SERVICE_PORT_HTTPS": "443",
        "KVASIR_WEBHOOK_PORT": "tcp://10.0.0.1:443",
        "KVASIR_WEBHOOK_PORT_443_TCP": "tcp://10.0.0.1:443",
        "KVASIR_WEBHOOK_PORT_443_TCP_ADDR": "10.0.0.1",
    }
    refuse_unknown(links)
    refuse_unknown(dict.fromkeys(KNOWN, "1"))
    with pytest.raises(UserError, match="KVASIR_DRAIN_PORT is no variable"):
        refuse_unknown({"KVASIR_DRAIN_PORT": "8000"})


def test_the_command_ends_with_one_line_and_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvasir_engine.entrypoints.cli", "drain"],
        env={**os.environ, "KVASIR_QUITE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["kvasir: error: KVASIR_QUITE is no variable of Kvasir's"]


def test_the_configuration_loads_no_torch() -> None:
    code = "import sys, kvasir_engine.config, kvasir_engine.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_the_operator_refuses_them_too() -> None:
    result = CliRunner().invoke(operator, ["crd"], env={"KVASIR_ENGINE_IMAG": "x"})
    assert result.exit_code == 2
    assert result.output == (
        "kvasir-operator: error: KVASIR_ENGINE_IMAG is no variable of Kvasir's; did you mean KVASIR_ENGINE_IMAGE?\n"
    )
