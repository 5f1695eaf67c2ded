"""Mutations of files: bytes of any file, and the structure of JSON, .npz, .safetensors and ONNX files."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any, Final

import onnx

#: What stands in the place of a value: ends of types, other types, and text that is none.
VALUES: Final[tuple[Any, ...]] = (
    0, -1, 1, 2, 3, 127, 128, 2**31 - 1, 2**31, 2**62, 0.0, 1e-45, 1e-30, 1e15, 1e38, 1e308, "", "M", "S",
    "x" * 300, "\ud800", "\x1b[2J", "../../up", [], [[]], [0, 1], {}, {"a": 0}, None, True, False,
)  # fmt: skip
#: Names of the kinds of scalar fields of a protobuf message, and values for each.
WIDE: Final = (0, 1, -1, 2, 3, 64, 2**31 - 1, -(2**31), 2**62, 2**20)
TEXTS: Final = ("", "M", "L", "T", "S", "x" * 300, "../up", "MatMul", "Loop", "LinearAttention", "qinvert")


def of_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, delete, repeat, insert or cut off some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.choice((1, 2, 8, 64, 500))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at:at] = rng.randbytes(length)
            case _:
                if rng.random() < 0.1:
                    del data[at:]
    return bytes(data)


def of_json(rng: random.Random, content: bytes) -> bytes:
    """Replace, delete or repeat a value of a JSON document."""
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _mutate_json(rng, document)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.9)
    return text.encode(errors="surrogatepass")


def _mutate_json(rng: random.Random, node: Any) -> None:
    while isinstance(node, (dict, list)) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[f"{key}_"] = node.pop(key)
            case 2 if isinstance(node, list):
                node.extend([node[key]] * rng.choice((1, 2, 50)))
            case _:
                other = rng.choice(keys)
                node[key] = node[other] if rng.random() < 0.3 else rng.choice(VALUES)
        return


def of_npz(rng: random.Random, content: bytes) -> bytes:
    """Mutate a member of an archive and pack it again, with a checksum that fits."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if rng.random() < 0.5:
        # The header of an array is a literal of Python.
        head, body = members[name][:128], members[name][128:]
        members[name] = of_bytes(rng, head).ljust(128, b" ")[:128] + body
    else:
        members[name] = of_bytes(rng, members[name])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return packed.getvalue()


def of_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Mutate the header, and write its length so that it fits."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    header = of_json(rng, header)
    return struct.pack("<Q", len(header)) + header + data


def of_onnx(rng: random.Random, content: bytes) -> bytes:
    """Change, delete or repeat fields of a model's messages."""
    model = onnx.load_model_from_string(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _mutate_message(rng, model)
    changed: bytes = model.SerializeToString()
    return changed


def _mutate_message(rng: random.Random, message: Any) -> None:
    while True:
        fields = [field for field, _ in message.ListFields()]
        if not fields:
            return
        field = rng.choice(fields)
        value = getattr(message, field.name)
        if field.message_type is None:
            _mutate_scalar(rng, message, field, value)
            return
        if hasattr(value, "ListFields"):
            if rng.random() < 0.03:
                message.ClearField(field.name)
                return
            message = value
            continue
        at = rng.randrange(len(value))
        action = rng.random()
        if action < 0.06:
            del value[at]
            return
        if action < 0.1:
            value.add().CopyFrom(value[at])
            return
        message = value[at]


def _mutate_scalar(rng: random.Random, message: Any, field: Any, value: Any) -> None:
    new = _like(rng, value[0] if hasattr(value, "append") and len(value) else value)
    try:
        if hasattr(value, "append"):
            value[rng.randrange(len(value))] = new
        else:
            setattr(message, field.name, new)
    except (TypeError, ValueError):
        # An enumeration has no such number, or a field of 32 bits no room for it.
        message.ClearField(field.name)


def _like(rng: random.Random, value: Any) -> Any:
    match value:
        case str():
            return rng.choice(TEXTS)
        case bytes():
            return of_bytes(rng, value)
        case float():
            return rng.choice((0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan")))
        case _:
            return rng.choice(WIDE)


#: Mutations by the kind of file; bytes are mutated in each of them, too.
MUTATIONS: Final[dict[str, Callable[[random.Random, bytes], bytes]]] = {
    "plan": of_json,
    "npz": of_npz,
    "safetensors": of_safetensors,
    "verify": of_onnx,
    "graft": of_onnx,
}
