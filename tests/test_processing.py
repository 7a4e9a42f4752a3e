"""Prompts as upstream renders them, and messages with pictures to model inputs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmmamba.conversion.convert import chat_template
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor, encode_conversation, expand_placeholders
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "prompts.json").read_text())["cases"]
CONTROL = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = MmMambaTokenizer(str(GOLDEN / "tokenizer" / "tokenizer.model"))
    tokenizer.chat_template = chat_template("internlm2-chat")
    return tokenizer


@pytest.fixture(scope="module")
def processor(tokenizer):
    image_processor = MmMambaImageProcessorPil(size={"height": 16, "width": 16}, max_patches=6)
    return MmMambaProcessor(image_processor, tokenizer, tokens_per_tile=4)


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def messages_of(case):
    messages = [] if case["system_message"] is None else [{"role": "system", "content": case["system_message"]}]
    question = case["question"]
    if case["history"] is None and case["has_pixel_values"] and "<image>" not in question:
        question = "<image>\n" + question  # chat() does this
    for asked, answered in case["history"] or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}], question


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}-{case['name']}")
def test_every_upstream_prompt_is_rendered(case, tokenizer):
    messages, question = messages_of(case)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template(case["template"])
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == case["prompt_before_image_expansion"]

    tiles = case["num_image_token"]
    if prompt.count("<image>") == len(case["num_patches_list"]):
        assert expand_placeholders([prompt], case["num_patches_list"], tiles) == [case["prompt"]]
        if question:
            ids = encode_conversation(
                tokenizer, question, case["history"], case["num_patches_list"], tiles, case["system_message"]
            )
            assert ids == tokenizer(case["prompt"])["input_ids"]
    else:  # upstream says nothing when a picture has no placeholder; here it is an error
        with pytest.raises(ValueError, match="0 <image> placeholders but there are 1 pictures"):
            encode_conversation(tokenizer, question, case["history"], case["num_patches_list"], tiles)


def test_messages_with_pictures_become_inputs(processor, tokenizer):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(32, 16)}, {"type": "text", "text": "What is this?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == encode_conversation(tokenizer, "<image>\nWhat is this?", None, [3], 4)
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_a_batch_is_padded_on_the_left(processor):
    def asked(text, *pictures):
        content = [{"type": "image", "image": p} for p in pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    batch = [asked("Which?", picture(32, 16), picture(16, 16)), asked("Hello")]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(batch, padding=True, **options)
    alone = [processor.apply_chat_template(one, **options) for one in batch]
    for row, mask, one in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == one["input_ids"][0].tolist()
        assert mask[-1] == 1
    torch.testing.assert_close(inputs["pixel_values"], alone[0]["pixel_values"])


def test_messages_cannot_inject_control_tokens_or_pictures(processor, tokenizer):
    typed = "a" + "".join(CONTROL) + "<image>b"
    control = set(tokenizer.convert_tokens_to_ids(CONTROL))
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}

    def control_ids(content):
        before = copy.deepcopy(content)
        ids = processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"]
        assert content == before
        return [i for i in np.ravel(ids).tolist() if i in control]

    assert control_ids(typed) == control_ids("harmless")
    assert control_ids([{"type": "text", "text": typed}]) == control_ids("harmless")
    # What was typed is still there, as text.
    ids = processor.apply_chat_template([{"role": "user", "content": typed}], **options)["input_ids"]
    assert typed in tokenizer.decode(np.ravel(ids).tolist())


def test_a_raw_prompt_may_contain_control_tokens(processor, tokenizer):
    ids = processor(text="<|im_start|>user\nHi<|im_end|>")["input_ids"]
    assert ids == [tokenizer("<|im_start|>user\nHi<|im_end|>")["input_ids"]]


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("no place", [picture(16, 16)], "0 <image> placeholders but there are 1 pictures"),
        ("<image><image>", [picture(16, 16)], "2 <image> placeholders but there are 1 pictures"),
        ("<image>", None, "1 <image> placeholders but there are 0 pictures"),
        (["<image>", "x"], [[], [picture(16, 16)]], "1 <image> placeholders but 0 pictures"),
        (None, None, "text is missing"),
    ],
)
def test_counts_must_agree(processor, text, images, words):
    with pytest.raises(ValueError) as error:
        processor(images=images, text=text)
    assert words in str(error.value)


def test_a_saved_processor_loads_again(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MmMambaProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    options = {"images": [picture(40, 20)], "text": "<image>\nHi", "return_tensors": "pt"}
    for name, value in processor(**options).items():
        torch.testing.assert_close(again(**options)[name], value)
    assert again.tokens_per_tile == 4
    assert again.chat_template == processor.chat_template
