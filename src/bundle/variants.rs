//! Precision variants of components, and the choice of one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Result, list_preview};

use super::component::Component;
use super::layout::{Role, VARIANTS};

/// Name of the files without a suffix on the command line, as transformers.js calls them.
const FULL: &str = "fp32";

/// Precisions of `export --precision`, with the variants that they write.
pub const PRECISION_VARIANTS: &[(&str, &str)] =
    &[("fp16", "fp16"), ("int8", "quantized"), ("int8-qdq", "int8"), ("int4", "q4"), ("q4f16", "q4f16")];

/// A hint for a variant that is named as a precision of `export` which writes another variant.
fn hint(name: &str) -> Option<String> {
    let (_, variant) = PRECISION_VARIANTS.iter().find(|(precision, own)| *precision == name && own != precision)?;
    Some(format!("`export --precision {name}` writes the variant `{variant}`"))
}

/// The flag that chooses these variants, for messages.
pub fn variant_flag(chosen: Option<&str>) -> String {
    chosen.map_or_else(|| "no `--variant`".to_string(), |variants| format!("`--variant {variants}`"))
}

/// Roles that a variant can be chosen for.
pub(super) const ROLES: &[Role] = &[
    Role::VisionEncoder,
    Role::EmbedTokens,
    Role::Decoder,
    Role::DecoderPrefill,
    Role::DecoderWithPast,
    Role::Projector,
    Role::LmHead,
];

/// Precision variants: one for all components, or one for each component that is named. In files and on the command line a
/// text, `q4` or `decoder=q4,vision_encoder=fp16`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Variants {
    all: Option<String>,
    pub(super) roles: BTreeMap<Role, String>,
}

impl Variants {
    /// The variant of a role; `None` for the most precise one.
    fn of(&self, role: Role) -> Option<&str> {
        self.roles.get(&role).or(self.all.as_ref()).map(String::as_str)
    }

    /// True when nothing is chosen.
    pub fn is_empty(&self) -> bool {
        self.all.is_none() && self.roles.is_empty()
    }

    /// The chosen one of the variants of one component, the most precise one first.
    ///
    /// Errors: `Error::Invalid` when it is not there.
    pub fn choose<'a>(&self, variants: &[&'a Component]) -> Result<Option<&'a Component>> {
        let Some(&first) = variants.first() else { return Ok(None) };
        let Some(wanted) = self.of(first.role) else { return Ok(Some(first)) };
        let found = variants.iter().find(|component| component.variant_name() == wanted);
        found.map(|component| Some(*component)).ok_or_else(|| {
            let names: Vec<&str> = variants.iter().map(|component| component.file.as_str()).collect();
            Error::invalid(
                format!("variant `{wanted}` of `{}`", first.stem),
                format!("is not there; found {}", list_preview(&names, 6)),
            )
            .remedy(match hint(wanted) {
                Some(hint) => format!("{hint}; name one that is there, or leave `--variant` out"),
                None => {
                    let role = first.role.name();
                    format!("name a variant for each component, as in {role}=q4, or leave `--variant` out")
                }
            })
        })
    }
}

impl Component {
    /// Its variant as `--variant` names it.
    pub fn variant_name(&self) -> &str {
        if self.variant.is_empty() { FULL } else { &self.variant }
    }
}

impl FromStr for Variants {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |name: &str| -> Result<String, String> {
            let names = || VARIANTS.iter().map(|name| if name.is_empty() { FULL } else { name });
            match names().any(|other| other == name) {
                true => Ok(name.to_string()),
                false => {
                    let hint = hint(name).map(|hint| format!("; {hint}")).unwrap_or_default();
                    Err(format!("`{name}` is none of {}{hint}", names().collect::<Vec<_>>().join(", ")))
                }
            }
        };
        if !text.contains('=') {
            return Ok(Variants { all: Some(known(text)?), roles: BTreeMap::new() });
        }
        let mut roles = BTreeMap::new();
        for item in text.split(',') {
            let (role, variant) =
                item.split_once('=').ok_or_else(|| format!("`{item}` is not COMPONENT=VARIANT, as in decoder=q4"))?;
            let found = ROLES.iter().find(|other| other.name() == role).ok_or_else(|| {
                let names: Vec<&str> = ROLES.iter().map(|role| role.name()).collect();
                format!("component `{role}` is none of {}", names.join(", "))
            })?;
            if roles.insert(*found, known(variant)?).is_some() {
                return Err(format!("component `{role}` occurs twice"));
            }
        }
        Ok(Variants { all: None, roles })
    }
}

impl TryFrom<String> for Variants {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Variants> for String {
    fn from(variants: Variants) -> Self {
        variants.to_string()
    }
}

impl fmt::Display for Variants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles = self.roles.iter().map(|(role, variant)| format!("{}={variant}", role.name()));
        let parts: Vec<String> = self.all.iter().cloned().chain(roles).collect();
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_one_name_or_one_for_each_component() {
        let one: Variants = "q4".parse().unwrap();
        assert_eq!((one.of(Role::Decoder), one.of(Role::VisionEncoder)), (Some("q4"), Some("q4")));
        let some: Variants = "vision_encoder=fp16,decoder=q4".parse().unwrap();
        assert_eq!((some.of(Role::Decoder), some.of(Role::EmbedTokens)), (Some("q4"), None));
        assert_eq!(some.to_string().parse::<Variants>().unwrap(), some);
        for name in ["q2", "q2f16", "q1", "q1f16", "fp32"] {
            assert!(name.parse::<Variants>().is_ok(), "{name}");
        }
        for (bad, want) in [
            ("q5", "none of fp32, optimized"),
            ("decoder=q4,q8", "not COMPONENT=VARIANT"),
            ("tower=q4", "none of vision_encoder"),
            ("decoder=q4,decoder=q8", "twice"),
            ("", "none of"),
        ] {
            let error = bad.parse::<Variants>().unwrap_err();
            assert!(error.contains(want), "{bad}: {error}");
        }
    }
}
