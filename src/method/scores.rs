//! The artifact of scoring: similarities of the residual stream over packs of layers.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, read_artifact};
use crate::data::LeftOut;
use crate::runtime::Profile;

/// Version of `scores.json`.
pub const SCORES_SCHEMA_VERSION: u32 = 1;

/// Mean similarity per pack, by pack size `k`: entry `i` compares the stream before layer `i` with that after `i+k-1`.
pub type Similarities = BTreeMap<usize, Vec<f64>>;

/// Tokens that similarities are taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// Every token.
    All,
    /// Tokens that take one image feature each.
    Image,
    /// Every other token.
    Text,
}

/// A side of what is added to the stream between two layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StreamSide {
    /// The layer's output before anything is added: the hidden states that Hugging Face records.
    Before,
}

/// Every modality with its name.
pub const MODALITIES: &[(Modality, &str)] =
    &[(Modality::All, "all"), (Modality::Image, "image"), (Modality::Text, "text")];

/// Weight of each modality's similarities, 0 or more.
pub type ModalityWeights = BTreeMap<Modality, f64>;

/// `scores.json`: how little each pack of consecutive layers turns the residual stream.
///
/// With `h_i` the input of layer `i`, `sim_k[i]` is the mean over tokens of `cos(h_i[t], h_{i+k}[t])`, and its mean here
/// is over samples. Unless `last_layer_included`, `i` ends at `L-k-1`, so that the last layer is in no pack.
/// Source: arXiv:2511.19676, section 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Scores {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Decoder layers of the scored model.
    pub num_layers: usize,
    /// Samples that the means are over.
    pub num_samples: usize,
    /// True when packs that hold the last layer were scored too.
    pub last_layer_included: bool,
    /// On which side of what is added to the stream between layers (DeepStack features) the stream was compared; absent
    /// where nothing is added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub additions: Option<StreamSide>,
    /// Warnings about the reliability of these scores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Single layers.
    pub sim_1: PackScores,
    /// Packs of two layers.
    pub sim_2: PackScores,
    /// Packs of three layers.
    pub sim_3: PackScores,
    /// Longer packs, by the number of layers, where they were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub longer: BTreeMap<usize, PackScores>,
    /// The same over image tokens and over text tokens alone, each over the samples that have any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub modalities: BTreeMap<Modality, ModalityScores>,
    /// Samples that were drawn and not scored.
    #[serde(default, skip_serializing_if = "LeftOut::is_empty")]
    pub left_out: LeftOut,
    /// Where the time was spent, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<Profile>,
    /// Similarities of each sample.
    pub samples: Vec<SampleScores>,
}

/// Similarities over one modality's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModalityScores {
    /// Samples that have such tokens.
    pub num_samples: usize,
    /// Scores by the number of layers in the pack.
    pub packs: BTreeMap<usize, PackScores>,
}

/// Similarities of all packs of one size, by the first layer of the pack.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PackScores {
    /// Mean over samples, in -1..=1.
    pub mean: Vec<f64>,
    /// Standard error of the mean (sample standard deviation over the root of the count); 0 for one sample.
    pub standard_error: Vec<f64>,
}

/// Similarities that one sample gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleScores {
    /// The sample's id in its data set.
    pub id: String,
    /// Tokens of the scored prompt.
    pub tokens: usize,
    /// Similarities by pack size (`"1"`, `"2"`, ...), each by the first layer of the pack.
    pub sim: Similarities,
    /// Tokens and similarities of each modality that the prompt has tokens of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub modalities: BTreeMap<Modality, SampleModality>,
}

/// One modality of one sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SampleModality {
    /// Tokens that the means are over.
    pub tokens: usize,
    /// Mean similarity per pack of layers.
    pub sim: Similarities,
}

