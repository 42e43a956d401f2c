//! Encodes conversations about pictures as network inputs: token ids, pixel values and the mask of answer tokens.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use crate::bundle::{Bundle, Role};
use crate::onnx;
use crate::prompt::{GivenRow, Prompt};

use super::families::family_of;
use super::images::{ImageInputs, ImageProcessor, ImageSettings, Shown};
use super::levers::LEVERS;
use super::placeholders::{self, Ordinal, Placeholder};
use super::sample::{ImageBytes, MessagePart};
use super::template::{ChatMessage, ChatTemplate, Content, ContentPart};
use super::tokenizer::Tokenizer;

/// An encoded sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// Name in errors.
    pub id: String,
    /// Token ids. Each image placeholder is expanded to one id per image feature.
    pub input_ids: Vec<i64>,
    /// For each id: true if it belongs to an answer, including the answer's end token. All false in a prompt.
    pub answer_mask: Vec<bool>,
    /// Positions of the image features in `input_ids`, in order.
    pub image_positions: Vec<usize>,
    /// `None` without pictures.
    pub images: Option<ImageInputs>,
    /// Graph inputs from a row of ready tensors; `None` for a sample that a processor encoded.
    pub given: Option<GivenRow>,
}

impl Encoded {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// True when there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Converts to the input of a session.
    pub fn into_prompt(self) -> Prompt {
        let pictures = self.images.map(|images| images.pictures).unwrap_or_default();
        let question = self.answer_mask.iter().position(|&answer| answer);
        Prompt { input_ids: self.input_ids, pictures, question, given: self.given }
    }
}

/// A model's image processor, chat template and tokenizer.
#[derive(Debug)]
pub struct Processor {
    pub(super) tokenizer: Tokenizer,
    /// `None` for a model without a chat template.
    template: Option<ChatTemplate>,
    /// Name of the model in errors.
    subject: String,
    vision: Option<PictureEncoding>,
    /// Error message for an image processor that is not supported.
    unknown_images: Option<String>,
    pub(super) eos: Vec<u32>,
}

#[derive(Debug)]
struct PictureEncoding {
    images: ImageProcessor,
    /// Keys with which the config has the effect of the user's settings; `None` where the processor overrides them.
    stored: Option<Map<String, Value>>,
    placeholder: Placeholder,
    /// Id of the token at the position of one image feature.
    feature_id: u32,
    /// Id of the token at the position of one video feature. `Encoded::input_ids` has `feature_id` in its place.
    video_id: Option<u32>,
}

impl Processor {
    /// Opens the processor of a model from the model's files.
    ///
    /// If the image processor or one of its settings is not supported, only text without pictures can be encoded; see
    /// [`Processor::warning`].
    ///
    /// Errors: `Error::Invalid` when a file is missing, malformed or contradicts another.
    pub fn open(bundle: &Bundle) -> Result<Self> {
        Self::open_with(bundle, &ImageSettings::default())
    }

    /// As `open`, with user settings that override the files'.
    ///
    /// Errors: as `open`; `Error::Unsupported` when the image processor does not support a setting, or when settings
    /// are given and the image processor itself is not supported.
    pub fn open_with(bundle: &Bundle, settings: &ImageSettings) -> Result<Self> {
        let mut tokenizer = Tokenizer::open(bundle)?;
        let processor_config = bundle.read_json("processor_config.json")?.unwrap_or(Value::Null);
        let (vision, unknown_images) = match PictureEncoding::open(bundle, &processor_config, &tokenizer, settings) {
            Ok(vision) => (vision, None),
            // With user settings, an image processor that is not supported is an error: the settings would have no
            // effect.
            Err(error @ Error::Unsupported { .. }) if settings.is_default() => (None, Some(error.to_string())),
            Err(error) => return Err(error),
        };
        let mut template = read_template(bundle, &processor_config, &tokenizer)?;
        if let Some(PictureEncoding { placeholder, .. }) = &vision {
            tokenizer.special_tokens = placeholder.special_tokens;
            if template.is_none()
                && let Some(own) = placeholder.template
            {
                template = Some(ChatTemplate::new("the processor's own prompt", own, tokenizer.tokens.clone())?);
            }
        }
        let mut eos: Vec<u32> = Vec::new();
        if let Some(config) = bundle.config() {
            eos.extend(config.eos_token_ids.iter().filter_map(|id| u32::try_from(*id).ok()));
        }
        eos.extend(tokenizer.named("eos_token").and_then(|token| tokenizer.id(token)));
        eos.sort_unstable();
        eos.dedup();
        let subject = format!("`{}`", bundle.root().display());
        Ok(Processor { tokenizer, template, subject, vision, unknown_images, eos })
    }

