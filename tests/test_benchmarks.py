"""The benchmarks run, count bytes exactly, and compare implementations that compute the same."""

import argparse
import json
import sys
import types

import pytest
import torch

from mmmamba.benchmarks import ablations, arguments, capacity, distillation, engine, models, server, serving, timing
from mmmamba.cli.main import main
from mmmamba.conversion.distillation.recipe import load_recipe


def bench(folder, name, *options):
    """Runs a benchmark on the CPU and returns its JSON."""
    assert main(["bench", name, "--device=cpu", "--threads=1", f"--results={folder}", *options]) == 0
    return json.loads((folder / f"{name}-cpu.json").read_text(encoding="utf-8"))


def test_scan_measures_every_backend_against_fp64(tmp_path, capsys):
    result = bench(tmp_path, "scan", "--length=96", "--head-dim=16", "--rounds=1", "--dtypes=fp32")
    errors = {row["scan"]: row["error"] for row in result["rows"]}
    assert {"torch", "transformers, chunks of 128"} <= set(errors)
    assert all(error < 1e-5 for error in errors.values()), errors
    assert (tmp_path / "scan-cpu.png").stat().st_size
    assert "times faster" in capsys.readouterr().out and result["machine"]["packages"]["torch"]


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_our_models_and_their_peers_are_timed_at_every_length(tmp_path, name):
    result = bench(tmp_path, name, "--layers=4", "--lengths", "32", "64", "--rounds=1")
    assert {(row["model"], row.get("context") or row["length"]) for row in result["rows"]} == {
        (model, length) for model in arguments.OURS + arguments.PEERS for length in (32, 64)
    }
    assert all(0 < row["share"] for row in result["rows"]) and (tmp_path / f"{name}-cpu.png").stat().st_size


def test_memory_of_the_cache_is_its_states_and_the_peak_is_above_it(tmp_path):
    (row,) = bench(tmp_path, "memory", "--models=linear", "--layers=2", "--lengths=2048", "--rounds=1")["rows"]
    _, hidden, _, heads, kv_heads, _ = arguments.SIZES["small"]
    head_dim = hidden // heads
    recurrent, conv = heads * head_dim**2, (hidden + 2 * kv_heads * head_dim) * (2 - 1)
    assert 0 < 2 * 4 * recurrent <= row["cache MiB"] * 2**20 <= 2 * 4 * (recurrent + 4 * conv)
    assert row["peak MiB"] > row["cache MiB"]


@pytest.mark.parametrize("name", ["linear", "teacher"])
def test_bytes_of_a_decoding_step_are_counted_exactly(name):
    args = argparse.Namespace(size="small", layers=4, dtype="fp32", batch=3)
    model = models.make_model(name, args, torch.device("cpu"))
    layers, hidden, mlp, heads, kv_heads, vocabulary = 4, *arguments.SIZES["small"][1:]
    head_dim = hidden // heads
    projections = (hidden + 2 * kv_heads * head_dim) * hidden + hidden * hidden
    norms = 2 * hidden
    weights = vocabulary * hidden + hidden + layers * (3 * hidden * mlp + norms + projections)
    if name == "linear":
        channels = hidden + 2 * kv_heads * head_dim
        taps = model.config.get_text_config().conv_kernel
        weights += layers * (hidden * (hidden + heads) + channels * (taps + 1) + 2 * heads + head_dim)
        cached = 2 * 3 * layers * (heads * head_dim**2 + channels * (taps - 1))  # read and written
    else:
        cached = 3 * layers * 2 * kv_heads * head_dim * 40
    embedding_rows = 3 * hidden  # one per token; nothing of the vision embedding
    cache = models.cache_of_length(model, 40, 3)
    assert models.decode_bytes(model, cache, 3) == 4 * (weights + embedding_rows + cached)


@pytest.mark.parametrize("stage", distillation.IMPLEMENTATIONS)
def test_all_implementations_of_a_distillation_stage_give_the_same_loss_and_gradients(stage):
    settings = {"layers": 4, "hidden": 128, "vocabulary": 300, "length": 40, "steps": 1}
    args = argparse.Namespace(**settings)
    results = {}
    for implementation in distillation.IMPLEMENTATIONS[stage]:
        teacher, student = distillation.make_models(args, torch.device("cpu"))
        loss_function, trained = distillation.make_loss(teacher, student, stage, implementation)
        batch = {"input_ids": torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))}
        loss = loss_function(batch)
        loss.backward()
        results[implementation] = [loss.detach(), *(p.grad for p in trained)]
    for name, tensors in results.items():
        for ours, theirs in zip(results["ours"], tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(ours.abs().max()), msg=name)


