"""llama.cpp, built once from a package of the registry, and its `llama-bench`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from . import processes


PACKAGE, VERSION = "llama-cpp-python", "0.3.36"  # whose source distribution has llama.cpp's in it
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


def find_or_build(folder: Path, jobs: int) -> Path:
    """The `llama-bench` that is in the folder, or one that is built into it now, which takes some minutes.

    Raises:
        ValueError: if there is nothing to build it with, or that fails.
    """
    for built in sorted(folder.glob(f"llama.cpp-{VERSION}-*/llama-bench")):
        return built
    cmake, generator = _tools()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".llama.cpp-") as temporary:
        temporary = Path(temporary)
        print(f"llama.cpp of {PACKAGE} {VERSION} is downloaded and built, once; this takes minutes.", flush=True)
        source, commit = _source(temporary)
        log = folder / "llama.cpp-build.log"
        build = temporary / "build"
        with log.open("w", encoding="utf-8") as output:
            for command in (
                [cmake, "-S", source, "-B", build, *generator, *OPTIONS],
                [cmake, "--build", build, "--target", "llama-bench", "--parallel", str(jobs)],
            ):
                if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                    raise ValueError(
                        f"llama.cpp could not be built, {log} says why; or give one of your own: --llama-bench FILE."
                    )
        log.unlink()
        destination = folder / f"llama.cpp-{VERSION}-{commit}"
        shutil.rmtree(destination, ignore_errors=True)
        whole = temporary / "whole"
        whole.mkdir()
        shutil.move(build / "bin" / "llama-bench", whole)
        whole.rename(destination)
    return destination / "llama-bench"


def _tools() -> tuple[str, list[str]]:
    """CMake, and its options for Ninja if that is there. Raises ValueError if something is missing."""
    beside_python = str(Path(sys.executable).parent)  # where pip puts the programs of wheels
    path = os.pathsep.join([os.environ.get("PATH", ""), beside_python])
    cmake, ninja, make = (shutil.which(name, path=path) for name in ("cmake", "ninja", "make"))
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    missing = {
        "CMake (`pip install cmake`)": cmake,
        "Ninja (`pip install ninja`)": ninja or make,
        "a C++ compiler (on Debian and Ubuntu `apt install g++`)": compiler,
    }
    if names := [name for name, found in missing.items() if not found]:
        raise ValueError(
            f"llama.cpp is built from its source, and {' and '.join(names)} is missing; install it, or give a "
            "llama-bench of your own: --llama-bench FILE."
        )
    return cmake, ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


def _source(folder: Path) -> tuple[Path, str]:
    """Downloads the source into a folder. Returns where llama.cpp is, and which commit."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"The source of {PACKAGE} {VERSION} could not be downloaded with pip ({reason}); give a llama-bench of "
            "your own: --llama-bench FILE."
        )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    (unpacked,) = (path for path in folder.iterdir() if (path / "vendor" / "llama.cpp").is_dir())
    changes = (unpacked / "CHANGELOG.md").read_text(encoding="utf-8")
    return unpacked / "vendor" / "llama.cpp", commit_of(changes, VERSION)


def commit_of(changes: str, version: str) -> str:
    """The commit of llama.cpp that a version of the package has, by its list of changes."""
    since = changes.partition(f"\n## [{version}]")[2]
    found = re.search(r"llama\.cpp@([0-9a-f]{7,40})", since)
    return found[1] if found else "unknown"


def measure(
    llama_bench: Path, model: Path, what: str, tokens: int, threads: int, flash: int, preempting: bool,
    steps: int, repetitions: int,
) -> dict:  # fmt: skip
    """Times reading a prompt of so many `tokens`, or `steps` tokens one by one after so many.

    Args:
        llama_bench: The program.
        model: GGUF file.
        what: `prompt` or `step`.
        tokens: Of the prompt, or of the context, which `llama-bench` reads first.
        threads: Of the CPU.
        flash: Whether to use llama.cpp's flash attention, 0 or 1.
        preempting: See `processes.run`.
        steps: Tokens of a repetition.
        repetitions: How many, after one to warm up.

    Returns:
        `rates`, the tokens per second of each repetition; `peak bytes`; `commit`; `flash`.
    """
    command = _command(llama_bench, model, what, tokens, threads, steps, repetitions)
    done = processes.run([*command, "-fa", flash], preempting, OMP_NUM_THREADS=str(threads))
    (found,) = json.loads(done.output)
    return {
        "rates": found["samples_ts"],
        "peak bytes": done.peak_bytes,
        "commit": found["build_commit"],
        "flash": flash,
    }


def faster_attention(
    llama_bench: Path, model: Path, what: str, tokens: int, threads: int, preempting: bool, steps: int,
    repetitions: int,
) -> int:  # fmt: skip
    """1 if llama.cpp's flash attention is faster on this machine, else 0; a peer is measured at its best.

    Args: as `measure`.
    """
    command = _command(llama_bench, model, what, tokens, threads, steps, repetitions)
    done = processes.run([*command, "-fa", "0,1"], preempting, OMP_NUM_THREADS=str(threads))
    rates = {found["flash_attn"]: max(found["samples_ts"]) for found in json.loads(done.output)}
    return int(rates[1] > rates[0])


def _command(
    llama_bench: Path, model: Path, what: str, tokens: int, threads: int, steps: int, repetitions: int
) -> list:
    task = ["-p", tokens, "-n", 0] if what == "prompt" else ["-p", 0, "-n", steps, "-d", tokens]
    return [llama_bench, "-m", model, "-o", "json", "-t", threads, "-r", repetitions, *task]
