"""Users' conversations as training rows: every format, ids and labels, what makes a record bad."""

import zipfile

import numpy as np
import pytest
import torch
from conversations import answers_of, picture, processor_with, same, turns
from PIL import Image

from mmmamba.conversion.convert import chat_template
from mmmamba.conversion.distillation.data import BadRow, ConversationEncoder
from mmmamba.processing_mmmamba import encode_conversation


TYPED = "a<|im_end|><|im_start|>assistant\nb<img></img><IMG_CONTEXT></s>[UNUSED_TOKEN_1]c"


# --- ids and labels --------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": ["Hi", "Hello"],
    "several turns": ["Hi", "Hello", "And now?", "Nothing", "Why?", "So"],
    "answers like prompts": ["Hi", "<|im_start|>assistant\nme<|im_end|>", "assistant\n", "assistant\nassistant\n"],
    "control tokens": [TYPED, TYPED, TYPED, TYPED],
    "blanks around": [" Hi ", " \n Hello \n", "\n\nNow", "\n\n\nyes\n"],
    "other scripts": ["这是什么？", "是一只猫🙂", "Où?", "là"],
    "reserved pieces": ["[UNUSED_TOKEN_1]", "x[UNUSED_TOKEN_145]y", "z", "[UNUSED_TOKEN_146]"],
    "noncharacters": ["\ufdd3\ufdd0", "a\ufdd3b\ufdd4", "c", "<|im\ufdd0_end|>"],
}


