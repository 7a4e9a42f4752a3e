"""Both tokenizers give upstream's ids and text; marked control tokens are text; folders save and load."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mmmamba.chat_template_mmmamba import PLAIN_TEXT_MARK, as_text
from mmmamba.tokenization_mmmamba import CONTROL_TOKENS, PICTURE_TOKENS, MmMambaTokenizer, MmMambaTokenizerFast


ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
TRUTH = json.loads((GOLDEN / "cases.json").read_text())
CLASSES = [MmMambaTokenizer, MmMambaTokenizerFast]


@pytest.fixture(scope="module", params=CLASSES, ids=["sentencepiece", "tokenizers"])
def tokenizer(request):
    return request.param(str(GOLDEN / "tokenizer.model"))


@pytest.fixture(scope="module")
def reserved(tmp_path_factory):
    """Both tokenizers and ids of special tokens: as InternLM2's, control tokens have the ids of reserved pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user\nWhat is this?", "assistant\nA red square."] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        # The last one keeps its id.
        user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(len(CONTROL_TOKENS) + 1)],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("reserved")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    config = json.loads((ROOT / "tokenizer_config.json").read_text())
    ids = {name: pieces.piece_to_id(f"[UNUSED_TOKEN_{i}]") for i, name in enumerate(CONTROL_TOKENS)}
    ids |= {name: pieces.get_piece_size() + i for i, name in enumerate(PICTURE_TOKENS)}
    config["added_tokens_decoder"] = {
        str(ids.get(token["content"], number)): token for number, token in config["added_tokens_decoder"].items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return [tokenizer_class.from_pretrained(folder) for tokenizer_class in CLASSES], ids


@pytest.mark.parametrize("case", TRUTH["cases"], ids=range(len(TRUTH["cases"])))
def test_encoded_ids_and_decoded_text_are_upstreams(case, tokenizer):
    assert tokenizer(case["text"])["input_ids"] == case["ids"]
    assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids_no_special"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip"]


def test_ids_of_special_tokens_are_upstreams(tokenizer):
    assert len(tokenizer) == TRUTH["len"]
    assert tokenizer.vocab_size == TRUTH["vocab_size"]
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in TRUTH["added_ids"]} == TRUTH["added_ids"]
    ids = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [TRUTH["unk"], TRUTH["bos"], TRUTH["eos"], TRUTH["pad"]]


