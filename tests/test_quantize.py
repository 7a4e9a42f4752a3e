"""Models whose weights take 4 and 8 bits: loading, saving, the command that makes them, and what is refused."""

import copy
import errno
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from language_models import write_source
from model_folders import SHAPES, modules_cache, self_contained_copy
from safetensors.torch import load_file, save_file
from test_cli import failed
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from mmmamba.cli import serve
from mmmamba.cli.load import load_model
from mmmamba.cli.main import main
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import convert
from mmmamba.conversion.push import files_to_upload
from mmmamba.conversion.quantize import quantize_folder
from mmmamba.conversion.shards import ShardReader, ShardWriter, read_json, write_json
from mmmamba.examples.shapes.evaluate import answers, evaluate
from mmmamba.examples.shapes.folder import make_processor
from mmmamba.examples.shapes.world import KINDS, example
from mmmamba.fingerprint_mmmamba import weights_checksum
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.quantization_mmmamba import (
    MmMambaQuantizationConfig,
    QuantizedLinear,
    dequantize_weight,
    quantize_weight,
)
from mmmamba.tokenization_mmmamba import load_tokenizer


OPTIONS = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "<image>\nHow many objects are there?"
# Loads a folder where neither the package nor Accelerate can be imported, and says what it computes.
IN_A_FRESH_PROCESS = """
import json, sys
for name in ("accelerate", "mmmamba"):
    sys.modules[name] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.arange(3, 43)[None]).logits
print(json.dumps([type(model.lm_head).__name__, logits[0, -1].tolist()]))
"""

