"""The published schema and the reader of our YAML say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from flyball.adapters.fleet_files import read_fleet
from flyball.adapters.fleet_schema import SCHEMA
from flyball.core.errors import InvalidInput

EXAMPLE = Path(__file__).parents[3] / "examples" / "fleet.yaml"


def example() -> dict[str, Any]:
    """The example fleet, with one of everything that it leaves out."""
    spec: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    spec["accelerators"][0]["power"] = {"idle_w": 30, "full_w": 70}
    spec["servers"][0]["current"] = {"accelerator": "L4", "replicas": 1}
    return spec


def objects(schema: dict[str, Any], spec: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every object of a spec with the schema it has to keep."""
    if "properties" in schema:
        yield schema, spec
        for name, inner in schema["properties"].items():
            if name in spec:
                yield from objects(inner, spec[name])
    elif schema.get("type") == "array" and isinstance(schema.get("items"), dict) and spec:
        yield from objects(schema["items"], spec[0])
    elif isinstance(schema.get("additionalProperties"), dict) and spec:
        yield from objects(schema["additionalProperties"], next(iter(spec.values())))


def test_the_schema_is_one_and_takes_the_example() -> None:
    """It is valid itself, and the example keeps it."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(example(), SCHEMA)


@pytest.mark.parametrize("at", range(8))
def test_both_know_the_same_fields(tmp_path: Path, at: int) -> None:
    """At each place the reader's complaint about an unknown field lists exactly the schema's fields."""
    spec = example()
    places = list(objects(SCHEMA, spec))
    assert len(places) == 8
    schema, place = places[at]
    place["no_such_field"] = 1
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(InvalidInput, match="is not a known field; use") as complaint:
        read_fleet(path)
    listed = re.split(r"; use ", str(complaint.value))[1].split(", ")
    assert set(listed) == set(schema["properties"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, SCHEMA)


def test_what_the_schema_requires_the_reader_does(tmp_path: Path) -> None:
    """Each required field, left out, is refused by both."""
    path = tmp_path / "fleet.json"
    for at in range(8):
        for name in list(objects(SCHEMA, example()))[at][0]["required"]:
            spec = example()
            del list(objects(SCHEMA, spec))[at][1][name]
            path.write_text(json.dumps(spec))
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(spec, SCHEMA)
            if name in ("accelerators", "profiles", "service_classes"):
                continue  # without them there is nothing to run on, which the plan says server by server
            with pytest.raises(InvalidInput):
                read_fleet(path)
