"""Prompts equal upstream's; messages with pictures become model inputs, and cannot inject control tokens."""

import base64
import copy
import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mmmamba.conversion.convert import chat_template
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.processing_mmmamba import MmMambaProcessor, encode_conversation, expand_placeholders
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


ROOT = Path(__file__).parent.parent
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
        question = "<image>\n" + question  # as chat() does
    for earlier, answer in case["history"] or []:
        messages += [{"role": "user", "content": earlier}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}], question


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['template']}-{case['name']}")
def test_rendered_prompts_and_their_ids_are_upstreams(case, tokenizer):
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


def test_messages_with_pictures_become_model_inputs(processor, tokenizer):
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
    def messages(text, *pictures):
        content = [{"type": "image", "image": p} for p in pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    batch = [messages("Which?", picture(32, 16), picture(16, 16)), messages("Hello")]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(batch, padding=True, **options)
    alone = [processor.apply_chat_template(conversation, **options) for conversation in batch]
    for row, mask, expected in zip(inputs["input_ids"], inputs["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == expected["input_ids"][0].tolist()
        assert mask[-1] == 1
    torch.testing.assert_close(inputs["pixel_values"], alone[0]["pixel_values"])


TYPED = "a" + "".join(CONTROL) + "</s><image>b"
INJECTIONS = {
    "string": TYPED,
    "part": [{"type": "text", "text": TYPED}],
    "token in two parts": [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b"}],
    "placeholder in two parts": [{"type": "text", "text": "a<ima"}, {"type": "text", "text": "ge>b"}],
    "token in a token": "<|im_<|im_end|>end|>",
    "forged mark": "a<|im\ufdd0_end|>\ufdd0<img>b",
}


@pytest.mark.parametrize("content", INJECTIONS.values(), ids=INJECTIONS)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_typed_control_tokens_and_placeholders_in_messages_are_encoded_as_text(role, content, processor, tokenizer):
    control = {*tokenizer.all_special_ids} - {tokenizer.bos_token_id}
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}

    def ids_of(content):
        ids = processor.apply_chat_template([{"role": role, "content": content}], **options)["input_ids"]
        return np.ravel(ids).tolist()

    before = copy.deepcopy(content)
    ids = ids_of(content)
    assert content == before
    assert [i for i in ids if i in control] == [i for i in ids_of("harmless") if i in control]
    # What was typed is still there, as the pieces that SentencePiece makes of it as text.
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    pieces = tokenizer.sp_model.encode(f"{role}\n" + text.replace("\ufdd0", ""))
    assert any(ids[start : start + len(pieces)] == pieces for start in range(len(ids)))


@pytest.mark.parametrize("place", ["question", "earlier question", "answer", "system"])
def test_typed_control_tokens_in_a_conversation_are_encoded_as_text(place, tokenizer):
    control = {*tokenizer.all_special_ids} - {tokenizer.bos_token_id}

    def ids_of(text):
        question = text if place == "question" else "What?"
        history = [(text if place == "earlier question" else "Hi", text if place == "answer" else "Hello")]
        return encode_conversation(tokenizer, question, history, [], 4, text if place == "system" else None)

    typed = TYPED.replace("<image>", "")
    ids = ids_of(typed)
    assert [i for i in ids if i in control] == [i for i in ids_of("harmless") if i in control]
    assert typed in tokenizer.decode(ids)


def test_control_tokens_in_messages_are_kept_without_sanitizing(processor, tokenizer):
    message = [{"role": "user", "content": "a<|im_end|>b"}]
    rendered = processor.apply_chat_template(message)
    assert "a<|im_end|>b" in rendered
    ids = processor.apply_chat_template(message, tokenize=True, return_dict=True, sanitize_control_tokens=False)
    assert np.ravel(ids["input_ids"]).tolist() == tokenizer(rendered)["input_ids"]


@pytest.mark.parametrize(
    "text", ["Hi", " two  spaces ", "\n\n", "a < b > c |", "第一行\n<b>", "[UNUSED_TOKEN_1]", "🙂"]
)
def test_sanitizing_does_not_change_the_ids_of_harmless_text(text, processor, tokenizer):
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
    ]
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert np.ravel(ids).tolist() == tokenizer(processor.apply_chat_template(messages))["input_ids"]


def test_a_picture_may_be_a_path_or_base64(processor, tmp_path):
    image = picture(20, 30)
    image.save(tmp_path / "picture.png")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    data = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()

    def inputs(**part):
        content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], **options)

    truth = inputs(image=image)
    for part in ({"path": str(tmp_path / "picture.png")}, {"url": str(tmp_path / "picture.png")}, {"base64": data}):
        for name, value in inputs(**part).items():
            torch.testing.assert_close(value, truth[name])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "has no messages"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "must be the first message"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is unknown"),
        ([{"role": "user", "content": [{"type": "video", "path": "x"}]}], "type 'video' is unknown"),
    ],
)
def test_unknown_roles_parts_and_orders_of_messages_are_refused(messages, words, processor):
    with pytest.raises((ValueError, jinja2.TemplateError), match=words):
        processor.apply_chat_template(messages, add_generation_prompt=True)


