"""`mmmamba serve` without a server: its command line, and what stands before the engines."""

import asyncio
import base64
import http.server
import io
import json
import socket
import socketserver
import threading
from types import SimpleNamespace
from zlib import crc32

import av
import pytest
from PIL import Image
from test_cli import failed
from transformers import AutoTokenizer

from mmmamba.cli import arguments, serve
from mmmamba.cli.main import CommandParser
from mmmamba.serving import answers, media
from mmmamba.serving.limits import Limits
from mmmamba.serving.media import Media, RefusedError
from mmmamba.serving.middleware import RequestGuard, from_environment, to_environment
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor


SMALL = Limits(max_request_bytes=2000, max_image_bytes=500, max_image_pixels=100, max_request_pixels=250)


def png(width=8, height=8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def as_data(content: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def asked(guard, *pieces: bytes, path="/v1/chat/completions", headers=(), method="POST"):
    """Sends a body in pieces through the guard: (status, what is answered, what the engine got)."""
    sent, seen, left = [], [], list(pieces)

    async def engine(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body")
        seen.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive():
        piece = left.pop(0) if left else b""
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    guard.app = engine
    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), seen[0] if seen else None


def chat(*urls: str, key="image_url") -> bytes:
    parts = [{"type": key, key: {"url": url}} for url in urls]
    return json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()


def refusal(limits: Limits, url: str, kind="image") -> str:
    with pytest.raises(RefusedError) as refused:
        asyncio.run(Media(limits, 0).read(url, kind))
    return str(refused.value)


def test_the_body_passes_unchanged_in_meaning():
    body = {"model": "ü", "messages": [{"role": "user", "content": "1e400"}], "seed": 2**63, "temperature": 0.1}
    encoded = json.dumps(body).encode()
    status, _, seen = asked(RequestGuard(None, SMALL), encoded[:7], encoded[7:20], encoded[20:])
    assert status == 200 and json.loads(seen) == body


def test_a_body_that_is_no_object_is_refused():
    big = Limits(max_request_bytes=100_000)
    nested = [b'{"messages": ' + b"[" * depth + b"]" * depth + b"}" for depth in range(300, 1000, 50)]
    assert {asked(RequestGuard(None, big), body)[0] for body in nested} <= {200, 400}  # by the depth, never a failure
    for body in (b"", b"no JSON", b"[]", b"3", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * 40_000):
        status, answer, seen = asked(RequestGuard(None, big), body)
        assert status == 400 and seen is None and "no JSON object" in answer["error"]["message"]


def test_only_addresses_whose_bodies_are_read_may_be_posted_to():
    guard = RequestGuard(None, SMALL)
    for path in ("/v1/messages", "/health", "/metrics", "/v1/chat/completions/x"):
        status, answer, seen = asked(guard, b"{}", path=path)
        assert status == 404 and seen is None and path in answer["error"]["message"]
    assert asked(guard, b"{}", method="PUT")[0] == 404
    for path in ("/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert asked(guard, b"{}", path=path)[0] == 200
    assert asked(guard, b"", path="/version", method="GET")[0] == 200


def test_nothing_is_fetched_for_what_takes_no_messages():
    body = chat("http://127.0.0.1:9/a.png")
    assert asked(RequestGuard(None, SMALL), body)[0] == 400
    assert asked(RequestGuard(None, SMALL), body, path="/v1/completions")[0] == 200


def test_a_request_names_only_so_many_addresses(monkeypatch):
    monkeypatch.setattr(media.Media, "read", None)  # refused before the first is read
    status, answer, _ = asked(RequestGuard(None, Limits()), chat(*["https://a/b.png"] * 65))
    assert status == 400 and "65 addresses" in answer["error"]["message"] and "64" in answer["error"]["message"]


def video(frames: int, side: int = 16) -> str:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = side
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame(side, side, "yuv420p")))
        container.mux(stream.encode())
    return as_data(file.getvalue(), "video/mp4")


@pytest.mark.parametrize(
    ("limits", "asked_for", "frames"),
    [
        ({}, None, 8),
        ({"num_frames": -1}, None, 20),
        ({"num_frames": 50}, None, 20),
        ({"fps": 5}, None, 10),
        ({}, {"num_frames": 12}, 12),
        ({}, {"fps": 2}, 4),
    ],
)
def test_every_frame_that_is_taken_of_a_video_counts(limits, asked_for, frames):
    body = json.loads(chat(video(20), key="video_url"))
    if asked_for:
        body["media_io_kwargs"] = {"video": asked_for}
    pixels = 16 * 16 * frames
    for most, expected in ((pixels, 200), (pixels - 1, 400)):
        guard = RequestGuard(None, Limits(max_request_pixels=most, **limits))
        status, answer, _ = asked(guard, json.dumps(body).encode())
        assert status == expected
    assert f"{frames} frames" in answer["error"]["message"] and "--max-request-pixels" in answer["error"]["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"image": {"image_mode": "RGB"}},
        {"video": {"num_frames": 0}},
        {"video": {"num_frames": -1}},
        {"video": {"num_frames": True}},
        {"video": {"num_frames": 8, "video_backend": "opencv"}},
        {"video": {"fps": -1}},
        {"video": {"fps": 1e308}},
        {"video": {"num_frames": 8}, "image": {}},
        [],
        "x",
    ],
)
def test_a_request_may_say_of_videos_only_how_many_frames(options):
    status, answer, seen = asked(RequestGuard(None, SMALL), json.dumps({"media_io_kwargs": options}).encode())
    assert status == 400 and seen is None and "media_io_kwargs" in answer["error"]["message"]


