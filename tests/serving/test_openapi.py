"""The OpenAPI schema is complete, its examples are valid, and generated requests are answered according to it."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis.specs.openapi import checks as openapi_checks

from cluster.config import Config, ServingConfig
from serving.api_keys import create_key
from serving.gateway import build_api
from tests.serving.standin import Echo, client

# Not a loopback address, because schemathesis sends a Host header that names another machine.
API = build_api(Config(serving=ServingConfig(max_candidates=8, host="0.0.0.0", allow_no_keys=True)), Echo())
SCHEMA = API.openapi()
OPERATIONS = [(path, method) for path, methods in SCHEMA["paths"].items() for method in methods]
POSTS = [path for path, method in OPERATIONS if method == "post"]


def resolved(schema):
    """Return a validator of a schema of the document."""
    return Draft202012Validator({**schema, "components": SCHEMA["components"]})


def component(schema):
    return SCHEMA["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]


def example(path):
    """Return the example of a route's request body."""
    (shown,) = component(SCHEMA["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])["examples"]
    return shown


def content(path, method, status="200", kind="application/json"):
    return SCHEMA["paths"][path][method]["responses"][status]["content"][kind]["schema"]


def test_every_route_documents_its_body_its_answer_and_its_errors():
    for path, method in OPERATIONS:
        operation = SCHEMA["paths"][path][method]
        assert operation["description"], path
        for status, response in operation["responses"].items():
            assert "content" in response, (path, status)
            if status not in ("200", "503"):
                assert content(path, method, status) == {"$ref": "#/components/schemas/ErrorAnswer"}
        if method == "post":
            assert {"200", "400", "404", "408", "413", "415", "500", "503", "504"} <= operation["responses"].keys()
            assert operation["requestBody"]["required"]
    known = set(SCHEMA["components"]["schemas"])
    references = {part.split('"')[0] for part in json.dumps(SCHEMA).split("#/components/schemas/")[1:]}
    assert references <= known and "HTTPValidationError" not in known


@pytest.mark.parametrize("path", POSTS)
async def test_the_example_of_each_request_is_answered_according_to_the_schema(path):
    async with client(Echo()) as http:
        response = await http.post(path, json=example(path))
    assert response.status_code == 200
    resolved(content(path, "post")).validate(response.json())


def test_the_example_of_each_answer_is_valid():
    answers = [
        content(path, method)
        for path, method in OPERATIONS
        if "application/json" in SCHEMA["paths"][path][method]["responses"]["200"]["content"]
    ]
    models = [component(answer) for answer in [*answers, content("/v1/models", "get", "500")] if "$ref" in answer]
    assert len(models) >= len(POSTS)
    for model in models:
        (shown,) = model["examples"]
        resolved(model).validate(shown)


def test_with_keys_the_schema_documents_the_authentication():
    keyed = build_api(Config(serving=ServingConfig(api_keys=[{"name": "a", "sha256": create_key()[1]}])), Echo()).openapi()
    assert keyed["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert keyed["security"] == [{"bearer": []}, {"header": []}] and keyed["paths"]["/health"]["get"]["security"] == []
    assert {"401", "429"} <= keyed["paths"]["/v1/score"]["post"]["responses"].keys()
    assert "security" not in SCHEMA and "401" not in SCHEMA["paths"]["/v1/score"]["post"]["responses"]


CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_valid_and_invalid_requests_from_the_schema_are_answered_according_to_it(path, method):
    operation = schemathesis.openapi.from_asgi("/openapi.json", API)[path][method]
    statuses = set()

    @given(case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE), data=st.data())
    @settings(
        max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def fuzz(case, data):
        if isinstance(case.body, dict):
            case.body = {**case.body, "model": "cappy"}  # another model name would be a 404
            kept = data.draw(st.sampled_from([None, *sorted(case.body)]))
            if kept is not None:  # only one field is generated, the others are those of the example
                case.body = {**example(path), kept: case.body[kept]}
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    fuzz()
    assert statuses >= ({200, 400} if method == "post" else set()), statuses
