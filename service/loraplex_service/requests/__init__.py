"""One request, from its spec to its last token.

`inference` holds the steps in order; `entrance` is where all requests come in. `prepared` is all that a spec decides
before that; `prompts` turns its prompt into tokens, in `turns` where it is long; `cold_adapters` waits for adapters;
`run` is the admitted request on its engine; `outputs` turns tokens back into text. `scores` has candidates read instead
of outputs drawn, and `ranking` the best of several come back; `in_flight` knows all requests by their ids. `pooling` is
for requests without a next token, with the heads of `heads`; each is a `pooling_run` on its engine.
"""
