"""Lets functions that take masks, rules or biases be serialised by `jax.export`."""

from __future__ import annotations

import json
from typing import Any

from jax import export


def exportable[T](cls: type[T]) -> type[T]:
    """Registers a pytree whose static fields are numbers and text."""
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jsparse.{cls.__name__}",
        serialize_auxdata=_to_bytes,
        deserialize_auxdata=_from_bytes,
    )
    return cls


def _to_bytes(fields: tuple[Any, ...]) -> bytes:
    return json.dumps(fields).encode()


def _from_bytes(data: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(data))
