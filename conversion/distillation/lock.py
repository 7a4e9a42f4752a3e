"""Keeps a second start out of a run's folder while any process of the first one lives.

Every process of a launch locks a file of its own, the main one `.lock`, the others `.lock-1`, `.lock-2`, …, so that
those which a killed launcher has left behind are seen, too. The file says which process it is. The system releases the
lock (`flock`) when that process ends, however it ends.

Local disks, NFS, GPFS and Lustre (mounted with `-o flock`) show the locks of all machines. Where there are no locks
(Windows, some network and FUSE file systems), the process that the file names is looked for, which finds it on the
same machine only.
"""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import IO, Any

import psutil


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_NAME = re.compile(r"\.lock(?:-(\d+))?")
_open_locks: set[IO] = set()


class ProcessLock:
    """The lock of one process on a run's folder. Not taken yet.

    Args:
        folder: The run's folder, which exists.
        rank: Number of the process in its launch, 0 for the main one.

    Attributes:
        sees_other_machines: Whether the file system has locks; known once `acquire` was called.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / (f".lock-{rank}" if rank else ".lock")
        self.sees_other_machines = True
        self._file: IO | None = None

    def acquire(self) -> str | None:
        """Takes the lock. Returns None if that worked, else which process has it, in words."""
        file = self.path.open("a+", encoding="utf-8")
        is_free = True
        try:
            if fcntl is None:
                raise OSError("no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            is_free = False
        except OSError:
            self.sees_other_machines = False
        holder = _read(file)
        if not is_free or (not self.sees_other_machines and _is_running(holder)):
            file.close()
            return _describe(holder)
        file.truncate(0)
        json.dump(_this_process(), file)
        file.flush()
        self._file = file
        _open_locks.add(file)
        return None

    def release(self) -> None:
        """Gives the lock back, if it was taken."""
        if self._file is not None:
            self._file.truncate(0)  # the process lives on
            _open_locks.discard(self._file)
            self._file.close()
            self._file = None


def left_behind(folder: Path, num_processes: int) -> str | None:
    """In words, a process of an earlier launch that still runs, if its rank is beyond those of this launch."""
    for path in sorted(folder.glob(".lock-*")):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) >= num_processes:
            probe = ProcessLock(folder, int(match[1]))
            holder = probe.acquire()
            probe.release()
            if holder is not None:
                return holder
    return None


def is_lock_file(name: str) -> bool:
    """Whether a file of this name is a lock's."""
    return _NAME.fullmatch(name) is not None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "created": psutil.Process().create_time(),  # another process may get the same id later
    }


def _read(file: IO) -> dict[str, Any]:
    """What a lock's file says of its process; empty if it says nothing."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return holder if {"pid", "host", "since", "created"} <= holder.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _is_running(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["created"]) < 1
    except psutil.Error:
        return False


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not said which it is"
    return f"process {holder['pid']} on {holder['host']}, there since {holder['since']}"


def _close_in_child() -> None:
    """A forked process, such as a DataLoader's worker, must not hold its parent's locks when that is gone."""
    while _open_locks:
        _open_locks.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
