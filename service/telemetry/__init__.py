"""What the service tells those who run it: metrics, traces, logs, and the records that usage is billed by.

Everything hangs on one interface, `Observer` (records.py), which hears of each call when it begins and ends and of each
generation when it ends. Nothing here is on the path of a token, and nothing here ever holds a prompt or an output.
"""
