"""The answer in a completion."""

import re

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """Return the final answer of a completion, or None if it has none. Linear in the length of the text.

    The answer comes after the last `</think>`, if there is one; thinking that was opened and never closed has no
    answer, so a `<think>` that the prompt ends in must stand before the completion. In the rest it is the content
    of the last `\\boxed{...}` with balanced braces, or else of the last `<answer>...</answer>`, or else all that is
    left, stripped.
    """
    after_thinking = text.rfind("</think>")
    if text.rfind("<think>") > after_thinking:
        return None
    if after_thinking >= 0:
        text = text[after_thinking + len("</think>") :]
    answer = _last_boxed(text)
    if answer is None:
        answer = _last_tagged(text)
    return (text if answer is None else answer).strip() or None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None
