//! The table of graph inputs and outputs. One row per kind of input or output of a decoder, a token embedding or a
//! vision encoder, with its names and the function that builds its array from a step.
//!
//! Scoring, losses, healing, generation, evaluation, `verify` and `bench` all build their inputs with it.

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{
    Array, IMAGE_GRID_HWS, IMAGE_GRID_THW, IMAGE_SIZES, PATCH_ATTENTION_MASK, PIXEL_ATTENTION_MASK, PIXEL_POSITION_IDS,
    PIXEL_VALUES, SPATIAL_SHAPES, TARGET_SIZES,
};
use crate::rewrite::ADDED_PREFIX;

use super::pictures;
use super::port::Port;
use super::step::Step;

/// Content of an input or output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// `[B, T, D]`; wider than the token embeddings when DeepStack features are packed after them in each row.
    InputsEmbeds,
    /// `[B, T]`.
    InputIds,
    /// `[B, past + T]`: 1 where a position is real.
    AttentionMask,
    /// `[B, T]`, or `[3, B, T]`: temporal, height and width positions of multimodal rotary embedding.
    PositionIds,
    /// `[T]`: columns of the cache that the step writes.
    CachePosition,
    /// True to read the cache (decoders with two branches in an `If`).
    UseCacheBranch,
    /// Number of last positions that get logits; 0 means all.
    LogitsToKeep,
    /// `[B, T]`: true at image tokens.
    ImageMask,
    /// `[B, pictures, tokens of each]`: true for every token of a picture.
    ImageTokens,
    /// `[B, T]`: see [`super::TokenTypes`].
    TokenTypes,
    /// Features of the vision encoder's inner layers: `[N, D]` over the image tokens, `[B, T, D]` with zeros elsewhere,
    /// or all levels stacked along a first axis.
    Deepstack,
    /// `[B, T, L, P]`: a second embedding of each token for every layer.
    PerLayerInputs,
    /// `[N, D]`: the vision encoder's output, one row per image token.
    ImageFeatures,
    /// `[N, D]`: features of sounds; always empty.
    AudioFeatures,
    /// An array of the pictures, with the name that processors use.
    Image(&'static str),
    /// A cache or a recurrent state.
    Past,
    /// An input that a rewrite added; the code that uses the rewritten graph sets it.
    Added,
    /// An input without a known meaning; only ready tensors can set it.
    Given,
}

/// How a finetuning pass, which has no cache and starts inside the graph, sets an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Training {
    /// Like any other run.
    Fed,
    /// With zeros: after the start of the pass only the shape is read.
    ShapeOnly,
    /// Empty, or the initial value of a recurrent state.
    Empty,
}

/// One row of the table.
pub struct InputRow {
    pub kind: InputKind,
    /// Names in exported graphs. A `*` at the end matches a number, with or without a `.` or `_` before it; a `.` at
    /// the end matches any suffix.
    pub names: &'static [&'static str],
    /// Ranks for which the row applies; empty for any rank.
    pub ranks: &'static [usize],
    pub training: Training,
    make: fn(&Step, &Input) -> Result<Array>,
}

/// An input of a graph, with its row in the table.
#[derive(Clone)]
pub struct Input {
    /// Name, type and shape in the graph.
    pub port: Port,
    /// The row of the table, which builds its array.
    pub row: &'static InputRow,
    /// The number in its name.
    pub number: Option<usize>,
    /// Numbers of all inputs of DeepStack features, ascending; empty for inputs of another kind.
    pub levels: Vec<usize>,
}

const fn row(
    kind: InputKind,
    names: &'static [&'static str],
    ranks: &'static [usize],
    make: fn(&Step, &Input) -> Result<Array>,
) -> InputRow {
    InputRow { kind, names, ranks, training: Training::Fed, make }
}