every_width = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture
def quietly(monkeypatch):
    """The command without its progress bar, which stands before an error's line."""
    monkeypatch.setattr("mmmamba.cli.quantize.quantize_folder", lambda *given, progress: quantize_folder(*given))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped hybrid in 4 and in 8 bits."""
    parent = tmp_path_factory.mktemp("quantised")
    for bits in (4, 8):
        quantize_folder(SHAPES / "hybrid", parent / str(bits), bits)
    return {bits: parent / str(bits) for bits in (4, 8)}


def loaded(folder, **options):
    return MmMambaForConditionalGeneration.from_pretrained(folder, **options).eval()


def same_tensors(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def tiles(count):
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(0))


# --- models and folders ----------------------------------------------------------------------------------------------


@every_width
def test_every_linear_layer_of_decoder_and_head_is_quantised_and_nothing_else(folders, bits):
    plain, model = loaded(SHAPES / "hybrid"), loaded(folders[bits])
    expected = {
        name
        for name, module in plain.named_modules()
        if type(module) is nn.Linear and not name.startswith("model.vision_embeddings")
    }
    found = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert found == expected and "lm_head" in found and len(found) == 35
    before, after = plain.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.removesuffix(".weight") in found:
            assert after[name].dtype == torch.uint8
        else:
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype


@every_width
@pytest.mark.parametrize("kind", ["teacher", "linear", "hybrid"])
def test_quantising_while_loading_gives_the_commands_weights_bit_for_bit(tmp_path, kind, bits):
    quantize_folder(SHAPES / kind, tmp_path / "quantised", bits)
    while_loading = loaded(SHAPES / kind, quantization_config=MmMambaQuantizationConfig(bits=bits))
    same_tensors(while_loading.state_dict(), loaded(tmp_path / "quantised").state_dict())
    same_tensors(while_loading.state_dict(), load_file(tmp_path / "quantised" / "model.safetensors"))
    assert while_loading.config.quantization_config.bits == bits


def test_weights_that_are_offloaded_are_refused_while_loading(tmp_path, folders):
    pytest.importorskip("accelerate")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=r"these are offloaded by Accelerate; load .* device_map=\{'': 'cpu'\}, or a"):
        loaded(SHAPES / "hybrid", quantization_config=MmMambaQuantizationConfig(bits=4), **options)
    model = loaded(SHAPES / "hybrid")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="and these are cpu and offloaded by Accelerate; load the model"):
        model.quantize_weights(MmMambaQuantizationConfig(bits=4))
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = loaded(folders[4])(tokens).logits
        torch.testing.assert_close(loaded(folders[4], **options)(tokens).logits, expected)


@every_width
def test_quantised_models_are_saved_and_loaded_again(tmp_path, folders, bits):
    model = loaded(folders[bits])
    model.chat(make_processor().tokenizer, tiles(2), QUESTION, OPTIONS)
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = loaded(tmp_path / "saved")
    same_tensors(again.state_dict(), model.state_dict())
    assert again.dtype == model.dtype == torch.bfloat16
    stored = read_json(tmp_path / "saved" / "config.json")["quantization_config"]
    assert stored == read_json(folders[bits] / "config.json")["quantization_config"]
    assert stored == {
        "quant_method": "mmmamba",
        "bits": bits,
        "group_size": 32,
        "format_version": 1,
        "modules_to_not_convert": None,
    }


def test_other_weights_are_cast_while_loading(folders):
    model = loaded(folders[4], dtype=torch.float32)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32, torch.uint8}
    assert model.dtype == torch.float32 and model.model.layers[1].mamba.A_log.dtype == torch.float32


@every_width
def test_a_fresh_process_needs_neither_the_package_nor_accelerate(tmp_path, folders, bits):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, folders[bits]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    name, logits = json.loads(done.stdout)
    assert name == "QuantizedLinear"
    with torch.no_grad():
        expected = loaded(folders[bits], dtype=torch.float32)(torch.arange(3, 43)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-3, atol=1e-3)


def test_copies_of_the_code_in_one_process_keep_to_their_own_layers(tmp_path, folders):
    plain = self_contained_copy("hybrid", tmp_path / "plain")
    with modules_cache(tmp_path / "modules"):
        for folder, options in (
            (folders[4], {}),
            (plain, {"quantization_config": MmMambaQuantizationConfig(bits=4)}),
        ):
            model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
            assert type(model).__module__.startswith("transformers_modules.")
            module = type(model).__module__.rpartition(".")[0] + ".quantization_mmmamba"
            assert type(model.lm_head).__module__ == module
            same_tensors(model.state_dict(), loaded(folders[4]).state_dict())


def tied_folder(parent):
    """A language model whose head is its embedding, 330 rows of 64."""
    write_source(parent / "source", hidden_size=64, tie_word_embeddings=True)
    convert(parent / "source", parent / "tied")
    return parent / "tied"


@every_width
def test_a_tied_head_becomes_a_quantised_copy_of_the_embedding(tmp_path, bits):
    source = tied_folder(tmp_path)
    plain = loaded(source)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    quantize_folder(source, tmp_path / "quantised", bits)
    model = loaded(tmp_path / "quantised")
    while_loading = loaded(source, quantization_config=MmMambaQuantizationConfig(bits=bits))
    while_loading.save_pretrained(tmp_path / "saved")
    for made in (model, while_loading, loaded(tmp_path / "saved")):
        embedding = plain.model.embed_tokens.weight.detach()
        assert torch.equal(made.model.embed_tokens.weight, embedding)
        assert torch.equal(made.lm_head.weight, quantize_weight(embedding, bits))
        assert not made.config.tie_word_embeddings and not made.config.text_config.tie_word_embeddings
        same_tensors(made.state_dict(), model.state_dict())
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    # The MLP's second layer has 48 inputs and stays as it is.
    assert "model.layers.0.mlp.up_proj" in layers and "model.layers.0.mlp.down_proj" not in layers


def test_layers_can_be_left_alone(tmp_path):
    kept = ["lm_head", "layers.1", "model.layers.0.mlp.down_proj"]
    config = MmMambaQuantizationConfig(bits=8, modules_to_not_convert=kept)
    model = loaded(tied_folder(tmp_path), quantization_config=config)
    layers = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert layers and not any(name.startswith("model.layers.1.") or name in kept for name in layers)
    assert any(name.startswith("model.layers.0.") for name in layers)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    same_tensors(again.state_dict(), model.state_dict())


def test_a_model_is_dequantised_again(folders):
    model = loaded(folders[4], dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(ids).logits
        weight = dequantize_weight(model.lm_head.weight, 4, 655, torch.float32)
        plain = model.dequantize()
        assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
        assert torch.equal(plain.lm_head.weight, weight)
        assert (plain(ids).logits - expected).norm() < 0.05 * expected.norm()
    assert getattr(plain.config, "quantization_config", None) is None


def test_a_quantised_head_is_not_resized(folders):
    model = loaded(folders[4])
    with pytest.raises(ValueError, match="keeps its 655 rows, so there cannot be 700 tokens"):
        model.resize_token_embeddings(700)
    assert model.get_input_embeddings().num_embeddings == 655
    assert model.resize_token_embeddings(655) is model.get_input_embeddings()
    assert loaded(SHAPES / "hybrid").resize_token_embeddings(700).num_embeddings == 700


@pytest.mark.parametrize("kind", ["teacher", "linear", "hybrid"])
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_weights_in_fp64(kind):
    """Every layer at once, a prompt and a step: in fp64 no kernel rounds."""
    model = tiny_model(kind, intermediate_size=64)
    ids = token_ids(20, "tile", 5, seed=0)[None]
    pictures = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    reference = copy.deepcopy(model)
    model.quantize_weights(MmMambaQuantizationConfig(bits=4))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dequantize_weight(module.weight, 4, module.out_features, torch.float64)
            reference.get_submodule(name).weight.data = weight
    torch.testing.assert_close(model(ids, pictures).logits, reference(ids, pictures).logits)
    options = {"pixel_values": pictures, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_answers_are_those_of_the_unquantised_model(kernels, folders, bits, dtype):
    examples = [example("test", 0, index) for index in range(2 * len(KINDS))]
    expected, found = (answers(loaded(x, dtype=dtype), examples) for x in (SHAPES / "hybrid", folders[bits]))
    assert sum(a == b for a, b in zip(expected, found, strict=True)) >= len(examples) - 1


def test_conversations_are_saved_and_go_on(tmp_path, folders):
    tokenizer, question = make_processor().tokenizer, QUESTION.removeprefix("<image>\n")
    model = loaded(folders[4])
    state = model.conversation(tokenizer).extend("<image>\n", tiles(2))
    state.save(tmp_path / "state.safetensors")
    answers = [state.ask(question, OPTIONS), state.ask("Why?", OPTIONS)]
    fresh = loaded(folders[4])
    again = ConversationState.load(tmp_path / "state.safetensors", fresh, tokenizer)
    assert [again.ask(question, OPTIONS), again.ask("Why?", OPTIONS)] == answers
    assert weights_checksum(fresh) == weights_checksum(model) != weights_checksum(loaded(folders[8]))


# --- the command -----------------------------------------------------------------------------------------------------


@every_width
def test_the_command_makes_a_folder_for_every_other_command(tmp_path, capsys, monkeypatch, bits):
    folder = tmp_path / "small"
    assert main(["quantize", str(SHAPES / "hybrid"), str(folder), "--bits", str(bits)]) == 0
    before, after = (
        sum(x.nbytes for x in load_file(parent / "model.safetensors").values())
        for parent in (SHAPES / "hybrid", folder)
    )
    said = capsys.readouterr().out
    assert f"35 layers have {bits} bits; {before:,} bytes of weights are now {after:,}" in said
    assert after < before * {4: 0.42, 8: 0.63}[bits]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"35 linear layers, those of the decoder and its output head, were rounded to {bits} bits" in card
    assert f"mmmamba quantize hybrid small --bits {bits}" in card and "license: mit" in card
    picture = str(SHAPES / "picture.png")
    assert main(["chat", "--model", str(folder), "--device=cpu", "--image", picture, QUESTION]) == 0
    assert capsys.readouterr().out.strip() == "six"
    assert evaluate(folder, len(KINDS))["total"]["exact"] == 1
    assert "model.safetensors" in files_to_upload(folder)

    started = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)  # vLLM is installed, it seems
    monkeypatch.setattr(serve, "_serve_with_transformers", lambda args, *rest: started.append(args.model))
    assert main(["serve", str(folder), "--port=0"]) == 0 and started == [folder]


@pytest.mark.parametrize(
    "argv, words",
    {
        "vLLM": (["serve", "QUANTISED", "--engine", "vllm"], ["which vLLM cannot read", "--engine transformers"]),
        "twice": (["quantize", "QUANTISED", "NEW", "--bits", "4"], ["is quantised (quant_method='mmmamba')"]),
        "seed": (["seed", "QUANTISED", "NEW", "--linear"], ["is quantised", "weights in floating point"]),
        "distill": (["distill", "shapes-linear", "teacher=QUANTISED", "output=NEW"], ["QUANTISED is quantised"]),
        "exists": (["quantize", "PLAIN", "QUANTISED", "--bits", "4"], ["exists"]),
        "no bits": (["quantize", "PLAIN", "NEW"], ["--bits"]),
        "3 bits": (["quantize", "PLAIN", "NEW", "--bits", "3"], ["invalid choice: 3"]),
        "no folder": (["quantize", "NOTHING", "NEW", "--bits", "4"], ["NOTHING is no model folder"]),
        "bitsandbytes": (["quantize", "FOREIGN", "NEW", "--bits", "4"], ["(quant_method='bitsandbytes')"]),
        "narrow": (["quantize", "NARROW", "NEW", "--bits", "4"], ["No layer of this model", "hidden_size is 24"]),
        "NaN": (["quantize", "NAN", "NEW", "--bits", "4"], ["model.layers.0.mlp.up_proj.weight: ", "NaN"]),
        "infinite norm": (["quantize", "INFINITE", "NEW", "--bits", "4"], ["infinite values in model.norm.weight"]),
        "missing": (["quantize", "MISSING", "NEW", "--bits", "4"], ["missing: model.norm.weight"]),
    }.values(),
)
def test_what_cannot_be_quantised_or_used_is_refused_in_a_sentence(tmp_path, folders, capsys, quietly, argv, words):
    def changed(name, source=SHAPES / "hybrid", values=(), **tensors):
        self_contained_copy("hybrid", tmp_path / name)
        write_json(tmp_path / name / "config.json", read_json(source / "config.json") | dict(values))
        weights = load_file(source / "model.safetensors") | tensors
        save_file({k: v for k, v in weights.items() if v is not None}, tmp_path / name / "model.safetensors")

    if "FOREIGN" in argv:
        changed("FOREIGN", values={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    if "NAN" in argv:
        changed("NAN", **{"model.layers.0.mlp.up_proj.weight": torch.full((320, 128), torch.nan)})
    if "INFINITE" in argv:
        changed("INFINITE", **{"model.norm.weight": torch.full((128,), torch.inf)})
    if "MISSING" in argv:
        changed("MISSING", **{"model.norm.weight": None})
    if "NARROW" in argv:
        write_source(tmp_path / "source", hidden_size=24)
        convert(tmp_path / "source", tmp_path / "NARROW")
    names = {"QUANTISED": folders[4], "PLAIN": SHAPES / "hybrid"}
    there = sorted(tmp_path.iterdir())

    def named(text):
        for word in ("QUANTISED", "PLAIN", "NEW", "NOTHING", "FOREIGN", "NAN", "INFINITE", "MISSING", "NARROW"):
            text = text.replace(word, str(names.get(word, tmp_path / word)))
        return text

    capsys.readouterr()
    code, message = failed(capsys, *map(named, argv))
    assert code in (1, 2) and all(named(word) in message for word in words), message
    assert sorted(tmp_path.iterdir()) == there


def test_the_card_names_folders_that_are_given_as_a_dot(tmp_path, monkeypatch):
    self_contained_copy("hybrid", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    quantize_folder(".", "../small", 4)
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert "mmmamba quantize mine small --bits 4" in card and "Quantised from mine: " in card
    assert "all other parameters keep their dtype" in card


def test_a_full_disk_leaves_nothing_behind(tmp_path, capsys, monkeypatch, quietly):
    write = ShardWriter.write

    def full(self, name, tensor):
        if len(self._unwritten) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", full)
    code, message = failed(capsys, "quantize", SHAPES / "hybrid", tmp_path / "new", "--bits", "4")
    assert code == 1 and "No space left on device" in message and not list(tmp_path.iterdir())


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    read, alive, most = ShardReader.__getitem__, [], []

    def counted(self, name):
        most.append(sum(one() is not None for one in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ShardReader, "__getitem__", counted)
    quantize_folder(SHAPES / "hybrid", tmp_path / "new", 4)
    assert len(alive) == 76 and max(most) <= 1  # the one before, until the next has taken its name


def test_shards_keep_to_their_size(tmp_path):
    quantize_folder(SHAPES / "hybrid", tmp_path / "new", 4, max_shard_size="200KB")
    sizes = [file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors")]
    assert len(sizes) >= 6 and max(sizes) < 210_000
    quantize_folder(SHAPES / "hybrid", tmp_path / "one", 4)
    same_tensors(loaded(tmp_path / "new").state_dict(), loaded(tmp_path / "one").state_dict())


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, sentence",
    {
        "bits": ({"bits": 3}, "bits=3 is no number of bits"),
        "a bool": ({"bits": True}, "bits=True is no number of bits"),
        "text": ({"bits": "4"}, "bits='4' is no number of bits"),
        "groups": ({"bits": 4, "group_size": 64}, "group_size=64 is not supported; give 32"),
        "a later format": ({"bits": 4, "format_version": 2}, "have format_version=2, and this code reads 1"),
        "a name": ({"bits": 4, "modules_to_not_convert": "lm_head"}, "'lm_head' is no list of names of layers"),
        "a method": ({"bits": 4, "quant_method": "gptq"}, "quant_method='gptq' is not this package's"),
    }.values(),
)
def test_configurations_refuse_what_is_unknown(tmp_path, folders, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        MmMambaQuantizationConfig(**values)
    if "quant_method" not in values:
        config = read_json(folders[4] / "config.json")
        config["quantization_config"] |= values
        write_json(tmp_path / "config.json", config)
        (tmp_path / "model.safetensors").symlink_to(folders[4] / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            loaded(tmp_path)
        with pytest.raises(ValueError, match=sentence):
            load_model(tmp_path, "cpu")


def test_weights_of_other_bits_than_the_configuration_says_are_refused(tmp_path, folders):
    config = read_json(folders[4] / "config.json")
    config["quantization_config"]["bits"] = 8
    write_json(tmp_path / "config.json", config)
    (tmp_path / "model.safetensors").symlink_to(folders[4] / "model.safetensors")
    # Transformers 5.24 refuses weights of other shapes, 5.17 leaves it to the quantiser.
    with pytest.raises((RuntimeError, ValueError), match=r"`ignore_mismatched_sizes`|do not belong to config\.json"):
        loaded(tmp_path)
    model = loaded(folders[8])
    model.lm_head.weight.data = model.lm_head.weight[..., :288].contiguous()
    with pytest.raises(
        ValueError, match=r"^lm_head.weight is torch.uint8 \(41, 4, 288\) where uint8 \(41, 4, 544\) is"
    ):
        model.check_quantized_weights()


def test_models_of_others_are_refused(tmp_path):
    write_source(tmp_path, with_tokenizer=False)
    with pytest.raises(ValueError, match="is for models of mmMamba, and this is a LlamaForCausalLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MmMambaQuantizationConfig(bits=4))


def test_a_model_that_reads_text_only_chats(tmp_path, capsys):
    write_source(tmp_path / "source", hidden_size=128, intermediate_size=192, vocab_size=352)
    convert(tmp_path / "source", tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "small", 8)
    model, tokenizer = load_model(tmp_path / "small", "cpu"), load_tokenizer(tmp_path / "small")
    assert isinstance(model.chat(tokenizer, None, "What is it?", OPTIONS), str)
    assert MmMambaConfig.from_pretrained(tmp_path / "small").quantization_config["bits"] == 8
    assert main(["chat", "--model", str(tmp_path / "small"), "--device", "cpu", "--max-new-tokens=2", "What?"]) == 0
