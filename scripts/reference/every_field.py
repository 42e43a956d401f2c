#!/usr/bin/env python3
"""Creates a model in which every field of onnx.proto is set at least once, for tests of reading and writing.

    python3 scripts/reference/every_field.py fixtures/onnx/every-field.onnx

Run by hand when the format gets new fields. Fails when a field of the installed onnx package is not set, except those
that interlace rejects (training, sparse initializers, segments) and external data, which the zoo's graphs have. Needs
onnx and numpy.
"""

import sys

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, TypeProto, helper, numpy_helper

NOT_SET = {
    "ModelProto.training_info",
    "TrainingInfoProto",
    "GraphProto.sparse_initializer",
    "TensorProto.segment",
    "TensorProto.Segment",
    "TensorProto.data_location",
    "TensorProto.external_data",
}


def pairs(message, stem):
    for number in range(2):
        message.add(key=f"{stem}.key{number}", value=f"{stem}.value{number}")


def shape(proto, dims):
    for number, dim in enumerate(dims):
        entry = proto.dim.add(denotation=f"DATA_{number}")
        if isinstance(dim, int):
            entry.dim_value = dim
        elif dim is not None:
            entry.dim_param = dim


def value(info, name, dims=(2, "batch", None)):
    info.name = name
    info.type.denotation = "TENSOR"
    info.type.tensor_type.elem_type = TensorProto.FLOAT
    shape(info.type.tensor_type.shape, dims)
    info.doc_string = f"about {name}"
    pairs(info.metadata_props, name)
    return info


def types():
    dense = TypeProto(denotation="IMAGE")
    dense.tensor_type.elem_type = TensorProto.INT64
    shape(dense.tensor_type.shape, [1, "n"])
    sparse = TypeProto(denotation="SPARSE")
    sparse.sparse_tensor_type.elem_type = TensorProto.FLOAT
    shape(sparse.sparse_tensor_type.shape, [3, "m"])
    sequence = TypeProto(denotation="SEQUENCE")
    sequence.sequence_type.elem_type.CopyFrom(dense)
    mapped = TypeProto(denotation="MAP")
    mapped.map_type.key_type = TensorProto.STRING
    mapped.map_type.value_type.CopyFrom(sequence)
    optional = TypeProto(denotation="OPTIONAL")
    optional.optional_type.elem_type.CopyFrom(mapped)
    opaque = TypeProto(denotation="OPAQUE")
    if hasattr(opaque, "opaque_type"):
        opaque.opaque_type.domain = "example.types"
        opaque.opaque_type.name = "thing"
    return [dense, sparse, sequence, mapped, optional, opaque]


def tensor(name, kind, field, values, dims):
    proto = TensorProto(name=name, data_type=kind, dims=dims, doc_string=f"tensor {name}")
    pairs(proto.metadata_props, name)
    getattr(proto, field).extend(values)
    return proto


def tensors():
    return [
        tensor("floats", TensorProto.FLOAT, "float_data", [1.5, -2.25], [2]),
        tensor("halves", TensorProto.FLOAT16, "int32_data", [15360, 49152], [2]),
        tensor("bytes", TensorProto.UINT8, "int32_data", [7, 255], [1, 2]),
        tensor("nibbles", TensorProto.INT4, "int32_data", [0x21, 0x0F], [3]),
        tensor("longs", TensorProto.INT64, "int64_data", [-3, 1 << 40], [2]),
        tensor("doubles", TensorProto.DOUBLE, "double_data", [0.125, 9.0], [2]),
        tensor("unsigned", TensorProto.UINT64, "uint64_data", [1 << 63, 5], [2]),
        tensor("complex", TensorProto.COMPLEX64, "float_data", [1.0, 2.0], [1]),
        tensor("words", TensorProto.STRING, "string_data", [b"left", b"right"], [2]),
        numpy_helper.from_array(np.arange(6, dtype=np.int16).reshape(2, 3), "raw"),
    ]


def sparse(name):
    proto = onnx.SparseTensorProto(dims=[8, 8])
    proto.values.CopyFrom(tensor(f"{name}.values", TensorProto.FLOAT, "float_data", [4.0], [1]))
    proto.indices.CopyFrom(tensor(f"{name}.indices", TensorProto.INT64, "int64_data", [9], [1]))
    return proto


def branch(name, outer):
    graph = onnx.GraphProto(name=name, doc_string=f"graph {name}")
    pairs(graph.metadata_props, name)
    node = graph.node.add(op_type="Add", name=f"{name}.add", input=[outer, f"{name}.weight"], output=[f"{name}.sum"])
    node.doc_string = "adds"
    graph.initializer.append(tensor(f"{name}.weight", TensorProto.FLOAT, "float_data", [3.0], [1]))
    value(graph.output.add(), f"{name}.sum")
    value(graph.value_info.add(), f"{name}.weight", [1])
    annotation = graph.quantization_annotation.add(tensor_name=f"{name}.weight")
    pairs(annotation.quant_parameter_tensor_names, name)
    return graph


