//! Strategies: they select the layers to drop and the neighbours to finetune. One row of [`STRATEGIES`] each.

mod greedy;
mod interlace;
mod published;
mod request;
#[cfg(test)]
mod tests;
mod tiling;

pub use request::{Group, MeasureLosses, SelectionRequest};

use crate::base::{Error, Result};

use super::plan::Part;

/// A row of the table of strategies.
pub struct Strategy {
    /// Value of `--strategy`, recorded in plans.
    pub name: &'static str,
    /// One line for help texts and documents.
    pub summary: &'static str,
    /// Pack sizes whose similarities it reads when it drops `count` layers.
    pub packs: fn(count: usize) -> Vec<usize>,
    /// What of a layer it drops.
    pub drops: Part,
    /// The losses that it measures by `SelectionRequest::measure`.
    pub measures: Measures,
    /// True when it uses `SelectionRequest::seed`.
    pub seeded: bool,
    /// True when it reads `SelectionRequest::as_released`.
    pub released_differs: bool,
    /// True when it reads `SelectionRequest::beyond_structure`.
    pub goes_beyond: bool,
    /// Chooses groups that drop `count` layers in all, or fewer where it finds no more, which `Strategy::select` makes an
    /// error. A layer has one role; only layers below `usable` whose removal is not refused are dropped.
    select: fn(&mut SelectionRequest) -> Result<Vec<Group>>,
}

/// What a strategy measures for each candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measures {
    /// It uses similarities alone, or nothing.
    Nothing,
    /// The loss without the layer.
    Loss,
    /// The loss without the layer after a closed-form fit.
    HealedLoss,
}

/// The strategy where none is named. It needs nothing but scores, and ends at a lower loss than `interlace` on the networks that
/// were measured (docs/results/choosing-layers.md, docs/results/language-models.md).
pub const DEFAULT_STRATEGY: &str = "shortgpt";

/// All strategies.
pub const STRATEGIES: &[Strategy] = &[
    Strategy {
        name: "interlace",
        summary: "triplets by sim_3: of the first two layers drop the one with the higher sim_1, finetune the other, \
                  freeze the third",
        packs: |_| vec![1, 2, 3],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: false,
        goes_beyond: true,
        select: interlace::interlace,
    },
    Strategy {
        name: "interlace-oa",
        summary: "triplets by sim_3 in their given order: always drop the first layer, finetune the second",
        packs: |_| vec![3],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: false,
        goes_beyond: true,
        select: interlace::order_as_is,
    },
    Strategy {
        name: "interlace-tn",
        summary: "single layers by sim_1: drop the layer, finetune the next",
        packs: |_| vec![1],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: true,
        goes_beyond: true,
        select: interlace::with_next_layer,
    },
    Strategy {
        name: "interlace-loss",
        summary: "greedy by measured loss under the same structure: again and again the layer whose removal raises it \
                  least, never two neighbours, each beside one that is finetuned and, where there is room, a frozen one",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::Loss,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: |request| greedy::interlace_loss(request, "interlace-loss"),
    },
    Strategy {
        name: "interlace-heal",
        summary: "the same greedy choice by the loss after a fit: a linear map, folded into the layer before each gap, first \
                  makes up for what is gone (arXiv:2505.02819)",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::HealedLoss,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: |request| greedy::interlace_loss(request, "interlace-heal"),
    },
    Strategy {
        name: "consecutive",
        summary: "one block from the layer with the best sim_1, finetune as many layers after it",
        packs: |_| vec![1],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: true,
        goes_beyond: false,
        select: interlace::consecutive,
    },
    Strategy {
        name: "random",
        summary: "layers drawn at random with a seed, finetune as many others drawn the same way",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: true,
        released_differs: true,
        goes_beyond: false,
        select: interlace::random,
    },
    Strategy {
        name: "shortgpt",
        summary: "layers of the least Block Influence, 1 - sim_1 (arXiv:2403.03853), finetune their neighbours",
        packs: |_| vec![1],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: published::shortgpt,
    },
    Strategy {
        name: "angular",
        summary: "the block of the least angular distance across it (arXiv:2403.17887), finetune the layers after it",
        packs: |count| vec![count],
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: published::angular,
    },
    Strategy {
        name: "sleb",
        summary: "greedy: again and again the layer whose removal hurts the measured loss least (arXiv:2402.09025), \
                  finetune their neighbours",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::Loss,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: |request| greedy::sleb(request, "sleb"),
    },
    Strategy {
        name: "sleb-heal",
        summary: "as sleb, by the loss after that fit",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::HealedLoss,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: |request| greedy::sleb(request, "sleb-heal"),
    },
    Strategy {
        name: "finercut",
        summary: "as sleb, with the MLPs of layers as candidates: attention, caches and configs stay (arXiv:2405.18218)",
        packs: |_| Vec::new(),
        drops: Part::Mlp,
        measures: Measures::Loss,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: |request| greedy::sleb(request, "finercut"),
    },
    Strategy {
        name: "explicit",
        summary: "the layers that you name, finetune their neighbours",
        packs: |_| Vec::new(),
        drops: Part::Layer,
        measures: Measures::Nothing,
        seeded: false,
        released_differs: false,
        goes_beyond: false,
        select: published::explicit,
    },
];

