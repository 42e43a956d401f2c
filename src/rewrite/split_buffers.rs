//! Splits tables of embeddings and weights of products that are larger than a device's largest buffer.
//!
//! A product with a split weight is the concatenation of products with its parts. A lookup in a split table looks up in
//! every part and takes the row of the part that has it.

use std::collections::HashSet;

use crate::base::{Error, Result, human_bytes};
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, GraphIndex, Model, Node, Tensor, ValueId, captured, check,
    large_constants,
};

use super::build::{Builder, operator};
use super::tidy::sort_nodes;

/// First operator set in which a lookup can be split: `Unsqueeze` takes its axes as an input.
const OPSET: i64 = 13;
/// Largest number of parts of one initializer. A product or lookup has some nodes for each part.
const MAX_PARTS: u64 = 1024;
const REMEDY: &str = "allow a larger `--max-buffer`, or export a smaller precision";

/// How a node reads a weight.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// A lookup of rows.
    Gather(usize),
    /// A product with the weight `[K, N]`.
    Product(usize),
    /// A product with the transposed weight `[N, K]`.
    Transposed { transpose: usize, product: usize },
    /// `MatMulNBits`, whose packed weight is `[N, ..]`.
    Packed(usize),
}

impl Reader {
    /// The axis along which the weight is cut.
    fn axis(self) -> usize {
        usize::from(matches!(self, Reader::Product(_)))
    }
}

/// The model with every initializer of more than `limit` bytes in parts, and the names of these initializers. A weight
/// in a `Constant` node of the graph counts as one.
///
/// A lookup of an id outside `-rows..rows` stays an error of the runtime, and a negative id counts from the end.
///
/// Errors: `Error::Unsupported` naming a constant of more than `limit` bytes that cannot be split or would have more than
/// 1024 parts; `Error::Invalid` for a limit below a row.
pub fn split_buffers(model: &Model, limit: u64) -> Result<(Model, Vec<String>)> {
    let mut split = model.clone();
    constants_as_initializers(&mut split.graph.body, limit);
    let initializers = &split.graph.body.initializers;
    let large: Vec<ValueId> =
        initializers.iter().filter(|(_, tensor)| tensor.byte_len() > limit).map(|(id, _)| *id).collect();
    for &id in &large {
        for weight in packed_weights_of(&split.graph.body, id) {
            split_one(&mut split, weight, limit)?;
        }
        split_one(&mut split, id, limit)?;
    }
    if let Some((constant, size)) = large_constants(&split, limit).into_iter().next() {
        let problem = format!("has {}, more than {}, and cannot be split there", human_bytes(size), human_bytes(limit));
        return Err(Error::unsupported(constant, problem).remedy(REMEDY));
    }
    if !large.is_empty() {
        sort_nodes(&mut split.graph)?;
        check(&split)?;
    }
    Ok((split, large.into_iter().map(|id| model.graph.name(id).to_string()).collect()))
}

/// Turns each `Constant` node with a tensor of more than `limit` bytes into an initializer.
fn constants_as_initializers(body: &mut Body, limit: u64) {
    let Body { nodes, initializers, .. } = body;
    nodes.retain(|node| {
        let constant = node.domain.is_empty() && node.op_type == "Constant";
        let tensor = node.attribute("value").and_then(Attribute::as_tensor).filter(|_| constant);
        match (tensor.filter(|tensor| tensor.byte_len() > limit), node.present_outputs().next()) {
            (Some(tensor), Some(output)) => {
                initializers.push((output, tensor.clone()));
                false
            }
            _ => true,
        }
    });
}

/// Packed weights of the `MatMulNBits` whose scales, zero points or bias an initializer is: they are cut with the weight.
fn packed_weights_of(body: &Body, id: ValueId) -> Vec<ValueId> {
    let packed = body.nodes.iter().filter(|node| node.domain == "com.microsoft" && node.op_type == "MatMulNBits");
    let beside = packed.filter(|node| node.inputs.iter().skip(2).any(|input| *input == Some(id)));
    beside.filter_map(|node| node.inputs.get(1).copied().flatten()).collect()
}

