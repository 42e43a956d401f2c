//! Scans the wire format before the parser runs.
//!
//! The scan bounds the parser's input (no groups, limited nesting, limited message count, lengths inside the file) and
//! removes the large payloads of the graph's initializers, so that parsing needs memory for the structure alone.

use std::ops::Range;

/// Payloads of at least this many bytes are removed from the message.
const PAYLOAD_MIN: usize = 1024;
/// Limit on nested messages; functions and nested branches stay far below.
const MAX_DEPTH: usize = 64;
/// Limit on the number of messages: far more than any exporter writes, far fewer than would exhaust memory.
const MAX_MESSAGES: usize = 8_000_000;

/// Result of the scan.
pub struct Scan {
    /// The model message without the large payloads.
    pub skeleton: Vec<u8>,
    /// For each initializer of the top-level graph, in order: the payload's range in the file, if it was removed.
    pub payloads: Vec<Option<Range<usize>>>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum MessageType {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Segment,
    SparseTensor,
    ValueInfo,
    Type,
    TypeTensor,
    TypeInner,
    TypeMap,
    Shape,
    Dimension,
    Annotation,
    Function,
    Training,
    Leaf,
}

/// The message fields of each message of onnx.proto.
pub fn child(parent: MessageType, field: u64) -> Option<MessageType> {
    use MessageType::*;
    Some(match (parent, field) {
        (Model, 7) => Graph,
        (Model, 8 | 14) => Leaf,
        (Model, 20) => Training,
        (Model, 25) => Function,
        (Graph, 1) => Node,
        (Graph, 5) => Tensor,
        (Graph, 11..=13) => ValueInfo,
        (Graph, 14) => Annotation,
        (Graph, 15) => SparseTensor,
        (Graph, 16) => Leaf,
        (Node, 5) => Attribute,
        (Node, 9) => Leaf,
        (Attribute, 5 | 10) => Tensor,
        (Attribute, 6 | 11) => Graph,
        (Attribute, 14 | 15) => Type,
        (Attribute, 22 | 23) => SparseTensor,
        (Tensor, 3) => Segment,
        (Tensor, 13 | 16) => Leaf,
        (SparseTensor, 1 | 2) => Tensor,
        (ValueInfo, 2) => Type,
        (ValueInfo, 4) => Leaf,
        (Type, 1 | 8) => TypeTensor,
        (Type, 4 | 9) => TypeInner,
        (Type, 5) => TypeMap,
        (TypeInner, 1) => Type,
        (TypeMap, 2) => Type,
        (TypeTensor, 2) => Shape,
        (Shape, 1) => Dimension,
        (Annotation, 2) => Leaf,
        (Function, 7) => Node,
        (Function, 9 | 14) => Leaf,
        (Function, 11) => Attribute,
        (Function, 12) => ValueInfo,
        (Training, 1 | 2) => Graph,
        (Training, 3 | 4) => Leaf,
        _ => return None,
    })
}

/// One field of a message.
struct Field {
    number: u64,
    /// The whole field, tag included.
    whole: Range<usize>,
    /// The content of a length-delimited field.
    content: Option<Range<usize>>,
}

/// Scans a model file.
///
/// Errors: the problem with its byte offset. The caller adds the file's name.
pub fn scan(bytes: &[u8]) -> Result<Scan, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    let mut walker = Walker { bytes, messages: 0, payloads: Vec::new() };
    let mut skeleton = Vec::new();
    let mut graphs = 0;
    let mut position = 0;
    while position < bytes.len() {
        let field = walker.field(position, bytes.len())?;
        position = field.whole.end;
        match (child(MessageType::Model, field.number), field.content) {
            (Some(MessageType::Graph), Some(content)) => {
                graphs += 1;
                let graph = walker.strip_graph(content)?;
                put_field(&mut skeleton, 7, &graph);
            }
            (Some(inner), Some(content)) => {
                walker.check(inner, content, 1)?;
                skeleton.extend_from_slice(&bytes[field.whole]);
            }
            _ => skeleton.extend_from_slice(&bytes[field.whole]),
        }
    }
    if graphs == 0 {
        return Err("no graph in it, so it is not an ONNX model".into());
    }
    Ok(Scan { skeleton, payloads: walker.payloads })
}

struct Walker<'a> {
    bytes: &'a [u8],
    messages: usize,
    payloads: Vec<Option<Range<usize>>>,
}