const fn image(array: &'static str, names: &'static [&'static str], ranks: &'static [usize]) -> InputRow {
    row(InputKind::Image(array), names, ranks, image_array)
}

/// All kinds of inputs and outputs except caches, which [`CACHES`] lists.
pub const INPUTS: &[InputRow] = &[
    InputRow {
        training: Training::ShapeOnly,
        ..row(InputKind::InputsEmbeds, &["inputs_embeds"], &[3], |step, input| step.embeddings(input.port.width()))
    },
    InputRow {
        training: Training::ShapeOnly,
        ..row(InputKind::InputIds, &["input_ids"], &[2], |step, _| step.input_ids())
    },
    row(InputKind::AttentionMask, &["attention_mask"], &[2], |step, _| Ok(step.attention_mask())),
    row(InputKind::PositionIds, &["position_ids"], &[2, 3], |step, input| step.position_ids(input.port.rank() == 3)),
    row(InputKind::CachePosition, &["cache_position"], &[1], |step, _| Ok(step.cache_position())),
    row(InputKind::UseCacheBranch, &["use_cache_branch"], &[], |step, input| {
        Ok(flag(input, i64::from(step.has_cache())))
    }),
    row(InputKind::LogitsToKeep, &["num_logits_to_keep", "logits_to_keep"], &[], |step, input| {
        Ok(flag(input, i64::from(step.last_only())))
    }),
    row(
        InputKind::ImageMask,
        &["visual_pos_masks", "image_mask", "images_seq_mask", "special_image_mask"],
        &[2, 3],
        |step, input| Ok(step.image_mask(input.port.rank())),
    ),
    row(InputKind::ImageTokens, &["images_emb_mask"], &[3], |step, input| step.image_tokens(&input.port)),
    row(InputKind::TokenTypes, &["token_type_ids", "mm_token_type_ids"], &[2], |step, _| Ok(step.token_types())),
    row(
        InputKind::Deepstack,
        &["deepstack_features*", "deepstack_visual_embeds*", "deepstack_embeds*", "deepstack*"],
        &[2, 3, 4],
        |step, input| input.deepstack(step),
    ),
    row(InputKind::PerLayerInputs, &["per_layer_inputs"], &[3, 4], |step, input| step.per_layer_inputs(&input.port)),
    row(
        InputKind::ImageFeatures,
        &["image_features", "image_embeds", "vision_features", "visual_features"],
        &[2, 3],
        |step, input| step.image_features(&input.port),
    ),
    row(InputKind::AudioFeatures, &["audio_features"], &[2, 3], |step, input| step.audio_features(&input.port)),
    image(PIXEL_VALUES, &["pixel_values"], &[2, 3, 4, 5]),
    image(PIXEL_ATTENTION_MASK, &["pixel_attention_mask"], &[2, 3, 4]),
    image(IMAGE_GRID_THW, &["image_grid_thw", "grid_thw"], &[2]),
    image(IMAGE_GRID_HWS, &["image_grid_hws", "grid_hws"], &[2]),
    image(IMAGE_SIZES, &["image_sizes"], &[2]),
    image(SPATIAL_SHAPES, &["spatial_shapes"], &[2]),
    image(PIXEL_POSITION_IDS, &["pixel_position_ids", "image_position_ids"], &[2, 3]),
    image(TARGET_SIZES, &["target_sizes", "tgt_sizes"], &[2, 3]),
    image(PATCH_ATTENTION_MASK, &["patch_attention_mask"], &[2, 3, 4]),
    row(InputKind::Added, &[ADDED_PREFIX], &[], caller_gives),
];

/// Prefixes of the names of a cache input and of the matching output.
pub const CACHES: &[(&str, &str)] = &[
    ("past_key_values.", "present."),
    ("past_key_values.", "present_key_values."),
    ("input.past_key_values.", "output.past_key_values."),
    ("key_cache.", "updated_key_cache."),
    ("value_cache.", "updated_value_cache."),
    ("past_key_", "present_key_"),
    ("past_value_", "present_value_"),
    ("past_conv.", "present_conv."),
    ("past_ssm.", "present_ssm."),
    ("past_recurrent.", "present_recurrent."),
];

static CACHE: InputRow =
    InputRow { kind: InputKind::Past, names: &[], ranks: &[], training: Training::Empty, make: caller_gives };

/// The row for inputs without a known meaning.
static GIVEN: InputRow =
    InputRow { kind: InputKind::Given, names: &[], ranks: &[], training: Training::Fed, make: only_given };

fn only_given(_: &Step, input: &Input) -> Result<Array> {
    Err(unknown("the graph", &input.port))
}

fn caller_gives(_: &Step, input: &Input) -> Result<Array> {
    Err(Error::invalid(
        format!("input {}", input.port.described()),
        "must be set by the caller; a step has no data for it",
    ))
}

fn image_array(step: &Step, input: &Input) -> Result<Array> {
    let InputKind::Image(name) = input.row.kind else { return caller_gives(step, input) };
    pictures::array(step.pictures(), name, &input.port)
}

/// The value with as many axes of size 1 as the input has.
fn flag(input: &Input, value: i64) -> Array {
    Array::Int(ArrayD::from_elem(IxDyn(&vec![1; input.port.rank()]), value))
}

impl InputRow {
    /// The number after a name of this row; `Some(None)` for a name without a number, `None` for other names.
    fn matches(&self, name: &str) -> Option<Option<usize>> {
        self.names.iter().find_map(|pattern| {
            if let Some(start) = pattern.strip_suffix('*') {
                let rest = name.strip_prefix(start)?;
                let number = rest.strip_prefix(['.', '_']).unwrap_or(rest);
                return if rest.is_empty() { Some(None) } else { number.parse().ok().map(Some) };
            }
            let found = if pattern.ends_with('.') { name.starts_with(pattern) } else { name == *pattern };
            found.then_some(None)
        })
    }
}

/// The row of an input or output, by name and rank, and the number in its name.
fn row_of(port: &Port) -> Option<(&'static InputRow, Option<usize>)> {
    let row = INPUTS.iter().find_map(|row| row.matches(&port.name).map(|number| (row, number)));
    row.filter(|(row, _)| row.ranks.is_empty() || row.ranks.contains(&port.rank()))
}

/// The content of an output of a vision encoder or token embedding, and the number in its name.
pub fn output_kind(port: &Port) -> Option<(InputKind, Option<usize>)> {
    row_of(port).map(|(row, number)| (row.kind, number))
}

/// True for the name of a cache input.
pub fn is_cache(name: &str) -> bool {
    CACHES.iter().any(|(past, _)| name.starts_with(past))
}

/// Possible names of the output that matches a cache input.
pub fn presents_of(name: &str) -> impl Iterator<Item = String> + '_ {
    CACHES.iter().filter_map(move |(past, present)| Some(format!("{present}{}", name.strip_prefix(past)?)))
}

