//! Plans of an eight-billion-parameter decoder and of small ones.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::*;
use crate::analysis::Projection;
use crate::finetune::loss::LossKind;
use crate::finetune::plan::activations::{Kept, Width};
use crate::finetune::plan::order;
use crate::finetune::settings::{LoraLayers, RecipeRow, Stage};
use crate::ir::{Graph, Value};

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
        copied_bytes: 4 * frozen,
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

/// The models that ONNX Runtime runs, in fp16 on a GPU: 36 layers, embeddings and head, and a vision encoder of 576 M.
const SESSIONS: Sessions = Sessions { prefix: 2_800_000_000, dense: 17_530_000_000, in_dense: true };

fn plan(settings: &Settings, sizes: &Sizes, memory: Option<u64>) -> RunPlan {
    let limits = Limits { memory, ..Limits::default() };
    planned(settings, sizes, limits, (&[], &[], Sessions::default()), true)
}

/// The fitted products of nine layers, attention's last and the MLP's last, with their points.
fn fitted() -> (Vec<FitTarget>, Vec<Point>) {
    let id = Graph::default().add_value(Value::default());
    let product = |width| Projection { operand: id, weight: id, transposed: false, width };
    let target = |layer| FitTarget { layer, products: Ok(vec![product(4096), product(12288)]) };
    let layers = || (0..9).map(|layer| 3 * layer);
    (layers().map(target).collect(), layers().map(|layer| Point { student: layer + 1, dense: layer + 2 }).collect())
}

fn planned(
    settings: &Settings,
    sizes: &Sizes,
    limits: Limits,
    (fitted, fit_points, sessions): (&[FitTarget], &[Point], Sessions),
    on_gpu: bool,
) -> RunPlan {
    let (samples, tokens, answer_tokens, longest_tokens) = (2400, 2_400_000, 240_000, 1500);
    let (image_tokens, image_share, estimated) = (0, 0.0, true);
    let answer_share = 0.1;
    let data = PlannedData {
        samples,
        tokens,
        answer_tokens,
        answer_share,
        longest_tokens,
        image_tokens,
        image_share,
        estimated,
    };
    with_data(data, (settings, sizes, limits), (fitted, fit_points, sessions), on_gpu)
}

fn with_data(
    data: PlannedData,
    (settings, sizes, limits): (&Settings, &Sizes, Limits),
    (fitted, fit_points, sessions): (&[FitTarget], &[Point], Sessions),
    on_gpu: bool,
) -> RunPlan {
    let layers: Vec<usize> = (0..9).map(|layer| 3 * layer).collect();
    let inputs = PlanInputs {
        device: if on_gpu { Device::Cuda(0) } else { Device::Cpu },
        cores: 16,
        settings,
        layers: &layers,
        layer_count: 27,
        first: 0,
        sizes,
        connector: None,
        fitted,
        points: &[],
        fit_points,
        sessions,
        host_bytes: Some(64_000_000_000),
        data,
        limits,
        cache_bytes: 32_000_000_000,
        rows: None,
    };
    RunPlan::resolve(&inputs)
}

fn of(plan: &RunPlan, phase: Phase, place: Place) -> u64 {
    plan.bytes.iter().filter(|item| (item.phase, item.place) == (phase, place)).map(|item| item.bytes).sum()
}

