"""Requests made up from the server's own OpenAPI: whatever comes, the answer is a declared one and no fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
JSON = {"content-type": "application/json"}
PATHS = {"/v1/chat/completions": "ChatRequest", "/v1/completions": "CompletionRequest"}


@pytest.fixture(scope="module")
def spec(running: Any) -> dict[str, Any]:
    with running.client() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def _from_schema(schema: dict[str, Any], spec: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that mostly fit a schema: lengths, patterns and ranges are only sometimes kept."""
    if "$ref" in schema:
        return _from_schema(spec["components"]["schemas"][schema["$ref"].split("/")[-1]], spec, depth + 1)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return st.one_of([_from_schema(part, spec, depth + 1) for part in schema[word]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        known = {name: _from_schema(part, spec, depth + 1) for name, part in schema.get("properties", {}).items()}
        needed = set(schema.get("required", ()))
        if not known:
            return st.dictionaries(st.text(max_size=4), _anything(), max_size=2)
        return st.fixed_dictionaries(
            {name: part for name, part in known.items() if name in needed},
            optional={name: part for name, part in known.items() if name not in needed},
        )
    if kind == "array":
        return st.lists(_from_schema(schema.get("items", {}), spec, depth + 1), max_size=3)
    if kind == "integer":
        low, high = schema.get("minimum", -5), schema.get("maximum", 2**64)
        return st.integers(low, min(high, 40)) | st.integers(low - 1, high + 1)
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum")) | st.floats()
    plain = {"string": st.text(max_size=12), "boolean": st.booleans(), "null": st.none()}
    return plain.get(str(kind), _anything())


def _anything() -> st.SearchStrategy[Any]:
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(leaf, lambda part: st.lists(part, max_size=2) | st.dictionaries(st.text(max_size=3), part))


def _check(running: Any, spec: dict[str, Any], path: str, body: bytes) -> int:
    response = running.post(path, content=body, headers=JSON)
    assert str(response.status_code) in spec["paths"][path]["post"]["responses"], response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    return int(response.status_code)


@pytest.mark.parametrize("path", PATHS)
def test_requests_in_the_schemas_shape_are_answered_as_declared(running: Any, spec: Any, path: str) -> None:
    strategy = _from_schema(spec["components"]["schemas"][PATHS[path]], spec)
    statuses = set()

    @SETTINGS
    @given(strategy, st.booleans())
    def check(body: dict[str, Any], is_ours: bool) -> None:
        # small answers, and often the right model: otherwise 404 hides the rest
        body["max_tokens"] = 3
        body.pop("max_completion_tokens", None)
        if is_ours:
            body["model"] = "tiny"
        statuses.add(_check(running, spec, path, json.dumps(body).encode()))

    check()
    running.wait_idle()
    assert {200, 422} <= statuses


@pytest.mark.parametrize("path", PATHS)
def test_valid_request_with_one_field_replaced_is_answered_as_declared(running: Any, spec: Any, path: str) -> None:
    valid: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
    valid |= {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    names = sorted(spec["components"]["schemas"][PATHS[path]]["properties"])

    @SETTINGS
    @given(st.sampled_from(names), _anything())
    def check(name: str, value: Any) -> None:
        _check(running, spec, path, json.dumps({**valid, name: value}).encode())

    check()
    running.wait_idle()


def test_any_bytes_are_answered(running: Any, spec: Any) -> None:
    @SETTINGS
    @given(st.binary(max_size=60))
    def check(body: bytes) -> None:
        assert _check(running, spec, "/v1/completions", body) in (400, 422)

    check()
