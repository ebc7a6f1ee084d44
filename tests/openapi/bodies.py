"""Bodies made from schemas: good ones, and bad ones with the reason why each is bad."""

import json
from dataclasses import dataclass

# Below and above all that the API's unsigned numbers hold.
BELOW, ABOVE = -1, 2**64
DISK_SIZE = 4 << 20
# Marks a key that is to be sent without the mark, and so a second time.
AGAIN = "<again>"


@dataclass(frozen=True)
class Bad:
    """A bad body: the text to send, what is wrong with it, and words that the answer must have."""

    text: bytes
    reason: str
    words: tuple = ()


class Maker:
    """Makes the bodies of an operation; the files that they name are in `folder`."""

    def __init__(self, operation, folder):
        self.operation = operation
        self.folder = folder

    def good(self):
        """The example of the document, else a body with nothing but what is required."""
        return self.smallest(self.operation.schema)

    def bad(self):
        """Every bad body."""
        body = self.good()
        text = json.dumps(body).encode()
        for broken in (b"{", b"not json", b"\xff\xfe", text + b"}", text[:-1]):
            yield Bad(broken, "it is not JSON", ("json",))
        for wrong, reason, words in self.wrong(self.operation.schema, body):
            yield Bad(json.dumps(wrong).replace(AGAIN, "").encode(), reason, words)

    def tolerant(self):
        """Good bodies, each with a field that the document neither knows nor forbids."""
        body = self.good()
        yield from self.with_unknown_field(self.operation.schema, body)

    def smallest(self, schema, name=""):
        """The example of a schema, else a value with nothing but what is required."""
        if "example" in schema:
            return self.with_files(schema["example"], name)
        kind = schema.get("type")
        if kind == "object":
            return {key: self.smallest(schema["properties"][key], key) for key in schema.get("required", [])}
        if kind == "array":
            return [self.smallest(schema["items"])] * schema.get("minItems", 0)
        plain = {"string": "a" * schema.get("minLength", 1), "boolean": False, "integer": schema.get("minimum", 1)}
        default = schema.get("default", plain.get(kind, {}))
        return self.with_files(schema.get("enum", [default])[0], name)

    def with_files(self, value, name=""):
        """The value with files of the folder where it names files; those that are read are made."""
        if isinstance(value, dict):
            return {key: self.with_files(item, key) for key, item in value.items()}
        if name == "kernel_image_path":
            return "kernel"
        if name == "host_dev_name":
            return self.folder.name[:15]
        if name == "path_on_host":
            disk = self.folder / f"{self.operation.resource}.img"
            with disk.open("ab") as file:
                file.truncate(DISK_SIZE)
            return disk.name
        return f"{self.operation.resource}.{name}" if name.endswith("path") else value

    def wrong(self, schema, value):
        """Values that a schema forbids, near the good `value`; with the reason, and words for the answer."""
        for wrong in wrong_kinds(schema):
            yield wrong, f"{wrong!r} is no {schema.get('type')}", ()
        for wrong in wrong_sizes(schema):
            yield wrong, f"{str(wrong)[:40]} is out of range", ()
        if schema.get("type") == "object":
            yield from self.wrong_fields(schema, value)
        if schema.get("type") == "array":
            item = value[0] if value else self.smallest(schema["items"])
            for wrong, reason, words in self.wrong(schema["items"], item):
                yield [wrong], f"in the list, {reason}", words

    def wrong_fields(self, schema, value):
        """Objects that a schema forbids."""
        for name in schema.get("required", []):
            yield {key: item for key, item in value.items() if key != name}, f"no {name}", (name,)
        if schema.get("additionalProperties") is False:
            yield {**value, "no_such_field": 1}, "a field that does not exist", ("no_such_field",)
        elif isinstance(schema.get("additionalProperties"), dict):
            for wrong, reason, words in self.wrong(schema["additionalProperties"], ""):
                yield {**value, "any": wrong}, reason, words
        for name, field in schema.get("properties", {}).items():
            item = value.get(name, self.smallest(field, name))
            yield {**value, name: item, name + AGAIN: item}, f"{name} twice", ("duplicate field", name)
            for wrong, reason, words in self.wrong(field, item):
                yield {**value, name: wrong}, f"{name}: {reason}", words

    def with_unknown_field(self, schema, value):
        """The value with an unknown field in each of its objects that may have one."""
        fields = schema.get("properties", {})
        if fields and schema.get("additionalProperties"):
            yield {**value, "no_such_field": 1}
        for name, field in fields.items():
            item = value.get(name, self.smallest(field, name))
            for inner in self.with_unknown_field(field, item):
                yield {**value, name: inner}
        if "items" in schema:
            item = value[0] if value else self.smallest(schema["items"])
            for inner in self.with_unknown_field(schema["items"], item):
                yield [inner]


def wrong_kinds(schema):
    """Values of every other type; no array for an object, as arrays are taken as fields in order."""
    kind = schema.get("type")
    if kind is None:
        return
    others = {"string": [7, True, {"a": 1}, ["a"]], "boolean": ["true", 1, {}], "array": [7, "a", {"a": 1}, True]}
    others["integer"] = ["1", 1.5, True, {"a": 1}]
    others["object"] = [7, "a", True]
    yield from others[kind]
    if not schema.get("nullable"):
        yield None


def wrong_sizes(schema):
    """Values of the right type that are out of range."""
    kind = schema.get("type")
    if "enum" in schema:
        yield "no such value"
    elif kind == "integer":
        yield schema.get("minimum", 0) - 1
        yield BELOW
        yield schema.get("maximum", ABOVE - 1) + 1
        yield ABOVE
    elif kind == "string":
        if "maxLength" in schema:
            yield "a" * (schema["maxLength"] + 1)
        if schema.get("minLength"):
            yield "a" * (schema["minLength"] - 1)
        if "pattern" in schema:
            yield "!"
    elif kind == "array" and "maxItems" in schema:
        yield [0] * (schema["maxItems"] + 1)
    elif kind == "object" and schema.get("minProperties"):
        yield {}
