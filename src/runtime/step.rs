//! Decoder inputs: embedded prompts, and steps over batches of them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ndarray::{ArrayD, IxDyn};

use crate::base::{Error, Result};
use crate::prompt::{Array, ImageArrays};

use super::port::Port;
use super::projector::Unprojected;

/// A prompt in the form of decoder inputs: `T` tokens with the values computed for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedded {
    /// `[T]` token ids.
    pub input_ids: Vec<i64>,
    /// Width of `data`; 0 when the decoder embeds the ids itself.
    pub hidden_size: usize,
    /// `[T, hidden_size]` in row-major order, with the image features merged in.
    pub data: Vec<f32>,
    /// One row of positions, or three for multimodal rotary embedding.
    pub positions: Vec<Vec<i64>>,
    /// The position of the first generated token.
    pub next_position: i64,
    /// Further per-token inputs.
    pub side: SideValues,
    /// Positions of the tokens in the whole prompt where image tokens were left out; `None` with all tokens.
    pub kept: Option<Vec<usize>>,
}

/// Further inputs of some decoders, per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SideValues {
    /// True at image tokens; empty when there are none.
    pub image: Vec<bool>,
    /// `token_type_ids`; empty when all are 0.
    pub types: Vec<i64>,
    /// DeepStack features by level, one row per image token.
    pub deepstack: Vec<Vec<f32>>,
    /// The number of each level; empty when the levels are the decoder's, in order.
    pub levels: Vec<usize>,
    /// `[T, W]`: the tokens' second embedding; empty when the model has none.
    pub per_layer: Vec<f32>,
    /// Image features, one row per image token, when the decoder's graph merges them.
    pub features: Vec<f32>,
    /// Pictures, when the decoder's graph takes them.
    pub pictures: Vec<Arc<ImageArrays>>,
    /// What the projector made the rows at image tokens from, by picture; empty unless the vision encoder keeps it.
    pub unprojected: Vec<Arc<Unprojected>>,
    /// Ready tensors for inputs by name.
    pub given: BTreeMap<String, Array>,
}

impl Embedded {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.positions.first().map_or(0, Vec::len)
    }

    /// True when there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Text tokens with positions from `first` on, in `rows` equal rows of positions.
    pub fn text(input_ids: &[i64], hidden_size: usize, data: Vec<f32>, first: i64, rows: usize) -> Self {
        let next_position = first + input_ids.len() as i64;
        let positions = vec![(first..next_position).collect(); rows.max(1)];
        Embedded {
            input_ids: input_ids.to_vec(),
            hidden_size,
            data,
            positions,
            next_position,
            side: SideValues::default(),
            kept: None,
        }
    }

    /// A range of the tokens.
    pub fn slice(&self, tokens: Range<usize>) -> Embedded {
        let time = self.len();
        let cut = |data: &[f32]| {
            let width = data.len().checked_div(time).unwrap_or(0);
            data.get(tokens.start * width..tokens.end * width).unwrap_or_default().to_vec()
        };
        let part = |row: &[i64]| row.get(tokens.clone()).unwrap_or_default().to_vec();
        let image = self.side.image.get(tokens.clone()).unwrap_or_default().to_vec();
        let before = self.side.image.iter().take(tokens.start).filter(|&&image| image).count();
        let inside = image.iter().filter(|&&image| image).count();
        let all = self.side.image.iter().filter(|&&image| image).count();
        let level = |level: &Vec<f32>| {
            let width = level.len().checked_div(all).unwrap_or(0);
            level.get(before * width..(before + inside) * width).unwrap_or_default().to_vec()
        };
        Embedded {
            input_ids: part(&self.input_ids),
            hidden_size: self.hidden_size,
            data: cut(&self.data),
            positions: self.positions.iter().map(|row| part(row)).collect(),
            next_position: self.next_position,
            side: SideValues {
                types: part(&self.side.types),
                deepstack: self.side.deepstack.iter().map(level).collect(),
                levels: self.side.levels.clone(),
                per_layer: cut(&self.side.per_layer),
                features: level(&self.side.features),
                pictures: if inside > 0 { self.side.pictures.clone() } else { Vec::new() },
                unprojected: Vec::new(),
                given: self.side.given.clone(),
                image,
            },
            kept: self.kept.as_ref().map(|kept| kept.get(tokens).unwrap_or_default().to_vec()),
        }
    }
}

