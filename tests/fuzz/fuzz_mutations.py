"""Changes of files, drawn from a seed: of bytes, of JSON, of the headers of safetensors and GGUF.

What a change may do to a reading is said with it: NEUTRAL ones keep the meaning and have to be
read; after LAYOUT ones the meaning is the old one, or the file is refused; after ANY other the
file is refused or means something that its readers can bear.
"""

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

NEUTRAL, LAYOUT, ANY = "neutral", "layout", "any"

NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 31, 32, 33, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**12, 10**30, 10**400, -(2**31), -(2**63)),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e-50, 1e-8, 1e30, 1e39, 1e300, float("inf"), float("nan")),
]
TEXTS = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "..",
        "../x",
        "/etc/passwd",
        "/dev/zero",
        ".",
        "a" * 300,
        "é",
        "\ud800",
    ),
    *("🙂", "[UNK]", "default", "{{", "{% for", "(a+)+$", "(", ".*" * 50, "a{99999999999}", "AAAA"),
    *("/////w==", "NaN", "null", "true", "1e999", "model.safetensors", "config.json", "x" * 10**5),
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [1, 2],
    ["a"],
    {"a": 1},
    {"": {}},
    [None] * 50,
]


def odd(rng: random.Random) -> Any:
    """A value that a file may have where another is expected."""
    return rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS]))


def of_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes of any format."""
    whole = bytearray(data)
    place = rng.randrange(len(whole) + 1)
    size = rng.choice([1, 2, 4, 8, 64, max(1, len(whole) // 3)])
    kind = rng.randrange(9)
    if kind == 0 and whole:
        whole[place % len(whole)] ^= 1 << rng.randrange(8)
    elif kind == 1 and whole:
        whole[place % len(whole)] = rng.randrange(256)
    elif kind == 2:
        del whole[place:]
    elif kind == 3:
        del whole[place : place + size]
    elif kind == 4:
        whole[place:place] = rng.randbytes(size)
    elif kind == 5:
        whole[place:place] = whole[place : place + size] * rng.choice([1, 3])
    elif kind == 6:
        number = rng.choice([n for n in NUMBERS if isinstance(n, int)]) % 2**64
        form = rng.choice("BHIQ")
        width = struct.calcsize(form)
        place = min(place, max(0, len(whole) - width))
        whole[place : place + width] = struct.pack(f"<{form}", number % 2 ** (8 * width))
    elif kind == 7:
        runs = list(re.finditer(rb"\d+", bytes(whole)))
        if runs:
            run = rng.choice(runs)
            whole[run.start() : run.end()] = str(rng.choice(NUMBERS)).encode()
    else:
        other = rng.randrange(len(whole) + 1)
        a, b = whole[place : place + size], whole[other : other + size]
        whole[place : place + size], whole[other : other + size] = b, a
    return bytes(whole), ANY


def of_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """JSON's structure; keys twice and lone surrogates too."""
    value = json.loads(data)
    kind = rng.randrange(10)
    if kind == 0:
        return _rewritten(rng, value), NEUTRAL
    if kind == 1:
        return of_bytes(rng, data)
    if kind == 2:
        depth = rng.choice([50, 70, 500, 100_000])
        return _at(rng, data, b"[" * depth + b"]" * depth), ANY
    if kind == 3:
        keys = list(re.finditer(rb'"[^"]+":', data))
        key = rng.choice(keys)[0] if keys else b'"a":'
        text = data.rstrip()[:-1] + b"," + key + json.dumps(odd(rng)).encode() + b"}"
        return text, ANY
    for _ in range(rng.choice([1, 1, 2])):
        value = _edited(rng, value)
    return json.dumps(value).encode(), ANY


def _rewritten(rng: random.Random, value: Any) -> bytes:
    """The same value, in other words."""
    options = {"indent": rng.choice([None, 0, 3]), "ensure_ascii": rng.random() < 0.5}
    text = json.dumps(value, **options)
    return rng.choice(["", " ", "\n\n"]).encode() + text.encode() + b"\n" * rng.randrange(3)


def _at(rng: random.Random, data: bytes, new: bytes) -> bytes:
    values = list(re.finditer(rb'(?<=:)\s*("[^"]*"|[\d.]+|true|false|null)', data))
    if not values:
        return new
    value = rng.choice(values)
    return data[: value.start()] + new + data[value.end() :]


def _edited(rng: random.Random, value: Any) -> Any:
    """One place of a value changed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(str(odd(rng)) if k == key else k): v for k, v in value.items()}
        if kind == 2:
            return {**value, str(odd(rng)): odd(rng)}
        return {**value, key: _edited(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        kind = rng.randrange(5)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return [*value[:place], value[place], *value[place:]]
        return [*value[:place], _edited(rng, value[place]), *value[place + 1 :]]
    return odd(rng)


def of_safetensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """The header's JSON or its length, or any bytes."""
    if rng.random() < 0.3:
        return of_bytes(rng, data)
    (size,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([0, size - 1, size + 1, 2**63, 2**64 - 1])) + data[
            8:
        ], ANY
    header, kind = of_json(rng, data[8 : 8 + size])
    # Spaces in front of it are another beginning than a header has.
    kind = ANY if header[:1] != b"{" else kind
    return struct.pack("<Q", len(header)) + header + data[8 + size :], kind


def of_gguf(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Where tensors are said to lie, what is counted, or any bytes."""
    fields = list(re.finditer(rb"(token_embd|output|output_norm|blk\.\d\.\w+)\.weight", data))
    kind = rng.randrange(4)
    if kind == 0 or not fields:
        return of_bytes(rng, data)
    if kind == 1:
        place, form = rng.choice([(4, "I"), (8, "Q"), (16, "Q")])
    else:
        field = rng.choice(fields)
        (dimensions,) = struct.unpack_from("<I", data, field.end())
        after = field.end() + 4 + 8 * dimensions
        place, form = rng.choice(
            [(field.end(), "I"), (after, "I"), (after + 4, "Q"), (after + 4, "Q")]
        )
    (old,) = struct.unpack_from(f"<{form}", data, place)
    limit = 2 ** (8 * struct.calcsize(form))
    new = rng.choice([0, 1, old + 1, old - 1, old + 32, old - 32, old * 2, limit - 1, limit // 2])
    whole = bytearray(data)
    struct.pack_into(f"<{form}", whole, place, new % limit)
    # A type of the same size is a legal one.
    same = form == "I" and kind > 1
    return bytes(whole), ANY if same else LAYOUT


def of_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Matrix Market: lines as well as bytes."""
    lines = data.split(b"\n")
    kind = rng.randrange(4)
    place = rng.randrange(len(lines))
    if kind == 0:
        return b"\n".join([lines[0], b"% a comment", *lines[1:]]), NEUTRAL
    if kind == 1:
        return b"\n".join([*lines[:place], lines[place], *lines[place:]]), ANY
    if kind == 2:
        lines[place] = b" ".join(str(rng.choice(NUMBERS)).encode() for _ in range(3))
        return b"\n".join(lines), ANY
    return of_bytes(rng, data)


def mutation(name: str) -> Callable[[random.Random, bytes], tuple[bytes, str]]:
    """The changes for a file, by its name."""
    ends = {".json": of_json, ".safetensors": of_safetensors, ".gguf": of_gguf, ".mtx": of_text}
    return next((change for end, change in ends.items() if name.endswith(end)), of_bytes)
