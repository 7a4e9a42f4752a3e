"""Llama-shaped language models become teachers: same logits, same ids, and students can be carved out of them."""

import json
import os
import shutil
import subprocess
import sys

import language_models
import pytest
import torch
from huggingface_hub import ModelCard
from language_models import SIZES, TEMPLATE, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)

from mmmamba.cli.main import main
from mmmamba.conversion.convert import VisionPlan, convert
from mmmamba.conversion.llama import open_language_model
from mmmamba.conversion.push import files_to_upload
from mmmamba.conversion.seeding import seed_folder
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import MmMambaTextTokenizer, MmMambaTokenizer, load_tokenizer


try:
    from transformers import InternLM3Config
except ImportError:  # Transformers before it had that model
    InternLM3Config = None


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "head_dim": (LlamaConfig, {"head_dim": 16}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "internlm3": (InternLM3Config, {}),
    **{f"rope-{name}": (LlamaConfig, {"rope_parameters": rope}) for name, rope in ROPES.items()},
}
FP32 = {"rtol": 0, "atol": 1e-4}  # of logits around 10: Transformers computes norms and angles in fp32, ours are fp64
TEXTS = (
    "The  capital of\n\n France <|im_end|> is Paris. 'tis 3.14!",
    "é 中文 😀\t  ",
    "",
    "x",
    "<unused> a<|im_start|>b",
)


def write_source(folder, kind="llama", **options):
    config_class, settings = ARCHITECTURES[kind]
    if config_class is None:
        pytest.skip(f"this version of Transformers has no {kind}")
    return language_models.write_source(folder, config_class, **{**settings, **options})


def prompt(length=40, vocabulary=320):
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))


def logits(folder, ids):
    model = MmMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_transformers_own_model(kind, tmp_path):
    theirs = write_source(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "ours")
    ids = prompt()
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(tmp_path / "ours", ids), expected, **FP32)


def test_internlm2s_fused_and_interleaved_projections_are_taken_apart(tmp_path):
    theirs = write_source(tmp_path / "llama", with_tokenizer=False)
    state, renamed = load_file(tmp_path / "llama" / "model.safetensors"), {}
    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in state.items():
        if ".q_proj" in name:
            q, k, v = (state[name.replace("q_proj", f"{x}_proj")].unflatten(0, (2, -1, 8)) for x in "qkv")
            fused = [torch.cat([q[group].flatten(0, 1), k[group, 0], v[group, 0]]) for group in range(2)]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(fused)
        elif ".k_proj" not in name and ".v_proj" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
    (tmp_path / "source").mkdir()
    save_file(renamed, tmp_path / "source" / "model.safetensors")
    config = json.loads((tmp_path / "llama" / "config.json").read_text()) | {"model_type": "internlm2", "bias": False}
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    report = convert(tmp_path / "source", tmp_path / "ours")
    assert "no tokenizer" in report.notes[0]
    with torch.no_grad():
        expected = theirs(prompt()).logits
    torch.testing.assert_close(logits(tmp_path / "ours", prompt()), expected, **FP32)


REFUSED = {
    "qwen3": (Qwen3Config, {}, ["qwen3", "normalises queries and keys"]),
    "sliding window": (MistralConfig, {"sliding_window": 16}, ["sliding_window=16"]),
    "partial rotation": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["rope_parameters", "in part"],
    ),
    "quantised": (LlamaConfig, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_network_does_not_have_is_refused_by_name(case, tmp_path):
    config_class, options, words = REFUSED[case]
    write_source(tmp_path / "source")
    config_class(**{**SIZES, "vocab_size": 330, **options}).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "source", tmp_path / "ours")
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model of Transformers' and its conversion."""
    root = tmp_path_factory.mktemp("language-model")
    write_source(root / "source")
    convert(root / "source", root / "ours")
    return root / "source", root / "ours"


def test_ids_and_rendered_chats_are_those_of_the_source(folders):
    theirs, ours = (AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in folders)
    assert type(ours).__name__ == MmMambaTextTokenizer.__name__
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": " x "}] * 2
    messages = messages[:-1]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert ours.apply_chat_template(parts, add_generation_prompt=True)["input_ids"] == expected
    with pytest.raises(ValueError, match="'image' cannot be read"):
        ours.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_typed_control_tokens_stay_text(folders):
    ours = load_tokenizer(folders[1])
    ids = ours.apply_chat_template([{"role": "user", "content": "a<|im_end|>b<unused>c"}])["input_ids"]
    assert (
        ids.count(ours.convert_tokens_to_ids("<|im_end|>")) == 1 and ours.convert_tokens_to_ids("<unused>") not in ids
    )
    assert "a<|im_end|>b<unused>c" in ours.decode(ids)


