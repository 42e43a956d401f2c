//! Compares the sizes in a decoder's config with its graph.

use std::collections::BTreeSet;

use crate::analysis;
use crate::base::list_preview;
use crate::bundle::{Bundle, Component, LatentAttention, ModelConfig, Role};
use crate::ir::{DataType, Model, ValueId, ValueType};
use crate::runtime::{Decoder, missing_deepstack};

use super::checks::{CheckStatus, Checks};

const NAME: &str = "config and graph";

/// Checks the counts and sizes that both contain.
pub fn config_and_graph(bundle: &Bundle, part: &Component, model: &Model, decoder: &Decoder, checks: &mut Checks) {
    let Some(config) = bundle.config() else {
        checks.add(NAME, &part.file, CheckStatus::Unavailable, "there is no config");
        return;
    };
    if let Some(problem) = missing_deepstack(bundle, &model.graph) {
        checks.add("DeepStack", &part.file, CheckStatus::Warning, problem);
    }
    let layers = match analysis::analyse(model) {
        Ok(found) => Some(found.map.layers.len()),
        Err(error) => {
            checks.error("layers", &part.file, &error);
            None
        }
    };
    let named = |what: &str| format!("{what} of {}", part.file);
    checks.equal(&named("num_hidden_layers"), config.num_hidden_layers, layers);
    // If the head is a component of its own, the decoder's output is hidden states.
    let vocabulary = decoder.vocabulary().filter(|_| bundle.component(Role::LmHead).is_none());
    checks.equal(&named("vocab_size"), config.vocab_size, vocabulary);
    if decoder.takes_embeds() {
        // The DeepStack features of all levels may be packed after each row.
        let levels = config.raw.get("vision_config").and_then(|vision| vision.get("deepstack_visual_indexes"));
        let rows = 1 + levels.and_then(|levels| levels.as_array()).map_or(0, Vec::len);
        let width = decoder.hidden_size().map(|width| match config.hidden_size {
            Some(hidden) if hidden.checked_mul(rows) == Some(width) => hidden,
            _ => width,
        });
        checks.equal(&named("hidden_size"), config.hidden_size, width);
    }
    // Keys and values of attention have shape [batch, heads, positions, head size].
    let attention: Vec<_> = decoder.slots().iter().filter(|slot| slot.past.shape.len() == 4).collect();
    if attention.is_empty() {
        return;
    }
    let sizes = |axis: usize| attention.iter().map(|slot| slot.fixed_size(axis)).collect::<Option<BTreeSet<usize>>>();
    if let Some(latent) = &config.latent_attention {
        let slots = attention.iter().map(|slot| Some((slot.fixed_size(1)?, slot.fixed_size(3)?)));
        latent_cache(&named("cache"), latent, config, slots.collect(), checks);
        return;
    }
    let heads = config.num_key_value_heads.or(config.num_attention_heads);
    check_size_of(&named("num_key_value_heads"), heads, &config.other_key_value_heads, sizes(1), checks);
    check_size_of(&named("head_dim"), config.head_size(), &config.other_head_dims, sizes(3), checks);
}

/// A size that a config states for all layers, with the sizes that it states for keys, values
/// or layers of another kind.
fn check_size_of(
    subject: &str,
    figure: Option<usize>,
    others: &[usize],
    found: Option<BTreeSet<usize>>,
    checks: &mut Checks,
) {
    match (figure, found.as_ref().map(BTreeSet::len), &found) {
        (Some(figure), Some(2..), Some(found)) => {
            let list = found.iter().map(usize::to_string).collect::<Vec<_>>().join(" and ");
            let known: Vec<usize> = others.iter().copied().chain([figure]).collect();
            let (status, detail) = match found.iter().all(|size| known.contains(size)) {
                true => (CheckStatus::Passed, format!("both {list}")),
                false => (CheckStatus::Failed, format!("the config says {known:?}, the graph {list}")),
            };
            checks.add(NAME, subject, status, detail);
        }
        (_, _, found) => {
            let only = found.as_ref().and_then(|found| found.first().copied());
            let figure = figure.map(|figure| only.filter(|size| others.contains(size)).unwrap_or(figure));
            checks.equal(subject, figure, only);
        }
    }
}

/// The cache of multi-head latent attention: either keys and values of each head, with their own sizes, or the latent
/// and the rotary part of the key, which all heads share.
///
/// Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
fn latent_cache(
    subject: &str,
    latent: &LatentAttention,
    config: &ModelConfig,
    slots: Option<BTreeSet<(usize, usize)>>,
    checks: &mut Checks,
) {
    let Some(slots) = slots else {
        return checks.add(NAME, subject, CheckStatus::Unavailable, "the graph leaves it open");
    };
    let key = latent.qk_nope_head_dim + latent.qk_rope_head_dim;
    let whole = config.num_attention_heads.map(|heads| [(heads, key), (heads, latent.v_head_dim)]);
    let rank = latent.kv_lora_rank;
    let shared = [(1, rank), (1, latent.qk_rope_head_dim), (1, rank + latent.qk_rope_head_dim)];
    let list = |slots: &mut dyn Iterator<Item = &(usize, usize)>| {
        slots.map(|(heads, size)| format!("{heads} x {size}")).collect::<Vec<_>>().join(", ")
    };
    let within = |known: &[(usize, usize)]| slots.iter().all(|slot| known.contains(slot));
    let found = list(&mut slots.iter());
    if within(&shared) || whole.is_some_and(|whole| within(&whole)) {
        return checks.add(NAME, subject, CheckStatus::Passed, format!("latent attention, heads x size: both {found}"));
    }
    let known = list(&mut whole.iter().flatten().chain(&shared));
    let detail = format!("latent attention, heads x size: the config allows {known}, the graph has {found}");
    checks.add(NAME, subject, CheckStatus::Failed, detail);
}

