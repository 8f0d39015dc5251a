"""Stream, deadline, retry, cancel, error details: python example.py 127.0.0.1:50051 storyteller."""

import sys

from loraplex import Client, DeadlineExceeded, LoraplexError

address, model = sys.argv[1:]

# UNAVAILABLE is retried by itself, up to the moment at which the server admits a call.
# `timeout` is the deadline of each call.
with Client(address, timeout=60) as client:
    client.wait_until_serving("", timeout=60)

    print("stream:")
    with client.stream_generate(model, "Once upon a time", max_tokens=16) as stream:
        for text in stream.text():
            print(text, end="", flush=True)
    print()

    try:
        client.generate(model, "Once upon a time", max_tokens=2000, ignore_eos=True, timeout=0.1)
    except DeadlineExceeded as error:
        print("deadline:", error.code.name)
    except LoraplexError as error:  # the model's context may be too short for so many tokens
        print("deadline:", error.reason)

    # Leaving the block cancels the call, and frees what the server holds for it.
    with client.stream_generate(model, "Once upon a time", max_tokens=1000) as stream:
        next(iter(stream.text()))
    print("cancel: done")

    try:
        client.generate(model, "Once upon a time", temperature=-1)
    except LoraplexError as error:
        print("error:", error.code.name, error.reason)
        for violation in error.violations:
            print(" ", violation.field, violation.description)
