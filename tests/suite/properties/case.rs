//! A graph with its inputs, and the comparison of the interpreter with ONNX Runtime on it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use interlace::ir::{self, AttributeKind, Body, DataType, Dim, Node, Value, ValueId, ValueType};
use interlace::runtime::{Optimisation, Runtime, SessionOptions, TensorValue};
use interlace::torch;
use tch::{Kind, Tensor};

const PLAIN: SessionOptions =
    SessionOptions { threads: Some(1), optimisation: Optimisation::None, exact_products: true, memory_limit: None };

/// A graph for both engines, with its inputs.
pub struct Case {
    pub model: ir::Model,
    pub feeds: Vec<(String, ir::Tensor)>,
    /// A graph with the same inputs and outputs for ONNX Runtime, if it lacks the operator.
    pub reference: Option<ir::Model>,
    /// Largest difference of floats, relative to 1 + their absolute value.
    pub tolerance: f64,
    /// Largest difference of integers.
    pub steps: i64,
}

/// Outcome of a comparison.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Agrees,
    /// ONNX Runtime refuses the case, so there is no reference.
    NoReference(String),
    /// ONNX Runtime runs the case, but the interpreter refuses it.
    Refused(String),
    Differs(String),
}

impl Case {
    /// Runs both engines. The interpreter runs twice, so that values cached for the shapes are tested as well.
    pub fn compare(&self, runtime: &Runtime) -> Outcome {
        let theirs = match self.theirs(runtime) {
            Ok(theirs) => theirs,
            Err(error) => return Outcome::NoReference(error),
        };
        let ours = catch_unwind(AssertUnwindSafe(|| self.ours()));
        let ours = match ours {
            Ok(Ok(ours)) => ours,
            Ok(Err(error)) => return Outcome::Refused(error),
            Err(_) => return Outcome::Differs("the interpreter panics".into()),
        };
        assert_eq!(ours.len(), theirs.len(), "outputs");
        for (number, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            if let Some(problem) = self.difference(ours, theirs) {
                return Outcome::Differs(format!("output {number}: {problem}"));
            }
        }
        Outcome::Agrees
    }

    fn theirs(&self, runtime: &Runtime) -> Result<Vec<ir::Tensor>, String> {
        let text = |e: interlace::base::Error| e.to_string();
        let model = self.reference.as_ref().unwrap_or(&self.model);
        let mut session = runtime.session_of(model, &PLAIN).map_err(text)?;
        let tensors: Vec<(&str, TensorValue)> = self
            .feeds
            .iter()
            .map(|(name, tensor)| Ok((name.as_str(), TensorValue::from_ir(tensor)?)))
            .collect::<Result<_, _>>()
            .map_err(text)?;
        let tensors: Vec<(&str, &TensorValue)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let outputs = session.run(&tensors, None).map_err(text)?;
        outputs.iter().map(|(_, tensor)| tensor.to_ir().map_err(text)).collect()
    }

    fn ours(&self) -> Result<Vec<Tensor>, String> {
        let text = |e: interlace::base::Error| e.to_string();
        let program = torch::Program::compile(&self.model, &torch::Options::default()).map_err(text)?;
        let feeds: Vec<(ValueId, Tensor)> = self
            .feeds
            .iter()
            .map(|(name, tensor)| Ok((program.value(name)?, torch::tensor_from_ir(name, tensor)?)))
            .collect::<Result<_, _>>()
            .map_err(text)?;
        let run = || tch::no_grad(|| program.run(&feeds, program.outputs())).map_err(text);
        let (first, again) = (run()?, run()?);
        assert_eq!(first.len(), again.len(), "outputs");
        for (first, again) in first.iter().zip(&again) {
            if first.kind() != again.kind() || first.size() != again.size() || numbers(first) != numbers(again) {
                return Err("the second run gives another result than the first".into());
            }
        }
        Ok(first)
    }

