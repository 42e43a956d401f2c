//! A client of OpenAI's chat API for judges.
//!
//! Source: OpenAI's API reference, `POST /chat/completions`; vLLM, llama.cpp and others implement the same API.

use std::sync::mpsc::channel;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::base::{Cancel, Error, Progress, Result, http_agent};

/// Environment variable with the API key.
pub const JUDGE_KEY: &str = "OPENAI_API_KEY";
/// What remains of an interrupted run.
const KEPT: &str = "no report is written";
/// Number of attempts per question.
const ATTEMPTS: u32 = 4;
/// Number of concurrent questions.
const AT_ONCE: usize = 4;
/// Limit on the size of a reply, in bytes.
const REPLY_BYTES: u64 = 4 << 20;

/// A judge and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Judge {
    /// Address of the API, such as `https://api.openai.com/v1`.
    pub url: String,
    /// The model to ask.
    pub model: String,
    /// Seconds after which a question counts as failed.
    #[serde(default = "default_timeout")]
    pub timeout_s: u64,
    /// Seconds before a failed question is asked again; doubled each time.
    #[serde(skip, default = "default_pause")]
    pub pause: Duration,
}

fn default_timeout() -> u64 {
    120
}

fn default_pause() -> Duration {
    Duration::from_secs(2)
}

/// A question, with a picture or without.
pub struct ChatQuestion {
    /// Text of the question.
    pub text: String,
    /// An encoded picture; empty where the question has none.
    pub picture: Vec<u8>,
}

/// Reason for a failed question.
enum Failure {
    /// A temporary failure; another attempt may succeed.
    Passing(String),
    Final(Error),
}

impl Judge {
    /// A judge with the default time-out.
    /// Errors: `Error::Invalid` for an address that is neither http nor https; `Error::Unsupported` for https in a
    /// build without the feature `https`.
    pub fn new(url: &str, model: &str) -> Result<Self> {
        if !url.starts_with("http://") && !url.starts_with("https://") {
            return Err(Error::invalid(format!("judge `{url}`"), "is no address")
                .remedy("expected one such as `https://api.openai.com/v1` or `http://localhost:8000/v1`"));
        }
        if url.starts_with("https://") && !cfg!(feature = "https") {
            return Err(Error::unsupported(format!("judge `{url}`"), "needs TLS, which this build does not have")
                .remedy("build interlace without `--no-default-features`, or name a server at an http address"));
        }
        let (url, model) = (url.trim_end_matches('/').to_string(), model.to_string());
        Ok(Judge { url, model, timeout_s: default_timeout(), pause: default_pause() })
    }

    /// The replies to `count` questions, which `question` builds by number, in order. Several questions are sent
    /// concurrently; failed ones are repeated.
    ///
    /// Errors: those of `question`; `Error::Invalid` when the judge refuses, its certificate is not trusted, or it fails for
    /// the last time; `Error::Io` when the file of certificates cannot be read; `Error::Interrupted`.
    pub fn ask_all(
        &self,
        count: usize,
        question: impl Fn(usize) -> Result<ChatQuestion> + Sync,
        cancel: &Cancel,
    ) -> Result<Vec<String>> {
        let agent = self.agent()?;
        let key = std::env::var(JUDGE_KEY).ok().filter(|key| !key.is_empty());
        let progress = Progress::new("judge", "answers", count as u64);
        let mut replies = vec![String::new(); count];
        let next = std::sync::atomic::AtomicUsize::new(0);
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(count) {
                let (sender, agent, key, next, question) = (sender.clone(), &agent, key.as_deref(), &next, &question);
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if number >= count {
                            break;
                        }
                        let reply = cancel
                            .check(KEPT)
                            .and_then(|()| question(number))
                            .and_then(|question| self.ask(agent, key, &question, cancel));
                        // Sending fails when another question has failed for good.
                        if sender.send((number, reply)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for (number, reply) in receiver {
                match reply {
                    Ok(reply) => replies[number] = reply,
                    Err(error) => {
                        next.store(count, std::sync::atomic::Ordering::Relaxed);
                        return Err(error);
                    }
                }
                progress.advance(1);
            }
            Ok(())
        })?;
        Ok(replies)
    }

    fn agent(&self) -> Result<ureq::Agent> {
        http_agent(|config| config.timeout_global(Some(Duration::from_secs(self.timeout_s))))
    }

    fn subject(&self) -> String {
        format!("judge `{}` at `{}`", self.model, self.url)
    }

