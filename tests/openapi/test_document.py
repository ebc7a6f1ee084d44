"""The document and the monitor have the same operations, and the document says what the other tests need to know."""

import itertools
import json
import re

import pytest
from bodies import Maker
from document import PATH, operations

OPERATIONS = operations()
# The monitor's words for a path that it does not have.
UNKNOWN = ("Invalid request method and/or path", "not supported by this version", "Unrecognized")
# The longest paths of the API have three words.
DEPTH = 3
# The words of the route table: what a path may consist of.
ROUTES = PATH.parents[1] / "vmm" / "src" / "api"


def answer(machine, method, path):
    """The status, and the reason of a refusal, of a request with an empty object for a body where there may be one."""
    body = b"{}" if method in ("PUT", "PATCH") else None
    with machine.session.request(method, machine.URL + path, data=body, stream=True) as answer:
        # What is no refusal may be a stream without an end.
        return answer.status_code, answer.text if answer.status_code == 400 else ""


def is_unknown(answer):
    return answer[0] == 400 and any(words in answer[1] for words in UNKNOWN)


def unlike_others(machine, method, path, word):
    """Below a resource, what is answered like any other name is an id, or is not looked at."""
    other = "z-z" if "-" in word else "zz"
    names = re.compile(rf"(?<![\w-])({word}|{other})(?![\w-])")
    said = [answer(machine, method, f"{path}/{name}") for name in (word, other)]
    return said[0][0] != said[1][0] or names.sub("*", said[0][1]) != names.sub("*", said[1][1])


def routes(machine):
    """The monitor's routes, found by asking for everything that the words of its route table make."""
    code = "".join(file.read_text().split("#[cfg(test)]")[0] for file in sorted(ROUTES.rglob("*.rs")))
    words = sorted(set(re.findall(r'"([a-z][a-z-]*)"', code)))
    found = set()
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        paths = ["/", *(f"/{word}" for word in words)]
        found.update((method, path) for path in paths if not is_unknown(answer(machine, method, path)))
        parents = paths[1:]
        for _ in range(DEPTH - 1):
            pairs = itertools.product(parents, words)
            parents = [f"{path}/{word}" for path, word in pairs if unlike_others(machine, method, path, word)]
            found.update((method, path) for path in parents if not is_unknown(answer(machine, method, path)))
    return found


def test_every_route_is_in_the_document(new_machine):
    documented = {(operation.method, operation.path.split("/{")[0]) for operation in OPERATIONS}
    undocumented = sorted(routes(new_machine("routes")) - documented)
    assert not undocumented, "these routes are missing in resources/openapi.yaml"


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_operation_has_a_route(machine, operation):
    if operation.streams:
        assert not is_unknown(answer(machine, operation.method, operation.path))
        return
    body = Maker(operation, machine.folder).good() if operation.schema else None
    said = machine.request(operation.method, operation.url(body), body)
    assert not is_unknown((said.status_code, said.text))


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.streams], ids=str)
def test_streams_begin_with_what_the_document_says(machine, operation):
    media_type, content = next(iter(operation.raw["responses"]["200"]["content"].items()))
    with machine.session.request(operation.method, machine.URL + operation.path, stream=True) as answer:
        assert answer.headers["Content-Type"] == media_type
        first = json.loads(next(answer.iter_lines(chunk_size=1)))
    assert set(content["schema"]["required"]) <= set(first)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_every_operation_says_when_it_is_possible_and_how_it_is_refused(operation):
    assert operation.states, 'the summary says none of "Before start", "After start", "At any time"'
    assert "400" in operation.raw["responses"]
    assert "default" not in operation.raw["responses"]


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.schema], ids=str)
def test_every_body_says_what_becomes_of_unknown_fields(operation):
    undecided = []

    def walk(schema, place):
        if "properties" in schema and "additionalProperties" not in schema:
            undecided.append(place)
        for name, field in schema.get("properties", {}).items():
            walk(field, f"{place}.{name}")
        walk(schema["items"], f"{place}[]") if "items" in schema else None

    walk(operation.schema, "body")
    assert undecided == []