/// The run itself: recipe `best` with its fit, its search and the dense model, and 2.4 M tokens.
#[test]
fn best_with_adapters_on_all_layers_of_8b_fits_into_22_gb() {
    let settings = RecipeRow::named("best").unwrap().settings().with(|s| {
        (s.lora.rank, s.lora.layers) = (16, LoraLayers::All);
        s.precision = Some(Precision::Bf16);
    });
    let (targets, points) = fitted();
    let limits = Limits { memory: Some(22_000_000_000), cache: Some(64_000_000_000), ..Limits::default() };
    let of_run = |limits| planned(&settings, &eight_billion(true), limits, (&targets, &points, SESSIONS), true);
    let plan = of_run(limits);
    assert_eq!((plan.fits, plan.streamed), (Some(true), false), "{}", plan.line());
    plan.check().unwrap();
    // Each phase counts what it holds; what no product reads is in host memory.
    assert_eq!(
        of(&plan, Phase::Teacher, Place::Memory),
        crate::finetune::plan::CUDA_BYTES + SESSIONS.dense + crate::finetune::plan::LOGIT_BYTES
    );
    assert!(of(&plan, Phase::Fit, Place::Memory) > 18_000_000_000);
    let fit = plan.fit.as_ref().unwrap();
    assert_eq!((fit.computed, fit.together, fit.elements), (9, 9, 9 * (4096 + 12288) * 4096));
    let held = |what: &str| plan.bytes.iter().find(|item| item.what == what).map(|item| (item.place, item.bytes));
    assert_eq!(held("targets of the fit"), Some((Place::Host, 2 * 9 * fit.tokens * 4096)));
    assert_eq!(held("weights before the fit"), Some((Place::Host, 4 * fit.elements)));
    assert_eq!(held("weights before the search").map(|(place, _)| place), Some(Place::Host));
    // Without room on disk the dense model stays loaded, and the error says what keeps it there.
    let tight = of_run(Limits { cache: Some(100_000_000), ..limits });
    assert_eq!((tight.fits, tight.rows()), (Some(false), KeptRows::Nothing));
    // The fit's samples have the stream before layer 0 on disk, in bf16, and the answers that `kd` reads.
    let rows_of_fit = |plan: &RunPlan| {
        let own = plan.bytes.iter().find(|item| item.what == "rows of the fit");
        own.map(|item| (item.phase, item.bytes))
    };
    let answers = answers_of(&tight).bytes;
    let rows = fit.tokens * 2 * 4096 + answers * fit.tokens / 2_400_000;
    assert_eq!(rows_of_fit(&tight), Some((Phase::Fit, rows)));
    assert!(tight.disk_bytes >= rows);
    let message = tight.check().unwrap_err().to_string();
    assert!(message.contains("compute rows between steps") && message.contains("`--cache-bytes 20GB`"), "{message}");
}

fn answers_of(plan: &RunPlan) -> &PlannedTarget {
    plan.targets.iter().find(|target| target.what == ANSWERS).unwrap()
}

/// 2,400 samples of 1,000 tokens have room in the budget that a run has without a flag, because their stream is in bf16. With
/// less room the dense model's answers are kept, and the embeddings are looked up again between steps.
#[test]
fn best_of_8b_fits_into_22_gb_with_the_default_budget_and_with_less() {
    let settings = RecipeRow::named("best").unwrap().settings().with(|s| {
        (s.lora.rank, s.lora.layers) = (16, LoraLayers::All);
        s.precision = Some(Precision::Bf16);
    });
    let (targets, points) = fitted();
    let of_run = |cache| {
        let limits = Limits { memory: Some(22_000_000_000), cache, ..Limits::default() };
        planned(&settings, &eight_billion(true), limits, (&targets, &points, SESSIONS), true)
    };
    let (usual, tight) = (of_run(None), of_run(Some(2_000_000_000)));
    assert_eq!((usual.fits, usual.rows()), (Some(true), KeptRows::All), "{}", usual.line());
    assert_eq!(usual.targets[0].bytes, 2 * 4096 * 2_400_000);
    assert!(
        usual.targets.iter().filter(|target| target.written).map(|target| target.bytes).sum::<u64>() < 20_000_000_000
    );
    assert_eq!((tight.fits, tight.rows()), (Some(true), KeptRows::Dense), "{}", tight.line());
    assert!(answers_of(&tight).written && !tight.targets[0].written);
    // Between steps only the frozen part is loaded, and only its rows are on disk for the fit, which frees it.
    let loaded = |phase| tight.bytes.iter().find(|item| item.phase == phase && item.what == ONNX_RUNTIME);
    assert_eq!(loaded(Phase::Steps).map(|item| item.bytes), Some(SESSIONS.prefix));
    assert_eq!(loaded(Phase::Fit), None);
    let rows = tight.bytes.iter().find(|item| item.what == "rows of the fit").unwrap();
    assert_eq!(rows.bytes, tight.fit.as_ref().unwrap().tokens * 2 * 4096);
    // In f32 the rows are twice as large and do not fit the budget.
    let wide = settings.with(|s| s.precision = Some(Precision::F32));
    let wide = planned(&wide, &eight_billion(true), Limits::default(), (&targets, &points, SESSIONS), true);
    assert_eq!((wide.targets[0].bytes, wide.rows()), (4 * 4096 * 2_400_000, KeptRows::Dense));
}

