//! Chat templates: Jinja in Hugging Face's dialect, in a sandbox with limits on instructions, time, memory, stack and
//! output.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, ErrorKind, State, Value as Jinja, filters};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::base::{Error, Result, confined};

/// Maximum number of instructions of one rendering. Values nest less than 250,000 deep with it, of which none takes more than 1 KB of
/// stack.
const FUEL: u64 = 2_000_000;
/// Maximum time of one rendering. A conversation takes some milliseconds.
const MAX_TIME: Duration = Duration::from_secs(10);
/// Maximum output of one rendering in bytes.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Maximum length of a template in bytes. Compiling recurses for each operator of a chain, with less than 1 KB of stack for
/// each byte.
const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Maximum width, precision, indentation or count in an argument of a filter.
const MAX_WIDTH: usize = 9999;
const NAME: &str = "chat_template";

/// One message of a conversation in the form that templates read.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ChatMessage {
    pub role: &'static str,
    pub content: Content,
}

impl ChatMessage {
    /// All texts of the content.
    pub fn texts(&self) -> Vec<&str> {
        match &self.content {
            Content::Text(text) => vec![text],
            Content::Parts(parts) => parts
                .iter()
                .filter_map(|part| match part {
                    ContentPart::Text { text } => Some(text.as_str()),
                    ContentPart::Image | ContentPart::Video => None,
                })
                .collect(),
        }
    }
}

/// Content of a message: a list of parts for vision-language models, a string for text-only models.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Content {
    Parts(Vec<ContentPart>),
    Text(String),
}

/// One part of a message.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum ContentPart {
    Image,
    Video,
    Text { text: String },
}

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    source: String,
    environment: Arc<Environment<'static>>,
    /// Maximum time of one rendering.
    limit: Duration,
    /// Special tokens by name, such as `bos_token`.
    tokens: Map<String, Value>,
    /// Forms of content that the template renders without loss.
    forms: Forms,
}

/// Forms of a message's content that a template renders without loss.
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    parts: bool,
    text: bool,
}

#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [ChatMessage],
    add_generation_prompt: bool,
    tools: Option<()>,
    documents: Option<()>,
    #[serde(flatten)]
    tokens: &'a Map<String, Value>,
}

impl ChatTemplate {
    /// Compiles a template. `source` is the name of its file, `tokens` are the special tokens by name.
    ///
    /// Errors: `Error::Invalid` when the template is longer than 256 KiB, does not compile, or takes longer than 10 s to
    /// render a question; the message has the line.
    pub fn new(source: &str, template: &str, tokens: Map<String, Value>) -> Result<Self> {
        Self::limited(source, template, tokens, MAX_TIME)
    }

    fn limited(source: &str, template: &str, tokens: Map<String, Value>, limit: Duration) -> Result<Self> {
        let remedy = "restore the template that belongs to the model";
        let subject = format!("chat template in `{source}`");
        let refused = |problem: &str| Error::invalid(subject.clone(), problem).remedy(remedy);
        if template.len() > MAX_TEMPLATE_BYTES {
            let problem = format!("is {} bytes long, expected at most {MAX_TEMPLATE_BYTES}", template.len());
            return Err(refused(&problem));
        }
        let template = without_generation_tags(template);
        let compiled = confined(limit, |problem| refused(&format!("{problem} to compile")), || compile(template))?;
        let environment = Arc::new(compiled.map_err(|e| refused(&describe(&e)))?);
        let source = source.to_string();
        let mut template = ChatTemplate { source, environment, limit, tokens, forms: Forms::default() };
        template.forms = template.probe()?;
        Ok(template)
    }

    /// True when a message's content must be a list of parts, false when it must be a string. If the template renders
    /// both forms or neither, the result is `sees`, which is true for models with an image processor.
    pub fn takes_parts(&self, sees: bool) -> bool {
        match (self.forms.parts, self.forms.text) {
            (true, false) => true,
            (false, true) => false,
            _ => sees,
        }
    }