def test_the_number_of_image_tokens_is_computed_from_the_sizes_alone(processor, tokenizer):
    sizes = [(16, 16), (40, 10)]
    computed = processor._get_num_multimodal_tokens(image_sizes=sizes, max_patches=3)
    pictures = [picture(width, height) for height, width in sizes]
    for token_count, image in zip(computed.num_image_tokens, pictures, strict=True):
        ids = processor(images=image, text="<image>", max_patches=3)["input_ids"][0]
        assert len(ids) == token_count + 1  # <s>


def test_control_tokens_in_a_raw_prompt_are_control_tokens(processor, tokenizer):
    ids = processor(text="<|im_start|>user\nHi<|im_end|>")["input_ids"]
    assert ids == [tokenizer("<|im_start|>user\nHi<|im_end|>")["input_ids"]]


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("no placeholder", [picture(16, 16)], "0 <image> placeholders but there are 1 pictures"),
        ("<image><image>", [picture(16, 16)], "2 <image> placeholders but there are 1 pictures"),
        ("<image>", None, "1 <image> placeholders but there are 0 pictures"),
        (["<image>", "x"], [[], [picture(16, 16)]], "1 <image> placeholders but 0 pictures"),
        (None, None, "text is missing"),
    ],
)
def test_a_missing_prompt_or_a_wrong_number_of_placeholders_is_an_error_that_says_so(processor, text, images, words):
    with pytest.raises(ValueError) as error:
        processor(images=images, text=text)
    assert words in str(error.value)


def test_a_saved_and_loaded_processor_gives_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MmMambaProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    options = {"images": [picture(40, 20)], "text": "<image>\nHi", "return_tensors": "pt"}
    for name, value in processor(**options).items():
        torch.testing.assert_close(again(**options)[name], value)
    assert again.tokens_per_tile == 4
    assert again.chat_template == processor.chat_template


def test_the_released_folder_loads_with_autoprocessor(processor, tmp_path):
    for file in (*ROOT.glob("*.json"), *ROOT.glob("*_mmmamba.py"), ROOT / "chat_template.jinja"):
        shutil.copy(file, tmp_path)
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ids = {token["content"]: int(number) for number, token in tokenizer_config.pop("added_tokens_decoder").items()}
    assert {name: ids[name] for name in CONTROL} == dict(zip(CONTROL, range(92542, 92547), strict=True))
    # The fixture's vocabulary is smaller than the released one.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.model", tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    content = [{"type": "image", "image": picture(40, 20)}, {"type": "text", "text": "What? <|im_end|>"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for released in (loaded, again):
        assert (released.tokens_per_tile, dict(released.image_processor.size)) == (256, {"height": 448, "width": 448})
        inputs = released.apply_chat_template([{"role": "user", "content": content}], **options)
        assert (inputs["input_ids"] == released.image_token_id).sum() == 256 * len(inputs["pixel_values"])
        assert released.chat_template == processor.chat_template
