//! Sizes of the parts of a decoder, computed from its graph alone.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::finetune::cut::{Cut, Suffix, nodes_between};
use crate::finetune::settings::Precision;
use crate::ir::{DataType, Graph, Tensor, ValueId};
use crate::rewrite::fuse_kernels;

use super::activations::{Kept, of_layer, width_at};

/// Sizes of a connector in training, which are parts of those of the whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectorSizes {
    /// Bytes of its frozen weights as stored in the file, and with every weight of 16 bits or less as f32.
    pub frozen_bytes: u64,
    pub widened_bytes: u64,
    /// Number of matrices with adapters, and of the adapters' elements.
    pub matrices: u64,
    pub elements: u64,
    /// Width of a row of features.
    pub width: u64,
    /// Rows of features of as many image tokens.
    pub rows: (u64, u64),
    /// Activation memory for each row of features.
    pub activations: Kept,
}

impl ConnectorSizes {
    /// Rows of features of `tokens` image tokens.
    pub fn rows_of(&self, tokens: u64) -> u64 {
        (tokens * self.rows.0).div_ceil(self.rows.1.max(1))
    }
}

/// Sizes of the weights and activations of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes of the frozen weights from the first trained layer to the head, as stored in the file.
    pub frozen_bytes: u64,
    /// Bytes of the same weights with every weight of 16 bits or less as f32.
    pub widened_bytes: u64,
    /// Bytes of the f32 copies of all of them that have 16 bits or less.
    pub copied_bytes: u64,
    /// Bytes of the f32 copies that the products of one layer make of its weights of 16 bits or less. The maximum over
    /// the layers.
    pub layer_widened_bytes: u64,
    /// Bytes of the f32 copies of the head's weights of 16 bits or less.
    pub head_widened_bytes: u64,
    /// Shape of each trained weight.
    pub trained: Vec<Vec<u64>>,
    /// Number of elements of the weights that a fit writes and no step trains.
    pub written: u64,
    /// Activation memory of each layer, from the first trained layer on.
    pub layer_activations: Vec<Kept>,
    pub hidden_size: u64,
    /// Numbers that passes read of each token besides the stream.
    pub side_width: u64,
    pub vocabulary: u64,
    /// The connector, where it is trained.
    pub connector: Option<ConnectorSizes>,
}

