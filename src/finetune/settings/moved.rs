//! Refuses settings files with the old flat layout. Maps each old key to its place in the tables, for the error
//! message.

use crate::base::{Error, Result};

/// Old key and new place. The flag is true when the new layout has a table with the old key's name; then only a value
/// that is not a table is an old one.
const MOVED: &[(&str, &str, bool)] = &[
    ("learning_rate", "[optimizer] learning_rate", false),
    ("learning_rates", "[optimizer] learning_rate", false),
    ("optimizer", "[optimizer] kind", true),
    ("weight_decay", "[optimizer] weight_decay", false),
    ("beta1", "[optimizer] beta1", false),
    ("beta2", "[optimizer] beta2", false),
    ("epsilon", "[optimizer] epsilon", false),
    ("max_grad_norm", "[optimizer] max_grad_norm", false),
    ("average_last", "[optimizer] average_last", false),
    ("schedule", "[schedule] kind", true),
    ("warmup_ratio", "[schedule] warmup_ratio", false),
    ("epochs", "[schedule] epochs", false),
    ("max_steps", "[schedule] max_steps", false),
    ("checkpoint_every", "[schedule] checkpoint_every", false),
    ("batch_size", "[batch] size", false),
    ("accumulation_steps", "[batch] accumulation_steps", false),
    ("gradient_checkpointing", "[batch] gradient_checkpointing", false),
    ("data_share", "[data] share", false),
    ("max_tokens", "[data] max_tokens", false),
    ("group_by_length", "[data] group_by_length", false),
    ("fit", "[fit] enabled", true),
    ("fit_tokens_per_feature", "[fit] tokens_per_feature", false),
    ("fit_tokens", "[fit] tokens", false),
    ("step_tokens", "[data] step_tokens", false),
    ("lora_rank", "[lora] rank", false),
    ("lora_alpha", "[lora] alpha", false),
    ("lora_layers", "[lora] layers", false),
    ("kd_temperature", "[kd] temperature", false),
    ("kd_top_k", "[kd] top_k", false),
    ("losses", "[[stage]] losses", false),
    ("stages", "[[stage]]", false),
];

/// Refuses keys of the flat layout.
///
/// Errors: `Error::Invalid` with the new place of each old key.
pub fn refuse_moved(table: &toml::Table) -> Result<()> {
    let old = MOVED.iter().filter(|(old, _, same_name)| match table.get(*old) {
        Some(value) => !(*same_name && value.is_table()),
        None => false,
    });
    let old: Vec<_> = old.collect();
    if old.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = old.iter().map(|(old, ..)| format!("`{old}`")).collect();
    let places: Vec<String> = old.iter().map(|(old, new, _)| format!("`{new}` for `{old}`")).collect();
    Err(Error::invalid("finetune settings", format!("{} moved into tables", names.join(", ")))
        .remedy(format!("write {}", places.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::settings::Settings;

    #[test]
    fn moved_settings_are_refused_with_their_new_names() {
        let refused = |text: &str| refuse_moved(&text.parse().unwrap()).unwrap_err().to_string();
        let message = refused("batch_size = 4\nlearning_rates = [1e-3, 2e-3]\noptimizer = \"muon\"\nfit = true");
        for want in
            ["`[batch] size` for `batch_size`", "`[optimizer] learning_rate`", "`[optimizer] kind`", "`[fit] enabled`"]
        {
            assert!(message.contains(want), "{message}");
        }
        assert!(refused("losses = { ce = 1.0 }").contains("`[[stage]] losses` for `losses`"));
        refuse_moved(&"[optimizer]\nlearning_rate = 1e-3\n[fit]\nenabled = true".parse().unwrap()).unwrap();
    }

    #[test]
    fn the_new_name_of_every_moved_setting_exists() {
        let all = toml::Table::try_from(Settings::default().with(|s| {
            s.schedule.max_steps = Some(1);
            (s.fit.tokens, s.data.step_tokens) = (Some(1), Some(1));
            s.batch.gradient_checkpointing = Some(true);
        }));
        let all = all.unwrap();
        for (_, place, _) in MOVED.iter().filter(|(_, place, _)| !place.starts_with("[[")) {
            let (table, key) = place.trim_start_matches('[').split_once("] ").unwrap();
            assert!(all[table].get(key).is_some(), "{place}");
        }
    }
}
