//! Image features and their cache, which lets a vision encoder run once per picture.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::base::Sha256Digest;

use super::projector::Unprojected;

/// Output of a vision encoder for one picture: one row per image token.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    /// Width of a row.
    pub hidden_size: usize,
    /// `[tokens, hidden_size]` in row-major order.
    pub data: Vec<f32>,
    /// DeepStack features by level, `[tokens, hidden_size]` each; empty for encoders without.
    pub deepstack: Vec<Vec<f32>>,
    /// The number of each level in the encoder's output names.
    pub levels: Vec<usize>,
    /// What the projector made `data` from; `None` unless the encoder keeps it.
    pub unprojected: Option<Arc<Unprojected>>,
}

impl Features {
    /// Number of image tokens.
    pub fn tokens(&self) -> usize {
        self.data.len().checked_div(self.hidden_size).unwrap_or(0)
    }

    /// The features of a range of image tokens. Those before the projector are not cut: a part of them has none.
    pub fn part(&self, tokens: Range<usize>) -> Features {
        let cut = |rows: &Vec<f32>| {
            let range = tokens.start * self.hidden_size..tokens.end * self.hidden_size;
            rows.get(range).unwrap_or_default().to_vec()
        };
        let deepstack = self.deepstack.iter().map(cut).collect();
        let unprojected = self.unprojected.clone().filter(|_| tokens == (0..self.tokens()));
        let (hidden_size, levels) = (self.hidden_size, self.levels.clone());
        Features { hidden_size, data: cut(&self.data), deepstack, levels, unprojected }
    }

    fn bytes(&self) -> usize {
        let unprojected = self.unprojected.as_ref().map_or(0, |unprojected| unprojected.data.len());
        let numbers = self.data.len() + self.deepstack.iter().map(Vec::len).sum::<usize>() + unprojected;
        numbers * size_of::<f32>()
    }
}

/// Features of known pictures. Models share a cache if their vision encoders have the same bytes.
#[derive(Debug)]
pub struct FeatureCache {
    limit_bytes: usize,
    state: Mutex<CacheState>,
}

#[derive(Debug, Default)]
struct CacheState {
    features: HashMap<(Sha256Digest, Sha256Digest), Arc<Features>>,
    order: VecDeque<(Sha256Digest, Sha256Digest)>,
    bytes: usize,
}

impl FeatureCache {
    /// A cache that evicts the oldest features beyond `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Arc<Self> {
        Arc::new(FeatureCache { limit_bytes, state: Mutex::default() })
    }

    pub(super) fn get(&self, encoder: &str, picture: &str) -> Option<Arc<Features>> {
        let state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        state.features.get(&(encoder.to_string(), picture.to_string())).cloned()
    }

    pub(super) fn put(&self, encoder: &str, picture: &str, features: &Arc<Features>) {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let key = (encoder.to_string(), picture.to_string());
        if state.features.insert(key.clone(), Arc::clone(features)).is_none() {
            state.order.push_back(key);
            state.bytes += features.bytes();
        }
        while state.bytes > self.limit_bytes {
            let Some(oldest) = state.order.pop_front() else { break };
            if let Some(gone) = state.features.remove(&oldest) {
                state.bytes -= gone.bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(value: f32) -> Arc<Features> {
        let (data, deepstack) = (vec![value; 2], vec![vec![value; 2]]);
        Arc::new(Features { hidden_size: 2, data, deepstack, levels: vec![0], unprojected: None })
    }

    #[test]
    fn the_cache_separates_encoders_and_evicts_the_oldest_entry() {
        let cache = FeatureCache::new(32);
        cache.put("a", "x", &features(1.0));
        cache.put("b", "x", &features(2.0));
        assert_eq!(cache.get("a", "x"), Some(features(1.0)));
        assert_eq!(cache.get("b", "x"), Some(features(2.0)));
        cache.put("a", "y", &features(3.0));
        assert_eq!(cache.get("a", "x"), None);
        assert_eq!(cache.get("b", "x"), Some(features(2.0)));
    }
}
