"""The number a text ends in, exactly: what a rule compares with an answer."""

from __future__ import annotations

import re
from fractions import Fraction

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_PLAIN = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)"
_PART = r"\s*(?:\{([^{}]*)\}|(\d))"
_POWER = r"[eE]([-+]?\d{1,3})(?![\w.])|\s*(?:\\times|\\cdot|×|\*)\s*10\s*(?:\^|\*\*)\s*\{?([-+]?\d{1,3})\}?"
_NUMERAL = re.compile(
    rf"(?P<frac>(?:(?<![A-Za-z\d_])(?P<units>\d+)\s*)?\\[dt]?frac{_PART}{_PART})"
    rf"|(?<![A-Za-z\d_])(?:(?P<mixed>\d+)\s+(?P<over>\d+)/(?P<under>\d+)(?![\d.])"
    rf"|(?P<top>{_PLAIN})\s*/\s*(?P<bottom>{_PLAIN})"
    rf"|(?P<plain>{_PLAIN})(?:{_POWER})?)"
)
_LATEX = {"{,}": ",", "\\,": "", "\\!": "", "\\;": " ", "\\ ": " ", "\\$": "$", "\\%": "%", "−": "-", "–": "-"}
_OPERATORS = "=(:{[,<>≈*/^"


def last_number(text: str) -> Fraction | None:
    """The number a response gives as its answer, or None.

    That is the last number inside the last \\boxed{...}; else the first one after the last "####" on that line; else the last
    of the text. Known are signs, decimals, thousands separators (1,234), fractions (3/4, \\frac{3}{4}), mixed numbers (1 1/2),
    powers of ten (1.5e3, 1.5 \\times 10^{3}); units, currency and percent signs are passed over (50% is 50). Nothing is computed:
    what is not a numeral, such as \\frac{\\pi}{2}, is no number.
    """
    for written, plain in _LATEX.items():
        text = text.replace(written, plain)
    boxed = _boxed(text)
    if boxed is not None:
        found = list(_NUMERAL.finditer(boxed))
        return _value(found[-1], boxed) if found else None
    if "####" in text:
        line = text.rpartition("####")[2].strip("\n").partition("\n")[0]
        first = _NUMERAL.search(line)
        return None if first is None else _value(first, line)
    found = list(_NUMERAL.finditer(text))
    return _value(found[-1], text) if found else None


def _boxed(text: str) -> str | None:
    """What is in the last \\boxed{...} that is closed, braces inside it counted."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[match.end() : i]
    return None


def _value(match: re.Match[str], text: str) -> Fraction | None:
    try:
        size = _size(match)
    except (ValueError, ZeroDivisionError):  # more digits than Python converts, or x/0
        return None
    return -size if _negative(text[: match.start()]) else size


def _size(match: re.Match[str]) -> Fraction:
    part = match.groupdict()
    if part["frac"]:
        above, below = (match[i] or match[i + 1] for i in (3, 5))
        return Fraction(part["units"] or 0) + _fraction(above) / _fraction(below)
    if part["mixed"]:
        return Fraction(part["mixed"]) + Fraction(part["over"]) / Fraction(part["under"])
    if part["top"]:
        return _fraction(part["top"]) / _fraction(part["bottom"])
    power = match[match.re.groups - 1] or match[match.re.groups] or "0"
    return _fraction(part["plain"]) * Fraction(10) ** int(power)


def _fraction(text: str) -> Fraction:
    return Fraction(text.strip().replace(",", ""))


def _negative(before: str) -> bool:
    """Whether what stands before a numeral makes it negative: a minus that does not subtract. A currency sign may come between."""
    before = before.removesuffix("$")
    if not before.rstrip().endswith("-"):
        return False
    apart, left = before != before.rstrip(), before.rstrip()[:-1]
    if apart or left != left.rstrip():  # "- 3" only after an operator; " -3" always
        return not apart or left.rstrip().endswith(tuple(_OPERATORS)) or not left
    return not left or not (left[-1].isalnum() or left[-1] in ".)]}%_-")
