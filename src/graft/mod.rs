//! Writes finetuned weights into an ONNX graph that exists: each weight of the graph is matched by content to tensors of the
//! checkpoint that it was exported from, and gets their finetuned values.

mod blocks;
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

use blocks::{Blocks, Scheme, quantised};
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

/// What of the checkpoint the graphs do not have.
#[derive(Clone, Debug, Default)]
pub struct Absent {
    /// Dropped layers of the language model, counted as in the model that was never pruned.
    pub layers: BTreeSet<usize>,
    /// Beginnings of names of tensors that the user leaves out.
    pub names: Vec<String>,
}

/// A weight that is made of tensors of the checkpoint.
#[derive(Clone, Serialize, JsonSchema)]
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

/// Where the finetuned values of a weight come from and go to.
#[derive(Clone)]
struct Plan {
    part: usize,
    target: Target,
    found: Match,
    places: Vec<Place>,
}

/// What a weight is in the graph.
#[derive(Clone)]
enum Target {
    /// One initializer of floating-point numbers.
    Floats(ValueId),
    /// Initializers of a quantised matrix.
    Blocks(Blocks, &'static Scheme),
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
#[derive(Clone, Default, Serialize, JsonSchema)]
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
    /// Finetuned tensors that have no place and that the user leaves out.
    pub left_out: Vec<String>,
}

impl GraftTable {
    /// Finds the place of every finetuned tensor.
    ///
    /// Errors: `Error::Invalid` when a name to leave out is none of the base's, and when no matrix of the graphs is in the base, so that it is not the graphs' checkpoint;
    /// `Error::Interrupted` on Ctrl-C.
    pub fn find(parts: &[Part], base: &Checkpoint, tuned: &Tuned, absent: &Absent, cancel: &Cancel) -> Result<Self> {
        let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
        let values = Values { base, tuned, names: &names, last: None };
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
            let matrices = quantised(&part.model.graph.body);
            for matrix in &matrices {
                finder.blocks(number, part, matrix)?;
            }
            let inside =
                |id: ValueId| matrices.iter().any(|m| id == m.numbers || id == m.scales || m.zeros == Some(id));
            for (id, weight) in weights_of(&part.model.graph.body) {
                cancel.check("nothing was written")?;
                progress.advance(1);
                if weight.dtype.is_float() && weight.element_count() > 1 && !inside(id) {
                    finder.floats(number, part, id, weight)?;
                }
            }
        }
        drop(progress);
        let Finder { mut values, covered, changed, mut table, .. } = finder;
        if !table.weights.iter().any(|weight| weight.shape.iter().filter(|&&size| size > 1).count() > 1) {
            return Err(Error::invalid(
                format!("`{}`", base.path().display()),
                "holds none of the matrices of the graphs",
            )
            .remedy("give as base the checkpoint that the ONNX files were exported from"));
        }
        table.lost(&changed, &covered, &mut values, absent)?;
        nearest::fill(&mut table, parts, base)?;
        Ok(table)
    }

    /// Sorts finetuned tensors that are nowhere into those of pruned layers and the others.
    fn lost(
        &mut self,
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
                self.pruned.push(name.clone());
                continue;
            }
            if absent.names.iter().any(|prefix| name.starts_with(prefix.as_str())) {
                self.left_out.push(name.clone());
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
             exporter folded into others cannot be taken apart: export the finetuned model anew; leave tensors out that \
             these files do not have (`--leave-out NAME`)",
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
        for weight in &self.weights {
            progress.advance(1);
            if !weight.changed {
                continue;
            }
            let Plan { part, target, found, places } = &weight.plan;
            let body = &parts[*part].model.graph.body;
            match target {
                Target::Floats(id) => {
                    let Some((_, tensor)) = weights_of(body).into_iter().find(|(other, _)| other == id) else {
                        continue;
                    };
                    put(*part, *id, composed(tensor, found, places, |number| values.of(number))?)?;
                }
                Target::Blocks(blocks, scheme) => {
                    let matrix = blocks.shape();
                    let bytes = composed(&matrix, found, places, |number| values.of(number))?;
                    let numbers = floats(&Tensor::from_bytes(matrix.dtype, &matrix.dims, bytes))?;
                    let packed = blocks.quantise(&numbers, scheme, body)?;
                    put(*part, blocks.numbers, packed.numbers)?;
                    put(*part, blocks.scales, packed.scales)?;
                    if let (Some(id), Some(bytes)) = (blocks.zeros, packed.zeros) {
                        put(*part, id, bytes)?;
                    }
                }
            }
        }
        Ok(())
    }
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
        let first: Vec<Place> = found.pieces.iter().map(|piece| piece.places[0]).collect();
        let base = self.values.base;
        let original = |number: usize| Ok(Rc::new(floats(&base.tensors()[self.values.names[number]])?));
        let matrix = blocks.shape();
        let bytes = composed(&matrix, &found, &first, original)?;
        let original = floats(&Tensor::from_bytes(matrix.dtype, &dims, bytes))?;
        match blocks.scheme(&original, body)? {
            Some(scheme) => self.matched(number, part, Target::Blocks(blocks.clone(), scheme), &dims, found),
            None => {
                let schemes: Vec<&str> = blocks::SCHEMES.iter().map(|scheme| scheme.name).collect();
                let reason = format!(
                    "it is made of `{}`, but no known rounding ({}) gives its bytes",
                    self.values.names[first[0].tensor],
                    list_preview(&schemes, 4)
                );
                self.keep(part, blocks.numbers, &dims, Some(reason));
                Ok(())
            }
        }
    }

    fn matched(&mut self, number: usize, part: &Part, target: Target, dims: &[u64], found: Match) -> Result<()> {
        let id = match &target {
            Target::Floats(id) => *id,
            Target::Blocks(blocks, _) => blocks.numbers,
        };
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
        let mut how = how(&found, &tensors);
        if let Target::Blocks(blocks, scheme) = &target {
            how += &format!(", {} bits {}", blocks.bits, scheme.name);
        }
        self.table.weights.push(MatchedWeight {
            component: part.file.to_string(),
            initializer: name.to_string(),
            shape: dims.to_vec(),
            how,
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
