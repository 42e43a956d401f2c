//! Finds the place of every finetuned tensor.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::{Cancel, Error, Result};
use crate::checkpoint::{Checkpoint, Tuned, floats};
use crate::quantised::WeightLayout;

use super::covered::Covered;
use super::index::{Change, RowPlace};
use super::matching::Match;
use super::nearest;
use super::part::{Absent, ModelPart};
use super::place::{Position, chosen, is_vision, layer_of};
use super::scan::{Made, Other, Seen, scan};
use super::table::{GraftPlan, GraftTable, MatchedWeight, Unmatched};
use super::values::Values;

/// Finds the place of every finetuned tensor.
///
/// Errors: `Error::Invalid` when a name to leave out is none of the base's, and when no matrix of the graphs is in the base,
/// so that it is not the graphs' checkpoint; `Error::Interrupted` on Ctrl-C.
pub fn find(
    parts: &[ModelPart],
    base: &Checkpoint,
    tuned: &Tuned,
    absent: &Absent,
    cancel: &Cancel,
) -> Result<GraftTable> {
    let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
    if let Some(unknown) =
        absent.names.iter().find(|prefix| !names.iter().any(|name| name.starts_with(prefix.as_str())))
    {
        return Err(Error::invalid(format!("`{unknown}`"), "begins the name of no tensor of the base")
            .remedy("leave out names as `--dry-run` prints them"));
    }
    let changed = tuned.changed(base)?;
    let values = Values::new(base, tuned, &names);
    let mut finder = Finder { values, covered: Covered::new(base), changed, table: GraftTable::default() };
    for seen in scan(parts, base, cancel)? {
        match seen {
            Seen::Made(made) => finder.matched(parts, made)?,
            Seen::Other(other) => finder.table.kept.push(other.described(parts)),
        }
    }
    let Finder { mut values, covered, changed, mut table } = finder;
    sort_unmatched(&mut table, &changed, &covered, &mut values, absent)?;
    nearest::fill(&mut table, parts, base)?;
    Ok(table)
}

/// Sorts finetuned tensors that are nowhere into those of pruned layers and the others.
fn sort_unmatched(
    table: &mut GraftTable,
    changed: &BTreeSet<String>,
    covered: &Covered,
    values: &mut Values,
    absent: &Absent,
) -> Result<()> {
    for name in changed {
        let Some(number) = values.names.iter().position(|other| other == name) else { continue };
        let tensor = &values.base.tensors()[name];
        let missing = covered.missing(number);
        if missing.is_empty() {
            continue;
        }
        let (before, after) = (floats(tensor).ok(), values.of(number)?);
        let moved =
            before.is_none_or(|before| missing.iter().any(|range| before[range.clone()] != after[range.clone()]));
        if !moved {
            continue;
        }
        if !is_vision(name) && layer_of(name).is_some_and(|layer| absent.layers.contains(&layer)) {
            table.pruned.push(name.clone());
            continue;
        }
        if absent.names.iter().any(|prefix| name.starts_with(prefix.as_str())) {
            table.left_out.push(name.clone());
            continue;
        }
        table.homeless.push(Unmatched {
            component: None,
            name: name.clone(),
            shape: tensor.dims.clone(),
            nearest: None,
            reason: None,
        });
    }
    Ok(())
}

/// What is found while the weights of all parts are looked at.
struct Finder<'a> {
    values: Values<'a>,
    covered: Covered,
    changed: BTreeSet<String>,
    table: GraftTable,
}

impl Finder<'_> {
    fn matched(&mut self, parts: &[ModelPart], made: Made) -> Result<()> {
        let Made { part, target, dims, found } = made;
        let (id, owner) = (target.id(), &parts[part]);
        let name = owner.model.graph.name(id);
        let position = Position::of(owner, name);
        let values = &mut self.values;
        let places = match chosen(&found, &position, values.base, |piece, a, b| values.same(piece, a, b))? {
            Ok(places) => places,
            Err(reason) => {
                let other = Other { part, id, dims, reason: Some(reason) };
                self.table.kept.push(other.described(parts));
                return Ok(());
            }
        };
        self.covered.add(&found, &places, |piece, a, b| values.same(piece, a, b))?;
        let tensors = tensors_of(&places, values.names);
        self.table.weights.push(MatchedWeight {
            component: owner.file.to_string(),
            initializer: name.to_string(),
            shape: dims,
            how: describe_match(&found, &tensors) + &target.quantisation(),
            changed: tensors.iter().any(|tensor| self.changed.contains(tensor)),
            tensors,
            plan: GraftPlan { part, target, found, places },
        });
        Ok(())
    }
}

fn tensors_of(places: &[RowPlace], names: &[&str]) -> Vec<String> {
    let mut tensors: Vec<String> = places.iter().map(|place| names[place.tensor].to_string()).collect();
    let mut seen = BTreeMap::new();
    tensors.retain(|name| seen.insert(name.clone(), ()).is_none());
    tensors
}

fn describe_match(found: &Match, tensors: &[String]) -> String {
    let mut words = vec![match (found.layout, tensors.len()) {
        (_, 2..) => "joined",
        (WeightLayout::Columns, _) => "transposed",
        _ => "equal",
    }];
    if tensors.len() > 1 && found.layout == WeightLayout::Columns {
        words.push("transposed");
    }
    if found.pieces.iter().any(|piece| piece.change == Change::PlusOne) {
        words.push("plus one");
    }
    if found.pieces.iter().any(|piece| matches!(piece.change, Change::Scale(_))) {
        words.push("scaled");
    }
    words.join(", ")
}
