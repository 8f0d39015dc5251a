"""The embedded default of Loraplex: two tiny base models, five LoRA adapters on them, and the script that made them.

``models/storyteller`` is a Llama that tells short stories and answers simple questions; ``models/quizzer`` is a Qwen3
that does small sums and recalls facts. Every folder under ``adapters/`` is a PEFT adapter whose voice shows in the
first line of its answer, so that a person sees at once which adapter is speaking. The folder is a Python package only
so that its data is installed with the project; ``python -m loraplex_demo.train`` makes all of it again, from nothing
but the grammar in ``stories``, ``corpus`` and ``quiz``.
"""
