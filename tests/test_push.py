"""`mmmamba push` uploads a checked folder, says what went wrong in one sentence, and shows the token to nobody.

The Hub is a server here that answers as the real one does.
"""

import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from socket import socket
from threading import Thread
from urllib.parse import unquote

import pytest
import torch
import yaml
from huggingface_hub import close_session, constants
from model_folders import self_contained_copy
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file, save_file

import mmmamba
from mmmamba.cli.main import main
from mmmamba.conversion import space
from mmmamba.conversion.space import space_files


HYBRID = Path(mmmamba.__file__).parent / "examples" / "shapes" / "hybrid"
INDEX = "model.safetensors.index.json"
TOKEN = "hf_secretsecretsecretsecretsecret"


class Hub(ThreadingHTTPServer):
    """What the Hub does for an upload: repositories with branches of files, and a store for large ones.

    Attributes:
        repos: Name to `{"private": …, "branches": {branch: {path: bytes}}, "messages": […]}`.
        requests: (method, path) of everything that was asked.
        failures: Path to (status, message) of answers that are errors.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.reset()

    def reset(self):
        self.repos, self.store, self.requests, self.failures = {}, {}, [], {}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, value=None, **headers):
        body = json.dumps(value or {}).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self):
        hub, (path, _, query) = self.server, self.path.partition("?")
        hub.requests.append((self.command, path))
        body = self.body()
        for prefix, (status, message) in hub.failures.items():
            if path.startswith(prefix):
                return self.answer(status, {"error": message}, **{"X-Error-Message": message.replace("\n", " ")})
        if path.startswith("/lfs/"):  # the store, whose addresses are signed: a token has no place there
            assert self.headers.get("Authorization") is None and "Signature=" in query
            hub.store[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": message}, **{"X-Error-Message": message})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            bad = "license: forbidden" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of the known'}] if bad else []
            return self.answer(400 if bad else 200, {"errors": errors, "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        _, api, kind, user, name, *rest = path.split("/")
        repo = hub.repos.get(f"{user}/{name}")
        if api != "api" or repo is None or kind != ("spaces" if "sdk" in repo else "models"):
            return self.answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
        action, revision = (*rest, None, None)[:2]
        revision = unquote(revision or "")
        if action is None:
            return self.answer(200, {"id": f"{user}/{name}", "private": repo["private"], "sha": "0" * 40})
        if action == "branch":
            exists = revision in repo["branches"]
            repo["branches"].setdefault(revision, dict(repo["branches"]["main"]))
            return self.answer(409 if exists else 200, {"error": "exists"} if exists else {})
        if revision not in repo["branches"]:
            return self.answer(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".model")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        assert action == "commit", path
        return self.commit(f"{user}/{name}", revision, [json.loads(line) for line in body.splitlines()])

    do_GET = do_POST = do_PUT = handle_request

    def create(self, values):
        hub, name = self.server, f"{values['organization']}/{values['name']}"
        url = {"url": f"{hub.address}/{'spaces/' if values.get('type') == 'space' else ''}{name}"}
        if name in hub.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        # Older clients say `private`, newer ones `visibility`; the Hub takes both.
        private = values["private"] if "private" in values else values["visibility"] == "private"
        hub.repos[name] = {"private": private, "branches": {"main": {".gitattributes": b""}}, "messages": []}
        if values.get("type") == "space":
            hub.repos[name]["sdk"] = values["sdk"]
        return self.answer(200, url)

    def batch(self, values):
        actions = []
        for item in values["objects"]:
            action = {"upload": {"href": f"{self.server.address}/lfs/{item['oid']}?Signature=abc"}}
            actions.append({**item, **({} if item["oid"] in self.server.store else {"actions": action})})
        return self.answer(200, {"transfer": "basic", "objects": actions})

    def commit(self, name, revision, lines):
        repo, (header, *operations) = self.server.repos[name], lines
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                content = self.server.store[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
            else:
                assert operation["key"] == "file"
                content = base64.b64decode(value["content"])
            repo["branches"][revision][value["path"]] = content
        repo["messages"].append(header["value"]["summary"])
        url = f"{self.server.address}/{name}/commit/{'1' * 40}"
        return self.answer(200, {"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})


@pytest.fixture(scope="module")
def server():
    server = Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The Hub with nothing on it, as huggingface_hub finds it in this process."""
    server.reset()
    for name in settings_of_the_hub():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": server.address,
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    close_session()  # a client that an earlier test made has its settings
    return server


def settings_of_the_hub():
    return [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]