/// Splits one initializer; does nothing where it is split already.
fn split_one(model: &mut Model, id: ValueId, limit: u64) -> Result<()> {
    let name = model.graph.name(id).to_string();
    let Some(tensor) = model.graph.body.initializer(id).cloned() else { return Ok(()) };
    let size = human_bytes(tensor.byte_len());
    let refused = |problem: &str| {
        Error::unsupported(
            format!("initializer `{name}`"),
            format!("has {size}, with a limit of {}, and {problem}", human_bytes(limit)),
        )
        .remedy(REMEDY)
    };
    let readers = readers(&model.graph.body, id, &tensor).map_err(|problem| refused(&problem))?;
    let Some(axis) = readers.first().map(|reader| reader.axis()) else {
        return Err(refused("nothing reads it"));
    };
    if readers.iter().any(|reader| reader.axis() != axis) {
        return Err(refused("its readers need it cut along different axes"));
    }
    let opset = model.opset_imports.get("").copied().unwrap_or(1);
    if opset < OPSET && readers.iter().any(|reader| matches!(reader, Reader::Gather(_))) {
        let problem = format!("the operator set {opset} is below {OPSET}, which splitting a table needs");
        return Err(refused(&problem).remedy(format!("raise it with `--opset {OPSET}`")));
    }
    let rows = tensor.dims.get(axis).copied().unwrap_or(1);
    let row_bytes = row_bytes(&model.graph.body, &readers, tensor.byte_len().div_ceil(rows.max(1)), rows);
    let step = limit / row_bytes.max(1);
    if step == 0 {
        let problem = format!("is below a row of `{name}`, {}", human_bytes(row_bytes));
        return Err(Error::invalid("`--max-buffer`", problem).remedy("allow at least one row"));
    }
    if rows.div_ceil(step) > MAX_PARTS {
        let least = rows.div_ceil(MAX_PARTS).saturating_mul(row_bytes);
        let problem = format!("would have {} parts, more than {MAX_PARTS}", rows.div_ceil(step));
        return Err(refused(&problem).remedy(format!("allow at least {least} bytes with `--max-buffer`")));
    }
    let counts: Vec<u64> = (0..rows).step_by(step as usize).map(|from| step.min(rows - from)).collect();
    let mut gone = HashSet::new();
    let mut build = Builder::new(model, "split");
    let parts: Vec<ValueId> = cut(&tensor, axis, &counts)
        .into_iter()
        .enumerate()
        .map(|(number, part)| build.constant(&format!("{name}.{number}"), part))
        .collect();
    for reader in readers {
        match reader {
            Reader::Gather(node) => split_gather(&mut build, node, &parts, &counts, tensor.dtype),
            Reader::Product(node) => split_product(&mut build, node, &parts, false),
            Reader::Transposed { product, .. } => split_product(&mut build, product, &parts, true),
            Reader::Packed(node) => {
                split_packed(&mut build, node, &parts, &counts).map_err(|problem| refused(&problem))?
            }
        }
        match reader {
            Reader::Gather(node) | Reader::Product(node) | Reader::Packed(node) => gone.extend([node]),
            Reader::Transposed { transpose, product } => gone.extend([transpose, product]),
        }
    }
    let body = &mut model.graph.body;
    let mut number = 0;
    body.nodes.retain(|_| {
        number += 1;
        !gone.contains(&(number - 1))
    });
    let read: HashSet<ValueId> =
        body.nodes.iter().flat_map(|node| node.present_inputs().chain(node.bodies().flat_map(captured))).collect();
    body.initializers
        .retain(|(other, _)| read.contains(other) || body.outputs.contains(other) || body.inputs.contains(other));
    Ok(())
}

/// Bytes of a row of a weight or, where they are more, of the scales, zero points or bias that are cut with it.
fn row_bytes(body: &Body, readers: &[Reader], own: u64, rows: u64) -> u64 {
    let packed = readers.iter().filter_map(|reader| match reader {
        Reader::Packed(node) => Some(&body.nodes[*node]),
        _ => None,
    });
    let beside = packed.flat_map(|node| node.inputs.iter().skip(2).flatten());
    beside.filter_map(|&id| body.initializer(id)).map(|tensor| tensor.byte_len() / rows.max(1)).fold(own, u64::max)
}

