"""Runs a function in several processes that form one gloo group."""

from __future__ import annotations

import datetime
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 100) -> list[Any]:
    """Calls `work(rank, *args)` in `world` processes; fails if one fails, or waits for the others too long.

    Returns:
        What each returned, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    processes = [context.Process(target=_enter, args=(work, rank, world, port, results, args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    answers: dict[int, Any] = {}
    while not results.empty():
        rank, answer, error = results.get()
        if error:
            raise AssertionError(f"rank {rank}: {error}")
        answers[rank] = answer
    assert not waiting, f"ranks {waiting} wait for the others"
    return [answers[rank] for rank in range(world)]


def _enter(work: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and runs on a CPU with that
    answer, error = None, ""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=20),
        )
        answer = work(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    results.put((rank, answer, error))
