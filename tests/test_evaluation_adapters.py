"""The adapters for VLMEvalKit and lmms-eval answer as `chat` does, on top of these packages' own base classes.

Both packages are downloaded from PyPI without their many dependencies; only the modules that an adapter uses are
imported, with stubs for their other imports. VLMEvalKit is on PyPI only as ms-vlmeval, ModelScope's distribution,
whose `BaseModel` differs from the repository's in its imports alone.
"""

import importlib
import importlib.util
import logging
import math
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from language_models import write_source
from model_folders import modules_cache, self_contained_copy
from PIL import Image

import mmmamba
from mmmamba.conversion.convert import convert
from mmmamba.examples.shapes import world
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


FOLDER = Path(mmmamba.__file__).parent / "examples"
HYBRID = FOLDER / "shapes" / "hybrid"
ADAPTERS = FOLDER / "evaluation"
EXAMPLES = [world.example("test", 0, index) for index in range(22)]  # two of each kind, with one to three pictures


def unpacked(config, distribution: str, version: str, package: str) -> Path:
    """A folder with a package from PyPI, without its dependencies; downloaded once."""
    folder = Path(config.cache.mkdir("evaluation")) / f"{distribution}-{version}"
    with FileLock(f"{folder}.lock"):  # tests run in several processes
        return _unpacked(folder, distribution, version, package)


def _unpacked(folder: Path, distribution: str, version: str, package: str) -> Path:
    if not (folder / package).is_dir():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        done = subprocess.run(
            [*download, "--only-binary", ":all:", "--dest", str(folder), f"{distribution}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(
                f"{distribution} {version}, whose base class the adapter is tested with, cannot be downloaded: "
                f"{done.stderr.strip().splitlines()[-1:]}"
            )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folder, [name for name in files.namelist() if name.startswith(f"{package}/")])
    return folder


def stub_module(name: str, path: Path | None = None, **contents) -> types.ModuleType:
    """Puts a module into `sys.modules`; with a path, a package whose own __init__ is not run."""
    module = types.ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    for key, value in contents.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


@pytest.fixture(scope="module", autouse=True)
def clean_modules(tmp_path_factory):
    """Removes imported modules and stubs afterwards, and keeps remote code out of the user's cache."""
    modules, path = dict(sys.modules), list(sys.path)
    with modules_cache(tmp_path_factory.mktemp("modules")):
        yield
    for name in set(sys.modules) - set(modules):
        if name.split(".")[0] in {
            "vlmeval",
            "lmms_eval",
            "loguru",
            "evaluate",
            "pytz",
            "sty",
            "validators",
        }:
            del sys.modules[name]
    sys.path[:] = path


@pytest.fixture(scope="module")
def chat():
    """The package's own answer: (pictures, question) -> text."""
    model = MmMambaForConditionalGeneration.from_pretrained(HYBRID, dtype=torch.float32).eval()
    tokenizer = MmMambaTokenizer.from_pretrained(HYBRID)
    image_processor = MmMambaImageProcessor.from_pretrained(HYBRID)

    def answer(pictures, question, **options):
        tiles, counts = None, None
        if pictures:
            vision = image_processor(pictures, return_tensors="pt")
            tiles, counts = vision["pixel_values"], vision["num_patches"].tolist()
        options = {"max_new_tokens": 48, "do_sample": False, **options}
        return model.chat(tokenizer, tiles, question, options, num_patches_list=counts)

    return answer


@pytest.fixture(scope="module")
def expected(chat):
    """What `chat` answers to each question of `EXAMPLES`."""
    return [
        chat(draw_pictures(example), "<image>" * len(example.pictures) + "\n" + example.question)
        for example in EXAMPLES
    ]


def draw_pictures(example) -> list[Image.Image]:
    return [picture.draw() for picture in example.pictures]


def count_right(answers) -> int:
    return sum(answer == example.answer for answer, example in zip(answers, EXAMPLES, strict=True))


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """The hybrid as a folder that holds its code, as models on the Hub do."""
    return self_contained_copy("hybrid", tmp_path_factory.mktemp("hub") / "hybrid")


