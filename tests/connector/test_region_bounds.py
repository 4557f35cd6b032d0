"""What keeps a peer within the region that is registered: its own NIXL, and nothing at the other end.

An honest NIXL agent refuses descriptors that leave what the peer's metadata says is registered. That check is at
the attacker's end. With metadata that it has edited itself it writes to any memory of the process, over TCP and
over shared memory alike: UCX emulates remote access over TCP by messages, whose addresses nobody looks at, and CMA
takes any address. Only a network card that checks keys would refuse. So a process that takes part in NIXL over TCP
trusts all who reach its port, and `--encryption required` leaves TCP on loopback alone.
"""

import multiprocessing as mp
import os
import struct
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import pytest
from nixl_cu13._api import nixl_agent, nixl_agent_config
from nixl_cu13._bindings import nixlNotFoundError

from kvasir_engine.connector.fabric import fabric_env

pytestmark = pytest.mark.dataplane

SIZE, SMALL = 1 << 16, 4096
Where = Literal["inside", "too long", "behind", "elsewhere"]


def _agent(name: str, env: Mapping[str, str]) -> nixl_agent:
    os.environ.update(env)
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _hold(pipe: Connection, env: Mapping[str, str]) -> None:
    """Registers the first half of some memory, and none of another."""
    agent, memory, elsewhere = _agent("holder", env), np.zeros(2 * SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    agent.register_memory([(memory.ctypes.data, SIZE, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data, elsewhere.ctypes.data))
    agent.add_remote_agent(pipe.recv())
    while not pipe.poll(0.001):
        agent.get_new_notifs()
    pipe.send([int(part.max()) for part in (memory[:SIZE], memory[SIZE:], elsewhere)])


def _write(pipe: Connection, env: Mapping[str, str], where: Where, forged: bool) -> None:
    memory, agent = np.full(SIZE, 7, np.uint8), _agent("writer", env)
    agent.register_memory([(memory.ctypes.data, SIZE, 0, "")], "DRAM")
    metadata, address, elsewhere = pipe.recv()
    begin, size = {
        "inside": (address, SMALL),
        "too long": (address + SIZE - SMALL, 2 * SMALL),
        "behind": (address + SIZE, SMALL),
        "elsewhere": (elsewhere, SMALL),
    }[where]
    if forged:
        claimed = bytearray(metadata)
        at = metadata.index(struct.pack("<QQ", address, SIZE))
        claimed[at : at + 16] = struct.pack("<QQ", begin, 2 * SMALL)
        metadata = bytes(claimed)
    agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    try:
        ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", [(memory.ctypes.data, size, 0)], "DRAM")
        theirs = agent.prep_xfer_dlist("holder", [(begin, size, 0)], "DRAM")
    except nixlNotFoundError:
        pipe.send("refused")
        return
    handle = agent.make_prepped_xfer("WRITE", ours, [0], theirs, [0])
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    pipe.send(state)
    pipe.recv()


def attack(holders: Mapping[str, str], writers: Mapping[str, str], where: Where, forged: bool) -> list[int] | str:
    """What is in the registered memory, behind it, and elsewhere afterwards; or `refused`, by the writer's NIXL."""
    context = mp.get_context("forkserver")
    (holder, holders_end), (writer, writers_end) = context.Pipe(), context.Pipe()
    processes = [
        context.Process(target=_hold, args=(holders_end, holders), daemon=True),
        context.Process(target=_write, args=(writers_end, writers, where, forged), daemon=True),
    ]
    for process in processes:
        process.start()
    try:
        writer.send(holder.recv())
        holder.send(writer.recv())
        assert writer.poll(60), "the writer waits for ever"
        state = writer.recv()
        if state == "refused":
            return "refused"
        holder.send("look")
        assert holder.poll(60)
        seen: list[int] = holder.recv()
        return seen
    finally:
        for process in processes:
            process.kill()
            process.join(60)


TCP, SHM = fabric_env("tcp", cuda=False), fabric_env("shm", cuda=False)


@pytest.mark.parametrize("where", ["too long", "behind", "elsewhere"])
def test_an_honest_agent_is_refused_what_is_not_registered(where: Where) -> None:
    assert attack(TCP, TCP, where, forged=False) == "refused"


def test_a_forged_description_reaches_any_memory_over_tcp_whatever_is_registered() -> None:
    assert attack(TCP, TCP, "inside", forged=True) == [7, 0, 0]
    assert attack(TCP, TCP, "too long", forged=True) == [7, 7, 0]
    assert attack(TCP, TCP, "elsewhere", forged=True) == [0, 0, 7]


def test_shared_memory_is_no_better_nor_is_the_tcp_beside_it() -> None:
    assert attack(SHM, SHM, "elsewhere", forged=True) == [0, 0, 7]
    assert attack(SHM, TCP, "elsewhere", forged=True) == [0, 0, 7]


def test_within_the_machine_tcp_is_on_loopback_alone() -> None:
    env = fabric_env("auto", cuda=False, within_machine=True)
    assert env["UCX_NET_DEVICES"] == "lo"
    assert attack(env, env, "inside", forged=False) == [7, 0, 0]
