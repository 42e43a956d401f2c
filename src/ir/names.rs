//! Names that no value has yet.

use std::collections::{HashMap, HashSet};

use super::Graph;

/// Gives names that neither a graph nor an earlier call has. It reads the graph's names once.
#[derive(Debug)]
pub struct FreshNames {
    taken: HashSet<String>,
    /// Names that were given for each stem.
    counts: HashMap<String, u64>,
}

impl FreshNames {
    /// Names that no value of the graph has. Values that are added later under other names are not known.
    pub fn of(graph: &Graph) -> Self {
        FreshNames { taken: graph.values.iter().map(|value| value.name.clone()).collect(), counts: HashMap::new() }
    }

    /// `stem` or, where a value has this name, `stem_1`, `stem_2`, ...
    pub fn fresh(&mut self, stem: &str) -> String {
        let count = self.counts.entry(stem.to_string()).or_default();
        let mut name = if *count == 0 { stem.to_string() } else { format!("{stem}_{count}") };
        while self.taken.contains(&name) {
            *count += 1;
            name = format!("{stem}_{count}");
        }
        self.taken.insert(name.clone());
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::Value;

    #[test]
    fn names_are_new_to_the_graph_and_to_each_other() {
        let values = ["x", "x_1"].map(|name| Value { name: name.into(), ..Value::default() });
        let mut names = FreshNames::of(&Graph { values: values.into(), ..Graph::default() });
        assert_eq!(["x", "x", "y", "y", "x_1"].map(|stem| names.fresh(stem)), ["x_2", "x_3", "y", "y_1", "x_1_1"]);
    }
}
