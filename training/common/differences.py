"""How two fingerprints differ, by the names of what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator


def differences(before: str | None, now: str) -> list[str] | None:
    """What differs between two fingerprints; `None` if the first is of an earlier version, or no fingerprint."""
    try:
        one, other = (dict(_leaves(json.loads(text))) for text in (before, now))
    except (TypeError, ValueError):
        return None
    return [
        f"{name} {one.get(name, 'nothing')} there, {other.get(name, 'nothing')} now"
        for name in sorted(one.keys() | other.keys())
        if one.get(name, "nothing") != other.get(name, "nothing")
    ]


def _leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of all entries, however deep."""
    if isinstance(value, str) and value.startswith("{"):  # one fingerprint in another
        value = json.loads(value)
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}".lstrip("."))
    else:
        yield name, json.dumps(value)