impl Strategy {
    /// The row with this name.
    ///
    /// Errors: `Error::Invalid` listing the known names.
    pub fn named(name: &str) -> Result<&'static Strategy> {
        STRATEGIES.iter().find(|strategy| strategy.name == name).ok_or_else(|| {
            let names: Vec<_> = STRATEGIES.iter().map(|strategy| strategy.name).collect();
            Error::invalid(format!("strategy `{name}`"), "does not exist")
                .remedy(format!("use one of {}", names.join(", ")))
        })
    }

    /// Selects `request.count` layers to drop and the layers to finetune. Only the user's own list may contain a layer
    /// that cannot be dropped alone.
    ///
    /// Errors: `Error::Invalid` when the count is zero or too large (naming the largest possible count and the layers
    /// that cannot be dropped), when a similarity is missing or has the wrong length, or when the strategy needs losses
    /// and they cannot be measured.
    pub fn select(&self, request: &mut SelectionRequest) -> Result<Vec<Group>> {
        if request.count == 0 {
            return Err(Error::invalid("number of layers to drop", "is 0")
                .remedy(format!("ask for at least one of the {} layers", request.num_layers)));
        }
        if request.count > request.usable() {
            return Err(self.too_many(request, request.usable()));
        }
        self.check_options(request)?;
        let mut sizes = (self.packs)(request.count);
        if request.beyond_structure {
            sizes.extend([1, 2].iter().filter(|size| !(self.packs)(request.count).contains(size)));
        }
        for size in sizes {
            let Some(values) = request.similarities.get(&size) else {
                return Err(Error::invalid(
                    format!("strategy `{}`", self.name),
                    format!("needs sim_{size}, which was not scored"),
                )
                .remedy(format!("score again with `--packs 1,2,3,{size}`")));
            };
            let want = request.starts(size);
            if values.len() < want {
                return Err(Error::invalid(
                    format!("sim_{size}"),
                    format!("has {} values, {want} needed for {} layers", values.len(), request.num_layers),
                )
                .remedy("score again"));
            }
        }
        let groups = (self.select)(request)?;
        let dropped = groups.iter().map(|group| group.drop.len()).sum::<usize>();
        if dropped < request.count {
            return Err(self.too_many(request, dropped));
        }
        Ok(groups)
    }

    /// Errors: `Error::Invalid` for an option that this strategy does not read.
    fn check_options(&self, request: &SelectionRequest) -> Result<()> {
        let reads = |set: bool, row: bool, flag: &str, has: fn(&Strategy) -> bool| {
            if !set || row {
                return Ok(());
            }
            let names: Vec<&str> = STRATEGIES.iter().filter(|row| has(row)).map(|row| row.name).collect();
            Err(Error::invalid(format!("strategy `{}`", self.name), format!("has no `{flag}`"))
                .remedy(format!("use it with one of {}, or leave it out", names.join(", "))))
        };
        let released = |row: &Strategy| row.released_differs;
        reads(request.as_released, self.released_differs, "--as-released", released)?;
        reads(request.beyond_structure, self.goes_beyond, "--beyond-structure", |row| row.goes_beyond)
    }

    fn too_many(&self, request: &SelectionRequest, most: usize) -> Error {
        let mut problem = format!("cannot drop {} of {} layers, {most} at most", request.count, request.num_layers);
        let refused = (0..request.usable()).filter_map(|layer| Some((layer, (request.refusal)(&[layer])?)));
        let (layers, reasons): (Vec<usize>, Vec<String>) = refused.unzip();
        if let Some(reason) = reasons.first() {
            let list: Vec<String> = layers.iter().map(usize::to_string).collect();
            let noun = if layers.len() == 1 { "layer" } else { "layers" };
            problem += &format!(" ({noun} {} cannot be dropped: {reason})", list.join(", "));
        }
        let remedy = match self.goes_beyond && !request.beyond_structure && request.count <= request.usable() {
            true => "ask for fewer, go on with single layers by `--beyond-structure`, or choose another strategy",
            false => "ask for fewer, or choose another strategy",
        };
        Error::invalid(format!("strategy `{}`", self.name), problem).remedy(remedy)
    }
}

/// The number of layers for a drop ratio: `floor(ratio * num_layers)`.
///
/// Errors: `Error::Invalid` unless 0 < ratio < 1, or when the result is 0.
pub fn drop_count(ratio: f64, num_layers: usize) -> Result<usize> {
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(Error::invalid(format!("drop ratio {ratio}"), "must be between 0 and 1, both excluded")
            .remedy("to drop a number of layers use `--drop-count`"));
    }
    // Rounding errors (0.3 * 10 may give 2.9999999999999996) must not reduce a ratio that means
    // a whole number of layers.
    let count = (ratio * num_layers as f64 + 1e-9).floor() as usize;
    if count == 0 {
        return Err(Error::invalid(
            format!("drop ratio {ratio}"),
            format!("of {num_layers} layers is less than one layer, the least is {:.4}", 1.0 / num_layers as f64),
        )
        .remedy("raise the ratio to that, or use `--drop-count`"));
    }
    Ok(count)
}
