"""What a stage was made from, as one short hash; and the difference between two such records in words."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def fingerprint(name: str, given: dict[str, Any]) -> str:
    """Return 16 characters for a stage's name, settings, and the fingerprints of its inputs."""
    return hashlib.sha256(json.dumps([name, given], sort_keys=True).encode()).hexdigest()[:16]


def difference(made: dict[str, Any], given: dict[str, Any]) -> str:
    """Say which settings differ between two records, or else which inputs."""
    changed = [f"{key}: {old} -> {new}" for key, old, new in _changes(made["settings"], given["settings"])]
    inputs = [key for key, _, _ in _changes(made["inputs"], given["inputs"])]
    return "; ".join(changed) or f"its input {', '.join(inputs)} changed"


def differs_beyond(sections: Sequence[str], made: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether two records differ in settings other than those of `sections`."""
    first, second = (
        {key: value for key, value in record["settings"].items() if key not in sections} for record in (made, given)
    )
    return first != second


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested values as (dotted key, value) pairs, sorted by key."""
    pairs: list[tuple[str, Any]] = []
    for key in sorted(values):
        value = values[key]
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old value, new value) of what differs; None stands for a missing key."""
    old, new = dict(flatten(before)), dict(flatten(after))
    return [(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
