//! The variables of the environment that `huggingface_hub` reads too.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::base::{Error, Result};

/// Where the hub is, where its cache is, and as whom it is asked.
#[derive(Clone, Debug)]
pub(super) struct Environment {
    /// Address of the hub without a `/` at the end.
    pub endpoint: String,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Token of the user.
    pub token: Option<String>,
    /// True when nothing may be downloaded.
    pub offline: bool,
}

/// The first of these variables that is set and not empty.
fn first(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
}

fn is_true(value: Option<String>) -> bool {
    value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
}

impl Environment {
    /// Reads the environment: `HF_ENDPOINT`, `HF_HUB_CACHE` or `HF_HOME`, `HF_TOKEN` or the file that `hf auth login` writes,
    /// `HF_HUB_OFFLINE`.
    ///
    /// Errors: `Error::Invalid` for an address that is neither http nor https, or a token that is no text of one line, and
    /// when no folder for the cache can be found; `Error::Unsupported` for https in a build without it.
    pub fn read() -> Result<Self> {
        let endpoint = first(&["HF_ENDPOINT"]).unwrap_or_else(|| "https://huggingface.co".to_string());
        let endpoint = endpoint.trim().trim_end_matches('/').to_string();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::invalid(format!("HF_ENDPOINT `{endpoint}`"), "is no address")
                .remedy("expected one such as https://huggingface.co"));
        }
        if endpoint.starts_with("https://") && !cfg!(feature = "https") {
            return Err(Error::unsupported(format!("`{endpoint}`"), "needs TLS, which this build does not have")
                .remedy("build interlace without `--no-default-features`, or download the model with `hf download`"));
        }
        let home = match first(&["HF_HOME"]) {
            Some(home) => PathBuf::from(home),
            None => cache_home()?.join("huggingface"),
        };
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map_or_else(|| home.join("hub"), PathBuf::from);
        let offline = is_true(first(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]));
        Ok(Environment { endpoint, cache, token: token(&home)?, offline })
    }
}

fn cache_home() -> Result<PathBuf> {
    let own = first(&["XDG_CACHE_HOME"]).map(PathBuf::from);
    own.or_else(|| first(&["HOME"]).map(|home| Path::new(&home).join(".cache"))).ok_or_else(|| {
        Error::invalid("the hub's cache", "neither HF_HOME nor HOME is set").remedy("set HF_HOME to a folder")
    })
}

fn token(home: &Path) -> Result<Option<String>> {
    let named = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]);
    let path = first(&["HF_TOKEN_PATH"]).map_or_else(|| home.join("token"), PathBuf::from);
    let implicit = !is_true(first(&["HF_HUB_DISABLE_IMPLICIT_TOKEN"]));
    let found = named.or_else(|| fs::read_to_string(&path).ok().filter(|_| implicit));
    let Some(token) = found.map(|text| text.trim().to_string()).filter(|token| !token.is_empty()) else {
        return Ok(None);
    };
    match token.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(Some(token)),
        false => Err(Error::invalid("the hub's token", "has characters that no token has")
            .remedy(format!("correct HF_TOKEN or `{}`", path.display()))),
    }
}
