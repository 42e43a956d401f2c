//! Rotations by position, and grouped-query attention with its cache.

use crate::base::Result;
use crate::ir::{AttributeKind, DataType, Node, ValueId};

use super::site::{Site, float, int, optional};

/// A tensor `[B, S, heads, D]` rotated by the rows of two tables `[positions, width / 2]` at `positions` `[B, S]`. Behind
/// the first `2 * half` numbers of each head nothing changes.
fn rotate(site: &mut Site<'_>, x: ValueId, tables: [ValueId; 2], positions: ValueId, form: &Form) -> ValueId {
    let heads = site.ints(&[2]);
    let [cos, sin] = tables.map(|table| {
        let rows = site.op("Gather", &[table, positions], &[("axis", AttributeKind::Int(0))]);
        site.op("Unsqueeze", &[rows, heads], &[])
    });
    let Form { half, head, interleaved } = *form;
    let rotated = if 2 * half < head { site.slice(x, 3, 0, 2 * half) } else { x };
    let (first, second) = if interleaved {
        let pairs = site.reshape(rotated, &[0, 0, 0, half, 2]);
        let index = [site.int(0), site.int(1)];
        let part = |site: &mut Site<'_>, index| site.op("Gather", &[pairs, index], &[("axis", AttributeKind::Int(4))]);
        (part(site, index[0]), part(site, index[1]))
    } else {
        (site.slice(rotated, 3, 0, half), site.slice(rotated, 3, half, 2 * half))
    };
    let product = |site: &mut Site<'_>, a, b| site.op("Mul", &[a, b], &[]);
    let (a, b) = (product(site, first, cos), product(site, second, sin));
    let real = site.op("Sub", &[a, b], &[]);
    let (a, b) = (product(site, first, sin), product(site, second, cos));
    let imaginary = site.op("Add", &[a, b], &[]);
    let rotated = if interleaved {
        let last = site.ints(&[-1]);
        let pair = [real, imaginary].map(|part| site.op("Unsqueeze", &[part, last], &[]));
        let pairs = site.concat(&pair, -1);
        site.reshape(pairs, &[0, 0, 0, 2 * half])
    } else {
        site.concat(&[real, imaginary], 3)
    };
    if 2 * half == head {
        return rotated;
    }
    let rest = site.slice(x, 3, 2 * half, head);
    site.concat(&[rotated, rest], 3)
}

/// Sizes of a rotation.
struct Form {
    half: i64,
    head: i64,
    interleaved: bool,
}

/// Columns of a table of rotations, which is a weight.
fn columns(site: &Site<'_>, node: &Node, table: ValueId) -> Result<i64> {
    let dims = site.weight(table).map(|tensor| tensor.dims.clone());
    match dims.as_deref() {
        Some([_, columns]) => Ok(*columns as i64),
        _ => Err(site.refuse(node, "has a table of rotations that is no weight")),
    }
}

/// Source: ONNX Runtime, com.microsoft RotaryEmbedding-1.
pub(super) fn rotary_embedding(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["interleaved", "num_heads", "rotary_embedding_dim", "scale", "is_packed_batching"], 4)?;
    if float(node, "scale", 1.0) != 1.0 || int(node, "is_packed_batching", 0) != 0 {
        return Err(site.refuse(node, "scales or packs its rows"));
    }
    let (x, positions) = (site.input(node, 0)?, site.input(node, 1)?);
    let tables = [site.input(node, 2)?, site.input(node, 3)?];
    let half = columns(site, node, tables[0])?;
    let (heads, width) = (int(node, "num_heads", 0), int(node, "rotary_embedding_dim", 0));
    let rank = site.rank(x);
    if width != 0 && (heads == 0 || width != 2 * half) {
        return Err(site.refuse(node, "rotates a part of unknown heads"));
    }
    if site.rank(positions) != Some(2) {
        return Err(site.refuse(node, "has positions that are not listed for every token"));
    }
    let output = site.output(node)?;
    let interleaved = int(node, "interleaved", 0) != 0;
    match rank {
        Some(3) if width == 0 => {
            let form = Form { half, head: 2 * half, interleaved };
            let cut = site.reshape(x, &[0, 0, -1, 2 * half]);
            let turned = rotate(site, cut, tables, positions, &form);
            let shape = site.op("Shape", &[x], &[]);
            site.give(output, "Reshape", &[turned, shape], &[]);
            Ok(())
        }
        Some(4) if width == 0 => {
            let form = Form { half, head: 2 * half, interleaved };
            let cut = site.transpose(x, &[0, 2, 1, 3]);
            let turned = rotate(site, cut, tables, positions, &form);
            site.give(output, "Transpose", &[turned], &[("perm", AttributeKind::Ints(vec![0, 2, 1, 3]))]);
            Ok(())
        }
        _ => Err(site.refuse(node, "has an input of unknown rank, or rotates a part of each head")),
    }
}

const ATTRIBUTES: &[&str] = &[
    "num_heads",
    "kv_num_heads",
    "scale",
    "softcap",
    "do_rotary",
    "rotary_interleaved",
    "local_window_size",
    "smooth_softmax",
    "qk_output",
    "k_quant_type",
    "v_quant_type",
    "kv_cache_bit_width",
    "sliding_window_cache",
];

/// Attributes whose presence changes nothing at this value.
const NEUTRAL: &[(&str, i64)] =
    &[("smooth_softmax", 0), ("qk_output", 0), ("sliding_window_cache", 0), ("smooth_softmax", -1)];

/// Products, mask and softmax of the whole prompt or of new tokens behind a cache. All rows of a batch have the same
/// length, as `total_sequence_length` says, and the cache grows with every token.
///
/// Shapes: query `[B, S, H * D]` or packed, caches `[B, G, P, D]` -> `[B, S, H * D]` and caches `[B, G, P + S, D]`.
/// Source: ONNX Runtime, com.microsoft GroupQueryAttention-1.
pub(super) fn group_query_attention(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, ATTRIBUTES, 11)?;
    for name in ["smooth_softmax", "qk_output", "sliding_window_cache"] {
        if !NEUTRAL.contains(&(name, int(node, name, 0))) {
            return Err(site.refuse(node, &format!("sets `{name}`")));
        }
    }
    let text = |name: &str| node.attribute(name).and_then(|value| value.as_str().map(str::to_string));
    if ["k_quant_type", "v_quant_type"].iter().any(|name| text(name).is_some_and(|kind| kind != "NONE")) {
        return Err(site.refuse(node, "has a quantised cache"));
    }
    if site.read_output(node, 3).is_some() {
        return Err(site.refuse(node, "gives its products"));
    }
    let (heads, groups) = (int(node, "num_heads", 0), int(node, "kv_num_heads", 0));
    if heads < 1 || groups < 1 || heads % groups != 0 {
        return Err(site.refuse(node, "has no valid number of heads"));
    }
    let query = site.input(node, 0)?;
    let (q, k, v) = match (optional(node, 1), optional(node, 2)) {
        (Some(key), Some(value)) => {
            let cut = |site: &mut Site<'_>, x, heads| site.reshape(x, &[0, 0, heads, -1]);
            (cut(site, query, heads), cut(site, key, groups), cut(site, value, groups))
        }
        _ => {
            let all = site.reshape(query, &[0, 0, heads + 2 * groups, -1]);
            let part = |site: &mut Site<'_>, from, to| site.slice(all, 2, from, to);
            (part(site, 0, heads), part(site, heads, heads + groups), part(site, heads + groups, heads + 2 * groups))
        }
    };
    let steps = site.size(query, 1);
    let past = match optional(node, 3) {
        Some(past) => site.size(past, 2),
        None => site.ints(&[0]),
    };
    let total = site.op("Add", &[past, steps], &[]);
    let zero = site.int(0);
    let one = site.int(1);
    let scalar = |site: &mut Site<'_>, list: ValueId| site.op("Squeeze", &[list], &[]);
    let (past_length, total_length) = (scalar(site, past), scalar(site, total));
    // Positions of the new tokens, [S].
    let places = site.op("Range", &[past_length, total_length, one], &[]);
    let (mut q, mut k) = (q, k);
    if int(node, "do_rotary", 0) != 0 {
        let tables = [site.input(node, 7)?, site.input(node, 8)?];
        let half = columns(site, node, tables[0])?;
        let positions = match optional(node, 9) {
            Some(positions) => positions,
            None => {
                let first = site.ints(&[0]);
                let row = site.op("Unsqueeze", &[places, first], &[]);
                let batch = site.size(query, 0);
                let shape = site.concat(&[batch, steps], 0);
                site.op("Expand", &[row, shape], &[])
            }
        };
        let head = head_size(node, site, half)?;
        let form = Form { half, head, interleaved: int(node, "rotary_interleaved", 0) != 0 };
        q = rotate(site, q, tables, positions, &form);
        k = rotate(site, k, tables, positions, &form);
    }
    let [q, k, v] = [q, k, v].map(|x| site.transpose(x, &[0, 2, 1, 3]));
    let extended = |site: &mut Site<'_>, position: usize, new: ValueId| {
        let whole = match optional(node, position) {
            Some(past) => site.concat(&[past, new], 2),
            None => new,
        };
        if let Some(output) = node.outputs.get(position - 2).copied().flatten() {
            site.give(output, "Identity", &[whole], &[]);
        }
        whole
    };
    let (keys, values) = (extended(site, 3, k), extended(site, 4, v));
    let mask = visible(node, site, places, (zero, total_length, one));
    let bias = optional(node, 10);
    let output = site.output(node)?;
    attend(node, site, [q, keys, values], (heads / groups, mask, bias), output);
    Ok(())
}

/// Width of one head, from a declared cache or the table of rotations.
fn head_size(node: &Node, site: &Site<'_>, half: i64) -> Result<i64> {
    let declared = optional(node, 3).and_then(|past| site.last_size(past));
    match declared {
        Some(head) if head >= 2 * half => Ok(head),
        None => Ok(2 * half),
        Some(_) => Err(site.refuse(node, "has heads narrower than its table of rotations")),
    }
}

/// True where a new token sees a column of the cache, `[S, P + S]`.
fn visible(
    node: &Node,
    site: &mut Site<'_>,
    places: ValueId,
    (zero, total, one): (ValueId, ValueId, ValueId),
) -> ValueId {
    let columns = site.op("Range", &[zero, total, one], &[]);
    let last = site.ints(&[1]);
    let rows = site.op("Unsqueeze", &[places, last], &[]);
    let mut shown = site.op("LessOrEqual", &[columns, rows], &[]);
    let window = int(node, "local_window_size", -1);
    if window > 0 {
        let window = site.int(window);
        let start = site.op("Sub", &[rows, window], &[]);
        let near = site.op("Greater", &[columns, start], &[]);
        shown = site.op("And", &[shown, near], &[]);
    }
    shown
}

/// `softmax(q k^T * scale + bias, masked) v` with `[B, G, T, D]` keys and values, each for `repeats` heads of `q`.
fn attend(
    node: &Node,
    site: &mut Site<'_>,
    [q, keys, values]: [ValueId; 3],
    (repeats, mask, bias): (i64, ValueId, Option<ValueId>),
    output: ValueId,
) {
    let (shape_of_q, last) = (site.op("Shape", &[q], &[]), site.ints(&[2]));
    let size = site.size(q, 3);
    let (heads, groups) = (int(node, "num_heads", 0), int(node, "kv_num_heads", 0));
    // Heads of one group beside each other: [B, G, R, S, D].
    let batch = site.size(q, 0);
    let steps = site.size(q, 2);
    let group = site.ints(&[groups, repeats]);
    let shape = site.concat(&[batch, group, steps, size], 0);
    let grouped = site.op("Reshape", &[q, shape], &[]);
    let [keys, values] = [keys, values].map(|x| site.op("Unsqueeze", &[x, last], &[]));
    let turned = site.transpose(keys, &[0, 1, 2, 4, 3]);
    let scale = match float(node, "scale", 0.0) {
        0.0 => {
            let size = site.cast(size, DataType::Float);
            let root = site.op("Sqrt", &[size], &[]);
            let scale = site.op("Reciprocal", &[root], &[]);
            site.like(scale, q)
        }
        scale => site.float_like(scale, q),
    };
    let products = site.op("MatMul", &[grouped, turned], &[]);
    let mut products = site.op("Mul", &[products, scale], &[]);
    let softcap = float(node, "softcap", 0.0);
    if softcap > 0.0 {
        let cap = site.float_like(softcap, q);
        let inner = site.op("Div", &[products, cap], &[]);
        let inner = site.op("Tanh", &[inner], &[]);
        products = site.op("Mul", &[inner, cap], &[]);
    }
    // Back to [B, H, S, T], where a bias fits.
    let (total, count) = (site.size(products, 4), site.ints(&[heads]));
    let shape = site.concat(&[batch, count, steps, total], 0);
    let mut products = site.op("Reshape", &[products, shape], &[]);
    if let Some(bias) = bias {
        products = site.op("Add", &[products, bias], &[]);
    }
    let least = site.float_like(-65_504.0, q);
    let masked = site.op("Where", &[mask, products, least], &[]);
    let weights = site.op("Softmax", &[masked], &[("axis", AttributeKind::Int(-1))]);
    let shape = site.concat(&[batch, group, steps, total], 0);
    let weights = site.op("Reshape", &[weights, shape], &[]);
    let mixed = site.op("MatMul", &[weights, values], &[]);
    let mixed = site.op("Reshape", &[mixed, shape_of_q], &[]);
    let mixed = site.transpose(mixed, &[0, 2, 1, 3]);
    let shape = site.ints(&[0, 0, -1]);
    site.give(output, "Reshape", &[mixed, shape], &[]);
}
