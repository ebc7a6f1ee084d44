"""The operations of resources/openapi.yaml, with every reference resolved."""

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

PATH = Path(__file__).parents[2] / "resources" / "openapi.yaml"
METHODS = ("get", "put", "patch", "delete")
# The words of a summary that say when an operation is possible, and in which states that is.
STATES = {"before start": {"before"}, "after start": {"after"}, "at any time": {"before", "after"}}


@dataclass(frozen=True, eq=False)
class Operation:
    """One method of one path."""

    method: str
    path: str
    raw: dict
    # The schema of the body; None where there may be no body.
    schema: dict | None
    body_required: bool
    parameters: tuple

    def __str__(self):
        return f"{self.method} {self.path}"

    @property
    def resource(self):
        """The first part of the path."""
        return self.path.split("/")[1]

    @property
    def states(self):
        """The states that the summary names; a GET is possible in both unless that says something else."""
        summary = self.raw["summary"].lower()
        named = set().union(*(states for words, states in STATES.items() if words in summary))
        return named or ({"before", "after"} if self.method == "GET" else set())

    @property
    def streams(self):
        """The answer goes on until the process ends."""
        return "application/x-ndjson" in self.raw["responses"].get("200", {}).get("content", {})

    @property
    def configures(self):
        """Sets a part of a machine that is not started."""
        return self.method == "PUT" and "before" in self.states and self.resource != "actions"

    def url(self, body=None, **ids):
        """The path with its parameters filled in: `ids`, else what the body says, else any id."""
        filled = self.path
        for name in self.parameters:
            fitting = body if isinstance(body, dict) else {}
            value = ids.get(name, fitting.get(name, "any"))
            filled = filled.replace("{%s}" % name, value)
        return filled


def load():
    """The document as plain data."""
    return resolved(yaml.safe_load(PATH.read_text(encoding="utf-8")))


def resolved(document):
    """The document with references replaced by what they refer to, and `allOf` by one schema."""

    def walk(node):
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = document
            for key in node["$ref"].removeprefix("#/").split("/"):
                target = target[key]
            return walk(target)
        node = {key: walk(value) for key, value in node.items()}
        for part in node.pop("allOf", []):
            node = {**part, **node}
        return node

    return walk(document)


def is_positional(schema, value):
    """Somewhere in the value there is an array for an object: the monitor takes it as the fields in their order."""
    if isinstance(value, list):
        return schema.get("type") == "object" or any(is_positional(schema.get("items", {}), item) for item in value)
    fields = schema.get("properties", {})
    return isinstance(value, dict) and any(is_positional(fields.get(name, {}), value[name]) for name in value)


@functools.cache
def operations():
    """Every operation, in the order of the document."""
    found = []
    for path, item in load()["paths"].items():
        for method in METHODS:
            if method not in item:
                continue
            raw = item[method]
            body = raw.get("requestBody", {})
            content = body.get("content", {}).get("application/json", {})
            parameters = item.get("parameters", []) + raw.get("parameters", [])
            found.append(
                Operation(
                    method=method.upper(),
                    path=path,
                    raw=raw,
                    schema=content.get("schema"),
                    body_required=body.get("required", False),
                    parameters=tuple(p["name"] for p in parameters if p["in"] == "path"),
                )
            )
    return found
