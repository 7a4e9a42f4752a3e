"""Quantised by Transformers' tools a model chats, is saved, loaded and evaluated like any other."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from language_models import write_source
from model_folders import SHAPES
from safetensors.torch import load_file
from torch import nn

from mmmamba.benchmarks import arguments
from mmmamba.benchmarks.quantization import TOOLS, Tool, load_with_quanto, save_with_quanto
from mmmamba.cli.load import load_model
from mmmamba.cli.main import main
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import convert
from mmmamba.conversion.seeding import seed_folder
from mmmamba.examples.shapes.evaluate import answers, evaluate
from mmmamba.examples.shapes.folder import make_processor
from mmmamba.examples.shapes.world import KINDS, example
from mmmamba.fingerprint_mmmamba import weights_checksum
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


MODULES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimum-quanto": "optimum.quanto"}
# Those of others; "torchao int4" needs another package.
NAMES = [name for name, tool in TOOLS.items() if tool.package in MODULES and name != "torchao int4"]
EXAMPLES = [example("test", 0, index) for index in range(2 * len(KINDS))]
OPTIONS = {"max_new_tokens": 8, "do_sample": False}
QUESTION = "<image>\nHow many objects are there?"
NO_PACKING = "bitsandbytes.nn.modules.has_avx512bf16"


def installed(module):
    return find_spec(module.split(".")[0]) is not None and find_spec(module) is not None


def needs(package):
    reason = f"{package} is not installed: pip install -e '.[quantization]'"
    return pytest.mark.skipif(not installed(MODULES[package]), reason=reason)


def tools(*names):
    return [pytest.param(TOOLS[name], id=name, marks=needs(TOOLS[name].package)) for name in names]


every_tool = pytest.mark.parametrize("tool", tools(*NAMES))
saved_by_transformers = pytest.mark.parametrize("tool", tools(*(n for n in NAMES if not n.startswith("quanto"))))


@pytest.fixture(autouse=True)
def four_bit_layers_are_not_packed(monkeypatch):
    """On CPUs with AVX-512 and bf16 bitsandbytes refuses most Mamba-2 layers, see docs/quantization.md."""
    if installed("bitsandbytes"):
        monkeypatch.setattr(NO_PACKING, lambda: False)


def quantised(tool, dtype=torch.float32, kind="hybrid"):
    return MmMambaForConditionalGeneration.from_pretrained(
        SHAPES / kind, dtype=dtype, quantization_config=tool.config(), device_map={"": "cpu"}
    ).eval()


def tiles(count):
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def with_processor(folder):
    """Beside a saved model, the files that chatting with it needs."""
    for file in (SHAPES / "hybrid").iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@every_tool
def test_every_linear_layer_but_the_head_is_quantised_and_nothing_else(tool):
    plain = MmMambaForConditionalGeneration.from_pretrained(SHAPES / "hybrid", dtype=torch.float32)
    expected = {name for name, module in plain.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    model = quantised(tool)
    changed = {
        name
        for name, module in model.named_modules()
        if any(type(parameter) is not nn.Parameter for parameter in module.parameters(recurse=False))
    }
    assert changed == expected and len(expected) == 36


@every_tool
def test_answers_are_those_of_the_unquantised_model(tool):
    plain = MmMambaForConditionalGeneration.from_pretrained(SHAPES / "hybrid", dtype=torch.float32).eval()
    assert answers(quantised(tool), EXAMPLES) == answers(plain, EXAMPLES)


@saved_by_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_after_answering_and_loaded_again_nothing_has_changed(tmp_path, tool, dtype):
    model, tokenizer = quantised(tool, dtype), make_processor().tokenizer
    model.save_pretrained(tmp_path / "before")
    expected = model.chat(tokenizer, tiles(2), QUESTION, OPTIONS)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # bitsandbytes casts biases to the dtype that it computes in
        assert torch.equal(tensor.to(after[name].dtype), after[name]), name
    again = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "after").eval()
    assert again.dtype == dtype
    assert weights_checksum(again) == weights_checksum(model)
    assert again.chat(tokenizer, tiles(2), QUESTION, OPTIONS) == expected


@pytest.mark.parametrize("tool", tools("quanto int8"))
def test_quanto_saves_by_its_own_functions_and_transformers_says_that_it_cannot(tmp_path, tool):
    model, tokenizer = quantised(tool), make_processor().tokenizer
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    save_with_quanto(model, tmp_path)
    again = load_with_quanto(tmp_path, torch.device("cpu"))
    answer = model.chat(tokenizer, tiles(2), QUESTION, OPTIONS)
    assert again.chat(tokenizer, tiles(2), QUESTION, OPTIONS) == answer


@pytest.mark.parametrize("tool", tools("bitsandbytes int8", "bitsandbytes nf4", "torchao int8", "quanto int8"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_conversations_go_on_from_what_was_read(tmp_path, tool, dtype):
    tokenizer, question = make_processor().tokenizer, QUESTION.removeprefix("<image>\n")
    model = quantised(tool, dtype)
    state = model.conversation(tokenizer).extend("<image>\n", tiles(2))
    state.save(tmp_path / "state.safetensors")
    answers = [state.ask(question, OPTIONS), state.ask("Why?", OPTIONS)]
    fresh = quantised(tool, dtype)  # its first forward is that of a loaded conversation
    again = ConversationState.load(tmp_path / "state.safetensors", fresh, tokenizer)
    assert [again.ask(question, OPTIONS), again.ask("Why?", OPTIONS)] == answers
    assert model.chat(tokenizer, tiles(2), QUESTION, OPTIONS) == answers[0]


@pytest.mark.parametrize("tool", tools("bitsandbytes nf4", "torchao int8"))
def test_commands_take_a_quantised_folder(tmp_path, capsys, tool):
    """Saved from bf16, as Hub models are; commands load other folders in fp32 on a CPU."""
    quantised(tool, torch.bfloat16).save_pretrained(tmp_path)
    with_processor(tmp_path)
    assert evaluate(tmp_path, len(KINDS))["total"]["exact"] == 1
    picture = str(SHAPES / "picture.png")
    assert main(["chat", "--model", str(tmp_path), "--device=cpu", "--image", picture, QUESTION]) == 0
    assert capsys.readouterr().out.strip() == "six"


@needs("bitsandbytes")
def test_4_bit_layers_run_where_bitsandbytes_would_pack_them(tmp_path, monkeypatch):
    tool = TOOLS["bitsandbytes nf4"]
    quantised(tool).save_pretrained(tmp_path)
    monkeypatch.setattr(NO_PACKING, lambda: True)
    model, tokenizer = load_model(tmp_path, "cpu"), make_processor().tokenizer
    expected = model.chat(tokenizer, tiles(2), QUESTION, OPTIONS)
    monkeypatch.setattr(NO_PACKING, lambda: False)
    assert quantised(tool).chat(tokenizer, tiles(2), QUESTION, OPTIONS) == expected


@needs("bitsandbytes")
def test_the_benchmark_counts_answers_before_and_after_loading_and_bytes(tmp_path, monkeypatch, capsys):
    names = ["none", "bitsandbytes nf4", "mmmamba, 4 bits", "absent"]
    plain = SHAPES / "hybrid" / "model.safetensors"
    monkeypatch.setitem(TOOLS, "absent", Tool("no-such-package", None))
    monkeypatch.setattr(arguments, "TOOLS", names)
    command = ["bench", "quantization", "--device=cpu", "--questions=4", f"--results={tmp_path}", "--tools", *names]
    assert main(command) == 0
    assert "absent is left out: no-such-package is not installed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "quantization-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["tool"], row["exact"], row["reloaded"]) for row in rows] == [(name, 100, 100) for name in names[:3]]
    assert rows[0]["MB, bf16"] == pytest.approx(plain.stat().st_size / 1e6, rel=0.01)  # but for its metadata
    assert rows[1]["MB, bf16"] < 0.45 * rows[0]["MB, bf16"]
    assert rows[0]["embeddings and head, MB, bf16"] == 2 * 655 * 128 * 2 / 1e6
    assert rows[2]["MB, bf16"] < rows[1]["MB, bf16"]  # the head is quantised, too
    assert rows[0]["KL"] == 0 and all(1e-6 < row["KL"] < 0.05 for row in rows[1:])


@saved_by_transformers
def test_a_model_that_reads_text_only_is_quantised_saved_and_chats(tool, tmp_path, capsys):
    write_source(tmp_path / "source", hidden_size=128, intermediate_size=192, vocab_size=352)
    convert(tmp_path / "source", tmp_path / "teacher")
    seed_folder(tmp_path / "teacher", tmp_path / "student", attention=[1])
    model = MmMambaForConditionalGeneration.from_pretrained(
        tmp_path / "student", dtype=torch.float32, quantization_config=tool.config(), device_map={"": "cpu"}
    ).eval()
    tokenizer = load_tokenizer(tmp_path / "student")
    expected = model.chat(tokenizer, None, "What is it?", OPTIONS)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved", "cpu").chat(tokenizer, None, "What is it?", OPTIONS) == expected
    assert main(["chat", "--model", str(tmp_path / "saved"), "--device", "cpu", "--max-new-tokens=2", "What?"]) == 0
