//! Budgets: the smallest number of dropped layers for a model that is small or fast enough.

use std::collections::HashSet;

use crate::analysis::{Analysis, Layer, parameter_counts, sublayers};
use crate::base::{Error, Result, human_bytes, human_count};
use crate::bundle::{Bundle, Role};
use crate::ir::Body;
use crate::method::Part;
use crate::onnx;

/// Parameters and bytes of a model's parts, each component in its most precise variant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCosts {
    /// Elements of all weights; a weight with several readers counts once.
    pub parameters: u64,
    /// Bytes of the files.
    pub size_bytes: u64,
    /// Cost of each decoder layer: the weights that only this layer reads.
    pub layers: Vec<LayerCost>,
    /// Cost of each decoder layer's MLP; 0 where it cannot be dropped alone.
    pub mlps: Vec<LayerCost>,
}

/// One layer's own weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCost {
    /// Elements of the weights.
    pub parameters: u64,
    /// Bytes of the weights in the file's own element types.
    pub size_bytes: u64,
}

/// Cost of a pruned model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remaining {
    /// Elements of all weights.
    pub parameters: u64,
    /// Bytes of all files of the model.
    pub size_bytes: u64,
    /// Ideal decoder speed-up: all layers over the kept ones; where MLPs are dropped alone, the parameters of all layers over
    /// those that stay.
    pub speedup: f64,
}

/// A limit for the pruned model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// At most this many parameters.
    Params(u64),
    /// At most this many bytes.
    Size(u64),
    /// An ideal decoder speed-up of at least this.
    Speedup(f64),
}

impl ModelCosts {
    /// The costs of the analysed decoder and of the other components.
    ///
    /// Errors: those of reading the files.
    pub fn of(bundle: &Bundle, analysis: &Analysis) -> Result<Self> {
        let decoder = bundle.require(Role::Decoder)?;
        let body = &analysis.model.graph.body;
        let cost =
            |layer: &Layer| LayerCost { parameters: layer.parameters(body), size_bytes: layer.weight_bytes(body) };
        // A graph whose layers cannot be cut has no MLP that goes alone.
        let mlps = sublayers(analysis).map_or(Vec::new(), |parts| {
            let place =
                |mlp: Result<usize, String>| mlp.map_or(LayerCost::default(), |place| cost(&parts.map.layers[place]));
            parts.mlps.iter().cloned().map(place).collect()
        });
        let mut costs = ModelCosts {
            parameters: parameters(body),
            size_bytes: bundle.size_bytes(decoder)?,
            layers: analysis.map.layers.iter().map(cost).collect(),
            mlps,
        };
        for role in [Role::EmbedTokens, Role::VisionEncoder] {
            if let Some(component) = bundle.component(role) {
                costs.parameters += parameters(&onnx::load(&bundle.path_of(component))?.graph.body);
                costs.size_bytes += bundle.size_bytes(component)?;
            }
        }
        Ok(costs)
    }

    /// Cost of the model without these layers or, where `part` says so, without their MLPs.
    pub fn without_part(&self, part: Part, drop: &[usize]) -> Remaining {
        if part == Part::Layer {
            return self.without(drop);
        }
        let gone = |weight: fn(&LayerCost) -> u64| -> u64 {
            drop.iter().filter_map(|&layer| self.mlps.get(layer)).map(weight).sum()
        };
        let parameters = gone(|mlp| mlp.parameters);
        let all: u64 = self.layers.iter().map(|layer| layer.parameters).sum();
        Remaining {
            parameters: self.parameters.saturating_sub(parameters),
            size_bytes: self.size_bytes.saturating_sub(gone(|mlp| mlp.size_bytes)),
            speedup: all as f64 / all.saturating_sub(parameters).max(1) as f64,
        }
    }

    /// Cost of the model without these layers.
    pub fn without(&self, drop: &[usize]) -> Remaining {
        let gone = |weight: fn(&LayerCost) -> u64| -> u64 {
            drop.iter().filter_map(|&layer| self.layers.get(layer)).map(weight).sum()
        };
        let kept = self.layers.len().saturating_sub(drop.len()).max(1);
        Remaining {
            parameters: self.parameters.saturating_sub(gone(|layer| layer.parameters)),
            size_bytes: self.size_bytes.saturating_sub(gone(|layer| layer.size_bytes)),
            speedup: self.layers.len() as f64 / kept as f64,
        }
    }
}

/// Number of all weights; two names for the same bytes count once.
fn parameters(body: &Body) -> u64 {
    let counts = parameter_counts(body);
    let mut seen = HashSet::new();
    let once = body
        .initializers
        .iter()
        .filter(|(_, tensor)| tensor.byte_len() == 0 || seen.insert((tensor.bytes().as_ptr(), tensor.byte_len())));
    once.filter_map(|(id, _)| counts.get(id)).sum()
}

