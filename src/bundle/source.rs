//! A model that a verb works on: its path, and the precision variants that it runs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::base::{Error, Result, list_preview};

use super::layout::{Role, VARIANTS};
use super::{Bundle, Component};

/// Name of the files without a suffix on the command line, as transformers.js calls them.
const FULL: &str = "fp32";

/// Roles that a variant can be chosen for.
const ROLES: &[Role] = &[
    Role::VisionEncoder,
    Role::EmbedTokens,
    Role::Decoder,
    Role::DecoderPrefill,
    Role::DecoderWithPast,
    Role::Projector,
    Role::LmHead,
];

/// Precision variants: one for all components, or one for each component that is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Variants {
    all: Option<String>,
    roles: BTreeMap<Role, String>,
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
        let suffix = if wanted == FULL { "" } else { wanted };
        let found = variants.iter().find(|component| component.variant == suffix);
        found.map(|component| Some(*component)).ok_or_else(|| {
            let names: Vec<&str> = variants.iter().map(|component| component.file.as_str()).collect();
            Error::invalid(
                format!("variant `{wanted}` of `{}`", first.stem),
                format!("is not there; found {}", list_preview(&names, 6)),
            )
            .remedy(format!(
                "name a variant for each component, as in {}=q4, or leave `--variant` out",
                first.role.name()
            ))
        })
    }
}

impl FromStr for Variants {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = |name: &str| -> Result<String, String> {
            let names = || VARIANTS.iter().map(|name| if name.is_empty() { FULL } else { name });
            match names().any(|other| other == name) {
                true => Ok(name.to_string()),
                false => Err(format!("`{name}` is none of {}", names().collect::<Vec<_>>().join(", "))),
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

impl fmt::Display for Variants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let roles = self.roles.iter().map(|(role, variant)| format!("{}={variant}", role.name()));
        let parts: Vec<String> = self.all.iter().cloned().chain(roles).collect();
        f.write_str(&parts.join(","))
    }
}

/// A model's path with the variants to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    path: PathBuf,
    variants: Variants,
}

impl ModelSource {
    /// A model folder or one `.onnx` file.
    pub fn new(path: impl Into<PathBuf>, variants: Option<Variants>) -> Self {
        ModelSource { path: path.into(), variants: variants.unwrap_or_default() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The variants to run.
    pub fn variants(&self) -> &Variants {
        &self.variants
    }

    /// The variants as `--variant` names them; `None` for the most precise ones.
    pub fn chosen(&self) -> Option<String> {
        (!self.variants.is_empty()).then(|| self.variants.to_string())
    }

    /// Opens it.
    ///
    /// Errors: as [`Bundle::open`]; `Error::Invalid` when a component lacks the chosen variant, or a component that the folder
    /// does not have is named.
    pub fn open(&self) -> Result<Bundle> {
        let mut bundle = Bundle::open(&self.path)?;
        bundle.choose(&self.variants)?;
        Ok(bundle)
    }
}

impl From<&Path> for ModelSource {
    fn from(path: &Path) -> Self {
        ModelSource::new(path, None)
    }
}

impl fmt::Display for ModelSource {
    /// The path, with the variants in brackets where some were chosen.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.variants.is_empty() {
            true => write!(f, "{}", self.path.display()),
            false => write!(f, "{} ({})", self.path.display(), self.variants),
        }
    }
}

impl Bundle {
    /// Makes [`Bundle::component`] give the chosen variants.
    fn choose(&mut self, variants: &Variants) -> Result<()> {
        for role in variants.roles.keys() {
            self.require(*role)?;
        }
        let mut chosen = BTreeMap::new();
        for &role in ROLES {
            let found: Vec<&Component> = self.variants(role).collect();
            if let Some(component) = variants.choose(&found)? {
                chosen.insert(role, component.file.clone());
            }
        }
        self.chosen = chosen;
        self.chosen_name = (!variants.is_empty()).then(|| variants.to_string());
        Ok(())
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
        assert_eq!(ModelSource::new("m", Some(one)).to_string(), "m (q4)");
        assert_eq!(ModelSource::new("m", None).to_string(), "m");
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
