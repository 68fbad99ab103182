"""Help, verbosity, errors and exit codes."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMANDS = [
    ["generate"],
    ["parity"],
    ["env"],
    ["bench", "decode"],
    ["bench", "generate"],
    ["bench", "prefill"],
    ["bench", "serve"],
]
COMMANDS += [["eval", name] for name in ("ppl", "kl", "pareto", "mass", "budget", "prefill", "needle", "ruler")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(cli: Callable[..., Any], command: list[str]) -> None:
    result = cli(*command, "--help")
    assert result.exit_code == 0
    assert f"hf-twilight {' '.join(command)}" in result.stdout
    assert "Example" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_help_of_what_runs_until_stopped_shows_an_example(cli: Callable[..., Any], command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert f"hf-twilight {command} --" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, twilight_apps.cli; print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_main_without_arguments_teaches(cli: Callable[..., Any]) -> None:
    result = cli()
    assert "hf-twilight generate" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "--model", "./no-such-folder"], "no-such-folder"),
        (["generate", "--preset", "compct"], "did you mean 'compact'"),
        (["generate", "--set", "key_bit=4"], "did you mean 'key_bits'"),
        (["generate", "--set", "p=1.5"], "p must be in (0, 1], got 1.5"),
        (["generate", "--set", "p"], "--set must be key=value, got 'p'"),
        (["generate", "--temperature", "-1"], "temperature must be 0"),
        (["generate", "--prompt", "a", "--document", "b"], "--prompt must stand alone"),
        (["generate", "--load-cache", "a", "--preset", "exact"], "--load-cache must stand without --preset"),
        (["generate", "--load-cache", "no-such-file"], "no-such-file"),
        (["generate", "--threads", "0"], "threads must be at least 1, got 0"),
        (["parity", "--new-tokens", "1"], "new_tokens must be at least 2, got 1"),
        (["serve", "--api-key", "a", "--api-key-file", "b"], "must not be given both"),
        (["serve", "--api-key", " "], "the API key must not be empty"),
        (["serve", "--api-key-file", "no-such-file"], "no-such-file"),
        (["serve", "--chat-template", "no-such-file"], "chatml-tools, got 'no-such-file'"),
        (["serve", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["serve", "--max-connections", "0"], "max_connections must be at least 1, got 0"),
        (["serve", "--stall-s", "0"], "stall_s must be above 0"),
        (["bench", "decode", "--shape", "llama"], "shape must be llama3-8b, smollm2 or H,K,D"),
        (["bench", "decode", "--shape", "3,2,64"], "multiple of KV heads"),
        (["bench", "decode", "--p", "0"], "p must be in (0, 1], got 0"),
        (["bench", "generate", "--new-tokens", "0"], "new_tokens must be at least 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_2(
    cli: Callable[..., Any], arguments: list[str], expected: str, tiny_model: str
) -> None:
    if "--model" not in arguments and arguments[:2] != ["bench", "decode"]:
        arguments = [*arguments, "--model", tiny_model]
    result = cli(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("option", ["--max-running", "--prefill-tokens", "--max-cache-tokens"])
def test_limits_are_looked_at_before_a_model_is_loaded(cli: Callable[..., Any], option: str) -> None:
    result = cli("serve", option, "0", "--model", "no-such-model")
    assert result.exit_code == 2
    assert f"'{option}'" in result.stderr


def test_dtype_must_be_known(cli: Callable[..., Any], tiny_model: str) -> None:
    result = cli("generate", "--model", tiny_model, "--dtype", "int8")
    assert (result.exit_code, result.stderr.strip()) == (
        2,
        "error: dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
    )


def test_very_verbose_shows_the_traceback(cli: Callable[..., Any]) -> None:
    result = cli("generate", "--preset", "none", "-vv")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_interrupt_ends_with_130(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twilight_apps.generate.run", interrupted)
    result = cli("generate")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_logging_is_as_before_afterwards(cli: Callable[..., Any]) -> None:
    logger = logging.getLogger("hf_twilight")
    before = list(logger.handlers), logger.level, logger.propagate
    cli("env", "-v")
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_env_prints_what_a_bug_report_needs(cli: Callable[..., Any]) -> None:
    result = cli("env", "--json")
    assert result.exit_code == 0
    found = result.json
    assert found["command"] == "env"
    assert found["string_patch_active"] is True
    assert {"exact", "balanced", "compact"} <= set(found["presets"])
    assert {"python", "versions", "cpu", "threads", "devices", "backend"} <= set(found["environment"])
    assert found["environment"]["versions"]["torch"]


def test_missing_document_is_named(cli: Callable[..., Any], tiny_model: str, tmp_path: Path) -> None:
    result = cli("generate", "--model", tiny_model, "--document", tmp_path / "none.txt")
    assert result.exit_code == 2
    assert "none.txt" in result.stderr
