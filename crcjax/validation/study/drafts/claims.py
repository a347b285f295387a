"""Claims that no draft may make: clearance, certification, compliance, clinical validity, and truth of the reference."""

from __future__ import annotations

import re

_STATES = "cleared|approved|authori[sz]ed|certified|compliant|validated|registered"
_BODIES = r"FDA|MHRA|EMA|CE|UKCA|ISO(?:[ /-]?\w+)?|IEC(?:[ -]?\w+)?|HIPAA|GDPR|IVDR|MDR|Part 11|AI Act"
_CLAIMS = (
    rf"\b(?:{_BODIES})[- ](?:{_STATES}|ready)\b",
    rf"\b(?:{_STATES}) (?:by|under|to|with) (?:the )?(?:{_BODIES})\b",
    rf"\b(?:compl(?:y|ies)|complian(?:t|ce)|conforms?|conformity) (?:with|to) (?:the )?(?:{_BODIES})\b",
    r"\b(?:CE|UKCA)[- ]mark(?:ed|ing)?\b",
    r"\b510\(k\)[- ](?:ready|cleared|clearance)",
    r"\bclinically (?:validated|proven|valid)\b",
    r"\bground[- ]truth\b",
    r"\bproven (?:safe|effective)\b",
    r"\bsafe and effective\b",
    r"\b(?:fully|truly|irreversibly) anonymous\b|\banonymi[sz]ed\b",
)
_FORBIDDEN = re.compile("|".join(_CLAIMS), re.IGNORECASE)


def forbidden_claims(text: str) -> list[str]:
    """The claims in a text that software cannot support. A denial of one is found too: word it without the claim."""
    return [match[0] for match in _FORBIDDEN.finditer(" ".join(text.split()))]
