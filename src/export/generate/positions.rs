//! Positions of a prompt, computed inside the graph: tokens counted, or three rows for multimodal rotary embedding.

use std::collections::HashMap;

use crate::base::Result;
use crate::ir::{AttributeKind, DataType, Model, ValueId};
use crate::prompt::IMAGE_GRID_THW;
use crate::rewrite::JoinScope;
use crate::runtime::{InputKind, Port};

use super::super::nodes::{cast, graph_input, inputs_of, ints, refused, scalar};

/// What three rows of positions depend on besides the ids.
pub(in crate::export) struct Grids {
    /// `[N, 3]` of int64: frames, rows and columns of patches of each picture.
    pub grids: ValueId,
    /// Placeholder of one row of image features.
    pub image: i64,
    /// Side of the square of patches that makes one token.
    pub merge: i64,
}

/// The arrays of pictures that the graph reads.
pub(super) struct Pictures {
    /// The vision encoder's inputs.
    pub bound: HashMap<ValueId, ValueId>,
    /// Patches of each picture, `[N, 3]`, if the vision encoder reads them.
    grids: Option<(ValueId, DataType)>,
}

impl Pictures {
    /// Adds them to the graph's inputs.
    pub fn inputs(scope: &mut JoinScope<'_>, model: &Model) -> Result<Self> {
        let (mut bound, mut grids) = (HashMap::new(), None);
        for (id, input) in inputs_of("vision_encoder", model)? {
            let InputKind::Image(array) = input.kind() else {
                return Err(refused(
                    &input.port,
                    "is no array of pictures: no pixels, masks, grids, sizes or positions of patches",
                ));
            };
            let value = graph_input(scope.joined, &input.port.name, input.port.dtype, &input.port.shape);
            if array == IMAGE_GRID_THW {
                grids = Some((value, input.port.dtype));
            }
            bound.insert(id, value);
        }
        Ok(Pictures { bound, grids })
    }

    /// What positions in three rows, the decoder's input `port`, follow from.
    pub fn grids(
        &self,
        scope: &mut JoinScope<'_>,
        port: &Port,
        (image, merge): (Option<i64>, Option<i64>),
    ) -> Result<Grids> {
        let problem = |text: &str| refused(port, text);
        let (grids, dtype) = self.grids.ok_or_else(|| {
            problem("has three rows, and the vision encoder reads no `image_grid_thw` from which they follow")
        })?;
        let merge = merge.ok_or_else(|| problem("has three rows, and the config names no `spatial_merge_size`"))?;
        let image = image.ok_or_else(|| problem("has three rows, and the config names no image token"))?;
        Ok(Grids { grids: cast(scope, grids, dtype, DataType::Int64), image, merge })
    }
}

/// The numbers from 0, `[1, T]`; `shape` holds these two sizes.
pub(super) fn counted(scope: &mut JoinScope<'_>, shape: ValueId) -> ValueId {
    let (zero, step, row) = (scalar(scope, "zero", 0), scalar(scope, "one", 1), ints(scope, "row", &[1, -1]));
    let axis = scalar(scope, "time_axis", 1);
    let length = scope.op("prompt_length", "Gather", &[shape, axis], &[]);
    let range = scope.op("range", "Range", &[zero, length, step], &[]);
    scope.op("positions", "Reshape", &[range, row], &[])
}

