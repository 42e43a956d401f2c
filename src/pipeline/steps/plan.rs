//! Creates a plan from scores.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::analysis::Analysis;
use crate::base::{Error, Provenance, Result, Sha256Digest};
use crate::bundle::{Bundle, Tower};
use crate::data::{DataOptions, LeftOut};
use crate::method::select::{SelectionRequest, Strategy, drop_count};
use crate::method::{ModalityWeights, PLAN_SCHEMA_VERSION, Part, Plan, Scores, Similarities};
use crate::rewrite::drop_mlps;

use super::budget::{Budget, ModelCosts};
use super::inspect::decoder_analysis;
use super::meter::Meter;
use super::needs::of_another_model;
use super::refusal::drop_refusal;

/// Number of layers to drop, or the budget that determines it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HowMany {
    /// Part of the decoder's layers, rounded down.
    DropRatio(f64),
    /// A number of layers, fewer than the decoder has.
    DropCount(usize),
    /// These layers, named by the user.
    Drop(Vec<usize>),
    /// As few as leave at most this many parameters.
    TargetParams(u64),
    /// As few as leave at most this many bytes of files.
    TargetSize(u64),
    /// As few as give this ideal decoder speed-up, all layers over those that stay.
    TargetSpeedup(f64),
}

/// Settings of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanSettings {
    /// Name of a row of `STRATEGIES`.
    pub strategy: String,
    /// Number of layers to drop, or the budget from which it is computed.
    pub how_many: HowMany,
    /// Seed of the `random` strategy and of the draw of samples.
    pub seed: u64,
    /// Calibration samples that losses are measured on, where the strategy measures them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// The most tokens of other samples that fits look at, where the strategy makes up for what is gone by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit_tokens: Option<usize>,
    /// Options for reading the calibration data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataOptions>,
    /// Weights of the similarities over image tokens, text tokens and all tokens; all tokens alone by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modality_weights: Option<ModalityWeights>,
    /// Lets `interlace-tn`, `random` and `consecutive` choose the last layer too, as the authors' released code does.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub as_released: bool,
    /// Goes on where a strategy's packs run out: pairs for `interlace-oa`, then single frozen layers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub beyond_structure: bool,
}

/// What would be dropped: these layers, ascending, or their MLPs.
type Asked = (Part, Vec<usize>);

/// The model of a plan.
pub struct PlannedModel {
    /// Digest over the model's files.
    pub digest: Sha256Digest,
    /// Decoder layers.
    pub num_layers: usize,
    /// Parameters and bytes of each decoder layer and of the rest.
    pub costs: ModelCosts,
    bundle: Bundle,
    analysis: Analysis,
    /// Sets of layers checked so far, with the reason why they cannot be dropped, if any.
    refusals: Mutex<BTreeMap<Asked, Option<String>>>,
    /// Layers after which the graph changes the residual stream, with the graph inputs that are read there (DeepStack).
    additions: Vec<(usize, Vec<String>)>,
}

impl PlannedModel {
    /// Analyses a model's decoder and computes the costs of its components.
    ///
    /// Errors: as `decoder_analysis`, and those of reading the files.
    pub fn of(bundle: &Bundle) -> Result<Self> {
        let analysis = decoder_analysis(bundle)?;
        let costs = ModelCosts::of(bundle, &analysis)?;
        let graph = &analysis.model.graph;
        let additions = analysis.map.glue.iter().filter_map(|glue| {
            let inputs = glue.inputs.iter().map(|&id| graph.name(id).to_string()).collect();
            Some((glue.after?, inputs))
        });
        let additions = additions.collect();
        let (digest, num_layers) = (bundle.digest()?, analysis.map.layers.len());
        let (bundle, refusals) = (bundle.clone(), Mutex::default());
        Ok(PlannedModel { digest, num_layers, costs, bundle, analysis, refusals, additions })
    }

    /// The error with which `prune` would refuse to drop these layers, or their MLPs; `None` if it would accept them.
    fn refusal(&self, part: Part, layers: &[usize]) -> Option<Error> {
        match part {
            Part::Layer => drop_refusal(&self.bundle, &self.analysis, Tower::Text, layers),
            Part::Mlp => drop_mlps(&self.analysis, layers).err(),
        }
    }

