"""The HTTP door: a process of its own, so that JSON and HTTP never hold the service's event loop.

`process` starts it and starts it again. Inside, `door` has the endpoints of all APIs. Of each, a table says what its
parameters become in a message of the contract (`parameters`; `dialects` has all tables), and answers say in its words
what comes back: `tables` and `answers` are OpenAI's, `responses` its newer API, and `messages` is Anthropic's.
`service` has the clients that call the data port, over a socket that only this service reaches, `generations` calls it,
`failures` says what went wrong, and `exchange` is one request of HTTP. Who may do what, and how much, the service
decides, as for every call: the door forwards credentials, tenant and address.
"""