    /// Note for a model that gets less detail of a large picture than in Hugging Face's code, because its graphs take
    /// no tiles; `None` for other models.
    ///
    /// Errors: as `onnx::load`.
    pub fn note(&self, bundle: &Bundle) -> Result<Option<String>> {
        let Some(vision) = &self.vision else { return Ok(None) };
        Ok(match Packing::of(bundle, &vision.placeholder)? {
            Packing::Nowhere(problem) => {
                Some(format!("a picture is one view, as in transformers.js, and is not cut into tiles: {problem}"))
            }
            Packing::Unneeded | Packing::Graph(_) => None,
        })
    }

    /// Keys of the image processor's config with the effect of the settings that this processor was opened with; `None`
    /// without an image processor, or where it passes other values to every call.
    pub fn stored_settings(&self) -> Option<&Map<String, Value>> {
        self.vision.as_ref()?.stored.as_ref()
    }

    /// Image settings with which this picture may have fewer tokens, judged by its layout under the model's own ones.
    ///
    /// Errors: as `ImageProcessor::open`.
    pub(super) fn smaller_pictures(&self, picture: &ImageBytes) -> Result<Vec<ImageSettings>> {
        let Some(vision) = &self.vision else { return Ok(Vec::new()) };
        let shown = vision.images.open(std::slice::from_ref(picture))?.shown;
        let Some(Shown::Picture(layout)) = shown.first() else { return Ok(Vec::new()) };
        Ok(LEVERS.iter().flat_map(|lever| (lever.settings)(layout, vision.images.has_longest_edge())).collect())
    }

    /// Warning when the model's image processor is not supported; `None` when it is.
    pub fn warning(&self) -> Option<String> {
        let problem = self.unknown_images.as_ref()?;
        Some(format!("{problem}; only text without pictures can be read"))
    }

    fn no_pictures(&self, id: &str) -> Error {
        match &self.unknown_images {
            Some(problem) => Error::unsupported(id, format!("has pictures: {problem}"))
                .remedy("take samples without pictures, or running text"),
            // The model's fault and not the row's, so that no row is left out for it.
            None => {
                Error::unsupported(&self.subject, format!("{id} has pictures, but the model has no image processor"))
                    .remedy("use samples without pictures, or put `preprocessor_config.json` beside the model")
            }
        }
    }

    /// Ids with which every text can be written and ended: added tokens, tokens of one byte or character, and end tokens.
    pub fn essential_ids(&self) -> BTreeSet<u32> {
        self.tokenizer.essential().into_iter().chain(self.eos.iter().copied()).collect()
    }

    /// Ids that end the generation.
    #[cfg(test)]
    pub fn eos_ids(&self) -> Vec<i64> {
        self.eos.iter().map(|id| i64::from(*id)).collect()
    }

    /// Id of the token at the position of one image feature; `None` when pictures cannot be encoded.
    pub fn image_token_id(&self) -> Option<i64> {
        self.vision.as_ref().map(|vision| i64::from(vision.feature_id))
    }

