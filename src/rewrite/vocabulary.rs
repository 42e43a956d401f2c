//! Cuts a head to the tokens that a domain uses.
//!
//! The product that gives the logits keeps the rows of these tokens. Behind it each logit is put in the token's own place;
//! all other tokens get minus infinity. The logits keep their name, type and shape.

use crate::base::{Error, Result};
use crate::ir::{Attribute, AttributeKind, Body, DataType, GraphIndex, Model, Node, Tensor, ValueId, ValueType};

use super::build::{Builder, operator};
use super::tidy::{finish, remove_dead_code};

/// First operator set with `ScatterElements`.
const OPSET: i64 = 11;
/// Operators between the product and the logits that compute each logit from itself.
const ELEMENTWISE: &[&str] = &["Cast", "Identity", "Add", "Sub", "Mul", "Div", "Tanh", "Clip"];

/// The nodes that give the logits.
struct Head {
    /// The product of the hidden states with the weight.
    product: usize,
    /// Input of the product that is the weight, or its transpose.
    weight: ValueId,
    /// The node that transposes the weight for the product.
    transpose: Option<usize>,
    /// Axis of the weight's initializer that has the tokens.
    axis: usize,
    /// Elementwise nodes behind the product, the last one first.
    behind: Vec<usize>,
    /// Inputs of the product or of the nodes behind it that have a number for each token, with their nodes.
    vectors: Vec<(usize, ValueId)>,
    /// Number of tokens.
    tokens: usize,
    /// Element type and number of axes of the logits.
    dtype: DataType,
    rank: usize,
}

/// The model with a head for the tokens `kept`, in ascending order.
///
/// Errors: `Error::Unsupported` when the logits do not come from a product with a float matrix, naming the node that gives them;
/// `Error::Invalid` when a token is outside the logits.
pub fn cut_vocabulary(model: &Model, logits: ValueId, kept: &[usize]) -> Result<Model> {
    let name = model.graph.name(logits).to_string();
    let head = Head::find(model, logits).map_err(|problem| {
        Error::unsupported(format!("output `{name}`"), problem)
            .remedy("cut the vocabulary of a float model whose head is one product; quantise it afterwards")
    })?;
    if let Some(token) = kept.iter().find(|token| **token >= head.tokens) {
        return Err(Error::invalid(format!("token {token}"), format!("is outside the {} logits", head.tokens)));
    }
    let mut cut = model.clone();
    let mut build = Builder::new(&mut cut, "vocabulary");
    let initializer = |body: &Body, id: ValueId| body.initializer(id).cloned();
    let id = match head.transpose {
        Some(node) => build.model.graph.body.nodes[node].inputs[0],
        None => Some(head.weight),
    };
    if let Some(weight) = id.and_then(|id| initializer(&build.model.graph.body, id)) {
        let mut small = build.constant("head", picked(&weight, head.axis, kept));
        if head.transpose.is_some() {
            // Other nodes may read the transposed weight as it was.
            small = build.node("Transpose", &[small], &[("perm", AttributeKind::Ints(vec![1, 0]))]);
        }
        replace_input(&mut build.model.graph.body.nodes[head.product], head.weight, small);
    }
    for (number, (node, id)) in head.vectors.iter().enumerate() {
        if let Some(vector) = initializer(&build.model.graph.body, *id) {
            let small = picked(&vector, vector.dims.len().saturating_sub(1), kept);
            let small = build.constant(&format!("vector{number}"), small);
            replace_input(&mut build.model.graph.body.nodes[*node], *id, small);
        }
    }
    put_back(&mut build, logits, &head, kept);
    remove_dead_code(&mut cut.graph.body);
    finish(&mut cut)?;
    Ok(cut)
}

