"""The descriptor pool of the dialects.

Others' packages, such as `inference`, would collide in the default pool with the stubs of their own clients, where both
are installed.
"""

from google.protobuf import descriptor_pool, struct_pb2
from google.protobuf.descriptor import ServiceDescriptor

POOL = descriptor_pool.DescriptorPool()
POOL.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)  # what the dialects import


def service_of(name: str) -> ServiceDescriptor:
    """The descriptor of a service, by its full name: of the contract, or of a dialect. Raises KeyError."""
    try:
        return descriptor_pool.Default().FindServiceByName(name)
    except KeyError:
        return POOL.FindServiceByName(name)
