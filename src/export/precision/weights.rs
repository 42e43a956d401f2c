//! Constant weights of a graph: the products and tables that read them, and what takes their place.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::{Error, MappedFile, Result};
use crate::ir::{Attribute, Body, DataType, Graph, GraphIndex, Model, Node, Tensor, TensorData, Value, ValueId};
use crate::quantised::WeightLayout;

use super::Done;
use super::report::KeptTensor;

/// Tensors below this many bytes stay in memory, and are not listed when they stay floats.
const SMALL_BYTES: usize = 1024;
/// Alignment in bytes of tensors in the scratch file.
const ALIGNMENT: u64 = 64;

/// The float constants of all bodies.
pub(super) struct Weights {
    tensors: HashMap<ValueId, Tensor>,
    /// Results of nodes that transpose a constant matrix, with the constant.
    turned: HashMap<ValueId, ValueId>,
}

/// A product of activations with a constant matrix.
pub(super) struct WeightProduct {
    pub operand: ValueId,
    pub weight: ValueId,
    /// True when the constant is `[N, K]` and not `[K, N]`.
    pub transposed: bool,
    pub bias: Option<ValueId>,
    pub result: ValueId,
    /// `K` and `N`.
    pub inner: usize,
    pub outer: usize,
}

impl Weights {
    pub fn of(model: &Model) -> Self {
        let mut weights = Weights { tensors: HashMap::new(), turned: HashMap::new() };
        weights.add(&model.graph.body);
        weights
    }

    fn add(&mut self, body: &Body) {
        // A caller may replace the default value of an input.
        let inputs: HashSet<ValueId> = body.inputs.iter().copied().collect();
        let own =
            body.initializers.iter().filter(|(id, tensor)| tensor.dtype == DataType::Float && !inputs.contains(id));
        self.tensors.extend(own.map(|(id, tensor)| (*id, tensor.clone())));
        for node in &body.nodes {
            if node.op_type == "Transpose"
                && node.domain.is_empty()
                && node.attribute("perm").is_none_or(|perm| perm.as_ints() == Some(&[1, 0]))
                && let (Some(Some(from)), Some(Some(to))) = (node.inputs.first(), node.outputs.first())
                && self.matrix(*from).is_some()
            {
                self.turned.insert(*to, *from);
            }
            node.bodies().for_each(|inner| self.add(inner));
        }
    }

    /// A constant matrix.
    pub fn matrix(&self, id: ValueId) -> Option<&Tensor> {
        self.tensors.get(&id).filter(|tensor| tensor.dims.len() == 2 && tensor.element_count() > 0)
    }

    /// The product that a node computes, if its second factor is a constant matrix.
    pub fn product(&self, node: &Node) -> Option<WeightProduct> {
        let &[Some(operand), Some(right), ..] = node.inputs.as_slice() else { return None };
        let result = node.outputs.first().copied().flatten()?;
        let number = |name: &str| node.attribute(name).map_or(Some(1.0), Attribute::as_float);
        let flag = |name: &str| node.attribute(name).and_then(Attribute::as_int).unwrap_or(0) != 0;
        let (turned, bias) = match (node.domain.as_str(), node.op_type.as_str()) {
            ("", "MatMul") => (false, None),
            ("", "Gemm") if number("alpha") == Some(1.0) && number("beta") == Some(1.0) && !flag("transA") => {
                (flag("transB"), node.inputs.get(2).copied().flatten())
            }
            _ => return None,
        };
        let (weight, transposed) = match self.turned.get(&right) {
            Some(&weight) => (weight, !turned),
            None => (right, turned),
        };
        let &[rows, columns] = self.matrix(weight)?.dims.as_slice() else { return None };
        let (inner, outer) = if transposed { (columns, rows) } else { (rows, columns) };
        if self.tensors.contains_key(&operand) {
            return None;
        }
        let (inner, outer) = (usize::try_from(inner).ok()?, usize::try_from(outer).ok()?);
        Some(WeightProduct { operand, weight, transposed, bias, result, inner, outer })
    }

    /// The table of which a `Gather` takes rows: its id, rows and columns.
    pub fn table(&self, node: &Node) -> Option<(ValueId, usize, usize)> {
        let axis = node.attribute("axis").and_then(Attribute::as_int).unwrap_or(0);
        if node.op_type != "Gather" || !node.domain.is_empty() || axis != 0 {
            return None;
        }
        let id = node.inputs.first().copied().flatten()?;
        let &[rows, columns] = self.matrix(id)?.dims.as_slice() else { return None };
        Some((id, usize::try_from(rows).ok()?, usize::try_from(columns).ok()?))
    }

    /// The matrix of a product as bytes of f32, one row for each output.
    pub fn rows(&self, product: &WeightProduct) -> Tensor {
        let Some(tensor) = self.matrix(product.weight) else { return Tensor::from_f32(&[0, 0], &[]) };
        let layout = if product.transposed { WeightLayout::Rows } else { WeightLayout::Columns };
        let rows = layout.rows(tensor);
        tensor.release();
        Tensor::from_bytes(DataType::Float, &[product.outer as u64, product.inner as u64], rows)
    }
}

/// New constants of one graph. Large ones are kept in a file, so that memory holds one at a time.
pub(super) struct FloatConstants {
    path: PathBuf,
    file: File,
    length: u64,
    entries: Vec<(ValueId, DataType, Vec<u64>, Content)>,
}

enum Content {
    Memory(Vec<u8>),
    File { offset: u64, length: u64 },
}

