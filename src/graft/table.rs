//! What a graft would do, as a table.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result, list_preview};
use crate::ir::ValueId;
use crate::quantised::{Blocks, Channels, Range8, Scheme};

use super::index::RowPlace;
use super::matching::Match;

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
    pub(super) plan: GraftPlan,
}

/// Where the finetuned values of a weight come from and go to.
#[derive(Clone)]
pub(super) struct GraftPlan {
    pub part: usize,
    pub target: Target,
    pub found: Match,
    pub places: Vec<RowPlace>,
}

/// What a weight is in the graph.
#[derive(Clone)]
pub(super) enum Target {
    /// One initializer of floating-point numbers.
    Floats(ValueId),
    /// Initializers of a matrix that is quantised in blocks.
    Blocks(Blocks, &'static Scheme),
    /// Initializers of a matrix of 8 bits.
    Channels(Channels, &'static Range8),
}

impl Target {
    /// The initializer that gives the weight its name.
    pub fn id(&self) -> ValueId {
        match self {
            Target::Floats(id) => *id,
            Target::Blocks(blocks, _) => blocks.numbers,
            Target::Channels(channels, _) => channels.numbers,
        }
    }

    /// All its initializers.
    pub fn ids(&self) -> Vec<ValueId> {
        let of_matrix = |numbers, scales, zeros: Option<ValueId>| [numbers, scales].into_iter().chain(zeros).collect();
        match self {
            Target::Floats(id) => vec![*id],
            Target::Blocks(blocks, _) => of_matrix(blocks.numbers, blocks.scales, blocks.zeros),
            Target::Channels(channels, _) => of_matrix(channels.numbers, channels.scales, channels.zeros),
        }
    }

    /// What the table says of the element type.
    pub fn quantisation(&self) -> String {
        match self {
            Target::Floats(_) => String::new(),
            Target::Blocks(blocks, scheme) => format!(", {} bits {}", blocks.bits, scheme.name),
            Target::Channels(_, range) => format!(", 8 bits {}", range.name),
        }
    }
}

/// A weight that is not made of the checkpoint's tensors, or a finetuned tensor that no weight is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
