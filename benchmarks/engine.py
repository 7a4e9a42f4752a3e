"""vLLM's engine without HTTP, in one process and on one thread, timed by the processor's clock.

On a machine that others use, too, a server's figures say more about the others than about the model: its processes
wait for each other. One thread takes the same processor time whatever else runs (but for shared caches), so a second
below is a second of one processor core for itself.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .server import resident_memory


ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Engine:
    """A process that has one model folder loaded and measures a point for each line that it reads.

    Args:
        name: Name of the model, for messages.
        folder: The model folder.
        log: File for what the engine prints.
        cache_gib: Memory for keys, values and states.
        options: Arguments of vLLM's `EngineArgs`.
    """

    def __init__(self, name: str, folder: Path, log: Path, cache_gib: float, options: dict):
        self.name, self.log, self.cache_bytes = name, log, int(cache_gib * 2**30)
        options = options | {"model": str(folder), "kv_cache_memory_bytes": self.cache_bytes}
        command = [sys.executable, "-m", "mmmamba.benchmarks.engine", json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stderr=output, env=os.environ | ENVIRONMENT, **pipes)

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of the log if the engine does not start."""
        self.fit = self._read()["fit at once"]

    def conversations_that_fit(self) -> float:
        """How many conversations of the longest length the cache holds at once, as vLLM allots it."""
        return self.fit

    def memory(self) -> tuple[float, float]:
        """MiB of the process, now and at its peak."""
        return resident_memory(self.process.pid)

    def measure(self, length: int, clients: int, requests: int, output_tokens: int, seed: int) -> dict:
        """One point; see `measure`."""
        point = {"length": length, "clients": clients, "requests": requests, "output_tokens": output_tokens}
        self.process.stdin.write(json.dumps(point | {"seed": seed}) + "\n")
        self.process.stdin.flush()
        sample = self._read()
        return sample | {"cache MiB": sample.pop("cache share") * self.cache_bytes / 2**20}

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            end = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"vLLM's engine of {self.name} stopped; the end of its log:\n{end}")
        return json.loads(line)


def measure(
    engine, length: int, clients: int, requests: int, output_tokens: int, seed: int, clock: Callable[[], float]
) -> dict:
    """Keeps `clients` requests in flight until `requests` are answered, each with its own prompt of random tokens.

    Args:
        engine: vLLM's `LLMEngine`.
        length: Tokens of a prompt.
        clients: Requests in flight.
        requests: Requests in all.
        output_tokens: Tokens of an answer.
        seed: Of the prompts.
        clock: Seconds.

    Returns:
        The columns that `serving.SAMPLED` names. The time to the first token begins when a request is sent, so it
        includes waiting for others.
    """
    import numpy
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    vocabulary = engine.model_config.get_vocab_size()
    prompts = numpy.random.default_rng(seed).integers(10, vocabulary, (requests, length)).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    scheduler = engine.engine_core.engine_core.scheduler
    sent, first, last, tokens, cached, preempted = {}, {}, {}, 0, 0.0, 0
    start, wall = clock(), time.perf_counter()
    while len(last) < requests:
        while prompts and len(sent) - len(last) < clients:
            name = f"{seed}-{len(sent)}"
            sent[name] = clock()
            engine.add_request(name, tokens_input(prompts.pop()), sampling)
        outputs = engine.step()
        cached = max(cached, scheduler.kv_cache_manager.usage)
        preempted = max(preempted, sum(request.num_preemptions for request in scheduler.requests.values()))
        for output in outputs:
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, clock())
            if output.finished:
                last[output.request_id], tokens = clock(), tokens + len(output.outputs[0].token_ids)
    seconds, wall = clock() - start, time.perf_counter() - wall
    if tokens != requests * output_tokens:
        raise RuntimeError(f"{tokens} tokens were generated, not {requests * output_tokens}.")
    per_token = [(last[name] - first[name]) / max(1, output_tokens - 1) for name in last]
    return {
        "requests/s": requests / seconds, "tokens/s": tokens / seconds,
        "first token ms": 1e3 * sum(first[name] - sent[name] for name in last) / requests,
        "token ms": 1e3 * sum(per_token) / requests, "CPU s/request": seconds / requests, "seconds": wall,
        "requests": requests, "cache share": cached, "preempted": preempted,
    }  # fmt: skip


def main(options: dict) -> None:
    """Loads a model and prints a line when it is ready; then a line for each point that it reads."""
    out, sys.stdout = sys.stdout, sys.stderr  # vLLM prints, too
    from vllm import EngineArgs, LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    cache = engine.vllm_config.cache_config
    print(json.dumps({"fit at once": cache.kv_cache_max_concurrency}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(engine, **json.loads(line), clock=time.process_time)), file=out, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("options", type=json.loads)
    main(parser.parse_args().options)
