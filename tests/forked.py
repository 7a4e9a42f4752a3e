"""Processes forked from the test's own: another rank, or one to kill, without importing everything again."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.state import AcceleratorState
from torch.multiprocessing import ProcessExitedException


def run_ranks(function, folder: Path, *args, world_size: int = 2) -> None:
    """Calls `function(*args)` in processes that form a gloo group; raises what one of them raises.

    Args:
        function: What each rank does.
        folder: Where they can leave the file by which they find each other.
    """
    torch.multiprocessing.start_processes(
        _rank, args=(function, folder / "rendezvous", world_size, args), nprocs=world_size, start_method="fork"
    )


def _rank(rank: int, function, rendezvous: Path, world_size: int, args: tuple) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent was
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    function(*args)
    dist.destroy_process_group()


def run_killed(function, *args) -> None:
    """Calls `function(*args)` in a process; fails, with what was raised there, unless that kills itself by SIGKILL."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.start_processes(_without_rank, args=(function, args), nprocs=1, start_method="fork")


def _without_rank(_: int, function, args: tuple) -> None:
    torch.set_num_threads(1)  # torch makes its threads anew after a fork, and threads that load weights race to do so
    function(*args)


def kill_this_process(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
