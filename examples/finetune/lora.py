"""Fine-tunes a model on your own picture conversations with LoRA (arXiv 2106.09685), on one device.

    python -m mmmamba.examples.finetune.lora train.jsonl runs/adapter --model my-model/ --test test.jsonl

A line of `train.jsonl` is one conversation in a format of docs/distill.md, such as

    {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWho is it?"},
                                           {"from": "gpt", "value": "Mrs Whiskers."}]}

with pictures beside it. The output folder gets the adapter with the processor, `loss.png`, and in `merged/` a model
folder like any other. Only answers are trained. `make_trainer` is all the setup there is.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from mmmamba.conversion.distillation.data import ConversationDataset, open_data, pad
from mmmamba.conversion.publish import whole_folder
from mmmamba.examples.shapes.folder import SHIPPED


try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    raise ImportError('Fine-tuning needs PEFT; run `pip install -e ".[finetune]"`.') from None


def make_trainer(model_folder: str | Path, train_file: str | Path, output: str | Path, **options) -> Trainer:
    """A Trainer of Transformers for LoRA on the answers of conversations.

    Args:
        model_folder: The model to start from, a folder or a name on the Hub.
        train_file: Conversations as JSON lines; paths of images start at its folder.
        output: Folder for the adapter.
        options: More of `TrainingArguments`.
    """
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=dtype, trust_remote_code=True)
    # All linear layers but lm_head: attention, Mamba-2 mixers, MLPs and the projector of pictures.
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
    return Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(str(output), report_to="none", remove_unused_columns=False, **options),
        train_dataset=open_data({"file": str(train_file)}, processor),
        data_collator=partial(collate, pad_token_id=processor.tokenizer.pad_token_id),
        processing_class=processor,  # is saved beside the adapter
    )


def collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows to a padded batch; says which records were left out, such as one whose picture is missing."""
    batch = pad(rows, pad_token_id)
    for name, reason in batch.pop("bad_rows", []):
        print(f"{name} is left out: {reason}.")
    return batch


def plot_loss(log: list[dict[str, float]], file: Path) -> None:
    """Draws the training loss over steps, as a Trainer logs it in `trainer.state.log_history`."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log if "loss" in entry), strict=True)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, losses)
    axes.set(xlabel="step", ylabel="loss on answers", yscale="log", title="Fine-tuning with LoRA")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


@torch.inference_mode()
def first_answers(model, processor, dataset: ConversationDataset) -> list[tuple[str, str]]:
    """The model's and the given answer to the first question of each conversation."""
    model.eval()
    image_token, answers = processor.image_token_id, []
    for row in (dataset[index] for index in range(len(dataset))):
        ids, is_answer = row["input_ids"].tolist(), (row["labels"] != -100).tolist()
        start = is_answer.index(True)
        end = next((place for place in range(start, len(ids)) if not is_answer[place]), len(ids))
        prompt = row["input_ids"][None, :start].to(model.device)
        tiles = ids[:start].count(image_token) // processor.tokens_per_tile
        pictures = {"pixel_values": row["pixel_values"][:tiles].to(model.device, model.dtype)} if tiles else {}
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **pictures,
            max_new_tokens=end - start + 16,
            do_sample=False,
        )
        both = processor.batch_decode([output[0, start:].tolist(), ids[start:end]], skip_special_tokens=True)
        answers.append((both[0].strip(), both[1].strip()))
    return answers


def report(title: str, answers: list[tuple[str, str]]) -> float:
    """Prints the share of right answers, and the first wrong one. Returns the share."""
    right = sum(given == expected for given, expected in answers) / len(answers)
    wrong = next((f"; {given!r} instead of {expected!r}" for given, expected in answers if given != expected), "")
    print(f"{title}: {right:.0%} of {len(answers)} answers are right{wrong}.")
    return right


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="conversations to train on, as JSON lines")
    parser.add_argument("output", type=Path, help="folder for adapter, plot and merged model")
    parser.add_argument("--model", default=SHIPPED / "hybrid", help="model folder (the small hybrid one)")
    parser.add_argument("--test", type=Path, help="conversations whose first questions are asked before and after")
    parser.add_argument("--steps", type=int, default=200, help="training steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations per step (%(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="the highest; 1e-4 for large models (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"{args.output} exists; name a folder that does not.")
    for file in (args.data, args.test):
        if file is not None and not file.is_file():
            parser.error(f"{file} is no file; give conversations as JSON lines.")
    try:
        trainer = make_trainer(
            args.model,
            args.data,
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=max(1, args.steps // 50),
            save_strategy="no",
            bf16=torch.cuda.is_available(),
        )
        processor = trainer.processing_class
        questions = open_data({"file": str(args.test)}, processor) if args.test else None
    except (OSError, ValueError) as error:  # a model or conversations that cannot be read
        parser.error(str(error))
    if questions:
        report("Before", first_answers(trainer.model, processor, questions))
    trainer.train()
    trainer.save_model()  # the adapter, and the processor
    plot_loss(trainer.state.log_history, args.output / "loss.png")
    merged = trainer.model.merge_and_unload()
    with whole_folder(args.output / "merged") as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
    if questions:
        report("After", first_answers(merged, processor, questions))


if __name__ == "__main__":
    main()
