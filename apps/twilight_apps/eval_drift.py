"""``hf-twilight eval ppl|kl|pareto``: drift from the dense model, bytes stored and bytes read, method by method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_twilight import TwilightCache
from hf_twilight.drift import Drift, Reference, decode_drift, packing_drift
from twilight_cache import DecodePolicy

from . import eval_bytes, eval_methods, eval_texts, models, tables
from .eval_methods import DECODE, DENSE, PACKING, Method
from .eval_texts import Excerpt
from .session import message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_TEXTS = "all texts"
MODES = (PACKING, DECODE)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        contexts: tokens of an excerpt.
        excerpts: of each text.
        chunk: tokens of a forward in the mode packing.
        positions: tokens that the mode decode predicts one by one.
        modes: of ``MODES``.
        seed: decides where excerpts begin.
    """

    contexts: tuple[int, ...]
    excerpts: int
    chunk: int
    positions: int
    modes: tuple[str, ...] = MODES
    seed: int = 0

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"mode must be {PACKING} or {DECODE}, got {mode!r}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if not 1 <= self.positions < min(self.contexts):
            raise ValueError(
                f"positions must be from 1 to {min(self.contexts) - 1} (less than the shortest context), got "
                f"{self.positions}"
            )


@dataclass(frozen=True)
class Measured:
    """One method on one or more excerpts in one mode; ``drift`` is None if it could not run, ``status`` says why."""

    text: str
    context: int
    mode: str
    method: Method
    status: str = "ok"
    drift: Drift | None = None
    stored: float = 0.0
    read: float | None = None
    candidates: float | None = None
    kept: float | None = None

    def record(self, dense: Measured) -> dict[str, Any]:
        """Return a flat record; ratios are to the stock cache of the same text, context and mode."""
        facts: dict[str, Any] = {
            "text": self.text, "context": self.context, "mode": self.mode, "method": self.method.name,
            "kind": self.method.kind, "status": self.status,
        }  # fmt: skip
        if self.drift is None:
            return facts
        facts |= self.drift.summary()
        facts |= {"stored_bytes": self.stored, "smaller": dense.stored / self.stored}
        if self.read is not None and dense.read is not None:
            facts |= {"read_bytes": self.read, "reads_less": dense.read / self.read}
            facts |= {"candidate_tokens": self.candidates, "kept_tokens": self.kept}
        return facts


def run(
    model_name: str,
    dtype: str,
    texts: dict[str, str],
    plan: Plan,
    presets: Sequence[str],
    baselines: Sequence[str],
) -> dict[str, Any]:
    """Measure all methods on all texts.

    Returns:
        What ``--json`` prints: ``"records"`` is one flat record for each text, context, mode and method, and, of
        several texts, for ``ALL_TEXTS`` together.
    """
    chosen = eval_methods.presets(presets)
    chosen_baselines = eval_methods.baselines(baselines)
    if PACKING in plan.modes:
        _require_windows(chosen, plan.chunk)
    tokenizer = models.load_tokenizer(model_name)
    parts = {
        context: [
            excerpt
            for name, text in texts.items()
            for excerpt in eval_texts.excerpts(tokenizer, name, text, context + 1, plan.excerpts, plan.seed)
        ]
        for context in plan.contexts
    }
    model = models.load(model_name, dtype, max(plan.contexts) + 1)
    models.use_attention(model, models.OUR_ATTENTION)
    records: list[dict[str, Any]] = []
    methods = [eval_methods.dense(), *chosen, *chosen_baselines]
    for cut in parts.values():
        records += _pooled(_at_context(model, cut, methods, plan))
    return {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": plan.seed,
        "chunk": plan.chunk,
        "positions": plan.positions,
        "excerpts": [
            {"text": e.text, "context": context, "start": e.start} for context, cut in parts.items() for e in cut
        ],
        "settings": {method.name: method.settings for method in methods},
        "records": records,
    }


def _require_windows(chosen: Sequence[Method], chunk: int) -> None:
    for method in chosen:
        if chunk > method.settings["window"]:
            raise ValueError(
                f"chunk must be at most the window of {method.name}, {method.settings['window']} tokens, or part of "
                f"what is read would never have been packed; got {chunk}"
            )


