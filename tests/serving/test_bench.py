"""The serving benchmark runs through: servers start, answer as many tokens as asked for, and are stopped."""

import json

from mmmamba.cli.main import main


def test_two_clients_are_served_by_our_model_and_by_granite(tmp_path):
    options = ["--size=tiny", "--models", "linear", "granite", "--clients=2", "--lengths=48", "--output-tokens=4"]
    folders = [f"--results={tmp_path}", f"--logs={tmp_path}"]
    assert main(["bench", "serving", "--device=cpu", "--rounds=1", *options, *folders]) == 0
    result = json.loads((tmp_path / "serving-cpu.json").read_text(encoding="utf-8"))
    assert {(row["model"], row["clients"], row["length"]) for row in result["rows"]} == {
        ("linear", 2, 48), ("granite", 2, 48),
    }  # fmt: skip
    assert all(row["tokens/s"] > row["requests/s"] > 0 and row["preempted"] == 0 for row in result["rows"])
    for name, model in result["models"].items():
        assert model["fit at once"] >= 2 and model["KiB per conversation"] > 0, (name, model)
