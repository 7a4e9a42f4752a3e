"""`mmmamba serve` through OpenAI's own client: the same promises of both engines, held against the model itself."""

import http.client
import importlib.util
import json
import re
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from PIL import Image
from running_server import BATCHED_TOKENS, KEY, LIMITS, as_data, picture, shown, start, user

from mmmamba.examples.shapes.world import example


HOW_MANY = "How many objects are there?"
# An answer of some hundred tokens, whatever the model would say.
LONG = {
    "type": "json_schema",
    "json_schema": {
        "name": "list",
        "schema": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 40, "maxItems": 40},
    },
}
needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed")


def test_the_model_is_listed_by_name_and_folder(server):
    assert [model.id for model in server.client.models.list()] == ["hybrid", "examples/shapes/hybrid"]
    with pytest.raises(openai.NotFoundError, match="gpt"):
        server.client.chat.completions.create(model="gpt", messages=user(HOW_MANY))


def test_answers_about_pictures_are_those_of_generate(server, reference):
    for index in range(8):
        pictures, question = example("test", 0, index)[1:3]
        images = [drawn.draw() for drawn in pictures]
        question = question.replace("<image>", "").strip()
        answer = server.answer(shown(*map(as_data, images), question=question))
        assert answer == reference.answer_about(*images, question=question)


def test_a_text_is_answered_as_by_generate(server, reference):
    for text in ("What color is the star?", "blue blue blue", "Is there a red heart?"):
        assert server.answer(text) == reference.answer(text)


def test_a_conversation_is_answered_as_by_generate(server, reference):
    question = [{"type": "image", "image": picture(0)}, {"type": "text", "text": HOW_MANY}]
    turns = [{"role": "assistant", "content": "six"}, *user("What color is the star?")]
    ids = reference.ids(reference.encode([*user(question), *turns]))
    asked = server.answer([*user(shown(as_data(picture(0)), question=HOW_MANY)), *turns])
    assert asked == reference.processor.decode(ids, skip_special_tokens=True)


def test_pictures_come_by_address_in_base64_and_as_files(server, media, reference):
    expected = reference.answer_about(picture(1), question=HOW_MANY)
    for address in (f"{media.url}/1.png", f"file://{media.folder}/1.png", as_data(picture(1))):
        assert server.answer(shown(address, question=HOW_MANY)) == expected


def test_several_pictures_keep_their_order(server, media, reference):
    question = "How many objects are there in the second picture?"
    addresses = [f"{media.url}/0.png", as_data(picture(1)), f"file://{media.folder}/2.png"]
    expected = reference.answer_about(*map(picture, range(3)), question=question)
    assert server.answer(shown(*addresses, question=question)) == expected


def test_transparent_pixels_are_read_as_by_the_processor(server, reference):
    image = picture(2).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = reference.answer_about(image, question=HOW_MANY)
    assert server.answer(shown(as_data(image), question=HOW_MANY)) == expected


def test_a_video_is_answered_as_by_generate(server, media, reference):
    expected = reference.answer(
        [{"type": "video", "path": str(media.folder / "clip.mp4")}, {"type": "text", "text": HOW_MANY}]
    )
    for address in (f"{media.url}/clip.mp4", f"file://{media.folder}/clip.mp4"):
        content = [{"type": "video_url", "video_url": {"url": address}}, {"type": "text", "text": HOW_MANY}]
        assert server.answer(content) == expected


def test_without_a_temperature_answers_are_greedy_as_the_folder_says(server, reference):
    expected = reference.answer_about(picture(0), question=HOW_MANY)
    for seed in range(3):
        reply = server.chat(shown(as_data(picture(0)), question=HOW_MANY), temperature=openai.NOT_GIVEN, seed=seed)
        assert reply.choices[0].message.content == expected


def test_a_stream_has_the_whole_answer_piece_by_piece(server):
    content = shown(as_data(picture(0)), question="What color is the star?")
    whole = server.chat(content, response_format=None)
    chunks = list(server.chat(content, stream=True, stream_options={"include_usage": True}))
    told = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[0].delta.role == "assistant" and told[-1].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage and {chunk.id for chunk in chunks} == {chunks[0].id}


