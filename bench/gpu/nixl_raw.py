"""Raw NIXL writes between two processes, by the size of a piece: what a handoff is held against.

python -m bench.gpu.nixl_raw VRAM|DRAM [UCX_TLS]
"""

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

PAGES, PAGE, LAYERS = 256, 2 << 20, 32
SECONDS = 40


def side(role: str, connection: Connection, memory: str, pages: int, page: int, layers: int) -> None:
    """The writer fills its memory with sevens and writes it to the holder, which looks at what came."""
    import torch
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    device = "cuda" if memory == "VRAM" else "cpu"
    tensor = torch.full((pages * page,), 7 if role == "writer" else 0, dtype=torch.uint8, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    agent = nixl_agent(role, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(tensor.data_ptr(), tensor.nbytes, 0, "")], memory)
    connection.send((tensor.data_ptr(), agent.get_agent_metadata()))
    address, metadata = connection.recv()
    other = agent.add_remote_agent(metadata)
    if role == "holder":
        while not connection.poll(0.001):
            agent.get_new_notifs()
        connection.recv()
        connection.send(bool((tensor == 7).all().item()))
        return
    sizes = (page, page // layers)
    connection.send([rate(agent, other, memory, tensor.data_ptr(), address, tensor.nbytes, size) for size in sizes])
    connection.poll(SECONDS)  # what was written stays registered until it has been looked at


def rate(agent: Any, other: str, memory: str, own: int, theirs: int, size: int, piece: int) -> str:
    """The best of three writes of all of it, in pieces of `piece` bytes in random order."""
    import numpy as np

    count = size // piece

    def table(base: int) -> Any:
        rows = np.zeros((count, 3), np.uint64)
        rows[:, 0] = base + np.arange(count, dtype=np.uint64) * np.uint64(piece)
        rows[:, 1] = piece
        return rows

    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", table(own), memory)
    remote = agent.prep_xfer_dlist(other, table(theirs), memory)
    order = np.random.default_rng(0).permutation(count).astype(np.int32)  # so that neighbours are not merged
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        handle = agent.make_prepped_xfer("WRITE", local, order, remote, order)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            return f"{piece >> 10} KiB: {state}"
        best = max(best, size / (time.perf_counter() - began) / 1e9)
        handle.release()
    return f"{piece >> 10} KiB: {best:.2f} GB/s"


def main(memory: str, transports: str = "", pages: int = PAGES, page: int = PAGE, layers: int = LAYERS) -> bool:
    """Prints the rates. Returns whether all came right."""
    if transports:
        os.environ["UCX_TLS"] = transports
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for role in ("writer", "holder"):
        ours, theirs = context.Pipe()
        process = context.Process(target=side, args=(role, theirs, memory, pages, page, layers), daemon=True)
        process.start()
        ends.append(ours)
        processes.append(process)
    writer, holder = ends
    said = writer.recv(), holder.recv()
    writer.send(said[1])
    holder.send(said[0])
    rates = writer.recv() if writer.poll(SECONDS) else ["timeout"]
    holder.send("look")
    intact = holder.recv() if holder.poll(5) else False
    print(
        "NIXL", memory, f"UCX_TLS={transports}", "; ".join(rates), "intact" if intact else "NOT intact", flush=True
    )
    writer.send("end")
    for process in processes:
        process.join(5)
        process.kill()
    return bool(intact)


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:3]))