impl Scores {
    /// Mean and standard error over samples.
    ///
    /// Errors: `Error::Invalid` without samples, when samples have different packs, when a pack of size 1, 2 or 3 is
    /// missing or has the wrong length, or when a value is not a cosine (such as NaN).
    pub fn from_samples(
        provenance: Provenance,
        num_layers: usize,
        last_layer_included: bool,
        samples: Vec<SampleScores>,
    ) -> Result<Self> {
        let first = samples.first().ok_or_else(|| Error::invalid("scores", "no sample was scored"))?;
        let rows = samples.iter().map(|sample| (sample.id.as_str(), &sample.sim));
        let mut packs = mean_packs(&rows.collect::<Vec<_>>())?;
        let longest = first.sim.keys().copied().collect::<Vec<_>>();
        let mut modalities = BTreeMap::new();
        for modality in [Modality::Image, Modality::Text] {
            let rows: Vec<(&str, &Similarities)> = samples
                .iter()
                .filter_map(|sample| Some((sample.id.as_str(), &sample.modalities.get(&modality)?.sim)))
                .collect();
            if let Some((id, sim)) = rows.first() {
                if sim.keys().copied().ne(longest.iter().copied()) {
                    return Err(Error::invalid(format!("sample `{id}`"), "lacks packs of one of its modalities"));
                }
                let packs = mean_packs(&rows)?;
                modalities.insert(modality, ModalityScores { num_samples: rows.len(), packs });
            }
        }
        let mut take = |size| {
            packs
                .remove(&size)
                .ok_or_else(|| Error::invalid("scores", format!("packs of {size} layers were not scored")))
        };
        let scores = Scores {
            provenance,
            num_layers,
            num_samples: samples.len(),
            last_layer_included,
            additions: None,
            warnings: Vec::new(),
            sim_1: take(1)?,
            sim_2: take(2)?,
            sim_3: take(3)?,
            longer: packs,
            modalities,
            profile: None,
            left_out: LeftOut::default(),
            samples,
        };
        scores.check()?;
        Ok(scores)
    }

    /// Reads and checks `scores.json`.
    ///
    /// Errors: those of `base::read_artifact`; `Error::Invalid` when lengths do not match `num_layers`
    /// or a value is not a cosine.
    pub fn read(path: &Path) -> Result<Self> {
        let scores: Scores = read_artifact(path, SCORES_SCHEMA_VERSION, "scores")?;
        scores.check()?;
        Ok(scores)
    }

    /// The means by pack size, which strategies use.
    pub fn similarities(&self) -> Similarities {
        self.packs().map(|(size, pack)| (size, pack.mean.clone())).collect()
    }

    /// The weighted means over modalities, by pack size. The weights need not sum to 1.
    ///
    /// Errors: `Error::Invalid` when no weight is above 0, a weight is negative or not a number, or
    /// the scores lack a modality.
    pub fn weighted_similarities(&self, weights: &ModalityWeights) -> Result<Similarities> {
        check_weights(weights)?;
        let sum: f64 = weights.values().sum();
        let mut total = Similarities::new();
        for (&modality, &weight) in weights.iter().filter(|(_, weight)| **weight > 0.0) {
            let own = match modality {
                Modality::All => self.similarities(),
                _ => {
                    let scores = self.modalities.get(&modality).ok_or_else(|| {
                        Error::invalid(format!("scores over {} tokens", modality.name()), "are not in the file").remedy(
                            "score again with this version, on data that has such tokens, or leave this weight out",
                        )
                    })?;
                    scores.packs.iter().map(|(&size, pack)| (size, pack.mean.clone())).collect()
                }
            };
            for (size, values) in own {
                let slot = total.entry(size).or_insert_with(|| vec![0.0; values.len()]);
                for (slot, value) in slot.iter_mut().zip(values) {
                    *slot += weight / sum * value;
                }
            }
        }
        Ok(total)
    }

    fn packs(&self) -> impl Iterator<Item = (usize, &PackScores)> {
        let first = [(1, &self.sim_1), (2, &self.sim_2), (3, &self.sim_3)];
        first.into_iter().chain(self.longer.iter().map(|(&size, pack)| (size, pack)))
    }

    fn check(&self) -> Result<()> {
        for (size, pack) in self.packs() {
            check_pack(&format!("sim_{size}"), size, self, &pack.mean)?;
            if pack.standard_error.len() != pack.mean.len() {
                return Err(Error::invalid(
                    format!("scores sim_{size}"),
                    format!("{} means, {} standard errors", pack.mean.len(), pack.standard_error.len()),
                )
                .remedy("score again"));
            }
        }
        for (modality, scores) in &self.modalities {
            for (&size, pack) in &scores.packs {
                check_pack(&format!("sim_{size} over {} tokens", modality.name()), size, self, &pack.mean)?;
            }
        }
        for sample in &self.samples {
            let split = sample.modalities.values().map(|modality| &modality.sim);
            for (&size, values) in std::iter::once(&sample.sim).chain(split).flatten() {
                check_pack(&format!("sim_{size} of sample `{}`", sample.id), size, self, values)?;
            }
        }
        Ok(())
    }
}

