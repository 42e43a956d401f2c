//! A picture for a vision encoder's inputs, made up or from the model's own processor.

use std::sync::Arc;

use crate::base::{Result, Sha256Digest};
use crate::bundle::Bundle;
use crate::data::Processor;
use crate::prompt::ImageArrays;
use crate::runtime::{FeatureCache, Session, TensorValue, VisionEncoder};

use super::probe::{noise_picture, picture_prompt};

/// The vision encoder's inputs for a picture: from the model's own processor if possible, otherwise synthetic.
///
/// Errors: `Error::Unsupported` naming an unknown input, or one whose size the graph does not fix.
pub(super) fn pixel_feeds(bundle: &Bundle, session: Session) -> Result<(Session, Vec<(String, TensorValue)>)> {
    let encoder = VisionEncoder::new(session, Sha256Digest::new(), FeatureCache::new(0))?;
    let picture = noise_or_own_picture(bundle, &encoder)?;
    let feeds = encoder.feeds(&[&picture])?;
    Ok((encoder.into_session(), feeds))
}

/// A synthetic picture that fits the encoder, or else one from the model's own processor.
///
/// Errors: `Error::Unsupported` naming an unknown input, or one whose size the graph does not fix.
pub(super) fn noise_or_own_picture(bundle: &Bundle, encoder: &VisionEncoder) -> Result<Arc<ImageArrays>> {
    let made = noise_picture(encoder.session().subject(), encoder.inputs());
    match made.and_then(|made| encoder.feeds(&[&made]).map(|_| made)) {
        Ok(made) => Ok(Arc::new(made)),
        Err(error) => {
            let own = Processor::open(bundle).and_then(|processor| picture_prompt(&processor));
            match own.as_ref().map(|prompt| prompt.pictures.first()) {
                Ok(Some(picture)) => Ok(Arc::clone(picture)),
                _ => Err(error),
            }
        }
    }
}
