"""The parts of a grammar that no text completes, because each of their ways leads to themselves again.

A part ends if one of its ways does, and a way if all parts that it needs do. Ways are followed from those that need
nothing, each once (Dowling and Gallier, "Linear-time algorithms for testing the satisfiability of propositional Horn
formulae").
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from llguidance.gbnf_to_lark import AlternativeNode, ASTNode, RepetitionNode, RuleNode, RuleRefNode

Way = tuple[Hashable, Collection[Hashable]]  # a part, and the parts that one way to complete it needs


def endless(ways: Iterable[Way]) -> set[Hashable]:
    """The parts that nothing completes."""
    parts: set[Hashable] = set()
    missing: list[int] = []
    heads: list[Hashable] = []
    users: defaultdict[Hashable, list[int]] = defaultdict(list)
    ends: list[Hashable] = []
    for head, needs in ways:
        parts.add(head)
        for need in set(needs):
            users[need].append(len(heads))
        heads.append(head)
        missing.append(len(set(needs)))
        if not needs:
            ends.append(head)
    while ends:
        part = ends.pop()
        if part not in parts:
            continue
        parts.remove(part)
        for way in users[part]:
            missing[way] -= 1
            if missing[way] == 0:
                ends.append(heads[way])
    return parts


def grammar_ways(rules: Mapping[str, RuleNode]) -> Iterator[Way]:
    """The ways of the rules of a grammar in GBNF, by their names; parts within rules are named by their nodes."""
    nodes: list[tuple[Hashable, ASTNode]] = [(name, rule.alternatives) for name, rule in rules.items()]
    while nodes:
        part, node = nodes.pop()
        inside = [(id(child), child) for child in node.children()]
        nodes += inside
        if isinstance(node, RuleRefNode):
            yield part, [node.name]
        elif isinstance(node, AlternativeNode):
            yield from ((part, [child]) for child, _ in inside)
        elif isinstance(node, RepetitionNode) and node.min_times == 0:
            yield part, ()
        else:
            yield part, [child for child, _ in inside]


def schema_ways(schemas: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Way]:
    """The ways of a schema and those inside, by their paths. What is not understood here counts as complete."""
    found = dict(schemas)
    for where, schema in found.items():
        needs: set[Hashable] = {need for need in _needs(where, schema) if need in found}
        for keyword in ("anyOf", "oneOf"):
            options = schema.get(keyword)
            if isinstance(options, list) and options:
                needs.add((where, keyword))
                for index in range(len(options)):
                    option = _inside(where, keyword, index)
                    yield (where, keyword), [option] if option in found else ()
        yield where, needs


def _needs(where: str, schema: dict[str, Any]) -> Iterator[str]:
    """The paths of schemas that every value of a schema needs values of, or of none that there is."""
    reference, parts = schema.get("$ref"), schema.get("allOf")
    if isinstance(reference, str) and reference.startswith("#"):
        yield unquote(reference[1:]).replace("~1", "/").replace("~0", "~") or "/"
    if isinstance(parts, list):
        yield from (_inside(where, "allOf", index) for index in range(len(parts)))
    if schema.get("type") == "object":
        properties, required = schema.get("properties"), schema.get("required")
        known = properties if isinstance(properties, dict) else {}
        for name in required if isinstance(required, list) else ():
            if name in known:
                yield _inside(where, "properties", name)
            elif "patternProperties" not in schema:
                yield _inside(where, "additionalProperties")
    least = schema.get("minItems")
    if schema.get("type") == "array" and isinstance(least, int | float):
        first = schema.get("prefixItems")
        num_first = len(first) if isinstance(first, list) else 0
        yield from (_inside(where, "prefixItems", index) for index in range(min(num_first, int(min(least, 1e6)))))
        if least > num_first:
            yield _inside(where, "items")


def _inside(where: str, *keys: object) -> str:
    return f"{where.rstrip('/')}/{'/'.join(map(str, keys))}"