    /// Text of generated ids, without special tokens.
    ///
    /// Errors: `Error::Invalid` for a negative id, or when the tokenizer fails.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        self.tokenizer.decode(ids)
    }

    /// Encodes a question with its pictures, up to the start of the model's answer. `id` is the name of the sample in
    /// errors.
    ///
    /// Errors: `Error::Invalid` when a picture does not decode, the template fails, or the text does not have one
    /// placeholder per picture; `Error::Unsupported` for pictures when the image processor is not supported.
    pub fn encode_question(&self, id: &str, question: &[MessagePart], images: &[ImageBytes]) -> Result<Encoded> {
        self.encode_messages(id, &[self.user(question, images)?], images, true)
    }

    /// Encodes messages with no token marked. `prompt` adds the template's generation prompt.
    pub(super) fn encode_messages(
        &self,
        id: &str,
        messages: &[ChatMessage],
        images: &[ImageBytes],
        prompt: bool,
    ) -> Result<Encoded> {
        let images = self.images(id, images)?;
        let text = self.render(id, messages, prompt)?;
        let ids = self.tokenizer.encode(&self.expand(id, &text, images.as_ref(), true)?)?;
        let answer_mask = vec![false; ids.len()];
        Ok(self.encoded(id, ids, answer_mask, images))
    }

    pub(super) fn user(&self, parts: &[MessagePart], images: &[ImageBytes]) -> Result<ChatMessage> {
        let part = |part: &MessagePart| match part {
            MessagePart::Image(place) if images.get(*place).is_some_and(|image| image.as_frames().is_some()) => {
                ContentPart::Video
            }
            MessagePart::Image(_) => ContentPart::Image,
            MessagePart::Text(text) => ContentPart::Text { text: text.clone() },
        };
        let parts: Vec<ContentPart> = parts.iter().map(part).collect();
        let shown = |part: &ContentPart| !matches!(part, ContentPart::Text { .. });
        if self.vision.is_none() && parts.iter().any(shown) {
            return Err(self.no_pictures("data"));
        }
        Ok(self.parts("user", parts))
    }

    /// A message of text alone.
    pub(super) fn message(&self, role: &'static str, text: &str) -> ChatMessage {
        self.parts(role, vec![ContentPart::Text { text: text.to_string() }])
    }

    /// A message in the form that the template expects: a list of parts, or one string with placeholder markers.
    pub(super) fn parts(&self, role: &'static str, parts: Vec<ContentPart>) -> ChatMessage {
        if self
            .template
            .as_ref()
            .is_some_and(|template| template.takes_parts(self.vision.is_some() || self.unknown_images.is_some()))
        {
            return ChatMessage { role, content: Content::Parts(parts) };
        }
        let mut text = String::new();
        for part in &parts {
            match (part, &self.vision) {
                (ContentPart::Text { text: piece }, _) => text.push_str(piece),
                (ContentPart::Image, Some(vision)) => {
                    text.push_str(&vision.placeholder.marker);
                    text.push('\n');
                }
                (ContentPart::Video, Some(PictureEncoding { placeholder, .. })) => {
                    text.push_str(placeholder.video.as_ref().map_or("", |video| &video.marker));
                    text.push('\n');
                }
                (ContentPart::Image | ContentPart::Video, None) => {}
            }
        }
        ChatMessage { role, content: Content::Text(text) }
    }

    /// The chat template, which conversations need.
    ///
    /// Errors: `Error::Invalid` for a model without one.
    pub(super) fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| {
            Error::invalid(&self.subject, "has no chat template").remedy(
                "expected chat_template.jinja, or `chat_template` in tokenizer_config.json; running text needs none",
            )
        })
    }

    /// The error of conversations for a model without a chat template; `None` for a model with one.
    pub fn without_template(&self) -> Option<String> {
        self.template().err().map(|error| error.to_string())
    }

    pub(super) fn render(&self, id: &str, messages: &[ChatMessage], prompt: bool) -> Result<String> {
        let template = self.template()?;
        // The template's error has a remedy.
        let text = template.render(messages, prompt).map_err(|error| Error::invalid(id, error.to_string()))?;
        // Answers are not checked: templates remove the reasoning of earlier turns.
        let given = messages.iter().filter(|message| message.role != "assistant");
        match given.flat_map(ChatMessage::texts).find(|part| !text.contains(part.trim())) {
            Some(lost) => Err(Error::invalid(
                id,
                format!("the chat template drops the text `{}`", lost.trim().chars().take(60).collect::<String>()),
            )
            .remedy("expected a template that takes the content in the form that the model's processor gives it")),
            None => Ok(text),
        }
    }

    pub(super) fn images(&self, id: &str, images: &[ImageBytes]) -> Result<Option<ImageInputs>> {
        match &self.vision {
            _ if images.is_empty() => Ok(None),
            Some(vision) => vision.images.open(images).map(Some),
            None => Err(self.no_pictures(id)),
        }
    }

    /// Expands the image markers of a rendered text. With `all`, the text must have one marker per picture; otherwise
    /// it may have fewer.
    ///
    /// Errors: `Error::Invalid` for another number of markers.
    pub(super) fn expand(&self, id: &str, text: &str, images: Option<&ImageInputs>, all: bool) -> Result<String> {
        let shown = images.map(|images| images.shown.as_slice()).unwrap_or_default();
        let Some(vision) = &self.vision else { return Ok(text.to_string()) };
        let (expanded, taken) = vision.expand(text, shown).map_err(|problem| Error::invalid(id, problem))?;
        let fits = if all { taken == shown.len() } else { taken <= shown.len() };
        if !fits {
            let marker = &vision.placeholder.marker;
            return Err(Error::invalid(
                id,
                format!("its text holds `{marker}` {taken} times, but it has {} pictures", shown.len()),
            )
            .remedy("write one placeholder for each picture"));
        }
        Ok(expanded)
    }

    pub(super) fn encoded(
        &self,
        id: &str,
        ids: Vec<u32>,
        answer_mask: Vec<bool>,
        images: Option<ImageInputs>,
    ) -> Encoded {
        let image = self.vision.as_ref().map(|vision| vision.feature_id);
        let video = self.vision.as_ref().and_then(|vision| vision.video_id);
        // The graph reads features of pictures and videos at the same token id.
        let ids = ids.into_iter().map(|token| image.filter(|_| video == Some(token)).unwrap_or(token));
        let ids: Vec<u32> = ids.collect();
        let positions = ids.iter().enumerate().filter(|(_, token)| Some(**token) == image);
        Encoded {
            id: id.to_string(),
            image_positions: positions.map(|(place, _)| place).collect(),
            input_ids: ids.into_iter().map(i64::from).collect(),
            answer_mask,
            images,
            given: None,
        }
    }
}

