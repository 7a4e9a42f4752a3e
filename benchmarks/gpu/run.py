"""What `run.sh` runs: kernel tests and benchmarks with a time limit each, collected in one JSON and one report."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmmamba.benchmarks.arguments import OURS, PEERS
from mmmamba.benchmarks.timing import format_table, machine_info


ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / ".source_distributions"  # of packages, which tests download
TESTS = ["tests/test_triton.py", "tests/test_capture.py"]
OUTPUT_LIMIT = 6000  # characters of a section's output that the report quotes


def sections(small: bool) -> list[tuple[str, int, list[str]]]:
    """Name, time limit in seconds and command of each section, the most important first."""
    size = ["--size", "small", "--layers", "4"] if small else ["--size", "released", "--dtype", "bf16"]
    rounds = ["--rounds", "3" if small else "5"]
    lengths = ["256", "512"] if small else ["1024", "8192", "32768", "103000"]
    few_lengths = ["--lengths", *lengths[1::2]]
    million = "2048" if small else "1048576"
    batch_sizes = ["2", "4"] if small else ["64", "256"]
    scan_options = ["--length", "256" if small else "8192"]
    if not small:
        scan_options += [option for folder in SOURCES.glob("mamba_ssm-*/") for option in ("--mamba-ssm", str(folder))]
    pytest = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", "--tb=short"]
    pytest += ["-k", "no_such_test" if small else "not compiles_for"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(min(16, os.cpu_count()))]  # compiling kernels takes most of the time

    def bench(name, *options):
        return [sys.executable, "-m", "mmmamba", "bench", name, *rounds, *options]

    def decode_batch(batch_size):
        return bench("decode", *size, "--models", *OURS[:2], "--lengths", lengths[0], "--batch", batch_size)

    return [
        ("kernel tests", 200, [*pytest, *TESTS]),
        ("warm-up", 40, [sys.executable, "-m", "mmmamba.benchmarks.gpu.warm_up", *size]),
        ("decode", 110, bench("decode", *size, "--models", *OURS, *PEERS, "--lengths", *lengths)),
        ("decode-million", 40, bench("decode", *size, "--models", *OURS[:2], "--lengths", million)),
        *((f"decode-{batch_size}", 40, decode_batch(batch_size)) for batch_size in batch_sizes),
        ("prefill", 130, bench("prefill", *size, "--models", *OURS, "llama", *few_lengths, "--rounds", "3")),
        ("prefill-peers", 50, bench("prefill", *size, "--models", "linear", *PEERS, "--lengths", lengths[1])),
        ("memory", 140, bench("memory", *size, "--models", *OURS, *few_lengths, "--rounds", "1")),
        ("million", 80, bench("memory", *size, "--models", "linear", "--lengths", million, "--rounds", "1")),
        ("scan", 120, bench("scan", *scan_options)),
        ("scan-backward", 120, bench("scan", *scan_options, "--backward")),
        ("mamba_ssm's kernels", 200, [*pytest, "tests/test_cuda.py"]),  # which are autotuned, by minutes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with small models")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--limit", type=float, default=530, help="seconds after which no section is started")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --device cpu tries the script out.")
    chosen = sections(small=args.device == "cpu")
    if unknown := set(args.sections or ()) - {name for name, *_ in chosen}:
        parser.error(f"unknown section {unknown.pop()}; choose from {', '.join(name for name, *_ in chosen)}")
    start = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    result, report = {"machine": machine_info(torch.device(args.device)), "sections": {}}, []
    for name, limit, command in chosen:
        if args.sections and name not in args.sections:
            continue
        left = args.limit - (time.perf_counter() - start)
        if left < 10:
            result["sections"][name] = {"status": "not started: out of time"}
            continue
        plots = (args.folder / name.replace(" ", "-")).resolve()
        if "bench" in command:
            command = [*command, "--device", args.device, "--results", str(plots)]
        section_start = time.perf_counter()
        on_cpu = args.device == "cpu"  # limits are a GPU's
        status, output = run_command(command, min(120 if on_cpu else limit, left), allow_no_tests=on_cpu)
        output = output[-OUTPUT_LIMIT:]
        section = {"status": status, "seconds": round(time.perf_counter() - section_start, 1), "output": output}
        for file in sorted(plots.glob("*.json")):
            section |= json.loads(file.read_text(encoding="utf-8"))
            file.unlink()  # gpu.json holds it
        result["sections"][name] = section
        print(f"{name}: {status} after {section['seconds']} s", flush=True)
        report.append(f"## {name}\n\n`{' '.join(command[1:])}`: {status}\n\n```\n{output.strip()}\n```\n")
    (args.folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    machine = result["machine"]
    rows = [{"what": key, "value": str(value)} for key, value in machine.items()]
    title = f"# Measured on {machine.get('gpu', 'a CPU')}\n\n```\n{format_table(rows, ['what', 'value'])}\n```\n\n"
    (args.folder / "report.md").write_text(title + "\n".join(report), encoding="utf-8")
    print(f"written: {args.folder}/gpu.json, report.md")
    if any(section["status"] != "ok" for section in result["sections"].values()):
        raise SystemExit(1)


def run_command(command: list[str], limit: float, allow_no_tests: bool) -> tuple[str, str]:
    """Runs a command for at most `limit` seconds, and its children with it.

    Returns:
        "ok" or what went wrong, and the output.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"stopped after {limit:.0f} s", output
    succeeded = (0, 5) if allow_no_tests else (0,)  # pytest returns 5 if it selected no test
    if process.returncode in succeeded:
        return "ok", output
    return f"failed with exit status {process.returncode}", output + errors[-4000:]


if __name__ == "__main__":
    main()
