"""`make test-versions`: the tests that touch Transformers, on its oldest supported and its newest version.

Each version is installed into a folder of its own under `.venv/versions`, with whatever it needs, and put before the
environment's. The locked version, often the newest, is left to `make test`. A failure on a version that is newer than
the lock is printed loudly and does not fail the run: it says what to mend before the lock is renewed.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parent.parent
FOLDER = Path(sys.prefix) / "versions"
TESTS = (
    "golden",
    "hd",
    "modeling",
    "cache",
    "generation",
    "chat",
    "chat_templates",
    "loading",
    "quantize",
    "quantized_linear",
    "layer_step",
    "pictures",
    "conversation",
    "video",
    "packing",
    "distillation",
    "distill_text",
    "language_models",
    "tokenization",
    "processing",
    "transformers_common",
    "transformers_processing",
)


def oldest() -> str:
    """The oldest version that pyproject.toml allows."""
    required = [Requirement(line) for line in metadata.requires("mmmamba") if "extra ==" not in line]
    (requirement,) = (x for x in required if x.name == "transformers")
    (bound,) = (x.version for x in requirement.specifier if x.operator == ">=")
    return f"{bound}.0" if bound.count(".") == 1 else bound


def newest() -> str:
    """The newest version that the package registry has."""
    options = ("--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-")
    report = json.loads(pip("install", *options, "transformers").stdout)
    return report["install"][0]["metadata"]["version"]


def pip(*arguments: str) -> subprocess.CompletedProcess:
    """Runs pip. Raises SystemExit with its last words if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip {' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
    return done


def run(version: str) -> tuple[bool, str, str]:
    """Whether the tests pass on this version, pytest's closing line, and all it said."""
    folder = FOLDER / version
    if not (folder / "complete").is_file():
        pip("install", "--quiet", "--upgrade", "--target", str(folder), f"transformers=={version}")
        (folder / "complete").touch()
    paths = filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    command += ["--numprocesses", "auto", "--dist", "worksteal", *(f"tests/test_{name}.py" for name in TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"]
    return done.returncode == 0, lines[-1].strip("= "), done.stdout + done.stderr


def main() -> int:
    """Returns 1 if the tests fail on a version older than the locked one."""
    locked = metadata.version("transformers")
    failed = False
    for version in sorted({oldest(), newest()} - {locked}, key=Version):
        passed, line, said = run(version)
        older = Version(version) < Version(locked)
        word = "" if passed else "FAILED: " if older else "FAILED ON A NEWER VERSION: "
        failed |= older and not passed
        print(f"{'' if passed else said}transformers {version}: {word}{line}", flush=True)
    print(f"transformers {locked} is the locked version, which `make test` tests.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
