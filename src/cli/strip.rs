//! The strip of layers: one letter per layer, coloured on terminals.

use owo_colors::OwoColorize;

use crate::method::{LayerRole, Plan};

/// `0 ..DF A.. 15`: letters in groups of ten, coloured by role.
pub fn strip(plan: &Plan) -> String {
    let letters = plan.layers.iter().map(|layer| {
        let letter = layer.role.letter();
        let gap = if layer.index > 0 && layer.index % 10 == 0 { " " } else { "" };
        match layer.role {
            LayerRole::Drop => format!("{gap}{}", letter.red().bold()),
            LayerRole::Finetune => format!("{gap}{}", letter.green().bold()),
            LayerRole::Anchor => format!("{gap}{}", letter.blue()),
            LayerRole::Freeze => format!("{gap}{}", letter.dimmed()),
        }
    });
    letters.collect()
}

/// Meaning of the letters.
pub fn legend() -> String {
    format!("{} dropped  {} finetuned  {} anchor (frozen)  . frozen", "D".red().bold(), "F".green().bold(), "A".blue())
}
