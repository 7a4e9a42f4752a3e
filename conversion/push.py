"""`mmmamba push`: uploads a checked model folder to the Hugging Face Hub, and a Space that shows the model."""

import argparse
import io
import json
import mmap
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.package_code import self_contained
from mmmamba.conversion.publish import check_model_folder, expected_specs
from mmmamba.conversion.shards import PICKLES, listed, printable, read_index, read_json
from mmmamba.conversion.space import space_files


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
IGNORED_FOLDERS = {".git", ".cache", "__pycache__"}  # of git, huggingface_hub and Python; never uploaded
UNFINISHED_SUFFIXES = (".incomplete", ".part", ".tmp", ".lock")
SECRET_NAMES = ("token", "*.pem", "*.key", "*.env", "id_rsa*", "id_ed25519*")
SECRET_CONTENT = re.compile(rb"\bhf_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----")
# The instructions of a pickle that call something.
PICKLE_CALLS = {"REDUCE", "BUILD", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"}
LOGIN = "run `hf auth login` or set HF_TOKEN"


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba push`. Raises ValueError for what cannot be uploaded and OSError if the Hub does not take it."""
    if args.space is not None:
        check_repo_name(args.space)
        if args.revision is not None:
            raise ValueError(f"--space shows the main branch; leave out --revision {args.revision}, or --space.")
    if not args.dry_run:
        print(push(args.folder, args.repo, args.public, args.revision, args.message))
        if args.space is not None:
            print(push_space(args.folder, args.repo, args.space, args.public))
        return
    check_repo_name(args.repo)
    files = files_to_upload(args.folder)
    _list_files(files)
    print(f"metadata of README.md:\n{_model_card(files['README.md']).data.to_yaml().strip()}\n")
    branch = f", branch {args.revision}" if args.revision else ""
    new = f"{'public' if args.public else 'private'} if it is new"
    if args.space is not None:
        print(f"to {args.repo}{branch}, {new}\n")
        files = space_files(args.repo, _license(args.folder))
        _list_files(files)
        print(files["requirements.txt"].decode())
    print(f"to {args.space or args.repo + branch}, {new}; nothing was sent")


def _list_files(files: dict[str, Path | bytes]) -> None:
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    for name, file in sorted(files.items()):
        is_link = isinstance(file, Path) and file.is_symlink()
        note = " (a link; its content is uploaded)" if is_link else ""
        print(f"{_format_size(sizes[name]):>9}  {printable(name)}{note}")
    print(f"{_format_size(sum(sizes.values())):>9}  in {len(files)} files\n")


def push(
    folder: str | Path, repo: str, public: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Checks a model folder and uploads it in one commit.

    A repository that exists keeps its visibility; a note says so if it differs from `public`. The token is the one
    that huggingface_hub finds; no message shows it.

    Args:
        folder: Model folder. Links to files inside it are uploaded as the files.
        repo: Name on the Hub, `user/name`; created if it does not exist.
        public: Whether a new repository is public.
        revision: Branch, created if it does not exist; the main branch if not given.
        message: Of the commit.

    Returns:
        The address of the uploaded model.

    Raises:
        ValueError: if the name or the folder cannot be uploaded; then nothing was sent.
        OSError: if nobody is logged in, or the Hub cannot be reached or refuses.
    """
    check_repo_name(repo)
    files = files_to_upload(folder)
    with _hub(repo) as api:
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        private = api.model_info(repo).private
        if private == public:
            print(f"note: {repo} is {'private' if private else 'public'} and stays so; change it in its settings.")
        # Branches of pull requests (refs/pr/1) are created by the Hub.
        if revision and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, file) for name, file in files.items()],
            revision=revision,
            commit_message=message or f"Upload {repo.split('/')[1]} with mmmamba",
        )
    return f"{url}/tree/{revision}" if revision else url


def push_space(folder: str | Path, model: str, space: str, public: bool = False) -> str:
    """Uploads a Space: a page that shows a model which is on the Hub.

    Args:
        folder: The model's folder, whose card names its licence.
        model: Name of the model on the Hub.
        space: Name of the Space, `user/name`; created if it does not exist.
        public: Whether a new Space is public.

    Returns:
        The address of the Space.

    Raises:
        ValueError: if the name cannot be the Hub's; then nothing was sent.
        OSError: as `push`.
    """
    check_repo_name(space)
    files = space_files(model, _license(folder))
    with _hub(space) as api:
        url = str(api.create_repo(space, repo_type="space", space_sdk="gradio", private=not public, exist_ok=True))
        if api.model_info(model).private:
            print(
                f"note: {model} is private, so the Space needs a secret HF_TOKEN that may read it; see its settings."
            )
        api.create_commit(
            space,
            [CommitOperationAdd(name, file) for name, file in files.items()],
            repo_type="space",
            commit_message=f"Show {model} with mmmamba",
        )
    return url


def _license(folder: str | Path) -> str | None:
    return _model_card(Path(folder) / "README.md").data.license


def check_repo_name(repo: str) -> None:
    """Raises ValueError if this is not a `user/name` that the Hub accepts."""
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it needs one slash")
    except HFValidationError as error:
        reason = str(error).split(":")[0].rstrip(".")
        raise ValueError(f"REPO {repo!r} is no name on the Hub ({reason}); give user/name.") from None


def files_to_upload(folder: str | Path) -> dict[str, Path | bytes]:
    """Checks a model folder; `mmmamba_code.py` in it is replaced by the modules that it imports.

    Returns:
        Path on the Hub, to the file or its content.

    Raises:
        ValueError: if the folder is no complete model of this package, or holds what should not be published.
    """
    folder = Path(folder)
    check_model_folder(folder)
    if ".unfinished-" in folder.resolve().name:
        raise ValueError(f"{folder} is what an interrupted command left behind; run that command again.")
    files = self_contained(_publishable_files(folder))
    config = MmMambaConfig.from_pretrained(folder)
    _check_weights(folder, files, config)
    _check_code(folder, files)
    if "README.md" not in files:
        raise ValueError(f"{folder} has no README.md, the model's card; write one, with a block of metadata.")
    _model_card(files["README.md"])
    return files


def _publishable_files(folder: Path) -> dict[str, Path]:
    """The files in a folder by relative path. Raises ValueError if one of them must not be published."""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - IGNORED_FOLDERS)
        for name in [*folders, *sorted(names)]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if objection := _objection(path, folder):
                raise ValueError(f"{relative} in {folder} {objection}.")
            if name not in folders:
                files[relative] = path
    return files


def _objection(path: Path, folder: Path) -> str | None:
    """Why a file or folder must not be published, as the end of a sentence about it; None if it may be."""
    name = path.name.lower()
    if path.is_symlink():
        if not path.exists():
            return "links to a file that does not exist; put the file in its place"
        if path.is_dir():
            return "links to a folder, and only files are uploaded; copy it or remove it"
        if folder.resolve() not in path.resolve().parents:
            return "links to a file outside of the folder; copy the file to its place"
    if name.startswith(".") and name != ".gitattributes":
        return "is hidden, so it may be private; move it elsewhere"
    if path.is_dir():
        return None
    if not path.is_file():
        return "is not a regular file but a pipe, socket or device; remove it"
    if any(fnmatch(name, pattern) for pattern in SECRET_NAMES):
        return "is a secret by its name; move it elsewhere"
    is_weights = path.suffix == ".safetensors"  # opened later, as the model's weights
    if not is_weights and (path.suffix.lower() in PICKLES or _is_pickle(path)):
        kind = "by its name" if path.suffix.lower() in PICKLES else "by its content"
        return (
            f"is a pickle {kind}, which can run any code when it is loaded; only safetensors are uploaded, so "
            "move it elsewhere"
        )
    if path.suffix.lower() in UNFINISHED_SUFFIXES:
        return "is unfinished by its name; finish or remove it"
    if _contains_secret(path):
        return "contains an access token or a private key; remove it from the file"
    return None


def _contains_secret(path: Path) -> bool:
    if not path.stat().st_size:
        return False  # nothing to map
    # Mapped, not read: a shard of weights may be larger than memory.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return SECRET_CONTENT.search(content) is not None


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or an archive with one in it, such as torch.save writes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).suffix.lower() in PICKLES for name in archive.namelist()):
                return True
            for name in archive.namelist():
                with suppress(
                    RuntimeError, NotImplementedError, zipfile.BadZipFile, OSError
                ):  # such as an encrypted one
                    if _starts_pickle(io.BytesIO(archive.read(name))):
                        return True
        return False
    with path.open("rb") as file:
        return _starts_pickle(file)


def _starts_pickle(file: BinaryIO) -> bool:
    try:
        names = [opcode.name for opcode, _, _ in pickletools.genops(file)]
    except Exception:  # pickletools raises many kinds on bytes that are no pickle, or not a whole one
        file.seek(0)
        return re.match(rb"\x80[\x02-\x05]", file.read(2)) is not None  # cut short
    # Protocols 0 and 1 have no header, so that a short text can be a pickle by chance.
    return names[0] == "PROTO" or not PICKLE_CALLS.isdisjoint(names)


def _check_weights(folder: Path, files: dict[str, Path | bytes], config: MmMambaConfig) -> None:
    """Raises ValueError unless the shards are there, readable, and hold the tensors of the model and no others."""
    index = None
    if INDEX in files:
        if SINGLE in files:
            raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; keep the weights that count.")
        index = read_index(files[INDEX])
    shards = sorted(set(index.values())) if index else [SINGLE]
    if absent := [shard for shard in shards if shard not in files]:
        raise ValueError(f"{folder} has no {listed(absent)}; write the model again, or add the missing weights.")
    if others := sorted({name for name in files if name.endswith(".safetensors")} - set(shards)):
        raise ValueError(f"{listed(others)} in {folder} belongs to no index; move it elsewhere.")
    shard_of, shapes = {}, {}
    for shard in shards:
        try:
            with safe_open(files[shard], "pt") as tensors:
                for name in tensors.keys():
                    shard_of[name] = shard
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{shard} in {folder} is not a whole safetensors file ({error}); write the model again."
            ) from None
    if index and (wrong := sorted(name for name in {*index, *shard_of} if index.get(name) != shard_of.get(name))):
        raise ValueError(f"{INDEX} in {folder} and the shards disagree about {listed(wrong)}; write the model again.")
    expected = {name: tuple(spec.shape) for name, spec in expected_specs(config).items()}
    if differing := sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name)):
        name = differing[0]
        raise ValueError(
            f"The weights in {folder} do not fit its config.json: {listed(differing)} (the first has shape "
            f"{shapes.get(name, 'none')}, and {expected.get(name, 'none')} is expected); write the model again."
        )


def _check_code(folder: Path, files: dict[str, Path | bytes]) -> None:
    """Raises ValueError if a module that the configs name, or one that such a module imports, is missing."""

    def classes(value) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield from _strings(inner) if key == "auto_map" else classes(inner)

    configs = [
        read_json(file) if isinstance(file, Path) else json.loads(file)
        for name, file in files.items()
        if name.endswith("config.json")
    ]
    named = {name for config in configs for name in classes(config)}
    # A class of another repository is written `user/name--module.Class`.
    modules = {f"{name.split('.')[0]}.py" for name in named if "--" not in name}
    present = [files[module] for module in modules if module in files]
    try:
        imported = {Path(path).name for module in present for path in get_relative_import_files(module)}
    except FileNotFoundError as error:
        imported = {Path(error.filename).name}
    if absent := sorted((modules | imported) - set(files)):
        raise ValueError(f"{folder} has no {listed(absent)}, which its model needs; write the folder again.")
    if not modules:
        raise ValueError(f"config.json in {folder} has no auto_map, so nobody could load the model; write it again.")


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _model_card(readme: Path) -> ModelCard:
    """A model's card. Raises ValueError if its metadata cannot be used."""
    try:
        text = readme.read_text(encoding="utf-8")
        if not REGEX_YAML_BLOCK.match(text):
            raise ValueError("there is no block of YAML between two lines ---")
        card = ModelCard(text)
        values = card.data.to_dict()
        if not values:
            raise ValueError("the block is empty")
        for key in ("base_model", "datasets"):
            for name in _strings(values.get(key)):
                validate_repo_id(name)
        for key in ("license", "library_name", "pipeline_tag"):
            if not isinstance(values.get(key, ""), str):
                raise ValueError(f"{key}={values[key]!r} is no text")
        return card
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of {readme} cannot be used ({reason}); correct it.") from None


def _format_size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


@contextmanager
def _hub(repo: str) -> Iterator[HfApi]:
    """A client of the Hub. Raises OSError with one sentence, and no token in it, for whatever fails inside."""
    token, endpoint = None, HfApi().endpoint
    try:
        if token := get_token():
            yield HfApi(token=token)
            return
    except Exception as error:
        # An upload in several threads raises an error of its own from the one that matters.
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        response = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        message = _explain_response(response, repo, endpoint) if response else _explain_failure(causes, endpoint)
        raise OSError(_redact(message, token)) from None
    raise OSError(f"You are not logged in to {endpoint}; {LOGIN}.")


def _explain_response(error: HfHubHTTPError, repo: str, endpoint: str) -> str:
    status = error.response.status_code
    detail = f" ({status}: {error.server_message})" if error.server_message else f" ({status})"
    if status == 401:
        return f"{endpoint} does not accept the token{detail}; {LOGIN} with a valid one."
    if status == 403:
        return f"The token may not write to {repo}{detail}; {LOGIN} with one that may."
    if status == 404:
        return f"{repo} cannot be found on {endpoint}{detail}; give a name under which you may write."
    if status == 429 or status >= 500:
        return f"{endpoint} cannot take {repo} now{detail}; run the same command again later."
    return f"{endpoint} refuses {repo}{detail}; change what it names and run the same command again."


def _explain_failure(causes: list[Exception], endpoint: str) -> str:
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it."
    # huggingface_hub raises ValueError for what the Hub finds wrong with the card.
    if isinstance(causes[0], ValueError):
        return f"{endpoint} does not take this: {causes[0]}"
    reason = str(causes[-1]) or type(causes[-1]).__name__
    return f"{endpoint} cannot be reached ({reason}); check the network and run the same command again."


def _redact(message: str, token: str | None) -> str:
    if token:
        message = message.replace(token, "***")
    message = re.sub(r"\bhf_\w{6,}", "***", message)
    # The query of an upload's address is its signature, which lets anyone upload.
    return " ".join(re.sub(r"(https?://[^\s?]+)\?[^\s)]+", r"\1", message).split())
