"""Downloads source distributions from the package registry, once per version, and unpacks them beside the tests."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from filelock import FileLock


CACHE = Path(__file__).parent / ".source_distributions"


def unpacked(package: str, version: str, build_isolation: bool = False, **environment: str) -> Path:
    """The folder of a package's source distribution. Skips the calling module if it cannot be downloaded.

    Args:
        build_isolation: Whether to get metadata with the package's own build requirements, which are downloaded, too.
        environment: Variables to set.
    """
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / f"{package}-{version}.lock"):  # tests run in several processes
        return _unpacked(package, version, build_isolation, environment)


def _unpacked(package: str, version: str, build_isolation: bool, environment: dict[str, str]) -> Path:
    folder = CACHE / f"{package}-{version}"
    if folder.is_dir():
        return folder
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
    # Metadata is built with the installed packages: isolated build requirements would download a second torch.
    command += [] if build_isolation else ["--no-build-isolation"]
    command += ["--retries", "1", "--dest", str(CACHE), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the source of {package} {version} cannot be downloaded: {reason}", allow_module_level=True)
    (archive,) = CACHE.glob(f"{package}-{version}.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(CACHE, filter="data")
    archive.unlink()
    return folder
