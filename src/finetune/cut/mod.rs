//! The cut of a decoder for training. It depends on the graph alone.

mod adapters;
mod connector;
mod inputs;
mod projection;
mod suffix;
mod weights;

use std::collections::HashSet;

use crate::analysis::{Analysis, analyse, head_weight};
use crate::base::{Error, Result};
use crate::finetune::settings::{Lora, WriteTrained};
use crate::ir::{Body, Model, Tensor, ValueId};
use crate::quantised::{Activations, QuantisedWeight, float_products, place_floats};

use suffix::reader_count;

pub use adapters::Adapted;
pub use connector::Connector;
pub use inputs::{ConnectorInput, SideInputs, SideWidths, inputs_of, row_inputs, side_inputs, token_inputs};
pub use projection::{FitTarget, products_of};
pub use suffix::{Suffix, nodes_between};
pub use weights::{trained_weights, written_back};

/// A decoder's graph, cut before its first trained layer.
pub struct Cut {
    /// The graph that training runs: float products in place of quantised ones.
    pub analysis: Analysis,
    /// The graph as it is in the file, for ONNX Runtime. Values have the same ids.
    pub stored: Model,
    /// Quantised weights of products. Their float weights are initializers only where these are written to.
    pub quantised: Vec<QuantisedWeight>,
    /// True for a merged decoder, whose layers are in branches of an `If`.
    in_branches: bool,
    /// Trained initializers: weights, or their adapters.
    pub trained: Vec<ValueId>,
    /// Adapters, one per adapted weight.
    pub adapted: Vec<Adapted>,
    /// Weights that a fit writes and that have no gradient.
    pub written: Vec<ValueId>,
    /// Index of the first trained layer.
    pub first: usize,
    /// Residual stream before the first trained layer, between layers, and after the last layer.
    pub streams: Vec<ValueId>,
    /// The connector, where it is a part of the network in training.
    pub connector: Option<Connector>,
}

impl Cut {
    /// Finds the trained weights of `layers` and cuts the graph before the first of these layers.
    ///
    /// Errors: `Error::Unsupported` and `Error::Invalid` for layers that cannot be trained.
    pub fn new(decoder: &Model, layers: &[usize]) -> Result<Self> {
        let mut analysis = analyse(decoder)?;
        let (stored, in_branches) = (analysis.model.clone(), analysis.merged.is_some());
        let quantised = float_products(&mut analysis.model, Activations::Rounded, &|_| true);
        if !quantised.is_empty() {
            analysis = analyse(&analysis.model)?;
        }
        let trained = trained_weights(&analysis.model.graph, &analysis.map, layers, &quantised)?;
        let first = layers.iter().copied().min().unwrap_or(0);
        let map = &analysis.map;
        let streams = map.layers[first..]
            .iter()
            .map(|layer| layer.input)
            .chain(map.layers.last().map(|layer| layer.output))
            .collect();
        let (adapted, written, connector) = (Vec::new(), Vec::new(), None);
        Ok(Cut { trained, adapted, written, first, streams, analysis, stored, quantised, in_branches, connector })
    }

    /// Adds the weight of the head's product to the trained weights.
    ///
    /// Errors: `Error::Unsupported` when the head has no such weight, when it is not a floating-point tensor, or when
    /// another node reads it.
    pub fn train_head(&mut self) -> Result<()> {
        let graph = &self.analysis.model.graph;
        let refused = |problem: String| {
            Err(Error::unsupported("the head", problem).remedy("leave `train_head` out, or export the float model"))
        };
        let Some(weight) = head_weight(graph, self.analysis.map.result) else {
            return refused("is no product with a weight of its own".to_string());
        };
        let name = graph.name(weight);
        let float = graph.body.initializer(weight).is_some_and(|tensor| tensor.dtype.is_float());
        if !float || reader_count(&graph.body.nodes, weight) != 1 {
            let what = if float { "is read in other places too" } else { "is no floating-point tensor" };
            return refused(format!("its weight `{name}` {what}"));
        }
        self.trained.push(weight);
        Ok(())
    }

    /// Expands the trained weights that are quantised: floats that training writes to, in place of the packed ones.
    ///
    /// Errors: `Error::Invalid` for scales that are no floats.
    pub fn expand_trained(&mut self) -> Result<()> {
        self.expand(&self.trained.clone())
    }

    fn expand(&mut self, weights: &[ValueId]) -> Result<()> {
        for weight in self.quantised.iter().filter(|weight| weights.contains(&weight.weight)) {
            let values = weight.form.values(&self.stored.graph.body)?;
            let tensor = Tensor::from_f32(&weight.dims, &values);
            place_floats(&mut self.analysis.model.graph.body, weight.weight, tensor);
        }
        Ok(())
    }