def test_the_ablation_report_gives_mean_and_spread_over_the_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "FOLDER", tmp_path / "ablations")

    def scores(exact):
        return {"questions": 5, "total": {"exact": exact}, "kinds": {"color": {"exact": exact}}}

    for seed, exact in enumerate((0.5, 0.7)):
        folder = ablations.experiment_folder("stages-123", seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"scores": scores(exact)}), encoding="utf-8")
    (tmp_path / "ablations" / "teacher.json").write_text(json.dumps(scores(0.9)), encoding="utf-8")
    ablations.report(tmp_path / "report.json")
    tables = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["tables"]
    assert {(table, label) for table, rows in tables.items() for label in rows} == {
        ("students", "teacher"), ("stages", "1+2+3"), ("initialization", "inherited + mimic"),
        ("attention layers", "0"), ("attention layers", "6 (the teacher)"),
    }  # fmt: skip
    row = tables["stages"]["1+2+3"]
    assert row["mean"] == pytest.approx(60) and row["spread"] == pytest.approx(14.142, 1e-3)
    printed = capsys.readouterr().out
    assert "| 1+2+3 | 60.0 ± 14.1 | 50.0, 70.0 |" in printed and "| teacher | 90.0 | 90.0 |" in printed
    assert (tmp_path / "report.png").stat().st_size


def test_every_ablation_has_a_valid_recipe_and_stands_in_a_table():
    experiments = {name for group in ablations.GROUPS.values() for name in group} | {"teacher"}
    assert {name for rows in ablations.TABLES.values() for name in rows.values()} == experiments
    for group in ablations.GROUPS.values():
        for recipe, overrides in group.values():
            load_recipe(recipe, overrides)


def serving_sample(model, length, clients, rate):
    sample = {"length": length, "clients": clients, "model": model, "requests/s": rate, "tokens/s": 8 * rate}
    sample |= {"first token ms": 1.0, "token ms": 1.0, "CPU s/request": 0.5 / rate}
    return sample | {"seconds": 1.0, "cache MiB": 2.0, "preempted": 0.0}


