"""The endpoint picker: tells an Envoy which replica a request should go to, by where its adapter is.

A process of its own, `loraplex picker`. It keeps up with each replica (`replicas.py`: its health as a stream, its
metrics page several times a second, read by `page.py`), learns of each request which adapter it wants (`asked.py`), and
chooses (`policy.py`, a pure function). Envoy asks as it asks every external processor (`processor.py`, in the messages
of `envoy.py`), and so do gateways with an endpoint picker of the Gateway API's inference extension. Where nothing is
known it says nothing, and Envoy goes by its own policy.
"""
