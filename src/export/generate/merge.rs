//! Puts the features of pictures into a prompt: its embeddings, and what the decoder reads beside them.

use crate::base::{Error, Result};
use crate::ir::{AttributeKind, Body, DataType, Model, Tensor, ValueId};
use crate::rewrite::JoinScope;
use crate::runtime::{Input, InputKind, Port, output_kind};

use super::super::nodes::{any, cast, ints, refused, scalar, undeclared, with_rows_at};
use super::ports::DecoderPorts;

/// The embeddings of a prompt.
#[derive(Clone, Copy)]
pub(in crate::export) struct Rows {
    /// `[1, T]` token ids.
    pub ids: ValueId,
    /// `[1, T, D]` embeddings.
    pub values: ValueId,
    pub dtype: DataType,
    /// `D`, where the graph fixes it.
    pub width: Option<usize>,
}

/// What the pictures make of a prompt.
pub(in crate::export) struct MergedPrompt {
    /// `[1, T, D]`, or wider with DeepStack features behind each row.
    pub values: ValueId,
    /// A value for each of the decoder's inputs of DeepStack features, in their order and types.
    pub deepstack: Vec<ValueId>,
}

/// The outputs of a vision encoder, each with its place in the graph's signature.
pub(in crate::export) struct VisionPorts {
    /// The image features.
    pub main: (usize, Port),
    /// DeepStack features by ascending number: of one level each, or one output with all levels along its first axis.
    pub levels: Vec<(usize, Option<usize>, Port)>,
}

impl VisionPorts {
    /// Errors: `Error::Unsupported` for an output that is neither, and for one without a declared type and rank.
    pub(in crate::export) fn of(model: &Model) -> Result<Self> {
        let graph = &model.graph;
        let (mut main, mut levels) = (Vec::new(), Vec::new());
        for (place, &id) in graph.body.outputs.iter().enumerate() {
            let port = Port::of_value(graph, id)
                .ok_or_else(|| undeclared(format!("output `{}` of the vision encoder", graph.name(id))))?;
            match output_kind(&port) {
                Some((InputKind::Deepstack, number)) => levels.push((place, number, port)),
                _ => main.push((place, port)),
            }
        }
        levels.sort_by_key(|(_, number, _)| *number);
        let names: Vec<String> = main.iter().map(|(_, port)| port.name.clone()).collect();
        match <[(usize, Port); 1]>::try_from(main) {
            Ok([main]) => Ok(VisionPorts { main, levels }),
            Err(_) => {
                let problem = format!("gives {}, expected one output of image features", names.join(", "));
                Err(Error::unsupported("the vision encoder", problem).remedy("use the components of another target"))
            }
        }
    }

    /// The only output, if it has all levels.
    fn stacked(&self) -> Option<&Port> {
        match &self.levels[..] {
            [(_, None, port)] if port.rank() > 2 => Some(port),
            _ => None,
        }
    }

    /// Number of levels; `None` where the graph does not fix it.
    fn count(&self) -> Option<usize> {
        match self.stacked() {
            Some(port) => port.fixed_size(0),
            None => Some(self.levels.len()),
        }
    }

    /// The levels that an input of the decoder takes: those with its numbers, or those at the same places.
    fn levels_of(&self, input: &Input) -> Result<Vec<usize>> {
        let count = self.count().ok_or_else(|| refused(&input.port, "is fed a number of levels that is not fixed"))?;
        let numbers: Vec<usize> = match self.stacked() {
            Some(_) => (0..count).collect(),
            None => self.levels.iter().map(|(_, number, _)| number.unwrap_or(0)).collect(),
        };
        let taken =
            if input.is_stacked() { input.port.fixed_size(0).unwrap_or(count) } else { input.levels.len().max(1) };
        let found = match input.number {
            None if input.is_stacked() => (taken == count).then(|| (0..count).collect()),
            None => (count == 1).then(|| vec![0]),
            Some(number) => {
                let by_number = input.levels.iter().all(|level| numbers.contains(level));
                let list = if by_number { &numbers } else { &input.levels };
                let place = list.iter().position(|&level| level == number);
                place.filter(|_| by_number || taken == count).map(|place| vec![place])
            }
        };
        found.ok_or_else(|| {
            let problem = format!("takes {taken} levels of DeepStack features, the vision encoder gives {count}");
            Error::unsupported(format!("input {}", input.port.described()), problem)
                .remedy("check that vision encoder and decoder belong to one model")
        })
    }