/// Programs that read the folder find its settings, and are told of its data files.
pub fn readers(bundle: &Bundle, checks: &mut Checks) {
    const NAME: &str = "settings for other readers";
    if bundle.asset_path("tokenizer_config.json").is_none() {
        return;
    }
    let mut missed: Vec<(&str, String)> =
        bundle.missed_settings().into_iter().map(|missed| (missed.file, missed.problem)).collect();
    let has_data = bundle.components().iter().any(|component| !component.external.is_empty());
    let counts = "/transformers.js_config/use_external_data_format";
    let told = bundle.config().is_some_and(|config| config.raw.pointer(counts).is_some());
    if bundle.layout().name == "transformers.js" && has_data && !told {
        let problem = "transformers.js is not told which graphs have data files: `transformers.js_config` has no \
                       `use_external_data_format`";
        missed.push(("config.json", problem.to_string()));
    }
    if missed.is_empty() {
        let detail = "transformers.js and transformers 4 find the chat template, the classes and the data files";
        checks.add(NAME, "configs", CheckStatus::Passed, detail);
    }
    for (file, problem) in missed {
        checks.add(NAME, file, CheckStatus::Warning, format!("{problem}; `export --to transformers-js` writes it"));
    }
}

/// transformers.js feeds and reads float32, caches aside.
pub fn port_types(bundle: &Bundle, part: &Component, model: &Model, checks: &mut Checks) {
    if bundle.layout().name != "transformers.js" {
        return;
    }
    let graph = &model.graph;
    let is_half = |id: &&ValueId| {
        let dtype = graph.value(**id).ty.as_ref().and_then(ValueType::dtype);
        let is_cache = ["past", "present"].iter().any(|start| graph.name(**id).starts_with(start));
        !is_cache && matches!(dtype, Some(DataType::Float16 | DataType::Bfloat16))
    };
    let ports = graph.body.inputs.iter().chain(&graph.body.outputs).filter(is_half);
    let half: Vec<&str> = ports.map(|id| graph.name(*id)).collect();
    if !half.is_empty() {
        let detail = format!(
            "{} in half precision, and transformers.js feeds and reads float32 there: convert with inputs and outputs kept, as \
             `export --precision fp16` does",
            list_preview(&half, 4)
        );
        checks.add("inputs and outputs", &part.file, CheckStatus::Failed, detail);
    }
}

/// Programs that run a model folder find the logits by name.
pub fn logits_name(bundle: &Bundle, part: &Component, decoder: &Decoder, checks: &mut Checks) {
    // In this layout the decoder's output is hidden states.
    if bundle.component(Role::LmHead).is_some() {
        return;
    }
    let found = decoder.logits_name();
    let named = bundle.config().and_then(|config| config.raw.pointer("/model/decoder/outputs/logits")?.as_str());
    let by_name = matches!(bundle.layout().name, "genai" | "transformers.js" | "mobius" | "optimum");
    let wanted = named.unwrap_or("logits");
    // The consumers of a single file are unknown, but the name must at least look like logits.
    if !by_name && !found.starts_with("logits") {
        return;
    }
    let (status, detail) = match found == wanted {
        true => (CheckStatus::Passed, format!("the logits are `{wanted}`")),
        false => (
            CheckStatus::Failed,
            format!("the logits are `{found}`, and programs that run the model look for `{wanted}`: rename the output"),
        ),
    };
    checks.add("output names", &part.file, status, detail);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn latent(heads: usize, slots: &[(usize, usize)]) -> CheckStatus {
        let latent = LatentAttention { kv_lora_rank: 32, qk_nope_head_dim: 16, qk_rope_head_dim: 8, v_head_dim: 12 };
        let config = ModelConfig { num_attention_heads: Some(heads), ..ModelConfig::default() };
        let mut checks = Checks(Vec::new());
        latent_cache("cache", &latent, &config, Some(slots.iter().copied().collect()), &mut checks);
        checks.0[0].status
    }

    #[test]
    fn latent_attention_has_its_own_sizes_of_keys_and_values() {
        for slots in [&[(4, 24), (4, 12)][..], &[(1, 32), (1, 8)], &[(1, 40)]] {
            assert_eq!(latent(4, slots), CheckStatus::Passed, "{slots:?}");
        }
        for slots in [&[(4, 24), (4, 16)][..], &[(2, 24)], &[(1, 33)], &[(4, 24), (1, 8)]] {
            assert_eq!(latent(4, slots), CheckStatus::Failed, "{slots:?}");
        }
    }

    #[test]
    fn layers_of_two_kinds_may_have_two_head_sizes() {
        let check = |figure: usize, others: &[usize], found: &[usize]| {
            let mut checks = Checks(Vec::new());
            check_size_of("head_dim", Some(figure), others, Some(found.iter().copied().collect()), &mut checks);
            checks.0[0].status
        };
        assert_eq!(check(64, &[], &[64]), CheckStatus::Passed);
        assert_eq!(check(64, &[], &[32]), CheckStatus::Failed);
        assert_eq!(check(64, &[128], &[64, 128]), CheckStatus::Passed);
        assert_eq!(check(64, &[128], &[128]), CheckStatus::Passed);
        assert_eq!(check(64, &[], &[64, 128]), CheckStatus::Failed);
    }
}
