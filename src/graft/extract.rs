//! Takes the tensors of a checkpoint out of graphs whose weights may have changed since the export.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use crate::base::{Cancel, Error, Result, findings_preview, list_preview};
use crate::checkpoint::{Checkpoint, floats, from_floats};
use crate::ir::{DataType, Tensor, ValueId};
use crate::quantised::{Blocks, Channels, block_matrices, channel_matrices};

use super::covered::Covered;
use super::matching::Match;
use super::part::{ModelPart, weights_of};
use super::place::{Position, candidates, stack_of};
use super::scan::{Made, Seen, scan};
use super::table::{Target, Unmatched};

/// The tensors of a checkpoint, with the values that graphs give them.
pub struct Extraction<'a> {
    base: &'a Checkpoint,
    names: Vec<&'a str>,
    current: &'a [ModelPart<'a>],
    sources: Vec<Source>,
    /// Where changed elements come from, by tensor.
    changed: BTreeMap<usize, Vec<Origin>>,
    /// Weights of the graphs that are made of no tensor: tables of rotations, masks.
    pub unmatched: Vec<Unmatched>,
    /// Tensors with elements that are in no graph.
    pub missing: Vec<String>,
    /// Beginnings of the names of tensors of layers, up to the layer's number: those of a vision encoder, and the others.
    pub stacks: BTreeMap<bool, BTreeSet<String>>,
}

/// A tensor with the graphs' values.
pub struct Extracted {
    /// Element type: the checkpoint's, or f32 where the graph's is another one.
    pub dtype: DataType,
    /// Elements in row-major order.
    pub bytes: Vec<u8>,
}

/// A weight that changed since the export.
struct Source {
    part: usize,
    target: Target,
    found: Match,
    name: String,
}

/// Elements of a tensor that a weight holds.
struct Origin {
    source: usize,
    /// Number of the piece of the source's match.
    piece: usize,
    /// Elements of the tensor.
    range: Range<usize>,
}

/// Matches graphs with a checkpoint and finds what changed. `reference` are the graphs before any weight changed, `current`
/// those with the values to take, component by component under the same names; both may be the same graphs.
///
/// Errors: as the matching of `graft`; `Error::Invalid` naming the weights when one that changed is made of no tensor, could
/// be made of several, was added since, or is tied in the checkpoint to one with other values; `Error::Interrupted`.
pub fn extract<'a>(
    reference: &[ModelPart],
    current: &'a [ModelPart<'a>],
    base: &'a Checkpoint,
    cancel: &Cancel,
) -> Result<Extraction<'a>> {
    let names: Vec<&str> = base.tensors().keys().map(String::as_str).collect();
    let mut taker = Taker {
        reference,
        current,
        targets: current.iter().map(Targets::of).collect(),
        covered: Covered::new(base),
        unchanged: BTreeMap::new(),
        votes: BTreeMap::new(),
        problems: Vec::new(),
        made: Extraction {
            base,
            names,
            current,
            sources: Vec::new(),
            changed: BTreeMap::new(),
            unmatched: Vec::new(),
            missing: Vec::new(),
            stacks: BTreeMap::new(),
        },
    };
    for seen in scan(reference, base, cancel)? {
        match seen {
            Seen::Made(made) => taker.take(made)?,
            Seen::Other(other) => {
                let (was, is) = (&reference[other.part], &current[other.part]);
                let described = other.described(reference);
                if let Some(now) = weight_named(is, &described.name)
                    && !weight_named(was, &described.name).is_some_and(|before| same(before, now))
                {
                    taker
                        .problems
                        .push(format!("`{}` changed, and no tensor of the base has its former values", described.name));
                }
                taker.made.unmatched.push(described);
            }
        }
    }
    taker.added();
    taker.tied();
    taker.finish()
}

