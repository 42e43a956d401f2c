//! Prompts of a model without the image tokens that its token pruner leaves out.

use std::sync::Arc;

use crate::base::{Error, Result};
use crate::prompt::Prompt;

use super::features::Features;
use super::step::Embedded;
use super::token_pruner::{TokenPruner, check_token_pruning};
use super::vlm::{Vision, VlmSession};

impl VlmSession {
    /// Leaves out image tokens of every prompt from now on, or none with `None`.
    ///
    /// Errors: as [`check_token_pruning`]; `Error::Unsupported` for a model without a vision encoder of its own.
    pub fn set_token_pruner(&mut self, pruner: Option<TokenPruner>) -> Result<()> {
        if pruner.is_some() {
            check_token_pruning(self.decoder.session().subject(), self.decoder.inputs())?;
            if !matches!(self.vision, Some(Vision::Known(_))) {
                let problem = "it has no vision encoder of its own, so the tokens of each picture are not known";
                return Err(Error::unsupported("leaving out image tokens of the model", problem)
                    .remedy("export the vision encoder as a graph of its own"));
            }
        }
        self.pruner = pruner;
        Ok(())
    }

    /// Takes the token pruner and gives the one before.
    ///
    /// Errors: as [`VlmSession::set_token_pruner`].
    pub fn replace_token_pruner(&mut self, pruner: Option<TokenPruner>) -> Result<Option<TokenPruner>> {
        let before = self.pruner.take();
        self.set_token_pruner(pruner)?;
        Ok(before)
    }

    /// The embedded prompt without the image tokens that the token pruner leaves out.
    ///
    /// Errors: as [`TokenPruner::kept`]; `Error::Unsupported` for ready tensors with image tokens.
    pub(super) fn without_pruned(
        &mut self,
        embedded: Embedded,
        prompt: &Prompt,
        features: &[Arc<Features>],
    ) -> Result<Embedded> {
        let Some(pruner) = &mut self.pruner else { return Ok(embedded) };
        if !embedded.side.image.contains(&true) {
            return Ok(embedded);
        }
        if let Some(given) = &prompt.given {
            let problem = "has image tokens and does not show which ones belong to which picture";
            return Err(Error::unsupported(&given.batch.subject, problem)
                .remedy("give conversations with pictures, or remove `token_pruner.onnx` from the model"));
        }
        let counts: Vec<usize> = features.iter().map(|item| item.tokens()).collect();
        let kept = pruner.kept(&embedded, prompt.question.unwrap_or(embedded.len()), &counts)?;
        Ok(embedded.only(kept))
    }
}
