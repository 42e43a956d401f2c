//! The manifest of an export, made from its record, the model's history and reports of `eval`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::base::{Error, Provenance, Result, Sha256Digest, read_json, sha256_file};
use crate::bundle::{Bundle, ExportManifest, ListedScores, MANIFEST_SCHEMA_VERSION};

use super::record::Export;

/// Version of the schema of `eval`'s reports.
const REPORT_SCHEMA_VERSION: u32 = 1;

/// What is read of a report of `eval`.
#[derive(Deserialize)]
struct Report {
    #[serde(flatten)]
    provenance: Provenance,
    model: Scores,
    baseline: Option<Scores>,
}

#[derive(Deserialize)]
struct Scores {
    benchmark: String,
    questions: u64,
    score: f64,
}

/// Digests of reports, by name.
type Digests = BTreeMap<String, Sha256Digest>;

/// The scores of reports about the model with this digest, with the reports' digests.
///
/// Errors: as `base::read_json`; `Error::Invalid` for a report that is not of this model.
pub(super) fn scores(reports: &[PathBuf], model: &Sha256Digest) -> Result<(Vec<ListedScores>, Digests)> {
    let (mut scores, mut digests) = (Vec::new(), Digests::new());
    for path in reports {
        let report: Report = read_json(path, REPORT_SCHEMA_VERSION)?;
        if report.provenance.inputs.get("model") != Some(model) {
            return Err(Error::invalid(format!("`{}`", path.display()), "is a report of another model")
                .remedy("give reports of `eval` on this model's folder, as it is now"));
        }
        digests.insert(format!("report {}", report.model.benchmark), sha256_file(path)?);
        let Scores { benchmark, questions, score } = report.model;
        scores.push(ListedScores { benchmark, questions, after: score, before: report.baseline.map(|b| b.score) });
    }
    Ok((scores, digests))
}

/// The manifest of an export whose files are in `folder`.
///
/// Errors: as `Bundle::record` and `ExportManifest::list`.
pub(super) fn of(
    bundle: &Bundle,
    export: &Export,
    (scores, reports): (Vec<ListedScores>, Digests),
    folder: &Path,
) -> Result<ExportManifest> {
    let mut inputs = export.provenance.inputs.clone();
    inputs.extend(reports);
    let record = bundle.record()?;
    for (name, digest) in
        record.iter().flat_map(|record| &record.provenance.inputs).filter(|(name, _)| *name != "model")
    {
        inputs.entry(name.clone()).or_insert_with(|| digest.clone());
    }
    let (files, licences) = ExportManifest::list(folder)?;
    let head = Provenance::new(MANIFEST_SCHEMA_VERSION, inputs, &export.provenance.settings)?;
    Ok(ExportManifest {
        provenance: Provenance { hub: export.provenance.hub.clone(), ..head },
        target: export.target.clone(),
        history: record.map(|record| record.history).unwrap_or_default(),
        scores,
        licences,
        files,
    })
}
