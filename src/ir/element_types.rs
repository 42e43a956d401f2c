//! Element types of all values of a graph, whether the file declares them or not.

use std::collections::HashMap;

use super::{Attribute, Body, DataType, Model, Node, Value, ValueId};

/// Where an operator's element types come from. Other operators give the type of their first input.
enum From {
    /// All outputs have this type.
    Fixed(DataType),
    /// The type of this input.
    Input(usize),
    /// The attribute with a type number, or else the type of the first input.
    Attribute(&'static str),
    /// The attribute with a type number, or else floats.
    AttributeOrFloat(&'static str),
    /// The first output as the first input, the others of this type.
    Others(DataType),
    /// Each output of a type of its own.
    Each(&'static [DataType]),
}

const OPERATORS: &[(&str, From)] = &[
    ("ArgMax", From::Fixed(DataType::Int64)),
    ("ArgMin", From::Fixed(DataType::Int64)),
    ("BlackmanWindow", From::AttributeOrFloat("output_datatype")),
    ("Cast", From::Attribute("to")),
    ("CastLike", From::Input(1)),
    ("ConvInteger", From::Fixed(DataType::Int32)),
    ("DequantizeLinear", From::Input(1)),
    ("Dropout", From::Others(DataType::Bool)),
    ("DynamicQuantizeLinear", From::Each(&[DataType::Uint8, DataType::Float, DataType::Uint8])),
    ("And", From::Fixed(DataType::Bool)),
    ("Equal", From::Fixed(DataType::Bool)),
    ("Greater", From::Fixed(DataType::Bool)),
    ("GreaterOrEqual", From::Fixed(DataType::Bool)),
    ("HammingWindow", From::AttributeOrFloat("output_datatype")),
    ("HannWindow", From::AttributeOrFloat("output_datatype")),
    ("IsInf", From::Fixed(DataType::Bool)),
    ("IsNaN", From::Fixed(DataType::Bool)),
    ("Less", From::Fixed(DataType::Bool)),
    ("LessOrEqual", From::Fixed(DataType::Bool)),
    ("Not", From::Fixed(DataType::Bool)),
    ("Or", From::Fixed(DataType::Bool)),
    ("Xor", From::Fixed(DataType::Bool)),
    ("EyeLike", From::Attribute("dtype")),
    ("GatherBlockQuantized", From::Input(2)),
    ("MatMulInteger", From::Fixed(DataType::Int32)),
    ("MatMulIntegerToFloat", From::Input(2)),
    ("NonZero", From::Fixed(DataType::Int64)),
    ("OneHot", From::Input(2)),
    ("QAttention", From::Input(3)),
    ("QLinearConv", From::Input(7)),
    ("QLinearMatMul", From::Input(7)),
    ("QuantizeLinear", From::Input(2)),
    ("RandomNormal", From::AttributeOrFloat("dtype")),
    ("RandomNormalLike", From::Attribute("dtype")),
    ("RandomUniform", From::AttributeOrFloat("dtype")),
    ("RandomUniformLike", From::Attribute("dtype")),
    ("SequenceEmpty", From::AttributeOrFloat("dtype")),
    ("SequenceLength", From::Fixed(DataType::Int64)),
    ("Shape", From::Fixed(DataType::Int64)),
    ("Size", From::Fixed(DataType::Int64)),
    ("TopK", From::Others(DataType::Int64)),
    ("Unique", From::Others(DataType::Int64)),
    ("Where", From::Input(1)),
];

/// The types of the graph's values, in bodies too: those that a file declares and those that follow from the operators. Values of
/// which neither says it are left out.
pub fn element_types(model: &Model) -> HashMap<ValueId, DataType> {
    let declared = |(at, value): (usize, &Value)| Some((at, value.ty.as_ref()?.dtype()?));
    let declared: HashMap<usize, DataType> = model.graph.values.iter().enumerate().filter_map(declared).collect();
    let mut types = HashMap::new();
    visit(&model.graph.body, &declared, &mut types);
    types
}

fn visit(body: &Body, declared: &HashMap<usize, DataType>, types: &mut HashMap<ValueId, DataType>) {
    for &id in &body.inputs {
        types.extend(declared.get(&id.index()).map(|&dtype| (id, dtype)));
    }
    types.extend(body.initializers.iter().map(|(id, tensor)| (*id, tensor.dtype)));
    for node in &body.nodes {
        carry_in(node, types);
        node.bodies().for_each(|inner| visit(inner, declared, types));
        for (place, id) in node.outputs.iter().enumerate() {
            let Some(id) = *id else { continue };
            let dtype = declared.get(&id.index()).copied().or_else(|| output_type(node, place, types));
            types.extend(dtype.map(|dtype| (id, dtype)));
        }
    }
}

/// Gives the inputs of a body the types of the values that are carried or cut into them.
fn carry_in(node: &Node, types: &mut HashMap<ValueId, DataType>) {
    let is_loop = node.op_type == "Loop";
    if !is_loop && node.op_type != "Scan" {
        return;
    }
    for inner in node.bodies() {
        let mut skipped = 0;
        if is_loop {
            types.extend(inner.inputs.first().map(|&id| (id, DataType::Int64)));
            types.extend(inner.inputs.get(1).map(|&id| (id, DataType::Bool)));
            skipped = 2;
        }
        for (&id, outer) in inner.inputs.iter().zip(&node.inputs).skip(skipped) {
            let dtype = outer.and_then(|outer| types.get(&outer).copied());
            types.extend(dtype.map(|dtype| (id, dtype)));
        }
    }
}

fn output_type(node: &Node, place: usize, types: &HashMap<ValueId, DataType>) -> Option<DataType> {
    let input = |place: usize| types.get(&node.inputs.get(place).copied().flatten()?).copied();
    if let Some(inner) = node.bodies().next() {
        // The first output of a loop's body is its condition.
        let skipped = usize::from(node.op_type == "Loop");
        return types.get(inner.outputs.get(place + skipped)?).copied();
    }
    if matches!(node.op_type.as_str(), "Constant" | "ConstantOfShape") {
        return Some(match node.attribute("value").and_then(Attribute::as_tensor) {
            Some(tensor) => tensor.dtype,
            None if node.attribute("value_int").or(node.attribute("value_ints")).is_some() => DataType::Int64,
            None => DataType::Float,
        });
    }
    let row = OPERATORS.iter().find(|(name, _)| *name == node.op_type).map(|(_, from)| from);
    match row {
        None => input(0).or_else(|| number_type(node, "dtype")),
        Some(From::Fixed(dtype)) => Some(*dtype),
        Some(From::Input(place)) => input(*place),
        Some(From::Attribute(name)) => number_type(node, name).or_else(|| input(0)),
        Some(From::AttributeOrFloat(name)) => number_type(node, name).or(Some(DataType::Float)),
        Some(From::Others(dtype)) => {
            if place == 0 {
                input(0)
            } else {
                Some(*dtype)
            }
        }
        Some(From::Each(list)) => list.get(place).copied(),
    }
}

fn number_type(node: &Node, name: &str) -> Option<DataType> {
    let number = node.attribute(name).and_then(Attribute::as_int)?;
    i32::try_from(number).ok().and_then(DataType::from_number)
}