# --- VLMEvalKit ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vlmevalkit(request):
    """The adapter's module, on the real `vlmeval.vlm.base` and `vlmeval.smp`."""
    folder = unpacked(request.config, "ms-vlmeval", "0.0.20", "vlmeval") / "vlmeval"
    # vlmeval/__init__.py turns off the verification of certificates; vlm/__init__.py imports every model.
    stub_module("vlmeval", folder)
    stub_module("vlmeval.vlm", folder / "vlm", __getattr__=lambda name: print)
    stub_module("vlmeval.api", __getattr__=lambda name: print)
    stub_module("vlmeval.dataset", DATASET_TYPE=lambda name: "VQA")
    stub_module("sty", fg=None)
    stub_module("validators", url=lambda text: bool(re.fullmatch(r"https?://\S+", text)))
    return load(ADAPTERS / "vlmevalkit_mmmamba.py", "vlmeval.vlm.mmmamba")


def load(file: Path, name: str) -> types.ModuleType:
    """A file as a module of another name, as if it had been copied."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vlm(vlmevalkit):
    return vlmevalkit.MmMamba(str(HYBRID), device="cpu", max_new_tokens=48)


def test_register_adds_the_model_to_vlmevalkit_by_name(vlmevalkit, hub_folder):
    vlmevalkit.register("mmMamba-shapes", model_path=str(hub_folder), device="cpu")
    config = importlib.import_module("vlmeval.config")
    assert Path(config.__file__).parent.name == "vlmeval" and len(config.supported_VLM) > 100
    model = config.supported_VLM["mmMamba-shapes"]()
    assert isinstance(model, importlib.import_module("vlmeval.vlm.base").BaseModel)
    assert type(model.model).__module__.startswith("transformers_modules.")
    assert model.use_custom_prompt("MMBench_DEV_EN") is False


def test_vlmevalkit_answers_as_chat_does(vlm, expected, tmp_path):
    answers = []
    for index, example in enumerate(EXAMPLES):
        message = []
        for number, picture in enumerate(draw_pictures(example)):
            picture.save(tmp_path / f"{index}-{number}.png")
            message.append({"type": "image", "value": str(tmp_path / f"{index}-{number}.png")})
        answers.append(vlm.generate([*message, {"type": "text", "value": example.question}], dataset="MMBench_DEV_EN"))
    assert answers == expected
    assert count_right(answers) >= 20


def test_vlmevalkit_messages_may_be_strings_parts_or_lists_of_either(vlm, chat, tmp_path):
    example = EXAMPLES[0]
    (picture,) = draw_pictures(example)
    picture.save(tmp_path / "picture.png")
    text, image = (
        {"type": "text", "value": example.question},
        {"type": "image", "value": str(tmp_path / "picture.png")},
    )
    plain = chat([picture], f"<image>\n{example.question}")
    assert vlm.generate([str(tmp_path / "picture.png"), example.question]) == plain == example.answer
    assert vlm.generate_inner([{"type": "image", "value": picture}, text]) == plain
    assert vlm.generate(example.question) == vlm.generate(text) == chat(None, example.question)
    between = [{"type": "text", "value": "Look:\n"}, image, {"type": "text", "value": example.question}]
    assert vlm.generate(between) == chat([picture], f"Look:\n<image>\n{example.question}")
    # `<image>` in a benchmark's text is text.
    assert isinstance(vlm.generate([image, {"type": "text", "value": f"<image> {example.question}"}]), str)
    with pytest.raises(AssertionError, match="video"):
        vlm.generate([{"type": "video", "value": video(tmp_path)}])


def video(folder: Path) -> str:
    (folder / "film.mp4").write_bytes(b"")
    return str(folder / "film.mp4")


def test_vlmevalkit_answers_the_last_turn_of_a_conversation(vlm):
    example = next(x for x in EXAMPLES if len(x.pictures) == 1)
    first = [{"type": "image", "value": draw_pictures(example)[0]}, {"type": "text", "value": example.question}]
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": [{"type": "text", "value": example.answer}]},
        {"role": "user", "content": [{"type": "text", "value": example.question}]},
    ]
    assert vlm.chat_inner(turns) == example.answer


# --- lmms-eval -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lmms_eval(request, tmp_path_factory):
    """The adapter's module, copied into lmms-eval as its docstring says and loaded by its registry."""
    source = unpacked(request.config, "lmms-eval", "0.7.3", "lmms_eval") / "lmms_eval"
    folder = tmp_path_factory.mktemp("lmms") / "lmms_eval"
    for part in ("__init__.py", "utils.py", "api", "models/__init__.py", "models/registry_v2.py"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (source / part).is_dir() else shutil.copyfile)(source / part, folder / part)
    (folder / "models" / "simple").mkdir()
    shutil.copyfile(ADAPTERS / "lmms_eval_mmmamba.py", folder / "models" / "simple" / "mmmamba.py")
    docstring = (ADAPTERS / "lmms_eval_mmmamba.py").read_text().split('"""')[1]
    (line,) = re.findall(r'^ {4}("mmmamba": .*)$', docstring, re.MULTILINE)
    registry = folder / "models" / "__init__.py"
    text = registry.read_text()
    assert "AVAILABLE_SIMPLE_MODELS = {\n" in text
    registry.write_text(text.replace("AVAILABLE_SIMPLE_MODELS = {\n", f"AVAILABLE_SIMPLE_MODELS = {{\n    {line}\n"))

    logger = logging.getLogger("lmms_eval")
    logger.remove = logger.add = lambda *args, **kwargs: None
    stub_module("loguru", logger=logger)
    stub_module("evaluate")
    stub_module("pytz")
    sys.path.insert(0, str(folder.parent))
    return importlib.import_module("lmms_eval.models")


