"""The tables of generations, each with the request that it reads. docs/dialects.md is made of them."""

from loraplex_service.dialect_stubs import openengine_pb2, vllm_engine_pb2, vllm_pb2
from loraplex_service.dialects.openengine.fields import GENERATE
from loraplex_service.dialects.vllm.fields import ENGINE, INFERENCE

TABLES = (
    (INFERENCE, vllm_pb2.GenerateRequest.DESCRIPTOR),
    (ENGINE, vllm_engine_pb2.GenerateRequest.DESCRIPTOR),
    (GENERATE, openengine_pb2.GenerateRequest.DESCRIPTOR),
)