impl Input {
    /// The inputs of a graph in order; `subject` names the graph in messages.
    ///
    /// Errors: `Error::Unsupported` naming an input without a known meaning.
    pub fn all<'a>(subject: &str, ports: impl IntoIterator<Item = &'a Port>) -> Result<Vec<Input>> {
        let inputs = Input::all_or_given(ports);
        match inputs.iter().find(|input| input.kind() == InputKind::Given) {
            Some(input) => Err(unknown(subject, &input.port)),
            None => Ok(inputs),
        }
    }

    /// The inputs of a graph that may take ready tensors: inputs without a known meaning become [`InputKind::Given`].
    pub fn all_or_given<'a>(ports: impl IntoIterator<Item = &'a Port>) -> Vec<Input> {
        let mut inputs = Vec::new();
        for port in ports {
            let (row, number) = match row_of(port) {
                Some(found) => found,
                None if is_cache(&port.name) => (&CACHE, None),
                None => (&GIVEN, None),
            };
            inputs.push(Input { port: port.clone(), row, number, levels: Vec::new() });
        }
        let deepstack = |input: &&Input| input.kind() == InputKind::Deepstack;
        let mut levels: Vec<usize> = inputs.iter().filter(deepstack).filter_map(|input| input.number).collect();
        levels.sort_unstable();
        for input in inputs.iter_mut().filter(|input| input.kind() == InputKind::Deepstack) {
            input.levels.clone_from(&levels);
        }
        inputs
    }

    /// Content of the input.
    pub fn kind(&self) -> InputKind {
        self.row.kind
    }

    /// True when one input takes DeepStack features of all levels.
    pub fn is_stacked(&self) -> bool {
        self.kind() == InputKind::Deepstack && self.number.is_none() && self.port.rank() > 2
    }

    /// True when DeepStack features have a row for every token, zeros at text.
    pub fn is_by_token(&self) -> bool {
        self.port.rank() - usize::from(self.is_stacked()) == 3
    }

    /// One level of DeepStack features, or all of them stacked; see [`InputKind::Deepstack`].
    fn deepstack(&self, step: &Step) -> Result<Array> {
        let width = self.port.width().unwrap_or(step.hidden_size());
        let by_token = self.is_by_token();
        let wanted = self.levels_of(step)?;
        let mut data = Vec::new();
        for &level in &wanted {
            match by_token {
                true => data.extend(step.spread_level(level, width)?),
                false => data.extend_from_slice(step.level(level)),
            }
        }
        let mut shape = if by_token { vec![step.batch(), step.time(), width] } else { vec![step.image_count(), width] };
        if self.is_stacked() {
            shape.insert(0, wanted.len());
        }
        let array = ArrayD::from_shape_vec(IxDyn(&shape), data);
        array.map(Array::Float).map_err(|e| Error::invalid("step", format!("shape {shape:?}: {e}")))
    }

    /// A step's DeepStack features for this input, by level: `[B * T, width]`, with zeros at other tokens.
    ///
    /// Errors: `Error::Invalid` when the step lacks these levels or they have another width.
    pub fn deepstack_rows(&self, step: &Step, width: usize) -> Result<Vec<Vec<f32>>> {
        self.levels_of(step)?.into_iter().map(|level| step.spread_level(level, width)).collect()
    }

    /// The step's levels for this input: the level with the same number if the vision encoder uses the decoder's
    /// numbers, otherwise the level at the same position.
    fn levels_of(&self, step: &Step) -> Result<Vec<usize>> {
        let pictured = step.image().contains(&true);
        let (numbers, count) = step.levels();
        let stacked = self.port.fixed_size(0).unwrap_or(count);
        let found = match self.number {
            None if self.is_stacked() && (!pictured || stacked == count) => Some((0..stacked).collect()),
            None if !self.is_stacked() && (!pictured || count == 1) => Some(vec![0]),
            None => None,
            Some(number) => {
                let by_number = self.levels.iter().all(|level| numbers.contains(level));
                let list = if by_number { numbers } else { &self.levels };
                let same = by_number || !pictured || self.levels.len() == count;
                list.iter().position(|&level| level == number).filter(|_| same).map(|level| vec![level])
            }
        };
        found.ok_or_else(|| {
            let taken = if self.is_stacked() { stacked } else { self.levels.len().max(1) };
            let problem = format!("takes {taken} levels of DeepStack features, there are {count}");
            Error::invalid(format!("input {}", self.port.described()), problem)
                .remedy("check that vision encoder and decoder belong to one model")
        })
    }

    /// The input's array for a step.
    ///
    /// Errors: `Error::Invalid` when the step lacks the data for it.
    pub fn make(&self, step: &Step) -> Result<Array> {
        match step.given(&self.port.name) {
            Some(array) => Ok(array.clone()),
            None => (self.row.make)(step, self),
        }
    }
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input({}, {:?})", self.port.name, self.kind())
    }
}

