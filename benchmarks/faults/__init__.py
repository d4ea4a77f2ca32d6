"""Faults made on purpose, and what the SDK makes of them. Run by benchmarks/reliability.py and by tests/sdk/fire."""