def test_chat_continues_from_its_state_as_if_it_had_read_all_again(folders):
    model = MmMambaForConditionalGeneration.from_pretrained(folders[1], dtype=torch.float64).eval()
    ours, options = load_tokenizer(folders[1]), {"max_new_tokens": 6, "do_sample": False}
    state, history = model.conversation(ours), []
    for question in ("What is the time?", "And the capital of France is?"):
        answer = state.ask(question, options)
        assert answer == model.chat(ours, None, question, options, history=list(history))
        history.append((question, answer))
    with pytest.raises(ValueError, match="reads text only"):
        model.chat(ours, torch.zeros(1, 3, 8, 8), "What?", options)


def test_every_named_template_takes_messages_of_parts(tmp_path):
    named = tokenizer()
    named.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "tools"}
    write_source(tmp_path / "source", with_tokenizer=False)
    named.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours")
    ours = load_tokenizer(tmp_path / "ours")
    for name in named.chat_template:
        whole = named.apply_chat_template([{"role": "user", "content": "a b"}], chat_template=name, tokenize=False)
        parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
        assert ours.apply_chat_template(parts, chat_template=name, tokenize=False) == whole


def test_internlm2s_tokenizer_has_its_ids_and_its_template_takes_parts(tmp_path):
    theirs = load_tokenizer("examples/shapes/teacher")
    write_source(tmp_path / "source", with_tokenizer=False, vocab_size=len(theirs))
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    shutil.copyfile("examples/shapes/teacher/tokenizer.model", tmp_path / "source" / "tokenizer.model")
    remote = {"tokenizer_class": "InternLM2Tokenizer", "chat_template": TEMPLATE, "add_bos_token": True}
    (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(remote))
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"model_type": "internlm2"}))
    checkpoint = open_language_model(tmp_path / "source", None)
    plain = MmMambaTokenizer.from_pretrained(tmp_path / "source", extra_special_tokens=[])
    for text in ("Where is the red star?", "é 中文", "  two"):
        assert checkpoint.processor(text)["input_ids"] == plain(text)["input_ids"]
    message = {"role": "user", "content": [{"type": "text", "text": "Where"}]}
    assert checkpoint.processor.apply_chat_template([message], tokenize=False) == "<|im_start|>user\nWhere<|im_end|>\n"


def test_the_card_names_the_sources_licence_and_model_and_claims_no_other(tmp_path):
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "unknown")
    assert "license" not in (tmp_path / "unknown" / "README.md").read_text()
    (tmp_path / "source" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/name"}))
    convert(tmp_path / "source", tmp_path / "ours")
    seed_folder(tmp_path / "ours", tmp_path / "student", attention=[0])
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: org/name" in card
    assert "license: apache-2.0" in (tmp_path / "student" / "README.md").read_text()


def test_qwen2_with_windows_from_a_layer_on_that_it_has_not_is_converted(tmp_path):
    theirs = write_source(tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=9)
    convert(tmp_path / "source", tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "ours", prompt()), theirs(prompt()).logits, **FP32)


def test_inherited_mixers_keep_the_teachers_biases_and_scratch_ones_do_not(tmp_path):
    write_source(tmp_path / "source", "qwen2")
    convert(tmp_path / "source", tmp_path / "teacher")
    teacher = load_file(tmp_path / "teacher" / "model.safetensors")
    biases = torch.cat([teacher[f"model.layers.1.self_attn.{name}_proj.bias"] for name in "vkq"])
    for initialization in ("mimic", "inherited", "scratch"):
        seed_folder(tmp_path / "teacher", tmp_path / initialization, attention=[0], initialization=initialization)
        found = load_file(tmp_path / initialization / "model.safetensors")["model.layers.1.mamba.conv1d.bias"]
        assert torch.equal(found.float(), biases.float()) == (initialization != "scratch")


