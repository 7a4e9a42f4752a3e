"""Upstream checkpoints become ours with the same logits, completely, or not at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from golden_checkpoints import GOLDEN, add_tokenizer, change_weights, checkpoint, training_layers
from PIL import Image
from safetensors.torch import load_file, save_file

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion.convert import convert, read_upstream_config
from mmmamba.conversion.layouts import from_training_student, upstream_rules
from mmmamba.conversion.publish import expected_specs
from mmmamba.conversion.shards import ShardReader, ShardWriter
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


MODELS = ["hovle_tiny", "hovle_tiny_special", "hovle_tiny_pixshuf_pre", "mmmamba_linear_tiny", "mmmamba_hybrid_tiny"]
WQKV = "language_model.model.layers.1.attention.wqkv.weight"


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def logits(folder, name, case):
    tensors = load_file(GOLDEN / name / f"case_{case}.safetensors")
    inputs = {key: tensors[f"in.{key}"] for key in ("input_ids", "pixel_values") if f"in.{key}" in tensors}
    model = MmMambaForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = tensors["out.logits"] if "out.logits" in tensors else tensors["out.prefill_logits"]
        return model(**inputs).logits, expected


def edit_config(folder, **changes):
    """Sets entries of the upstream config; `llm_config__x=1` reaches into a section."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key, value in changes.items():
        *section, last = key.split("__")
        target = values[section[0]] if section else values
        target[last] = value
    path.write_text(json.dumps(values))