/// Where the features of a picture's tiles are packed for the prompt.
enum Packing {
    /// They need no packing, or there is no vision encoder.
    Unneeded,
    /// In the graph of the vision encoder. The reason that it always gets tiles.
    Graph(String),
    /// They need packing, but the vision encoder has no input for it. The reason that tiles cannot be used.
    Nowhere(String),
}

impl Packing {
    fn of(bundle: &Bundle, placeholder: &Placeholder) -> Result<Self> {
        let (Some(input), Some(vision)) = (placeholder.packed_by, bundle.component(Role::VisionEncoder)) else {
            return Ok(Packing::Unneeded);
        };
        let graph = onnx::load(&bundle.path_of(vision))?.graph;
        Ok(match graph.input(input) {
            Some(_) => Packing::Graph(format!(
                "`{}` has an input `{input}`: it packs the features of tiles, and a single view is not what it expects",
                vision.file
            )),
            None => Packing::Nowhere(format!(
                "`{}` has no input `{input}`; cutting the padding off the tiles' features and putting newlines between \
                 them is in no graph of the folder",
                vision.file
            )),
        })
    }

    /// The setting for tiles: the user's, or true for a vision encoder that packs them.
    ///
    /// Errors: `Error::Unsupported` for a setting that does not fit the vision encoder.
    fn tiles(self, own: Option<bool>) -> Result<Option<bool>> {
        match (self, own) {
            (Packing::Nowhere(problem), Some(true)) => Err(Error::unsupported("image tiles", problem)
                .remedy("leave `--image-tiles` out: a picture is then one view, as in transformers.js")),
            (Packing::Graph(problem), Some(false)) => Err(Error::unsupported("no image tiles", problem)
                .remedy("leave `--image-tiles` out: the only picture of a conversation is then cut into tiles")),
            (Packing::Graph(_), None) => Ok(Some(true)),
            (_, own) => Ok(own),
        }
    }
}

impl PictureEncoding {
    /// `None` for a model without an image processor.
    fn open(
        bundle: &Bundle,
        processor_config: &Value,
        tokenizer: &Tokenizer,
        settings: &ImageSettings,
    ) -> Result<Option<Self>> {
        let nested = processor_config.get("image_processor").filter(|value| value.is_object());
        let (config, source) = match (bundle.read_json("preprocessor_config.json")?, nested) {
            (Some(config), nested) => {
                agree(&config, nested)?;
                (config, "preprocessor_config.json")
            }
            (None, Some(nested)) => (nested.clone(), "processor_config.json"),
            (None, None) => return Ok(None),
        };
        let model_type = bundle.config().map(|config| config.model_type.as_str()).unwrap_or_default();
        if let Some(family) = family_of(model_type).filter(|family| family.class.is_none()) {
            let problem = format!("belongs to {} (`{model_type}`): {}", family.name, family.note);
            return Err(Error::unsupported(format!("`{source}`"), problem));
        }
        ImageProcessor::check_kind(&config, source)?;
        let mut placeholder = placeholders::open(bundle, tokenizer, &config, processor_config)?;
        let forced = std::mem::take(&mut placeholder.image_settings);
        let tiles = Packing::of(bundle, &placeholder)?.tiles(settings.tiles)?;
        let stored = settings.stored(&config, source)?.filter(|keys| !keys.keys().any(|key| forced.contains_key(key)));
        let mut images = ImageProcessor::new(&config, source, forced, &ImageSettings { tiles, ..*settings })?;
        if placeholder.video.is_some() {
            images.read_video(&video_config(bundle, processor_config)?)?;
        }
        let feature = &placeholder.feature;
        let feature_id = tokenizer.id(feature).ok_or_else(|| {
            Error::invalid("`tokenizer.json`", format!("has no image token `{feature}`"))
                .remedy("restore `tokenizer.json` and `processor_config.json` of the same model")
        })?;
        let video_id = placeholder.video.as_ref().and_then(|video| tokenizer.id(&video.feature));
        Ok(Some(PictureEncoding { images, stored, placeholder, feature_id, video_id }))
    }

