"""The messages of Envoy's external processing, as far as the picker reads and writes them.

Fields have the numbers of envoy.service.ext_proc.v3. The package is our own, so that Envoy's own stubs can be in
the same process.
"""

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = "Process"

# How Envoy sends a body, and this in its ProtocolConfiguration.
NO_BODY, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)
OVERWRITE: Final = 2  # HeaderValueOption.append_action

_PACKAGE: Final = "loraplex.picker.envoy"
_STRUCT: Final = ".google.protobuf.Struct"
_MESSAGES: Final = """
HeaderValue: 1 key string, 2 value string, 3 raw_value bytes
HeaderMap: 1 headers HeaderValue*
HeaderValueOption: 1 header HeaderValue, 3 append_action int32
HeaderMutation: 1 set_headers HeaderValueOption*, 2 remove_headers string*
HttpHeaders: 1 headers HeaderMap, 3 end_of_stream bool
HttpBody: 1 body bytes, 2 end_of_stream bool
HttpTrailers: 1 trailers HeaderMap
NamedStruct: 1 key string, 2 value Struct
Metadata: 1 filter_metadata NamedStruct*
ProtocolConfiguration: 1 request_body_mode int32
ProcessingRequest: 2 request_headers HttpHeaders?, 3 response_headers HttpHeaders?, 4 request_body HttpBody?, \
5 response_body HttpBody?, 6 request_trailers HttpTrailers?, 7 response_trailers HttpTrailers?, \
8 metadata_context Metadata, 11 protocol_config ProtocolConfiguration
StreamedBodyResponse: 1 body bytes, 2 end_of_stream bool
BodyMutation: 3 streamed_response StreamedBodyResponse
CommonResponse: 2 header_mutation HeaderMutation, 3 body_mutation BodyMutation
HeadersResponse: 1 response CommonResponse
BodyResponse: 1 response CommonResponse
TrailersResponse: 1 header_mutation HeaderMutation
ProcessingResponse: 1 request_headers HeadersResponse?, 2 response_headers HeadersResponse?, \
3 request_body BodyResponse?, 4 response_body BodyResponse?, 5 request_trailers TrailersResponse?, \
6 response_trailers TrailersResponse?, 8 dynamic_metadata Struct
"""

_Field = descriptor_pb2.FieldDescriptorProto


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="loraplex/picker/envoy.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[struct_pb2.DESCRIPTOR.name],
    )
    for line in _MESSAGES.strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            _add_field(message, *field.split())
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    names = [message.name for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names}


def _add_field(message: descriptor_pb2.DescriptorProto, number: str, name: str, kind: str) -> None:
    """Add a field. `kind`: a type, with * for a list and with ? for one of a choice."""
    bare = kind.rstrip("*?")
    field = message.field.add(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if kind.endswith("*") else _Field.LABEL_OPTIONAL
    if bare[0].isupper():
        field.type = _Field.TYPE_MESSAGE
        field.type_name = _STRUCT if bare == "Struct" else f".{_PACKAGE}.{bare}"
    else:
        field.type = _Field.Type.Value(f"TYPE_{bare.upper()}")
    if kind.endswith("?"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="kind")
        field.oneof_index = 0


_CLASSES = _classes()
ProcessingRequest = _CLASSES["ProcessingRequest"]
ProcessingResponse = _CLASSES["ProcessingResponse"]
