//! Distribution of a step's samples over several threads. Each thread has its own network; all networks share the same
//! weights.
//!
//! The operations of a step are small. Threads that synchronised after every operation would mostly wait for each
//! other, especially on a busy machine; here they synchronise once per step.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use crate::base::{Result, thread_count};

use super::batches::each_batch;
use super::context::Run;
use super::gradient::{self, Counts};
use super::pool::on_pool;
use crate::finetune::data::{TrainingBatch, TrainingSet};
use crate::finetune::error::torch_error;
use crate::finetune::loss::{LOSSES, LossKind, TeacherOutput};
use crate::finetune::optim::{OptimizedParameter, Optimizer};
use crate::finetune::settings::Settings;
use crate::finetune::student::Student;
use crate::torch::Ranks;

/// Losses and gradients, summed over a step.
#[derive(Debug, Default)]
pub struct StepSums {
    /// Mean of each loss term over the step, without its weight.
    pub losses: BTreeMap<LossKind, f64>,
    /// Gradients in the order of the network's trained weights, f32 as [`run`] gives them; empty when no sample has an
    /// answer.
    pub gradients: Vec<Tensor>,
}

/// Runs a step's samples through the networks and sums the results, always in the same order. With several processes,
/// sums over all of them.
///
/// Errors: those of [`gradient::pass`], of the first network that failed.
pub fn run(
    students: &mut [Student],
    dataset: &TrainingSet,
    settings: &Settings,
    step: &[Vec<usize>],
    run: &Run<'_>,
) -> Result<StepSums> {
    let device = run.device;
    let samples = || step.iter().flatten().map(|&sample| &dataset.examples[sample]);
    let counts = Counts {
        answer_tokens: samples().map(|example| example.answers as u64).sum(),
        tokens: samples().map(|example| example.length as u64).sum(),
    };
    let length = |sample: usize| dataset.examples[sample].length;
    let mut shares = distribute(own_passes(run, dataset, step, students.len()), length, students.len());
    let results = side_by_side(students, &mut shares, run, |student, share| {
        passes(student, dataset, settings, share, counts, device)
    })?;
    let mut total = StepSums::default();
    let in_f64 = students.first().is_some_and(gradient::sums_in_f64);
    for sums in results {
        total.absorb(sums, in_f64)?;
    }
    if let (Some(ranks), Some(first)) = (run.ranks, students.first()) {
        total.sum_over(ranks, first, in_f64)?;
    }
    total.gradients_in(Kind::Float)?;
    Ok(total)
}

/// Passes of a step that this process computes: all of them, or this process's share.
pub fn own_passes(run: &Run<'_>, dataset: &TrainingSet, step: &[Vec<usize>], networks: usize) -> Vec<Vec<usize>> {
    let length = |sample: usize| dataset.examples[sample].length;
    let passes = cut(step.concat(), length, networks, run.batch_tokens);
    match run.ranks {
        Some(ranks) => {
            let mut parts = distribute(passes, length, ranks.size());
            parts.get_mut(ranks.rank()).map(std::mem::take).unwrap_or_default()
        }
        None => passes,
    }
}

/// Runs `work` on each network with its share, in parallel, and returns the results in the order of the networks. On a
/// GPU there is one network, and `work` runs on the calling thread.
///
/// Errors: `Error::Engine` when the threads cannot be created; the first error of `work`.
pub fn side_by_side<S: Send, R: Send>(
    students: &mut [Student],
    shares: &mut [S],
    run: &Run<'_>,
    work: impl Fn(&Student, &mut S) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if run.device != Device::Cpu {
        return students.iter().zip(shares).map(|(student, share)| work(student, share)).collect();
    }
    let work = &work;
    let tasks = students.iter_mut().zip(shares).map(|(student, share)| move || work(student, share));
    on_pool(run.threads, tasks)
}

