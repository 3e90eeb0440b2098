"""Random runbooks in the language, and random arguments for them. The same seed gives the same program.

Not every program is accepted: a condition can be decided by ranges, a sum can leave 64 bits. What is accepted must
mean the same everywhere: tests/unit/runbook/test_differential.py.
"""

from __future__ import annotations

from random import Random

from pointcall_runbook import ModuleInfo
from pointcall_runbook.vocabulary import EVENTS, Kind, fields

HEAD = '''"""A generated runbook."""

from pointcall_runbook import (
    NO_SERVICE, Address, Again, CircuitOpened, Decision, FilesystemSlow, Level, Network, Notify, OpenCircuit, Operation,
    Recreate, Remember, channel, minutes, parameter, remembered, runbook, seconds, service,
)

OPS = channel("ops")
DB = service("db")
NEAR = Network("10.0.0.0/8")
WIDE = Network("2001:db8::/32")
HOST = Network("192.0.2.7/32")
LIMIT = parameter(3, lo=-5, hi=1000)
KEPT = remembered(0, hi=500)
FAR = 7 * seconds(1)
'''
FIELDS = {
    "CircuitOpened": ("failures", "opens", "restarts", "port"),
    "FilesystemSlow": ("operations", "slow", "restarts", "device"),
}
CONDITIONS = {
    "CircuitOpened": ("e.reopened", "e.address in NEAR", "e.address not in WIDE", "e.address in HOST"),
    "FilesystemSlow": ("e.operation == Operation.READ", "e.operation != Operation.FSYNC", "e.longest > FAR"),
}


class Writer:
    """Writes one function body; `names` are integers that surely have a value."""

    def __init__(self, chance: Random, event: str | None, names: list[str]) -> None:
        self.chance, self.event, self.names = chance, event, names
        self.count = 0

    def integer(self, depth: int) -> str:
        if depth == 0 or self.chance.random() < 0.25:
            return self.leaf()
        a, b = self.integer(depth - 1), self.integer(depth - 1)
        n = self.chance.choice((2, 3, 7, 60))
        forms = [
            f"({a} + {b})", f"({a} - {b})", f"({a} * {n})", f"max({a}, 0) // max({b}, 1)",
            f"max({a}, 0) % max({b}, {n})",
            f"min({a}, {b})", f"max({a}, {b}, {n})", f"abs({a})", f"({a} >> min(max({b}, 0), 9))", f"-({a})",
            f"(max({a}, 0) & max({b}, 0))", f"(max({a}, 0) | max({b}, 0))", f"(max({a}, 0) ^ {n})",
            f"(min(max({a}, 0), 4095) << {n % 20})", f"({a} if {self.condition(depth - 1)} else {b})",
            f"int({self.condition(depth - 1)})", f"seconds(min(max({a}, 0), 9))",
        ]  # fmt: skip
        if self.event:
            forms += [f"first({a}, {b})", f"second({a})"]
        return self.chance.choice(forms)

    def leaf(self) -> str:
        options = [str(self.chance.choice((0, 1, 2, 5, 100, -3, 2**31))), "LIMIT", "KEPT", *self.names]
        options += [f"e.{f}" for f in FIELDS[self.event]] if self.event else []
        return self.chance.choice(options)

    def condition(self, depth: int) -> str:
        if depth <= 0 or self.chance.random() < 0.5:
            sign = self.chance.choice(("<", "<=", ">", ">=", "==", "!="))
            forms = [
                f"{self.leaf()} {sign} {self.leaf()}",
                f"{self.leaf()} < {self.leaf()} <= {self.leaf()}",
                f"{self.leaf()} in (1, 5, 80)",
            ]
            if self.event:
                forms += ["e.service == NO_SERVICE", "e.service != DB", *CONDITIONS[self.event]]
            return self.chance.choice(forms)
        a, b = self.condition(depth - 1), self.condition(depth - 1)
        return self.chance.choice((f"({a} and {b})", f"({a} or {b})", f"not ({a})", f"({a}) == ({b})"))

    def body(self, indent: int, depth: int) -> list[str]:
        pad, out = "    " * indent, []
        for _ in range(self.chance.randint(1, 3)):
            known = list(self.names)
            match self.chance.randrange(6 if depth else 2):
                case 0 | 1:
                    out.append(pad + self.assignment())
                    continue
                case 2 | 3:
                    out += [f"{pad}if {self.condition(2)}:", *self.inner(indent, depth)]
                    if self.chance.random() < 0.6:
                        out += [f"{pad}else:", *self.inner(indent, depth)]
                case 4:
                    self.count += 1
                    stop = self.chance.choice(("3", "5", f"min({self.leaf()}, 4)"))
                    out += [f"{pad}for i{self.count} in range({stop}):", *self.round(indent, depth)]
                case _:
                    out += self.matched(indent, depth)
            self.names = known
        return out

    def inner(self, indent: int, depth: int) -> list[str]:
        known = list(self.names)
        lines = self.body(indent + 1, depth - 1)
        if self.event and self.chance.random() < 0.3:
            lines.append("    " * (indent + 1) + self.decision())
        self.names = known
        return lines

    def round(self, indent: int, depth: int) -> list[str]:
        known, pad = list(self.names), "    " * (indent + 1)
        self.names.append(f"i{self.count}")
        lines = self.body(indent + 1, depth - 1)
        if self.chance.random() < 0.6:
            lines += [f"{pad}if {self.condition(1)}:", f"{pad}    {self.chance.choice(('break', 'continue'))}"]
            self.names = [n for n in self.names if n in known or n.startswith("i")]
            lines += self.body(indent + 1, 0)
        self.names = known
        return lines

    def matched(self, indent: int, depth: int) -> list[str]:
        pad = "    " * indent
        if self.event != "FilesystemSlow":
            return [f"{pad}if {self.condition(1)}:", *self.inner(indent, depth)]
        members = ["READ", "WRITE", "FSYNC", "OTHER"]
        self.chance.shuffle(members)
        lines = [f"{pad}match e.operation:", f"{pad}    case Operation.{members[0]}:", *self.inner(indent + 1, depth)]
        lines += [f"{pad}    case Operation.{members[1]} | Operation.{members[2]}:", *self.inner(indent + 1, depth)]
        rest = self.chance.choice((f"Operation.{members[3]}", "_", ""))
        return lines + ([f"{pad}    case {rest}:", *self.inner(indent + 1, depth)] if rest else [])

    def assignment(self) -> str:
        assigned = [n for n in self.names if n.startswith("x")]
        value = f"max(min({self.integer(2)}, 100000), -100000)"
        if assigned and self.chance.random() < 0.5:
            return f"{self.chance.choice(assigned)} = {value}"
        self.count += 1
        name = f"x{self.count}"
        self.names.append(name)
        return f"{name} = {value}"

    def decision(self) -> str:
        actions = [
            f"Notify(channel=OPS, level=Level.ERROR, code=min(max({self.integer(1)}, 0), 4000000000))",
            f"Again(after=min(max({self.integer(2)}, 0), minutes(1)), tag=3)",
            f"Recreate(service=e.service if {self.condition(1)} else DB)",
            f"Remember(slot=KEPT.slot, value=min(max({self.integer(1)}, 0), 500))",
        ]
        if self.event == "CircuitOpened":
            there = f"e.address if {self.condition(1)} else Address.parse('10.9.8.7')"
            actions.append(f"OpenCircuit(address={there}, port=e.port, hold=seconds(5))")
        chosen = self.chance.sample(actions, self.chance.randint(0, 3))
        text = f"[{', '.join(chosen)}]"
        return "return " + (f"{text} if {self.condition(1)} else []" if self.chance.random() < 0.2 else text)


