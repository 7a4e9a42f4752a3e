"""vLLM servers in processes of their own, their memory and what they say about their cache."""

import asyncio
import contextlib
import json
import math
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


STARTUP_SECONDS = 600
WARM_UPS = 1  # requests before a point: the first one after a pause may take half a second longer
CAPACITY = re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d,.]+)x")
# Columns of the table, and what they are in the results of `bench serve`.
MEASURES = {
    "requests/s": "request_throughput",
    "tokens/s": "output_throughput",
    "first token ms": "mean_ttft_ms",
    "token ms": "mean_tpot_ms",
}
USAGE, PREEMPTED = "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total"


class Server:
    """vLLM's OpenAI-compatible server of one model folder, on a free port.

    Args:
        name: Name of the model, for messages.
        folder: The model folder.
        log: File for the server's output.
        cache_gib: Memory for keys, values and states.
        options: More of vLLM's `EngineArgs`, by name.
    """

    def __init__(self, name: str, folder: Path, log: Path, cache_gib: float, options: dict):
        self.name, self.folder, self.log, self.cache_bytes = name, folder, log, int(cache_gib * 2**30)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}"]
        command += ["--host=127.0.0.1", f"--port={self.port}", f"--kv-cache-memory-bytes={self.cache_bytes}"]
        for option, value in options.items():
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}  # `conversations_that_fit` reads the log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

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

    def conversations_that_fit(self) -> float:
        """How many conversations of the longest length the cache holds at once, as vLLM allots it."""
        found = CAPACITY.findall(self.log.read_text(errors="replace"))
        return float(found[-1].replace(",", "")) if found else math.nan

    def memory(self) -> tuple[float, float]:
        """MiB of the engine, now and at its peak."""
        return resident_memory(self.process.pid)

    def cpu_seconds(self) -> float:
        """Processor time that the server's processes have used so far."""
        ticks = 0
        for process in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def measure(self, length: int, clients: int, requests: int, output_tokens: int, seed: int) -> dict:
        """One point once: throughput and latencies, and what of the server's cache was used at most."""
        with self.watched() as usage:
            result = bench_serve(self, length, clients, requests, output_tokens, seed)
        sample = {column: result[key] for column, key in MEASURES.items()}
        usage["CPU s/request"] = usage.pop("CPU s") / (WARM_UPS + requests)
        return sample | {"seconds": result["duration"], "requests": requests} | usage

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


def resident_memory(process: int) -> tuple[float, float]:
    """MiB of the largest of a process and those that it started, now and at its peak."""
    sizes = []
    for one in descendants(process):
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{one}/status").read_text()
            sizes.append(tuple(int(status.split(f"{name}:")[1].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM")))
    return max(sizes, default=(0.0, 0.0))


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


def bench_serve(server: Server, length: int, clients: int, requests: int, output_tokens: int, seed: int) -> dict:
    """Runs vLLM's `bench serve` in this process; its output goes to the server's log.

    Raises:
        RuntimeError: if a request failed or an answer has not the length asked for.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai", "host": "127.0.0.1", "port": server.port, "model": server.folder,
        "dataset-name": "random", "random-input-len": length, "random-output-len": output_tokens,
        "num-prompts": requests, "max-concurrency": clients, "seed": seed, "temperature": 0,
        "num-warmups": WARM_UPS,
        "ready-check-timeout-sec": 0,
    }  # fmt: skip
    arguments = ["--disable-tqdm", *(f"--{name}={value}" for name, value in options.items())]
    with server.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        result = asyncio.run(main_async(parser.parse_args(arguments)))
    tokens = (result["completed"], result["total_input_tokens"], result["total_output_tokens"])
    if tokens != (requests, requests * length, requests * output_tokens):
        raise RuntimeError(
            f"{server.name} answered {tokens[0]} of {requests} requests, {tokens[1]} tokens read and {tokens[2]} "
            f"written; see {server.log}."
        )
    return result
