//! Low-rank adapters (LoRA) in the files of the `peft` library: differences `scale * B A` for matrices of a base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::ArrayView2;
use serde_json::Value;

use crate::base::{Error, Result, Sha256Digest, list_preview, sha256_large_file};
use crate::ir::Tensor;

use super::{ADAPTER_CONFIG, Checkpoint, floats, from_floats};

const WEIGHTS: &str = "adapter_model.safetensors";
/// What `peft` puts before the names of the base.
const PREFIX: &str = "base_model.model.";
/// Settings of an adapter that change what is computed, each with the only value under which the difference is `B A`.
const PLAIN: &[(&str, &[&str])] = &[
    ("use_dora", &["false", "null"]),
    ("peft_type", &["\"LORA\""]),
    ("bias", &["\"none\"", "null"]),
    ("lora_bias", &["false", "null"]),
    ("alora_invocation_tokens", &["null"]),
    ("target_parameters", &["null", "[]"]),
    ("trainable_token_indices", &["null"]),
    ("use_qalora", &["false", "null"]),
    ("use_bdlora", &["false", "null"]),
    ("arrow_config", &["null"]),
    ("monteclora_config", &["null"]),
    ("velora_config", &["null"]),
    ("kasa_config", &["null"]),
    ("layer_replication", &["null"]),
];

/// Differences of some tensors of a base.
#[derive(Debug)]
pub struct Adapter {
    weights: PathBuf,
    /// By the name of the base's tensor.
    changes: BTreeMap<String, Change>,
}

#[derive(Debug)]
enum Change {
    /// `base + scale * B A`.
    LowRank { a: Tensor, b: Tensor, scale: f64, transposed: bool },
    /// The tensor itself (`modules_to_save`).
    Replaced(Tensor),
}

impl Adapter {
    /// Opens an adapter's folder and finds the base's tensor for each difference.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when settings or weights are malformed, or a tensor is not the base's;
    /// `Error::Unsupported` for adapters whose difference is not `scale * B A`.
    pub fn open(path: &Path, base: &Checkpoint) -> Result<Self> {
        let config = path.join(ADAPTER_CONFIG);
        let text = fs::read(&config).map_err(|e| Error::io("read", &config, e))?;
        let subject = || format!("`{}`", config.display());
        let settings: Value = serde_json::from_slice(&text)
            .map_err(|e| Error::invalid(subject(), format!("is not JSON: {e}")).remedy("save the adapter again"))?;
        for (key, plain) in PLAIN {
            let value = settings.get(*key).map_or_else(|| "null".to_string(), Value::to_string);
            if settings.get(*key).is_some() && !plain.contains(&value.as_str()) {
                return Err(Error::unsupported(
                    subject(),
                    format!("`{key}` is {value}, and only plain LoRA is merged"),
                )
                .remedy("merge it with `merge_and_unload()`, and give the merged checkpoint"));
            }
        }
        let weights = path.join(WEIGHTS);
        let mut tensors = Checkpoint::open(&weights)?.tensors;
        let mut changes = BTreeMap::new();
        let names: Vec<String> = tensors.keys().cloned().collect();
        let mut unknown = Vec::new();
        for name in &names {
            let Some(tensor) = tensors.get(name).cloned() else { continue };
            let stem = name.strip_prefix(PREFIX).unwrap_or(name);
            if let Some(module) = stem.strip_suffix(".lora_A.weight") {
                let Some(b) = tensors.remove(&name.replace(".lora_A.", ".lora_B.")) else {
                    return Err(Error::invalid(subject(), format!("`{name}` has no `lora_B` beside it"))
                        .remedy("save the adapter again"));
                };
                let target = target(base, &format!("{module}.weight"))?;
                let scale = scale(&settings, module, subject)?;
                let transposed = settings.get("fan_in_fan_out").and_then(Value::as_bool).unwrap_or(false);
                changes.insert(target, Change::LowRank { a: tensor, b, scale, transposed });
            } else if stem.contains(".lora_") {
                // The `lora_B` of a pair is taken out with its `lora_A`, which comes first.
                unknown.push(name.clone());
            } else {
                let stem = stem.replace(".modules_to_save.default.", ".").replace(".original_module.", ".");
                changes.insert(target(base, &stem)?, Change::Replaced(tensor));
            }
        }
        if !unknown.is_empty() {
            let problem = format!("only matrices are merged; found {}", list_preview(&unknown, 4));
            return Err(Error::unsupported(format!("`{}`", weights.display()), problem)
                .remedy("merge it with `merge_and_unload()`, and give the merged checkpoint"));
        }
        let adapter = Adapter { weights, changes };
        adapter.check_shapes(base)?;
        Ok(adapter)
    }

