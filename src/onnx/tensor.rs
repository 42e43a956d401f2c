//! Constants and types of a message, with inline, mapped or external content.

use std::mem::take;

use onnx_protobuf as pb;
use pb::type_proto;
use protobuf::EnumOrUnknown;

use crate::base::{Error, Result};
use crate::ir::{DataType, Dim, Tensor, TensorData, ValueType};

use super::external::Sources;
use super::opaque::{self, pairs};

/// Converts a tensor. An initializer's name belongs to its value; any other tensor keeps its own name.
///
/// Errors: `Error::Invalid` when type, shape and content disagree; `Error::Unsupported` for unknown element types and
/// segments; those of `Sources::external`.
pub fn tensor(
    mut proto: pb::TensorProto,
    payload: Option<(usize, usize)>,
    named: bool,
    sources: &mut Sources,
) -> Result<Tensor> {
    let name = if named { take(&mut proto.name) } else { proto.name.clone() };
    let subject = || format!("tensor `{name}`");
    let number = take(&mut proto.data_type);
    let dtype = DataType::from_number(number)
        .ok_or_else(|| Error::unsupported(subject(), format!("element type number {number}")))?;
    if proto.segment.is_some() {
        return Err(Error::unsupported(subject(), "it is split into segments"));
    }
    let dims = take(&mut proto.dims)
        .iter()
        .map(|&dim| u64::try_from(dim).map_err(|_| Error::invalid(subject(), format!("has a dimension of {dim}"))))
        .collect::<Result<Vec<u64>>>()?;
    let want = dims
        .iter()
        .try_fold(1u64, |count, &dim| count.checked_mul(dim))
        .and_then(|count| dtype.byte_len(count))
        .ok_or_else(|| Error::invalid(subject(), format!("shape {dims:?} overflows")))?;
    let data = tensor_data(&mut proto, &name, dtype, want, payload, sources)?;
    let tensor = Tensor {
        dtype,
        dims,
        data,
        doc_string: take(&mut proto.doc_string),
        metadata: pairs(&mut proto.metadata_props),
        extra: opaque::rest(&proto),
    };
    if let TensorData::Strings(items) = &tensor.data
        && items.len() as u64 != tensor.element_count()
    {
        let problem =
            format!("holds {} strings, shape {:?} takes {}", items.len(), tensor.dims, tensor.element_count());
        return Err(Error::invalid(subject(), problem));
    }
    if dtype != DataType::String && tensor.byte_len() != want {
        return Err(Error::invalid(
            subject(),
            format!("holds {} bytes, {} of shape {:?} takes {want}", tensor.byte_len(), dtype, tensor.dims),
        ));
    }
    Ok(tensor)
}

/// Moves the content out of a tensor: from another file, from its range in this file (`payload`), or inline.
fn tensor_data(
    proto: &mut pb::TensorProto,
    name: &str,
    dtype: DataType,
    want: u64,
    payload: Option<(usize, usize)>,
    sources: &mut Sources,
) -> Result<TensorData> {
    let subject = || format!("tensor `{name}`");
    let has_raw = payload.is_some() || !proto.raw_data.is_empty();
    let strings = take(&mut proto.string_data);
    let typed = typed_bytes(proto, dtype);
    let external = match proto.data_location.value() {
        0 => false,
        1 => true,
        other => return Err(Error::invalid(subject(), format!("has data location {other}, expected 0 or 1"))),
    };
    let places = [external, has_raw, !typed.is_empty() || !strings.is_empty()];
    if places.iter().filter(|&&given| given).count() > 1 {
        return Err(Error::invalid(subject(), "holds its content twice, in `raw_data`, in a typed field or in a file"));
    }
    if dtype == DataType::String && (external || has_raw) {
        return Err(Error::invalid(subject(), "is of strings, which only `string_data` can hold"));
    }
    if external {
        proto.data_location = EnumOrUnknown::default();
        let entries = take(&mut proto.external_data);
        let entries: Vec<(&str, &str)> =
            entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect();
        return sources.external(name, &entries, want);
    }
    if let Some((offset, length)) = payload {
        return Ok(sources.inside(offset, length));
    }
    Ok(match dtype {
        DataType::String => TensorData::Strings(strings.into()),
        _ if has_raw => TensorData::Bytes(take(&mut proto.raw_data).into()),
        _ => TensorData::Bytes(typed.into()),
    })
}

/// Moves the typed field of a tensor out as raw bytes. Source: onnx.proto, which assigns each type a field.
pub fn typed_bytes(proto: &mut pb::TensorProto, dtype: DataType) -> Vec<u8> {
    use DataType::*;
    match dtype {
        Float | Complex64 => take(&mut proto.float_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Double | Complex128 => take(&mut proto.double_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int64 => take(&mut proto.int64_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Uint32 => take(&mut proto.uint64_data).iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        Uint64 => take(&mut proto.uint64_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int32 => take(&mut proto.int32_data).iter().flat_map(|v| v.to_le_bytes()).collect(),
        Int16 | Uint16 | Float16 | Bfloat16 => {
            take(&mut proto.int32_data).iter().flat_map(|&v| (v as u16).to_le_bytes()).collect()
        }
        String => Vec::new(),
        // One byte of content per number; sub-byte types are packed inside it.
        _ => take(&mut proto.int32_data).iter().map(|&v| v as u8).collect(),
    }
}

/// A type, and the fields of its message without a counterpart in the graph in memory (denotations).
pub fn value_type(mut proto: pb::TypeProto) -> (ValueType, Option<pb::TypeProto>) {
    let Some(type_proto::Value::TensorType(tensor)) = &mut proto.value else {
        return (ValueType::Other(opaque::rest(&proto)), None);
    };
    let Some(dtype) = DataType::from_number(tensor.elem_type) else {
        return (ValueType::Other(opaque::rest(&proto)), None);
    };
    tensor.elem_type = 0;
    let shape = tensor.shape.as_mut().map(|shape| shape.dim.iter_mut().map(dimension).collect());
    if let Some(rest) = tensor.shape.as_mut()
        && rest.dim.iter().all(|dim| *dim == pb::tensor_shape_proto::Dimension::default())
    {
        rest.dim.clear();
    }
    if tensor.shape.as_ref().is_some_and(|rest| *rest == pb::TensorShapeProto::default()) {
        tensor.shape.take();
    }
    if *tensor == type_proto::Tensor::default() {
        proto.value = None;
    }
    let rest = (proto != pb::TypeProto::default()).then_some(proto);
    (ValueType::Tensor { dtype, shape }, rest)
}

/// Moves the size or name out of an axis.
fn dimension(proto: &mut pb::tensor_shape_proto::Dimension) -> Dim {
    use pb::tensor_shape_proto::dimension::Value::{DimParam, DimValue};
    match proto.value.take() {
        Some(DimValue(size)) => Dim::Known(size),
        Some(DimParam(name)) if !name.is_empty() => Dim::Symbol(name),
        _ => Dim::Unknown,
    }
}
