"""Checkpoints, configs, recipes and saved conversations of every damaged kind: one sentence, nothing half-written."""

import json
import os
import signal
import struct

import pytest
import torch
import yaml
from conversations import processor_with
from golden_checkpoints import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from mmmamba.configuration_mmmamba import MmMambaConfig, MmMambaTextConfig, MmMambaVisionConfig
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import chat_template, convert, read_upstream_config
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.conversion.shards import ShardReader, listed, printable, read_json
from mmmamba.image_processing_mmmamba import MmMambaImageProcessorPil
from mmmamba.image_reading_mmmamba import read_image


NAN, INFINITE = float("nan"), float("inf")
FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def refused(function, *arguments, **options):
    """The one sentence, without control characters, with which something is refused."""
    with pytest.raises(Exception) as raised:
        function(*arguments, **options)
    error = raised.value
    if type(error).__name__.startswith("StrictDataclass"):  # in which a strict config wraps the sentence
        error = error.__cause__
    assert isinstance(error, ValueError | TypeError), repr(error)
    assert str(error).isprintable() and len(str(error)) < 1000, str(error)
    return str(error)


@pytest.fixture(autouse=True)
def nothing_hangs():
    signal.alarm(120)  # ends the process
    yield
    signal.alarm(0)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        {},
        "model.safetensors",
        ["model.safetensors"],
        {"a": None},
        {"a": ["model.safetensors"]},
        {"a": 1},
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "/{folder}/model.safetensors"},
        {"a": "x/../model.safetensors"},
        {"a": "./model.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": "model\0.safetensors"},
        {"a": "C:\\model.safetensors"},
        {"a": "pytorch_model.bin"},
        {"a": "gone.safetensors"},
        {"\x1b[31ma": "../model.safetensors"},
    ],
    ids=repr,
)
def test_an_index_names_plain_files_in_its_folder(weight_map, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (folder, tmp_path):
        save_file({"a": torch.ones(2)}, place / "model.safetensors")
    text = json.dumps({"weight_map": weight_map}).replace("{folder}", str(folder))
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(ShardReader, folder)


def safetensors_file(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


@pytest.mark.parametrize(
    "shape",
    [[2**62, 2**62], [0, 2**63], [0, 2**62, 2**62], [-1], [1.5], ["x"], 3, [[1]], [0] * 200, [2**64]],
    ids=repr,
)
def test_impossible_shapes_are_refused(shape, tmp_path):
    safetensors_file(tmp_path / "a.safetensors", {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    if shape == [0] * 200:  # many dimensions of nothing are no lie
        return
    assert "a.safetensors" in refused(ShardReader, tmp_path)


def test_control_characters_in_tensor_names_are_escaped(tmp_path):
    name = "evil\x1b[2J\u202e\n中文"
    safetensors_file(tmp_path / "a.safetensors", {name: {"dtype": "I8", "shape": [64], "data_offsets": [0, 64]}})
    assert r"evil\x1b[2J\u202e\n中文 in a.safetensors has dtype I8" in refused(ShardReader, tmp_path)
    assert listed([name, "plain"]) == r"evil\x1b[2J\u202e\n中文, plain"
    assert printable("plain text, 中文") == "plain text, 中文"


def test_pipes_in_place_of_files_do_not_hang(tmp_path):
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", "state.safetensors"):
        os.mkfifo(tmp_path / name)
    assert "no regular file" in refused(ShardReader, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "holds no *.safetensors file" in refused(ShardReader, tmp_path)
    assert "config.json is no regular file" in refused(read_json, tmp_path / "config.json")
    assert "config.json is no regular file" in refused(convert, tmp_path, tmp_path / "out")
    assert "pipe" in refused(ConversationState.load, tmp_path / "state.safetensors", tiny_model("linear"), None)


@pytest.mark.parametrize(
    "text", ["", "[1]", "null", "{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ufeff{}", '"x"']
)
def test_what_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    assert "a.json" in refused(read_json, tmp_path / "a.json")


# --- configs ---------------------------------------------------------------------------------------------------------

EPSILONS = ("rms_norm_eps", "embedding_rms_norm_eps", "ssm_norm_eps")
SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads",
    "conv_kernel", "intermediate_size", "max_position_embeddings",
)  # fmt: skip
BAD_TEXT = [
    *({name: value} for name in EPSILONS for value in (NAN, INFINITE, 0.0, -1.0)),
    *({"rope_parameters": {"rope_theta": value}} for value in (NAN, INFINITE, 0, -1, True, "x", None)),
    *({"embedding_rope_parameters": value} for value in ("x", [1], {}, {"rope_type": "default"}, {"rope_theta": NAN})),
    {"rope_parameters": {"rope_type": "unheard-of", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
    *({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": value}} for value in (NAN, 0, "x")),
    {"rope_scaling": "linear"},
    {"dtype": "float99"},
    {"torch_dtype": "float99"},
    {"dtype": "int8"},
    {"dtype": ["float32"]},
    *({name: value} for name in SIZES for value in (0, -1, 10**13, 10**400, "8", 1.5)),
    {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20},
    {"num_labels": 10**9},
    {"layer_types": 3},
    {"layer_types": [["full_attention"]]},
    {"initializer_range": NAN},
    {"attention_dropout": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("values", BAD_TEXT, ids=lambda values: repr(values)[:60])
def test_values_that_no_decoder_can_have_are_refused(values):
    name = "rope" if "rope" in str(values) else "dtype" if "dtype" in str(values) else next(iter(values))
    assert name in refused(MmMambaTextConfig, **values)


@pytest.mark.parametrize("name", ["image_size", "patch_size", "num_channels"])
@pytest.mark.parametrize("value", [0, -1, 10**9, NAN, "x"])
def test_values_that_no_patch_embedding_can_have_are_refused(name, value):
    assert name in refused(MmMambaVisionConfig, **{name: value})


UPSTREAM = {
    "rope_scaling": ["linear", ["linear"], 3, {"type": "linear", "factor": NAN}, {"type": "linear"}, {"factor": 2.0}],
    "rope_theta": [NAN, INFINITE, 0, -1.0, "x", None, [1]],
    "rms_norm_eps": [NAN, 0, -1e-5, "x", True],
    "num_hidden_layers": [-1, 10**9, 10**400, "4", 4.0, None],
    "layers_block_type": ["mha", {"a": 1}, [["mha"]], [None]],
    "hidden_size": [None, [], "64", 10**13],
    "vocab_size": ["x", None, 1.5],
    "max_position_embeddings": [-1, "x", NAN],
    "hidden_act": [None, ["silu"], "unheard-of"],
    "model_type": [None, ["internlm2"], 3],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in UPSTREAM.items() for value in values], ids=repr
)
def test_upstream_configs_with_damaged_entries_are_refused(key, value, tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    values = json.loads((source / "config.json").read_text())
    for section in ("llm_config", "embedding_config"):
        values[section][key] = value
    assert key.split("_")[0] in refused(read_upstream_config, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("template", ["internlm2-chat"]),
        ("template", "../../secret"),
        ("_name_or_path", 3),
        ("min_dynamic_patch", "1"),
        ("downsample_ratio", "half"),
        ("downsample_ratio", NAN),
        ("force_image_size", "56"),
        ("llm_config", []),
        ("embedding_config", "x"),
        ("model_type", ["internvl_chat"]),
        ("dynamic_image_size", "yes"),
    ],
)
def test_upstream_configs_of_other_types_are_refused(key, value, tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    values = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(values))
    assert key in refused(convert, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# --- recipes ---------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
RECIPES = {
    "itself": "&a a: *a",
    "a mapping in itself": "&a\ndata: *a",
    "a list in itself": "teacher: x\noutput: y\nstages: []\ndata: &a [*a]",
    "exponential": BOMB,
    "deep": "[" * 1500,
    "no date": "a: 2001-99-99",
    "unhashable key": "? [a]\n: b",
    "control characters": "a: \x01",
    "code": "a: !!python/object/apply:os.system [true]",
    "number as key": "{1: 2}",
    "merge of nothing": "<<: 3",
    "undefined": "a: *b",
    "list": "[a]",
    "nothing": "",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_recipes_of_every_damaged_kind_are_refused(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    refused(load_recipe, file)
    file.write_bytes(b"\xff\xfe\x00a")
    assert "recipe.yaml" in refused(load_recipe, file)


def test_anchors_that_repeat_a_value_are_still_read(tmp_path):
    stage = {"steps": 10, "learning_rate": 1e-3}
    values = {
        "teacher": "x",
        "output": "y",
        "data": [{"file": "a.jsonl"}],
        "stage_1": stage,
        "stage_2": stage,
        "stages": [1, 2],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.dump(values))
    assert "&id001" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml").stage_2.steps == 10


# --- saved conversations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, its tokenizer, and the tensors and description of a saved conversation with it."""
    tokenizer = processor_with(chat_template("internlm2-chat")).tokenizer
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model = tiny_model("hybrid", image_token_id=image_token, vocab_size=len(tokenizer))
    file = tmp_path_factory.mktemp("saved") / "state.safetensors"
    model.conversation(tokenizer).extend("Hello, and some more words").save(file)
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["mmmamba"])
    return model, tokenizer, load_file(file), described


def load_with(saved, file, tensors=None, described=None, text=None):
    model, tokenizer, whole, truth = saved
    metadata = json.dumps(truth | (described or {})) if text is None else text
    save_file(whole | (tensors or {}), file, {"mmmamba": metadata})
    return ConversationState.load(file, model, tokenizer)


def test_the_whole_file_is_read(saved, tmp_path):
    assert load_with(saved, tmp_path / "a.safetensors").ids == saved[2]["ids"].tolist()


@pytest.mark.parametrize(
    "described",
    [
        {name: value}
        for name, values in {
            "model": [None, [], "x", 3],
            "system_message": [3, ["x"], {}, True, "\ud800"],
            "last_token": [None, 3, "", "<no token>", ["x"], "\udfff"],
            "pending": [None, 3, [], True, "a\ud83d"],
            "in_turn": [None, 1, "yes"],
            "turns": [None, -1, 1.5, True, "2", NAN],
            "format": [None, 3, ["mmmamba-conversation-2"], "mmmamba-conversation-1"],
        }.items()
        for value in values
    ],
    ids=repr,
)
def test_metadata_of_wrong_types_are_refused(described, saved, tmp_path):
    assert "a.safetensors" in refused(load_with, saved, tmp_path / "a.safetensors", described=described)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, '{"format": "mmmamba-conversation-2"}'])
def test_metadata_that_are_no_description_are_refused(text, saved, tmp_path):
    assert "a.safetensors" in refused(load_with, saved, tmp_path / "a.safetensors", text=text)


def test_tensors_that_no_conversation_has_are_refused(saved, tmp_path):
    model, _, whole, _ = saved
    ids, vocab_size = whole["ids"], model.config.text_config.vocab_size
    state = next(name for name in whole if name.endswith("recurrent_state"))
    keys = next(name for name in whole if name.endswith("keys"))
    damaged = {
        "above the vocabulary": {"ids": torch.cat([ids[1:], ids.new_tensor([vocab_size])])},
        "below it": {"ids": torch.cat([ids[1:], ids.new_tensor([-1])])},
        "no integers": {"ids": ids.float()},
        "a table": {"ids": ids[:, None].contiguous()},
        "one number": {"ids": ids[0].clone()},
        "integers": {state: whole[state].int()},
        "another shape": {state: whole[state][..., :-1].contiguous()},
        "too many": {"another": torch.ones(1)},
    }
    for name in (state, keys):
        for value in (NAN, INFINITE, -INFINITE):
            tensor = whole[name].clone()
            tensor.view(-1)[-1] = value
            damaged[f"{name} {value}"] = {name: tensor}
    for case, tensors in damaged.items():
        assert "a.safetensors" in refused(load_with, saved, tmp_path / "a.safetensors", tensors=tensors), case


# --- calls -----------------------------------------------------------------------------------------------------------


def test_calls_with_what_is_no_text_no_history_or_no_count_are_refused(saved):
    model, tokenizer, _, _ = saved
    options, tiles = {"max_new_tokens": 2, "do_sample": False}, torch.zeros(1, 3, 16, 16)
    state = model.conversation(tokenizer)

    def chat(question="a", pixel_values=None, **more):
        model.chat(tokenizer, pixel_values, question, options, **more)

    def batch(questions, pixel_values=None, **more):
        model.batch_chat(tokenizer, pixel_values, questions, options, **more)

    for call, arguments, more in (
        *((chat, (question,), {}) for question in (None, 5, b"a", ["a"], "a\ud800", "\udfff")),
        *(
            (chat, (), {"history": value})
            for value in ("ab", 3, [("a",)], [("a", None)], [("a", 3)], [3], [("\ud800", "b")])
        ),
        *((chat, (), {"system_message": value}) for value in (3, ["a"], "\ud800")),
        *((chat, ("a", tiles), {"num_patches_list": value}) for value in ([-1, 2], [0, 1], [1.0], [True], ["1"])),
        *((batch, (value,), {}) for value in ("ab", None, 3, ["a", None], ["a", "\ud800"])),
        (batch, (["a", "b"], tiles), {"num_patches_list": [-1, 2]}),
        (batch, (["a"],), {"history": [[("a", 3)]]}),
        *((state.extend, (value,), {}) for value in (5, "\ud800", ["a"])),
        (state.extend, ("a", tiles, [-1, 2]), {}),
        *((state.ask, (value, options), {}) for value in (None, 5, "\ud800")),
        *((state.add_turn, value, {}) for value in (("a", None), (None, "a"), ("a", "\ud800"))),
        (model.conversation, (tokenizer, 3), {}),
    ):
        assert refused(call, *arguments, **more)
    assert (state.ids, state.pending, state.turns) == ([], "", 0)
    chat("a null byte \0 is text", system_message="\0")


# --- anything --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def answered_or_refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else error
        assert isinstance(cause, ValueError | TypeError), repr(error)
        assert "\n" not in str(cause), str(cause)


@FEW
@given(
    content=st.binary(max_size=200),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM", b"DDS ", b"8BPS"]),
)
def test_any_bytes_are_a_picture_or_refused(content, head, tmp_path):
    (tmp_path / "a.png").write_bytes(head + content)
    answered_or_refused(read_image, tmp_path / "a.png")
    answered_or_refused(MmMambaImageProcessorPil(size=16), str(tmp_path / "a.png"))


@FEW
@given(content=st.binary(max_size=200))
def test_any_bytes_in_place_of_a_file_are_refused(content, saved, tmp_path):
    for name in ("config.json", "a.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
    answered_or_refused(read_json, tmp_path / "config.json")
    answered_or_refused(load_recipe, tmp_path / "a.yaml")
    answered_or_refused(ShardReader, tmp_path)
    answered_or_refused(ConversationState.load, tmp_path / "model.safetensors", saved[0], saved[1])


@FEW
@given(data=st.data())
def test_any_value_in_any_place_of_a_config_is_taken_or_refused(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    values = json.loads((checkpoint(folder / "src", "hovle_tiny") / "config.json").read_text())
    target = data.draw(st.sampled_from([values, values["llm_config"], values["embedding_config"]]))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    answered_or_refused(read_upstream_config, values)
    ours = json.loads(json.dumps(tiny_model("hybrid").config.to_dict()))
    target = data.draw(st.sampled_from([ours["text_config"], ours["vision_config"]]))
    names = sorted(set(target) & {*MmMambaTextConfig.__annotations__, *MmMambaVisionConfig.__annotations__})
    target[data.draw(st.sampled_from(names))] = data.draw(JSON)
    answered_or_refused(MmMambaConfig.from_dict, ours)


@FEW
@given(
    text=st.from_type(str) | JSON.map(json.dumps),
    name=st.sampled_from(["last_token", "pending", "turns", "model"]),
    value=JSON,
)
def test_any_metadata_is_a_conversation_or_refused(text, name, value, saved, tmp_path):
    try:
        answered_or_refused(load_with, saved, tmp_path / "a.safetensors", text=text)
    except UnicodeEncodeError:  # safetensors takes no lone surrogates
        pass
    answered_or_refused(load_with, saved, tmp_path / "a.safetensors", described={name: value})
