"""`mmmamba push`: a model folder to the Hugging Face Hub, checked before anything is sent."""

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from mmmamba.conversion.shards import PICKLES, listed, read_json


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What git, huggingface_hub and Python keep beside a model's files; it stays here.
BOOKKEEPING = {".git", ".cache", "__pycache__"}
UNFINISHED = (".incomplete", ".part", ".tmp", ".lock")
LOGIN = "run `hf auth login` or set HF_TOKEN"


def run(args: argparse.Namespace) -> None:
    """Runs `mmmamba push`. Raises ValueError for what cannot be uploaded and OSError if the Hub does not take it."""
    if not args.dry_run:
        print(push(args.folder, args.repo, args.public, args.revision, args.message))
        return
    check_repo_name(args.repo)
    files = check_upload(args.folder)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    for name, file in sorted(files.items()):
        link = isinstance(file, Path) and file.is_symlink()
        print(f"{_size(sizes[name]):>9}  {name}{' (a link; its content goes)' if link else ''}")
    print(f"{_size(sum(sizes.values())):>9}  in {len(files)} files\n")
    print(f"metadata of README.md:\n{_card(files['README.md']).data.to_yaml().strip()}\n")
    branch = f", branch {args.revision}" if args.revision else ""
    print(f"to {args.repo}{branch}, {'public' if args.public else 'private'} if it is new; nothing was sent")


