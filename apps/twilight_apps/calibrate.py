"""``hf-twilight calibrate``: settings for one model, written to a folder that ``--preset`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_twilight import Calibration, calibrate, calibrate_prefill, calibrate_skvq
from hf_twilight.calibration import RATIOS, REPORT_NAME

from . import documents, models, tables


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
        ValueError: as ``hf_twilight.calibrate``; an empty text, or one that is no UTF-8.
        FileNotFoundError: a missing text.
        NotADirectoryError: ``folder`` is a file.
    """
    settings = models.parse_settings(preset, changes)
    words = _words(texts, folder)
    if ratio is None and preset not in RATIOS:
        raise ValueError(f"--ratio must be given unless --preset is one of {', '.join(RATIOS)}, got {preset!r}")
    model, tokenizer = models.load(name, dtype), models.load_tokenizer(name)
    try:
        with tables.progress("measuring layers", total=1) as bar:
            found = calibrate(
                model, tokenizer, words, preset=settings, ratio=RATIOS[preset] if ratio is None else ratio,
                max_drift=max_drift, sample_len=sample_len, samples=samples, seed=seed, folder=folder,
                on_progress=lambda done, total: bar.update(bar.task_ids[0], completed=done, total=total),
            )  # fmt: skip
    except KeyboardInterrupt:
        if (folder / REPORT_NAME).is_file():
            tables.say(f"measurements so far are kept in {folder}: the same command goes on")
        raise
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
    tables.say(
        f"beside presets, on other text: hf-twilight eval pareto --small --preset {preset} --preset {folder} "
        "--text OTHER.txt --out results"
    )
    return {"settings": found.settings.to_dict(), "report": found.report}


def run_skvq(name: str, dtype: str, texts: list[Path], folder: Path, *, sample_len: int, seed: int) -> dict[str, Any]:
    """Calibrate SKVQ with the paper's recipe, 2-bit keys and 1.5-bit values, and write it to ``folder``."""
    words = _words(texts, folder)
    model, tokenizer = models.load(name, dtype), models.load_tokenizer(name)
    settings = calibrate_skvq(model, tokenizer, words, folder, sample_len=sample_len, seed=seed)
    tables.say(f"written to {folder}; use it with: hf-twilight generate --preset {folder}")
    return {"settings": settings.to_dict()}


def _words(texts: list[Path], folder: Path) -> list[str]:
    """Read the texts, before minutes of work, and see that ``folder`` may be one."""
    words = [documents.document_text(path) for path in texts]
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out must be a folder, got the file {folder}; give another name")
    return words


def _print(settings: Any, report: dict[str, Any]) -> None:
    """Show the layers, those that bear least first."""
    rows = []
    layers = report["layers"]
    for index in sorted(layers, key=lambda name: -layers[name]["keys"]["0.0"]):
        key_codec, value_codec = settings.codecs(int(index))
        keys, values = layers[index]["keys"], layers[index]["values"]
        drifts = [f"{1000 * nats:.2f}" for nats in (keys["0.0"], keys["0.25"], values["0.0"])]
        share = f"{report['kept_shares'].get(index, 1.0):.0%}"
        dense = "yes" if int(index) in settings.dense_layers else ""
        refined = settings.refined(int(index), *layers[index]["shape"][:2]).count
        got = [str(key_codec.bits), str(refined) if refined else "", str(value_codec.bits)]
        rows.append([index, *drifts, *got, share, dense])
    columns = [
        "layer", "2-bit keys", "a quarter refined", "2-bit values", "key bits", "channels refined", "value bits",
        "tokens kept", "dense",
    ]  # fmt: skip
    title = "drift of each layer rounded alone, thousandths of a nat, and what it got; the most sensitive first"
    tables.print_table(title, columns, rows)
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
