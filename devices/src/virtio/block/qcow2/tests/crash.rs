//! A crash at any moment: the image is whole, and what was flushed is there.

use std::io::Write;

use vmm_sys_util::tempfile::TempFile;

use super::*;

const SECTORS: usize = 6144;
/// What all sectors of a backing file say.
const BASE: u64 = 1 << 32;

/// What the guest did, and how much had happened to the disk before and after.
enum Done {
    Write(usize, Range<usize>, u64),
    Flush(usize),
}

/// A disk with a guest that writes, zeroes, discards and flushes; what the guest did.
fn work(platter: &Platter, files: &[String], durable: bool, seed: u64, requests: u64) -> Vec<Done> {
    let image = open_over(platter, files, false, durable).unwrap();
    platter.0.lock().unwrap().log = Some(Vec::new());
    let (mut random, mut done) = (Random::new(seed), Vec::new());
    for stamp in 1..=requests {
        let start = random.index(SECTORS - 100);
        let sectors = start..start + 1 + random.index(90);
        let bytes = sectors.start as u64 * 512..sectors.end as u64 * 512;
        let begin = platter.events();
        match random.below(12) {
            0 => {
                image.write_zeroes(bytes, stamp % 2 == 0).unwrap();
                done.push(Done::Write(begin, sectors, 0));
            }
            1 => {
                image.sync().unwrap();
                done.push(Done::Flush(platter.events()));
            }
            2 => {
                // What is discarded may read as anything, so it is written right after.
                image.discard(bytes.clone()).unwrap();
                put(&image, bytes.start, &stamped(stamp, sectors.len() * 512)).unwrap();
                done.push(Done::Write(begin, sectors.clone(), 0));
                done.push(Done::Write(begin, sectors, stamp));
            }
            _ => {
                put(&image, bytes.start, &stamped(stamp, sectors.len() * 512)).unwrap();
                done.push(Done::Write(begin, sectors, stamp));
            }
        }
        if !durable {
            image.settle().unwrap();
            done.push(Done::Flush(platter.events()));
        }
    }
    done
}

/// The disk after a crash when `count` things had happened. Of what was not synced, any sector may be there or not if
/// the host crashed, and all is if only the process did.
fn after_crash(start: &[u8], log: &[Event], count: usize, host: bool, random: &mut Random) -> Vec<u8> {
    let synced = log[..count]
        .iter()
        .rposition(|event| matches!(event, Event::Sync));
    let mut disk = State {
        bytes: start.to_vec(),
        ..State::default()
    };
    for (index, event) in log[..count].iter().enumerate() {
        let Event::Write(offset, data) = event else {
            continue;
        };
        for (number, sector) in data.chunks(512).enumerate() {
            let safe = !host || synced.is_some_and(|synced| index < synced);
            if safe || random.below(2) == 0 {
                disk.apply(usize::try_from(*offset).unwrap() + number * 512, sector);
            }
        }
    }
    disk.bytes
}

/// What each sector may say when `count` things had happened, if it said `before` at the start.
fn allowed(done: &[Done], count: usize, before: u64) -> Vec<Vec<u64>> {
    let flushed = done
        .iter()
        .rposition(|d| matches!(d, Done::Flush(end) if *end <= count));
    let mut sectors = vec![vec![before]; SECTORS];
    for (index, done) in done.iter().enumerate() {
        match done {
            Done::Write(begin, range, stamp) if *begin <= count => {
                for sector in &mut sectors[range.clone()] {
                    if flushed.is_some_and(|flushed| index < flushed) {
                        sector.clear();
                    }
                    sector.push(*stamp);
                }
            }
            _ => {}
        }
    }
    sectors
}