    /// The same as text, cached.
    fn known_refusal(&self, part: Part, layers: &[usize]) -> Option<String> {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        let mut known = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let refusal = |(part, layers): &Asked| self.refusal(*part, layers).map(|error| error.to_string());
        known.entry((part, layers)).or_insert_with_key(refusal).clone()
    }

    /// Checks that scores are of this model. `subject` is their name in the error.
    ///
    /// Errors: `Error::Invalid`.
    pub fn check_scores(&self, scores: &Scores, subject: String) -> Result<()> {
        if scores.provenance.inputs.get("model") == Some(&self.digest) {
            return Ok(());
        }
        Err(of_another_model(subject, &scores.provenance, &self.bundle, "score this model first"))
    }

    /// Warnings about a plan.
    pub fn plan_warnings(&self, plan: &Plan) -> Vec<String> {
        if plan.part.is_layer() { self.warnings(&plan.drop) } else { Vec::new() }
    }

    /// Warnings about dropping these layers.
    fn warnings(&self, drop: &[usize]) -> Vec<String> {
        let met = self.additions.iter().filter(|(layer, _)| drop.contains(layer));
        met.map(|(layer, inputs)| {
            let what = if inputs.is_empty() { "features".to_string() } else { inputs.join(", ") };
            format!(
                "{what} are added to the residual stream behind layer {layer}, which goes: they are then added behind the \
                 layer before it, or, with `prune --deepstack shift`, behind the first layers that stay; `plan --drop` can \
                 spare it"
            )
        })
        .collect()
    }
}

impl HowMany {
    /// The limit, if there is one.
    pub fn target(&self) -> Option<Budget> {
        match *self {
            HowMany::TargetParams(most) => Some(Budget::Params(most)),
            HowMany::TargetSize(most) => Some(Budget::Size(most)),
            HowMany::TargetSpeedup(least) => Some(Budget::Speedup(least)),
            HowMany::DropRatio(_) | HowMany::DropCount(_) | HowMany::Drop(_) => None,
        }
    }

    /// The number of layers to drop; for a limit, the smallest number that can satisfy it.
    ///
    /// Errors: as `select::drop_count` and `Budget::least_count`.
    pub fn count(&self, model: &PlannedModel) -> Result<usize> {
        match (self, self.target()) {
            (_, Some(target)) => target.least_count(&model.costs),
            (HowMany::DropRatio(ratio), _) => drop_count(*ratio, model.num_layers),
            (HowMany::DropCount(count), _) => Ok(*count),
            (HowMany::Drop(layers), _) => Ok(layers.len()),
            _ => Ok(0),
        }
    }
}