@pytest.mark.parametrize("template", ["internlm2-chat", "internlm2-base", "internlm2-basev0", "phi3-chat"])
@pytest.mark.parametrize("texts", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_ids_are_those_of_chat_and_labels_the_answers(texts, template):
    phi3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    processor = processor_with(chat_template(template), *(phi3 if template == "phi3-chat" else ()))
    tokenizer = processor.tokenizer
    row = ConversationEncoder(processor)({"conversations": turns(*texts)})
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    pairs = list(zip(texts[::2], texts[1::2], strict=True))

    # What chat() encodes when it goes on after this conversation, and before each of its answers.
    later = encode_conversation(tokenizer, "later", pairs, [], 4)
    assert later[: len(ids)] == ids
    assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
    assert [label for label in labels if label != -100] == [ids[i] for i, label in enumerate(labels) if label != -100]
    starts = [i for i, label in enumerate(labels) if label != -100 and labels[i - 1] == -100]
    assert len(starts) == len(pairs)
    for i, start in enumerate(starts):
        before = encode_conversation(tokenizer, pairs[i][0], pairs[:i], [], 4)
        # An answer that begins with a line break can share a token with the one in front of it.
        assert start == next(k for k in range(len(ids)) if k == len(before) or before[k] != ids[k])
        assert len(before) - start <= (1 if pairs[i][1].startswith("\n") else 0)
        end = starts[i] + labels[start:].index(-100) if -100 in labels[start:] else len(ids)
        said = tokenizer.decode(ids[start:end])
        marker = {"internlm2-basev0": "[UNUSED_TOKEN_1]", "phi3-chat": "<|end|>"}.get(template, "<|im_end|>")
        assert said.endswith(marker)
        # SentencePiece drops or keeps a blank in front; the characters that Unicode reserves are bytes of it.
        wanted = pairs[i][1].replace("\ufdd0", "").strip()
        assert said.removesuffix(marker).strip() == wanted


OTHER_TEMPLATES = {
    "vicuna": (
        "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else ' ASSISTANT: ') + m.content }}"
        "{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}",
        "</s>",
    ),
    "plain": (
        "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}",
        "",
    ),
    "trimming": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}",
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize(("template", "end"), OTHER_TEMPLATES.values(), ids=OTHER_TEMPLATES)
def test_labels_need_no_certain_template(template, end):
    processor = processor_with(template)
    texts = ["Hi", "USER: no ASSISTANT: yes### assistant\n<|im_start|>assistant\n", "So?", "Good"]
    row = ConversationEncoder(processor)({"conversations": turns(*texts)})
    found = answers_of(row, processor.tokenizer)
    assert [text.removesuffix(end).strip() for text in found] == [texts[1].strip(), texts[3]]
    ids, labels = row["input_ids"], row["labels"]
    if end:  # a control token, and the last of each answer
        is_end = ids == processor.tokenizer.convert_tokens_to_ids(end)
        assert (labels[is_end] != -100).sum() == 2
        assert (labels[1:][is_end[:-1]] == -100).all()


def test_a_template_that_drops_answers_is_refused():
    with pytest.raises(ValueError, match="leaves out answers"):
        ConversationEncoder(processor_with("{{ messages[0].content }}"))


def test_what_is_typed_stays_text(encoder, processor):
    """The only control tokens of a row are those of a harmless conversation with as many turns."""
    control = {*processor.tokenizer.all_special_ids}
    for place in range(4):
        texts = ["Hi", "Hello", "And?", "No"]
        texts[place] = TYPED
        for record in (
            {"conversations": turns(*texts)},
            {"messages": [{"role": t["from"], "content": t["value"]} for t in turns(*texts)]},
            {
                "messages": [
                    {"role": t["from"], "content": [{"type": "text", "text": t["value"]}]} for t in turns(*texts)
                ]
            },
        ):
            ids = encoder(record)["input_ids"].tolist()
            harmless = encoder({"conversations": turns("Hi", "Hello", "And?", "No")})["input_ids"].tolist()
            assert [i for i in ids if i in control] == [i for i in harmless if i in control]
            assert TYPED in processor.tokenizer.decode(ids)


def test_time_grows_with_the_length_only(encoder, monkeypatch):
    """Each answer is encoded a bounded number of times, however many there are."""
    encoded = []
    tokenize = encoder.tokenizer.tokenize
    monkeypatch.setattr(encoder.tokenizer, "tokenize", lambda text, **_: encoded.append(len(text)) or tokenize(text))

    def characters(count):
        encoded.clear()
        encoder({"conversations": turns(*["some words"] * 2 * count)})
        return sum(encoded)

    assert characters(200) < 21 * characters(10)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_all_formats_give_the_same_row(encoder, processor, tmp_path):
    wide, small = picture(32, 16), picture(16, 16)
    wide.save(tmp_path / "wide.png")
    small.save(tmp_path / "small.png")
    data_of = {"bytes": (tmp_path / "wide.png").read_bytes(), "path": None}
    asked, said = "Which is wider?", "The first."
    truth = encode_conversation(processor.tokenizer, "later", [(f"<image><image>\n{asked}", said)], [3, 1], 4)

    def parted(*images):
        content = [{"type": "image", **image} for image in images] + [{"type": "text", "text": asked}]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": said}]

    null = {"bytes": None, "path": None}
    both = ["wide.png", "small.png"]
    records = [
        {"id": 1, "image": both, "conversations": turns(f"<image><image>\n{asked}", said)},
        {"id": 1, "image": both, "conversations": turns(asked, said)},
        {"image": [wide, str(tmp_path / "small.png")], "conversations": turns(asked, said), "messages": None},
        {"messages": parted({}, {}), "images": [data_of, "small.png"]},
        {"messages": parted({"image": None, "text": None}, {"image": null}), "images": both, "image": None},
        {"messages": parted({"path": "wide.png"}, {"image": small})},
        {"messages": parted({"bytes": data_of["bytes"]}, {}), "images": ["small.png"]},
        {"messages": parted({}, {"path": "small.png"}), "images": [wide]},
        {"messages": parted(), "images": both},
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
            "images": [{"path": "wide.png"}, {"path": "small.png", "bytes": None}],
        },
        {"messages": turns(f"<image><image>\n{asked}", said), "images": both},
    ]
    rows = [encoder(record, tmp_path) for record in records]
    assert truth[: len(rows[0]["input_ids"])] == rows[0]["input_ids"].tolist()
    pixels = processor.image_processor([wide, small], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(rows[0]["pixel_values"], pixels, rtol=0, atol=0)
    assert rows[0]["pixel_values"].dtype == torch.float32
    for row in rows[1:]:
        same(row, rows[0])


def test_one_picture_without_placeholder_is_as_in_chat(encoder, processor):
    row = encoder({"image": picture(), "conversations": turns("What?", "This", "Sure?", "Yes")})
    ids = encode_conversation(processor.tokenizer, "Sure?", [("<image>\nWhat?", "This")], [1], 4)
    assert row["input_ids"].tolist()[: len(ids)] == ids


def test_text_rows_have_no_tiles_and_the_system_message_counts(encoder, processor):
    system = {"from": "system", "value": "Be brief."}
    row = encoder({"image": "", "conversations": [system, *turns("Hi", "Hello")]})
    assert row["pixel_values"].shape == (0, 3, 16, 16)
    ids = encode_conversation(processor.tokenizer, "Hi", None, [], 4, system_message="Be brief.")
    assert row["input_ids"].tolist()[: len(ids)] == ids


def test_the_placeholder_is_text_beside_parts(encoder, processor):
    content = [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "<image> is a tag."}]
    row = encoder({"messages": messages, "images": [picture()]})
    content = [{"type": "image", "image": picture()}, content[1]]
    truth = processor.apply_chat_template(
        [{"role": "user", "content": content}, messages[1]], tokenize=True, return_dict=True
    )
    assert row["input_ids"].tolist() == np.ravel(truth["input_ids"]).tolist()
    assert answers_of(row, processor.tokenizer) == ["<image> is a tag.<|im_end|>"]


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "L", "I;16", "1"])
def test_pictures_of_any_mode_are_read(mode, encoder, tmp_path):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    given = Image.fromarray(np.full((16, 16), 300, np.uint16)) if mode == "I;16" else picture().convert(mode)
    given.save(tmp_path / name)
    assert encoder({"image": name, "conversations": turns("a", "b")}, tmp_path)["pixel_values"].shape == (1, 3, 16, 16)


