"""Runs a measurement as a process of its own, before all others if the system lets us, and takes its peak memory."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple


REAL_TIME = ("chrt", "--fifo", "50")
INTERVAL = 0.05  # seconds between two looks at a process's memory


class Finished(NamedTuple):
    """What a process printed, and the most bytes of memory that it had."""

    output: str
    peak_bytes: int


@cache
def real_time() -> tuple[str, ...]:
    """What to put before a command so that nothing preempts it; nothing where that is not permitted.

    Both llama.cpp's and OpenMP's threads wait for each other in a loop. If one of them is preempted, all wait.
    """
    if shutil.which(REAL_TIME[0]) is None:
        return ()
    tried = subprocess.run([*REAL_TIME, "true"], capture_output=True, check=False)
    return () if tried.returncode else REAL_TIME


def run(command: list[str], preempting: bool, **environment: str) -> Finished:
    """Runs a command to its end.

    Args:
        command: Program and arguments.
        preempting: Whether to put it before all other processes, see `real_time`.
        environment: Variables to set.

    Raises:
        ChildProcessError: if it fails, with the last line of its errors.
    """
    command = [*(real_time() if preempting else ()), *map(str, command)]
    peak = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | environment) as process:
            try:
                while process.poll() is None:
                    peak = max(peak, _peak_bytes(process.pid))
                    time.sleep(INTERVAL)
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise ChildProcessError(f"{' '.join(command)} ended with {process.returncode}: {lines[-1]}")
        return Finished(output.read().decode(), peak)


def _peak_bytes(process: int) -> int:
    """Most bytes that a process has had so far.

    Not what `wait4` says of it in the end: that counts the memory of whoever started it, too.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)  # not there any more when it has ended
    return 1024 * int(found[1]) if found else 0
