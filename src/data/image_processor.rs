//! Pictures to `pixel_values`, as `preprocessor_config.json` says: one row per `image_processor_type`.

use std::sync::Arc;

use ndarray::{ArrayD, IxDyn};
use serde_json::{Map, Value};

use crate::base::{Error, Result, list_preview};
use crate::prompt::{Array, ImageArrays};

use super::idefics3::Idefics3;
use super::picture::Picture;
use super::qwen2_vl::Qwen2Vl;
use super::resample::Filter;

/// What an image processor made of the pictures of one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageInputs {
    /// What the vision encoder reads for each picture.
    pub pictures: Vec<Arc<ImageArrays>>,
    /// How each picture stands in the text.
    pub layouts: Vec<ImageLayout>,
}

impl ImageInputs {
    /// Adds a picture: arrays by the names of the vision encoder's inputs (see [`ImageArrays`]), and how it stands in the
    /// text.
    ///
    /// Errors: as `ImageArrays::new`.
    pub(super) fn push(
        &mut self,
        arrays: impl IntoIterator<Item = (&'static str, Array)>,
        layout: ImageLayout,
    ) -> Result<()> {
        self.pictures.push(Arc::new(ImageArrays::new(arrays)?));
        self.layouts.push(layout);
        Ok(())
    }

    /// The arrays of this name of all pictures behind each other, as Hugging Face's processor gives them.
    ///
    /// Errors: `Error::Invalid` when a picture has none, or they do not fit together.
    pub fn joined(&self, name: &str) -> Result<Array> {
        let arrays: Option<Vec<&Array>> = self.pictures.iter().map(|picture| picture.get(name)).collect();
        let arrays = arrays.ok_or_else(|| Error::invalid("picture", format!("has no array `{name}`")))?;
        Array::joined(&arrays)
    }
}

/// How a picture became image features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageLayout {
    /// Tiles row by row, then the whole picture; no rows and columns when there is only the whole.
    Tiles { rows: usize, columns: usize },
    /// A run of this many features.
    Run { features: usize },
}

/// One way to make pixel values.
pub(super) trait ImageProcessor: std::fmt::Debug + Send + Sync {
    /// Errors: `Error::Invalid` for pictures that it cannot take.
    fn process(&self, pictures: &[Picture]) -> Result<ImageInputs>;
}

struct Row {
    types: &'static [&'static str],
    build: fn(&mut Settings) -> Result<Box<dyn ImageProcessor>>,
}

const ROWS: &[Row] = &[
    Row {
        types: &[
            "Idefics3ImageProcessor",
            "Idefics3ImageProcessorFast",
            "SmolVLMImageProcessor",
            "SmolVLMImageProcessorFast",
        ],
        build: |settings| Ok(Box::new(Idefics3::new(settings)?)),
    },
    Row {
        types: &["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor"],
        build: |settings| Ok(Box::new(Qwen2Vl::new(settings)?)),
    },
];

/// Keys that say nothing about still pictures.
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
    "default_to_square",
    "auto_map",
];

/// Keys whose only accepted value is the one that changes nothing.
const NEUTRAL: &[(&str, &[&str])] = &[
    ("do_center_crop", &["false"]),
    ("data_format", &["\"channels_first\""]),
    ("return_tensors", &[]),
    ("input_data_format", &[]),
    ("device", &[]),
    ("pad_size", &[]),
    ("image_seq_length", &[]),
];

/// Makes the processor that a config asks for; the numbers are those of the Pillow-based processors.
///
/// Errors: `Error::Unsupported` for an unknown type; `Error::Invalid` for a key that nobody reads or a value of the
/// wrong kind.
pub(super) fn build(config: &Value, source: &str) -> Result<Box<dyn ImageProcessor>> {
    let map = config.as_object().ok_or_else(|| Error::invalid(format!("`{source}`"), "is no JSON object"))?;
    let kind = map.get("image_processor_type").or_else(|| map.get("feature_extractor_type")).and_then(Value::as_str);
    let kind = kind.ok_or_else(|| Error::invalid(format!("`{source}`"), "has no `image_processor_type`"))?;
    let row = ROWS.iter().find(|row| row.types.contains(&kind)).ok_or_else(|| {
        let known: Vec<&str> = ROWS.iter().flat_map(|row| row.types).copied().collect();
        Error::unsupported(format!("`{source}`"), format!("image processor `{kind}`; known are {}", known.join(", ")))
    })?;
    let mut settings = Settings { source: source.to_string(), map: map.clone() };
    let processor = (row.build)(&mut settings)?;
    settings.finish()?;
    Ok(processor)
}

