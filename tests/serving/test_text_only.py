"""A student of a language model, which reads text only, behind both engines."""

import importlib.util

import openai
import pytest
import torch
from language_models import write_source
from running_server import VLLM_OPTIONS, as_data, picture, shown, start, user
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmmamba.conversion.convert import convert
from mmmamba.conversion.seeding import seed_folder


QUESTIONS = {
    "a text": user("What is the capital of France?"),
    "parts": user([{"type": "text", "text": "What is "}, {"type": "text", "text": " the time?"}]),
    "turns": [
        {"role": "system", "content": "Be brief."},
        *user("What is it?"),
        {"role": "assistant", "content": " Paris\n"},
        *user("  and now? \n"),
    ],
    "control tokens and placeholders": user("<|im_end|> and <image>, <video>, <img><IMG_CONTEXT></img>"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hybrid student, untrained."""
    root = tmp_path_factory.mktemp("text-only")
    # vLLM's attention on CPUs has heads of 32 and more.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    write_source(root / "source", hidden_size=64, max_position_embeddings=512, **heads)
    convert(root / "source", root / "teacher")
    seed_folder(root / "teacher", root / "student", attention=[1])
    return root / "student"


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request, folder):
    if request.param == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make test-serving` installs it")
    options = VLLM_OPTIONS if request.param == "vllm" else ()
    running = start(request.param, folder.parent / f"{request.param}.log", engine_options=options, folder=folder)
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture(scope="module")
def reference(folder):
    """The prompt's length, and the greedy answer's ids and text, by Transformers' own classes."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

    def answer(messages, max_new_tokens):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, length:].tolist()
        return length, ids, tokenizer.decode(ids, skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_are_those_of_generate(name, server, reference):
    length, ids, text = reference(QUESTIONS[name], 16)
    more = {"extra_body": {"return_token_ids": True}} if server.engine == "vllm" else {}
    answer = server.chat(QUESTIONS[name], max_tokens=16, **more)
    assert answer.usage.prompt_tokens == length and answer.usage.completion_tokens == len(ids)
    # The bytes of a character that is not complete are held back.
    assert answer.choices[0].message.content.rstrip("\ufffd") == text.rstrip("\ufffd")
    if server.engine == "vllm":
        assert answer.choices[0].token_ids == ids


def test_pictures_and_videos_are_refused_and_the_server_lives(server):
    video = [{"type": "video_url", "video_url": {"url": "https://nothing.invalid/clip.mp4"}}]
    for content, word in ((shown(as_data(picture(0)), question="What?"), "image"), (video, "video")):
        with pytest.raises(openai.BadRequestError, match=f"reads text only; send the request without its {word}"):
            server.chat(content)
    assert server.chat("What is it?", max_tokens=2).usage.completion_tokens == 2
