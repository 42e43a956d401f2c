//! Scores of judged answers per group and overall, and their ratios to a baseline's.

use std::collections::{BTreeMap, HashMap};

use crate::base::{Error, Result};

use super::judge::read_yes_no;
use super::metrics::{JUDGED, Judged, Metric, mean_score, metric_named, metric_of};
use super::mia::read_grades;
use super::report::{Answer, EvalTiming, GroupRetention, GroupScore, ModelScores, Retention};
use super::stats::{PairedComparison, RESAMPLES, Stratum, compared, compared_over};

/// The group of questions without a category.
pub(super) const NO_GROUP: &str = "all";

/// Scores of a benchmark, with its groups in the order of their first question.
pub(super) fn summarise(model: String, benchmark: String, answers: Vec<Answer>, timing: EvalTiming) -> ModelScores {
    let metric = metric_of(&benchmark);
    let groups: Vec<Option<&str>> = answers.iter().map(|answer| Some(answer.group.as_str())).collect();
    let groups = groups_by(&answers, &groups);
    let mean_of_groups = mean(groups.iter().map(|group| group.score));
    let all: Vec<&Answer> = once_per_group(&answers).collect();
    let rows = judged(&all);
    ModelScores {
        model,
        questions: answers.len(),
        metric: metric.map(|metric| metric.name.to_string()),
        score: metric.map_or(mean_of_groups, |metric| (metric.score)(&rows)),
        figures: metric.map(|metric| figures(metric, &rows)).unwrap_or_default(),
        by_column: BTreeMap::new(),
        mean_of_groups,
        mean_of_questions: mean(answers.iter().filter(|answer| !answer.unjudged).map(|answer| answer.score)),
        benchmark,
        groups,
        timing,
        likelihood: None,
        answers,
    }
}

/// Mean grades by component type, from the judge's replies. `types` are the cells of the answers' rows.
pub(super) fn grades_by_type(answers: &[Answer], types: &[&str]) -> Vec<GroupScore> {
    let mut groups: Vec<(String, Vec<f64>)> = Vec::new();
    for (answer, types) in answers.iter().zip(types) {
        let grades = answer.reply.as_deref().and_then(|reply| read_grades(types, reply));
        for (kind, grade) in grades.map(|grades| grades.components).unwrap_or_default() {
            match groups.iter_mut().find(|(known, _)| *known == kind) {
                Some((_, own)) => own.push(grade),
                None => groups.push((kind, vec![grade])),
            }
        }
    }
    let group = |(group, grades): (String, Vec<f64>)| GroupScore {
        group,
        questions: grades.len(),
        score: mean(grades.iter().copied()),
        metrics: BTreeMap::from([(JUDGED.to_string(), grades.len())]),
        figures: BTreeMap::new(),
    };
    groups.into_iter().map(group).collect()
}

/// Scores of the answers of each group. If the metric allows several groups, an answer with a comma-separated list
/// counts in each of them; an answer without a group counts in none.
pub(super) fn groups_by(answers: &[Answer], groups: &[Option<&str>]) -> Vec<GroupScore> {
    let mut names: Vec<&str> = Vec::new();
    let mut members: HashMap<&str, Vec<&Answer>> = HashMap::new();
    for (answer, group) in answers.iter().zip(groups) {
        for name in group.iter().flat_map(|group| answer.groups_of(group)) {
            let own = members.entry(name).or_default();
            if own.is_empty() {
                names.push(name);
            }
            own.push(answer);
        }
    }
    let score = |name: &&str| {
        let own = &members[name];
        let mut metrics = BTreeMap::new();
        for answer in own {
            *metrics.entry(answer.metric.clone()).or_insert(0) += 1;
        }
        let rows = judged(own);
        let yes_no: Vec<&Answer> = own.iter().copied().filter(|answer| answer.metric == "yes_no").collect();
        let figures = match (metric_of_all(own), metric_named("yes_no")) {
            (Some(metric), _) => figures(metric, &rows),
            (None, Some(metric)) if !yes_no.is_empty() => figures(metric, &judged(&yes_no)),
            _ => BTreeMap::new(),
        };
        GroupScore { group: name.to_string(), questions: own.len(), score: score_of(own)(&rows), metrics, figures }
    };
    names.iter().map(score).collect()
}

/// Errors: `Error::Invalid` when the two did not answer the same questions.
fn check_same(model: &ModelScores, baseline: &ModelScores) -> Result<()> {
    let same = model.answers.len() == baseline.answers.len()
        && model.answers.iter().zip(&baseline.answers).all(|(a, b)| a.index == b.index && a.group == b.group);
    if same {
        return Ok(());
    }
    Err(Error::invalid("retention", "model and baseline did not answer the same questions")
        .remedy("compare two reports of one benchmark file, with the same --limit"))
}

/// The answers of each group, or all of them where the benchmark's metric scores all at once.
fn headline(model: &ModelScores, baseline: &ModelScores) -> Vec<Stratum> {
    let pairs: Vec<(&Answer, &Answer)> = model.answers.iter().zip(&baseline.answers).collect();
    match &model.metric {
        Some(_) => vec![stratum(&pairs, None)],
        None => model.groups.iter().map(|group| stratum(&of_group(&pairs, &group.group), Some(&group.group))).collect(),
    }
}

