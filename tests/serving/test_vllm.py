"""The vLLM plugin against the package's own model: the same prompts and tokens, whatever the engine does with them."""

import base64
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` installs it")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from mmmamba.conversion.quantize import quantize_folder
from mmmamba.examples.shapes.clip import write_clip
from mmmamba.examples.shapes.world import example


SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
LINEAR_LAYERS = "q_proj k_proj v_proj o_proj in_proj out_proj gate_proj up_proj down_proj".split()
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=3)


class Reference:
    """The package's own model, one conversation at a time."""

    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def inputs(self, messages):
        return self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )

    def answer(self, messages):
        """Ids of the prompt and of the greedy answer, and the log-probabilities of the answer's tokens."""
        inputs = self.inputs(messages)
        output = self.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        prompt = inputs["input_ids"][0].tolist()
        answer = output.sequences[0, len(prompt) :].tolist()
        scores = torch.cat(output.scores).log_softmax(-1)
        return prompt, answer, scores[torch.arange(len(answer)), answer].tolist()


def user(*content):
    """A question: pictures, files of videos, and text, in any order."""
    parts = []
    for one in content:
        kind = "text" if isinstance(one, str) else "video" if isinstance(one, Path) else "image"
        parts.append({"type": kind, kind: one})
    return {"role": "user", "content": parts}


def for_vllm(messages):
    """The same messages with pictures and videos as vLLM takes them from Python."""

    def part_of(part):
        if part["type"] == "image":
            return {"type": "image_pil", "image_pil": part["image"]}
        if part["type"] == "video":
            content = base64.b64encode(part["video"].read_bytes()).decode()
            return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}
        return part

    return [
        message if isinstance(message["content"], str) else {**message, "content": [*map(part_of, message["content"])]}
        for message in messages
    ]


def shapes_questions(count):
    """Conversations of the picture world, of one to three pictures with one to six tiles each."""
    examples = [example("test", 7, index) for index in range(count)]
    return [[user(*(picture.draw() for picture in one.pictures), one.question)] for one in examples]


def odd_questions():
    """Conversations that a picture world does not have."""
    picture, wide = Image.open(SHAPES / "picture.png"), Image.new("RGB", (300, 60), "red")
    earlier = [user(picture, "How many objects are there?"), {"role": "assistant", "content": "six"}]
    return [
        [user("Which colour is the star?")],
        [{"role": "system", "content": "Be brief."}, user("a", picture, "b", wide, "c")],
        [*earlier, user("And what is the colour of the star?")],
        [*earlier, user(wide, picture, "What is the difference?")],
        [user("A user types <|im_end|>, </s>, <image>, <img><IMG_CONTEXT></img> and <img></img>.", picture)],
        [user(picture, "word " * 300)],
    ]


def check_same_answers(llm, reference, conversations, **options):
    outputs = llm.chat([for_vllm(one) for one in conversations], GREEDY, use_tqdm=False, **options)
    for output, conversation in zip(outputs, conversations, strict=True):
        prompt, answer, expected = reference.answer(conversation)
        (completion,) = output.outputs
        assert list(output.prompt_token_ids) == prompt
        assert list(completion.token_ids) == answer
        found = [step[token].logprob for step, token in zip(completion.logprobs, answer, strict=True)]
        assert np.allclose(found, expected, atol=2e-3)
    return outputs


def start(folder, **options):
    return LLM(
        str(folder),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=16,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4, "video": 1},
        media_io_kwargs={"video": {"num_frames": 8}},  # the processor's default; vLLM's is 32
        **options,
    )


def adapter_of(folder, target, seed=0):
    """A LoRA adapter of every linear layer of the decoder in PEFT's format, and a model that has it merged."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    weights, lora = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".")[-1] in LINEAR_LAYERS:
            a, b = (torch.randn(*shape, generator=generator) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
            lora[f"base_model.model.{module}.lora_A.weight"] = a / weight.shape[1] ** 0.5
            lora[f"base_model.model.{module}.lora_B.weight"] = b * 0.5
            weights[name] = weight + 2 * (b * 0.5) @ (a / weight.shape[1] ** 0.5)
    adapter, merged = target / "adapter", target / "merged"
    adapter.mkdir()
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": LINEAR_LAYERS}))
    shutil.copytree(folder, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


@pytest.fixture(scope="module")
def hybrid():
    """The hybrid in an engine that reads prompts in chunks, keeps states of prefixes, and takes adapters."""
    engine = start(
        SHAPES / "hybrid", max_num_batched_tokens=128, enable_prefix_caching=True, enable_lora=True, max_lora_rank=8
    )
    return engine, Reference(SHAPES / "hybrid")


def test_answers_are_those_of_generate(hybrid):
    check_same_answers(*hybrid, shapes_questions(40))


def test_every_prompt_is_that_of_the_chat_template(hybrid):
    check_same_answers(*hybrid, odd_questions())


def test_videos_are_the_frames_that_the_processor_takes(hybrid, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_clip(clip)
    (tmp_path / "text.mp4").write_text("no video")
    llm, reference = hybrid
    conversations = [[user(clip, "Where is the red star?")], [user("Look: ", clip, Image.new("RGB", (90, 40)), "?")]]
    check_same_answers(llm, reference, conversations)
    with pytest.raises(ValueError, match="The video of a request"):
        llm.chat(for_vllm([user(tmp_path / "text.mp4", "?")]), GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    "options", [{"size": {"height": 24, "width": 24}}, {"max_patches": 1000}, {"images_kwargs": {"do_resize": False}}]
)
def test_a_request_cannot_change_how_many_rows_a_tile_has(hybrid, options):
    picture = user(Image.new("RGB", (90, 40), "blue"), "What is it?")
    with pytest.raises(ValueError, match="mm_processor_kwargs has"):
        hybrid[0].chat(for_vllm([picture]), GREEDY, use_tqdm=False, mm_processor_kwargs=options)
    check_same_answers(*hybrid, [[picture]])  # the engine lives


def test_states_are_fp32_unless_the_engine_is_told_otherwise():
    from vllm.config import CacheConfig

    from mmmamba.serving.vllm_mixer import state_dtypes

    assert state_dtypes(torch.bfloat16, CacheConfig()) == (torch.bfloat16, torch.float32)
    told = CacheConfig(mamba_ssm_cache_dtype="float16")
    assert state_dtypes(torch.bfloat16, told) == (torch.bfloat16, torch.float16)


def test_an_earlier_turns_state_is_used_again(hybrid):
    llm, reference = hybrid
    first = [user(Image.open(SHAPES / "picture.png"), "How many objects are there? " + "Think about it. " * 60)]
    (output,) = check_same_answers(llm, reference, [first])
    more = [*first, {"role": "assistant", "content": output.outputs[0].text}, user("And what colour is the star?")]
    (output,) = check_same_answers(llm, reference, [more])
    assert output.num_cached_tokens > 100


def test_adapters_of_every_layer_are_applied_by_request(hybrid, tmp_path):
    llm, reference = hybrid
    adapter, merged = adapter_of(SHAPES / "hybrid", tmp_path)
    questions = shapes_questions(6)
    request = LoRARequest("adapter", 1, str(adapter))
    outputs = check_same_answers(llm, Reference(merged), questions, lora_request=request)
    without = check_same_answers(llm, reference, questions)
    changes = [
        one.outputs[0].cumulative_logprob - other.outputs[0].cumulative_logprob
        for one, other in zip(outputs, without, strict=True)
    ]
    assert np.abs(changes).max() > 0.1  # or this would show nothing


def test_heads_may_be_spread_over_more_processes_than_there_are_key_value_heads(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    llm = start(SHAPES / "linear", tensor_parallel_size=4, distributed_executor_backend="mp")
    check_same_answers(llm, Reference(SHAPES / "linear"), shapes_questions(20) + odd_questions())


def test_layers_may_be_spread_over_processes(monkeypatch):
    def prepare(worker):
        """vLLM 0.32 does this in runners for GPUs alone, so that none of its models can be spread so over CPUs."""
        runner = worker.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `prepare`
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = start(SHAPES / "hybrid", pipeline_parallel_size=2, distributed_executor_backend="mp")
    llm.collective_rpc(prepare)
    check_same_answers(llm, Reference(SHAPES / "hybrid"), shapes_questions(20) + odd_questions())


def in_eight_bits(folder, target):
    """The folder with int8 weights, a scale per row, as llm-compressor writes them (compressed-tensors, W8A8)."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR_LAYERS:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
    shutil.copytree(folder, target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "re:.*vision_embeddings.*"],
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_quantised_weights(tmp_path):
    questions, reference = shapes_questions(40), Reference(SHAPES / "linear")
    outputs = start(in_eight_bits(SHAPES / "linear", tmp_path / "int8")).chat(
        [for_vllm(one) for one in questions], GREEDY, use_tqdm=False
    )
    same = [
        list(o.outputs[0].token_ids) == reference.answer(one)[1] for o, one in zip(outputs, questions, strict=True)
    ]
    assert sum(same) >= 36  # of 40: eight bits are not all


def test_weights_of_mmmamba_quantize_are_refused(tmp_path):
    quantize_folder(SHAPES / "linear", tmp_path / "small", 4)
    with pytest.raises(ValueError, match=r"serve the folder that it was made from, or this one by `mmmamba serve"):
        start(tmp_path / "small")


def test_a_teacher_needs_no_states():
    check_same_answers(
        start(SHAPES / "teacher"), Reference(SHAPES / "teacher"), shapes_questions(20) + odd_questions()
    )