class Tasks:
    """lmms-eval's requests about `EXAMPLES`, as its tasks make them."""

    def __init__(self, instance):
        self.instance = instance

    def request(self, kind, *arguments):
        metadata = {"task": "shapes", "doc_id": 0, "repeats": 1}
        return self.instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)

    def questions(self, rows, to_pictures=draw_pictures, **generation):
        place = ("shapes", "test")
        return [
            self.request("generate_until", EXAMPLES[i].question, dict(generation), to_pictures, i, *place)
            for i in rows
        ]


@pytest.fixture(scope="module")
def tasks(lmms_eval):
    return Tasks(importlib.import_module("lmms_eval.api.instance").Instance)


@pytest.fixture(scope="module")
def lmm(lmms_eval, hub_folder):
    """The model as lmms-eval's evaluator makes it from the command line."""
    cls = lmms_eval.get_model("mmmamba")
    assert cls is importlib.import_module("lmms_eval.api.registry").get_model("mmmamba")
    more = {"batch_size": "5", "max_batch_size": None, "device": "cpu"}
    model = cls.create_from_arg_string(f"pretrained={hub_folder},max_new_tokens=48", more)
    assert isinstance(model, importlib.import_module("lmms_eval.api.model").lmms)
    assert type(model.model).__module__.startswith("transformers_modules.")
    model.task_dict = {"shapes": {"test": EXAMPLES}}
    return model


def test_lmms_eval_answers_as_chat_does(lmm, tasks, expected):
    requests = tasks.questions(range(len(EXAMPLES)), until=["\n\n"], max_new_tokens=48, temperature=0, do_sample=False)
    before = [dict(request.args[1]) for request in requests]
    answers = lmm.generate_until(requests)
    assert answers == expected
    assert count_right(answers) >= 20
    assert [request.args[1] for request in requests] == before, "a task's arguments are its own"


