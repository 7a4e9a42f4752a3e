"""`mmmamba bench laptop`: its models, what it counts, how a run goes on, and all of it beside a stand-in peer."""

import argparse
import json
import shutil
import subprocess
import sys
from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch

from mmmamba.benchmarks import arguments
from mmmamba.benchmarks.laptop import comparison, gguf_models, llama_cpp, our_models, ours, profile, report
from mmmamba.benchmarks.laptop.samples import Point, Samples, order
from mmmamba.cache_mmmamba import CACHE
from mmmamba.cli.load import load_model
from mmmamba.cli.main import main


LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = arguments.SIZES["small"]
# Answers as llama-bench does, and notes how it was called: flash attention is the faster way to take a step.
LLAMA_BENCH = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    print(json.dumps(given), file=log)
found = []
for flash in given["-fa"].split(","):
    rate = 10.0 + int(flash) * (1 if given["-n"] != "0" else -1)
    row = {{"build_commit": "0c1e570", "flash_attn": int(flash), "samples_ts": [rate] * int(given["-r"])}}
    found.append(row)
print(json.dumps(found))
"""


@pytest.fixture
def llama_bench(tmp_path):
    """A stand-in for llama-bench, and the file in which it notes how it was called."""
    program, log = tmp_path / "llama-bench", tmp_path / "log"
    program.write_text(LLAMA_BENCH.format(python=sys.executable, log=str(log)), encoding="utf-8")
    program.chmod(0o755)
    return program, log


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """Where the models of this module are made, once."""
    return tmp_path_factory.mktemp("laptop")


@pytest.fixture(scope="module", params=["linear", "hybrid"])
def folder(request, work_dir):
    """A small model in 4 bits."""
    return our_models.make(work_dir / "small", request.param, "small", 4)


@pytest.mark.parametrize("bits", gguf_models.FORMATS)
@pytest.mark.parametrize("model", gguf_models.ARCHITECTURES)
def test_peers_files_hold_models_of_the_shape_and_format_asked_for(model, bits, tmp_path):
    file = tmp_path / "model.gguf"
    gguf_models.write_gguf(file, model, "small", bits)
    reader = gguf.GGUFReader(file)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    architecture = settings["general.architecture"]
    assert architecture == gguf_models.ARCHITECTURES[model]
    assert settings[f"{architecture}.block_count"] == LAYERS and settings[f"{architecture}.vocab_size"] == VOCABULARY
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(x) for x in tensor.shape[::-1]) for name, tensor in tensors.items()}
    assert shapes["output.weight"] == shapes["token_embd.weight"] == (VOCABULARY, HIDDEN)
    attends = f"blk.{LAYERS // 2}."  # the hybrid's only layer that does
    assert shapes[f"{attends}attn_k.weight"] == (KV_HEADS * HIDDEN // HEADS, HIDDEN)
    if model == "granite":
        inner, state, heads = 2 * HIDDEN, 128, 2 * HIDDEN // 64
        assert shapes["blk.0.ssm_in.weight"] == (2 * inner + 2 * state + heads, HIDDEN)
        assert shapes["blk.0.ssm_conv1d.weight"] == (inner + 2 * state, 4)
        kv_heads = settings["granitehybrid.attention.head_count_kv"]
        assert [i for i, n in enumerate(kv_heads) if n] == [LAYERS // 2] and max(kv_heads) == KV_HEADS
    for name, tensor in tensors.items():
        is_matrix = len(tensor.shape) == 2 and "ssm_conv1d" not in name and tensor.shape[0] > 1 and "norm" not in name
        assert tensor.tensor_type.name == (gguf_models.FORMATS[bits] if is_matrix else "F32"), name
    weights = gguf.quants.dequantize(tensors["output.weight"].data, tensors["output.weight"].tensor_type)
    assert weights.shape == (VOCABULARY, HIDDEN) and np.std(weights) == pytest.approx(0.02, rel=0.05)
    stored = sum(int(tensor.n_bytes) for tensor in tensors.values())
    assert stored == gguf_models.file_bytes(model, "small", bits)
    # A step reads all of it but all rows of the embeddings but one; keys and values are in fp16.
    embeddings = int(tensors["token_embd.weight"].n_bytes)
    weights_read = stored - embeddings + embeddings // VOCABULARY
    grown = [gguf_models.step_bytes(model, "small", bits, n) - weights_read for n in (0, 100)]
    attention_layers = LAYERS if model == "llama" else 1
    assert grown[1] - grown[0] == 100 * attention_layers * 2 * KV_HEADS * (HIDDEN // HEADS) * 2
    states = 0 if model == "llama" else (LAYERS - 1) * (inner * state + (inner + 2 * state) * 3) * 4
    assert grown[0] == 2 * states  # read and written


def test_the_peers_of_the_released_size_are_as_large_as_each_other():
    counts = {
        model: sum(int(np.prod(spec.shape)) for spec in gguf_models.tensor_specs(model, "released").values())
        for model in gguf_models.ARCHITECTURES
    }
    assert counts["llama"] == 2_392_496_128 and abs(counts["granite"] / counts["llama"] - 1) < 0.02


def test_our_models_are_made_whole_and_their_bytes_counted(folder):
    config = load_model(folder, "cpu").config.text_config
    attention = config.layer_types.count("full_attention")
    assert attention == (0 if folder.name.startswith("linear") else LAYERS // 4)
    total, read = our_models.weight_bytes(folder)
    header = sum(file.stat().st_size for file in folder.glob("*.safetensors")) - total
    assert 0 < header < 20_000
    model = load_model(folder, "cpu")
    vision = sum(x.nbytes for name, x in model.state_dict().items() if "vision" in name)
    assert total - read == vision + (VOCABULARY - 1) * HIDDEN * 2  # embeddings stay in bf16
    planned = our_models.bytes_to_make(folder.parent.parent / "empty", [(folder.name[:6], 4)], "small")
    full, _ = our_models.weight_bytes(folder.parent / f"{folder.name[:6]}-16")
    assert planned == pytest.approx(full + total, rel=0.01)
    assert our_models.bytes_to_make(folder.parent, [(folder.name[:6], 4)], "small") == 0


def test_a_long_context_is_a_cache_of_that_length_that_steps_continue(folder, monkeypatch):
    monkeypatch.setattr(ours, "LONGEST_READ", 32)
    model = load_model(folder, "cpu")
    with torch.no_grad():
        read, filled = ours.cache_after(model, 32), ours.cache_after(model, 400)
        assert (read.get_seq_length(), filled.get_seq_length()) == (32, 400)
        assert {name: x.dtype for name, x in read.tensors().items()} == {
            name: x.dtype for name, x in filled.tensors().items()
        }
        _, seconds = ours.decode(model, filled, torch.tensor([[5]]), 3)
    assert filled.get_seq_length() == 403 and len(seconds) == 3 and min(seconds) > 0
    measured = ours.measure(folder, None, 33, 4, 2)
    assert len(measured["rates"]) == 2 and all(len(seconds) == 4 for seconds in measured["seconds"])
    key_value = model.config.text_config.layer_types.count("full_attention") * 2 * KV_HEADS * (HIDDEN // HEADS) * 2
    states = measured["step bytes"] - our_models.weight_bytes(folder)[1] - key_value * (33 + ours.WARM_UP + 4)
    mamba_layers = LAYERS - model.config.text_config.layer_types.count("full_attention")
    size = HIDDEN // HEADS
    channels = (HEADS + 2 * KV_HEADS) * size
    assert states == mamba_layers * 2 * (HEADS * size * size * 4 + channels * 2)


def test_a_prompt_is_read_up_to_the_logits_of_its_last_token(folder):
    model = load_model(folder.parent / f"{folder.name[:6]}-16", "cpu", torch.float32)
    model.config.text_config.prefill_chunk_size = 7
    ids = torch.randint(4, VOCABULARY, (1, 23))
    with torch.no_grad():
        cache, at_once = ours.read_prompt(model, ids), model.new_cache()
        model(ids, **{CACHE: at_once})
    assert cache.get_seq_length() == 23
    for name, expected in at_once.tensors().items():
        torch.testing.assert_close(cache.tensors()[name], expected, rtol=1e-3, atol=1e-4)


def test_the_parts_of_a_step_come_to_the_whole(folder):
    with torch.no_grad():
        rows = profile.profile(load_model(folder, "cpu"), 16, 2)
    (whole, *parts) = rows
    assert whole["part"] == "all" and sum(part["ms"] for part in parts) == pytest.approx(whole["ms"])
    layers = 2 if folder.name.startswith("linear") else 4  # rows of one or two kinds of layers
    assert [part["part"] for part in parts[layers:]] == ["head", "all else"]


def sample(model, bits, what, tokens, rates, peak=1e9, **others):
    measured = {"rates": rates, "peak bytes": peak, "file bytes": 9e8, "step bytes": 2e9, "libraries bytes": 3e8}
    measured |= {"at": "2026-11-27T04:00:00+00:00", "commit": "0c1e570"}
    return {"model": model, "bits": bits, "what": what, "tokens": tokens} | measured | others


def test_ratios_are_of_medians_and_goals_are_as_the_issue_has_them():
    bandwidth = {"model": "machine", "bits": 0, "what": "bandwidth", "tokens": 0}
    samples = [
        bandwidth | {"bytes/s": {"sum": 2e10, "product": 1e10}},
        bandwidth | {"bytes/s": {"sum": 1e10, "product": 4e10}},
        sample("linear", 4, "step", 256, [11, 99, 1]),
        sample("linear", 4, "step", 256, [13, 13, 13]),
        sample("linear", 4, "step", 256, [40, 40, 41]),
        sample("linear", 4, "step", 4096, [19.9]),
        sample("linear", 4, "prompt", 512, [50]),
        sample("llama", 4, "step", 256, [10]),
        sample("llama", 4, "step", 4096, [10]),
        sample("llama", 4, "prompt", 512, [50]),
        sample("granite", 4, "step", 256, [10.1]),
        sample("linear", 16, "step", 256, [5], peak=1.16e9),
        sample("llama", 16, "step", 256, [5]),
    ]
    result = report.results(samples, {("llama", 4): 6.5e8, ("llama", 16): 1e9})
    assert result["bandwidth"] == {"bytes/s": 4e10, "loop": "product"}
    row = result["rows"][0]
    assert (row["tokens/s"], row["least tokens/s"], row["most tokens/s"], row["rounds"]) == (13, 1, 99, 3)
    assert row["least ms"] == pytest.approx(50) and row["share"] == pytest.approx(13 * 0.05)
    goals = [(goal["ratio"], goal["target"], goal["reached"]) for goal in result["goals"]]
    assert goals == [
        (pytest.approx(1.3), "≥ 1.1", True), (pytest.approx(1.99), "≥ 2.0", False),
        (pytest.approx(13 / 10.1), "≥ 1.3", False),
        (1.0, "≥ 1.0", True), (1.0, "≥ 1.0", True),
        (pytest.approx(0.86), "≤ 1.15", True), (pytest.approx(1.16), "≤ 1.15", False),
        (pytest.approx(7 / 6.5), "≤ 1.15", True), (pytest.approx(10 / 6.5), "≤ 1.15", False),
    ]  # fmt: skip
    text = report.markdown(result | {"failed": {"mmMamba-hybrid, 4 bits": "killed"}})
    assert "| mmMamba-linear, 4 bits | 50.0 | 13.0 | 19.9 | 1.00 (0.30) | 0.90 |" in text
    assert "| llama.cpp, Llama, F16 |  | 5.0 |  |" in text and "5 of 9 goals are reached" in text
    assert "mmMamba-hybrid, 4 bits is left out: killed" in text


IDENTITIES = {("machine", 0): "here", ("linear", 4): "code 1", ("llama", 4): "file"}
OURS, PEER = Point("linear", 4, "step", 256), Point("llama", 4, "step", 256)
MACHINE = Point("machine", 0, "bandwidth", 0)


def count(samples, point):
    return len(samples.of({point}))


def test_an_interrupted_run_goes_on_and_a_finished_one_does_not(tmp_path):
    file = tmp_path / "samples.jsonl"
    samples = Samples(file, IDENTITIES)
    samples.add(OURS, {"rates": [1]})
    samples.add(PEER, {"rates": [2]})
    with file.open("a") as stream:
        stream.write('{"model": "llama", "bi')  # killed while it wrote
    again = Samples(file, IDENTITIES)
    assert again.rows == samples.rows and (count(again, OURS), count(again, PEER)) == (1, 1)
    assert count(again, PEER._replace(tokens=4096)) == 0
    again.add(OURS, {"rates": [3]})
    assert count(Samples(file, IDENTITIES), OURS) == 2
    again.finish()
    assert Samples(file, IDENTITIES).rows == []


def test_an_interrupted_run_of_other_code_begins_anew(tmp_path, capsys):
    file, changed = tmp_path / "samples.jsonl", IDENTITIES | {("linear", 4): "code 2"}
    samples = Samples(file, IDENTITIES)
    for point in (OURS, PEER, MACHINE):
        samples.add(point, {"rates": [1]})
    kept = Samples(file, changed, keep_peers=True)
    assert (count(kept, OURS), count(kept, PEER)) == (0, 1) and capsys.readouterr().out == ""
    kept.add(OURS, {"rates": [1]})
    assert Samples(file, IDENTITIES).rows == [] and "--keep-peers" in capsys.readouterr().out


def test_peers_samples_of_a_finished_run_are_kept_on_demand(tmp_path):
    file = tmp_path / "samples.jsonl"
    samples = Samples(file, IDENTITIES)
    for point in (OURS, PEER, MACHINE):
        samples.add(point, {"rates": [1]})
    samples.finish()
    for _ in range(2):  # the second time they are in the new run already
        kept = Samples(file, IDENTITIES, keep_peers=True)
        assert [count(kept, point) for point in (OURS, PEER, MACHINE)] == [0, 1, 0]
    assert Samples(file, IDENTITIES | {("llama", 4): "another file"}, keep_peers=True).rows == []


def test_a_run_of_some_models_leaves_the_samples_of_others(tmp_path):
    file = tmp_path / "samples.jsonl"
    samples = Samples(file, IDENTITIES)
    samples.add(PEER, {"rates": [1]})
    some = {key: value for key, value in IDENTITIES.items() if key != ("llama", 4)}
    ours_alone = Samples(file, some)
    assert ours_alone.rows == []
    ours_alone.add(OURS, {"rates": [1]})
    ours_alone.finish()
    interrupted = Samples(file, IDENTITIES)
    assert (count(interrupted, OURS), count(interrupted, PEER)) == (0, 1)
    interrupted.finish()
    Samples(file, some).finish()
    kept = Samples(file, IDENTITIES, keep_peers=True)
    assert count(kept, PEER) == 1
    longer = PEER._replace(tokens=4096)
    kept.add(longer, {"rates": [1]})
    kept.finish()
    again = Samples(file, IDENTITIES)  # which measures the one anew and the other not at all
    again.add(PEER, {"rates": [2]})
    again.finish()
    kept = Samples(file, IDENTITIES, keep_peers=True)
    assert [row["rates"] for row in kept.of({PEER})] == [[2]] and count(kept, longer) == 1


def test_every_round_begins_with_another_candidate():
    rounds = order([("prompt", 512), ("step", 256)], [("linear", 4), ("llama", 4)], 3)
    assert [point.model for point in rounds[0]] == ["linear", "llama", "linear", "llama"]
    assert [point.model for point in rounds[1]] == ["llama", "linear", "llama", "linear"]
    assert [(point.what, point.tokens) for point in rounds[2]] == [("prompt", 512)] * 2 + [("step", 256)] * 2


def test_the_commit_is_that_of_the_version():
    changes = "# Changelog\n\n## [0.3.36]\n\n- feat: update llama.cpp to ggml-org/llama.cpp@0c1e57098\n\n## [0.3.35]\n"
    changes += "\n- feat: update llama.cpp to ggml-org/llama.cpp@4df29be4f\n- ggml-org/llama.cpp@adb55e514\n"
    assert llama_cpp.commit_of(changes, "0.3.36") == "0c1e57098"
    assert llama_cpp.commit_of(changes, "0.3.35") == "4df29be4f"
    assert llama_cpp.commit_of(changes, "0.3.1") == "unknown"


def test_llama_bench_is_built_once(tmp_path, monkeypatch):
    built = tmp_path / f"llama.cpp-{llama_cpp.VERSION}-0c1e57098" / "llama-bench"
    built.parent.mkdir()
    built.touch()
    monkeypatch.setattr(llama_cpp.subprocess, "run", None)
    assert llama_cpp.find_or_build(tmp_path, 1) == built


def run(work_dir, program, *options):
    options = ["--size=small", f"--work-dir={work_dir}", f"--llama-bench={program}", "--normal-priority", *options]
    return main(["bench", "laptop", "--threads=1", *options])


def refusal(capsys, *command):
    assert main(["bench", "laptop", *map(str, command)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path, llama_bench, monkeypatch, capsys):
    program, _ = llama_bench
    here = ["--size", "small", "--work-dir", tmp_path / "work"]
    assert "--llama-bench" in refusal(capsys, *here, "--llama-bench", tmp_path / "nowhere")
    disk = namedtuple("disk", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: disk(10**12, 10**12 - 10**6, 10**6))
        refused = refusal(capsys, *here, "--llama-bench", program)
        assert "0.0 GB are free" in refused and "--work-dir" in refused
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        assert "pip install gguf" in refusal(capsys, *here, "--llama-bench", program)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX", raising=False)
        patch.setattr(sys, "executable", "/nowhere/python")
        refused = refusal(capsys, *here)
        assert all(part in refused for part in ("pip install cmake", "C++ compiler", "--llama-bench"))
    with monkeypatch.context() as patch:
        failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no such version")
        patch.setattr(llama_cpp, "_tools", lambda: ("cmake", []))
        patch.setattr(llama_cpp.subprocess, "run", lambda *args, **kwargs: failed)
        assert "ERROR: no such version" in refusal(capsys, *here)
    assert not list((tmp_path / "work" / "small").iterdir()), "something was made before it was refused"
    with pytest.raises(ValueError, match="measures CPUs, and --device is cuda:0"):
        comparison.run(argparse.Namespace(device="cuda:0"), torch.device("cuda:0"))


def test_a_run_from_models_to_the_table(work_dir, llama_bench, tmp_path, capsys):
    program, log = llama_bench
    results = tmp_path / "results"
    options = ["--models", "linear", "llama", "--bits", "4", "--contexts", "16", "20000", "--rounds=1"]
    assert run(work_dir, program, *options, f"--results={results}") == 0
    result = json.loads((results / "laptop-cpu.json").read_text(encoding="utf-8"))
    assert {(row["model"], row["what"], row["tokens"]) for row in result["rows"]} == {
        (model, *point) for model in ("linear", "llama") for point in (("prompt", 512), ("step", 16), ("step", 20000))
    }
    assert result["machine"]["processor"] and "features" in result["machine"] and result["settings"]["threads"] == 1
    assert result["llama.cpp"] == ["0c1e570"] and result["failed"] == {}
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    # Both ways to attend are tried, at no more than 4,096 tokens; a step is then measured with flash attention.
    assert [call["-fa"] for call in calls] == ["0,1", "0", "0,1", "1", "0,1", "1"] and calls[4]["-d"] == "4096"
    assert [(call["-p"], call["-n"], call.get("-d")) for call in calls if call["-fa"] != "0,1"] == [
        ("512", "0", None), ("0", "32", "16"), ("0", "32", "20000"),
    ]  # fmt: skip
    assert all(call["-t"] == "1" and call["-m"].endswith("small/llama-Q4_0.gguf") for call in calls)
    (llama,) = [row for row in result["rows"] if (row["model"], row["tokens"]) == ("llama", 16)]
    assert llama["tokens/s"] == 11 and llama["step bytes"] == gguf_models.step_bytes("llama", "small", 4, 16)
    linear = next(row for row in result["rows"] if row["model"] == "linear")
    assert linear["peak bytes"] > linear["libraries bytes"] > linear["file bytes"] > 1e7
    assert (results / "laptop-cpu.png").stat().st_size
    printed = capsys.readouterr().out
    assert (results / "laptop-cpu.md").read_text(encoding="utf-8").strip() in printed
    log.unlink()  # the next time peers are not measured
    assert run(work_dir, program, "--models", "llama", *options[3:], "--keep-peers") == 0
    assert not log.exists()


def test_a_candidate_that_fails_is_left_out_and_said(work_dir, llama_bench, tmp_path, capsys):
    program, _ = llama_bench
    program.write_text("#!/bin/sh\necho 'failed to load model' >&2\nexit 3\n", encoding="utf-8")
    options = ["--models", "granite", "llama", "--bits", "4", "--contexts", "16", "--rounds=2"]
    assert run(work_dir, program, *options) == 0
    printed = capsys.readouterr().out
    for name in ("llama.cpp, Llama, Q4_0", "llama.cpp, Mamba-2 hybrid, Q4_0"):
        assert printed.count(f"{name} is left out") == 2  # when it happened, and in the report
    assert "ended with 3: failed to load model" in printed