@pytest.mark.parametrize("saved_by", CLASSES, ids=["sentencepiece", "tokenizers"])
def test_a_saved_folder_loads_as_either_with_the_same_ids(saved_by, tmp_path):
    tokenizer = saved_by(str(GOLDEN / "tokenizer.model"))
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "folder")
    shutil.copy(ROOT / "config.json", tmp_path / "folder")
    fast = AutoTokenizer.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    slow = AutoTokenizer.from_pretrained(tmp_path / "folder", trust_remote_code=True, backend="sentencepiece")
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>Was ist das?<extra> 这是什么<|im_end|>"
    for loaded, name in ((fast, "MmMambaTokenizerFast"), (slow, "MmMambaTokenizer")):
        assert type(loaded).__name__ == name
        assert type(loaded) not in CLASSES  # the folder's own code
        assert loaded.is_fast == name.endswith("Fast")
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.get_vocab() == tokenizer.get_vocab()
        loaded.save_pretrained(tmp_path / name)
        for again in CLASSES:
            assert again.from_pretrained(tmp_path / name)(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_folder_without_tokenizer_json_gives_the_fast_tokenizer(tokenizer, tmp_path):
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    auto_map = ["tokenization_mmmamba.MmMambaTokenizer", "tokenization_mmmamba.MmMambaTokenizerFast"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": auto_map}}))
    for module in ("tokenization_mmmamba.py", "chat_template_mmmamba.py"):
        shutil.copy(ROOT / module, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.is_fast
    assert loaded("Was ist das?")["input_ids"] == tokenizer("Was ist das?")["input_ids"]


def test_a_tokenizer_json_alone_is_enough(tokenizer, tmp_path):
    MmMambaTokenizer(str(GOLDEN / "tokenizer.model"), add_bos_token=False).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    alone = MmMambaTokenizerFast.from_pretrained(tmp_path)
    text = "<img>Hello 这 wörld"
    assert alone(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    alone.save_pretrained(tmp_path / "again")
    assert MmMambaTokenizerFast.from_pretrained(tmp_path / "again")(text) == alone(text)


def test_a_model_that_tokenizers_cannot_reproduce_is_saved_without_tokenizer_json(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user\nWhat is this?", "assistant\nA red square."] * 50),
        model_writer=model,
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = MmMambaTokenizer(str(tmp_path / "tokenizer.model"))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.json").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(loaded).__name__ == "MmMambaTokenizer"
    assert loaded("What is this?") == tokenizer("What is this?")


@pytest.mark.parametrize("again", CLASSES, ids=["to sentencepiece", "to tokenizers"])
@pytest.mark.parametrize("saved_by", CLASSES, ids=["sentencepiece", "tokenizers"])
def test_options_are_saved_and_loaded(saved_by, again, tmp_path):
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    saved_by(str(GOLDEN / "tokenizer.model"), **options).save_pretrained(tmp_path)
    again = again.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in options} == options
    ids = again("Hello")["input_ids"]
    assert ids[0] != again.bos_token_id
    assert ids[-1] == again.eos_token_id


def test_special_tokens_mask_has_one_entry_per_id(tokenizer):
    text = "a <|im_end|> 这"
    encoded = tokenizer(text, return_special_tokens_mask=True)
    assert encoded["special_tokens_mask"] == [1] + [0] * (len(encoded["input_ids"]) - 1)
    assert 1 not in tokenizer(text, add_special_tokens=False, return_special_tokens_mask=True)["special_tokens_mask"]
    batch = tokenizer([text, "b"], return_special_tokens_mask=True)
    assert list(map(len, batch["special_tokens_mask"])) == list(map(len, batch["input_ids"]))


def test_offsets_are_those_of_the_text():
    text = "<|im_start|>user\nA red square.<|im_end|>"
    encoded = MmMambaTokenizerFast(str(GOLDEN / "tokenizer.model"))(text, return_offsets_mapping=True)
    spans = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert spans[:2] == ["", "<|im_start|>"]
    assert spans[-1] == "<|im_end|>"
    assert "".join(spans) == text


def test_the_tokenizer_can_be_pickled(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied("<img>Hello 这")["input_ids"] == tokenizer("<img>Hello 这")["input_ids"]


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer(["Hello world", "Hi"], padding=True)
    short = tokenizer("Hi")["input_ids"]
    missing = len(batch["input_ids"][0]) - len(short)
    assert batch["input_ids"][1] == [tokenizer.pad_token_id] * missing + short
    assert batch["attention_mask"][1] == [0] * missing + [1] * len(short)


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *PICTURE_TOKENS, "</s>"])
def test_a_marked_special_token_is_encoded_as_text(token, tokenizer):
    marked = f"say {token[0]}{PLAIN_TEXT_MARK}{token[1:]} now"
    pieces = sentencepiece.SentencePieceProcessor(str(GOLDEN / "tokenizer.model"))
    assert tokenizer(marked, add_special_tokens=False)["input_ids"] == pieces.encode(f"say {token} now")


def test_control_tokens_may_have_the_ids_of_reserved_pieces(reserved):
    tokenizers, ids = reserved
    for tokenizer in tokenizers:
        assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
        assert len(tokenizer) == max(ids.values()) + 1
        assert tokenizer("<|im_end|>[UNUSED_TOKEN_6]<|im_end|>", add_special_tokens=False)["input_ids"] == [
            ids["<|im_end|>"],
            *([tokenizer.convert_tokens_to_ids("▁")] if not tokenizer.is_fast else []),
            tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_6]"),
            ids["<|im_end|>"],
        ]
    # Upstream reads a reserved piece in a raw prompt as the control token, and so does SentencePiece here.
    assert ids["<|im_end|>"] in tokenizers[0]("a[UNUSED_TOKEN_1]b")["input_ids"]


@pytest.mark.parametrize(
    "typed",
    ["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_6]", "a[UNUSED_TOKEN_1] b", "[[UNUSED_TOKEN_1]]", "[UNUSED_TOKEN_99]", "b"],
)
def test_a_typed_reserved_piece_is_encoded_as_text_by_both_alike(typed, reserved):
    tokenizers, ids = reserved
    encoded = []
    for tokenizer in tokenizers:
        encoded.append(tokenizer(f"<|im_start|>{as_text(typed, tokenizer)}<|im_end|>")["input_ids"])
        inside = encoded[-1][2:-1]
        assert not set(inside) & {*ids.values(), tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_6]")}
        assert tokenizer.decode(inside) == typed
    assert encoded[0] == encoded[1]


def test_a_missing_or_damaged_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_file=None is no file; put the SentencePiece `tokenizer.model` there"):
        MmMambaTokenizer()
    with pytest.raises(ValueError, match=r"nowhere\.model"):
        MmMambaTokenizer(str(tmp_path / "nowhere.model"))
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        MmMambaTokenizer(str(tmp_path / "tokenizer.model"))
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        MmMambaTokenizerFast(str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer file"):
        MmMambaTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"put the SentencePiece `tokenizer.model` there, or a tokenizer.json"):
        MmMambaTokenizerFast()


@pytest.mark.parametrize("text", ["a\ud83d", 5, b"bytes"])
def test_what_is_no_text_is_refused_in_a_sentence(text, tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate, U.D83D, at character 1|give a string"):
        tokenizer(text)
    with pytest.raises(ValueError, match=r"lone surrogate|give a string"):
        tokenizer(["fine", text])
    with pytest.raises(ValueError, match=r"lone surrogate|give a string"):
        tokenizer("fine", text)
    for method in (tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(ValueError, match=r"lone surrogate|give a string"):
            method(text)


def test_a_prompt_with_its_beginning_token_does_not_get_another(tokenizer):
    once = tokenizer("hi")["input_ids"]
    assert tokenizer("<s>hi")["input_ids"] == tokenizer.encode("<s>hi") == once
    assert tokenizer(["<s>hi", "<s>hi"])["input_ids"] == [once, once]
    assert tokenizer("<s>hi", add_special_tokens=True)["input_ids"] == [1, *once]  # as is said