impl Budget {
    /// True when the remaining model is within the limit.
    pub fn is_met(self, remaining: Remaining) -> bool {
        match self {
            Budget::Params(most) => remaining.parameters <= most,
            Budget::Size(most) => remaining.size_bytes <= most,
            Budget::Speedup(least) => remaining.speedup >= least - 1e-9,
        }
    }

    /// The smallest number of layers that can satisfy the limit, when the most expensive ones are dropped. The last
    /// layer is kept.
    ///
    /// Errors: `Error::Invalid` when the model is within the limit already, or when the limit cannot be reached (naming
    /// the best possible value).
    pub fn least_count(self, costs: &ModelCosts) -> Result<usize> {
        let mut heaviest: Vec<usize> = (0..costs.layers.len().saturating_sub(1)).collect();
        heaviest.sort_by_key(|&layer| {
            let LayerCost { parameters, size_bytes } = costs.layers[layer];
            std::cmp::Reverse(if matches!(self, Budget::Size(_)) { size_bytes } else { parameters })
        });
        let met = |count: usize| self.is_met(costs.without(&heaviest[..count]));
        match (0..=heaviest.len()).find(|&count| met(count)) {
            Some(0) => {
                Err(Error::invalid(self.to_string(), format!("the model has {} already", self.of(costs.without(&[]))))
                    .remedy("nothing need be dropped; ask for less, or use `--drop-ratio`"))
            }
            Some(count) => Ok(count),
            None => Err(Error::invalid(
                self.to_string(),
                format!(
                    "cannot be reached: with all {} layers but the last dropped there would be {}",
                    costs.layers.len(),
                    self.of(costs.without(&heaviest))
                ),
            )
            .remedy("set a weaker limit: only decoder layers can be dropped")),
        }
    }

    /// The limited quantity of the remaining model, for messages.
    fn of(self, remaining: Remaining) -> String {
        match self {
            Budget::Params(_) => format!("{} parameters", human_count(remaining.parameters)),
            Budget::Size(_) => human_bytes(remaining.size_bytes),
            Budget::Speedup(_) => format!("an ideal decoder speed-up of {:.3}", remaining.speedup),
        }
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Budget::Params(most) => write!(f, "target of {} parameters", human_count(*most)),
            Budget::Size(most) => write!(f, "target of {}", human_bytes(*most)),
            Budget::Speedup(least) => write!(f, "target speed-up of {least}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Embeddings and head have 100 parameters, the layers 10, 10, 40 and 10; each parameter takes four bytes.
    fn costs() -> ModelCosts {
        let layers = [10, 10, 40, 10].map(|parameters| LayerCost { parameters, size_bytes: 4 * parameters });
        let mlps = [6, 6, 24, 6].map(|parameters| LayerCost { parameters, size_bytes: 4 * parameters });
        ModelCosts { parameters: 170, size_bytes: 680, layers: layers.to_vec(), mlps: mlps.to_vec() }
    }

    #[test]
    fn mlps_alone_count_by_their_parameters() {
        let left = costs().without_part(Part::Mlp, &[0, 2]);
        assert_eq!((left.parameters, left.size_bytes, left.speedup), (140, 560, 70.0 / 40.0));
        assert_eq!(costs().without_part(Part::Layer, &[0, 2]), costs().without(&[0, 2]));
    }

    #[test]
    fn the_fewest_layers_that_meet_a_budget_are_counted() {
        let least = |target: Budget| target.least_count(&costs());
        assert_eq!(least(Budget::Params(130)).unwrap(), 1);
        assert_eq!(least(Budget::Params(129)).unwrap(), 2);
        assert_eq!(least(Budget::Size(4 * 120)).unwrap(), 2);
        assert_eq!(least(Budget::Speedup(1.5)).unwrap(), 2);
        assert_eq!(least(Budget::Speedup(4.0 / 3.0)).unwrap(), 1);
        assert_eq!(least(Budget::Speedup(4.0)).unwrap(), 3);
        assert!(!Budget::Params(130).is_met(costs().without(&[0, 1])));
        assert!(Budget::Params(130).is_met(costs().without(&[2])));
    }

    #[test]
    fn the_error_for_an_unreachable_budget_gives_the_reachable_value() {
        let error = |target: Budget| target.least_count(&costs()).unwrap_err().to_string();
        assert!(error(Budget::Params(109)).contains("would be 110 parameters"));
        assert!(error(Budget::Size(1)).contains("would be 440 B"));
        assert!(error(Budget::Speedup(4.1)).contains("ideal decoder speed-up of 4.000"));
        assert!(error(Budget::Params(170)).contains("has 170 parameters already"));
    }
}
