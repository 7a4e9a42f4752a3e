"""Shipped models load with the package's code; folders saved or uploaded from them contain the code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import modules_cache, self_contained_copy
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import mmmamba
from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.conversion import package_code
from mmmamba.conversion.seeding import seed_folder
from mmmamba.conversion.shards import read_json
from mmmamba.examples.shapes.folder import save
from mmmamba.examples.shapes.world import example
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTokenizerFast


PACKAGE = Path(mmmamba.__file__).parent
SHAPES = PACKAGE / "examples" / "shapes"
TEACHER, LINEAR, HYBRID = FOLDERS = [SHAPES / name for name in ("teacher", "linear", "hybrid")]
MODELS = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
# Loads with every auto class, then asks the pipeline a question; the package cannot be imported.
WITHOUT_THE_PACKAGE = """
import sys
class NoPackage:
    def find_spec(name, path=None, target=None):
        if name == "mmmamba":
            raise ModuleNotFoundError("No module named 'mmmamba'")
sys.meta_path.insert(0, NoPackage)
import torch, transformers
picture, *folders = sys.argv[1:]
for folder in folders:
    parts = [
        getattr(transformers, f"Auto{name}").from_pretrained(folder, trust_remote_code=True)
        for name in (
            "Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "ModelForMultimodalLM", "Tokenizer",
            "Processor",
        )
    ] + [
        transformers.AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=True)
        for backend in ("pil", "torchvision")
    ]
    assert all(type(part).__module__.startswith("transformers_modules.") for part in parts), (folder, parts)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "How many objects are there?"}]
    ask = transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
    (answer,) = ask(text=[[{"role": "user", "content": content}]], max_new_tokens=16, return_full_text=False)
    print(repr(answer[0]["generated_text"].strip()))
"""


@pytest.fixture(autouse=True, scope="module")
def own_modules_cache(tmp_path_factory):
    """Keeps remote code out of the user's cache, here and in subprocesses."""
    with modules_cache(tmp_path_factory.mktemp("modules")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules-of-subprocesses")))
        yield


def without_the_package(*folders: Path) -> subprocess.CompletedProcess:
    """Asks the models in these folders to count the objects of a picture with six, where `mmmamba` is missing."""
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, SHAPES / "picture.png", *folders]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_folders_contain_neither_symlinks_nor_copies_of_the_packages_code(folder):
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert [file.name for file in folder.glob("*.py")] == ["mmmamba_code.py"]
    assert (folder / "mmmamba_code.py").read_text() == package_code.SOURCE


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_auto_classes_load_the_packages_classes_from_a_shipped_folder(folder):
    def load(auto, **options):
        return type(auto.from_pretrained(folder, trust_remote_code=True, **options))

    assert load(AutoConfig) is MmMambaConfig
    assert [load(auto) for auto in MODELS] == [MmMambaForConditionalGeneration] * len(MODELS)
    assert load(AutoTokenizer) is MmMambaTokenizerFast
    assert load(AutoProcessor) is MmMambaProcessor
    assert load(AutoImageProcessor, backend="pil") is MmMambaImageProcessorPil
    assert load(AutoImageProcessor, backend="torchvision") is MmMambaImageProcessor


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_the_pipelines_answer_with_a_shipped_model(task):
    question = example("test", 0, 2)
    images = [{"type": "image", "image": picture.draw()} for picture in question.pictures]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": question.question}]}]
    ask = pipeline(task, model=str(HYBRID), trust_remote_code=True, dtype=torch.float32)
    (answer,) = ask(text=[messages], max_new_tokens=16, return_full_text=False)
    assert answer[0]["generated_text"].strip() == question.answer


def test_loading_a_shipped_model_without_the_package_names_the_package():
    done = without_the_package(HYBRID)
    assert done.returncode != 0 and "packages that were not found in your environment: mmmamba" in done.stderr


def test_models_saved_uploaded_or_seeded_from_a_shipped_folder_load_without_the_package(tmp_path):
    saved, uploaded, seeded = folders = [tmp_path / name for name in ("saved", "uploaded", "seeded")]
    AutoModelForImageTextToText.from_pretrained(HYBRID, trust_remote_code=True).save_pretrained(saved)
    AutoProcessor.from_pretrained(HYBRID, trust_remote_code=True).save_pretrained(saved)
    self_contained_copy("hybrid", uploaded)
    seed_folder(TEACHER, seeded, attention=range(6))  # all layers, so that its answers are the teacher's

    done = without_the_package(*folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["'six'"] * 3
    for folder in folders:
        assert not (folder / "mmmamba_code.py").exists()
        assert "mmmamba_code" not in "".join(file.read_text() for file in folder.glob("*.json"))
    backends = {"torchvision": "MmMambaImageProcessor", "pil": "MmMambaImageProcessorPil"}
    for folder in (uploaded, seeded):
        classes = {backend: f"image_processing_mmmamba.{name}" for backend, name in backends.items()}
        assert read_json(folder / "preprocessor_config.json")["auto_map"]["AutoImageProcessor"] == classes


def test_a_self_contained_folder_is_not_changed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "other.Config"}}))
    files = {"config.json": tmp_path / "config.json"}
    assert package_code.self_contained(files) == files


def test_models_saved_among_the_shipped_ones_import_their_code_and_others_contain_it(tmp_path, monkeypatch):
    model = MmMambaForConditionalGeneration.from_pretrained(TEACHER)
    save(model, tmp_path / "elsewhere", "model", "Trained.")
    assert (tmp_path / "elsewhere" / "modeling_mmmamba.py").is_file()
    assert not (tmp_path / "elsewhere" / "mmmamba_code.py").exists()

    monkeypatch.setattr("mmmamba.examples.shapes.folder.SHIPPED", tmp_path)
    save(model, tmp_path / "shipped", "model", "Trained.")
    assert [file.name for file in (tmp_path / "shipped").glob("*.py")] == ["mmmamba_code.py"]
    assert type(AutoModel.from_pretrained(tmp_path / "shipped", trust_remote_code=True)) is type(model)
