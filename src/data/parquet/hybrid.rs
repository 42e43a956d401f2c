//! Decoder of Parquet's hybrid encoding: runs of equal numbers and runs of bit-packed numbers. Levels and dictionary
//! indices use it.
//!
//! Source: apache/parquet-format, Encodings.md, "Run Length Encoding / Bit-Packing Hybrid".

use std::io::Read;

/// Reader of numbers with a fixed number of bits.
pub(super) struct Hybrid<R> {
    input: R,
    /// Bits per number, at most 32.
    width: u32,
    /// Remaining numbers of the current run.
    left: u64,
    run: HybridRun,
}

enum HybridRun {
    Equal(u32),
    /// Bits that are read but not consumed, lowest first, and their number.
    Packed {
        bits: u64,
        count: u32,
    },
}

impl<R: Read> Hybrid<R> {
    /// Makes a reader of numbers of `width` bits.
    ///
    /// Errors: a width of more than 32 bits.
    pub fn new(input: R, width: u32) -> Result<Self, String> {
        if width > 32 {
            return Err(format!("has numbers of {width} bits, expected at most 32"));
        }
        Ok(Hybrid { input, width, left: 0, run: HybridRun::Equal(0) })
    }

    /// Reads the next number; always 0 when the width is 0.
    ///
    /// Errors: the input ends, or the header of a run is malformed.
    pub fn next(&mut self) -> Result<u32, String> {
        if self.width == 0 {
            return Ok(0);
        }
        while self.left == 0 {
            self.begin()?;
        }
        self.left -= 1;
        match &mut self.run {
            HybridRun::Equal(value) => Ok(*value),
            HybridRun::Packed { bits, count } => {
                while *count < self.width {
                    *bits |= u64::from(byte(&mut self.input)?) << *count;
                    *count += 8;
                }
                let value = *bits & ((1 << self.width) - 1);
                *bits >>= self.width;
                *count -= self.width;
                u32::try_from(value).map_err(|e| e.to_string())
            }
        }
    }

    /// Counts the zeros among the next `count` numbers and consumes the reader.
    ///
    /// Errors: those of [`Hybrid::next`].
    pub fn zeros(mut self, count: usize) -> Result<usize, String> {
        let (mut rest, mut zeros) = (count as u64, 0u64);
        while self.width > 0 && rest > 0 {
            zeros += u64::from(self.next()? == 0);
            rest -= 1;
            if let HybridRun::Equal(value) = self.run {
                // The rest of an equal run is counted at once.
                let equal = self.left.min(rest);
                zeros += if value == 0 { equal } else { 0 };
                (self.left, rest) = (self.left - equal, rest - equal);
            }
        }
        usize::try_from(if self.width == 0 { count as u64 } else { zeros }).map_err(|e| e.to_string())
    }

    /// Reads the header of a run.
    fn begin(&mut self) -> Result<(), String> {
        let head = varint(&mut self.input)?;
        if head & 1 == 1 {
            self.left = (head >> 1).checked_mul(8).ok_or("has a run that is too long")?;
            self.run = HybridRun::Packed { bits: 0, count: 0 };
        } else {
            self.left = head >> 1;
            let mut value = [0; 4];
            let bytes = value.get_mut(..self.width.div_ceil(8) as usize).ok_or("has numbers that are too wide")?;
            self.input.read_exact(bytes).map_err(|e| e.to_string())?;
            self.run = HybridRun::Equal(u32::from_le_bytes(value));
        }
        Ok(())
    }
}

/// Reads one byte.
pub(super) fn byte(input: &mut impl Read) -> Result<u8, String> {
    let mut byte = [0];
    input.read_exact(&mut byte).map_err(|e| e.to_string())?;
    Ok(byte[0])
}

/// Reads a LEB128 number: groups of seven bits, lowest first.
///
/// Errors: the input ends, or the number has more than 64 bits.
pub(super) fn varint(input: &mut impl Read) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let next = byte(input)?;
        value |= u64::from(next & 0x7f) << shift;
        if next & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("has a number of more than 64 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_bit_packed_numbers_are_decoded_in_order() {
        // The three-bit numbers 0 to 7 are the example of the specification.
        let bytes = [0x0a, 0x02, 0x03, 0x88, 0xc6, 0xfa];
        let mut numbers = Hybrid::new(&bytes[..], 3).unwrap();
        let found: Vec<u32> = (0..13).map(|_| numbers.next().unwrap()).collect();
        assert_eq!(found, [2, 2, 2, 2, 2, 0, 1, 2, 3, 4, 5, 6, 7]);
        let short = "failed to fill whole buffer";
        assert_eq!(numbers.next(), Err(short.to_string()));
        let zeros = |width, count| Hybrid::new(&[0x0a, 0x00, 0x03, 0x88, 0xc6, 0xfa][..], width).unwrap().zeros(count);
        assert_eq!((zeros(3, 0), zeros(3, 3), zeros(3, 13), zeros(0, 9)), (Ok(0), Ok(3), Ok(6), Ok(9)));
        assert_eq!(zeros(3, 14), Err(short.to_string()));
    }

    #[test]
    fn bit_widths_from_0_to_32_are_decoded() {
        assert_eq!(Hybrid::new(&[][..], 0).unwrap().next(), Ok(0));
        assert_eq!(Hybrid::new(&[0x02, 1, 2, 3, 4][..], 32).unwrap().next(), Ok(0x0403_0201));
        let packed: Vec<u8> =
            [0x03].into_iter().chain((0..8u32).flat_map(|n| (n * 0x1111_1111).to_le_bytes())).collect();
        let mut numbers = Hybrid::new(&packed[..], 32).unwrap();
        assert_eq!(
            (0..8).map(|_| numbers.next().unwrap()).collect::<Vec<_>>(),
            (0..8).map(|n| n * 0x1111_1111).collect::<Vec<_>>()
        );
        let wide = Hybrid::new(&[][..], 33).err();
        assert_eq!(wide.as_deref(), Some("has numbers of 33 bits, expected at most 32"));
    }
}
