"""The trained models of the picture world, and the recipes that make them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

import mmmamba
from mmmamba.cli.main import main
from mmmamba.examples.shapes import evaluate, train
from mmmamba.examples.shapes.world import example
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


SHAPES = Path(mmmamba.__file__).parent / "examples" / "shapes"
MAMBA_LAYERS = {"teacher": 0, "linear": 6, "hybrid": 4}


@pytest.mark.parametrize(("name", "least"), [("teacher", 0.93), ("hybrid", 0.9), ("linear", 0.8)])
def test_trained_models_answer_about_pictures_they_never_saw(name, least):
    """README has the scores on 2,000 questions; 220 leave a standard error of some two points."""
    result = evaluate.evaluate(SHAPES / name, num_questions=220)["total"]
    assert result["exact"] >= least
    assert result["shuffled"] <= result["majority"] + 0.07


@pytest.mark.parametrize(("name", "count"), MAMBA_LAYERS.items())
def test_trained_models_are_what_they_are_called(name, count):
    model = MmMambaForConditionalGeneration.from_pretrained(SHAPES / name)
    assert model.config.text_config.layer_types.count("linear_attention") == count
    assert model.dtype == torch.bfloat16


def test_all_checkpoints_together_are_small():
    assert sum(file.stat().st_size for file in SHAPES.glob("*/*") if file.is_file()) < 10e6


def question(index):
    one = example("test", 0, index)
    content = [{"type": "image", "image": picture.draw()} for picture in one.pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": one.question}]}], one


def test_processor_pipeline_and_batches_answer_as_chat_does():
    """Processor and generate, the pipeline, a batch, and chat()."""
    path = str(SHAPES / "hybrid")
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    conversations, examples = zip(*map(question, range(11)), strict=True)
    expected = []
    for one in examples:
        vision = processor.image_processor([picture.draw() for picture in one.pictures], return_tensors="pt")
        text = "<image>" * len(one.pictures) + "\n" + one.question
        counts = vision["num_patches"].tolist()
        options = {"max_new_tokens": 16, "do_sample": False}
        expected.append(model.chat(tokenizer, vision["pixel_values"], text, options, num_patches_list=counts))

    inputs = processor.apply_chat_template(
        list(conversations), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)] == expected

    ask = pipeline("image-text-to-text", model=path, trust_remote_code=True, dtype=torch.float32)
    options = {"max_new_tokens": 16, "do_sample": False}
    given = ask(text=list(conversations), generate_kwargs=options, return_full_text=False)
    assert [answer[0]["generated_text"].strip() for answer in given] == expected


def test_the_teachers_recipe_makes_a_model_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 2)
    train.main([str(tmp_path / "teacher"), "--steps", "3"])
    model = AutoModel.from_pretrained(tmp_path / "teacher", trust_remote_code=True)
    assert model.config.text_config.layer_types == ["full_attention"] * 6
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "teacher")])


def test_the_demonstration_asks_what_its_picture_shows_and_is_answered_right(capsys):
    assert main(["chat"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    truths = [(lines[i - 1], line) for i, line in enumerate(lines) if line.startswith("(right: ")]
    assert len(truths) == 3
    for given, truth in truths:
        assert truth == f"(right: {given})"