impl Modality {
    /// Name in files and flags.
    pub fn name(self) -> &'static str {
        MODALITIES.iter().find(|row| row.0 == self).map_or("all", |row| row.1)
    }
}

/// Errors: `Error::Invalid` when no weight is above 0, or a weight is negative or not a number.
pub fn check_weights(weights: &ModalityWeights) -> Result<()> {
    if let Some((modality, weight)) = weights.iter().find(|(_, weight)| !(weight.is_finite() && **weight >= 0.0)) {
        return Err(Error::invalid(
            format!("weight of modality `{}`", modality.name()),
            format!("is {weight}, must be 0 or more"),
        )
        .remedy("give each modality a weight of 0 or more"));
    }
    if !weights.values().any(|&weight| weight > 0.0) {
        return Err(
            Error::invalid("modality weights", "none is above 0").remedy("give at least one modality a weight above 0")
        );
    }
    Ok(())
}

/// Mean and standard error over samples for each pack size. The ids name the samples in messages.
fn mean_packs(samples: &[(&str, &Similarities)]) -> Result<BTreeMap<usize, PackScores>> {
    let Some((first, sim)) = samples.first() else { return Ok(BTreeMap::new()) };
    let mut packs = BTreeMap::new();
    for &size in sim.keys() {
        let rows = samples
            .iter()
            .map(|(id, own)| {
                let row = own.get(&size).filter(|_| own.len() == sim.len());
                row.map(Vec::as_slice).ok_or_else(|| {
                    Error::invalid(format!("sample `{id}`"), format!("lacks sim_{size} that `{first}` has"))
                })
            })
            .collect::<Result<Vec<_>>>()?;
        packs.insert(size, PackScores::over(&rows));
    }
    Ok(packs)
}

fn check_pack(subject: &str, size: usize, scores: &Scores, values: &[f64]) -> Result<()> {
    let starts = scores.num_layers.saturating_add(usize::from(scores.last_layer_included));
    let want = starts.saturating_sub(size);
    if size == 0 || values.len() != want {
        return Err(Error::invalid(
            format!("scores {subject}"),
            format!("has {} values, {want} expected for {} layers", values.len(), scores.num_layers),
        )
        .remedy("score again"));
    }
    match values.iter().position(|value| !(-1.001..=1.001).contains(value)) {
        None => Ok(()),
        Some(layer) => Err(Error::invalid(
            format!("scores {subject} from layer {layer}"),
            format!("{} is not a cosine similarity", values[layer]),
        )
        .remedy(
            "the model's hidden states overflow or a sample is broken: score in float32, or leave that sample out",
        )),
    }
}

