//! Half precision: weights and activations in f16, inputs and outputs in f32.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};

use half::f16;

use crate::base::{Cancel, Error, Result};
use crate::checkpoint::floats;
use crate::ir::{AttributeKind, Body, DataType, Graph, Model, Node, Tensor, Value, ValueId, ValueType, element_types};
use crate::rewrite::TYPE_ATTRIBUTES;

use super::super::components::NOTHING;
use super::finite::require_finite;
use super::kept::{KeptNode, kept_nodes};
use super::report::{KeptOperators, QuantisedTensor, relative_error};
use super::weights::{FloatConstants, Weights};
use super::{Done, Work};

/// Attributes with the type in which an operator accumulates.
const ACCUMULATORS: &[&str] = &["stash_type", "softmax_precision"];

/// Operators that make floats unless an attribute names another type, with the attribute.
const FLOAT_BY_DEFAULT: &[(&str, &str)] = &[
    ("BlackmanWindow", "output_datatype"),
    ("HammingWindow", "output_datatype"),
    ("HannWindow", "output_datatype"),
    ("SequenceEmpty", "dtype"),
];

/// The graph in f16.
///
/// Errors: `Error::Io` when the scratch file cannot be written; `Error::Invalid` for a constant that is not a number and a weight
/// beyond the range of f16; `Error::Unsupported` for inputs and outputs that are no dense tensors.
pub(super) fn half(mut work: Work<'_>) -> Result<Done> {
    refuse_sequences(&work)?;
    let mut constants = work.constants("half")?;
    let weights = weights_of(&work.model);
    let (file, cancel, model) = (work.file, work.cancel, &mut work.model);
    let types = element_types(model);
    let kept = kept_nodes(&model.graph.body, &types);
    let mut converter = Converter {
        types,
        kept,
        raw: HashMap::new(),
        singles: HashSet::new(),
        wide: HashMap::new(),
        ports: HashSet::new(),
        weights,
        file,
        cancel,
        constants: &mut constants,
        found: Vec::new(),
        operators: BTreeMap::new(),
        clamped: 0,
    };
    let mut body = std::mem::take(&mut model.graph.body);
    converter.open(&mut model.graph, &mut body);
    converter.body(&mut model.graph, &mut body, true)?;
    model.graph.body = body;
    let Converter { found, operators, clamped, .. } = converter;
    let mut done = Done::of(work.model, constants, found)?;
    let row = |((operator, reason), nodes): ((String, &str), usize)| KeptOperators {
        operator,
        nodes,
        reason: reason.to_string(),
    };
    done.kept_operators = operators.into_iter().map(row).collect();
    done.clamped_numbers = clamped;
    // FloatConstants that only operators in float32 read are there in float32 alone.
    let names = super::constant_names(&done.model);
    done.quantised.retain(|tensor| names.contains(&tensor.name));
    Ok(done)
}

struct Converter<'a> {
    types: HashMap<ValueId, DataType>,
    kept: KeptNode,
    /// The f32 form of values that are also there in f16.
    raw: HashMap<ValueId, ValueId>,
    /// New values that are in f32.
    singles: HashSet<ValueId>,
    /// FloatConstants as the float graph has them.
    wide: HashMap<ValueId, Tensor>,
    /// Results of the casts behind inputs and before outputs.
    ports: HashSet<ValueId>,
    /// Constants that products read.
    weights: HashSet<ValueId>,
    /// Path of the graph, for messages.
    file: &'a str,
    cancel: &'a Cancel,
    constants: &'a mut FloatConstants,
    found: Vec<QuantisedTensor>,
    operators: BTreeMap<(String, &'static str), usize>,
    clamped: u64,
}

/// Parts of a body as they are converted.
#[derive(Default)]
struct Single {
    nodes: Vec<Node>,
    initializers: Vec<(ValueId, Tensor)>,
    /// Values in f32 made from those in f16.
    casts: HashMap<ValueId, ValueId>,
}

