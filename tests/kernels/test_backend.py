"""Which kernels run where: by device, overridden in the environment, always said."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from twilight_kernels import _backend, _reference, backend_name

F32 = torch.float32
OVERRIDE = "HF_TWILIGHT_BACKEND"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was chosen and said before is of no account here, nor later."""
    caches = (_backend._name, _backend._triton, _backend._say_triton, _backend._say_reference)
    monkeypatch.delenv(OVERRIDE, raising=False)
    for found in caches:
        found.cache_clear()
    yield
    for found in caches:
        found.cache_clear()


def test_each_device_has_its_kernels() -> None:
    assert backend_name("cpu") == "numba"
    assert backend_name("cuda") == ("triton" if importlib.util.find_spec("triton") else "reference")
    assert backend_name(torch.device("meta")) == "reference"
    assert _backend.kernels("score", torch.zeros(1), F32).__name__.endswith("._numba_score")


def test_cuda_without_triton_runs_on_the_reference_and_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for _ in range(2):
        assert backend_name("cuda") == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install hf-twilight[gpu]" in caplog.text


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(OVERRIDE, "reference")
    with caplog.at_level(logging.INFO, logger="twilight_kernels"):
        for _ in range(2):
            assert _backend.kernels("score", torch.zeros(1), F32) is _reference
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        ("cuda", "cpu", "HF_TWILIGHT_BACKEND must be one of reference, numba, triton or unset, got 'cuda'"),
        ("numba", "cuda", "HF_TWILIGHT_BACKEND=numba runs on CPUs only, got tensors on cuda; unset it"),
        ("triton", "meta", "HF_TWILIGHT_BACKEND=triton runs on cuda, .* got tensors on meta; unset it"),
    ],
)
def test_what_cannot_run_is_refused(asked: str, kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, asked)
    with pytest.raises(ValueError, match=said):
        backend_name(kind)


def test_triton_on_cpus_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu where TRITON_INTERPRET=1 is set before triton is imported"):
        backend_name("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_name("cpu") == "triton"