/// Side on which shorter rows are padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// For rows that decoding continues.
    Left,
    /// For prefill only; positions continue in the padding.
    Right,
}

/// One step for a batch of `B` rows and `T` new positions each.
#[derive(Clone, Debug)]
pub struct Step {
    batch: usize,
    time: usize,
    /// Columns of the cache before this step, padding included; `None` for a prefill.
    past: Option<usize>,
    /// `[B, T]`.
    ids: Vec<i64>,
    hidden_size: usize,
    /// `[B, T, hidden_size]`.
    data: Vec<f32>,
    /// `[B, past + T]`.
    mask: Vec<i64>,
    /// One entry per row of positions, `[B, T]` each.
    positions: Vec<Vec<i64>>,
    /// `[B, T]`.
    image: Vec<bool>,
    /// `[B, T]`.
    types: Vec<i64>,
    /// By level, one row per image token of the batch in order.
    deepstack: Vec<Vec<f32>>,
    levels: Vec<usize>,
    /// `[B, T, W]`; empty when the model has no second embeddings.
    per_layer: Vec<f32>,
    /// One row per image token of the batch in order.
    features: Vec<f32>,
    pictures: Vec<Arc<ImageArrays>>,
    given: BTreeMap<String, Array>,
    last_only: bool,
}

impl Step {
    /// A prefill of whole prompts. `last_only` requests the logits of the last position alone, if the graph has an
    /// input for this.
    ///
    /// Errors: `Error::Invalid` when there are no tokens, or when rows have different kinds of data.
    pub fn prefill(rows: &[&Embedded], last_only: bool) -> Result<Self> {
        Step::new(rows, None, Padding::Left, last_only)
    }

    /// [`Step::prefill`] with shorter rows padded on the right.
    ///
    /// Errors: as `prefill`.
    pub fn padded_right(rows: &[&Embedded]) -> Result<Self> {
        Step::new(rows, None, Padding::Right, false)
    }

    /// A step after a cache. `past` is the mask of each row's cache columns: 0 at padding.
    ///
    /// Errors: as `prefill`, and when the numbers of masks and rows differ.
    pub fn decode(rows: &[&Embedded], past: &[Vec<i64>], last_only: bool) -> Result<Self> {
        Step::new(rows, Some(past), Padding::Left, last_only)
    }

    fn new(rows: &[&Embedded], past: Option<&[Vec<i64>]>, padding: Padding, last_only: bool) -> Result<Self> {
        let time = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let (Some(first), true) = (rows.first(), time > 0) else {
            return Err(Error::invalid("step", format!("{} rows of {time} tokens", rows.len())));
        };
        let columns = past.map(|past| past.first().map_or(0, Vec::len));
        if let Some(past) = past
            && (past.len() != rows.len() || past.iter().any(|mask| Some(mask.len()) != columns))
        {
            return Err(Error::invalid("step", format!("{} rows, masks of {} cached rows", rows.len(), past.len())));
        }
        let mut step = Step {
            batch: rows.len(),
            time,
            past: columns,
            ids: Vec::with_capacity(rows.len() * time),
            hidden_size: first.hidden_size,
            data: Vec::with_capacity(rows.len() * time * first.hidden_size),
            mask: Vec::with_capacity(rows.len() * (columns.unwrap_or(0) + time)),
            positions: vec![Vec::with_capacity(rows.len() * time); first.positions.len()],
            image: Vec::with_capacity(rows.len() * time),
            types: Vec::with_capacity(rows.len() * time),
            deepstack: Vec::new(),
            levels: Vec::new(),
            per_layer: Vec::new(),
            features: Vec::new(),
            pictures: Vec::new(),
            given: first.side.given.clone(),
            last_only,
        };
        if let Some(name) = rows.iter().filter(|_| rows.len() > 1).find_map(|row| row.side.given.keys().next()) {
            return Err(Error::invalid("step", format!("has several rows with ready tensors for `{name}`"))
                .remedy("feed such rows one at a time"));
        }
        let per_layer = rows.iter().map(|row| row.side.per_layer.len() / row.len().max(1)).max().unwrap_or(0);
        let levels = rows.iter().map(|row| row.side.deepstack.len()).max().unwrap_or(0);
        step.deepstack = vec![Vec::new(); levels];
        let numbered = rows.iter().find(|row| !row.side.deepstack.is_empty());
        step.levels = numbered.map(|row| row.side.levels.clone()).unwrap_or_default();
        for (number, row) in rows.iter().enumerate() {
            check(row, first, per_layer, levels)?;
            if let Some(past) = past {
                step.mask.extend_from_slice(&past[number]);
            }
            step.push(row, per_layer, padding);
        }
        Ok(step)
    }

