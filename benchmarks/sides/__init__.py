"""Whom a benchmark measures: latentrt and its peers, each behind the same small contract (contract.py)."""
