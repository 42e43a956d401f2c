//! Unknown fields as bytes.

use protobuf::well_known_types::empty::Empty;
use protobuf::{Message, SpecialFields};

use crate::ir::Opaque;

/// The unknown fields of a message in wire format.
pub fn take(fields: SpecialFields) -> Opaque {
    let mut holder = Empty::new();
    holder.special_fields = fields;
    // Writing into memory fails only for messages over 2 GiB, which a parsed file of that limit cannot hold.
    holder.write_to_bytes().unwrap_or_default()
}

/// The unknown fields back as a message carries them.
pub fn put(bytes: &Opaque) -> SpecialFields {
    Empty::parse_from_bytes(bytes).map(|holder| holder.special_fields).unwrap_or_default()
}
