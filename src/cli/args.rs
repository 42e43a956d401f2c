//! Types of argument values that several verbs use.

use std::num::IntErrorKind;
use std::path::Path;

use crate::base;
use crate::bundle::{ModelSource, Variants};
use crate::eval::MOST_COUNT;
use crate::method::{MODALITIES, ModalityWeights, check_weights};

use super::context::Context;

/// The precision variants of MODEL that a verb works on.
#[derive(clap::Args, Clone, Debug)]
pub struct VariantArgs {
    /// Take this precision variant of every component, such as fp16 or q4, or one for each that is named, as in
    /// decoder=q4,vision_encoder=fp16, and leave out the others; fp32 are the files without a suffix [default: verbs that run the
    /// model take the most precise ones, verbs that write it take all of a folder and the most precise ones from the hub]
    #[arg(long, value_name = "VARIANT")]
    variant: Option<Variants>,
}

impl VariantArgs {
    /// The model at this path in these variants.
    ///
    /// Errors: as `ModelSource::find`.
    pub fn source(&self, path: &Path, context: &Context) -> base::Result<ModelSource> {
        ModelSource::find(path, self.variant.clone(), &context.cancel)
    }
}

/// A list of layers, `2,5`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerList(pub Vec<usize>);

impl std::str::FromStr for LayerList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let layers = text.split(',').map(|item| {
            item.parse()
                .map_err(|_| format!("`{item}` is not a layer index; write indices from 0 with commas, as in 2,5"))
        });
        layers.collect::<Result<_, String>>().map(LayerList)
    }
}

/// Layers to train: `all`, or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrainedLayers {
    /// Every decoder layer.
    All,
    /// These.
    These(LayerList),
}

impl std::str::FromStr for TrainedLayers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(TrainedLayers::All),
            list => list.parse().map(TrainedLayers::These).map_err(|problem: String| format!("{problem}, or `all`")),
        }
    }
}

/// Weights of modalities, `image=0.7,text=0.3`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModalityWeightsArg(pub ModalityWeights);

impl std::str::FromStr for ModalityWeightsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = MODALITIES.iter().map(|row| row.1).collect();
        let mut weights = ModalityWeights::new();
        for item in text.split(',') {
            let (name, value) =
                item.split_once('=').ok_or_else(|| format!("`{item}` is not NAME=WEIGHT, as in image=0.7,text=0.3"))?;
            let row = MODALITIES.iter().find(|row| row.1 == name);
            let row = row.ok_or_else(|| format!("`{name}` is none of {}", names.join(", ")))?;
            let value = value.parse().map_err(|_| format!("`{value}` is not a number"))?;
            if weights.insert(row.0, value).is_some() {
                return Err(format!("`{name}` occurs twice"));
            }
        }
        check_weights(&weights).map_err(|e| e.to_string())?;
        Ok(ModalityWeightsArg(weights))
    }
}

/// A number above 0 and at most 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("must be a number above 0 and at most 1".to_string()),
    }
}

/// Units of numbers besides those of sizes.
const COUNT_UNITS: &[(&str, f64)] = &[("k", 1e3), ("M", 1e6), ("G", 1e9), ("B", 1.0)];

/// The first amount that is refused as too large.
const TOO_MUCH: f64 = 1e18;

/// A positive integer, optionally with a unit: `1500000`, `1.5M`, `800MiB`.
pub fn amount(text: &str) -> Result<u64, String> {
    let unit =
        base::BYTE_UNITS.iter().chain(COUNT_UNITS).find_map(|(name, factor)| Some((text.strip_suffix(name)?, *factor)));
    let (number, factor) = unit.unwrap_or((text, 1.0));
    match number.parse::<f64>() {
        Ok(value) if (1.0..TOO_MUCH).contains(&(value * factor)) => Ok((value * factor) as u64),
        _ => Err(format!(
            "must be a number from 1 to below {TOO_MUCH:e} in all, with k, M, G, kB, MB, GB, KiB, MiB or GiB behind it or nothing"
        )),
    }
}

/// As [`amount`], or 0.
pub fn amount_or_none(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { amount(text) }
}

/// A part above 0 and at most 1.
pub fn part(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("must be a number above 0 and at most 1, as in 0.5".to_string()),
    }
}

/// The longest edge of a picture in pixels.
const MOST_EDGE: usize = 1 << 14;

/// The most threads, and the most tiles of a picture.
const MOST_PARTS: usize = 1 << 12;

/// A positive integer.
pub fn positive(text: &str) -> Result<usize, String> {
    whole(text, usize::MAX)
}