/// The quantised matrices and the floating-point weights of a part by the name of their first initializer.
struct Targets {
    blocks: HashMap<String, Blocks>,
    channels: HashMap<String, Channels>,
    floats: HashMap<String, ValueId>,
}

impl Targets {
    fn of(part: &ModelPart) -> Self {
        let (body, name) = (&part.model.graph.body, |id| part.model.graph.name(id).to_string());
        Targets {
            blocks: block_matrices(body).into_iter().map(|blocks| (name(blocks.numbers), blocks)).collect(),
            channels: channel_matrices(body).into_iter().map(|channels| (name(channels.numbers), channels)).collect(),
            floats: weights_of(body).into_iter().map(|(id, _)| (name(id), id)).collect(),
        }
    }

    /// What a weight of the reference is here.
    fn like(&self, target: &Target, name: &str) -> Option<Target> {
        Some(match target {
            Target::Floats(_) => Target::Floats(*self.floats.get(name)?),
            Target::Blocks(_, scheme) => Target::Blocks(self.blocks.get(name)?.clone(), scheme),
            Target::Channels(before, range) => {
                Target::Channels(self.channels.get(name)?.clone().in_order_of(before), range)
            }
        })
    }
}

struct Taker<'a, 'b> {
    reference: &'b [ModelPart<'b>],
    current: &'a [ModelPart<'a>],
    targets: Vec<Targets>,
    covered: Covered,
    /// Elements whose only place is known and that did not change, by tensor, with the weight's name.
    unchanged: BTreeMap<usize, Vec<(Range<usize>, String)>>,
    /// Layers that a beginning of names has, by tower.
    votes: BTreeMap<(bool, String), BTreeSet<usize>>,
    problems: Vec<String>,
    made: Extraction<'a>,
}

impl<'a> Taker<'a, '_> {
    fn take(&mut self, made: Made) -> Result<()> {
        let part = &self.reference[made.part];
        let name = part.model.graph.name(made.target.id()).to_string();
        let position = Position::of(part, &name);
        let now = self.targets[made.part].like(&made.target, &name);
        let current = &self.current[made.part];
        let changed = now.as_ref().is_some_and(|now| !same_target(part, &made.target, current, now));
        let mut origins = Vec::new();
        for (number, piece) in made.found.pieces.iter().enumerate() {
            let places = candidates(piece, &position, &self.made.names);
            piece.places.iter().for_each(|place| self.covered.note_piece(piece, *place));
            let [place] = places[..] else {
                if changed {
                    let mut tensors: Vec<&str> = places.iter().map(|place| self.made.names[place.tensor]).collect();
                    tensors.dedup();
                    let list = list_preview(&tensors, 4);
                    self.problems.push(format!("`{name}` changed, and its former values are those of {list}"));
                }
                continue;
            };
            let tensor = self.made.names[place.tensor];
            if let (Some(layer), Some((prefix, number, _))) = (position.layer, stack_of(tensor))
                && layer == number
            {
                self.votes.entry((part.vision, prefix.to_string())).or_default().insert(layer);
            }
            let begin = place.row * piece.length;
            origins.push((number, place.tensor, begin..begin + piece.rows * piece.length));
        }
        match now {
            Some(target) if changed => {
                let source = self.made.sources.len();
                self.made.sources.push(Source { part: made.part, target, found: made.found, name });
                for (piece, tensor, range) in origins {
                    self.made.changed.entry(tensor).or_default().push(Origin { source, piece, range });
                }
            }
            // A weight that is not here any more belongs to a dropped layer.
            Some(_) => {
                for (_, tensor, range) in origins {
                    self.unchanged.entry(tensor).or_default().push((range, name.clone()));
                }
            }
            None => {}
        }
        Ok(())
    }

    /// Weights of several numbers that the graphs did not have before.
    fn added(&mut self) {
        for (was, is) in self.reference.iter().zip(self.current) {
            let before: BTreeSet<&str> =
                weights_of(&was.model.graph.body).into_iter().map(|(id, _)| was.model.graph.name(id)).collect();
            for (id, tensor) in weights_of(&is.model.graph.body) {
                let name = is.model.graph.name(id);
                if tensor.dtype.is_float() && tensor.element_count() > 1 && !before.contains(name) {
                    self.problems.push(format!("`{name}` is not in the dense model's `{}`", was.file));
                }
            }
        }
    }

    /// Weights that are one tensor of the checkpoint, of which only some changed.
    fn tied(&mut self) {
        for (tensor, origins) in &self.made.changed {
            for origin in origins {
                let overlap = |range: &Range<usize>| range.start < origin.range.end && origin.range.start < range.end;
                let unchanged = self.unchanged.get(tensor).into_iter().flatten();
                if let Some((_, other)) = unchanged.into_iter().find(|(range, _)| overlap(range)) {
                    self.problems.push(format!(
                        "`{}` changed and `{other}` did not, and both are `{}` in the checkpoint",
                        self.made.sources[origin.source].name, self.made.names[*tensor]
                    ));
                }
            }
        }
    }

    fn finish(mut self) -> Result<Extraction<'a>> {
        if !self.problems.is_empty() {
            self.problems.sort();
            self.problems.dedup();
            let problem = format!("cannot be told apart: {}", findings_preview(&self.problems, 4));
            return Err(Error::invalid("weights of the graphs", problem).remedy(
                "give the model before it was trained with `--dense`, as the same exporter wrote it from this base; train \
                 layers without adapters that stay beside the weights",
            ));
        }
        for (number, name) in self.made.names.iter().enumerate() {
            if !self.covered.missing(number).is_empty() {
                self.made.missing.push(name.to_string());
            }
        }
        for vision in [false, true] {
            let parts = self.reference.iter().filter(|part| part.vision == vision);
            let layers: BTreeSet<usize> = parts.flat_map(|part| part.layers.values().copied()).collect();
            let stacks = self.votes.iter().filter(|((of, _), voted)| *of == vision && voted.is_superset(&layers));
            self.made.stacks.insert(vision, stacks.map(|((_, prefix), _)| prefix.clone()).collect());
        }
        self.made.check_others()?;
        Ok(self.made)
    }
}

