//! Negative log-likelihood of a token under a decoder's logits.

use crate::base::{Error, Result};

/// `-log softmax(logits)[target]` in nats, computed in f64.
///
/// Errors: `Error::Invalid` when the target is outside the logits.
pub fn cross_entropy(logits: &[f32], target: i64) -> Result<f64> {
    let chosen = usize::try_from(target)
        .ok()
        .and_then(|target| logits.get(target))
        .ok_or_else(|| Error::invalid(format!("token {target}"), format!("is outside the {} logits", logits.len())))?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&value| f64::from(value - most).exp()).sum();
    Ok(total.ln() - f64::from(chosen - most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_equals_values_computed_by_hand() {
        // softmax of (0, ln 3) is (1/4, 3/4).
        let logits = [0.0, 3f32.ln()];
        assert!((cross_entropy(&logits, 1).unwrap() - (4.0f64 / 3.0).ln()).abs() < 1e-6);
        assert!((cross_entropy(&logits, 0).unwrap() - 4f64.ln()).abs() < 1e-6);
        assert!((cross_entropy(&[1000.0, 1000.0], 0).unwrap() - 2f64.ln()).abs() < 1e-6);
        for target in [2, -1] {
            let error = cross_entropy(&logits, target).unwrap_err().to_string();
            assert_eq!(error, format!("token {target}: is outside the 2 logits"));
        }
    }
}