def attributes(outer):
    kinds = AttributeProto
    rows = [
        ("a_float", kinds.FLOAT, {"f": 0.5}),
        ("an_int", kinds.INT, {"i": -4}),
        ("a_string", kinds.STRING, {"s": b"bytes \xff"}),
        ("a_tensor", kinds.TENSOR, {"t": tensors()[0]}),
        ("a_graph", kinds.GRAPH, {"g": branch("only", outer)}),
        ("a_sparse_tensor", kinds.SPARSE_TENSOR, {"sparse_tensor": sparse("one")}),
        ("a_type", kinds.TYPE_PROTO, {"tp": types()[4]}),
        ("floats", kinds.FLOATS, {"floats": [0.0, 1.0, -0.0]}),
        ("ints", kinds.INTS, {"ints": [0, -1, 1 << 50]}),
        ("strings", kinds.STRINGS, {"strings": [b"", b"x"]}),
        ("tensors", kinds.TENSORS, {"tensors": tensors()}),
        ("graphs", kinds.GRAPHS, {"graphs": [branch("first", outer), branch("second", outer)]}),
        ("sparse_tensors", kinds.SPARSE_TENSORS, {"sparse_tensors": [sparse("two"), sparse("three")]}),
        ("types", kinds.TYPE_PROTOS, {"type_protos": types()}),
    ]
    return [AttributeProto(name=name, type=kind, doc_string=f"doc of {name}", **held) for name, kind, held in rows]


def function():
    proto = onnx.FunctionProto(name="Scale", domain="example.functions", overload="wide", doc_string="scales")
    proto.input.extend(["x", "factor"])
    proto.output.append("y")
    proto.attribute.append("needed")
    proto.attribute_proto.append(AttributeProto(name="given", type=AttributeProto.INT, i=2, doc_string="a default"))
    proto.opset_import.append(helper.make_opsetid("", 21))
    proto.opset_import.append(helper.make_opsetid("example.custom", 1))
    pairs(proto.metadata_props, "function")
    value(proto.value_info.add(), "x")
    value(proto.value_info.add(), "scaled")
    node = proto.node.add(op_type="Mul", name="mul", input=["x", "factor"], output=["scaled"], doc_string="multiplies")
    pairs(node.metadata_props, "mul")
    custom = proto.node.add(op_type="Custom", domain="example.custom", input=["scaled"], output=["y"])
    custom.attribute.append(AttributeProto(name="width", ref_attr_name="needed", type=AttributeProto.INT, doc_string="r"))
    return proto


def devices(model, node):
    configuration = model.configuration.add(name="pair", num_devices=2)
    configuration.device.extend(["gpu0", "gpu1"])
    placed = node.device_configurations.add(configuration_id="pair", pipeline_stage=1)
    spec = placed.sharding_spec.add(tensor_name="in")
    spec.device.extend([0, 1])
    group = spec.index_to_device_group_map.add(key=-1)
    group.value.extend([0, 1])
    sharded = spec.sharded_dim.add(axis=1)
    sharded.simple_sharding.add(dim_value=4, num_shards=2)
    sharded.simple_sharding.add(dim_param="batch", num_shards=2)


def model():
    proto = onnx.ModelProto(
        ir_version=11,
        producer_name="interlace's tests",
        producer_version="1.2",
        domain="example",
        model_version=7,
        doc_string="every field",
    )
    # Not in alphabetical order, and one domain in its other spelling.
    for domain, version in [("example.functions", 1), ("ai.onnx", 21), ("example.custom", 1)]:
        proto.opset_import.append(helper.make_opsetid(domain, version))
    pairs(proto.metadata_props, "model")
    proto.functions.append(function())
    graph = proto.graph
    graph.name = "main"
    graph.doc_string = "the graph"
    pairs(graph.metadata_props, "graph")
    value(graph.input.add(), "in")
    value(graph.input.add(), "scale", [1])
    for number, kind in enumerate(types()[1:5]):
        graph.input.add(name=f"other{number}").type.CopyFrom(kind)
    graph.initializer.extend(tensors())
    graph.initializer.append(tensor("scale", TensorProto.FLOAT, "float_data", [2.0], [1]))
    value(graph.value_info.add(), "floats", [2])
    value(graph.value_info.add(), "middle")
    value(graph.value_info.add(), "defined.nowhere")
    for name in ["in", "scale", "halves", "middle", "out", "defined.nowhere"]:
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    custom = graph.node.add(op_type="Custom", domain="example.custom", name="custom", overload="typed")
    custom.input.extend(["in", "", "floats"])
    custom.output.extend(["middle", "", "unused"])
    custom.doc_string = "a node"
    custom.attribute.extend(attributes("in"))
    pairs(custom.metadata_props, "custom")
    devices(proto, custom)
    call = graph.node.add(op_type="Scale", domain="example.functions", overload="wide", name="call")
    call.input.extend(["middle", "scale"])
    call.output.append("out")
    call.attribute.append(helper.make_attribute("needed", 3))
    plain = graph.node.add(op_type="Identity", domain="ai.onnx", name="plain", input=["in"], output=["copy"])
    plain.doc_string = "the default domain in its other spelling"
    value(graph.output.add(), "out")
    graph.output.add(name="copy")
    return proto


def visit(message, found):
    for field, content in message.ListFields():
        found.add(f"{message.DESCRIPTOR.full_name}.{field.name}".removeprefix("onnx."))
        if field.message_type is not None:
            repeated = not hasattr(content, "DESCRIPTOR")
            for inner in content if repeated else [content]:
                visit(inner, found)


def expected(descriptor, known):
    name = descriptor.full_name.removeprefix("onnx.")
    if descriptor.full_name in known or name in NOT_SET:
        return
    known[descriptor.full_name] = [f"{name}.{field.name}" for field in descriptor.fields]
    for field in descriptor.fields:
        if field.message_type is not None and f"{name}.{field.name}" not in NOT_SET:
            expected(field.message_type, known)


def main():
    proto = model()
    found, known = set(), {}
    visit(proto, found)
    expected(proto.DESCRIPTOR, known)
    missing = sorted(field for fields in known.values() for field in fields if field not in found | NOT_SET)
    if missing:
        sys.exit(f"not set: {', '.join(missing)}")
    with open(sys.argv[1], "wb") as file:
        file.write(proto.SerializeToString(deterministic=True))


main()
