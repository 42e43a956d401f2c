//! Writes finetuned weights into an ONNX graph that exists: each weight of the graph is matched by content to tensors of the
//! checkpoint that it was exported from, and gets their finetuned values.

mod compose;
mod covered;
mod index;
mod matching;
mod nearest;
mod place;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use schemars::JsonSchema;
use serde::Serialize;

use crate::base::{Cancel, Error, Progress, Result, list_preview};
use crate::checkpoint::{Checkpoint, Tuned, floats};
use crate::ir::{Body, Model, Tensor, ValueId};

pub use compose::composed;
pub use index::{Change, Place};
pub use matching::{Match, Matcher, Piece};
pub use view::Layout;

use covered::Covered;
use place::{Position, chosen, is_vision, layer_of};

/// A component of a model with what places need to know of its weights.
pub struct Part<'a> {
    /// Path of the component below the model's folder.
    pub file: &'a str,
    /// Its graph.
    pub model: &'a Model,
    /// True for the vision encoder.
    pub vision: bool,
    /// The layer that alone reads an initializer, by the initializer's name, counted as in the model that was never pruned.
    pub layers: HashMap<String, usize>,
}

/// A weight that is made of tensors of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatchedWeight {
    /// Path of the component below the model's folder.
    pub component: String,
    /// Name of the initializer.
    pub initializer: String,
    /// Sizes of its axes.
    pub shape: Vec<u64>,
    /// How it is made of the tensors: `equal`, `transposed`, `joined`, with `plus one` or `scaled` where that was found.
    pub how: String,
    /// Tensors of the checkpoint, in order.
    pub tensors: Vec<String>,
    /// True when one of them was finetuned.
    pub changed: bool,
    #[serde(skip)]
    #[schemars(skip)]
    plan: Plan,
}

#[derive(Clone, Debug, PartialEq)]
struct Plan {
    part: usize,
    id: ValueId,
    found: Match,
    places: Vec<Place>,
}

/// A weight that is not made of the checkpoint's tensors, or a finetuned tensor that no weight is made of.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Unmatched {
    /// Path of the component; absent for a tensor of the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub component: Option<String>,
    /// Name of the initializer or the tensor.
    pub name: String,
    /// Sizes of its axes.
    pub shape: Vec<u64>,
    /// Most similar weight of the other side with as many elements; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nearest: Option<Nearest>,
    /// Reason where it is not only that the numbers are nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The most similar weight of the other side.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Nearest {
    /// Its name.
    pub name: String,
    /// Norm of the difference over the norm of the weight, in the better of both orders of a matrix.
    pub difference: f64,
}

/// What a graft would do.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GraftTable {
    /// Weights that are made of the checkpoint's tensors.
    pub weights: Vec<MatchedWeight>,
    /// Floating-point weights of two elements and more that are not, and stay: tables of rotations, masks, scales.
    pub kept: Vec<Unmatched>,
    /// Finetuned tensors that belong nowhere in the graphs. A graft is refused while there are any.
    pub homeless: Vec<Unmatched>,
    /// Finetuned tensors of layers that were pruned, which are left out.
    pub pruned: Vec<String>,
}

impl GraftTable {
    /// Finds the place of every finetuned tensor.
    ///
    /// `dropped` says whether a layer of the language model, counted as in the model that was never pruned, is gone.
    ///
    /// Errors: `Error::Invalid` when no matrix of the graphs is in the base, so that it is not the graphs' checkpoint;
    /// `Error::Interrupted` on Ctrl-C.
    pub fn find(
        parts: &[Part],
        base: &Checkpoint,
        tuned: &Tuned,
        dropped: &dyn Fn(usize) -> bool,
        cancel: &Cancel,
    ) -> Result<Self> {
        let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
        let changed = tuned.changed(base)?;
        let mut matcher = Matcher::new(base);
        let mut values = Values { base, tuned, names: &names, last: None };
        let mut covered = Covered::new(base);
        let mut table = GraftTable::default();
        let total: usize = parts.iter().map(|part| weights_of(&part.model.graph.body).len()).sum();
        let progress = Progress::new("matching weights", "weights", total as u64);
        for (number, part) in parts.iter().enumerate() {
            for (id, weight) in weights_of(&part.model.graph.body) {
                cancel.check("nothing was written")?;
                progress.advance(1);
                let name = part.model.graph.name(id);
                let position = Position { name, layer: part.layers.get(name).copied(), vision: part.vision };
                let kept = |reason: Option<String>| Unmatched {
                    component: Some(part.file.to_string()),
                    name: name.to_string(),
                    shape: weight.dims.clone(),
                    nearest: None,
                    reason,
                };
                let Some(found) = matcher.find(weight)? else {
                    if weight.dtype.is_float() && weight.element_count() > 1 {
                        table.kept.push(kept(None));
                    }
                    continue;
                };
                let same = |piece: &Piece, a: Place, b: Place| values.same(piece, a, b);
                let places = match chosen(&found, &position, base, same)? {
                    Ok(places) => places,
                    Err(reason) => {
                        table.kept.push(kept(Some(reason)));
                        continue;
                    }
                };
                covered.add(&found, &places, |piece, a, b| values.same(piece, a, b))?;
                let tensors = tensors_of(&places, &names);
                table.weights.push(MatchedWeight {
                    component: part.file.to_string(),
                    initializer: name.to_string(),
                    shape: weight.dims.clone(),
                    how: how(&found, &tensors),
                    changed: tensors.iter().any(|tensor| changed.contains(tensor)),
                    tensors,
                    plan: Plan { part: number, id, found, places },
                });
            }
        }
        drop(progress);
        if !table.weights.iter().any(|weight| weight.shape.iter().filter(|&&size| size > 1).count() > 1) {
            return Err(Error::invalid(
                format!("`{}`", base.path().display()),
                "holds none of the matrices of the graphs",
            )
            .remedy("give as base the checkpoint that the ONNX files were exported from"));
        }
        table.lost(&changed, &covered, &mut values, dropped)?;
        nearest::fill(&mut table, parts, base)?;
        Ok(table)
    }

