//! Decoding and then encoding a file gives the same message. The messages are compared in wire format, field by field,
//! so that unknown fields count as well.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use onnx_protobuf as pb;
use protobuf::Message as _;

use super::wire::{MessageType, child, put_field, put_varint};
use super::*;
use crate::ir::DataType;

#[derive(Clone, Debug, PartialEq)]
enum Item {
    Varint(u64),
    Fixed32(u32),
    Fixed64(u64),
    Bytes(Vec<u8>),
    Tree(Tree),
}

/// The fields of a message by number.
type Tree = BTreeMap<u64, Vec<Item>>;

/// Repeated fields that hold no messages. In any other field a default value equals an absent one.
const REPEATED: &[(MessageType, &[u64])] = &[
    (MessageType::Node, &[1, 2]),
    (MessageType::Attribute, &[7, 8, 9]),
    (MessageType::Tensor, &[1, 4, 5, 6, 7, 10, 11]),
    (MessageType::SparseTensor, &[3]),
    (MessageType::Function, &[4, 5, 6]),
    // A oneof: a size of 0 differs from an absent size.
    (MessageType::Dimension, &[1, 2]),
];

/// Repeated numbers, which may be packed: bytes per number, 0 for base-128.
fn packed(message: MessageType, field: u64) -> Option<usize> {
    match (message, field) {
        (MessageType::Attribute, 7) | (MessageType::Tensor, 4) => Some(4),
        (MessageType::Tensor, 10) => Some(8),
        (MessageType::Attribute, 8) | (MessageType::Tensor, 1 | 5 | 7 | 11) | (MessageType::SparseTensor, 3) => Some(0),
        _ => None,
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

fn fixed<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (head, tail) = bytes.split_at(N);
    *bytes = tail;
    head.try_into().unwrap()
}

/// A tensor whose typed fields are moved to `raw_data`, the form in which tensors are written.
fn with_raw_data(bytes: &[u8]) -> Vec<u8> {
    let mut proto = pb::TensorProto::parse_from_bytes(bytes).unwrap();
    if let Some(dtype) = DataType::from_number(proto.data_type)
        && proto.raw_data.is_empty()
    {
        proto.raw_data = tensor::typed_bytes(&mut proto, dtype);
    }
    proto.write_to_bytes().unwrap()
}

/// A message as fields, repeated fields in order. With `without_content`, the values of initializers are left out.
fn tree(message: MessageType, bytes: &[u8], without_content: bool) -> Tree {
    let whole = if message == MessageType::Tensor { with_raw_data(bytes) } else { bytes.to_vec() };
    let mut bytes = whole.as_slice();
    let mut tree = Tree::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes);
        let field = tag >> 3;
        let items = tree.entry(field).or_default();
        match tag & 7 {
            0 => items.push(Item::Varint(varint(&mut bytes))),
            1 => items.push(Item::Fixed64(u64::from_le_bytes(fixed(&mut bytes)))),
            5 => items.push(Item::Fixed32(u32::from_le_bytes(fixed(&mut bytes)))),
            _ => {
                let length = varint(&mut bytes) as usize;
                let (mut content, tail) = bytes.split_at(length);
                bytes = tail;
                match (packed(message, field), child(message, field)) {
                    (Some(size), _) => {
                        while !content.is_empty() {
                            items.push(match size {
                                4 => Item::Fixed32(u32::from_le_bytes(fixed(&mut content))),
                                8 => Item::Fixed64(u64::from_le_bytes(fixed(&mut content))),
                                _ => Item::Varint(varint(&mut content)),
                            });
                        }
                    }
                    (None, Some(inner)) => items.push(Item::Tree(self::tree(inner, content, without_content))),
                    (None, None) => items.push(Item::Bytes(content.to_vec())),
                }
            }
        }
    }
    let repeated = REPEATED.iter().find(|(of, _)| *of == message).map_or(&[][..], |(_, fields)| fields);
    let default = |item: &Item| match item {
        Item::Varint(value) => *value == 0,
        Item::Fixed32(value) => *value == 0,
        Item::Fixed64(value) => *value == 0,
        Item::Bytes(bytes) => bytes.is_empty(),
        Item::Tree(_) => false,
    };
    tree.retain(|field, items| repeated.contains(field) || !items.iter().all(default));
    match message {
        MessageType::Tensor if without_content => [9, 13, 14].iter().for_each(|field| drop(tree.remove(field))),
        // The order of entries that describe values by name is not significant.
        MessageType::Graph | MessageType::Function => {
            let unordered = if message == MessageType::Graph { &[13, 14][..] } else { &[12] };
            for field in unordered {
                tree.entry(*field).or_default().sort_by_key(|item| format!("{item:?}"));
            }
        }
        _ => {}
    }
    tree
}