def test_a_body_is_counted_while_it_comes():
    pieces = [b"x" * 900] * 100

    guard = RequestGuard(None, SMALL)
    status, answer, seen = asked(guard, *pieces)
    assert status == 413 and seen is None and "2000" in answer["error"]["message"]
    status, answer, _ = asked(guard, b"", headers=[(b"content-length", b"2001")])
    assert status == 413 and "2001 bytes" in answer["error"]["message"]
    assert "--max-request-bytes" in answer["error"]["message"] and answer["error"]["code"] == 413


def test_pictures_are_checked_wherever_they_stand_in_the_messages():
    good, large = as_data(png()), as_data(png(11, 10))
    assert asked(RequestGuard(None, SMALL), chat(good))[0] == 200
    responses = {"input": [{"content": [{"type": "input_image", "image_url": large}]}]}
    for path, body in (
        ("/v1/chat/completions", chat(good, large)),
        ("/v1/chat/completions", json.dumps({"messages": [[{"content": [{"image_url": large}]}]]}).encode()),
        ("/tokenize", chat(large)),
        ("/v1/responses", json.dumps(responses).encode()),
    ):
        status, answer, seen = asked(RequestGuard(None, SMALL), body, path=path)
        assert status == 400 and seen is None and "11 x 10 pixels" in answer["error"]["message"]
    assert "250 pixels" in asked(RequestGuard(None, SMALL), chat(*[good] * 4))[1]["error"]["message"]
    schema = {"messages": [], "tools": [{"properties": {"image_url": {"type": "string"}}}]}
    assert asked(RequestGuard(None, SMALL), json.dumps(schema).encode())[0] == 200


def test_a_decompression_bomb_is_not_opened():
    bomb = bytearray(png())
    for side, words in ((10_000, "10000 x 10000 pixels"), (30_000, "more pixels than Pillow opens")):
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = crc32(bomb[12:29]).to_bytes(4, "big")
        assert words in refusal(Limits(), as_data(bytes(bomb)))


def test_formats_that_pillow_reads_by_other_programs_are_refused():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    Image.open(io.BytesIO(postscript)).close()  # Pillow knows it
    assert "formats" in refusal(Limits(), as_data(postscript))


