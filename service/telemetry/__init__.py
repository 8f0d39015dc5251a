"""What the service tells those who run it: metrics, traces, logs, and the records that usage is billed by.

Everything hangs on one interface, `Observer` (records.py), which hears of each call when it begins and ends and of each
generation when it ends. On the path of a token there is one thing, the histogram of the gaps between them; and nothing
here ever holds a prompt or an output.
"""