fn passes(
    student: &Student,
    dataset: &TrainingSet,
    settings: &Settings,
    batches: &[Vec<usize>],
    counts: Counts,
    device: Device,
) -> Result<StepSums> {
    // Loss terms are summed on the device and read once, because each read makes the host wait for the GPU.
    let mut terms: BTreeMap<LossKind, Tensor> = BTreeMap::new();
    let mut total = StepSums::default();
    let one = |_: &[usize], batch: &TrainingBatch| -> Result<()> {
        if batch.answer_tokens == 0 {
            return Ok(());
        }
        for (kind, term) in gradient::pass(student, batch, settings, counts, &mut total.gradients)? {
            let term = term.f_to_kind(Kind::Double).map_err(torch_error("the loss"))?;
            let sum = match terms.remove(&kind) {
                Some(sum) => sum.f_add(&term).map_err(torch_error("the loss"))?,
                None => term,
            };
            terms.insert(kind, sum);
        }
        Ok(())
    };
    let feeds = student.feeds();
    let (layers, answers) = (student.layers_compared(settings), settings.reads(TeacherOutput::Logits));
    each_batch(batches, device, |samples| dataset.batch_with(samples, feeds, layers.clone(), answers), one)?;
    if !terms.is_empty() {
        let sums: Vec<&Tensor> = terms.values().collect();
        let read = || Vec::<f64>::try_from(Tensor::f_stack(&sums, 0)?.f_to_device(Device::Cpu)?);
        total.losses = terms.keys().copied().zip(read().map_err(torch_error("the loss"))?).collect();
    }
    Ok(total)
}

impl StepSums {
    /// Adds the sums of the other processes. A process without answers contributes zeros.
    fn sum_over(&mut self, ranks: &Ranks, student: &Student, in_f64: bool) -> Result<()> {
        let kinds: Vec<LossKind> = LOSSES.iter().map(|row| row.kind).collect();
        let mut numbers: Vec<f64> = vec![f64::from(u8::from(!self.gradients.is_empty()))];
        for kind in &kinds {
            let value = self.losses.get(kind);
            numbers.extend([f64::from(u8::from(value.is_some())), value.copied().unwrap_or(0.0)]);
        }
        let numbers = Tensor::from_slice(&numbers);
        ranks.sum(std::slice::from_ref(&numbers))?;
        let numbers = Vec::<f64>::try_from(&numbers).map_err(torch_error("the losses of all ranks"))?;
        let pairs = kinds.iter().zip(numbers[1..].chunks_exact(2));
        self.losses = pairs.filter(|(_, pair)| pair[0] > 0.0).map(|(&kind, pair)| (kind, pair[1])).collect();
        if numbers[0] == 0.0 {
            return Ok(());
        }
        if self.gradients.is_empty() {
            let zeros = student.weights_now().map(|weight| weight.tensor.f_detach()?.f_zeros_like());
            self.gradients = zeros.collect::<Result<_, _>>().map_err(torch_error("the gradients of all ranks"))?;
        }
        if in_f64 {
            self.gradients_in(Kind::Double)?;
        }
        ranks.sum(&self.gradients)
    }

    /// Converts the gradients, one after the other.
    fn gradients_in(&mut self, kind: Kind) -> Result<()> {
        for gradient in self.gradients.iter_mut().filter(|gradient| gradient.kind() != kind) {
            *gradient = gradient.f_to_kind(kind).map_err(torch_error("gradient accumulation"))?;
        }
        Ok(())
    }

    fn absorb(&mut self, other: StepSums, in_f64: bool) -> Result<()> {
        for (kind, value) in other.losses {
            *self.losses.entry(kind).or_default() += value;
        }
        if self.gradients.is_empty() {
            self.gradients = other.gradients;
            return Ok(());
        }
        for (sum, own) in self.gradients.iter_mut().zip(&other.gradients) {
            gradient::add_to(sum, own, in_f64)?;
        }
        Ok(())
    }
}

/// Cuts samples into forward passes of at most `batch_tokens` tokens and distributes them over at most `workers`
/// networks.
pub fn passes_by_worker(
    dataset: &TrainingSet,
    samples: Vec<usize>,
    workers: usize,
    batch_tokens: usize,
) -> Vec<Vec<Vec<usize>>> {
    let length = |sample: usize| dataset.examples[sample].length;
    distribute(cut(samples, length, workers, batch_tokens), length, workers)
}