impl PackScores {
    /// Mean and standard error by column; rows are samples of equal length.
    fn over(rows: &[&[f64]]) -> Self {
        let width = rows.iter().map(|row| row.len()).min().unwrap_or(0);
        let count = rows.len() as f64;
        let mut pack = PackScores::default();
        for column in 0..width {
            let mean = rows.iter().map(|row| row[column]).sum::<f64>() / count;
            let squares = rows.iter().map(|row| (row[column] - mean).powi(2)).sum::<f64>();
            let error = if rows.len() > 1 { (squares / (count - 1.0) / count).sqrt() } else { 0.0 };
            pack.mean.push(mean);
            pack.standard_error.push(error);
        }
        pack
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Provenance {
        Provenance::new(SCORES_SCHEMA_VERSION, BTreeMap::new(), &serde_json::json!({})).unwrap()
    }

    fn sample(id: &str, value: f64) -> SampleScores {
        let sim = (1..=3).map(|size| (size, vec![value; 5 - size])).collect();
        SampleScores { id: id.into(), tokens: 7, sim, modalities: BTreeMap::new() }
    }

    #[test]
    fn mean_and_standard_error_are_over_samples() {
        // Values 0.2, 0.4, 0.9: mean 0.5, sample variance 0.13, standard error sqrt(0.13 / 3).
        let samples = vec![sample("a", 0.2), sample("b", 0.4), sample("c", 0.9)];
        let scores = Scores::from_samples(head(), 5, false, samples).unwrap();
        assert_eq!(scores.sim_1.mean.len(), 4);
        assert_eq!(scores.sim_3.mean.len(), 2);
        assert!((scores.sim_2.mean[0] - 0.5).abs() < 1e-12);
        assert!((scores.sim_2.standard_error[0] - (0.13f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_standard_error_of_one_sample_is_zero() {
        let scores = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2)]).unwrap();
        assert_eq!(scores.sim_1.standard_error, vec![0.0; 4]);
    }

    #[test]
    fn an_invalid_similarity_is_refused_with_its_layer() {
        let mut bad = sample("b", 0.4);
        bad.sim.get_mut(&2).unwrap()[1] = f64::NAN;
        let error = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2), bad]).unwrap_err().to_string();
        assert!(error.contains("sim_2") && error.contains("layer 1") && error.contains("NaN"), "{error}");
    }

    #[test]
    fn the_number_of_similarities_must_fit_the_number_of_layers() {
        let error = Scores::from_samples(head(), 6, false, vec![sample("a", 0.2)]).unwrap_err().to_string();
        assert!(error.contains("has 4 values, 5 expected for 6 layers"), "{error}");
    }

    fn seeing(id: &str, all: f64, image: Option<f64>, text: f64) -> SampleScores {
        let part = |tokens, value| SampleModality { tokens, sim: sample(id, value).sim };
        let mut modalities = BTreeMap::from([(Modality::Text, part(3, text))]);
        modalities.extend(image.map(|image| (Modality::Image, part(4, image))));
        SampleScores { modalities, ..sample(id, all) }
    }

    /// Image: 0.9 and 0.5 of two samples; text: 0.2, 0.4 and 0.6 of three.
    #[test]
    fn modalities_are_averaged_over_their_own_samples_and_weighted() {
        let samples =
            vec![seeing("a", 0.5, Some(0.9), 0.2), seeing("b", 0.5, Some(0.5), 0.4), seeing("c", 0.8, None, 0.6)];
        let scores = Scores::from_samples(head(), 5, false, samples).unwrap();
        let image = &scores.modalities[&Modality::Image];
        assert_eq!(image.num_samples, 2);
        assert!((image.packs[&2].mean[1] - 0.7).abs() < 1e-12);
        assert!((scores.modalities[&Modality::Text].packs[&3].mean[0] - 0.4).abs() < 1e-12);
        assert_eq!(scores.similarities()[&1].len(), 4);
        // (3 * 0.7 + 1 * 0.4) / 4, and with all tokens besides (mean 0.6): (0.7 + 0.6) / 2.
        let weighed = |weights: &[(Modality, f64)]| {
            scores.weighted_similarities(&weights.iter().copied().collect()).map(|sim| sim[&1][0])
        };
        assert!((weighed(&[(Modality::Image, 3.0), (Modality::Text, 1.0)]).unwrap() - 0.625).abs() < 1e-12);
        assert!((weighed(&[(Modality::Image, 0.5), (Modality::All, 0.5)]).unwrap() - 0.65).abs() < 1e-12);
        assert_eq!(weighed(&[(Modality::All, 2.0)]).unwrap(), scores.similarities()[&1][0]);
        let error = weighed(&[(Modality::Image, -1.0)]).unwrap_err().to_string();
        assert!(error.contains("weight of modality `image`: is -1, must be 0 or more"), "{error}");
        let error = weighed(&[]).unwrap_err().to_string();
        assert!(error.contains("modality weights: none is above 0"), "{error}");
        let older = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2)]).unwrap();
        let error = older.weighted_similarities(&[(Modality::Text, 1.0)].into()).unwrap_err().to_string();
        assert!(error.contains("text tokens") && error.contains("score again"), "{error}");
    }

    #[test]
    fn score_files_without_modalities_are_read() {
        let scores = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2)]).unwrap();
        let text = serde_json::to_string(&scores).unwrap();
        assert!(!text.contains("modalities"));
        assert_eq!(serde_json::from_str::<Scores>(&text).unwrap(), scores);
    }

    #[test]
    fn scores_without_samples_are_an_error() {
        let error = Scores::from_samples(head(), 5, false, Vec::new()).unwrap_err().to_string();
        assert!(error.contains("no sample was scored"), "{error}");
    }
}
