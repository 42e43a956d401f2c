//! Outputs that show the residual stream: lists with one output per layer, and their changes when layers are dropped.

use std::collections::BTreeMap;

use crate::analysis::{LayerMap, Tap};
use crate::ir::{Graph, ValueId};

use super::renumber::{digit_runs, padded_width};

/// A list of outputs with consecutive numbers in their names, one for the stream before (or after) each layer: the
/// `output_hidden_states` of transformers, with or without its first or last entry.
///
/// When a layer is dropped, its entry is removed and the others are renumbered. Outputs at some places only are not a
/// list, and all of them stay.
#[derive(Debug)]
pub struct Series {
    entries: Vec<Entry>,
    /// The number in the first entry's name.
    first: usize,
    /// Width to which numbers are padded with zeros.
    width: usize,
    /// Text before and after the number in the names.
    before: String,
    after: String,
}

#[derive(Debug)]
struct Entry {
    output: ValueId,
    /// The layer of the entry; `None` for the stream at the other end of the network.
    layer: Option<usize>,
}

/// Outputs by their place in the stream, and the width to which their numbers are padded.
type Numbered = (BTreeMap<usize, ValueId>, usize);

impl Series {
    /// The lists among a graph's outputs. `map` refers to the outputs by the same ids as `graph`.
    pub fn all(graph: &Graph, map: &LayerMap) -> Vec<Series> {
        let count = map.layers.len();
        // Grouped by the text around the number, and by the meaning of the number: the place, or
        // the layer before the place.
        let mut frames: BTreeMap<(String, String, bool), Numbered> = BTreeMap::new();
        for (output, place) in outputs_with_places(map) {
            let name = graph.name(output);
            for (start, end) in digit_runs(name) {
                let digits = &name[start..end];
                let number = digits.parse::<usize>().ok();
                let by_layer = number.and_then(|number| number.checked_add(1)) == Some(place);
                if number == Some(place) || by_layer {
                    let frame = (name[..start].to_string(), name[end..].to_string(), by_layer);
                    let (places, width) = frames.entry(frame).or_default();
                    places.insert(place, output);
                    *width = (*width).max(padded_width(digits));
                }
            }
        }
        let listed = frames.into_iter().filter_map(|((before, after, by_layer), (places, width))| {
            let (&start, &end) = (places.keys().next()?, places.keys().next_back()?);
            let whole = places.len() == end - start + 1 && places.len() >= count && count > 1;
            // In a list that begins with the embeddings, an entry belongs to the layer after it.
            let layer = |place: usize| if start == 0 { Some(place) } else { place.checked_sub(1) };
            let entries = places
                .into_iter()
                .map(|(place, output)| Entry { output, layer: layer(place).filter(|&layer| layer < count) });
            let first = start - usize::from(by_layer);
            whole.then(|| Series { entries: entries.collect(), first, width, before, after })
        });
        let mut lists: Vec<Series> = Vec::new();
        for list in listed {
            // When two numbers in the names would fit, the first one counts.
            let is_known =
                |entry: &Entry| lists.iter().flat_map(|list| &list.entries).any(|known| known.output == entry.output);
            if !list.entries.iter().any(is_known) {
                lists.push(list);
            }
        }
        lists
    }

    /// The outputs that belong to these layers.
    pub fn outputs_of(&self, layers: &[usize]) -> Vec<ValueId> {
        let gone = self.entries.iter().filter(|entry| entry.layer.is_some_and(|layer| layers.contains(&layer)));
        gone.map(|entry| entry.output).collect()
    }

    /// The new name of each output when these layers stay; `None` for removed ones.
    fn names(&self, kept: &[usize]) -> Vec<(ValueId, Option<String>)> {
        let (mut number, width) = (self.first, self.width);
        let mut names = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let stays = entry.layer.is_none_or(|layer| kept.contains(&layer));
            names.push((entry.output, stays.then(|| format!("{}{number:0width$}{}", self.before, self.after))));
            number += usize::from(stays);
        }
        names
    }

    /// Renumbers the outputs that stay.
    pub fn renumber(&self, graph: &mut Graph, kept: &[usize]) {
        let names = self.names(kept);
        // A removed output can still be read inside the graph.
        for &(output, _) in names.iter().filter(|(_, name)| name.is_none()) {
            let name = graph.fresh_name(&format!("{}.inner", graph.name(output)));
            graph.values[output.index()].name = name;
        }
        for (output, name) in names {
            if let Some(name) = name {
                graph.values[output.index()].name = name;
            }
        }
    }
}

/// Outputs that show the stream at exactly one place, including the result.
fn outputs_with_places(map: &LayerMap) -> impl Iterator<Item = (ValueId, usize)> + '_ {
    let taps = map.taps.iter().filter(|tap| tap.inside.is_empty());
    let places = taps.filter_map(|tap| match tap.places[..] {
        [place] => Some((tap.output, place)),
        _ => None,
    });
    places.chain([(map.result, map.layers.len())])
}

/// A change to an output that shows the residual stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedTap {
    /// Name of the output before.
    pub output: String,
    /// Name of the output now; `None` when it belonged to a dropped layer and was removed from its list.
    pub output_now: Option<String>,
    /// Places at which it read the stream: `i` is before layer `i`, the number of layers is
    /// after the last one. Ascending.
    pub before: Vec<usize>,
    /// The places now, in the new numbers of the layers.
    pub before_now: Vec<usize>,
}

/// The changes to outputs that show the stream when only the `kept` layers stay: names, or places. The place after the
/// last layer remains the place after the last layer. `map` refers to the outputs by the same ids as `graph`.
pub fn moved_taps(graph: &Graph, map: &LayerMap, kept: &[usize]) -> Vec<MovedTap> {
    let names: Vec<(ValueId, Option<String>)> =
        Series::all(graph, map).iter().flat_map(|list| list.names(kept)).collect();
    let behind_last = Tap { output: map.result, places: vec![map.layers.len()], inside: Vec::new() };
    let listed = |output: ValueId| names.iter().find(|(id, _)| *id == output).map(|(_, name)| name.clone());
    let result = Some(behind_last).filter(|tap| listed(tap.output).is_some());
    let all = map.taps.iter().chain(&result);
    let moved = all.map(|tap| {
        let output = graph.name(tap.output).to_string();
        let mut now: Vec<usize> =
            tap.places.iter().map(|place| kept.iter().filter(|layer| *layer < place).count()).collect();
        now.dedup();
        let output_now = listed(tap.output).unwrap_or_else(|| Some(output.clone()));
        let before_now = if output_now.is_some() { now } else { Vec::new() };
        MovedTap { output, output_now, before: tap.places.clone(), before_now }
    });
    let last = (map.layers.len(), kept.len());
    let same_place = |tap: &MovedTap| {
        let pairs = || tap.before.iter().copied().zip(tap.before_now.iter().copied());
        tap.before.len() == tap.before_now.len() && pairs().all(|pair| pair.0 == pair.1 || pair == last)
    };
    moved.filter(|tap| tap.output_now.as_ref() != Some(&tap.output) || !same_place(tap)).collect()
}
