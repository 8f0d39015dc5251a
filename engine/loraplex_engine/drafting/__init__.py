"""Speculative decoding: guesses at the tokens to come, which a step checks all at once.

`drafting` adds drafts to the plans of the scheduler, as many as pay: `account` keeps what each request won and spent by
them, `costs` how long steps of so many rows take. They come from a `source`: `ngram`, or a smaller
`model`.
"""
