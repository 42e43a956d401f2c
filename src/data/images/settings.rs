//! Reads a processor's config. Each key is read once; a key that is never read is an error.

use serde_json::{Map, Value};

use crate::base::{Error, Result, list_preview};

use super::levels::Levels;
use super::resample::{BackEnd, Filter, Scaler};

/// Keys that do not affect still pictures.
const SILENT: &[&str] = &[
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "model_input_names",
    "return_row_col_info",
    "disable_grouping",
    "video_sampling",
    "video_processor_type",
    "_valid_processor_keys",
    "auto_map",
    "image_seq_length",
];

/// Keys with the values that change nothing. Any other value except null is an error.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("do_center_crop", &["false"]),
    ("crop_size", &[]),
    ("data_format", &["\"channels_first\""]),
    ("return_tensors", &[]),
    ("input_data_format", &[]),
    ("device", &[]),
    ("pad_size", &[]),
    ("do_pad", &["false"]),
];

/// A size in a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::data) enum Size {
    /// Both edges.
    Exact { height: usize, width: usize },
    /// The shorter edge; the longer one follows from the aspect.
    ShortestEdge(usize),
    /// Maximum of the longer edge.
    LongestEdge(usize),
}

/// A config whose keys are each read once.
pub(in crate::data) struct ProcessorSettings {
    source: String,
    map: Map<String, Value>,
    back_end: BackEnd,
    /// The user's setting for tiles, until a rule reads it.
    tiles: Option<bool>,
}

impl ProcessorSettings {
    pub fn new(source: &str, map: Map<String, Value>, back_end: BackEnd, tiles: Option<bool>) -> Self {
        ProcessorSettings { source: source.to_string(), map, back_end, tiles }
    }

    /// `Error::Invalid` for the value of one key.
    pub fn error(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::invalid(format!("`{key}` in `{}`", self.source), format!("is {value}, expected {expected}"))
            .remedy("restore the config that belongs to the model")
    }

    /// `Error::Invalid` for a combination of values.
    pub fn contradiction(&self, problem: impl Into<String>) -> Error {
        Error::invalid(format!("`{}`", self.source), problem)
    }

