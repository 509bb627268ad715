"""Finite MDPs whose dynamics are known: soft values, occupancies, the bilevel problem, diagnostics."""
