//! MIA-Bench: a language model grades how well an answer follows each component of its instruction.
//!
//! The question to the judge has our own wording; the form of the reply and its parsing are VLMEvalKit's.

use crate::base::{Error, Result};
use crate::data::{BenchRow, Benchmark, string_list};

/// The grades of one answer, 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Grades {
    /// By the component's type, in the order of the reply.
    pub components: Vec<(String, f64)>,
    pub total: f64,
}

/// The question to the judge about an answer.
///
/// Errors: `Error::Invalid` naming the row when a component or its weight is missing.
pub fn grading_question(benchmark: &Benchmark, row: &BenchRow, answer: &str) -> Result<String> {
    let subject = || format!("row `{}` of the benchmark", row.index);
    let cell = |column: &str| {
        benchmark.cell(row, column).ok_or_else(|| {
            Error::invalid(subject(), format!("has no `{column}`"))
                .remedy("expected MIA-Bench's columns: question, components, component_weight, component_type")
        })
    };
    let list = |column: &str| -> Result<Vec<String>> {
        let text = cell(column)?;
        string_list(text).filter(|list| !list.is_empty()).ok_or_else(|| {
            Error::invalid(subject(), format!("`{column}` is `{text}`")).remedy("expected a list, as in ['a', 'b']")
        })
    };
    let (components, weights) = (list("components")?, list("component_weight")?);
    if components.len() != weights.len() {
        let problem = format!("has {} components and {} weights", components.len(), weights.len());
        return Err(Error::invalid(subject(), problem).remedy("give a weight for each component"));
    }
    let parts: String = components
        .iter()
        .zip(&weights)
        .enumerate()
        .map(|(number, (component, weight))| format!("{}. ({weight} points) {component}\n", number + 1))
        .collect();
    let form: Vec<String> = weights
        .iter()
        .enumerate()
        .map(|(number, weight)| format!("score of component {}: x/{weight}", number + 1))
        .collect();
    Ok(format!(
        "Grade an answer about this picture strictly. The instruction was:\n{}\n\nIt has these components:\n{parts}\n\
         The answer was:\n{answer}\n\nGive each component a whole number of points up to its maximum, by how well the \
         answer follows it. The total is out of 10. Begin your reply with one sentence of exactly this form:\n{}, total \
         score: z/10.\nThen say why.",
        cell("question")?,
        form.join(", ")
    ))
}

/// Parses a judge's reply: the first sentence is a comma-separated list whose last item is the total. `types` is the
/// cell `component_type`. `None` for a reply of another form, which is left out of all scores.
pub fn read_grades(types: &str, reply: &str) -> Option<Grades> {
    let types: Vec<char> = types.chars().collect();
    let types: String = types.get(2..types.len().saturating_sub(2)).unwrap_or_default().iter().collect();
    let types: Vec<&str> = types.split("', '").collect();
    let items: Vec<&str> = reply.split('.').next().unwrap_or_default().split(',').collect();
    let (last, first) = items.split_last().filter(|(_, first)| !first.is_empty())?;
    let mut components: Vec<(String, f64)> = Vec::new();
    for (number, item) in first.iter().enumerate() {
        let (kind, grade) = (types.get(number)?.to_string(), grade(item)?);
        match components.iter_mut().find(|(known, _)| *known == kind) {
            // Of two components of one type the later one counts.
            Some((_, known)) => *known = grade,
            None => components.push((kind, grade)),
        }
    }
    Some(Grades { components, total: grade(last)? })
}

/// The fraction in `name: 3/4`: the text after the first colon and one more character.
fn grade(item: &str) -> Option<f64> {
    let text = item.split(':').nth(1)?;
    let rest: String = text.chars().skip(1).collect();
    let mut parts = rest.split('/');
    let (points, most) = (whole(parts.next()?)?, whole(parts.next()?)?);
    (most != 0.0).then_some(points / most)
}

/// An integer by the rules of Python's `int`.
fn whole(text: &str) -> Option<f64> {
    let text = text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c));
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let grouped = digits.split('_').all(|group| !group.is_empty() && group.chars().all(|c| c.is_ascii_digit()));
    let plain = text.replace('_', "");
    if grouped { plain.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Golden {
        grades: Vec<Reply>,
        averages: BTreeMap<String, f64>,
    }

    #[derive(Deserialize)]
    struct Reply {
        types: String,
        reply: String,
        components: BTreeMap<String, f64>,
        total: Option<f64>,
    }

    /// `scripts/vlmevalkit/prompts.py` computes the values.
    #[test]
    fn judge_replies_are_parsed_as_in_vlmevalkit() {
        let text = std::fs::read_to_string("fixtures/vlmevalkit/prompts.json").unwrap();
        let golden: Golden = serde_json::from_str(&text).unwrap();
        let mut found: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for want in &golden.grades {
            let grades = read_grades(&want.types, &want.reply);
            assert_eq!(grades.as_ref().map(|grades| grades.total), want.total, "{} {}", want.types, want.reply);
            for (kind, grade) in grades.iter().flat_map(|grades| &grades.components) {
                assert_eq!(Some(grade), want.components.get(kind), "{}", want.reply);
                found.entry(kind.clone()).or_default().push(*grade);
            }
            found.entry("total_score".into()).or_default().extend(grades.map(|grades| grades.total));
        }
        for (kind, want) in &golden.averages {
            let own = &found[kind];
            assert!((own.iter().sum::<f64>() / own.len() as f64 - want).abs() < 1e-12, "{kind}");
        }
    }
}