/// A config from which each key is taken once.
pub(super) struct Settings {
    source: String,
    map: Map<String, Value>,
}

impl Settings {
    fn error(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::invalid(format!("`{key}` in `{}`", self.source), format!("is {value}, expected {expected}"))
    }

    fn take(&mut self, key: &str) -> Option<Value> {
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

    /// A size of 1 to 65536.
    pub fn size(&mut self, key: &str, default: usize) -> Result<usize> {
        match self.take(key) {
            None => Ok(default),
            Some(value) => {
                let size = value.as_u64().filter(|size| (1..=65536).contains(size));
                size.map(|size| size as usize).ok_or_else(|| self.error(key, &value, "a size of 1 to 65536"))
            }
        }
    }

    /// A number of pixels.
    pub fn pixels(&mut self, key: &str) -> Result<Option<usize>> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|pixels| usize::try_from(pixels).ok()) {
                Some(pixels) => Ok(Some(pixels)),
                None => Err(self.error(key, &value, "a number of pixels")),
            },
        }
    }

    pub fn resample(&mut self, default: Filter) -> Result<Filter> {
        match self.take("resample") {
            None => Ok(default),
            Some(value) => {
                let number = value.as_i64().ok_or_else(|| self.error("resample", &value, "a number"))?;
                Filter::from_number(number)
            }
        }
    }

    /// Edges by name, such as `{"longest_edge": 512}`; other names are refused.
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

    /// Rescaling, then normalising.
    pub fn levels(&mut self, mean: [f64; 3], std: [f64; 3]) -> Result<Levels> {
        let rescale = self.bool("do_rescale", true)?;
        let factor = self.f64("rescale_factor", 1.0 / 255.0)?;
        let normalize = self.bool("do_normalize", true)?;
        let mean = self.channels("image_mean", mean)?;
        let std = self.channels("image_std", std)?;
        if normalize && std.contains(&0.0) {
            return Err(Error::invalid(format!("`image_std` in `{}`", self.source), "holds 0"));
        }
        Ok(Levels::new(rescale.then_some(factor), normalize.then_some((mean, std))))
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

    fn finish(mut self) -> Result<()> {
        for (key, accepted) in NEUTRAL {
            if let Some(value) = self.take(key)
                && !accepted.contains(&value.to_string().as_str())
            {
                let accepted = if accepted.is_empty() { "null".to_string() } else { accepted.join(" or ") };
                return Err(Error::unsupported(
                    format!("`{key}` in `{}`", self.source),
                    format!("is {value}, expected {accepted}"),
                ));
            }
        }
        self.map.retain(|key, value| !SILENT.contains(&key.as_str()) && !value.is_null());
        let unread: Vec<&String> = self.map.keys().collect();
        if unread.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported(format!("`{}`", self.source), format!("nothing reads {}", list_preview(&unread, 8)))
            .remedy("a processor that ignores a setting would feed the model other pixels than it was trained on"))
    }
}

/// The float for each byte, by channel: `byte * rescale_factor` in f64 rounded to f32, then `(x - mean) / std` in f32.
#[derive(Clone, Debug)]
pub(super) struct Levels(Box<[[f32; 256]; 3]>);

impl Levels {
    fn new(rescale: Option<f64>, normalize: Option<([f64; 3], [f64; 3])>) -> Self {
        let mut table = Box::new([[0f32; 256]; 3]);
        for (channel, levels) in table.iter_mut().enumerate() {
            for (byte, level) in levels.iter_mut().enumerate() {
                let value = rescale.map_or(byte as f32, |factor| (byte as f64 * factor) as f32);
                *level = match &normalize {
                    Some((mean, std)) => (value - mean[channel] as f32) / std[channel] as f32,
                    None => value,
                };
            }
        }
        Levels(table)
    }

    /// Appends the picture as `[3, H, W]`.
    pub fn append_planes(&self, picture: &Picture, out: &mut Vec<f32>) {
        for (channel, levels) in self.0.iter().enumerate() {
            out.extend(picture.rgb().iter().skip(channel).step_by(3).map(|&byte| levels[usize::from(byte)]));
        }
    }
}

/// Floats in the given shape.
///
/// Errors: `Error::Invalid` when the data does not fill it.
pub(super) fn floats(shape: &[usize], data: Vec<f32>) -> Result<Array> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), data);
    array.map(Array::Float).map_err(|e| Error::invalid("pixel_values", e.to_string()))
}

/// One row of integers, `[1, N]`: what describes a picture as a whole, such as its grid or its size.
pub(super) fn int_row(values: &[i64]) -> Array {
    Array::Int(ArrayD::from_shape_fn(IxDyn(&[1, values.len()]), |place| values[place[1]]))
}
