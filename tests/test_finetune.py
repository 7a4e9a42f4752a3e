"""Fine-tuning with PEFT, Transformers' Trainer and TRL, on rows with pictures."""

import inspect
import json

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mmmamba.conversion.distillation.data import ConversationEncoder, open_data
from mmmamba.examples.finetune import house_style
from mmmamba.examples.shapes.folder import SHIPPED
from mmmamba.examples.shapes.world import conversation


HYBRID = SHIPPED / "hybrid"


def with_old_names(test):
    """Marks a test of PEFT or TRL, which know activation checkpointing by the name that it had before 5.24."""
    test = pytest.mark.deprecations("PEFT and TRL use a name that Transformers 5.24 replaced")(test)
    return pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")(test)


@pytest.fixture
def model():
    return AutoModelForImageTextToText.from_pretrained(HYBRID, dtype=torch.float32, trust_remote_code=True)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(HYBRID, trust_remote_code=True)


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason='TRL is missing; pip install "mmmamba[finetune]"')


@pytest.fixture
def lora():
    pytest.importorskip("peft", reason='PEFT is missing; pip install "mmmamba[finetune]"')
    from mmmamba.examples.finetune import lora

    return lora


@pytest.fixture(scope="module")
def rows():
    """Conversations of two questions, as TRL takes them; some have several pictures, some pictures several tiles."""
    conversations = [conversation("train", 0, index, turns=2) for index in range(8)]
    assert len({len(pictures) for pictures, _ in conversations}) > 1
    rows = []
    for pictures, turns in conversations:
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": [picture.draw() for picture in pictures]})
    return rows


@with_old_names
def test_lora_teaches_an_answer_that_stays_after_saving_loading_and_merging(lora, tmp_path, capsys):
    from peft import PeftModel

    house_style.write_data(tmp_path, num_train=8, num_test=4)
    options = ["--test", str(tmp_path / "train.jsonl"), "--steps", "25", "--learning-rate", "5e-3"]
    lora.main([str(tmp_path / "train.jsonl"), str(tmp_path / "out"), *options])
    before, after = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("Before", "After")))
    assert before.startswith("Before: 50% of 8 answers are right") and after == "After: 100% of 8 answers are right."
    with Image.open(tmp_path / "out" / "loss.png") as plot:
        assert plot.size[0] > 500

    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)  # beside the adapter
    questions = open_data({"file": str(tmp_path / "train.jsonl")}, processor)
    base = AutoModelForImageTextToText.from_pretrained(HYBRID, dtype=torch.float32, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out" / "merged", dtype=torch.float32, trust_remote_code=True
    ).eval()
    for tuned in (adapted, merged):
        assert all(given == expected for given, expected in lora.first_answers(tuned, processor, questions))
    batch = {name: tensor for name, tensor in lora.collate([questions[0]], 2).items() if name != "labels"}
    with torch.inference_mode():
        torch.testing.assert_close(adapted(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_test_file_holds_pictures_that_are_not_trained_on(tmp_path):
    house_style.write_data(tmp_path, num_train=40, num_test=40)
    records = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    ]
    seen, held_out = (
        {(tmp_path / image).read_bytes() for record in part for image in record["image"]} for part in records
    )
    assert not seen & held_out
    answers = [record["conversations"][1]["value"] for record in records[0]]
    assert sum(answer.isdigit() for answer in answers) >= 20 and not {"one", "two", "three"} & set(answers)


@with_old_names
def test_all_linear_adapts_every_projection_but_the_head(lora, model):
    from peft import LoraConfig, get_peft_model

    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    targets = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}
    assert targets == {f"base_model.model.{name}" for name in linear - {"lm_head"}}
    names = {name.rsplit(".", 1)[1] for name in targets}
    assert {"q_proj", "in_proj", "out_proj", "gate_proj"} <= names and any("projector" in name for name in targets)


