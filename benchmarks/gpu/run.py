"""What `run.sh` runs: sections with a time limit each, put together to one JSON and one readable report."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmmamba.benchmarks.models import OURS, PEERS
from mmmamba.benchmarks.timing import machine, table


ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/test_triton.py", "tests/test_cuda.py", "tests/test_capture.py"]
RELEASED = ["--size", "released", "--dtype", "bf16"]
SMALL = ["--size", "small", "--layers", "4"]


def sections(small: bool) -> list[tuple[str, int, list[str]]]:
    """Name, seconds allowed and command line of everything that runs; under nine minutes in all."""
    size = SMALL if small else RELEASED
    rounds = ["--rounds", "3" if small else "5"]
    lengths = ["256", "512"] if small else ["1024", "8192", "32768", "103000"]
    million = "2048" if small else "1048576"
    shape = ["--length", "256" if small else "8192"]
    tests = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", *TESTS]
    tests += ["-k", "no_such_test" if small else "not compiles_for"]

    def bench(name, *options):
        return [sys.executable, "-m", "mmmamba", "bench", name, *rounds, *options]

    def batch(size_of_batch):
        return bench("decode", *size, "--models", *OURS[:2], "--lengths", lengths[0], "--batch", size_of_batch)

    several, many = ("2", "4") if small else ("64", "256")
    return [
        ("kernel tests", 130, tests),
        ("warm-up", 40, [sys.executable, "-m", "mmmamba.benchmarks.gpu.warm_up", *size]),
        ("scan", 25, bench("scan", *shape)),
        ("scan-backward", 25, bench("scan", *shape, "--backward")),
        ("decode", 90, bench("decode", *size, "--models", *OURS, *PEERS, "--lengths", *lengths)),
        ("decode-million", 20, bench("decode", *size, "--models", *OURS[:2], "--lengths", million)),
        (f"decode-{several}", 20, batch(several)),
        (f"decode-{many}", 20, batch(many)),
        ("prefill", 60, bench("prefill", *size, "--models", *OURS, "llama", "--lengths", *lengths[1::2])),
        ("prefill-peers", 30, bench("prefill", *size, "--models", "linear", *PEERS, "--lengths", lengths[1])),
        ("memory", 50, bench("memory", *size, "--models", *OURS, "--lengths", *lengths[1::2], "--rounds", "1")),
        ("million", 20, bench("memory", *size, "--models", "linear", "--lengths", million, "--rounds", "1")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with small models")
    parser.add_argument("--limit", type=float, default=530, help="seconds after which nothing more is begun")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --device cpu tries the script out.")
    device, begun = torch.device(args.device), time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    found, text = {"machine": machine(device), "sections": {}}, []
    for name, limit, command in sections(small=args.device == "cpu"):
        left = args.limit - (time.perf_counter() - begun)
        if left < 10:
            found["sections"][name] = {"status": "not begun: out of time"}
            continue
        results = (args.folder / name.replace(" ", "-")).resolve()
        if "bench" in command:
            command = [*command, "--device", args.device, "--results", str(results)]
        start = time.perf_counter()
        status, output = run(command, min(limit, left), nothing_is_fine=args.device == "cpu")
        section = {"status": status, "seconds": round(time.perf_counter() - start, 1), "output": output[-6000:]}
        for file in sorted(results.glob("*.json")):
            section |= json.loads(file.read_text(encoding="utf-8"))
        found["sections"][name] = section
        print(f"{name}: {status} after {section['seconds']} s", flush=True)
        text.append(f"## {name}\n\n`{' '.join(command[1:])}`: {status}\n\n```\n{output[-6000:].strip()}\n```\n")
        # One JSON holds all; plots stay.
        for file in results.glob("*.json"):
            file.unlink()
    (args.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    about = [{"what": key, "value": str(value)} for key, value in found["machine"].items()]
    report = f"# Measured on {found['machine'].get('gpu', 'a CPU')}\n\n```\n{table(about, ['what', 'value'])}\n```\n\n"
    (args.folder / "report.md").write_text(report + "\n".join(text), encoding="utf-8")
    print(f"written: {args.folder}/gpu.json, report.md")
    if any(section["status"] != "ok" for section in found["sections"].values()):
        raise SystemExit(1)


def run(command: list[str], limit: float, nothing_is_fine: bool) -> tuple[str, str]:
    """How a command ended, and what it printed; with a process group of its own, so that nothing outlives it."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    try:
        printed, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return f"stopped after {limit:.0f} s", printed
    fine = (0, 5) if nothing_is_fine else (0,)  # 5: pytest selected nothing
    if process.returncode in fine:
        return "ok", printed
    return f"failed with {process.returncode}", printed + errors[-4000:]


if __name__ == "__main__":
    main()
