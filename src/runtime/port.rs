//! Inputs and outputs of a graph, according to its declarations.

use crate::ir::{DataType, Dim, Graph, ValueId};

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// Name in the graph's signature.
    pub name: String,
    /// Type of the elements.
    pub dtype: DataType,
    /// Axes, outermost first; empty for a scalar.
    pub shape: Vec<Dim>,
}

impl Port {
    /// An input or output of a graph in memory; `None` when the graph does not declare its type or rank.
    pub fn of_value(graph: &Graph, id: ValueId) -> Option<Self> {
        let ty = graph.value(id).ty.as_ref()?;
        Some(Port { name: graph.name(id).to_string(), dtype: ty.dtype()?, shape: ty.shape()?.to_vec() })
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The size of an axis, if the graph fixes it.
    pub fn fixed_size(&self, axis: usize) -> Option<usize> {
        self.shape.get(axis).and_then(known_size)
    }

    /// The size of the last axis, if the graph fixes it.
    pub fn width(&self) -> Option<usize> {
        self.rank().checked_sub(1).and_then(|axis| self.fixed_size(axis))
    }

    /// Name, element type and shape, as messages show them: ``​`pixels` (float32 [n, 3, ?])``.
    pub fn described(&self) -> String {
        let dims: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        format!("`{}` ({} [{}])", self.name, self.dtype, dims.join(", "))
    }
}

/// The size of an axis: a number, or a symbol that is a number (some exporters write `"16"` as a name).
fn known_size(dim: &Dim) -> Option<usize> {
    match dim {
        Dim::Known(size) => usize::try_from(*size).ok(),
        Dim::Symbol(name) => name.parse().ok(),
        Dim::Unknown => None,
    }
}
