"""Which slots an idle job could have, and which of its conditions excludes the others.

Pure: from a job ad and slot ads to counts. What ``condor_q -better-analyze`` does for one job on a terminal, in the
numbers that a diagnosis needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import classad2

_WHOLE = {
    "Cpus": "TotalSlotCpus",
    "Memory": "TotalSlotMemory",
    "Disk": "TotalSlotDisk",
    "GPUs": "TotalSlotGPUs",
}
"""What a partitionable slot has left, and what it had before any of it was given away."""

SLOT_ATTRIBUTES = (
    "Name",
    "Machine",
    "SlotType",
    "State",
    "Requirements",
    "Start",
    "WithinResourceLimits",
    *_WHOLE,
    *_WHOLE.values(),
)
"""What an analysis needs of every slot, beside what the job's requirements and the slot's own refer to."""

_FREE = ("Unclaimed", "Backfill")
_NAME = re.compile(r"[A-Za-z_]\w*")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Condition:
    """One of the conditions that a job makes, all of which a slot has to meet.

    Attributes:
        text: the condition, as the schedd has it.
        excluded: slots that do not meet it.
        excluded_alone: those of them that meet all the others.
    """

    text: str
    excluded: int
    excluded_alone: int


@dataclass(frozen=True)
class MatchAnalysis:
    """What the slots of a pool are to a job.

    Attributes:
        slots: slots there are; those that HTCondor carved out of a partitionable one are part of that.
        fitting: slots that would meet the job's conditions if nothing ran in them.
        refusing: those of them whose own policy (START) would not take the job.
        free: those of the others that have room for it now.
        claimed: slots that somebody's jobs have now, carved ones among them.
        open: slots of which some part is unclaimed.
        conditions: the job's conditions that exclude a slot, those that exclude most first.
        largest_memory: memory of the largest slot, in MiB.
        largest_cpus: cores of the one that has most.
    """

    slots: int
    fitting: int
    refusing: int
    free: int
    claimed: int
    open: int
    conditions: tuple[Condition, ...] = ()
    largest_memory: float = 0.0
    largest_cpus: float = 0.0


def analyse(job: classad2.ClassAd, slots: Iterable[classad2.ClassAd]) -> MatchAnalysis:
    """Match a job with the slots of a pool.

    Args:
        job: the job's ad.
        slots: slot ads with `SLOT_ATTRIBUTES` and whatever else the requirements of either side refer to.
    """
    whole = job.lookup("Requirements")
    conditions = [(text, classad2.ExprTree(text)) for text in conjuncts(str(whole))]
    excluded: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    largest = {"Memory": 0.0, "Cpus": 0.0}
    for slot in slots:
        kind, state = str(slot.get("SlotType") or "Static"), str(slot.get("State") or "")
        if kind != "Partitionable":
            counts["claimed" if state == "Claimed" else "open"] += 1
        if kind == "Dynamic":
            continue
        if kind == "Partitionable" and _number(slot, "Cpus") > 0:
            counts["open"] += 1
        counts["slots"] += 1
        empty = _empty(slot) if kind == "Partitionable" else slot
        largest = {name: max(most, _number(empty, name)) for name, most in largest.items()}
        if not _holds(whole, job, empty):
            failed = [text for text, condition in conditions if not _holds(condition, job, empty)]
            excluded.update(failed)
            alone.update(failed if len(failed) == 1 else ())
            continue
        counts["fitting"] += 1
        if _refuses(empty, job):
            counts["refusing"] += 1
        elif (kind == "Partitionable" or state in _FREE) and (
            empty is slot or (_holds(whole, job, slot) and not _refuses(slot, job))
        ):
            counts["free"] += 1
    return MatchAnalysis(
        **{name: counts[name] for name in ("slots", "fitting", "refusing", "free", "claimed", "open")},
        conditions=tuple(Condition(text, number, alone[text]) for text, number in excluded.most_common()),
        largest_memory=largest["Memory"],
        largest_cpus=largest["Cpus"],
    )


def conjuncts(expression: str) -> list[str]:
    """The parts of a ClassAd expression, in their order, that all have to hold where it shall hold."""
    text = expression.strip()
    while text.startswith("(") and _closes(text) == len(text) - 1:
        text = text[1:-1].strip()
    parts = _split(text)
    if len(parts) == 1:
        return parts
    return list(dict.fromkeys(piece for part in parts for piece in conjuncts(part)))


def _closes(text: str) -> int:
    """Where the bracket closes that a text begins with."""
    for position, depth in _depths(text):
        if depth == 0:
            return position
    return -1


def _split(text: str) -> list[str]:
    """A text at its outermost `&&`; whole, where an operator that binds less closely stands beside them."""
    cuts = []
    skip = -1
    for position, depth in _depths(text):
        if depth or position <= skip:
            continue
        if text.startswith(("=?=", "=!="), position):
            skip = position + 2
        elif text.startswith("&&", position):
            cuts.append(position)
            skip = position + 1
        elif text.startswith(("||", "?"), position):
            return [text]
    starts, ends = [0, *(cut + 2 for cut in cuts)], [*cuts, len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def _depths(text: str) -> Iterable[tuple[int, int]]:
    """Each position outside of quotes, with the number of brackets that are open behind it."""
    depth, quote, position = 0, "", -1
    while (position := position + 1) < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
            continue
        if character in "\"'":
            quote = character
            continue
        depth += (character in _BRACKETS) - (character in _BRACKETS.values())
        yield position, depth


def _holds(condition: classad2.ExprTree, job: classad2.ClassAd, slot: classad2.ClassAd) -> bool:
    value = condition.eval(job, slot)
    return not isinstance(value, classad2.Value) and bool(value)


def _refuses(slot: classad2.ClassAd, job: classad2.ClassAd) -> bool:
    """Whether a slot's own policy says no; what it does not say, nobody knows."""
    if "Requirements" not in slot:
        return False
    value = slot.lookup("Requirements").eval(slot, job)
    return not isinstance(value, classad2.Value) and not value