/// The type in which rows of a table are chosen: ONNX Runtime's `Where` has no kernel for every type that its `Gather`
/// has one for.
fn chosen_as(dtype: DataType) -> Option<DataType> {
    Some(match dtype {
        DataType::Float | DataType::Float16 | DataType::Double => dtype,
        DataType::Int32 | DataType::Int64 | DataType::Uint8 => dtype,
        DataType::Bfloat16 => DataType::Float,
        DataType::Bool => DataType::Uint8,
        DataType::Int8 | DataType::Int16 | DataType::Uint16 => DataType::Int32,
        DataType::Uint32 => DataType::Int64,
        _ => return None,
    })
}

/// All readers of a weight; the text says why one of them does not allow a split.
fn readers(body: &Body, id: ValueId, tensor: &Tensor) -> std::result::Result<Vec<Reader>, String> {
    if body.inputs.contains(&id) || body.outputs.contains(&id) {
        return Err("is an input or output of the graph".into());
    }
    let in_bodies: HashSet<ValueId> = body.nodes.iter().flat_map(Node::bodies).flat_map(captured).collect();
    if in_bodies.contains(&id) {
        return Err("a body inside a node reads it".into());
    }
    let index = GraphIndex::of_body(body);
    let mut found = Vec::new();
    let readers_of = |id: ValueId| {
        body.nodes.iter().enumerate().filter(move |(_, node)| node.present_inputs().any(|input| input == id))
    };
    let matrix = tensor.dims.len() == 2;
    for (number, node) in readers_of(id) {
        let own: Vec<usize> = (0..node.inputs.len()).filter(|&at| node.inputs[at] == Some(id)).collect();
        let int = |name: &str, default: i64| node.attribute(name).and_then(Attribute::as_int).unwrap_or(default);
        match (node.domain.as_str(), node.op_type.as_str(), &own[..]) {
            ("", "Gather" | "Transpose", [0]) | ("", "MatMul", [1]) if !matrix => {
                let rank = tensor.dims.len();
                return Err(format!("`{}` ({}) reads it with {rank} axes instead of 2", node.name, node.op_type));
            }
            ("", "Gather", [0]) if [0, -2].contains(&int("axis", 0)) => match chosen_as(tensor.dtype) {
                Some(_) => found.push(Reader::Gather(number)),
                None => return Err(format!("rows of {} cannot be chosen from parts", tensor.dtype)),
            },
            ("", "MatMul", [1]) => found.push(Reader::Product(number)),
            ("com.microsoft", "MatMulNBits", [1]) => match (tensor.dims.first(), tensor.dims.len()) {
                (Some(&rows), 2..) if u64::try_from(int("N", 0)) == Ok(rows) => found.push(Reader::Packed(number)),
                _ => {
                    let shape = &tensor.dims;
                    return Err(format!("`{}` (MatMulNBits) has N {} for the shape {shape:?}", node.name, int("N", 0)));
                }
            },
            ("", "Transpose", [0]) => {
                let perm = node.attribute("perm").and_then(Attribute::as_ints);
                let turned = node.present_outputs().next();
                let turned = turned.filter(|out| index.output_position(*out).is_none() && !in_bodies.contains(out));
                let all: Vec<usize> = turned.into_iter().flat_map(readers_of).map(|(number, _)| number).collect();
                let product = |&number: &usize| {
                    let node = &body.nodes[number];
                    (node.domain.as_str(), node.op_type.as_str()) == ("", "MatMul")
                        && node.inputs.first().copied().flatten() != turned
                };
                match all[..] {
                    [only] if product(&only) && perm.is_none_or(|perm| perm == [1, 0]) => {
                        found.push(Reader::Transposed { transpose: number, product: only });
                    }
                    _ => return Err(format!("`{}` transposes it for other nodes than one product", node.name)),
                }
            }
            _ => return Err(format!("`{}` ({}) cannot read it in parts", node.name, node.op_type)),
        }
    }
    Ok(found)
}

