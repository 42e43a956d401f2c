//! Image processors: convert pictures to the input arrays of a vision encoder. [`ROWS`] has one row per kind of
//! processor.

mod anyres;
mod centred;
mod fixed_size;
mod gemma3;
mod gemma4;
mod got_ocr2;
mod granite_docling;
mod grid;
mod idefics3;
mod jpeg;
mod levels;
mod lfm2_vl;
mod minicpm_v;
mod ovis2;
mod patches;
mod picture;
mod pixtral;
mod resample;
mod rule;
mod settings;

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::prompt::{Array, ImageArrays};

use super::sample::ImageBytes;

pub use picture::{Picture, Transparency};
pub use resample::{BackEnd, Filter, Scaler};
use rule::ImageRule;
pub use rule::{ImageLayout, VideoLayout};
pub(super) use settings::ProcessorSettings;

/// Output of an image processor for the pictures of one prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageInputs {
    /// Inputs of the vision encoder, one entry per picture and per moment of a video.
    pub pictures: Vec<Arc<ImageArrays>>,
    /// Layout of each picture and video, in order.
    pub shown: Vec<Shown>,
}

/// A picture or a video of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub enum Shown {
    /// A still picture and its layout.
    Picture(ImageLayout),
    /// A video and its layout.
    Video(VideoLayout),
}

impl ImageInputs {
    /// Concatenates the arrays of this name over all pictures along axis 0, as Hugging Face's processors return them.
    ///
    /// Errors: `Error::Invalid` when a picture lacks the array, or the shapes do not match.
    pub fn joined(&self, name: &str) -> Result<Array> {
        let arrays: Option<Vec<&Array>> = self.pictures.iter().map(|picture| picture.get(name)).collect();
        let arrays = arrays.ok_or_else(|| Error::invalid("picture", format!("has no array `{name}`")))?;
        Array::joined(&arrays)
    }
}

/// Config keys that `ImageSettings::image_size` sets.
#[derive(Clone, Copy)]
enum SizeForm {
    /// `size` as a square, and `crop_size` if the config has it.
    Square,
    /// `size` with a longest edge.
    LongestEdge,
    /// No key: the size follows from numbers of pixels or from other settings.
    None,
}

pub(super) struct ProcessorRow {
    /// Class names in transformers, without the suffix `Fast` or `Pil`.
    pub types: &'static [&'static str],
    /// Class of the processor that contains this image processor, if the image processor's class determines it.
    pub processor: Option<&'static str>,
    /// Default back end of transformers.
    back_end: BackEnd,
    /// Default of `do_convert_rgb`.
    on_white: bool,
    size: SizeForm,
    /// Key that says whether large pictures are cut into tiles.
    tiles: Option<&'static str>,
    /// Key of the most tiles of a picture.
    max_tiles: Option<&'static str>,
    build: fn(&mut ProcessorSettings) -> Result<Box<dyn ImageRule>>,
}

/// Defaults of the rows. Each row sets `types` and `build`.
const USUAL: ProcessorRow = ProcessorRow {
    types: &[],
    processor: None,
    back_end: BackEnd::Torchvision,
    on_white: true,
    size: SizeForm::None,
    tiles: None,
    max_tiles: None,
    build: |_| Err(Error::unsupported("image processor", "has no rule")),
};

