"""An interpreter of a little PTX: one instruction after another, one thread at a time.

For inline assembly whose threads do not wait for one another between its barriers.
Registers are Python integers, kept as their bits; memory is bytes.
"""

from __future__ import annotations

import re
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

WIDTH = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
UNDEFINED = 0x5A5A5A5A5A5A5A5A
"""What is in a register that nobody has set."""


class Memory:
    """An array as bytes; addresses begin where it is told to."""

    def __init__(self, array: np.ndarray, base: int):
        self.array = np.ascontiguousarray(array)
        self.bytes, self.base = self.array.view(np.uint8).reshape(-1), base

    def has(self, address: int) -> bool:
        return self.base <= address < self.base + len(self.bytes)

    @property
    def type(self) -> Any:
        """What MLIR would say of it."""
        kind = {"bfloat16": "bf16"}.get(str(self.array.dtype))
        kind = kind or f"{self.array.dtype.kind}{8 * self.array.dtype.itemsize}"
        return types.SimpleNamespace(shape=self.array.shape, element_type=kind)

    def at(self, address: int, bits: int) -> np.ndarray:
        """A view of what an instruction moves, which must be aligned."""
        assert address % (bits // 8) == 0, address
        first = address - self.base
        assert 0 <= first <= len(self.bytes) - bits // 8, address
        return self.bytes[first : first + bits // 8]


class Machine:
    """Runs inline assembly where kernels would write it, for thread ``number``.

    Stands in for `_registers` and MLIR: references are their addresses, scalars are
    integers.
    """

    def __init__(self, memories: list[Memory]):
        self.memories, self.number = memories, 0

    def install(self, patch: Any, module: Any) -> None:
        """Makes functions on registers of a module of kernels functions of integers."""
        registers = types.SimpleNamespace(
            **vars(module.r) | {"asm": self.asm, "command": self.command}
        )
        mlir = types.SimpleNamespace(
            MemRefType=lambda ty: ty,
            IntegerType=types.SimpleNamespace(get_signless=lambda bits: bits),
        )
        utils = types.SimpleNamespace(
            memref_ptr=lambda x: x.base, warpgroup_barrier=lambda: None
        )
        patch.setattr(registers, "i32", lambda: 32)
        for name, stand_in in (("r", registers), ("ir", mlir), ("utils", utils)):
            patch.setattr(module, name, stand_in)
        patch.setattr(
            module.plgpu, "inline_mgpu", lambda **_: lambda f: lambda *x: f(None, *x)
        )

    def each(self, f: Any, *args: Any) -> None:
        """Calls a function on registers for every thread of a warpgroup."""
        for self.number in range(128):
            f(*(x if isinstance(x, Memory) else Scalar(x) for x in args))

    def asm(self, out: Any, args: Any, text: str, spec: str, effects: bool = False):
        """As `_registers.asm`, for one result."""
        del out, effects
        assert spec.count("=") == 1
        return self._run(text, ["%result", *args])["%result"]

    def command(self, text: str, *args: Any, spec: str = "") -> None:
        """As `_registers.command`."""
        assert len(spec.split(",")) == len(args)
        self._run(text, list(args))

    def _run(self, text: str, operands: list[Any]) -> dict[str, Any]:
        thread = Thread(self.number, self.memories)
        thread.run(text, operands)
        return thread.values


class Scalar:
    """An integer that stands in for an array of one register."""

    def __init__(self, value: int):
        self.registers = np.asarray(value)


class Thread:
    """Registers of one thread, and the memories it may reach."""

    def __init__(self, number: int, memories: list[Memory]):
        self.values: dict[str, Any] = {"%tid.x": number}
        self.memories = memories

    def run(self, text: str, operands: list[Any]) -> None:
        """Runs ``{ ... }``, whose ``$n`` are the operands."""
        text = re.sub(r"\$(\d+)", lambda m: str(operands[int(m.group(1))]), text)
        lines, labels = [], {}
        for line in text.strip().strip("{}").replace("};", "}};").split(";"):
            line = line.strip()
            while found := re.match(r"(\w+):\s*", line):
                labels[found.group(1)] = len(lines)
                line = line[found.end() :]
            if line and not line.startswith(".reg"):
                lines.append(line)
        at = 0
        for _ in range(100_000):
            if at == len(lines):
                return
            to = self._step(lines[at])
            at = at + 1 if to is None else labels[to]
        raise AssertionError("it goes on and on")

    def _step(self, line: str) -> str | None:
        guard = re.match(r"@(!?)(\w+)\s+", line)
        if guard:
            line = line[guard.end() :]
            if bool(self.values[guard.group(2)]) == bool(guard.group(1)):
                return None
        name, _, rest = line.partition(" ")
        if name == "bra":
            return rest.strip()
        args = re.findall(r"\[[^]]*\]|\{[^}]*\}+|[^,\s]+", rest)
        getattr(self, "_" + name.split(".")[0])(name.split(".")[1:], *args)
        return None

    def _get(self, x: str, bits: int = 64) -> int:
        number = re.fullmatch(r"-?\d+", x)
        value = int(x) if number else int(self.values.get(x, UNDEFINED))
        return value & (1 << bits) - 1

    def _signed(self, x: str, bits: int) -> int:
        value = self._get(x, bits)
        return value - (1 << bits) if value >> bits - 1 else value

    def _set(self, to: str, value: int, bits: int) -> None:
        self.values[to] = value & (1 << bits) - 1

    def _read(self, x: str, kind: str) -> int:
        bits = WIDTH[kind]
        return self._signed(x, bits) if kind[0] == "s" else self._get(x, bits)

    # ------------------------------------------------------------------ instructions

    def _mov(self, kinds, to, x):
        if x.startswith("{"):
            low, high = re.findall(r"\w+", x)
            self._set(to, self._get(low, 16) | self._get(high, 16) << 16, 32)
        else:
            self._set(to, self._get(x), WIDTH[kinds[-1]])

    def _cvt(self, kinds, to, x):
        if kinds[:1] == ["rn"]:
            dtype = {"f16": np.float16, "bf16": jnp.bfloat16}[kinds[1]]
            value = np.uint32(self._get(x, 32)).view(np.float32).astype(dtype)
            self._set(to, int(value.view(np.uint16)), 16)
        elif kinds == ["f32", "f16"]:
            value = np.uint16(self._get(x, 16)).view(np.float16).astype(np.float32)
            self._set(to, int(value.view(np.uint32)), 32)
        else:
            self._set(to, self._read(x, kinds[1]), WIDTH[kinds[0]])

    def _arithmetic(self, kinds, to, value):
        self._set(to, value, WIDTH[kinds[-1]])

    def _add(self, kinds, to, x, y):
        self._arithmetic(kinds, to, self._get(x) + self._get(y))

    def _sub(self, kinds, to, x, y):
        self._arithmetic(kinds, to, self._get(x) - self._get(y))

    def _and(self, kinds, to, x, y):
        if kinds == ["pred"]:
            self.values[to] = self.values[x] and self.values[y]
        else:
            self._arithmetic(kinds, to, self._get(x) & self._get(y))

    def _or(self, kinds, to, x, y):
        self._arithmetic(kinds, to, self._get(x) | self._get(y))

    def _neg(self, kinds, to, x):
        self._arithmetic(kinds, to, -self._get(x))

    def _popc(self, kinds, to, x):
        self._arithmetic(kinds, to, self._get(x, WIDTH[kinds[-1]]).bit_count())

    def _div(self, kinds, to, x, y):
        assert kinds == ["u32"]
        self._arithmetic(kinds, to, self._get(x, 32) // self._get(y, 32))

    def _min(self, kinds, to, x, y):
        self._arithmetic(kinds, to, min(self._read(z, kinds[-1]) for z in (x, y)))

    def _shl(self, kinds, to, x, n):
        self._arithmetic(kinds, to, self._get(x) << self._get(n))

    def _shr(self, kinds, to, x, n):
        self._arithmetic(kinds, to, self._read(x, kinds[-1]) >> self._get(n))

    def _mul(self, kinds, to, x, y):
        assert kinds[0] == "wide"
        self._set(to, self._read(x, kinds[1]) * self._read(y, kinds[1]), 64)

    def _mad(self, kinds, to, x, y, z):
        product = self._read(x, kinds[1]) * self._read(y, kinds[1])
        bits = 64 if kinds[0] == "wide" else WIDTH[kinds[1]]
        self._set(to, product + self._get(z, bits), bits)

    def _setp(self, kinds, to, x, y, *also):
        x, y = (self._read(z, kinds[-1]) for z in (x, y))
        found = {"ge": x >= y, "gt": x > y, "lt": x < y, "ne": x != y}[kinds[0]]
        self.values[to] = found and all(self.values[z] for z in also)

    def _memory(self, place, bits):
        base, _, offset = place.strip("[]").partition("+")
        address = self._get(base) + int(offset or 0)
        (memory,) = [x for x in self.memories if x.has(address)]
        return memory.at(address, bits)

    def _red(self, kinds, place, x):
        self._atom(kinds, None, place, x)

    def _atom(self, kinds, to, place, x):
        assert kinds[0] == "shared"
        memory = self._memory(place, 32)
        old = int.from_bytes(memory.tobytes(), "little")
        new = {"add": old + self._get(x), "or": old | self._get(x)}[kinds[1]]
        memory[:] = np.frombuffer((new & 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)
        if to is not None:
            self._set(to, old, 32)

    def _ld(self, kinds, to, place):
        bits = WIDTH[kinds[-1]]
        value = int.from_bytes(self._memory(place, bits).tobytes(), "little")
        self._set(to, value, bits)

    def _st(self, kinds, place, x):
        bits = WIDTH[kinds[-1]]
        value = self._get(x, bits).to_bytes(bits // 8, "little")
        self._memory(place, bits)[:] = np.frombuffer(value, np.uint8)
