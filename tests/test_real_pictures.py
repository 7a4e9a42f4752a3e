"""The experiment on real pictures: vendors stay apart, answers are right, and the training of the teacher resumes."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_language_models import write_source

from mmmamba.benchmarks import real_pictures
from mmmamba.benchmarks.smollm2 import grow, packages, picture_scores, pictures
from mmmamba.benchmarks.smollm2.pictures import DESIGNS, HELD_OUT, Concept, Question
from mmmamba.conversion.convert import VisionPlan, convert
from mmmamba.conversion.distillation.data.training_data import load_processor
from mmmamba.conversion.distillation.recipe import load_recipe
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


EMOJI = [  # name, subcategory, file, designs that lack it
    ("COW FACE", "animal-mammal", "1f42e", ()),
    ("COW", "animal-mammal", "1f404", ()),
    ("OX", "animal-mammal", "1f402", ()),
    ("OWL", "animal-bird", "1f989", ()),
    ("GRAPES", "food-fruit", "1f347-fe0f", ()),
    ("RED APPLE", "food-fruit", "1f34e", ()),  # two words
    ("KOALA", "animal-mammal", "1f428", ("google-blobs",)),
    ("BUG", "animal-bug", "1f41b", ()),  # a kind
    ("KEY", "lock", "1f511", ()),  # of no kind
]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def png(design: str, emoji: str) -> bytes:
    """A square of the emoji's color, in the design's size, on nothing."""
    seed = int(emoji.replace("-", ""), 16) % 1000
    color = (*np.random.default_rng(seed).integers(0, 255, 3).tolist(), 255)
    image = Image.new("RGBA", (72, 72))
    image.paste(color, (8 + list(DESIGNS).index(design), 16, 56, 56))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of pictures and conversations, and all names of files in the made-up archives."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "downloads").mkdir()
    entries = [{"name": name, "subcategory": sub, "image": f"{file}.png"} for name, sub, file, _ in EMOJI]
    with pytest.MonkeyPatch.context() as patch:
        for design, (package, prefix) in DESIGNS.items():
            name, version = package.rsplit("@", 1)
            archive_file = folder / "downloads" / f"{name.split('/')[-1]}-{version}.tgz"
            with tarfile.open(archive_file, "w:gz") as archive:
                add(archive, "package/emoji.json", json.dumps(entries).encode())
                for _, _, emoji, lacking in EMOJI:
                    if design not in lacking:
                        stem = emoji.removesuffix("-fe0f") if design == "joypixels" else emoji
                        add(archive, f"{prefix}{stem}.png", png(design, emoji))
            patch.setitem(packages.PACKAGES, package, hashlib.sha256(archive_file.read_bytes()).hexdigest())
        pictures.prepare_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    write_source(folder / "source", "tied")  # as SmolLM2
    convert(folder / "source", folder / "grown", vision=VisionPlan(1, image_size=64, patch_size=16, max_patches=1))
    return folder / "grown"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_experiment_has_a_valid_recipe_and_stands_in_a_table():
    named = {name for rows in real_pictures.TABLES.values() for name in rows.values()}
    for group in real_pictures.GROUPS.values():
        for name, overrides in group.items():
            load_recipe(real_pictures.EXPERIMENTS.recipe, overrides)
            assert name in named


def test_experiments_of_one_table_have_as_many_steps_unless_they_say_otherwise():
    overrides = {name: x for group in real_pictures.GROUPS.values() for name, x in group.items()}
    for rows in real_pictures.TABLES.values():
        for label, name in rows.items():
            if name != "teacher":
                recipe = load_recipe(real_pictures.EXPERIMENTS.recipe, overrides[name])
                steps = sum(recipe.stage(number).steps for number in recipe.stages)
                assert steps == real_pictures.BUDGET * (5 if "five times" in label else 1)


def test_concepts_are_names_of_one_word_that_all_designs_draw(prepared):
    concepts = pictures.read_concepts(prepared)
    assert concepts == [
        Concept("cow", "mammal", ("1f404", "1f42e")),
        Concept("grapes", "fruit", ("1f347-fe0f",)),
        Concept("owl", "bird", ("1f989",)),
        Concept("ox", "mammal", ("1f402",)),
    ]


def test_pictures_are_on_white_and_of_one_size(prepared):
    with Image.open(prepared / "pictures" / "fluent" / "1f989.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255)


def test_no_picture_of_the_held_out_vendor_is_trained_on(prepared):
    trained = [row["image"] for row in lines(prepared / "train.jsonl")]
    assert len(trained) == 5 * (len(DESIGNS) - 1) * pictures.VARIATIONS
    assert not any(HELD_OUT in image for image in trained)
    assert {row["image"].split("/")[0] for row in lines(prepared / "test.jsonl")} == {HELD_OUT}
    assert all(HELD_OUT not in row["image"] for row in lines(prepared / "seen.jsonl"))
    assert all((prepared / "pictures" / image).is_file() for image in trained)


def test_questions_have_the_answers_of_their_picture(prepared):
    shown = {emoji: concept for concept in pictures.read_concepts(prepared) for emoji in concept.emoji}
    asked = pictures.read_questions(prepared / "test.jsonl")
    assert {question.about for question in asked} == set(picture_scores.ABOUT)
    yes = []
    for question in asked:
        concept = shown[Path(question.image).stem]
        if question.about == "yes/no":
            named = question.question.removeprefix("Is this ").removesuffix("?").split()[-1]
            assert question.answer == ("Yes." if named == concept.name else "No.")
            yes.append(question.answer == "Yes.")
        else:
            assert question.answer.lower().split()[-1] == f"{getattr(concept, question.about)}."
    assert abs(sum(yes) - len(yes) / 2) <= 1
    answers = {question.answer for question in asked if question.about == "name"}
    assert {"A cow.", "An owl.", "Grapes."} <= answers


def test_conversations_ask_all_four_questions_in_different_orders(prepared):
    rows = [row["conversations"] for row in lines(prepared / "train.jsonl")]
    assert {len(turns) for turns in rows} == {8}
    assert len({turns[0]["value"].split()[1] for turns in rows}) == 2  # What, Is
    for turns in rows:
        assert turns[0]["value"].startswith("<image>\n") and turns[2]["value"].startswith(("What", "Is"))
        assert sum(turn["value"] == "Yes." for turn in turns) == sum(turn["value"] == "No." for turn in turns) == 1


def quick_phases() -> dict[str, grow.Phase]:
    return {
        "distill": grow.Phase(steps=4, batch_size=4, learning_rate=1e-3, save_every=2),
        "align": grow.Phase(steps=3, batch_size=2, learning_rate=1e-3, save_every=2),
        "tune": grow.Phase(steps=3, batch_size=2, learning_rate=1e-3, save_every=2),
    }


@pytest.fixture(scope="module")
def teacher(prepared, grown):
    grow.grow(prepared, grown, quick_phases())
    return prepared / "teacher"


def test_each_step_of_growing_trains_its_part_only(prepared, grown, teacher):
    first, last = load_file(grown / "model.safetensors"), load_file(teacher / "model.safetensors")
    distilled, aligned = (load_file(prepared / f"{name}.safetensors") for name in ("distilled", "aligned"))
    assert distilled.keys() == aligned.keys()
    assert {name.split(".")[0] for name in aligned} == {"vision_embeddings", "layers"}
    for name in aligned:
        assert not torch.equal(distilled[name], first[f"model.{name}"].float()), name
    moved = {name for name in first if not torch.equal(first[name].float(), last[name])}
    assert first.keys() - moved == {"model.embed_tokens.weight"}  # which is the head, too
    patches = "vision_embeddings.patch_embedding.weight"
    assert not torch.equal(distilled[patches], aligned[patches])


def test_growing_resumes_as_if_it_had_not_been_stopped(prepared, grown, teacher, tmp_path, monkeypatch):
    for name in ("pictures", "concepts.json", "train.jsonl"):
        (tmp_path / name).symlink_to(prepared / name)
    for stopped in ("distill", "align", "tune"):
        original = grow.Trainer.training_step

        def stop_after_a_checkpoint(self, *args, stopped=stopped, original=original, **kwargs):
            if Path(self.args.output_dir).name == stopped and self.state.global_step == 2:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(grow.Trainer, "training_step", stop_after_a_checkpoint)
            grow.grow(tmp_path, grown, quick_phases())
    grow.grow(tmp_path, grown, quick_phases())
    expected, found = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "teacher"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def test_the_embedding_alone_is_compared_with_names_as_it_stands_in_the_model(prepared, teacher):
    processor, concepts = load_processor(teacher), pictures.read_concepts(prepared)
    model = MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    names = grow.name_embeddings(model.model.embed_tokens.weight, processor.tokenizer, concepts)
    ids = processor.tokenizer(" grapes", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(names[1], model.model.embed_tokens.weight[ids].mean(0))
    data = grow.NamedPictures(prepared / "pictures", concepts, 100)
    normalize = grow.TileNormalizer(processor.image_processor)
    batch = grow._stack(normalize, [data[index] for index in (3, 50, 97)])
    embedding = grow.NamedEmbedding(model, names)
    with torch.no_grad():
        found = embedding(**batch)
        rows = model.get_image_features(batch["pixel_values"]).pooler_output
        rows = model(inputs_embeds=rows, output_hidden_states=True).hidden_states[1]  # behind its one layer
    cosines = torch.cosine_similarity(rows.mean(1)[:, None], names[None], dim=-1)
    torch.testing.assert_close(found["logits"], np.e**2.7 * cosines, rtol=1e-4, atol=1e-4)
    likelihood = found["logits"].log_softmax(-1)
    right = likelihood[torch.arange(3), batch["labels"]]
    distance = (rows - names[batch["labels"], None]).square().mean() / names.var()
    expected = -(0.9 * right + 0.1 * likelihood.mean(-1)).mean() + distance
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-4)


def test_a_picture_is_varied_in_the_same_way_in_every_run(prepared):
    concepts = pictures.read_concepts(prepared)
    first, second = (grow.NamedPictures(prepared / "pictures", concepts, 100) for _ in range(2))
    assert len(first) >= 100
    torch.manual_seed(1)
    assert torch.equal(first[7]["levels"], second[7]["levels"])
    assert first[7]["label"] == first[7 + len(first.pictures)]["label"]
    assert not torch.equal(first[7]["levels"], first[7 + len(first.pictures)]["levels"])


def test_scores_are_shares_of_right_answers(prepared):
    about = {"name": ("A cow.", "An owl."), "kind": ("B.",), "yes/no": ("No.", "No.", "Yes.")}
    asked = [Question("", name, "", answer) for name, answers in about.items() for answer in answers]
    said = [" A cow.", "A cow.", "B", "No.", "Yes.", "Yes."]
    assert picture_scores.exact_match(asked, said) == {"name": 0.5, "kind": 0.0, "yes/no": 2 / 3}
    assert picture_scores.most_frequent(asked) == {"name": 0.5, "kind": 1.0, "yes/no": 2 / 3}
    # Nearly the same colored squares: the nearest picture is one of the same emoji.
    nearest = picture_scores.nearest_picture(prepared, pictures.read_questions(prepared / "test.jsonl"))
    assert nearest == {"name": 1.0, "kind": 1.0}


def test_models_are_asked_about_the_pictures_and_the_control_about_none(prepared, teacher):
    model = MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32).eval()
    seen = []
    forward = model.model.vision_embeddings.forward
    model.model.vision_embeddings.forward = lambda tiles: seen.append(tiles) or forward(tiles)
    tokenizer, asked = load_tokenizer(teacher), pictures.read_questions(prepared / "test.jsonl")
    said = picture_scores.answers(model, tokenizer, asked, prepared / "pictures")
    processor = load_processor(teacher).image_processor
    with Image.open(prepared / "pictures" / asked[0].image) as picture:
        expected = processor([picture.convert("RGB")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat(seen)[:1], expected, rtol=0, atol=2 / 255 / 0.22)
    assert len(torch.cat(seen)) == len(said) == len(asked)
    seen.clear()
    blank = picture_scores.answers(model, tokenizer, asked, prepared / "pictures", blank=True)
    assert all((tiles == tiles[:1, :, :1, :1]).all() for tiles in seen)
    assert len(torch.cat(seen)) == len({question.question for question in asked})
    names = {answer for question, answer in zip(asked, blank, strict=True) if question.about == "name"}
    assert len(names) == 1


def test_kl_counts_the_answers_tokens_only(prepared, teacher):
    ours, theirs = (MmMambaForConditionalGeneration.from_pretrained(teacher, dtype=torch.float64).eval() for _ in "ab")
    ours.model.layers[1].mlp.down_proj.weight.data *= 0.5
    processor, file = load_processor(teacher), prepared / "test-conversations.jsonl"
    found = picture_scores.answers_kl(ours, theirs, processor, file, prepared / "pictures", 2)
    total = count = 0
    for index in range(2):
        row = grow.open_data({"file": str(file), "root": str(prepared / "pictures")}, processor)[index]
        labels = row.pop("labels")
        inputs = {"input_ids": row["input_ids"][None], "pixel_values": row["pixel_values"]}
        with torch.no_grad():
            ours_p, theirs_p = (model(**inputs).logits[0].softmax(-1) for model in (ours, theirs))
        kl = (theirs_p * (theirs_p / ours_p).log()).sum(-1)
        for position in range(1, len(labels)):
            if labels[position] != -100:
                total, count = total + kl[position - 1].item(), count + 1
    assert found["kl"] == pytest.approx(total / count, rel=1e-3)
    assert picture_scores.answers_kl(theirs, theirs, processor, file, prepared / "pictures", 2)["agreement"] == 1


def write_scores(experiments, name, seed, right, asked):
    """Made-up scores: this share of answers is right."""
    said = [one.answer if i < right * len(asked) else "A key." for i, one in enumerate(asked)]
    exact = {about: right for about in picture_scores.ABOUT}
    found = {
        "exact": {"test": exact, "seen": exact, "blank": exact, "most frequent": exact, "nearest picture": exact},
        "answers": {"test": said},
        "conversations": {"kl": 1 - right, "agreement": right},
        "trained tokens": 1000,
        "overrides": experiments.overrides(name),
    }
    file = experiments.scores_file(name, seed)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(found))


def test_the_report_has_means_spreads_and_pictures_with_answers(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_pictures, "FOLDER", prepared)
    experiments = dataclasses.replace(real_pictures.EXPERIMENTS, folder=tmp_path)
    asked = pictures.read_questions(prepared / "test.jsonl")
    for name, seed, right in (("teacher", 0, 1.0), ("linear", 0, 0.25), ("linear", 1, 0.75), ("hybrid-8", 0, 0.75)):
        write_scores(experiments, name, seed, right, asked)
    experiments.report(tmp_path / "report.json", [0, 1])
    students = json.loads((tmp_path / "report.json").read_text())["tables"]["student"]
    assert students["none (linear)"]["mean"]["name, %"] == 50
    assert students["none (linear)"]["spread"]["name, %"] == pytest.approx(25 * 2**0.5)
    assert students["teacher"]["seeds"] == 1 and "8, five times the tokens" not in students
    assert "| none (linear) | 50 ± 35 |" in capsys.readouterr().out
    with Image.open(tmp_path / "report.png") as drawn:
        assert len(drawn.convert("RGB").resize((50, 25)).getcolors(1250)) > 20


def test_a_finished_experiment_is_not_run_again_and_a_failed_one_is_told(tmp_path, monkeypatch, capfd):
    experiments = dataclasses.replace(real_pictures.EXPERIMENTS, folder=tmp_path, recipe=tmp_path / "missing.yaml")
    write_scores(experiments, "linear", 0, 0.5, [])
    assert experiments.run_one("linear", 0)
    assert not (tmp_path / "linear-0.log").exists()
    assert not experiments.run_one("linear", 1)
    assert "linear 1: failed, see" in capfd.readouterr().out
    assert "missing.yaml" in (tmp_path / "linear-1.log").read_text()


def test_of_a_finished_run_the_student_stays_and_the_models_before_it_do_not(tmp_path, monkeypatch):
    experiments = dataclasses.replace(real_pictures.EXPERIMENTS, folder=tmp_path)
    before = [tmp_path / "linear-0" / name for name in ("seeded", "stage-1/model", "stage-3/model")]
    for folder in (*before, tmp_path / "linear-0" / "model"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    (tmp_path / "linear-0" / "stage-1" / "loss.png").touch()
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: CompletedProcess(args, returncode=1))
    assert not experiments.run_one("linear", 0)
    assert all(folder.is_dir() for folder in before)
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: CompletedProcess(args, returncode=0))
    assert experiments.run_one("linear", 0)
    assert not any(folder.exists() for folder in before)
    assert (tmp_path / "linear-0" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "linear-0" / "stage-1" / "loss.png").is_file()
