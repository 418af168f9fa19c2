"""The OpenAPI document is what the server does: schemathesis asks everything in it."""

from __future__ import annotations

import pytest
import schemathesis
from fake_engine import FakeEngineClient
from http_app import MODEL, Caller, make_app
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

app = make_app(FakeEngineClient())
schema = schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_request_model_is_defined() -> None:
    document = Caller(app).get("/openapi.json").json()
    defined = document["components"]["schemas"]
    for path in ("/generate", "/", "/v1/completions", "/v1/chat/completions", "/tokenize"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for ref in body["schema"].get("anyOf", [body["schema"]]):
            assert ref["$ref"].rsplit("/", 1)[1] in defined
    fields = defined["GenerateRequest"]["properties"]
    assert fields["prompt"]["anyOf"][0] == {"type": "string"}
    assert all(name != "prompt_logprobs" for name in fields)


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_nothing_in_the_document_is_untrue(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = MODEL
    # A document can't say what fits this model and its template: those refusals have own tests.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
