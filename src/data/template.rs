//! Chat templates: Jinja in Hugging Face's dialect, in a sandbox with limits on instructions, memory and output.

use std::io;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::base::{Error, Result, watched};

/// Maximum number of instructions of one rendering.
const FUEL: u64 = 5_000_000;
/// Maximum output of one rendering in bytes.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Maximum length of a template in bytes.
const MAX_TEMPLATE_BYTES: usize = 4 << 20;
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
    environment: Environment<'static>,
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
    /// Errors: `Error::Invalid` when the template is longer than 4 MiB, or does not compile; the message has the line.
    pub fn new(source: &str, template: &str, tokens: Map<String, Value>) -> Result<Self> {
        let subject = || format!("chat template in `{source}`");
        if template.len() > MAX_TEMPLATE_BYTES {
            return Err(Error::invalid(
                subject(),
                format!("is {} bytes long, expected at most {MAX_TEMPLATE_BYTES}", template.len()),
            )
            .remedy("restore the template that belongs to the model"));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, without_generation_tags(template)).map_err(|e| {
            Error::invalid(subject(), describe(&e)).remedy("restore the template that belongs to the model")
        })?;
        let mut template = ChatTemplate { source: source.to_string(), environment, tokens, forms: Forms::default() };
        template.forms = template.probe();
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
    fn probe(&self) -> Forms {
        const WORD: &str = "quincunx-7f3a";
        let text = || ContentPart::Text { text: WORD.to_string() };
        let whole = |contents: Vec<Content>| {
            contents.into_iter().any(|content| {
                let out = self.render(&[ChatMessage { role: "user", content }], true).unwrap_or_default();
                // A template that expects a string may print the list of parts literally.
                out.contains(WORD) && !out.contains("'type'") && !out.contains("\"type\"")
            })
        };
        Forms {
            parts: whole(vec![Content::Parts(vec![text()]), Content::Parts(vec![ContentPart::Image, text()])]),
            text: whole(vec![Content::Text(WORD.to_string())]),
        }
    }

    /// Renders a conversation.
    ///
    /// Errors: `Error::Invalid` when the template raises an exception, fails, or exceeds its limits.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let error = |e: &minijinja::Error| {
            Error::invalid(format!("chat template in `{}`", self.source), describe(e))
                .remedy("repair the template, or the row if it is one that the template does not take")
        };
        let context = Context { messages, add_generation_prompt, tools: None, documents: None, tokens: &self.tokens };
        let mut out = Bounded(Vec::new());
        let template = self.environment.get_template(NAME).map_err(|e| error(&e))?;
        let runs_away = || {
            Error::invalid(format!("chat template in `{}`", self.source), "takes more than 1 GB of memory to render")
                .remedy("restore the template that belongs to the model")
        };
        watched(runs_away, || template.render_captured_to(context, &mut out)).map_err(|e| error(&e))?;
        String::from_utf8(out.0).map_err(|_| {
            Error::invalid(format!("chat template in `{}`", self.source), "did not write UTF-8")
                .remedy("restore the template that belongs to the model")
        })
    }
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
mod tests {
    use super::*;

    fn messages() -> Vec<ChatMessage> {
        vec![
            ChatMessage {
                role: "user",
                content: Content::Parts(vec![ContentPart::Image, ContentPart::Text { text: "What <is> it?".into() }]),
            },
            ChatMessage { role: "assistant", content: Content::Text("a cat".into()) },
        ]
    }

    fn render(template: &str) -> Result<String> {
        let tokens = Map::from_iter([("bos_token".to_string(), Value::from("<s>"))]);
        ChatTemplate::new("chat_template.jinja", template, tokens)?.render(&messages(), true)
    }

    #[test]
    fn templates_render_as_in_hugging_face() {
        let cases = [
            ("{{ bos_token }}{{ messages[0]['role'] | capitalize }}", "<s>User"),
            (
                "{% for m in messages %}\n  {% if loop.first %}\n{{ m.content | length }}\n  {% endif %}\n{% endfor %}",
                "2\n",
            ),
            ("{{ messages[0].content | tojson }}", r#"[{"type": "image"}, {"type": "text", "text": "What <is> it?"}]"#),
            ("{{ {'b': 1, 'a': []} | tojson(indent=2) }}", "{\n  \"b\": 1,\n  \"a\": []\n}"),
            (
                "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration %}{% endfor %}",
                "userassistant",
            ),
            (
                "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content.strip() }}{% endfor %}",
                "a cat",
            ),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            ("{{ tools is none }} {{ missing is defined }} {{ missing }}", "True False "),
            ("{{ strftime_now('%%') }}", "%"),
            ("{{ messages[1].content.split(' ')[-1] }}{{ 'x'.startswith('x') }}", "catTrue"),
        ];
        for (template, want) in cases {
            assert_eq!(render(template).unwrap(), want, "{template}");
        }
    }

    #[test]
    fn hostile_templates_end_in_errors() {
        let cases = [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "fuel"),
            ("{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}", "failed to write output"),
            ("{% include '/etc/passwd' %}", "template"),
            ("{% if %}", "line 1"),
            ("{{ messages.__class__.x }}", "line 1"),
        ];
        for (template, want) in cases {
            let error = render(template).unwrap_err().to_string();
            assert!(error.contains(want), "{template}: {error}");
        }
    }
}