    fn difference(&self, ours: &Tensor, theirs: &ir::Tensor) -> Option<String> {
        let shape: Vec<i64> = theirs.dims.iter().map(|&dim| dim as i64).collect();
        let kind = match theirs.dtype {
            DataType::Float16 | DataType::Bfloat16 => Some(Kind::Float),
            dtype => torch::kind_of(dtype),
        };
        if Some(ours.kind()) != kind || ours.size() != shape {
            return Some(format!(
                "{:?}{:?}, in ONNX Runtime {}{:?}",
                ours.kind(),
                ours.size(),
                theirs.dtype,
                theirs.dims
            ));
        }
        if let Some(theirs) = theirs.to_i64s() {
            let ours = integers(ours);
            let place = (0..ours.len()).find(|&at| (ours[at] - theirs[at]).abs() > self.steps)?;
            return Some(format!("{} at {place}, in ONNX Runtime {}", ours[place], theirs[place]));
        }
        let (ours, theirs) = (numbers(ours), theirs.to_f64s().expect("floats"));
        let off = |at: usize| {
            let (own, other) = (f64::from_bits(ours[at]), theirs[at]);
            let same = own == other || own.is_nan() && other.is_nan();
            // A NaN difference is a mismatch.
            let near = (own - other).abs() <= self.tolerance * (1.0 + other.abs());
            !same && !near
        };
        let place = (0..ours.len()).find(|&at| off(at))?;
        Some(format!("{:e} at {place}, in ONNX Runtime {:e}", f64::from_bits(ours[place]), theirs[place]))
    }

    /// The operators, attributes and inputs, for messages.
    pub fn describe(&self) -> String {
        let nodes: Vec<String> = self
            .model
            .graph
            .body
            .nodes
            .iter()
            .map(|node| {
                let attributes: Vec<String> = node.attributes.iter().map(|(name, a)| attribute(name, a)).collect();
                let version = self.model.opset_imports.get(&node.domain).copied().unwrap_or(0);
                let graph = &self.model.graph;
                let input = |id: &Option<ValueId>| id.map_or("-".into(), |id| graph.name(id).to_string());
                let inputs: Vec<String> = node.inputs.iter().map(input).collect();
                format!("{}-{version}({}) {{{}}}", node.op_type, inputs.join(", "), attributes.join(", "))
            })
            .collect();
        let body = &self.model.graph.body;
        let constants = body.initializers.iter().map(|(id, tensor)| (self.model.graph.name(*id), tensor, true));
        let feeds = self.feeds.iter().map(|(name, tensor)| (name.as_str(), tensor, false));
        let inputs: Vec<String> =
            feeds.chain(constants).map(|(name, tensor, fixed)| shown(name, tensor, fixed)).collect();
        format!("{} on {}", nodes.join("; "), inputs.join(", "))
    }
}

fn attribute(name: &str, attribute: &ir::Attribute) -> String {
    let value = match &attribute.kind {
        AttributeKind::String(text) => String::from_utf8_lossy(text).into_owned(),
        AttributeKind::Graph(body) => body.nodes.iter().map(|node| node.op_type.as_str()).collect::<Vec<_>>().join(" "),
        AttributeKind::Int(value) => value.to_string(),
        AttributeKind::Float(value) => value.to_string(),
        AttributeKind::Ints(values) => format!("{values:?}"),
        other => format!("{other:?}"),
    };
    format!("{name}: {value}")
}

fn shown(name: &str, tensor: &ir::Tensor, fixed: bool) -> String {
    let mut values = match (tensor.to_i64s(), tensor.to_f64s()) {
        (Some(values), _) => format!("{values:?}"),
        (_, Some(values)) => format!("{values:?}"),
        _ => format!("{:?}", tensor.bytes()),
    };
    if values.len() > 200 {
        values.truncate(200);
        values.push_str("..");
    }
    let fixed = if fixed { " constant" } else { "" };
    format!("{name}: {}{:?}{fixed} {values}", tensor.dtype, tensor.dims)
}

/// The elements as bits of f64, so that NaN equals NaN.
fn numbers(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.detach().to_kind(Kind::Double).contiguous().reshape([-1]);
    Vec::<f64>::try_from(flat).expect("numbers").into_iter().map(f64::to_bits).collect()
}

fn integers(tensor: &Tensor) -> Vec<i64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Int64).contiguous().reshape([-1])).expect("integers")
}

/// Builds graphs by name.
#[derive(Default)]
pub struct Builder {
    pub model: ir::Model,
    names: Vec<(String, ValueId)>,
}

