//! Conversations of one length, which run through a decoder together.

use crate::base::Result;
use crate::runtime::{Embedded, Step, TensorValue};

/// Limit on the tokens of one decoder pass; a longer conversation runs alone. Bounds memory and
/// does not affect the result.
const TOKENS_PER_PASS: usize = 2048;

/// An embedded conversation.
pub struct Conversation {
    /// Its index among all conversations.
    pub number: usize,
    pub answer_mask: Vec<bool>,
    pub embedded: Embedded,
}

/// Conversations of one length, which run together without padding.
pub struct Batch {
    pub step: Step,
    /// `[1, N, 2]`, the graph's input of row positions; `targets` is `[1, N, 1]`.
    pub rows: TensorValue,
    pub targets: TensorValue,
    /// `[N]`: index of the conversation of each row.
    pub owners: Vec<usize>,
}

/// Groups conversations with answers into batches of one length.
pub fn batches(mut conversations: Vec<Conversation>, fixed_batch: Option<usize>) -> Result<Vec<Batch>> {
    conversations.retain(|conversation| conversation.answer_mask.iter().skip(1).any(|&answer| answer));
    grouped(conversations, fixed_batch, batch)
}

/// Groups of one length, each of at most so many tokens as a pass takes.
pub fn grouped(
    mut conversations: Vec<Conversation>,
    fixed_batch: Option<usize>,
    batch: impl Fn(&[Conversation]) -> Result<Batch>,
) -> Result<Vec<Batch>> {
    conversations.sort_by_key(|conversation| conversation.embedded.len());
    let mut batches = Vec::new();
    for group in conversations.chunk_by(|a, b| a.embedded.len() == b.embedded.len()) {
        let time = group[0].embedded.len();
        let size = fixed_batch.unwrap_or(TOKENS_PER_PASS / time.max(1)).max(1);
        for group in group.chunks(size) {
            batches.push(batch(group)?);
        }
    }
    Ok(batches)
}

fn batch(group: &[Conversation]) -> Result<Batch> {
    let (mut rows, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (number, conversation) in group.iter().enumerate() {
        let next = conversation.embedded.input_ids.iter().zip(&conversation.answer_mask).skip(1);
        for (position, (&target, _)) in next.enumerate().filter(|(_, (_, answer))| **answer) {
            rows.extend([number as i64, position as i64]);
            targets.push(target);
            owners.push(conversation.number);
        }
    }
    let embedded: Vec<&Embedded> = group.iter().map(|conversation| &conversation.embedded).collect();
    Ok(Batch {
        step: Step::prefill(&embedded, false)?,
        rows: TensorValue::new(&[1, targets.len(), 2], rows)?,
        targets: TensorValue::new(&[1, targets.len(), 1], targets)?,
        owners,
    })
}
