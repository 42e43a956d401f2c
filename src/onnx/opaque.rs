//! Unknown fields of messages: kept as bytes and merged into the message that is written.
//!
//! The decoder takes out of a message what it understands; [`rest`] keeps all that is left, fields of later versions of
//! the format included. The encoder starts from [`base`] and puts its own fields in. So no field is lost because
//! this version does not know it.

use protobuf::Message;

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
