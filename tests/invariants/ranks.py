"""Runs a function in several processes that form one gloo group."""

from __future__ import annotations

import datetime
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
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
    with tempfile.TemporaryDirectory() as folder:  # a pipe would be full before the processes have ended
        files = [Path(folder, str(rank)) for rank in range(world)]
        processes = [
            context.Process(target=_enter, args=(work, rank, world, port, file, args))
            for rank, file in enumerate(files)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        answers = {rank: pickle.loads(file.read_bytes()) for rank, file in enumerate(files) if file.exists()}
    for rank, (_, error) in answers.items():
        assert not error, f"rank {rank}: {error}"
    assert not waiting, f"ranks {waiting} wait for the others"
    return [answers[rank][0] for rank in range(world)]


def _enter(work: Callable[..., Any], rank: int, world: int, port: int, file: Path, args: tuple[Any, ...]) -> None:
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
    ready = file.with_suffix(".part")
    ready.write_bytes(pickle.dumps((answer, error)))
    ready.rename(file)