def refused(source, tmp_path, *words):
    """Converting fails with all these words, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_every_tensor_of_the_model_is_written(name, tmp_path):
    report = convert(checkpoint(tmp_path / "src", name), tmp_path / "out")
    expected = {key: tuple(spec.shape) for key, spec in expected_specs(report.config).items()}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == expected
    assert any("class_embedding" in key for key in report.left_out)


def test_each_rule_can_be_undone(name):
    """The inverse of a rule gives the upstream tensors back, up to the unused row."""
    upstream = read_upstream_config(json.loads((GOLDEN / name / "config.json").read_text()))
    text, tensors = upstream.config.text_config, load_file(GOLDEN / name / "state.safetensors")
    shuffle = upstream.config.vision_config.use_pixel_shuffle
    for rule in upstream_rules(text, tensors, len(upstream.special_tokens), shuffle):
        sources = [tensors[source] for source in rule.sources]
        back = rule.operation.write(rule.operation.read(sources, text), text)
        for source, original, again in zip(rule.sources, sources, back, strict=True):
            used = slice(1, None) if "position_embedding" in source else slice(None)
            if "position_embedding" in source:
                original, again = original[0], again[0]
            assert torch.equal(original[used], again[used]), source


def test_sharded_checkpoints_convert_the_same(tmp_path):
    whole = checkpoint(tmp_path / "whole", "mmmamba_hybrid_tiny")
    sharded = checkpoint(tmp_path / "sharded", "mmmamba_hybrid_tiny")
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    weight_map = {key: f"model-{index % 3}.safetensors" for index, key in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    convert(whole, tmp_path / "a")
    convert(sharded, tmp_path / "b", max_shard_size="200KB")
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 2
    one, other = (MmMambaForConditionalGeneration.from_pretrained(tmp_path / x).state_dict() for x in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_keep_their_dtype(dtype, tmp_path):
    source = checkpoint(tmp_path / "src", "mmmamba_linear_tiny")

    def lower(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype) if "A_log" not in key else tensors[key]

    change_weights(source, lower)
    report = convert(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for key, tensor in written.items() if "A_log" not in key} == {dtype}
    assert {tensor.dtype for key, tensor in written.items() if "A_log" in key} == {torch.float32}
    assert report.config.dtype == dtype


def test_the_training_student_fuses_as_upstream_fuses_it():
    case = load_file(GOLDEN / "convert" / "case.safetensors")
    before = {key.removeprefix("before."): x for key, x in case.items() if key.startswith("before.")}
    upstream_names = {
        "in_proj.weight": "wvkqgdt.weight", "norm.weight": "g_norm_swish_gate.weight", "A_log": "A_log_bias",
        "out_proj.weight": "o_proj.weight", "dt_bias": "dt_bias", "conv1d.weight": "conv1d.weight",
        "conv1d.bias": "conv1d.bias",
    }  # fmt: skip
    fused = from_training_student(before)
    assert set(fused) == set(upstream_names)
    for key, upstream in upstream_names.items():
        assert torch.equal(fused[key], case[f"after.{upstream}"]), key
    with pytest.raises(ValueError, match="lacks v_proj"):
        from_training_student({key: x for key, x in before.items() if key != "v_proj.weight"})


def test_a_whole_training_student_converts_to_the_converted_models_logits(tmp_path):
    """Fixture `convert`: stage-2 student, q/k/v trained, shadows left over, everything else from the teacher."""
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    layers = training_layers("student_perturbed.safetensors", "student_stage2_qkv.safetensors")

    def become_student(tensors):
        for layer, mixer in layers.items():
            tensors[f"{layer}.attention.o_proj.weight"] = tensors.pop(f"{layer}.attention.wo.weight")
            tensors[f"{layer}.attention.q_proj_shadow.weight"] = tensors.pop(f"{layer}.attention.wqkv.weight")
            tensors |= {f"{layer}.attention.{key}": x for key, x in mixer.items()}

    change_weights(source, become_student)
    report = convert(source, tmp_path / "out")
    assert set(report.config.text_config.layer_types) == {"linear_attention"}
    assert sum("shadow" in key for key in report.left_out) == len(layers) == 12

    inputs = load_file(GOLDEN / "seeding" / "stage1_at_seed.safetensors")
    expected = load_file(GOLDEN / "convert" / "case.safetensors")["converted_model.prefill_logits"]
    # In double precision, so that the bound measures upstream's rounding alone: the norm over a head amplifies it by
    # up to 300, so it is larger here than in the released model's fixtures. Mistakes of meaning show as 1e-2 or more.
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    with torch.no_grad():
        ours = model(input_ids=inputs["in.input_ids"], pixel_values=inputs["in.pixel_values"].double()).logits
    torch.testing.assert_close(ours.float(), expected, atol=5e-3, rtol=0)


def test_a_training_checkpoint_without_the_frozen_part_is_explained(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    (source / "model.safetensors").unlink()
    save_file(load_file(GOLDEN / "seeding" / "student_seeded.safetensors"), source / "model.safetensors")
    refused(source, tmp_path, "missing", "training checkpoint")


# What stops a conversion, and what the message must say.
DAMAGE = {
    "missing": (lambda x: x.pop(WQKV), ["missing", WQKV]),
    "unknown": (lambda x: x.update({"language_model.extra": torch.ones(2)}), ["unknown", "language_model.extra"]),
    "wrong shape": (lambda x: x.update({WQKV: x[WQKV][:-1].clone()}), ["wrong shape", WQKV, "(127, 64)", "(128, 64)"]),
    "nan": (lambda x: x[WQKV].view(-1)[7].fill_(float("nan")), ["NaN", WQKV]),
    "infinite": (lambda x: x[WQKV].view(-1)[7].fill_(float("inf")), ["infinite", WQKV]),
    "integers": (lambda x: x.update({WQKV: x[WQKV].to(torch.int8)}), ["I8", WQKV]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_leave_nothing_behind(damage, tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    change, words = DAMAGE[damage]
    change_weights(source, change)
    refused(source, tmp_path, *words)


def test_all_problems_are_listed_at_once(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    change_weights(source, lambda x: (DAMAGE["unknown"][0](x), DAMAGE["missing"][0](x)))
    refused(source, tmp_path, "missing", "unknown", WQKV, "language_model.extra")


def test_nan_in_an_unused_tensor_is_no_problem(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    change_weights(source, lambda x: x["language_model.model.tok_embeddings.weight"].fill_(float("nan")))
    convert(source, tmp_path / "out")


CONFIGS = {
    "another model": (dict(model_type="llava"), ["llava", "internvl_chat"]),
    "another language model": (dict(llm_config__model_type="llama"), ["llama", "internlm2"]),
    "our layout": (dict(model_type="mmmamba"), ["already"]),
    "unequal stacks": (dict(embedding_config__intermediate_size=99), ["intermediate_size=99", "128"]),
    "biases": (dict(llm_config__bias=True), ["llm_config.bias"]),
    "unknown scaling": (dict(llm_config__rope_scaling={"type": "yarn", "factor": 2.0}), ["yarn"]),
    "unknown block": (dict(llm_config__layers_block_type=["rwkv"] * 4), ["rwkv", "mamba2"]),
    "short block list": (dict(llm_config__layers_block_type=["mha"]), ["1 entries"]),
    "vocabulary": (dict(llm_config__vocab_size=200), ["200"]),
    "downsampling": (dict(downsample_ratio=0.5), ["downsample_ratio"]),
    "tile size": (dict(force_image_size=112), ["112", "56"]),
    "image token": (dict(embedding_config__img_context_token_id=999), ["999"]),
    "template": (dict(template="no-such-template"), ["no-such-template"]),
    "wrong type": (dict(llm_config__hidden_size="64", embedding_config__hidden_size="64"), ["hidden_size"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit_are_refused(case, tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    changes, words = CONFIGS[case]
    edit_config(source, **changes)
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_missing_config_entry_is_named(tmp_path):
    values = json.loads((GOLDEN / "hovle_tiny" / "config.json").read_text())
    del values["embedding_config"]["rope_theta"]
    with pytest.raises(ValueError, match=r"embedding_config\.rope_theta"):
        read_upstream_config(values)


def test_an_unknown_place_of_the_pixel_shuffle_is_refused_by_name(tmp_path):
    for number, change in enumerate(({"pixel_shuffle_loc": "mid"}, {"use_pixel_shuffle_proj": False})):
        source = checkpoint(tmp_path / f"src{number}", "hovle_tiny_pixshuf_post")
        config = json.loads((source / "config.json").read_text())
        config["embedding_config"] |= change
        (source / "config.json").write_text(json.dumps(config))
        refused(source, tmp_path, "pixel_shuffle_loc=", "known are 'pre'")


def test_config_values_arrive(tmp_path):
    values = json.loads((GOLDEN / "mmmamba_hybrid_tiny" / "config.json").read_text())
    values["llm_config"] |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rms_norm_eps": 1e-6}
    values["embedding_config"]["rope_theta"] = 5000.0
    config = read_upstream_config(values).config
    text = config.text_config
    assert text.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    assert text.embedding_rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert (text.rms_norm_eps, text.embedding_rms_norm_eps) == (1e-6, 1e-5)
    assert [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"] == [0, 4, 8]
    assert (text.num_hidden_layers, text.num_embedding_layers) == (12, 8)
    assert (config.image_token_id, config.vision_config.image_size) == (130, 56)


def test_pickles_are_refused_with_the_reason(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused(source, tmp_path, "pytorch_model.bin", "pickle", "safetensors")


def test_truncated_and_absent_shards_are_refused(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    weights = source / "model.safetensors"
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {WQKV: "gone.safetensors"}}))
    refused(source, tmp_path, "gone.safetensors")
    index.unlink()
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(source, tmp_path, "model.safetensors")
    weights.unlink()
    refused(source, tmp_path, "*.safetensors")


def test_an_existing_destination_is_left_alone(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    calls = []

    def interrupted(self, name, tensor):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_shards_hold_what_was_written(tmp_path):
    """Written in any order, split over files, read back the same; a forgotten tensor is noticed."""
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0, 4), "d": torch.randn(())}
    with ShardWriter(tmp_path, tensors, max_shard_size=90) as writer:
        for key in reversed(tensors):
            writer.write(key, tensors[key])
    reader = ShardReader(tmp_path)
    assert set(reader.specs) == set(tensors)
    for key, tensor in tensors.items():
        torch.testing.assert_close(reader[key], tensor, atol=0, rtol=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match="never written"), ShardWriter(tmp_path, tensors) as writer:
        writer.write("a", tensors["a"])


def test_a_converted_folder_names_its_classes_and_has_a_card(tmp_path):
    convert(checkpoint(tmp_path / "src", "mmmamba_hybrid_tiny"), tmp_path / "out")
    config = MmMambaConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["MmMambaForConditionalGeneration"]
    assert config.auto_map["AutoConfig"] == "configuration_mmmamba.MmMambaConfig"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "license: mit" in card


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A converted folder whose source had everything."""
    folder = tmp_path_factory.mktemp("complete")
    source = checkpoint(folder / "src", "hovle_tiny_pixshuf_pre")
    add_tokenizer(source)
    report = convert(source, folder / "model")
    assert report.notes == []
    return folder / "model"


