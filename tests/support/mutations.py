"""Files with one thing wrong: JSON of other values, safetensors of other bytes; all by a seed."""

import json
import random
from pathlib import Path

HUGE = 10**30
VALUES = [
    *(None, True, False, 0, -1, 3, HUGE, 1.5, float("nan"), "", "x", "../x", "/x", "\u0000"),
    *([], {}, [None], [[1]], {"a": None}, "float16", "nf4", [1, 2, 3], "model.layers.0"),
]


def mutate_json(text: str, rng: random.Random) -> str:
    """Return JSON with one value replaced, removed or added; sometimes no JSON at all."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(["", "[", "{" * 100_000, "[" * 100_000, "null", "[]", "3", '"x"', "{}"])
    if kind == 1:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", "\x00", "}", '"', ",", "9"]) + text[at + 1 :]
    tree = json.loads(text)
    places = list(_places(tree))
    holder, key = rng.choice(places)
    if kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "weight_map", "peft_type", "\ud7ff"])] = rng.choice(VALUES)
    elif kind == 4:
        holder[key] = holder[rng.choice([k for h, k in places if h is holder])]
    else:
        value = rng.choice(VALUES)
        if value == HUGE and isinstance(holder[key], int):
            value = -HUGE  # a model of so many layers is made until the machine is full
        holder[key] = value
    return json.dumps(tree)


def _places(tree):
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file cut short, or with other bytes or values in its header."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        at = rng.randrange(8 + size)
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        wrong = rng.choice([0, 1, size + 1, 2**63 - 1, 2**64 - 1])
        return wrong.to_bytes(8, "little") + data[8:]
    header = mutate_json(data[8 : 8 + size].decode(), rng).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_file(path: Path, rng: random.Random) -> None:
    """Change a file in place."""
    if path.suffix == ".json":
        text = mutate_json(path.read_text(encoding="utf-8"), rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutate_safetensors(path.read_bytes(), rng))
