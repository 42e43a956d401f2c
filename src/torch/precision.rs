//! Precision of the operators of a program whose products run in 16 bits.
//!
//! The rows of the table say which operators read 16-bit operands in f32 ([`Operator::widens`]: powers, roots, exponentials
//! and sums, the list of PyTorch's autocast) and which give 16 bits where an operand has them ([`Operator::rounds`]:
//! arithmetic). A normalisation in several nodes is so computed in f32, as one in a single node is, and the stream and
//! what is computed from it go on in 16 bits.

use tch::{Kind, Tensor};

use super::kernel::{Args, Kernel, OpResult};
use super::operator::Operator;
use super::table::operators;
use crate::ir::Node;

/// How an operator treats operands in the autocast kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MixedPrecision {
    /// It reads them in f32, and its results are in f32.
    pub widens: bool,
    /// Its results have the autocast kind where an operand has it.
    pub rounds: bool,
}

impl MixedPrecision {
    /// The treatment by a node; that of an operator without a row is the default.
    pub fn of(node: &Node) -> Self {
        let same = |row: &&&Operator| (row.domain, row.op_type) == (node.domain.as_str(), node.op_type.as_str());
        operators().iter().find(same).map_or_else(MixedPrecision::default, |row| Self::of_row(row, node))
    }

    fn of_row(row: &Operator, node: &Node) -> Self {
        // A square is a power.
        let square = row.op_type == "Mul" && node.inputs.first() == node.inputs.get(1);
        MixedPrecision { widens: row.widens || square, rounds: row.rounds && !square }
    }
}

/// The kernel of a node with its operands and results in the kinds that its row says, where an operand has kind `low`.
pub(super) fn mixed(row: &Operator, node: &Node, kernel: Kernel, low: Kind) -> Kernel {
    let MixedPrecision { widens, rounds } = MixedPrecision::of_row(row, node);
    if !widens && !rounds {
        return kernel;
    }
    let adds = row.op_type == "Add";
    Box::new(move |args| {
        let is = |tensor: &Tensor, kind: Kind| tensor.f_kind().is_ok_and(|own| own == kind);
        if !args.all().any(|tensor| is(tensor, low)) {
            return kernel(args);
        }
        let mut changed: Vec<Option<Tensor>> = Vec::with_capacity(args.inputs.len());
        for tensor in args.inputs {
            changed.push(match tensor {
                Some(tensor) if widens && is(tensor, low) => Some(tensor.f_to_kind(Kind::Float)?),
                Some(tensor) if adds && is(tensor, Kind::Float) => finite(tensor)?,
                _ => None,
            });
        }
        let inputs: Vec<Option<&Tensor>> =
            args.inputs.iter().zip(&changed).map(|(own, changed)| changed.as_ref().or(*own)).collect();
        let mut results = kernel(&Args { inputs: &inputs })?;
        if rounds {
            for result in results.iter_mut().filter(|result| result.defined() && is(result, Kind::Float)) {
                *result = result.f_to_kind(low)?;
            }
        }
        Ok(results)
    })
}

/// A mask of f32's lowest number would be minus infinity in bf16, and a row without a visible key 0 / 0. Half of it is
/// finite with any score added. What has a gradient is no mask.
fn finite(mask: &Tensor) -> OpResult<Option<Tensor>> {
    let most = f64::from(f32::MAX) / 2.0;
    Ok(if mask.requires_grad() { None } else { Some(mask.f_clamp(-most, most)?) })
}
