//! What a folder of `interlace run` or `interlace sweep` holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result, read_json, read_plain};
use crate::eval::{BenchReport, ModelScores};
use crate::finetune::StepMetrics;
use crate::method::{Plan, Scores};
use crate::pipeline::{
    MANIFEST_FILE, Manifest, SWEEP_FILE, SweepTable, TABLE_FILE, TUNE_FILE, Table, TableRow, TuneReport,
    stored_answers, stored_bench,
};

/// Most bytes of the steps of one finetuning.
const MOST_METRICS: u64 = 1 << 30;

/// The artifacts of a run.
pub struct RunFolder {
    /// Table of a run.
    pub table: Option<Table>,
    /// Table of a sweep.
    pub sweep: Option<SweepTable>,
    /// Report of a tuning.
    pub tune: Option<TuneReport>,
    /// Manifest of a run.
    pub manifest: Option<Manifest>,
    /// Similarities of the layers.
    pub scores: Option<Scores>,
    /// Plans by strategy.
    pub plans: BTreeMap<String, Plan>,
    /// Steps of each finetuning, by the name of its work folder.
    pub metrics: BTreeMap<String, Vec<StepMetrics>>,
    /// Answers by the name in the table.
    pub answers: BTreeMap<String, ModelScores>,
    /// Measured speed by the name in the table.
    pub benches: BTreeMap<String, BenchReport>,
}

/// An artifact, if it is there.
fn optional<T>(path: PathBuf, read: impl FnOnce(&Path) -> Result<T>) -> Result<Option<T>> {
    path.exists().then(|| read(&path)).transpose()
}

/// Entries of a folder, sorted; none where it is not there.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |e| Error::io("read", folder, e);
    let read = fs::read_dir(folder).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()).map_err(failed));
    let mut found: Vec<PathBuf> = read.collect::<Result<_>>()?;
    found.sort();
    Ok(found)
}

impl RunFolder {
    /// Reads the folder of a run, a sweep or a tuning: of the last one the work folder, or the model folder that it wrote with the
    /// work folder `FOLDER.work` beside it.
    ///
    /// Errors: `Error::Invalid` when it holds none of the tables, or an artifact is malformed; `Error::Io`.
    pub fn read(folder: &Path) -> Result<Self> {
        let table = optional(folder.join(format!("{TABLE_FILE}.json")), |path| read_json(path, Table::SCHEMA_VERSION))?;
        let sweep =
            optional(folder.join(format!("{SWEEP_FILE}.json")), |path| read_json(path, SweepTable::SCHEMA_VERSION))?;
        let tune = tune_report(folder)?;
        if table.is_none() && sweep.is_none() && tune.is_none() {
            let problem = format!("holds none of `{TABLE_FILE}.json`, `{SWEEP_FILE}.json` and `{TUNE_FILE}.json`");
            return Err(Error::invalid(format!("run `{}`", folder.display()), problem)
                .remedy("name the folder of a finished `interlace run` or `interlace sweep`, or the work folder of `interlace tune`"));
        }
        let manifest = optional(folder.join(MANIFEST_FILE), |path| read_json(path, Manifest::SCHEMA_VERSION))?;
        let mut run = RunFolder {
            table,
            sweep,
            tune,
            manifest,
            scores: optional(folder.join("scores.json"), Scores::read)?,
            plans: plans(folder)?,
            metrics: metrics(folder)?,
            answers: BTreeMap::new(),
            benches: BTreeMap::new(),
        };
        let benchmarks = run.benchmarks();
        let names: Vec<String> = run.rows().iter().map(|row| row.model.clone()).collect();
        for name in names {
            run.answers.extend(stored_answers(folder, &benchmarks, &name)?.map(|answers| (name.clone(), answers)));
            run.benches.extend(stored_bench(folder, &name)?.map(|bench| (name, bench)));
        }
        Ok(run)
    }

    /// Rows of the run's table; none for a sweep.
    pub fn rows(&self) -> &[TableRow] {
        self.table.as_ref().map_or(&[], |table| &table.rows)
    }

