//! Forms for the parts of a model: floats and 8 bits where they lower the divergence most for each byte.

use super::forms::WeightForm;

/// Bytes and divergence of one part in each form, in the order of [`WeightForm::ALL`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct FormCosts {
    /// Bytes of its weights.
    pub bytes: [u64; 3],
    /// Divergence in nats when this part alone has the form.
    pub kl: [f64; 3],
}

/// A part in a better form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Upgrade {
    /// Its place among the parts.
    pub part: usize,
    /// The better form.
    pub form: WeightForm,
    /// Bytes that it takes more.
    pub bytes: u64,
}

/// The upgrades from 4 bits in all parts to floats in all parts, each time the one that lowers the sum of the divergences most for
/// each byte. Upgrades that lower nothing come last, the cheapest first, so that the end is the float model.
pub(super) fn upgrades(costs: &[FormCosts]) -> Vec<Upgrade> {
    let mut forms = vec![WeightForm::Int4; costs.len()];
    let mut found = Vec::new();
    loop {
        let mut best: Option<(f64, Upgrade)> = None;
        for (part, cost) in costs.iter().enumerate() {
            let now = forms[part] as usize;
            for form in WeightForm::ALL.into_iter().filter(|&form| (form as usize) < now) {
                let bytes = cost.bytes[form as usize].saturating_sub(cost.bytes[now]);
                let saved = cost.kl[now] - cost.kl[form as usize];
                // A part whose 8 bits take the bytes of its floats has no form between.
                if form == WeightForm::Int8 && cost.bytes[form as usize] >= cost.bytes[0] {
                    continue;
                }
                let size = bytes.max(1) as f64;
                let value = if saved > 0.0 { saved / size } else { -size };
                if best.as_ref().is_none_or(|(most, _)| value > *most) {
                    best = Some((value, Upgrade { part, form, bytes }));
                }
            }
        }
        let Some((_, upgrade)) = best else { return found };
        forms[upgrade.part] = upgrade.form;
        found.push(upgrade);
    }
}

/// The forms after some upgrades.
pub(super) fn forms_after<'a>(parts: usize, upgrades: impl IntoIterator<Item = &'a Upgrade>) -> Vec<WeightForm> {
    let mut forms = vec![WeightForm::Int4; parts];
    upgrades.into_iter().for_each(|upgrade| forms[upgrade.part] = upgrade.form);
    forms
}

/// The forms within `spare` bytes more than 4 bits take: upgrades in their order, without those that no longer fit and what builds
/// on them, nor those that lower nothing.
pub(super) fn forms_within(costs: &[FormCosts], upgrades: &[Upgrade], spare: u64) -> Vec<WeightForm> {
    let mut forms = vec![WeightForm::Int4; costs.len()];
    let mut left = spare;
    for upgrade in upgrades {
        let (now, better) = (forms[upgrade.part] as usize, upgrade.form as usize);
        let cost = &costs[upgrade.part];
        // Where an upgrade to 8 bits was left out, the next one of this part takes more bytes.
        let bytes = cost.bytes[better].saturating_sub(cost.bytes[now]);
        if bytes <= left && cost.kl[better] < cost.kl[now] {
            left -= bytes;
            forms[upgrade.part] = upgrade.form;
        }
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::*;
    use WeightForm::{Float32, Int4, Int8};

    fn costs() -> Vec<FormCosts> {
        vec![
            FormCosts { bytes: [80, 20, 10], kl: [0.0, 0.01, 0.5] },
            FormCosts { bytes: [80, 20, 10], kl: [0.0, 0.001, 0.02] },
            // No bytes between 4 bits and floats, and no loss.
            FormCosts { bytes: [40, 40, 10], kl: [0.0, 0.0, 0.0] },
        ]
    }

    #[test]
    fn the_part_that_saves_most_for_each_byte_comes_first() {
        let found: Vec<_> = upgrades(&costs()).iter().map(|one| (one.part, one.form, one.bytes)).collect();
        assert_eq!(found, [(0, Int8, 10), (1, Int8, 10), (0, Float32, 60), (1, Float32, 60), (2, Float32, 30)]);
        assert_eq!(forms_after(3, &upgrades(&costs())), [Float32; 3]);
        assert_eq!(forms_after(3, &upgrades(&costs())[..3]), [Float32, Int8, Int4]);
    }

    #[test]
    fn a_size_takes_what_fits_and_saves_something() {
        let (costs, upgrades) = (costs(), upgrades(&costs()));
        assert_eq!(forms_within(&costs, &upgrades, 9), [Int4, Int4, Int4]);
        assert_eq!(forms_within(&costs, &upgrades, 10), [Int8, Int4, Int4]);
        assert_eq!(forms_within(&costs, &upgrades, 79), [Int8, Int8, Int4]);
        assert_eq!(forms_within(&costs, &upgrades, 80), [Float32, Int8, Int4]);
        assert_eq!(forms_within(&costs, &upgrades, 1000), [Float32, Float32, Int4]);
    }
}
