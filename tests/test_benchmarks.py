"""Every benchmark runs, on a small case; what it measures is its own business."""

import json

from benchmarks import training_step


def test_training_step(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.json"
    arguments = ["--shape", "tiny", "--lengths", "64", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["training_step", *arguments])
    training_step.main()
    result = json.loads(output.read_text())
    assert [row["contender"] for row in result["rows"]] == ["none", "plain", "ours", "eager"]
    for row in result["rows"]:
        assert row["peak_gib"] > 0
        assert row["time_ratio"] > 0
    assert "memory ratio" in capsys.readouterr().out