/// The parts of a tensor of at least two axes along axis 0 or, of a matrix, along axis 1.
fn cut(tensor: &Tensor, axis: usize, counts: &[u64]) -> Vec<Tensor> {
    let bytes = tensor.bytes();
    let outer: usize = tensor.dims[..axis].iter().product::<u64>() as usize;
    let row = bytes.len() / outer.max(1) / (tensor.dims[axis] as usize).max(1);
    let stride = bytes.len() / outer.max(1);
    let mut from = 0;
    let mut parts = Vec::with_capacity(counts.len());
    for &count in counts {
        let length = count as usize * row;
        let mut part = Vec::with_capacity(outer * length);
        for line in 0..outer {
            part.extend_from_slice(&bytes[line * stride + from..line * stride + from + length]);
        }
        let mut dims = tensor.dims.clone();
        dims[axis] = count;
        parts.push(Tensor::from_bytes(tensor.dtype, &dims, part));
        from += length;
    }
    parts
}

fn split_product(build: &mut Builder<'_>, node: usize, parts: &[ValueId], transposed: bool) {
    let node = build.model.graph.body.nodes[node].clone();
    let [Some(left), _] = node.inputs[..] else { return };
    let mut products = Vec::with_capacity(parts.len());
    for &part in parts {
        let part = match transposed {
            true => build.node("Transpose", &[part], &[("perm", AttributeKind::Ints(vec![1, 0]))]),
            false => part,
        };
        products.push(build.node("MatMul", &[left, part], &[]));
    }
    concatenate(build, &node, &products);
}

/// Gives the columns of `products` in the place of the result of `node`.
fn concatenate(build: &mut Builder<'_>, node: &Node, products: &[ValueId]) {
    let Some(output) = node.present_outputs().next() else { return };
    let whole = operator("Concat", products, output, &[("axis", AttributeKind::Int(-1))]);
    build.model.graph.body.nodes.push(Node { name: node.name.clone(), ..whole });
}

/// A lookup of ids in `-rows..rows`. Another id is behind the last row of the last part, where the lookup fails.
fn split_gather(build: &mut Builder<'_>, node: usize, parts: &[ValueId], counts: &[u64], dtype: DataType) {
    let node = build.model.graph.body.nodes[node].clone();
    let ([_, Some(ids)], Some(output)) = (&node.inputs[..], node.present_outputs().next()) else { return };
    let cast = |to: DataType| [("to", AttributeKind::Int(to as i64))];
    let via = chosen_as(dtype).unwrap_or(dtype);
    let zero = build.constant("zero", Tensor::from_i64(&[], &[0]));
    let last_axis = build.constant("last_axis", Tensor::from_i64(&[1], &[-1]));
    let all = build.constant("rows", Tensor::from_i64(&[], &[counts.iter().sum::<u64>() as i64]));
    let ids = build.node("Cast", &[*ids], &cast(DataType::Int64));
    let negative = build.node("Less", &[ids, zero], &[]);
    let from_end = build.node("Add", &[ids, all], &[]);
    let row = build.node("Where", &[negative, from_end, ids], &[]);
    let before_first = build.node("Less", &[row, zero], &[]);
    let row = build.node("Where", &[before_first, all, row], &[]);
    let mut rows = None;
    let mut from = 0;
    for (number, (&part, &count)) in parts.iter().zip(counts).enumerate() {
        let start = build.constant(&format!("start.{number}"), Tensor::from_i64(&[], &[from]));
        let own = build.node("Sub", &[row, start], &[]);
        let inside = match number + 1 == parts.len() {
            true => build.node("Max", &[own, zero], &[]),
            false => {
                let last = build.constant(&format!("last.{number}"), Tensor::from_i64(&[], &[count as i64 - 1]));
                build.node("Clip", &[own, zero, last], &[])
            }
        };
        let mut found = build.node("Gather", &[part, inside], &[]);
        if via != dtype {
            found = build.node("Cast", &[found], &cast(via));
        }
        // The parts are in order: an id belongs to the last part that does not begin behind it.
        rows = Some(match rows {
            None => found,
            Some(before) => {
                let here = build.node("GreaterOrEqual", &[own, zero], &[]);
                let here = build.node("Unsqueeze", &[here, last_axis], &[]);
                build.node("Where", &[here, found, before], &[])
            }
        });
        from += count as i64;
    }
    if let Some(rows) = rows.filter(|_| via != dtype) {
        build.node("Cast", &[rows], &cast(dtype));
    }
    if let Some(whole) = build.model.graph.body.nodes.last_mut() {
        whole.outputs = vec![Some(output)];
        whole.name = node.name;
    }
}

