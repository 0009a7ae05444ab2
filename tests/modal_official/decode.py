"""Decodes requests with Modal's own descriptors: `[[RPC, message in hex]…]` in, `[[RPC, message]…]` out.

A field that the descriptors don't know is an error.
"""

import json
import sys

from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet
from modal_proto import api_pb2, task_command_router_pb2


def check(message, path):
    unknown = [field.field_number for field in UnknownFieldSet(message)]
    assert not unknown, f"{path}: unknown fields {unknown}"
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else [value]:
            check(one, f"{path}.{field.name}")


methods = {}
for file, service in (
    (api_pb2, "ModalClient"),
    (task_command_router_pb2, "TaskCommandRouter"),
):
    methods |= file.DESCRIPTOR.services_by_name[service].methods_by_name

decoded = []
for rpc, raw in json.load(sys.stdin):
    message = GetMessageClass(methods[rpc].input_type).FromString(bytes.fromhex(raw))
    check(message, rpc)
    decoded.append([rpc, MessageToDict(message, preserving_proto_field_name=True)])
json.dump(decoded, sys.stdout)
