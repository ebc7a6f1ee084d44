//! The set of blocks, against a plain list.

use proptest::prelude::*;

use crate::virtio::mem::blocks::{BlockState, Blocks, Part};

/// Blocks in a slot: more than one word, and no whole number of them.
const PER_SLOT: u32 = 100;
const BLOCKS: usize = 450;

fn state(model: &[bool]) -> BlockState {
    match (
        model.iter().all(|plugged| *plugged),
        model.iter().any(|plugged| *plugged),
    ) {
        (true, _) => BlockState::Plugged,
        (_, true) => BlockState::Mixed,
        _ => BlockState::Unplugged,
    }
}

fn assert_same(blocks: &Blocks, model: &[bool]) {
    let count = model.iter().filter(|plugged| **plugged).count();
    assert_eq!(blocks.plugged(), count as u64);
    let slots: Vec<_> = (0u32..)
        .zip(model.chunks(PER_SLOT as usize))
        .filter(|(_, slot)| slot.contains(&true))
        .map(|(index, _)| index)
        .collect();
    assert_eq!(blocks.slots().collect::<Vec<_>>(), slots);
    let mut from_runs = vec![false; model.len()];
    let mut end = 0;
    for (first, count) in blocks.runs() {
        assert!(count > 0 && (first > end || first == 0), "runs touch");
        end = first + count;
        from_runs[usize::try_from(first).unwrap()..usize::try_from(end).unwrap()].fill(true);
    }
    assert_eq!(from_runs, model);
}

#[test]
fn a_range_is_split_at_slots() {
    let parts: Vec<_> = Blocks::new(PER_SLOT).parts(99..300).collect();
    let part = |slot, blocks| Part { slot, blocks };
    assert_eq!(parts, [part(0, 99..100), part(1, 0..100), part(2, 0..100)]);
}

proptest! {
    #[test]
    fn random_changes_do_what_they_do_to_a_list(changes in prop::collection::vec((0..BLOCKS, 1..200usize), 1..60)) {
        let (mut blocks, mut model) = (Blocks::new(PER_SLOT), vec![false; BLOCKS]);
        for (first, count) in changes {
            let end = (first + count).min(BLOCKS);
            let range = first as u64..end as u64;
            let expected = state(&model[first..end]);
            prop_assert_eq!(blocks.state(range.clone()), expected);
            match expected {
                BlockState::Unplugged => blocks.plug(range),
                BlockState::Plugged => blocks.unplug(range),
                BlockState::Mixed => continue,
            }
            model[first..end].fill(expected == BlockState::Unplugged);
            assert_same(&blocks, &model);
        }
    }
}