    /// Appends a row. Padding is masked out; it repeats a real token, so that its values are finite.
    fn push(&mut self, row: &Embedded, per_layer: usize, padding: Padding) {
        let pad = self.time - row.len();
        let pads = |at: Padding| if at == padding { pad } else { 0 };
        let (left, right) = (pads(Padding::Left), pads(Padding::Right));
        spread(&mut self.ids, &row.input_ids, 1, left, right);
        spread(&mut self.data, &row.data, self.hidden_size, left, right);
        spread(&mut self.per_layer, &row.side.per_layer, per_layer, left, right);
        fill(&mut self.mask, &[], 0, left, 0);
        fill(&mut self.mask, &[], 1, row.len(), 0);
        fill(&mut self.mask, &[], 0, 0, right);
        let image = |step: &mut Self, real: &[bool]| fill(&mut step.image, real, false, left, right);
        match row.side.image.is_empty() {
            true => image(self, &vec![false; row.len()]),
            false => image(self, &row.side.image),
        }
        match row.side.types.is_empty() {
            true => fill(&mut self.types, &vec![0; row.len()], 0, left, right),
            false => fill(&mut self.types, &row.side.types, 0, left, right),
        }
        for (all, own) in self.positions.iter_mut().zip(&row.positions) {
            fill(all, own, 0, left, 0);
            let last = own.last().copied().unwrap_or(-1);
            all.extend((0..right as i64).map(|ahead| last + 1 + ahead));
        }
        for (all, own) in self.deepstack.iter_mut().zip(&row.side.deepstack) {
            all.extend_from_slice(own);
        }
        self.features.extend_from_slice(&row.side.features);
        self.pictures.extend(row.side.pictures.iter().cloned());
    }

    /// Width of the embeddings; 0 when there are none.
    pub(super) fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Number of new positions per row.
    pub fn time(&self) -> usize {
        self.time
    }

    /// Number of cache columns that it continues; `None` for a prefill.
    pub fn past(&self) -> Option<usize> {
        self.past
    }

    /// True when it continues a cache.
    pub fn has_cache(&self) -> bool {
        self.past.is_some()
    }

    /// True when only the last position's logits are requested.
    pub fn last_only(&self) -> bool {
        self.last_only
    }

    /// True at image tokens, `[B, T]`.
    pub fn image(&self) -> &[bool] {
        &self.image
    }

    /// A ready tensor for the input of this name.
    pub(super) fn given(&self, name: &str) -> Option<&Array> {
        self.given.get(name)
    }

    pub(super) fn pictures(&self) -> impl Iterator<Item = &ImageArrays> {
        self.pictures.iter().map(Arc::as_ref)
    }

    /// `[B, T, D]`. A larger `width` adds the DeepStack features after each row, zeros at other tokens.
    pub(super) fn embeddings(&self, width: Option<usize>) -> Result<Array> {
        let hidden = self.hidden_size;
        if hidden == 0 || self.data.len() != self.batch * self.time * hidden {
            return Err(Error::invalid("step", "holds token ids, the graph takes `inputs_embeds`"));
        }
        let width = width.unwrap_or(hidden);
        if width == hidden {
            return floats(&[self.batch, self.time, hidden], self.data.clone());
        }
        if width < hidden || !width.is_multiple_of(hidden) {
            return Err(Error::invalid("step", format!("embeddings are {hidden} wide, the graph takes {width}")));
        }
        let mut packed = Vec::with_capacity(self.batch * self.time * width);
        let levels: Vec<Vec<f32>> =
            (0..width / hidden - 1).map(|level| self.spread_level(level, hidden)).collect::<Result<_>>()?;
        for (at, row) in self.data.chunks_exact(hidden).enumerate() {
            packed.extend_from_slice(row);
            levels.iter().for_each(|level| packed.extend_from_slice(&level[at * hidden..][..hidden]));
        }
        floats(&[self.batch, self.time, width], packed)
    }

