//! Outputs that show the residual stream: lists with one of them for every layer, and what dropped layers change of each.

use std::collections::BTreeMap;

use crate::analysis::{LayerMap, Tap};
use crate::ir::{Graph, ValueId};

use super::renumber::{digit_runs, padded_width};

/// Outputs whose names are numbered without a gap, with one for the stream before, or behind, each layer: all of
/// transformers' `output_hidden_states`, or that list without its first or last entry.
///
/// The list of a network of fewer layers is shorter: without a layer its entry is not in the list, and the others are
/// numbered anew. A graph that shows the stream at some places only has no list, and all its outputs stay.
#[derive(Debug)]
pub struct Series {
    entries: Vec<Entry>,
    /// The number in the first entry's name.
    first: usize,
    /// Digits that numbers are padded to with zeros.
    width: usize,
    /// Text of the names before and behind the number.
    before: String,
    after: String,
}

#[derive(Debug)]
struct Entry {
    output: ValueId,
    /// The layer that it belongs to; the stream at the other end of the network belongs to none.
    layer: Option<usize>,
}

/// Outputs by the place that they show, and the digits that their numbers are padded to.
type Numbered = (BTreeMap<usize, ValueId>, usize);

impl Series {
    /// The lists among a graph's outputs. `map` names the outputs as `graph` does.
    pub fn all(graph: &Graph, map: &LayerMap) -> Vec<Series> {
        let count = map.layers.len();
        // By frame, and by whether names carry the place that is shown or the number of the layer before it.
        let mut frames: BTreeMap<(String, String, bool), Numbered> = BTreeMap::new();
        for (output, place) in shown(map) {
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
            // From the embeddings on, an entry is that of the layer behind it.
            let layer = |place: usize| if start == 0 { Some(place) } else { place.checked_sub(1) };
            let entries = places
                .into_iter()
                .map(|(place, output)| Entry { output, layer: layer(place).filter(|&layer| layer < count) });
            let first = start - usize::from(by_layer);
            whole.then(|| Series { entries: entries.collect(), first, width, before, after })
        });
        let mut lists: Vec<Series> = Vec::new();
        for list in listed {
            // Of two numbers in the same names the first is taken.
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

    /// The new name of each output when these layers stay; `None` for those that go.
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

    /// Gives the outputs that stay their new numbers.
    pub fn renumber(&self, graph: &mut Graph, kept: &[usize]) {
        let names = self.names(kept);
        // A value that is no output any more can still be read inside the graph.
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

/// Outputs that show the stream at one place and nothing else, the result among them.
fn shown(map: &LayerMap) -> impl Iterator<Item = (ValueId, usize)> + '_ {
    let taps = map.taps.iter().filter(|tap| tap.inside.is_empty());
    let places = taps.filter_map(|tap| match tap.places[..] {
        [place] => Some((tap.output, place)),
        _ => None,
    });
    places.chain([(map.result, map.layers.len())])
}

/// An output that shows the residual stream and that dropped layers change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedTap {
    /// Its name before.
    pub output: String,
    /// Its name now; `None` where the entry of a dropped layer went from a list with one for every layer.
    pub output_now: Option<String>,
    /// Where it read the stream: `i` is before layer `i`, the number of layers is behind the last one. In order.
    pub before: Vec<usize>,
    /// The same now, in the numbers of the layers that stay.
    pub before_now: Vec<usize>,
}

/// What dropping all but the `kept` layers changes of the outputs that show the stream: names, or the numbers of the layers
/// before which they read it. Behind the last layer stays behind the last layer. `map` names the outputs as `graph` does.
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