/// Rows that are read once are not kept, unless the models that compute them would not fit beside the steps: first the dense
/// model's are, then all.
#[test]
fn rows_are_kept_where_the_loaded_models_do_not_fit() {
    let settings = Settings::default().with(|s| {
        s.stages = Stage::only([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)]);
        (s.lora.rank, s.schedule.epochs, s.precision) = (16, 1, Some(Precision::Bf16));
    });
    let rows = |memory, sessions| {
        let limits = Limits { memory: Some(memory), cache: Some(64_000_000_000), ..Limits::default() };
        let plan = planned(&settings, &eight_billion(true), limits, (&[], &[], sessions), true);
        assert_eq!((plan.fits, plan.streamed), (Some(true), plan.rows() != KeptRows::All), "{}", plan.line());
        plan.rows()
    };
    assert_eq!(rows(80_000_000_000, SESSIONS), KeptRows::Nothing);
    assert_eq!(rows(22_000_000_000, SESSIONS), KeptRows::Dense);
    assert_eq!(rows(22_000_000_000, Sessions { prefix: 9_000_000_000, ..SESSIONS }), KeptRows::All);
}

/// On a CPU everything is in one memory. Targets that take more than the dense model are computed for some layers at a
/// time, and the dense model is then loaded during the fit.
#[test]
fn a_fit_on_a_cpu_counts_its_targets_and_copies() {
    let settings = RecipeRow::named("best").unwrap().settings().with(|s| s.lora.rank = 16);
    let (targets, points) = fitted();
    let plan = |dense| {
        let sessions = Sessions { dense, ..SESSIONS };
        planned(&settings, &eight_billion(true), Limits::default(), (&targets, &points, sessions), false)
    };
    let (whole, parts) = (plan(SESSIONS.dense), plan(3_000_000_000));
    let fit = parts.fit.as_ref().unwrap();
    assert_eq!((whole.fit.as_ref().unwrap().together, fit.together), (9, 2));
    assert!(parts.bytes.iter().any(|item| item.what == "dense model" && item.phase == Phase::Fit));
    assert!(whole.bytes.iter().all(|item| item.what != "dense model" && item.place != Place::Host));
    let held = |what: &str| whole.bytes.iter().any(|item| item.what == what && item.place == Place::Memory);
    assert!(held("targets of the fit") && held("weights before the fit") && held("weights before the search"));
}

/// Without checkpointing the backward pass keeps the f32 copies of every layer, in every network.
#[test]
fn copies_of_stored_weights_are_counted_where_the_backward_pass_keeps_them() {
    let sizes = eight_billion(true);
    let in_use = |checkpointing: bool, frozen: Option<Hold>| {
        let settings = Settings::default().with(|s| s.batch.gradient_checkpointing = Some(checkpointing));
        let limits = Limits { frozen, ..Limits::default() };
        let plan = planned(&settings, &sizes, limits, (&[], &[], Sessions::default()), false);
        let bytes = |what: &str| plan.bytes.iter().find(|item| item.what == what).map(|item| item.bytes);
        (plan.frozen_as_stored, bytes("frozen weights").unwrap(), bytes("weights in use"))
    };
    let one = sizes.layer_widened_bytes.max(sizes.head_widened_bytes);
    assert_eq!(in_use(true, None), (true, sizes.frozen_bytes, Some(one)));
    assert_eq!(in_use(false, None), (true, sizes.frozen_bytes, Some(sizes.copied_bytes)));
    assert_eq!(in_use(false, Some(Hold::Widened)), (false, sizes.widened_bytes, None));
    let small = Sizes { frozen_bytes: 2_000, widened_bytes: 4_000, ..sizes.clone() };
    let limits = Limits { frozen: Some(Hold::Stored), ..Limits::default() };
    let held = |limits| planned(&Settings::default(), &small, limits, (&[], &[], Sessions::default()), false);
    assert_eq!([held(Limits::default()), held(limits)].map(|plan| plan.frozen_as_stored), [false, true]);
}

#[test]
fn the_environment_says_how_frozen_weights_are_held() {
    let found = ["", "file", "f32"].map(|value| Limits::frozen_from(Some(value)).unwrap());
    assert_eq!(found, [None, Some(Hold::Stored), Some(Hold::Widened)]);
    let error = Limits::frozen_from(Some("f16")).unwrap_err().to_string();
    assert!(error.contains("INTERLACE_FROZEN") && error.contains("`f16`") && error.contains("`file`"), "{error}");
}