    /// The embeddings as rows: `[B * T, width]`. If `width` is larger than theirs, the DeepStack
    /// features follow each embedding.
    ///
    /// Errors: `Error::Invalid` when the step has no embeddings, or `width` is not a multiple of their width.
    pub fn embedding_rows(&self, width: usize) -> Result<Vec<f32>> {
        Ok(self.embeddings(Some(width))?.floats().map(|array| array.iter().copied().collect()).unwrap_or_default())
    }

    pub(super) fn input_ids(&self) -> Result<Array> {
        if self.ids.len() != self.batch * self.time {
            return Err(Error::invalid("step", "holds embeddings, the graph takes token ids"));
        }
        ints(&[self.batch, self.time], self.ids.clone())
    }

    pub(super) fn attention_mask(&self) -> Array {
        let columns = self.past.unwrap_or(0) + self.time;
        Array::Int(ArrayD::from_shape_fn(IxDyn(&[self.batch, columns]), |at| self.mask[at[0] * columns + at[1]]))
    }

    /// `[B, T]`, or `[3, B, T]`.
    pub(super) fn position_ids(&self, rows: bool) -> Result<Array> {
        match (rows, &self.positions[..]) {
            (false, [only]) => ints(&[self.batch, self.time], only.clone()),
            (true, [only]) => ints(&[3, self.batch, self.time], only.repeat(3)),
            (true, three) => ints(&[three.len(), self.batch, self.time], three.concat()),
            (false, many) => {
                let problem = format!("holds {} rows of positions, the graph takes one", many.len());
                Err(Error::invalid("step", problem))
            }
        }
    }

    pub(super) fn cache_position(&self) -> Array {
        let past = self.past.unwrap_or(0);
        Array::Int(ArrayD::from_shape_fn(IxDyn(&[self.time]), |at| (past + at[0]) as i64))
    }

    /// `[B, T]` or `[B, T, 1]`.
    pub(super) fn image_mask(&self, rank: usize) -> Array {
        let shape = &[self.batch, self.time, 1][..rank.clamp(2, 3)];
        Array::Bool(ArrayD::from_shape_fn(IxDyn(shape), |at| self.image[at[0] * self.time + at[1]]))
    }

    /// `[1, N, K]`: true for each of the `K` tokens of each of `N` pictures.
    pub(super) fn image_tokens(&self, port: &Port) -> Result<Array> {
        let places = self.image.iter().filter(|&&image| image).count();
        let pictures = self.pictures.len();
        let each = places.checked_div(pictures).unwrap_or_else(|| port.fixed_size(2).unwrap_or(0));
        if self.batch != 1 || each * pictures != places {
            let problem = format!("{places} image tokens of {} prompts belong to {pictures} pictures", self.batch);
            return Err(Error::invalid("step", problem).remedy("feed one prompt at a time, with pictures of one size"));
        }
        Ok(Array::Bool(ArrayD::from_elem(IxDyn(&[1, pictures, each]), true)))
    }

    pub(super) fn token_types(&self) -> Array {
        let shape = IxDyn(&[self.batch, self.time]);
        Array::Int(ArrayD::from_shape_fn(shape, |at| self.types[at[0] * self.time + at[1]]))
    }

    /// Number of image tokens in the batch.
    pub(super) fn image_count(&self) -> usize {
        self.image.iter().filter(|&&image| image).count()
    }

    /// Numbers of the DeepStack levels, and how many levels there are.
    pub(super) fn levels(&self) -> (&[usize], usize) {
        (&self.levels, self.deepstack.len())
    }

    /// The rows of a level, one per image token.
    pub(super) fn level(&self, level: usize) -> &[f32] {
        self.deepstack.get(level).map_or(&[], Vec::as_slice)
    }

    /// The rows of a level at their image tokens, zeros at other tokens: `[B * T, width]`.
    pub(super) fn spread_level(&self, level: usize, width: usize) -> Result<Vec<f32>> {
        let mut data = vec![0f32; self.batch * self.time * width];
        let places = self.image.iter().filter(|&&image| image).count();
        if places == 0 {
            return Ok(data);
        }
        let rows = self.deepstack.get(level).map_or(&[][..], Vec::as_slice);
        if rows.len() != places * width {
            let problem =
                format!("level {level} holds {} numbers, {places} image tokens take {width} each", rows.len());
            return Err(Error::invalid("DeepStack features", problem)
                .remedy("check that vision encoder and decoder belong to one model"));
        }
        let targets = data.chunks_exact_mut(width).zip(&self.image).filter(|(_, image)| **image);
        for ((target, _), row) in targets.zip(rows.chunks_exact(width)) {
            target.copy_from_slice(row);
        }
        Ok(data)
    }

