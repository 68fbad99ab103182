"""Text completions over a socket."""

from __future__ import annotations

import json
from typing import Any


def _post(running: Any, **fields: Any) -> Any:
    return running.post("/v1/completions", json={"model": "tiny", "prompt": "hello", **fields})


def test_prompts_of_every_kind_give_the_same(running: Any, tokenizer: Any) -> None:
    ids = tokenizer("hello")["input_ids"]
    whole = _post(running).json()["choices"][0]["text"]
    assert len(whole) <= 16
    assert whole
    assert _post(running, prompt=ids).json()["choices"][0]["text"] == whole
    for both in (["hello", "hello"], [ids, ids]):
        choices = _post(running, prompt=both).json()["choices"]
        assert [choice["text"] for choice in choices] == [whole, whole]
        assert [choice["index"] for choice in choices] == [0, 1]


def test_echo_comes_first(running: Any) -> None:
    whole = _post(running, echo=True, n=2).json()["choices"]
    assert all(choice["text"].startswith("hello") and len(choice["text"]) > 5 for choice in whole)
    with running.client() as client:
        body = {"model": "tiny", "prompt": "hello", "echo": True, "stream": True, "n": 2}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [json.loads(line)["choices"][0] for line in lines[:-1]]
    for index in range(2):
        assert "".join(e["text"] for e in events if e["index"] == index) == whole[index]["text"]


def test_logprobs_have_offsets(running: Any) -> None:
    choice = _post(running, logprobs=2, max_tokens=5).json()["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert [choice["text"][offset] for offset in found["text_offset"]] == found["tokens"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob


def test_token_beyond_the_vocabulary_is_refused(running: Any) -> None:
    response = _post(running, prompt=[5, 10**6])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert _post(running, logit_bias={"99999999": 1}).json()["error"]["param"] == "logit_bias"
