//! One page of HTML about a run: every figure is from the files of its folder, and nothing is loaded from elsewhere.

mod examples;
mod html;
mod layers;
mod models;
mod run_folder;
mod svg;
mod training;
mod tuning;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::{AtomicFile, Error, Result, check_output_file};
use crate::pipeline::{FRONT_FILE, TUNE_FILE, TuneReport};

use run_folder::RunFolder;
use svg::Chart;

/// A part of the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReportSection {
    /// Its heading.
    pub name: String,
    /// Reason why it is left out, with the key of the recipe that makes it; absent for a part that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

/// A page that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WrittenReport {
    /// Where it is.
    pub output: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its parts, in order.
    pub sections: Vec<ReportSection>,
}

/// Start of a page's title, before the model's name.
const TITLE: &str = "interlace: ";

/// Bytes of a page within which its title begins.
const HEAD_BYTES: u64 = 1024;

/// What a section's function makes: HTML, or the reason why there is none.
type Made = Result<std::result::Result<String, String>>;

/// A section: id, heading, and its function.
type Section = (&'static str, &'static str, fn(&RunFolder) -> Made);

/// The sections, in order.
const SECTIONS: &[Section] = &[
    ("models", "Models", models::overview),
    ("similarity", "How little layers change the stream", layers::similarity),
    ("layers", "Layers that were dropped and trained", layers::strips),
    ("training", "Loss while training", training::losses),
    ("retention", "What is kept of the dense models", models::retention),
    ("front", "Kept score and speed", models::pareto),
    ("latency", "Where the time goes", models::latency),
    ("size", "Size", models::size),
    ("examples", "Questions and answers", examples::examples),
];

/// The sections about a tuning.
const TUNING_SECTIONS: &[Section] = &[
    ("plans", "Plans", tuning::plans),
    ("front", "Kept likelihood and time to the first token", tuning::front),
    ("candidates", "Models that were made and measured", tuning::candidates),
    ("costs", "What each part costs", tuning::costs),
];

/// Writes the page about the folder of a run, sweep or tuning.
///
/// Errors: as `RunFolder::read`; `Error::Invalid` for an output in the folder of no file, and for one that is there and is no such
/// page; `Error::Io`.
pub fn report(run: &Path, output: &Path) -> Result<WrittenReport> {
    check_output_file(output)?;
    check_replaceable(output)?;
    let (page, sections) = page(&RunFolder::read(run)?)?;
    let mut file = AtomicFile::create(output)?;
    file.write_all(page.as_bytes())?;
    file.commit()?;
    Ok(WrittenReport { output: output.to_path_buf(), size_bytes: page.len() as u64, sections })
}

/// Errors: `Error::Invalid` for a file with other content than a page of [`report`]; `Error::Io`.
fn check_replaceable(output: &Path) -> Result<()> {
    if !output.is_file() {
        return Ok(());
    }
    let failed = |e| Error::io("read", output, e);
    let mut start = Vec::new();
    File::open(output).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut start)).map_err(failed)?;
    let start = String::from_utf8_lossy(&start);
    let is_page = start.starts_with("<!DOCTYPE html>") && start.contains(&format!("<title>{TITLE}"));
    match start.is_empty() || is_page {
        true => Ok(()),
        false => Err(Error::invalid(
            format!("`{}`", output.display()),
            "is there already, and is no page that `report` wrote",
        )
        .remedy("name another file, or remove it")),
    }
}

/// Draws kept score over speed as [`FRONT_FILE`] into the folder of a run or sweep. Gives its path, or `None` with fewer than
/// two models whose speed is known.
///
/// Errors: as `RunFolder::read`; `Error::Io`.
pub fn draw_front(run: &Path) -> Result<Option<PathBuf>> {
    models::pareto_chart(&RunFolder::read(run)?).map(|chart| write_chart(&chart, run.join(FRONT_FILE))).transpose()
}

/// Draws the front of a tuning as `tune.svg` into its work folder, and gives its path.
///
/// Errors: `Error::Io`.
pub fn draw_tuning(tuning: &TuneReport, work: &Path) -> Result<PathBuf> {
    write_chart(&tuning::front_chart(tuning), work.join(format!("{TUNE_FILE}.svg")))
}

fn write_chart(chart: &Chart, path: PathBuf) -> Result<PathBuf> {
    let mut file = AtomicFile::create(&path)?;
    file.write_all(chart.file().as_bytes())?;
    file.commit()?;
    Ok(path)
}

fn page(run: &RunFolder) -> Result<(String, Vec<ReportSection>)> {
    let (mut body, mut contents, mut sections) = (String::new(), Vec::new(), Vec::new());
    let all = if run.tune.is_some() { TUNING_SECTIONS } else { SECTIONS };
    for (id, name, make) in all {
        let made = make(run)?;
        body.push_str(&format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{}</h2>\n", html::escaped(name)));
        body.push_str(&match &made {
            Ok(text) => text.clone(),
            Err(reason) => format!("<p class=\"soft\">Left out: {}.</p>\n", html::escaped(reason)),
        });
        body.push_str("</section>\n");
        contents.push((*id, *name));
        sections.push(ReportSection { name: name.to_string(), left_out: made.err() });
    }
    Ok((html::page(&format!("{TITLE}{}", run.model()), &contents, &body), sections))
}
