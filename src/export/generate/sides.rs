//! What a decoder reads of tokens besides embeddings, mask and positions: DeepStack features, the places of image tokens, token
//! types, second embeddings.

use crate::base::Result;
use crate::ir::{DataType, Tensor, ValueId};
use crate::rewrite::JoinScope;
use crate::runtime::{Input, InputKind, TokenTypes};

use super::super::nodes::{cast, ints, refused, scalar};
use super::merge::no_features;
use super::ports::DecoderPorts;

/// Tokens of one iteration.
pub(in crate::export) struct Tokens<'a> {
    /// `[1, T]`.
    pub ids: ValueId,
    /// False for a token of the answer.
    pub in_prompt: bool,
    /// The placeholder of image features in a prompt with pictures.
    pub image: Option<i64>,
    /// For a prompt with pictures the values of the decoder's inputs of DeepStack features, in order.
    pub deepstack: Option<&'a [ValueId]>,
    /// Second embeddings and their type.
    pub per_layer: Option<(ValueId, DataType)>,
    /// Width of the embeddings, where the graph fixes it.
    pub width: Option<usize>,
    pub types: TokenTypes,
}

impl Tokens<'_> {
    /// A value for each of the decoder's side inputs, in their order and types.
    ///
    /// Errors: `Error::Unsupported` naming an input that these tokens have no value for.
    pub(in crate::export) fn sides(&self, scope: &mut JoinScope<'_>, decoder: &DecoderPorts) -> Result<Vec<ValueId>> {
        let mut deepstack = self.deepstack.unwrap_or_default().iter();
        decoder
            .sides()
            .map(|input| match input.kind() {
                InputKind::Deepstack => match deepstack.next() {
                    Some(value) => Ok(*value),
                    None => no_features(scope, input, self.ids, self.width),
                },
                _ => self.one(scope, input),
            })
            .collect()
    }

    fn one(&self, scope: &mut JoinScope<'_>, input: &Input) -> Result<ValueId> {
        let port = &input.port;
        let (value, from) = match (input.kind(), self.image) {
            (InputKind::PerLayerInputs, _) => self
                .per_layer
                .ok_or_else(|| refused(port, "is fed second embeddings, which the token embedding does not give"))?,
            (InputKind::TokenTypes, _) if self.types == TokenTypes::Answer => {
                (self.all(scope, i64::from(!self.in_prompt)), DataType::Int64)
            }
            (_, Some(image)) if self.in_prompt => {
                let image = scalar(scope, "image_id", image);
                (scope.op("is_image", "Equal", &[self.ids, image], &[]), DataType::Bool)
            }
            _ => (self.all(scope, 0), DataType::Int64),
        };
        let value = cast(scope, value, from, port.dtype);
        Ok(match (input.kind(), port.rank()) {
            (InputKind::ImageMask, 3) => {
                let shape = ints(scope, "mask_shape", &[1, -1, 1]);
                scope.op("image_mask", "Reshape", &[value, shape], &[])
            }
            _ => value,
        })
    }

    /// `[1, T]` of this number.
    fn all(&self, scope: &mut JoinScope<'_>, number: i64) -> ValueId {
        let shape = scope.op("token_sizes", "Shape", &[self.ids], &[]);
        let number = scope.joined.constant("number", Tensor::from_i64(&[1, 1], &[number]));
        scope.op("all", "Expand", &[number, shape], &[])
    }
}
