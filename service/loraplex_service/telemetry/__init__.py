"""Telemetry for operators: metrics, traces, logs, and the usage records for billing.

All parts implement one interface, `Observer` (records.py), which is told of each call when it begins and ends and of
each generation when it ends. On the path of a token there is only the histogram of the gaps between tokens. And
nothing here ever holds a prompt or an output.
"""