#[test]
fn an_8b_decoder_fits_into_22_gb_only_with_adapters() {
    let losses = BTreeMap::from([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)]);
    let best = Settings::default().with(|s| {
        s.stages = Stage::only(losses);
        s.optimizer.average_last = 0.5;
        s.precision = Some(Precision::Bf16);
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
    assert!(message.contains("no setting goes below 671 MB") && !message.contains("lora"), "{message}");
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

/// Bf16 halves what is kept of a token, and adds the copies of the trained weights in which products read them.
#[test]
fn a_plan_for_a_gpu_is_in_bf16_unless_the_settings_say_f32() {
    let sizes = eight_billion(false);
    let in_format = |precision, on_gpu| {
        let settings = Settings::default().with(|s| s.precision = precision);
        planned(&settings, &sizes, Limits::default(), (&[], &[], Sessions::default()), on_gpu)
    };
    let [gpu, cpu] = [true, false].map(|on_gpu| in_format(None, on_gpu));
    assert_eq!(gpu, in_format(Some(Precision::Bf16), true));
    assert_eq!(cpu, in_format(Some(Precision::F32), false));
    let wide = in_format(Some(Precision::F32), true);
    assert_eq!([&gpu, &cpu, &wide].map(|plan| plan.precision.name()), ["bf16", "f32", "f32"]);
    assert!(gpu.line().contains(" in bf16, ") && cpu.line().contains(" in f32, "), "{}", gpu.line());
    let bytes = |plan: &RunPlan, what: &str| {
        plan.bytes.iter().filter(|item| item.what == what).map(|item| item.bytes).sum::<u64>()
    };
    let logits = 16 * (gpu.batch_tokens / 10) * 151_936;
    assert_eq!(2 * (bytes(&gpu, "activations") - logits), bytes(&wide, "activations") - logits);
    assert_eq!(bytes(&gpu, "trained weights"), bytes(&wide, "trained weights"));
    assert_eq!((bytes(&gpu, "trained weights in bf16") > 0, bytes(&wide, "trained weights in bf16")), (true, 0));
    assert!(gpu.memory_bytes < wide.memory_bytes);
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

/// Fewer networks leave no core idle: each gets its part of them.
#[test]
fn networks_share_all_cores_however_many_there_are() {
    let small = Sizes { trained: vec![vec![4096, 4096]], hidden_size: 4096, vocabulary: 32_000, ..Sizes::default() };
    let of = |memory, workers| {
        let limits = Limits { memory, workers, ..Limits::default() };
        planned(&Settings::default(), &small, limits, (&[], &[], Sessions::default()), false)
    };
    let (free, tight) = (of(None, None), of(Some(2_000_000_000), None));
    assert_eq!((free.workers, free.threads), (16, 1));
    assert!(tight.fits == Some(true) && tight.workers < 16, "{}", tight.line());
    assert_eq!(tight.workers * tight.threads, 16);
    let few = of(None, Some(3));
    assert_eq!((few.workers, few.threads), (3, 5));
}

/// Paths of all numbers in a JSON value.
fn numbers_of(value: &Json, path: &str, found: &mut Vec<String>) {
    match value {
        Json::Number(_) => found.push(path.to_string()),
        Json::Object(members) => members.iter().for_each(|(key, own)| numbers_of(own, &format!("{path}/{key}"), found)),
        Json::Array(items) => {
            items.iter().enumerate().for_each(|(at, own)| numbers_of(own, &format!("{path}/{at}"), found))
        }
        _ => {}
    }
}

/// Every number in the settings, alone and beside every other one, at the ends of what its type holds: it is refused by
/// its name, or it plans a run whose memory has not wrapped round to a small number.
#[test]
fn settings_of_any_size_are_refused_or_planned() {
    let settings = Settings::default().with(|s| {
        (s.data.step_tokens, s.schedule.max_steps, s.fit.tokens) = (Some(1000), Some(10), Some(1000));
        s.stages = Stage::only([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)]);
        s.data.group_by_length = true;
        s.fit.enabled = true;
    });
    let json = serde_json::to_value(&settings).unwrap();
    let mut paths = Vec::new();
    numbers_of(&json, "", &mut paths);
    assert!(paths.len() >= 22 && paths.contains(&"/batch/accumulation_steps".to_string()), "{paths:?}");
    let (lengths, (targets, points), sizes) = ([10; 50], fitted(), eight_billion(false));
    let memory = |settings: &Settings| -> Vec<u64> {
        order::epoch(settings, &lengths, 0);
        StepRange::each(settings, lengths.len(), 27);
        TrialPlan::of(settings, lengths.len(), 27);
        // Rows are never kept, so no number decides whether the models that compute them stay loaded.
        let limits = Limits { cache: Some(0), ..Limits::default() };
        let plan = |on_gpu| planned(settings, &sizes, limits, (&targets, &points, SESSIONS), on_gpu);
        [true, false].map(|on_gpu| plan(on_gpu).memory_bytes).to_vec()
    };
    let least = memory(&settings);
    let largest: Vec<Json> = [1e30, 1e300]
        .map(Json::from)
        .into_iter()
        .chain([u64::from(u32::MAX), 1 << 31, 1 << 40, 1 << 20, i64::MAX as u64, u64::MAX].map(Json::from))
        .collect();
    let smallest = [Json::from(0), Json::from(1), Json::from(-1), Json::from(1e-300)];
    let mut planned_at = Vec::new();
    for (path, value) in paths.iter().flat_map(|path| largest.iter().chain(&smallest).map(move |value| (path, value))) {
        let mut changed = json.clone();
        *changed.pointer_mut(path).unwrap() = value.clone();
        let Ok(settings) = serde_json::from_value::<Settings>(changed) else { continue };
        if let Err(error) = settings.check() {
            let name = path.rsplit('/').find(|part| part.parse::<u32>().is_err()).unwrap();
            assert!(error.to_string().contains(name), "{path} = {value}: {error}");
            continue;
        }
        let found = memory(&settings);
        if largest.contains(value) {
            assert!(found.iter().zip(&least).all(|(found, least)| found >= least), "{path} = {value}: {found:?}");
            planned_at.push((path, value));
        }
    }
    for ((one, value), (other, beside)) in planned_at.iter().flat_map(|a| planned_at.iter().map(move |b| (a, b))) {
        let mut changed = json.clone();
        *changed.pointer_mut(one).unwrap() = (*value).clone();
        *changed.pointer_mut(other).unwrap() = (*beside).clone();
        let Ok(settings) = serde_json::from_value::<Settings>(changed) else { continue };
        if settings.check().is_ok() {
            let found = memory(&settings);
            assert!(found.iter().zip(&least).all(|(found, least)| found >= least), "{one}, {other}: {found:?}");
        }
    }
}

/// Limits of any size plan a run. No limit of tokens makes a plan of less memory than a smaller one.
#[test]
fn limits_of_any_size_are_planned() {
    let of = |limits, on_gpu| {
        planned(&Settings::default(), &eight_billion(false), limits, (&[], &[], Sessions::default()), on_gpu)
    };
    for on_gpu in [true, false] {
        let tokens = [1, 4096, MOST_BATCH_TOKENS, 1 << 63, u64::MAX];
        let memory = tokens.map(|tokens| {
            of(Limits { batch_tokens: Some(tokens), memory: Some(1 << 40), ..Limits::default() }, on_gpu).memory_bytes
        });
        assert!(memory.is_sorted(), "{memory:?}");
        for most in [0, 1, u64::MAX] {
            let limits = Limits { memory: Some(most), cache: Some(most), workers: Some(most), ..Limits::default() };
            let plan = of(limits, on_gpu);
            assert_eq!(plan.fits, Some(most == u64::MAX), "{most}: {}", plan.line());
            assert!(plan.workers >= 1 && plan.threads >= 1);
        }
    }
}

/// 31 answers of one word and one of 300 tokens: the pass that has the long one needs logits of all of it, and no pass has
/// more answers than there are.
#[test]
fn logits_are_counted_for_the_sample_with_the_largest_share_of_answers() {
    let sizes = eight_billion(true);
    let of = |answer_share: f64, answer_tokens: u64| {
        let data = PlannedData {
            samples: 32,
            tokens: 31 * 40 + 400,
            longest_tokens: 400,
            answer_tokens,
            answer_share,
            ..PlannedData::default()
        };
        let plan =
            with_data(data, (&Settings::default(), &sizes, Limits::default()), (&[], &[], Sessions::default()), false);
        let activations = plan.bytes.iter().find(|item| item.what == "activations").unwrap().bytes;
        (plan.batch_tokens, activations)
    };
    let logits = |answers: u64| 16 * answers * sizes.vocabulary;
    let ((tokens, none), (_, ragged), (_, all)) = (of(0.0, 0), of(0.75, 331), of(0.75, 100_000));
    assert!(ragged - none >= logits(300) && ragged - none <= logits(331), "{}", (ragged - none) / logits(1));
    assert_eq!(all - none, logits(tokens * 3 / 4));
}
