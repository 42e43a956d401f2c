//! The schema of every JSON artifact, derived from its type. One row each.

use schemars::{Schema, schema_for};

use crate::bundle::Record;
use crate::eval::EvalReport;
use crate::export::triton::Export;
use crate::method::{Plan, Scores};
use crate::pipeline::State;
use crate::pipeline::steps::{Inspection, Pruned};

/// Name and schema of every artifact; `schemas/` holds them under `NAME.schema.json`.
pub fn schemas() -> Vec<(&'static str, Schema)> {
    vec![
        ("export", schema_for!(Export)),
        ("interlace", schema_for!(Record)),
        ("layers", schema_for!(Inspection)),
        ("plan", schema_for!(Plan)),
        ("pruned", schema_for!(Pruned)),
        ("report", schema_for!(EvalReport)),
        ("scores", schema_for!(Scores)),
        ("state", schema_for!(State)),
    ]
}
