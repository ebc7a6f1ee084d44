//! Images that somebody made to do harm: whatever they say, nothing panics, hangs, or grows without bound.

use super::*;

/// Does what a guest does, and takes whatever comes of it.
fn use_image(platter: &Platter) {
    let Ok(image) = open(platter) else {
        return;
    };
    let size = image.size().min(1 << 20);
    for step in 0..8u64 {
        let offset = size / 8 * step / 512 * 512;
        let len = usize::try_from((size - offset).min(3 * 4096)).unwrap();
        let _ = get(&image, offset, len);
        let _ = put(&image, offset, &stamped(step, len / 512 * 512));
        let _ = image.write_zeroes(offset..offset + len as u64, step % 2 == 0);
        let _ = image.discard(offset..offset + len as u64);
        let _ = image.sync();
    }
}

/// An image with all kinds of things in it.
fn full(builder: &Builder) -> Vec<u8> {
    let platter = Platter::new(builder.build());
    let image = open(&platter).unwrap();
    for step in 0..30 {
        put(&image, step * 32768, &stamped(step, 8192)).unwrap();
    }
    image.write_zeroes(0..4096, false).unwrap();
    drop(image);
    platter.bytes()
}

fn mutate(image: &[u8], random: &mut Random) -> Vec<u8> {
    let mut image = image.to_vec();
    for _ in 0..1 + random.below(4) {
        // Tables are at the front, and most of what matters is in eight bytes.
        let area = if random.below(3) == 0 { image.len() } else { 512 };
        let at = random.index(area / 8 - 1) * 8;
        let value = match random.below(6) {
            0 => random.below(1 << 8),
            1 => u64::MAX,
            2 => random.below(64) << 12 | 1 << 63,
            3 => 1 << random.below(64),
            4 => random.below(64) << 9 | 1 << 62,
            _ => random.below(u64::MAX),
        };
        let bytes = if random.below(2) == 0 { 8 } else { 1 };
        image[at..at + bytes].copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    }
    if random.below(8) == 0 {
        image.truncate(random.index(image.len()));
    }
    image
}

#[test]
fn mutated_images_do_no_harm() {
    let mut random = Random::new(4711);
    for (cluster_bits, refcount_order) in [(9, 6), (12, 4), (10, 1)] {
        let good = full(&Builder {
            cluster_bits,
            refcount_order,
            ..Builder::default()
        });
        for _ in 0..700 {
            use_image(&Platter::new(mutate(&good, &mut random)));
        }
    }
}

#[test]
fn an_entry_that_leads_far_away_does_not_make_the_file_grow() {
    let mut image = full(&Builder::default());
    // The first entry of the first L2 table, which the L1 table leads to.
    let l2 = u64::from_be_bytes(image[3 * 4096..3 * 4096 + 8].try_into().unwrap());
    let l2 = usize::try_from(l2 & !(1 << 63)).unwrap();
    image[l2..l2 + 8].copy_from_slice(&(1 << 63 | 1u64 << 40).to_be_bytes());
    let platter = Platter::new(image.clone());
    let opened = open(&platter).unwrap();
    assert_eq!(get(&opened, 0, 4096).unwrap(), vec![0; 4096]);
    assert!(
        put(&opened, 0, &[1; 512])
            .unwrap_err()
            .to_string()
            .contains("far behind its end")
    );
    drop(opened);
    assert_eq!(platter.bytes().len(), image.len());
}

#[test]
fn an_entry_that_leads_to_the_header_cannot_be_written() {
    let mut image = Builder {
        cluster_bits: 9,
        size: 1 << 15,
        ..Builder::default()
    }
    .build();
    // The L1 table leads to itself, and what the guest writes goes where entries lead.
    let l1 = 3 * 512;
    image[l1..l1 + 8].copy_from_slice(&(1 << 63 | l1 as u64).to_be_bytes());
    let platter = Platter::new(image.clone());
    let opened = open(&platter).unwrap();
    let _ = put(&opened, 0, &[0xff; 512]);
    drop(opened);
    assert_eq!(platter.bytes()[..512], image[..512]);
}

#[test]
fn finds_room_behind_clusters_that_all_count_as_used() {
    let mut image = full(&Builder::default());
    // All counts of the only block.
    image[2 * 4096..3 * 4096].fill(0xff);
    let platter = Platter::new(image);
    use_image(&platter);
    // What was written found room behind all that counted as used.
    assert!(platter.bytes().len() > 2048 * 4096);
}