impl Builder {
    pub fn new(opset: i64) -> Self {
        let mut model = ir::Model { ir_version: 10, ..Default::default() };
        model.opset_imports.insert(String::new(), opset);
        model.opset_imports.insert("com.microsoft".into(), 1);
        model.graph.body.name = "case".into();
        Builder { model, names: Vec::new() }
    }

    /// The value with this name, created if it is new.
    pub fn value(&mut self, name: &str) -> ValueId {
        if let Some((_, id)) = self.names.iter().find(|(known, _)| known == name) {
            return *id;
        }
        let id = self.model.graph.add_value(Value { name: name.into(), ..Default::default() });
        self.names.push((name.into(), id));
        id
    }

    /// A value with a declared type; `-1` is an axis of unknown length.
    pub fn typed(&mut self, name: &str, dtype: DataType, shape: Option<&[i64]>) -> ValueId {
        let id = self.value(name);
        let dim = |&size: &i64| if size < 0 { Dim::Unknown } else { Dim::Known(size) };
        let shape = shape.map(|shape| shape.iter().map(dim).collect());
        self.model.graph.values[id.index()].ty = Some(ValueType::Tensor { dtype, shape });
        id
    }

    pub fn input(&mut self, name: &str, dtype: DataType, shape: Option<&[i64]>) {
        let id = self.typed(name, dtype, shape);
        self.model.graph.body.inputs.push(id);
    }

    pub fn constant(&mut self, name: &str, tensor: ir::Tensor) {
        let id = self.value(name);
        self.model.graph.body.initializers.push((id, tensor));
    }

    pub fn output(&mut self, name: &str, dtype: DataType) {
        let id = self.typed(name, dtype, None);
        self.model.graph.body.outputs.push(id);
    }

    /// A node. An empty name is an omitted input or output. `domain:` may precede the operator.
    pub fn node(
        &mut self,
        op: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: Vec<(&str, AttributeKind)>,
    ) -> Node {
        let (domain, op_type) = op.split_once(':').unwrap_or(("", op));
        let mut ids = |names: &[&str]| -> Vec<Option<ValueId>> {
            names.iter().map(|name| (!name.is_empty()).then(|| self.value(name))).collect()
        };
        let (inputs, outputs) = (ids(inputs), ids(outputs));
        let attributes = attributes.into_iter().map(|(name, kind)| (name.to_string(), kind.into())).collect();
        let (domain, op_type, name) = (domain.to_string(), op_type.to_string(), String::new());
        Node { domain, op_type, name, inputs, outputs, attributes, ..Default::default() }
    }

    pub fn push(&mut self, node: Node) {
        self.model.graph.body.nodes.push(node);
    }

    /// A sub-graph that may read values of this graph.
    pub fn body(&mut self, inputs: &[&str], outputs: &[&str], nodes: Vec<Node>) -> Body {
        let inputs = inputs.iter().map(|name| self.value(name)).collect();
        let outputs = outputs.iter().map(|name| self.value(name)).collect();
        Body { name: "body".into(), inputs, outputs, nodes, ..Default::default() }
    }
}

/// One operator in a graph of its own.
pub struct Single {
    op: String,
    version: i64,
    inputs: Vec<Option<(ir::Tensor, bool)>>,
    outputs: Vec<Option<DataType>>,
    attributes: Vec<(&'static str, AttributeKind)>,
    tolerance: Option<f64>,
    steps: i64,
}

impl Single {
    /// `version` is that of the default domain.
    pub fn new(domain: &str, op: &str, version: i64) -> Self {
        let op = if domain.is_empty() { op.to_string() } else { format!("{domain}:{op}") };
        let (inputs, outputs, attributes) = (Vec::new(), Vec::new(), Vec::new());
        Single { op, version, inputs, outputs, attributes, tolerance: None, steps: 0 }
    }

    pub fn input(mut self, tensor: ir::Tensor) -> Self {
        self.inputs.push(Some((tensor, false)));
        self
    }

    /// An input that is always an initializer: its type cannot be fed, or ONNX Runtime requires a constant.
    pub fn fixed(mut self, tensor: ir::Tensor) -> Self {
        self.inputs.push(Some((tensor, true)));
        self
    }

    pub fn absent(mut self) -> Self {
        self.inputs.push(None);
        self
    }

    pub fn maybe(self, tensor: Option<ir::Tensor>) -> Self {
        match tensor {
            Some(tensor) => self.input(tensor),
            None => self.absent(),
        }
    }

