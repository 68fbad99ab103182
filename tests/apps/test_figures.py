"""The documents' figures come from committed JSON lines, not from a hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twilight_apps import figures
from twilight_apps.figures import with_figures

ROOT = Path(__file__).parents[2]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_the_figures_of_the_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_figures(text, ROOT / "docs" / "results") == text, "run: make figures"


def test_every_section_stands_in_one_document() -> None:
    texts = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert {name: texts.count(f"<!-- figures: {name} -->") for name in figures.SECTIONS} == dict.fromkeys(
        figures.SECTIONS, 1
    )


def test_with_figures_refuses_a_section_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'summery' is none of summary, performance"):
        with_figures("<!-- figures: summery --><!-- end of figures -->", ROOT / "docs" / "results")


def test_evaluation_tables_come_from_the_json(tmp_path: Path, cli: Callable[..., Any], tiny_model: str) -> None:
    for command, extra in (
        ("kl", ["--context", 300, "--positions", 2]),
        ("mass", ["--context", 300, "--set", "min_sparse_len=0", "--set", "dense_layers=[0]"]),
        ("needle", ["--context", 300, "--depth", 0.5]),
    ):
        baseline = [] if command == "mass" else ["--baseline", "fp8"]
        result = cli(
            "eval", command, "--small", "--model", tiny_model, "--preset", "compact", *extra, *baseline, "--json"
        )
        assert result.exit_code == 0, result.stderr
        (tmp_path / f"eval-{command}-x.json").write_text(result.stdout.splitlines()[-1])
    of_another = (tmp_path / "eval-kl-x.json").read_text().replace('"compact"', '"another"')
    (tmp_path / "eval-kl-y.json").write_text(of_another)
    text = figures.with_figures("a\n<!-- figures: evaluation -->old<!-- end of figures -->\nb", tmp_path)
    assert "old" not in text
    assert text.count("| method | smaller |") == 1, "runs on the same excerpts share a table"
    assert "| another |" in text
    assert (text[:2], text[-2:]) == ("a\n", "\nb")
    record = next(
        r
        for r in json.loads((tmp_path / "eval-kl-x.json").read_text())["records"]
        if (r["method"], r["mode"]) == ("compact", "packing")
    )
    assert f"| compact | {record['smaller']:.2f}x | {record['kl']:.4f} ± {record['kl_error']:.4f} |" in text
    assert "| exact keys | 0.95 |" in text
    assert "### Needle" in text


def test_serving_tables_come_from_the_json(tmp_path: Path, cli: Callable[..., Any], tiny_model: str) -> None:
    sizes = ["--requests", 2, "--shared", 20, "--answer", 2, "--workload", "w3", "--workload", "w1", "--limit-s", 20]
    names = ["--entrant", "twilight", "--entrant", "generate"]
    result = cli("bench", "serve", "--model", tiny_model, *sizes, *names, "--json")
    assert result.exit_code == 0, result.stderr
    (tmp_path / "bench-serve-x.json").write_text(result.stdout.splitlines()[-1])
    text = figures.with_figures("a\n<!-- figures: serving -->old<!-- end of figures -->\nb", tmp_path)
    assert "old" not in text
    assert text.index("**W1: 2 requests at once") < text.index("**W3: 4 chats")  # in the order of their names
    w1 = next(run for run in result.json["results"] if run["workload"] == "w1")
    assert f"| twilight | {w1['entrants'][0]['prefill_rows']:,} | " in text
    assert "one run each" in text
