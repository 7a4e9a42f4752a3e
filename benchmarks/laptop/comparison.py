"""The table of a CPU: our models beside llama.cpp's, in one run, every measurement in a process of its own.

mmmamba bench laptop --results out
mmmamba bench laptop --contexts 256 4096 --bits 4 --keep-peers --results out

Models of random weights and llama.cpp are made in `--work-dir`, once. A run that was interrupted goes on.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmmamba.benchmarks.arguments import LAPTOP_OURS
from mmmamba.benchmarks.timing import processor_name, write_result
from mmmamba.cpu_mmmamba import usable_cores

from . import gguf_models, llama_cpp, our_models, processes, report
from .samples import Point, Samples, order


PROMPT = 512  # tokens; llama-bench's own choice
LONGEST_TRIAL = 4096  # tokens after which llama.cpp's two ways to attend are compared
LONG = 16384  # tokens: longer contexts are measured less often
STEPS, REPETITIONS = 32, {"prompt": 1, "step": 3}
MACHINE = ("machine", 0)  # the candidate that reads memory and does nothing with it
BUILD_BYTES = 1e9  # that llama.cpp takes while it is built


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Runs `mmmamba bench laptop`. Raises ValueError, with the reason, for what cannot be measured here."""
    check(args, device)
    threads = args.threads or usable_cores()
    torch.set_num_threads(threads)  # as the result says of the machine
    candidates = [(model, bits) for bits in sorted(set(args.bits)) for model in args.models]
    bench = prepare(candidates, args, threads)
    samples = Samples(bench.folder / "samples.jsonl", bench.identities(), args.keep_peers)
    rounds = rounds_of(args, candidates)
    points = {point for measurements in rounds for point in measurements}
    if there := samples.of(points):
        print(f"{len(there)} measurements are there already.")
    names = ("size", "bits", "contexts", "rounds", "long_bits", "long_rounds", "keep_peers")
    settings = {name: getattr(args, name) for name in names} | {"threads": threads, "prompt": PROMPT}
    settings["real time"] = bool(bench.preempting and processes.real_time())
    seen, failed = Counter(), {}
    for measurements in rounds:
        for point in measurements:
            seen[point] += 1
            if len(samples.of({point})) >= seen[point] or point[:2] in failed:
                continue
            try:
                samples.add(point, bench.measure(point))
                print(report.line_of(samples.rows[-1]), flush=True)
            except ChildProcessError as error:
                failed[point[:2]] = str(error)
                print(f"{report.name_of(*point[:2])} is left out: {error}", flush=True)
        failures = {report.name_of(*candidate): error for candidate, error in failed.items()}
        result = {"settings": settings, "failed": failures} | report.results(samples.of(points), bench.file_bytes())
        if args.results is not None:
            file = write_result("laptop", device, result, args.results)
            file.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
            report.plot(result["rows"], file.with_suffix(".png"))
    samples.finish()
    print("\n" + report.markdown(result))


def check(args: argparse.Namespace, device: torch.device) -> None:
    """Raises ValueError for arguments, or a machine, that the benchmark is not for."""
    if device.type != "cpu":
        raise ValueError(f"bench laptop measures CPUs, and --device is {args.device}; leave it out.")
    if not sys.platform.startswith("linux"):
        raise ValueError(f"bench laptop asks Linux for the memory of a process, and this is {sys.platform}.")
    if args.llama_bench is not None and not (args.llama_bench.is_file() and os.access(args.llama_bench, os.X_OK)):
        raise ValueError(f"--llama-bench {args.llama_bench} is no program; give the file of a llama-bench.")


def rounds_of(args: argparse.Namespace, candidates: list[tuple[str, int]]) -> list[list[Point]]:
    """What is measured, in order: rounds of the prompt and the shorter contexts, then those of the long ones."""
    short = [("step", context) for context in sorted(set(args.contexts)) if context <= LONG]
    long = [("step", context) for context in sorted(set(args.contexts)) if context > LONG]
    rounds = order([("prompt", PROMPT), *short], candidates, args.rounds)
    rounds = [[Point(*MACHINE, "bandwidth", 0), *measurements] for measurements in rounds]
    if at_length := [candidate for candidate in candidates if candidate[1] in args.long_bits]:
        rounds += order(long, at_length, args.long_rounds) if long else []
    return rounds


