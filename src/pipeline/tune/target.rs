//! Targets of a tuning. One row of [`TARGETS`] each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{BYTE_UNITS, Error, Result, human_bytes};

/// Figures of a model that targets limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// From the encoded picture and the question to the first token, in milliseconds.
    pub ttft_ms: f64,
    /// Tokens generated in a second behind it, for one answer at a time.
    pub tokens_per_s: f64,
    /// Bytes of the components that are run, external data included.
    pub size_bytes: u64,
}

/// A kind of target.
pub struct TargetKind {
    /// Name of its flag, without the dashes.
    pub name: &'static str,
    /// True for an upper limit, false for a lower one.
    pub at_most: bool,
    /// True for a figure that is measured and not counted.
    pub is_time: bool,
    /// Reads the flag's value.
    pub parse: fn(&str) -> Result<f64, String>,
    /// What the plan with the best figure is called.
    pub best_is: &'static str,
    /// The limited figure.
    pub figure: fn(&Figures) -> f64,
    /// The figure with its unit.
    pub show: fn(f64) -> String,
}

/// All kinds of targets.
pub const TARGETS: &[TargetKind] = &[
    TargetKind {
        name: "ttft",
        at_most: true,
        is_time: true,
        best_is: "fastest",
        parse: |text| with_unit(text, &[("ms", 1.0), ("s", 1000.0)], "800ms or 1.2s"),
        figure: |figures| figures.ttft_ms,
        show: |value| format!("{value:.1} ms to the first token"),
    },
    TargetKind {
        name: "tokens-per-s",
        at_most: false,
        is_time: true,
        best_is: "fastest",
        parse: |text| with_unit(text, &[("", 1.0)], "25"),
        figure: |figures| figures.tokens_per_s,
        show: |value| format!("{value:.1} tokens per second"),
    },
    TargetKind {
        name: "size",
        at_most: true,
        is_time: false,
        best_is: "smallest",
        parse: |text| with_unit(text, BYTE_UNITS, "300MB or 1.5GiB"),
        figure: |figures| figures.size_bytes as f64,
        show: |value| format!("a size of {}", human_bytes(value as u64)),
    },
];

/// A positive number with one of these units behind it, in the first unit's scale.
fn with_unit(text: &str, units: &[(&str, f64)], example: &str) -> Result<f64, String> {
    let number = |(unit, factor): &(&str, f64)| {
        let value = factor * text.strip_suffix(unit)?.parse::<f64>().ok()?;
        (value.is_finite() && value > 0.0).then_some(value)
    };
    units.iter().find_map(number).ok_or_else(|| {
        let names: Vec<&str> = units.iter().map(|(name, _)| *name).filter(|name| !name.is_empty()).collect();
        let unit = if names.is_empty() { String::new() } else { format!(" with {} behind it", names.join(" or ")) };
        format!("must be a number above 0{unit}, as in {example}")
    })
}

/// A limit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TuneTarget {
    /// `ttft`, `tokens-per-s` or `size`.
    pub kind: String,
    /// Milliseconds, tokens per second or bytes.
    pub value: f64,
}

impl TuneTarget {
    /// Its row.
    ///
    /// Errors: `Error::Invalid` for an unknown kind.
    pub fn row(&self) -> Result<&'static TargetKind> {
        TARGETS.iter().find(|row| row.name == self.kind).ok_or_else(|| {
            let names: Vec<&str> = TARGETS.iter().map(|row| row.name).collect();
            Error::invalid(format!("target `{}`", self.kind), "does not exist")
                .remedy(format!("use one of {}", names.join(", ")))
        })
    }

    /// True for figures within the limit, with times made stricter by `margin` of at most 1.
    ///
    /// Errors: as `row`.
    pub fn is_met(&self, figures: &Figures, margin: f64) -> Result<bool> {
        let row = self.row()?;
        let margin = if row.is_time { margin } else { 1.0 };
        let found = (row.figure)(figures);
        Ok(if row.at_most { found <= self.value * margin } else { found * margin >= self.value })
    }

    /// How far a figure is from the limit, as a factor: at most 1 where it is met.
    ///
    /// Errors: as `row`.
    pub fn excess(&self, figures: &Figures) -> Result<f64> {
        let row = self.row()?;
        let found = (row.figure)(figures);
        Ok(if row.at_most { found / self.value } else { self.value / found.max(f64::MIN_POSITIVE) })
    }

    /// The limit in words.
    ///
    /// Errors: as `row`.
    pub fn shown(&self) -> Result<String> {
        Ok((self.row()?.show)(self.value))
    }
}

/// True for figures within all limits, with times made stricter by `margin`.
///
/// Errors: as `TuneTarget::row`.
pub fn all_met(targets: &[TuneTarget], figures: &Figures, margin: f64) -> Result<bool> {
    for target in targets {
        if !target.is_met(figures, margin)? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(kind: &str, text: &str) -> Result<f64, String> {
        (TARGETS.iter().find(|row| row.name == kind).unwrap().parse)(text)
    }

    #[test]
    fn values_of_targets_are_parsed_with_their_units() {
        for (kind, text, want) in [
            ("ttft", "800ms", 800.0),
            ("ttft", "1.2s", 1200.0),
            ("tokens-per-s", "25", 25.0),
            ("tokens-per-s", "0.5", 0.5),
            ("size", "300MB", 300e6),
            ("size", "1.5GiB", 1.5 * 1024.0 * 1024.0 * 1024.0),
        ] {
            assert_eq!(parse(kind, text), Ok(want), "{kind} {text}");
        }
        for (kind, text, want) in [
            ("ttft", "800", "ms or s behind it, as in 800ms or 1.2s"),
            ("ttft", "800us", "ms or s"),
            ("ttft", "-1ms", "above 0"),
            ("ttft", "0s", "above 0"),
            ("ttft", "ms", "above 0"),
            ("ttft", "infs", "above 0"),
            ("ttft", "1e308s", "above 0"),
            ("ttft", "1e-324s", "above 0"),
            ("size", "1e308GB", "above 0"),
            ("tokens-per-s", "25/s", "above 0, as in 25"),
            ("size", "300", "KiB or MiB or GiB or kB or MB or GB"),
            ("size", "300Mb", "MB"),
            ("size", "300 MB", "MB"),
            ("size", "", "MB"),
        ] {
            let error = parse(kind, text).expect_err(text);
            assert!(error.contains(want), "{kind} {text}: {error}");
        }
    }

    #[test]
    fn limits_hold_in_their_own_direction_and_a_margin_is_for_times() {
        let figures = Figures { ttft_ms: 90.0, tokens_per_s: 10.0, size_bytes: 100 };
        let target = |kind: &str, value: f64| TuneTarget { kind: kind.into(), value };
        for (kind, value, met, strictly) in [
            ("ttft", 100.0, true, true),
            ("ttft", 91.0, true, false),
            ("ttft", 89.0, false, false),
            ("tokens-per-s", 9.0, true, true),
            ("tokens-per-s", 9.9, true, false),
            ("tokens-per-s", 11.0, false, false),
            ("size", 100.0, true, true),
            ("size", 99.0, false, false),
        ] {
            let target = target(kind, value);
            assert_eq!(target.is_met(&figures, 1.0).unwrap(), met, "{kind} {value}");
            assert_eq!(target.is_met(&figures, 0.95).unwrap(), strictly, "{kind} {value}");
            assert_eq!(target.excess(&figures).unwrap() <= 1.0, met, "{kind} {value}");
        }
        assert!(
            target("speed", 1.0).is_met(&figures, 1.0).unwrap_err().to_string().contains("ttft, tokens-per-s, size")
        );
    }
}