    /// Checks that trained quantised weights can be written as `write` asks.
    ///
    /// Errors: `Error::Unsupported` for float products in both branches of a merged decoder.
    pub fn check_writable(&self, write: WriteTrained) -> Result<()> {
        let trained = self.adapted.iter().map(|adapted| adapted.weight).chain(self.trained.iter().copied());
        let of_decoder = trained.filter(|&weight| !self.of_connector(weight));
        let packed = of_decoder.filter_map(|weight| self.quantised_weight(weight)).next();
        match packed.filter(|_| self.in_branches && write == WriteTrained::Float) {
            None => Ok(()),
            Some(weight) => {
                let name = weight.form.parts().first().map_or("", |&id| self.stored.graph.name(id));
                let problem = format!("its quantised weight `{name}` is read in branches of an `If`");
                Err(Error::unsupported("the decoder", problem)
                    .remedy("write the trained weights quantised again with `--write-trained quantised`"))
            }
        }
    }

    /// Lets go of the floats of expanded weights, after programs have made their own copies.
    pub fn release_expanded(&mut self) {
        let expanded: HashSet<ValueId> = self.quantised.iter().map(|weight| weight.weight).collect();
        for (id, tensor) in &mut self.analysis.model.graph.body.initializers {
            if expanded.contains(id) {
                *tensor = Tensor::from_bytes(tensor.dtype, &tensor.dims, Vec::new());
            }
        }
    }

    /// True for a weight of the connector in training.
    pub fn of_connector(&self, weight: ValueId) -> bool {
        self.connector.as_ref().is_some_and(|connector| connector.own(weight).is_some())
    }

    /// The body with the stored form of a weight: of the decoder's graph, or of the one that the connector is joined with.
    pub fn stored_body(&self, weight: ValueId) -> &Body {
        let model = if self.of_connector(weight) { &self.analysis.model } else { &self.stored };
        &model.graph.body
    }

    /// The stored form of a float weight, where it is quantised.
    pub fn quantised_weight(&self, weight: ValueId) -> Option<&QuantisedWeight> {
        self.quantised.iter().find(|quantised| quantised.weight == weight)
    }

    /// Adds adapters to the trained weights and trains the adapters instead; quantised weights stay packed. A fit still
    /// writes the weights of `targets`.
    ///
    /// Errors: `Error::Invalid` when no weight has sides above the rank.
    pub fn adapt(&mut self, lora: Lora, targets: &[FitTarget]) -> Result<()> {
        let adapted = adapters::adapt(&mut self.analysis.model.graph, &self.trained, lora)?;
        self.trained = adapted.iter().flat_map(|adapted| [adapted.a, adapted.b]).collect();
        let fitted = targets.iter().flat_map(|target| target.products.iter().flatten()).map(|product| product.weight);
        self.written = fitted.collect();
        self.adapted = adapted;
        self.expand(&self.written.clone())
    }

    /// The part of the graph that training runs.
    ///
    /// Errors: as [`Suffix::find`].
    pub fn suffix(&self) -> Result<Suffix> {
        let graph = &self.analysis.model.graph;
        let trained: HashSet<ValueId> = self.trained.iter().copied().collect();
        let map = &self.analysis.map;
        let inner = map.layers.last().map(|layer| layer.sums.as_slice()).unwrap_or_default();
        Suffix::find(graph, &self.streams, inner, map.result, &token_inputs(graph), &trained)
    }

    /// The products to fit in each of `layers`, in ascending order of the layers.
    ///
    /// Errors: `Error::Unsupported` when a layer has none and `must` is true.
    pub fn targets(&self, layers: &[usize], must: bool) -> Result<Vec<FitTarget>> {
        let graph = &self.analysis.model.graph;
        let trained: HashSet<ValueId> = self.trained.iter().copied().collect();
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        layers.dedup();
        let mut targets = Vec::with_capacity(layers.len());
        for layer in layers {
            let ends = &self.analysis.map.layers[layer];
            let products = products_of(graph, ends.input, ends.output, &trained);
            if let (Err(problem), true) = (&products, must) {
                return Err(Error::unsupported(format!("fitting layer {layer}"), problem.clone())
                    .remedy("take a recipe with steps after the fit, `best` for instance"));
            }
            targets.push(FitTarget { layer: layer - self.first, products });
        }
        Ok(targets)
    }

    /// True when the first trained layer reads a graph input, which is then the embeddings.
    pub fn begins_at_input(&self) -> bool {
        self.analysis.model.graph.body.inputs.contains(&self.streams[0])
    }
}