def program(chance: Random) -> str:
    """The source of one runbook with two helpers and one or two handlers."""
    first = Writer(chance, None, ["a", "b"])
    lines = [*HEAD.split("\n"), "", "def first(a: int, b: int) -> int:"]
    lines += [*first.body(1, 1), f"    if {first.condition(1)}:", f"        return {first.integer(1)}"]
    lines += [f"    return {first.leaf()}", "", "", "def second(a: int) -> int:"]
    lines += [f"    return min(max({Writer(chance, None, ['a']).integer(2)}, -9), 99)", "", ""]
    for event in chance.sample(sorted(FIELDS), chance.randint(1, 2)):
        writer = Writer(chance, event, ["z"])
        lines += [
            "@runbook",
            f"def on_{event}(e: {event}) -> Decision:",
            "    z = first(e.restarts, 3) + second(LIMIT)",
        ]
        lines += [*writer.body(1, 2), "    " + writer.decision(), "", ""]
    return "\n".join(lines).rstrip() + "\n"


def arguments(chance: Random, info: ModuleInfo, event: str) -> tuple[int, ...]:
    """Values in range, often at the edge of a range or small."""
    out: list[int] = []
    for field in fields(EVENTS[event]):
        if field.kind is Kind.ADDRESS:
            out += chance.choice(((0, 0xFFFF_0A01_0203), (0, 0xFFFF_C000_0207), (0x2001_0DB8 << 32, 1), (-1, -5)))
        else:
            out.append(_number(chance, int(field.lo), int(field.hi)))
    out += [_number(chance, p.lo, p.hi) for p in info.parameters]
    return (*out, *(_number(chance, s.lo, s.hi) for s in info.slots))


def _number(chance: Random, lo: int, hi: int) -> int:
    small = chance.randint(lo, min(hi, lo + 100))
    return chance.choice((lo, hi, small, small, chance.randint(lo, hi)))
