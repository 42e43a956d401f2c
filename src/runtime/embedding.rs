//! The token embedding component: token ids to the decoder's embeddings. In some layouts its graph also merges the
//! image features into them.

use std::time::Duration;

use crate::base::{Error, Result};

use super::inputs::{Input, InputKind, output_kind};
use super::port::Port;
use super::session::Session;
use super::step::{Embedded, Step};
use super::tensor::TensorValue;

/// A token embedding graph whose inputs and outputs all have a known meaning.
#[derive(Debug)]
pub struct TokenEmbedding {
    session: Session,
    inputs: Vec<Input>,
    output: String,
    per_layer: Option<String>,
}

/// The component's output for some tokens.
#[derive(Debug)]
pub struct TokenRows {
    pub hidden_size: usize,
    /// `[tokens, hidden_size]`.
    pub data: Vec<f32>,
    /// `[tokens, W]`, a second embedding of each token; empty when the model has none.
    pub per_layer: Vec<f32>,
}

impl TokenEmbedding {
    /// Finds the meaning of a graph's inputs and outputs.
    ///
    /// Errors: `Error::Unsupported` naming an input or output without a known meaning.
    pub fn new(session: Session) -> Result<Self> {
        let subject = session.subject();
        let inputs = Input::all(subject, session.inputs())?;
        let read = |kind: InputKind| {
            matches!(
                kind,
                InputKind::InputIds
                    | InputKind::AttentionMask
                    | InputKind::ImageFeatures
                    | InputKind::AudioFeatures
                    | InputKind::ImageMask
                    | InputKind::ImageTokens
                    | InputKind::Image(_)
            )
        };
        if let Some(input) = inputs.iter().find(|input| !read(input.kind())) {
            let problem = format!("input {} is not an input of a token embedding", input.port.described());
            return Err(Error::unsupported(subject, problem)
                .remedy("export the token embedding with `input_ids`, and with image features if it merges them"));
        }
        if !inputs.iter().any(|input| input.kind() == InputKind::InputIds) {
            return Err(Error::unsupported(subject, "has no input `input_ids`")
                .remedy("export the token embedding with `input_ids` as its input"));
        }
        let kind = |port| output_kind(port).map(|(kind, _)| kind);
        let per_layer = session.outputs().iter().find(|port| kind(port) == Some(InputKind::PerLayerInputs));
        let others: Vec<_> =
            session.outputs().iter().filter(|port| kind(port) != Some(InputKind::PerLayerInputs)).collect();
        let [output] = others[..] else {
            let names: Vec<String> = others.iter().map(|port| port.described()).collect();
            let problem = format!("has outputs {}, expected one output of embeddings", names.join(" and "));
            return Err(Error::unsupported(subject, problem).remedy("export the token embedding alone"));
        };
        let (output, per_layer) = (output.name.clone(), per_layer.map(|port| port.name.clone()));
        Ok(TokenEmbedding { session, inputs, output, per_layer })
    }

    /// Name in messages.
    pub fn subject(&self) -> &str {
        self.session.subject()
    }

    /// Time inside all runs so far.
    pub fn elapsed(&self) -> Duration {
        self.session.elapsed()
    }

    /// Width of the embeddings, if the graph fixes it.
    pub fn width(&self) -> Option<usize> {
        self.session.output(&self.output).and_then(Port::width)
    }

    /// True when the graph merges image features itself.
    pub fn takes_features(&self) -> bool {
        self.inputs.iter().any(|input| input.kind() == InputKind::ImageFeatures)
    }

    /// True when the graph reads pixels, so that the vision encoder is inside it.
    pub fn takes_pictures(&self) -> bool {
        self.inputs.iter().any(|input| matches!(input.kind(), InputKind::Image(_)))
    }

    /// The graph's inputs.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// Returns the session.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// Width of the image features that the graph merges; `None` when it merges none or does not fix the width.
    pub fn feature_width(&self) -> Option<usize> {
        self.inputs.iter().find(|input| input.kind() == InputKind::ImageFeatures).and_then(|input| input.port.width())
    }

    /// All inputs for one prompt. The prompt's ids must be set, and the `side` data that the graph reads.
    ///
    /// Errors: `Error::Invalid` when the prompt lacks data for an input.
    pub fn feeds(&self, prompt: &Embedded) -> Result<Vec<(String, TensorValue)>> {
        let step = Step::prefill(&[prompt], false)?;
        let feed = |input: &Input| {
            Ok((input.port.name.clone(), TensorValue::from_array(input.port.dtype, input.make(&step)?)?))
        };
        self.inputs.iter().map(feed).collect()
    }

    /// Embeds one prompt. The prompt's ids must be set, and the `side` data that the graph reads.
    ///
    /// Errors: `Error::Invalid` when the graph returns another number of rows; `Error::Engine` when the run fails.
    pub fn run(&mut self, prompt: &Embedded) -> Result<TokenRows> {
        let feeds = self.feeds(prompt)?;
        let feeds: Vec<(&str, &TensorValue)> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = self.session.run(&feeds, None)?;
        let tokens = prompt.len();
        let rows = |name: &str| {
            let tensor = outputs.get(name)?;
            let data = tensor.to_f32()?.into_owned();
            match data.len().checked_div(tokens) {
                Some(width) if width > 0 && width * tokens == data.len() => Ok((width, data)),
                _ => {
                    let problem = format!("`{name}` has shape {:?} for {tokens} tokens", tensor.shape());
                    Err(Error::invalid(self.session.subject(), problem))
                }
            }
        };
        let (hidden_size, data) = rows(&self.output)?;
        let per_layer = match &self.per_layer {
            Some(name) => rows(name)?.1,
            None => Vec::new(),
        };
        Ok(TokenRows { hidden_size, data, per_layer })
    }
}