impl Extraction<'_> {
    /// A matrix of the graphs and one of the checkpoint that have one size and no other match are most likely one matrix
    /// with two values, which no one can choose between.
    fn check_others(&self) -> Result<()> {
        let is_matrix = |dims: &[u64]| dims.iter().filter(|&&size| size > 1).count() > 1;
        let count = |dims: &[u64]| dims.iter().product::<u64>();
        let pairs = self.unmatched.iter().filter(|weight| weight.reason.is_none() && is_matrix(&weight.shape));
        let pairs: Vec<String> = pairs
            .filter_map(|weight| {
                let alike = self.missing.iter().find(|name| {
                    let tensor = &self.base.tensors()[*name];
                    is_matrix(&tensor.dims) && tensor.element_count() == count(&weight.shape)
                });
                Some(format!("`{}` and `{}`", weight.name, alike?))
            })
            .collect();
        if pairs.is_empty() {
            return Ok(());
        }
        let problem = format!("differ from tensors of the base that have their size: {}", findings_preview(&pairs, 4));
        Err(Error::invalid("weights of the graphs", problem).remedy(
            "give as base the very checkpoint that the ONNX files were exported from; with `--dense`, the model before it \
             was trained",
        ))
    }

    /// Names of the tensors that have other values than in the checkpoint.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        self.changed.keys().map(|&tensor| self.names[tensor])
    }

    /// The element type that a changed tensor gets; `None` for one that did not change.
    pub fn dtype(&self, name: &str) -> Option<DataType> {
        let own = self.base.tensors().get(name)?.dtype;
        let origins = self.changed.get(&self.names.binary_search(&name).ok()?)?;
        let of = |origin: &Origin| {
            let source = &self.sources[origin.source];
            match source.target {
                Target::Floats(id) => weight(&self.current[source.part], id).map(|tensor| tensor.dtype),
                _ => Some(DataType::Float),
            }
        };
        let kept = origins.iter().all(|origin| of(origin) == Some(own));
        Some(if kept { own } else { DataType::Float })
    }

    /// A tensor with the values of the graphs; `None` when they are the checkpoint's.
    ///
    /// Errors: `Error::Invalid` when two weights of the graphs give it different values.
    pub fn tensor(&self, name: &str) -> Result<Option<Extracted>> {
        let Some(dtype) = self.dtype(name) else { return Ok(None) };
        let number = self.names.binary_search(&name).unwrap_or_default();
        let mut numbers = floats(&self.base.tensors()[name])?;
        let mut written: Vec<(Range<usize>, &str)> = Vec::new();
        for origin in self.changed.get(&number).into_iter().flatten() {
            let source = &self.sources[origin.source];
            let values = self.piece(source, origin.piece)?;
            for (range, other) in &written {
                let overlap = range.start.max(origin.range.start)..range.end.min(origin.range.end);
                let own = overlap.clone().map(|place| values[place - origin.range.start]);
                if overlap.clone().zip(own).any(|(place, own)| numbers[place] != own) {
                    let problem = format!("is `{other}` and `{}` in the graphs, with different values", source.name);
                    return Err(Error::invalid(format!("tensor `{name}` of the checkpoint"), problem)
                        .remedy("train weights that the checkpoint ties together, or none of them"));
                }
            }
            numbers[origin.range.clone()].copy_from_slice(&values);
            written.push((origin.range.clone(), &source.name));
        }
        Ok(Some(Extracted { dtype, bytes: from_floats(dtype, &numbers)? }))
    }

    /// The checkpoint's numbers of one piece of a weight.
    fn piece(&self, source: &Source, number: usize) -> Result<Vec<f32>> {
        let part = &self.current[source.part];
        let body = &part.model.graph.body;
        let rows = match &source.target {
            Target::Floats(id) => match weight(part, *id) {
                Some(tensor) => {
                    let rows = source.found.layout.rows(tensor);
                    floats(&Tensor::from_bytes(tensor.dtype, &[tensor.element_count()], rows))?
                }
                None => Vec::new(),
            },
            Target::Blocks(blocks, _) => blocks.dequantised(body)?.0,
            Target::Channels(channels, _) => channels.dequantised(body)?.0,
        };
        let size = |piece: &super::matching::WeightPiece| piece.rows * piece.length;
        let begin: usize = source.found.pieces[..number].iter().map(size).sum();
        let piece = &source.found.pieces[number];
        Ok(rows[begin..begin + size(piece)].iter().map(|&number| piece.change.inverse(number)).collect())
    }
}

fn weight<'a>(part: &'a ModelPart, id: ValueId) -> Option<&'a Tensor> {
    weights_of(&part.model.graph.body).into_iter().find(|(other, _)| *other == id).map(|(_, tensor)| tensor)
}

fn weight_named<'a>(part: &'a ModelPart, name: &str) -> Option<&'a Tensor> {
    let graph = &part.model.graph;
    weights_of(&graph.body).into_iter().find(|(id, _)| graph.name(*id) == name).map(|(_, tensor)| tensor)
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype == b.dtype && a.dims == b.dims && a.bytes() == b.bytes()
}

/// True when all initializers of a weight are the same in both graphs.
fn same_target(was: &ModelPart, before: &Target, is: &ModelPart, now: &Target) -> bool {
    let (before, now) = (before.ids(), now.ids());
    before.len() == now.len()
        && before.iter().zip(&now).all(|(a, b)| match (weight(was, *a), weight(is, *b)) {
            (Some(a), Some(b)) => same(a, b),
            _ => false,
        })
}