    fn ask(&self, agent: &ureq::Agent, key: Option<&str>, question: &ChatQuestion, cancel: &Cancel) -> Result<String> {
        let mut pause = self.pause;
        let mut problem = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                cancel.sleep(KEPT, pause)?;
                pause *= 2;
            }
            let (judge, agent, key) = (self.clone(), agent.clone(), key.map(str::to_string));
            let body = self.body(question).to_string();
            match cancel.waiting(KEPT, None, move || judge.ask_once(&agent, key.as_deref(), body))? {
                Some(Ok(reply)) => return Ok(reply),
                Some(Err(Failure::Final(error))) => return Err(error),
                Some(Err(Failure::Passing(what))) => problem = what,
                None => {}
            }
        }
        Err(Error::invalid(self.subject(), format!("gave no answer in {ATTEMPTS} attempts: {problem}"))
            .remedy("check the address, and that the server is up; answers are kept by `--predictions`"))
    }

    fn ask_once(&self, agent: &ureq::Agent, key: Option<&str>, body: String) -> Result<String, Failure> {
        let address = match self.url.ends_with("/chat/completions") {
            true => self.url.clone(),
            false => format!("{}/chat/completions", self.url),
        };
        let mut request = agent.post(&address).header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(|error| self.unreached(&error.to_string()))?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(REPLY_BYTES).read_to_string();
        let text = text.map_err(|error| Failure::Passing(error.to_string()))?;
        let shown = || text.chars().take(300).collect::<String>();
        match status {
            200..=299 => {}
            408 | 409 | 429 | 500.. => return Err(Failure::Passing(format!("status {status}: {}", shown()))),
            401 | 403 => {
                let problem = format!("refuses the key, with status {status}: {}", shown());
                let remedy = format!("put the key into the environment variable {JUDGE_KEY}");
                return Err(Failure::Final(Error::invalid(self.subject(), problem).remedy(remedy)));
            }
            _ => {
                let problem = format!("refuses the question, with status {status}: {}", shown());
                let remedy = "expected an address that speaks OpenAI's chat API, and a model that reads pictures";
                return Err(Failure::Final(Error::invalid(self.subject(), problem).remedy(remedy)));
            }
        }
        let reply: Option<String> = serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|value| value.pointer("/choices/0/message/content")?.as_str().map(str::to_string));
        reply.ok_or_else(|| Failure::Passing(format!("its reply has no `choices[0].message.content`: {}", shown())))
    }

    /// A question that did not arrive.
    fn unreached(&self, problem: &str) -> Failure {
        // The certificate will be the same next time.
        if !problem.contains("certificate") {
            return Failure::Passing(problem.to_string());
        }
        let remedy = "put the path of a PEM file with the certificate of the server's authority into the environment \
                      variable SSL_CERT_FILE, or name the server at an http address; answers are kept by `--predictions`";
        Failure::Final(Error::invalid(self.subject(), format!("is not trusted: {problem}")).remedy(remedy))
    }

    fn body(&self, question: &ChatQuestion) -> Value {
        let kind = match question.picture.as_slice() {
            [0x89, b'P', b'N', b'G', ..] => "png",
            [b'G', b'I', b'F', ..] => "gif",
            [b'R', b'I', b'F', b'F', ..] => "webp",
            _ => "jpeg",
        };
        let mut content = vec![json!({"type": "text", "text": question.text})];
        if !question.picture.is_empty() {
            let url = format!("data:image/{kind};base64,{}", STANDARD.encode(&question.picture));
            content.push(json!({"type": "image_url", "image_url": {"url": url}}));
        }
        json!({
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_pictures_have_the_format_of_the_chat_api() {
        assert!(Judge::new("localhost:8000", "x").unwrap_err().to_string().contains("http://localhost:8000/v1"));
        let judge = Judge::new("http://localhost:1/v1/", "m").unwrap();
        assert_eq!(judge.url, "http://localhost:1/v1");
        let body = judge.body(&ChatQuestion { text: "q".into(), picture: b"\x89PNG".to_vec() });
        let content = &body["messages"][0]["content"];
        assert_eq!(content[1]["image_url"]["url"], "data:image/png;base64,iVBORw==");
        assert_eq!((&content[0]["text"], &body["model"]), (&json!("q"), &json!("m")));
        let body = judge.body(&ChatQuestion { text: "q".into(), picture: Vec::new() });
        assert_eq!(body["messages"][0]["content"], json!([{"type": "text", "text": "q"}]));
    }
}
