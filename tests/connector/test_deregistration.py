"""What deregistering memory proves: on the transports of one machine, nothing.

A writer that holds the descriptors goes on writing: CMA writes to any address of the process, and over TCP the
peer's own UCX copies to it. Only a network card that checks the key refuses. So pages never leave a fence because
their region was deregistered.
"""

import multiprocessing as mp
import os
from multiprocessing.connection import Connection

import numpy as np
import pytest
from nixl_cu13._api import nixl_agent, nixl_agent_config

from kvasir_engine.connector.fabric import Fabric, fabric_env

pytestmark = pytest.mark.dataplane

SIZE = 1 << 16


def _agent(name: str) -> nixl_agent:
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _hold(pipe: Connection, fabric: Fabric) -> None:
    """The holder: its memory is registered, written to, deregistered, and written to again."""
    os.environ.update(fabric_env(fabric, cuda=False))
    memory, agent = np.zeros(SIZE, np.uint8), _agent("holder")
    registered = agent.register_memory([(memory.ctypes.data, SIZE, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), memory.ctypes.data))
    agent.add_remote_agent(pipe.recv())
    for _ in range(2):
        while not pipe.poll(0.001):
            agent.get_new_notifs()
        seen = (pipe.recv(), int(memory.min()))
        if registered is not None:
            agent.deregister_memory(registered)
            registered = None
        memory[:] = 0
        pipe.send(seen)  # last: the next write comes after it


def _write(pipe: Connection, fabric: Fabric, metadata: bytes, address: int) -> None:
    os.environ.update(fabric_env(fabric, cuda=False))
    memory, agent = np.full(SIZE, 7, np.uint8), _agent("writer")
    agent.register_memory([(memory.ctypes.data, SIZE, 0, "")], "DRAM")
    agent.add_remote_agent(metadata)
    pipe.send(agent.get_agent_metadata())
    ours = agent.prep_xfer_dlist("NIXL_INIT_AGENT", [(memory.ctypes.data, SIZE, 0)], "DRAM")
    theirs = agent.prep_xfer_dlist("holder", [(address, SIZE, 0)], "DRAM")
    while pipe.recv():
        handle = agent.make_prepped_xfer("WRITE", ours, [0], theirs, [0])
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        pipe.send(state)


@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_a_writer_still_writes_to_memory_that_was_deregistered(fabric: Fabric) -> None:
    context = mp.get_context("forkserver")
    holder, holders_end = context.Pipe()
    writer, writers_end = context.Pipe()
    holding = context.Process(target=_hold, args=(holders_end, fabric), daemon=True)
    holding.start()
    metadata, address = holder.recv()
    writing = context.Process(target=_write, args=(writers_end, fabric, metadata, address), daemon=True)
    writing.start()
    holder.send(writer.recv())
    for registered in (True, False):
        writer.send(True)
        assert writer.recv() == "DONE"
        holder.send("look")
        assert holder.recv() == ("look", 7), f"{registered=}"
    writer.send(False)
    for process in (holding, writing):
        process.join(60)
        assert process.exitcode == 0
