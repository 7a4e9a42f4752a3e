"""The serving benchmark runs through: vLLM starts, answers as many tokens as asked for, and is stopped."""

import json

import pytest

from mmmamba.cli.main import main


@pytest.mark.parametrize("how", [[], ["--in-process"]], ids=["server", "in-process"])
def test_two_clients_are_served_at_once(tmp_path, how):
    options = ["--size=tiny", "--models=linear", "--clients=2", "--lengths=48", "--output-tokens=4", "--rounds=1"]
    folders = [f"--results={tmp_path}", f"--logs={tmp_path}"]
    assert main(["bench", "serving", "--device=cpu", *options, *how, *folders]) == 0
    result = json.loads((tmp_path / "serving-cpu.json").read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert (row["model"], row["clients"], row["length"]) == ("linear", 2, 48)
    assert row["tokens/s"] == pytest.approx(4 * row["requests/s"]) and row["preempted"] == 0
    assert result["models"]["linear"]["fit at once"] >= 2 and result["models"]["linear"]["peak MiB"] > 0
