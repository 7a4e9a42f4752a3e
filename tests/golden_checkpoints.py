"""Upstream checkpoint folders made of the golden fixtures."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


GOLDEN = Path(__file__).parent / "golden"


def checkpoint(folder: Path, name: str) -> Path:
    """A folder with one fixture's config and weights, as somebody would have downloaded it."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / name / "config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / name / "state.safetensors", folder / "model.safetensors")
    return folder


def change_weights(folder: Path, change) -> None:
    """Rewrites a single-file checkpoint after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def training_layers(*files: str) -> dict[str, dict[str, torch.Tensor]]:
    """Mixers of the training student, by upstream layer, from fixture files of `seeding`; later files win."""
    layers = {}
    for file in files:
        for name, tensor in load_file(GOLDEN / "seeding" / file).items():
            layer, parameter = name.split(".attention.")
            layers.setdefault(layer, {})[parameter] = tensor
    return layers


CONTROL = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
PICTURE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def add_tokenizer(folder: Path) -> None:
    """Gives a checkpoint the fixture's tokenizer in upstream's files, and a vocabulary of its size.

    As in the published model, the tokens of turns take the ids of the last pieces of the SentencePiece model (1200
    pieces here), and the tokens of pictures follow them.
    """
    ids = dict(enumerate(["<unk>", "<s>", "</s>"])) | dict(enumerate(CONTROL + PICTURE, 1200 - len(CONTROL)))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    values = {
        "added_tokens_decoder": {str(i): {"content": token, "special": True, **flags} for i, token in ids.items()},
        "additional_special_tokens": CONTROL + PICTURE,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "chat_template": "upstream's own, which knows no pictures",
        "tokenizer_class": "InternLM2Tokenizer",
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    shutil.copyfile(GOLDEN / "tokenizer" / "tokenizer.model", folder / "tokenizer.model")

    rows = max(ids) + 1
    config = json.loads((folder / "config.json").read_text())
    config["embedding_config"] |= {"llm_vocab_size": rows, "img_context_token_id": 1202}
    config["llm_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))

    def enlarge(tensors):
        for name in (
            "embedding_model.llm_text_embeddings",
            "language_model.output",
            "language_model.model.tok_embeddings",
        ):
            table = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = table.repeat(rows // len(table) + 1, 1)[:rows].clone()

    change_weights(folder, enlarge)