    /// Renders a question in both forms with a word that no template contains, and looks for the word in the output.
    ///
    /// Errors: as `rendered`.
    fn probe(&self) -> Result<Forms> {
        const WORD: &str = "quincunx-7f3a";
        let text = || ContentPart::Text { text: WORD.to_string() };
        let whole = |contents: Vec<Content>| -> Result<bool> {
            for content in contents {
                let out = self.rendered(&[ChatMessage { role: "user", content }], true)?.unwrap_or_default();
                // A template that expects a string may print the list of parts literally.
                if out.contains(WORD) && !out.contains("'type'") && !out.contains("\"type\"") {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        Ok(Forms {
            parts: whole(vec![Content::Parts(vec![text()]), Content::Parts(vec![ContentPart::Image, text()])])?,
            text: whole(vec![Content::Text(WORD.to_string())])?,
        })
    }

    /// Renders a conversation.
    ///
    /// Errors: `Error::Invalid` when the template raises an exception, fails, or exceeds its limits.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.rendered(messages, add_generation_prompt)?.map_err(|problem| {
            Error::invalid(format!("chat template in `{}`", self.source), problem)
                .remedy("repair the template, or the row if it is one that the template does not take")
        })
    }

    /// Renders a conversation; the text of the inner error says why the template does not take it.
    ///
    /// Errors: as `confined`, when the template exceeds its limits.
    fn rendered(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<Result<String, String>> {
        let context = Context { messages, add_generation_prompt, tools: None, documents: None, tokens: &self.tokens };
        let (context, environment) = (Jinja::from_serialize(context), self.environment.clone());
        let exceeded = |problem: &str| {
            Error::invalid(format!("chat template in `{}`", self.source), format!("{problem} to render"))
                .remedy("restore the template that belongs to the model")
        };
        confined(self.limit, exceeded, move || {
            let mut out = Bounded(Vec::new());
            let template = environment.get_template(NAME).map_err(|e| describe(&e))?;
            template.render_captured_to(context, &mut out).map_err(|e| describe(&e))?;
            String::from_utf8(out.0).map_err(|_| "did not write UTF-8".to_string())
        })
    }
}

/// The environment in which a template runs, with the template in it.
fn compile(template: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(64);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(|state, value, method, args| {
        if let Some(format) = value.as_str().filter(|_| method == "format") {
            check_widths(format, ends_brace_field)?;
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    for (name, filter) in [
        ("indent", Jinja::from_function(filters::indent)),
        ("slice", Jinja::from_function(filters::slice)),
        ("batch", Jinja::from_function(filters::batch)),
    ] {
        environment.add_filter(name, move |state: &State<'_, '_>, args: Rest<Jinja>| {
            for size in args.iter().skip(1) {
                let named = size.is_kwargs().then(|| size.try_iter().into_iter().flatten().collect::<Vec<_>>());
                let named = named.into_iter().flatten().filter_map(|key| size.get_item(&key).ok());
                if named.chain([size.clone()]).any(|size| size.as_i64().is_some_and(|size| size > MAX_WIDTH as i64)) {
                    return Err(too_wide(name));
                }
            }
            filter.call(state, &args)
        });
    }
    environment.add_filter("format", |state: &State<'_, '_>, format: &Jinja, args: Rest<Jinja>| {
        check_widths(format.as_str().unwrap_or_default(), ends_percent_field)?;
        filters::format(state, format, args)
    });
    environment.add_template_owned(NAME, template)?;
    Ok(environment)
}

fn too_wide(place: &str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, format!("{place}: a width or count above {MAX_WIDTH}"))
}

/// True when the text behind a number shows that it ends a field of a `%` format.
fn ends_percent_field(after: &str) -> bool {
    let after = after.strip_prefix('.').filter(|after| after.starts_with(char::is_alphanumeric)).unwrap_or(after);
    after.starts_with(|c: char| c.is_alphanumeric() || c == '%')
}

/// True when the text behind a number shows that it ends a field of a `{}` format.
fn ends_brace_field(after: &str) -> bool {
    after.trim_start_matches(|c: char| c.is_alphanumeric() || ",_.%".contains(c)).starts_with('}')
}

/// Errors: when a field has a width or precision above `MAX_WIDTH`.
fn check_widths(format: &str, ends_field: fn(&str) -> bool) -> Result<(), minijinja::Error> {
    let most_digits = MAX_WIDTH.to_string().len();
    let mut rest = format;
    while let Some(begin) = rest.find(|c: char| c.is_ascii_digit()) {
        let (_, number) = rest.split_at(begin);
        let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
        rest = &number[digits..];
        if digits > most_digits && ends_field(rest) {
            return Err(too_wide("format"));
        }
    }
    Ok(())
}

fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// Output buffer with a maximum size.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(format!("writes more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Replaces `{% generation %}` with `{% if true %}`. The tag marks the assistant's text and does not change it.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        match tag.trim_start_matches("{%").trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(
        ErrorKind::InvalidOperation,
        format!("the template refuses this conversation: {message}"),
    ))
}

