//! Weights of 4 or 8 bits in blocks: `MatMulNBits` in place of products, `GatherBlockQuantized` in place of tables.

use std::collections::HashMap;

use crate::base::Result;
use crate::checkpoint::floats;
use crate::ir::{Attribute, AttributeKind, Body, DataType, Graph, Model, Node, Tensor, Value, ValueId};
use crate::quantised::{BlockForm, Packed, Scheme};

use super::super::components::NOTHING;
use super::finite::{require_finite, require_scales};
use super::forms::{WeightForm, WeightForms};
use super::report::{QuantisedTensor, relative_error};
use super::weights::{FloatConstants, WeightProduct, Weights, replace_nodes};
use super::{Done, PrecisionSettings, Work};

/// Shortest block that the operators take.
const LEAST_BLOCK: usize = 16;
const MICROSOFT: &str = "com.microsoft";
/// `accuracy_level` of products with 8-bit weights: activations are rounded to 8 bits, block by block. Without it ONNX Runtime 1.30
/// expands all 8-bit weights in every run.
const INTEGER_ACTIVATIONS: usize = 4;

/// The graph with 4-bit weights and scales in f32.
///
/// Errors: `Error::Io` when the scratch file cannot be written; `Error::Invalid` for a weight or a scale that is not finite.
pub(super) fn single(work: Work<'_>) -> Result<Done> {
    quantise(work, DataType::Float)
}

/// The graph with 4-bit weights and scales in f16, for activations in f16.
///
/// Errors: as [`single`].
pub(super) fn quantise(mut work: Work<'_>, scale_type: DataType) -> Result<Done> {
    let mut constants = work.constants("int4")?;
    let weights = Weights::of(&work.model);
    let mut quantiser = Quantiser {
        scheme: Scheme::of(work.settings.zero_points, work.settings.least_error),
        block: work.settings.block_size,
        settings: work.settings,
        file: work.file,
        forms: work.forms,
        scale_type,
        weights: &weights,
        constants: &mut constants,
        known: HashMap::new(),
        tables: HashMap::new(),
        found: Vec::new(),
        reasons: HashMap::new(),
    };
    let cancel = work.cancel;
    replace_nodes(&mut work.model.graph, &mut |graph, node, _| {
        cancel.check(NOTHING)?;
        quantiser.replace(graph, node)
    })?;
    let (found, reasons) = (quantiser.found, quantiser.reasons);
    if !found.is_empty() {
        work.model.opset_imports.entry(MICROSOFT.into()).or_insert(1);
    }
    let mut done = Done::of(work.model, constants, found)?;
    done.reasons = reasons;
    Ok(done)
}

struct Quantiser<'a> {
    scheme: &'static Scheme,
    block: usize,
    settings: &'a PrecisionSettings,
    /// Path of the graph, for messages.
    file: &'a str,
    forms: &'a WeightForms,
    scale_type: DataType,
    weights: &'a Weights,
    constants: &'a mut FloatConstants,
    /// Inputs with numbers, scales and zero points of a weight, by the weight and whether it is transposed.
    known: HashMap<(ValueId, bool), Vec<ValueId>>,
    /// The same of tables.
    tables: HashMap<ValueId, Vec<ValueId>>,
    found: Vec<QuantisedTensor>,
    /// Why weights stay in floats.
    reasons: HashMap<String, String>,
}

/// Bytes of a matrix in blocks of so many bits, with scales in f32; `None` where padded blocks take more than its floats, so that it
/// stays in floats.
fn packed_bytes(settings: &PrecisionSettings, block: usize, bits: usize, rows: usize, columns: usize) -> Option<u64> {
    let count = columns.div_ceil(block);
    let zeros = if settings.zero_points { (count * bits).div_ceil(8) } else { 0 };
    let smaller = count * (block * bits / 8 + 4) < columns * 4;
    smaller.then_some((rows * (count * (block * bits / 8 + 4) + zeros)) as u64)
}

/// The longest block, at most as long as asked, of which a table's rows consist: its last block cannot be shorter.
fn table_block(longest: usize, columns: usize) -> Option<usize> {
    let halves = std::iter::successors(Some(longest), |block| Some(block / 2));
    halves.take_while(|&block| block >= LEAST_BLOCK).find(|block| columns.is_multiple_of(*block))
}

/// Bytes of a weight in each form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WeightSizes {
    /// Name of the initializer.
    pub name: String,
    /// In floats, in 8 bits and in 4 bits.
    pub bytes: [u64; 3],
}