    /// Replaces each marker with the tokens of its picture or video. Returns the text and the number of markers.
    ///
    /// Errors: a message when the marker of a picture is at the place of a video, or the reverse.
    fn expand(&self, text: &str, shown: &[Shown]) -> Result<(String, usize), String> {
        let Placeholder { marker, video, .. } = &self.placeholder;
        let count = shown.iter().filter(|shown| matches!(shown, Shown::Picture(_))).count();
        let (mut out, mut rest) = (String::new(), text);
        let (mut taken, mut index) = (0, 0);
        loop {
            let image = rest.find(marker.as_str()).map(|place| (place, marker, false));
            let clip = video.as_ref().and_then(|video| Some((rest.find(video.marker.as_str())?, &video.marker, true)));
            let Some((place, found, is_video)) = [image, clip].into_iter().flatten().min_by_key(|next| next.0) else {
                break;
            };
            let (before, after) = rest.split_at(place);
            out.push_str(before);
            match (shown.get(taken), video) {
                (Some(Shown::Picture(layout)), _) if !is_video => {
                    out.push_str(&(self.placeholder.expand)(layout, Ordinal { index, count }));
                    index += 1;
                }
                (Some(Shown::Video(layout)), Some(video)) if is_video => out.push_str(&(video.expand)(layout)),
                (Some(_), _) => {
                    return Err(format!("its text holds `{found}` in another order than its pictures and videos"));
                }
                (None, _) => out.push_str(found),
            }
            taken += 1;
            rest = after.get(found.len()..).unwrap_or_default();
        }
        out.push_str(rest);
        Ok((out, taken))
    }
}

/// The video processor's config: from `processor_config.json`, else from `video_preprocessor_config.json`, else empty.
fn video_config(bundle: &Bundle, processor_config: &Value) -> Result<Value> {
    let nested = processor_config.get("video_processor").filter(|value| value.is_object());
    let own = bundle.read_json("video_preprocessor_config.json")?;
    Ok(nested.cloned().or(own).unwrap_or_else(|| Value::Object(serde_json::Map::new())))
}

/// Compares two copies of the image processor's config.
///
/// Errors: `Error::Invalid` names the first key whose values differ.
fn agree(config: &Value, nested: Option<&Value>) -> Result<()> {
    let (Some(config), Some(nested)) = (config.as_object(), nested.and_then(Value::as_object)) else { return Ok(()) };
    for (key, value) in config {
        if let Some(other) = nested.get(key).filter(|other| *other != value) {
            return Err(Error::invalid(
                "`processor_config.json`",
                format!("`image_processor.{key}` is {other}, but preprocessor_config.json says {value}"),
            )
            .remedy("keep the value that the model was trained with in both files"));
        }
    }
    Ok(())
}

/// The chat template from the first file that has one, in this order: `chat_template.jinja`, `chat_template.json`,
/// `processor_config.json`, `tokenizer_config.json`.
fn read_template(bundle: &Bundle, processor_config: &Value, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let tokens = tokenizer.tokens.clone();
    if let Some(text) = bundle.read_text("chat_template.jinja")? {
        return ChatTemplate::new("chat_template.jinja", &text, tokens).map(Some);
    }
    let own = bundle.read_json("chat_template.json")?;
    let tokenizer_config = bundle.read_json("tokenizer_config.json")?;
    let places = [
        ("chat_template.json", own.as_ref()),
        ("processor_config.json", Some(processor_config)),
        ("tokenizer_config.json", tokenizer_config.as_ref()),
    ];
    for (file, config) in places {
        let Some(value) = config.and_then(|config| config.get("chat_template")).filter(|value| !value.is_null()) else {
            continue;
        };
        let text = match value {
            Value::String(text) => Some(text.as_str()),
            Value::Array(named) => named
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|entry| entry.get("template"))
                .and_then(Value::as_str),
            _ => None,
        };
        let text = text.ok_or_else(|| {
            Error::invalid(
                format!("`chat_template` in `{file}`"),
                "expected a template, or a list with one named default",
            )
            .remedy("restore the file that belongs to the model")
        })?;
        return ChatTemplate::new(file, text, tokens).map(Some);
    }
    Ok(None)
}
