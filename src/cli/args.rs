//! Argument values that several verbs share.

/// A list of layers, `2,5`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerList(pub Vec<usize>);

impl std::str::FromStr for LayerList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let layers = text.split(',').map(|item| {
            item.parse().map_err(|_| format!("`{item}` is no layer index; write indices from 0 with commas, as in 2,5"))
        });
        layers.collect::<Result<_, String>>().map(LayerList)
    }
}

/// A number above 0 and at most 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("must be a number above 0 and at most 1".to_string()),
    }
}

/// A whole number above 0.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(value) if value > 0 => Ok(value),
        _ => Err("must be a whole number above 0".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_layers_are_read_strictly() {
        assert_eq!("2,5".parse(), Ok(LayerList(vec![2, 5])));
        assert_eq!("7".parse(), Ok(LayerList(vec![7])));
        for bad in ["", ",", "2,", ",2", "2;5", "2-5", "-1", "1.5", "two", "2,,5", "99999999999999999999999"] {
            let error = bad.parse::<LayerList>().expect_err(bad);
            assert!(error.contains("no layer index"), "{bad}: {error}");
        }
    }

    #[test]
    fn fractions_and_counts_have_bounds() {
        assert_eq!(fraction("0.25"), Ok(0.25));
        assert_eq!(fraction("1"), Ok(1.0));
        assert!(["0", "-0.1", "1.01", "nan", "x"].iter().all(|text| fraction(text).is_err()));
        assert_eq!(positive("3"), Ok(3));
        assert!(["0", "-1", "1.5", ""].iter().all(|text| positive(text).is_err()));
    }
}