@pytest.mark.parametrize("kind", ["tied", "biases", "qwen2"])
def test_a_student_is_seeded_and_keeps_the_biases_that_its_mixers_can_have(kind, tmp_path):
    write_source(tmp_path / "source", kind)
    convert(tmp_path / "source", tmp_path / "teacher")
    if kind == "biases":  # of the output projection
        with pytest.raises(ValueError, match="attention_output_bias"):
            seed_folder(tmp_path / "teacher", tmp_path / "student", attention=[0])
        return
    seed_folder(tmp_path / "teacher", tmp_path / "student", attention=[0])
    model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "student", dtype=torch.float64)
    teacher = MmMambaForConditionalGeneration.from_pretrained(tmp_path / "teacher", dtype=torch.float64)
    mixer, attention = model.model.layers[1].mamba, teacher.model.layers[1].self_attn
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    vkq = mixer.in_proj(x)[..., : mixer.splits[0]]
    before_activation = torch.nn.functional.conv1d(
        torch.nn.functional.pad(vkq.transpose(1, 2), (1, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=64
    )
    expected = torch.cat([attention.v_proj(x), attention.k_proj(x), attention.q_proj(x)], dim=-1)
    torch.testing.assert_close(before_activation.transpose(1, 2), expected)
    assert model(input_ids=prompt()).logits.isfinite().all()
    assert (
        load_tokenizer(tmp_path / "student")("x")["input_ids"]
        == load_tokenizer(tmp_path / "teacher")("x")["input_ids"]
    )


def test_a_saved_copy_loads_without_the_package(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[1], trust_remote_code=True)
    model.save_pretrained(tmp_path / "copy")
    AutoTokenizer.from_pretrained(folders[1], trust_remote_code=True).save_pretrained(tmp_path / "copy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", trust_remote_code=True)
    ids = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=True)("What", return_tensors="pt")
    torch.testing.assert_close(again(**ids).logits, model(**ids).logits)


@pytest.mark.deprecations  # 5.17's own pipeline calls `generate` in a deprecated way
def test_the_pipeline_answers_as_generate_does(folders):
    ask = pipeline("text-generation", model=str(folders[1]), trust_remote_code=True, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is it?"}]
    inputs = ask.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = ask.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (answer,) = ask(messages, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == ask.tokenizer.decode(ids, skip_special_tokens=True)


# Run where `import mmmamba` fails as if it were not installed; prints what each folder's model answers.
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["mmmamba"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    print(ascii(model.chat(tokenizer, None, "What is it?", {"max_new_tokens": 5, "do_sample": False})))
"""


def test_what_is_pushed_loads_without_the_package(folders, tmp_path):
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    for name, file in files_to_upload(folders[1]).items():
        (uploaded / name).write_bytes(file if isinstance(file, bytes) else file.read_bytes())
    assert not any("processor" in file.name for file in uploaded.glob("*.json"))
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, uploaded]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    model = MmMambaForConditionalGeneration.from_pretrained(folders[1]).eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    assert done.stdout.strip() == ascii(model.chat(load_tokenizer(folders[1]), None, "What is it?", options))


@pytest.mark.parametrize("license", [None, "apache-2.0"])
def test_cards_name_the_licence_and_the_name_of_the_source(license, tmp_path):
    source = tmp_path / "models--someone--small" / "snapshots" / "0123"
    write_source(source)
    if license:
        (source / "README.md").write_text(f"---\nlicense: {license}\n---\n# small\n")
    convert(source, tmp_path / "teacher")
    seed_folder(tmp_path / "teacher", tmp_path / "student", attention=[0])
    teacher, student = (ModelCard.load(tmp_path / name / "README.md") for name in ("teacher", "student"))
    assert teacher.data.pipeline_tag == student.data.pipeline_tag == "text-generation"
    assert teacher.data.license == student.data.license == license
    assert teacher.data.base_model == "someone/small"
    assert "Its weights keep that model's licence" in teacher.text


def test_the_picture_world_is_not_asked_of_a_model_that_reads_text_only(folders, capsys):
    assert main(["evaluate", "--model", str(folders[1])]) == 1
    assert "reads text only" in capsys.readouterr().err


def test_the_chat_command_answers_and_refuses_pictures(folders, tmp_path, capsys):
    assert main(["chat", "--model", str(folders[1]), "--max-new-tokens=4", "What is it?"]) == 0
    assert main(["chat", "--model", str(folders[1]), "--image", "examples/shapes/picture.png", "What is it?"]) == 1
    assert "reads text only" in capsys.readouterr().err


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "tied"])
def with_vision(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    theirs = write_source(root / "source", request.param, vocab_size=324)
    convert(root / "source", root / "ours", vision=VisionPlan(2, image_size=16, patch_size=4))
    return theirs, root / "ours"


def test_new_embedding_layers_change_nothing_of_texts(with_vision):
    theirs, folder = with_vision
    with torch.no_grad():
        expected = theirs(prompt()).logits
    found = logits(folder, prompt())
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, **FP32)


def test_pictures_are_read_and_their_embedding_learns(with_vision):
    _, folder = with_vision
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = MmMambaForConditionalGeneration.from_pretrained(folder)
    content = [{"type": "image", "path": "examples/shapes/picture.png"}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4 * len(inputs["pixel_values"])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "vision_embeddings" in name or "o_proj" in name]
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)
    answer = model.chat(
        processor.tokenizer, inputs["pixel_values"], "What?", {"max_new_tokens": 3, "do_sample": False}
    )
    assert isinstance(answer, str)


def test_vision_needs_a_tokenizer_and_a_language_model_in_its_original_layout(tmp_path, folders):
    write_source(tmp_path / "source", with_tokenizer=False)
    for source, words in ((tmp_path / "source", "no tokenizer"), (folders[1], "model_type='mmmamba'")):
        with pytest.raises(ValueError, match=words):
            convert(source, tmp_path / "ours", vision=VisionPlan(1))


@pytest.mark.parametrize("patch_size", [5, 0])
def test_pictures_that_cannot_be_cut_into_patches_are_refused_in_one_sentence(folders, tmp_path, patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        convert(folders[0], tmp_path / "ours", vision=VisionPlan(1, 16, patch_size))


def test_sizes_of_pictures_without_vision_are_refused(folders, tmp_path, capsys):
    assert main(["convert", str(folders[0]), str(tmp_path / "ours"), "--patch-size", "8"]) == 1
    assert "--patch-size is for new embedding layers; add --vision N" in capsys.readouterr().err


# --- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf(file, without=(), scaled=None):
    """A small Llama as llama.cpp stores it: queries and keys permuted, a byte-level tokenizer.

    `without` names tensors that are left out, `scaled` is how it says that rotary positions are scaled.
    """
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    words = tokenizer()
    vocabulary = sorted(words.get_vocab(), key=words.get_vocab().get)
    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    control = [gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(vocabulary))]
    writer.add_token_types(control)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_license("apache-2.0")
    shapes = {"token_embd": (len(vocabulary), 32), "output": (len(vocabulary), 32), "output_norm": (32,)}
    for layer in range(2):
        rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48, "ffn_up": 48}
        shapes |= {f"blk.{layer}.{name}": (count, 32) for name, count in rows.items()}
        shapes |= {f"blk.{layer}.ffn_down": (32, 48), f"blk.{layer}.attn_norm": (32,), f"blk.{layer}.ffn_norm": (32,)}
    if scaled == "type":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    elif scaled == "factors":
        shapes["rope_freqs"] = (4,)
    for name, shape in shapes.items():
        if name in without:
            continue
        values = 0.3 * torch.randn(shape, generator=generator) + (1 if "norm" in name else 0)
        writer.add_tensor(f"{name}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_logits_of_transformers_own_reader(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    convert(tmp_path / "model.gguf", tmp_path / "ours")
    ids = prompt(vocabulary=theirs.config.vocab_size)
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(tmp_path / "ours", ids), expected.double(), **FP32)
    assert ModelCard.load(tmp_path / "ours" / "README.md").data.license == "apache-2.0"
    original = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    words = load_tokenizer(tmp_path / "ours")
    for text in TEXTS:
        assert words(text)["input_ids"] == original(text)["input_ids"]
    assert (words.bos_token_id, words.eos_token_id, words.unk_token_id, words.pad_token_id) == (1, 2, 0, 0)
    shutil.copyfile(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="2 GGUF files"):
        convert(tmp_path, tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"without": ["blk.1.ffn_down"]}, r"lacks model\.layers\.1\.mlp\.down_proj\.weight"),
        ({"scaled": "type"}, r"rope\.scaling\.type='linear'"),
        ({"scaled": "factors"}, r"rope_freqs\.weight"),
    ],
)
def test_a_gguf_file_of_which_transformers_reads_less_than_there_is_is_refused(options, words, tmp_path):
    write_gguf(tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "model.gguf", tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_end_tokens_beside_a_gguf_file_are_another_models(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert convert(tmp_path / "model.gguf", tmp_path / "ours").config.text_config.eos_token_id == 2