def test_lmms_eval_answers_requests_of_different_tasks_in_one_call(lmm, tasks, expected, chat, tmp_path):
    """Requests of several tasks, arguments, splits and kinds of pictures in one call are answered in order."""

    def as_paths(example):
        for number, picture in enumerate(draw_pictures(example)):
            picture.save(tmp_path / f"{EXAMPLES.index(example)}-{number}.png")
        return [str(tmp_path / f"{EXAMPLES.index(example)}-{number}.png") for number in range(len(example.pictures))]

    lmm.task_dict["reversed"] = {"val": EXAMPLES[::-1]}
    single = next(i for i, example in enumerate(EXAMPLES) if len(example.pictures) == 1)
    asked = EXAMPLES[single].question
    long = max(range(len(EXAMPLES)), key=lambda i: len(expected[i]))
    requests = [
        *tasks.questions([3, 4], to_pictures=as_paths),
        tasks.request("generate_until", EXAMPLES[-1].question, {}, draw_pictures, 0, "reversed", "val"),
        *tasks.questions([long, long], max_new_tokens=1),
        *tasks.questions([long]),
        *tasks.questions([6], to_pictures=lambda example: [draw_pictures(example)]),
        tasks.request("generate_until", asked, {}, lambda example: None, 0, "shapes", "test"),
        tasks.request("generate_until", f"Look:\n<image>\n{asked}", {}, draw_pictures, single, "shapes", "test"),
        tasks.request("generate_until", f"<image><image>\n{asked}", {}, draw_pictures, single, "shapes", "test"),
    ]
    example = EXAMPLES[long]
    one_token = chat(
        draw_pictures(example), "<image>" * len(example.pictures) + "\n" + example.question, max_new_tokens=1
    )
    assert one_token != expected[long]
    assert lmm.generate_until(requests) == [
        expected[3],
        expected[4],
        expected[-1],
        one_token,
        one_token,
        expected[long],
        expected[6],
        chat(None, asked),
        chat(draw_pictures(EXAMPLES[single]), f"Look:\n<image>\n{asked}"),
        expected[single],
    ]


def test_lmms_eval_answers_end_before_the_tasks_stop_strings(lmm, tasks, expected):
    number = max(range(len(EXAMPLES)), key=lambda i: len(expected[i]))
    answer = expected[number]
    middle = answer[len(answer) // 2]
    for until in (middle, [middle], ["never", middle, ""]):
        assert lmm.generate_until(tasks.questions([number], until=until)) == [answer.split(middle)[0].strip()]
    assert lmm.generate_until(tasks.questions([number], until=[])) == [answer]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, dict(do_sample=False, max_new_tokens=48)),
        (dict(temperature=0, top_p=0.9, num_beams=2), dict(do_sample=False, num_beams=2, max_new_tokens=48)),
        (dict(temperature=0.7, max_new_tokens=8), dict(do_sample=True, temperature=0.7, max_new_tokens=8)),
        (dict(do_sample=True, top_p=0.9), dict(do_sample=True, top_p=0.9, max_new_tokens=48)),
        (dict(do_sample=False, temperature=0.7), dict(do_sample=False, max_new_tokens=48)),
        (dict(do_sample=True, temperature=0), dict(do_sample=False, max_new_tokens=48)),
        (dict(until=["\n"], image_aspect_ratio="pad", top_p=None), dict(do_sample=False, max_new_tokens=48)),
    ],
)
def test_lmms_eval_generation_arguments_become_arguments_of_generate(lmm, tasks, monkeypatch, given, used):
    seen = []
    generate = type(lmm.model).generate

    def spy(self, *args, **kwargs):
        own = {"input_ids", "attention_mask", "pixel_values", "eos_token_id", "pad_token_id", "streamer"}
        seen.append({key: value for key, value in kwargs.items() if key not in own})
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(lmm.model), "generate", spy)
    lmm.generate_until(tasks.questions([0], **given))
    assert seen == [used]


