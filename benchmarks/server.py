"""vLLM servers in processes of their own, their memory and what they say about their cache."""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from .models import DTYPES


STARTUP_SECONDS = 600
CAPACITY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
USAGE, PREEMPTED = "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"


class Server:
    """vLLM's OpenAI-compatible server of one model folder, on a free port.

    Args:
        name: Name of the model, for messages.
        folder: The model folder.
        log: File for the server's output.
        cache_gib: Memory for keys, values and states.
        options: More arguments of the server.
    """

    def __init__(self, name: str, folder: Path, log: Path, cache_gib: float, options: list[str]):
        self.name, self.folder, self.log, self.cache_bytes = name, folder, log, int(cache_gib * 2**30)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}"]
        command += ["--host=127.0.0.1", f"--port={self.port}", f"--kv-cache-memory-bytes={self.cache_bytes}", *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of the log if the server stops, or takes more than ten minutes."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"vLLM did not start {self.name}; the end of its log:\n{end}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def capacity(self) -> dict:
        """How many conversations of the longest length the cache holds, and what one takes, as vLLM allots it."""
        found = CAPACITY.findall(self.log.read_text(errors="replace"))
        if not found:
            return {}
        length, conversations = found[-1]
        allotted = self.cache_bytes / float(conversations)
        return {
            "longest": int(length.replace(",", "")), "fit at once": float(conversations),
            "KiB per conversation": allotted / 2**10,
        }  # fmt: skip

    def memory(self) -> dict:
        """Resident memory of the engine, the largest of the server's processes, now and at its peak."""
        sizes = []
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{process}/status").read_text()
                sizes.append([int(status.split(f"{name}:")[1].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM")])
        now, peak = max(sizes, default=(0.0, 0.0))
        return {"RSS MiB": now, "peak MiB": peak}

    def cpu_seconds(self) -> float:
        """Processor time that the server's processes have used so far."""
        ticks = 0
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict]:
        """Fills a dictionary: most of the cache in use, how many requests were preempted, processor time."""
        usage, stop, most = {}, threading.Event(), [0.0]

        def watch():
            while not stop.wait(0.5):
                with contextlib.suppress(OSError):
                    most[0] = max(most[0], self._metric(USAGE))

        before, cpu_seconds = self._metric(PREEMPTED), self.cpu_seconds()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield usage
        finally:
            stop.set()
            thread.join()
        usage |= {"cache MiB": most[0] * self.cache_bytes / 2**20, "preempted": self._metric(PREEMPTED) - before}
        usage["CPU s"] = self.cpu_seconds() - cpu_seconds

    def _metric(self, name: str) -> float:
        lines = self._get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read().decode()


def descendants(process: int) -> list[int]:
    """A process and those that it started, directly or not."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@contextlib.contextmanager
def running_servers(
    folders: dict[str, Path], caches: dict[str, float], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Server]]:
    """Starts a server for each model folder, all with the same settings, and stops them at the end.

    Args:
        folders: By name of the model.
        caches: GiB for keys, values and states, by name of the model.
        args: Of the benchmark.
        device: CPU or GPU.
    """
    longest = max(args.lengths) + args.output_tokens
    options = [
        "--trust-remote-code", f"--dtype={str(DTYPES[args.dtype]).removeprefix('torch.')}",
        f"--max-model-len={longest}", f"--max-num-seqs={max(args.clients)}",
        f"--max-num-batched-tokens={args.batched_tokens}", "--no-enable-prefix-caching",
        f"--limit-mm-per-prompt={json.dumps({'image': 0, 'video': 0})}",
    ]  # fmt: skip
    options += [] if args.compile else ["--enforce-eager"]
    if device.type == "cuda":
        options.append(f"--gpu-memory-utilization={0.9 / len(folders):.2f}")
    servers = {}
    try:
        for name, folder in folders.items():
            mine = options if name not in ("llama", "granite") else [o for o in options if "limit-mm" not in o]
            servers[name] = Server(name, folder, folder.with_suffix(".log"), caches[name], mine)
        for server in servers.values():
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers.values():
            server.stop()