    /// `[B, T, W]`, or `[B, T, L, P]`.
    pub(super) fn per_layer_inputs(&self, port: &Port) -> Result<Array> {
        let width = self.per_layer.len() / (self.batch * self.time);
        let wrong = || {
            let problem = format!("takes a second embedding of each token, there is one of {width} numbers");
            Error::invalid(format!("input {}", port.described()), problem)
                .remedy("it is the output `per_layer_inputs` of the model's token embedding component")
        };
        if width == 0 {
            return Err(wrong());
        }
        let mut shape = vec![self.batch, self.time, width];
        if port.rank() == 4 {
            let (layers, each) = match (port.fixed_size(2), port.fixed_size(3)) {
                (Some(layers), _) if layers > 0 => (layers, width / layers),
                (None, Some(each)) if each > 0 => (width / each, each),
                _ => return Err(wrong()),
            };
            if layers * each != width {
                return Err(wrong());
            }
            shape.splice(2.., [layers, each]);
        }
        floats(&shape, self.per_layer.clone())
    }

    /// `[N, D]`, or `[1, N, D]`, over the image tokens.
    pub(super) fn image_features(&self, port: &Port) -> Result<Array> {
        let places = self.image.iter().filter(|&&image| image).count();
        let width = match self.features.len().checked_div(places) {
            Some(width) if width * places == self.features.len() && width > 0 => width,
            None => port.width().unwrap_or(self.hidden_size),
            Some(_) => {
                let problem = format!("{places} image tokens have {} numbers of features", self.features.len());
                return Err(Error::invalid("step", problem));
            }
        };
        let shape = [1, places, width];
        floats(&shape[usize::from(port.rank() == 2)..], self.features.clone())
    }

    /// An array without rows, because prompts contain no sounds.
    pub(super) fn audio_features(&self, port: &Port) -> Result<Array> {
        let width = port.width().unwrap_or(self.hidden_size);
        let shape = [1, 0, width];
        floats(&shape[usize::from(port.rank() == 2)..], Vec::new())
    }
}

fn check(row: &Embedded, first: &Embedded, per_layer: usize, levels: usize) -> Result<()> {
    let time = row.len();
    let alike = row.hidden_size == first.hidden_size && row.positions.len() == first.positions.len();
    let pictured = row.side.image.contains(&true);
    let full = row.data.len() == time * row.hidden_size
        && row.positions.iter().all(|positions| positions.len() == time)
        && [row.input_ids.len(), row.side.types.len(), row.side.image.len()].iter().all(|&len| len == 0 || len == time)
        && row.side.per_layer.len() == per_layer * time
        && (!pictured || row.side.deepstack.len() == levels);
    if alike && full && time > 0 {
        return Ok(());
    }
    let problem = format!(
        "a row of {time} tokens holds {} ids, {} numbers of width {} and {} rows of positions",
        row.input_ids.len(),
        row.data.len(),
        row.hidden_size,
        row.positions.len()
    );
    Err(Error::invalid("step", problem))
}

/// Appends rows of `width` with `left` copies of the first row before and `right` copies of the last row after them.
/// Appends nothing for an empty row.
fn spread<T: Copy>(all: &mut Vec<T>, own: &[T], width: usize, left: usize, right: usize) {
    if own.is_empty() || width == 0 {
        return;
    }
    (0..left).for_each(|_| all.extend_from_slice(&own[..width]));
    all.extend_from_slice(own);
    (0..right).for_each(|_| all.extend_from_slice(&own[own.len() - width..]));
}

/// Appends `own` with `left` copies of `value` before and `right` copies after it.
fn fill<T: Copy>(all: &mut Vec<T>, own: &[T], value: T, left: usize, right: usize) {
    all.resize(all.len() + left, value);
    all.extend_from_slice(own);
    all.resize(all.len() + right, value);
}

fn floats(shape: &[usize], data: Vec<f32>) -> Result<Array> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), data);
    array.map(Array::Float).map_err(|e| Error::invalid("step", format!("shape {shape:?}: {e}")))
}

fn ints(shape: &[usize], data: Vec<i64>) -> Result<Array> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), data);
    array.map(Array::Int).map_err(|e| Error::invalid("step", format!("shape {shape:?}: {e}")))
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
