"""The built wheel contains every module once and works without the checkout that it was built from."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

import mmmamba


if find_spec("setuptools") is None or find_spec("pip") is None:
    pytest.skip("the wheel is built by setuptools and installed by pip; one is not installed", allow_module_level=True)

ROOT = Path(mmmamba.__file__).resolve().parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
# benchmarks/gpu runs from a checkout, on a machine with a GPU.
NOT_PACKAGED = ("tests", "docs", "gpu", "build", "dist", "runs", "*.egg-info", ".*")


def run_command(command, **options) -> str:
    """Runs a command and returns its output; the test fails with its errors if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy to build from, since setuptools writes into the source folder."""
    source = tmp_path_factory.mktemp("source") / "mmmamba"
    return shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_PACKAGED))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run_command([*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source])
    (wheel,) = folder.glob("mmmamba-*.whl")
    return wheel


def test_the_wheel_contains_every_module_once(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        contents = {name: archive.read(name) for name in names if name.endswith(".py")}
    packages = [init.parent for init in source.rglob("__init__.py") if source / "build" not in init.parents]
    expected = {
        f"mmmamba/{file.relative_to(source).as_posix()}" for package in packages for file in package.glob("*.py")
    }
    imports = {name for name in contents if name.endswith("/mmmamba_code.py")}
    assert set(contents) - imports == expected
    assert len(imports) == 3
    digests = Counter(
        hashlib.sha256(content).digest() for name, content in contents.items() if content and name not in imports
    )
    assert max(digests.values()) == 1
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_contains_the_data_files_that_its_code_reads(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shapes = source / "examples" / "shapes"
    data = [
        *source.glob("*.json"),
        *source.glob("*.jinja"),
        *(file for file in source.glob("conversion/**/*") if file.suffix in (".jinja", ".yaml", ".json")),
        shapes / "tokenizer.model",
        *(file for name in ("teacher", "linear", "hybrid") for file in (shapes / name).iterdir()),
    ]
    assert len(data) > 40
    assert {f"mmmamba/{file.relative_to(source).as_posix()}" for file in data} <= names


def test_the_installed_wheel_chats_with_the_shipped_hybrid(wheel, tmp_path):
    target = tmp_path / "site"
    run_command([*PIP, "install", "--no-index", "--no-deps", "--target", target, wheel])
    # Dependencies come from where they are installed; the package must not.
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = [str(target), *(folder for folder in others if not (Path(folder) / "mmmamba").exists())]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}}
    imported = run_command([sys.executable, "-c", "import mmmamba; print(mmmamba.__file__)"], **options)
    assert Path(imported.strip()) == target / "mmmamba" / "__init__.py"

    ask = ["chat", "--image", ROOT / "examples" / "shapes" / "picture.png", "How many objects are there?"]
    assert run_command([sys.executable, target / "bin" / "mmmamba", *ask], **options).strip() == "six"
