"""HoVLE-HD, whose embedding layers read every patch and whose language layers one row for four of them.

`test_golden` compares it with upstream; here batches, pieces, caches and training are compared with one row in one
forward, and that with the equations written out.
"""

import copy
import json

import pytest
import test_generation
import test_packing
import torch
from golden_checkpoints import add_tokenizer, checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_conversation import make_chat_model, make_tokenizer
from test_distillation import gradients
from tiny_models import LAYER_TYPES, tiny_config, tiny_model, token_ids
from transformers import AutoProcessor, DynamicCache

from mmmamba.cache_mmmamba import CACHE, MmMambaCache
from mmmamba.conversation_mmmamba import ConversationState
from mmmamba.conversion.convert import convert
from mmmamba.conversion.distillation.data.collate import pack, pad
from mmmamba.conversion.distillation.end_to_end import EndToEndDistiller
from mmmamba.conversion.distillation.layerwise import LOSS_SCALE, LayerwiseDistiller, mamba_mixers
from mmmamba.conversion.distillation.losses import count_tokens
from mmmamba.conversion.seeding import seed_folder, seed_state_dict
from mmmamba.generation_mmmamba import PromptImages
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration


# `hybrid` has its attention in the embedding layers; here it is behind them.
KINDS = [*LAYER_TYPES, "attention behind"]
BEHIND = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def hd_model(kind):
    layers = {"layer_types": BEHIND} if kind == "attention behind" else {}
    return tiny_model("teacher" if layers else kind, pixel_shuffle_loc="post", **layers)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return hd_model(request.param)


def prompt(*parts, seed=0):
    return token_ids(*parts, seed=seed)[None]


def tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def written_out(model, ids, pictures):
    """Logits of one row, by loops over tokens and patches and one forward of each layer."""
    network, config = model.model, model.config.text_config
    patches = iter(network.vision_embeddings(pictures).flatten(0, 1))
    rows, patch_places = [], []
    for token in ids[0].tolist():
        for _ in range(4 if token == model.config.image_token_id else 1):
            is_patch = token == model.config.image_token_id
            patch_places += [len(rows)] if is_patch else []
            rows.append(next(patches) if is_patch else network.embed_tokens.weight[token])
    hidden, rotary = torch.stack(rows)[None], network.embedding_rotary_emb

    def run(hidden, layers, rotary):
        cosines = rotary(hidden, torch.arange(hidden.shape[1])[None])
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf, dtype=hidden.dtype).triu(1)
        for layer in layers:
            attends = layer.layer_type == "full_attention"
            hidden = layer(hidden, mask[None, None] if attends else None, position_embeddings=cosines)
        return hidden

    hidden = run(hidden, network.layers[: config.num_embedding_layers], rotary)[0]
    by_tile = [patch_places[i : i + 16] for i in range(0, len(patch_places), 16)]
    quads = [
        [tile[4 * (2 * y + dy) + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)]
        for tile in by_tile
        for y in (0, 1)
        for x in (0, 1)
    ]
    shuffled = iter(network.vision_embeddings.projector(hidden[torch.tensor(quads)].flatten(1)))
    texts = iter(hidden[[i for i in range(len(rows)) if i not in patch_places]])
    is_image = (ids[0] == model.config.image_token_id).tolist()
    hidden = torch.stack([next(shuffled) if image else next(texts) for image in is_image])[None]
    return model.lm_head(network.norm(run(hidden, network.layers[config.num_embedding_layers :], network.rotary_emb)))


def test_logits_are_those_of_the_equations_written_out(model):
    ids, pictures = prompt(3, "tile", "tile", 4, "tile", 6), tiles(3)
    close(model(ids, pixel_values=pictures).logits, written_out(model, ids, pictures))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_of_each_row_and_goes_on_from_them(model, side):
    parts = [(4, "tile", 9), (2,), ("tile", 7, "tile", "tile", 3)]
    rows = [prompt(*row, seed=i) for i, row in enumerate(parts)]
    pictures, counts = tiles(4), [1, 0, 3]
    longest = max(row.shape[1] for row in rows)
    gaps = [(longest - row.shape[1], 0) if side == "left" else (0, longest - row.shape[1]) for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, gap, value=2) for row, gap in zip(rows, gaps, strict=True)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)])
    outputs = model(ids, pixel_values=pictures, attention_mask=mask, use_cache=True)
    # Then tokens, and a picture in one of the rows.
    following = torch.cat([prompt(5, seed=8), prompt(1, "tile", seed=9), prompt(5, seed=10)])
    mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    continued = model(following, pixel_values=tiles(1, 5), attention_mask=mask, **{CACHE: outputs[CACHE]}).logits
    last = model(prompt(2, seed=11).expand(3, -1), attention_mask=torch.nn.functional.pad(mask, (0, 2), value=1),
                 **{CACHE: outputs[CACHE]}).logits  # fmt: skip
    for i, (row, own) in enumerate(zip(rows, pictures.split(counts), strict=True)):
        own = torch.cat([own, tiles(1, 5)]) if i == 1 else own
        whole = torch.cat([row, following[i : i + 1], prompt(2, seed=11)], 1)
        expected = model(whole, **({"pixel_values": own} if len(own) else {})).logits[0]
        valid = mask[i, :longest].bool()
        close(torch.cat([outputs.logits[i, valid], continued[i], last[i]]), expected)


