from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_calibrate_writes_a_folder_that_generate_takes(cli: Any, tiny_model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {n} says {n * 7}." for n in range(100)))
    out = tmp_path / "out"
    command = ["calibrate", "--model", tiny_model, "--text", text, "--out", out, "--sample-len", 448, "--json"]
    done = cli(*command, "--ratio", 3.5)
    assert done.exit_code == 0, done.stderr
    assert done.json["command"] == "calibrate"
    assert done.json["settings"]["calibrated_for"]["num_hidden_layers"] == 2
    assert "expected drift" in done.stdout
    used = cli(
        "generate", "--model", tiny_model, "--preset", out, "--prompt", "Line 3", "--max-new-tokens", 4, "--no-compare"
    )
    assert used.exit_code == 0, used.stderr


def test_calibrate_refuses_a_missing_text(cli: Any, tiny_model: str, tmp_path: Path) -> None:
    done = cli("calibrate", "--model", tiny_model, "--text", tmp_path / "none.txt", "--out", tmp_path)
    assert done.exit_code == 2
    assert "none.txt" in done.stderr


@pytest.mark.parametrize(
    ("content", "out", "words"),
    [
        (b"\xff\xfe\x00", "out", "must be a UTF-8 text file"),
        (b" ", "out", "must hold text, got an empty file"),
        (b"some text", "text.txt", "--out must be a folder, got the file"),
    ],
)
def test_calibrate_refuses_bad_files_before_it_loads_a_model(
    cli: Any, tmp_path: Path, content: bytes, out: str, words: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    done = cli("calibrate", "--model", "none", "--text", tmp_path / "text.txt", "--out", tmp_path / out)
    assert done.exit_code == 2
    assert words in done.stderr


def test_calibrate_refuses_what_skvq_has_no_use_for(cli: Any, tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text")
    command = ("calibrate", "--model", tiny_model, "--text", tmp_path / "text.txt", "--out", tmp_path)
    assert "may be given with --codec skvq" in cli(*command, "--codec", "skvq", "--ratio", 4).stderr
    assert "codec must be channel or skvq, got 'kivi'" in cli(*command, "--codec", "kivi").stderr
