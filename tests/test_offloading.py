"""Wherever the weights are kept until they are needed, the answers are the same."""

import accelerate
import pytest
import torch
from conversations import processor_with
from tiny_models import LAYER_TYPES, tiny_config, tiny_model

from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import chat_template
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


OPTIONS = {"max_new_tokens": 4, "do_sample": False}
MODULES = {
    "embeddings": "model.embed_tokens",
    "vision": "model.vision_embeddings",
    "patch embedding": "model.vision_embeddings.patch_embedding",
    "Mamba-2 layer": "model.layers.0",
    "Mamba-2 mixer": "model.layers.0.mamba",
    "input projection": "model.layers.0.mamba.in_proj",
    "convolution": "model.layers.0.mamba.conv1d",
    "gated norm": "model.layers.0.mamba.norm",
    "attention layer": "model.layers.1",
    "attention": "model.layers.1.self_attn",
    "norm of a layer": "model.layers.1.input_layernorm",
    "last norm": "model.norm",
    "head": "lm_head",
    "everything": "",
}


@pytest.fixture(scope="module")
def tokenizer():
    return processor_with(chat_template("internlm2-chat")).tokenizer


@pytest.fixture(scope="module")
def plain(tokenizer):
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return tiny_model("hybrid", image_token_id=image_token, vocab_size=len(tokenizer)).float()


@pytest.fixture(scope="module")
def state_file(plain, tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("state") / "state.safetensors"
    plain.conversation(tokenizer).extend("What is this? <image>", tiles(1)).save(file)
    return file


@pytest.fixture(scope="module")
def expected(plain, tokenizer, state_file):
    return conversations(plain, tokenizer, state_file)


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    plain.save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder, tmp_path):
    def load(**options):
        return MmMambaForConditionalGeneration.from_pretrained(folder, offload_folder=tmp_path / "offload", **options)

    return load


def tiles(count):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conversations(model, tokenizer, state_file):
    """Answers about pictures and without, in turn, in a batch, by beams, and in a conversation begun elsewhere."""
    answer, history = model.chat(tokenizer, tiles(2), "What is this?", OPTIONS, return_history=True)
    later = model.chat(tokenizer, tiles(2), "Why?", OPTIONS, history, num_patches_list=[2])
    batch = model.batch_chat(tokenizer, tiles(1), ["<image>\nA", "B?"], OPTIONS, num_patches_list=[1, 0])
    beams = model.chat(tokenizer, None, "Hello", OPTIONS | {"num_beams": 2})
    state = ConversationState.load(state_file, model, tokenizer)
    return [answer, later, *batch, beams, state.ask("Why?", OPTIONS)]


def whole_map(root, module, place):
    """A device map with `module` at `place` and the rest on the CPU; every weight has one name in it."""
    if not module:
        return {"": place}
    places = {}

    def visit(name, current):
        if name == module or not (module + ".").startswith(name + "." if name else ""):
            places[name] = place if name == module else "cpu"
            return
        prefix = name + "." if name else ""
        places.update({prefix + own: "cpu" for own, _ in current.named_parameters(recurse=False)})
        for child, inner in current.named_children():
            visit(prefix + child, inner)

    visit("", root)
    return places


def offloaded(model):
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("module", list(MODULES.values()), ids=list(MODULES))
def test_any_module_may_be_on_the_disk(plain, load, tokenizer, state_file, expected, module):
    model = load(device_map=whole_map(plain, module, "disk"))
    inside = f"{module}." if module else ""
    assert offloaded(model) == [name for name, _ in plain.named_parameters() if name.startswith(inside)]
    assert conversations(model, tokenizer, state_file) == expected


@pytest.mark.parametrize(("device_map", "max_memory"), [("auto", None), ("auto", {"cpu": 60_000}), ("cpu", None)])
def test_maps_that_transformers_makes(load, tokenizer, state_file, expected, device_map, max_memory):
    model = load(device_map=device_map, max_memory=max_memory)
    assert bool(offloaded(model)) == (max_memory is not None)
    assert conversations(model, tokenizer, state_file) == expected


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_models_that_accelerate_offloads(plain, load, tmp_path, tokenizer, state_file, expected, offload):
    model = load()
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif offload == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        places = whole_map(plain, "model.layers.0", "disk") | {"lm_head": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert {"model.layers.0.mamba.A_log", "lm_head.weight"} <= set(offloaded(model))
    assert conversations(model, tokenizer, state_file) == expected


@pytest.mark.parametrize("kind", list(LAYER_TYPES))
def test_tied_embeddings_may_be_on_the_disk(tmp_path, kind):
    config = tiny_config(kind)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = MmMambaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    places = whole_map(model, "model.embed_tokens", "disk") | {"lm_head": "disk"}
    again = MmMambaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    row = {"input_ids": torch.arange(3, 20)[None], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(**row), model.generate(**row))