impl Sizes {
    /// Sizes of a decoder cut at its first trained layer. `heads` is the number of attention heads in the model's
    /// configuration. `precision` is that of the passes.
    pub fn of(cut: &Cut, suffix: &Suffix, heads: u64, precision: Precision) -> Self {
        let graph = &cut.analysis.model.graph;
        let trained: HashSet<ValueId> = cut.trained.iter().chain(&cut.written).copied().collect();
        let map = &cut.analysis.map;
        let mut sizes = Sizes { vocabulary: last_axis(graph, suffix.logits), ..Sizes::default() };
        sizes.trained = cut.trained.iter().filter_map(|&id| Some(graph.body.initializer(id)?.dims.clone())).collect();
        let written = cut.written.iter().filter_map(|&id| graph.body.initializer(id));
        sizes.written = written.map(crate::ir::Tensor::element_count).sum();
        let before: HashSet<ValueId> =
            map.layers[..cut.first].iter().flat_map(|layer| layer.weights.iter().copied()).collect();
        let read = &suffix.weights;
        let packed: HashMap<ValueId, [u64; 2]> = cut
            .quantised
            .iter()
            .filter_map(|weight| Some((weight.form.parts().first().copied()?, weight.dims)))
            .collect();
        let parts: HashSet<ValueId> = cut.quantised.iter().flat_map(|weight| weight.form.parts()).collect();
        // Scales and zero points are converted a weight at a time, and small.
        let converted =
            |id: &ValueId, tensor: &Tensor| packed.contains_key(id) || is_narrow(tensor) && !parts.contains(id);
        let widened = |id: &ValueId, tensor: &Tensor| match packed.get(id) {
            Some([rows, columns]) => 4 * rows * columns,
            None if converted(id, tensor) => 4 * tensor.element_count(),
            None => tensor.byte_len(),
        };
        for (id, tensor) in &graph.body.initializers {
            if read.contains(id) && !trained.contains(id) {
                sizes.frozen_bytes += tensor.byte_len();
                sizes.widened_bytes += widened(id, tensor);
                sizes.copied_bytes += if converted(id, tensor) { widened(id, tensor) } else { 0 };
            }
        }
        let copies = |ids: &mut dyn Iterator<Item = ValueId>| -> u64 {
            let frozen = ids.filter(|id| read.contains(id) && !trained.contains(id));
            let tensors = frozen.filter_map(|id| Some((id, graph.body.initializer(id)?)));
            let narrow = tensors.filter(|(id, tensor)| converted(id, tensor));
            narrow.map(|(id, tensor)| widened(&id, tensor)).sum()
        };
        let mut in_layers: HashSet<ValueId> = before;
        for layer in &map.layers[cut.first..] {
            sizes.layer_widened_bytes = sizes.layer_widened_bytes.max(copies(&mut layer.weights.iter().copied()));
            in_layers.extend(layer.weights.iter().copied());
        }
        let all = graph.body.initializers.iter().map(|(id, _)| *id);
        let of_connector: Vec<ValueId> = all.filter(|&id| cut.of_connector(id)).collect();
        sizes.layer_widened_bytes = sizes.layer_widened_bytes.max(copies(&mut of_connector.iter().copied()));
        in_layers.extend(of_connector.iter().copied());
        let head = graph.body.initializers.iter().map(|(id, _)| *id).filter(|id| !in_layers.contains(id));
        sizes.head_widened_bytes = copies(&mut head.into_iter());
        let in_layer = map.layers[cut.first..].iter().flat_map(|layer| &layer.weights);
        let floats = in_layer.filter(|id| !parts.contains(id)).filter_map(|&id| graph.body.initializer(id));
        let floats = floats.filter_map(|tensor| <[u64; 2]>::try_from(tensor.dims.as_slice()).ok());
        let in_layer = floats.chain(cut.quantised.iter().map(|weight| weight.dims));
        let width = suffix.streams.iter().map(|&stream| last_axis(graph, stream)).max().unwrap_or(0);
        sizes.hidden_size = if width > 0 { width } else { commonest_side(in_layer) };
        let with_gradients: HashSet<ValueId> = cut.trained.iter().copied().collect();
        let compiled = fuse_kernels(&cut.analysis.model).0.graph;
        let low = precision == Precision::Bf16;
        for ends in suffix.streams.windows(2) {
            let piece = nodes_between(&compiled, ends[0], ends[1]);
            let stream = (ends[0], sizes.hidden_size);
            sizes.layer_activations.push(of_layer(&compiled, &piece, stream, &with_gradients, heads, low));
        }
        sizes.connector = cut.connector.as_ref().map(|own| {
            let frozen = of_connector.iter().filter_map(|id| Some((id, graph.body.initializer(*id)?)));
            let adapters = cut.adapted.iter().filter(|adapted| cut.of_connector(adapted.weight));
            let thin = adapters.clone().flat_map(|adapted| [adapted.a, adapted.b]);
            let from = (own.features, own.input.width as u64);
            let piece = nodes_between(&compiled, own.features, own.output);
            // A matrix that reads several rows at once shows how many of them become one.
            let merged =
                || (sizes.hidden_size as f64 / width_at(&compiled, &piece, from, own.output).max(1) as f64).round();
            let rows = own
                .rows()
                .map_or_else(|| (merged().max(1.0) as u64, 1), |(before, after)| (before as u64, after as u64));
            ConnectorSizes {
                frozen_bytes: frozen.clone().map(|(_, tensor)| tensor.byte_len()).sum(),
                widened_bytes: frozen.map(|(id, tensor)| widened(id, tensor)).sum(),
                matrices: adapters.count() as u64,
                elements: thin.filter_map(|id| graph.body.initializer(id)).map(Tensor::element_count).sum(),
                width: from.1,
                rows,
                activations: of_layer(&compiled, &piece, from, &with_gradients, heads, low),
            }
        });
        sizes
    }

    /// Number of elements of all trained weights.
    pub fn trained_elements(&self) -> u64 {
        self.trained.iter().map(|dims| dims.iter().product::<u64>()).sum()
    }
}

/// True for weights that operators convert to a wider type before they compute.
fn is_narrow(tensor: &Tensor) -> bool {
    let bits = tensor.dtype.bits();
    tensor.element_count() > 4096 && bits <= 16 && tensor.dtype != DataType::Bool
}

/// The most frequent side length of the matrices. It is the width of the stream, because most of a layer's matrices read
/// or write the stream.
fn commonest_side(matrices: impl Iterator<Item = [u64; 2]>) -> u64 {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    for sides in matrices {
        sides.into_iter().filter(|&side| side > 1).for_each(|side| *counts.entry(side).or_default() += 1);
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map_or(0, |(side, _)| side)
}

/// Size of a value's last axis; 0 when the graph does not state it.
fn last_axis(graph: &Graph, id: ValueId) -> u64 {
    let shape = graph.value(id).ty.as_ref().and_then(|ty| ty.shape().map(<[_]>::to_vec));
    match shape.as_deref().and_then(<[_]>::last) {
        Some(crate::ir::Dim::Known(size)) => u64::try_from(*size).unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_width_is_the_most_common_matrix_side() {
        let grouped = [[256, 256], [256, 64], [256, 64], [256, 768], [768, 256]];
        assert_eq!(commonest_side(grouped.into_iter()), 256);
        assert_eq!(commonest_side(std::iter::empty()), 0);
    }
}