/// A number of tokens, samples of a batch or rounds, which become the length of a list or of a loop.
pub fn count(text: &str) -> Result<usize, String> {
    whole(text, MOST_COUNT)
}

/// An edge of a picture in pixels.
pub fn edge(text: &str) -> Result<usize, String> {
    whole(text, MOST_EDGE)
}

/// A number of pixels that pictures are enlarged to.
pub fn pixels(text: &str) -> Result<usize, String> {
    whole(text, MOST_EDGE * MOST_EDGE)
}

/// A number of threads or tiles.
pub fn parts(text: &str) -> Result<usize, String> {
    whole(text, MOST_PARTS)
}

/// A whole number from 1 to `most`.
fn whole(text: &str, most: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(value) if value > most => Err(format!("must be at most {most}")),
        Ok(value) if value > 0 => Ok(value),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err(format!("must be at most {most}")),
        _ => Err("must be a whole number above 0".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_lists_are_parsed_strictly() {
        assert_eq!("2,5".parse(), Ok(LayerList(vec![2, 5])));
        assert_eq!("7".parse(), Ok(LayerList(vec![7])));
        for bad in ["", ",", "2,", ",2", "2;5", "2-5", "-1", "1.5", "two", "2,,5", "99999999999999999999999"] {
            let error = bad.parse::<LayerList>().expect_err(bad);
            assert!(error.contains("not a layer index"), "{bad}: {error}");
        }
    }

    #[test]
    fn layers_to_train_are_all_or_a_layer_list() {
        assert_eq!("all".parse(), Ok(TrainedLayers::All));
        assert_eq!("2,5".parse(), Ok(TrainedLayers::These(LayerList(vec![2, 5]))));
        assert!("most".parse::<TrainedLayers>().unwrap_err().contains("as in 2,5, or `all`"));
    }

    #[test]
    fn modality_weights_are_parsed_strictly() {
        use crate::method::Modality::{Image, Text};
        assert_eq!("image=0.75,text=2".parse(), Ok(ModalityWeightsArg([(Image, 0.75), (Text, 2.0)].into())));
        for (bad, want) in [
            ("image", "NAME=WEIGHT"),
            ("sound=1", "none of all, image, text"),
            ("image=x", "not a number"),
            ("image=-1", "0 or more"),
            ("image=0", "none is above 0"),
            ("text=1,text=2", "twice"),
            ("", "NAME=WEIGHT"),
        ] {
            let error = bad.parse::<ModalityWeightsArg>().expect_err(bad);
            assert!(error.contains(want), "{bad}: {error}");
        }
    }

    #[test]
    fn amounts_accept_unit_suffixes() {
        let cases =
            [("1500", 1500), ("1.5M", 1_500_000), ("2GB", 2_000_000_000), ("0.5KiB", 512), ("7B", 7), ("3k", 3000)];
        for (text, want) in cases {
            assert_eq!(amount(text), Ok(want), "{text}");
        }
        assert_eq!(amount("999999999GB"), Ok(999_999_999_000_000_000));
        for bad in ["", "0", "-1", "1X", "M", "nan", "1e30", "1.5 GB", "1EB", "1000000000GB", "18446744073709551616"] {
            let error = amount(bad).expect_err(bad);
            assert!(error.starts_with("must be a number from 1 to below 1e18 in all, with k, M, G"), "{bad}: {error}");
        }
    }

    #[test]
    fn fractions_and_counts_out_of_range_are_refused() {
        assert_eq!(fraction("0.25"), Ok(0.25));
        assert_eq!(fraction("1"), Ok(1.0));
        for bad in ["0", "-0.1", "1.01", "nan", "x"] {
            assert_eq!(fraction(bad), Err("must be a number above 0 and at most 1".to_string()), "{bad}");
        }
        assert_eq!(positive("3"), Ok(3));
        for bad in ["0", "-1", "1.5", ""] {
            assert_eq!(positive(bad), Err("must be a whole number above 0".to_string()), "{bad}");
        }
        assert_eq!((count("16777216"), edge("16384"), parts("4096")), (Ok(1 << 24), Ok(1 << 14), Ok(1 << 12)));
        for over in ["16777217", "9223372036854775807", "18446744073709551616"] {
            assert_eq!(count(over), Err("must be at most 16777216".to_string()), "{over}");
            assert_eq!(edge(over), Err("must be at most 16384".to_string()), "{over}");
            assert_eq!(parts(over), Err("must be at most 4096".to_string()), "{over}");
        }
        assert_eq!(positive("18446744073709551616"), Err(format!("must be at most {}", usize::MAX)));
    }
}