def test_a_batch_without_a_mask_has_the_logits_of_each_row(model):
    rows, pictures = [prompt(4, "tile", 9, seed=1), prompt(10, "tile", 3, seed=2), prompt(17, seed=3)], tiles(2)
    logits = model(torch.cat(rows), pixel_values=pictures).logits
    for i, row in enumerate(rows):
        close(logits[i], model(row, pixel_values=pictures[i : i + 1] if i < 2 else None).logits[0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_a_prompt_is_read_in_pieces_that_cut_no_tile_apart(model, size, monkeypatch):
    ids, pictures = prompt(3, "tile", "tile", 4, "tile", 6), tiles(3)
    whole, pieces = model(ids, pixel_values=pictures, use_cache=True), []
    forward = type(model.model).forward

    def counting(self, input_ids=None, **kwargs):
        pieces.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", counting)
    cache = model.new_cache()
    images = PromptImages(model, ids == model.config.image_token_id, pictures)
    model.read_prompt(cache, ids, images=images, chunk_size=size)
    assert cache.get_seq_length() == ids.shape[1] == sum(pieces)
    assert max(pieces) <= max(size, 2)  # a line of a tile is two tokens
    torch.testing.assert_close(cache.tensors(), whole[CACHE].tensors(), rtol=1e-8, atol=1e-8)


GENERATION = [
    (test_generation.test_a_batch_with_different_pictures_per_row_answers_as_each_row_alone, [{}]),
    (test_generation.test_generation_follows_the_plain_run, [{}]),
    (test_generation.test_beams_of_a_batch_are_those_of_each_row, [{}]),
    (test_generation.test_prefill_in_pieces, [{"size": size} for size in (1, 3, 7)]),
    (test_generation.test_the_callers_own_cache_is_filled, [{}]),
    (test_generation.test_a_second_turn_continues_from_the_first_ones_cache, [{}]),
    (test_generation.test_without_a_cache_the_answer_is_the_same, [{"options": {}}, {"options": {"num_beams": 2}}]),
]


@pytest.mark.parametrize(
    ("test", "arguments"), [pytest.param(test, x, id=test.__name__) for test, many in GENERATION for x in many]
)
def test_generation_keeps_its_promises(model, test, arguments):
    test(model, **arguments)


def test_a_cache_forgets_and_copies_pictures(model):
    """A snapshot before and behind a picture, a clone, and cropping where no layer has a state."""
    ids, pictures = prompt(3, "tile", 5, "tile", 6), tiles(2)
    expected = model(ids, pixel_values=pictures).logits
    cache = model.new_cache()
    model(ids[:, :3], **{CACHE: cache})
    before = cache.snapshot()
    model(ids[:, 3:12], pixel_values=pictures[:1], **{CACHE: cache})
    behind, copied = cache.snapshot(), cache.clone()
    model(ids[:, 12:], pixel_values=pictures[1:], **{CACHE: cache})
    for one, snapshot, start in ((cache, behind, 12), (copied, None, 12), (cache, before, 3)):
        if snapshot is not None:
            one.restore(snapshot)
        assert one.get_seq_length() == start
        own = pictures[1:] if start == 12 else pictures
        close(model(ids[:, start:], pixel_values=own, **{CACHE: one}).logits, expected[:, start:])
    if not cache.state_layers:
        cache.crop(-10)  # the last picture and what follows
        close(model(ids[:, 12:], pixel_values=pictures[1:], **{CACHE: cache}).logits, expected[:, 12:])
        cache.crop(-20)
        close(model(ids[:, 2:], pixel_values=pictures, **{CACHE: cache}).logits, expected[:, 2:])
    cache.reset()
    close(model(ids[:, :3], **{CACHE: cache}).logits, expected[:, :3])


def test_embedding_layers_keep_a_key_for_each_patch():
    model = hd_model("teacher")
    cache = model(prompt(3, "tile", 5), pixel_values=tiles(1), use_cache=True)[CACHE]
    assert [cache.keys(i).shape[2] for i in range(4)] == [24, 24, 12, 12]
    assert cache.get_seq_length() == 12


def test_what_cannot_be_done_is_refused_in_one_sentence():
    model, ids, pictures = hd_model("teacher"), prompt(3, "tile", 5), tiles(1)
    split = torch.cat([prompt("tile")[:, :3], prompt(1), prompt("tile")[:, :1]], 1)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    for arguments, words in (
        ({"input_ids": ids, "pixel_values": tiles(2)}, "4 image tokens but the pictures give 32 patches"),
        ({"input_ids": split, "pixel_values": pictures}, "no whole lines of 2"),
        ({"input_ids": ids[:, :4], "pixel_values": pictures}, "no whole lines of 2"),
        ({"input_ids": ids, "pixel_values": tiles(1)[..., :8]}, "give pixel_values of 16 x 16 pixels"),
        ({"input_ids": ids, "pixel_values": pictures, "attention_mask": mask}, "needs one of shape"),
        ({"input_ids": ids, "pixel_values": pictures, CACHE: DynamicCache(config=model.config)}, "model.new_cache()"),
        ({"input_ids": ids, "pixel_values": pictures, CACHE: MmMambaCache(model.config, 64)}, "model.new_cache()"),
    ):
        with pytest.raises(ValueError) as error:
            model(**arguments)
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"model\.new_cache\(\)"):
        model.generate(ids, pixel_values=pictures, cache_implementation="static", **OPTIONS)
    for change, words in (
        ({"num_embedding_layers": 0}, "num_embedding_layers=0"),
        ({"normalize_embedding_output": True}, "normalize_embedding_output=True"),
        ({"pixel_shuffle_loc": "mid"}, "'mid' is unknown"),
    ):
        with pytest.raises(Exception, match=words):
            tiny_config("teacher", **{"pixel_shuffle_loc": "post"} | change)


def test_packed_sequences_have_the_logits_and_gradients_of_each_alone(model):
    model = copy.deepcopy(model).requires_grad_(True)
    rows = test_packing.FIRST_ROW
    close(model(**test_packing.packed(rows)).logits, test_packing.alone(model, rows))
    found = []
    for logits in (model(**test_packing.packed(rows)).logits, test_packing.alone(model, rows)):
        model.zero_grad()
        logits.square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    for name, gradient in found[0].items():
        close(gradient, found[1][name])
    with pytest.raises(ValueError, match="pack all sequences into one row"):
        model(**test_packing.packed(rows, test_packing.SECOND_ROW))


@pytest.fixture(scope="module", params=["linear", "hybrid", "teacher"])
def chat_model(request):
    return make_chat_model(request.param, make_tokenizer(), pixel_shuffle_loc="post")


def test_a_conversation_is_read_kept_saved_and_forked(chat_model, tmp_path):
    tokenizer = make_tokenizer()
    state, turns, counts = chat_model.conversation(tokenizer), [], []
    for seed, (question, count) in enumerate([("Compare <image> with\n", 3), ("Why? <image>", 1), ("Is it? ", 0)]):
        new = tiles(count, seed).float() if count else None
        counts += [count] if count else []
        pictures = torch.cat([tiles(n, i).float() for i, n in enumerate(counts)])
        expected = chat_model.chat(tokenizer, pictures, question, OPTIONS, list(turns), num_patches_list=counts)
        state.save(tmp_path / "state.safetensors")
        again = ConversationState.load(tmp_path / "state.safetensors", chat_model, tokenizer)
        for one in (state.fork(), again, state):
            assert one.ask(question, OPTIONS, new) == expected
        turns.append((question, expected))
        cache = state.cache.tensors()
        torch.testing.assert_close(again.cache.tensors(), cache, rtol=0, atol=0)
    ids = torch.tensor([state.ids])
    read = chat_model(ids, pixel_values=pictures.double(), use_cache=True)[CACHE].tensors()
    torch.testing.assert_close(cache, read, rtol=1e-8, atol=1e-8)


def test_a_saved_conversation_without_its_image_places_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    model, file = make_chat_model("teacher", tokenizer, pixel_shuffle_loc="post"), tmp_path / "state.safetensors"
    model.conversation(tokenizer).extend("<image> and", tiles(1)).save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert tensors["layers.0.keys"].shape[2] == len(tensors["ids"]) + 12
    for change in ({"image_places": None}, {"image_places": ~tensors["image_places"]}, {"layers.0.keys": None}):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        save_file(changed, file, metadata)
        with pytest.raises(ValueError, match="does not hold the tensors of a whole conversation"):
            ConversationState.load(file, model, tokenizer)


def picture_rows():
    """Training rows with two pictures, one, and none."""
    made = []
    for seed, (parts, count) in enumerate([((3, "tile", "tile", 4), 2), ((9,), 0), (("tile", 2), 1)]):
        ids = token_ids(*parts, seed=seed)
        labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - 2, -100)
        made.append({"input_ids": ids, "labels": labels, "pixel_values": tiles(count, seed)})
    return made


