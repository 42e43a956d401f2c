//! Rotary positions of prompts with pictures, in three rows for multimodal rotary embedding.

use crate::base::{Error, Result};

/// Temporal, height and width positions of one prompt, and the first position after it.
///
/// Text increments all three together. A picture of `grid` patches `(t, h, w)`, of which `merge` by `merge` form a
/// token, counts its frames, rows and columns from the position where it begins; the next token follows the largest of
/// them. Source: Qwen2-VL, arXiv:2409.12191, section 2.1 (M-RoPE).
///
/// Errors: `Error::Invalid` when the pictures' grids do not match the number of image tokens.
pub fn multimodal_positions(
    input_ids: &[i64],
    image_token: i64,
    grids: &[[i64; 3]],
    merge: usize,
) -> Result<([Vec<i64>; 3], i64)> {
    let merge = i64::try_from(merge.max(1)).unwrap_or(1);
    let mut rows: [Vec<i64>; 3] = Default::default();
    let mut next = 0i64;
    let mut grids = grids.iter();
    let mut at = 0;
    while at < input_ids.len() {
        if input_ids[at] != image_token {
            rows.iter_mut().for_each(|row| row.push(next));
            next += 1;
            at += 1;
            continue;
        }
        let run = input_ids[at..].iter().take_while(|&&id| id == image_token).count();
        let wrong = |problem: String| {
            Error::invalid(format!("image tokens at position {at} of the prompt"), problem).remedy(MISMATCH)
        };
        let &[frames, height, width] = grids.next().ok_or_else(|| wrong("belong to no picture".into()))?;
        let (height, width) = (height / merge, width / merge);
        let count = frames.checked_mul(height).and_then(|count| count.checked_mul(width)).unwrap_or(-1);
        if count != run as i64 {
            return Err(wrong(format!("are {run}, the grid of their picture makes {count}")));
        }
        for t in 0..frames {
            for h in 0..height {
                for w in 0..width {
                    rows[0].push(next + t);
                    rows[1].push(next + h);
                    rows[2].push(next + w);
                }
            }
        }
        next += frames.max(height).max(width);
        at += run;
    }
    if grids.next().is_some() {
        return Err(Error::invalid("prompt", "has fewer runs of image tokens than pictures").remedy(MISMATCH));
    }
    Ok((rows, next))
}

/// Remedy when the prompt's image tokens do not match its pictures.
const MISMATCH: &str = "check that the processor's files and the graph belong to one model";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_tokens_get_row_and_column_positions() {
        // One text token, a picture of 2 x 3 tokens (grid 4 x 6, merged 2 x 2), two text tokens.
        let ids = [5, 9, 9, 9, 9, 9, 9, 6, 7];
        let (rows, next) = multimodal_positions(&ids, 9, &[[1, 4, 6]], 2).expect("positions");
        assert_eq!(rows[0], [0, 1, 1, 1, 1, 1, 1, 4, 5]);
        assert_eq!(rows[1], [0, 1, 1, 1, 2, 2, 2, 4, 5]);
        assert_eq!(rows[2], [0, 1, 2, 3, 1, 2, 3, 4, 5]);
        assert_eq!(next, 6);
    }

    #[test]
    fn grids_must_match_the_number_of_image_tokens() {
        for (grids, want) in [
            (&[][..], "image tokens at position 1 of the prompt: belong to no picture"),
            (&[[1, 4, 4]][..], "image tokens at position 1 of the prompt: are 6, the grid of their picture makes 4"),
            (&[[1, 4, 6], [1, 2, 2]][..], "prompt: has fewer runs of image tokens than pictures"),
        ] {
            let error = multimodal_positions(&[5, 9, 9, 9, 9, 9, 9], 9, grids, 2).expect_err(want);
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
            assert!(error.to_string().starts_with(want), "{error}, expected {want}");
        }
    }
}
