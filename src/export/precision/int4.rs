//! Weights of 4 bits in blocks: `MatMulNBits` in place of products, `GatherBlockQuantized` in place of tables.

use std::collections::HashMap;

use crate::base::Result;
use crate::checkpoint::floats;
use crate::ir::{Attribute, AttributeKind, DataType, Graph, Node, Tensor, Value, ValueId};
use crate::quantised::{BlockForm, Packed, Scheme};

use super::report::{QuantisedTensor, relative_error};
use super::weights::{FloatConstants, WeightProduct, Weights, replace_nodes};
use super::{Done, Work};

const BITS: usize = 4;
/// Shortest block that the operators take.
const LEAST_BLOCK: usize = 16;
const MICROSOFT: &str = "com.microsoft";

/// The graph with 4-bit weights and scales in f32.
///
/// Errors: `Error::Io` when the scratch file cannot be written.
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
        scale_type,
        weights: &weights,
        constants: &mut constants,
        known: HashMap::new(),
        tables: HashMap::new(),
        found: Vec::new(),
    };
    replace_nodes(&mut work.model.graph, &mut |graph, node, _| quantiser.replace(graph, node))?;
    let found = quantiser.found;
    if !found.is_empty() {
        work.model.opset_imports.entry(MICROSOFT.into()).or_insert(1);
    }
    Done::of(work.model, constants, found)
}

struct Quantiser<'a> {
    scheme: &'static Scheme,
    block: usize,
    scale_type: DataType,
    weights: &'a Weights,
    constants: &'a mut FloatConstants,
    /// Inputs with numbers, scales and zero points of a weight, by the weight and whether it is transposed.
    known: HashMap<(ValueId, bool), Vec<ValueId>>,
    /// The same of tables.
    tables: HashMap<ValueId, Vec<ValueId>>,
    found: Vec<QuantisedTensor>,
}

impl Quantiser<'_> {
    fn replace(&mut self, graph: &mut Graph, node: Node) -> Result<Vec<Node>> {
        if let Some(product) = self.weights.product(&node) {
            return match Self::is_smaller(self.block, product.outer, product.inner) {
                true => self.product(graph, node, &product),
                false => Ok(vec![node]),
            };
        }
        match self.weights.table(&node) {
            Some((id, rows, columns)) => {
                match self.table_block(columns).filter(|&b| Self::is_smaller(b, rows, columns)) {
                    Some(block) => self.table(graph, node, (id, rows, columns), block),
                    None => Ok(vec![node]),
                }
            }
            None => Ok(vec![node]),
        }
    }

    /// False for a matrix whose padded blocks take more than its floats.
    fn is_smaller(block: usize, rows: usize, columns: usize) -> bool {
        rows * columns.div_ceil(block) * (block / 2 + 4) < rows * columns * 4
    }

    /// The longest block, at most as long as asked, of which a table's rows consist: its last block cannot be shorter.
    fn table_block(&self, columns: usize) -> Option<usize> {
        let halves = std::iter::successors(Some(self.block), |block| Some(block / 2));
        halves.take_while(|&block| block >= LEAST_BLOCK).find(|block| columns.is_multiple_of(*block))
    }

    fn product(&mut self, graph: &mut Graph, node: Node, product: &WeightProduct) -> Result<Vec<Node>> {
        let key = (product.weight, product.transposed);
        let parts = match self.known.get(&key) {
            Some(parts) => parts.clone(),
            None => {
                let (rows, count) = (product.outer as u64, product.inner.div_ceil(self.block) as u64);
                let dims = [vec![rows, count, self.block as u64 / 2], vec![rows, count], vec![rows, count.div_ceil(2)]];
                let parts = self.pack(graph, product.weight, &self.weights.rows(product), self.block, dims)?;
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
        let mut nodes = vec![Node {
            name: node.name.clone(),
            op_type: "MatMulNBits".into(),
            domain: MICROSOFT.into(),
            inputs: [product.operand].into_iter().chain(parts).map(Some).collect(),
            outputs: vec![Some(result)],
            attributes: vec![
                int("K", product.inner),
                int("N", product.outer),
                int("bits", BITS),
                int("block_size", self.block),
            ],
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
    ) -> Result<Vec<Node>> {
        let parts = match self.tables.get(&id) {
            Some(parts) => parts.clone(),
            None => {
                let Some(tensor) = self.weights.matrix(id) else { return Ok(vec![node]) };
                let (rows, count) = (rows as u64, (columns / block) as u64);
                let dims = [vec![rows, columns as u64 / 2], vec![rows, count], vec![rows, count.div_ceil(2)]];
                let parts = self.pack(graph, id, tensor, block, dims)?;
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
            vec![int("bits", BITS), int("block_size", block), int("gather_axis", 0), int("quantize_axis", 1)];
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
        block: usize,
        dims: [Vec<u64>; 3],
    ) -> Result<Vec<ValueId>> {
        let name = graph.name(id).to_string();
        let (rows, columns) = (matrix.dims[0] as usize, matrix.dims[1] as usize);
        let values = floats(matrix)?;
        let form = BlockForm { rows, columns, bits: BITS as u32, block };
        let Packed { numbers, scales, zeros } = form.pack(&values, self.scheme, self.scale_type, &[])?;
        let stored = floats(&Tensor::from_bytes(self.scale_type, &dims[1], scales.clone()))?;
        let found = form.unpack(&numbers, &stored, zeros.as_deref());
        self.found.push(QuantisedTensor {
            name: name.clone(),
            dims: self.weights.matrix(id).map_or(Vec::new(), |tensor| tensor.dims.clone()),
            form: format!("{BITS} bits, {}, in blocks of {block}", self.scheme.name),
            bytes: (numbers.len() + scales.len() + zeros.as_ref().map_or(0, Vec::len)) as u64,
            relative_error: relative_error(&values, &found),
        });
        let [number_dims, scale_dims, zero_dims] = dims;
        let mut parts = vec![
            self.constants.add(graph, &format!("{name}_Q4"), DataType::Uint8, &number_dims, numbers)?,
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
