"""Requests that schemathesis makes up from the document, good and bad, the same ones every time. No answer may say that
the server is at fault, be missing, or be other than the document says; no nonsense may be taken; and the monitor must
live on.
"""

import schemathesis
from document import PATH, is_positional, operations
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
CONFIG = {"seed": 1, "generation": {"max-examples": 40, "deterministic": True, "no-shrink": True}}
SCHEMAS = {(operation.method, operation.path): operation.schema for operation in operations()}
STREAMS = [operation.path for operation in operations() if operation.streams]
SCHEMA = schemathesis.openapi.from_path(PATH, config=schemathesis.Config.from_dict(CONFIG)).exclude(path=STREAMS)


def check(case, machine):
    """Sends a made-up request and checks its answer."""
    schema = SCHEMAS[case.operation.method.upper(), case.operation.path] or {}
    checks = CHECKS if is_positional(schema, case.body) else [*CHECKS, negative_data_rejection]
    case.call_and_validate(base_url=machine.URL, session=machine.session, checks=checks)
    machine.check_alive()


@SCHEMA.parametrize()
def test_made_up_requests_before_the_start(case, machine_before):
    check(case, machine_before)


@SCHEMA.parametrize()
def test_made_up_requests_after_the_start(case, machine_after):
    check(case, machine_after)