impl Converter<'_> {
    fn is_float(&self, id: ValueId) -> bool {
        self.types.get(&id) == Some(&DataType::Float)
    }

    /// Puts casts behind the float inputs and before the float outputs of the graph.
    fn open(&mut self, graph: &mut Graph, body: &mut Body) {
        let mut narrow = HashMap::new();
        let mut before = Vec::new();
        for &id in &body.inputs.clone() {
            if self.is_float(id) && body.initializer(id).is_none() {
                let inner = self.fresh(graph, id, "half", DataType::Float16);
                narrow.insert(id, inner);
                self.raw.insert(inner, id);
                self.ports.insert(inner);
                before.push(cast(graph, id, inner, DataType::Float16));
            }
        }
        let outputs: Vec<ValueId> = body.outputs.iter().copied().filter(|&id| self.is_float(id)).collect();
        for &id in &outputs {
            if let Entry::Vacant(entry) = narrow.entry(id) {
                let inner = self.fresh(graph, id, "half", DataType::Float16);
                entry.insert(inner);
                if let Some(&why) = self.kept.get(&id) {
                    self.kept.insert(inner, why);
                }
            }
        }
        rename(body, &narrow);
        let mut after: Vec<(ValueId, ValueId)> = Vec::new();
        for id in &mut body.outputs {
            let Some((&own, &inner)) = narrow.iter().find(|(_, inner)| **inner == *id) else { continue };
            *id = own;
            // An input that is also an output is the same value in both places.
            if !body.inputs.contains(&own) && !after.contains(&(inner, own)) {
                after.push((inner, own));
            }
        }
        before.append(&mut body.nodes);
        before.extend(after.iter().map(|&(inner, own)| cast(graph, inner, own, DataType::Float)));
        self.ports.extend(after.into_iter().map(|(_, own)| own));
        body.nodes = before;
    }

    fn body(&mut self, graph: &mut Graph, body: &mut Body, top: bool) -> Result<()> {
        let fixed: HashSet<ValueId> = match top {
            true => body.inputs.iter().chain(&body.outputs).copied().collect(),
            false => HashSet::new(),
        };
        let mut single = Single::default();
        for (id, tensor) in std::mem::take(&mut body.initializers) {
            if tensor.dtype != DataType::Float || body.inputs.contains(&id) {
                single.initializers.push((id, tensor));
                continue;
            }
            self.cancel.check(NOTHING)?;
            self.initializer(graph, id, &tensor)?;
            self.wide.insert(id, tensor);
        }
        for mut node in std::mem::take(&mut body.nodes) {
            if node.present_outputs().any(|id| self.ports.contains(&id)) {
                // What an output has in f32 needs no detour.
                let raw = node.present_inputs().find_map(|id| self.raw.get(&id).copied());
                node.inputs = raw.map(|raw| vec![Some(raw)]).unwrap_or(node.inputs);
                single.nodes.push(node);
                continue;
            }
            for inner in node.bodies_mut() {
                self.body(graph, inner, false)?;
            }
            let why = node.present_outputs().next().and_then(|id| self.kept.get(&id).copied());
            let Some(why) = why else {
                self.narrow(&mut node);
                single.nodes.push(node);
                continue;
            };
            *self.operators.entry((node.op(), why)).or_default() += 1;
            self.keep(graph, node, &mut single);
        }
        let Single { nodes, initializers, .. } = single;
        let made = nodes.iter().flat_map(Node::present_outputs);
        let inner_inputs = body.inputs.iter().copied().filter(|_| !top);
        for id in made.chain(inner_inputs).filter(|id| !fixed.contains(id)) {
            if self.is_float(id) && !self.singles.contains(&id) {
                narrow_type(graph, id);
            }
        }
        body.nodes = nodes;
        body.initializers = initializers;
        Ok(())
    }

    /// Adds a node that stays in f32, with casts where its neighbours are in f16.
    fn keep(&mut self, graph: &mut Graph, mut node: Node, single: &mut Single) {
        for input in node.inputs.iter_mut().flatten() {
            if !self.is_float(*input) {
                continue;
            }
            *input = match self.raw.get(input).or(single.casts.get(input)) {
                Some(&raw) => raw,
                None => {
                    let whole = self.fresh(graph, *input, "single", DataType::Float);
                    match self.wide.get(input) {
                        Some(tensor) => single.initializers.push((whole, within_range(tensor))),
                        None => single.nodes.push(cast(graph, *input, whole, DataType::Float)),
                    }
                    single.casts.insert(*input, whole);
                    whole
                }
            };
        }
        let mut after = Vec::new();
        for output in node.outputs.iter_mut().flatten() {
            if self.is_float(*output) {
                let whole = self.fresh(graph, *output, "single", DataType::Float);
                self.raw.insert(*output, whole);
                after.push(cast(graph, whole, *output, DataType::Float16));
                *output = whole;
            }
        }
        clamp_constants(&mut node);
        single.nodes.push(node);
        single.nodes.append(&mut after);
    }

    /// A new value like another one in an element type.
    fn fresh(&mut self, graph: &mut Graph, like: ValueId, what: &str, dtype: DataType) -> ValueId {
        let name = graph.fresh_name(&format!("{}.{what}", graph.name(like)));
        let shape = graph.value(like).ty.as_ref().and_then(ValueType::shape).map(<[_]>::to_vec);
        let ty = shape.map(|shape| ValueType::Tensor { dtype, shape: Some(shape) });
        let id = graph.add_value(Value { name, ty, ..Value::default() });
        self.types.insert(id, DataType::Float);
        if dtype == DataType::Float {
            self.singles.insert(id);
        }
        id
    }

    /// An initializer in f16.
    fn initializer(&mut self, graph: &mut Graph, id: ValueId, tensor: &Tensor) -> Result<()> {
        let values = floats(tensor)?;
        tensor.release();
        self.require_range(graph.name(id), &values, self.weights.contains(&id))?;
        let mut found = Vec::with_capacity(values.len());
        let mut bytes = Vec::with_capacity(2 * values.len());
        for &value in &values {
            let (narrow, clamped) = narrowed(value);
            self.clamped += u64::from(clamped);
            found.push(narrow.to_f32());
            bytes.extend(narrow.to_le_bytes());
        }
        if tensor.dims.len() > 1 {
            self.found.push(QuantisedTensor {
                name: graph.name(id).to_string(),
                dims: tensor.dims.clone(),
                form: "float16".to_string(),
                bytes: bytes.len() as u64,
                relative_error: relative_error(&values, &found),
            });
        }
        narrow_type(graph, id);
        self.constants.set(id, DataType::Float16, &tensor.dims, bytes)
    }

    /// Errors: `Error::Invalid` for numbers that are not numbers, and for infinite or too large ones of a product's weight. A mask may
    /// have both.
    fn require_range(&self, name: &str, values: &[f32], is_weight: bool) -> Result<()> {
        if is_weight || values.iter().any(|value| value.is_nan()) {
            require_finite(self.file, name, values)?;
        }
        match values.iter().find(|value| is_weight && narrowed(**value).1) {
            Some(value) => {
                let problem = format!("has {value:e}, and float16 ends at {}", f16::MAX);
                Err(Error::invalid(format!("`{}`: weight `{name}`", self.file), problem)
                    .remedy("take int4 or int8, whose scales are float32, or leave the model in floats"))
            }
            None => Ok(()),
        }
    }

    fn narrow(&mut self, node: &mut Node) {
        self.spell_out(node);
        for (name, attribute) in &mut node.attributes {
            match &mut attribute.kind {
                AttributeKind::Int(number)
                    if TYPE_ATTRIBUTES.contains(&name.as_str())
                        && !ACCUMULATORS.contains(&name.as_str())
                        && *number == DataType::Float as i64 =>
                {
                    *number = DataType::Float16 as i64;
                }
                AttributeKind::Tensor(tensor) if tensor.dtype == DataType::Float => {
                    let narrow = |value: f64| {
                        let (narrow, clamped) = narrowed(value as f32);
                        self.clamped += u64::from(clamped);
                        narrow.to_le_bytes()
                    };
                    let bytes: Vec<u8> = tensor.to_f64s().unwrap_or_default().into_iter().flat_map(narrow).collect();
                    *tensor = Tensor::from_bytes(DataType::Float16, &tensor.dims.clone(), bytes);
                }
                _ => {}
            }
        }
    }

    /// Gives constants a tensor in place of attributes that are f32 by definition, and remembers its numbers.
    fn spell_out(&mut self, node: &mut Node) {
        let value = node.attributes.iter().position(|(name, _)| name.starts_with("value"));
        let tensor = match (node.op_type.as_str(), value.map(|place| &node.attributes[place].1.kind)) {
            ("Constant", Some(AttributeKind::Float(number))) => Tensor::from_f32(&[], &[*number]),
            ("Constant", Some(AttributeKind::Floats(numbers))) => Tensor::from_f32(&[numbers.len() as u64], numbers),
            ("Constant", Some(AttributeKind::Tensor(tensor))) if tensor.dtype == DataType::Float => tensor.clone(),
            ("ConstantOfShape", None) => Tensor::from_f32(&[1], &[0.0]),
            _ => {
                let default = FLOAT_BY_DEFAULT.iter().find(|(operator, _)| *operator == node.op_type);
                if let Some((_, name)) = default.filter(|(_, name)| node.attribute(name).is_none()) {
                    let float = AttributeKind::Int(DataType::Float as i64);
                    node.attributes.push((name.to_string(), float.into()));
                }
                return;
            }
        };
        if node.op_type == "Constant" {
            self.wide.extend(node.present_outputs().map(|id| (id, tensor.clone())));
        }
        node.attributes.retain(|(name, _)| !name.starts_with("value"));
        node.attributes.push(("value".into(), AttributeKind::Tensor(tensor).into()));
    }
}

