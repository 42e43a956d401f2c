//! Renames the cache ports of the kept layers by the file's own pattern, without gaps.

use crate::analysis::{KvPort, LayerMap, PortRole};
use crate::base::{Error, Result};
use crate::ir::{Graph, ValueId};

/// Renames the ports of kept layers. `kept` holds their old indices in ascending order.
///
/// When the number in the ports' names is the layer's index, it becomes the new index; when it counts the layers with
/// such a port, it becomes the new count; names without a number stay.
///
/// Errors: `Error::Invalid` when the numbers follow neither rule, or when another value has the new name.
pub fn rename_ports(graph: &mut Graph, map: &LayerMap, kept: &[usize]) -> Result<()> {
    let mut renames: Vec<(ValueId, String)> = Vec::new();
    let mut roles: Vec<PortRole> =
        map.layers.iter().flat_map(|layer| layer.ports.iter().map(|port| port.role)).collect();
    roles.sort_unstable();
    roles.dedup();
    type Side = fn(&KvPort) -> Option<ValueId>;
    let sides: [Side; 2] = [|port| port.past, |port| port.present];
    for role in roles {
        for side in sides {
            let all: Vec<(usize, ValueId)> = map
                .layers
                .iter()
                .flat_map(|layer| {
                    layer
                        .ports
                        .iter()
                        .filter(|port| port.role == role)
                        .filter_map(move |port| side(port).map(|id| (layer.index, id)))
                })
                .collect();
            let names: Vec<&str> = all.iter().map(|(_, id)| graph.name(*id)).collect();
            let Some(numbers) = varying_number(&names) else { continue };
            let by_layer = all.iter().zip(&numbers).all(|((layer, _), (number, _, _))| layer == number);
            let by_count = numbers.iter().enumerate().all(|(count, (number, _, _))| count == *number);
            if !by_layer && !by_count {
                return Err(Error::invalid(
                    format!("cache ports `{}` to `{}`", names[0], names[names.len() - 1]),
                    "are numbered neither by layer nor by count, so what their new numbers should be is not clear",
                )
                .remedy("rename them in the graph, as in `past_key_values.0.key`"));
            }
            let digits =
                |name: &str, before: &str, after: &str| padded_width(&name[before.len()..name.len() - after.len()]);
            let widths = names.iter().zip(&numbers).map(|(name, (_, before, after))| digits(name, before, after));
            let width = widths.max().unwrap_or(0);
            let mut count = 0;
            for ((layer, id), (_, before, after)) in all.iter().zip(&numbers) {
                if let Some(new_layer) = kept.iter().position(|old| old == layer) {
                    let number = if by_layer { new_layer } else { count };
                    renames.push((*id, format!("{before}{number:0width$}{after}")));
                    count += 1;
                }
            }
        }
    }
    for (id, name) in renames {
        graph.values[id.index()].name = name;
    }
    Ok(())
}

/// The one number in which the names differ: its value, and the text before and after it.
fn varying_number(names: &[&str]) -> Option<Vec<(usize, String, String)>> {
    let split: Vec<Vec<(usize, usize)>> = names.iter().map(|name| digit_runs(name)).collect();
    let columns = split.first()?.len();
    for column in 0..columns {
        let found: Option<Vec<(usize, String, String)>> = names
            .iter()
            .zip(&split)
            .map(|(name, runs)| {
                let &(start, end) = runs.get(column)?;
                let number: usize = name.get(start..end)?.parse().ok()?;
                Some((number, name.get(..start)?.to_string(), name.get(end..)?.to_string()))
            })
            .collect();
        let Some(found) = found else { continue };
        let same_frame = found.iter().all(|(_, before, after)| *before == found[0].1 && *after == found[0].2);
        if same_frame && (found.len() == 1 || found.iter().any(|(number, _, _)| *number != found[0].0)) {
            return Some(found);
        }
    }
    None
}

/// Width to which a number is padded with zeros; 0 without padding.
pub fn padded_width(digits: &str) -> usize {
    if digits.len() > 1 && digits.starts_with('0') { digits.len() } else { 0 }
}

/// Start and end of every run of digits in a name.
pub fn digit_runs(name: &str) -> Vec<(usize, usize)> {
    let bytes = name.as_bytes();
    let mut runs = Vec::new();
    let mut start = None;
    for position in 0..=bytes.len() {
        let digit = bytes.get(position).is_some_and(u8::is_ascii_digit);
        match (digit, start) {
            (true, None) => start = Some(position),
            (false, Some(first)) => {
                runs.push((first, position));
                start = None;
            }
            _ => {}
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_give_the_padded_width() {
        assert_eq!(["7", "0", "07", "000", "10"].map(padded_width), [0, 0, 2, 3, 0]);
    }

    #[test]
    fn the_layer_number_is_found_among_other_digits() {
        let names = ["kv2.past.0.key1", "kv2.past.1.key1", "kv2.past.2.key1"];
        let found = varying_number(&names).unwrap();
        assert_eq!(found[2], (2, "kv2.past.".to_string(), ".key1".to_string()));
        assert!(varying_number(&["abc", "xyz"]).is_none());
        assert!(varying_number(&["q7", "z1"]).is_none());
    }
}
