//! Products with quantised weights as products of floats.
//!
//! Gradients do not pass the operators of quantised networks: integer products have none, and rounding has a gradient of 0.
//! So `y = x W` takes their place, where `W` is expanded from the packed weight by a node of its own, or is an initializer.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::base::Result;
use crate::ir::{
    Attribute, AttributeKind, Body, DataType, Dim, Graph, GraphIndex, Model, Node, Tensor, Value, ValueId, ValueType,
};
use crate::rewrite::{EXPANDED_BLOCKS, INTERNAL_DOMAIN, ROUNDED, ROUNDED_DYNAMICALLY};

use super::blocks::{Blocks, of_product};
use super::channels::{Channels, integer_product};

/// What becomes of the rounding of a quantised product's first factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// It stays, as a node whose gradient passes straight through where the range is not exceeded (Bengio et al. 2013,
    /// arXiv:1308.3432). Only the interpreter has such nodes.
    #[default]
    Rounded,
    /// Integer products lose it. Pairs of `QuantizeLinear` and `DequantizeLinear` stay as they are.
    Exact,
}

/// How the numbers of a weight are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Form {
    /// In blocks with a scale each (`MatMulNBits`).
    Blocks(Blocks),
    /// In 8 bits with a scale for all or one per channel (`MatMulInteger`, `DequantizeLinear`).
    Channels(Channels),
}

/// A quantised weight and the products that read it.
#[derive(Clone, Debug)]
pub struct QuantisedWeight {
    /// The float weight in the graph with float products.
    pub weight: ValueId,
    /// Sizes of the float weight: `[K, N]`, or as the graph has it where a `DequantizeLinear` makes it.
    pub dims: [u64; 2],
    /// Results of the products; they have these ids in both graphs.
    pub products: Vec<ValueId>,
    /// The stored form.
    pub form: Form,
}

impl Form {
    /// The initializers, that of the numbers first.
    pub fn parts(&self) -> Vec<ValueId> {
        let (numbers, scales, zeros) = match self {
            Form::Blocks(blocks) => (blocks.numbers, blocks.scales, blocks.zeros),
            Form::Channels(channels) => (channels.numbers, channels.scales, channels.zeros),
        };
        [Some(numbers), Some(scales), zeros].into_iter().flatten().collect()
    }

    /// The weight as floats in the order of [`QuantisedWeight::dims`].
    ///
    /// Errors: `Error::Invalid` for scales that are no floats.
    pub fn values(&self, body: &Body) -> Result<Vec<f32>> {
        match self {
            Form::Blocks(blocks) => Ok(transposed(&blocks.values(body)?, blocks.columns)),
            Form::Channels(channels) => channels.values(body),
        }
    }

    /// Element type of the scales, in which the graph computes.
    pub fn float_type(&self, body: &Body) -> DataType {
        let scales = self.parts().get(1).and_then(|&id| body.initializer(id));
        scales.map_or(DataType::Float, |scales| scales.dtype)
    }
}

/// The transpose of a matrix with rows of `width` numbers.
pub(super) fn transposed(values: &[f32], width: usize) -> Vec<f32> {
    (0..width).flat_map(|column| values.iter().skip(column).step_by(width.max(1)).copied()).collect()
}

/// Puts float products in place of the quantised ones whose results are `wanted`, with each weight expanded by a node. Values
/// keep their ids; a product whose form is not known stays as it is.
pub fn float_products(
    model: &mut Model,
    activations: Activations,
    wanted: &dyn Fn(ValueId) -> bool,
) -> Vec<QuantisedWeight> {
    let index = GraphIndex::new(&model.graph);
    let mut found = Found { activations, ..Found::default() };
    let count = model.graph.body.nodes.len();
    for number in 0..count {
        let node = model.graph.body.nodes[number].clone();
        match (node.domain.as_str(), node.op_type.as_str()) {
            ("com.microsoft", "MatMulNBits") => found.blocks(&mut model.graph, number, &node, wanted),
            ("", "MatMulInteger") => found.integers(&mut model.graph, &index, number, &node, wanted),
            ("", "DequantizeLinear") => found.dequantised(&mut model.graph, &index, number, &node, wanted),
            _ => None,
        };
    }
    let Found { mut replaced, weights, .. } = found;
    if replaced.is_empty() {
        return weights;
    }
    let gone: Vec<Node> = replaced.keys().map(|&number| model.graph.body.nodes[number].clone()).collect();
    let nodes = std::mem::take(&mut model.graph.body.nodes);
    for (number, node) in nodes.into_iter().enumerate() {
        match replaced.remove(&number) {
            Some(own) => model.graph.body.nodes.extend(own),
            None => model.graph.body.nodes.push(node),
        }
    }
    if model.graph.body.nodes.iter().any(|node| node.domain == INTERNAL_DOMAIN) {
        model.opset_imports.insert(INTERNAL_DOMAIN.into(), 1);
    }
    let kept: HashSet<ValueId> = weights.iter().flat_map(|weight| weight.form.parts()).collect();
    remove_unread(&mut model.graph.body, gone.iter().flat_map(Node::present_inputs).collect(), &kept);
    weights
}

