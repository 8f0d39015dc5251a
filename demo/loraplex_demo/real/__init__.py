"""The demo with a model that people have: SmolLM2-135M-Instruct and three adapters that were trained on it here.

`model` fetches the model's file; `lessons` draws what the adapters learn, and `train` trains them; `served/` is what
`loraplex demo --real` serves beside the model: a configuration, a chat template and the adapters.
"""