def test_the_key_is_asked_for_everywhere_but_where_health_is_asked():
    guard = RequestGuard(None, SMALL, key="k3y")
    right = [(b"authorization", b"Bearer k3y")]
    assert asked(guard, b"{}", headers=right)[0] == 200
    for headers in ([], [(b"authorization", b"k3y")], [(b"authorization", b"Bearer k3")], [(b"x-api-key", b"k3y")]):
        status, answer, seen = asked(guard, b"{}", headers=headers)
        assert status == 401 and seen is None and answer["error"]["type"] == "authentication_error"
        assert asked(guard, b"", path="/metrics", headers=headers, method="GET")[0] == 401
        assert asked(guard, b"", path="/health", headers=headers, method="GET")[0] == 200
        assert asked(guard, b"{}", path="/health", headers=headers)[0] == 401  # a POST


def test_limits_pass_through_the_environment(monkeypatch):
    limits = Limits(1, 2, 3, 4, ("a", "b"), "/media")
    monkeypatch.setenv("MMMAMBA_SERVE_LIMITS", to_environment(limits))
    assert from_environment() == limits
    monkeypatch.delenv("MMMAMBA_SERVE_LIMITS")
    assert from_environment() == Limits()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::",
        "64:ff9b::7f00:1", "64:ff9b::169.254.169.254", "::ffff:0:127.0.0.1", "::127.0.0.1", "::10.0.0.1",
        "64:ff9b:1::808:808", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_of_own_networks_are_not_public(address):
    assert not media._is_public(address)


def test_public_addresses_are():
    assert media._is_public("8.8.8.8") and media._is_public("2606:4700::1111")
    assert media._is_public("64:ff9b::8.8.8.8") and media._is_public("::ffff:8.8.8.8")