def test_a_complete_source_gives_a_complete_folder(complete):
    assert {file.name for file in complete.iterdir()} >= {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json",
        "processor_config.json", "chat_template.jinja", "tokenizer.model", "tokenizer_config.json",
        "configuration_mmmamba.py", "modeling_mmmamba.py", "ssm_mmmamba.py", "chat_mmmamba.py",
        "pictures_mmmamba.py", "loading_mmmamba.py",
        "image_processing_mmmamba.py", "processing_mmmamba.py", "tokenization_mmmamba.py",
        "video_processing_mmmamba.py", "video_reading_mmmamba.py",
    }  # fmt: skip
    assert json.loads((complete / "generation_config.json").read_text())["eos_token_id"] == 1198  # <|im_end|>
    assert "upstream's own" not in (complete / "chat_template.jinja").read_text()


# What a fresh interpreter, which does not have this package, does with converted folders.
PROGRAM = """
import sys, traceback
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM,
    AutoTokenizer, AutoVideoProcessor
)

hybrid, complete, code = sys.argv[1:]

def models():
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto.from_pretrained(hybrid, trust_remote_code=True).eval()
        assert "transformers_modules" in type(model).__module__, type(model)
        assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, do_sample=False).shape[1] <= 5

def card():
    exec(Path(code).read_text(), {})

def processors():
    for backend in ("torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(complete, trust_remote_code=True, backend=backend)
        bases = [base.__name__.lower().removesuffix("backend") for base in type(processor).__mro__]
        assert backend in bases, (backend, bases)
    video_processor = AutoVideoProcessor.from_pretrained(complete, trust_remote_code=True)
    assert (video_processor.num_frames, video_processor.max_patches, video_processor.size.height) == (8, 1, 56)
    tokenizer = AutoTokenizer.from_pretrained(complete, trust_remote_code=True, backend="sentencepiece")
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<IMG_CONTEXT>"]) == [1198, 1202]

for part in (models, card, processors):
    try:
        part()
    except BaseException:
        Path(part.__name__).write_text(traceback.format_exc())
    else:
        Path(part.__name__).write_text("passed")
assert not any(name == "mmmamba" or name.startswith("mmmamba.") for name in sys.modules)
Path("independence").write_text("passed")
"""


