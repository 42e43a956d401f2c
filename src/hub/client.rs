//! Requests to the hub.
//!
//! Source: `huggingface_hub`'s `HfApi.model_info` and `hf_hub_download`, which ask the same addresses.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use ureq::http::Response;
use ureq::{Agent, Body};

use crate::base::{Cancel, Error, Result, http_agent};

use super::download::KEPT;
use super::environment::Environment;
use super::name::HubName;
use super::tree::Tree;

/// Number of attempts before a server counts as out of reach.
pub(super) const ATTEMPTS: u32 = 5;
/// Limit on the hub's answer about a model, in bytes.
const ANSWER_BYTES: u64 = 32 << 20;
/// Limit on the time of the hub's answer about a model, and on the time until a file begins to arrive.
const ANSWER_TIME: Duration = Duration::from_secs(120);
/// Longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Limit on the number of redirects.
const REDIRECTS: usize = 5;
/// A connection on which nothing arrives for this long is given up.
const SILENCE: Duration = Duration::from_secs(20);

/// Reason for a request that gave nothing.
pub(super) enum Failure {
    /// The server cannot be reached, or fails; another attempt may succeed.
    Passing(String),
    /// The server asks for a pause before the next attempt.
    Busy(String, Duration),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

/// A client of the hub.
#[derive(Clone)]
pub(super) struct Client {
    agent: Agent,
    environment: Environment,
    /// Pause before the second attempt; doubled each time.
    pause: Duration,
}

/// Does the work in a thread, which is left behind when the user asks to stop or the work is over its time.
///
/// Errors: `Error::Interrupted`; `Failure::Passing` after `limit`, and when the work panicked.
fn awaited<T: Send + 'static>(
    cancel: &Cancel,
    limit: Duration,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match cancel.waiting(KEPT, Some(limit), work) {
        Ok(Some(done)) => done,
        Ok(None) => Err(Failure::Passing(format!("the answer took longer than {} s", limit.as_secs_f64()))),
        Err(error @ Error::Interrupted { .. }) => Err(Failure::Final(error)),
        Err(error) => Err(Failure::Passing(error.to_string())),
    }
}

/// Bytes that are read at a time.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be taken.
const WAITING: usize = 4;

/// The content of an answer as it arrives. A thread reads it, which is left behind when the user asks to stop while the server is
/// silent.
pub(super) struct Incoming(Receiver<io::Result<Vec<u8>>>);