/// The first place where two messages differ.
fn difference(at: &str, a: &Tree, b: &Tree) -> Option<String> {
    let fields: std::collections::BTreeSet<u64> = a.keys().chain(b.keys()).copied().collect();
    for field in fields {
        let none = Vec::new();
        let (left, right) = (a.get(&field).unwrap_or(&none), b.get(&field).unwrap_or(&none));
        let at = format!("{at}.{field}");
        if left.len() != right.len() {
            let lost = left.iter().find(|item| !right.contains(item));
            let found = format!("{at}: {} entries became {}, lost {lost:?}", left.len(), right.len());
            return Some(found.chars().take(400).collect());
        }
        for (number, pair) in left.iter().zip(right).enumerate() {
            let at = format!("{at}[{number}]");
            match pair {
                (Item::Tree(a), Item::Tree(b)) => {
                    if let Some(found) = difference(&at, a, b) {
                        return Some(found);
                    }
                }
                (a, b) if a != b => return Some(format!("{at}: {a:?} became {b:?}")),
                _ => {}
            }
        }
    }
    None
}

/// Bytes of the model after it was read and written.
fn again(path: &Path) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("again.onnx");
    save(&load(path).unwrap(), &out, &Storage::Inline).unwrap();
    std::fs::read(out).unwrap()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

#[test]
fn every_fixture_graph_keeps_every_field() {
    let mut open = vec![fixtures()];
    let mut count = 0;
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "onnx") {
                let before = tree(MessageType::Model, &std::fs::read(&path).unwrap(), true);
                let found = difference("model", &before, &tree(MessageType::Model, &again(&path), true));
                assert_eq!(found, None, "{}", path.display());
                count += 1;
            }
        }
    }
    assert!(count >= 20, "{count} graphs");
}

#[test]
fn a_model_with_every_field_set_keeps_every_field() {
    let path = fixtures().join("onnx/every-field.onnx");
    let before = std::fs::read(&path).unwrap();
    let found =
        difference("model", &tree(MessageType::Model, &before, false), &tree(MessageType::Model, &again(&path), false));
    assert_eq!(found, None);
    // `ai.onnx` and the empty name are the same domain.
    let model = load(&path).unwrap();
    assert_eq!(model.opset_imports.get(""), Some(&21));
    assert!(model.graph.body.nodes.iter().any(|node| node.op() == "Identity"));
}

/// The message with an unknown field (number 2000) appended to it and to every nested message.
fn with_unknown_fields(message: MessageType, bytes: &[u8], count: &mut usize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let start = rest;
        let tag = varint(&mut rest);
        match tag & 7 {
            0 => drop(varint(&mut rest)),
            1 => drop(fixed::<8>(&mut rest)),
            5 => drop(fixed::<4>(&mut rest)),
            _ => {
                let length = varint(&mut rest) as usize;
                let (content, tail) = rest.split_at(length);
                rest = tail;
                if let Some(inner) = child(message, tag >> 3) {
                    put_field(&mut out, tag >> 3, &with_unknown_fields(inner, content, count));
                    continue;
                }
            }
        }
        out.extend_from_slice(&start[..start.len() - rest.len()]);
    }
    *count += 1;
    put_field(&mut out, 2000, format!("unknown {count}").as_bytes());
    put_varint(&mut out, 2001 << 3);
    put_varint(&mut out, *count as u64);
    out
}

#[test]
fn unknown_fields_are_kept_in_every_message() {
    let mut count = 0;
    let bytes = std::fs::read(fixtures().join("onnx/every-field.onnx")).unwrap();
    let before = with_unknown_fields(MessageType::Model, &bytes, &mut count);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, &before).unwrap();
    let after = again(&path);
    let found =
        difference("model", &tree(MessageType::Model, &before, false), &tree(MessageType::Model, &after, false));
    assert_eq!(found, None);
    for number in 1..=count {
        let field = format!("unknown {number}");
        let mut marked = Vec::new();
        put_field(&mut marked, 2000, field.as_bytes());
        assert!(after.windows(marked.len()).any(|window| window == marked), "{field} of {count}");
    }
    assert!(count > 200, "{count} messages");
}