def push(
    folder: str | Path, repo: str, public: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Checks a model folder and uploads it; says so if the repository is there with another visibility.

    The token is the one that huggingface_hub finds, and is in no message.

    Args:
        folder: Model folder; links in it go as what they point to.
        repo: Name on the Hub, `user/name`; made if it is not there.
        public: Whether a new repository is public. One that is there stays as it is.
        revision: Branch, made if it is not there; the main one if not given.
        message: Of the commit.

    Returns:
        The address of the uploaded model.

    Raises:
        ValueError: if the name or the folder cannot be uploaded; then nothing was sent.
        OSError: if nobody is logged in, or the Hub cannot be reached or refuses.
    """
    check_repo_name(repo)
    files = check_upload(folder)
    with _explained(repo) as api:
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        private = api.model_info(repo).private
        if private == public:
            print(f"note: {repo} is {'private' if private else 'public'} and stays so; change it in its settings.")
        # Pull requests (refs/pr/1) are made on the Hub.
        if revision and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, file) for name, file in files.items()],
            revision=revision,
            commit_message=message or f"Upload {repo.split('/')[1]} with mmmamba",
        )
    return f"{url}/tree/{revision}" if revision else url


def check_repo_name(repo: str) -> None:
    """Raises ValueError if this is not a `user/name` that the Hub takes."""
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it needs one slash")
    except HFValidationError as error:
        reason = str(error).split(":")[0].rstrip(".")
        raise ValueError(f"REPO {repo!r} is no name on the Hub ({reason}); give user/name.") from None


def check_upload(folder: str | Path) -> dict[str, Path | bytes]:
    """The files of a model folder to upload; `mmmamba_code.py` becomes the modules that it imports.

    Returns:
        Path on the Hub, to file or content.

    Raises:
        ValueError: if the folder is no complete model of this package, or holds what should not be published.
    """
    folder = Path(folder)
    check_model_folder(folder)
    if ".unfinished-" in folder.resolve().name:
        raise ValueError(f"{folder} is what an interrupted command left behind; run that command again.")
    files = self_contained(_files(folder))
    config = MmMambaConfig.from_pretrained(folder)
    _check_weights(folder, files, config)
    _check_code(folder, files)
    if "README.md" not in files:
        raise ValueError(f"{folder} has no README.md, the model's card; write one, with a block of metadata.")
    _card(files["README.md"])
    return files


def _files(folder: Path) -> dict[str, Path]:
    """Files by name on the Hub. Raises ValueError for those that must not go."""
    files = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - BOOKKEEPING)
        for name in [*folders, *sorted(names)]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() and not path.exists():
                raise ValueError(f"{relative} in {folder} links to what is not there; put the file in its place.")
            if path.is_symlink() and path.is_dir():
                raise ValueError(f"{relative} in {folder} links to a folder, and only files go; copy it or remove it.")
            if name.startswith(".") and name != ".gitattributes":
                raise ValueError(f"{relative} in {folder} is hidden, so it may be private; move it elsewhere.")
            if path.suffix.lower() in PICKLES:
                raise ValueError(
                    f"{relative} in {folder} is a pickle by its name, which can run any code when it is loaded; only "
                    "safetensors are uploaded, so move it elsewhere."
                )
            if path.suffix.lower() in UNFINISHED:
                raise ValueError(f"{relative} in {folder} is unfinished by its name; finish or remove it.")
            if name not in folders:
                files[relative] = path
    return files


def _check_weights(folder: Path, files: dict[str, Path | bytes], config: MmMambaConfig) -> None:
    """Raises ValueError unless the shards are there, readable, and hold the tensors of the model and no others."""
    index = None
    if INDEX in files:
        if SINGLE in files:
            raise ValueError(f"{folder} has both {SINGLE} and {INDEX}; keep the weights that count.")
        index = read_json(files[INDEX]).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{INDEX} in {folder} has no weight_map; write the model again.")
    shards = sorted(set(index.values())) if index else [SINGLE]
    if absent := [shard for shard in shards if shard not in files]:
        raise ValueError(f"{folder} has no {listed(absent)}; write the model again, or add the missing weights.")
    if others := sorted({name for name in files if name.endswith(".safetensors")} - set(shards)):
        raise ValueError(f"{listed(others)} in {folder} belongs to no index; move it elsewhere.")
    place, shapes = {}, {}
    for shard in shards:
        try:
            with safe_open(files[shard], "pt") as tensors:
                for name in tensors.keys():
                    place[name] = shard
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{shard} in {folder} is not a whole safetensors file ({error}); write the model again."
            ) from None
    if index and (wrong := sorted(name for name in {*index, *place} if index.get(name) != place.get(name))):
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


def _card(readme: Path) -> ModelCard:
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


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


@contextmanager
def _explained(repo: str) -> Iterator[HfApi]:
    """The Hub; what goes wrong with it is said in one sentence that holds no token."""
    token, endpoint = None, HfApi().endpoint
    try:
        if token := get_token():
            yield HfApi(token=token)
            return
    except Exception as error:
        # An upload in several threads wraps what went wrong.
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        answered = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        message = _answer(answered, repo, endpoint) if answered else _no_answer(causes, endpoint)
        raise OSError(_without_secrets(message, token)) from None
    raise OSError(f"You are not logged in to {endpoint}; {LOGIN}.")


def _answer(error: HfHubHTTPError, repo: str, endpoint: str) -> str:
    status = error.response.status_code
    said = f" ({status}: {error.server_message})" if error.server_message else f" ({status})"
    if status == 401:
        return f"{endpoint} does not accept the token{said}; {LOGIN} with a valid one."
    if status == 403:
        return f"The token may not write to {repo}{said}; {LOGIN} with one that may."
    if status == 404:
        return f"{repo} cannot be found on {endpoint}{said}; give a name under which you may write."
    if status == 429 or status >= 500:
        return f"{endpoint} cannot take {repo} now{said}; run the same command again later."
    return f"{endpoint} refuses {repo}{said}; change what it names and run the same command again."


def _no_answer(causes: list[Exception], endpoint: str) -> str:
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it."
    # Such as what the Hub finds wrong with the card.
    if isinstance(causes[0], ValueError):
        return f"{endpoint} does not take this: {causes[0]}"
    reason = str(causes[-1]) or type(causes[-1]).__name__
    return f"{endpoint} cannot be reached ({reason}); check the network and run the same command again."


def _without_secrets(message: str, token: str | None) -> str:
    if token:
        message = message.replace(token, "***")
    message = re.sub(r"\bhf_\w{6,}", "***", message)
    # Addresses for uploads are signed.
    return " ".join(re.sub(r"(https?://[^\s?]+)\?[^\s)]+", r"\1", message).split())