@needs_xgrammar
def test_a_stream_begins_before_the_answer_ends(server):
    arrivals = [time.monotonic()]
    for chunk in server.chat("Colors!", stream=True, response_format=LONG, max_tokens=1000):
        if chunk.choices and chunk.choices[0].delta.content:
            arrivals.append(time.monotonic())
    first, last = arrivals[1] - arrivals[0], arrivals[-1] - arrivals[0]
    assert len(arrivals) > 40 and first < last / 2


def test_completions_continue_a_text_as_generate_does(server, reference):
    prompt = "How many objects are there?"
    inputs = reference.processor.tokenizer(prompt, return_tensors="pt")
    ids = reference.ids(inputs, max_new_tokens=8)
    options = {"model": "hybrid", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    reply = server.client.completions.create(**options)
    assert reply.choices[0].text.strip() == reference.processor.decode(ids, skip_special_tokens=True).strip()
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]
    pieces = server.client.completions.create(**options, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == reply.choices[0].text


def test_several_answers_of_which_each_is_drawn_anew(server, reference):
    content = shown(as_data(picture(0)), question=HOW_MANY)
    if server.engine == "vllm":  # which refuses to give the greedy answer twice
        with pytest.raises(openai.BadRequestError, match="greedy"):
            server.chat(content, n=2)
    else:
        expected = reference.answer_about(picture(0), question=HOW_MANY)
        assert [choice.message.content for choice in server.chat(content, n=2).choices] == [expected] * 2
    options = {"n": 6, "temperature": 2.0, "max_tokens": 6}
    drawn = [
        [choice.message.content for choice in sorted(server.chat("Colors!", seed=seed, **options).choices, key=_index)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


def _index(choice):
    return choice.index


def test_a_stream_of_several_answers_tells_them_apart(server):
    content, options = shown(as_data(picture(0)), question=HOW_MANY), {"n": 3, "temperature": 2.0, "max_tokens": 6}
    whole = [choice.message.content for choice in sorted(server.chat(content, seed=5, **options).choices, key=_index)]
    streamed = ["", "", ""]
    for chunk in server.chat(content, seed=5, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


def test_logprobs_are_those_of_the_model(server, reference):
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": HOW_MANY}]
    inputs = reference.encode(user(content))
    ids = reference.ids(inputs)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], -1)
    inputs.pop("attention_mask", None)
    with torch.inference_mode():
        logprobs = reference.model(**inputs).logits[0, length - 1 : -1].float().log_softmax(-1)
    reply = server.chat(shown(as_data(picture(0)), question=HOW_MANY), logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == len(ids)
    for token, found, of_model in zip(tokens, ids, logprobs, strict=True):
        assert token.logprob == pytest.approx(of_model[found].item(), abs=2e-3)
        top = sorted((entry.logprob for entry in token.top_logprobs), reverse=True)[:3]
        assert top == pytest.approx(of_model.topk(3).values.tolist(), abs=2e-3)


def test_an_answer_ends_before_a_stop_text(server):
    content = shown(as_data(picture(0)), question="What color is the star?")
    whole = server.answer(content)
    letter = whole[len(whole) // 2]
    for stop in (letter, ["never there", letter]):
        reply = server.chat(content, stop=stop).choices[0]
        assert reply.message.content == whole[: whole.index(letter)] and reply.finish_reason == "stop"
        streamed = server.chat(content, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply.message.content


def test_an_answer_ends_at_max_tokens(server, reference):
    text = "blue blue blue"
    for name in ("max_tokens", "max_completion_tokens"):
        options = {"max_tokens": openai.NOT_GIVEN, name: 1}
        reply = server.chat(text, **options)
        assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 1
        assert reply.usage.prompt_tokens == reference.encode(user(text))["input_ids"].shape[1]


@needs_xgrammar
def test_an_answer_keeps_to_a_schema(server):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for temperature in (0, 1.5):
        content = shown(as_data(picture(0)), question=HOW_MANY)
        answer = json.loads(server.answer(content, response_format=format, temperature=temperature, max_tokens=200))
        assert answer["color"] in ("red", "blue") and answer["count"] in (1, 2, 3) and len(answer) == 2


def test_a_long_prompt_is_read_in_chunks(server, reference):
    text = "blue star red heart " * 200 + HOW_MANY
    reply = server.chat(text)
    assert reply.usage.prompt_tokens > 3 * BATCHED_TOKENS
    assert reply.choices[0].message.content == reference.answer(text)


def test_64_requests_at_once_have_the_answers_that_each_has_alone(server, reference):
    questions = []
    for index in range(64):
        pictures, question = example("test", 1, index)[1:3]
        images = [drawn.draw() for drawn in pictures]
        questions.append((images, question.replace("<image>", "").strip()))
    expected = [reference.answer_about(*images, question=question) for images, question in questions]
    with ThreadPoolExecutor(64) as pool:
        asked = [
            pool.submit(server.answer, shown(*map(as_data, images), question=question))
            for images, question in questions
        ]
        assert [answer.result() for answer in asked] == expected


@needs_xgrammar
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(server, stream):
    connection = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)/", server.url)[1]), timeout=60)
    body = {
        "model": "hybrid",
        "messages": user("Colors!"),
        "stream": stream,
        "max_tokens": 1500,
        "n": 4,
        "temperature": 1.0,
    }
    many = json.loads(json.dumps(LONG).replace("40", "400"))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", "/v1/chat/completions", json.dumps({**body, "response_format": many}), headers)
    if stream:
        connection.getresponse().read(2000)
    else:
        time.sleep(2)
    before = _running(server)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    began = time.monotonic()
    assert server.answer("What color is the star?", max_tokens=2) is not None
    while (running := _running(server)) and time.monotonic() - began < 20:
        time.sleep(0.2)
    # Alone, so many answers take far longer.
    assert running in (0, None) and before != 0 and time.monotonic() - began < 20


def _running(server) -> int | None:
    """Requests that vLLM works on; None of another engine."""
    if server.engine != "vllm":
        return None
    request = urllib.request.Request(server.url.replace("/v1", "/metrics"), headers={"Authorization": f"Bearer {KEY}"})
    text = urllib.request.urlopen(request).read().decode()
    return round(sum(map(float, re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M))))


def test_bad_pictures_are_refused_and_the_server_lives(server, media):
    secret = media.folder.parent / "secret.png"
    picture(0).save(secret)
    (media.folder / "link.png").unlink(missing_ok=True)
    (media.folder / "link.png").symlink_to(secret)
    for address, words in (
        (f"{media.url}/damaged.png", ""),
        (f"file://{media.folder}/damaged.png", ""),
        ("data:image/png;base64,bm8gcGljdHVyZQ==", "cannot be opened as a picture"),
        ("data:image/png;base64,!", "not valid base64"),
        ("data:image/png,abc", "not in base64"),
        (f"{media.url}/nowhere.png", "status 404"),
        ("http://127.0.0.1:9/0.png", "cannot be fetched"),
        ("http://localhost/0.png", "--allowed-media-domains"),
        (f"file://{media.folder}/nowhere.png", "is no file"),
        (f"file://{secret}", "not in the folder"),
        (f"file://{media.folder}/../{secret.name}", "not in the folder"),
        (f"file://{media.folder}/link.png", "not in the folder"),
        (f"file://{media.folder}", ""),
        ("ftp://127.0.0.1/0.png", "no address of a picture"),
        (str(media.folder / "0.png"), "no address of a picture"),
        ("", "no address of a picture"),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(words) or None) as refused:
            server.chat(shown(address, question=HOW_MANY))
        assert refused.value.body["message"] and "Traceback" not in refused.value.body["message"]
    assert server.answer(shown(f"{media.url}/0.png", question=HOW_MANY))


def test_pictures_over_a_limit_are_refused(server, media):
    big = as_data(Image.new("RGB", (1001, 1000)))
    with pytest.raises(openai.BadRequestError, match=r"1001 x 1000 pixels.*--max-image-pixels"):
        server.chat(shown(big, question=HOW_MANY))
    allowed = as_data(Image.new("RGB", (1000, 1000)))
    with pytest.raises(openai.BadRequestError, match=r"3000000 pixels.*--max-request-pixels"):
        server.chat(shown(*[allowed] * 4, question=HOW_MANY))
    noise = Image.effect_noise((990, 1000), 100).convert("RGB")
    noise.save(media.folder / "noise.bmp")  # 3 MB
    for address in (
        as_data(noise, "BMP")[: 22 + 1_400_000],
        f"{media.url}/noise.bmp",
        f"file://{media.folder}/noise.bmp",
    ):
        with pytest.raises(openai.BadRequestError, match=str(LIMITS["--max-image-bytes"])):
            server.chat(shown(address, question=HOW_MANY))


def test_requests_over_the_limit_are_refused_before_they_are_read(server):
    with pytest.raises(openai.APIStatusError, match=r"4000000.*--max-request-bytes") as refused:
        server.chat("x" * 4_000_001)
    assert refused.value.status_code == 413
    # Without a length, as a stream without end.
    port = int(re.search(r":(\d+)/", server.url)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        sock.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        answer = threading.Thread(target=lambda: answers.append(sock.recv(4096)))
        answers = []
        answer.start()
        try:
            for _ in range(1000):
                sock.sendall(chunk)
        except OSError:
            pass
        answer.join(30)
    assert b" 413 " in answers[0].split(b"\r\n")[0]
    assert server.answer("What color is the star?")


def test_only_those_with_the_key_are_answered(server):
    for key in ("wrong", KEY + "x", KEY[:-1]):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key=key, max_retries=0).models.list()
    base = server.url.removesuffix("/v1")
    assert urllib.request.urlopen(f"{base}/health").status == 200
    for path in ("/v1/models", "/metrics", "/load_model", "/docs"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(base + path)
        assert refused.value.code == 401
    assert KEY not in server.log.read_text()
    words = open(f"/proc/{server.process.pid}/cmdline").read()
    assert "--port" in words and KEY not in words  # though the server was started with it there


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": [3]}, "stop"),
        ({"messages": []}, "message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"messages": user([{"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}])}, "audio"),
        ({"response_format": {"type": "xml"}}, ""),
    ],
)
def test_wrong_requests_are_refused_with_a_reason(server, options, words):
    with pytest.raises(openai.BadRequestError, match=words or None):
        server.client.chat.completions.create(**{"model": "hybrid", "messages": user("x"), **options})


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "logit_bias", "tools", "best_of"])
def test_what_transformers_cannot_do_is_refused_by_name(server, name):
    if server.engine != "transformers":
        pytest.skip("vLLM takes these, or refuses them in words of its own")
    value = {"logit_bias": {"5": 3}, "tools": [{"type": "function", "function": {"name": "f"}}], "best_of": 2}
    with pytest.raises(openai.BadRequestError, match=f"^.*{name} is not supported"):
        server.chat("x", extra_body={name: value.get(name, 0.5)})


@needs_xgrammar
def test_sigterm_finishes_what_runs_and_refuses_what_is_new(server):
    """The last test, since it ends the server."""
    options = {"response_format": LONG, "max_tokens": 1000}
    whole = server.answer("Colors!", **options)
    stream = server.chat("Colors!", stream=True, **options)
    pieces = [next(stream).choices[0].delta.content or ""]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.answer, "Colors!", **options)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        with pytest.raises(openai.APIError):
            server.chat("What color is the star?")
        pieces += [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole == answer.result()
    assert server.process.wait(60) == 0


def test_sigint_ends_an_idle_server_well(tmp_path):
    running = start("transformers", tmp_path / "log")
    assert running.stop(signal.SIGINT) == 0
    assert "Traceback" not in running.log.read_text()
