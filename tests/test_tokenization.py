"""Ids and text equal upstream's; marked control tokens are text; folders save and load."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mmmamba.tokenization_mmmamba import CONTROL_TOKENS, PICTURE_TOKENS, PLAIN_TEXT_MARK, MmMambaTokenizer


ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
TRUTH = json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return MmMambaTokenizer(str(GOLDEN / "tokenizer.model"))


@pytest.fixture(scope="module")
def reserved(tmp_path_factory):
    """A tokenizer and ids of its special tokens: as InternLM2's, control tokens have the ids of reserved pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["user\nWhat is this?", "assistant\nA red square."] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(len(CONTROL_TOKENS))],
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
    return MmMambaTokenizer.from_pretrained(folder), ids


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


def test_a_folder_loads_with_autotokenizer_and_again_after_saving(tokenizer, tmp_path):
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    config = {"auto_map": {"AutoTokenizer": ["tokenization_mmmamba.MmMambaTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "tokenization_mmmamba.py", tmp_path)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>Was ist das? 这是什么<|im_end|>"
    first = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True, use_fast=False)
    first.save_pretrained(tmp_path / "again")
    shutil.copy(ROOT / "config.json", tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for loaded in (first, again):
        assert type(loaded).__name__ == "MmMambaTokenizer"
        assert type(loaded) is not MmMambaTokenizer  # the folder's own code
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.get_vocab() == tokenizer.get_vocab()


def test_options_are_saved_and_loaded(tmp_path):
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    MmMambaTokenizer(str(GOLDEN / "tokenizer.model"), **options).save_pretrained(tmp_path)
    again = MmMambaTokenizer.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in options} == options
    ids = again("Hello")["input_ids"]
    assert ids[0] != again.bos_token_id
    assert ids[-1] == again.eos_token_id


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
    assert tokenizer(marked, add_special_tokens=False)["input_ids"] == tokenizer.sp_model.encode(f"say {token} now")


def test_control_tokens_may_have_the_ids_of_reserved_pieces(reserved):
    tokenizer, ids = reserved
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
    assert len(tokenizer) == max(ids.values()) + 1
    # Upstream reads a reserved piece in a raw prompt as the control token, and so does this.
    assert ids["<|im_end|>"] in tokenizer("a[UNUSED_TOKEN_1]b")["input_ids"]


@pytest.mark.parametrize(
    "typed", ["[?UNUSED_TOKEN_1]", "[UNUSED?_TOKEN_1]", "a[UNUSED_TOKEN_1?] b", "[[?UNUSED_TOKEN_1]]"]
)
def test_a_marked_reserved_piece_is_encoded_as_text(typed, reserved):
    tokenizer, ids = reserved
    text = f"[UNUSED_TOKEN_0]{typed} [UNUSED_TOKEN_99][UNUSED_TOKEN_0]".replace("?", PLAIN_TEXT_MARK)
    encoded = tokenizer(text)["input_ids"]
    assert ids["<|im_end|>"] not in encoded
    assert encoded.count(ids["<|im_start|>"]) == 2
    spelled = tokenizer.decode([i for i in encoded if i != ids["<|im_start|>"]], skip_special_tokens=True)
    assert spelled == f"{typed.replace('?', '')} [UNUSED_TOKEN_99]"


def test_a_missing_or_damaged_model_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_file=None is no file; put the SentencePiece `tokenizer.model` there"):
        MmMambaTokenizer()
    with pytest.raises(ValueError, match=r"nowhere\.model"):
        MmMambaTokenizer(str(tmp_path / "nowhere.model"))
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is no SentencePiece model"):
        MmMambaTokenizer(str(tmp_path / "tokenizer.model"))