@with_old_names
def test_a_record_that_cannot_be_read_is_left_out_by_name(lora, tmp_path, capsys):
    house_style.write_data(tmp_path, num_train=2, num_test=1)
    first = tmp_path / json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["image"][0]
    first.unlink()
    trainer = lora.make_trainer(HYBRID, tmp_path / "train.jsonl", tmp_path / "out", max_steps=1, save_strategy="no")
    trainer.train()
    said = capsys.readouterr().out
    assert "is left out: " in said and first.name in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl", "out"], "missing.jsonl is no file"),
        (["train.jsonl", "pictures"], "pictures exists; name a folder"),
        (["train.jsonl", "out", "--model", "pictures"], "pictures"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(
    lora, arguments, words, tmp_path, monkeypatch, capsys
):
    house_style.write_data(tmp_path, num_train=1, num_test=1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        lora.main(arguments)
    assert error.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def collate(processor, rows):
    """As docs/tools.md shows it."""
    batch = processor.apply_chat_template(
        [with_images(row) for row in rows],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True},
    )
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    return batch


def with_images(row):
    """The messages of a row, its pictures in front of the first question."""
    first, *others = row["messages"]
    images = [{"type": "image", "image": image} for image in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": first["content"]}]}, *others]


def test_the_assistant_mask_covers_the_answers_of_rows_with_pictures(processor, rows):
    encoder = ConversationEncoder(processor)
    batch = collate(processor, rows)
    for row, ids, labels, mask in zip(
        rows, batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        expected = encoder(row)
        assert ids[mask].tolist() == expected["input_ids"].tolist()
        assert labels[mask].tolist() == expected["labels"].tolist()
        assert not (labels[~mask] != -100).any()


def test_trainer_checkpoints_activations_without_changing_the_loss(model, processor, rows, tmp_path):
    known = inspect.signature(TrainingArguments).parameters
    option = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    losses = []
    for checkpointing in (False, True):
        arguments = TrainingArguments(
            str(tmp_path), report_to="none", remove_unused_columns=False, max_steps=2, per_device_train_batch_size=4,
            logging_steps=1, save_strategy="no", learning_rate=0.0, use_cpu=True, **{option: checkpointing},
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, data_collator=lambda batch: collate(processor, batch),
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
        losses.append([entry[name] for entry in trainer.state.log_history[:2] for name in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_model_trained_with_its_processor_still_ends_its_turns(model, processor, rows, tmp_path):
    """Trainer writes the tokenizer's end token, which is not that of a turn, into the configs."""
    arguments = TrainingArguments(
        str(tmp_path), report_to="none", remove_unused_columns=False, max_steps=1, save_strategy="no", use_cpu=True,
        learning_rate=0.0,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=lambda batch: collate(processor, batch),
        processing_class=processor,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    tuned = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, trust_remote_code=True).eval()
    saved = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    tiles = saved.image_processor(Image.open(SHIPPED / "picture.png"), return_tensors="pt")["pixel_values"]
    assert tuned.chat(saved.tokenizer, tiles, "<image>\nHow many objects are there?", {"max_new_tokens": 16}) == "six"


# --- TRL -------------------------------------------------------------------------------------------------------------


def common(tmp_path):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 1, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
    }  # fmt: skip


def train_one_step(trainer) -> dict[str, float]:
    """What is logged; checks that every layer's weights were moved."""
    before = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    still = [n for n, p in trainer.model.named_parameters() if "norm" not in n and torch.equal(p, before[n])]
    assert not still
    return trainer.state.log_history[0]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="TRL wants Transformers 5.18 for it")
@with_old_names
def test_trl_sft_trains_the_answers_alone(trl, model, processor, rows, tmp_path):
    from datasets import Dataset

    arguments = trl.SFTConfig(**common(tmp_path), assistant_only_loss=True, max_length=None, shuffle_dataset=False)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)
    batch = trainer.data_collator([dict(row) for row in rows])
    expected = [ConversationEncoder(processor)(row)["labels"] for row in rows]
    given = [labels[mask.bool()] for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True)]
    assert [labels.tolist() for labels in given] == [labels.tolist() for labels in expected]
    assert 0 < train_one_step(trainer)["loss"] < 5


def preference(processor, row, rejected):
    """As docs/tools.md shows it."""
    (question, answer) = with_images(row)[:2]
    return {
        "prompt": processor.apply_chat_template([question], tokenize=False) + "<|im_start|>",
        "chosen": f"assistant\n{answer['content']}<|im_end|>",
        "rejected": f"assistant\n{rejected}<|im_end|>",
        "images": row["images"],
    }


@with_old_names
def test_trl_dpo_compares_answers_in_the_tokens_that_the_model_writes(trl, model, processor, rows, tmp_path):
    from datasets import Dataset

    pairs = [preference(processor, row, "nothing") for row in rows]
    arguments = trl.DPOConfig(**common(tmp_path), max_length=None, trust_remote_code=True)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=processor)
    batch = trainer.data_collator([dict(pair) for pair in pairs])
    ids, mask = batch["input_ids"][: len(rows)], batch["attention_mask"][: len(rows)].bool()  # chosen, then rejected
    for row, given, is_token in zip(rows, ids, mask, strict=True):
        expected = ConversationEncoder(processor)(row | {"messages": row["messages"][:2]})["input_ids"]
        assert given[is_token].tolist() == expected.tolist()
    assert train_one_step(trainer)["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: it starts as the reference


@with_old_names
def test_trl_grpo_rewards_answers_about_pictures_of_several_tiles(trl, model, processor, rows, tmp_path):
    from datasets import Dataset

    prompts = [
        {"prompt": row["messages"][:1], "answer": row["messages"][1]["content"], "images": row["images"]}
        for row in rows
    ]
    prompts.sort(key=lambda prompt: prompt["images"][0].width, reverse=True)
    first = prompts[0]["images"]  # the step is made with the first prompt
    assert len(processor.image_processor(first)["pixel_values"]) > len(first)
    seen = []

    def reward(completions, answer, **kwargs):
        texts = [completion[0]["content"].strip() for completion in completions]
        seen.extend(zip(texts, answer, strict=True))
        return [float(index % 2) for index in range(len(texts))]

    arguments = trl.GRPOConfig(
        **common(tmp_path), num_generations=4, max_completion_length=8, temperature=0.01, shuffle_dataset=False
    )
    trainer = trl.GRPOTrainer(
        model,
        args=arguments,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        processing_class=processor,
    )
    trainer.train()
    assert len(seen) == 4 and all(given == expected for given, expected in seen)


@with_old_names
def test_trl_refuses_to_pack_or_cut_rows_with_pictures(trl, model, processor, rows, tmp_path):
    from datasets import Dataset

    def trainer(**options):
        arguments = trl.SFTConfig(**common(tmp_path), **options)
        return trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor)

    with pytest.raises(ValueError, match="Packing is not supported for vision datasets"):
        trainer(packing=True)
    with pytest.raises(ValueError, match="max_length=12 leaves"):
        trainer(max_length=12).train()
