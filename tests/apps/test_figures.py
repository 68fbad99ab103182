"""The README's figures come from committed JSON lines, not from a hand."""

from pathlib import Path

import pytest

from twilight_apps.figures import with_figures

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_figures_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_figures(text, ROOT / "docs" / "results") == text, (
        "run: python -m twilight_apps.figures README.md docs/results"
    )


def test_with_figures_refuses_a_text_without_markers() -> None:
    with pytest.raises(ValueError, match="must hold"):
        with_figures("no markers", ROOT / "docs" / "results")
