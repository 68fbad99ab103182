"""``hf-twilight calibrate``: settings for one model, written to a folder that ``--preset`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_twilight import Calibration, calibrate, calibrate_prefill, calibrate_skvq
from hf_twilight.calibration import RATIOS

from . import models, tables


def run(
    name: str,
    dtype: str,
    texts: list[Path],
    folder: Path,
    *,
    preset: str,
    changes: list[str],
    ratio: float | None,
    max_drift: float | None,
    sample_len: int,
    samples: int,
    seed: int,
    with_prefill: bool,
) -> dict[str, Any]:
    """Calibrate a model, write the result to ``folder`` and print what was found.

    Raises:
        ValueError: as ``hf_twilight.calibrate``; a text that is no UTF-8.
    """
    settings = models.parse_settings(preset, changes)
    model, tokenizer = models.load(name, dtype), models.load_tokenizer(name)
    words = [path.read_text(encoding="utf-8") for path in texts]
    with tables.progress("measuring layers", total=1) as bar:
        found = calibrate(
            model, tokenizer, words, preset=settings,
            ratio=RATIOS.get(preset) if ratio is None else ratio,
            max_drift=max_drift, sample_len=sample_len, samples=samples, seed=seed, folder=folder,
            on_progress=lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total),
        )  # fmt: skip
    if with_prefill:
        with tables.progress("reading prompts", total=1) as bar:
            chosen, facts = calibrate_prefill(
                model, tokenizer, words, found.settings, seed=seed,
                on_progress=lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total),
            )  # fmt: skip
        found = Calibration(chosen, found.report | {"prefill": facts})
    found.save_pretrained(folder)
    _print(found.settings, found.report)
    tables.say(f"written to {folder}; use it with: hf-twilight generate --preset {folder}")
    return {"settings": found.settings.to_dict(), "report": found.report}


def run_skvq(name: str, dtype: str, texts: list[Path], folder: Path, *, sample_len: int, seed: int) -> dict[str, Any]:
    """Calibrate SKVQ with the paper's recipe, 2-bit keys and 1.5-bit values, and write it to ``folder``."""
    model, tokenizer = models.load(name, dtype), models.load_tokenizer(name)
    words = [path.read_text(encoding="utf-8") for path in texts]
    settings = calibrate_skvq(model, tokenizer, words, folder, sample_len=sample_len, seed=seed)
    tables.say(f"written to {folder}; use it with: hf-twilight generate --preset {folder}")
    return {"settings": settings.to_dict()}


def _print(settings: Any, report: dict[str, Any]) -> None:
    """Show the layers, those that bear least first."""
    rows = []
    layers = report["layers"]
    for index in sorted(layers, key=lambda name: -layers[name]["keys"]["2"]):
        key_codec, value_codec = settings.codecs(int(index))
        drifts = [f"{1000 * nats:.2f}" for nats in (layers[index]["keys"]["2"], layers[index]["values"]["2"])]
        share = f"{report['kept_shares'].get(index, 1.0):.0%}"
        dense = "yes" if int(index) in settings.dense_layers else ""
        rows.append([index, *drifts, str(key_codec.bits), str(value_codec.bits), share, dense])
    columns = ["layer", "2-bit keys, mnat", "2-bit values, mnat", "key bits", "value bits", "kept", "dense"]
    tables.print_table("drift of each layer alone, and what it got", columns, rows)
    if "prefill" in report:
        _print_prefill(settings.alpha, report["prefill"])
    drift, ratio = report["expected_drift"], report["ratio"]
    tables.say(f"{ratio}x smaller than bf16 at 8,000 tokens; expected drift {drift:.4f} nats a token, p {settings.p}")


def _print_prefill(alpha: float, facts: dict[str, Any]) -> None:
    rows = [
        [tried, f"{found['score']:.2%}", f"{found['agreement']:.1%}", f"{found['kl']:.4f}", f"{found['density']:.0%}"]
        for tried, found in facts["tried"].items()
    ]
    columns = ["alpha", "score kept", "argmax agrees", "KL", "pairs computed"]
    tables.print_table(f"sparse prefill of {facts['sample_len']:,} tokens against dense", columns, rows)
    tables.say(f"alpha {alpha}: the smallest that keeps {facts['kept_score']:.0%} of the dense score")