    /// Sorts finetuned tensors that are nowhere into those of pruned layers and the others.
    fn lost(
        &mut self,
        changed: &BTreeSet<String>,
        covered: &Covered,
        values: &mut Values,
        dropped: &dyn Fn(usize) -> bool,
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
            if !is_vision(name) && layer_of(name).is_some_and(dropped) {
                self.pruned.push(name.clone());
                continue;
            }
            self.homeless.push(Unmatched {
                component: None,
                name: name.clone(),
                shape: tensor.dims.clone(),
                nearest: None,
                reason: None,
            });
        }
        Ok(())
    }

    /// Refuses what would lose a finetuned tensor.
    ///
    /// Errors: `Error::Invalid` that names the first tensors without a place, each with the nearest weight.
    pub fn check(&self) -> Result<()> {
        if self.homeless.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = self.homeless.iter().map(Unmatched::described).collect();
        let ambiguous =
            self.kept.iter().filter_map(|weight| Some(format!("`{}`: {}", weight.name, weight.reason.as_ref()?)));
        let ambiguous: Vec<String> = ambiguous.collect();
        let mut problem =
            format!("{} finetuned tensors belong nowhere in the graphs: {}", lines.len(), list_preview(&lines, 4));
        if !ambiguous.is_empty() {
            problem += &format!("; of the graphs' weights {}", list_preview(&ambiguous, 2));
        }
        Err(Error::invalid("graft", problem).remedy(
            "check with `--dry-run` that the base is the checkpoint that the graphs were exported from; weights that an \
             exporter folded into others cannot be taken apart: export the finetuned model anew",
        ))
    }

    /// The new elements of every weight that changes, handed to `put` one by one with the number of its part.
    ///
    /// Errors: those of `put`; `Error::Invalid` when a weight of the graph is not what was matched.
    pub fn apply(
        &self,
        parts: &[Part],
        base: &Checkpoint,
        tuned: &Tuned,
        mut put: impl FnMut(usize, ValueId, Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
        let mut values = Values { base, tuned, names: &names, last: None };
        let progress = Progress::new("writing weights", "weights", self.weights.len() as u64);
        let by_part: Vec<HashMap<ValueId, &Tensor>> =
            parts.iter().map(|part| weights_of(&part.model.graph.body).into_iter().collect()).collect();
        for weight in &self.weights {
            progress.advance(1);
            if !weight.changed {
                continue;
            }
            let Plan { part, id, found, places } = &weight.plan;
            let Some(tensor) = by_part.get(*part).and_then(|weights| weights.get(id)) else { continue };
            put(*part, *id, composed(tensor, found, places, |number| values.of(number))?)?;
        }
        Ok(())
    }
}

impl Unmatched {
    /// Name and nearest weight in one line.
    pub fn described(&self) -> String {
        match &self.nearest {
            Some(nearest) => format!("`{}` (nearest `{}`, {:.2} apart)", self.name, nearest.name, nearest.difference),
            None => format!("`{}` (nothing of its size {:?})", self.name, self.shape),
        }
    }
}

/// Finetuned values of the base's tensors, the last one kept.
struct Values<'a> {
    base: &'a Checkpoint,
    tuned: &'a Tuned,
    names: &'a [&'a str],
    last: Option<(usize, Rc<Vec<f32>>)>,
}

impl Values<'_> {
    fn of(&mut self, number: usize) -> Result<Rc<Vec<f32>>> {
        if let Some((last, values)) = &self.last
            && *last == number
        {
            return Ok(values.clone());
        }
        let values = Rc::new(self.tuned.floats(self.names[number], self.base)?);
        self.last = Some((number, values.clone()));
        Ok(values)
    }

    /// True when the finetuned rows of a piece are the same at both places.
    fn same(&mut self, piece: &Piece, a: Place, b: Place) -> Result<bool> {
        let range = |place: Place| place.row * piece.length..(place.row + piece.rows) * piece.length;
        let (left, right) = (self.of(a.tensor)?, self.of(b.tensor)?);
        Ok(left[range(a)] == right[range(b)])
    }
}

/// The initializers of a graph, those in branches included.
pub fn weights_of(body: &Body) -> Vec<(ValueId, &Tensor)> {
    let mut all: Vec<(ValueId, &Tensor)> = body.initializers.iter().map(|(id, tensor)| (*id, tensor)).collect();
    for inner in body.nodes.iter().flat_map(|node| node.bodies()) {
        all.extend(weights_of(inner));
    }
    all
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
