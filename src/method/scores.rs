//! The artifact of scoring: similarities of the residual stream over packs of layers.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result, read_json};

/// Version of `scores.json`.
pub const SCORES_SCHEMA_VERSION: u32 = 1;

/// Mean similarity per pack, by pack size `k`: entry `i` compares the stream before layer `i` with that after `i+k-1`.
pub type Similarities = BTreeMap<usize, Vec<f64>>;

/// `scores.json`: how little each pack of consecutive layers turns the residual stream.
///
/// With `h_i` the input of layer `i`, `sim_k[i]` is the mean over tokens of `cos(h_i[t], h_{i+k}[t])`, and its mean here
/// is over samples. Unless `last_layer_included`, `i` ends at `L-k-1`, so that the last layer is in no pack.
/// Source: arXiv:2511.19676, section 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Scores {
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Decoder layers of the scored model.
    pub num_layers: usize,
    /// Samples that the means are over.
    pub num_samples: usize,
    /// True when packs that hold the last layer were scored too.
    pub last_layer_included: bool,
    /// Single layers.
    pub sim_1: PackScores,
    /// Packs of two layers.
    pub sim_2: PackScores,
    /// Packs of three layers.
    pub sim_3: PackScores,
    /// Longer packs, by the number of layers, where they were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub longer: BTreeMap<usize, PackScores>,
    /// What each sample gave.
    pub samples: Vec<SampleScores>,
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
}

impl Scores {
    /// Mean and standard error over samples.
    ///
    /// Errors: `Error::Invalid` without samples, when samples differ in their packs, when a pack of size 1, 2 or 3 is
    /// missing or has the wrong length, or when a value is no cosine (NaN among them).
    pub fn from_samples(
        provenance: Provenance,
        num_layers: usize,
        last_layer_included: bool,
        samples: Vec<SampleScores>,
    ) -> Result<Self> {
        let first = samples.first().ok_or_else(|| Error::invalid("scores", "no sample was scored"))?;
        let sizes: Vec<usize> = first.sim.keys().copied().collect();
        let mut packs = BTreeMap::new();
        for &size in &sizes {
            let rows = samples
                .iter()
                .map(|sample| {
                    let row = sample.sim.get(&size).filter(|_| sample.sim.len() == sizes.len());
                    row.map(Vec::as_slice).ok_or_else(|| {
                        Error::invalid(
                            format!("sample `{}`", sample.id),
                            format!("lacks sim_{size} that `{}` has", first.id),
                        )
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            packs.insert(size, PackScores::over(&rows));
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
            sim_1: take(1)?,
            sim_2: take(2)?,
            sim_3: take(3)?,
            longer: packs,
            samples,
        };
        scores.check()?;
        Ok(scores)
    }

    /// Reads and checks `scores.json`.
    ///
    /// Errors: those of `base::read_json`; `Error::Invalid` when lengths do not fit `num_layers` or a value is no cosine.
    pub fn read(path: &Path) -> Result<Self> {
        let scores: Scores = read_json(path, SCORES_SCHEMA_VERSION)?;
        scores.check()?;
        Ok(scores)
    }

    /// The means by pack size, which is what strategies select by.
    pub fn similarities(&self) -> Similarities {
        self.packs().map(|(size, pack)| (size, pack.mean.clone())).collect()
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
                ));
            }
        }
        for sample in &self.samples {
            for (&size, values) in &sample.sim {
                check_pack(&format!("sim_{size} of sample `{}`", sample.id), size, self, values)?;
            }
        }
        Ok(())
    }
}

fn check_pack(subject: &str, size: usize, scores: &Scores, values: &[f64]) -> Result<()> {
    let starts = scores.num_layers.saturating_add(usize::from(scores.last_layer_included));
    let want = starts.saturating_sub(size);
    if size == 0 || values.len() != want {
        return Err(Error::invalid(
            format!("scores {subject}"),
            format!("has {} values, {want} expected for {} layers", values.len(), scores.num_layers),
        ));
    }
    match values.iter().position(|value| !(-1.001..=1.001).contains(value)) {
        None => Ok(()),
        Some(layer) => Err(Error::invalid(
            format!("scores {subject} from layer {layer}"),
            format!("{} is no cosine similarity", values[layer]),
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
        SampleScores { id: id.into(), tokens: 7, sim }
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
    fn one_sample_has_no_error_to_tell() {
        let scores = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2)]).unwrap();
        assert_eq!(scores.sim_1.standard_error, vec![0.0; 4]);
    }

    #[test]
    fn a_value_that_is_no_cosine_is_refused_with_its_place() {
        let mut bad = sample("b", 0.4);
        bad.sim.get_mut(&2).unwrap()[1] = f64::NAN;
        let error = Scores::from_samples(head(), 5, false, vec![sample("a", 0.2), bad]).unwrap_err().to_string();
        assert!(error.contains("sim_2") && error.contains("layer 1") && error.contains("NaN"), "{error}");
    }

    #[test]
    fn lengths_must_fit_the_number_of_layers() {
        let error = Scores::from_samples(head(), 6, false, vec![sample("a", 0.2)]).unwrap_err().to_string();
        assert!(error.contains("has 4 values, 5 expected for 6 layers"), "{error}");
    }

    #[test]
    fn nothing_scored_is_an_error() {
        assert!(Scores::from_samples(head(), 5, false, Vec::new()).is_err());
    }
}
