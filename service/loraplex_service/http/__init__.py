"""The OpenAI-compatible HTTP door: a process of its own, so that JSON and HTTP never hold the service's event loop.

`process` starts it and starts it again. Inside, `door` has the endpoints: `parameters` and `tables` turn a body into a
message of the contract, `service` has the clients that call the data port with it, over a socket that only this service
reaches, and `answers` and `failures` say in OpenAI's words what comes back. `exchange` is one request of HTTP. Who may
do what, and how much, the service decides, as for every call: the door forwards credentials, tenant and address.
"""