/// Cuts samples into forward passes of at most `batch_tokens` tokens, padding included, longest samples first; a longer
/// sample forms a pass of its own. The number of passes is at most the smallest multiple of `workers`, the networks of one
/// process, for which that is possible, and the largest of them is as small as this number allows. Several processes make
/// the same cut and distribute the passes, so the passes do not depend on the number of processes.
fn cut(
    mut samples: Vec<usize>,
    length: impl Fn(usize) -> usize,
    workers: usize,
    batch_tokens: usize,
) -> Vec<Vec<usize>> {
    samples.sort_by_key(|&sample| std::cmp::Reverse(length(sample)));
    let lengths: Vec<usize> = samples.iter().map(|&sample| length(sample).max(1)).collect();
    let workers = workers.clamp(1, samples.len().max(1));
    let count = cuts(&lengths, batch_tokens).len().next_multiple_of(workers);
    // Binary search for the smallest pass size that needs at most `count` passes.
    let longest = lengths.first().copied().unwrap_or(1);
    let (mut low, mut high) = (longest.min(batch_tokens), batch_tokens);
    while low < high {
        let middle = low + (high - low) / 2;
        if cuts(&lengths, middle).len() <= count { high = middle } else { low = middle + 1 }
    }
    split(&samples, cuts(&lengths, low))
}

/// Distributes passes, longest first, so that at most `workers` shares have about the same work. Empty shares are
/// always the last ones and are removed.
fn distribute(passes: Vec<Vec<usize>>, length: impl Fn(usize) -> usize, workers: usize) -> Vec<Vec<Vec<usize>>> {
    let mut shares: Vec<(usize, Vec<Vec<usize>>)> = vec![(0, Vec::new()); workers.max(1)];
    for pass in passes {
        let longest = pass.iter().map(|&sample| length(sample).max(1)).max().unwrap_or(1);
        if let Some(share) = shares.iter_mut().min_by_key(|share| share.0) {
            share.0 += longest * pass.len();
            share.1.push(pass);
        }
    }
    shares.into_iter().map(|share| share.1).filter(|passes| !passes.is_empty()).collect()
}

/// Cuts samples into passes of at most `tokens` tokens, padding included, longest samples first. A longer sample forms
/// a pass of its own.
pub fn passes_of(dataset: &TrainingSet, mut samples: Vec<usize>, tokens: usize) -> Vec<Vec<usize>> {
    samples.sort_by_key(|&sample| std::cmp::Reverse(dataset.examples[sample].length));
    let lengths: Vec<usize> = samples.iter().map(|&sample| dataset.examples[sample].length.max(1)).collect();
    split(&samples, cuts(&lengths, tokens))
}

/// Splits samples into runs of these sizes.
fn split(mut samples: &[usize], sizes: Vec<usize>) -> Vec<Vec<usize>> {
    let runs = sizes.into_iter().map(|size| {
        let (run, rest) = samples.split_at(size);
        samples = rest;
        run.to_vec()
    });
    runs.collect()
}

/// Cuts `lengths`, which are descending, into runs whose padded size is at most `limit` tokens. Returns the number of
/// samples of each run.
fn cuts(lengths: &[usize], limit: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = Vec::new();
    let mut longest = 0;
    for &length in lengths {
        match sizes.last_mut() {
            Some(size) if (*size + 1).saturating_mul(longest) <= limit => *size += 1,
            _ => {
                longest = length;
                sizes.push(1);
            }
        }
    }
    sizes
}