/// Puts each kept logit in its token's place of a tensor full of minus infinity. This takes time for the kept tokens alone; a `Gather`
/// over all tokens takes five times as long in ONNX Runtime 1.30.
fn put_back(build: &mut Builder<'_>, logits: ValueId, head: &Head, kept: &[usize]) {
    let last = head.behind.first().copied().unwrap_or(head.product);
    let small = build.value();
    for output in build.model.graph.body.nodes[last].outputs.iter_mut().filter(|output| **output == Some(logits)) {
        *output = Some(small);
    }
    // Their declared shapes have all tokens.
    for node in head.behind.iter().chain([&head.product]) {
        let outputs: Vec<ValueId> = build.model.graph.body.nodes[*node].present_outputs().collect();
        outputs.into_iter().for_each(|id| build.model.graph.values[id.index()].ty = None);
    }
    let nothing = Tensor::from_f64s(head.dtype, &[], &[f64::NEG_INFINITY]);
    let nothing = build.constant("nothing", nothing.unwrap_or_else(|| Tensor::from_f32(&[], &[f32::NEG_INFINITY])));
    let tokens: Vec<i64> = kept.iter().map(|token| *token as i64).collect();
    let tokens = build.constant("tokens", Tensor::from_i64(&[tokens.len() as u64], &tokens));
    let [first, last, width] = [("first", 0), ("last", -1), ("width", head.tokens as i64)]
        .map(|(name, value)| build.constant(name, Tensor::from_i64(&[1], &[value])));
    // `[.., kept]`, and `[.., tokens]`.
    let shape = build.node("Shape", &[small], &[]);
    let rows = build.node("Slice", &[shape, first, last], &[]);
    let whole = build.node("Concat", &[rows, width], &[("axis", AttributeKind::Int(0))]);
    let empty = build.node("Expand", &[nothing, whole], &[]);
    let places = build.node("Expand", &[tokens, shape], &[]);
    let axis = [("axis", AttributeKind::Int(head.rank as i64 - 1))];
    build.model.graph.body.nodes.push(operator("ScatterElements", &[empty, places, small], logits, &axis));
}

fn replace_input(node: &mut Node, from: ValueId, to: ValueId) {
    node.inputs.iter_mut().filter(|input| **input == Some(from)).for_each(|input| *input = Some(to));
}

/// The parts of a tensor at these places of an axis.
fn picked(tensor: &Tensor, axis: usize, kept: &[usize]) -> Tensor {
    let bytes = tensor.bytes();
    let outer = tensor.dims[..axis].iter().product::<u64>() as usize;
    let stride = bytes.len() / outer.max(1);
    let row = stride / (tensor.dims[axis] as usize).max(1);
    let mut found = Vec::with_capacity(outer * kept.len() * row);
    for line in 0..outer {
        kept.iter().for_each(|place| found.extend_from_slice(&bytes[line * stride + place * row..][..row]));
    }
    tensor.release();
    let mut dims = tensor.dims.clone();
    dims[axis] = kept.len() as u64;
    Tensor::from_bytes(tensor.dtype, &dims, found)
}

