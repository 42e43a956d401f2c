//! Checkpoints on the hub: which of their files are needed.

use std::path::{Path, PathBuf};

use crate::base::{Cancel, Error, Result};
use crate::hub::{HubName, Repository};

use super::{INDEX, SINGLE, files_of_index};

/// Weights of an adapter.
const ADAPTER: &str = "adapter_model.safetensors";
/// Endings of configs, tokenizers, templates, code, and licences.
const TEXTS: &[&str] = &["json", "jinja", "txt", "model", "tiktoken", "py", "md"];

/// The folder of a checkpoint: a path as it is; for `hf:OWNER/NAME[@REVISION]` a folder in the hub's cache with its safetensors,
/// configs and tokenizer. What is not in the cache is downloaded.
///
/// Errors: as `Repository::open` and `fetch`; `Error::Invalid` when there are no weights in safetensors.
pub fn checkpoint_on_disk(path: &Path, cancel: &Cancel) -> Result<PathBuf> {
    let Some(name) = HubName::of(path)? else { return Ok(path.to_path_buf()) };
    let repository = Repository::open(&name, cancel)?;
    let has = |file: &str| repository.files().any(|other| other == file);
    let mut files: Vec<String> = repository.files().filter(|file| is_text(file)).map(str::to_string).collect();
    let snapshot = repository.fetch(&files, cancel)?;
    if has(INDEX) {
        files.extend(files_of_index(&snapshot.join(INDEX))?);
    } else if let Some(weights) = [SINGLE, ADAPTER].into_iter().find(|file| has(file)) {
        files.push(weights.to_string());
    } else {
        let problem =
            format!("has none of `{SINGLE}`, `{INDEX}` and `{ADAPTER}`, so it is no checkpoint in safetensors");
        return Err(Error::invalid(format!("`{name}`"), problem)
            .remedy("save weights of another format as safetensors first, and give that folder"));
    }
    repository.fetch(&files, cancel)?;
    repository.selection(&files)
}

fn is_text(file: &str) -> bool {
    let plain = !file.contains('/') && !file.starts_with('.');
    plain && file.rsplit_once('.').is_none_or(|(_, ending)| TEXTS.contains(&ending))
}
