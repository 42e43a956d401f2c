//! Outputs that are the whole list of hidden states, as transformers' `output_hidden_states` gives them.

use std::collections::BTreeMap;

use crate::analysis::LayerMap;
use crate::ir::{Graph, ValueId};

use super::renumber::digit_runs;

/// One output for the stream before each layer and one behind the last, whose names carry the numbers `0..=L`.
///
/// The list of a network of fewer layers is shorter: without layer `i` the stream before it is not in the list, and the
/// others are numbered anew. A graph that shows the stream at some places only is no list, and all its outputs stay.
#[derive(Debug)]
pub struct Series {
    outputs: Vec<ValueId>,
    /// Text of the names before and behind the number.
    before: String,
    after: String,
}

impl Series {
    /// The list among a graph's outputs, if there is one. `map` names the outputs as `graph` does.
    pub fn of(graph: &Graph, map: &LayerMap) -> Option<Series> {
        let count = map.layers.len();
        let mut frames: BTreeMap<(String, String), Vec<Option<ValueId>>> = BTreeMap::new();
        let taps = map.taps.iter().filter(|tap| tap.inside.is_empty());
        let places = taps.filter_map(|tap| match tap.places[..] {
            [place] => Some((tap.output, place)),
            _ => None,
        });
        for (output, place) in places.chain([(map.result, count)]) {
            let name = graph.name(output);
            for (start, end) in digit_runs(name) {
                if name.get(start..end).and_then(|number| number.parse().ok()) == Some(place) {
                    let frame = (name.get(..start)?.to_string(), name.get(end..)?.to_string());
                    let outputs = frames.entry(frame).or_insert_with(|| vec![None; count + 1]);
                    *outputs.get_mut(place)? = Some(output);
                }
            }
        }
        frames.into_iter().find_map(|((before, after), outputs)| {
            let outputs: Option<Vec<ValueId>> = outputs.into_iter().collect();
            Some(Series { outputs: outputs?, before, after })
        })
    }

    /// The outputs that show the stream before these layers.
    pub fn outputs_of(&self, layers: &[usize]) -> Vec<ValueId> {
        layers.iter().filter_map(|&layer| self.outputs.get(layer).copied()).collect()
    }

    /// Gives the outputs of the layers that stay, and the last one, their new numbers.
    pub fn renumber(&self, graph: &mut Graph, kept: &[usize]) {
        let last = self.outputs.len() - 1;
        // A value that is no output any more can still be read inside the graph.
        for (old, &output) in self.outputs.iter().enumerate().filter(|(old, _)| *old != last && !kept.contains(old)) {
            let name = graph.fresh_name(&format!("{}{old}{}.inner", self.before, self.after));
            graph.values[output.index()].name = name;
        }
        for (number, &old) in kept.iter().chain([&last]).enumerate() {
            graph.values[self.outputs[old].index()].name = format!("{}{number}{}", self.before, self.after);
        }
    }
}