/// Makes one optimiser step; parameters are distributed over threads.
///
/// Errors: those of [`Optimizer::step`].
pub fn optimize(
    optimizer: &Optimizer,
    parameters: &mut [OptimizedParameter],
    gradients: Vec<Tensor>,
    step: u64,
    learning_rate: f64,
    device: Device,
) -> Result<()> {
    let mut pairs: Vec<_> = parameters.iter_mut().zip(gradients).collect();
    if device != Device::Cpu {
        let mut pairs = pairs.into_iter();
        return pairs.try_for_each(|(parameter, gradient)| optimizer.step(parameter, &gradient, step, learning_rate));
    }
    pairs.sort_by_key(|(parameter, _)| std::cmp::Reverse(parameter.work()));
    let mut groups: Vec<(usize, Vec<_>)> = (0..thread_count()).map(|_| (0, Vec::new())).collect();
    for pair in pairs {
        if let Some((work, group)) = groups.iter_mut().min_by_key(|(work, _)| *work) {
            *work += pair.0.work();
            group.push(pair);
        }
    }
    let tasks = groups.into_iter().map(|(_, group)| {
        move || {
            let mut group = group.into_iter();
            group.try_for_each(|(parameter, gradient)| optimizer.step(parameter, &gradient, step, learning_rate))
        }
    });
    on_pool(1, tasks).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::optim::OptimizerKind;

    #[test]
    fn every_sample_is_in_one_pass_of_one_worker() {
        let lengths: Vec<usize> = (0..37).map(|i| 1 + (i * 29) % 71).collect();
        for workers in 1..6 {
            let length = |sample: usize| lengths[sample];
            let shares = distribute(cut((0..37).collect(), length, workers, 512), length, workers);
            assert_eq!(shares.len(), workers);
            let mut seen: Vec<usize> = shares.concat().concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..37).collect::<Vec<_>>());
            let work = |share: &Vec<Vec<usize>>| -> usize {
                share.iter().map(|pass| pass.len() * pass.iter().map(|&s| lengths[s]).max().unwrap()).sum()
            };
            let most = shares.iter().map(work).max().unwrap();
            assert!(most * workers < 2 * lengths.iter().sum::<usize>(), "{workers} workers: {most}");
        }
    }

    /// For any number of processes the passes are those of one process, and each pass has one process.
    #[test]
    fn the_passes_of_a_step_are_divided_among_processes() {
        let lengths: Vec<usize> = (0..37).map(|i| 1 + (i * 29) % 71).collect();
        let length = |sample: usize| lengths[sample];
        let passes = cut((0..37).collect(), length, 2, 128);
        let work = |passes: &[Vec<usize>]| -> usize { passes.iter().map(|pass| pass.len() * length(pass[0])).sum() };
        for size in 1..5 {
            let parts = distribute(passes.clone(), length, size);
            let mut seen = parts.concat();
            seen.sort_by_key(|pass| passes.iter().position(|other| other == pass));
            assert_eq!(seen, passes);
            let tokens: Vec<usize> = parts.iter().map(|part| work(part)).collect();
            assert!(tokens.iter().max().unwrap() - tokens.iter().min().unwrap() <= 128, "{tokens:?}");
        }
        assert_eq!(distribute(vec![vec![7]], |_| 5, 2).len(), 1);
    }

    #[test]
    fn long_steps_are_cut_into_passes_of_a_bounded_size() {
        let shares = distribute(cut((0..64).collect(), |_| 256, 2, 512), |_| 256, 2);
        assert_eq!(shares.iter().map(Vec::len).collect::<Vec<_>>(), [16, 16]);
        assert!(shares.concat().iter().all(|pass| pass.len() * 256 == 512));
    }

    /// Lengths that leave much padding or room in a pass. The number of passes is the smallest one that is fair to the
    /// networks.
    #[test]
    fn no_pass_exceeds_the_limit_but_for_a_longer_sample() {
        type Length<'a> = &'a dyn Fn(usize) -> usize;
        let ragged = |step: usize, least: usize| move |sample: usize| least + (sample * step) % (1025 - least);
        let cases: [(Length<'_>, usize, usize, usize); 7] = [
            (&ragged(47, 900), 1024, 1, 32),
            (&ragged(47, 900), 1024, 4, 32),
            (&|_| 460, 512, 1, 32),
            (&|_| 460, 512, 3, 33),
            (&|_| 200, 512, 2, 16),
            (&ragged(331, 1), 1024, 2, 22),
            // One longer sample does not make room for others.
            (&|sample| if sample == 5 { 2000 } else { 300 }, 1000, 2, 12),
        ];
        for (number, (length, batch_tokens, workers, want)) in cases.into_iter().enumerate() {
            let passes = cut((0..32).collect(), length, workers, batch_tokens);
            let padded = |pass: &Vec<usize>| pass.len() * pass.iter().map(|&sample| length(sample)).max().unwrap();
            let too_large = passes.iter().filter(|pass| pass.len() > 1 && padded(pass) > batch_tokens);
            assert_eq!(too_large.count(), 0, "case {number}: {passes:?}");
            assert!(passes.len() <= want && passes.len() + workers > want, "case {number}: {} passes", passes.len());
        }
    }

    #[test]
    fn fewer_samples_than_workers_leave_workers_idle() {
        assert_eq!(distribute(cut(vec![7], |_| 5000, 4, 512), |_| 5000, 4), [[[7]]]);
        assert!(distribute(cut(Vec::new(), |_| 1, 4, 512), |_| 1, 4).is_empty());
    }

    /// However passes are divided among networks and processes. In f32 the order matters.
    #[test]
    fn gradients_sum_to_the_same_bits_in_any_order() {
        let numbers = Tensor::arange(5000, (Kind::Float, Device::Cpu));
        let passes: Vec<Tensor> = (1..9).map(|n| (&numbers * (0.37 * f64::from(n))).sin() / f64::from(n)).collect();
        let total = |shares: &[&[usize]], in_f64: bool| -> Tensor {
            let sum_of = |parts: Vec<StepSums>| {
                let mut sum = StepSums::default();
                parts.into_iter().for_each(|part| sum.absorb(part, in_f64).unwrap());
                sum
            };
            let pass = |&pass: &usize| StepSums { gradients: vec![passes[pass].copy()], ..StepSums::default() };
            let mut sum = sum_of(shares.iter().map(|share| sum_of(share.iter().map(pass).collect())).collect());
            sum.gradients_in(Kind::Float).unwrap();
            sum.gradients.remove(0)
        };
        let orders: [&[&[usize]]; 3] =
            [&[&[0, 1, 2, 3, 4, 5, 6, 7]], &[&[0, 2, 4, 6], &[1, 3, 5, 7]], &[&[7], &[6, 1], &[5, 4, 3], &[2, 0]]];
        let all = |in_f64| orders.map(|shares| total(shares, in_f64));
        let (exact, rounded) = (all(true), all(false));
        assert!(exact.iter().all(|sum| sum.kind() == Kind::Float && sum.equal(&exact[0])));
        assert!(!rounded[1].equal(&rounded[0]) && rounded[1].allclose(&exact[0], 1e-5, 1e-6, false));
    }

    #[test]
    fn dividing_parameters_among_threads_changes_no_bit() {
        let values =
            |size: &[i64]| Tensor::arange(size.iter().product::<i64>(), (Kind::Float, Device::Cpu)).sin().view(size);
        let sizes: [&[i64]; 5] = [&[3], &[20, 50], &[1], &[7, 11], &[2, 9, 4]];
        for kind in [OptimizerKind::AdamW, OptimizerKind::Muon] {
            let optimizer = Optimizer::new(Settings::default().with(|s| s.optimizer.weight_decay = 0.1).constants());
            let make = || -> Vec<OptimizedParameter> {
                sizes.iter().map(|size| OptimizedParameter::new("w", values(size), kind).unwrap()).collect()
            };
            let gradients = || -> Vec<Tensor> { sizes.iter().map(|size| values(size).cos()).collect() };
            let (mut alone, mut distribute) = (make(), make());
            for (parameter, gradient) in alone.iter_mut().zip(gradients()) {
                optimizer.step(parameter, &gradient, 1, 0.01).unwrap();
            }
            optimize(&optimizer, &mut distribute, gradients(), 1, 0.01, Device::Cpu).unwrap();
            for ((a, b), size) in alone.iter().zip(&distribute).zip(sizes) {
                assert!(a.tensors().zip(b.tensors()).all(|(a, b)| a.1.detach().equal(&b.1.detach())), "{kind:?}");
                assert!(!a.value.detach().equal(&values(size)));
            }
        }
    }
}
