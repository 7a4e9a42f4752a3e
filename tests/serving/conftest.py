"""Fixtures: a running server of each engine, files for it, and the model itself."""

import importlib.util
import socketserver
import threading
from functools import partial

import pytest
from running_server import LIMITS, VLLM_OPTIONS, Media, QuietHandler, Reference, picture, start

from mmmamba.examples.shapes.clip import write_clip


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request, tmp_path_factory, media):
    """A running server of each engine that is installed."""
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make test-serving` installs it")
    log = tmp_path_factory.mktemp("server") / f"{request.param}.log"
    limits = [str(word) for pair in LIMITS.items() for word in pair]
    options = ["--allowed-media-domains", "127.0.0.1", "--allowed-local-media-path", str(media.folder), *limits]
    running = start(request.param, log, *options, engine_options=VLLM_OPTIONS if request.param == "vllm" else ())
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows the end of the server's log when a test fails."""
    report = (yield).get_result()
    running = getattr(item, "funcargs", {}).get("server")
    if report.failed and running is not None:
        report.sections.append(("the server's log", running.log.read_text(errors="replace")[-4000:]))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:-100])
    write_clip(folder / "clip.mp4")
    handler = partial(QuietHandler, directory=folder)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield Media(folder, f"http://127.0.0.1:{httpd.server_address[1]}")
        httpd.shutdown()


@pytest.fixture(scope="session")
def reference():
    return Reference()
