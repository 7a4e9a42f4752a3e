"""A conversation goes on from what was read, and says what it would say had everything been read again."""

import copy
import itertools
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conversations import picture
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from mmmamba.cache_mmmamba import CACHE
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import chat_template
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor
from mmmamba.modeling_mmmamba import MmMambaModel
from mmmamba.processing_mmmamba import encode_conversation
from mmmamba.tokenization_mmmamba import MmMambaTokenizer


GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {"max_new_tokens": 8, "do_sample": False}
TOKENS_PER_TILE = 4


def make_tokenizer(template="internlm2-chat"):
    tokenizer = MmMambaTokenizer(str(GOLDEN / "tokenizer" / "tokenizer.model"))
    tokenizer.chat_template = chat_template(template)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=["linear", "hybrid", "teacher"])
def chat_model(request, tokenizer):
    return make_chat_model(request.param, tokenizer)


def make_chat_model(kind, tokenizer, **text):
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return tiny_model(kind, image_token_id=image_token, vocab_size=len(tokenizer), **text)


def tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def read(monkeypatch):
    """How many tokens every pass through the network has read."""
    lengths, forward = [], MmMambaModel.forward

    def counting(self, input_ids=None, **kwargs):
        lengths.append((kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(MmMambaModel, "forward", counting)
    return lengths


def assert_has_read(state, turns, question, counts):
    """The state is that of a cache that has read the conversation's beginning at once."""
    ids = encode_conversation(state.tokenizer, question, turns, counts, TOKENS_PER_TILE, state.system_message)
    assert ids[: len(state)] == state.ids
    pictures = [tiles(count, seed) for seed, count in enumerate(counts)]
    pictures = {"pixel_values": torch.cat(pictures)} if pictures else {}
    cache = state.model(torch.tensor([state.ids]), use_cache=True, **pictures)[CACHE]
    torch.testing.assert_close(state.cache.tensors(), cache.tensors(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("system_message", [None, "You look at pictures."])
def test_every_turn_is_as_if_everything_were_read_again(chat_model, tokenizer, system_message):
    state = chat_model.conversation(tokenizer, system_message)
    turns, counts = [], []
    for seed, (question, count) in enumerate([("Compare <image> with\n", 3), ("Why? <image>", 1), ("Is it? ", 0)]):
        new = tiles(count, seed) if count else None
        counts += [count] if count else []
        pictures = torch.cat([tiles(n, i) for i, n in enumerate(counts)])
        options = {"num_patches_list": counts, "system_message": system_message}
        expected = chat_model.chat(tokenizer, pictures, question, OPTIONS, list(turns), **options)
        assert state.ask(question, OPTIONS, new) == expected
        turns.append((question, expected))
        assert_has_read(state, turns[:-1], question, counts)


def test_chat_reads_only_what_is_new(chat_model, tokenizer, read):
    pictures = tiles(3)
    _, history = chat_model.chat(tokenizer, pictures, "What is this?", OPTIONS, return_history=True)
    kept = len(history._kept[0][0])
    assert kept > 12  # the pictures at least
    del read[:]
    answer, longer = chat_model.chat(
        tokenizer, pictures, "Why?", OPTIONS, history, return_history=True, num_patches_list=[3]
    )
    whole = len(encode_conversation(tokenizer, "Why?", list(history), [3], TOKENS_PER_TILE))
    assert sum(read) == whole - kept + OPTIONS["max_new_tokens"] - 1
    assert answer == chat_model.chat(tokenizer, pictures, "Why?", OPTIONS, list(history), num_patches_list=[3])
    assert longer == [*history, ("Why?", answer)]


@pytest.mark.parametrize(
    "change",
    [
        lambda history, pictures: (copy.deepcopy(history), pictures),
        lambda history, pictures: (pickle.loads(pickle.dumps(history)), pictures),
        lambda history, pictures: ([(history[0][0], "another answer")], pictures),
        lambda history, pictures: (history, -2 * pictures.flip(3)),
    ],
    ids=["copied", "pickled", "rewritten", "other-pictures"],
)
def test_a_history_is_read_again_where_its_state_does_not_fit(chat_model, tokenizer, change, read):
    pictures = tiles(2)
    _, history = chat_model.chat(tokenizer, pictures, "What is this?", OPTIONS, return_history=True)
    history, pictures = change(history, pictures)
    expected = chat_model.chat(
        tokenizer, pictures, "Why?", OPTIONS, [tuple(turn) for turn in history], num_patches_list=[2]
    )
    length = sum(read)
    del read[:]
    assert chat_model.chat(tokenizer, pictures, "Why?", OPTIONS, history, num_patches_list=[2]) == expected
    whole = encode_conversation(tokenizer, "Why?", list(history), [2], TOKENS_PER_TILE)
    assert sum(read) == len(whole) + OPTIONS["max_new_tokens"] - 1 <= length


def test_a_history_can_be_asked_twice(chat_model, tokenizer):
    pictures = tiles(2)
    _, history = chat_model.chat(tokenizer, pictures, "What is this?", OPTIONS, return_history=True)
    answers = [chat_model.chat(tokenizer, pictures, "Why?", OPTIONS, history, num_patches_list=[2]) for _ in range(2)]
    assert answers[0] == answers[1]


def test_a_model_that_has_changed_reads_again(tokenizer):
    options = {"return_history": True, "history": None}
    for change in ("dtype", "weights", "inference mode"):
        model = make_chat_model("hybrid", tokenizer)
        with torch.inference_mode(change == "inference mode"):
            _, history = model.chat(tokenizer, None, "What is this?", OPTIONS, **options)
            state = model.conversation(tokenizer).extend("What is this? And <image>", tiles(1))
        if change == "dtype":
            model.float()
            with pytest.raises(ValueError, match=r"float64 when it read this, .* torch.float32"):
                state.ask("Why?", OPTIONS)
        elif change == "weights":
            for layer in model.model.layers:
                if layer.layer_type == "linear_attention":
                    layer.mamba.A_log.data += 1
        else:
            whole = "What is this? And <image>Why?"
            assert state.ask("Why?", OPTIONS) == model.chat(tokenizer, tiles(1), whole, OPTIONS)
        expected = model.chat(tokenizer, None, "Why?", OPTIONS, list(history))
        assert model.chat(tokenizer, None, "Why?", OPTIONS, history) == expected


class Adapter(torch.nn.Module):
    """A linear layer with a LoRA beside it, which speaks of itself as PEFT's layers do."""

    active_adapters, merged_adapters, disable_adapters = ("default",), (), True

    def __init__(self, base):
        super().__init__()
        self.base, self.scaling = base, {"default": 1.0}
        self.delta = torch.nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) if self.disable_adapters else self.base(x) + self.scaling["default"] * self.delta(x)


def train_one_step(model):
    model.model.layers[0].mamba.in_proj.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model.model.layers[0].mamba.in_proj.weight], lr=1.0)
    model(torch.arange(5, 30)[None], labels=torch.arange(5, 30)[None]).loss.backward()
    optimizer.step()


def switch_on(model):
    model.model.layers[0].mamba.in_proj.disable_adapters = False


def strengthen(model):
    model.model.layers[0].mamba.in_proj.scaling["default"] = 3.0


def change_behind_autograds_back(model):
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [train_one_step, switch_on, strengthen, change_behind_autograds_back])
def test_nothing_is_answered_by_other_weights_than_read_it(tokenizer, tmp_path, change):
    model = make_chat_model("linear", tokenizer)
    if change in (switch_on, strengthen):
        torch.manual_seed(0)
        model.model.layers[0].mamba.in_proj = Adapter(model.model.layers[0].mamba.in_proj)
        model.model.layers[0].mamba.in_proj.disable_adapters = change is switch_on
    _, history = model.chat(tokenizer, None, "What is this?", OPTIONS, return_history=True)
    state = model.conversation(tokenizer).extend("What is this? ")
    state.save(tmp_path / "state.safetensors")
    before = model.chat(tokenizer, None, "Why?", {"max_new_tokens": 30, "do_sample": False}, list(history))
    change(model)
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = model.chat(tokenizer, None, "Why?", options, list(history))
    assert expected != before
    assert model.chat(tokenizer, None, "Why?", options, history) == expected
    for use in (lambda: state.ask("Why?", OPTIONS), lambda: state.save(tmp_path / "other.safetensors")):
        with pytest.raises(ValueError, match="weights or active adapters are not those that read"):
            use()
    with pytest.raises(ValueError, match=r"another model's conversation.*weights"):
        ConversationState.load(tmp_path / "state.safetensors", model, tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_checkpoint_in_another_dtype_is_the_same_model(tokenizer, tmp_path):
    """bf16 weights read as fp32 are the same numbers, so what was read with them may go on."""
    model = make_chat_model("hybrid", tokenizer).to(torch.bfloat16)
    model.conversation(tokenizer).extend("What is this? And that?").save(tmp_path / "state.safetensors")
    state = ConversationState.load(tmp_path / "state.safetensors", model.float(), tokenizer)
    assert state.cache.keys(1).dtype == torch.float32
    state.ask("Why?", OPTIONS)


def in_threads(function, arguments):
    """Results of the function in as many threads at once, errors included."""
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def test_threads_that_go_on_from_one_history_do_not_disturb_each_other(chat_model, tokenizer):
    questions = ["Why?", "And then?", "Who wrote it?", "Where was that?"]
    for _ in range(3):
        _, history = chat_model.chat(tokenizer, tiles(1), "What is this?", OPTIONS, return_history=True)
        expected = [
            chat_model.chat(tokenizer, tiles(1), question, OPTIONS, list(history), num_patches_list=[1])
            for question in questions
        ]

        def ask(question, history=history):
            return chat_model.chat(tokenizer, tiles(1), question, OPTIONS, history, num_patches_list=[1])

        assert in_threads(ask, questions) == expected


def test_threads_take_turns_with_one_state(chat_model, tokenizer):
    state = chat_model.conversation(tokenizer).extend("What is this? " * 3)
    start, questions = state.fork(), ["Why?", "And then?", "Who wrote it?"]
    asked = list(zip(questions, in_threads(lambda question: state.ask(question, OPTIONS), questions), strict=True))
    # In some order, each was answered after the ones before it.
    orders = ([*order] for order in itertools.permutations(asked))
    assert any(all(replay.ask(q, OPTIONS) == a for q, a in order) for order in orders for replay in [start.fork()])
    assert state.turns == 3


def test_a_failed_turn_keeps_what_was_read(chat_model, tokenizer, read):
    _, history = chat_model.chat(tokenizer, None, "What is this? " * 10, OPTIONS, return_history=True)
    kept = len(history._kept[0][0])
    with pytest.raises(ValueError, match="empty"):
        chat_model.chat(tokenizer, None, "", OPTIONS, history)
    del read[:]
    chat_model.chat(tokenizer, None, "Why?", OPTIONS, history)
    whole = encode_conversation(tokenizer, "Why?", list(history), [], TOKENS_PER_TILE)
    assert sum(read) == len(whole) - kept + OPTIONS["max_new_tokens"] - 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_go_on_from_the_kept_state(chat_model, tokenizer, options):
    options = {"max_new_tokens": 6, "do_sample": False} | options
    state = chat_model.conversation(tokenizer).extend("What is <image> this?", tiles(1))
    single = options | {"num_return_sequences": 1}
    (expected,) = chat_model.batch_chat(tokenizer, tiles(1), ["What is <image> this? Why?"], single)
    assert state.ask(" Why?", options) == expected
    before = state.fork()
    assert state.ask("And then?", OPTIONS) == before.ask("And then?", OPTIONS)
    assert_has_read(state, [("What is <image> this? Why?", expected)], "And then?", [1])


def test_text_is_read_as_it_comes_and_as_one(chat_model, tokenizer, read):
    words = (
        "  It was the best of times,\nit was   the worst of times. naïve – 日本語 text\u3000here <|im_end|> ▁ x " * 9
    )
    state, sizes, place = chat_model.conversation(tokenizer), [1, 2, 3, 5, 50, 7, 300], 0
    while place < len(words):
        state.extend(words[place : place + sizes[0]])
        place, sizes = place + sizes[0], [*sizes[1:], sizes[0]]
    whole = encode_conversation(tokenizer, words + " Why?", None, [], TOKENS_PER_TILE)
    assert sum(read) == len(state) > len(whole) - 40
    assert_has_read(state, [], words + " Why?", [])
    del read[:]
    assert state.fork().ask(" Why?", OPTIONS) == chat_model.chat(tokenizer, None, words + " Why?", OPTIONS)
    assert sum(read[: len(read) // 2]) < 60


def test_pieces_across_spaces_are_waited_for(tokenizer):
    assert tokenizer.splits_at_spaces

    class Across(MmMambaTokenizer):
        splits_at_spaces = False

    other = Across(str(GOLDEN / "tokenizer" / "tokenizer.model"))
    other.chat_template = tokenizer.chat_template
    state = make_chat_model("linear", tokenizer).conversation(other).extend("What is this? " * 20)
    assert len(state.pending) > 200


@pytest.mark.parametrize("turns", [[("Hi", "")], [("", "Hi")], [("Hi", ""), ("", ""), ("Why?", "So.")]])
def test_turns_in_which_nothing_is_said(chat_model, tokenizer, turns):
    state = chat_model.conversation(tokenizer)
    for turn in turns:
        state.add_turn(*turn)
    state.extend("").extend("What? ").extend("")
    whole = encode_conversation(tokenizer, "What? Who?", turns, [], TOKENS_PER_TILE)
    assert whole[: len(state)] == state.ids and len(state) > len(whole) - 12
    assert state.ask("Who?", OPTIONS) == chat_model.chat(tokenizer, None, "What? Who?", OPTIONS, turns)


def test_tiles_of_another_size_are_refused(chat_model, tokenizer):
    for size in (8, 32):
        with pytest.raises(ValueError, match=f"A tile of {size} x {size} pixels gives"):
            chat_model.chat(tokenizer, torch.randn(2, 3, size, size), "What?", OPTIONS)


@pytest.mark.parametrize("as_object", [False, True])
def test_the_longest_answer_can_be_said_either_way(chat_model, tokenizer, as_object):
    from transformers import GenerationConfig

    options = {"max_length": 125, "do_sample": False}
    state = chat_model.conversation(tokenizer)
    made = []
    streamer = type("Counts", (), {"put": lambda self, value: made.append(value.numel()), "end": lambda self: None})()
    state.ask("Hello", GenerationConfig(**options) if as_object else options, streamer=streamer)
    assert sum(made) <= 125


def test_what_an_answer_calls_a_picture_is_text(chat_model, tokenizer):
    history = [("What?", "see <image>")]
    (answer,) = chat_model.batch_chat(tokenizer, None, ["Why?"], OPTIONS, history=[history])
    assert answer == chat_model.chat(tokenizer, None, "Why?", OPTIONS, history)


def test_a_changed_history_is_not_answered_from_the_kept_state(chat_model, tokenizer):
    _, history = chat_model.chat(tokenizer, None, "What is this?", OPTIONS, return_history=True)
    history[0] = ("What was that?", "A circle.")
    expected = chat_model.chat(tokenizer, None, "Why?", OPTIONS, [("What was that?", "A circle.")])
    assert chat_model.chat(tokenizer, None, "Why?", OPTIONS, history) == expected


def test_frames_one_by_one_cost_the_same_and_are_one_question(chat_model, tokenizer, read):
    state, costs = chat_model.conversation(tokenizer), []
    for seed in range(5):
        del read[:]
        state.extend(f"Frame{seed % 2}: <image>\n", tiles(2, seed))
        costs.append(sum(read))
    assert len(set(costs[1:])) == 1
    question = "".join(f"Frame{seed % 2}: <image>\n" for seed in range(5))
    assert_has_read(state, [], question + "Which?", [2] * 5)
    pictures = torch.cat([tiles(2, seed) for seed in range(5)])
    expected = chat_model.chat(tokenizer, pictures, question + "Which?", OPTIONS, num_patches_list=[2] * 5)
    assert state.ask("Which?", OPTIONS) == expected


def test_forks_go_on_without_each_other(chat_model, tokenizer):
    state = chat_model.conversation(tokenizer).extend("A long document. ")
    state.ask("What is it about?", OPTIONS)
    other = state.fork()
    first = state.ask("Why?", OPTIONS)
    assert other.turns == 1 and other.ask("Why?", OPTIONS) == first
    different = other.fork().ask("Who wrote it, and when?", OPTIONS)
    assert state.ask("Who wrote it, and when?", OPTIONS) == different


def test_saved_and_loaded_it_goes_on(chat_model, tokenizer, tmp_path):
    state = chat_model.conversation(tokenizer, "Be brief.")
    for step in range(3):
        if step == 1:
            state.ask("What is this?", OPTIONS, tiles(2))
        elif step == 2:
            state.extend("And <image> this", tiles(1))
        state.save(tmp_path / "state.safetensors")
        loaded = ConversationState.load(tmp_path / "state.safetensors", chat_model, tokenizer)
        assert (len(loaded), loaded.nbytes, loaded.turns) == (len(state), state.nbytes, state.turns)
        assert loaded.ask("Why?", OPTIONS) == state.fork().ask("Why?", OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_files_that_do_not_fit_are_refused_in_words(tokenizer, tmp_path):
    model, file = make_chat_model("linear", tokenizer), tmp_path / "state.safetensors"
    state = model.conversation(tokenizer).extend("Hello")
    state.ask("Why?", OPTIONS)
    state.save(file)
    another = make_chat_model("hybrid", tokenizer)
    trained = make_chat_model("linear", tokenizer)
    trained.model.norm.weight.data += 1
    for other, word in ((another, "layer_types"), (trained, "weights")):
        with pytest.raises(ValueError, match=f"another model's conversation.*{word}"):
            ConversationState.load(file, other, tokenizer)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    save_file(load_file(file), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"another model's conversation.*template"):
        ConversationState.load(file, model, make_tokenizer("phi3-chat"))
    distilled = make_chat_model("linear", tokenizer)
    distilled.model.layers[2].mamba.dt_bias.data += 1
    with pytest.raises(ValueError, match="weights"):
        ConversationState.load(file, distilled, tokenizer)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        state.save(tmp_path / "folder.safetensors")
    with pytest.raises(ValueError, match="cannot be written"):
        state.save(tmp_path / "nowhere" / "state.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    whole = load_file(file)
    for number, name in enumerate(("ids", "layers.1.recurrent_state")):
        save_file(
            {key: x for key, x in whole.items() if key != name}, tmp_path / f"less{number}.safetensors", metadata
        )
        save_file(whole | {name: whole[name][..., :-1].contiguous()}, tmp_path / f"cut{number}.safetensors", metadata)
    damaged = [(f"{kind}{number}", "whole conversation") for kind in ("less", "cut") for number in range(2)]
    del damaged[2]  # a linear state does not show how much it has read
    words = (("cut", "not a whole"), ("plain", "no conversation saved"), ("none", "does not exist"))
    for name, said in (*words, ("folder", "cannot be read"), *damaged):
        with pytest.raises(ValueError, match=said):
            ConversationState.load(tmp_path / f"{name}.safetensors", model, tokenizer)


def test_the_state_of_a_linear_model_has_one_size(tokenizer):
    sizes = {}
    for kind in ("linear", "hybrid"):
        state = make_chat_model(kind, tokenizer).conversation(tokenizer)
        sizes[kind] = []
        for _ in range(2):
            state.ask("A rather long question about nothing? " * 5, OPTIONS)
            sizes[kind].append((state.nbytes, len(state)))
    assert sizes["linear"][0][0] == sizes["linear"][1][0]
    (small, first), (large, second) = sizes["hybrid"]
    assert large - small == (second - first) * 2 * 2 * 8 * 8  # keys and values of two heads of eight fp64 numbers


def test_what_fails_leaves_the_conversation_as_it_was(chat_model, tokenizer, monkeypatch):
    for turns in range(2):
        state = chat_model.conversation(tokenizer)
        if turns:
            state.ask("What is this?", OPTIONS, tiles(1))
        expected = state.fork().ask("Why?", OPTIONS)
        before = (list(state.ids), state.pending, state.in_turn, state.turns)
        failures = [
            ("", OPTIONS, None, None),
            ("<image> and <image>", OPTIONS, tiles(1), None),
            ("Why?", OPTIONS, tiles(1), [2]),
            ("Why?", {"max_new_tokens": -1}, None, None),
            ("Why?", OPTIONS | {"streamer": Interrupting()}, None, None),
        ]
        for arguments in failures:
            with pytest.raises((ValueError, KeyboardInterrupt)):
                state.ask(*arguments)
            assert (state.ids, state.pending, state.in_turn, state.turns) == before
        assert state.ask("Why?", OPTIONS) == expected


class Interrupting:
    """A streamer whose user presses Ctrl-C at the third token."""

    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("the answer never ended")


@pytest.mark.parametrize("template", ["internlm2-chat", "phi3-chat", "internlm2-base", "internlm2-basev0"])
def test_every_template_of_the_package_can_be_taken_apart(tokenizer, template):
    other = make_tokenizer(template)
    state = make_chat_model("linear", tokenizer).conversation(other)
    turns = [("One", "Two"), ("Three", "Four")]
    for turn in turns:
        state.add_turn(*turn)
    state.extend("Five")
    assert state.ids == encode_conversation(other, "Five", turns, [], TOKENS_PER_TILE)[: len(state)]
    assert len(state) > 0 or template == "phi3-chat"  # this tokenizer has none of its control tokens


def test_chat_needs_no_template_that_can_be_taken_apart(chat_model, tokenizer):
    numbered = make_tokenizer()
    numbered.chat_template = (
        "{% for m in messages %}<|im_start|>{{ loop.length }} {{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="renders a turn otherwise"):
        chat_model.conversation(numbered)
    answer, history = chat_model.chat(numbered, tiles(1), "What?", OPTIONS, return_history=True)
    assert history == [("<image>\nWhat?", answer)] and type(history) is list


@pytest.mark.parametrize("size", [1, 5, 16])
def test_pieces_change_nothing(chat_model, tokenizer, size):
    pictures, question = tiles(3), "One: <image>\nTwo: <image>"
    arguments = (tokenizer, pictures, question, OPTIONS)
    expected = chat_model.chat(*arguments, num_patches_list=[2, 1])
    chat_model.config.text_config.prefill_chunk_size = size
    try:
        assert chat_model.chat(*arguments, num_patches_list=[2, 1]) == expected
        batch = chat_model.batch_chat(tokenizer, pictures, [question, "Hello"], OPTIONS, num_patches_list=[[2, 1], 0])
        assert batch[0] == expected
    finally:
        chat_model.config.text_config.prefill_chunk_size = None


def test_the_saved_description_is_readable(tokenizer, tmp_path):
    state = make_chat_model("linear", tokenizer).conversation(tokenizer)
    state.ask("Hello", OPTIONS)
    state.save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        described = json.loads(file.metadata()["mmmamba"])
    assert described["turns"] == 1 and described["model"]["layer_types"] == ["linear_attention"] * 4


def test_a_model_may_move_weights_when_it_first_runs(tokenizer):
    """As bitsandbytes does, which casts biases then."""
    expected = make_chat_model("hybrid", tokenizer).chat(tokenizer, tiles(1), "What is this?", OPTIONS)
    model = make_chat_model("hybrid", tokenizer)

    def move(module, args):
        module.weight.data = module.weight.data.clone()
        hook.remove()

    hook = model.model.norm.register_forward_pre_hook(move)
    state = model.conversation(tokenizer)
    assert state.ask("What is this?", OPTIONS, tiles(1)) == expected
    move(model.model.norm, ())
    with pytest.raises(ValueError, match="were moved since"):
        state.ask("Why?", OPTIONS)


def test_a_state_can_be_copied_and_pickled(tokenizer):
    state = make_chat_model("hybrid", tokenizer).conversation(tokenizer).extend("What is this? And that?")
    expected = state.fork().ask("Why?", OPTIONS)
    assert copy.deepcopy(state).ask("Why?", OPTIONS) == expected
    assert pickle.loads(pickle.dumps(state)).ask("Why?", OPTIONS) == expected


def test_answers_may_be_asked_for_as_generate_returns_them(chat_model, tokenizer):
    expected = chat_model.chat(tokenizer, None, "Hello", OPTIONS)
    options = OPTIONS | {"return_dict_in_generate": True, "output_scores": True}
    assert chat_model.chat(tokenizer, None, "Hello", options) == expected
    assert chat_model.batch_chat(tokenizer, None, ["Hello"], options) == [expected]


def test_pictures_are_taken_as_they_are(chat_model, tokenizer):
    one, two = picture(48, 16), picture(16, 32)
    cut = MmMambaImageProcessor(size={"height": 16, "width": 16})(images=[one, two], return_tensors="pt")
    first, second = cut["pixel_values"].split(cut["num_patches"].tolist())
    expected, state = (chat_model.conversation(tokenizer) for _ in range(2))
    expected.extend("<image>", first).add_turn("", "An answer", cut["pixel_values"], [4, 3])
    state.extend("<image>", one).add_turn("", "An answer", [one, two])
    assert state.ask("<image>?", OPTIONS, [*second]) == expected.ask("<image>?", OPTIONS, second)
    assert state.ids == expected.ids
    torch.testing.assert_close(state.cache.tensors(), expected.cache.tensors(), rtol=0, atol=0)


def test_prefill_chunk_size_is_how_much_is_read_at_once(chat_model, tokenizer, read):
    long, pictures = "A rather long question about nothing? " * 9, tiles(3)
    expected = chat_model.conversation(tokenizer).extend(long).ask("<image>", OPTIONS, pictures)
    expected_second = chat_model.chat(tokenizer, None, long, OPTIONS, history=[(long, long)])
    assert max(read) > 100
    read.clear()
    state = chat_model.conversation(tokenizer).extend(long, prefill_chunk_size=7)
    options = OPTIONS | {"prefill_chunk_size": 7}
    assert state.ask("<image>", options, pictures) == expected
    assert chat_model.chat(tokenizer, None, long, options, history=[(long, long)]) == expected_second
    assert max(read) == 7


def test_a_conversation_has_its_own_cache(chat_model, tokenizer):
    state = chat_model.conversation(tokenizer).extend("Hello")
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(ValueError, match="has a cache"):
            state.ask("Why?", OPTIONS | options)


@pytest.mark.deprecations("Transformers' own assistant passes options beside a generation config")
def test_teachers_are_assisted_in_chat_and_states_say_that_they_cannot(chat_model, tokenizer):
    arguments = (tokenizer, tiles(2), "What is this? What is this?")
    answer, history = chat_model.chat(*arguments, OPTIONS, return_history=True)
    expected = chat_model.chat(tokenizer, tiles(2), "Why?", OPTIONS, history=list(history))
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": make_chat_model("teacher", tokenizer)}):
        options = OPTIONS | assistance
        if "linear_attention" in chat_model.config.text_config.layer_types:
            with pytest.raises(ValueError, match="stateful"):
                chat_model.chat(*arguments, options)
            continue
        assert chat_model.chat(*arguments, options) == answer
        assert chat_model.chat(tokenizer, tiles(2), "Why?", options, history=list(history)) == expected
        assert chat_model.conversation(tokenizer).extend(arguments[2], tiles(2)).ask("", options) == answer


@pytest.mark.deprecations("Transformers' own assistant passes options beside a generation config")
def test_an_assistant_sees_the_pictures(tokenizer, monkeypatch):
    model, assistant = (make_chat_model("teacher", tokenizer) for _ in range(2))
    seen, encode = [], type(model).get_image_features

    def recording(self, pixel_values):
        seen.append("assistant" if self is assistant else "model")
        return encode(self, pixel_values)

    monkeypatch.setattr(type(model), "get_image_features", recording)
    model.chat(tokenizer, tiles(2), "What?", OPTIONS | {"assistant_model": assistant})
    assert set(seen) == {"model", "assistant"}