    /// `[N, width]` rows of every level, of the type `dtype`.
    fn rows(&self, scope: &mut JoinScope<'_>, values: &[ValueId], width: usize, dtype: DataType) -> Vec<ValueId> {
        let shape = ints(scope, "rows_of_level", &[-1, width as i64]);
        let row = |scope: &mut JoinScope<'_>, value: ValueId, from: DataType| {
            let rows = scope.op("level", "Reshape", &[value, shape], &[]);
            cast(scope, rows, from, dtype)
        };
        match self.stacked() {
            Some(port) => (0..port.fixed_size(0).unwrap_or(0))
                .map(|level| {
                    let level = scalar(scope, "level_number", level as i64);
                    let axis = [("axis", AttributeKind::Int(0))];
                    let one = scope.op("level", "Gather", &[values[self.levels[0].0], level], &axis);
                    row(scope, one, port.dtype)
                })
                .collect(),
            None => self.levels.iter().map(|(place, _, port)| row(scope, values[*place], port.dtype)).collect(),
        }
    }
}

/// Zeros of shape `before`, the sizes in `ids`' shape `[1, T]`, `width`.
fn zeros(scope: &mut JoinScope<'_>, before: &[i64], ids: ValueId, width: usize, dtype: DataType) -> ValueId {
    let sizes = scope.op("token_sizes", "Shape", &[ids], &[]);
    let (before, width) = (ints(scope, "levels", before), ints(scope, "width", &[width as i64]));
    let shape = scope.op("shape", "Concat", &[before, sizes, width], &[("axis", AttributeKind::Int(0))]);
    constant_of(scope, shape, dtype)
}

fn constant_of(scope: &mut JoinScope<'_>, shape: ValueId, dtype: DataType) -> ValueId {
    let bytes = vec![0; dtype.byte_len(1).unwrap_or(8) as usize];
    let value = Tensor::from_bytes(dtype, &[1], bytes);
    scope.op("zeros", "ConstantOfShape", &[shape], &[("value", AttributeKind::Tensor(value))])
}

/// DeepStack features of an input of the decoder for tokens without pictures.
pub(in crate::export) fn no_features(
    scope: &mut JoinScope<'_>,
    input: &Input,
    ids: ValueId,
    width: Option<usize>,
) -> Result<ValueId> {
    let port = &input.port;
    let width = width_of(input, width)?;
    let levels = match input.is_stacked() {
        true => Some(port.fixed_size(0).ok_or_else(|| refused(port, "does not declare its number of levels"))? as i64),
        false => None,
    };
    Ok(match input.is_by_token() {
        true => zeros(scope, levels.as_slice(), ids, width, port.dtype),
        false => {
            let shape: Vec<i64> = levels.into_iter().chain([0, width as i64]).collect();
            let shape = ints(scope, "no_rows", &shape);
            constant_of(scope, shape, port.dtype)
        }
    })
}

fn width_of(input: &Input, width: Option<usize>) -> Result<usize> {
    let width = input.port.width().or(width);
    width.ok_or_else(|| refused(&input.port, "does not declare the width of its features"))
}

/// `[1, T, D + columns]`: zeros behind each row.
pub(in crate::export) fn padded(
    scope: &mut JoinScope<'_>,
    (values, dtype): (ValueId, DataType),
    ids: ValueId,
    columns: usize,
) -> ValueId {
    if columns == 0 {
        return values;
    }
    let zeros = zeros(scope, &[], ids, columns, dtype);
    scope.op("padded", "Concat", &[values, zeros], &[("axis", AttributeKind::Int(-1))])
}

