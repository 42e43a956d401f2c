//! Finds the place of every finetuned tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::base::{Cancel, Error, Progress, Result, list_preview};
use crate::checkpoint::{Checkpoint, Tuned, floats};
use crate::ir::{Tensor, ValueId};
use crate::quantised::{Blocks, Channels, Layout, RANGES, SCHEMES, block_matrices, channel_matrices};

use super::covered::Covered;
use super::index::{Change, Place};
use super::matching::{Match, Matcher};
use super::nearest;
use super::part::{Absent, Part, weights_of};
use super::place::{Position, chosen, is_vision, layer_of};
use super::table::{GraftTable, MatchedWeight, Plan, Target, Unmatched};
use super::values::{Values, rows_of};

/// Finds the place of every finetuned tensor.
///
/// Errors: `Error::Invalid` when a name to leave out is none of the base's, and when no matrix of the graphs is in the base, so that it is not the graphs' checkpoint;
/// `Error::Interrupted` on Ctrl-C.
pub fn find(parts: &[Part], base: &Checkpoint, tuned: &Tuned, absent: &Absent, cancel: &Cancel) -> Result<GraftTable> {
    let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
    let values = Values::new(base, tuned, &names);
    let (matcher, covered) = (Matcher::new(base), Covered::new(base));
    if let Some(unknown) =
        absent.names.iter().find(|prefix| !names.iter().any(|name| name.starts_with(prefix.as_str())))
    {
        return Err(Error::invalid(format!("`{unknown}`"), "begins the name of no tensor of the base")
            .remedy("leave out names as `--dry-run` prints them"));
    }
    let changed = tuned.changed(base)?;
    let mut finder = Finder { matcher, values, covered, changed, table: GraftTable::default() };
    let total: usize = parts.iter().map(|part| weights_of(&part.model.graph.body).len()).sum();
    let progress = Progress::new("matching weights", "weights", total as u64);
    for (number, part) in parts.iter().enumerate() {
        let blocks = block_matrices(&part.model.graph.body);
        let channels = channel_matrices(&part.model.graph.body);
        for matrix in &blocks {
            cancel.check("nothing was written")?;
            finder.blocks(number, part, matrix)?;
        }
        for matrix in &channels {
            cancel.check("nothing was written")?;
            finder.channels(number, part, matrix)?;
        }
        let of_blocks = blocks.iter().flat_map(|m| [Some(m.numbers), Some(m.scales), m.zeros]);
        let of_channels = channels.iter().flat_map(|m| [Some(m.numbers), Some(m.scales), m.zeros]);
        let inside: BTreeSet<ValueId> = of_blocks.chain(of_channels).flatten().collect();
        for (id, weight) in weights_of(&part.model.graph.body) {
            cancel.check("nothing was written")?;
            progress.advance(1);
            if weight.dtype.is_float() && weight.element_count() > 1 && !inside.contains(&id) {
                finder.floats(number, part, id, weight)?;
            }
        }
    }
    drop(progress);
    let Finder { mut values, covered, changed, mut table, .. } = finder;
    if !table.weights.iter().any(|weight| weight.shape.iter().filter(|&&size| size > 1).count() > 1) {
        return Err(Error::invalid(format!("`{}`", base.path().display()), "holds none of the matrices of the graphs")
            .remedy("give as base the checkpoint that the ONNX files were exported from"));
    }
    lost(&mut table, &changed, &covered, &mut values, absent)?;
    nearest::fill(&mut table, parts, base)?;
    Ok(table)
}

/// Sorts finetuned tensors that are nowhere into those of pruned layers and the others.
fn lost(
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
    matcher: Matcher<'a>,
    values: Values<'a>,
    covered: Covered,
    changed: BTreeSet<String>,
    table: GraftTable,
}