@pytest.fixture(scope="module")
def elsewhere(complete, tmp_path_factory):
    """The folder in which `PROGRAM` ran, once for all tests; a file for each of its parts says how that went."""
    folder = tmp_path_factory.mktemp("elsewhere")
    convert(checkpoint(folder / "src", "mmmamba_hybrid_tiny"), folder / "out")
    hybrid = (folder / "out").rename(folder / "moved")
    code = (complete / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'path = "model"' in code
    code = code.replace('path = "model"', f"path = {str(complete)!r}").replace("max_new_tokens=64", "max_new_tokens=3")
    (folder / "example.py").write_text(code)
    Image.new("RGB", (90, 50), "red").save(folder / "picture.png")
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(hybrid), str(complete), str(folder / "example.py")]
    subprocess.run(command, check=False, env=environment, cwd=folder)
    return folder


def test_a_converted_folder_loads_elsewhere_with_its_own_code(elsewhere):
    assert (elsewhere / "models").read_text() == "passed"
    assert (elsewhere / "independence").read_text() == "passed"


def test_the_cards_example_runs_as_printed(elsewhere):
    assert (elsewhere / "card").read_text() == "passed"


def test_auto_classes_find_tokenizer_video_processor_and_both_image_processors(elsewhere):
    assert (elsewhere / "processors").read_text() == "passed"


def test_tiling_follows_the_source(complete):
    values = json.loads((complete / "preprocessor_config.json").read_text())
    assert values["size"] == {"height": 56, "width": 56} and values["max_patches"] == 6 and values["use_thumbnail"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny")
    add_tokenizer(source)
    edit_config(source, embedding_config__img_context_token_id=1201)
    refused(source, tmp_path, "<IMG_CONTEXT>", "1202", "1201")


def test_without_a_tokenizer_the_note_says_what_is_missing(tmp_path):
    report = convert(checkpoint(tmp_path / "src", "hovle_tiny"), tmp_path / "out")
    assert len(report.notes) == 1 and "tokenizer.model" in report.notes[0]
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