    /// The recipe's settings.
    fn settings(&self) -> Option<&serde_json::Value> {
        let table = self.table.as_ref().map(|table| &table.provenance.settings);
        table.or_else(|| self.sweep.as_ref().map(|sweep| &sweep.provenance.settings))
    }

    /// A text of the recipe.
    pub fn setting(&self, pointer: &str) -> Option<&str> {
        self.settings()?.pointer(pointer)?.as_str()
    }

    /// The dense model's name on the hub, or its path in the recipe, with its variants in brackets where some were chosen.
    pub fn model(&self) -> String {
        let table = self.table.as_ref().map(|table| &table.provenance);
        let sweep = self.sweep.as_ref().map(|sweep| &sweep.provenance);
        let head = table.or(sweep).or_else(|| self.tune.as_ref().map(|tune| &tune.provenance));
        let named = head.and_then(|head| head.hub.get("model")).map(String::as_str);
        let name = named.or_else(|| self.setting("/model")).unwrap_or("a model");
        match head.and_then(|head| head.variants.get("model")) {
            Some(variants) => format!("{name} ({variants})"),
            None => name.to_string(),
        }
    }

    /// Paths of the benchmarks, as they were in the working folder of the run.
    pub fn benchmarks(&self) -> Vec<PathBuf> {
        let list = self.settings().and_then(|settings| settings.pointer("/eval/benchmarks")?.as_array().cloned());
        list.unwrap_or_default().iter().filter_map(|path| path.as_str().map(PathBuf::from)).collect()
    }

    /// Name of the row of the dense model as it came.
    pub fn dense(&self) -> Option<&str> {
        self.rows().first().map(|row| row.model.as_str())
    }

    /// Name of the row of the dense model with all layers finetuned: the one that every row is compared with.
    pub fn dense_finetuned(&self) -> Option<&str> {
        let same = |row: &&TableRow| {
            let kept =
                row.kept_of_finetuned.is_some_and(|kept| kept.ratio == 1.0 && kept.low == 1.0 && kept.high == 1.0);
            row.dropped_layers == 0 && kept
        };
        self.rows().iter().skip(1).find(same).map(|row| row.model.as_str())
    }

    /// Name of the row of the first strategy's finetuned model.
    pub fn healed(&self) -> Option<&str> {
        let dropped: Vec<&TableRow> = self.rows().iter().filter(|row| row.dropped_layers > 0).collect();
        dropped.get(1).or(dropped.first()).map(|row| row.model.as_str())
    }
}

/// `tune.json` of a work folder, or of the one beside a model folder.
fn tune_report(folder: &Path) -> Result<Option<TuneReport>> {
    let name = format!("{TUNE_FILE}.json");
    let read = |path: &Path| read_json(path, TuneReport::SCHEMA_VERSION);
    match optional(folder.join(&name), read)? {
        Some(report) => Ok(Some(report)),
        None => optional(folder.with_added_extension("work").join(name), read),
    }
}

/// Plans of a run, `plan-STRATEGY.json`.
fn plans(folder: &Path) -> Result<BTreeMap<String, Plan>> {
    let mut plans = BTreeMap::new();
    for path in entries(folder)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(name) = name.strip_prefix("plan-").and_then(|name| name.strip_suffix(".json")) {
            plans.insert(name.to_string(), Plan::read(&path)?);
        }
    }
    Ok(plans)
}

/// `work/NAME/metrics.jsonl`.
fn metrics(folder: &Path) -> Result<BTreeMap<String, Vec<StepMetrics>>> {
    let mut metrics = BTreeMap::new();
    for work in entries(&folder.join("work"))? {
        let path = work.join("metrics.jsonl");
        let Some(name) = work.file_name().and_then(|name| name.to_str()).filter(|_| path.exists()) else { continue };
        let text = String::from_utf8_lossy(&read_plain(&path, MOST_METRICS)?).into_owned();
        let steps = text.lines().enumerate().map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::invalid(format!("line {} of `{}`", number + 1, path.display()), e.to_string())
                    .remedy("make the run again, or remove the line")
            })
        });
        metrics.insert(name.to_string(), steps.collect::<Result<_>>()?);
    }
    Ok(metrics)
}