/// The error for an input without a known meaning.
pub(super) fn unknown(subject: &str, port: &Port) -> Error {
    let named = INPUTS.iter().find(|row| row.matches(&port.name).is_some());
    let problem = match named {
        Some(row) => {
            let ranks: Vec<String> = row.ranks.iter().map(usize::to_string).collect();
            format!("input {} has rank {}, known is {}", port.described(), port.rank(), ranks.join(" or "))
        }
        None => format!("input {} has no known meaning", port.described()),
    };
    let known: Vec<&str> = INPUTS.iter().flat_map(|row| row.names).map(|name| name.trim_end_matches('*')).collect();
    Error::unsupported(subject, problem).remedy(format!(
        "if it is one of {} under another name, rename it in the graph; if it is always the same, make it an initializer; \
         else feed it as a ready tensor, by this name in a .safetensors or .npz file that `score`, `finetune` and `eval` take \
         as `--data`",
        known.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Dim};

    fn port(name: &str, rank: usize) -> Port {
        Port { name: name.into(), dtype: DataType::Float, shape: vec![Dim::Unknown; rank] }
    }

    #[test]
    fn deepstack_levels_are_numbered_by_their_names() {
        let ports = [port("deepstack_features_17", 2), port("input_ids", 2), port("deepstack_features.5", 2)];
        let inputs = Input::all("graph", &ports).unwrap();
        let found: Vec<_> = inputs.iter().map(|input| (input.kind(), input.number, input.levels.clone())).collect();
        let deepstack = |number: usize| (InputKind::Deepstack, Some(number), vec![5, 17]);
        assert_eq!(found, [deepstack(17), (InputKind::InputIds, None, vec![]), deepstack(5)]);
        assert!(!inputs[0].is_stacked());
        assert!(Input::all("graph", &[port("deepstack_visual_embeds", 3)]).unwrap()[0].is_stacked());
    }

    #[test]
    fn every_input_name_matches_exactly_one_row() {
        for row in INPUTS {
            for name in row.names {
                let name = name.trim_end_matches('*');
                let found = INPUTS.iter().filter(|other| other.matches(name).is_some()).count();
                assert_eq!(found, 1, "{name}");
            }
        }
    }

    #[test]
    fn unknown_inputs_are_named_with_type_shape_and_remedy() {
        let error = Input::all("`decoder`", &[port("cross_states", 3)]).unwrap_err().to_string();
        assert!(error.contains("`cross_states` (float32 [?, ?, ?])") && error.contains("rename"), "{error}");
        let error = Input::all("`decoder`", &[port("attention_mask", 4)]).unwrap_err().to_string();
        assert!(error.contains("has rank 4, known is 2"), "{error}");
        assert_eq!(Input::all("`decoder`", &[port("past_conv.3", 3)]).unwrap()[0].kind(), InputKind::Past);
    }

    #[test]
    fn cache_inputs_are_recognised_and_matched_to_their_outputs() {
        let presents: Vec<String> = presents_of("past_key_values.3.key").collect();
        assert_eq!(presents, ["present.3.key", "present_key_values.3.key", "present_key_values.3.key"]);
        assert!(is_cache("past_recurrent.0") && !is_cache("position_ids"));
    }
}