/// The product of a packed weight: its scales and zero points are cut too.
fn split_packed(
    build: &mut Builder<'_>,
    number: usize,
    parts: &[ValueId],
    counts: &[u64],
) -> std::result::Result<(), String> {
    let node = build.model.graph.body.nodes[number].clone();
    let total: u64 = counts.iter().sum();
    let Some(left) = node.inputs.first().copied().flatten() else { return Err("has no first factor".into()) };
    let mut beside = Vec::new();
    for (place, input) in node.inputs.iter().enumerate().skip(2) {
        let Some(input) = input else { continue };
        let tensor = build.model.graph.body.initializer(*input).cloned();
        let tensor = tensor.filter(|tensor| place != 4 && tensor.byte_len() % total.max(1) == 0);
        let Some(tensor) = tensor else { return Err(format!("input {place} of `{}` cannot be cut", node.name)) };
        // One row of numbers for each output, whether the file declares them as a matrix or as one list.
        let dims = match tensor.dims.first() {
            Some(&first) if first == total => tensor.dims.clone(),
            _ => vec![total, tensor.element_count() / total],
        };
        let flat = tensor.dims.len() == 1;
        let rows = Tensor::from_bytes(tensor.dtype, &dims, tensor.bytes().to_vec());
        let pieces = cut(&rows, 0, counts).into_iter().map(|piece| match flat {
            true => Tensor::from_bytes(piece.dtype, &[piece.element_count()], piece.bytes().to_vec()),
            false => piece,
        });
        let pieces: Vec<Tensor> = pieces.collect();
        let pieces: Vec<ValueId> =
            pieces.into_iter().map(|piece| build.constant(&format!("beside.{place}"), piece)).collect();
        beside.push((place, pieces));
    }
    let mut products = Vec::with_capacity(parts.len());
    for (at, (&part, &count)) in parts.iter().zip(counts).enumerate() {
        let output = build.value();
        let mut own = node.clone();
        own.inputs[0] = Some(left);
        own.inputs[1] = Some(part);
        for (place, pieces) in &beside {
            own.inputs[*place] = Some(pieces[at]);
        }
        own.outputs = vec![Some(output)];
        own.name = format!("{}.{at}", node.name);
        for (name, value) in &mut own.attributes {
            if name == "N" {
                *value = AttributeKind::Int(count as i64).into();
            }
        }
        build.model.graph.body.nodes.push(own);
        products.push(output);
    }
    concatenate(build, &node, &products);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts side by side are the tensor again, along both axes.
    #[test]
    fn parts_add_up_to_the_tensor() {
        let tensor = Tensor::from_f32(&[5, 3], &(0..15).map(|number| number as f32).collect::<Vec<_>>());
        let rows = cut(&tensor, 0, &[2, 2, 1]);
        assert_eq!(rows.iter().map(|part| part.dims.clone()).collect::<Vec<_>>(), [[2, 3], [2, 3], [1, 3]]);
        let joined: Vec<u8> = rows.iter().flat_map(|part| part.bytes().to_vec()).collect();
        assert_eq!(joined, tensor.bytes());
        let columns = cut(&tensor, 1, &[2, 1]);
        assert_eq!(columns[0].to_f64s().unwrap(), [0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 9.0, 10.0, 12.0, 13.0]);
        assert_eq!(columns[1].to_f64s().unwrap(), [2.0, 5.0, 8.0, 11.0, 14.0]);
        assert_eq!(columns[1].dims, [5, 1]);
    }
}
