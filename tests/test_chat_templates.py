"""Chats of language models have the ids that Transformers gives them, whatever their chat template writes."""

import pytest
import torch
from language_models import TEMPLATE, tokenizer, write_source
from tokenizers import processors
from transformers import AutoProcessor, AutoTokenizer

from mmmamba.conversion.convert import VisionPlan, convert
from mmmamba.conversion.distillation.data.encoding import ConversationEncoder
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.tokenization_mmmamba import load_tokenizer


# In the manner of these models: who writes the beginning token, and whether messages are trimmed.
TEMPLATES = {
    "ChatML": TEMPLATE,
    "Llama 3": (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
    ),
    "Llama 2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
HISTORY = [("  What is it? \n", " the time\n"), ("\n the capital <|im_end|> \n", "Paris ")]
GREEDY = {"max_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request):
    return TEMPLATES[request.param]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adds a beginning token"])
def folders(request, template, tmp_path_factory):
    """A language model whose tokenizer may put a beginning token before every text, and its conversion."""
    root = tmp_path_factory.mktemp("templates")
    write_source(root / "source", with_tokenizer=False)
    theirs = tokenizer()
    if request.param:
        theirs.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    theirs.chat_template = template
    theirs.save_pretrained(root / "source")
    convert(root / "source", root / "ours")
    return root / "source", root / "ours"


@pytest.fixture(scope="module")
def expected(folders):
    """The ids of messages, by Transformers' own tokenizer."""
    theirs = AutoTokenizer.from_pretrained(folders[0])

    def ids(history, *last, **options) -> list[int]:
        messages = as_messages(history, *last)
        return theirs.apply_chat_template(messages, **{"add_generation_prompt": True, **options})["input_ids"]

    return ids


@pytest.fixture
def model(folders, monkeypatch):
    """The converted model; `prompts` are the ids that were given to its `generate`."""
    model = MmMambaForConditionalGeneration.from_pretrained(folders[1]).eval()
    generate, model.prompts = model.generate, []

    def recorded(**arguments):
        model.prompts.append(arguments["input_ids"][0].tolist())
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", recorded)
    return model


def as_messages(history, *last):
    said = [text for turn in history for text in turn] + list(last)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def without_typed_tokens(history):
    return [tuple(text.replace("<|im_end|>", "") for text in turn) for turn in history]


@pytest.mark.parametrize("history", [[], without_typed_tokens(HISTORY)], ids=["first", "third"])
def test_the_ids_of_a_chat_are_those_of_transformers(history, folders, expected, model):
    ours, question = load_tokenizer(folders[1]), "  And  the\tcapital? \n"
    wanted = expected(history, question)
    assert ours.apply_chat_template(as_messages(history, question), add_generation_prompt=True)["input_ids"] == wanted
    model.chat(ours, None, question, GREEDY, history=history)
    model.chat(ours, None, question, {**GREEDY, "use_cache": False}, history=history)
    model.batch_chat(ours, None, [question], GREEDY, history=[history])
    assert model.prompts == [wanted] * 3


def test_a_turn_that_comes_in_pieces_is_the_turn_as_a_whole(folders, expected, model):
    ours, history = load_tokenizer(folders[1]), without_typed_tokens(HISTORY)
    state = model.conversation(ours)
    for question, answer in history:
        state.add_turn(question, answer)
    *pieces, last = (" \n", " And the  ", " capital", " of France? ", " ", "\n")
    for piece in pieces:
        state.extend(piece)
    state.ask(last, GREEDY)
    assert model.prompts == [expected(history, "".join(pieces) + last)]


def test_typed_control_tokens_add_none(folders, expected, model):
    ours = load_tokenizer(folders[1])
    model.chat(ours, None, "x", GREEDY, history=HISTORY)
    end, (ids,) = ours.convert_tokens_to_ids("<|im_end|>"), model.prompts
    assert ids.count(end) == expected(without_typed_tokens(HISTORY), "x").count(end)
    assert "<|im_end|>" in ours.decode([token for token in ids if token != end])


def test_students_are_trained_on_the_ids_that_they_are_asked_with(folders, expected):
    history = without_typed_tokens(HISTORY)
    example = ConversationEncoder(load_tokenizer(folders[1]))({"messages": as_messages(history)})
    assert list(example["input_ids"]) == expected(history, add_generation_prompt=False)


def test_a_processor_adds_no_beginning_token_either(folders, expected, tmp_path):
    convert(folders[0], tmp_path / "ours", vision=VisionPlan(1, image_size=16, patch_size=4))
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is the time?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    wanted = expected([], "What is the time?")
    assert processor.apply_chat_template(messages, **options)["input_ids"] == [wanted]
    padded = processor.apply_chat_template(
        messages, **options, return_tensors="pt", processor_kwargs={"padding": "max_length", "max_length": 80}
    )
    assert padded["input_ids"].shape == (1, 80)
    assert torch.equal(padded["input_ids"][padded["attention_mask"].bool()], torch.tensor(wanted))


def test_placeholders_of_pictures_are_text_to_a_model_that_reads_text_only(folders, expected, model):
    ours, question = load_tokenizer(folders[1]), "What are <image>, <video> and <img><IMG_CONTEXT></img> in XML?"
    history = [(question, question)]
    model.chat(ours, None, question, GREEDY, history=history)
    model.batch_chat(ours, None, [question], GREEDY, history=[history])
    state = model.conversation(ours)
    state.add_turn(*history[0])
    state.ask(question, GREEDY)
    assert model.prompts == [expected(history, question)] * 3