impl Walker<'_> {
    fn varint(&self, position: &mut usize, end: usize) -> Result<u64, String> {
        let start = *position;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = match self.bytes.get(*position) {
                Some(&byte) if *position < end => byte,
                _ => return Err(format!("cut off or damaged at byte {start}")),
            };
            *position += 1;
            if shift < 64 {
                value |= u64::from(byte & 0x7f) << shift;
            }
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(format!("damaged number at byte {start}"))
    }

    fn field(&self, start: usize, end: usize) -> Result<Field, String> {
        let mut position = start;
        let tag = self.varint(&mut position, end)?;
        let number = tag >> 3;
        if number == 0 || number > u64::from(u32::MAX >> 3) {
            return Err(format!("field number {number} at byte {start} is not possible"));
        }
        let mut content = None;
        let length = match tag & 7 {
            0 => {
                self.varint(&mut position, end)?;
                0
            }
            1 => 8,
            5 => 4,
            2 => {
                let length = self.varint(&mut position, end)?;
                let length = usize::try_from(length).map_err(|_| format!("damaged length at byte {start}"))?;
                let stop = position.checked_add(length).ok_or_else(|| format!("damaged length at byte {start}"))?;
                content = Some(position..stop);
                length
            }
            3 | 4 => return Err(format!("a group at byte {start}: ONNX has none")),
            wire => return Err(format!("wire type {wire} at byte {start} does not exist")),
        };
        let stop = position.checked_add(length).filter(|&stop| stop <= end);
        let Some(stop) = stop else {
            return Err(format!("cut off: the field at byte {start} reaches past the end at byte {end}"));
        };
        Ok(Field { number, whole: start..stop, content })
    }

    fn count(&mut self, at: usize) -> Result<(), String> {
        self.messages += 1;
        if self.messages > MAX_MESSAGES {
            return Err(format!("more than {MAX_MESSAGES} messages, the limit, at byte {at}"));
        }
        Ok(())
    }

    /// Checks a message and all nested messages.
    fn check(&mut self, message: MessageType, range: Range<usize>, depth: usize) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH} messages at byte {}", range.start));
        }
        self.count(range.start)?;
        let mut position = range.start;
        while position < range.end {
            let field = self.field(position, range.end)?;
            position = field.whole.end;
            match (child(message, field.number), field.content) {
                (Some(inner), Some(content)) => self.check(inner, content, depth + 1)?,
                _ => self.count(field.whole.start)?,
            }
        }
        Ok(())
    }

    fn strip_graph(&mut self, range: Range<usize>) -> Result<Vec<u8>, String> {
        let mut out = Vec::new();
        let mut position = range.start;
        while position < range.end {
            let field = self.field(position, range.end)?;
            position = field.whole.end;
            match (child(MessageType::Graph, field.number), field.content) {
                (Some(MessageType::Tensor), Some(content)) => {
                    let tensor = self.strip_tensor(content)?;
                    put_field(&mut out, 5, &tensor);
                }
                (Some(inner), Some(content)) => {
                    self.check(inner, content, 2)?;
                    out.extend_from_slice(&self.bytes[field.whole]);
                }
                _ => {
                    self.count(field.whole.start)?;
                    out.extend_from_slice(&self.bytes[field.whole]);
                }
            }
        }
        Ok(out)
    }

    fn strip_tensor(&mut self, range: Range<usize>) -> Result<Vec<u8>, String> {
        self.count(range.start)?;
        let mut out = Vec::new();
        let mut payload = None;
        let mut position = range.start;
        while position < range.end {
            let field = self.field(position, range.end)?;
            position = field.whole.end;
            match (field.number, field.content) {
                (9, Some(content)) => {
                    if content.len() >= PAYLOAD_MIN {
                        payload = Some(content);
                        continue;
                    }
                    payload = None;
                }
                (number, Some(content)) => {
                    if let Some(inner) = child(MessageType::Tensor, number) {
                        self.check(inner, content, 3)?;
                    }
                }
                _ => self.count(field.whole.start)?,
            }
            out.extend_from_slice(&self.bytes[field.whole]);
        }
        self.payloads.push(payload);
        Ok(out)
    }
}

/// Appends a length-delimited field.
pub fn put_field(out: &mut Vec<u8>, number: u64, content: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
}

/// Appends a base-128 number.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