impl Head {
    /// The nodes between the product and the logits; the text says what does not allow a cut.
    fn find(model: &Model, logits: ValueId) -> std::result::Result<Self, String> {
        let opset = model.opset_imports.get("").copied().unwrap_or(1);
        if opset < OPSET {
            return Err(format!("is in a graph of opset {opset}, and the cut needs {OPSET}"));
        }
        let (graph, body) = (&model.graph, &model.graph.body);
        let Some(ValueType::Tensor { dtype, shape: Some(shape) }) = graph.value(logits).ty.clone() else {
            return Err("declares no shape".to_string());
        };
        let index = GraphIndex::of_body(body);
        let maker = |id: ValueId| index.node_of(id).map(|(number, _)| number);
        let no_product = |node: usize| format!("is given by {}", body.nodes[node].describe(graph));
        let (mut at, mut behind) = (logits, Vec::new());
        let product = loop {
            let Some(node) = maker(at) else { return Err("is given by no node".to_string()) };
            let own = &body.nodes[node];
            if own.domain.is_empty() && matches!(own.op_type.as_str(), "MatMul" | "Gemm") {
                break node;
            }
            let flowing =
                own.present_inputs().find(|id| maker(*id).is_some_and(|n| body.nodes[n].op_type != "Constant"));
            match flowing.filter(|_| own.domain.is_empty() && ELEMENTWISE.contains(&own.op_type.as_str())) {
                Some(input) => at = input,
                None => return Err(no_product(node)),
            }
            if index.uses(at).len() != 1 || index.output_position(at).is_some() {
                return Err(format!("is computed from `{}`, which others read", graph.name(at)));
            }
            behind.push(node);
        };
        let node = &body.nodes[product];
        let weight = node.inputs.get(1).copied().flatten().ok_or_else(|| no_product(product))?;
        let turns = |node: &Node| {
            let perm = node.attribute("perm").and_then(Attribute::as_ints);
            node.op_type == "Transpose" && node.domain.is_empty() && perm.is_none_or(|perm| *perm == [1, 0])
        };
        let transpose = maker(weight).filter(|number| turns(&body.nodes[*number]));
        let stored = match transpose {
            Some(number) => body.nodes[number].inputs.first().copied().flatten(),
            None => Some(weight),
        };
        let stored = stored.filter(|id| !body.inputs.contains(id));
        let tensor = stored.and_then(|id| body.initializer(id)).filter(|it| it.dims.len() == 2 && it.dtype.is_float());
        let Some(tensor) = tensor else {
            return Err(format!("{}, whose weight is no float matrix of the graph", no_product(product)));
        };
        let by_gemm = node.attribute("transB").and_then(Attribute::as_int).unwrap_or(0) != 0;
        let axis = if by_gemm == transpose.is_some() { 1 } else { 0 };
        let tokens = tensor.dims[axis] as usize;
        let mut head =
            Head { product, weight, transpose, axis, behind, vectors: Vec::new(), tokens, dtype, rank: shape.len() };
        head.find_vectors(body, &index).map_err(no_product)?;
        Ok(head)
    }