/// The current local time in the given `strftime` format.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let failed = || minijinja::Error::new(ErrorKind::InvalidOperation, "strftime_now: the format cannot be written");
    let format = std::ffi::CString::new(format).map_err(|_| failed())?;
    if format.as_bytes().is_empty() {
        return Ok(String::new());
    }
    let mut buffer = [0u8; 512];
    // SAFETY: `time` accepts null; `tm` is plain data that `localtime_r` fills; `strftime` writes at most
    // `buffer.len()` bytes and reads a NUL-terminated string.
    let written = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut local).is_null() {
            return Err(failed());
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), format.as_ptr(), &local)
    };
    let text = buffer.get(..written).filter(|text| !text.is_empty()).ok_or_else(failed)?;
    String::from_utf8(text.to_vec()).map_err(|_| failed())
}

/// The filter `tojson`: `json.dumps(value, ensure_ascii=False, indent=.., sort_keys=.., separators=..)`.
fn tojson(value: Jinja, positional: Rest<Jinja>, options: Kwargs) -> Result<String, minijinja::Error> {
    let refuse = |what: &str| minijinja::Error::new(ErrorKind::InvalidOperation, format!("tojson: {what}"));
    let indent: Option<Jinja> = options.get("indent")?;
    let indent = indent.filter(|indent| !indent.is_none());
    let indent =
        indent.map(|indent| indent.as_usize().filter(|n| *n <= 16).ok_or_else(|| refuse("indent must be 0 to 16")));
    let indent = indent.transpose()?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if !positional.0.is_empty() || ensure_ascii == Some(true) {
        return Err(refuse("only the options indent, sort_keys, separators and ensure_ascii=false are supported"));
    }
    let json = serde_json::to_value(&value).map_err(|e| refuse(&e.to_string()))?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(refuse("separators must be two strings")),
    };
    let mut out = String::new();
    Dump { indent, item, key, sort: sort_keys == Some(true) }.write(&json, 0, &mut out);
    Ok(out)
}

/// Writes JSON with Python's separators and indentation.
struct Dump<'a> {
    indent: Option<usize>,
    item: &'a str,
    key: &'a str,
    sort: bool,
}

impl Dump<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Array(items) if !items.is_empty() => {
                out.push('[');
                for (place, item) in items.iter().enumerate() {
                    self.separate(place, depth + 1, out);
                    self.write(item, depth + 1, out);
                }
                self.line(depth, out);
                out.push(']');
            }
            Value::Object(members) if !members.is_empty() => {
                let mut members: Vec<(&String, &Value)> = members.iter().collect();
                if self.sort {
                    members.sort_by_key(|(key, _)| *key);
                }
                out.push('{');
                for (place, (key, member)) in members.into_iter().enumerate() {
                    self.separate(place, depth + 1, out);
                    out.push_str(&Value::from(key.as_str()).to_string());
                    out.push_str(self.key);
                    self.write(member, depth + 1, out);
                }
                self.line(depth, out);
                out.push('}');
            }
            scalar => out.push_str(&scalar.to_string()),
        }
    }

    fn separate(&self, place: usize, depth: usize, out: &mut String) {
        if place > 0 {
            out.push_str(self.item);
        }
        self.line(depth, out);
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