impl Incoming {
    /// Begins to read.
    pub fn of(response: Response<Body>) -> Self {
        let (taken, pieces) = sync_channel(WAITING);
        thread::spawn(move || {
            let mut reader = response.into_body().into_reader();
            loop {
                let mut piece = vec![0; PIECE];
                let read = match reader.read(&mut piece) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    read => read,
                };
                let ends = !matches!(read, Ok(1..));
                let read = read.map(|count| {
                    piece.truncate(count);
                    piece
                });
                // Nobody takes pieces any more once the download is over.
                if taken.send(read).is_err() || ends {
                    return;
                }
            }
        });
        Incoming(pieces)
    }

    /// The next bytes; none at the end.
    ///
    /// Errors: `Failure::Passing` when the connection fails or is silent for too long; `Failure::Final` for `Error::Interrupted`.
    pub fn next(&self, cancel: &Cancel) -> Result<Vec<u8>, Failure> {
        loop {
            cancel.check(KEPT)?;
            match self.0.recv_timeout(Duration::from_millis(50)) {
                Ok(piece) => return piece.map_err(|error| Failure::Passing(error.to_string())),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Passing("the reader failed".to_string())),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Scheme, host and port of an address, in lower case.
fn origin(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.split(['/', '?', '#']).next().filter(|host| !host.is_empty() && !host.contains('@'))?;
    let scheme = scheme.to_ascii_lowercase();
    ["http", "https"].contains(&scheme.as_str()).then(|| format!("{scheme}://{}", host.to_ascii_lowercase()))
}

/// The address that a redirect leads to; `None` for a redirect that is not followed: to another protocol, or from https to
/// http.
fn redirected(from: &str, location: &str) -> Option<String> {
    let target = match location.starts_with('/') && !location.starts_with("//") {
        true => format!("{}{location}", origin(from)?),
        false => location.to_string(),
    };
    let secure = |url: &str| origin(url).map(|origin| origin.starts_with("https://"));
    (secure(&target)? || !secure(from)?).then_some(target)
}

/// A path or revision as a part of an address; `keep` is left as it is.
fn encoded(text: &str, keep: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || keep.as_bytes().contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

impl Client {
    pub fn new(environment: &Environment) -> Result<Self> {
        let agent = http_agent(|config| {
            config
                .max_redirects(0)
                .timeout_connect(Some(SILENCE))
                .timeout_recv_response(Some(3 * SILENCE))
                .timeout_per_read(Some(SILENCE))
        })?;
        Ok(Client { agent, environment: environment.clone(), pause: Duration::from_secs(1) })
    }

    /// Waits before attempt `number`, counted from 1, and for at least as long as the server asked.
    ///
    /// Errors: `Error::Interrupted`.
    pub fn wait(&self, number: u32, asked: Duration, cancel: &Cancel) -> Result<()> {
        cancel.sleep(KEPT, asked.max(self.pause * 2u32.pow(number.saturating_sub(1))))
    }

    /// The files of the name's revision.
    ///
    /// Errors: `Failure::Passing` and `Failure::Busy` when the server cannot be reached, fails or takes longer than two minutes,
    /// `Failure::Final` when it refuses, when its answer is no list of files or longer than 32 MiB, and for
    /// `Error::Interrupted`.
    pub fn tree(&self, name: &HubName, cancel: &Cancel) -> Result<Tree, Failure> {
        let (client, name) = (self.clone(), name.clone());
        awaited(cancel, ANSWER_TIME, move || client.listing(&name))
    }

    fn listing(&self, name: &HubName) -> Result<Tree, Failure> {
        let (repository, revision) = (name.repository(), encoded(name.revision(), ""));
        let url = format!("{}/api/models/{repository}/revision/{revision}?blobs=true", self.environment.endpoint);
        let mut response = self.get(&url, 0, name, None)?;
        let strange = |problem: String| {
            let subject = format!("`{name}`: the answer of `{}`", self.environment.endpoint);
            Error::invalid(subject, problem).remedy("check HF_ENDPOINT; expected a server with the hub's API")
        };
        let mut answer = Vec::new();
        let read = response.body_mut().as_reader().take(ANSWER_BYTES + 1).read_to_end(&mut answer);
        read.map_err(|error| Failure::Passing(error.to_string()))?;
        if answer.len() as u64 > ANSWER_BYTES {
            return Err(strange(format!("is longer than {} MiB", ANSWER_BYTES >> 20)).into());
        }
        Ok(Tree::from_answer(&answer).map_err(strange)?)
    }

    /// A file's content from byte `from` on.
    ///
    /// Errors: as [`Client::tree`].
    pub fn file(
        &self,
        name: &HubName,
        commit: &str,
        path: &str,
        from: u64,
        cancel: &Cancel,
    ) -> Result<Response<Body>, Failure> {
        let (repository, file) = (name.repository(), encoded(path, "/"));
        let url = format!("{}/{repository}/resolve/{commit}/{file}", self.environment.endpoint);
        let (client, name, path) = (self.clone(), name.clone(), path.to_string());
        awaited(cancel, ANSWER_TIME, move || client.get(&url, from, &name, Some(&path)))
    }

    /// Follows redirects. The token goes to the hub's own address alone.
    fn get(&self, url: &str, from: u64, name: &HubName, path: Option<&str>) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..=REDIRECTS {
            let mut request = self.agent.get(&url).header("accept-encoding", "identity");
            if from > 0 {
                request = request.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = &self.environment.token
                && origin(&url) == origin(&self.environment.endpoint)
            {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| self.unreached(&error.to_string()))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return self.accepted(response, name, path);
            }
            let location = response.headers().get("location").and_then(|value| value.to_str().ok());
            url = location.and_then(|location| redirected(&url, location)).ok_or_else(|| {
                let shown = location.unwrap_or("nowhere").escape_debug().to_string();
                Error::invalid(format!("`{name}`"), format!("`{url}` redirects to `{shown}`, which is not followed"))
                    .remedy("check HF_ENDPOINT")
            })?;
        }
        let problem = format!("`{}` redirects more than {REDIRECTS} times", self.environment.endpoint);
        Err(Error::invalid(format!("`{name}`"), problem).remedy("check HF_ENDPOINT").into())
    }

    fn unreached(&self, problem: &str) -> Failure {
        if !problem.contains("certificate") {
            return Failure::Passing(problem.to_string());
        }
        // The certificate will be the same next time.
        let remedy = "put the path of a PEM file with the certificate of the server's authority into the environment \
                      variable SSL_CERT_FILE";
        let subject = format!("`{}`", self.environment.endpoint);
        Failure::Final(Error::invalid(subject, format!("is not trusted: {problem}")).remedy(remedy))
    }

    /// The answer if its status says that it is what was asked for.
    fn accepted(
        &self,
        response: Response<Body>,
        name: &HubName,
        path: Option<&str>,
    ) -> Result<Response<Body>, Failure> {
        let status = response.status().as_u16();
        let header = |key: &str| response.headers().get(key).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let code = header("x-error-code");
        let address = format!("{}/{}", self.environment.endpoint, name.repository());
        let asked = match path {
            Some(path) => format!("`{name}`: file `{path}`"),
            None => format!("`{name}`"),
        };
        let refused = |problem: &str, remedy: String| -> Result<Response<Body>, Failure> {
            Err(Error::invalid(asked.clone(), format!("{problem} (status {status})")).remedy(remedy).into())
        };
        let token = match self.environment.token.is_some() {
            true => {
                "give a token that may read it in HF_TOKEN, or run `hf auth login`; a token was sent and is not enough"
            }
            false => "put a token that may read it into HF_TOKEN, or run `hf auth login`; no token was found",
        };
        let encoding = header("content-encoding");
        match (status, code) {
            (200 | 206, _) if !["", "identity"].contains(&encoding) => refused(
                &format!("is sent in the encoding `{}`, which was not asked for", encoding.escape_debug()),
                "check HF_ENDPOINT and the proxy; expected a server that sends files as they are".to_string(),
            ),
            (200 | 206, _) => Ok(response),
            // Asked for a range behind the end: the part that is here is not of this file.
            (416, _) => Ok(response),
            (401 | 403, "GatedRepo") => {
                let problem = "is given to those alone whom its owner lets in";
                refused(problem, format!("ask for access at {address}, then {token}"))
            }
            (404, "RevisionNotFound") => refused(
                &format!("has no revision `{}`", name.revision()),
                format!("name a branch, a tag or a commit that {address}/commits lists"),
            ),
            (401 | 403, _) => refused(
                "does not exist, or is private",
                format!("check the name at {address}; if it is private, {token}"),
            ),
            (404 | 410, _) => {
                refused("is not there", format!("check the name at {address}; if it is private, {token}"))
            }
            (408 | 429 | 500.., _) => {
                let problem = format!("status {status} from `{}`", self.environment.endpoint);
                match header("retry-after").parse().map(Duration::from_secs) {
                    Err(_) => Err(Failure::Passing(problem)),
                    Ok(pause) if pause <= LONGEST_PAUSE => Err(Failure::Busy(problem, pause)),
                    Ok(pause) => refused(
                        &format!("is not given now: `{}` asks for a pause", self.environment.endpoint),
                        format!("run the command again in {} s", pause.as_secs()),
                    ),
                }
            }
            _ => refused("was refused", "check HF_ENDPOINT; expected a server with the hub's API".to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn waiting_ends_on_request_and_after_its_limit() {
        let endless = || -> Result<(), Failure> {
            thread::sleep(Duration::from_secs(3600));
            Ok(())
        };
        let cancel = Cancel::default();
        let broken = || -> Result<(), Failure> { std::panic::panic_any("a bug") };
        let failed = awaited(&cancel, Duration::from_secs(3600), broken);
        assert!(matches!(failed, Err(Failure::Passing(problem)) if problem.contains("without a result")));
        let begun = Instant::now();
        let late = awaited(&cancel, Duration::from_millis(100), endless);
        assert!(matches!(late, Err(Failure::Passing(problem)) if problem.contains("longer than 0.1 s")));
        cancel.request();
        let stopped = awaited(&cancel, Duration::from_secs(3600), endless);
        assert!(matches!(stopped, Err(Failure::Final(Error::Interrupted { .. }))));
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert!(matches!(awaited(&cancel, Duration::from_secs(3600), || Ok(3)), Ok(3)));
    }

    #[test]
    fn redirects_stay_secure_and_the_hub_is_known_by_its_whole_address() {
        assert_eq!(origin("https://Hub.co/a/b?c").as_deref(), Some("https://hub.co"));
        assert_ne!(origin("http://127.0.0.1:1/x"), origin("http://127.0.0.1:2/x"));
        for bad in ["ftp://hub.co", "https://user@hub.co/x", "https://", "hub.co"] {
            assert_eq!(origin(bad), None, "{bad}");
        }
        let from = "https://hub.co/a/resolve/x";
        assert_eq!(redirected(from, "/b/resolve/x").as_deref(), Some("https://hub.co/b/resolve/x"));
        assert_eq!(redirected(from, "https://cdn.co/x?y=z").as_deref(), Some("https://cdn.co/x?y=z"));
        for bad in ["http://cdn.co/x", "file:///etc/passwd", "//cdn.co/x", "x"] {
            assert_eq!(redirected(from, bad), None, "{bad}");
        }
        assert_eq!(encoded("onnx/a b#?.onnx", "/"), "onnx/a%20b%23%3F.onnx");
        assert_eq!(encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
    }
}