/// `[3, 1, T]`: temporal, height and width positions of `[1, T]` ids, the same as those of `generate`. A token's position is the
/// number of text tokens before it, plus for each picture before it the largest side of that picture in tokens; inside a
/// picture, a token adds its own frame, row and column.
pub(super) fn three_rows(scope: &mut JoinScope<'_>, ids: ValueId, of: &Grids) -> ValueId {
    let (flat, first, last) =
        (ints(scope, "flat", &[-1]), ints(scope, "from_first", &[0]), ints(scope, "to_last", &[-1]));
    let (none, one) = (ints(scope, "none", &[0]), ints(scope, "one_more", &[1]));
    let first_axis = [("axis", AttributeKind::Int(0))];
    let count = |scope: &mut JoinScope<'_>, value: ValueId, exclusive: i64| {
        let axis = scalar(scope, "first_axis", 0);
        scope.op("count", "CumSum", &[value, axis], &[("exclusive", AttributeKind::Int(exclusive))])
    };

    // `[T]`: 1 at image tokens, at text tokens, and at the first token of each picture.
    let image = scalar(scope, "image_id", of.image);
    let is_image = scope.op("is_image", "Equal", &[ids, image], &[]);
    let is_image = cast(scope, is_image, DataType::Bool, DataType::Int64);
    let is_image = scope.op("is_image", "Reshape", &[is_image, flat], &[]);
    let is_text = scope.op("is_text", "Sub", &[one, is_image], &[]);
    let padded = scope.op("padded", "Concat", &[none, is_image], &first_axis);
    let before = scope.op("before", "Slice", &[padded, first, last], &[]);
    let goes_on = scope.op("goes_on", "Mul", &[is_image, before], &[]);
    let begins = scope.op("begins", "Sub", &[is_image, goes_on], &[]);
    // `[T]`: pictures that ended before a token.
    let begun = count(scope, begins, 0);
    let picture = scope.op("picture", "Sub", &[begun, is_image], &[]);

    // `[N]`: sides of each picture in tokens. A grid of zeros stands for no picture.
    let sides = {
        let merges = ints(scope, "merges", &[1, of.merge, of.merge]);
        let sides = scope.op("sides", "Div", &[of.grids, merges], &[]);
        scope.op("sides", "Max", &[sides, one], &[])
    };
    let [frames, height, width] = [0, 1, 2].map(|column| {
        let column = scalar(scope, "column", column);
        scope.op("side", "Gather", &[sides, column], &[("axis", AttributeKind::Int(1))])
    });
    let area = scope.op("area", "Mul", &[height, width], &[]);
    let tokens = scope.op("tokens", "Mul", &[frames, area], &[]);
    let span = scope.op("span", "Max", &[frames, height, width], &[]);
    // `[T]`: the value of each token's picture, where `values` has one number more than there are pictures.
    let of_picture = |scope: &mut JoinScope<'_>, values: ValueId| scope.op("own", "Gather", &[values, picture], &[]);
    let summed = |scope: &mut JoinScope<'_>, values: ValueId| {
        let sums = count(scope, values, 0);
        let sums = scope.op("sums", "Concat", &[none, sums], &first_axis);
        of_picture(scope, sums)
    };
    let own = |scope: &mut JoinScope<'_>, values: ValueId| {
        let values = scope.op("sides", "Concat", &[values, one], &first_axis);
        of_picture(scope, values)
    };

    // `[T]`: where each token's picture begins, or the text token is.
    let text_before = count(scope, is_text, 1);
    let spans_before = summed(scope, span);
    let begin = scope.op("begin", "Add", &[text_before, spans_before], &[]);
    // `[T]`: the token's number inside its picture, 0 for text.
    let images_before = count(scope, is_image, 1);
    let tokens_before = summed(scope, tokens);
    let inside = scope.op("inside", "Sub", &[images_before, tokens_before], &[]);
    let inside = scope.op("inside", "Mul", &[inside, is_image], &[]);
    let (area, height, width) = (own(scope, area), own(scope, height), own(scope, width));
    let frame = scope.op("frame", "Div", &[inside, area], &[]);
    let line = scope.op("line", "Div", &[inside, width], &[]);
    let line = scope.op("line", "Mod", &[line, height], &[]);
    let column = scope.op("column", "Mod", &[inside, width], &[]);
    let row = ints(scope, "position_row", &[1, 1, -1]);
    let rows = [frame, line, column].map(|offset| {
        let positions = scope.op("positions", "Add", &[begin, offset], &[]);
        scope.op("positions", "Reshape", &[positions, row], &[])
    });
    scope.op("positions", "Concat", &rows, &first_axis)
}

/// The position of the token behind those of `positions`, one more than the largest: `[1]`.
pub(in crate::export) fn behind(scope: &mut JoinScope<'_>, positions: ValueId, name: &str) -> ValueId {
    let one = ints(scope, "one", &[1]);
    let most = scope.op("last_position", "ReduceMax", &[positions], &[("keepdims", AttributeKind::Int(0))]);
    scope.op(name, "Add", &[most, one], &[])
}

/// The positions of that token, `[1, 1]` or `[3, 1, 1]`.
pub(super) fn next(scope: &mut JoinScope<'_>, positions: ValueId, rank: usize) -> ValueId {
    let next = behind(scope, positions, "next_position");
    let shape = ints(scope, "position_cell", if rank == 3 { &[3, 1, 1] } else { &[1, 1] });
    scope.op("next_position", "Expand", &[next, shape], &[])
}