    /// Removes a key and returns its value; `None` for a missing key or a null.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.map.remove(key).filter(|value| !value.is_null())
    }

    pub fn bool(&mut self, key: &str, default: bool) -> Result<bool> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(key, &value, "true or false")),
        }
    }

    pub fn f64(&mut self, key: &str, default: f64) -> Result<f64> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.error(key, &value, "a number")),
        }
    }

    pub fn text(&mut self, key: &str, default: &str) -> Result<String> {
        match self.take(key) {
            None => Ok(default.to_string()),
            Some(value) => value.as_str().map(str::to_string).ok_or_else(|| self.error(key, &value, "a text")),
        }
    }

    /// An integer of 1 to 65536.
    pub fn size(&mut self, key: &str, default: usize) -> Result<usize> {
        Ok(self.count(key, 1)?.unwrap_or(default))
    }

    /// An integer of `least` to 65536; `None` for a missing key.
    pub fn count(&mut self, key: &str, least: u64) -> Result<Option<usize>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let count = value.as_u64().filter(|count| (least..=65536).contains(count));
        let count = count.ok_or_else(|| self.error(key, &value, &format!("a size of {least} to 65536")))?;
        Ok(Some(count as usize))
    }

    /// A number of pixels; `None` for a missing key.
    pub fn pixels(&mut self, key: &str) -> Result<Option<usize>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|pixels| usize::try_from(pixels).ok()) {
                Some(pixels) => Ok(Some(pixels)),
                None => Err(self.error(key, &value, "a number of pixels")),
            },
        }
    }

    /// The scaler for `resample`, which is a filter's number in Pillow, with the arithmetic of the back end.
    pub fn scaler(&mut self, default: Filter) -> Result<Scaler> {
        let filter = match self.take("resample") {
            None => default,
            Some(value) => {
                let number = value.as_i64().ok_or_else(|| self.error("resample", &value, "a number"))?;
                Filter::from_number(number)?
            }
        };
        Scaler::new(filter, self.back_end)
    }

    /// True when large pictures are cut into tiles: the user's setting, or `config` without one.
    pub fn tiles(&mut self, config: bool) -> bool {
        self.tiles.take().unwrap_or(config)
    }

    pub fn back_end(&self) -> BackEnd {
        self.back_end
    }

    /// The edges of an object such as `{"longest_edge": 512}`, in the order of `names`; `None` for a missing edge.
    /// Other names are an error.
    pub fn edges(&mut self, key: &str, names: &[&str]) -> Result<Option<Vec<Option<usize>>>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let expected = format!("an object of {}", names.join(", "));
        let map = value.as_object().ok_or_else(|| self.error(key, &value, &expected))?;
        let known = map.iter().all(|(name, size)| names.contains(&name.as_str()) || size.is_null());
        if !known {
            return Err(self.error(key, &value, &expected));
        }
        let read = |name: &&str| match map.get(*name).filter(|size| !size.is_null()) {
            None => Ok(None),
            Some(size) => match size.as_u64().filter(|size| *size >= 1).and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Ok(Some(size)),
                None => Err(self.error(key, &value, "whole numbers from 1")),
            },
        };
        names.iter().map(read).collect::<Result<Vec<_>>>().map(Some)
    }

    /// A size with edges of 1 to 65536. A single number is the edge of a square, or the shortest edge if `square` is
    /// false.
    pub fn size_of(&mut self, key: &str, square: bool) -> Result<Option<Size>> {
        const EXPECTED: &str = "`height` and `width`, `shortest_edge` or `longest_edge`, of 1 to 65536";
        let Some(value) = self.map.get(key).cloned().filter(|value| !value.is_null()) else {
            self.map.remove(key);
            return Ok(None);
        };
        let allowed = |edge: usize| (1..=65536).contains(&edge);
        let size = if let Some(edge) = value.as_u64().and_then(|edge| usize::try_from(edge).ok()) {
            self.map.remove(key);
            if square { Size::Exact { height: edge, width: edge } } else { Size::ShortestEdge(edge) }
        } else {
            match self.edges(key, &["height", "width", "shortest_edge", "longest_edge"])?.as_deref() {
                Some([Some(height), Some(width), None, None]) => Size::Exact { height: *height, width: *width },
                Some([None, None, Some(edge), None]) => Size::ShortestEdge(*edge),
                Some([None, None, None, Some(edge)]) => Size::LongestEdge(*edge),
                _ => return Err(self.error(key, &value, EXPECTED)),
            }
        };
        let fits = match size {
            Size::Exact { height, width } => allowed(height) && allowed(width),
            Size::ShortestEdge(edge) | Size::LongestEdge(edge) => allowed(edge),
        };
        if fits { Ok(Some(size)) } else { Err(self.error(key, &value, EXPECTED)) }
    }

    /// Height and width. A single number is the edge of a square.
    pub fn rectangle(&mut self, key: &str, default: [usize; 2]) -> Result<[usize; 2]> {
        match self.size_of(key, true)? {
            None => Ok(default),
            Some(Size::Exact { height, width }) => Ok([height, width]),
            Some(_) => Err(self.contradiction(format!("`{key}` has an edge alone, expected `height` and `width`"))),
        }
    }

    /// The table of rescaled and normalised values. `mean` and `std` are the defaults.
    pub fn levels(&mut self, mean: [f64; 3], std: [f64; 3]) -> Result<Levels> {
        self.levels_unless(true, mean, std)
    }

    /// As `levels`, with `normalize` as the default of `do_normalize`.
    pub fn levels_unless(&mut self, normalize: bool, mean: [f64; 3], std: [f64; 3]) -> Result<Levels> {
        let rescale = self.bool("do_rescale", true)?;
        let factor = self.f64("rescale_factor", 1.0 / 255.0)?;
        let normalize = self.bool("do_normalize", normalize)?;
        let mean = self.channels("image_mean", mean)?;
        let std = self.channels("image_std", std)?;
        if normalize && std.contains(&0.0) {
            return Err(Error::invalid(format!("`image_std` in `{}`", self.source), "holds 0")
                .remedy("restore the config that belongs to the model"));
        }
        if rescale && factor == 0.0 {
            return Err(Error::invalid(format!("`rescale_factor` in `{}`", self.source), "is 0")
                .remedy("restore the config that belongs to the model"));
        }
        Ok(Levels::new(rescale.then_some(factor), normalize.then_some((mean, std)), mean, self.back_end))
    }

    fn channels(&mut self, key: &str, default: [f64; 3]) -> Result<[f64; 3]> {
        let Some(value) = self.take(key) else { return Ok(default) };
        let numbers: Option<Vec<f64>> = match &value {
            Value::Array(items) => items.iter().map(Value::as_f64).collect(),
            _ => value.as_f64().map(|number| vec![number; 3]),
        };
        let numbers = numbers.and_then(|numbers| <[f64; 3]>::try_from(numbers).ok());
        numbers.ok_or_else(|| self.error(key, &value, "three numbers"))
    }

    /// True for a key that has a value and was not read.
    pub fn is_unread(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Checks that every key was read.
    ///
    /// Errors: `Error::Unsupported` for keys that were not read (named in the message), a key of `NEUTRAL` with a value
    /// that changes something, or a tiles setting that no rule has read.
    pub fn finish(mut self) -> Result<()> {
        if self.tiles.is_some() {
            return Err(Error::unsupported("image tiles", "this model's image processor cuts no picture into tiles")
                .remedy("leave `--image-tiles` out"));
        }
        for (key, accepted) in NEUTRAL {
            if let Some(value) = self.take(key)
                && !accepted.contains(&value.to_string().as_str())
            {
                let accepted = if accepted.is_empty() { "null".to_string() } else { accepted.join(" or ") };
                return Err(Error::unsupported(
                    format!("`{key}` in `{}`", self.source),
                    format!("is {value}, expected {accepted}"),
                )
                .remedy("run the model with samples without pictures, or restore its config"));
            }
        }
        self.map.retain(|key, value| !SILENT.contains(&key.as_str()) && !value.is_null());
        let unread: Vec<&String> = self.map.keys().collect();
        if unread.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(
            format!("`{}`", self.source),
            format!("has unknown settings: {}", list_preview(&unread, 8)),
        )
        .remedy(
            "remove them if they do not change the pixels; a setting that is ignored could feed the model other pixels",
        ))
    }
}
