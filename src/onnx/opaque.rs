//! Unknown fields of messages: kept as bytes and merged into the message that is written.
//!
//! The decoder takes out of a message what it understands; [`rest`] keeps all that is left, fields of later versions of
//! the format included. The encoder starts from [`base`] and puts its own fields in. So no field is lost because
//! this version does not know it.

use onnx_protobuf as pb;
use protobuf::{Message, SpecialFields};

use crate::ir::Opaque;

/// A message, after its understood fields have been taken out, in wire format; empty when nothing is left.
pub fn rest<M: Message>(message: &M) -> Opaque {
    // Writing into memory fails only for messages over 2 GiB, which a parsed file of that limit cannot hold.
    message.write_to_bytes().unwrap_or_default()
}

/// The message that [`rest`] kept.
pub fn base<M: Message>(bytes: &Opaque) -> M {
    // The bytes were written by `rest`, so they parse.
    if bytes.is_empty() { M::new() } else { M::parse_from_bytes(bytes).unwrap_or_else(|_| M::new()) }
}

/// Keys and values; entries with fields that this version does not know stay in the message.
pub fn pairs(entries: &mut Vec<pb::StringStringEntryProto>) -> Vec<(String, String)> {
    let plain = |entry: &pb::StringStringEntryProto| entry.special_fields == SpecialFields::default();
    entries.extract_if(.., |entry| plain(entry)).map(|entry| (entry.key, entry.value)).collect()
}
