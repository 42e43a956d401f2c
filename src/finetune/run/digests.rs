//! SHA-256 of what determines a run, computed while its graphs are analysed.

use std::collections::BTreeMap;
use std::panic::resume_unwind;

use crate::base::{Error, Result, Sha256Digest, sha256_json};
use crate::finetune::data::{RowDtype, Teacher};

use super::planning::Opened;
use super::request::Request;

/// Digests of the files of a run.
pub struct Digests {
    /// The pruned model.
    pub model: Sha256Digest,
    /// The training samples.
    pub data: Sha256Digest,
    /// The dense model; `None` for a run that does not read it.
    pub dense: Option<Sha256Digest>,
}

/// Opens the graphs of a run. Its files are hashed while the graphs are analysed.
///
/// Errors: as [`Opened::new`]; those of the files.
pub fn open(request: &Request<'_>, teacher: Option<&Teacher<'_>>) -> Result<(Digests, Opened)> {
    let (digests, opened) = std::thread::scope(|scope| {
        let (bundle, data) = (request.bundle, request.data);
        let hashing = scope.spawn(move || {
            let dense = teacher.map(|teacher| teacher.bundle.digest()).transpose()?;
            Ok::<_, Error>(Digests { model: bundle.digest()?, data: data.digest()?, dense })
        });
        let opened = Opened::new(request, teacher);
        (hashing.join().unwrap_or_else(|panic| resume_unwind(panic)), opened)
    });
    let opened = opened?;
    Ok((digests?, opened))
}

impl Digests {
    /// Digest of each input that determines the result, by name.
    ///
    /// Errors: `Error::Invalid` when the layers or settings cannot be hashed.
    pub fn inputs(&self, request: &Request<'_>) -> Result<BTreeMap<String, Sha256Digest>> {
        let mut inputs = BTreeMap::from([
            ("model".to_string(), self.model.clone()),
            ("data".to_string(), self.data.clone()),
            ("layers".to_string(), sha256_json(&request.layers)?),
            ("settings".to_string(), sha256_json(request.settings)?),
        ]);
        inputs.extend(self.dense.clone().map(|dense| ("teacher".to_string(), dense)));
        Ok(inputs)
    }

    /// Digest of everything that affects the rows of the frozen layers' output. `element`: the type in which they are stored.
    ///
    /// Errors: as [`Digests::inputs`].
    pub fn of_rows(&self, request: &Request<'_>, opened: &Opened, element: RowDtype) -> Result<Sha256Digest> {
        let (first, max_tokens) = (opened.cut.first, request.settings.data.max_tokens);
        let rows = ("stream with sample numbers", &self.model, &self.data, first, max_tokens, element);
        match opened.side.connector {
            Some(connector) => sha256_json(&(rows, connector)),
            None => sha256_json(&rows),
        }
    }
}