impl FloatConstants {
    /// `path` names a new file in a scratch folder that outlives the constants.
    ///
    /// Errors: `Error::Io`.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(|e| Error::io("create", path, e))?;
        Ok(FloatConstants { path: path.to_path_buf(), file, length: 0, entries: Vec::new() })
    }

    /// Adds a constant with a name like this one.
    ///
    /// Errors: `Error::Io` when the scratch file cannot be written.
    pub fn add(
        &mut self,
        graph: &mut Graph,
        name: &str,
        dtype: DataType,
        dims: &[u64],
        bytes: Vec<u8>,
    ) -> Result<ValueId> {
        let name = graph.fresh_name(name);
        let id = graph.add_value(Value { name, ..Value::default() });
        self.set(id, dtype, dims, bytes)?;
        Ok(id)
    }

    /// Makes a value a constant.
    ///
    /// Errors: as [`FloatConstants::add`].
    pub fn set(&mut self, id: ValueId, dtype: DataType, dims: &[u64], bytes: Vec<u8>) -> Result<()> {
        let content = if bytes.len() < SMALL_BYTES {
            Content::Memory(bytes)
        } else {
            let offset = self.length.next_multiple_of(ALIGNMENT);
            let failed = |e| Error::io("write", &self.path, e);
            self.file.write_all(&vec![0; (offset - self.length) as usize]).map_err(failed)?;
            self.file.write_all(&bytes).map_err(failed)?;
            self.length = offset + bytes.len() as u64;
            Content::File { offset, length: bytes.len() as u64 }
        };
        self.entries.push((id, dtype, dims.to_vec(), content));
        Ok(())
    }

    /// The constants as initializers, large ones mapped from the file.
    ///
    /// Errors: `Error::Io`.
    pub fn finish(self) -> Result<Vec<(ValueId, Tensor)>> {
        let file = Arc::new(MappedFile::open(&self.path)?);
        let tensor = |(id, dtype, dims, content): (ValueId, DataType, Vec<u64>, Content)| {
            let tensor = match content {
                Content::Memory(bytes) => Tensor::from_bytes(dtype, &dims, bytes),
                Content::File { offset, length } => Tensor {
                    data: TensorData::Mapped { file: Arc::clone(&file), offset, length, external: true },
                    ..Tensor::from_bytes(dtype, &dims, Vec::new())
                },
            };
            (id, tensor)
        };
        Ok(self.entries.into_iter().map(tensor).collect())
    }
}

/// What replaces one node.
pub(super) type Replace<'a> = &'a mut dyn FnMut(&mut Graph, Node, usize) -> Result<Vec<Node>>;

/// Replaces every node of every body by those that the function gives for it, which is also told the body's number.
///
/// Errors: those of the function.
pub(super) fn replace_nodes(graph: &mut Graph, replace: Replace<'_>) -> Result<()> {
    let mut body = std::mem::take(&mut graph.body);
    let done = replace_in(graph, &mut body, replace, &mut 0);
    graph.body = body;
    done
}

fn replace_in(graph: &mut Graph, body: &mut Body, replace: Replace<'_>, count: &mut usize) -> Result<()> {
    let number = *count;
    let mut nodes = Vec::with_capacity(body.nodes.len());
    for mut node in std::mem::take(&mut body.nodes) {
        for inner in node.bodies_mut() {
            *count += 1;
            replace_in(graph, inner, replace, count)?;
        }
        nodes.extend(replace(graph, node, number)?);
    }
    body.nodes = nodes;
    Ok(())
}

/// Removes what no output needs, in all bodies.
pub(super) fn remove_dead_code(body: &mut Body) {
    crate::rewrite::remove_dead_code(body);
    body.nodes.iter_mut().flat_map(Node::bodies_mut).for_each(remove_dead_code);
}

/// Constants of the float graph that stayed and are neither small nor vectors, each with the reason.
pub(super) fn kept_tensors(done: &Done, names: &HashSet<String>) -> Vec<KeptTensor> {
    let model = &done.model;
    let mut readers: HashMap<ValueId, BTreeSet<String>> = HashMap::new();
    let mut kept = Vec::new();
    collect(&model.graph, &model.graph.body, &mut readers, &mut kept);
    kept.retain(|(_, tensor)| names.contains(&tensor.name));
    for (id, tensor) in &mut kept {
        let ops: Vec<&str> = readers.get(id).into_iter().flatten().map(String::as_str).collect();
        let other = || format!("read by {}, not as the plain matrix of a product or a table", ops.join(", "));
        tensor.reason = done.reasons.get(&tensor.name).cloned().unwrap_or_else(other);
    }
    kept.into_iter().map(|(_, tensor)| tensor).collect()
}

fn collect(
    graph: &Graph,
    body: &Body,
    readers: &mut HashMap<ValueId, BTreeSet<String>>,
    kept: &mut Vec<(ValueId, KeptTensor)>,
) {
    let index = GraphIndex::of_body(body);
    for node in &body.nodes {
        for id in node.present_inputs() {
            readers.entry(id).or_default().insert(node.op());
            // A constant behind a transpose is read by the transpose's readers.
            if let Some((maker, _)) = index.node_of(id).filter(|(maker, _)| body.nodes[*maker].op_type == "Transpose") {
                body.nodes[maker].present_inputs().for_each(|id| {
                    readers.entry(id).or_default().insert(node.op());
                });
            }
        }
        node.bodies().for_each(|inner| collect(graph, inner, readers, kept));
    }
    for (id, tensor) in &body.initializers {
        let large = tensor.byte_len() >= SMALL_BYTES as u64 && tensor.dims.iter().filter(|&&size| size > 1).count() > 1;
        if large && tensor.dtype == DataType::Float {
            let (name, bytes) = (graph.name(*id).to_string(), tensor.byte_len());
            kept.push((*id, KeptTensor { name, dims: tensor.dims.clone(), bytes, reason: String::new() }));
        }
    }
}