@dataclass
class Bench:
    """How each candidate is measured.

    Attributes:
        folder: Where samples and choices are kept.
        files: (model, bits) to a model's folder or GGUF file.
        llama_bench: The program; None if no peer is measured.
        threads: Of the CPU.
        preempting: Whether measurements go before all other processes, see `processes.real_time`.
        attention: By peer, task and length, whether llama.cpp's flash attention is faster here.
    """

    folder: Path
    files: dict[tuple[str, int], Path]
    llama_bench: Path | None
    threads: int
    preempting: bool
    attention: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self._attention_file.is_file():
            self.attention = json.loads(self._attention_file.read_text(encoding="utf-8"))

    @property
    def _attention_file(self) -> Path:
        return self.folder / "attention.json"

    def identities(self) -> dict[tuple[str, int], str]:
        """What each candidate is measured with: machine, threads, and the code or the files."""
        here = f"{processor_name()}, {self.threads} threads, {'real time' if self.preempting else 'normal priority'}"
        program = "" if self.llama_bench is None else hashlib.sha256(self.llama_bench.read_bytes()).hexdigest()[:16]
        identities = {MACHINE: here}
        for (model, bits), file in self.files.items():
            what = f"code {our_models.code_digest()}" if model in LAPTOP_OURS else f"{program}, {_header_digest(file)}"
            identities[model, bits] = f"{here}, {what}"
        return identities

    def file_bytes(self) -> dict[tuple[str, int], int]:
        """Sizes of the peers' GGUF files."""
        return {key: file.stat().st_size for key, file in self.files.items() if key[0] not in LAPTOP_OURS}

    def measure(self, point: Point) -> dict:
        """Takes one sample. Raises ChildProcessError if the process fails."""
        if point[:2] != MACHINE:
            _forget(self.files[point[:2]])
        if point[:2] == MACHINE:
            return {"bytes/s": self._python("roofline", ["--bytes=67108864"] if self.folder.name == "small" else [])}
        if point.model in LAPTOP_OURS:
            option = "--prompt" if point.what == "prompt" else "--context"
            options = [f"--steps={STEPS}", f"--repetitions={REPETITIONS[point.what]}"]
            return self._python("ours", [self.files[point[:2]], option, point.tokens, *options])
        size, file = self.folder.name, self.files[point[:2]]
        measured = llama_cpp.measure(
            self.llama_bench, file, point.what, point.tokens, self.threads, self._flash(point), self.preempting,
            STEPS, REPETITIONS[point.what],
        )  # fmt: skip
        if point.what == "step":
            measured["step bytes"] = gguf_models.step_bytes(point.model, size, point.bits, point.tokens)
        return measured | {"file bytes": file.stat().st_size}

    def _python(self, module: str, arguments: list) -> dict:
        command = [sys.executable, "-m", f"mmmamba.benchmarks.laptop.{module}", *arguments]
        command.append(f"--threads={self.threads}")
        done = processes.run(command, self.preempting, OMP_NUM_THREADS=str(self.threads))
        return json.loads(done.output.splitlines()[-1])

    def _flash(self, point: Point) -> int:
        """Whether the peer is faster with llama.cpp's flash attention, tried once, on its smallest file."""
        bits = min(bits for model, bits in self.files if model == point.model)
        tokens = min(point.tokens, LONGEST_TRIAL)
        key = f"{point.model}, {point.what}, {tokens} tokens, {self.identities()[point.model, bits]}"
        if key not in self.attention:
            self.attention[key] = llama_cpp.faster_attention(
                self.llama_bench, self.files[point.model, bits], point.what, tokens, self.threads, self.preempting,
                STEPS, REPETITIONS[point.what],
            )  # fmt: skip
            self._attention_file.write_text(json.dumps(self.attention, indent=2) + "\n", encoding="utf-8")
        return self.attention[key]


def _forget(model: Path) -> None:
    """Has the system read a model anew: where its pages lie moves a rate by a third, for as long as they lie there."""
    for file in model.iterdir() if model.is_dir() else [model]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _header_digest(file: Path) -> str:
    """Of a GGUF file's beginning, which names all tensors, and its size."""
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(2**20) + str(file.stat().st_size).encode()).hexdigest()[:16]


def prepare(candidates: list[tuple[str, int]], args: argparse.Namespace, threads: int) -> Bench:
    """Makes the models and builds llama.cpp, as far as they are not there yet.

    Raises:
        ValueError: if the disk has no room for them, or there is nothing to make them with.
    """
    work_dir = args.work_dir.expanduser()
    folder = work_dir / args.size
    peers = [candidate for candidate in candidates if candidate[0] not in LAPTOP_OURS]
    ours = [candidate for candidate in candidates if candidate[0] in LAPTOP_OURS]
    files = {(model, bits): folder / f"{model}-{gguf_models.FORMATS[bits]}.gguf" for model, bits in peers}
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(gguf_models.file_bytes(*key[:1], args.size, key[1]) for key in peers if not files[key].is_file())
    needed += our_models.bytes_to_make(folder, ours, args.size)
    builds = bool(peers) and args.llama_bench is None
    free = shutil.disk_usage(folder).free
    if needed + (BUILD_BYTES if builds else 0) > free:
        raise ValueError(
            f"The models take {needed / 1e9:.1f} GB more in {folder}, and {free / 1e9:.1f} GB are free there; free "
            "some, measure fewer --bits or --models, or give another --work-dir."
        )
    if needed:
        print(f"Models of {needed / 1e9:.1f} GB are made in {folder}, once.", flush=True)
    # Whatever may be missing is missed before minutes are spent on anything.
    if not all(file.is_file() for file in files.values()):
        gguf_models.import_gguf()
    program = llama_cpp.find_or_build(work_dir, threads) if builds else args.llama_bench
    for (model, bits), file in files.items():
        if not file.is_file():
            print(f"{file.name} is made.", flush=True)
            gguf_models.write_gguf(file, model, args.size, bits)
    for model, bits in ours:
        files[model, bits] = our_models.make(folder, model, args.size, bits)
    return Bench(folder, files, program, threads, not args.normal_priority)