/// Errors: `Error::Unsupported` for sequences and the like as inputs or outputs, whose elements nothing casts.
fn refuse_sequences(work: &Work<'_>) -> Result<()> {
    let graph = &work.model.graph;
    let mut ports = graph.body.inputs.iter().chain(&graph.body.outputs);
    match ports.find(|id| matches!(graph.value(**id).ty, Some(ValueType::Other(_)))) {
        Some(&id) => {
            let problem = format!("has `{}`, which is no dense tensor and cannot be cast", graph.name(id));
            Err(Error::unsupported(format!("`{}`", work.file), problem).remedy("take int4 or int8"))
        }
        None => Ok(()),
    }
}

/// Constants that are weights of products and convolutions.
fn weights_of(model: &Model) -> HashSet<ValueId> {
    fn add(body: &Body, weights: &Weights, found: &mut HashSet<ValueId>) {
        for node in &body.nodes {
            found.extend(weights.product(node).map(|product| product.weight));
            if matches!(node.op_type.as_str(), "Conv" | "ConvTranspose") {
                found.extend(node.inputs.get(1).copied().flatten());
            }
            node.bodies().for_each(|inner| add(inner, weights, found));
        }
    }
    let mut found = HashSet::new();
    add(&model.graph.body, &Weights::of(model), &mut found);
    found
}