/// Puts floats in place of the node that expands a weight.
pub fn place_floats(body: &mut Body, weight: ValueId, tensor: Tensor) {
    let makes = |node: &Node| node.present_outputs().any(|id| id == weight);
    let Some(place) = body.nodes.iter().position(makes) else { return };
    let expanding = body.nodes.remove(place);
    body.initializers.push((weight, tensor));
    remove_unread(body, expanding.present_inputs().collect(), &HashSet::new());
}

/// Removes what no node reads any more: of these values, and of what they were made from. Those to keep stay.
fn remove_unread(body: &mut Body, mut open: Vec<ValueId>, kept: &HashSet<ValueId>) {
    let mut index = GraphIndex::of_body(body);
    while let Some(id) = open.pop() {
        let inputs = body.inputs.contains(&id) || kept.contains(&id);
        if inputs || !index.uses(id).is_empty() || index.output_position(id).is_some() {
            continue;
        }
        match index.node_of(id) {
            Some((number, _)) => {
                let node = &body.nodes[number];
                let read = |id: ValueId| !index.uses(id).is_empty() || index.output_position(id).is_some();
                if !node.present_outputs().any(read) {
                    open.extend(body.nodes.remove(number).present_inputs());
                    index = GraphIndex::of_body(body);
                }
            }
            None => body.initializers.retain(|(other, _)| *other != id),
        }
    }
}

#[derive(Default)]
struct Found {
    activations: Activations,
    weights: Vec<QuantisedWeight>,
    /// Nodes in place of those with these numbers.
    replaced: BTreeMap<usize, Vec<Node>>,
    /// The rounded first factor that each quantising node gives.
    rounded: HashMap<usize, ValueId>,
}

impl Found {
    /// The float weight of a form, and the node that makes it where no earlier product reads the same numbers.
    fn weight(&mut self, graph: &mut Graph, form: Form, dims: [u64; 2], product: ValueId) -> (ValueId, Option<Node>) {
        if let Some(known) = self.weights.iter_mut().find(|known| known.form == form) {
            known.products.push(product);
            return (known.weight, None);
        }
        let parts = form.parts();
        let name = graph.fresh_name(&format!("{}.float", graph.name(parts[0])));
        let ty = float_matrix(form.float_type(&graph.body), dims);
        let weight = graph.add_value(Value { name: name.clone(), ty: Some(ty), ..Value::default() });
        let int = |name: &str, value: usize| (name.to_string(), Attribute::from(AttributeKind::Int(value as i64)));
        let (op_type, domain, attributes) = match &form {
            Form::Blocks(blocks) => {
                let (bits, block) = (int("bits", blocks.bits as usize), int("block_size", blocks.block));
                let sizes = [int("K", blocks.columns), int("N", blocks.rows), bits, block];
                (EXPANDED_BLOCKS, INTERNAL_DOMAIN, sizes.to_vec())
            }
            Form::Channels(_) => ("DequantizeLinear", "", vec![int("axis", 1)]),
        };
        let expanding = Node {
            name,
            op_type: op_type.into(),
            domain: domain.into(),
            inputs: parts.into_iter().map(Some).collect(),
            outputs: vec![Some(weight)],
            attributes,
            ..Node::default()
        };
        self.weights.push(QuantisedWeight { weight, dims, products: vec![product], form });
        (weight, Some(expanding))
    }

    /// A product with a weight in blocks.
    fn blocks(
        &mut self,
        graph: &mut Graph,
        number: usize,
        node: &Node,
        wanted: &dyn Fn(ValueId) -> bool,
    ) -> Option<()> {
        let (x, result) = (node.inputs.first().copied()??, node.outputs.first().copied()??);
        let blocks = of_product(&graph.body, node).filter(|_| wanted(result))?;
        let dims = [blocks.columns as u64, blocks.rows as u64];
        let (weight, expanding) = self.weight(graph, Form::Blocks(blocks), dims, result);
        let mut nodes: Vec<Node> = expanding.into_iter().collect();
        match node.inputs.get(5).copied().flatten() {
            None => nodes.push(plain("MatMul", &node.name, &[x, weight], result)),
            Some(bias) => {
                let name = graph.fresh_name(&format!("{}.product", graph.name(result)));
                let ty = graph.value(result).ty.clone();
                let product = graph.add_value(Value { name, ty, ..Value::default() });
                nodes.push(plain("MatMul", &node.name, &[x, weight], product));
                nodes.push(plain("Add", &format!("{}.bias", node.name), &[product, bias], result));
            }
        }
        self.replaced.insert(number, nodes);
        Some(())
    }