    /// Names of the base's tensors that it changes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.changes.keys().map(String::as_str)
    }

    /// One digest over its weights.
    ///
    /// Errors: `Error::Io` when the file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        sha256_large_file(&self.weights)
    }

    /// A tensor of the base with its difference added in f32, rounded to the base's element type, in row-major order.
    ///
    /// Errors: `Error::Invalid` when it is not of floating-point numbers.
    pub fn merged(&self, name: &str, base: &Tensor) -> Result<Vec<f32>> {
        let (a, b, scale, transposed) = match self.changes.get(name) {
            None => return floats(base),
            Some(Change::Replaced(tensor)) => return floats(tensor),
            Some(Change::LowRank { a, b, scale, transposed }) => (a, b, *scale as f32, *transposed),
        };
        let mut sum = floats(base)?;
        let (left, right) = (floats(b)?, floats(a)?);
        let wrong = |_| Error::invalid(format!("the adapter of `{name}`"), "its matrices do not fit each other");
        let left = ArrayView2::from_shape((b.dims[0] as usize, b.dims[1] as usize), &left).map_err(wrong)?;
        let right = ArrayView2::from_shape((a.dims[0] as usize, a.dims[1] as usize), &right).map_err(wrong)?;
        let product = left.dot(&right);
        let product = if transposed { product.reversed_axes() } else { product };
        for (number, difference) in sum.iter_mut().zip(product.iter()) {
            *number += scale * difference;
        }
        let rounded = Tensor::from_bytes(base.dtype, &base.dims, from_floats(base.dtype, &sum)?);
        floats(&rounded)
    }

    fn check_shapes(&self, base: &Checkpoint) -> Result<()> {
        for (name, change) in &self.changes {
            let Some(tensor) = base.tensors.get(name) else { continue };
            let found = match change {
                Change::Replaced(other) => other.dims.clone(),
                Change::LowRank { a, b, transposed, .. } => match (a.dims.as_slice(), b.dims.as_slice()) {
                    ([rank, input], [output, other]) if rank == other => {
                        if *transposed {
                            vec![*input, *output]
                        } else {
                            vec![*output, *input]
                        }
                    }
                    _ => Vec::new(),
                },
            };
            if found != tensor.dims || !tensor.dtype.is_float() {
                let problem =
                    format!("changes `{name}` as if its shape were {found:?}, the base's is {:?}", tensor.dims);
                return Err(Error::invalid(format!("`{}`", self.weights.display()), problem)
                    .remedy("give the base that the adapter was trained on"));
            }
        }
        Ok(())
    }
}

/// The base's tensor for a name of the adapter: the same, or the only one that ends in it or that it ends in, since
/// classes put prefixes of their own before the names of a checkpoint.
fn target(base: &Checkpoint, name: &str) -> Result<String> {
    // `peft` puts the wrapped layer below `base_layer`.
    let name = name.replace(".base_layer.", ".");
    if base.tensors.contains_key(&name) {
        return Ok(name);
    }
    let ends = |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
    let found: Vec<&String> = base.tensors.keys().filter(|key| ends(key, &name) || ends(&name, key)).collect();
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        found => {
            let problem = match found.len() {
                0 => "no tensor of the base has that name".to_string(),
                _ => format!("several tensors of the base could be meant: {}", list_preview(found, 4)),
            };
            Err(Error::invalid(format!("the adapter's `{name}`"), problem)
                .remedy("give the base that the adapter was trained on, or the merged checkpoint"))
        }
    }
}

/// `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`; per-module patterns win.
///
/// Source: arXiv:2106.09685 section 4.1; arXiv:2312.03732.
fn scale(settings: &Value, module: &str, subject: impl Fn() -> String) -> Result<f64> {
    let of = |key: &str, pattern: &str| {
        let patterns = settings.get(pattern).and_then(Value::as_object);
        let special =
            patterns.into_iter().flatten().find(|(name, _)| module == *name || module.ends_with(&format!(".{name}")));
        special
            .map(|(_, value)| value)
            .or_else(|| settings.get(key))
            .and_then(Value::as_f64)
            .ok_or_else(|| Error::invalid(subject(), format!("`{key}` is missing")).remedy("save the adapter again"))
    };
    let (rank, alpha) = (of("r", "rank_pattern")?, of("lora_alpha", "alpha_pattern")?);
    if !(rank >= 1.0 && alpha.is_finite()) {
        return Err(Error::invalid(subject(), format!("`r` is {rank} and `lora_alpha` {alpha}"))
            .remedy("save the adapter again"));
    }
    let root = settings.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Ok(alpha / if root { rank.sqrt() } else { rank })
}