/// The weights of a graph that 4 bits make smaller, in the order of the initializers.
pub(super) fn weight_sizes(model: &Model, settings: &PrecisionSettings) -> Vec<WeightSizes> {
    let weights = Weights::of(model);
    let mut uses: HashMap<(ValueId, Option<bool>), [u64; 3]> = HashMap::new();
    visit(&model.graph.body, &mut |node| {
        let (key, rows, columns, block) = match (weights.product(node), weights.table(node)) {
            (Some(product), _) => {
                let key = (product.weight, Some(product.transposed));
                (key, product.outer, product.inner, Some(settings.block_size))
            }
            (None, Some((id, rows, columns))) => ((id, None), rows, columns, table_block(settings.block_size, columns)),
            (None, None) => return,
        };
        let floats = 4 * (rows * columns) as u64;
        let packed = |bits| block.and_then(|block| packed_bytes(settings, block, bits, rows, columns));
        if let Some(four) = packed(4) {
            uses.insert(key, [floats, packed(8).unwrap_or(floats), four]);
        }
    });
    let sizes = |id: ValueId| {
        let own: Vec<&[u64; 3]> = uses.iter().filter(|((other, _), _)| *other == id).map(|(_, bytes)| bytes).collect();
        let sum = |place: usize| own.iter().map(|bytes| bytes[place]).sum();
        // Each use has a packed copy of its own, and all uses share the floats.
        own.first().map(|first| [first[0], sum(1), sum(2)])
    };
    let mut found = Vec::new();
    bodies(&model.graph.body, &mut |body| {
        let own = body.initializers.iter().filter_map(|(id, _)| Some((*id, sizes(*id)?)));
        found.extend(own.map(|(id, bytes)| WeightSizes { name: model.graph.name(id).to_string(), bytes }));
    });
    found
}

fn visit(body: &Body, each: &mut dyn FnMut(&Node)) {
    bodies(body, &mut |body| body.nodes.iter().for_each(&mut *each));
}

fn bodies(body: &Body, each: &mut dyn FnMut(&Body)) {
    each(body);
    body.nodes.iter().flat_map(Node::bodies).for_each(|inner| bodies(inner, each));
}

