"""Fuzzing of the served models: every request must be answered, or rejected with a message.

structured.py  hypothesis: requests close to the contract ─┐
octets.py      a seeded generator: mutated request bytes  ─┴─► exchange.py ─► judge.py ─► report.py
"""