def _at_context(model: PreTrainedModel, excerpts: list[Excerpt], methods: list[Method], plan: Plan) -> list[Measured]:
    """Measure every method on every excerpt of one length; the reference of an excerpt is made once."""
    runs = [(mode, method) for method in methods for mode in plan.modes if mode in method.modes]
    context = excerpts[0].ids.shape[1] - 1
    found = []
    with tables.progress("Reading", len(excerpts) * (len(runs) + 1) * context) as bar:
        task = bar.task_ids[0]

        def advance(tokens: int) -> None:
            bar.advance(task, tokens)

        for excerpt in excerpts:
            bar.update(task, description=f"{excerpt.text}, {context} tokens: dense reference")
            reference = Reference.of(model, excerpt.ids, on_tokens=advance)
            for mode, method in runs:
                bar.update(task, description=f"{excerpt.text}, {context} tokens: {method.name}, {mode}")
                blank = Measured(excerpt.text, context, mode, method)
                found.append(_measure(model, reference, blank, plan, advance))
    return found


def _measure(
    model: PreTrainedModel,
    reference: Reference,
    blank: Measured,
    plan: Plan,
    on_tokens: Callable[[int], object],
) -> Measured:
    method = blank.method
    if method.missing is not None:
        return replace(blank, status=method.missing)
    try:
        return _run(model, reference, blank, plan, on_tokens)
    except Exception as error:  # whatever a peer does must not end the others' measurement, and is shown
        if method.kind != eval_methods.PEER:
            raise
        return replace(blank, status=f"failed: {type(error).__name__}: {message(error)}")


def _run(
    model: PreTrainedModel,
    reference: Reference,
    blank: Measured,
    plan: Plan,
    on_tokens: Callable[[int], object],
) -> Measured:
    cache = blank.method.make(model.config)
    if blank.mode == PACKING:
        drift = packing_drift(model, reference, cache, chunk=plan.chunk, on_tokens=on_tokens)
        return replace(blank, drift=drift, stored=eval_bytes.stored_bytes(cache, model.dtype))
    drift = decode_drift(model, reference, cache, positions=plan.positions, on_tokens=on_tokens)
    return replace(
        blank,
        drift=drift,
        stored=eval_bytes.stored_bytes(cache, model.dtype),
        read=eval_bytes.read_bytes(cache, model.dtype),
        candidates=_mean(cache, "candidates"),
        kept=_mean(cache, "kept"),
    )


def _mean(cache: Any, count: str) -> float | None:
    """A count of packed tokens, mean over steps, heads and the layers that prune; None for other caches."""
    if not isinstance(cache, TwilightCache):
        return None
    policies = {layer["layer"]: cache.settings.policy(layer["layer"]) for layer in cache.stats()}
    layers = [layer for layer in cache.stats() if policies[layer["layer"]] != DecodePolicy()]
    if not layers:
        return None
    means: list[float] = [sum(layer[count]) / len(layer[count]) for layer in layers]
    return sum(means) / len(means)


def _pooled(found: list[Measured]) -> list[dict[str, Any]]:
    """Join the excerpts of each text and, where there are several texts, all of them; return records."""
    texts = list(dict.fromkeys(measured.text for measured in found))
    if len(texts) > 1:
        found = found + [replace(measured, text=ALL_TEXTS) for measured in found]
        texts.append(ALL_TEXTS)
    records = []
    for text in texts:
        of_text = [measured for measured in found if measured.text == text]
        for mode in dict.fromkeys(measured.mode for measured in of_text):
            names = list(dict.fromkeys(m.method.name for m in of_text if m.mode == mode))
            joined = {name: _join([m for m in of_text if m.mode == mode and m.method.name == name]) for name in names}
            records += [measured.record(joined[DENSE]) for measured in joined.values()]
    return records


def _join(parts: list[Measured]) -> Measured:
    """Join the excerpts of one method: positions are put together, bytes and tokens averaged."""
    drifts = [part.drift for part in parts]
    if any(drift is None for drift in drifts):
        return parts[0]
    drift = drifts[0]
    for other in drifts[1:]:
        assert drift is not None and other is not None
        drift += other

    def mean(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else sum(values) / len(values)

    return replace(
        parts[0],
        drift=drift,
        stored=mean("stored"),
        read=mean("read"),
        candidates=mean("candidates"),
        kept=mean("kept"),
    )
