//! Laws of weights in blocks.

use proptest::prelude::*;

use super::{BlockForm, Packed, SCHEMES};
use crate::checkpoint::{floats, from_floats};
use crate::ir::{DataType, Tensor};

fn unpacked(form: &BlockForm, packed: &Packed, dtype: DataType) -> Vec<f32> {
    let scales = Tensor::from_bytes(dtype, &[(form.rows * form.count()) as u64], packed.scales.clone());
    form.unpack(&packed.numbers, &floats(&scales).unwrap(), packed.zeros.as_deref())
}

fn error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum()
}

proptest! {
    #[test]
    fn packed_blocks_have_their_sizes_and_half_a_step_of_error_at_most(
        rows in 1usize..4,
        columns in 1usize..80,
        bits in prop_oneof![Just(4u32), Just(8)],
        block in prop_oneof![Just(16usize), Just(32), Just(64)],
        half in any::<bool>(),
        numbers in prop::collection::vec(-2.0f32..2.0, 4 * 80),
    ) {
        let form = BlockForm { rows, columns, bits, block };
        let values = &numbers[..rows * columns];
        let dtype = if half { DataType::Float16 } else { DataType::Float };
        let mut errors = Vec::new();
        for scheme in SCHEMES {
            let packed = form.pack(values, scheme, dtype, &[]).unwrap();
            prop_assert_eq!(packed.numbers.len(), rows * form.count() * block * bits as usize / 8);
            prop_assert_eq!(packed.zeros.as_ref().map(Vec::len), scheme.has_zeros.then_some(rows * form.zero_bytes()));
            let found = unpacked(&form, &packed, dtype);
            prop_assert_eq!(found.len(), values.len());
            errors.push(error(values, &found));
            // With zero points every number is at most half a step off, and a scale in f16 is itself rounded, below 2^-14 to
            // multiples of 2^-24.
            let scales = floats(&Tensor::from_bytes(dtype, &[(rows * form.count()) as u64], packed.scales.clone())).unwrap();
            let rounding = if half { 1.0 + f32::powi(2.0, -10) * 256.0 } else { 1.0 + 1e-4 };
            let smallest = if half { 256.0 * f32::powi(2.0, -25) } else { 0.0 };
            if scheme.name == "asymmetric" {
                for (at, (value, found)) in values.iter().zip(&found).enumerate() {
                    let scale = scales[at / columns * form.count() + at % columns / block];
                    prop_assert!((value - found).abs() <= 0.51 * scale * rounding + smallest + 1e-6, "{value} {found} {scale}");
                }
            }
        }
        // The search tries the range's own scale too.
        if !half {
            prop_assert!(errors[2] <= errors[0] * (1.0 + 1e-5) + 1e-9, "{errors:?}");
            prop_assert!(errors[3] <= errors[1] * (1.0 + 1e-5) + 1e-9, "{errors:?}");
        }
    }
}

/// Numbers from the definition: scale times (number - zero point), the low bits first, rows padded to whole blocks.
#[test]
fn numbers_are_read_as_the_operator_defines_them() {
    let form = BlockForm { rows: 2, columns: 18, bits: 4, block: 16 };
    let mut numbers = vec![0u8; 32];
    (numbers[0], numbers[8], numbers[16], numbers[24]) = (0x3a, 0x0f, 0x88, 0x01);
    let zeros = [0x92u8, 0x08];
    let found = form.unpack(&numbers, &[0.5, 2.0, 1.0, 4.0], Some(&zeros));
    assert_eq!(found[..3], [0.5 * (10.0 - 2.0), 0.5 * (3.0 - 2.0), 0.5 * (0.0 - 2.0)]);
    assert_eq!(found[16..18], [2.0 * (15.0 - 9.0), 2.0 * (0.0 - 9.0)]);
    assert_eq!(found[18..20], [0.0, 0.0]);
    assert_eq!(found[34..36], [4.0 * 1.0, 0.0]);
    let plain = form.unpack(&numbers, &[0.5, 2.0, 1.0, 4.0], None);
    assert_eq!(plain[..2], [0.5 * (10.0 - 8.0), 0.5 * (3.0 - 8.0)]);
    assert_eq!(from_floats(DataType::Float16, &[0.5]).unwrap(), [0x00, 0x38]);
}
