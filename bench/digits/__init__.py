"""Digits by policies and by other systems: what they cost, what is recognised; see docs/rivals.md, docs/digits.md."""
