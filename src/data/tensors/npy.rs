//! Parser of the header of NumPy's `.npy` format.
//!
//! Source: NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".

use crate::ir::DataType;

/// Element type, shape and offset of the elements in bytes.
#[derive(Debug, PartialEq)]
pub(super) struct NpyHeader {
    pub dtype: DataType,
    pub shape: Vec<usize>,
    pub begin: usize,
}

/// Supported element types and their NumPy names.
const TYPES: &[(&str, DataType)] = &[
    ("f2", DataType::Float16),
    ("f4", DataType::Float),
    ("f8", DataType::Double),
    ("i1", DataType::Int8),
    ("i2", DataType::Int16),
    ("i4", DataType::Int32),
    ("i8", DataType::Int64),
    ("u1", DataType::Uint8),
    ("u2", DataType::Uint16),
    ("u4", DataType::Uint32),
    ("u8", DataType::Uint64),
    ("b1", DataType::Bool),
];

/// Parses the header at the start of `bytes`.
///
/// Errors: a message with the problem and, if known, a remedy.
pub(super) fn npy_header(bytes: &[u8]) -> Result<NpyHeader, String> {
    let cut = || "ends inside its header".to_string();
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or("is no array in NumPy's format")?;
    let (length, before) = match *rest.first_chunk::<6>().ok_or_else(cut)? {
        [1, _, a, b, ..] => (usize::from(u16::from_le_bytes([a, b])), 10),
        [2 | 3, _, a, b, c, d] => (u32::from_le_bytes([a, b, c, d]) as usize, 12),
        [version, ..] => return Err(format!("has version {version} of NumPy's format, known are 1 to 3")),
    };
    let begin = length.checked_add(before).filter(|&end| end <= bytes.len()).ok_or_else(cut)?;
    let text = std::str::from_utf8(&bytes[before..begin]).map_err(|_| "has a header that is no text")?.trim();
    let malformed = || format!("has the header `{}`, which is malformed", text.chars().take(120).collect::<String>());
    let fields = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).ok_or_else(malformed)?;
    let field = |key: &str| fields.split_once(&format!("'{key}':")).map(|(_, value)| value.trim_start());
    let descr = field("descr").ok_or_else(malformed)?;
    let Some(descr) = descr.strip_prefix('\'').and_then(|text| text.split_once('\'')).map(|(name, _)| name) else {
        return Err("has named fields; save each as an array of its own".into());
    };
    let dtype = match descr.split_at_checked(1) {
        Some(("<" | "|" | "=", name)) => TYPES.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype),
        _ => None,
    };
    let dtype = dtype.ok_or_else(|| {
        format!("has elements of type `{descr}`; save little-endian numbers, such as `.astype('<f4')` or `'<i8'`")
    })?;
    match field("fortran_order") {
        Some(value) if value.starts_with("False") => {}
        Some(value) if value.starts_with("True") => {
            return Err("is stored column by column; save `np.ascontiguousarray(array)`".into());
        }
        _ => return Err(malformed()),
    }
    let shape = field("shape").and_then(|value| value.strip_prefix('(')?.split_once(')'));
    let (shape, _) = shape.ok_or_else(malformed)?;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape = sizes.map(|size| size.parse().map_err(|_| malformed())).collect::<Result<_, _>>()?;
    Ok(NpyHeader { dtype, shape, begin })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((text.len() as u16).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    #[test]
    fn element_type_and_shape_are_read_from_npy_headers() {
        for (text, dtype, shape) in [
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", DataType::Float, vec![2, 3]),
            ("{'descr': '|b1', 'fortran_order': False, 'shape': (4,), }", DataType::Bool, vec![4]),
            ("{'descr': '<i8', 'fortran_order': False, 'shape': (), }", DataType::Int64, vec![]),
        ] {
            let bytes = file(text);
            assert_eq!(npy_header(&bytes), Ok(NpyHeader { dtype, shape, begin: bytes.len() }));
        }
    }

    #[test]
    fn unsupported_npy_headers_are_refused_with_a_reason() {
        for (text, want) in [
            ("{'descr': '>f4', 'fortran_order': False, 'shape': (2,), }", "`>f4`"),
            ("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }", "ascontiguousarray"),
            ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", "named fields"),
            ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }", "malformed"),
            ("{'descr': '<f4', 'shape': (2,), }", "malformed"),
            ("", "ends inside its header"),
            ("                ", "malformed"),
        ] {
            let error = npy_header(&file(text)).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
        let whole = file("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }");
        for length in 0..whole.len() {
            let want = if length < 6 { "is no array in NumPy's format" } else { "ends inside its header" };
            assert_eq!(npy_header(&whole[..length]), Err(want.to_string()), "{length}");
        }
        assert!(npy_header(b"\x93NUMPY\x07\x00\x00\x00\x00\x00").unwrap_err().contains("version 7"));
    }
}