/// Selects layers with a strategy, among those that `prune` can drop. `scores` includes the digest of their file.
///
/// Errors: `Error::Invalid` when the scores are of another model, the strategy needs scores or losses that are missing,
/// or it cannot drop this number of layers; as `prune` for layers that the user listed.
pub fn plan(
    model: &PlannedModel,
    scores: Option<(&Scores, Sha256Digest)>,
    settings: &PlanSettings,
    mut meter: Option<&mut Meter>,
) -> Result<Plan> {
    let strategy = Strategy::named(&settings.strategy)?;
    let num_layers = model.num_layers;
    let target = settings.how_many.target();
    if let (Some(target), Part::Mlp) = (target, strategy.drops) {
        return Err(Error::invalid(format!("strategy `{}`", strategy.name), format!("takes no limit, found {target}"))
            .remedy("give the number of MLPs to drop with `--drop-count` or `--drop-ratio`"));
    }
    let mut count = settings.how_many.count(model)?;
    let mut inputs = BTreeMap::from([("model".to_string(), model.digest.clone())]);
    if let Some((scores, digest)) = &scores {
        model.check_scores(scores, "scores".to_string())?;
        inputs.insert("scores".to_string(), digest.clone());
    } else if !(strategy.packs)(count).is_empty() {
        return Err(Error::invalid(format!("strategy `{}`", strategy.name), "needs scores")
            .remedy("make them with `interlace score` and name them with `--scores`"));
    }
    let (mut samples, mut left_out) = (Vec::new(), LeftOut::default());
    if let Some(meter) = &meter {
        inputs.insert("data".to_string(), meter.data.clone());
        (samples, left_out) = (meter.samples.clone(), meter.left_out.clone());
    }
    let layers: &[usize] = match &settings.how_many {
        HowMany::Drop(layers) => layers,
        _ => &[],
    };
    let scores = scores.map(|(scores, _)| scores);
    let similarities = match (scores, &settings.modality_weights) {
        (Some(scores), Some(weights)) => scores.weighted_similarities(weights)?,
        (Some(scores), None) => scores.similarities(),
        (None, Some(_)) => {
            return Err(Error::invalid("modality weights", "weigh scores, and there are none")
                .remedy("name the scores with `--scores`"));
        }
        (None, None) => Similarities::new(),
    };
    let include_last = scores.is_some_and(|scores| scores.last_layer_included);
    // Layers can have different costs, so a strategy's selection may miss a limit that other layers would satisfy.
    let groups = loop {
        let measure = meter.as_mut().map(|meter| meter.measure());
        let seed = settings.seed;
        let refusal = &|layers: &[usize]| model.known_refusal(strategy.drops, layers);
        let mut request = SelectionRequest {
            num_layers,
            count,
            include_last,
            as_released: settings.as_released,
            beyond_structure: settings.beyond_structure,
            refusal,
            similarities: &similarities,
            seed,
            layers,
            measure,
        };
        let groups = strategy.select(&mut request)?;
        let dropped: Vec<usize> = groups.iter().flat_map(|group| group.drop.iter().copied()).collect();
        if target.is_none_or(|target| target.is_met(model.costs.without_part(strategy.drops, &dropped))) {
            break groups;
        }
        count += 1;
    };
    let dropped: Vec<usize> = groups.iter().flat_map(|group| group.drop.iter().copied()).collect();
    if let Some(error) = model.refusal(strategy.drops, &dropped) {
        return Err(error);
    }
    let provenance = Provenance::new(PLAN_SCHEMA_VERSION, inputs, settings)?
        .with_hub("model", model.bundle.hub_name())
        .with_variants("model", model.bundle.chosen_variants());
    let plan = Plan::new(provenance, strategy.name, strategy.drops, num_layers, groups)?;
    Ok(Plan { samples, left_out, ..plan })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn model(path: &str) -> PlannedModel {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path);
        PlannedModel::of(&Bundle::open(&path).unwrap()).unwrap()
    }

    fn settings(how_many: HowMany) -> PlanSettings {
        PlanSettings {
            strategy: "random".into(),
            how_many,
            seed: 42,
            samples: None,
            fit_tokens: None,
            data: None,
            modality_weights: None,
            as_released: false,
            beyond_structure: false,
        }
    }

    /// The decoder's layers are equal, so each limit has an exact smallest number of dropped layers.
    #[test]
    fn budgets_are_met_with_the_fewest_layers() {
        let model = model("model");
        let whole = model.costs.without(&[]);
        let layer = model.costs.layers[0];
        assert!(model.costs.layers.iter().all(|other| *other == layer) && layer.parameters > 0);
        let cases = [
            (HowMany::TargetParams(whole.parameters - 3 * layer.parameters), 3),
            (HowMany::TargetParams(whole.parameters - 3 * layer.parameters - 1), 4),
            (HowMany::TargetSize(whole.size_bytes - 2 * layer.size_bytes), 2),
            (HowMany::TargetSpeedup(16.0 / 12.0), 4),
            (HowMany::TargetSpeedup(1.34), 5),
        ];
        for (how_many, want) in cases {
            let drop = plan(&model, None, &settings(how_many.clone()), None).unwrap().drop;
            assert_eq!(drop.len(), want, "{how_many:?}");
            assert!(how_many.target().unwrap().is_met(model.costs.without(&drop)));
        }
        let error = plan(&model, None, &settings(HowMany::TargetParams(1)), None).unwrap_err().to_string();
        assert!(error.contains("cannot be reached: with all 16 layers but the last dropped"), "{error}");
    }

    #[test]
    fn dropping_a_layer_with_added_features_gives_a_warning() {
        let mut model = model("model");
        assert!(model.warnings(&[0, 1, 2]).is_empty());
        model.additions = vec![(1, vec!["deepstack_0".to_string()])];
        assert!(model.warnings(&[0, 2]).is_empty());
        let warnings = model.warnings(&[1, 3]);
        assert!(warnings.len() == 1 && warnings[0].contains("deepstack_0") && warnings[0].contains("layer 1"));
    }
}
