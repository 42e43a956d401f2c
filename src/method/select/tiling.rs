//! Sets of dropped layers that follow INTERLACE's structure, with the neighbours to finetune.
//!
//! A stack of layers is tiled with pairs (dropped, finetuned) or (finetuned, dropped), anchors after pairs, and frozen
//! layers. Two dropped layers are never adjacent.

use super::request::Group;

/// One piece of a tiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Frozen,
    /// A frozen layer after a pair.
    Anchor,
    /// Dropped, then finetuned.
    DropFirst,
    /// Finetuned, then dropped.
    DropSecond,
}

/// Every piece, its number of layers, and the index of the dropped layer in it.
const PIECES: &[(Piece, usize, Option<usize>)] = &[
    (Piece::Frozen, 1, None),
    (Piece::Anchor, 1, None),
    (Piece::DropFirst, 2, Some(0)),
    (Piece::DropSecond, 2, Some(1)),
];

impl Piece {
    /// True when this piece may follow `before`.
    fn follows(self, before: Option<Piece>) -> bool {
        match self {
            Piece::Anchor => matches!(before, Some(Piece::DropFirst | Piece::DropSecond)),
            Piece::DropFirst => before != Some(Piece::DropSecond),
            Piece::Frozen | Piece::DropSecond => true,
        }
    }
}

/// Criteria for the choice of a tiling, the most important first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Worth {
    drops: usize,
    anchors: usize,
    drop_first: usize,
}

/// A tiling of layers.
#[derive(Clone, Debug, Default)]
pub(super) struct Tiling {
    /// Pieces with their first layer, ascending.
    pieces: Vec<(usize, Piece)>,
    worth: Worth,
}

impl Tiling {
    pub(super) fn drops(&self) -> usize {
        self.worth.drops
    }

    /// One group per pair, ascending.
    pub(super) fn into_groups(self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (start, piece) in self.pieces {
            let (drop, finetune) = match piece {
                Piece::DropFirst => (start, start + 1),
                Piece::DropSecond => (start + 1, start),
                Piece::Anchor => {
                    if let Some(group) = groups.last_mut() {
                        group.anchor = Some(start);
                    }
                    continue;
                }
                Piece::Frozen => continue,
            };
            groups.push(Group { drop: vec![drop], finetune: vec![finetune], anchor: None, score: None });
        }
        groups
    }
}

/// The best tiling of `free.len()` layers that drops all of `dropped`; `None` if there is none. With `more`, the tiling
/// also drops as many layers as possible among those for which `free` is true; without it, the tiling drops exactly
/// `dropped` and has as many anchors as possible.
pub(super) fn tile(free: &[bool], dropped: &[usize], more: bool) -> Option<Tiling> {
    let layers = free.len();
    // For each number of tiled layers, the best tiling that ends with each piece.
    let mut best: Vec<Vec<Tiling>> = vec![Vec::new(); layers + 1];
    best[0].push(Tiling::default());
    for start in 0..layers {
        let before = std::mem::take(&mut best[start]);
        for layout in &before {
            for &(piece, size, drop) in PIECES {
                let fits = start + size <= layers
                    && piece.follows(layout.pieces.last().map(|&(_, piece)| piece))
                    && (0..size).all(|place| match drop == Some(place) {
                        true => (more && free[start + place]) || dropped.contains(&(start + place)),
                        false => !dropped.contains(&(start + place)),
                    });
                if !fits {
                    continue;
                }
                let mut layout = layout.clone();
                layout.pieces.push((start, piece));
                layout.worth.drops += usize::from(drop.is_some());
                layout.worth.anchors += usize::from(piece == Piece::Anchor);
                layout.worth.drop_first += usize::from(piece == Piece::DropFirst);
                let ends = &mut best[start + size];
                match ends.iter_mut().find(|other| other.pieces.last().map(|&(_, piece)| piece) == Some(piece)) {
                    Some(other) if other.worth < layout.worth => *other = layout,
                    Some(_) => {}
                    None => ends.push(layout),
                }
            }
        }
    }
    let mut found = best.pop()?;
    found.sort_by_key(|layout| layout.worth);
    found.pop()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Shape = Vec<(usize, usize, Option<usize>)>;

    fn groups(layers: usize, dropped: &[usize]) -> Option<Shape> {
        let groups = tile(&vec![true; layers], dropped, false)?.into_groups();
        Some(groups.iter().map(|group| (group.drop[0], group.finetune[0], group.anchor)).collect())
    }

    #[test]
    fn every_dropped_layer_gets_a_partner_and_if_possible_an_anchor() {
        assert_eq!(groups(9, &[1, 5]).unwrap(), [(1, 2, Some(3)), (5, 6, Some(7))]);
        // Dropped 3 and 5: the pair (3 4) leaves no anchor before 5; the pair (2 3) lets 4 be an anchor.
        assert_eq!(groups(9, &[3, 5]).unwrap(), [(3, 2, Some(4)), (5, 6, Some(7))]);
        // The last layer has a neighbour on one side only.
        assert_eq!(groups(4, &[0, 3]).unwrap(), [(0, 1, None), (3, 2, None)]);
        assert_eq!(groups(5, &[0, 2, 4]), None);
        assert_eq!(groups(6, &[0, 2, 4]).unwrap(), [(0, 1, None), (2, 3, None), (4, 5, None)]);
        assert_eq!(groups(9, &[3, 4]), None);
    }

    #[test]
    fn the_maximum_number_of_drops_includes_the_layers_already_dropped() {
        let most = |layers, dropped: &[usize]| tile(&vec![true; layers], dropped, true).map(|tiling| tiling.drops());
        assert_eq!(most(15, &[]), Some(7));
        assert_eq!(most(15, &[4]), Some(7));
        // Pairs on both sides of a single frozen layer.
        assert_eq!(most(5, &[2]), Some(2));
        assert_eq!(most(4, &[1, 2]), None);
        // Layers 0 to 4, of which only 1 and 4 are droppable.
        let free = [false, true, false, false, true];
        assert_eq!(tile(&free, &[], true).map(|tiling| tiling.drops()), Some(2));
        assert_eq!(tile(&free[..4], &[], true).map(|tiling| tiling.drops()), Some(1));
    }

    /// Every set of dropped layers in stacks of up to ten layers, compared with an exhaustive search by the definition.
    #[test]
    fn a_set_fits_if_every_dropped_layer_gets_its_own_neighbour() {
        for layers in 2..=10usize {
            for mask in 1u32..1 << layers {
                let dropped: Vec<usize> = (0..layers).filter(|layer| mask >> layer & 1 == 1).collect();
                let apart = dropped.windows(2).all(|pair| pair[1] > pair[0] + 1);
                let partners = (0u32..1 << dropped.len()).any(|sides| {
                    let mut taken = Vec::new();
                    dropped.iter().enumerate().all(|(number, &layer)| {
                        let partner = if sides >> number & 1 == 1 { layer + 1 } else { layer.wrapping_sub(1) };
                        let free = partner < layers && !taken.contains(&partner);
                        taken.push(partner);
                        free
                    })
                });
                assert_eq!(groups(layers, &dropped).is_some(), apart && partners, "{dropped:?} of {layers}");
            }
        }
    }
}