    /// Finds the constants with a number for each token. The error is the node that reads another value.
    fn find_vectors(&mut self, body: &Body, index: &GraphIndex) -> std::result::Result<(), usize> {
        let nodes: Vec<usize> = self.behind.iter().copied().chain([self.product]).collect();
        for node in nodes {
            // The first two inputs of the product are the hidden states and the weight.
            let skipped = if node == self.product { 2 } else { 0 };
            for id in body.nodes[node].inputs.iter().skip(skipped).copied().flatten() {
                let made = index.node_of(id).map(|(number, _)| &body.nodes[number]);
                let constant = match made {
                    Some(maker) if maker.op_type == "Constant" => {
                        maker.attribute("value").and_then(Attribute::as_tensor)
                    }
                    Some(_) if node != self.product => continue,
                    Some(_) => return Err(node),
                    None => body.initializer(id),
                };
                match constant.map(|tensor| tensor.dims.last().copied().unwrap_or(1)) {
                    Some(1) => {}
                    Some(size) if size == self.tokens as u64 && made.is_none() => self.vectors.push((node, id)),
                    // A scalar in an attribute of another kind.
                    None if made.is_some() => {}
                    _ => return Err(node),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{Dim, Graph, Value};

    /// `logits = tanh(x W + b) * 30` in one of four forms: a plain product, one with the transposed weight, and `Gemm` in both.
    fn model(form: usize) -> Model {
        let mut graph = Graph::default();
        let mut value = |name: &str, shape: &[i64]| {
            let shape = Some(shape.iter().map(|&size| Dim::Known(size)).collect());
            let ty = Some(ValueType::Tensor { dtype: DataType::Float, shape });
            graph.add_value(Value { name: name.into(), ty, ..Value::default() })
        };
        let (x, weight, bias) = (value("x", &[2, 2]), value("weight", &[2, 5]), value("bias", &[5]));
        let (turned, sum, flat) = (value("turned", &[2, 5]), value("sum", &[2, 5]), value("flat", &[2, 5]));
        let (product, thirty, logits) = (value("product", &[2, 5]), value("thirty", &[]), value("logits", &[2, 5]));
        graph.body.inputs.push(x);
        graph.body.outputs.push(logits);
        let columns: [f32; 10] = std::array::from_fn(|at| at as f32 * 0.1);
        let rows: [f32; 10] = std::array::from_fn(|at| columns[at % 2 * 5 + at / 2]);
        let by_rows = Tensor::from_f32(&[5, 2], &rows);
        let by_columns = Tensor::from_f32(&[2, 5], &columns);
        graph.body.initializers.push((weight, if [1, 3].contains(&form) { by_rows } else { by_columns }));
        graph.body.initializers.push((bias, Tensor::from_f32(&[5], &[0.5, 0.4, 0.3, 0.2, 0.1])));
        graph.body.initializers.push((thirty, Tensor::from_f32(&[], &[30.0])));
        let nodes = &mut graph.body.nodes;
        match form {
            0 | 1 => {
                let own = if form == 1 { turned } else { weight };
                if form == 1 {
                    nodes.push(operator("Transpose", &[weight], turned, &[("perm", AttributeKind::Ints(vec![1, 0]))]));
                }
                nodes.push(operator("MatMul", &[x, own], product, &[]));
                nodes.push(operator("Add", &[product, bias], sum, &[]));
            }
            _ => {
                let turn = [("transB", AttributeKind::Int(i64::from(form == 3)))];
                nodes.push(operator("Gemm", &[x, weight, bias], sum, &turn));
            }
        }
        nodes.push(operator("Tanh", &[sum], flat, &[]));
        nodes.push(operator("Mul", &[flat, thirty], logits, &[]));
        Model { ir_version: 8, opset_imports: [(String::new(), 18)].into(), graph, ..Model::default() }
    }

    #[test]
    fn the_head_keeps_its_tokens_whichever_way_its_weight_lies() {
        for form in 0..4 {
            let model = model(form);
            let cut = cut_vocabulary(&model, model.graph.output("logits").unwrap(), &[1, 4]).unwrap();
            let named = |name: &str| {
                let found = cut.graph.body.initializers.iter().find(|(id, _)| cut.graph.name(*id) == name);
                found.map(|(_, tensor)| tensor.clone()).unwrap_or_else(|| panic!("{form}: no `{name}`"))
            };
            let head = named("interlace.vocabulary.head");
            let (dims, values): (&[u64], [f64; 4]) = match form {
                1 | 3 => (&[2, 2], [0.1, 0.6, 0.4, 0.9]),
                _ => (&[2, 2], [0.1, 0.4, 0.6, 0.9]),
            };
            assert_eq!(head.dims, dims);
            assert!(head.to_f64s().unwrap().iter().zip(values).all(|(a, b)| (a - b).abs() < 1e-6), "{form}");
            assert_eq!(
                named("interlace.vocabulary.vector0").to_f64s().unwrap()[..],
                [f64::from(0.4f32), f64::from(0.1f32)]
            );
            assert_eq!(named("interlace.vocabulary.tokens").to_i64s().unwrap(), [1, 4]);
            let names: Vec<&str> = cut.graph.body.initializers.iter().map(|(id, _)| cut.graph.name(*id)).collect();
            assert!(!names.contains(&"weight") && !names.contains(&"bias"), "{names:?}");
            assert_eq!(
                cut.graph.value(cut.graph.output("logits").unwrap()).ty,
                model.graph.value(model.graph.body.outputs[0]).ty
            );
        }
    }

    #[test]
    fn heads_of_other_kinds_are_refused_by_name() {
        let cut = |model: &Model| cut_vocabulary(model, model.graph.body.outputs[0], &[1]).unwrap_err().to_string();
        let mut packed = model(0);
        packed.graph.body.nodes[0].op_type = "MatMulNBits".into();
        packed.graph.body.nodes[0].domain = "com.microsoft".into();
        assert!(cut(&packed).contains("MatMulNBits"), "{}", cut(&packed));
        let mut sum = model(0);
        sum.graph.body.nodes.last_mut().unwrap().op_type = "Softmax".into();
        assert!(cut(&sum).contains("Softmax"));
        let mut given = model(0);
        let weight = given.graph.body.initializers.remove(0).0;
        given.graph.body.inputs.push(weight);
        assert!(cut(&given).contains("no float matrix"), "{}", cut(&given));
        let error = cut_vocabulary(&model(0), model(0).graph.output("logits").unwrap(), &[5]).unwrap_err().to_string();
        assert_eq!(error, "token 5: is outside the 5 logits");
    }
}
