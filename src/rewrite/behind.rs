//! Adds nodes behind layers that change the residual stream there.

use ndarray::Array2;

use crate::analysis::{Analysis, Layer, analyse};
use crate::base::{Error, Result};
use crate::ir::{DataType, Model, Tensor, Value, ValueId, ValueType};

use super::build::{ADDED_PREFIX, operator};
use super::{fuse, tidy};

/// A change of the stream behind a layer.
#[derive(Clone, Copy, Debug)]
pub enum Behind<'a> {
    /// `x` becomes `factor x`.
    Scale(f64),
    /// `x` becomes `x + (x down) up`; `down` is `[D, R]`, `up` `[R, D]`.
    Bridge {
        /// `[D, R]`.
        down: &'a Array2<f32>,
        /// `[R, D]`.
        up: &'a Array2<f32>,
    },
}

/// Errors: `Error::Unsupported` when nodes cannot be added behind these layers: the decoder is two branches of an `If`, or a
/// stream is of another type than floats.
pub fn check_behind(analysis: &Analysis, layers: &[usize]) -> Result<()> {
    if analysis.merged.is_some() {
        return Err(refusal("the decoder", "is two branches of an `If`, whose streams cannot both be changed")
            .remedy("export it as one graph, or use `--compensate linear`"));
    }
    layers.iter().try_for_each(|&layer| stream_type(&analysis.model, &analysis.map.layers[layer]).map(|_| ()))
}

/// The model with changes behind some of its layers, each at most once. A bridge is a block of the layer from then on, so that
/// it is dropped and trained with it; a factor belongs to no layer.
///
/// Errors: as [`check_behind`]; `Error::Invalid` when a bridge is not as wide as the stream.
pub fn change_behind(model: &Model, changes: &[(usize, Behind)]) -> Result<Model> {
    if changes.is_empty() {
        return Ok(model.clone());
    }
    let analysis = analyse(model)?;
    let layers: Vec<usize> = changes.iter().map(|(layer, _)| *layer).collect();
    check_behind(&analysis, &layers)?;
    let mut model = analysis.model.clone();
    for (layer, change) in changes {
        let layer = &analysis.map.layers[*layer];
        let dtype = stream_type(&model, layer)?;
        Stream { model: &mut model, layer: layer.index, dtype }.change(layer.output, change)?;
    }
    fuse::fuse_skip_norms(&mut model);
    tidy::remove_dead_code(&mut model.graph.body);
    tidy::finish(&mut model)?;
    Ok(model)
}

fn refusal(subject: impl Into<String>, problem: &str) -> Error {
    Error::unsupported(subject, format!("nodes cannot be added behind its layers: {problem}"))
}

/// Element type of the stream behind a layer. Where the graph does not declare it, it is that of the layer's weights.
fn stream_type(model: &Model, layer: &Layer) -> Result<DataType> {
    let declared = model.graph.value(layer.output).ty.as_ref().and_then(ValueType::dtype);
    let of_weights = || {
        let own = model.graph.body.initializers.iter().filter(|(id, _)| layer.weights.contains(id));
        own.map(|(_, tensor)| tensor.dtype).find(|dtype| dtype.is_float())
    };
    declared.or_else(of_weights).filter(|dtype| dtype.is_float()).ok_or_else(|| {
        refusal(format!("layer {}", layer.index), "the type of its stream is not known to be of floats")
            .remedy("export the model with the types of its values, or use `--compensate linear`")
    })
}

/// The stream behind a layer of a model.
struct Stream<'m> {
    model: &'m mut Model,
    layer: usize,
    dtype: DataType,
}

impl Stream<'_> {
    /// Puts nodes between the node that computes `output` and all readers of it; the name `output` is the changed stream's.
    fn change(mut self, output: ValueId, change: &Behind) -> Result<()> {
        let before = self.value("before", Some(output));
        let producers = self.model.graph.body.nodes.iter_mut().flat_map(|node| &mut node.outputs);
        producers.filter(|slot| **slot == Some(output)).for_each(|slot| *slot = Some(before));
        match change {
            Behind::Scale(factor) => {
                let factor = self.weight("factor", &[], &[*factor])?;
                self.node("Mul", &[before, factor], output, "scale");
            }
            Behind::Bridge { down, up } => {
                let down = self.matrix("down", down)?;
                let up = self.matrix("up", up)?;
                let (low, added) = (self.value("low", None), self.value("added", None));
                self.node("MatMul", &[before, down], low, "down");
                self.node("MatMul", &[low, up], added, "up");
                self.node("Add", &[before, added], output, "add");
            }
        }
        Ok(())
    }

    /// A new value, of the type of `like`.
    fn value(&mut self, what: &str, like: Option<ValueId>) -> ValueId {
        let graph = &mut self.model.graph;
        let ty = like.and_then(|id| graph.value(id).ty.clone());
        let name = format!("{ADDED_PREFIX}bridge.{}.{what}.{}", self.layer, graph.values.len());
        graph.add_value(Value { name, ty, ..Value::default() })
    }

    fn weight(&mut self, what: &str, dims: &[u64], values: &[f64]) -> Result<ValueId> {
        let tensor = Tensor::from_f64s(self.dtype, dims, values)
            .ok_or_else(|| refusal(format!("layer {}", self.layer), "its stream is of no type of floats"))?;
        let id = self.value(what, None);
        self.model.graph.body.initializers.push((id, tensor));
        Ok(id)
    }

    fn matrix(&mut self, what: &str, values: &Array2<f32>) -> Result<ValueId> {
        let dims = [values.nrows() as u64, values.ncols() as u64];
        let values: Vec<f64> = values.iter().map(|&value| f64::from(value)).collect();
        self.weight(what, &dims, &values)
    }

    fn node(&mut self, op_type: &str, inputs: &[ValueId], output: ValueId, name: &str) {
        let mut node = operator(op_type, inputs, output, &[]);
        node.name = format!("/{ADDED_PREFIX}bridge.{}/{name}", self.layer);
        self.model.graph.body.nodes.push(node);
    }
}