impl Quantiser<'_> {
    fn replace(&mut self, graph: &mut Graph, node: Node) -> Result<Vec<Node>> {
        if let Some(product) = self.weights.product(&node) {
            return match self.bits(graph, product.weight, self.block, product.outer, product.inner) {
                Some(bits) => self.product(graph, node, &product, bits),
                None => Ok(vec![node]),
            };
        }
        let Some((id, rows, columns)) = self.weights.table(&node) else { return Ok(vec![node]) };
        let Some(block) = table_block(self.block, columns) else {
            let why = format!("its rows of {columns} are no whole number of blocks of {LEAST_BLOCK}");
            self.reasons.insert(graph.name(id).to_string(), why);
            return Ok(vec![node]);
        };
        match self.bits(graph, id, block, rows, columns) {
            Some(bits) => self.table(graph, node, (id, rows, columns), block, bits),
            None => Ok(vec![node]),
        }
    }

    /// Bits of a weight; `None` for one that stays in floats.
    fn bits(&mut self, graph: &Graph, weight: ValueId, block: usize, rows: usize, columns: usize) -> Option<usize> {
        let name = graph.name(weight);
        let bits = match self.forms.of(name) {
            WeightForm::Float32 => {
                self.reasons.insert(name.to_string(), "its part stays in floats within the limits".to_string());
                return None;
            }
            WeightForm::Int8 => 8,
            WeightForm::Int4 => 4,
        };
        if packed_bytes(self.settings, block, bits, rows, columns).is_none() {
            let why = format!("rows of {columns} in blocks of {block} take as many bytes as its floats");
            self.reasons.insert(name.to_string(), why);
            return None;
        }
        Some(bits)
    }

    fn product(&mut self, graph: &mut Graph, node: Node, product: &WeightProduct, bits: usize) -> Result<Vec<Node>> {
        let key = (product.weight, product.transposed);
        let parts = match self.known.get(&key) {
            Some(parts) => parts.clone(),
            None => {
                let (rows, count) = (product.outer as u64, product.inner.div_ceil(self.block) as u64);
                let block_bytes = (self.block * bits / 8) as u64;
                let zeros = (count * bits as u64).div_ceil(8);
                let dims = [vec![rows, count, block_bytes], vec![rows, count], vec![rows, zeros]];
                let matrix = self.weights.rows(product);
                let parts = self.pack(graph, product.weight, &matrix, (self.block, bits), dims)?;
                self.known.insert(key, parts.clone());
                parts
            }
        };
        let int = |name: &str, value: usize| (name.to_string(), Attribute::from(AttributeKind::Int(value as i64)));
        let result = match product.bias {
            Some(_) => {
                let name = graph.fresh_name(&format!("{}.product", graph.name(product.result)));
                graph.add_value(Value { name, ty: graph.value(product.result).ty.clone(), ..Value::default() })
            }
            None => product.result,
        };
        let mut attributes =
            vec![int("K", product.inner), int("N", product.outer), int("bits", bits), int("block_size", self.block)];
        if bits == 8 {
            attributes.push(int("accuracy_level", INTEGER_ACTIVATIONS));
        }
        let mut nodes = vec![Node {
            name: node.name.clone(),
            op_type: "MatMulNBits".into(),
            domain: MICROSOFT.into(),
            inputs: [product.operand].into_iter().chain(parts).map(Some).collect(),
            outputs: vec![Some(result)],
            attributes,
            metadata: node.metadata.clone(),
            ..Node::default()
        }];
        nodes.extend(product.bias.map(|bias| super::bias_node(&node, result, bias, product.result)));
        Ok(nodes)
    }

    fn table(
        &mut self,
        graph: &mut Graph,
        node: Node,
        (id, rows, columns): (ValueId, usize, usize),
        block: usize,
        bits: usize,
    ) -> Result<Vec<Node>> {
        let parts = match self.tables.get(&id) {
            Some(parts) => parts.clone(),
            None => {
                let Some(tensor) = self.weights.matrix(id) else { return Ok(vec![node]) };
                let (rows, count) = (rows as u64, (columns / block) as u64);
                let (packed, zeros) = ((columns * bits / 8) as u64, (count * bits as u64).div_ceil(8));
                let dims = [vec![rows, packed], vec![rows, count], vec![rows, zeros]];
                let parts = self.pack(graph, id, tensor, (block, bits), dims)?;
                tensor.release();
                self.tables.insert(id, parts.clone());
                parts
            }
        };
        let indices = node.inputs.get(1).copied().flatten();
        let int = |name: &str, value: usize| (name.to_string(), Attribute::from(AttributeKind::Int(value as i64)));
        let mut inputs = vec![parts.first().copied(), indices];
        inputs.extend(parts.iter().skip(1).copied().map(Some));
        let attributes =
            vec![int("bits", bits), int("block_size", block), int("gather_axis", 0), int("quantize_axis", 1)];
        Ok(vec![Node {
            name: node.name.clone(),
            op_type: "GatherBlockQuantized".into(),
            domain: MICROSOFT.into(),
            inputs,
            outputs: node.outputs,
            attributes,
            metadata: node.metadata,
            ..Node::default()
        }])
    }

    /// Packs a matrix, and returns its numbers, scales and zero points as constants of the graph.
    fn pack(
        &mut self,
        graph: &mut Graph,
        id: ValueId,
        matrix: &Tensor,
        (block, bits): (usize, usize),
        dims: [Vec<u64>; 3],
    ) -> Result<Vec<ValueId>> {
        let name = graph.name(id).to_string();
        let (rows, columns) = (matrix.dims[0] as usize, matrix.dims[1] as usize);
        let values = floats(matrix)?;
        require_finite(self.file, &name, &values)?;
        let form = BlockForm { rows, columns, bits: bits as u32, block };
        let Packed { numbers, scales, zeros } = form.pack(&values, self.scheme, self.scale_type, &[])?;
        let stored = floats(&Tensor::from_bytes(self.scale_type, &dims[1], scales.clone()))?;
        let found = form.unpack(&numbers, &stored, zeros.as_deref());
        require_scales(self.file, &name, &values, self.scale_type, &stored, &found)?;
        self.found.push(QuantisedTensor {
            name: name.clone(),
            dims: self.weights.matrix(id).map_or(Vec::new(), |tensor| tensor.dims.clone()),
            form: format!("{bits} bits, {}, in blocks of {block}", self.scheme.name),
            bytes: (numbers.len() + scales.len() + zeros.as_ref().map_or(0, Vec::len)) as u64,
            relative_error: relative_error(&values, &found),
        });
        let [number_dims, scale_dims, zero_dims] = dims;
        let mut parts = vec![
            self.constants.add(graph, &format!("{name}_Q{bits}"), DataType::Uint8, &number_dims, numbers)?,
            self.constants.add(graph, &format!("{name}_scales"), self.scale_type, &scale_dims, scales)?,
        ];
        if let Some(zeros) = zeros {
            parts.push(self.constants.add(
                graph,
                &format!("{name}_zero_points"),
                DataType::Uint8,
                &zero_dims,
                zeros,
            )?);
        }
        Ok(parts)
    }
}