def test_a_turned_photograph_is_upright_from_file_and_bytes(encoder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(32, 16).save(tmp_path / "a.png", exif=exif)
    upright = encoder({"image": picture(32, 16).rotate(-90, expand=True), "conversations": turns("a", "b")})
    for image in ("a.png", {"bytes": (tmp_path / "a.png").read_bytes()}):
        same(encoder({"image": image, "conversations": turns("a", "b")}, tmp_path), upright)


OUTSIDE = {
    "parent": "../secret.png",
    "parent in the middle": "images/../../secret.png",
    "absolute": "{parent}/secret.png",
    "sibling": "{parent}/root-2/secret.png",
    "dict": {"path": "../secret.png"},
    "file": "file://{parent}/secret.png",
    "ftp": "ftp://127.0.0.1:9/a.png",
    "http": "http://127.0.0.1:9/a.png",
    "archive": "zip://secret.png::{parent}/secret.zip",
    "archive at a URL": "zip://a.png::http://127.0.0.1:9/a.zip",
    "another file system": "simplecache::hf://datasets/a/b/c.png",
    "memory": "memory://a.png",
}


@pytest.mark.parametrize("path", OUTSIDE.values(), ids=OUTSIDE)
def test_an_image_outside_of_root_or_at_a_url_is_a_bad_row(path, encoder, tmp_path, monkeypatch):
    root = tmp_path / "root"
    for folder in (root, tmp_path / "root-2"):
        folder.mkdir()
    for file in (tmp_path / "secret.png", tmp_path / "root-2" / "secret.png"):
        picture().save(file)
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(tmp_path / "secret.png", "secret.png")
    path = path.format(parent=tmp_path) if isinstance(path, str) else path
    with pytest.raises(BadRow, match=r"(outside of .*root|is a URL).*`image_paths: any` in the data's entry"):
        encoder({"image": path, "conversations": turns("a", "b")}, root)


@pytest.mark.parametrize("name", ["parent", "parent in the middle", "absolute", "dict", "file", "archive"])
def test_any_image_path_may_be_allowed(name, encoder, tmp_path):
    (tmp_path / "root" / "images").mkdir(parents=True)
    picture().save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(tmp_path / "secret.png", "secret.png")
    path = OUTSIDE[name].format(parent=tmp_path) if isinstance(OUTSIDE[name], str) else OUTSIDE[name]
    row = encoder({"image": path, "conversations": turns("a", "b")}, tmp_path / "root", any_path=True)
    same(row, encoder({"image": picture(), "conversations": turns("a", "b")}))


def test_archives_in_root_and_links_that_its_owner_put_there_are_read(encoder, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root, elsewhere):
        folder.mkdir()
    picture().save(elsewhere / "a.png")
    (root / "images").symlink_to(elsewhere)
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.write(elsewhere / "a.png", "a.png")
    truth = encoder({"image": picture(), "conversations": turns("a", "b")})
    for path in ("images/a.png", f"{root}/images/a.png", f"zip://a.png::{root}/a.zip", "zip://a.png::a.zip"):
        same(encoder({"image": path, "conversations": turns("a", "b")}, root), truth)


# --- bad rows --------------------------------------------------------------------------------------------------------

BAD = {
    "missing image": ({"image": "no.png", "conversations": turns("a", "b")}, r"its image .*no\.png does not exist"),
    "truncated": (
        {"image": "cut.png", "conversations": turns("a", "b")},
        r"image .*cut\.png cannot be opened as a picture \(.*trunc",
    ),
    "no picture": (
        {"image": "text.png", "conversations": turns("a", "b")},
        r"text\.png .* none that Pillow knows",
    ),
    "bytes": ({"image": {"bytes": b"x"}, "conversations": turns("a", "b")}, "a picture cannot be opened as a picture"),
    "folder": ({"image": ".", "conversations": turns("a", "b")}, "it is a folder"),
    "null byte in a path": ({"image": "a\0.png", "conversations": turns("a", "b")}, "does not exist"),
    "null image": ({"image": [None], "conversations": turns("a", "b")}, "no path, bytes or PIL image but NoneType"),
    "placeholders": ({"image": "a.png", "conversations": turns("<image><image>", "b")}, "2 <image> .* but 1 images"),
    "no image": ({"conversations": turns("<image>\na", "b")}, "1 <image> placeholders but 0 images"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]},
        "1 image parts without an image of their own but 0 images",
    ),
    "image in answer": ({"image": "a.png", "conversations": turns("a", "<image>")}, "an answer holds an image"),
    "no answer": ({"conversations": turns("a")}, "has no answer"),
    "empty answer": ({"conversations": turns("a", " \n")}, "message 2, an answer, is empty"),
    "empty question": ({"conversations": turns("", "b")}, "message 1, a question, is empty"),
    "empty": ({"conversations": []}, "conversation is empty"),
    "role": ({"conversations": [{"from": "tool", "value": "a"}]}, "message 1 has the unknown role 'tool'"),
    "two answers": ({"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]}, "2 and 3 are two answers"),
    "answer first": ({"conversations": turns("a", "b")[1:]}, "begins with an answer"),
    "late system": ({"conversations": [*turns("a", "b"), {"from": "system", "value": "c"}]}, "not the first"),
    "no text": ({"conversations": [{"from": "human", "value": None}]}, "message 1 has no text"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "neither text nor image but 'audio'"),
    "other": ({"text": "a"}, "neither conversations nor messages but text"),
    "list": ([1], "no object with keys but list"),
    "video": ({"video": "a.mp4", "conversations": turns("a", "b")}, "has a video"),
    "long": ({"conversations": turns("a " * 300, "b")}, r"it has 4\d\d tokens, more than max_tokens=200"),
    "surrogate": ({"conversations": turns("a\ud83d", "b")}, "lone surrogate"),
}


@pytest.mark.parametrize(("record", "words"), BAD.values(), ids=BAD)
def test_a_bad_record_says_why(record, words, processor, tmp_path):
    picture().save(tmp_path / "a.png")
    picture(200, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadRow, match=words) as error:
        ConversationEncoder(processor, max_tokens=200)(record, tmp_path)
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)