/// The embeddings with the features of the pictures at the image tokens, and DeepStack features in the forms that the decoder takes.
/// Without image tokens the embeddings are unchanged, and the nodes of `outputs` do not run. `outputs` gives the outputs of the
/// vision encoder, in order.
///
/// Errors: `Error::Unsupported` naming what does not fit together; `Error::Invalid` without an image token.
pub(in crate::export) fn at_image_tokens(
    scope: &mut JoinScope<'_>,
    rows: &Rows,
    decoder: &DecoderPorts,
    vision: &VisionPorts,
    image: Option<i64>,
    outputs: impl FnOnce(&mut JoinScope<'_>) -> Result<Vec<ValueId>>,
) -> Result<MergedPrompt> {
    let image = image.ok_or_else(|| {
        Error::invalid("`config.json`", "names no image token").remedy("add `image_token_id` to `config.json`")
    })?;
    let (place, main) = &vision.main;
    let width = main.width().or(rows.width).ok_or_else(|| {
        Error::unsupported("the vision encoder", "does not declare the width of its features")
            .remedy("export it with a fixed width")
    })?;
    let packed = decoder.packed_levels(rows.width)?;
    let columns = packed * rows.width.unwrap_or(0);
    // Features as wide as the decoder's rows have the levels behind them already.
    let wide = packed > 0 && Some(width) != rows.width;
    if packed > 0 && !wide && vision.count() != Some(packed) {
        let problem = format!("gives {} DeepStack outputs, the decoder takes {packed} levels", vision.levels.len());
        return Err(Error::unsupported("the vision encoder", problem)
            .remedy("check that vision encoder and decoder belong to one model"));
    }
    let image = scalar(scope, "image_id", image);
    let is_image = scope.op("is_image", "Equal", &[rows.ids, image], &[]);
    let pictured = any(scope, is_image);
    let shape = ints(scope, "rows_of_features", &[-1, width as i64]);

    let mut with = JoinScope::new(&mut *scope.joined);
    let values = outputs(&mut with)?;
    let features = with.op("features", "Reshape", &[values[*place], shape], &[]);
    let features = cast(&mut with, features, main.dtype, rows.dtype);
    let into = if wide { padded(&mut with, (rows.values, rows.dtype), rows.ids, columns) } else { rows.values };
    let mut merged = with_rows_at(&mut with, into, is_image, features);
    let spread = |scope: &mut JoinScope<'_>, level: ValueId, width: usize, dtype: DataType| {
        let zeros = zeros(scope, &[], rows.ids, width, dtype);
        with_rows_at(scope, zeros, is_image, level)
    };
    if packed > 0 && !wide {
        let levels = vision.rows(&mut with, &values, width, rows.dtype);
        let mut parts = vec![merged];
        for level in levels {
            parts.push(spread(&mut with, level, width, rows.dtype));
        }
        merged = with.op("packed", "Concat", &parts, &[("axis", AttributeKind::Int(-1))]);
    }
    let mut given = vec![merged];
    for input in decoder.deepstack() {
        let (width, dtype) = (width_of(input, Some(width))?, input.port.dtype);
        let by_token = input.is_by_token();
        let all = vision.rows(&mut with, &values, width, dtype);
        let mut levels = Vec::new();
        for level in vision.levels_of(input)? {
            levels.push(if by_token { spread(&mut with, all[level], width, dtype) } else { all[level] });
        }
        given.push(match input.is_stacked() {
            false => levels[0],
            true => {
                let axes = ints(&mut with, "level_axis", &[0]);
                let mut stack = |level: &ValueId| with.op("level", "Unsqueeze", &[*level, axes], &[]);
                let parts: Vec<ValueId> = levels.iter().map(&mut stack).collect();
                with.op("levels", "Concat", &parts, &[("axis", AttributeKind::Int(0))])
            }
        });
    }
    let with = Body { name: "with_pictures".into(), nodes: with.nodes, outputs: given, ..Body::default() };

    let mut without = JoinScope::new(&mut *scope.joined);
    let same = padded(&mut without, (rows.values, rows.dtype), rows.ids, columns);
    let mut given = vec![without.op("text", "Identity", &[same], &[])];
    for input in decoder.deepstack() {
        given.push(no_features(&mut without, input, rows.ids, Some(width))?);
    }
    let without = Body { name: "text_only".into(), nodes: without.nodes, outputs: given, ..Body::default() };
    let values = scope.joined.value("embedded");
    let deepstack: Vec<ValueId> = decoder.deepstack().map(|_| scope.joined.value("deepstack")).collect();
    let all = [vec![values], deepstack.clone()].concat();
    scope.control("If", &[pictured], &all, vec![("then_branch", with), ("else_branch", without)]);
    Ok(MergedPrompt { values, deepstack })
}
