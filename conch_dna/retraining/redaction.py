"""Secrets in texts, by pattern: keys, tokens, passwords, addresses, numbers of cards and accounts.

Knows texts only; nothing of where they are kept. To redact another kind of secret: an entry in
REDACTIONS, and examples of what it finds and leaves in the tests.
"""

import re
from collections.abc import Sequence

from conch_dna.errors import ConchError

# Every pattern is linear in the text's length.
REDACTIONS: dict[str, re.Pattern[str]] = {
    "private_key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
    ),
    "token": re.compile(
        r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|(?i:\bbearer)\s+[\w.~+/-]{16,}=*",
    ),
    "api_key": re.compile(
        r"\b(?:sk|pk|rk)[-_][\w-]{16,}|\bgh[opsru]_\w{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
        r"|\bhf_\w{20,}|\bxox[abprs]-[\w-]{10,}|\bA(?:KI|SI)A[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    ),
    "password": re.compile(
        r"(?i:\b(?:password|passwd|pwd|secret|api[_-]?key|access[_-]?token)\b[\"']?\s*[:=]\s*)"
        r"(?:\"[^\"\n]+\"|'[^'\n]+'|[^\s,;\"']+)|(?<=://)[^\s/:@]{1,64}:[^\s/@]{1,128}(?=@)"
    ),
    "email": re.compile(r"\b[\w.%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}\b"),
    "card": re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
}


def redaction_names(redact: Sequence[str] | bool) -> tuple[str, ...]:
    """Which entries of REDACTIONS are asked for: all, none, or those named.

    Raises:
        ConchError: A name is none of them.
    """
    if isinstance(redact, bool):
        return tuple(REDACTIONS) if redact else ()
    names = (redact,) if isinstance(redact, str) else tuple(redact)
    if unknown := sorted(set(names) - set(REDACTIONS)):
        raise ConchError(
            f"nothing is known to redact by the name {', '.join(unknown)}: use some of "
            f"{', '.join(REDACTIONS)}, or True for all"
        )
    return tuple(name for name in REDACTIONS if name in names)


def redacted(text: str, names: Sequence[str]) -> str:
    """A text with `[redacted:NAME]` in the place of every secret of these kinds.

    >>> redacted("Write to ann@example.org.", ["email"])
    'Write to [redacted:email].'
    """
    for name in names:
        mark = f"[redacted:{name}]"
        if name == "card":
            numbers = {found[0] for found in REDACTIONS[name].finditer(text) if _luhn(found[0])}
            for number in sorted(numbers, key=len, reverse=True):
                text = text.replace(number, mark)
        else:
            text = REDACTIONS[name].sub(mark, text)
    return text


def _luhn(number: str) -> bool:
    """Whether the check digit of a card number is right; most other long numbers fail."""
    digits = [int(each) for each in reversed(number) if each.isdigit()]
    doubled = [2 * each - 9 * (each > 4) for each in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0