impl Finder<'_> {
    fn floats(&mut self, number: usize, part: &Part, id: ValueId, weight: &Tensor) -> Result<()> {
        match self.matcher.find(weight)? {
            Some(found) => self.matched(number, part, Target::Floats(id), &weight.dims, found),
            None => {
                self.keep(part, id, &weight.dims, None);
                Ok(())
            }
        }
    }

    fn blocks(&mut self, number: usize, part: &Part, blocks: &Blocks) -> Result<()> {
        let body = &part.model.graph.body;
        let dims = blocks.shape().dims;
        let (values, steps) = blocks.dequantised(body)?;
        let Some(found) = self.matcher.find_near(&values, &steps, blocks.columns)? else {
            self.keep(part, blocks.numbers, &dims, None);
            return Ok(());
        };
        match blocks.scheme(&self.original(&blocks.shape(), &found)?, body)? {
            Some(scheme) => self.matched(number, part, Target::Blocks(blocks.clone(), scheme), &dims, found),
            None => {
                let schemes = SCHEMES.iter().map(|scheme| scheme.name).collect();
                self.keep_rounded(part, blocks.numbers, &dims, &found, schemes);
                Ok(())
            }
        }
    }

    fn channels(&mut self, number: usize, part: &Part, channels: &Channels) -> Result<()> {
        let body = &part.model.graph.body;
        for channels in [Some(channels.clone()), channels.turned()].into_iter().flatten() {
            let dims = channels.shape().dims;
            let (values, steps) = channels.dequantised(body)?;
            let Some(found) = self.matcher.find_near(&values, &steps, channels.columns())? else { continue };
            return match channels.scheme(&self.original(&channels.shape(), &found)?, body)? {
                Some(range) => self.matched(number, part, Target::Channels(channels, range), &dims, found),
                None => {
                    let schemes = RANGES.iter().map(|range| range.name).collect();
                    self.keep_rounded(part, channels.numbers, &dims, &found, schemes);
                    Ok(())
                }
            };
        }
        self.keep(part, channels.numbers, &channels.shape().dims, None);
        Ok(())
    }

    /// The base's values of a quantised matrix, row by row.
    fn original(&self, matrix: &Tensor, found: &Match) -> Result<Vec<f32>> {
        let first: Vec<Place> = found.pieces.iter().map(|piece| piece.places[0]).collect();
        let (base, names) = (self.values.base, self.values.names);
        rows_of(matrix, found, &first, |number| Ok(Rc::new(floats(&base.tensors()[names[number]])?)))
    }

    /// Keeps a quantised matrix whose rounding is not known.
    fn keep_rounded(&mut self, part: &Part, id: ValueId, dims: &[u64], found: &Match, schemes: Vec<&str>) {
        let tensor = self.values.names[found.pieces[0].places[0].tensor];
        let known = list_preview(&schemes, 6);
        let reason = format!("it is made of `{tensor}`, but no known rounding ({known}) gives its bytes");
        self.keep(part, id, dims, Some(reason));
    }

    fn matched(&mut self, number: usize, part: &Part, target: Target, dims: &[u64], found: Match) -> Result<()> {
        let id = target.id();
        let name = part.model.graph.name(id);
        let position = Position { name, layer: part.layers.get(name).copied(), vision: part.vision };
        let values = &mut self.values;
        let places = match chosen(&found, &position, values.base, |piece, a, b| values.same(piece, a, b))? {
            Ok(places) => places,
            Err(reason) => {
                self.keep(part, id, dims, Some(reason));
                return Ok(());
            }
        };
        self.covered.add(&found, &places, |piece, a, b| values.same(piece, a, b))?;
        let tensors = tensors_of(&places, values.names);
        self.table.weights.push(MatchedWeight {
            component: part.file.to_string(),
            initializer: name.to_string(),
            shape: dims.to_vec(),
            how: how(&found, &tensors) + &target.quantisation(),
            changed: tensors.iter().any(|tensor| self.changed.contains(tensor)),
            tensors,
            plan: Plan { part: number, target, found, places },
        });
        Ok(())
    }

    fn keep(&mut self, part: &Part, id: ValueId, dims: &[u64], reason: Option<String>) {
        self.table.kept.push(Unmatched {
            component: Some(part.file.to_string()),
            name: part.model.graph.name(id).to_string(),
            shape: dims.to_vec(),
            nearest: None,
            reason,
        });
    }
}

fn tensors_of(places: &[Place], names: &[&str]) -> Vec<String> {
    let mut tensors: Vec<String> = places.iter().map(|place| names[place.tensor].to_string()).collect();
    let mut seen = BTreeMap::new();
    tensors.retain(|name| seen.insert(name.clone(), ()).is_none());
    tensors
}

fn how(found: &Match, tensors: &[String]) -> String {
    let mut words = vec![match (found.layout, tensors.len()) {
        (_, 2..) => "joined",
        (Layout::Columns, _) => "transposed",
        _ => "equal",
    }];
    if tensors.len() > 1 && found.layout == Layout::Columns {
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