/// The same numbers, at most as large as those of f16: what is computed from them becomes f16 later.
fn within_range(tensor: &Tensor) -> Tensor {
    let values: Vec<f32> = tensor.to_f64s().unwrap_or_default().iter().map(|&value| within(value as f32)).collect();
    Tensor::from_f32(&tensor.dims, &values)
}

fn clamp_constants(node: &mut Node) {
    for (_, attribute) in &mut node.attributes {
        if let AttributeKind::Tensor(tensor) = &mut attribute.kind
            && tensor.dtype == DataType::Float
        {
            *tensor = within_range(tensor);
        }
    }
}

/// Prefix of the names of casts at the graph's inputs and outputs.
const PORT: &str = "interlace.half.";

fn cast(graph: &Graph, from: ValueId, to: ValueId, dtype: DataType) -> Node {
    Node {
        name: format!("{PORT}{}", graph.name(to)),
        op_type: "Cast".into(),
        inputs: vec![Some(from)],
        outputs: vec![Some(to)],
        attributes: vec![("to".into(), AttributeKind::Int(dtype as i64).into())],
        ..Node::default()
    }
}

fn narrow_type(graph: &mut Graph, id: ValueId) {
    match &mut graph.values[id.index()].ty {
        Some(ValueType::Tensor { dtype, .. }) if *dtype == DataType::Float => *dtype = DataType::Float16,
        // The declared elements of a sequence are floats; the operators say what they are now.
        ty @ Some(ValueType::Other(_)) => *ty = None,
        _ => {}
    }
}

/// A number in f16. Finite ones beyond its range become the largest one of their sign, and the flag is set then.
fn narrowed(value: f32) -> (f16, bool) {
    let within = within(value);
    (f16::from_f32(within), within.to_bits() != value.to_bits() && !value.is_nan())
}

fn within(value: f32) -> f32 {
    let most = f16::MAX.to_f32();
    if value.is_finite() { value.clamp(-most, most) } else { value }
}

/// Renames values in all bodies, where they are made and where they are read.
fn rename(body: &mut Body, names: &HashMap<ValueId, ValueId>) {
    let renew = |id: &mut ValueId| {
        if let Some(&new) = names.get(id) {
            *id = new;
        }
    };
    for node in &mut body.nodes {
        node.inputs.iter_mut().flatten().for_each(renew);
        node.outputs.iter_mut().flatten().for_each(renew);
        for inner in node.bodies_mut() {
            rename(inner, names);
        }
    }
    body.initializers.iter_mut().for_each(|(id, _)| renew(id));
    body.outputs.iter_mut().for_each(renew);
}

/// The graph with 4-bit weights, scales and activations in f16.
///
/// Errors: as [`half`].
pub(super) fn four_bits(work: Work<'_>) -> Result<Done> {
    let Work { settings, forms, ranges, scratch, file, cancel, .. } = work;
    let four = super::int4::quantise(work, DataType::Float16)?;
    let next = Work { model: four.model, settings, forms, ranges, scratch, file, cancel };
    let mut done = half(next)?;
    done.quantised = four.quantised.into_iter().chain(done.quantised).collect();
    Ok(done)
}