    pub fn output(mut self, dtype: DataType) -> Self {
        self.outputs.push(Some(dtype));
        self
    }

    pub fn unwanted(mut self) -> Self {
        self.outputs.push(None);
        self
    }

    pub fn set(mut self, name: &'static str, kind: AttributeKind) -> Self {
        self.attributes.push((name, kind));
        self
    }

    pub fn int(self, name: &'static str, value: i64) -> Self {
        self.set(name, AttributeKind::Int(value))
    }

    pub fn float(self, name: &'static str, value: f64) -> Self {
        self.set(name, AttributeKind::Float(value as f32))
    }

    pub fn text(self, name: &'static str, value: &str) -> Self {
        self.set(name, AttributeKind::String(value.as_bytes().to_vec()))
    }

    pub fn ints(self, name: &'static str, values: &[i64]) -> Self {
        self.set(name, AttributeKind::Ints(values.to_vec()))
    }

    /// Adds the attribute if there is a value.
    pub fn maybe_int(self, name: &'static str, value: Option<i64>) -> Self {
        match value {
            Some(value) => self.int(name, value),
            None => self,
        }
    }

    pub fn tolerance(mut self, tolerance: f64) -> Self {
        self.tolerance = Some(tolerance);
        self
    }

    pub fn steps(mut self, steps: i64) -> Self {
        self.steps = steps;
        self
    }

    /// The case; `fix` says which inputs are initializers.
    pub fn case(self, mut fix: impl FnMut() -> bool) -> Case {
        let mut builder = Builder::new(self.version);
        let mut feeds = Vec::new();
        let names: Vec<String> = (0..self.inputs.len()).map(|number| format!("in{number}")).collect();
        let mut given: Vec<&str> = Vec::new();
        let tolerance = self.tolerance.unwrap_or_else(|| rounding(self.inputs.iter().flatten().map(|input| &input.0)));
        for (name, input) in names.iter().zip(self.inputs) {
            let Some((tensor, fixed)) = input else {
                given.push("");
                continue;
            };
            given.push(name);
            if fixed || fix() {
                builder.constant(name, tensor);
            } else {
                let shape: Vec<i64> = tensor.dims.iter().map(|&dim| dim as i64).collect();
                builder.input(name, tensor.dtype, Some(&shape));
                feeds.push((name.clone(), tensor));
            }
        }
        while given.last() == Some(&"") {
            given.pop();
        }
        let mut made: Vec<String> = Vec::new();
        let mut casts = Vec::new();
        for (number, output) in self.outputs.iter().enumerate() {
            let name = format!("out{number}");
            match output {
                None => made.push(String::new()),
                // ONNX Runtime cannot return 4-bit numbers.
                Some(dtype @ (DataType::Uint4 | DataType::Int4)) => {
                    let wide = if *dtype == DataType::Uint4 { DataType::Uint8 } else { DataType::Int8 };
                    let own = format!("{name}/4");
                    builder.typed(&own, *dtype, None);
                    let to = vec![("to", AttributeKind::Int(wide as i64))];
                    casts.push(builder.node("Cast", &[&own], &[&name], to));
                    builder.output(&name, wide);
                    made.push(own);
                }
                Some(dtype) => {
                    builder.output(&name, *dtype);
                    made.push(name);
                }
            }
        }
        let made: Vec<&str> = made.iter().map(String::as_str).collect();
        if let Some((domain, _)) = self.op.split_once(':') {
            builder.model.opset_imports.insert(domain.into(), 1);
        }
        let node = builder.node(&self.op, &given, &made, self.attributes);
        builder.push(node);
        casts.into_iter().for_each(|cast| builder.push(cast));
        Case { model: builder.model, feeds, reference: None, tolerance, steps: self.steps }
    }
}

/// Tolerance of results: the interpreter computes 16-bit floats in f32, and ONNX Runtime rounds them.
fn rounding<'a>(inputs: impl Iterator<Item = &'a ir::Tensor>) -> f64 {
    let of = |tensor: &ir::Tensor| match tensor.dtype {
        DataType::Float16 => 4e-3,
        DataType::Bfloat16 => 3e-2,
        _ => 1e-4,
    };
    inputs.map(of).fold(1e-4, f64::max)
}