def teacher_and_student(attention=(1,)):
    teacher = hd_model("teacher")
    state, config = seed_state_dict(teacher.state_dict(), teacher.config, attention)
    student = MmMambaForConditionalGeneration(config).double()
    student.load_state_dict(state)
    torch.manual_seed(1)
    for mixer in mamba_mixers(student).values():
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return teacher, student


def mean_over_rows(teacher, student):
    """Gradients of stage 2 by autograd over all layers, every row alone; each layer's mean is over its positions."""
    inputs, hooks, squares, counts = {}, [], {}, {}
    for index in mamba_mixers(student):
        attention = teacher.model.layers[index].self_attn
        hooks.append(attention.register_forward_pre_hook(
            lambda _, args, kwargs, i=index: inputs.update({i: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        ))  # fmt: skip
        hooks.append(
            attention.o_proj.register_forward_pre_hook(lambda _, args, i=index: inputs.update({-1 - i: args[0]}))
        )
    student.requires_grad_(True).zero_grad()
    for row in picture_rows():
        pictures = {"pixel_values": row["pixel_values"]} if len(row["pixel_values"]) else {}
        with torch.no_grad():
            teacher(input_ids=row["input_ids"][None], **pictures)
        for index, mixer in mamba_mixers(student).items():
            heads = mixer.heads(inputs[index].clone()).flatten(2)
            squares[index] = squares.get(index, 0) + (heads - inputs[-1 - index]).square().mean(2).sum()
            counts[index] = counts.get(index, 0) + heads.shape[1]
    for hook in hooks:
        hook.remove()
    assert counts[0] - counts[3] == 3 * 12  # three pictures
    (LOSS_SCALE * sum(squares[i] / counts[i] for i in squares) / len(squares)).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("collate", [pad, pack])
def test_students_learn_from_every_patch_that_the_embedding_layers_read(collate):
    teacher, student = teacher_and_student()
    expected = mean_over_rows(teacher, copy.deepcopy(student))
    distiller = LayerwiseDistiller(teacher, student, 2)
    found = gradients(distiller, collate(picture_rows(), pad_token_id=2))
    assert set(found) == {name for name in expected if "out_proj" not in name}
    for name, gradient in found.items():
        close(gradient, expected[name])
    # However the rows are split, and for stage 3, too.
    parts = [collate(picture_rows()[:2], 2), collate(picture_rows()[2:], 2)]
    totals = sum(count_tokens(part, extra_per_tile=12) for part in parts)
    for one in (distiller, EndToEndDistiller(teacher, student)):
        whole = gradients(one, collate(picture_rows(), pad_token_id=2))
        shares = [gradients(one, part, totals) for part in parts]
        for name, gradient in whole.items():
            close(shares[0][name] + shares[1][name], gradient)


def test_padding_counts_in_training_where_it_is_asked_for():
    teacher, student = teacher_and_student()
    batch = pad(picture_rows()[:1] + picture_rows()[2:], pad_token_id=2)
    everything = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    with torch.no_grad():
        unmasked = LayerwiseDistiller(teacher, student, 2, include_padding=True)(**batch)
        torch.testing.assert_close(unmasked, LayerwiseDistiller(teacher, student, 2)(**everything))


def test_from_conversion_to_a_seeded_students_answers_about_a_picture(tmp_path):
    source = checkpoint(tmp_path / "src", "hovle_tiny_pixshuf_post")
    add_tokenizer(source)
    convert(source, tmp_path / "teacher")
    assert (
        json.loads((tmp_path / "teacher" / "config.json").read_text())["vision_config"]["pixel_shuffle_loc"] == "post"
    )
    seed_folder(tmp_path / "teacher", tmp_path / "linear")
    seed_folder(tmp_path / "teacher", tmp_path / "hybrid", attention=[0, 8])
    processor = AutoProcessor.from_pretrained(tmp_path / "teacher", trust_remote_code=True)
    assert processor.tokens_per_tile == 4
    pictures = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for name in ("teacher", "linear", "hybrid"):
        model = MmMambaForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        answer, history = model.chat(processor.tokenizer, pictures, "What?", OPTIONS, return_history=True)
        assert len(history._kept[0][0]) > 12
        options = OPTIONS | {"use_cache": False}
        without, _ = model.batch_chat(
            processor.tokenizer, torch.cat([pictures, pictures[:1]]), ["What?", "Why is it so?"], options, [3, 1],
            return_history=True,
        )  # fmt: skip
        assert without[0] == answer
        assert without[1] == model.chat(processor.tokenizer, pictures[:1], "Why is it so?", OPTIONS)
