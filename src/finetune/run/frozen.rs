//! The frozen layers before the first trained one, computed once for all samples or when steps need them.

use std::path::Path;

use crate::base::{Cancel, Result};
use crate::data::LeftOut;
use crate::finetune::cut::{ConnectorInput, Cut, SideInputs, row_inputs};
use crate::finetune::data::{
    Frozen, LazySession, RowDtype, RowStore, Streamed, StreamedParts, TeacherTargets, TrainingSet,
};
use crate::finetune::plan::{Sizes, session_bytes};
use crate::ir::Model;
use crate::rewrite::extract;
use crate::runtime::{Decoder, Runtime, SessionOptions, VlmSession};

use super::request::Request;

/// The frozen layers before the first trained one.
pub struct FrozenLayers<'a> {
    request: &'a Request<'a>,
    /// The graph up to the first trained layer. When no layer is frozen, it is the graph up to the end of the first
    /// layer, which shows the inputs that the decoder takes.
    prefix: Model,
    /// The same graph, which also takes what the trained layers read for each token, so that prompts hold it.
    fed: Model,
    embeds_only: bool,
    /// The connector in training.
    connector: Option<ConnectorInput>,
}

impl<'a> FrozenLayers<'a> {
    /// Extracts the frozen layers from the decoder.
    ///
    /// Errors: `Error::Invalid` when the graph cannot be cut there.
    pub fn new(request: &'a Request<'a>, cut: &Cut) -> Result<Self> {
        let embeds_only = cut.begins_at_input();
        let (model, end) = (&cut.stored, [cut.streams[usize::from(embeds_only)]]);
        let prefix = extract(model, &[], &end)?;
        let fed = extract(model, &row_inputs(&model.graph), &end)?;
        let connector = cut.connector.as_ref().map(|connector| connector.input);
        Ok(FrozenLayers { request, prefix, fed, embeds_only, connector })
    }

    /// Bytes that ONNX Runtime holds of the weights.
    pub fn session_bytes(&self, on_gpu: bool) -> u64 {
        session_bytes(&self.fed.graph, on_gpu)
    }

    fn session(&self) -> Result<VlmSession> {
        let request = self.request;
        let runtime = Runtime::new(request.device)?;
        let options = SessionOptions { memory_limit: request.limits.memory, ..SessionOptions::default() };
        let head_dim = request.bundle.config().and_then(|config| config.head_size());
        let decoder = Decoder::prefill_only(runtime.session_of(&self.fed, &options)?, head_dim)?;
        let mut session = VlmSession::with_decoder(&runtime, request.bundle, decoder, &options, request.features)?;
        if self.connector.is_some() {
            session.keep_unprojected();
        }
        Ok(session)
    }

    /// The value of the dense model that equals the frozen layers' output; `None` when there is none.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn in_dense(&self, targets: &TeacherTargets<'_>) -> Result<Option<Frozen>> {
        targets.frozen(self.request.bundle, (!self.embeds_only).then_some(&self.prefix))
    }

    /// Computes the frozen layers' output for all samples and writes it to disk. `in_dense`: as [`FrozenLayers::in_dense`].
    /// The dense model computes it together
    /// with its own targets when it contains the same layers and its targets are not on disk yet; otherwise the frozen
    /// layers are run.
    ///
    /// Errors: those of the samples and of the run; `Error::Interrupted`.
    pub fn fill(
        &self,
        store: &RowStore,
        targets: Option<&TeacherTargets<'_>>,
        in_dense: Option<Frozen>,
        cancel: &Cancel,
    ) -> Result<(TrainingSet, LeftOut)> {
        let data = self.request.data;
        if let (Some(targets), Some(frozen)) = (targets.filter(|targets| !targets.files_exist()), in_dense) {
            let mut running = targets.running(Some(frozen));
            let frozen = Some((frozen, store));
            let filled = targets.fill(data, targets.files(), frozen, &mut running, "dense model", cancel)?;
            drop(running);
            targets.release();
            if let Some(filled) = filled {
                return Ok(filled);
            }
        }
        let max_tokens = self.request.settings.data.max_tokens as usize;
        let mut prefix = LazySession::new(|| self.session());
        let filled = store.fill(data, "frozen part", &mut prefix, self.embeds_only, max_tokens, cancel);
        drop(prefix);
        self.fed.graph.body.initializers.iter().for_each(|(_, tensor)| tensor.release());
        filled
    }

    /// Type of the rows of the frozen layers' output.
    pub fn element(&self) -> RowDtype {
        RowDtype::of_stream(self.request.settings.precision_on(self.request.device))
    }

    /// A source that computes the frozen layers' output when steps need it, and with it the dense model's `targets`.
    pub fn streamed<'s>(
        &'s self,
        side: SideInputs,
        targets: Option<&'s TeacherTargets<'s>>,
        in_dense: Option<Frozen>,
        (work, sizes): (&Path, &Sizes),
        cancel: &'s Cancel,
    ) -> Streamed<'s> {
        let targets = targets.filter(|targets| !targets.files().is_empty());
        let frozen = in_dense.filter(|_| targets.is_some());
        let points = targets.map_or(0, |targets| targets.student_points().len() as u64);
        let features = sizes.connector.as_ref().map_or(0, |connector| connector.width * connector.rows_of(1));
        let stream = self.element();
        let of_streams = sizes.hidden_size * (stream.size() as u64 + 2 * points);
        let bytes_per_token = of_streams + 4 * (side.widths.total() as u64 + features);
        Streamed::new(StreamedParts {
            source: self.request.data,
            side,
            stream,
            prefix: LazySession::new(|| self.session()),
            embeds_only: self.embeds_only,
            targets,
            frozen,
            max_tokens: self.request.settings.data.max_tokens as usize,
            work: work.to_path_buf(),
            cancel,
            bytes_per_token,
        })
    }
}