@pytest.fixture
def push(hub, capfd):
    """Runs commands, each a list of arguments; returns (exit code, stdout, stderr) of each."""

    def run(*commands):
        results = []
        capfd.readouterr()
        for command in commands:
            try:
                code = main(["push", *map(str, command)])
            except SystemExit as stop:
                code = stop.code
            out, error = capfd.readouterr()
            assert TOKEN not in out + error and "Signature" not in out + error
            results.append((code, out, error))
        return results

    return run


def errors(results):
    """The one sentence of each command, all of which must fail with 1."""
    sentences = []
    for code, _, error in results:
        assert code == 1, error
        (sentence,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in error
        sentences.append(sentence)
    return sentences


def copied(folder, change=None):
    """A model folder that holds its code, as a student that was written elsewhere does."""
    self_contained_copy("hybrid", folder)
    if change is not None:
        change(folder)
    return folder


def shard(folder):
    """Splits the weights over two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_arrives_in_a_private_repository(hub, push, tmp_path):
    sharded = copied(tmp_path / "sharded", shard)
    (sharded / "docs [1]").mkdir()
    (sharded / "docs [1]" / "page*.md").write_text("a name full of wildcards")
    first, other, again = push(
        [HYBRID, "me/shipped"],
        [sharded, "me/other", "--public", "--message", "First\nof many"],
        [sharded, "me/other", "--public", "--revision", "later/one"],
    )
    for code, out, error in (first, other, again):
        assert code == 0, error
        assert "note" not in out
    assert first[1].splitlines()[-1] == f"{hub.address}/me/shipped"
    assert again[1].splitlines()[-1] == f"{hub.address}/me/other/tree/later/one"

    repo, main = hub.repos["me/shipped"], hub.repos["me/shipped"]["branches"]["main"]
    assert repo["private"] is True and repo["messages"] == ["Upload shipped with mmmamba"]
    assert {path: main[path] for path in main if path != ".gitattributes"} == contents(copied(tmp_path / "complete"))
    assert len(hub.store) == 4  # one file of weights, two shards, and the tokenizer of both

    repo = hub.repos["me/other"]
    assert repo["private"] is False and repo["messages"] == ["First\nof many", "Upload other with mmmamba"]
    for branch in ("main", "later/one"):
        files = repo["branches"][branch]
        assert {path: files[path] for path in files if path != ".gitattributes"} == contents(sharded)


def test_a_dry_run_sends_nothing(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    ((code, out, _),) = push([HYBRID, "me/model", "--dry-run", "--revision", "try"])
    assert code == 0 and hub.requests == []
    assert "me/model, branch try, private" in out and "nothing was sent" in out
    assert "pipeline_tag: image-text-to-text" in out
    lines = {line.split()[2]: line.split()[:2] for line in out.splitlines() if "mmmamba.py" in line or ".saf" in line}
    assert lines["model.safetensors"] == ["2.8", "MB"] and "modeling_mmmamba.py" in lines
    assert all(name in out for name in contents(HYBRID) if name != "mmmamba_code.py")
    assert "mmmamba_code.py" not in out


def test_the_visibility_of_what_exists_stays(hub, push):
    for name, private in (("open", False), ("closed", True)):
        hub.repos[f"me/{name}"] = {"private": private, "branches": {"main": {}}, "messages": []}
    results = push([HYBRID, "me/open"], [HYBRID, "me/closed", "--public"], [HYBRID, "me/closed"])
    assert [code for code, *_ in results] == [0, 0, 0]
    assert "note: me/open is public and stays so" in results[0][1]
    assert "note: me/closed is private and stays so" in results[1][1]
    assert "note" not in results[2][1]
    assert (hub.repos["me/open"]["private"], hub.repos["me/closed"]["private"]) == (False, True)
    assert "model.safetensors" in hub.repos["me/open"]["branches"]["main"]


def test_a_space_that_shows_the_model_follows_it(hub, push):
    results = push(
        [HYBRID, "me/model", "--space", "me/page"],
        [HYBRID, "me/model", "--space", "me/page", "--public"],
    )
    for code, out, error in results:
        assert code == 0, error
        assert out.splitlines()[-1] == f"{hub.address}/spaces/me/page"
        assert "me/model is private, so the Space needs a secret HF_TOKEN" in out
    repo, main = hub.repos["me/page"], hub.repos["me/page"]["branches"]["main"]
    assert (
        repo["private"] is True and repo["sdk"] == "gradio" and repo["messages"] == ["Show me/model with mmmamba"] * 2
    )
    names = {"README.md", "app.py", "app_sessions.py", "picture.png", "requirements.txt"}
    assert set(main) == names | {".gitattributes"}
    assert "model.safetensors" in hub.repos["me/model"]["branches"]["main"]
    page = main["app.py"].decode()
    assert '"MMMAMBA_MODEL", "me/model"' in page and "from app_sessions import" in page
    assert not re.search(r"^\s*(from|import) (\.|mmmamba)", page + main["app_sessions.py"].decode(), re.MULTILINE)
    card = yaml.safe_load(main["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["me/model"]
    assert card["license"] == "mit" and re.fullmatch(r"6\.\d+\.\d+", card["sdk_version"])
    assert len(card["short_description"]) <= 60  # the Hub refuses a longer one


@pytest.mark.parametrize(
    ("installed", "named"), [("5.49.1", "6.31.0"), ("6.32.0", "6.32.0"), ("7.0.0", "6.31.0"), (None, "6.31.0")]
)
def test_a_space_names_a_gradio_that_can_run_the_page(installed, named, monkeypatch):
    real = space._installed
    monkeypatch.setattr(space, "_installed", lambda name: installed if name == "gradio" else real(name))
    card = yaml.safe_load(space.space_files("me/model")["README.md"].decode().split("---")[1])
    assert card["sdk_version"] == named


def test_a_space_asks_for_what_the_package_asks_for():
    """All but what only commands need, in the same versions or the one that is installed here."""
    wanted = space_files("me/model")["requirements.txt"].decode().split()
    wanted = {requirement.name: requirement for requirement in map(Requirement, wanted)}
    project = (Path(mmmamba.__file__).parent / "pyproject.toml").read_text()
    asked = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    asked = {requirement.name: requirement for requirement in map(Requirement, re.findall(r'"([^"]+)"', asked))}
    assert set(asked) - set(wanted) == {"huggingface_hub", "pyyaml", "tqdm"}  # Transformers brings them
    assert set(wanted) <= set(asked)
    for name, requirement in wanted.items():
        if name in ("torch", "torchvision", "transformers"):
            assert str(requirement.specifier) == f"=={Version(version(name)).public}"
            assert Version(version(name)).public in asked[name].specifier
        else:
            assert requirement.specifier == asked[name].specifier


def test_a_dry_run_lists_the_space_and_sends_nothing(hub, push):
    ((code, out, _),) = push([HYBRID, "me/model", "--space", "me/page", "--dry-run"])
    assert code == 0 and hub.requests == []
    model, space = out.split("to me/model, private if it is new")
    assert "app.py" not in model and "app_sessions.py" in space and "requirements.txt" in space
    assert "transformers==" in space and space.rstrip().endswith("to me/page, private if it is new; nothing was sent")


def test_a_space_that_cannot_be_made_is_refused_before_any_request(hub, push):
    sentences = errors(
        push(
            [HYBRID, "me/model", "--space", "page"],
            [HYBRID, "me/model", "--space", "me/page", "--revision", "try"],
        )
    )
    assert "'page'" in sentences[0] and "give user/name" in sentences[0]
    assert "leave out --revision try" in sentences[1]
    assert hub.requests == []


def replace(file, old, new):
    def change(folder):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


def cut(folder):
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def misindex(folder):
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def link_folder(folder):
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def archive(file, name, content):
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(name, content)


def nested(folder):
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "Optimizer.PT").write_bytes(b"")


def lose_shard(folder):
    shard(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()


# What must not be uploaded, and what the sentence must say.
REFUSED = {
    "no model": (lambda x: (x / "config.json").unlink(), ["no config.json"]),
    "another model": (replace("config.json", '"mmmamba"', '"llama"'), ["model_type='llama'"]),
    "broken config": (
        replace(
            "config.json",
            "{",
            "",
        ),
        ["not readable JSON"],
    ),
    "wrong config": (replace("config.json", '"hidden_size": 128', '"hidden_size": "wide"'), ["hidden_size"]),
    "other sizes": (
        replace("config.json", '"intermediate_size": 3', '"intermediate_size": 4'),
        ["mlp", "(128, 320)", "(128, 420)"],
    ),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), ["has no model.safetensors"]),
    "missing shard": (lose_shard, ["has no model-00001-of-00002.safetensors"]),
    "truncated shard": (cut, ["model-00002-of-00002.safetensors", "not a whole safetensors file"]),
    "wrong index": (misindex, ["disagree", "model.norm.weight"]),
    "index of files elsewhere": (
        lambda x: (shard(x), replace(INDEX, '"model-00001-of-00002.safetensors"', '"../model.safetensors"')(x)),
        ["'../model.safetensors', which is no plain name"],
    ),
    "index of lists": (
        lambda x: (shard(x), (x / INDEX).write_text('{"weight_map": {"a": ["model.safetensors"]}}')),
        ["no plain name"],
    ),
    "token in the weights": (
        lambda x: save_file(
            load_file(x / "model.safetensors"), x / "model.safetensors", {"format": "pt", "by": TOKEN}
        ),
        ["model.safetensors", "contains an access token"],
    ),
    "token in a table": (lambda x: (x / "log.csv").write_text(f"1,{TOKEN}"), ["log.csv", "access token"]),
    "pickle called weights": (
        lambda x: (x / "model.safetensors").write_bytes(pickle.dumps([1])),
        ["model.safetensors", "not a whole safetensors file"],
    ),
    "stray weights": (lambda x: save_file({}, x / "old.safetensors"), ["old.safetensors", "no index"]),
    "pickle": (lambda x: (x / "training_args.bin").write_bytes(b""), ["training_args.bin", "pickle"]),
    "nested pickle": (nested, ["checkpoint-1/Optimizer.PT", "pickle"]),
    "old pickle": (
        lambda x: (x / "a.txt").write_bytes(pickle.dumps(Path("a"), 0)),
        ["a.txt", "pickle by its content"],
    ),
    "disguised pickle": (lambda x: (x / "a.json").write_bytes(pickle.dumps([1])), ["a.json", "pickle by its content"]),
    "cut pickle": (lambda x: (x / "a").write_bytes(pickle.dumps(["abc"])[:-3]), ["a in", "pickle by its content"]),
    "disguised weights": (lambda x: torch.save([1], x / "notes.md"), ["notes.md", "pickle by its content"]),
    "pickle in an archive": (lambda x: archive(x / "a.zip", "weights.txt", pickle.dumps([1])), ["a.zip", "pickle by"]),
    "named pickle in an archive": (lambda x: archive(x / "a.zip", "A.PT", b""), ["a.zip", "pickle by"]),
    "token in a text": (
        lambda x: (x / "run.sh").write_text(f"HF_TOKEN={TOKEN} ./go"),
        ["run.sh", "contains an access token"],
    ),
    "token in the card": (replace("README.md", "# shapes", f"# {TOKEN}"), ["README.md", "contains an access token"]),
    "key in a text": (
        lambda x: (x / "notes.txt").write_text("-----BEGIN RSA PRIVATE KEY-----"),
        ["notes.txt", "private key"],
    ),
    **{
        f"secret called {name}": (lambda x, name=name: (x / name).write_text("?"), [name, "secret by its name"])
        for name in ("token", "server.PEM", "id_rsa", "prod.env")
    },
    "pipe": (lambda x: os.mkfifo(x / "pipe"), ["pipe", "not a regular file"]),
    "link to elsewhere": (
        lambda x: (x / "notes.md").symlink_to(HYBRID / "README.md"),
        ["notes.md", "outside of the folder"],
    ),
    "hidden file": (lambda x: (x / ".env").write_text(f"HF_TOKEN={TOKEN}"), [".env", "hidden"]),
    "unfinished file": (lambda x: (x / "model.safetensors.incomplete").write_bytes(b""), ["unfinished"]),
    "dangling link": (lambda x: (x / "notes.md").symlink_to("nowhere"), ["notes.md", "does not exist"]),
    "linked folder": (link_folder, ["more", "links to a folder"]),
    "missing code": (lambda x: (x / "processing_mmmamba.py").unlink(), ["has no processing_mmmamba.py"]),
    "missing import": (lambda x: (x / "ssm_mmmamba.py").unlink(), ["has no ssm_mmmamba.py"]),
    "no card": (lambda x: (x / "README.md").unlink(), ["no README.md"]),
    "no metadata": (lambda x: (x / "README.md").write_text("# Model"), ["README.md", "no block"]),
    "broken metadata": (replace("README.md", "license: mit", "license: [mit"), ["README.md cannot be used"]),
    "odd metadata": (replace("README.md", "license: mit", "base_model: runs/my/teacher"), ["runs/my/teacher"]),
    "odd results": (replace("README.md", "model-index:", "model-index: 3\nold-results:"), ["model_index"]),
}


def test_what_must_not_be_published_is_refused_before_any_request(hub, push, tmp_path):
    folders = {name: copied(tmp_path / name, change) for name, (change, _) in REFUSED.items()}
    unfinished = copied(tmp_path / ".model.unfinished-7")
    sentences = errors(push(*([folder, "me/model"] for folder in folders.values()), [unfinished, "me/model"]))
    for sentence, (name, (_, words)) in zip(sentences, REFUSED.items(), strict=False):
        assert all(word in sentence for word in words), (name, sentence)
    assert "interrupted" in sentences[-1]
    assert hub.requests == []


def test_what_tools_keep_beside_a_model_stays_here(hub, push, tmp_path):
    folder = copied(tmp_path / "model")
    before = {*contents(folder), ".gitattributes"}
    for name in (".git/config", ".cache/huggingface/x.lock", "__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("private")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    ((code, *_),) = push([folder, "me/model"])
    assert code == 0
    assert set(hub.repos["me/model"]["branches"]["main"]) == before


def test_harmless_files_and_links_within_the_folder_are_uploaded(hub, push, tmp_path):
    folder = copied(tmp_path / "model")
    (folder / "empty.txt").write_text("")
    (folder / "notes.txt").write_text("ab\nc.\n")
    (folder / "tokens.md").write_text("A token such as hf_... or hf_api_token is a secret.")
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        archive.writestr("picture.txt", "red")
    (folder / "same.txt").symlink_to("notes.txt")
    ((code, _, error),) = push([folder, "me/model"])
    assert code == 0, error
    main_branch = hub.repos["me/model"]["branches"]["main"]
    assert set(main_branch) == {*contents(folder), ".gitattributes"}
    assert main_branch["same.txt"] == b"ab\nc.\n"


def test_names_that_the_hub_cannot_take(hub, push):
    names = ["model", "me/my/model", "me/my model", "https://huggingface.co/me/model", "me/--x", "me/", ""]
    commands = [[HYBRID, name, *options] for options in ([], ["--dry-run"]) for name in names]
    for sentence, name in zip(errors(push(*commands)), names * 2, strict=True):
        assert repr(name) in sentence and "give user/name" in sentence
    assert hub.requests == []


def test_refusals_of_the_hub_are_one_sentence_with_the_remedy(hub, push, tmp_path):
    def sentence(path, status, message, folder=HYBRID):
        hub.failures = {path: (status, message)}
        return errors(push([folder, "me/model"]))[0]

    message = sentence("/api/repos/create", 401, f"Invalid token {TOKEN}")
    assert "(401: Invalid token ***)" in message and "hf auth login" in message and "HF_TOKEN" in message
    message = sentence("/api/repos/create", 403, "You don't have the rights to create a model")
    assert "may not write to me/model (403: " in message and "hf auth login" in message
    message = sentence("/api/repos/create", 500, f"Internal error\nfor {TOKEN}")
    assert "(500: " in message and "later" in message
    message = sentence("/api/models/me/model/commit", 403, "Read-only token")
    assert "may not write to me/model (403: " in message
    assert "model.safetensors" not in hub.repos["me/model"]["branches"]["main"]
    hub.store.clear()
    message = sentence("/lfs/", 403, "Request has expired")
    assert "403" in message and "may not write" in message
    bad = copied(tmp_path / "bad", replace("README.md", "license: mit", "license: forbidden"))
    assert '"license" must be one of the known' in sentence("/nothing", 500, "", bad)


def test_without_a_valid_token_or_a_network(hub, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (message,) = errors(push([HYBRID, "me/model"]))
    assert "not logged in" in message and "hf auth login" in message and "HF_TOKEN" in message
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_anotheranotheranother")
    (message,) = errors(push([HYBRID, "me/model"]))
    assert "does not accept the token" in message and "hf_another" not in message and hub.repos == {}
    with socket() as closed:  # bound to a port that it does not listen on
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        (message,) = errors(push([HYBRID, "me/model"]))
    assert f"{constants.ENDPOINT} cannot be reached" in message and "check the network" in message


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({}, 0, []),
        ({"HF_HUB_OFFLINE": "1"}, 1, ["HF_HUB_OFFLINE is set", "unset it"]),
    ],
    ids=["uploads", "offline"],
)
def test_the_command_line_obeys_the_settings_of_huggingface_hub(server, tmp_path, settings, code, words):
    """In a process of its own, since huggingface_hub reads them when it is imported."""
    server.reset()
    environment = {name: value for name, value in os.environ.items() if name not in settings_of_the_hub()}
    environment |= {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), **settings}
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmmamba", "push", str(HYBRID), "me/model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "model.safetensors" in server.repos["me/model"]["branches"]["main"] if code == 0 else server.repos == {}
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr
