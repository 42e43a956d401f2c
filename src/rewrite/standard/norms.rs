//! Norms, and norms of sums.

use crate::base::Result;
use crate::ir::{AttributeKind, DataType, Node, ValueId};

use super::site::{Site, float, int, optional};

/// `x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, computed in f32.
fn rms(site: &mut Site<'_>, x: ValueId, scale: ValueId, epsilon: f32, output: ValueId) {
    let wide = if site.is_f32() { x } else { site.cast(x, DataType::Float) };
    let square = site.op("Mul", &[wide, wide], &[]);
    let axes = site.ints(&[-1]);
    let mean = site.op("ReduceMean", &[square, axes], &[]);
    let epsilon = site.float(epsilon);
    let mean = site.op("Add", &[mean, epsilon], &[]);
    let root = site.op("Sqrt", &[mean], &[]);
    let normed = site.op("Div", &[wide, root], &[]);
    let normed = site.like(normed, x);
    site.give(output, "Mul", &[normed, scale], &[]);
}

/// Source: ONNX Runtime, SimplifiedLayerNormalization-1.
pub(super) fn simplified(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["axis", "epsilon", "stash_type"], 2)?;
    let (x, scale) = (site.input(node, 0)?, site.input(node, 1)?);
    let axis = int(node, "axis", -1);
    if axis != -1 && site.rank(x).is_none_or(|rank| axis != rank as i64 - 1) {
        return Err(site.refuse(node, "normalises more than the last axis"));
    }
    if site.read_output(node, 1).is_some() {
        return Err(site.refuse(node, "has a second output that is read"));
    }
    let output = site.output(node)?;
    rms(site, x, scale, float(node, "epsilon", 1e-5), output);
    Ok(())
}

/// The sum of the first two inputs and a bias, as the fourth output if the node has one.
fn sum(node: &Node, site: &mut Site<'_>, bias: usize) -> Result<ValueId> {
    if [1, 2].into_iter().any(|position| site.read_output(node, position).is_some()) {
        return Err(site.refuse(node, "has a mean or variance that is read"));
    }
    let parts = [site.input(node, 0)?, site.input(node, 1)?];
    let named = node.outputs.get(3).copied().flatten();
    let add = |site: &mut Site<'_>, parts: [ValueId; 2], last: bool| match named.filter(|_| last) {
        Some(output) => {
            site.give(output, "Add", &parts, &[]);
            output
        }
        None => site.op("Add", &parts, &[]),
    };
    Ok(match optional(node, bias) {
        None => add(site, parts, true),
        Some(bias) => {
            let partial = add(site, parts, false);
            add(site, [partial, bias], true)
        }
    })
}

/// Source: ONNX Runtime, com.microsoft SkipSimplifiedLayerNormalization-1.
pub(super) fn skip_simplified(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["epsilon"], 4)?;
    let x = sum(node, site, 3)?;
    let (scale, output) = (site.input(node, 2)?, site.output(node)?);
    rms(site, x, scale, float(node, "epsilon", 1e-12), output);
    Ok(())
}

/// Source: ONNX Runtime, com.microsoft SkipLayerNormalization-1.
pub(super) fn skip(node: &Node, site: &mut Site<'_>) -> Result<()> {
    site.only(node, &["epsilon"], 5)?;
    let x = sum(node, site, 4)?;
    let mut inputs = vec![x, site.input(node, 2)?];
    inputs.extend(optional(node, 3));
    let output = site.output(node)?;
    let attributes =
        [("axis", AttributeKind::Int(-1)), ("epsilon", AttributeKind::Float(float(node, "epsilon", 1e-12)))];
    site.give(output, "LayerNormalization", &inputs, &attributes);
    Ok(())
}
