"""The benchmarks run, count what they say they count, and compare computations that are the same."""

import argparse
import json

import pytest
import torch

from mmmamba.benchmarks import distillation, models, proof
from mmmamba.cli.main import main
from mmmamba.conversion.distillation.recipe import load_recipe


def bench(folder, name, *options):
    assert main(["bench", name, "--device=cpu", "--threads=1", f"--results={folder}", *options]) == 0
    return json.loads((folder / f"{name}-cpu.json").read_text(encoding="utf-8"))


def test_scan_measures_every_backend_against_fp64(tmp_path, capsys):
    found = bench(tmp_path, "scan", "--length=96", "--head-dim=16", "--rounds=1", "--dtypes=fp32")
    errors = {row["scan"]: row["error"] for row in found["rows"]}
    assert {"torch", "transformers, chunks of 128"} <= set(errors)
    assert all(error < 1e-5 for error in errors.values()), errors
    assert (tmp_path / "scan-cpu.png").stat().st_size
    assert "times faster" in capsys.readouterr().out and found["machine"]["packages"]["torch"]


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_models_are_timed_beside_their_peers(tmp_path, name):
    found = bench(tmp_path, name, "--layers=4", "--lengths", "32", "64", "--rounds=1")
    assert {(row["model"], row.get("context") or row["length"]) for row in found["rows"]} == {
        (model, length) for model in models.OURS + models.PEERS for length in (32, 64)
    }
    assert all(0 < row["share"] for row in found["rows"]) and (tmp_path / f"{name}-cpu.png").stat().st_size


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    (row,) = bench(tmp_path, "memory", "--models=linear", "--layers=2", "--lengths=2048", "--rounds=1")["rows"]
    text = models.SIZES["small"]
    head_dim = text[1] // text[3]
    state, window = text[3] * head_dim**2, (text[1] + 2 * text[4] * head_dim) * (2 - 1)
    assert 0 < 2 * 4 * state <= row["kept MiB"] * 2**20 <= 2 * 4 * (state + 4 * window)
    assert row["peak MiB"] > row["kept MiB"]


@pytest.mark.parametrize("name", ["linear", "teacher"])
def test_bytes_of_a_step_are_counted_exactly(name):
    args = argparse.Namespace(size="small", layers=4, dtype="fp32", batch=3)
    model = models.make(name, args, torch.device("cpu"))
    layers, hidden, mlp, heads, kv_heads, vocabulary = 4, *models.SIZES["small"][1:]
    head_dim = hidden // heads
    shared = (hidden + 2 * kv_heads * head_dim) * hidden + hidden * hidden
    norms = 2 * hidden
    weights = vocabulary * hidden + hidden + layers * (3 * hidden * mlp + norms + shared)
    if name == "linear":
        channels = hidden + 2 * kv_heads * head_dim
        window = model.config.get_text_config().conv_kernel
        weights += layers * (hidden * (hidden + heads) + channels * (window + 1) + 2 * heads + head_dim)
        read = 2 * 3 * layers * (heads * head_dim**2 + channels * (window - 1))
    else:
        read = 3 * layers * 2 * kv_heads * head_dim * 40
    # The vision tower is not part of a step, and the embedding gives one row per token.
    cache = models.read(model, 40, 3)
    counted = models.decode_work(model, cache, 3).bytes
    assert counted == 4 * (weights + 3 * hidden + read), (counted / 4 - 3 * hidden - read, weights)


@pytest.mark.parametrize("stage", distillation.WAYS)
def test_distillation_is_compared_with_the_same_computation(stage):
    settings = {"layers": 4, "hidden": 128, "vocabulary": 300, "length": 40, "steps": 1}
    args = argparse.Namespace(**settings)
    gradients = {}
    for way in distillation.WAYS[stage]:
        teacher, student = distillation.models(args, torch.device("cpu"))
        loss_of, trained = distillation.prepared(teacher, student, stage, way)
        batch = {"input_ids": torch.randint(4, 300, (1, 40), generator=torch.Generator().manual_seed(1))}
        loss = loss_of(batch)
        loss.backward()
        gradients[way] = [loss.detach(), *(p.grad for p in trained)]
    for way, found in gradients.items():
        for ours, theirs in zip(gradients["ours"], found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(ours.abs().max()), msg=way)


def test_the_proof_reports_mean_and_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(proof, "FOLDER", tmp_path / "proof")

    def scores(exact):
        return {"questions": 5, "total": {"exact": exact}, "kinds": {"color": {"exact": exact}}}

    for seed, exact in enumerate((0.5, 0.7)):
        folder = proof.folder_of("stages-123", seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"scores": scores(exact)}), encoding="utf-8")
    (tmp_path / "proof" / "teacher.json").write_text(json.dumps(scores(0.9)), encoding="utf-8")
    proof.report(tmp_path / "proof.json")
    found = json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))["tables"]
    rows = {(table, label) for table, ones in found.items() for label in ones}
    assert rows == {
        ("students", "teacher"), ("stages", "1+2+3"), ("initialization", "inherited + mimic"),
        ("attention layers", "0"), ("attention layers", "6 (the teacher)"),
    }  # fmt: skip
    one = found["stages"]["1+2+3"]
    assert one["mean"] == pytest.approx(60) and one["spread"] == pytest.approx(14.142, 1e-3)
    printed = capsys.readouterr().out
    assert "| 1+2+3 | 60.0 ± 14.1 | 50.0, 70.0 |" in printed and "| teacher | 90.0 | 90.0 |" in printed
    assert (tmp_path / "proof.png").stat().st_size


def test_the_proof_repeats_what_is_in_its_tables():
    experiments = {name for group in proof.GROUPS.values() for name in group} | {"teacher"}
    assert {name for rows in proof.TABLES.values() for name in rows.values()} == experiments
    for group in proof.GROUPS.values():
        for recipe, overrides in group.values():
            load_recipe(recipe, overrides)