def test_plots_that_cannot_be_drawn_are_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mmmamba.benchmarks.bench.find_spec", lambda name: None)
    assert main(["bench", "scan", "--results", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "pip install matplotlib" in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_serving_measures_what_is_left_in_turns_that_begin_with_another_model():
    points = [(16, 1), (16, 8)]
    samples = [serving_sample("linear", 16, 1, 1.0), serving_sample("llama", 16, 8, 1.0)]
    assert serving.left_to_measure(samples, ["linear", "llama"], points, 2) == [
        (16, 1, "llama"), (16, 8, "linear"),
        (16, 1, "llama"), (16, 1, "linear"), (16, 8, "llama"), (16, 8, "linear"),
    ]  # fmt: skip
    assert serving.left_to_measure(samples * 2, ["linear"], [(16, 1)], 2) == []


def test_serving_results_that_are_complete_are_reported_without_vllm(tmp_path, capsys):
    options = ["--size=tiny", "--models", "linear", "llama", "--lengths=16", "--clients", "1", "8", "--rounds=3"]
    rates = {("linear", 1): (4, 9, 2), ("linear", 8): (30, 30, 31), ("llama", 1): (2, 2, 3), ("llama", 8): (9, 12, 10)}
    samples = [serving_sample(name, 16, n, float(rate)) for (name, n), three in rates.items() for rate in three]
    settings = {"size": "tiny", "layers": None, "dtype": "fp32", "output_tokens": 64, "requests": 2}
    settings |= {"batched_tokens": 2048, "cache_gib": None, "compile": False, "in_process": False}
    result = {"settings": settings, "models": {"linear": {"parameters": 5}}, "samples": samples}
    timing.write_result("serving", torch.device("cpu"), result, tmp_path)
    rows = bench(tmp_path, "serving", *options)["rows"]
    (row,) = [row for row in rows if (row["model"], row["clients"]) == ("linear", 1)]
    assert (row["requests/s"], row["least requests/s"], row["most requests/s"], row["rounds"]) == (4, 2, 9, 3)
    for column in ("requests/s", "CPU s/request"):
        assert serving.ratios_of(rows, column) == [
            {"length": 16, "clients": 1, "linear/llama": 2.0}, {"length": 16, "clients": 8, "linear/llama": 3.0},
        ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "linear/llama" in printed and "parameters" in printed and (tmp_path / "serving-cpu.png").stat().st_size
    with pytest.raises(ValueError, match="measured with"):
        serving.earlier_result(tmp_path, torch.device("cpu"), settings | {"output_tokens": 32})


def test_the_models_that_are_served_have_as_many_parameters_within_four_percent():
    args = argparse.Namespace(size="narrow", layers=None, dtype="fp32")
    counts = {}
    for name in arguments.SERVED:
        parameters = models.make_model(name, args, torch.device("meta")).named_parameters()
        counts[name] = sum(parameter.numel() for key, parameter in parameters if "vision" not in key)
    assert max(counts.values()) < 1.04 * min(counts.values()), counts


def test_the_tokenizer_of_served_models_gives_prompts_of_the_length_asked_for():
    tokenizer = serving.word_tokenizer(50)
    ids = [*range(7, 50), 7, 8]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids and len(tokenizer) == 50


def test_how_many_conversations_fit_is_read_from_the_log_of_vllm(tmp_path):
    log = tmp_path / "log"
    log.write_text("CPU KV cache size: 9,216 tokens, Maximum concurrency for 1,024 tokens per request: 1,009.50x\n")
    started = server.Server.__new__(server.Server)
    started.log = log
    assert started.conversations_that_fit() == 1009.5


class SteppingEngine:
    """Stands in for vLLM's engine: a step takes a second and gives each of the first two requests a token."""

    def __init__(self):
        self.seconds, self.requests, self.most = 0, {}, 0
        manager = types.SimpleNamespace(usage=0.25)
        self.engine_core = self.scheduler = self  # vLLM's engine.engine_core.engine_core.scheduler
        self.kv_cache_manager, self.model_config = manager, types.SimpleNamespace(get_vocab_size=lambda: 50)

    def add_request(self, name, prompt, sampling):
        self.requests[name] = types.SimpleNamespace(left=sampling["max_tokens"], tokens=[], num_preemptions=1)
        self.most = max(self.most, len(self.requests))

    def step(self):
        self.seconds += 1
        outputs = []
        for name, request in list(self.requests.items())[:2]:
            request.tokens.append(7)
            finished = len(request.tokens) == request.left
            text = types.SimpleNamespace(token_ids=list(request.tokens))
            outputs.append(types.SimpleNamespace(request_id=name, outputs=[text], finished=finished))
            if finished:
                del self.requests[name]
        return outputs


def test_in_process_keeps_so_many_requests_in_flight_and_counts_from_when_each_was_sent(monkeypatch):
    vllm = types.ModuleType("vllm")
    vllm.SamplingParams, inputs = dict, types.ModuleType("vllm.inputs")
    inputs.tokens_input = list
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.inputs", inputs)
    stepping = SteppingEngine()
    found = engine.measure(stepping, 9, 3, 4, 5, seed=0, clock=lambda: float(stepping.seconds))
    assert stepping.most == 3
    # Two are answered in seconds 1 to 5; the third waits for them; the fourth is sent when they are done.
    assert found["first token ms"] == 1e3 * (1 + 1 + 6 + 1) / 4 and found["token ms"] == 1e3
    assert (found["requests/s"], found["tokens/s"], found["CPU s/request"]) == (0.4, 2.0, 2.5)
    assert (found["cache share"], found["preempted"]) == (0.25, 3)


@pytest.mark.parametrize("name", arguments.OURS)
def test_computed_bytes_of_a_conversation_are_those_of_its_cache(name):
    model = models.make_model(name, argparse.Namespace(size="tiny", layers=5, dtype="fp32"), torch.device("cpu"))
    state, per_token = capacity.conversation_bytes(model.config.get_text_config(), torch.float32)
    key_value, states = models.cache_bytes(models.cache_of_length(model, 40))
    assert (state, 40 * per_token) == (states, key_value)


def test_as_many_conversations_as_computed_fit_into_the_memory_and_no_more(tmp_path):
    options = ["--size=tiny", "--layers=5", "--dtype=fp32", "--lengths", "1", "50", "--memory-gb=0.05"]
    for row in bench(tmp_path, "capacity", *options)["rows"]:
        left = 0.05 - row["weights GB"]
        for length in (1, 50):
            one = row["state MB"] / 1e3 + row["KB per token"] * length / 1e6
            assert row[str(length)] * one <= left < (row[str(length)] + 1) * one, row
