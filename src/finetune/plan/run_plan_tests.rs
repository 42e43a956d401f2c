//! Plans of an eight-billion-parameter decoder and of small ones.

use std::collections::BTreeMap;

use super::*;
use crate::finetune::loss::LossKind;
use crate::finetune::plan::activations::{Kept, Width};
use crate::finetune::settings::{LoraLayers, Stage};

fn layer_kept(kept: u64, widest: u64) -> Kept {
    Kept { kept: Width { own: kept, per_key: 0 }, widest: Width { own: widest, per_key: 0 } }
}

/// Qwen3-VL-8B with 27 of 36 layers in bf16: width 4096, MLP 12288, 8 heads of 128 for keys and values.
fn eight_billion(lora: bool) -> Sizes {
    let (width, mlp, keys) = (4096u64, 12288, 1024);
    let matrices = [
        vec![width, width],
        vec![width, keys],
        vec![width, keys],
        vec![width, width],
        vec![width, mlp],
        vec![width, mlp],
        vec![mlp, width],
    ];
    let layer: u64 = matrices.iter().map(|dims| dims.iter().product::<u64>()).sum();
    let sides: u64 = matrices.iter().flatten().sum();
    let (head, vocabulary) = (151_936 * width, 151_936);
    let adapters = |layers: usize| -> Vec<Vec<u64>> {
        let thin = matrices.iter().flat_map(|dims| [vec![dims[0], 16], vec![16, dims[1]]]).collect::<Vec<_>>();
        (0..layers).flat_map(|_| thin.clone()).collect()
    };
    let written = 9 * (width * width + mlp * width);
    let frozen = 27 * layer + head - if lora { written } else { 9 * layer };
    Sizes {
        frozen_bytes: 2 * frozen,
        widened_bytes: 4 * frozen,
        layer_widened_bytes: 4 * layer,
        head_widened_bytes: 4 * head,
        trained: if lora { adapters(27) } else { (0..9).flat_map(|_| matrices.clone()).collect() },
        written: if lora { written } else { 0 },
        layer_activations: vec![layer_kept(sides * 5 / 4, mlp); 27],
        hidden_size: width,
        vocabulary,
        ..Sizes::default()
    }
}

fn plan(settings: &Settings, sizes: &Sizes, memory: Option<u64>) -> RunPlan {
    let layers: Vec<usize> = (0..9).map(|layer| 3 * layer).collect();
    let data =
        PlannedData { samples: 2400, tokens: 2_400_000, answer_tokens: 240_000, longest_tokens: 1500, estimated: true };
    let inputs = PlanInputs {
        device: "cuda:0".to_string(),
        on_gpu: true,
        cores: 16,
        settings,
        layers: &layers,
        layer_count: 27,
        first: 0,
        sizes,
        fitted: &[],
        points: &[],
        teacher_bytes: 0,
        data,
        limits: Limits { memory, ..Limits::default() },
        cache_bytes: 32_000_000_000,
        streamed: None,
    };
    RunPlan::resolve(&inputs)
}

#[test]
fn an_8b_decoder_fits_into_22_gb_only_with_adapters() {
    let losses = BTreeMap::from([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)]);
    let best = Settings::default().with(|s| {
        s.stages = Stage::only(losses);
        s.optimizer.average_last = 0.5;
        s.precision = Precision::Bf16;
    });
    let wide = best.clone().with(|s| s.lora.rank = 16);
    let plan_of = |settings: &Settings, lora: bool| plan(settings, &eight_billion(lora), Some(22_000_000_000));
    let lora = plan_of(&wide, true);
    assert_eq!((lora.fits, lora.gradient_checkpointing, lora.frozen_as_stored), (Some(true), true, true));
    lora.check().unwrap();
    let full = plan_of(&best, false);
    assert_eq!(full.fits, Some(false));
    let message = full.check().unwrap_err().to_string();
    assert!(message.contains("the limit is") && message.contains("`--lora-rank`"), "{message}");
    let message = plan(&best, &eight_billion(false), Some(200_000_000)).check().unwrap_err().to_string();
    assert!(message.contains("no setting goes below 262 MB") && !message.contains("lora"), "{message}");
    // 9 layers of 192.9 M: weights, gradients and mean at 4 bytes each; moments are listed separately.
    let trained: u64 = full
        .bytes
        .iter()
        .filter(|item| item.formula.contains(&format!("{}", full.trained_parameters)))
        .map(|item| item.bytes)
        .sum();
    assert_eq!(trained, 12 * full.trained_parameters);
    let state = full.bytes.iter().find(|item| item.what == "optimiser state").unwrap();
    assert_eq!(state.bytes, 8 * full.trained_parameters);
    assert!(full.memory_bytes > 20 * full.trained_parameters);
}

#[test]
fn adapters_on_all_layers_are_listed_for_all_of_them() {
    let rank = |layers| Settings::default().with(|s| (s.lora.rank, s.lora.layers) = (16, layers));
    let own = plan(&rank(LoraLayers::Trained), &eight_billion(true), None);
    let all = plan(&rank(LoraLayers::All), &eight_billion(true), None);
    assert_eq!(own.trained, [0, 3, 6, 9, 12, 15, 18, 21, 24]);
    assert_eq!(all.trained, (0..27).collect::<Vec<u64>>());
    assert!(all.line().contains("in 27 of 27 layers run"), "{}", all.line());
}

#[test]
fn a_memory_limit_makes_passes_smaller_and_keeps_the_step() {
    let settings = Settings::default().with(|s| s.lora.rank = 16);
    let free = plan(&settings, &eight_billion(true), None);
    let tight = plan(&settings, &eight_billion(true), Some(24_000_000_000));
    assert_eq!((free.fits, tight.fits), (None, Some(true)));
    assert!(tight.batch_tokens < free.batch_tokens && tight.batch_tokens >= 1500);
    assert_eq!(tight.stages, free.stages);
}
