"""What `run.sh` runs: sections with a time limit each, put together to one JSON and one readable report."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmmamba.benchmarks.timing import machine, table


ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/test_triton.py", "tests/test_cuda.py", "tests/test_capture.py"]
MODELS = ["linear", "hybrid", "teacher", "llama"]
RELEASED = ["--size", "released", "--dtype", "bf16"]
SMALL = ["--size", "small", "--layers", "4"]


def sections(small: bool) -> list[tuple[str, int, list[str]]]:
    """Name, seconds allowed and command line of everything that runs; under nine minutes in all."""
    size = SMALL if small else RELEASED
    rounds = ["--rounds", "3" if small else "5"]
    lengths = ["256", "512"] if small else ["1024", "8192", "32768", "103000"]
    shape = ["--length", "256" if small else "8192"]
    tests = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", *TESTS]
    tests += ["-k", "no_such_test"] if small else []

    def bench(name, *options):
        return [sys.executable, "-m", "mmmamba", "bench", name, *rounds, *options]

    return [
        ("kernel tests", 150, tests),
        ("warm-up", 60, [sys.executable, "-m", "mmmamba.benchmarks.gpu.warm_up", *size]),
        ("scan", 40, bench("scan", *shape)),
        ("scan-backward", 40, bench("scan", *shape, "--backward")),
        ("decode", 120, bench("decode", *size, "--models", *MODELS, "--lengths", *lengths)),
        ("decode-batches", 60, bench("decode", *size, "--models", *MODELS[:2], "--lengths", "1024", "--batch", "64")),
        ("prefill", 90, bench("prefill", *size, "--models", *MODELS, "--lengths", *lengths[1::2])),
        ("memory", 120, bench("memory", *size, "--models", *MODELS[:3], "--lengths", *lengths[1::2])),
        ("million", 60, bench("memory", *size, "--models", "linear", "--lengths", "2048" if small else "1048576")),
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
        status, output = run(command, min(limit, left))
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


def run(command: list[str], limit: float) -> tuple[str, str]:
    """How a command ended, and what it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=limit)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return f"stopped after {limit:.0f} s", printed.decode() if isinstance(printed, bytes) else printed
    status = "ok" if done.returncode in (0, 5) else f"failed with {done.returncode}"  # 5: pytest selected nothing
    return status, done.stdout + ("" if status == "ok" else done.stderr[-4000:])


if __name__ == "__main__":
    main()