def test_lmms_eval_asks_rounds_until_the_task_stops(lmm, tasks, expected):
    """Each task asks the questions that follow its document's, for one to three rounds."""
    calls = []

    def ask(document, previous_output, round_idx, previous_round_info):
        start = EXAMPLES.index(document)
        calls.append((start, round_idx, previous_round_info, len(previous_output)))
        stop = round_idx == 1 + start % 3
        follow = EXAMPLES[start + round_idx]
        return (None, None, True, previous_output, None) if stop else (
            draw_pictures(follow), follow.question, False, previous_output, round_idx
        )  # fmt: skip

    place = ("shapes", "test")
    requests = [
        tasks.request("generate_until_multi_round", EXAMPLES[i].question, {}, draw_pictures, ask, i, *place)
        for i in range(8)
    ]
    answers = lmm.generate_until_multi_round(requests)
    assert answers == [expected[i : i + 1 + i % 3] for i in range(8)]
    unwrap = importlib.import_module("lmms_eval.api.instance").unwrap_generation_output
    assert [unwrap(rounds)[0] for rounds in answers] == answers
    assert (2, 1, None, 1) in calls and (2, 2, 1, 2) in calls and (2, 3, 2, 3) in calls


def test_lmms_eval_scores_the_generated_answer_best(lmm, tasks, expected):
    """Of all answers the generated one has the highest log probability, and it alone is greedy."""
    place = ("shapes", "test")
    choices = sorted(set(expected))
    for number in (0, 1, 9):
        question = EXAMPLES[number].question
        scored = lmm.loglikelihood(
            [
                tasks.request("loglikelihood", question, f" {choice}", draw_pictures, number, *place)
                for choice in choices
            ]
        )
        assert choices[max(range(len(choices)), key=lambda i: scored[i][0])] == expected[number]
        assert [greedy for _, greedy in scored] == [choice == expected[number] for choice in choices]
        target = tasks.request(
            "loglikelihood", question, lambda example: example.answer, draw_pictures, number, *place
        )
        assert lmm.loglikelihood([target])[0] == pytest.approx(scored[choices.index(EXAMPLES[number].answer)])


def test_lmms_eval_score_is_the_models_loss(lmm, tasks):
    for number in (0, 9):
        example = EXAMPLES[number]
        request = tasks.request(
            "loglikelihood", example.question, example.answer, draw_pictures, number, "shapes", "test"
        )
        ((score, _),) = lmm.loglikelihood([request])
        pictures = [{"type": "image", "image": picture} for picture in draw_pictures(example)]
        turns = [{"role": "user", "content": [*pictures, {"type": "text", "text": example.question}]}]
        turns.append({"role": "assistant", "content": example.answer})
        inputs = lmm.processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
        ids = inputs["input_ids"]
        end = ids.shape[1] - 1  # <|im_end|>
        start = next(i for i in range(end, 0, -1) if lmm.processor.decode(ids[0, i:end]).strip() == example.answer)
        labels = torch.full_like(ids, -100)
        labels[0, start:end] = ids[0, start:end]
        with torch.no_grad():
            loss = lmm.model(**inputs, labels=labels).loss.item()
        assert score == pytest.approx(-loss * (end - start), abs=1e-4)
    # Tasks that use mutual information ask for the probability of an answer without a question.
    ((score, _),) = lmm.loglikelihood([tasks.request("loglikelihood", "", "red")])
    assert math.isfinite(score)


def test_lmms_eval_refuses_videos_and_automatic_batch_sizes(lmm, tasks):
    with pytest.raises(ValueError, match=r"film\.mp4 is a video"):
        lmm.generate_until(tasks.questions([0], to_pictures=lambda example: ["film.mp4"]))
    with pytest.raises(ValueError, match="batch_size='auto'"):
        type(lmm)(str(HYBRID), batch_size="auto")


def test_models_that_read_text_only_are_refused(lmms_eval, vlmevalkit, tmp_path):
    write_source(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "text")
    for make in (vlmevalkit.MmMamba, lmms_eval.get_model("mmmamba")):
        with pytest.raises(ValueError, match="reads text only"):
            make(str(tmp_path / "text"), device="cpu")
