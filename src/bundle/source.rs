//! A model that a verb works on: its path, and the precision variants that it runs.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::base::{Cancel, Result};
use crate::hub::commit_of;

use super::hub::model_on_disk;
use super::variants::{ROLES, Variants};
use super::{Bundle, Component};

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

    /// As [`ModelSource::new`], for a path that may be a name on the hub.
    ///
    /// Errors: as [`model_on_disk`].
    pub fn find(model: &Path, variants: Option<Variants>, cancel: &Cancel) -> Result<Self> {
        let variants = variants.unwrap_or_default();
        Ok(ModelSource { path: model_on_disk(model, &variants, cancel)?, variants })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `hf:OWNER/NAME@COMMIT` when it is in the hub's cache.
    pub fn hub_name(&self) -> Option<String> {
        commit_of(&self.path)
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
    /// The path, or the name on the hub with its commit, with the variants in brackets where some were chosen.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.hub_name().unwrap_or_else(|| self.path.display().to_string());
        match self.variants.is_empty() {
            true => f.write_str(&place),
            false => write!(f, "{place} ({})", self.variants),
        }
    }
}

impl Bundle {
    /// Leaves the chosen variants alone, so that the folder is as one on the hub of which nothing else was downloaded. A choice of
    /// nothing leaves all of them.
    fn choose(&mut self, variants: &Variants) -> Result<()> {
        if variants.is_empty() {
            return Ok(());
        }
        for role in variants.roles.keys() {
            self.require(*role)?;
        }
        let mut others = BTreeSet::new();
        for &role in ROLES {
            let found: Vec<&Component> = self.variants(role).collect();
            let chosen = variants.choose(&found)?.map(|component| &component.file);
            others.extend(
                found.into_iter().map(|component| &component.file).filter(|file| Some(*file) != chosen).cloned(),
            );
        }
        self.unchosen = self.components.extract_if(.., |component| others.contains(&component.file)).collect();
        // Data that a chosen variant reads too is written.
        let kept: BTreeSet<&String> = self.components.iter().flat_map(|component| &component.external).collect();
        let data = self.unchosen.iter().flat_map(|component| &component.external);
        others.extend(data.filter(|file| !kept.contains(file)).cloned());
        self.left_out.extend(others);
        self.chosen_name = Some(variants.to_string());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_shown_with_its_variants() {
        assert_eq!(ModelSource::new("m", Some("q4".parse().unwrap())).to_string(), "m (q4)");
        assert_eq!(ModelSource::new("m", None).to_string(), "m");
    }
}
