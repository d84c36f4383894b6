"""Worked solutions of reasoning-gym families: the targets of supervised fine-tuning.

A solution is `<think>STEPS</think>ANSWER`, one operation a line and no spaces where none are needed: a small policy
pays for every token. Each step follows from the prompt and the lines before it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Entry = Mapping[str, Any]  # an item of a reasoning-gym dataset: question, answer, metadata

_STEPS: dict[str, Callable[[Entry], Iterator[str]]] = {}


class Underdetermined(Exception):
    """The question does not determine its answer, so that no steps lead to it."""


def worked_solution(family: str, entry: Entry) -> str | None:
    """The worked solution of a reasoning-gym item, or None for a family or an item that has none."""
    if family not in _STEPS:
        return None
    try:
        steps = "\n".join(_STEPS[family](entry))
    except Underdetermined:
        return None
    return f"<think>{steps}</think>{entry['answer']}"


def _family(name: str) -> Callable[[Callable[[Entry], Iterator[str]]], Callable[[Entry], Iterator[str]]]:
    def add(steps: Callable[[Entry], Iterator[str]]) -> Callable[[Entry], Iterator[str]]:
        _STEPS[name] = steps
        return steps

    return add


@_family("chain_sum")
def _chain_sum(entry: Entry) -> Iterator[str]:
    """What is left of the sum after each operation: `4 - 1 - 7` → `3-7`, `-4`.

    A line is a function of the line before it alone, whatever the length of the sum, so a policy can carry the rule
    over to lengths that it has not seen.
    """
    first, *rest = entry["metadata"]["expression"].split()
    total = int(first)
    while rest:
        sign, term, *rest = rest
        total = total + int(term) if sign == "+" else total - int(term)
        yield f"{total}{''.join(rest)}"


@_family("products")
def _products(entry: Entry) -> Iterator[str]:
    """Long multiplication: one product for each non-zero digit of the next factor, added up as they come."""
    first, *rest = entry["metadata"]["expression"].split()
    total = int(first)
    for factor in map(int, rest[1::2]):
        product = None
        for part in _decimal_parts(factor):
            summand = total * part
            yield f"{total}*{part}={summand}"
            if product is not None:
                yield f"{product}+{summand}={product + summand}"
            product = summand + (product or 0)
        total = product or 0


def _decimal_parts(number: int) -> list[int]:
    """-305 → [-300, -5]."""
    digits = str(abs(number))
    parts = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits) if digit != "0"]
    return [-part if number < 0 else part for part in parts] or [0]


def _euclid(a: int, b: int) -> Iterator[str]:
    """Remainders until one is 0: `48%36=12`, `36%12=0`."""
    while b:
        yield f"{a}%{b}={a % b}"
        a, b = b, a % b


@_family("gcd")
def _gcd(entry: Entry) -> Iterator[str]:
    """Euclid's algorithm, folded over the numbers."""
    divisor, *rest = entry["metadata"]["numbers"]
    for number in rest:
        yield from _euclid(divisor, number)
        divisor = math.gcd(divisor, number)


@_family("lcm")
def _lcm(entry: Entry) -> Iterator[str]:
    """a·b / gcd(a, b), folded over the numbers: `a/gcd=quotient`, `quotient*b=multiple`."""
    multiple, *rest = entry["metadata"]["numbers"]
    for number in rest:
        yield from _euclid(multiple, number)
        divisor = math.gcd(multiple, number)
        yield f"{multiple}/{divisor}={multiple // divisor}"
        yield f"{multiple // divisor}*{number}={multiple // divisor * number}"
        multiple = multiple // divisor * number


@_family("prime_factorization")
def _prime_factorization(entry: Entry) -> Iterator[str]:
    """Divide by the smallest prime factor until a prime is left: `12/2=6`, `6/2=3`."""
    number = entry["metadata"]["number"]
    for factor in entry["metadata"]["factors"][:-1]:
        yield f"{number}/{factor}={number // factor}"
        number //= factor


@_family("leg_counting")
def _leg_counting(entry: Entry) -> Iterator[str]:
    """The product for each kind of animal, and the running sum: `dog 15*4=60`, `wasp 9*6=54`, `60+54=114`."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total = None
    for animal, count in entry["metadata"]["animals"].items():
        legs = count * ANIMALS[animal]
        yield f"{animal} {count}*{ANIMALS[animal]}={legs}"
        if total is not None:
            yield f"{total}+{legs}={total + legs}"
        total = legs + (total or 0)


@_family("count_bits")
def _count_bits(entry: Entry) -> Iterator[str]:
    """Halving, with the number of ones shifted out so far: for 5, `5 1`, `2 1`, `1 2`."""
    number, ones = entry["metadata"]["number"], 0
    while number:
        ones += number & 1
        yield f"{number} {ones}"
        number >>= 1


@_family("base_conversion")
def _base_conversion(entry: Entry) -> Iterator[str]:
    """Horner's scheme to decimal, then division by the target base: `5*16+10=90`, `90/7=12r6`."""
    metadata = entry["metadata"]
    source, target, digits = metadata["source_base"], metadata["target_base"], metadata["source_repr"]
    value = int(digits[0], source)
    if source != 10:
        for digit in digits[1:]:
            result = value * source + int(digit, source)
            yield f"{value}*{source}+{int(digit, source)}={result}"
            value = result
    value = metadata["decimal_value"]
    while target != 10 and value >= target:
        yield f"{value}/{target}={value // target}r{value % target}"
        value //= target


@_family("spell_backward")
def _spell_backward(entry: Entry) -> Iterator[str]:
    """The letters one by one, and then from the last to the first."""
    word = entry["metadata"]["word"]
    yield " ".join(word)
    yield " ".join(reversed(word))


@_family("letter_counting")
def _letter_counting(entry: Entry) -> Iterator[str]:
    """Each word with the number of times the letter has come up so far."""
    count = 0
    for word in entry["metadata"]["span"]:
        count += word.lower().count(entry["metadata"]["target_letter"])
        yield f"{word} {count}"


_LINEAR_TERM = re.compile(r"([+-]?)(?:(\d+)\*)?([a-z]|\d+)")


@_family("simple_equations")
def _simple_equations(entry: Entry) -> Iterator[str]:
    """`6*h + 66 = 456` → `456-66=390`, `390/6=65`."""
    left, right = entry["metadata"]["equation"].replace(" ", "").split("=")
    coefficient, constant, total = 0, 0, int(right)
    for sign, factor, term in _LINEAR_TERM.findall(left):
        unit = -1 if sign == "-" else 1
        if term.isdigit():
            constant += unit * int(term)
        else:
            coefficient += unit * int(factor or 1)
    if coefficient == 0:
        raise Underdetermined(entry["metadata"]["equation"])  # `2*x - 2*x + 10 = 10`, as it happens
    if constant:
        yield f"{total}{'+' if constant < 0 else '-'}{abs(constant)}={total - constant}"
    if coefficient != 1:
        yield f"{total - constant}/{coefficient}={(total - constant) // coefficient}"
