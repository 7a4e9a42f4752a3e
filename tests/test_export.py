"""`torch.compile`, `torch.export` and ONNX: one graph for every length and batch gives the model's logits."""

import pytest
import torch
from tiny_models import LAYER_TYPES, tiny_model, token_ids

from mmmamba.cache_mmmamba import CACHE
from mmmamba.conversion.export import FlatModel


DYNAMIC = torch.export.Dim.DYNAMIC
PICTURES = token_ids(5, "tile", 7, "tile", 3, seed=1)[None]  # shorter and longer than a chunk of 8 steps are below
OTHER_PICTURES = token_ids(31, "tile", 5, "tile", "tile", 90, seed=3)[None]


def tiles(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=list(LAYER_TYPES))
def model(request):
    layers = {"num_hidden_layers": 2, "num_embedding_layers": 1, "layer_types": LAYER_TYPES[request.param][:2]}
    return tiny_model(request.param, **layers).float()


def close(actual, expected):
    """Sums are taken in another order; the per-head norm of small states amplifies their rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def compiled(model):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, dynamic=True, backend="eager")


@torch.no_grad()
def test_one_compiled_graph_serves_lengths_padding_and_pictures(model, compiled):
    for inputs in (
        {"input_ids": token_ids(20, seed=2)[None]},
        {"input_ids": PICTURES, "pixel_values": tiles(2)},
        {"input_ids": OTHER_PICTURES, "pixel_values": tiles(3)},
    ):
        close(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    # Padding on the left, on the right and inside.
    ids, mask = token_ids(20, seed=2).repeat(2, 1), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = mask[1, 15:] = mask[1, 7] = 0
    actual, expected = (x(input_ids=ids, attention_mask=mask) for x in (compiled, model))
    close(actual.logits[mask.bool()], expected.logits[mask.bool()])
    states = [x[CACHE].tensors() for x in (actual, expected)]
    for name in states[0]:
        if name.endswith("state"):
            close(states[0][name], states[1][name])


@torch.no_grad()
def test_compiled_steps_continue_a_cache(model, compiled):
    ids, caches = token_ids(20, seed=2)[None], [model.new_cache(), model.new_cache()]
    for cache in caches:
        model(ids, **{CACHE: cache})
    for token in ids[:, :4].split(1, 1):
        actual, expected = (
            x(token, **{CACHE: cache}).logits for x, cache in zip((compiled, model), caches, strict=True)
        )
        close(actual, expected)


def exported(graph, inputs, shapes):
    return torch.export.export(graph, (), inputs, dynamic_shapes=shapes)


def prompt_shapes():
    return {"input_ids": {0: DYNAMIC, 1: DYNAMIC}}


def picture_shapes():
    return {"input_ids": {1: DYNAMIC}, "pixel_values": {0: DYNAMIC}}


def step_shapes(graph):
    return {"input_ids": {0: DYNAMIC}, "past": graph.shapes_of_past()}


@torch.no_grad()
def test_exported_prompts_and_steps_serve_every_length_batch_and_number_of_pictures(model):
    graph, ids = FlatModel(model), token_ids(20, seed=2).repeat(2, 1)
    prompt = exported(graph, {"input_ids": ids}, prompt_shapes()).module()
    step = exported(graph, {"input_ids": ids[:, :1], "past": list(graph(ids)[1:])}, step_shapes(graph)).module()
    pictures = exported(graph, {"input_ids": PICTURES, "pixel_values": tiles(2)}, picture_shapes()).module()
    for rows, length in ((3, 5), (4, 301)):
        ids = torch.stack([token_ids(length + 3, seed=seed) for seed in range(rows)])
        logits, *past = prompt(input_ids=ids[:, :length])
        close(logits[:, 0], model(ids[:, :length]).logits[:, -1])
        for position in range(length, length + 3):
            logits, *past = step(input_ids=ids[:, position : position + 1], past=past)
            close(logits[:, 0], model(ids[:, : position + 1]).logits[:, -1])
    logits, *past = pictures(input_ids=OTHER_PICTURES, pixel_values=tiles(3))
    close(logits[:, 0], model(OTHER_PICTURES, pixel_values=tiles(3)).logits[:, -1])


@torch.no_grad()
def test_onnx_prompts_and_steps_give_the_models_logits(model, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="pip install onnx onnxscript onnxruntime")
    import onnxruntime

    graph, names = FlatModel(model), FlatModel(model).names

    def session(name, inputs, shapes):
        given = ["input_ids", *(["pixel_values"] if "pixel_values" in inputs else [])]
        given += [f"past.{name}" for name in names] if "past" in inputs else []
        torch.onnx.export(
            graph, kwargs=inputs, f=tmp_path / name, dynamo=True, dynamic_shapes=shapes, input_names=given,
            output_names=["logits", *(f"present.{name}" for name in names)], verbose=False,
        )  # fmt: skip
        return onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])

    def run(session, **inputs):
        return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]

    ids = token_ids(20, seed=2).repeat(2, 1)
    prompt = session("prompt.onnx", {"input_ids": ids}, prompt_shapes())
    step = session("step.onnx", {"input_ids": ids[:, :1], "past": list(graph(ids)[1:])}, step_shapes(graph))
    pictures = session("pictures.onnx", {"input_ids": PICTURES, "pixel_values": tiles(2)}, picture_shapes())
    for rows, length in ((3, 5), (4, 301)):
        ids = torch.stack([token_ids(length + 3, seed=seed) for seed in range(rows)])
        logits, *past = run(prompt, input_ids=ids[:, :length])
        close(logits[:, 0], model(ids[:, :length]).logits[:, -1])
        for position in range(length, length + 3):
            cache = {f"past.{name}": x for name, x in zip(names, past, strict=True)}
            logits, *past = run(step, input_ids=ids[:, position : position + 1], **cache)
            close(logits[:, 0], model(ids[:, : position + 1]).logits[:, -1])
    logits, *past = run(pictures, input_ids=OTHER_PICTURES, pixel_values=tiles(3))
    close(logits[:, 0], model(OTHER_PICTURES, pixel_values=tiles(3)).logits[:, -1])