    /// A product of integers, up to where its result is multiplied with the scales. What other products read too comes
    /// before the integer product.
    fn integers(
        &mut self,
        graph: &mut Graph,
        index: &GraphIndex,
        number: usize,
        node: &Node,
        wanted: &dyn Fn(ValueId) -> bool,
    ) -> Option<()> {
        let product = integer_product(&graph.body, index, node)?;
        let result = graph.body.nodes[product.last].outputs.first().copied().flatten().filter(|&id| wanted(id))?;
        let x = graph.body.nodes[product.quantiser].inputs.first().copied()??;
        let &[rows, columns] = product.weight.dims() else { return None };
        let (weight, expanding) = self.weight(graph, Form::Channels(product.weight), [rows, columns], result);
        let mut nodes: Vec<Node> = expanding.into_iter().collect();
        let left = match (self.activations, self.rounded.get(&product.quantiser)) {
            (Activations::Exact, _) => x,
            (Activations::Rounded, Some(&rounded)) => rounded,
            (Activations::Rounded, None) => {
                let name = graph.fresh_name(&format!("{}.rounded", graph.name(x)));
                let ty = graph.value(x).ty.clone();
                let rounded = graph.add_value(Value { name: name.clone(), ty, ..Value::default() });
                let mut rounding = plain(ROUNDED_DYNAMICALLY, &name, &[x], rounded);
                rounding.domain = INTERNAL_DOMAIN.into();
                nodes.push(rounding);
                self.rounded.insert(product.quantiser, rounded);
                rounded
            }
        };
        nodes.push(node.clone());
        self.replaced.insert(number, nodes);
        self.replaced.insert(product.last, vec![plain("MatMul", &node.name, &[left, weight], result)]);
        Some(())
    }

    /// A weight that a node makes floats of, or a pair of nodes that rounds a value.
    fn dequantised(
        &mut self,
        graph: &mut Graph,
        index: &GraphIndex,
        number: usize,
        node: &Node,
        wanted: &dyn Fn(ValueId) -> bool,
    ) -> Option<()> {
        let input = |place: usize| node.inputs.get(place).copied().flatten();
        let (numbers, scale, output) = (input(0)?, input(1)?, node.outputs.first().copied()??);
        let axis = node.attribute("axis").and_then(Attribute::as_int).unwrap_or(1);
        if let Some((quantiser, _)) = index.node_of(numbers) {
            let quantiser = graph.body.nodes.get(quantiser).filter(|node| node.op_type == "QuantizeLinear")?;
            let alike = quantiser.inputs.get(1..) == node.inputs.get(1..)
                && quantiser.attribute("axis").and_then(Attribute::as_int).unwrap_or(1) == axis;
            let x = quantiser.inputs.first().copied()?.filter(|_| alike && self.activations == Activations::Rounded)?;
            let read: Vec<ValueId> = [Some(x), Some(scale), input(2)].into_iter().flatten().collect();
            let mut rounding = plain(ROUNDED, &node.name, &read, output);
            rounding.domain = INTERNAL_DOMAIN.into();
            rounding.attributes = vec![("axis".into(), AttributeKind::Int(axis).into())];
            self.replaced.insert(number, vec![rounding]);
            return Some(());
        }
        let channels = Channels::of(&graph.body, numbers, scale, input(2), axis)?;
        let &[rows, columns] = channels.dims() else { return None };
        let products = second_factor_of(graph, index, output)?;
        if !products.iter().any(|&product| wanted(product)) {
            return None;
        }
        let form = Form::Channels(channels);
        graph.values[output.index()].ty = Some(float_matrix(form.float_type(&graph.body), [rows, columns]));
        self.weights.push(QuantisedWeight { weight: output, dims: [rows, columns], products, form });
        Some(())
    }
}

/// Results of the products whose second factor a value is, as it is or transposed; `None` where something else reads it.
fn second_factor_of(graph: &Graph, index: &GraphIndex, value: ValueId) -> Option<Vec<ValueId>> {
    let mut products = Vec::new();
    for used in index.uses(value) {
        let node = graph.body.nodes.get(used.node)?;
        let result = node.outputs.first().copied()??;
        match (node.op_type.as_str(), used.input) {
            ("MatMul" | "Gemm", Some(1)) => products.push(result),
            ("Transpose", Some(0)) => products.extend(second_factor_of(graph, index, result)?),
            _ => return None,
        }
    }
    Some(products)
}

fn float_matrix(dtype: DataType, dims: [u64; 2]) -> ValueType {
    ValueType::Tensor { dtype, shape: Some(dims.iter().map(|&size| Dim::Known(size as i64)).collect()) }
}

fn plain(op_type: &str, name: &str, inputs: &[ValueId], output: ValueId) -> Node {
    let inputs = inputs.iter().copied().map(Some).collect();
    Node { name: name.into(), op_type: op_type.into(), inputs, outputs: vec![Some(output)], ..Node::default() }
}
