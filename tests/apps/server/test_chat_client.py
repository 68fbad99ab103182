"""``hf-twilight chat --url`` against a running server, and how it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twilight_apps.chat_partners import Manner, ServerPartner
from twilight_apps.cli import app


def _chat(text: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["chat", *arguments], input=text)


def test_conversation_goes_on(start_server: Callable[..., Any], tokenizer: Any) -> None:
    with start_server(script="It is blue.") as running:
        result = _chat("/system Be brief.\nWhat is the sky?\nAnd the sea?\n", "--url", running.url)
        assert result.exit_code == 0, result.output
        assert result.stdout.count("It is blue.") == 2
        assert "prompt tokens were cached" in result.stdout
        prompt = tokenizer.decode(running.engine.seen[-1].prompt)
        expected = ["system\nBe brief.", "user\nWhat is the sky?", "assistant\nIt is blue.", "user\nAnd the sea?"]
        places = [prompt.index(part) for part in expected]
        assert places == sorted(places)
        running.wait_idle()


def test_commands_change_the_conversation(start_server: Callable[..., Any], tokenizer: Any) -> None:
    with start_server(script="Yes.") as running:
        result = _chat("one\n/undo\ntwo\n/new\nthree\n/what\n/exit\nfour\n", "--url", f"{running.url}/v1/")
        assert result.exit_code == 0
        assert "take back the last question" in result.stdout
        prompts = [tokenizer.decode(handle.prompt) for handle in running.engine.seen]
        assert len(prompts) == 3
        assert "one" not in prompts[1]
        assert "two" not in prompts[2]


def test_failures_are_one_line_and_counted(start_server: Callable[..., Any]) -> None:
    with start_server(capacity=0) as running:
        result = _chat("hello\n", "--url", running.url)
        assert result.exit_code == 1
        assert "error: the server answers 429" in result.stdout
    result = _chat("hello\n", "--url", running.url)
    assert result.exit_code == 2
    assert "start one with hf-twilight serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--url", "localhost:8000"], "--url must begin with http://"),
        (["--url", "http://localhost", "--preset", "exact"], "--url must stand without"),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--temperature", "3"], "temperature must be in [0, 2]"),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: str) -> None:
    result = _chat("", *arguments)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_model_in_this_process_answers(tiny_model: str, tmp_path: Path) -> None:
    result = _chat("hello\n", "--model", tiny_model)
    assert result.exit_code == 2
    assert "must have a chat template" in result.stderr
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    result = _chat("hello\nagain\n", "--model", str(folder), "--preset", "exact", "--max-tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("tokens, first after") == 2


def test_answer_that_is_not_read_to_its_end_is_cancelled(start_server: Callable[..., Any]) -> None:
    with start_server(token_s=0.01) as running:
        partner = ServerPartner(running.url, None, None, Manner(max_tokens=1000))
        pieces = partner.answer([{"role": "user", "content": "hello"}])
        next(pieces)
        pieces.close()
        running.wait_idle(2.0)
        assert partner.name == "tiny"
