"""Fuzzing of the served models: no request may do more than be answered, or refused in words.

structured.py  hypothesis: requests near the contract ─┐
octets.py      a seeded generator: bytes near a request ┴─► exchange.py ─► judge.py ─► report.py
"""