pub(super) const ROWS: &[ProcessorRow] = &[
    ProcessorRow {
        types: &["Idefics3ImageProcessor", "SmolVLMImageProcessor"],
        processor: Some("Idefics3Processor"),
        // transformers uses Pillow here, because torchvision before 0.27 has no Lanczos filter.
        back_end: BackEnd::Pil,
        size: SizeForm::LongestEdge,
        tiles: Some("do_image_splitting"),
        build: |settings| Ok(Box::new(idefics3::Idefics3::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"],
        processor: Some("Qwen2VLProcessor"),
        build: |settings| Ok(Box::new(patches::Patches::qwen2_vl(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Glm4vImageProcessor", "Glm46VImageProcessor"],
        processor: Some("Glm4vProcessor"),
        build: |settings| Ok(Box::new(patches::Patches::glm4v(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["PaddleOCRVLImageProcessor"],
        processor: Some("PaddleOCRVLProcessor"),
        build: |settings| Ok(Box::new(patches::Patches::paddleocr_vl(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["CLIPImageProcessor"],
        processor: Some("LlavaProcessor"),
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(fixed_size::FixedSize::clip(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["LlavaImageProcessor"],
        processor: Some("LlavaProcessor"),
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(fixed_size::FixedSize::llava(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["SiglipImageProcessor"],
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(fixed_size::FixedSize::siglip(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["LlavaOnevisionImageProcessor"],
        processor: Some("LlavaOnevisionProcessor"),
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(anyres::AnyRes::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["GotOcr2ImageProcessor"],
        processor: Some("InternVLProcessor"),
        size: SizeForm::Square,
        tiles: Some("crop_to_patches"),
        max_tiles: Some("max_patches"),
        build: |settings| Ok(Box::new(got_ocr2::GotOcr2::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Gemma3ImageProcessor"],
        processor: Some("Gemma3Processor"),
        size: SizeForm::Square,
        tiles: Some("do_pan_and_scan"),
        build: |settings| Ok(Box::new(gemma3::Gemma3::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["PixtralImageProcessor"],
        processor: Some("PixtralProcessor"),
        size: SizeForm::LongestEdge,
        build: |settings| Ok(Box::new(pixtral::Pixtral::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Lfm2VlImageProcessor"],
        processor: Some("Lfm2VlProcessor"),
        tiles: Some("do_image_splitting"),
        max_tiles: Some("max_tiles"),
        build: |settings| Ok(Box::new(lfm2_vl::Lfm2Vl::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Gemma4ImageProcessor"],
        processor: Some("Gemma4Processor"),
        build: |settings| Ok(Box::new(gemma4::Gemma4::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["Ovis2ImageProcessor"],
        processor: Some("Ovis2Processor"),
        size: SizeForm::Square,
        tiles: Some("crop_to_patches"),
        max_tiles: Some("max_patches"),
        build: |settings| Ok(Box::new(ovis2::Ovis2::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["GraniteDoclingImageProcessor"],
        processor: Some("GraniteDoclingProcessor"),
        size: SizeForm::Square,
        tiles: Some("crop_to_patches"),
        max_tiles: Some("max_patches"),
        build: |settings| Ok(Box::new(granite_docling::GraniteDocling::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["MiniCPMV4_6ImageProcessor"],
        processor: Some("MiniCPMV4_6Processor"),
        tiles: Some("slice_mode"),
        max_tiles: Some("max_slice_nums"),
        build: |settings| Ok(Box::new(minicpm_v::MiniCpmV::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["JanusImageProcessor"],
        processor: Some("JanusProcessor"),
        on_white: false,
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(centred::Centred::new(settings)?)),
        ..USUAL
    },
    ProcessorRow {
        types: &["DeepseekVLImageProcessor"],
        processor: Some("DeepseekVLProcessor"),
        on_white: false,
        size: SizeForm::Square,
        build: |settings| Ok(Box::new(centred::Centred::new(settings)?)),
        ..USUAL
    },
];

/// Image settings that override the model's own files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ImageSettings {
    /// The fewest pixels that a picture is scaled to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_pixels: Option<usize>,
    /// The most pixels that a picture is scaled to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pixels: Option<usize>,
    /// The edge of a square, or the longest edge, in pixels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Cut large pictures into tiles, for processors that support it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles: Option<bool>,
    /// The most tiles that a picture is cut into, for processors that support it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tiles: Option<usize>,
    /// Library whose arithmetic is reproduced; by default the one that transformers uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_end: Option<BackEnd>,
}

/// Converts pictures and videos to arrays.
#[derive(Debug)]
pub(super) struct ImageProcessor {
    rule: Box<dyn ImageRule>,
    transparency: Transparency,
    /// Layout of video frames; `None` if the model takes no videos.
    video: Option<patches::Patches>,
    longest_edge: bool,
}

impl ImageProcessor {
    /// The image processor of a config. `source` is the config's file name in errors. `forced` are settings that the
    /// surrounding processor passes to every call; they override the config. `own` are the user's settings, which
    /// override both.
    ///
    /// Errors: `Error::Unsupported` for an unknown class, a key that the class does not read, or a user setting that it
    /// does not have; `Error::Invalid` for a value of the wrong type or out of range.
    pub fn new(config: &Value, source: &str, forced: Map<String, Value>, own: &ImageSettings) -> Result<Self> {
        let (kind, row) = Self::check_kind(config, source)?;
        let mut map = config.as_object().cloned().unwrap_or_default();
        map.extend(forced);
        map.extend(own.keys(row, kind, &map)?);
        // transformers saves class names without the suffix of the back end. A suffix is therefore the user's choice.
        let named = kind.ends_with("Pil").then_some(BackEnd::Pil);
        let back_end = own.back_end.or(named).unwrap_or(row.back_end);
        let mut settings = ProcessorSettings::new(source, map, back_end, own.tiles);
        let on_white = settings.bool("do_convert_rgb", row.on_white)?;
        let rule = (row.build)(&mut settings)?;
        for (flag, key, value) in
            [("--min-pixels", "min_pixels", own.min_pixels), ("--max-pixels", "max_pixels", own.max_pixels)]
        {
            if let Some(value) = value.filter(|_| settings.is_unread(key)) {
                return Err(Error::unsupported(format!("{flag} {value}"), format!("`{kind}` has no such limit"))
                    .remedy("leave it out, or set --image-size if the processor has a size"));
            }
        }
        settings.finish()?;
        let transparency = if on_white { Transparency::OnWhite } else { Transparency::Dropped };
        let longest_edge = matches!(row.size, SizeForm::LongestEdge);
        Ok(ImageProcessor { rule, transparency, video: None, longest_edge })
    }

    /// The class name in a config, and its row.
    ///
    /// Errors: `Error::Unsupported` for an unknown class, or none; `Error::Invalid` when the config is not an object.
    pub fn check_kind<'a>(config: &'a Value, source: &str) -> Result<(&'a str, &'static ProcessorRow)> {
        if !config.is_object() {
            return Err(Error::invalid(format!("`{source}`"), "is not a JSON object")
                .remedy("restore the config that belongs to the model"));
        }
        let kind = kind(config).ok_or_else(|| {
            Error::unsupported(format!("`{source}`"), "names no `image_processor_type`")
                .remedy("add the class name of the model's image processor, such as `Qwen2VLImageProcessor`")
        })?;
        let row = row(kind).ok_or_else(|| {
            let known: Vec<&str> = ROWS.iter().flat_map(|row| row.types).copied().collect();
            Error::unsupported(
                format!("`{source}`"),
                format!("image processor `{kind}`; known are {}", known.join(", ")),
            )
            .remedy("use samples without pictures, or a model with one of these processors")
        })?;
        Ok((kind, row))
    }

    /// True where `ImageSettings::image_size` is the longest edge, and not the size that the network was made for.
    pub fn has_longest_edge(&self) -> bool {
        self.longest_edge
    }

    /// Adds support for videos, with the video processor's config.
    ///
    /// Errors: as `new`.
    pub fn read_video(&mut self, config: &Value) -> Result<()> {
        let map = config.as_object().cloned().unwrap_or_default();
        let mut settings = ProcessorSettings::new("the video processor's config", map, BackEnd::Torchvision, None);
        self.video = Some(patches::Patches::qwen3_vl_video(&mut settings)?);
        settings.finish()
    }

    /// Processes the pictures and videos of one conversation.
    ///
    /// Errors: `Error::Invalid` for a picture that does not decode or that the rule does not accept;
    /// `Error::Unsupported` for a video if the model takes none.
    pub fn open(&self, images: &[ImageBytes]) -> Result<ImageInputs> {
        let count = images.iter().filter(|image| image.as_frames().is_none()).count();
        let mut inputs = ImageInputs::default();
        for image in images {
            match image.as_frames() {
                None => self.picture(&Picture::decode(image, self.transparency)?, count, &mut inputs)?,
                Some(frames) => {
                    let video = self.video.as_ref().ok_or_else(|| {
                        Error::unsupported(&image.subject, "is a video, which this model's processor does not take")
                            .remedy("give its frames as pictures")
                    })?;
                    let decode = |(_, frame): &(f64, ImageBytes)| Picture::decode(frame, self.transparency);
                    let pictures = frames.iter().map(decode).collect::<Result<Vec<_>>>()?;
                    let times: Vec<f64> = frames.iter().map(|(time, _)| *time).collect();
                    let (moments, layout) = video.video(&pictures, &times)?;
                    for arrays in moments {
                        inputs.pictures.push(Arc::new(ImageArrays::new(arrays)?));
                    }
                    inputs.shown.push(Shown::Video(layout));
                }
            }
        }
        Ok(inputs)
    }

    fn picture(&self, picture: &Picture, count: usize, inputs: &mut ImageInputs) -> Result<()> {
        let (arrays, layout) = self.rule.process(picture, count)?;
        inputs.pictures.push(Arc::new(ImageArrays::new(arrays)?));
        inputs.shown.push(Shown::Picture(layout));
        Ok(())
    }

    /// Processes one decoded picture.
    #[cfg(test)]
    pub fn process(&self, picture: &Picture) -> Result<ImageInputs> {
        let mut inputs = ImageInputs::default();
        self.picture(picture, 1, &mut inputs)?;
        Ok(inputs)
    }
}

/// The image processor's class name in a config.
pub(super) fn kind(config: &Value) -> Option<&str> {
    config.get("image_processor_type").or_else(|| config.get("feature_extractor_type")).and_then(Value::as_str)
}

/// Class of the processor that contains an image processor of class `kind`, if `kind` determines it.
pub(super) fn processor_of(kind: &str) -> Option<&'static str> {
    row(kind).and_then(|row| row.processor)
}

fn row(kind: &str) -> Option<&'static ProcessorRow> {
    let bare = kind.strip_suffix("Fast").or_else(|| kind.strip_suffix("Pil")).unwrap_or(kind);
    let bare = bare.strip_suffix("FeatureExtractor").map_or(bare.to_string(), |bare| format!("{bare}ImageProcessor"));
    ROWS.iter().find(|row| row.types.contains(&bare.as_str()))
}

impl ImageSettings {
    /// True when no setting overrides the model's files.
    pub fn is_default(&self) -> bool {
        *self == ImageSettings::default()
    }

    /// The config keys that these settings set, those of tiles aside.
    fn keys(&self, row: &ProcessorRow, kind: &str, config: &Map<String, Value>) -> Result<Map<String, Value>> {
        let mut keys = Map::new();
        let mut set = |key: &str, value: Option<usize>| {
            if let Some(value) = value {
                keys.insert(key.to_string(), value.into());
            }
        };
        set("min_pixels", self.min_pixels);
        set("max_pixels", self.max_pixels);
        match (row.max_tiles, self.max_tiles) {
            (Some(key), most) => set(key, most),
            (None, Some(_)) => {
                let problem = format!("`{kind}` has no such limit");
                return Err(Error::unsupported("number of image tiles", problem)
                    .remedy("leave `--max-image-tiles` out, or set `--image-size` or `--image-tiles`"));
            }
            (None, None) => {}
        }
        let Some(edge) = self.image_size else { return Ok(keys) };
        let square = serde_json::json!({"height": edge, "width": edge});
        match row.size {
            SizeForm::Square => {
                keys.insert("size".into(), square.clone());
                if config.get("crop_size").is_some_and(|size| !size.is_null()) {
                    keys.insert("crop_size".into(), square);
                }
            }
            SizeForm::LongestEdge => {
                keys.insert("size".into(), serde_json::json!({"longest_edge": edge}));
            }
            SizeForm::None => {
                return Err(Error::unsupported("image size", format!("`{kind}` has no size of its own to set"))
                    .remedy("set the numbers of pixels instead"));
            }
        }
        Ok(keys)
    }

    /// The keys with which the processor's config has the effect of these settings; `None` where no key has it.
    ///
    /// Errors: as `ImageProcessor::check_kind`; `Error::Unsupported` for a setting that the processor does not have.
    pub(super) fn stored(&self, config: &Value, source: &str) -> Result<Option<Map<String, Value>>> {
        let (kind, row) = ImageProcessor::check_kind(config, source)?;
        let map = config.as_object().cloned().unwrap_or_default();
        let mut keys = self.keys(row, kind, &map)?;
        match (self.tiles, row.tiles) {
            (Some(tiles), Some(key)) => drop(keys.insert(key.to_string(), tiles.into())),
            (Some(_), None) => return Ok(None),
            (None, _) => {}
        }
        // transformers 5 saves limits in pixels as edges of `size`.
        if let Some(size) = map.get("size").and_then(Value::as_object) {
            for (key, edge) in [("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")] {
                if !size.get(edge).is_some_and(Value::is_number) {
                    continue;
                }
                let Some(pixels) = keys.get(key).cloned() else { continue };
                if !map.contains_key(key) {
                    keys.remove(key);
                }
                let size = keys.entry("size").or_insert_with(|| Value::Object(size.clone()));
                size[edge] = pixels;
            }
        }
        Ok(self.back_end.is_none().then_some(keys))
    }
}