@pytest.fixture
def web():
    """An HTTP server of this machine: (its address, the paths that were asked for)."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            if self.path.startswith("/to?"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
                return
            content = png() if "large" not in self.path else b"x" * 10_000
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 9 * ("cut" in self.path)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", paths
        httpd.shutdown()


def test_own_services_are_not_asked_unless_allowed(web):
    address, paths = web
    for url in (f"{address}/a.png", address.replace("127.0.0.1", "localhost"), address.replace("127.0.0.1", "127.1")):
        assert "not on the public internet" in refusal(Limits(), url)
    assert paths == []
    allowed = Limits(allowed_media_domains=("127.0.0.1",))
    assert asyncio.run(Media(allowed, 0).read(f"{address}/a.png", "image")) == as_data(png())
    assert "localhost" in refusal(allowed, address.replace("127.0.0.1", "localhost"))
    assert "no host" in refusal(Limits(allowed_media_domains=()), f"{address}/a.png")


def test_a_redirection_leads_nowhere_else(web):
    address, paths = web
    allowed = Limits(allowed_media_domains=("127.0.0.1",))
    assert asyncio.run(Media(allowed, 0).read(f"{address}/to?/a.png", "image")) == as_data(png())
    other = address.replace("127.0.0.1", "localhost")
    assert "localhost" in refusal(allowed, f"{address}/to?{other}/secret.png")
    assert "file:" in refusal(allowed, f"{address}/to?file:///etc/passwd")
    assert "/secret.png" not in paths
    assert "5 times" in refusal(allowed, f"{address}/to?" + "/to?" * 5 + "/a.png")
    five = f"{address}/to?" + "/to?" * 4 + "/a.png"
    assert asyncio.run(Media(allowed, 0).read(five, "image")) == as_data(png())


def test_what_is_fetched_counts(web):
    address, _ = web
    allowed = Limits(2000, 5000, allowed_media_domains=("127.0.0.1",))
    assert "over 2000 bytes" in refusal(allowed, f"{address}/large.png")
    small = Limits(20_000, 500, allowed_media_domains=("127.0.0.1",))
    assert "--max-image-bytes" in refusal(small, f"{address}/large.png")
    assert "missing" in refusal(small, f"{address}/cut.png")


def test_a_server_that_is_silent_is_left(monkeypatch):
    monkeypatch.setattr(media, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        assert "seconds" in refusal(Limits(allowed_media_domains=("127.0.0.1",)), url)


def test_the_seconds_are_those_of_all_addresses_together(web, monkeypatch):
    address, _ = web
    monkeypatch.setattr(media, "TIMEOUT", 2)

    async def read_twice():
        reader = Media(Limits(allowed_media_domains=("127.0.0.1",)), 0)
        await reader.read(f"{address}/a.png", "image")
        await asyncio.sleep(2.1)
        await reader.read(f"{address}/b.png", "image")

    with pytest.raises(RefusedError, match=r"b\.png.* 2 seconds"):
        asyncio.run(read_twice())


def test_hosts_are_allowed_in_any_case(web):
    address = web[0].replace("127.0.0.1", "LocalHost")
    allowed = Limits(allowed_media_domains=("lOCALHOST",))
    assert asyncio.run(Media(allowed, 0).read(f"{address}/a.png", "image")) == as_data(png())


def test_files_are_read_in_the_allowed_folder_only(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "a b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    limits = Limits(allowed_local_media_path=str(folder))
    assert asyncio.run(Media(limits, 0).read(f"file://{folder}/a%20b.png", "image")) == as_data(png())
    for name in ("../secret.png", "link.png", "%2e%2e/secret.png"):
        assert "not in the folder" in refusal(limits, f"file://{folder}/{name}")
    assert "not in the folder" in refusal(limits, f"file://{folder.parent}/media2/a.png")
    assert "not in the folder" in refusal(limits, f"file://elsewhere{folder}/a b.png")
    assert "no file" in refusal(limits, f"file://{folder}")
    assert "no address of a file" in refusal(limits, "file://[a/b.png")
    assert "--allowed-local-media-path" in refusal(Limits(), f"file://{folder}/a b.png")


def parsed(*words):
    parser = CommandParser(prog="mmmamba serve")
    arguments.serve(parser)
    return parser.parse_args(words)


def test_only_this_machine_is_served_unless_told_otherwise():
    args = parsed()
    assert (args.host, args.port, args.engine, args.api_key) == ("127.0.0.1", 8000, "auto", None)
    assert serve._limits(args) == Limits()
    assert serve._limits(parsed("--allowed-media-domains")).allowed_media_domains == ()


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--port", "70000"], "70000"),
        (["--port", "x"], "'x'"),
        (["--max-image-pixels", "0"], "'0'"),
        (["--api-key", ""], "empty"),
        (["--engine", "ollama"], "ollama"),
        (["--fast"], "--fast"),
        (["--ap", "KEY"], "--ap"),  # abbreviated, it would stay on the command line
    ],
)
def test_wrong_options_exit_with_two(words, word, capsys):
    code, message = failed(capsys, "serve", "examples/shapes/hybrid", *words)
    assert code == 2 and word in message


def test_what_cannot_be_served_is_said_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "_engine", lambda wanted: "transformers")
    folder = arguments.HYBRID
    assert "nowhere" in failed(capsys, "serve", tmp_path / "nowhere")[1]
    assert str(tmp_path) in failed(capsys, "serve", tmp_path)[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, message = failed(capsys, "serve", folder, "--port", port)
        assert code == 1 and f"127.0.0.1:{port}" in message and "--port" in message
    assert "203.0.113.1" in failed(capsys, "serve", folder, "--host", "203.0.113.1", "--port", "0")[1]
    assert "no address" in failed(capsys, "serve", folder, "--host", "no host", "--port", "0")[1]
    assert "none" in failed(capsys, "serve", folder, "--allowed-local-media-path", tmp_path / "none")[1]
    assert "--max-model-len" in failed(capsys, "serve", folder, "--port", "0", "--", "--max-model-len", "9")[1]


def test_a_missing_engine_is_named_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    folder = arguments.HYBRID
    assert "pip install vllm" in failed(capsys, "serve", folder, "--engine", "vllm")[1]
    assert "transformers[serving]" in failed(capsys, "serve", folder)[1]


def started(monkeypatch, *words) -> list[str]:
    """The command that the process is replaced by."""

    class ReplacedError(Exception):
        pass

    def replace(program, command):
        raise ReplacedError(command)

    monkeypatch.setattr(serve.os, "execv", replace)
    monkeypatch.setattr(serve, "_engine", lambda wanted: "vllm")
    monkeypatch.setattr(serve.sys, "argv", ["mmmamba", *map(str, words)])
    for name in ("MMMAMBA_API_KEY", "MMMAMBA_SERVE_LIMITS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_MAX_IMAGE_PIXELS"):
        monkeypatch.setenv(name, "1")  # so that what is set is taken back
    from mmmamba.cli.main import main

    with pytest.raises(ReplacedError) as replaced:
        main([str(word) for word in words])
    return replaced.value.args[0]


def test_vllm_is_started_behind_the_guard(monkeypatch, capsys):
    command = started(monkeypatch, "serve", arguments.HYBRID, "--port", "0", "--", "--max-model-len", "512", "--port")
    assert command[-3:] == ["--max-model-len", "512", "--port"]  # as given, after ours
    assert command[command.index("--middleware") + 1] == "mmmamba.serving.middleware.RequestGuard"
    assert command[command.index("--host") + 1] == "127.0.0.1" and int(command[command.index("--port") + 1]) > 0
    assert command[command.index("--override-generation-config") + 1] == '{"temperature": 0.0}'
    media_options = json.loads(command[command.index("--media-io-kwargs") + 1])
    assert media_options == {"image": {"image_mode": None}, "video": {"num_frames": 8}}
    assert "vLLM" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--api-key", "s3cret"], ["--api-key=s3cret"]])
def test_the_key_does_not_stay_on_the_command_line(monkeypatch, words):
    command = started(monkeypatch, "serve", arguments.HYBRID, *words, "--port", "0")
    assert command[1:] == ["-m", "mmmamba", "serve", str(arguments.HYBRID), "--port", "0"]
    assert serve.os.environ["MMMAMBA_API_KEY"] == "s3cret"


@pytest.mark.parametrize(
    ("settings", "frames"),
    [({}, {"num_frames": 8}), ({"fps": 2}, {"fps": 2}), ({"num_frames": None}, {"num_frames": -1})],
)
def test_videos_are_sampled_as_the_folder_says(tmp_path, settings, frames):
    processor = MmMambaVideoProcessor(**settings)
    processor.save_pretrained(tmp_path)
    assert serve._frames(tmp_path) == frames


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(arguments.HYBRID, trust_remote_code=True)


def test_grammars_are_kept_within_bounds(tokenizer):
    pytest.importorskip("xgrammar")
    assert answers.Grammar.of({"type": "json_object"}, tokenizer, len(tokenizer)) is not None
    assert answers.Grammar.compilers[tokenizer].cache_limit_bytes == 64 * 2**20


@pytest.mark.parametrize("response_format", [{"type": "xml"}, {"type": "json_schema"}])
def test_a_wrong_grammar_is_refused_before_a_stream_begins(response_format, tokenizer):
    server = pytest.importorskip("mmmamba.serving.transformers_server")
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(tokenizer))))
    loaded = server.LoadedModel(model, SimpleNamespace(tokenizer=tokenizer), ["m"])
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "response_format": response_format}
    with pytest.raises(RefusedError, match="response_format"):
        asyncio.run(server.ChatHandler(loaded, None).handle_request(body, "1"))