fn check(disk: Vec<u8>, files: &[String], done: &[Done], count: usize) {
    let report = Report::of(&disk);
    assert_eq!(report.errors, [""; 0], "after {count} events");
    let image = open_over(&Platter::new(disk), files, false, true).unwrap();
    let content = get(&image, 0, SECTORS * 512).unwrap();
    let allowed = allowed(done, count, if files.is_empty() { 0 } else { BASE });
    for (number, (sector, allowed)) in content.chunks(512).zip(allowed).enumerate() {
        let stamp = u64::from_le_bytes(sector[..8].try_into().unwrap());
        assert!(
            sector == stamped(stamp, 512) && allowed.contains(&stamp),
            "after {count} events sector {number} says {stamp}, which is none of {allowed:?}"
        );
    }
}

fn crash_everywhere(builder: &Builder, files: &[String], durable: bool, seed: u64, crashes: usize) {
    let start = builder.build();
    let platter = Platter::new(start.clone());
    let done = work(&platter, files, durable, seed, 90);
    let log = platter.0.lock().unwrap().log.take().unwrap();
    assert!(log.len() > 60);
    let mut random = Random::new(seed + 1);
    for _ in 0..crashes {
        let count = random.index(log.len() + 1);
        check(
            after_crash(&start, &log, count, durable, &mut random),
            files,
            &done,
            count,
        );
    }
}

fn builder(cluster_bits: u32, refcount_order: u32) -> Builder {
    Builder {
        cluster_bits,
        refcount_order,
        size: SECTORS as u64 * 512,
        ..Builder::default()
    }
}

#[test]
fn a_crash_of_the_host_loses_nothing_that_was_flushed() {
    for (seed, cluster_bits, refcount_order) in [(11, 9, 6), (22, 12, 4), (33, 10, 0), (44, 16, 4)] {
        crash_everywhere(&builder(cluster_bits, refcount_order), &[], true, seed, 25);
    }
}

#[test]
fn the_end_of_the_process_loses_nothing_that_was_answered() {
    for (seed, cluster_bits, refcount_order) in [(55, 9, 6), (66, 12, 4)] {
        crash_everywhere(&builder(cluster_bits, refcount_order), &[], false, seed, 15);
    }
}

#[test]
fn a_copy_from_the_backing_file_goes_to_no_place_that_is_not_free_on_disk() {
    let base = TempFile::new().unwrap();
    base.as_file().write_all(&stamped(BASE, SECTORS * 512)).unwrap();
    let files = [base.as_path().to_str().unwrap().to_owned()];
    let builder = Builder {
        backing: Some(("base", Some("raw"))),
        ..builder(12, 4)
    };
    let platter = Platter::new(builder.build());
    let image = open_over(&platter, &files, false, true).unwrap();
    put(&image, 0, &stamped(1, 4096)).unwrap();
    image.sync().unwrap();
    let start = platter.bytes();
    platter.0.lock().unwrap().log = Some(Vec::new());
    image.write_zeroes(0..4096, true).unwrap();
    put(&image, 9 * 512, &stamped(2, 512)).unwrap();
    image.sync().unwrap();
    let log = platter.0.lock().unwrap().log.take().unwrap();
    let done = [
        Done::Write(0, 0..8, 1),
        Done::Flush(0),
        Done::Write(0, 0..8, 0),
        Done::Write(0, 9..10, 2),
    ];
    let mut random = Random::new(77);
    for count in 0..=log.len() {
        for _ in 0..8 {
            let disk = after_crash(&start, &log, count, true, &mut random);
            check(disk, &files, &done, count);
        }
    }
}

#[test]
fn a_second_crash_finds_what_the_first_left() {
    let builder = builder(12, 4);
    let mut random = Random::new(7);
    let mut disk = builder.build();
    for seed in 100..106 {
        let platter = Platter::new(disk.clone());
        work(&platter, &[], true, seed, 40);
        let log = platter.0.lock().unwrap().log.take().unwrap();
        disk = after_crash(&disk, &log, random.index(log.len() + 1), true, &mut random);
        assert_eq!(Report::of(&disk).errors, [""; 0]);
    }
}
