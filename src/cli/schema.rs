//! The schemas of all JSON artifacts, derived from their types. One row each.

use schemars::{Schema, schema_for};

use crate::bundle::{ExportManifest, Record};
use crate::eval::{BenchReport, EvalReport, TextReport, VerifyReport};
use crate::export::{Export, PrecisionReport, VocabularyReport};
use crate::finetune::{Report, RunPlan};
use crate::graft::GraftTable;
use crate::method::{Plan, Scores};
use crate::pipeline::steps::{Generations, ImageTokens, Inspection, LikelihoodReport, Pruned};
use crate::pipeline::{Costs, Manifest, Quality, Recipe, RunState, Sweep, SweepTable, Table, TuneReport};

/// Name and schema of every artifact; the folder `schemas/` has them as `NAME.schema.json`.
pub fn schemas() -> Vec<(&'static str, Schema)> {
    vec![
        ("bench", schema_for!(BenchReport)),
        ("export", schema_for!(Export)),
        ("export-manifest", schema_for!(ExportManifest)),
        ("finetune", schema_for!(Report)),
        ("generate", schema_for!(Generations)),
        ("graft", schema_for!(GraftTable)),
        ("image-tokens", schema_for!(ImageTokens)),
        ("interlace", schema_for!(Record)),
        ("layers", schema_for!(Inspection)),
        ("likelihood-report", schema_for!(LikelihoodReport)),
        ("manifest", schema_for!(Manifest)),
        ("plan", schema_for!(Plan)),
        ("precision", schema_for!(PrecisionReport)),
        ("pruned", schema_for!(Pruned)),
        ("recipe", schema_for!(Recipe)),
        ("report", schema_for!(EvalReport)),
        ("run-plan", schema_for!(RunPlan)),
        ("scores", schema_for!(Scores)),
        ("state", schema_for!(RunState)),
        ("sweep", schema_for!(SweepTable)),
        ("sweep-recipe", schema_for!(Sweep)),
        ("table", schema_for!(Table)),
        ("text-report", schema_for!(TextReport)),
        ("tune", schema_for!(TuneReport)),
        ("tune-costs", schema_for!(Costs)),
        ("tune-quality", schema_for!(Quality)),
        ("verify", schema_for!(VerifyReport)),
        ("vocabulary", schema_for!(VocabularyReport)),
    ]
}
