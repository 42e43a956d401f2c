//! Unknown fields of messages: kept as bytes and merged into the written message.
//!
//! The decoder moves the fields it understands out of a message; [`rest`] keeps all others, including fields of later
//! format versions. The encoder starts from [`base`] and adds its own fields. So a rewrite preserves fields that this
//! version does not know.

use onnx_protobuf as pb;
use protobuf::{Message, SpecialFields};

use crate::ir::Opaque;

/// A message without the fields already moved out of it, in wire format; empty when no field is left.
pub fn rest<M: Message>(message: &M) -> Opaque {
    // Writing into memory fails only for messages over 2 GiB, which a parsed file of that limit cannot hold.
    message.write_to_bytes().unwrap_or_default()
}

/// The message stored by [`rest`].
pub fn base<M: Message>(bytes: &Opaque) -> M {
    // The bytes were written by `rest`, so they parse.
    if bytes.is_empty() { M::new() } else { M::parse_from_bytes(bytes).unwrap_or_else(|_| M::new()) }
}

/// Moves keys and values out of the entries; entries with unknown fields stay in the message.
pub fn pairs(entries: &mut Vec<pb::StringStringEntryProto>) -> Vec<(String, String)> {
    let plain = |entry: &pb::StringStringEntryProto| entry.special_fields == SpecialFields::default();
    entries.extract_if(.., |entry| plain(entry)).map(|entry| (entry.key, entry.value)).collect()
}