fn of_group<'a>(pairs: &[(&'a Answer, &'a Answer)], name: &str) -> Vec<(&'a Answer, &'a Answer)> {
    pairs.iter().copied().filter(|(answer, _)| answer.groups().any(|group| group == name)).collect()
}

/// The headline scores of models over and less their baselines', as means over several runs of one experiment. `None` where
/// there is nothing to compare.
///
/// Errors: `Error::Invalid` when a model and its baseline did not answer the same questions.
pub fn compare_over(runs: &[(&ModelScores, &ModelScores)], seed: u64) -> Result<Option<PairedComparison>> {
    runs.iter().try_for_each(|(model, baseline)| check_same(model, baseline))?;
    let strata: Vec<Vec<Stratum>> = runs.iter().map(|(model, baseline)| headline(model, baseline)).collect();
    let strata: Vec<&[Stratum]> = strata.iter().map(Vec::as_slice).collect();
    Ok(compared_over(&strata, seed))
}

/// Retention: a model's scores over a baseline's on the same questions.
///
/// Errors: `Error::Invalid` when the two have answers to different questions.
pub fn compare(model: &ModelScores, baseline: &ModelScores, seed: u64) -> Result<Retention> {
    check_same(model, baseline)?;
    let pairs: Vec<(&Answer, &Answer)> = model.answers.iter().zip(&baseline.answers).collect();
    let names: Vec<&str> = model.groups.iter().map(|group| group.group.as_str()).collect();
    let strata: Vec<Stratum> = names.iter().map(|name| stratum(&of_group(&pairs, name), Some(name))).collect();
    let groups = names.iter().zip(&strata).map(|(name, stratum)| {
        let found = compared(std::slice::from_ref(stratum), seed);
        GroupRetention {
            group: name.to_string(),
            retention: found.and_then(|found| found.ratio),
            difference: found.map(|found| found.difference),
        }
    });
    let groups = groups.collect();
    let of_groups = compared(&strata, seed);
    let all = stratum(&pairs, None);
    let score = match &model.metric {
        Some(_) => compared(std::slice::from_ref(&all), seed),
        None => of_groups,
    };
    let of_questions = compared(&[Stratum { score: mean_score, ..all }], seed);
    let ratio = |found: Option<PairedComparison>| found.and_then(|found| found.ratio);
    Ok(Retention {
        groups,
        score: ratio(score),
        difference: score.map(|found| found.difference),
        mean_of_groups: ratio(of_groups),
        mean_of_questions: ratio(of_questions),
        likelihood: None,
        resamples: RESAMPLES,
        seed,
    })
}

/// The answers, each repeated once per group.
fn once_per_group(answers: &[Answer]) -> impl Iterator<Item = &Answer> {
    answers.iter().flat_map(|answer| answer.groups().map(move |_| answer))
}

/// The metric of the answers, if all have the same one.
fn metric_of_all(answers: &[&Answer]) -> Option<&'static Metric> {
    let first = &answers.first()?.metric;
    answers.iter().all(|answer| answer.metric == *first).then(|| metric_named(first)).flatten()
}

fn score_of(answers: &[&Answer]) -> fn(&[Judged]) -> f64 {
    metric_of_all(answers).map_or(mean_score, |metric| metric.score)
}

fn figures(metric: &Metric, rows: &[Judged]) -> BTreeMap<String, f64> {
    (metric.figures)(rows).into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

/// Answers in the form of metric inputs: units and strata become numbers; an answer without a
/// unit is a unit of its own.
fn judged(answers: &[&Answer]) -> Vec<Judged> {
    let mut units: HashMap<&str, usize> = HashMap::new();
    let mut strata: HashMap<&str, usize> = HashMap::new();
    let mut rows = Vec::with_capacity(answers.len());
    for (number, answer) in answers.iter().enumerate() {
        // Numbers of named units follow those of answers without a unit.
        let named = answers.len() + units.len();
        let next = strata.len();
        rows.push(Judged {
            score: answer.score,
            unit: answer.unit.as_deref().map_or(number, |name| *units.entry(name).or_insert(named)),
            stratum: answer.stratum.as_deref().map_or(usize::MAX, |name| *strata.entry(name).or_insert(next)),
            truth: answer.truth == Some(true),
            answered_yes: read_yes_no(&answer.prediction) == Some(true),
            unjudged: answer.unjudged,
        });
    }
    rows
}

/// Pairs of answers for the bootstrap, grouped by unit. Each counts as many times as it is in the group `name`, or in
/// any group if `name` is `None`.
fn stratum(pairs: &[(&Answer, &Answer)], name: Option<&str>) -> Stratum {
    let models: Vec<&Answer> = pairs.iter().map(|pair| pair.0).collect();
    let baselines: Vec<&Answer> = pairs.iter().map(|pair| pair.1).collect();
    let mut places: HashMap<usize, usize> = HashMap::new();
    let mut units: Vec<Vec<(Judged, Judged)>> = Vec::new();
    for ((answer, model), baseline) in models.iter().zip(judged(&models)).zip(judged(&baselines)) {
        let place = *places.entry(model.unit).or_insert(units.len());
        if place == units.len() {
            units.push(Vec::new());
        }
        let counted = answer.groups().filter(|group| name.is_none_or(|name| name == *group));
        units[place].extend(counted.map(|_| (model, baseline)));
    }
    Stratum { units, score: score_of(&models) }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

#[cfg(test)]
#[path = "summary_tests.rs"]
mod tests;
