"""Messages and services of the contract `loraplex.v1`, generated from proto/loraplex/v1 by proto/stubs.sh.

Fields that hold enumerators give numbers that print as their names.
"""

from loraplex.names import name_enumerators
from loraplex.v1 import adapters_pb2, generation_pb2, inference_pb2, models_pb2, pooling_pb2, prompt_pb2

name_enumerators(
    adapters_pb2.DESCRIPTOR,
    generation_pb2.DESCRIPTOR,
    inference_pb2.DESCRIPTOR,
    models_pb2.DESCRIPTOR,
    pooling_pb2.DESCRIPTOR,
    prompt_pb2.DESCRIPTOR,
)