def _empty(slot: classad2.ClassAd) -> classad2.ClassAd:
    """A partitionable slot as it is when nothing runs in it."""
    empty = classad2.ClassAd()
    for name in slot:
        empty[name] = slot.lookup(name)
    for left, whole in _WHOLE.items():
        if whole in slot:
            empty[left] = slot.lookup(whole)
    return empty


def _number(ad: classad2.ClassAd, name: str) -> float:
    value = ad.eval(name) if name in ad else 0
    return float(value) if isinstance(value, (int, float)) else 0.0


def unknown_references(job: classad2.ClassAd, slots: Iterable[classad2.ClassAd]) -> set[str]:
    """Attributes that the requirements of either side refer to and that its ads do not have, in lower case.

    They were left out of the query, or nobody defines them. A slot's policy cannot be judged without them.
    """
    of_slots: set[str] = set()
    defined: set[str] = set()
    seen: set[str] = set()
    for slot in slots:
        defined = defined or {name.lower() for name in slot}
        if "Requirements" in slot and (text := f"{slot.lookup('Requirements')} {slot.get('Start')}") not in seen:
            seen.add(text)
            of_slots |= _references(slot, slot.lookup("Requirements"))
    # What both sides have, such as CondorVersion, a job may ask of the slot alone.
    return (_references(job, job.lookup("Requirements")) | (of_slots - {name.lower() for name in job})) - defined


def _references(ad: classad2.ClassAd, expression: classad2.ExprTree) -> set[str]:
    # A reference may come as a whole expression: "split(TARGET.CondorVersion)[1]".
    names = {name.lower() for text in ad.externalRefs(expression) for name in _NAME.findall(text)}
    return names - {"target", "my"}
